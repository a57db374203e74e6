"""Text coloured by the activations of features, for notebooks."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tinymodel_jax.analysis.report.notebook import NotebookHtml
from tinymodel_jax.analysis.report.page import token_text
from tinymodel_jax.dictionaries.dictionary import resolve_indices
from tinymodel_jax.dictionaries.encoding import Indices
from tinymodel_jax.lm import FeatureReader

STRONGEST = 5
"""Features of a whole dictionary that are shown for each text."""


def show_activations(reader: FeatureReader, tok_ids: Any, indices: Indices = None) -> NotebookHtml:
    """Return texts coloured by the activations of features; `lm["M2N5"].show(text)` calls this.

    Args:
        reader: what a model returns for a tag: `lm["M2N5"]`, or `lm["M2"]`.
        tok_ids: a text or a list of texts, or token ids (batch, seq) or (seq,).
        indices: features of a whole dictionary, an int, a list or a slice; None shows those with the largest
            activation in each text.

    Raises:
        ValueError: as a call of `reader`.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import report
        >>> shown = report.show_activations(TinyModel("mini")["M2"], "The dog was sad.", [3, 5])
        >>> "M2N3" in shown.html and "M2N5" in shown.html
        True
    """
    ids = np.atleast_2d(reader.lm.to_tokens(tok_ids))
    acts = np.asarray(reader(ids, indices), np.float32)
    acts = acts[..., None] if acts.ndim == 2 else acts
    n_features = reader.dictionary.config.n_features
    chosen = resolve_indices(reader.feature if indices is None else indices, n_features)
    features = np.arange(n_features) if chosen is None else np.atleast_1d(chosen)
    most = acts.max(axis=(0, 1), initial=0)
    texts = []
    for row, row_acts in zip(ids, acts, strict=True):
        length = int(np.flatnonzero(row != reader.lm.config.pad_id).max(initial=0)) + 1
        counts = np.asarray(reader.counts(row))[:, None]
        columns = range(len(features)) if chosen is not None else _strongest(np.where(counts, row_acts, 0))
        words = [token_text(word) for word in reader.lm.to_str_tokens(row[:length])]
        tokens = list(zip(words, (row[:length] >= reader.lm.config.begin_id).tolist(), strict=True))
        name = reader.site.tag
        texts.append([_line(f"{name}N{features[i]}", tokens, row_acts[:length, i], float(most[i])) for i in columns])
    return NotebookHtml.of("activations.html.jinja", {"texts": texts, "site": reader.site.tag})


def _strongest(acts: Float[np.ndarray, "seq n_features"]) -> Int[np.ndarray, " n"]:
    peaks = acts.max(axis=0, initial=0)
    order = np.argsort(-peaks, kind="stable")[:STRONGEST]
    return order[peaks[order] > 0]


def _line(name: str, tokens: list[tuple[str, bool]], acts: Float[np.ndarray, " seq"], most: float) -> dict[str, Any]:
    """Return what the template shows of one feature on one text.

    Args:
        tokens: the text of each token, and whether it is a special one.
        most: the activation with the strongest colour.
    """
    shares = acts / max(most, np.finfo(np.float32).tiny)
    shown = [
        {"text": word, "special": special, "share": f"{share:.2f}" if act > 0 else "", "value": f"{act:.3g}"}
        for (word, special), act, share in zip(tokens, acts.tolist(), shares.tolist(), strict=True)
    ]
    return {"name": name, "largest": f"{acts.max(initial=0):.3g}", "active": bool((acts > 0).any()), "tokens": shown}
