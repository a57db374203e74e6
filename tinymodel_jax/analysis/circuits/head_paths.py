"""Which heads carry an edge: the edges of an attribution graph, divided among paths.

The last head on a path writes at the target's position, and what follows stays at that position. So

    edge = path without attention + sum over heads of the paths through this head alone + paths through several heads

where the first two are computed in closed form, and the third is what remains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tinymodel_jax.analysis.circuits.frozen import FrozenDictionary, FrozenPass
from tinymodel_jax.analysis.circuits.sources import Place, encoder_place
from tinymodel_jax.analysis.circuits.targets import Target

TOGETHER = 4096
"""Edges that are divided together."""


class HeadPaths(NamedTuple):
    """What the paths of each edge add to the target's `pre`. The sum over all paths is the edge's weight."""

    direct: Float[np.ndarray, " edges"]
    """Without attention, so from the target's own position."""
    heads: Float[np.ndarray, "edges layers heads"]
    """Through one head alone."""
    several: Float[np.ndarray, " edges"]
    """Through several heads, one after the other. From biases, also through one head, which reads them at all
    positions; from the node "rest", all of the weight."""


class _Written(NamedTuple):
    """What the sources write at their positions."""

    vectors: Float[np.ndarray, "nodes d"]
    writers: Int[np.ndarray, " nodes"]
    """0 for the embeddings, then three numbers per layer: b_O, the SAE of the attention's output, the MLP."""
    values: list[Float[np.ndarray, "nodes heads k"]]
    """For each layer, the values that the heads compute of it."""


class _Read(NamedTuple):
    """How the targets read what is written at their positions."""

    of_writer: list[Float[np.ndarray, "nodes d"]]
    values: list[Float[np.ndarray, "nodes heads k"]]
    """For each layer, how they read the mixed values of the heads."""


def head_paths(frozen: FrozenPass, targets: Sequence[Target], nodes: np.ndarray, edges: np.ndarray) -> HeadPaths:
    """Divide the edges of a graph among the heads that carry them, in float64.

    Args:
        frozen: the frozen pass of the graph's prompt, with the graph's dictionaries.
        targets: the graph's targets, which are its last nodes.
        nodes, edges: the graph's, which may be pruned.
    """
    n_layers, n_heads = frozen.config.n_layers, frozen.config.n_heads
    patterns = np.asarray(frozen.patterns, np.float64)
    written, read, position = _written(frozen, nodes), _read(frozen, targets, nodes), nodes["position"]
    of_writer, present = np.stack(read.of_writer), _present(frozen, nodes)
    number = np.cumsum(position < 0) - 1
    direct, heads = np.zeros(len(edges)), np.zeros((len(edges), n_layers, n_heads))
    for start in range(0, len(edges), TOGETHER):
        part = slice(start, start + TOGETHER)
        s, t = edges["source"][part], edges["target"][part]
        everywhere, one_position = position[s] < 0, position[s] == position[t]
        local = np.einsum("ed,ed->e", written.vectors[s], of_writer[written.writers[s], t])
        local = np.where(everywhere, local * present[number[s], position[t]], local)
        direct[part] = np.where(everywhere | one_position, local, 0)
        for layer in range(n_layers):
            seen = patterns[layer][:, position[t], np.maximum(position[s], 0)].T
            seen = np.where(everywhere[:, None], 0, seen)
            heads[part, layer] = seen * np.einsum("ehk,ehk->eh", written.values[layer][s], read.values[layer][t])
    return HeadPaths(direct, heads, edges["weight"] - direct - heads.sum(axis=(1, 2)))


def _present(frozen: FrozenPass, nodes: np.ndarray) -> Float[np.ndarray, "biases s"]:
    """Return 1 where each node without a position (a bias or the rest) writes, 0 elsewhere."""
    sites, real = nodes["site"][nodes["position"] < 0], np.arange(len(frozen.embed)) < int(frozen.length)
    acting = {f"{dictionary.tag} b_dec": np.asarray(dictionary.acting) for dictionary in frozen.dictionaries}
    return np.stack([acting.get(site, real) for site in sites.tolist()]).astype(np.float64)


def _written(frozen: FrozenPass, nodes: np.ndarray) -> _Written:
    n_layers = frozen.config.n_layers
    vectors, writers = np.zeros((len(nodes), frozen.embed.shape[1])), np.zeros(len(nodes), int)
    for kind, vector in (("token", frozen.embed), ("position", frozen.pos_embed)):
        own = nodes["kind"] == kind
        vectors[own] = np.asarray(vector, np.float64)[nodes["position"][own]]
    for layer in range(n_layers):
        own = nodes["site"] == f"blocks.{layer}.attn.b_O"
        vectors[own], writers[own] = np.asarray(frozen.b_O[layer], np.float64), 3 * layer + 1
        for dictionary in frozen.of_layer(layer):
            W_dec, error = np.asarray(dictionary.W_dec, np.float64), np.asarray(dictionary.error, np.float64)
            rows = _rows(dictionary)
            of_tag = nodes["site"] == dictionary.tag
            bias = nodes["site"] == f"{dictionary.tag} b_dec"
            wrong = of_tag & (nodes["kind"] == "error")
            active = of_tag & (nodes["kind"] == "feature") & (nodes["value"] > 0)
            vectors[bias] = np.asarray(dictionary.b_dec, np.float64)
            vectors[wrong] = error[nodes["position"][wrong]]
            used = [rows[feature] for feature in nodes["feature"][active].tolist()]
            vectors[active] = nodes["value"][active][:, None] * W_dec[used]
            writers[of_tag | bias] = 3 * layer + (2 if dictionary.part == "attn" else 3)
    stream, values = np.where((writers == 0)[:, None], vectors, 0), []
    for layer in range(n_layers):
        values.append(np.einsum("nd,hdk->nhk", stream, np.asarray(frozen.W_V[layer], np.float64)))
        after_attn = [3 * layer + 2] if frozen.at("attn", layer) else [3 * layer + 1]
        stream = stream + np.where(np.isin(writers, after_attn)[:, None], vectors, 0)
        stream = stream + _skipped(frozen, layer, stream, nodes["position"])
        stream = stream + np.where((writers == 3 * layer + 3)[:, None], vectors, 0)
    return _Written(vectors, writers, values)


def _read(frozen: FrozenPass, targets: Sequence[Target], nodes: np.ndarray) -> _Read:
    n_layers, d_model = frozen.config.n_layers, frozen.config.d_model
    directions, places = _directions(frozen, targets, nodes)

    def read(layer: int, part: str, width: int = d_model) -> np.ndarray:
        chosen = places == Place(layer, part).number
        return np.stack([d if c else np.zeros(width) for d, c in zip(directions, chosen, strict=True)])

    g, of_writer, values = read(n_layers, "before_attn"), [], []
    for layer in reversed(range(n_layers)):
        of_mlp = g + read(layer, "mlp")
        g = g + read(layer, "before_mlp") + _skipped(frozen, layer, of_mlp, nodes["position"], backward=True)
        alone = frozen.at("attn", layer) is not None  # then the SAE's encoder alone reads the attention's output
        of_attn = read(layer, "attn") + (0 if alone else g)
        of_writer += [of_mlp, g, of_attn]
        per_head = read(layer, "heads", frozen.W_O[layer][..., 0].size).reshape(len(nodes), frozen.config.n_heads, -1)
        values.append(np.einsum("nd,hkd->nhk", of_attn, np.asarray(frozen.W_O[layer], np.float64)) + per_head)
        g = g + read(layer, "before_attn")
    return _Read([*of_writer, g][::-1], values[::-1])


def _directions(
    frozen: FrozenPass, targets: Sequence[Target], nodes: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the direction that each node reads, and the number of the place; -1 for nodes that read nothing."""
    found, places = [np.zeros(frozen.config.d_model)] * len(nodes), np.full(len(nodes), -1)
    for dictionary in frozen.dictionaries:
        W_enc, rows = np.asarray(dictionary.W_enc, np.float64), _rows(dictionary)
        for number in np.flatnonzero((nodes["site"] == dictionary.tag) & (nodes["kind"] == "feature")):
            if (row := rows.get(int(nodes["feature"][number]))) is not None:
                found[number], places[number] = W_enc[row], encoder_place(dictionary).number
    for number, target in enumerate(targets, len(nodes) - len(targets)):
        found[number], places[number] = np.asarray(target.direction, np.float64), target.place.number
    return found, places


def _rows(dictionary: FrozenDictionary) -> dict[int, int]:
    """Return the row of each feature in the matrices of a frozen dictionary."""
    return {feature: row for row, feature in enumerate(np.asarray(dictionary.features).tolist()) if feature >= 0}


def _skipped(
    frozen: FrozenPass, layer: int, vectors: Float[np.ndarray, "nodes d"], position: np.ndarray, backward: bool = False
) -> Float[np.ndarray, "nodes d"]:
    """Return what the transcoder's skip connection makes of vectors at positions: 0 where it does not act."""
    transcoder = frozen.at("mlp", layer)
    assert transcoder is not None
    if transcoder.W_skip is None:
        return np.zeros_like(vectors)
    W_skip = np.asarray(transcoder.W_skip, np.float64)
    return np.where(np.asarray(transcoder.acting)[position][:, None], vectors @ (W_skip.T if backward else W_skip), 0)
