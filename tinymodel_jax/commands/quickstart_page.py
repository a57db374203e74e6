"""The page of `tinymodel quickstart`: results of the steps, cards of features, and the data for its script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinymodel_jax.analysis.concepts.labels import NAMED_FROM
from tinymodel_jax.analysis.report.page import token_text, write_page
from tinymodel_jax.analysis.search.logit_effects import logit_effects
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.commands.quickstart_steps import PROMPT, SITE, Named
from tinymodel_jax.lm import TinyModel

BARS = 24
"""Bars of a feature's histogram."""
PROMOTED = 3
"""Next tokens that a card shows as promoted."""
COLOURED = 1 / 3
"""Largest share of the story's words that the feature with which the page opens colours, if there is such a feature."""


def write_quickstart_page(
    path: Path,
    lm: TinyModel,
    story: list[int],
    named: Named,
    strongest: list[list[tuple[int, float]]],
    acts: np.ndarray,
    found: Mapping[str, Any],
) -> None:
    """Write the page.

    Args:
        story: token ids of the story.
        strongest: strongest features of each token, with their activations.
        acts: (tokens, features): activations on the story.
        found: results of the other steps, for the template.
    """
    content = {
        "model": f"{lm!r:.80}, trained on the story world",
        "site": SITE,
        "site_words": f"a sparse autoencoder of {named.acts.shape[2]} features of the residual stream in layer 2",
        "prompt": PROMPT,
        "named_from": NAMED_FROM,
        "tokens": [_text(lm, i) for i in story],
        "n_concepts": len(storyworld.CONCEPTS),
        "features": describe_features(lm, named, interesting_features(named, strongest)),
        "data": script_data(named, strongest, acts),
        **found,
    }
    write_page(path, "quickstart.html.jinja", content)


def interesting_features(named: Named, tokens: list[list[tuple[int, float]]], count: int = 24) -> list[int]:
    """Return features of the story that detect a concept well, the best one of each concept first."""
    present = {feature for found in tokens for feature, _ in found}
    ordered = sorted(present, key=lambda f: -named.f1[f])
    first = {named.concept[f]: f for f in reversed(ordered)}
    chosen = sorted(first.values(), key=lambda f: -named.f1[f])
    return [*chosen, *(f for f in ordered if f not in chosen)][:count]


def opening(named: Named, tokens: list[list[tuple[int, float]]], acts: np.ndarray) -> tuple[int, int] | None:
    """Return the token and the feature with which the page opens, or None if no feature fits.

    The feature has a name and is listed at its strongest token, which is the token returned. Of these features, it is
    the one that colours most, weighted by its F1; those that colour more than `COLOURED` of the story come last.
    """
    strongest = acts.argmax(axis=0)
    listed = {feature for i, found in enumerate(tokens) for feature, _ in found if strongest[feature] == i}

    def quality(feature: int) -> tuple[bool, float]:
        row = acts[:, feature]
        return bool((row > 0).mean() <= COLOURED), float(named.f1[feature] * row.sum() / row.max())

    best = max((f for f in sorted(listed) if named.f1[f] >= NAMED_FROM), key=quality, default=None)
    return None if best is None else (int(strongest[best]), best)


def describe_features(lm: TinyModel, named: Named, features: list[int]) -> list[dict[str, Any]]:
    """Return the cards of features: concept, activations, promoted tokens, most active tokens and top contexts."""
    effects = logit_effects(lm, SITE, PROMOTED, features)
    return [
        {
            "id": feature,
            "concept": named.concept[feature],
            "f1": float(named.f1[feature]),
            "density": float(named.density[feature]),
            "about": storyworld.CONCEPTS[named.concept[feature]],
            "promoted": [(_text(lm, i), float(effect)) for i, effect in zip(tok_ids, logits, strict=True)],
            **_activity(lm, named, feature),
        }
        for feature, tok_ids, logits in zip(features, effects.promoted, effects.promoted_effect, strict=True)
    ]


def _activity(lm: TinyModel, named: Named, feature: int) -> dict[str, Any]:
    """Return what a card says about the activations of its feature on the labelled stories."""
    acts = np.where(named.real, named.acts[..., feature], 0)
    above = acts[acts > 0]
    totals = np.bincount(named.tok_ids.ravel(), acts.ravel(), minlength=lm.config.d_vocab)
    where = np.argsort(-acts.max(axis=1), kind="stable")[:4]
    return {
        "histogram": np.histogram(above, BARS, (0, above.max(initial=1e-9)))[0].tolist(),
        "active": len(above),
        "largest": float(above.max(initial=0)),
        "peaks": [_text(lm, i) for i in np.argsort(-totals)[:6] if totals[i] > 0],
        "contexts": [_context(lm, named, acts, row) for row in where],
    }


def _context(lm: TinyModel, named: Named, acts: np.ndarray, row: int) -> list[dict[str, Any]]:
    """Return the words around the largest activation in a story, with their activations as shares of the largest."""
    peak, largest = int(acts[row].argmax()), max(float(acts.max()), 1e-9)
    window = [i for i in range(max(1, peak - 14), min(acts.shape[1], peak + 9)) if named.real[row, i]]
    return [{"text": _text(lm, named.tok_ids[row, i]), "strength": float(acts[row, i]) / largest} for i in window]


def _text(lm: TinyModel, tok_id: int) -> str:
    return token_text(lm.tokenizer.decode([int(tok_id)]))


def script_data(named: Named, tokens: list[list[tuple[int, float]]], acts: np.ndarray) -> dict[str, Any]:
    """Return the data for the page's script.

    It holds the features of each token, where each of those is active in the story, and the token and feature with
    which the page opens.
    """
    present = sorted({feature for found in tokens for feature, _ in found})
    features = {
        feature: {
            "concept": named.concept[feature],
            "f1": round(float(named.f1[feature]), 3),
            "activity": {int(i): round(float(acts[i, feature]), 3) for i in np.flatnonzero(acts[:, feature])},
        }
        for feature in present
    }
    strongest = [[(f, round(a, 3)) for f, a in found] for found in tokens]
    first = opening(named, tokens, acts)
    return {"tokens": strongest, "features": features, "named_from": NAMED_FROM, "opening": first}
