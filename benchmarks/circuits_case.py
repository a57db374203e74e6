"""One case of `circuits.py`: a random model, its graphs, and the matrix products of a graph alone.

A node that is read in layer L passes L + 1 attentions and L dictionaries. For each attention there are products with
W_O and W_V for every position, and one of the patterns with the values; for each dictionary, one with the decoder rows
of the features that are active at each position. `products` times these four with operands that lie in memory as a
product wants them, as often as the graph needs each. The model's own pass is not among them.
"""

import dataclasses
import importlib
import resource
import time
from collections import Counter
from statistics import median
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from tinymodel_jax.analysis import circuits
from tinymodel_jax.analysis.circuits.frozen import FrozenPass, exact
from tinymodel_jax.analysis.circuits.sources import TOGETHER, Place
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.encoding import param_shapes as dictionary_shapes
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.transformer import Transformer
from tinymodel_jax.runtime.compilation import fast_jit
from tinymodel_jax.text.prompts_and_stories import story_rows

N_FEATURES, L0 = 25_000, 32


def main(tokens: int, nodes: int, rounds: int, mini: int) -> None:
    """Print memory before and after in MB, seconds of the first and of a later graph, core-seconds, and products."""
    lm = TinyModel("mini") if mini else random_lm(ModelConfig(), N_FEATURES, L0)
    prompt = _story(lm, tokens) if mini else random_prompt(lm, tokens)
    jax.block_until_ready(lm.params)
    before = _peak_mb()
    first, warm, cores = seconds_of_graph(lm, prompt, nodes), [], []
    for _ in range(rounds):
        core = time.process_time()
        warm.append(seconds_of_graph(lm, prompt, nodes))
        cores.append(time.process_time() - core)
    peak = _peak_mb()
    print(before, peak, first, median(warm), median(cores), products(lm, prompt, nodes))


def random_lm(config: ModelConfig, n_features: int, k: int) -> TinyModel:
    """Return a model of normal draws with a TopK transcoder at each layer, in which values stay of size 1."""
    # a vocabulary of 10,000 would ask the hub for the published tokenizer
    config = dataclasses.replace(config, d_vocab=config.d_vocab - 1, dtype="float32")
    rng = np.random.default_rng(0)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), ids)["params"]
    lm = TinyModel.from_params(config, jax.tree.map(lambda leaf: _draws(rng, leaf.shape, config.d_model), shapes))
    for layer in range(config.n_layers):
        site, width = Site("M", layer), config.d_model
        of_site = DictionaryConfig(site.hook_in, site.hook_out, width, width, n_features, architecture="topk", k=k)
        params = {name: _draws(rng, shape, width) for name, shape in dictionary_shapes(of_site).items()}
        lm.attach(site.tag, Dictionary.from_params(of_site, params))
    return lm


def random_prompt(lm: TinyModel, tokens: int) -> np.ndarray:
    """Return random ids."""
    return np.random.default_rng(1).integers(0, lm.config.begin_id, tokens)


def seconds_of_graph(lm: TinyModel, prompt: Any, nodes: int) -> float:
    """Build a graph; return how long it takes."""
    start = time.perf_counter()
    circuits.attribution_graph(lm, prompt, max_nodes=nodes)
    return time.perf_counter() - start


def products(lm: TinyModel, prompt: Any, nodes: int) -> float:
    """Return the seconds that the products of a graph take alone."""
    module = importlib.import_module("tinymodel_jax.analysis.circuits.attribution_graph")
    with mock.patch.object(module, "contributions", side_effect=module.contributions) as spy:
        circuits.attribution_graph(lm, prompt, max_nodes=nodes)
    places = [call.args[3] for call in spy.call_args_list]
    with exact("float32"):
        each = _seconds_of_each(circuits.frozen_pass(lm, prompt, dtype="float32"))
    counts = Counter[str]()
    for place in places:
        attentions = place.layer + (place.part == Place(0, "before_mlp").part)
        counts += Counter(stream=2 * attentions, patterns=attentions, features=place.layer)
    return sum(counts[name] * seconds for name, seconds in each.items())


def _seconds_of_each(frozen: FrozenPass) -> dict[str, float]:
    """Return the seconds of each kind of product, for `TOGETHER` nodes and one layer."""
    s, d = frozen.embed.shape
    heads, n_active = frozen.config.n_heads, frozen.dictionaries[0].where.shape[1]
    shapes = {
        "stream": ((TOGETHER * s, d), (d, d)),
        "patterns": ((heads, s, s), (heads, s, TOGETHER * d // heads)),
        "features": ((s, TOGETHER, d), (s, d, n_active)),
    }
    rng, product = np.random.default_rng(0), fast_jit(jnp.matmul)
    return {name: _median_seconds(product, *(_draws(rng, shape, d) for shape in both)) for name, both in shapes.items()}


def _median_seconds(product: Any, *operands: Any) -> float:
    """Return the median seconds of a call that is already compiled."""
    jax.block_until_ready(product(*operands))
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        jax.block_until_ready(product(*operands))
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _draws(rng: np.random.Generator, shape: tuple[int, ...], width: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(width**-0.5))


def _story(lm: TinyModel, tokens: int) -> np.ndarray:
    (story,) = storyworld.stories(0, 1, storyworld.FIRST_UNSEEN)
    return story_rows(lm.tokenizer, [story.text], lm.config.n_ctx)[0, :tokens]


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
