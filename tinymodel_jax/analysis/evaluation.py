"""How good dictionaries are: reconstruction, sparsity, and what the language model loses when it runs through them.

Sums over held-out tokens, added batch by batch and divided once. All dictionaries given together are measured in one
compiled pass; XLA shares the layers below their site between them. `[PAD]` counts nowhere.

    CE recovered = (CE zero-ablated - CE spliced) / (CE zero-ablated - CE clean)

Each of the three is the mean next-token cross-entropy of the model: with the value at `hook_out` set to zero, with the
dictionary's prediction in its place, and untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinymodel_jax.analysis.metrics import DictionaryStats, finalize_stats, update_stats, zero_stats
from tinymodel_jax.compilation import fast_jit
from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.dictionary import Dictionary, encode, predict
from tinymodel_jax.forward import next_token_losses
from tinymodel_jax.hook_points import Hook
from tinymodel_jax.interventions import Scale, Splice
from tinymodel_jax.transformer import run_with_hooks


class DictionaryEvaluation(NamedTuple):
    """One dictionary's numbers; plain floats."""

    l0: float
    """Active features a token."""
    explained_variance: float
    """1 - squared error / squared distance from the mean."""
    dead_fraction: float
    """Share of the features that were active on none of the tokens; on few tokens, rare features count as dead."""
    ce_clean: float
    """Cross-entropy of the model, nats."""
    ce_spliced: float
    """Cross-entropy with the dictionary's prediction in place, nats."""
    ce_zero_ablated: float
    """Cross-entropy with zeros in place, nats."""
    ce_recovered: float
    """Share of what zero-ablation loses that the dictionary keeps."""
    tokens: int
    """Tokens that were counted."""


class ReconstructionEvaluation(NamedTuple):
    """The numbers that need no language model; plain floats, as in `DictionaryEvaluation`."""

    l0: float
    explained_variance: float
    dead_fraction: float
    tokens: int


class _Sums(NamedTuple):
    stats: tuple[DictionaryStats, ...]
    spliced: tuple[Float[Array, ""], ...]
    clean: Float[Array, ""]
    zeroed: Float[Array, ""]
    targets: Float[Array, ""]


def evaluate_at_site(
    params: Any,
    config: ModelConfig,
    dictionaries: Sequence[Dictionary],
    batches: Iterable[Int[Array, "_ _"]],
) -> list[DictionaryEvaluation]:
    """Measure dictionaries of one site (equal `hook_out`) on the same tokens.

    Args:
        params, config: of the language model.
        batches: token ids (batch, seq), best all of one shape, which is compiled once.

    Raises:
        ValueError: the dictionaries predict different hook points, or there is no token to predict.
    """
    configs = tuple(dictionary.config for dictionary in dictionaries)
    if len({c.hook_out for c in configs}) != 1:
        raise ValueError(
            f"evaluate_at_site: the dictionaries predict {sorted({c.hook_out for c in configs})}, not one."
        )
    stats = tuple(zero_stats(c.n_features, c.d_out) for c in configs)
    zero = jnp.zeros(())
    sums = _Sums(stats, (zero,) * len(configs), zero, zero, zero)
    trees = tuple(dictionary.params for dictionary in dictionaries)
    for tok_ids in batches:
        sums = _add_batch(sums, params, trees, tok_ids, config=config, configs=configs)
    if not float(sums.targets):
        raise ValueError("evaluate_at_site: the batches hold no token to predict; give held-out rows.")
    return [_divide(sums, i) for i in range(len(configs))]


def evaluate_reconstruction(
    dictionary: Dictionary, batches: Iterable[tuple[Float[Array, "_ d_in"], Float[Array, "_ d_out"]]]
) -> ReconstructionEvaluation:
    """Measure a dictionary on (input, target) vectors alone."""
    config = dictionary.config
    stats = zero_stats(config.n_features, config.d_out)
    for x, y in batches:
        stats = _add_vectors(stats, dictionary.params, x, y, config=config)
    found = finalize_stats(stats)
    return ReconstructionEvaluation(
        float(found.l0), float(found.explained_variance), float(found.dead_fraction), int(stats.positions)
    )


def _divide(sums: _Sums, index: int) -> DictionaryEvaluation:
    found = finalize_stats(sums.stats[index])
    clean, spliced, zeroed = (float(s / sums.targets) for s in (sums.clean, sums.spliced[index], sums.zeroed))
    return DictionaryEvaluation(
        l0=float(found.l0),
        explained_variance=float(found.explained_variance),
        dead_fraction=float(found.dead_fraction),
        ce_clean=clean,
        ce_spliced=spliced,
        ce_zero_ablated=zeroed,
        ce_recovered=(zeroed - spliced) / (zeroed - clean),
        tokens=int(sums.stats[index].positions),
    )


def _sum_batch(
    sums: _Sums,
    params: Any,
    trees: tuple[Any, ...],
    tok_ids: Int[Array, "batch seq"],
    *,
    config: ModelConfig,
    configs: tuple[DictionaryConfig, ...],
) -> _Sums:
    real = tok_ids != config.pad_id
    hook_out = configs[0].hook_out

    def loss(edit: Hook | None, keep: tuple[str, ...] = ()) -> tuple[Array, dict[str, Array]]:
        logits, acts = run_with_hooks(params, config, tok_ids, {} if edit is None else {hook_out: edit}, keep)
        return jnp.sum(jnp.where(real[:, 1:], next_token_losses(logits, tok_ids), 0)), acts

    clean, acts = loss(None, tuple(sorted({hook_out, *(c.hook_in for c in configs)})))
    stats = tuple(
        _update(one, tree, acts[c.hook_in], acts[hook_out], c, real)
        for one, tree, c in zip(sums.stats, trees, configs, strict=True)
    )
    spliced = tuple(
        before + loss(Splice(tree, config=c))[0] for before, tree, c in zip(sums.spliced, trees, configs, strict=True)
    )
    zeroed = loss(Scale(0.0))[0]
    return _Sums(
        stats, spliced, sums.clean + clean, sums.zeroed + zeroed, sums.targets + jnp.sum(real[:, 1:], dtype=jnp.float32)
    )


def _update(
    stats: DictionaryStats, tree: Any, x: Array, y: Array, config: DictionaryConfig, mask: Array | None
) -> DictionaryStats:
    acts = encode(tree, config, x)
    return update_stats(stats, y, predict(tree, config, x, acts), acts, mask)


def _sum_vectors(stats: DictionaryStats, tree: Any, x: Array, y: Array, *, config: DictionaryConfig) -> DictionaryStats:
    return _update(stats, tree, x, y, config, None)


_add_batch = fast_jit(_sum_batch, static_argnames=("config", "configs"))
_add_vectors = fast_jit(_sum_vectors, static_argnames=("config",))
