"""Charts of measured dictionaries: sparsity against quality, how often features are active, which of them matter.

A dictionary is a mapping with `site` and `results` (number by name; None where it is not defined), as `sweep.json` and
`tinymodel eval` hold it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinymodel_jax.runtime.atomic_files import replaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 20
"""Features that are shown one by one."""


def draw_pareto(axes: Axes, records: Sequence[Mapping[str, Any]], key: str, label: str) -> None:
    """Draw L0, on a logarithmic axis, against one of the results: a line a site."""
    from matplotlib.ticker import LogFormatter

    for site in dict.fromkeys(record["site"] for record in records):
        found = [record["results"] for record in records if record["site"] == site]
        points = sorted((r["l0"], r[key]) for r in found if r["l0"] and r[key] is not None)
        if points:  # a dictionary without active features has no place on a logarithmic axis
            axes.plot(*zip(*points, strict=True), marker="o", label=site)
    axes.set_xlabel("L0 (active features a token)")
    axes.set_ylabel(label)
    if axes.lines:
        axes.set_xscale("log")
        axes.legend(fontsize="small", ncols=1 + len(axes.lines) // 9)
    for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        ticks(LogFormatter(minor_thresholds=(1.5, 0.5)))  # plain numbers, few where the axis is long
    axes.grid(alpha=0.3, which="both")


def draw_densities(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw how many features are active on which share of the tokens: a line a dictionary, dead ones on the left."""
    for record in records:
        density = record["density"]
        edges = np.array(density["log10_edges"])
        (line,) = axes.step(edges, [density["features"][0], *density["features"]], label=record["name"])
        axes.plot([edges[0] - 0.75], [density["dead"]], "x", color=line.get_color())
    first, *rest = records[0]["density"]["log10_edges"][::2]
    axes.set_xticks([first - 0.75, first, *rest], ["dead", *(f"$10^{{{edge:.0f}}}$" for edge in (first, *rest))])
    axes.set(xlabel="share of the tokens on which a feature is active", ylabel="features", ylim=(0, None))
    for name in axes.legend(fontsize="small", ncols=1 + len(records) // 9).get_texts():
        name.set_parse_math(False)  # a folder may be called k=$8$
    axes.grid(alpha=0.3)


def plot_importance(table: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: the most important features with their intervals, and how much of the KL the first n carry.

    Args:
        table: what `tinymodel sweep --data` writes, the most important features first.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    first, share = figure.subplots(1, 2)
    shown = table["features"][:SHOWN]
    means, margins = zip(*((mean, margin or 0) for mean, margin in (one["kl_all"] for one in shown)), strict=True)
    first.errorbar(means, range(len(shown)), xerr=margins, fmt="o", capsize=2, markersize=4)
    first.set_yticks(range(len(shown)), [str(one["feature"]) for one in shown], fontsize=8)
    unit = "nats per position, 95 %" if any(margins) else "nats per position"
    first.set(xlabel=f"KL of turning it off ({unit})", ylabel=f"feature of {table['site']}", xlim=(0, None))
    first.invert_yaxis()
    carried = np.cumsum([one["kl_all"][0] for one in table["features"]])
    share.plot(np.arange(1, len(carried) + 1), carried / max(carried[-1], np.finfo(float).tiny))
    share.set(
        xlabel="features, the most important first", ylabel="share of the KL summed over features", ylim=(0, 1.02)
    )
    for axes in (first, share):
        axes.grid(alpha=0.3)
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def plot_evaluations(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG: L0 against explained variance and against CE recovered, and the densities."""
    from matplotlib.figure import Figure  # not pyplot: nothing global, no display

    figure = Figure(figsize=(15.6, 4.4), layout="constrained")
    explained, recovered, densities = figure.subplots(1, 3)
    draw_pareto(explained, records, "explained_variance", "explained variance")
    draw_pareto(recovered, records, "ce_recovered", "CE recovered")
    draw_densities(densities, records)
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
