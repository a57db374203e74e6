"""The pure parts of training: data, sharding, states and steps. The training loops are in the package `train`.

    from tinymodel_jax.training import recipe_preset, train_on_arrays

The names exported here train dictionaries; each is imported on first use. The language model's step is in `lm_step`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinymodel_jax.training.array_training import train_on_arrays as train_on_arrays
    from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe as DictionaryRecipe
    from tinymodel_jax.training.dictionary_recipe import recipe_preset as recipe_preset
    from tinymodel_jax.training.dictionary_state import finalize as finalize
    from tinymodel_jax.training.dictionary_state import init_state as init_state
    from tinymodel_jax.training.dictionary_step import settle_threshold as settle_threshold
    from tinymodel_jax.training.dictionary_step import train_step as train_step

_HOMES = {
    "DictionaryRecipe": "dictionary_recipe",
    "recipe_preset": "dictionary_recipe",
    "train_on_arrays": "array_training",
    "init_state": "dictionary_state",
    "train_step": "dictionary_step",
    "settle_threshold": "dictionary_step",
    "finalize": "dictionary_state",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tinymodel_jax.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tinymodel_jax.training.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
