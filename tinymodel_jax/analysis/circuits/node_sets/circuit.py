"""A circuit: a set of nodes, and the means by which everything else is replaced when it runs."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tinymodel_jax.analysis.circuits.neurons import NEURONS, neurons, neurons_tag
from tinymodel_jax.analysis.circuits.node_sets.mean_ablation import Gated, LayerMeans
from tinymodel_jax.analysis.circuits.node_sets.nodes import CIRCUIT_NODE, NodeSpace, labels
from tinymodel_jax.analysis.circuits.node_sets.places import OTHER, Aligned, Places, align
from tinymodel_jax.analysis.circuits.stored import stored
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.forward import forward
from tinymodel_jax.model.hook_points import as_names
from tinymodel_jax.runtime.atomic_files import replace_file

_MEANS = tuple(field.name for field in dataclasses.fields(LayerMeans))


@dataclasses.dataclass(frozen=True, eq=False)
class Circuit:
    """A set of nodes that carries a behaviour; `find` makes one.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import circuits
        >>> lm = TinyModel("mini")
        >>> from tinymodel_jax.analysis import logit_difference
        >>> prompts = ["Tim saw Lily. Then", "Lily saw Tim. Then"]
        >>> metric = logit_difference([" Tim", " Lily"], [" Lily", " Tim"])
        >>> circuit = circuits.find(lm, prompts, metric, budget=5)
        >>> circuit.dictionaries, len(circuit.labels)
        (('M0', 'M1', 'M2', 'M3'), 5)
    """

    nodes: np.ndarray
    """Structured array (nodes,) of dtype `CIRCUIT_NODE`, the largest effects first."""
    places: tuple[str, ...]
    """Names of the places; "0", "1", … for prompts of equal length."""
    dictionaries: tuple[str, ...]
    """Tag of each layer's transcoder, or `("neurons",)`."""
    means: tuple[LayerMeans, ...]
    """What nodes outside the circuit are replaced by, for each layer: means over the positions of each place, `z`
    (places, n_heads, d_head) of the heads, `out` (places, d_model) of the MLP, and `acts` (places, n_features)."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Name of each node: `L3H5 @end` is head 5 of layer 3 at the place "end", `M2N123 @end` a feature."""
        return labels(self.nodes, self.places)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `circuit.safetensors` (the means) and `circuit.json` (everything else) into a folder.

        Raises:
            OSError: the folder or a file cannot be written.
        """
        from safetensors.numpy import save

        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        means = {f"{i}.{n}": np.asarray(getattr(layer, n)) for i, layer in enumerate(self.means) for n in _MEANS}
        nodes = [dict(zip(CIRCUIT_NODE.names or (), node.tolist(), strict=True)) for node in self.nodes]
        texts = {"places": self.places, "dictionaries": self.dictionaries, "nodes": nodes}
        replace_file(folder / "circuit.safetensors", save(means))
        replace_file(folder / "circuit.json", json.dumps(texts, ensure_ascii=False, indent=1).encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Circuit:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the folder holds no circuit.
            ValueError: its files are damaged.
        """
        with stored(folder, "circuit") as (texts, means):
            names = CIRCUIT_NODE.names or ()
            nodes = np.array([tuple(node[name] for name in names) for node in texts["nodes"]], CIRCUIT_NODE)
            layers = range(len(means) // len(_MEANS))
            found = tuple(LayerMeans(*(jnp.asarray(means[f"{layer}.{n}"]) for n in _MEANS)) for layer in layers)
            return cls(nodes, tuple(texts["places"]), tuple(texts["dictionaries"]), found)

    def gates(self, space: NodeSpace) -> Bool[np.ndarray, " nodes"]:
        """Return which of all nodes belong to the circuit."""
        return np.isin(np.arange(space.size), space.numbers(self.nodes))


def run(
    lm: TinyModel, circuit: Circuit, prompts: Any, *, places: Places | None = None, complement: bool = False
) -> Float[Array, "prompts seq d_vocab"]:
    """Return the logits of a forward pass in which everything outside a circuit has its mean.

    Args:
        prompts: a list of texts, or token ids (prompts, seq), right-padded.
        places: as for `find`: the same names, for these prompts.
        complement: ablate the circuit instead, and keep everything else.

    Raises:
        ValueError: the prompts or places do not fit those of the circuit, or the circuit is of another model.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import circuits
        >>> lm = TinyModel("mini")
        >>> from tinymodel_jax.analysis import logit_difference
        >>> prompts = ["Tim saw Lily. Then", "Lily saw Tim. Then"]
        >>> metric = logit_difference([" Tim", " Lily"], [" Lily", " Tim"])
        >>> circuit = circuits.find(lm, prompts, metric, budget=5)
        >>> circuits.run(lm, circuit, prompts).shape
        (2, 7, 1024)
    """
    aligned = aligned_like(lm, circuit, prompts, places)
    gated = gated_like(lm, circuit)
    gates = jnp.asarray(circuit.gates(gated.space) != complement, jnp.float32)
    hooks = gated.hooks(circuit.means, gates, jnp.asarray(aligned.place))
    logits, _ = forward(gated.model.with_hooks(hooks), aligned.tok_ids, output="logits")
    assert logits is not None
    return logits[:, : aligned.lengths.max()]


def gated_model(lm: TinyModel, tags: tuple[str, ...], n_places: int) -> Gated:
    """Return a model with a gate at every node.

    Raises:
        ValueError: a tag is not that of a transcoder, or a layer has none.
    """
    sites, found = tags, tuple(lm[tag].dictionary for tag in tags if tag != NEURONS)
    if tags == (NEURONS,):
        layers = range(lm.config.n_layers)
        sites, found = tuple(map(neurons_tag, layers)), tuple(neurons(lm, layer) for layer in layers)
    n_features = tuple(dictionary.config.n_features for dictionary in found)
    return Gated(lm.hooked(), found, NodeSpace(sites, n_places, lm.config.n_heads, n_features))


def transcoder_tags(lm: TinyModel, dictionaries: Any) -> tuple[str, ...]:
    """Return the tag of each layer's transcoder, `M` where none is named; `("neurons",)` for neurons.

    Raises:
        ValueError: a tag is not that of a transcoder of an MLP of the model, or two are of one layer.
    """
    if dictionaries == NEURONS:
        return (NEURONS,)
    found: dict[int, str] = {}
    for tag in [] if dictionaries is None else as_names(dictionaries):
        site = Site.whole(tag, "circuits: ")
        if site.kind not in ("M", "T") or site.layer >= lm.config.n_layers:
            raise ValueError(
                f"circuits: {tag!r} is not a transcoder of an MLP of this model; name some of M0..T"
                f"{lm.config.n_layers - 1}, or 'neurons'."
            )
        if found.setdefault(site.layer, site.tag) != site.tag:
            raise ValueError(f"circuits: {found[site.layer]} and {site.tag} predict the same value; use one.")
    return tuple(found.get(layer, f"M{layer}") for layer in range(lm.config.n_layers))


def aligned_like(lm: TinyModel, circuit: Circuit, prompts: Any, places: Places | None) -> Aligned:
    """Return prompts aligned in the places of a circuit, in its order.

    Raises:
        ValueError: they have other places.
    """
    named = circuit.places[-1] == OTHER
    if named and places is not None and set(places) == set(circuit.places[:-1]):
        aligned = align(lm, prompts, {name: places[name] for name in circuit.places[:-1]})
        unseen = (aligned.real & (aligned.place == len(places))).any() and np.isnan(circuit.means[0].acts[-1]).any()
        if unseen:
            raise ValueError(
                f"circuits: there are no means for {OTHER!r}, since all positions of the prompts that the circuit was "
                "found on had names; name every position of these prompts, or find the circuit on such prompts."
            )
        return aligned
    if named or places is not None:
        own = f"the places {', '.join(circuit.places[:-1])}" if named else "positions without names (places=None)"
        given = "none" if places is None else ", ".join(places)
        raise ValueError(f"circuits: the circuit has {own}; got places: {given}. Give the circuit's.")
    aligned = align(lm, prompts, None)
    if aligned.names != circuit.places:
        raise ValueError(
            f"circuits: the prompts have {len(aligned.names)} tokens and the circuit's had {len(circuit.places)}; give "
            "prompts of that length."
        )
    return aligned


def gated_like(lm: TinyModel, circuit: Circuit) -> Gated:
    """Return a model with a gate at every node of a circuit's model.

    Raises:
        ValueError: the means have other shapes than the model's values.
    """
    layers = len(circuit.means)
    gated = gated_model(lm, circuit.dictionaries, len(circuit.places)) if layers == lm.config.n_layers else None
    config, n = lm.config, len(circuit.places)
    expected = [
        [(n, config.n_heads, config.d_head), (n, config.d_model), (n, n_features)]
        for n_features in (gated.space.n_features if gated else ())
    ]
    shapes = [[np.shape(getattr(layer, name)) for name in _MEANS] for layer in circuit.means]
    if gated is None or shapes != expected:
        raise ValueError(
            f"circuits: the circuit was found in another model, of {layers} layers and heads and values of the shapes "
            f"{shapes[0]}; run it in that one, with the dictionaries {', '.join(circuit.dictionaries)}."
        )
    return gated
