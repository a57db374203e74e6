"""The losses of a batch with values replaced: by a dictionary's predictions, by zeros, or by means.

A dictionary of one hook point replaces its value; a crosscoder one of its hook points' values at a time; a cross-layer
transcoder the outputs of all its MLPs in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinymodel_jax.analysis.evaluation.model_passes import CleanPass, losses_against, losses_with_value
from tinymodel_jax.block_order import stream_before
from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.model.forward import HookedModel
from tinymodel_jax.model.hook_points import Hooks
from tinymodel_jax.model.interventions import Replace, splice
from tinymodel_jax.runtime.rows import RowDevices


class Ablation(NamedTuple):
    """Where zeros or means take a value's place: at a hook point, except at excluded tokens."""

    place: str
    exclude: tuple[int, ...]


def ablations_of(config: DictionaryConfig) -> tuple[Ablation, ...]:
    """Return where values are replaced: at each hook point that the dictionary predicts."""
    return tuple(Ablation(place, config.exclude) for place in config.hooks_out)


def sites_of(config: DictionaryConfig) -> tuple[str, ...]:
    """Return the tags that the site of a crosscoder or cross-layer transcoder joins; () for other dictionaries."""
    if len(config.hooks_out) == 1:
        return ()
    return tuple(site.tag for site in Site.at(config.hook_in, config.hook_out).parts)


class BatchLosses:
    """Runs a batch with values replaced; the passes with zeros and with means are shared by all dictionaries.

    Args:
        clean: the pass without replaced values, with those at all places and in the stream before them.
        means: what takes the values' places at each ablation, besides zeros.
        devices: those that share the rows of the batch.
    """

    def __init__(
        self,
        model: HookedModel,
        ids: Int[np.ndarray, "batch seq"],
        clean: CleanPass,
        means: Mapping[Ablation, Float[np.ndarray, " width"]],
        devices: RowDevices,
    ) -> None:
        self._model, self._ids, self._clean, self._means, self._devices = model, ids, clean, means, devices
        self._placed = devices.rows(ids)
        self._ablated: dict[tuple[Ablation, ...], list[np.ndarray]] = {}

    def of(self, dictionary: Dictionary, prediction: Float[Array, "batch seq d_out"]) -> dict[str, np.ndarray]:
        """Return the rows' totals: `spliced`, `kl`, `zeroed` and `averaged`, and those of a crosscoder's single sites.

        Args:
            prediction: from the clean pass.
        """
        ablations, tags = ablations_of(dictionary.config), sites_of(dictionary.config)
        if dictionary.config.n_layers > 1:
            return self._named(self._with_hooks(splice(dictionary)), ablations)
        values = jnp.split(prediction, len(ablations), axis=-1)
        found = [self._named(self._with_value(at, v), (at,)) for at, v in zip(ablations, values, strict=True)]
        of_sites = {f"{name} {tag}": v for tag, one in zip(tags, found, strict=False) for name, v in one.items()}
        return {name: np.mean([one[name] for one in found], axis=0) for name in found[0]} | of_sites

    def _named(self, spliced_and_kl: np.ndarray, ablations: tuple[Ablation, ...]) -> dict[str, np.ndarray]:
        if ablations not in self._ablated:
            self._ablated[ablations] = [self._replaced(ablations, zeros) for zeros in (True, False)]
        arrays = (*spliced_and_kl, *self._ablated[ablations])
        return dict(zip(("spliced", "kl", "zeroed", "averaged"), arrays, strict=True))

    def _replaced(self, ablations: tuple[Ablation, ...], zeros: bool) -> np.ndarray:
        """Return the cross-entropies with zeros or means at places, all of them at once."""
        vectors = {at: np.zeros_like(self._means[at]) if zeros else self._means[at] for at in ablations}
        if len(ablations) == 1:
            ((at, vector),) = vectors.items()
            value = self._devices.rows(np.broadcast_to(vector, (*self._ids.shape, len(vector))))
            return self._with_value(at, value)[0]
        hooks: Hooks = {at.place: Replace(v, ~np.isin(self._ids, at.exclude)) for at, v in vectors.items()}
        return self._with_hooks(hooks)[0]

    def _with_hooks(self, hooks: Hooks) -> np.ndarray:
        return np.asarray(losses_against(self._model.with_hooks(hooks), self._placed, self._clean.logprobs))

    def _with_value(self, at: Ablation, value: Any) -> np.ndarray:
        """Run the layers above with another value at a place, except at excluded tokens."""
        clean, kept = self._clean, np.isin(self._ids, at.exclude)
        own, stream = clean.acts[at.place], clean.acts[stream_before(at.place)]
        found = losses_with_value(self._model, self._placed, stream, own, value, kept, clean.logprobs, place=at.place)
        return np.asarray(found)
