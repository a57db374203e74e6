"""An attribution graph as two arrays: nodes, and edges whose weights add up to each target's value.

For every expanded node,

    sum of the weights of its incoming edges + bias = pre

where `pre` is a feature's pre-activation or a logit. What is not a node of its own is part of the node "rest", so that
the sums are complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tinymodel_jax.analysis.circuits.frozen import FrozenPass
from tinymodel_jax.analysis.circuits.stored import stored
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.runtime.atomic_files import replace_file

NODE = np.dtype(
    [("kind", "U9"), ("site", "U32"), ("layer", "i4"), ("position", "i4"), ("feature", "i4"), ("value", "f8"),
     ("pre", "f8"), ("bias", "f8"), ("expanded", "?")]
)  # fmt: skip
"""Fields of a node, a NumPy structured dtype.

- `kind`: "token", "position", "bias", "feature", "error", "rest", or as a target "logit", "feature", "direction"
- `site`: a dictionary's tag, or the name of a parameter or hook point
- `layer`: -1 for the embeddings and the rest, n_layers for logits
- `position`: -1 for biases and the rest, which are of all positions
- `feature`: the feature, the token's id for tokens and logits, -1 for the others
- `value`: a feature's activation, a logit or a reading; 1 for the others
- `pre`: the pre-activation; the logit or reading; 0 for the others
- `bias`: the encoder's bias; b_U of a logit
- `expanded`: whether the incoming edges are known
"""
EDGE = np.dtype([("source", "i4"), ("target", "i4"), ("weight", "f8")])
"""Fields of an edge, a NumPy structured dtype.

- `source`: index of the node that the edge starts at
- `target`: index of the node that it leads to
- `weight`: what the source adds to the target's `pre`
"""


class Scores(NamedTuple):
    """How much of a graph is explained; shares between 0 and 1."""

    replacement: float
    """Influence of token embeddings as a share of that of token embeddings and errors (circuit-tracer's score)."""
    completeness: float
    """Share of the nodes' input that is not from errors, weighted by the nodes' influence (circuit-tracer's score)."""
    unexplained: float
    """Share of the errors in the total effects on the targets: the sizes of the effects of all errors, divided by those
    of all embeddings, biases and errors, on the whole prompt, whatever nodes the graph has."""


@dataclasses.dataclass(frozen=True, eq=False)
class AttributionGraph:
    """The direct effects between the parts of one prompt's frozen pass, as `attribution_graph` returns them.

    What is not a node of its own is part of the node "rest", so that the edges to every expanded node and its bias add
    up to its `pre`.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import circuits
        >>> lm = TinyModel("mini")
        >>> graph = circuits.attribution_graph(lm, "The dog ran", " to", max_nodes=60)
        >>> len(graph.nodes) <= 60, graph.imbalance < 1e-3
        (True, True)
        >>> smaller = graph.prune(node_share=0.5)
        >>> len(smaller.nodes) < len(graph.nodes)
        True
    """

    nodes: np.ndarray
    """Structured array (nodes,) of dtype `NODE`; sources first, then targets."""
    edges: np.ndarray
    """Structured array (edges,) of dtype `EDGE`, sorted by target."""
    tokens: tuple[str, ...]
    """Text of each token of the prompt."""
    weights: Float[np.ndarray, " nodes"]
    """Share of the influence that starts at each node: the probabilities of the logits; 0 for all but targets."""
    unexplained: float
    """As in `Scores`: a share between 0 and 1."""
    labels: tuple[str, ...]
    """Name of each node, such as `M2N123 @5`."""

    @property
    def influence(self) -> Float[np.ndarray, " nodes"]:
        """How much each node influences the targets: the sum over paths of the product of the edges' shares.

        An edge's share is its size divided by the sizes of all edges to the same node (Source: circuit-tracer).
        """
        found = self.weights.copy()
        for edges in self._by_depth():
            np.add.at(found, edges["source"], self._shares(edges) * found[edges["target"]])
        return found - self.weights

    @property
    def scores(self) -> Scores:
        """How much of the targets' influence the graph explains."""
        influence, kind = self.influence, self.nodes["kind"]
        token, error = influence[kind == "token"].sum(), influence[kind == "error"].sum()
        output = influence + self.weights
        from_errors = kind[self.edges["source"]] == "error"
        shares = self._shares(self.edges) * output[self.edges["target"]]
        replacement = token / (token + error) if token + error else 1.0
        completeness = 1 - shares[from_errors].sum() / output.sum()
        return Scores(float(replacement), float(completeness), self.unexplained)

    @property
    def imbalance(self) -> float:
        """The largest difference between a node's `pre` and the sum of its incoming edges and its bias."""
        sums = self.nodes["bias"].copy()
        np.add.at(sums, self.edges["target"], self.edges["weight"])
        known = self.nodes["expanded"]
        return float(np.abs(sums - self.nodes["pre"])[known].max())

    def incoming(self, node: int) -> np.ndarray:
        """Return the edges to a node, of dtype `EDGE`, the largest absolute weight first.

        Args:
            node: index into `nodes`.
        """
        return self._largest_first("target", node)

    def outgoing(self, node: int) -> np.ndarray:
        """Return the edges from a node, of dtype `EDGE`, the largest absolute weight first.

        Args:
            node: index into `nodes`.
        """
        return self._largest_first("source", node)

    def prune(self, node_share: float = 0.8, edge_share: float = 0.98) -> AttributionGraph:
        """Return the graph with the most influential nodes and edges; the node "rest" takes up what the others added.

        Args:
            node_share: the fewest nodes are kept that have this share of all nodes' influence; targets are kept.
            edge_share: of the edges between them, the fewest with this share of the influence that edges carry.

        Raises:
            ValueError: a share is not above 0 and at most 1.

        Source: circuit-tracer, whose defaults these are.
        """
        for name, share in (("node_share", node_share), ("edge_share", edge_share)):
            if not 0 < share <= 1:
                raise ValueError(f"prune: {name}={share}; it must be above 0 and at most 1.")
        rest = self.nodes["kind"] == "rest"
        kept = _largest(np.where(rest, 0, self.influence), node_share) | (self.weights > 0)
        pruned = self._with(kept, np.ones(len(self.edges), bool))
        carried = pruned._shares(pruned.edges) * (pruned.influence + pruned.weights)[pruned.edges["target"]]
        carried[pruned.nodes["kind"][pruned.edges["source"]] == "rest"] = 0
        pruned = pruned._with(np.ones(len(pruned.nodes), bool), _largest(carried, edge_share))
        while True:  # nodes that no longer lead anywhere
            leading = np.isin(np.arange(len(pruned.nodes)), pruned.edges["source"]) | (pruned.weights > 0)
            if (leading | (pruned.nodes["kind"] == "rest")).all():
                return pruned
            pruned = pruned._with(leading, np.ones(len(pruned.edges), bool))

    def _with(self, nodes: np.ndarray, edges: np.ndarray) -> AttributionGraph:
        """Return the graph of some nodes and edges, in which the rest has what the others added."""
        rest = self.nodes["kind"] == "rest"
        nodes = nodes | rest
        target_kept = nodes[self.edges["target"]]
        kept = target_kept & nodes[self.edges["source"]] & edges & ~rest[self.edges["source"]]
        number = np.cumsum(nodes) - 1
        weights = np.zeros(len(self.nodes))
        np.add.at(weights, self.edges["target"][~kept], self.edges["weight"][~kept])
        targets = np.flatnonzero(nodes & self.nodes["expanded"])
        own = self.edges[kept]
        joined = np.zeros(len(own) + len(targets), EDGE)
        joined["source"] = number[np.r_[own["source"], np.full(len(targets), np.flatnonzero(rest)[0])]]
        joined["target"] = number[np.r_[own["target"], targets]]
        joined["weight"] = np.r_[own["weight"], weights[targets]]
        joined = joined[np.argsort(joined["target"], kind="stable")]
        labels = tuple(np.array(self.labels, object)[nodes])
        return dataclasses.replace(
            self, nodes=self.nodes[nodes], edges=joined, weights=self.weights[nodes], labels=labels
        )

    def to_networkx(self) -> Any:
        """Return a `networkx.DiGraph`: nodes with their fields and labels, edges with their weights.

        Raises:
            ImportError: networkx is not installed.
        """
        try:
            import networkx
        except ImportError as error:
            raise ImportError("to_networkx needs networkx: pip install 'tinymodel-jax[graph]'") from error
        found = networkx.DiGraph()
        for i, (node, label) in enumerate(zip(self.nodes, self.labels, strict=True)):
            found.add_node(i, label=label, **{name: node[name].item() for name in NODE.names or ()})
        found.add_weighted_edges_from(zip(*(self.edges[name].tolist() for name in EDGE.names or ()), strict=True))
        return found

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `graph.safetensors` (the numbers) and `graph.json` (the texts) into a folder.

        Raises:
            OSError: the folder or a file cannot be written.
        """
        from safetensors.numpy import save

        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        texts = {name: self.nodes[name].tolist() for name in ("kind", "site")}
        texts |= {"labels": self.labels, "tokens": self.tokens, "unexplained": self.unexplained}
        numbers = {f"edges.{n}": np.ascontiguousarray(self.edges[n]) for n in EDGE.names or ()}
        numbers |= {f"nodes.{n}": np.ascontiguousarray(self.nodes[n]) for n in NODE.names or () if n not in texts}
        replace_file(folder / "graph.safetensors", save({**numbers, "weights": self.weights}))
        replace_file(folder / "graph.json", json.dumps(texts, ensure_ascii=False).encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> AttributionGraph:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the folder holds no graph.
            ValueError: its files are damaged.
        """
        with stored(folder, "graph") as (texts, numbers):
            nodes = _table(NODE, {**{f"nodes.{n}": texts[n] for n in ("kind", "site")}, **numbers}, "nodes")
            tokens, labels, unexplained = tuple(texts["tokens"]), tuple(texts["labels"]), texts["unexplained"]
            return cls(nodes, _table(EDGE, numbers, "edges"), tokens, numbers["weights"], unexplained, labels)

    def _largest_first(self, end: str, node: int) -> np.ndarray:
        found = self.edges[self.edges[end] == node]
        return found[np.argsort(-np.abs(found["weight"]), kind="stable")]

    def _shares(self, edges: np.ndarray) -> np.ndarray:
        """Return the size of each edge as a share of the sizes of all edges to the same node."""
        whole = np.bincount(self.edges["target"], np.abs(self.edges["weight"]), len(self.nodes))[edges["target"]]
        return np.abs(edges["weight"]) / np.where(whole > 0, whole, 1)

    def _by_depth(self) -> list[np.ndarray]:
        """Return the edges in groups: those to the nodes that are computed last first."""
        depth = 2 * self.nodes["layer"] + ~np.char.startswith(self.nodes["site"], "A")
        depth[self.weights > 0] = depth.max() + 1
        of_edge = depth[self.edges["target"]]
        return [self.edges[of_edge == level] for level in np.unique(of_edge)[::-1]]


def _largest(values: np.ndarray, share: float) -> np.ndarray:
    """Return a mask of the fewest values that add up to a share of the sum."""
    order = np.argsort(-values, kind="stable")
    summed = np.cumsum(values[order])
    mask = np.zeros(len(values), bool)
    mask[order[: int(np.searchsorted(summed, share * summed[-1] * (1 - 1e-12))) + 1]] = True
    return mask & (values > 0)


def _table(dtype: np.dtype, columns: Mapping[str, Any], prefix: str) -> np.ndarray:
    own = {name: columns[f"{prefix}.{name}"] for name in dtype.names or ()}
    table = np.zeros(max(map(len, own.values())), dtype)
    for name, column in own.items():
        table[name] = column
    return table


def label_of(node: np.void, tokens: tuple[str, ...]) -> str:
    """Return the name of a node or source, such as `M2N123 @5`."""
    kind, site, position, feature = (node[name].item() for name in ("kind", "site", "position", "feature"))
    at = f" @{position}" if position >= 0 else ""
    names = {
        "feature": f"{site}N{feature}{at}",
        "token": f"token {tokens[position]!r}{at}",
        "position": f"position{at}",
        "error": f"{site} error{at}",
        "bias": site,
        "rest": "rest",
        "logit": f"logit {feature}{at}",
        "direction": f"{site}{at}",
    }
    return names[kind]


def token_texts(lm: TinyModel, frozen: FrozenPass) -> tuple[str, ...]:
    """Return the text of each token of the prompt, as `texts_of`."""
    return tuple(texts_of(lm, np.asarray(frozen.tok_ids)[: int(frozen.length)].tolist()))


def texts_of(lm: TinyModel, tokens: Sequence[int]) -> list[str]:
    """Return the text of each token; its id, if the model has no tokenizer or its files are not here."""
    try:
        tokenizer = lm.tokenizer
    except (ValueError, FileNotFoundError):
        return list(map(str, tokens))
    return [tokenizer.decode([token]) for token in tokens]
