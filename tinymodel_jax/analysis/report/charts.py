"""Charts: SVG text for pages, and PNG files of measured dictionaries, without a display or Matplotlib's global state.

Names, tokens and titles are shown literally: a `$` in them does not start a formula (`parse_math=False`).
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from tinymodel_jax.runtime.atomic_files import replaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis
    from matplotlib.figure import Figure

    from tinymodel_jax.analysis.report.notebook import NotebookFigure

INK, ACCENT, SECOND = "#2b2b33", "#3b6fb6", "#c2571a"
SHOWN = 20
"""Features that `plot_importance` shows one by one."""


def training_curve(steps: Sequence[int], explained: Sequence[float], l0: Sequence[float]) -> str:
    """Draw explained variance over the training steps of a dictionary, and L0 if it changes."""
    figure, axes = _figure(6.4, 2.8)
    axes.plot(steps, explained, color=ACCENT)
    axes.set(xlabel="step", ylabel="explained variance", ylim=(0, 1.02))
    if min(l0) == max(l0):
        return _svg(figure, "Explained variance during training of the transcoder")
    axes.yaxis.label.set_color(ACCENT)
    other = axes.twinx()
    other.plot(steps, l0, color=SECOND)
    other.set(ylabel="L0 (active features per token)", ylim=(0, None))
    other.yaxis.label.set_color(SECOND)
    return _svg(figure, "Explained variance and L0 during training of the transcoder")


def bars(values: Mapping[str, float], label: str, title: str) -> str:
    """Draw labelled horizontal bars, the first one at the top."""
    return _svg(bars_figure(values, label), title)


def bars_figure(values: Mapping[str, float], label: str) -> NotebookFigure:
    """Return the figure of `bars`."""
    figure, axes = _figure(6.4, 0.8 + 0.26 * len(values))
    numbers = list(values.values())
    axes.barh(range(len(numbers)), numbers, color=[ACCENT if n >= 0 else SECOND for n in numbers])
    axes.set_yticks(range(len(numbers)), list(values), fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel(label, parse_math=False)
    return figure


def heat_map(table: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str) -> str:
    """Draw F1 scores as a labelled heat map; NaN is white."""
    return _svg(heat_map_figure(table, rows, columns), title)


def heat_map_figure(table: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> NotebookFigure:
    """Return the figure of `heat_map`."""
    figure, axes = _figure(2.4 + 0.36 * len(columns), 1.2 + 0.17 * len(rows))
    image = axes.imshow(table, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(len(columns)), list(columns), rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7, parse_math=False)
    figure.colorbar(image, ax=axes, label="F1")
    return figure


def effects_figure(
    tables: Mapping[str, np.ndarray],
    columns: Mapping[str, Sequence[str]],
    title: str,
    rows: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> NotebookFigure:
    """Return a figure of heat maps, one below the other.

    0 is white, 1 and more are blue, -1 and less are orange.

    Args:
        tables: the effects (rows, columns) of each heat map, by its name.
        columns: the labels of the columns of each heat map.
        rows: the labels of the rows of a heat map; by default there is one row per layer.
    """
    from matplotlib.colors import LinearSegmentedColormap

    widest = max(table.shape[1] for table in tables.values())
    width = 2.2 + 0.26 * max(widest, 12)
    figure = empty_figure(width, 0.5 + sum(0.9 + 0.24 * len(t) for t in tables.values()))
    colours = LinearSegmentedColormap.from_list("effects", [SECOND, "white", ACCENT])
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    images = []
    for axes, (name, table) in zip(panels, tables.items(), strict=True):
        aspect = "equal" if 2 * table.shape[1] < widest else "auto"  # few heads are not stretched to a long prompt
        images.append(axes.imshow(table, aspect=aspect, vmin=-1, vmax=1, cmap=colours, interpolation="nearest"))
        axes.set_xticks(range(table.shape[1]), list(columns[name]), rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(
            range(len(table)), rows.get(name, [f"layer {layer}" for layer in range(len(table))]), fontsize=7
        )
        axes.set_title(name, fontsize=9, loc="left")
    figure.colorbar(images[0], ax=list(panels), label="effect", aspect=40, pad=0.15 / width)
    for axes in panels:
        axes.set_anchor("W")  # after the colour bar, which moves narrow panels to the right
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure


def draw_pareto(axes: Axes, records: Sequence[Mapping[str, Any]], key: str, label: str) -> None:
    """Draw L0, on a logarithmic axis, against one of the results, with one line per site.

    Args:
        records: mappings with `site` and `results` (number by name, None where undefined), as in `sweep.json` and in
            the output of `tinymodel eval`.
    """
    for site in dict.fromkeys(record["site"] for record in records):
        found = [record["results"] for record in records if record["site"] == site]
        points = sorted((r["l0"], r[key]) for r in found if r["l0"] and r[key] is not None)
        if points:  # a logarithmic axis cannot show a dictionary without active features
            axes.plot(*zip(*points, strict=True), marker="o", label=site)
    axes.set_xlabel("L0 (active features per token)")
    axes.set_ylabel(label)
    if axes.lines:
        axes.set_xscale("log")
        _label_plainly(axes.xaxis)
        axes.legend(fontsize="small", ncols=1 + len(axes.lines) // 9)
    axes.grid(alpha=0.3)


def draw_densities(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw how many features are active on which share of the tokens, with one line per dictionary.

    Dead features are drawn on the left.
    """
    for record in records:
        density = record["density"]
        edges = np.array(density["log10_edges"])
        (line,) = axes.step(edges, [density["features"][0], *density["features"]], label=record["name"])
        axes.plot([edges[0] - 0.75], [density["dead"]], "x", color=line.get_color())
    first, *rest = records[0]["density"]["log10_edges"][::2]
    axes.set_xticks([first - 0.75, first, *rest], ["dead", *(f"$10^{{{edge:.0f}}}$" for edge in (first, *rest))])
    axes.set(xlabel="share of tokens on which a feature is active", ylabel="features", ylim=(0, None))
    for name in axes.legend(fontsize="small", ncols=1 + len(records) // 9).get_texts():
        name.set_parse_math(False)  # a folder may be called k=$8$
    axes.grid(alpha=0.3)


def plot_importance(table: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of the most important features with their intervals, and of the share of the KL in the first n.

    Args:
        table: the output of `tinymodel importance`, most important features first.
    """
    figure = empty_figure(10.4, 4.4)
    first, share = figure.subplots(1, 2)
    shown = table["features"][:SHOWN]
    means, margins = zip(*((mean, margin or 0) for mean, margin in (one["kl_all"] for one in shown)), strict=True)
    first.errorbar(means, range(len(shown)), xerr=margins, fmt="o", capsize=2, markersize=4)
    first.set_yticks(range(len(shown)), [str(one["feature"]) for one in shown], fontsize=8)
    unit = "nats per position, 95 %" if any(margins) else "nats per position"
    first.set(xlabel=f"KL of turning the feature off ({unit})", ylabel=f"feature of {table['site']}", xlim=(0, None))
    first.invert_yaxis()
    carried = np.cumsum([one["kl_all"][0] for one in table["features"]])
    share.plot(np.arange(1, len(carried) + 1), carried / max(carried[-1], np.finfo(float).tiny))
    share.set(xlabel="features, most important first", ylabel="share of the KL summed over features", ylim=(0, 1.02))
    for axes in (first, share):
        axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=120)


def plot_evaluations(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of L0 against explained variance, L0 against CE recovered, and feature densities."""
    figure = empty_figure(15.6, 4.4)
    explained, recovered, densities = figure.subplots(1, 3)
    draw_pareto(explained, records, "explained_variance", "explained variance")
    draw_pareto(recovered, records, "ce_recovered", "CE recovered")
    draw_densities(densities, records)
    save_figure(figure, path, dpi=120)


def save_figure(figure: Figure, path: Path, dpi: int, kind: str = "png") -> None:
    """Write a figure atomically.

    Args:
        kind: format of the file, as Matplotlib names it.

    Raises:
        OSError: it cannot be written.
    """
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format=kind)


def _label_plainly(axis: XAxis) -> None:
    """Label a logarithmic axis with a few plain numbers: of the form 1, 2, 5, or powers of ten, or even steps."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    short = MaxNLocator(5, steps=(1, 2, 5, 10))
    axis.set_major_locator(short if high < 5 * low else LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _figure(width: float, height: float) -> tuple[NotebookFigure, Axes]:
    figure = empty_figure(width, height)
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def empty_figure(width: float, height: float) -> NotebookFigure:
    """Return a figure of a size in inches."""
    from tinymodel_jax.analysis.report.notebook import NotebookFigure  # Matplotlib is loaded when a chart is drawn

    return NotebookFigure(figsize=(width, height), layout="constrained")


def _svg(figure: Any, title: str) -> str:
    """Return the figure as an `<svg>` with a title for screen readers and ids that are unique to that title."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title}, transparent=True)
    text = buffer.getvalue()
    svg = text[text.index("<svg") :].replace("<svg", '<svg role="img" class="chart"', 1)
    prefix = f"chart-{zlib.crc32(title.encode()):08x}-"  # Matplotlib uses the same ids in every figure
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
