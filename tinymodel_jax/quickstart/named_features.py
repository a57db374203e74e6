"""What is known of the features of one dictionary: seen on stories whose every token has its truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from tinymodel_jax.analysis.concepts.labels import concepts_of_units
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.runtime.progress import with_progress
from tinymodel_jax.text.prompts_and_stories import story_rows

SITE = "Rm2"
"""Whose features are shown: an SAE of the residual stream."""
NAMED_FROM = 0.5
"""F1 below which a feature's concept is shown as a weak guess."""


@dataclass
class Named:
    """What is known of a dictionary's features from labelled stories."""

    tok_ids: np.ndarray
    """(stories, seq)."""
    acts: np.ndarray
    """(stories, seq, features)."""
    real: np.ndarray
    """(stories, seq): whether the token is text."""
    concept: list[str]
    """Of each feature: the concept that its activity tells best."""
    f1: np.ndarray
    """How well, on the same stories: nothing is held out."""
    density: np.ndarray
    """Share of the tokens at which each is active."""

    def label(self, feature: int) -> str:
        """Return the feature's number, and its concept with the F1 if it names it well."""
        f1 = self.f1[feature]
        return f"{feature} {self.concept[feature]} ({f1:.2f})" if f1 >= NAMED_FROM else f"{feature} (no name)"


def name_features(lm: TinyModel, told: Sequence[storyworld.Story], console: Console) -> Named:
    """Look at every feature of `SITE` on stories whose every token has its truth."""
    console.rule("2 · What the features stand for")
    tok_ids = full_rows(lm, [story.text for story in told])
    truth = storyworld.labels(told, lm.tokenizer, width=tok_ids.shape[1])
    reader = lm[SITE]
    starts = with_progress(range(0, len(told), 12), "reading labelled stories")
    acts = np.concatenate([np.asarray(reader(tok_ids[start : start + 12])) for start in starts])
    real = lm.config.is_text(tok_ids)
    best, f1 = concepts_of_units(acts[real], truth[real])
    names = list(storyworld.CONCEPTS)
    return Named(tok_ids, acts, real, [names[i] for i in best], f1, (acts[real] > 0).mean(axis=0))


def full_rows(lm: TinyModel, texts: Sequence[str]) -> np.ndarray:
    """Return token ids (texts, n_ctx), padded with `[PAD]`."""
    return story_rows(lm.tokenizer, texts, lm.config.n_ctx, width=lm.config.n_ctx)
