"""The attention patterns of a text, to explore in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from tinymodel_jax.analysis.report.notebook import NotebookHtml
from tinymodel_jax.analysis.report.page import render, token_text

if TYPE_CHECKING:
    from tinymodel_jax.lm import TinyModel
    from tinymodel_jax.model.hook_points import Hook

PER_MILLE, DIGITS = 1000, "0123456789abcdefghijklmnopqrstuvwxyz"
"""Attention is stored in parts per thousand, each as two digits to base 36."""


def attention_patterns(
    lm: TinyModel, text: Any, layer: int | None = None, *, hooks: Mapping[str, Hook] | None = None
) -> NotebookHtml:
    """Return the attention patterns of a text as an interactive picture for a notebook.

    It shows a small heat map for each head (rows are queries, columns keys) and the text. Choose a head, then point at
    a token, or tap it, to see where the head attends from there; the arrow keys do the same. The picture is one
    `<iframe>` that needs no network, and has three digits of each number.

    Args:
        text: one text, or token ids (seq,) or (1, seq).
        layer: the layer whose heads are shown; None shows all layers. A head takes n (n + 1) bytes for n tokens, so
            choose a layer for a long text.
        hooks: edits, as `lm.run_with_hooks` takes them; the patterns are those after the edits.

    Raises:
        ValueError: there are several texts, the layer does not exist, or as `lm.run_with_hooks`.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import report
        >>> shown = report.attention_patterns(TinyModel("mini"), "Once upon a time", layer=3)
        >>> shown.html.startswith("<iframe")
        True
    """
    ids = np.atleast_2d(lm.to_tokens(text))
    if len(ids) != 1:
        raise ValueError(f"attention_patterns: shows one text, got {len(ids)}; call it for each of them.")
    if layer is not None and layer not in range(lm.config.n_layers):
        raise ValueError(f"attention_patterns: layer {layer} is outside 0..{lm.config.n_layers - 1}.")
    layers = list(range(lm.config.n_layers)) if layer is None else [layer]
    names = [f"blocks.{i}.attn.hook_pattern" for i in layers]
    _, acts = lm.run_with_hooks(ids, hooks, names, return_logprobs=False)
    lower = np.tril_indices(ids.shape[1])
    parts = [[_packed(head) for head in np.asarray(acts[name])[0][:, *lower]] for name in names]
    tokens = [token_text(word) for word in lm.to_str_tokens(ids)]
    special = np.flatnonzero(ids[0] >= lm.config.begin_id).tolist()
    data = {"tokens": tokens, "special": special, "layers": layers, "patterns": parts}
    page = render("notebook/attention.html.jinja", {"data": data})
    rough = 190 + 52 * len(layers) + 26 * (sum(map(len, tokens)) // 60)  # until the page measures itself
    return NotebookHtml.of("frame.html.jinja", {"page": page, "height": rough, "title": "".join(tokens)})


def _packed(shares: Float[np.ndarray, " n"]) -> str:
    return "".join(DIGITS[n // 36] + DIGITS[n % 36] for n in np.rint(shares * PER_MILLE).astype(int).tolist())
