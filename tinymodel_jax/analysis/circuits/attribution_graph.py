"""`attribution_graph`: build the graph of a prompt, from its targets backwards.

Each expansion divides a node's value among everything that is written before it, exactly. The nodes with the most
influence on the targets are expanded, until the most influential `max_nodes` sources are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tinymodel_jax.analysis.circuits.freeze import frozen_pass
from tinymodel_jax.analysis.circuits.frozen import FrozenPass, Precision, exact
from tinymodel_jax.analysis.circuits.graph import EDGE, NODE, AttributionGraph, label_of, token_texts
from tinymodel_jax.analysis.circuits.sources import TOGETHER, contributions, encoder_place, source_table
from tinymodel_jax.analysis.circuits.targets import Target, resolve
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.runtime.progress import Track, no_progress

AT_ONCE = 256
"""Nodes that are expanded before influence is computed again."""
DEEPEST = 2**20
"""`Block.depth` of targets, which nothing reads."""


def attribution_graph(
    lm: TinyModel,
    prompt: Any,
    targets: Any = None,
    max_nodes: int = 1000,
    *,
    dictionaries: str | Iterable[str] | None = None,
    influence_share: float = 1.0,
    dtype: Precision = "float32",
    track: Track = no_progress,
) -> AttributionGraph:
    """Return the graph of direct effects behind a prompt's predictions.

    Attention patterns are those of the prompt. Everything else between sources and targets is linear, so each target's
    incoming edges and its bias add up to its value:

        sum of the weights of its incoming edges + bias = pre-activation or logit

    Args:
        prompt: a text, or token ids (seq,) or (1, seq).
        targets: what to explain: None for the most likely next tokens (0.95 of the probability, at most 10), or one
            or a list of: a token's id or text, `logit_difference(a, b)`, `circuits.feature(tag, position)`,
            `circuits.direction(hook, vector, position)`.
        max_nodes: nodes of the graph at most, with targets, biases and the rest.
        dictionaries: as for `frozen_pass`.
        influence_share: stop when the nodes have this share of the influence on the targets, above 0 to 1.
        dtype: number format, "float32" or "float64".
        track: wraps the iterator over the batches of nodes that a round expands, for example with a progress bar.

    Raises:
        ValueError: as `frozen_pass`, a target does not exist, or `max_nodes` is too small for the targets and biases.

    Source: transcoder circuits (Dunefsky et al. 2024); circuit tracing (Ameisen et al. 2025) and its implementation
    circuit-tracer.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import circuits
        >>> lm = TinyModel("mini")
        >>> graph = circuits.attribution_graph(lm, "The dog ran to the", " woods", max_nodes=100)
        >>> graph.labels[-1], round(graph.scores.replacement, 1)
        ("logit ' woods' @5", 0.9)
    """
    if not 0 < influence_share <= 1:
        raise ValueError(f"attribution_graph: influence_share={influence_share}; it must be above 0 and at most 1.")
    frozen = frozen_pass(lm, prompt, dictionaries, dtype)
    found, table = resolve(lm, frozen, targets), source_table(frozen)
    n_fixed = len(found) + int((table["kind"] == "bias").sum()) + 1
    if max_nodes <= n_fixed:
        raise ValueError(
            f"attribution_graph: max_nodes={max_nodes}; {len(found)} targets, the biases and the rest are {n_fixed} "
            f"nodes, so give at least {n_fixed + 1}."
        )
    with exact(dtype):
        expansion = Expansion(frozen, table, found)
        chosen = expansion.most_influential(max_nodes - n_fixed, influence_share, track)
        unexplained = _unexplained(frozen, table, found)
    return _graph(expansion, chosen, token_texts(lm, frozen), unexplained)


class Block(NamedTuple):
    """Nodes that were expanded together."""

    depth: int
    """Sort key of the place that they read in the forward pass."""
    ids: Int[np.ndarray, " n"]
    """Columns of the features in the table of sources; -1 - number of the target for targets."""
    rows: Float[np.ndarray, "n sources"]
    """What each of the first sources adds."""
    sizes: Float[np.ndarray, " n"]
    """Sums of the absolute values of the rows."""


class Expansion:
    """What every source adds to the targets and to the features expanded so far."""

    def __init__(self, frozen: FrozenPass, table: np.ndarray, targets: list[Target]) -> None:
        self.frozen, self.table, self.targets = frozen, table, targets
        self.is_feature = table["kind"] == "feature"
        self.expanded = np.zeros(len(table), bool)
        self.blocks: list[Block] = []
        tags = [dictionary.tag for dictionary in frozen.dictionaries]
        self._dictionary = np.array(
            [tags.index(s) if f else -1 for s, f in zip(table["site"], self.is_feature, strict=True)]
        )
        self._index = np.full(len(table), -1)
        for number, dictionary in enumerate(frozen.dictionaries):
            active = np.asarray(dictionary.active)
            self._index[self._dictionary == number] = np.asarray(dictionary.where)[active]
        for numbers, rows in _of_targets(frozen, targets):
            self._add(DEEPEST, -1 - numbers, rows)

    def most_influential(self, n: int, share: float, track: Track = no_progress) -> Int[np.ndarray, " chosen"]:
        """Return the columns of the most influential sources, at most n; of biases, all, beside these.

        Features among them are expanded. An expansion may change which are the most influential ones.
        """
        bias = self.table["kind"] == "bias"
        while True:
            influence = np.where(bias, 0, self._influence())
            order = np.argsort(-influence, kind="stable")
            enough = int(np.searchsorted(np.cumsum(influence[order]), share * influence.sum())) + 1
            chosen = order[: min(n, enough, int((influence > 0).sum()))]
            pending = chosen[self.is_feature[chosen] & ~self.expanded[chosen]][:AT_ONCE]
            if not len(pending):
                return np.sort(np.r_[chosen, np.flatnonzero(bias)])
            known = len(chosen) - int((self.is_feature[chosen] & ~self.expanded[chosen]).sum())
            for batch in track(self._batches(pending), f"expanding nodes, {known:,} of {n:,} known"):
                self._expand(batch)

    def _batches(self, columns: Int[np.ndarray, " n"]) -> list[Int[np.ndarray, " batch"]]:
        """Return the features in groups of one dictionary, which one compiled call expands."""
        found = []
        for number in np.unique(self._dictionary[columns]):
            of_one = columns[self._dictionary[columns] == number]
            found += [of_one[start : start + TOGETHER] for start in range(0, len(of_one), TOGETHER)]
        return found

    def _expand(self, columns: Int[np.ndarray, " batch"]) -> None:
        dictionary = self.frozen.dictionaries[self._dictionary[columns[0]]]
        directions = np.asarray(dictionary.W_enc)[self._index[columns]]
        rows = contributions(self.frozen, directions, self.table["position"][columns], encoder_place(dictionary))
        self._add(2 * dictionary.layer + (dictionary.part == "mlp"), columns, rows)
        self.expanded[columns] = True

    def _add(self, depth: int, ids: Int[np.ndarray, " n"], rows: Float[np.ndarray, "n sources"]) -> None:
        reached = np.flatnonzero(rows.any(axis=0))
        rows = rows[:, : reached[-1] + 1 if len(reached) else 0].copy()  # the sources before the place come first
        self.blocks.append(Block(depth, ids, rows, np.abs(rows).sum(axis=1)))

    def _influence(self) -> Float[np.ndarray, " sources"]:
        """Return how much each source influences the targets, as `AttributionGraph.influence` defines it."""
        found = np.zeros(len(self.table))
        for block in sorted(self.blocks, key=lambda block: -block.depth):
            if block.depth == DEEPEST:
                started = np.array([self.targets[-1 - i].weight for i in block.ids])
            else:
                started = found[block.ids]
            shares = started / np.where(block.sizes > 0, block.sizes, 1)
            found[: block.rows.shape[1]] += shares @ np.abs(block.rows)
        return found


def _of_targets(
    frozen: FrozenPass, targets: list[Target], responding: bool = False
) -> Iterator[tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n sources"]]]:
    """Yield the numbers of the targets that are read at one place, and what each source adds to them."""
    for place in dict.fromkeys(target.place for target in targets):
        numbers = np.array([i for i, target in enumerate(targets) if target.place == place])
        directions = np.stack([targets[i].direction for i in numbers])
        positions = np.array([targets[i].position for i in numbers])
        yield numbers, contributions(frozen, directions, positions, place, responding=responding)


def _unexplained(frozen: FrozenPass, table: np.ndarray, targets: list[Target]) -> float:
    """Return the share of errors in the total effects of everything that is not a feature's activation."""
    error, feature = table["kind"] == "error", table["kind"] == "feature"
    given = np.where(feature, 0, 1.0)  # of a feature, only its encoder's bias is given
    active = feature & (table["value"] != 0)
    given[active] = table["bias"][active] / table["value"][active]
    shares = np.zeros(len(targets))
    for numbers, rows in _of_targets(frozen, targets, responding=True):
        effects = np.abs(rows * given)
        shares[numbers] = effects[:, error].sum(axis=1) / effects.sum(axis=1)
    weights = [target.weight for target in targets]
    return float(np.dot(weights, shares) / sum(weights))


def _graph(
    expansion: Expansion, chosen: Int[np.ndarray, " n"], tokens: tuple[str, ...], unexplained: float
) -> AttributionGraph:
    table, targets = expansion.table[chosen], expansion.targets
    n, number = len(chosen), np.full(len(expansion.table), -1)
    number[chosen] = np.arange(n)
    nodes = np.zeros(n + 1 + len(targets), NODE)
    for name in table.dtype.names or ():
        nodes[name][:n] = table[name]
    nodes["pre"][:n] = np.where(table["kind"] == "feature", table["value"], 0)
    nodes["expanded"][:n] = expansion.expanded[chosen]
    nodes[n] = ("rest", "rest", -1, -1, -1, 1, 0, 0, False)
    edges = []
    for block in expansion.blocks:
        at = np.where(block.ids < 0, n - block.ids, number[block.ids])  # targets follow the rest
        for place, node, row in zip(at, block.ids, block.rows, strict=True):
            if node < 0:
                target = targets[-1 - node]
                pre = row.sum(dtype=np.float64) + target.bias
                where = target.kind, target.site, target.layer, target.position, target.feature
                value = pre if target.kind != "feature" or _is_active(expansion.table, target) else 0
                nodes[place] = (*where, value, pre, target.bias, True)
        edges.append(_edges(block.rows[at >= 0], at[at >= 0], chosen, n))
    weights = np.r_[np.zeros(n + 1), [target.weight for target in targets]]
    joined = np.concatenate(edges)
    joined = joined[np.argsort(joined["target"], kind="stable")]
    labels = [label_of(node, tokens) for node in nodes[: n + 1]]
    for node, target in zip(nodes[n + 1 :], targets, strict=True):
        labels.append(f"{target.name} @{target.position}" if target.name else label_of(node, tokens))
    return AttributionGraph(nodes, joined, tokens, weights, unexplained, tuple(labels))


def _is_active(table: np.ndarray, target: Target) -> bool:
    here = (table["site"] == target.site) & (table["position"] == target.position)
    return bool((here & (table["kind"] == "feature") & (table["feature"] == target.feature)).any())


def _edges(rows: np.ndarray, targets: np.ndarray, chosen: np.ndarray, rest: int) -> np.ndarray:
    """Return the edges of rows: those from chosen sources, and from the rest what is missing to each sum."""
    within = rows[:, chosen[chosen < rows.shape[1]]].astype(np.float64)
    of, sources = np.nonzero(within)
    found = np.zeros(len(of) + len(rows), EDGE)
    found["source"], found["target"] = np.r_[sources, np.full(len(rows), rest)], np.r_[targets[of], targets]
    found["weight"] = np.r_[within[of, sources], rows.sum(axis=1, dtype=np.float64) - within.sum(axis=1)]
    return found
