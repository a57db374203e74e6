"""The page of `tinymodel quickstart`: results of the steps, cards of features, and the data for its script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinymodel_jax.analysis.report.page import token_text, write_page
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.commands.quickstart_steps import NAMED_FROM, PROMPT, SITE, Named
from tinymodel_jax.lm import TinyModel


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
        "tokens": [token_text(lm.tokenizer.decode([i])) for i in story],
        "n_concepts": len(storyworld.CONCEPTS),
        "features": [describe_feature(lm, named, feature) for feature in interesting_features(named, strongest)],
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


def describe_feature(lm: TinyModel, named: Named, feature: int) -> dict[str, Any]:
    """Return a feature's card: its concept, the tokens it is most active on, and its top contexts."""
    acts = np.where(named.real, named.acts[..., feature], 0)
    top, where = [], np.argsort(-acts.max(axis=1), kind="stable")[:4]
    largest = max(float(acts.max()), 1e-9)
    for row in where:
        peak = int(acts[row].argmax())
        window = [i for i in range(max(1, peak - 14), min(acts.shape[1], peak + 9)) if named.real[row, i]]
        top.append(
            [
                {
                    "text": token_text(lm.tokenizer.decode([int(named.tok_ids[row, i])])),
                    "strength": float(acts[row, i]) / largest,
                }
                for i in window
            ]
        )
    totals = np.bincount(named.tok_ids.ravel(), acts.ravel(), minlength=lm.config.d_vocab)
    strongest = [repr(token_text(lm.tokenizer.decode([int(i)]))) for i in np.argsort(-totals)[:6] if totals[i] > 0]
    return {
        "id": feature,
        "concept": named.concept[feature],
        "f1": float(named.f1[feature]),
        "density": float(named.density[feature]),
        "description": f"{storyworld.CONCEPTS[named.concept[feature]]}. Most activity on: {', '.join(strongest)}",
        "contexts": top,
    }


def script_data(named: Named, tokens: list[list[tuple[int, float]]], acts: np.ndarray) -> dict[str, Any]:
    """Return the data for the page's script: each token's features, and where each of those is active in the story."""
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
    return {"tokens": strongest, "features": features, "named_from": NAMED_FROM}
