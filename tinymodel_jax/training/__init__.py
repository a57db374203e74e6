"""The pure parts of training: data, sharding, states and steps. The training loops are in the package `train`.

    from tinymodel_jax.training import recipe_preset, train_on_arrays       # a dictionary, on arrays
    from tinymodel_jax.training import init_state, train_step, finalize     # a loop over dictionary steps
    from tinymodel_jax.training import stack_members, sweep_step, member_of # the same for a sweep of dictionaries
    from tinymodel_jax.training import lm_step, open_data, host_batch       # a loop over a language model's steps

The names exported here train dictionaries and read data; each is imported on first use. The language model's step is
the module `lm_step`, whose functions have the same names as those of dictionaries.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinymodel_jax.training.array_training import array_statistics as array_statistics
    from tinymodel_jax.training.array_training import train_on_arrays as train_on_arrays
    from tinymodel_jax.training.data import batch_indices as batch_indices
    from tinymodel_jax.training.data import host_batch as host_batch
    from tinymodel_jax.training.data import open_data as open_data
    from tinymodel_jax.training.data import prefetch as prefetch
    from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe as DictionaryRecipe
    from tinymodel_jax.training.dictionary_recipe import recipe_preset as recipe_preset
    from tinymodel_jax.training.dictionary_state import ActivationStatistics as ActivationStatistics
    from tinymodel_jax.training.dictionary_state import finalize as finalize
    from tinymodel_jax.training.dictionary_state import init_state as init_state
    from tinymodel_jax.training.dictionary_step import member_of as member_of
    from tinymodel_jax.training.dictionary_step import settle_threshold as settle_threshold
    from tinymodel_jax.training.dictionary_step import stack_members as stack_members
    from tinymodel_jax.training.dictionary_step import sweep_step as sweep_step
    from tinymodel_jax.training.dictionary_step import threshold_batches as threshold_batches
    from tinymodel_jax.training.dictionary_step import train_step as train_step
    from tinymodel_jax.training.warm_start import start_from as start_from

_HOMES = {
    "DictionaryRecipe": "dictionary_recipe",
    "recipe_preset": "dictionary_recipe",
    "train_on_arrays": "array_training",
    "array_statistics": "array_training",
    "ActivationStatistics": "dictionary_state",
    "init_state": "dictionary_state",
    "start_from": "warm_start",
    "train_step": "dictionary_step",
    "sweep_step": "dictionary_step",
    "stack_members": "dictionary_step",
    "member_of": "dictionary_step",
    "settle_threshold": "dictionary_step",
    "threshold_batches": "dictionary_step",
    "finalize": "dictionary_state",
    "open_data": "data",
    "batch_indices": "data",
    "host_batch": "data",
    "prefetch": "data",
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
