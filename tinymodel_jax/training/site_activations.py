"""Activations to train dictionaries on, from one pass of the language model: all sites at the same tokens.

Pure functions for use inside a compiled step. A step's vectors are those of `n` tokens drawn from a batch of stories,
never `[PAD]`, so a batch has a static size for stories of any length. `[BEGIN]` is included unless it is excluded,
because a spliced dictionary has to predict it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinymodel_jax.config import ModelConfig, split_hooks
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.model.transformer import run_with_hooks


class Vectors(NamedTuple):
    """A batch of activation vectors to train one dictionary on."""

    x: Float[Array, "n d_in"]
    """Inputs of the dictionary."""
    y: Float[Array, "n d_out"] | None
    """Targets; None if they are `x`."""


def draw_tokens(tok_ids: Int[Array, "batch seq"], without: Sequence[int], n: int, key: Array) -> Int[Array, " n"]:
    """Draw `n` positions of the flattened batch whose ids are not in `without`, each once before any is repeated."""
    real = ~jnp.isin(tok_ids.reshape(-1), jnp.asarray(without, tok_ids.dtype))
    order = jnp.argsort(jnp.where(real, jax.random.uniform(key, real.shape), 2.0))
    return order[jnp.arange(n) % jnp.maximum(jnp.sum(real), 1)]


def site_vectors(
    params: Any,
    config: ModelConfig,
    tok_ids: Int[Array, "batch seq"],
    sites: Sequence[Site],
    n: int,
    key: Array,
    layout: Any = None,
    exclude: Sequence[int] = (),
) -> dict[str, Vectors]:
    """Return each site's vectors (tag -> vectors) at the same `n` tokens.

    Args:
        params, config: those of the language model; layers above the highest site are not computed.
        layout: sharding of the vectors; None leaves it to the compiler.
        exclude: ids of tokens that are not drawn, besides `[PAD]`.
    """
    joined = {hook for site in sites for hook in (site.hook_in, site.hook_out)}
    names = tuple(sorted({name for hook in joined for name in split_hooks(hook)}))
    _, acts = run_with_hooks(params, config, tok_ids, {}, names)
    places = draw_tokens(tok_ids, (config.pad_id, *exclude), n, key)
    rows = {name: acts[name].reshape(tok_ids.size, -1) for name in names}  # the heads of q, k, v and z concatenated
    drawn = {name: rows[name][places].astype(jnp.float32) for name in names}
    for hook in sorted(joined - set(names)):
        drawn[hook] = jnp.concatenate([drawn[name] for name in split_hooks(hook)], axis=-1)
    if layout is not None:
        drawn = {name: jax.lax.with_sharding_constraint(vectors, layout) for name, vectors in drawn.items()}
    return {
        site.tag: Vectors(drawn[site.hook_in], None if site.hook_in == site.hook_out else drawn[site.hook_out])
        for site in sites
    }
