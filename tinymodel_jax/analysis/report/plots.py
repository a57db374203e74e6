"""Plots of what analyses return, as Matplotlib figures that a notebook shows.

Nothing is drawn on a screen and `pyplot` is not used: `figure.savefig("plot.png")` writes a figure to a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinymodel_jax.analysis.report.charts import bars_figure, draw_pareto, effects_figure, empty_figure
from tinymodel_jax.analysis.report.page import token_text

if TYPE_CHECKING:
    from tinymodel_jax.analysis.effects.direct_logit_attribution import DirectLogitAttribution
    from tinymodel_jax.analysis.effects.patching import Patched, Patching
    from tinymodel_jax.analysis.evaluation.evaluation import DictionaryEvaluation
    from tinymodel_jax.analysis.report.notebook import NotebookFigure
    from tinymodel_jax.lm import TinyModel
    from tinymodel_jax.model.hook_points import Hook

CELL_LETTERS = 10
"""Letters of a token that a cell of the logit lens has room for."""
QUALITIES = {"explained_variance": "explained variance", "ce_recovered": "CE recovered"}
"""What a Pareto front shows against L0, with its label."""


def plot_pareto(
    records: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[DictionaryEvaluation]],
) -> NotebookFigure:
    """Draw L0, on a logarithmic axis, against explained variance and, where it is known, CE recovered.

    Args:
        records: what to draw as one line each: results of `evaluate` by the line's name, `{"M2": [one, other]}`; or
            the records of `sweep.json` and of `tinymodel eval --json`, mappings with `site` and `results`, which make
            one line per site. A dictionary without active features is left out.

    Raises:
        ValueError: there are no records.

    Examples:
        >>> from tinymodel_jax.analysis import report
        >>> results = {"l0": 8.0, "explained_variance": 0.9}
        >>> figure = report.plot_pareto([{"site": "M2", "results": results}])
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['explained variance']
    """
    if isinstance(records, Mapping):
        records = [{"site": name, "results": one._asdict()} for name, found in records.items() for one in found]
    if not records:
        raise ValueError("plot_pareto: there are no records; give {name: evaluations}, or the records of sweep.json.")
    qualities = {key: label for key, label in QUALITIES.items() if key in records[0]["results"]}
    figure = empty_figure(5.2 * len(qualities), 4.2)
    for axes, (key, label) in zip(figure.subplots(1, len(qualities), squeeze=False)[0], qualities.items(), strict=True):
        draw_pareto(axes, records, key, label)
    sites = ", ".join(dict.fromkeys(record["site"] for record in records))
    figure.alt = f"L0 against {' and '.join(qualities.values())} of {len(records)} dictionaries: {sites}"
    return figure


def plot_logit_lens(
    lm: TinyModel, text: Any, *, hooks: Mapping[str, Hook] | None = None, positions: slice = slice(None)
) -> NotebookFigure:
    """Draw what the model would predict from the residual stream in front of each layer, and after the last one.

    There is a row for each position and a column for each stream. A cell shows the most likely next token, and its
    colour the probability of that token.

    Args:
        text: one text, or token ids (seq,) or (1, seq).
        hooks: edits, as `lm.run_with_hooks` takes them.
        positions: the positions to draw, such as `slice(-8, None)` for the last eight.

    Raises:
        ValueError: there are several texts, no position is chosen, or as `logit_lens`.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import report
        >>> figure = report.plot_logit_lens(TinyModel("mini"), "Once upon a time", positions=slice(1, None))
        >>> len(figure.axes[0].texts)  # 4 positions, 5 streams
        20
    """
    from tinymodel_jax.analysis.effects.logit_lens import logit_lens

    ids = np.atleast_2d(lm.to_tokens(text))
    if len(ids) != 1:
        raise ValueError(f"plot_logit_lens: draws one text, got {len(ids)}; call it for each of them.")
    logprobs = logit_lens(lm, ids, hooks=hooks).logprobs[:, 0, positions]
    labels = position_labels(lm.to_str_tokens(ids))[positions]
    if not labels:
        raise ValueError(f"plot_logit_lens: {positions} chooses none of {ids.shape[1]} positions.")
    best = logprobs.argmax(axis=-1)
    probability = np.exp(np.take_along_axis(logprobs, best[..., None], axis=-1))[..., 0].T
    streams = [*(f"before\nlayer {layer}" for layer in range(lm.config.n_layers)), "output"]
    figure = empty_figure(2.2 + 0.95 * len(streams), 1.0 + 0.23 * len(labels))
    axes = figure.subplots()
    image = axes.imshow(probability, aspect="auto", vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    axes.set_xticks(range(len(streams)), streams, fontsize=8)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
    for (row, column), share in np.ndenumerate(probability):
        word = _short(token_text(str(lm.to_string(best[column, row]))))
        ink = "white" if share > 0.55 else "black"
        axes.text(column, row, word, ha="center", va="center", fontsize=8, color=ink, parse_math=False)
    figure.colorbar(image, ax=axes, label="probability", aspect=30)
    figure.alt = "most likely next token at each position, from the residual stream in front of each layer"
    return figure


def plot_patching(found: Patching, tokens: Sequence[str] | None = None, title: str = "") -> NotebookFigure:
    """Draw the effects of activation patching as heat maps, one per kind of hook point.

    Rows are layers, and columns positions or heads; where each head was patched at each position, rows are heads. An
    effect of 1 (blue) restores the clean run, 0 (white) changes nothing, and -1 (orange) is as far in the opposite
    direction. Effects beyond 1 and -1 have the same colours.

    Args:
        found: the result of `patching.patch`.
        tokens: text of each token of the clean prompt, `lm.to_str_tokens(clean)`, to label positions with.
        title: title of the figure.

    Raises:
        ValueError: `tokens` has another number of tokens than the prompts.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import patching, report
        >>> lm = TinyModel("mini")
        >>> found = patching.patch(lm, "Once upon", "Once there", "hook_resid_pre", metric="next_logprob")
        >>> figure = report.plot_patching(found, lm.to_str_tokens("Once upon"))
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['0 [BEGIN]', '1 Once', '2 upon']
    """
    tables, rows = {}, {}
    for table in found.tables:
        n_layers, n_heads, *_ = table.effects.shape
        tables[table.kind] = table.effects.reshape(-1, table.effects.shape[-1])
        if table.axis == "head and position":
            rows[table.kind] = [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]
    columns = {table.kind: patching_labels(table, tokens) for table in found.tables}
    figure = effects_figure(tables, columns, title, rows)
    figure.alt = f"heat maps of the effects of patching {', '.join(tables)}"
    return figure


def plot_attribution(
    found: DirectLogitAttribution,
    token: int = 0,
    minus: int | None = None,
    *,
    row: int = 0,
    position: int = -1,
    parts: int = 15,
    title: str = "",
) -> NotebookFigure:
    """Draw the largest parts of a logit, or of the difference of two logits, as horizontal bars.

    The last bar is the sum of the parts that have no bar, so that all bars together are the logit.

    Args:
        found: the result of `direct_logit_attribution`.
        token: which of `found.tokens`, by its place there.
        minus: which of `found.tokens` to subtract; None draws the logit of `token` itself.
        row: which text of the batch.
        position: the position whose next token is predicted.
        parts: number of parts with a bar.
        title: what the number is, such as `"logit of ' Lily' minus ' Tim'"`; it stands below the axis.

    Raises:
        IndexError: there is no such token, row or position.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import direct_logit_attribution, report
        >>> found = direct_logit_attribution(TinyModel("mini"), "Once upon a time", ",")
        >>> figure = report.plot_attribution(found, parts=3, title="logit of ','")
        >>> len(figure.axes[0].patches)  # three parts, and the sum of all others
        4
    """
    values = found.values[:, row, position]
    numbers = values[:, token] if minus is None else values[:, token] - values[:, minus]
    order = np.argsort(-np.abs(numbers), kind="stable")
    shown = {found.labels[part]: float(numbers[part]) for part in order[:parts]}
    if len(order) > parts:
        shown[f"{len(order) - parts} others"] = float(numbers[order[parts:]].sum())
    figure = bars_figure(shown, title or "logits")
    figure.alt = f"largest parts of {title or 'a logit'}: " + ", ".join(f"{k} {v:+.2f}" for k, v in shown.items())
    return figure


def patching_labels(table: Patched, tokens: Sequence[str] | None) -> list[str]:
    """Return the labels of the last axis of a table: positions with their tokens, or heads.

    Raises:
        ValueError: `tokens` has another number of tokens than the table has positions.
    """
    n = table.effects.shape[-1]
    if table.axis == "head":
        return [f"head {head}" for head in range(n)]
    if tokens is None:
        return [str(place) for place in range(n)]
    if len(tokens) != n:
        raise ValueError(f"plot_patching: got {len(tokens)} tokens for prompts of {n}; lm.to_str_tokens(clean).")
    return position_labels(tokens)


def position_labels(tokens: Sequence[str]) -> list[str]:
    """Return the number and the text of each token, without its space."""
    return [f"{place} {token_text(token).strip(' ') or '␣'}" for place, token in enumerate(tokens)]


def _short(word: str) -> str:
    word = word.strip(" ") or "␣"
    return word if len(word) <= CELL_LETTERS else f"{word[: CELL_LETTERS - 1]}…"
