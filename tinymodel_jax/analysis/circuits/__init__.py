"""Exact circuits: what each feature, logit or attention score is made of.

from tinymodel_jax.analysis import circuits

graph = circuits.attribution_graph(lm, "Once upon a time")
"""

from tinymodel_jax.analysis.circuits.attribution_graph import attribution_graph as attribution_graph
from tinymodel_jax.analysis.circuits.circuit_tracer import save_circuit_tracer as save_circuit_tracer
from tinymodel_jax.analysis.circuits.freeze import frozen_pass as frozen_pass
from tinymodel_jax.analysis.circuits.frozen import FrozenPass as FrozenPass
from tinymodel_jax.analysis.circuits.graph import AttributionGraph as AttributionGraph
from tinymodel_jax.analysis.circuits.node_sets.circuit import Circuit as Circuit
from tinymodel_jax.analysis.circuits.node_sets.circuit import run as run
from tinymodel_jax.analysis.circuits.node_sets.find import CircuitScore as CircuitScore
from tinymodel_jax.analysis.circuits.node_sets.find import find as find
from tinymodel_jax.analysis.circuits.node_sets.find import score as score
from tinymodel_jax.analysis.circuits.qk import qk_attribution as qk_attribution
from tinymodel_jax.analysis.circuits.targets import direction as direction
from tinymodel_jax.analysis.circuits.targets import feature as feature
from tinymodel_jax.analysis.circuits.validity import validity_radius as validity_radius
from tinymodel_jax.analysis.circuits.virtual_weights import virtual_weights as virtual_weights
