"""Measurements of what a model and its dictionaries compute, in one folder per question.

    from tinymodel_jax.analysis import attribution, patching, sweeps

The modules that analyses are made of, and the functions `logit_lens`, `direct_logit_attribution` and
`logit_difference`, can be imported from here by name; each loads when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "coactivation": "search",
    "feature_queries": "search",
    "logit_effects": "search",
    "top_activations": "search",
    "attribution": "effects",
    "direct_logit_attribution": "effects",
    "importance": "effects",
    "logit_difference": "effects",
    "logit_lens": "effects",
    "patching": "effects",
    "sweeps": "effects",
    "labels": "concepts",
    "recovery": "concepts",
}

_FUNCTIONS = {
    "direct_logit_attribution": "direct_logit_attribution",
    "logit_difference": "metrics",
    "logit_lens": "logit_lens",
}
"""Names of functions, each with its module; the others are modules."""


_FOLDERS = ("circuits", "evaluation")
"""Folders whose `__init__` has the public functions."""


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return importlib.import_module(f"tinymodel_jax.analysis.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'tinymodel_jax.analysis' has no attribute {name!r}")
    module = importlib.import_module(f"tinymodel_jax.analysis.{_HOMES[name]}.{_FUNCTIONS.get(name, name)}")
    return getattr(module, name) if name in _FUNCTIONS else module


def __dir__() -> list[str]:
    return sorted([*_HOMES, *_FOLDERS])
