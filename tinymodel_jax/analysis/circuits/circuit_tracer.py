"""Attribution graphs as JSON files of circuit-tracer, for its front end and for Neuronpedia.

circuit-tracer's graphs have four kinds of nodes: features, errors, token embeddings and logits. So a token's embedding
includes here that of its position, and biases and the node "rest" are left out: the links to a node need not add up.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinymodel_jax.analysis.circuits.graph import AttributionGraph, texts_of
from tinymodel_jax.analysis.circuits.targets import target_names
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.runtime.atomic_files import replace_file

METADATA = "graph-metadata.json"
"""The file in which circuit-tracer's front end finds the graphs of a folder."""
Names = Mapping[tuple[str, int], str]
"""Names of features, by the dictionary's tag and the feature."""


def save_circuit_tracer(
    path: str | os.PathLike[str],
    lm: TinyModel,
    prompt: Any,
    graph: AttributionGraph,
    targets: Any = None,
    *,
    scan: str = "tinymodel_jax",
    names: Names | None = None,
) -> None:
    """Write a graph in circuit-tracer's schema, version 1. A file at `path` is replaced.

    The slug of the graph is the file's name. circuit-tracer's front end finds graphs in `graph-metadata.json` beside
    them, to which this one is added. Where SAEs of attention outputs are among the dictionaries, layer 2L is the
    attention of layer L, and layer 2L + 1 its MLP; otherwise layers have their own numbers.

    Args:
        path: the file to write, such as `graphs/lily.json`; its folder must exist.
        lm: the model, as `attribution_graph` was given it.
        prompt: likewise.
        graph: its result, which may be pruned.
        targets: as `attribution_graph` was given them; None for the most likely next tokens.
        scan: the name under which the viewer knows the model.
        names: shown for the features, in place of their tags.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the graph is of another prompt or has another number of targets, or `graph-metadata.json` exists
            and is not circuit-tracer's.

    Source: circuit-tracer, frontend/graph_models.py.

    Examples:
        >>> from pathlib import Path
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import circuits
        >>> lm = TinyModel("mini")
        >>> prompt, targets = "The dog ran", [" to"]
        >>> graph = circuits.attribution_graph(lm, prompt, targets, max_nodes=60)
        >>> circuits.save_circuit_tracer("dog.json", lm, prompt, graph, targets)
        >>> Path("dog.json").exists()
        True
    """
    path, tok_ids = Path(path).expanduser(), np.asarray(lm.to_tokens(prompt)).reshape(-1)
    tok_ids = tok_ids[tok_ids != lm.config.pad_id]
    if tuple(texts_of(lm, tok_ids.tolist())) != graph.tokens:
        raise ValueError("save_circuit_tracer: the graph is of another prompt; give the one that it was made of.")
    logprobs = np.asarray(lm(tok_ids[None]))[0, -1]
    is_target = graph.weights > 0
    target_text = dict(zip(np.flatnonzero(is_target).tolist(), target_names(lm, graph, targets), strict=True))
    has_saes = bool(np.char.startswith(graph.nodes["site"], "A").any())
    n_rows = (2 if has_saes else 1) * lm.config.n_layers
    found: list[dict[str, Any] | None] = []
    for number, (node, influence) in enumerate(zip(graph.nodes, _cumulative(graph.influence), strict=True)):
        if node["kind"] in ("logit", "direction"):
            found.append(_logit(node, list(target_text).index(number), target_text[number], n_rows, logprobs))
        else:
            row = 2 * node["layer"] + (not str(node["site"]).startswith("A")) if has_saes else node["layer"]
            found.append(_source(node, int(row), tok_ids, influence, names or {}))
    taken: dict[str, dict[str, Any]] = {}
    ids: list[str | None] = []
    for record, target in zip(found, is_target.tolist(), strict=True):
        again = record is not None and target and record["node_id"] in taken  # a target that is also a source
        ids.append(None if record is None or again else record["node_id"])
        if record is not None and not again:
            taken.setdefault(record["node_id"], record)
    metadata = {
        "slug": re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem),
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": list(graph.tokens),
        "prompt": "".join(graph.tokens),
        "node_threshold": None,
        "schema_version": 1,
    }
    view = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    content = {"metadata": metadata, "qParams": view, "nodes": list(taken.values()), "links": _links(graph, ids)}
    listed = _others(path.with_name(METADATA), metadata["slug"])
    replace_file(path, json.dumps(content, ensure_ascii=False).encode())
    replace_file(path.with_name(METADATA), json.dumps({"graphs": [*listed, metadata]}, ensure_ascii=False).encode())


def _others(path: Path, slug: str) -> list[dict[str, Any]]:
    """Return the other graphs that a file of metadata lists."""
    if not path.exists():
        return []
    try:
        return [graph for graph in json.loads(path.read_bytes())["graphs"] if graph["slug"] != slug]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not circuit-tracer's list of graphs; write to another folder.") from error


def _links(graph: AttributionGraph, ids: list[str | None]) -> list[dict[str, Any]]:
    weights: dict[tuple[str, str], float] = {}
    for edge in graph.edges:
        source, target = ids[edge["source"]], ids[edge["target"]]
        if source and target:  # a token and its position are one node, so their links are added up
            weights[source, target] = weights.get((source, target), 0.0) + float(edge["weight"])
    return [{"source": source, "target": target, "weight": weight} for (source, target), weight in weights.items()]


def _cumulative(influence: np.ndarray) -> list[float]:
    """Return for each node the share of all influence that it and the more influential nodes have."""
    order = np.argsort(-influence, kind="stable")
    shares = np.zeros(len(influence))
    shares[order] = np.cumsum(influence[order]) / max(influence.sum(), 1e-300)
    return shares.tolist()


def _source(node: np.void, row: int, tok_ids: np.ndarray, influence: float, names: Names) -> dict[str, Any] | None:
    """Return the record of a feature, an error or an embedding; None for a node that circuit-tracer does not have."""
    kind, site, position, feature = (node[name].item() for name in ("kind", "site", "position", "feature"))
    if kind in ("token", "position"):
        token = int(tok_ids[position])
        record = _common(f"E_{token}_{position}", position, "E", position, "embedding", f"E_{token}-{position}")
    elif kind == "feature":
        pair = (row + feature) * (row + feature + 1) // 2 + feature  # Cantor's numbering of pairs
        own = f"{row}_{feature}_{position}", pair, str(row), position, "cross layer transcoder", f"{row}_{feature}-0"
        record = _common(*own)
        record |= {"activation": node["value"].item(), "clerp": names.get((site, feature), f"{site}N{feature}")}
    elif kind == "error":  # circuit-tracer's id, 0_{row}_{position}, may be that of a feature of layer 0
        own = f"error_{row}_{position}", -1, str(row), position, "mlp reconstruction error", f"{row}_{position}-0"
        record = _common(*own)
    else:
        return None
    return {**record, "influence": influence}


def _logit(node: np.void, rank: int, text: str, n_rows: int, logprobs: np.ndarray) -> dict[str, Any]:
    """Return the record of a logit; a direction gets an id after those of the vocabulary, as in circuit-tracer."""
    is_token, position = node["kind"] == "logit", int(node["position"])
    token = int(node["feature"]) if is_token else len(logprobs) + rank
    p = float(np.exp(logprobs[token])) if is_token else 0.0
    own = f"{n_rows + 1}_{token}_{position}", token, str(n_rows + 1), position, "logit", f"L_{token}-{position}"
    more = {"token_prob": p, "is_target_logit": rank == 0, "clerp": f'Output "{text}" (p={p:.3f})'}
    return {**_common(*own), **more}


def _common(node_id: str, feature: int, layer: str, position: int, kind: str, js_id: str) -> dict[str, Any]:
    return {
        "node_id": node_id,
        "feature": feature,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js_id,
        "clerp": "",
        "influence": None,
        "activation": None,
    }
