"""Circuits: every edge is an intervention, every total effect holds up to its radius, and other measures of graphs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import networkx
import numpy as np
import pytest
from circuits_by_hand import PROMPT, ROUNDING, ByHand, key_of, tags_of, with_transcoders
from oracle import F32, assert_close, error_of

from tinymodel_jax.analysis import circuits
from tinymodel_jax.analysis.circuits.frozen import FrozenDictionary, encoded, exact, run_frozen
from tinymodel_jax.analysis.circuits.neurons import neurons
from tinymodel_jax.analysis.effects.metrics import logit_difference
from tinymodel_jax.analysis.evaluation.sparse_lm import export_sparse_lm
from tinymodel_jax.lm import TinyModel

FINAL = "blocks.1.hook_resid_post"
ARCHITECTURES: list[dict[str, Any]] = [
    {"architecture": "relu"},
    {"architecture": "topk", "k": 4},
    {"architecture": "groupmax", "k": 4},
    {"architecture": "batch_topk", "k": 4},
    {"architecture": "jumprelu"},
    {"architecture": "gated"},
    {"architecture": "relu", "subtract_b_dec": True},
    {"architecture": "topk", "k": 4, "skip": True, "exclude": (7,)},
]


@pytest.mark.parametrize("options", ARCHITECTURES, ids=lambda options: "-".join(map(str, options.values())))
def test_every_edge_is_an_intervention_with_all_other_nodes_held(lm, options):
    lm = with_transcoders(lm, **options)
    targets = [4, circuits.feature("M1N3", 4)]
    graph = circuits.attribution_graph(lm, PROMPT, targets, 500, dictionaries=["A1"], dtype="float64")
    assert graph.imbalance < ROUNDING
    hand = ByHand(lm, PROMPT, tags_of(lm, saes=True), respond=False)
    W_U = np.asarray(lm.W_U, np.float64)
    weights = {(e["source"], e["target"]): e["weight"] for e in graph.edges}
    targets_of = np.flatnonzero(graph.nodes["expanded"])
    for source in range(0, len(graph.nodes), 5):
        if graph.nodes[source]["kind"] in ("rest", "logit") or graph.weights[source]:
            continue
        moved = hand.run({key_of(graph.nodes[source]): 1.5})
        for target in targets_of:
            node = graph.nodes[target]
            if node["kind"] == "logit":
                change = (moved["final"] - hand.clean["final"])[node["position"]] @ W_U[:, node["feature"]]
            else:
                tag = node["site"].item()
                change = (moved[tag] - hand.clean[tag])[node["position"], node["feature"]]
            assert abs(change - 0.5 * weights.get((source, target), 0)) < ROUNDING, (
                graph.labels[source],
                graph.labels[target],
            )


@pytest.mark.parametrize("options", ARCHITECTURES, ids=lambda options: "-".join(map(str, options.values())))
def test_total_effects_are_exact_up_to_the_radius_and_not_beyond(lm, options):
    lm = with_transcoders(lm, **options)
    graph = circuits.attribution_graph(lm, PROMPT, [4], 500, dictionaries=["A1"], dtype="float64")
    hand = ByHand(lm, PROMPT, tags_of(lm, saes=True), respond=True)
    sources = [i for i, node in enumerate(graph.nodes) if node["kind"] in ("token", "feature", "error", "bias")]

    def active(delta: float, key: tuple[Any, ...]) -> dict[str, np.ndarray]:
        hand.acts = {}
        hand.run({key: 1 + delta})
        return {tag: acts > 0 for tag, acts in hand.acts.items()}

    checked = 0
    for source in sources[::7]:
        key = key_of(graph.nodes[source])
        radius = circuits.validity_radius(lm, PROMPT, graph.nodes[source], dictionaries=["A1"])
        for edge in (radius.below, radius.above):
            if not np.isfinite(edge):
                continue
            same = active(0, key)
            for factor, equal in ((1 - 1e-6, True), (1 + 1e-6, False)):
                other = active(edge * factor, key)
                assert all((same[tag] == other[tag]).all() for tag in same) == equal, (
                    graph.labels[source],
                    edge,
                    factor,
                )
            half = hand.run({key: 1 + edge / 2})["final"][-1] - hand.clean["final"][-1]
            whole = hand.run({key: 1 + edge * (1 - 1e-6)})["final"][-1] - hand.clean["final"][-1]
            np.testing.assert_allclose(whole, half * 2 * (1 - 1e-6), atol=ROUNDING)
            checked += 1
    assert checked > 3


def test_the_frozen_map_has_no_second_derivative(lm):
    lm = with_transcoders(lm)
    frozen = circuits.frozen_pass(lm, PROMPT)
    moved = np.random.default_rng(0).normal(size=(len(frozen.embed), 16))

    def respond(dictionary: FrozenDictionary, read: jax.Array) -> FrozenDictionary:
        return dataclasses.replace(dictionary, acts=encoded(dictionary, read))

    def of_frozen(amount: jax.Array) -> jax.Array:
        return run_frozen(frozen, respond, lambda layer, part: amount * moved if layer < 0 else 0.0)[0][len(PROMPT) - 1]

    def of_model(amount: jax.Array) -> jax.Array:
        added = amount * moved[: len(PROMPT)].astype(np.float32)
        return lm.run_with_hooks(PROMPT, {"hook_embed": lambda x, acts: x + added}, FINAL)[1][FINAL][0, -1]

    def derivatives(function: Any, dtype: str) -> Any:
        one = jnp.ones((), dtype)

        def slope(amount: jax.Array) -> jax.Array:
            return jax.jvp(function, (amount,), (one,))[1]

        return jax.jit(lambda: jax.jvp(slope, (0 * one,), (one,)))()

    with exact("float64"):
        slopes, curvatures = derivatives(of_frozen, "float64")
    assert np.abs(slopes).max() > 0.1
    assert not np.asarray(curvatures).any()
    assert np.abs(derivatives(of_model, "float32")[1]).max() > 0.1


def test_a_graph_of_the_exported_sparse_model_has_no_errors(lm):
    lm = with_transcoders(lm)
    sparse = circuits.attribution_graph(export_sparse_lm(lm), PROMPT, 7, 150, dictionaries="neurons", dtype="float64")
    spliced = circuits.attribution_graph(lm.splice(["M0", "M1"]), PROMPT, 7, 150, dtype="float64")
    for graph in (sparse, spliced):
        assert "error" not in graph.nodes["kind"]
        assert graph.scores.unexplained == 0
        assert graph.scores.completeness == 1
        assert graph.imbalance < ROUNDING
    assert_close(sparse.nodes["pre"][-1], spliced.nodes["pre"][-1], F32)


def test_a_spliced_dictionary_keeps_the_value_as_an_error_at_the_tokens_that_it_excludes(lm):
    lm = with_transcoders(lm, architecture="relu", exclude=(7,)).splice(["M0", "M1"])
    graph = circuits.attribution_graph(lm, PROMPT, [4, circuits.feature("M1N3", 2)], 500, dtype="float64")
    assert graph.imbalance < ROUNDING
    excluded = np.flatnonzero(PROMPT == 7)
    kind, position = graph.nodes["kind"], graph.nodes["position"]
    assert set(position[kind == "error"]) == set(excluded)
    assert not np.isin(position[(kind == "feature") & (graph.weights == 0)], excluded).any()
    assert_close(graph.nodes["pre"][-2], lm.logits(PROMPT)[0, -1, 4], F32)
    assert graph.nodes["value"][-1] == 0 != graph.nodes["pre"][-1]


def test_errors_are_kept_whatever_the_model_s_format_and_padding_is_no_token(lm):
    """In bfloat16, the rounding of the model's pass is as large as small errors."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params)
    half = TinyModel.from_params(dataclasses.replace(lm.config, dtype="bfloat16"), params)
    for layer in range(2):
        own = neurons(half, layer)
        half.attach(f"M{layer}", dataclasses.replace(own, params={**own.params, "W_dec": 0.99 * own.params["W_dec"]}))
    graph = circuits.attribution_graph(half, PROMPT, 7, 500, dtype="float64")
    assert (graph.nodes["kind"] == "error").sum() == len(PROMPT) + 1  # the last layer has one that reaches the target
    np.testing.assert_allclose(graph.nodes["pre"][-1], half.logits(PROMPT)[0, -1, 7].astype(jnp.float32), rtol=0.02)
    assert "error" not in circuits.attribution_graph(half.splice(["M0", "M1"]), PROMPT, 7, 500).nodes["kind"]
    padded = circuits.attribution_graph(lm, np.append(PROMPT, [lm.config.pad_id] * 2), 7, 60)
    np.testing.assert_array_equal(padded.nodes, circuits.attribution_graph(lm, PROMPT, 7, 60).nodes)


def test_influence_is_the_sum_over_paths_and_scores_follow_from_it(lm):
    lm = with_transcoders(lm)
    graph = circuits.attribution_graph(lm, PROMPT, None, 400, dtype="float64")
    n = len(graph.nodes)
    shares = np.zeros((n, n))
    shares[graph.edges["target"], graph.edges["source"]] = np.abs(graph.edges["weight"])
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1e-300)
    expected = graph.weights @ (np.linalg.inv(np.eye(n) - shares) - np.eye(n))
    np.testing.assert_allclose(graph.influence, expected, atol=ROUNDING)
    kind = graph.nodes["kind"]
    tokens, errors = expected[kind == "token"].sum(), expected[kind == "error"].sum()
    assert graph.scores.replacement == pytest.approx(tokens / (tokens + errors))
    output = expected + graph.weights
    assert graph.scores.completeness == pytest.approx(
        ((1 - shares[:, kind == "error"].sum(axis=1)) * output).sum() / output.sum()
    )


def test_track_sees_every_batch_of_nodes(lm):
    batches = []

    def track(items: Sequence[Any], what: str) -> Sequence[Any]:
        batches.extend(items)
        assert what.startswith("expanding nodes")
        return items

    nodes = circuits.attribution_graph(with_transcoders(lm), PROMPT, 4, 500, track=track).nodes
    assert sum(map(len, batches)) == (nodes["expanded"] & (nodes["kind"] == "feature")).sum() > 20


def test_directions_at_hook_points_are_read_as_the_model_computes_them(lm):
    lm = with_transcoders(lm)
    rng = np.random.default_rng(0)
    hooks = (
        "hook_resid_pre",
        "hook_attn_in",
        "hook_attn_out",
        "hook_resid_mid",
        "hook_mlp_in",
        "hook_mlp_out",
        "hook_resid_post",
    )
    vectors = {f"blocks.1.{hook}": rng.normal(size=16) for hook in hooks}
    vectors |= {f"blocks.1.attn.hook_{letter}": rng.normal(size=(2, 8)) for letter in "qkvz"}
    vectors["blocks.1.mlp.hook_pre"] = rng.normal(size=32)
    targets = [circuits.direction(hook, vector, 3) for hook, vector in vectors.items()]
    graph = circuits.attribution_graph(lm, PROMPT, [logit_difference(4, 9), *targets], 300, dtype="float64")
    assert graph.imbalance < ROUNDING
    logits = np.asarray(lm.logits(PROMPT))[0, -1]
    assert_close(graph.nodes["pre"][-1 - len(targets)], logits[4] - logits[9], F32)
    _, acts = lm.run_with_cache(PROMPT, list(vectors))
    for node in graph.nodes[-len(targets) :]:
        hook = node["site"].item()
        assert_close(node["pre"], (np.asarray(acts[hook])[0, 3] * vectors[hook]).sum(), F32)


def test_pairs_of_sources_add_up_to_the_attention_score(lm):
    lm, hook = with_transcoders(lm), "blocks.1.attn.hook_attn_scores"
    scores = np.asarray(lm.run_with_cache(PROMPT, [hook])[1][hook])[0]
    found = circuits.qk_attribution(lm, PROMPT, 1, 1, -1, 4)
    assert abs(found.matrix.sum() - found.score) < ROUNDING
    assert_close(found.score, scores[1, -1, 4], F32)
    pairs, matrix = found.strongest(50), found.matrix
    np.testing.assert_allclose([abs(pair.value) for pair in pairs], np.sort(np.abs(matrix), axis=None)[:-51:-1])
    i, j = found.query_labels.index(pairs[0].query), found.key_labels.index(pairs[0].key)
    assert_close(matrix[i, j], pairs[0].value, F32)
    assert len(found.strongest(matrix.size + 1)) == matrix.size
    sizes = np.arange(1, 401, dtype=float)[::-1, None]  # 400 sources, the largest first in one and last in the other
    many = found._replace(query_parts=sizes, key_parts=-sizes[::-1])
    many = many._replace(
        query_sources=np.resize(found.query_sources, 400), key_sources=np.resize(found.key_sources, 400)
    )
    assert [pair.value for pair in many.strongest(4)] == [-160000, -159600, -159600, -159201]
    difference = circuits.qk_attribution(lm, PROMPT, 1, 1, -1, 4, versus=2)
    assert abs(difference.matrix.sum() - difference.score) < ROUNDING
    assert_close(difference.score, scores[1, -1, 4] - scores[1, -1, 2], F32)
    np.testing.assert_allclose(difference.query_parts, found.query_parts)
    direct = circuits.qk_attribution(lm, PROMPT, 0, 1, -1, 4)  # before any attention, only the direct path exists
    token = direct.query_labels.index("token '2' @6")
    W_Q = np.asarray(lm.W_Q, np.float64)[0, 1] / np.sqrt(lm.config.d_head)
    np.testing.assert_allclose(direct.query_parts[token], np.asarray(lm.W_E, np.float64)[2] @ W_Q, atol=ROUNDING)


def test_virtual_weights_times_the_activation_are_the_edges_at_the_first_position(lm):
    lm = with_transcoders(lm, architecture="gated")
    graph = circuits.attribution_graph(lm, PROMPT, [circuits.feature(f"M1N{n}", 0) for n in range(12)], 400)
    edges = {(e["source"], e["target"]): e["weight"] for e in graph.edges}
    paths = [None, (1, 0), (1, 1)]  # the first position attends to itself alone
    found = [circuits.virtual_weights(lm, "M0", "M1", through, top=12) for through in paths]
    checked = 0
    for source, node in enumerate(graph.nodes):
        if node["kind"] != "feature" or node["site"] != "M0" or node["position"] != 0:
            continue
        for target in range(len(graph.nodes) - 12, len(graph.nodes)):
            number, row = graph.nodes[target]["feature"], node["feature"]
            weight = sum(links.values[row][links.features[row] == number].sum() for links in found)
            assert_close(node["value"] * weight, edges.get((source, target), 0), F32)
            checked += 1
    assert checked >= 12
    of_sae = circuits.attribution_graph(lm, PROMPT, circuits.feature("A1N3", 0), 400, dictionaries="A1")
    found_sae = [circuits.virtual_weights(lm, "M0", "A1", (1, head), top=99) for head in range(2)]
    for edge in of_sae.incoming(len(of_sae.nodes) - 1):
        node = of_sae.nodes[edge["source"]]
        if node["kind"] == "feature":
            row = node["feature"]
            weight = sum(links.values[row][links.features[row] == 3].sum() for links in found_sae)
            assert_close(edge["weight"], node["value"] * weight, F32)
            checked += 1
    assert checked > 72
    few = circuits.virtual_weights(lm, "M0", "M1", top=3)
    np.testing.assert_array_equal(few.features, found[0].features[:, :3])
    assert (np.diff(np.abs(few.values), axis=1) <= 0).all()


def test_graphs_are_saved_and_loaded_and_given_to_networkx(lm, tmp_path):
    graph = circuits.attribution_graph(with_transcoders(lm), PROMPT, [4, 5], 60, dtype="float64")
    graph.save(tmp_path / "graph")
    again = circuits.AttributionGraph.load(tmp_path / "graph")
    for field in dataclasses.fields(graph):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(graph, field.name))
    drawn = graph.to_networkx()
    assert networkx.is_directed_acyclic_graph(drawn)
    assert sum(weight for _, _, weight in drawn.in_edges(58, data="weight")) + graph.nodes["bias"][58] == pytest.approx(
        graph.nodes["pre"][58]
    )
    with pytest.raises(FileNotFoundError, match="holds no graph"):
        circuits.AttributionGraph.load(tmp_path)
    for name, content in (("graph.json", b"{}"), ("graph.safetensors", b"short")):
        graph.save(tmp_path / "damaged")
        (tmp_path / "damaged" / name).write_bytes(content)
        assert "holds a damaged graph" in error_of(lambda: circuits.AttributionGraph.load(tmp_path / "damaged"))


def test_bad_input_is_refused_in_one_line(lm, no_type_checks):
    lm = with_transcoders(lm)
    graph = circuits.attribution_graph
    cases = {
        "outside the prompt": lambda: graph(lm, PROMPT, circuits.feature("M1N3", 9)),
        "not a feature of this graph's": lambda: graph(lm, PROMPT, circuits.feature("Rm1N3")),
        "out of range": lambda: graph(lm, PROMPT, circuits.feature("M1N99")),
        "expected one or more ids": lambda: graph(lm, PROMPT, 23),
        "targets is empty": lambda: graph(lm, PROMPT, []),
        "give at least": lambda: graph(lm, PROMPT, [1, 2], max_nodes=3),
        "influence_share": lambda: graph(lm, PROMPT, 1, influence_share=0),
        "got 2 prompts": lambda: graph(lm, np.stack([PROMPT, PROMPT])),
        "cuts the residual stream": lambda: graph(lm, PROMPT, dictionaries=["Rm1"]),
        "predict the same value": lambda: graph(lm, PROMPT, dictionaries=["M1", "T1"]),
        "dtype='bfloat16'": lambda: graph(lm, PROMPT, dtype="bfloat16"),  # type: ignore[arg-type]
        "a direction cannot be at": lambda: graph(
            lm, PROMPT, circuits.direction("blocks.1.mlp.hook_post", np.ones(32))
        ),
        "has shape (3,); give (16,)": lambda: graph(lm, PROMPT, circuits.direction("blocks.1.hook_mlp_in", np.ones(3))),
        "give circuits.feature('M1N3', position)": lambda: graph(lm, PROMPT, "M1N3"),
        "is 0 or not finite": lambda: graph(lm, PROMPT, circuits.direction("blocks.1.hook_mlp_in", np.zeros(16))),
        "the prediction of the spliced A1": lambda: graph(
            lm.splice("A1"), PROMPT, circuits.direction("blocks.1.hook_attn_out", np.ones(16))
        ),
        "names one token twice": lambda: graph(lm, PROMPT, logit_difference(4, 4)),
        "has no tokens": lambda: graph(lm, np.full((1, 3), lm.config.pad_id)),
        "is not a node": lambda: circuits.validity_radius(lm, PROMPT, 3),  # type: ignore[arg-type]
        "layer '0' does not exist": lambda: circuits.qk_attribution(lm, PROMPT, "0", 0, 2, 1),  # type: ignore[arg-type]
        "is after query": lambda: circuits.qk_attribution(lm, PROMPT, 1, 0, 2, 3),
        "name a source that writes": lambda: circuits.virtual_weights(lm, "M1", "M0"),
        "is not between": lambda: circuits.virtual_weights(lm, "M0", "M1", through=(0, 1)),
        "the attention of layer 0 is not between": lambda: circuits.virtual_weights(lm, "M0", "A1", through=(0, 1)),
        "layers are 0..1": lambda: circuits.virtual_weights(lm, "M0", "M1", through=(2, 1)),
        "splice it as it is attached: lm.splice('M1')": lambda: graph(lm.splice("M1", exclude=7), PROMPT),
        "has other parameters": lambda: graph(with_transcoders(lm.splice("M1"), skip=False), PROMPT),
        "key 3 is after query 2": lambda: circuits.qk_attribution(lm, PROMPT, 1, 0, 2, 1, versus=3),
        "head 7 does not exist": lambda: circuits.qk_attribution(lm, PROMPT, 1, 7, 2, 1),
    }
    for words, call in cases.items():
        assert words in error_of(call)
    bare = TinyModel.from_params(lm.config, lm.params)
    assert "lm.attach('M0', path)" in error_of(lambda: graph(bare, PROMPT))
