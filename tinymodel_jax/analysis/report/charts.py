"""Charts for pages: Matplotlib figures as SVG text, without a display and without Matplotlib's global state.

Names, tokens and titles are shown as they are: a `$` in them begins no formula (`parse_math=False`).
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, ACCENT, SECOND = "#2b2b33", "#3b6fb6", "#c2571a"


def training_curve(steps: Sequence[int], explained: Sequence[float], l0: Sequence[float]) -> str:
    """Draw explained variance and L0 over the steps of a dictionary's training."""
    figure, axes = _figure(6.4, 2.8)
    axes.plot(steps, explained, color=ACCENT)
    axes.set(xlabel="step", ylabel="explained variance", ylim=(0, 1.02))
    axes.yaxis.label.set_color(ACCENT)
    other = axes.twinx()
    other.plot(steps, l0, color=SECOND)
    other.set(ylabel="L0 (active features a token)", ylim=(0, None))
    other.yaxis.label.set_color(SECOND)
    return _svg(figure, "Explained variance and L0 while the transcoder trains")


def bars(values: Mapping[str, float], label: str, title: str) -> str:
    """Draw labelled horizontal bars, the first on top."""
    figure, axes = _figure(6.4, 0.8 + 0.26 * len(values))
    numbers = list(values.values())
    axes.barh(range(len(numbers)), numbers, color=[ACCENT if n >= 0 else SECOND for n in numbers])
    axes.set_yticks(range(len(numbers)), list(values), fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel(label, parse_math=False)
    return _svg(figure, title)


def heat_map(table: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str) -> str:
    """Draw F1 scores as a labelled heat map; NaN stays white."""
    return _svg(heat_map_figure(table, rows, columns), title)


def heat_map_figure(table: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Figure:
    """Return the figure of `heat_map`."""
    figure, axes = _figure(2.4 + 0.36 * len(columns), 1.2 + 0.17 * len(rows))
    image = axes.imshow(table, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(len(columns)), list(columns), rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7, parse_math=False)
    figure.colorbar(image, ax=axes, label="F1")
    return figure


def effects_figure(tables: Mapping[str, np.ndarray], columns: Mapping[str, Sequence[str]], title: str) -> Figure:
    """Return heat maps under each other, a layer a row: 0 white, 1 blue, -1 orange, larger ones as those.

    Args:
        tables: name of each map, and its numbers (layers, places).
        columns: labels of the places of each map.
    """
    from matplotlib.colors import LinearSegmentedColormap

    widest = max(table.shape[1] for table in tables.values())
    figure = _empty_figure(2.2 + 0.26 * max(widest, 12), 0.5 + sum(0.9 + 0.24 * len(t) for t in tables.values()))
    colours = LinearSegmentedColormap.from_list("effects", [SECOND, "white", ACCENT])
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    images = []
    for axes, (name, table) in zip(panels, tables.items(), strict=True):
        images.append(axes.imshow(table, aspect="auto", vmin=-1, vmax=1, cmap=colours, interpolation="nearest"))
        axes.set_xticks(range(table.shape[1]), list(columns[name]), rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(len(table)), [f"layer {layer}" for layer in range(len(table))], fontsize=7)
        axes.set_title(name, fontsize=9, loc="left")
    figure.colorbar(images[0], ax=list(panels), label="effect", aspect=40)
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _empty_figure(width, height)
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _empty_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # loads when something is drawn

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any, title: str) -> str:
    """Return the figure as an `<svg>` with a title for screen readers, and ids that no chart of another title has."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title}, transparent=True)
    text = buffer.getvalue()
    svg = text[text.index("<svg") :].replace("<svg", '<svg role="img" class="chart"', 1)
    prefix = f"chart-{zlib.crc32(title.encode()):08x}-"  # Matplotlib numbers parts alike in every figure
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
