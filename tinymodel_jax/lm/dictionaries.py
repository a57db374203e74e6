"""The dictionaries of a model, and their activations as functions of token ids.

A tag names an attached dictionary, one that came with the model, or a published one, in this order. Dictionaries are
loaded when they are first used.
"""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary, require_finite, resolve_indices
from tinymodel_jax.dictionaries.encoding import Indices
from tinymodel_jax.dictionaries.readers import Reader, dictionary_of
from tinymodel_jax.dictionaries.sites import Site, require_layer
from tinymodel_jax.io.artifacts import config_at
from tinymodel_jax.model.forward import features
from tinymodel_jax.model.hook_points import Hooks, require_widths
from tinymodel_jax.model.interventions import Splice, at_hook_points, combine
from tinymodel_jax.model.padding import cut, feature_bucket, pad_to_bucket

if TYPE_CHECKING:
    from tinymodel_jax.analysis.report.notebook import NotebookHtml
    from tinymodel_jax.lm.tiny_model import TinyModel


class ModelDictionaries:
    """The dictionaries at the sites of one model, and those that its forward pass runs through.

    `loaded` maps tags to the dictionaries attached or loaded so far, `splices` maps tags to the edits of the forward
    pass, in its order.
    """

    def __init__(self, config: ModelConfig, own: Mapping[str, Dictionary | Path | str] | None = None):
        """Start with the dictionaries that came with the model: `own`, tag -> dictionary, its folder or address."""
        self.config = config
        self.loaded: dict[str, Dictionary] = {}
        self.splices: dict[str, Splice] = {}
        self._own = dict(own or {})

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags of the dictionaries that are attached or came with the model, in the order of the forward pass."""
        return tuple(sorted({*self._own, *self.loaded}, key=_order))

    def load_own(self) -> dict[str, Dictionary]:
        """Return all that are attached or came with the model."""
        return {tag: self.at(Site.whole(tag)) for tag in self.tags}

    def at(self, site: Site) -> Dictionary:
        """Return the dictionary at a site, and load it if needed.

        Raises:
            ValueError: the layer does not exist, or the model has no dictionary there and the published ones do not
                fit.
        """
        require_layer(site, self.config)
        if site.tag not in self.loaded:
            own = self._own.get(site.tag)
            if own is None and not self._has_published_sizes:
                raise ValueError(
                    f"{site.tag!r}: this model has no dictionary there (it has: {', '.join(self.tags) or 'none'}), and "
                    f"the published ones fit the published sizes only. Give one: lm.attach({site.tag!r}, path)."
                )
            self.attach(site, site.tag if own is None else own)
        return self.loaded[site.tag]

    def attach(self, site: Site, dictionary: Dictionary | Reader | str | os.PathLike[str]) -> None:
        """Put a dictionary at a site; load it if it is given by its path or published name.

        Raises:
            FileNotFoundError: the file or folder does not exist.
            ValueError: the layer does not exist, the folder is for another site, it is not a dictionary, the widths do
                not fit, or a parameter is not finite.
        """
        require_layer(site, self.config)
        if isinstance(dictionary, str | os.PathLike):
            dictionary = Dictionary.from_pretrained(dictionary, site.tag)
        else:
            dictionary = dictionary_of(dictionary)
            require_finite(dictionary.params, f"attach: the dictionary for {site.tag}")
        config = config_at(dictionary.config, site)
        require_widths(config, self.config, f"attach ({site.tag})")
        self.loaded[site.tag] = Dictionary.from_params(config, dictionary.params)

    def spliced(
        self, sites: Iterable[Site], switches: Mapping[str, bool], exclude: tuple[int, ...] | None
    ) -> ModelDictionaries:
        """Return the same dictionaries, with those at the sites spliced into the forward pass as well."""
        other = ModelDictionaries(self.config, self._own)
        splices = dict(self.splices)
        for site in sites:
            dictionary = self.at(site)
            config = dictionary.config
            config = config if exclude is None else dataclasses.replace(config, exclude=exclude)
            splices[site.tag] = Splice(dictionary.params, config=config, **switches)
        other.splices = {tag: splices[tag] for tag in sorted(splices, key=_order)}
        other.loaded = dict(self.loaded)
        return other

    def hooks(self, before: Site | None = None) -> Hooks:
        """Return the hooks of the splices, or only of the splices that act before a site is read.

        A crosscoder reads a pass without splices of crosscoders.

        Raises:
            ValueError: before the site, a crosscoder writes what depends on splices after it.
        """
        if before is not None:
            self._require_independent(before)
        reads_ahead = before is not None and before.is_crosscoder
        parts = [
            (part.order, {name: edit})
            for tag, splice in self.splices.items()
            for part, (name, edit) in zip(Site.whole(tag).parts, at_hook_points(splice).items(), strict=True)
            if before is None or (part.order < before.order and not (reads_ahead and splice.reads_ahead))
        ]
        return combine(*(hooks for _, hooks in sorted(parts, key=operator.itemgetter(0))))

    def _require_independent(self, site: Site) -> None:
        """Require that no crosscoder acts before a site and reads, in its first pass, splices at the site or later."""
        orders = {tag: [part.order for part in Site.whole(tag).parts] for tag in self.splices}
        last = max((orders[tag][-1] for tag, splice in self.splices.items() if splice.reads_ahead), default=site.order)
        read = [
            tag
            for tag, splice in self.splices.items()
            if not splice.reads_ahead and any(site.order <= order < last for order in orders[tag])
        ]
        if read:
            raise ValueError(
                f"{site.tag}: the value there depends on the later splices of {', '.join(read)}, through a spliced "
                "crosscoder that reads behind them. Use run_with_hooks(tok_ids, {}, keep) and dictionary.encode."
            )

    @property
    def _has_published_sizes(self) -> bool:
        """Whether the model has the sizes of the model that the published dictionaries were trained on."""
        return (self.config.n_layers, self.config.d_model, self.config.d_vocab) == (4, 768, 10_000)


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, so that `jax.jit(lm["M2"])` works
class FeatureReader:
    """The activations at one site as a function of token ids: what `lm[tag]` returns.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> lm = TinyModel("mini")
        >>> lm["M2"]("The dog ran").shape
        (1, 4, 512)
        >>> lm["M2N304"]("The dog ran").shape
        (1, 4)
    """

    lm: TinyModel
    """The model."""
    site: Site
    """Where the dictionary is."""
    dictionary: Dictionary
    """The dictionary that is read."""
    feature: int | None
    """The one feature that the tag names; None for all."""

    @classmethod
    def of(cls, lm: TinyModel, given: DictionaryLike, asker: str = "") -> FeatureReader:
        """Return the reader of a whole dictionary in a model.

        Args:
            given: a tag, what a model returns for a tag, or a dictionary. The last two are used in place of the model's
                dictionary at their site; `lm` is unchanged.
            asker: start of the error message, as in `Site.whole`.

        Raises:
            ValueError: it names a feature, does not fit the model, or is nothing of the kind.
        """
        if isinstance(given, str):
            return lm[Site.whole(given, asker).tag]
        if isinstance(given, FeatureReader):
            if given.feature is not None:
                Site.whole(f"{given.site.tag}N{given.feature}", asker)
            if given.lm is lm:
                return given
            tag, dictionary = given.site.tag, given.dictionary
        elif isinstance(given, Dictionary):
            tag, dictionary = Site.at(given.config.hook_in, given.config.hook_out).tag, given
        else:
            raise ValueError(
                f"{asker}got a {type(given).__name__} as dictionary; give a tag such as 'M2', lm['M2'] or a Dictionary."
            )
        holder = lm.splice([])  # so that attaching, which checks layer and width, leaves `lm` unchanged
        holder.attach(tag, dictionary)
        return holder[tag]

    def __call__(self, tok_ids: Any, indices: Indices = None) -> Array:
        """Return activations (batch, seq, n_features), only the columns of `indices` if given.

        Args:
            indices: an int (drops the last axis), a list or a slice; by default all, or the feature that the tag names.

        Raises:
            ValueError: an index is out of range, indices are given for a tag that names a feature, or `tok_ids` are not
                valid for the model.
        """
        config, tag = self.dictionary.config, self.site.tag
        if self.feature is not None and indices is not None:
            raise ValueError(
                f"'{tag}N{self.feature}' is one feature; indices={indices!r:.80} belong to the whole dictionary: "
                f"lm[{tag!r}](tok_ids, indices=…)."
            )
        chosen = resolve_indices(self.feature if indices is None else indices, config.n_features)
        n = len(chosen) if isinstance(chosen, np.ndarray) else None
        if n is not None:
            chosen = np.pad(chosen, (0, feature_bucket(n, config.n_features) - n))
        ids, length = pad_to_bucket(self.lm.to_tokens(tok_ids), self.lm.config)
        acts = features(self.lm.hooked(before=self.site), self.dictionary.params, ids, chosen, dictionary_config=config)
        acts = cut(acts, (1,), length)
        return acts if n is None else cut(acts, (2,), n)

    def show(self, tok_ids: Any, indices: Indices = None) -> NotebookHtml:
        """Return texts coloured by activations, which a notebook shows; point at a token for its number.

        Without a feature in the tag and without `indices`, it shows the five features with the largest activation in
        each text. A feature's colours have one scale in all texts, from 0 to its largest activation.

        Args:
            tok_ids: a text or a list of texts, or token ids (batch, seq) or (seq,).
            indices: features of a whole dictionary, as in a call.

        Raises:
            ValueError: as a call.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> shown = TinyModel("mini")["M2N304"].show("The dog was scared.")
            >>> "largest activation" in shown.html
            True
        """
        from tinymodel_jax.analysis.report.text_activations import show_activations

        return show_activations(self, tok_ids, indices)

    def counts(self, tok_ids: Any) -> Any:
        """Say which tokens count in statistics of the features: text at which the dictionary acts."""
        return self.lm.config.is_text(tok_ids) & self.dictionary.config.acts_at(tok_ids)


DictionaryLike = str | FeatureReader | Dictionary
"""A dictionary: its tag, what a model returns for the tag, or the dictionary itself."""


def _order(tag: str) -> tuple[int, int, int]:
    return Site.whole(tag).order
