"""Edges of attribution graphs, divided among the heads that carry them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from circuits_by_hand import PROMPT, ROUNDING, with_transcoders

from tinymodel_jax.analysis import circuits
from tinymodel_jax.analysis.circuits.freeze import frozen_pass
from tinymodel_jax.analysis.circuits.frozen import FrozenPass, exact
from tinymodel_jax.analysis.circuits.head_paths import head_paths
from tinymodel_jax.analysis.circuits.sources import contributions, source_table
from tinymodel_jax.analysis.circuits.targets import Target, resolve


def key_of(node: np.void) -> tuple[Any, ...]:
    return tuple(node[name].item() for name in ("kind", "site", "position", "feature"))


def rows_of(frozen: FrozenPass, targets: list[Target]) -> list[dict[tuple[Any, ...], float]]:
    """Return what each source, by its key, adds to each target."""
    keys, rows = [key_of(source) for source in source_table(frozen)], []
    with exact("float64"):
        for target in targets:
            given = target.direction[None], np.array([target.position]), target.place
            rows.append(dict(zip(keys, contributions(frozen, *given)[0].tolist(), strict=False)))
    return rows


@pytest.mark.parametrize(
    ("options", "saes"),
    [({}, ("A1",)), ({"architecture": "topk", "k": 4, "skip": True}, ()), ({"exclude": (0, 7), "skip": True}, ("A1",))],
)
def test_the_part_of_an_edge_through_a_head_is_what_it_is_when_all_others_are_off(lm, options, saes):
    lm = with_transcoders(lm, **options)
    vector = np.random.default_rng(0).normal(size=(2, 8))
    given = [4, circuits.feature("M1N3", 4), circuits.direction("blocks.1.attn.hook_z", vector, 5)]
    graph = circuits.attribution_graph(lm, PROMPT, given, 150, dictionaries=saes, dtype="float64")
    frozen = frozen_pass(lm, PROMPT, saes)
    targets = resolve(lm, frozen, given)
    found = head_paths(frozen, targets, graph.nodes, graph.edges)
    keys = [key_of(node) for node in graph.nodes]
    names = [f"{node['site']}N{node['feature']}" for node in graph.nodes]
    read = {
        i: circuits.feature(names[i], int(graph.nodes[i]["position"]))
        for i in np.flatnonzero(graph.nodes["expanded"])[: -len(targets)].tolist()
    }
    numbers = [*read, *range(len(graph.nodes) - len(targets), len(graph.nodes))]
    all_targets = [*resolve(lm, frozen, list(read.values())), *targets]

    def weights(on: np.ndarray) -> np.ndarray:
        with exact("float64"):
            masked = jnp.asarray(np.asarray(frozen.patterns) * on[..., None, None])
        rows = dict(zip(numbers, rows_of(dataclasses.replace(frozen, patterns=masked), all_targets), strict=True))
        return np.array([rows[edge["target"]].get(keys[edge["source"]], 0) for edge in graph.edges])

    without = weights(np.zeros((2, 2)))
    np.testing.assert_allclose(found.direct, without, atol=ROUNDING)
    somewhere = graph.nodes["position"][graph.edges["source"]] >= 0
    for layer, head in np.ndindex(2, 2):
        alone = np.zeros((2, 2))
        alone[layer, head] = 1
        through = np.where(somewhere, weights(alone) - without, 0)
        np.testing.assert_allclose(found.heads[:, layer, head], through, atol=ROUNDING)
    assert (np.abs(found.several[somewhere]) > ROUNDING).any()
