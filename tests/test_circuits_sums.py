"""The sums of attribution graphs close, on models of all sizes, at what the model itself computes."""

from typing import Any

import numpy as np
import pytest
from circuits_by_hand import PROMPT, ROUNDING, with_transcoders
from conftest import param_shapes, random_params
from oracle import F32, assert_close

from tinymodel_jax.analysis import circuits
from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.encoding import param_shapes as dictionary_shapes
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import TinyModel


@pytest.fixture(scope="module")
def mini() -> TinyModel:
    return TinyModel("mini")


@pytest.mark.parametrize(("model", "dictionaries"), [("lm", "neurons"), ("golden_lm", ("A0", "A3"))])
def test_the_edges_to_every_node_and_its_bias_add_up_to_what_the_model_computes(request, model, dictionaries):
    lm, ids = request.getfixturevalue(model), np.arange(6, dtype=np.int32) * 13 % 23
    graph = circuits.attribution_graph(lm, ids, max_nodes=200, dictionaries=dictionaries, dtype="float64")
    assert graph.imbalance < ROUNDING
    expanded = graph.nodes[graph.nodes["expanded"]]
    assert {"feature", "logit"} <= set(expanded["kind"])
    values = values_of(lm, ids, set(expanded["site"].tolist()) - {"logits"})
    computed = [values[node["site"].item()][node["position"], node["feature"]] for node in expanded]
    assert_close(expanded["value"], computed, F32)


def values_of(lm: TinyModel, ids: np.ndarray, sites: set[str]) -> dict[str, np.ndarray]:
    """Return logits, features and neurons by the model's own pass."""
    neurons = {site: f"blocks.{site[1]}.mlp.hook_post" for site in sites if site.endswith(" MLP")}
    read = {site: lm[site].dictionary.config.hook_in for site in sites - set(neurons)}
    acts = lm.run_with_cache(ids, [*neurons.values(), *read.values()], return_logprobs=False)[1]
    values: dict[str, Any] = {"logits": lm.logits(ids)}
    values |= {site: acts[hook] for site, hook in neurons.items()}
    values |= {site: lm[site].dictionary.encode(acts[hook]) for site, hook in read.items()}
    return {site: np.asarray(value)[0] for site, value in values.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "largest"), [("float32", 1e-4), ("float64", ROUNDING)])
def test_sums_close_in_a_random_model_of_the_published_size(full_size_lm, dtype, largest):
    ids = np.random.default_rng(0).integers(0, 9000, 40)
    graph = circuits.attribution_graph(full_size_lm, ids, max_nodes=400, dtype=dtype)
    pre = graph.nodes["pre"]
    assert graph.imbalance < largest * max(1, np.abs(pre).max())
    assert graph.nodes["expanded"].sum() > 100
    logits = np.asarray(full_size_lm.logits(ids))[0, -1]
    targets = graph.nodes["kind"] == "logit"
    assert_close(pre[targets], logits[graph.nodes["feature"][targets]], F32)


@pytest.fixture(scope="module")
def full_size_lm() -> TinyModel:
    """Random weights of the published sizes, with four transcoders of 25,000 features, 32 of them active."""
    config = ModelConfig(d_vocab=9_999)  # a vocabulary of 10,000 would ask for the published tokenizer
    lm = TinyModel.from_params(config, random_params(param_shapes(config), 0, config.d_model**-0.5))
    options = {"d_in": 768, "d_out": 768, "n_features": 25_000, "architecture": "topk", "k": 32}
    for layer in range(config.n_layers):
        site = Site("M", layer)
        dictionary = DictionaryConfig(site.hook_in, site.hook_out, **options)
        params = random_params(dictionary_shapes(dictionary), layer, config.d_model**-0.5)
        lm.attach(site.tag, Dictionary.from_params(dictionary, params))
    return lm


@pytest.mark.parametrize("model", ["lm", pytest.param("mini", marks=pytest.mark.slow)])
def test_float32_sums_close_to_a_ten_thousandth(request, model):
    lm = with_transcoders(request.getfixturevalue("lm")) if model == "lm" else request.getfixturevalue("mini")
    prompt = PROMPT if model == "lm" else "Once upon a time, there was a girl named Lily."
    graph = circuits.attribution_graph(lm, prompt, max_nodes=60)
    assert 0 < graph.imbalance < 1e-4 * np.abs(graph.nodes["pre"]).max()
    assert len(graph.nodes) == 60


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
