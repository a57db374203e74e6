"""Attribution graphs: every sum closes, every edge is an intervention, every total effect holds up to its radius."""

import dataclasses
from typing import Any

import networkx
import numpy as np
import pytest
from conftest import make_dictionary
from oracle import F32, assert_close, error_of

from tinymodel_jax.analysis import circuits
from tinymodel_jax.analysis.effects.metrics import logit_difference
from tinymodel_jax.analysis.evaluation.sparse_lm import export_sparse_lm
from tinymodel_jax.lm import TinyModel

ROUNDING = 1e-9
"""Largest difference of two float64 computations of numbers of size 10."""
PROMPT = np.array([0, 5, 7, 3, 7, 11, 2], np.int32)
ARCHITECTURES: list[dict[str, Any]] = [
    {"architecture": "relu"},
    {"architecture": "topk", "k": 4},
    {"architecture": "batch_topk", "k": 4},
    {"architecture": "jumprelu"},
    {"architecture": "gated"},
    {"architecture": "relu", "subtract_b_dec": True},
    {"architecture": "topk", "k": 4, "skip": True},
]


def with_transcoders(lm: TinyModel, **options: Any) -> TinyModel:
    lm = lm.splice([])
    for layer in range(lm.config.n_layers):
        block = f"blocks.{layer}"
        lm.attach(f"M{layer}", make_dictionary(f"{block}.hook_mlp_in", f"{block}.hook_mlp_out", layer + 7, **options))
    return lm


class ByHand:
    """The frozen pass in NumPy float64, one source at a time: `run(scales)` writes each source scale times."""

    def __init__(self, lm: TinyModel, tok_ids: np.ndarray, tags: dict[tuple[str, int], str], respond: bool) -> None:
        self.lm, self.ids, self.tags, self.respond = lm, tok_ids, tags, respond
        kept = lm.run_with_cache(tok_ids)[1]
        self.kept = {name: np.asarray(value, np.float64)[0] for name, value in kept.items()}
        self.acts: dict[str, np.ndarray] = {}
        self.errors: dict[str, np.ndarray] = {}
        self.clean = self.run({})

    def run(self, scales: dict[tuple[Any, ...], float]) -> dict[str, np.ndarray]:
        """Return pre-activations by tag, and the final stream as "final"."""
        found = {}
        params, length = self.lm.params, len(self.ids)
        scale = np.array([[scales.get((kind, p), 1.0) for p in range(length)] for kind in ("token", "position")])
        x = np.asarray(params["W_E"], np.float64)[self.ids] * scale[0][:, None]
        x = x + np.asarray(params["W_pos"], np.float64)[:length] * scale[1][:, None]
        for layer in range(self.lm.config.n_layers):
            attn = {n: np.asarray(v, np.float64) for n, v in params[f"blocks_{layer}"]["attn"].items()}
            pattern = self.kept[f"blocks.{layer}.attn.hook_pattern"]
            out = np.zeros_like(x)
            for head in range(self.lm.config.n_heads):
                out = out + pattern[head] @ (x @ attn["W_V"][head]) @ attn["W_O"][head]
            out = out + attn["b_O"] * scales.get(("bias", f"blocks.{layer}.attn.b_O"), 1.0)
            if ("attn", layer) in self.tags:
                out = self.through(
                    self.tags["attn", layer], out, self.kept[f"blocks.{layer}.hook_attn_out"], scales, found
                )
            x = x + out
            x = x + self.through(self.tags["mlp", layer], x, self.kept[f"blocks.{layer}.hook_mlp_out"], scales, found)
        return {**found, "final": x}

    def through(self, tag: str, x: Any, value: Any, scales: Any, found: dict[str, np.ndarray]) -> np.ndarray:
        own = self.lm[tag].dictionary
        w = {name: np.asarray(array, np.float64) for name, array in own.params.items()}
        given = x - w["b_dec"] if own.config.subtract_b_dec else x
        pre = given @ w["W_enc"]
        if own.config.architecture == "gated":
            on = pre + w["b_gate"] > 0
            pre = pre * np.exp(w["r_mag"]) + w["b_mag"]
            acts = np.maximum(pre, 0) * on
        else:
            pre = pre + w["b_enc"]
            acts = np.where(pre > np.maximum(w.get("threshold", 0), 0), pre, 0)
            if own.config.architecture == "topk":
                kept = np.zeros_like(acts)
                for row, largest in enumerate(np.argsort(-pre, axis=1, kind="stable")[:, : own.config.k]):
                    kept[row, largest] = acts[row, largest]
                acts = kept
        found[tag] = pre
        self.acts.setdefault(tag, acts)
        many = (acts if self.respond else self.acts[tag]).copy()
        for (kind, site, *where), factor in scales.items():
            if (kind, site) == ("feature", tag):
                many[tuple(where)] *= factor
        out = many @ w["W_dec"] + w["b_dec"] * scales.get(("bias", f"{tag} b_dec"), 1.0)
        if own.config.skip:
            out = out + x @ w["W_skip"]
        if tag not in self.errors:
            self.errors[tag] = value - out
        scale = np.array([scales.get(("error", tag, p), 1.0) for p in range(len(x))])
        return out + self.errors[tag] * scale[:, None]


def key_of(node: np.void) -> tuple[Any, ...]:
    """Return the key under which `ByHand.run` scales a source."""
    kind, site, position, feature = (node[name].item() for name in ("kind", "site", "position", "feature"))
    return {
        "token": ("token", position),
        "position": ("position", position),
        "bias": ("bias", site),
        "error": ("error", site, position),
        "feature": ("feature", site, position, feature),
    }[kind]


def tags_of(lm: TinyModel, saes: bool) -> dict[tuple[str, int], str]:
    tags = {("mlp", layer): f"M{layer}" for layer in range(lm.config.n_layers)}
    return tags | ({("attn", layer): f"A{layer}" for layer in (1,)} if saes else {})


@pytest.fixture(scope="module")
def mini() -> TinyModel:
    return TinyModel("mini")


@pytest.mark.parametrize("dictionaries", ["neurons", ("A0", "A3")])
def test_the_edges_to_every_node_and_its_bias_add_up_to_what_the_model_computes(golden_lm, dictionaries):
    ids = np.arange(6, dtype=np.int32) * 13 % 200
    graph = circuits.attribution_graph(golden_lm, ids, max_nodes=200, dictionaries=dictionaries, dtype="float64")
    assert graph.imbalance < ROUNDING
    expanded = graph.nodes[graph.nodes["expanded"]]
    assert {"feature", "logit"} <= set(expanded["kind"])
    values = {"logits": golden_lm.logits(ids)}
    for layer in range(4):
        hook = f"blocks.{layer}.mlp.hook_post"
        values[f"L{layer} MLP"] = golden_lm.run_with_cache(ids, [hook], return_logprobs=False)[1][hook]
        values |= {tag: golden_lm[tag](ids) for tag in (f"M{layer}", f"A{layer}")}
    values = {site: np.asarray(value)[0] for site, value in values.items()}
    computed = [values[node["site"].item()][node["position"], node["feature"]] for node in expanded]
    assert_close(expanded["value"], computed, F32)


def test_float32_sums_close_to_a_ten_thousandth(mini):
    graph = circuits.attribution_graph(mini, "Once upon a time, there was a girl named Lily.", max_nodes=100)
    scale = np.abs(graph.nodes["pre"]).max()
    assert 0 < graph.imbalance < 1e-4 * scale
    assert len(graph.nodes) == 100


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


def test_a_graph_of_the_exported_sparse_model_has_no_errors(golden_lm):
    ids = np.arange(6, dtype=np.int32) * 13 % 200
    tags = [f"M{layer}" for layer in range(4)]
    sparse = circuits.attribution_graph(
        export_sparse_lm(golden_lm), ids, 7, 150, dictionaries="neurons", dtype="float64"
    )
    spliced = circuits.attribution_graph(golden_lm.splice(tags), ids, 7, 150, dtype="float64")
    for graph in (sparse, spliced):
        assert "error" not in graph.nodes["kind"]
        assert graph.scores.unexplained == 0
        assert graph.scores.completeness == 1
        assert graph.imbalance < ROUNDING
    assert_close(sparse.nodes["pre"][-1], spliced.nodes["pre"][-1], F32)


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


@pytest.mark.slow
def test_a_small_graph_has_the_most_influential_nodes_and_its_sums_close(mini):
    prompt = "Once upon a time, there was"
    whole = circuits.attribution_graph(mini, prompt, max_nodes=10_000, dtype="float64")
    small = circuits.attribution_graph(mini, prompt, max_nodes=80, dtype="float64")
    assert len(small.nodes) == 80
    assert small.imbalance < ROUNDING
    ranked = np.argsort(-whole.influence)
    best = {whole.labels[i] for i in ranked[:40]} - {"rest"}
    assert best <= set(small.labels)
    kept = whole.prune(0.8, 0.9)
    assert kept.imbalance < ROUNDING
    assert len(kept.nodes) < len(whole.nodes)
    assert set(kept.labels[-int((whole.weights > 0).sum()) :]) == set(np.array(whole.labels)[whole.weights > 0])
    sources = set(kept.edges["source"])
    assert all(i in sources or kept.weights[i] > 0 for i in range(len(kept.nodes)) if kept.labels[i] != "rest")


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


def test_pairs_of_sources_add_up_to_the_attention_score(mini):
    prompt = "Once upon a time, there was a girl named Lily."
    hook = "blocks.3.attn.hook_attn_scores"
    scores = np.asarray(mini.run_with_cache(prompt, [hook])[1][hook])[0]
    found = circuits.qk_attribution(mini, prompt, 3, 5, -1, 4)
    assert abs(found.matrix.sum() - found.score) < ROUNDING
    assert_close(found.score, scores[5, -1, 4], F32)
    first = found.strongest(1)[0]
    assert abs(first.value) == np.abs(found.matrix).max()
    i, j = found.query_labels.index(first.query), found.key_labels.index(first.key)
    assert found.matrix[i, j] == first.value
    token = found.query_sources[
        found.query_labels.index(next(n for n in found.query_labels if n.startswith("token '.")))
    ]
    W_Q = np.asarray(mini.W_Q, np.float64)[3, 5] / np.sqrt(mini.config.d_head)
    assert token["kind"] == "token"
    assert found.query_parts.shape[1] == W_Q.shape[1]


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
        "is not a linear function": lambda: graph(
            lm, PROMPT, circuits.direction("blocks.1.mlp.hook_post", np.ones(32))
        ),
        "has shape (3,); give (16,)": lambda: graph(lm, PROMPT, circuits.direction("blocks.1.hook_mlp_in", np.ones(3))),
        "is after query": lambda: circuits.qk_attribution(lm, PROMPT, 1, 0, 2, 3),
        "name a source that writes": lambda: circuits.virtual_weights(lm, "M1", "M0"),
        "is not between": lambda: circuits.virtual_weights(lm, "M0", "M1", through=(0, 1)),
        "layers are 0..1": lambda: circuits.virtual_weights(lm, "M0", "M1", through=(2, 1)),
        "head 7 does not exist": lambda: circuits.qk_attribution(lm, PROMPT, 1, 7, 2, 1),
    }
    for words, call in cases.items():
        assert words in error_of(call)
    bare = TinyModel.from_params(lm.config, lm.params)
    assert "lm.attach('M0', path)" in error_of(lambda: graph(bare, PROMPT))
