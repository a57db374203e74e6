"""The page of an attribution graph: one HTML file that works from `file://`.

The page holds nodes, edges, the heads that carry them, why the most important of these heads looked where they did,
and what is known about each feature. All values are JSON values; weights have eight significant digits, so that the
sums hold on the page as well. The script of the page (templates/graph/*.js) reads these names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinymodel_jax.analysis.circuits.freeze import frozen_pass
from tinymodel_jax.analysis.circuits.frozen import FrozenPass
from tinymodel_jax.analysis.circuits.graph import AttributionGraph, token_texts
from tinymodel_jax.analysis.circuits.head_paths import HeadPaths, head_paths
from tinymodel_jax.analysis.circuits.qk import divided_score
from tinymodel_jax.analysis.circuits.targets import Target, resolve, target_names
from tinymodel_jax.analysis.concepts.labels import NAMED_FROM
from tinymodel_jax.analysis.report.dashboard.records import rounded
from tinymodel_jax.analysis.report.graph.features import FeatureFacts, logit_facts, words_of
from tinymodel_jax.analysis.report.graph.links import link_from_dashboards, node_ids, relative_address
from tinymodel_jax.analysis.report.page import token_text, write_page
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.runtime.progress import Track, no_progress

DIGITS = 8
"""Significant digits of the weights."""
HEADS_OF_AN_EDGE = 3
"""Heads that the page names for an edge, the strongest."""
EXPLAINED = 32
"""Places (layer, head, query, key) whose attention score the page divides among pairs, those that carry most."""
PAIRS = 8
"""Pairs of sources that the page lists for a score."""


def save_page(
    path: str | os.PathLike[str],
    lm: TinyModel,
    prompt: Any,
    graph: AttributionGraph,
    targets: Any = None,
    *,
    dictionaries: str | Iterable[str] | None = None,
    facts: FeatureFacts | None = None,
    track: Track = no_progress,
) -> None:
    """Write the page of a graph. A file at `path` is replaced.

    Args:
        lm, prompt, targets, dictionaries: what `attribution_graph` was given.
        graph: its result, which may be pruned.
        facts: contexts and concepts of the features, by `measured_facts` or `dashboard_facts`; None shows what follows
            from the weights, their logit effects. The pages of a dashboard get links to this one.
        track: wraps the iterator over attention scores, for example with a progress bar.

    Raises:
        ValueError: the graph is of another prompt, of other dictionaries or of other targets, or as `frozen_pass`.
        OSError: the file cannot be written.
    """
    frozen = frozen_pass(lm, prompt, dictionaries, "float32")
    found = resolve(lm, frozen, targets)
    _require_same(lm, graph, frozen, found)
    path, facts = Path(path), facts or logit_facts(lm, graph)
    paths = head_paths(frozen, found, graph.nodes, graph.edges)
    places = _most_carrying(graph, paths)
    looks = [_look(lm, frozen, graph.tokens, *place) for place in track(places, "attention scores")]
    names = [token_text(name) for name in target_names(lm, graph, targets)]
    data = {
        "tokens": [token_text(token) for token in graph.tokens],
        "layers": lm.config.n_layers,
        "nodes": _node_columns(graph),
        "edges": _edge_columns(graph, paths),
        "looks": looks,
        "names": {int(number): name for number, name in zip(np.flatnonzero(graph.weights > 0), names, strict=True)},
        "named_from": NAMED_FROM,
        "features": facts.records,
        "pages": {tag: relative_address(page, path) for tag, page in facts.pages.items()},
        "words": words_of(lm, graph, facts),
    }
    text = "".join(data["tokens"][1:] if graph.tokens[:1] == ("[BEGIN]",) else data["tokens"])
    is_logit = graph.nodes["kind"][graph.weights > 0] == "logit"
    named = [f"“{name}”" if quoted else name for name, quoted in zip(names, is_logit, strict=True)]
    about = {"title": text, "targets": named, "scores": graph.scores, "model": f"{lm!r}"}
    write_page(path, "graph/page.html.jinja", {"data": data, "source": facts.source, **about})
    link_from_dashboards(facts.pages, path, f"{text} → {', '.join(named)}", graph)


def _require_same(lm: TinyModel, graph: AttributionGraph, frozen: FrozenPass, targets: Sequence[Target]) -> None:
    if graph.tokens != token_texts(lm, frozen):
        raise ValueError("save_page: the graph is of another prompt; give the one that it was made of.")
    of_dictionary = np.isin(graph.nodes["kind"], ("feature", "error")) & (graph.weights == 0)
    given = {dictionary.tag for dictionary in frozen.dictionaries}
    if unknown := sorted(set(graph.nodes["site"][of_dictionary].tolist()) - given):
        raise ValueError(
            f"save_page: the graph has nodes of {', '.join(unknown)}; give the `dictionaries` that it was made with."
        )
    asked = [(*target[:2], target.position, target.feature) for target in targets]
    last = graph.nodes[graph.weights > 0]
    held = [tuple(node[name].item() for name in ("kind", "site", "position", "feature")) for node in last]
    final, end = np.asarray(frozen.final), frozen.config.n_layers
    same = asked == held and all(
        target.place.layer < end
        or np.isclose(final[target.position] @ target.direction + target.bias, node["pre"], rtol=1e-3, atol=1e-3)
        for target, node in zip(targets, last, strict=True)
    )
    if not same:
        raise ValueError(
            f"save_page: the graph's targets are {held}, and those given are {asked} or have other signs; give the "
            "targets that the graph was made with, in their order."
        )


def _node_columns(graph: AttributionGraph) -> dict[str, list[Any]]:
    nodes = graph.nodes
    exact = {name: rounded(nodes[name], DIGITS) for name in ("value", "pre", "bias")}
    plain = {name: nodes[name].tolist() for name in ("kind", "site", "layer", "position", "feature", "expanded")}
    shares = {"influence": rounded(graph.influence), "start": rounded(graph.weights)}
    return {"id": node_ids(graph), "label": list(graph.labels), **plain, **exact, **shares}


def _edge_columns(graph: AttributionGraph, paths: HeadPaths) -> dict[str, list[Any]]:
    """Return the edges; `paths` has for each [direct, layer, head, through this head, layer, head, …], strongest first.

    What is missing to the weight is from the other heads and from paths through several.
    """
    edges, n_heads = graph.edges, paths.heads.shape[2]
    flat = paths.heads.reshape(len(edges), -1)
    strongest = np.argsort(-np.abs(flat), axis=1, kind="stable")[:, :HEADS_OF_AN_EDGE]
    values = rounded(np.take_along_axis(flat, strongest, axis=1))
    records = []
    for direct, numbers, parts in zip(rounded(paths.direct), strongest.tolist(), values, strict=True):
        through = [x for n, part in zip(numbers, parts, strict=True) if part for x in (*divmod(n, n_heads), part)]
        records.append([direct, *through])
    ends = {name: edges[name].tolist() for name in ("source", "target")}
    return {**ends, "weight": rounded(edges["weight"], DIGITS), "paths": records}


def _most_carrying(graph: AttributionGraph, paths: HeadPaths) -> list[tuple[int, int, int, int]]:
    """Return the places (layer, head, query, key) that carry most influence, as far as each carries any."""
    edges, position = graph.edges, graph.nodes["position"]
    one = position[edges["source"]] >= 0
    whole = np.bincount(edges["target"], np.abs(edges["weight"]), len(graph.nodes))
    reached = (graph.influence + graph.weights) / np.where(whole > 0, whole, 1)
    carried = np.abs(paths.heads[one]) * reached[edges["target"][one]][:, None, None]
    n, n_layers, n_heads = len(graph.tokens), *carried.shape[1:]
    sums = np.zeros((n, n, n_layers, n_heads))
    np.add.at(sums, (position[edges["target"][one]], position[edges["source"][one]]), carried)
    order = np.argsort(-sums, axis=None, kind="stable")[:EXPLAINED]
    found = np.stack(np.unravel_index(order[sums.ravel()[order] > 0], sums.shape), axis=1)
    return [(layer, head, query, key) for query, key, layer, head in found.tolist()]


def _look(
    lm: TinyModel, frozen: FrozenPass, tokens: tuple[str, ...], layer: int, head: int, query: int, key: int
) -> dict[str, Any]:
    """Return an attention score, its strongest pairs of sources, and the head's pattern over all keys."""
    found = divided_score(lm, frozen, tokens, layer, head, query, key)
    pattern = np.asarray(frozen.patterns)[layer, head, query, : query + 1]
    return {
        "place": [layer, head, query, key],
        "score": rounded(found.score),
        "pairs": [[pair.query, pair.key, rounded(pair.value)] for pair in found.strongest(PAIRS)],
        "pattern": np.round(pattern, 4).tolist(),
    }
