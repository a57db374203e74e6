"""The search over all features, and the encoder's matrix products alone.

Activations of a full-size model are drawn at random, not computed: the language model's own pass is not part of either
time. `sweeps.py` measures both.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinymodel_jax.analysis.search.activation_pass import ActivationPass, DictionaryInputs, Sums, run_pass
from tinymodel_jax.analysis.search.coactivation import partners_of_all
from tinymodel_jax.analysis.search.top_activations import COACTIVATION_TOKENS, HISTOGRAM_TOKENS
from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.model.transformer import Transformer
from tinymodel_jax.runtime.compilation import fast_jit
from tinymodel_jax.runtime.progress import no_progress

WHOLE_PASS = 600_000
"""Tokens in the pass that the sample sizes are meant for; a shorter measurement samples the same shares."""
SITE = Site("M", 2)
ROW = 256
"""Tokens per row."""


def search_and_products(n_tokens: int, n_features: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a search over `n_tokens` and the products of its encoder alone, as calls that are already compiled.

    There is one product per batch, `x @ W_enc`, with the package's compiler options. The search is all of it: peaks,
    positions, sums, histograms, contexts, co-activation and its partners at the end.
    """
    model = TinyModel.from_params(*_model())
    reader = FeatureReader(model, SITE, _dictionary(n_features), None)
    n_rows = -(-n_tokens // ROW)
    rows = np.random.default_rng(0).integers(0, model.config.begin_id, (n_rows, ROW))
    inputs = _Drawn(reader, 8, n_rows)
    searching = ActivationPass(inputs, rows, seed=0, **_shares())
    product = fast_jit(lambda x, W: x @ W)
    W = reader.dictionary.params["W_enc"]

    def search() -> None:
        sums = Sums.zero(n_features, 20, 40)
        run_pass(searching, sums, 0, None, no_progress)
        partners_of_all(np.concatenate(sums.together), n_features, 10)

    def products() -> None:
        for x in inputs.drawn:
            jax.block_until_ready(product(x, W))

    first = searching.measure(0)
    assert first is not None
    Sums.zero(n_features, 20, 40).add(first, 0)
    jax.block_until_ready(product(inputs.drawn[0], W))
    return search, products


def _shares() -> dict[str, Any]:
    return {"share": COACTIVATION_TOKENS / WHOLE_PASS, "every": WHOLE_PASS // HISTOGRAM_TOKENS}


def _model() -> tuple[ModelConfig, Any]:
    config = ModelConfig(n_layers=3, d_model=768, n_heads=16, d_mlp=16, d_vocab=100)  # its own pass does not run
    return config, Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def _dictionary(n_features: int) -> Dictionary:
    """Return a transcoder with one in 500 features active per token, as in a trained one."""
    config = DictionaryConfig(SITE.hook_in, SITE.hook_out, d_in=768, d_out=768, n_features=n_features)
    W = jax.random.normal(jax.random.key(1), (768, n_features)) / 768**0.5
    params = {"W_enc": W, "b_enc": jnp.full(n_features, -2.9), "W_dec": W.T, "b_dec": jnp.zeros(768)}
    return Dictionary.from_params(config, params)


class _Drawn(DictionaryInputs):
    """Inputs that are drawn in advance and returned batch by batch, again and again."""

    def __init__(self, reader: FeatureReader, per_device: int, n_rows: int):
        super().__init__(reader, per_device)
        n_batches = -(-n_rows // self.batch)
        self.drawn = [jax.random.normal(jax.random.key(i), (self.batch, ROW, 768)) for i in range(n_batches)]
        self.batches = itertools.cycle(self.drawn)

    def __call__(self, tok_ids: np.ndarray) -> jax.Array:
        """Return the next batch of vectors."""
        del tok_ids
        return next(self.batches)
