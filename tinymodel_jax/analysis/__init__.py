"""Measurements of what a model and its dictionaries compute, in one folder per question.

    from tinymodel_jax.analysis import attribution, patching, sweeps

The modules that analyses are made of, and the functions `logit_lens`, `direct_logit_attribution` and
`logit_difference`, can be imported from here by name; each loads when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinymodel_jax.analysis import report as report
    from tinymodel_jax.analysis.concepts import labels as labels
    from tinymodel_jax.analysis.concepts import recovery as recovery
    from tinymodel_jax.analysis.effects import attribution as attribution
    from tinymodel_jax.analysis.effects import importance as importance
    from tinymodel_jax.analysis.effects import patching as patching
    from tinymodel_jax.analysis.effects import sweeps as sweeps
    from tinymodel_jax.analysis.effects.direct_logit_attribution import (
        direct_logit_attribution as direct_logit_attribution,
    )
    from tinymodel_jax.analysis.effects.logit_lens import logit_lens as logit_lens
    from tinymodel_jax.analysis.effects.metrics import logit_difference as logit_difference
    from tinymodel_jax.analysis.search import coactivation as coactivation
    from tinymodel_jax.analysis.search import feature_queries as feature_queries
    from tinymodel_jax.analysis.search import logit_effects as logit_effects
    from tinymodel_jax.analysis.search import top_activations as top_activations

_MODULES = {
    "attribution": "effects.attribution",
    "circuits": "circuits",
    "coactivation": "search.coactivation",
    "evaluation": "evaluation",
    "feature_queries": "search.feature_queries",
    "importance": "effects.importance",
    "labels": "concepts.labels",
    "logit_effects": "search.logit_effects",
    "patching": "effects.patching",
    "recovery": "concepts.recovery",
    "report": "report",
    "sweeps": "effects.sweeps",
    "top_activations": "search.top_activations",
}
"""Modules and folders, by the name under which they are imported from here."""
_FUNCTIONS = {
    "direct_logit_attribution": "effects.direct_logit_attribution",
    "logit_difference": "effects.metrics",
    "logit_lens": "effects.logit_lens",
}
"""Functions, and the module of each."""


def __getattr__(name: str) -> Any:
    home = _MODULES.get(name) or _FUNCTIONS.get(name)
    if home is None:
        raise AttributeError(f"module 'tinymodel_jax.analysis' has no attribute {name!r}")
    module = importlib.import_module(f"tinymodel_jax.analysis.{home}")
    return getattr(module, name) if name in _FUNCTIONS else module


def __dir__() -> list[str]:
    return sorted([*_MODULES, *_FUNCTIONS])
