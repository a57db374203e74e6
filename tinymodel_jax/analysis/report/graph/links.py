"""Links between the page of a graph and dashboards: addresses of pages and nodes, and what dashboards say of graphs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from tinymodel_jax.analysis.circuits.graph import AttributionGraph
from tinymodel_jax.analysis.report.dashboard.build import GRAPHS, read_data, write_data
from tinymodel_jax.analysis.report.page import token_text


def relative_address(to: Path, page: Path) -> str:
    """Return the address of a file, relative to that of a page."""
    return quote(Path(os.path.relpath(to.absolute(), page.absolute().parent)).as_posix())


def link_from_dashboards(pages: Mapping[str, Path], page: Path, title: str, graph: AttributionGraph) -> None:
    """Add a graph to the dashboards of its dictionaries, in place of an older graph on the same page.

    Args:
        pages: the page of each dictionary's dashboard, by its tag.

    Raises:
        OSError: a data file cannot be read or written.
    """
    ids, nodes = node_ids(graph), graph.nodes
    for tag, dashboard in pages.items():
        listed: dict[int, list[Any]] = {}
        for number in np.flatnonzero((nodes["kind"] == "feature") & (nodes["site"] == tag)).tolist():
            position = int(nodes["position"][number])
            place = f"“{token_text(graph.tokens[position])}” at position {position}"
            listed.setdefault(int(nodes["feature"][number]), []).append([ids[number], place])
        address = relative_address(page, dashboard)
        others = [other for other in read_data(dashboard.parent, GRAPHS) if other["page"] != address]
        write_data(dashboard.parent, GRAPHS, [*others, {"page": address, "title": title, "nodes": listed}])


def node_ids(graph: AttributionGraph) -> list[str]:
    """Return a name for each node that is the same in all graphs of a prompt, such as `M2N123@5`; without spaces."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        kind, site, position, feature = (node[name].item() for name in ("kind", "site", "position", "feature"))
        site = site.replace(" ", ":")
        stem = {
            "feature": f"{site}N{feature}",
            "error": f"{site}:error",
            "bias": site,
            "logit": f"logit:{feature}",
            "direction": f"direction:{site}",
        }.get(kind, kind)
        name = stem if position < 0 else f"{stem}@{position}"
        while name in found:  # a target may also be a source, and directions may be at the same place
            name += "'"
        found[name] = None
    return list(found)
