"""The transformer: embeddings, causal attention, ReLU MLPs and an unembedding, with no layer norm anywhere.

Stateless Linen modules over a plain nested dict of parameters with TransformerLens names and head-split shapes. A
`HookPoint` module marks every hook point. Nothing here is compiled: callers use `jit`.

Axes: `b` batch, `s` query position, `t` key position, `d` d_model, `h` head, `k` d_head, `m` d_mlp, `v` vocabulary
(and `f` feature, in the dictionaries).

Source: architecture of noanabeshima/tiny_model (tinymodel/lm_modules.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.model import causal_attention
from tinymodel_jax.model.hook_points import (
    Hook,
    HookPoint,
    Names,
    apply_with_hooks,
    chosen_names,
    masked_score,
)
from tinymodel_jax.model.padding import check_shape
from tinymodel_jax.params import ParamsModule, uniform_fan_in

Params = Mapping[str, Any]


class LayerCache(NamedTuple):
    """Keys and values of one layer for the positions so far, in the layout in which writes and products are fastest."""

    keys: Float[Array, "batch n_heads key_pos d_head"]
    values: Float[Array, "batch n_heads key_pos d_head"]

    @classmethod
    def of_prompt(cls, keys: Array, values: Array, capacity: int) -> LayerCache:
        """Build it from the (batch, pos, head, d_head) keys and values of a prompt, with room for more positions."""
        room = ((0, 0), (0, 0), (0, capacity - keys.shape[1]), (0, 0))
        return cls(*(jnp.pad(jnp.swapaxes(x, 1, 2), room) for x in (keys, values)))

    def with_token(self, key: Array, value: Array, positions: Int[Array, " batch"]) -> LayerCache:
        """Write the (batch, head, d_head) key and value of one token per row at the row's position."""
        rows = jnp.arange(key.shape[0])
        return LayerCache(self.keys.at[rows, :, positions].set(key), self.values.at[rows, :, positions].set(value))

    def followed_by(self, keys: Array, values: Array) -> LayerCache:
        """Append the (batch, pos, head, d_head) keys and values of the next positions."""
        new = (jnp.swapaxes(x, 1, 2) for x in (keys, values))
        return LayerCache(*(jnp.concatenate(both, axis=2) for both in zip(self, new, strict=True)))


KVCache = tuple[LayerCache, ...]
"""One `LayerCache` per layer. Slots at or after a row's current position are masked, so their content is irrelevant."""


class Attention(ParamsModule):
    """Causal attention with a bias on the output, and none on queries, keys and values."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        cache: LayerCache | None = None,
        positions: Int[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], LayerCache | None]:
        """Return the attention output, and the cache with the new keys and values.

        With a cache and `positions`, `x` has one token per row, at these positions. With a cache alone, `x` has the
        tokens after the cached ones.
        """
        cfg = self.config
        split, merged = (cfg.n_heads, cfg.d_model, cfg.d_head), (cfg.n_heads, cfg.d_head, cfg.d_model)
        W_Q = self.param("W_Q", _query_key_init(cfg), split, cfg.param_dtype)
        W_K = self.param("W_K", _query_key_init(cfg), split, cfg.param_dtype)
        W_V = self.param("W_V", uniform_fan_in(cfg.d_model), split, cfg.param_dtype)
        W_O = self.param("W_O", uniform_fan_in(cfg.d_model), merged, cfg.param_dtype)
        b_O = self.param("b_O", nn.initializers.zeros, (cfg.d_model,), cfg.param_dtype)
        q = HookPoint(name="hook_q")(_heads(x, W_Q.astype(cfg.dtype)))
        k = HookPoint(name="hook_k")(_heads(x, W_K.astype(cfg.dtype)))
        v = HookPoint(name="hook_v")(_heads(x, W_V.astype(cfg.dtype)))
        if cache is not None:
            cache = cache.followed_by(k, v) if positions is None else cache.with_token(k[:, 0], v[:, 0], positions)
            k, v = jnp.swapaxes(cache.keys, 1, 2), jnp.swapaxes(cache.values, 1, 2)
        scores_point, pattern_point = HookPoint(name="hook_attn_scores"), HookPoint(name="hook_pattern")
        looked_at = scores_point.is_used() or pattern_point.is_used()
        if positions is None and not looked_at and causal_attention.worthwhile(q, k):
            z = causal_attention.causal_attention(q, k, v)
        else:
            z = self._through_hooks(q, k, v, positions, scores_point, pattern_point)
        z = HookPoint(name="hook_z")(z)
        z = z.reshape(*z.shape[:2], cfg.n_heads * cfg.d_head)
        return _affine(z, W_O.reshape(-1, cfg.d_model).astype(cfg.dtype), b_O.astype(cfg.dtype)), cache

    def _through_hooks(
        self,
        q: Float[Array, "batch query n_heads d_head"],
        k: Float[Array, "batch key n_heads d_head"],
        v: Float[Array, "batch key n_heads d_head"],
        positions: Int[Array, " batch"] | None,
        scores_point: HookPoint,
        pattern_point: HookPoint,
    ) -> Float[Array, "batch query n_heads d_head"]:
        """Return the values, weighted by a pattern that passes its hook points."""
        scores = jnp.einsum("bshk,bthk->bhst", q, k) / math.sqrt(self.config.d_head)
        visible = _causal(q.shape[1], k.shape[1], positions)
        masked = masked_score(scores.dtype)
        scores = jnp.where(scores > -jnp.inf, scores, jnp.nan)  # so that an overflow is seen, and not taken for a mask
        scores = scores_point(jnp.where(visible, scores, masked))
        scores = jnp.where(visible, scores, masked)  # edits may mask more keys, not fewer
        pattern = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(self.config.dtype)
        pattern = jnp.where(scores <= masked, 0, pattern)  # a query that sees no key attends to nothing
        pattern = jnp.where(visible, pattern_point(pattern), 0)
        return jnp.einsum("bhst,bthk->bshk", pattern, v)


class MLP(ParamsModule):
    """Two linear maps with a ReLU in between. With `jumprelu`, neurons at or below their threshold are zero too."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        cfg = self.config
        W_in = self.param("W_in", uniform_fan_in(cfg.d_model), (cfg.d_model, cfg.d_mlp), cfg.param_dtype)
        b_in = self.param("b_in", uniform_fan_in(cfg.d_model), (cfg.d_mlp,), cfg.param_dtype)
        W_out = self.param("W_out", uniform_fan_in(cfg.d_mlp), (cfg.d_mlp, cfg.d_model), cfg.param_dtype)
        b_out = self.param("b_out", uniform_fan_in(cfg.d_mlp), (cfg.d_model,), cfg.param_dtype)
        pre = HookPoint(name="hook_pre")(_affine(x, W_in.astype(cfg.dtype), b_in.astype(cfg.dtype)))
        acts = jax.nn.relu(pre)
        if cfg.mlp_activation == "jumprelu":
            threshold = self.param("threshold", nn.initializers.zeros, (cfg.d_mlp,), cfg.param_dtype)
            acts = jnp.where(pre > threshold.astype(cfg.dtype), acts, 0)
        post = HookPoint(name="hook_post")(acts)
        return _affine(post, W_out.astype(cfg.dtype), b_out.astype(cfg.dtype))


class Block(nn.Module):
    """Attention, then an MLP; each reads the residual stream and adds to it.

    `hook_resid_*` are the residual stream: an edit there changes everything that follows. `hook_attn_in` and
    `hook_mlp_in` are the inputs of attention and MLP. Their values are equal, but an edit there does not change the
    stream.
    """

    config: ModelConfig

    def setup(self) -> None:
        self.attn, self.mlp = Attention(self.config), MLP(self.config)
        self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_in, self.hook_mlp_in = HookPoint(), HookPoint()
        self.hook_attn_out, self.hook_mlp_out = HookPoint(), HookPoint()

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        cache: LayerCache | None = None,
        positions: Int[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], LayerCache | None]:
        x = self.hook_resid_pre(x)
        attn_out, layer_cache = self.attn(self.hook_attn_in(x), cache, positions)
        return self.after_attention(x + self.hook_attn_out(attn_out)), layer_cache

    def after_attention(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        """Return the stream after the block, given the stream after its attention."""
        x = self.hook_resid_mid(x)
        mlp_out = self.hook_mlp_out(self.mlp(self.hook_mlp_in(x)))
        return self.hook_resid_post(x + mlp_out)


class Transformer(ParamsModule):
    """The language model: token ids in, logits out.

    `model.apply({"params": params}, tok_ids)` gives float32 logits (batch, seq, d_vocab). Ids are not checked,
    because compiled functions cannot raise; `TinyModel` checks them. Read hook points with `run_with_hooks`: Flax's own
    `capture_intermediates` does not see attention scores and patterns, which long inputs do not compute without need.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from tinymodel_jax import ModelConfig, Transformer
        >>> config = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_mlp=32, n_ctx=8, d_vocab=32)
        >>> tok_ids = jnp.zeros((1, 5), jnp.int32)
        >>> variables = Transformer(config).init(jax.random.key(0), tok_ids)
        >>> Transformer(config).apply(variables, tok_ids).shape
        (1, 5, 32)
    """

    config: ModelConfig
    """Shape and number formats."""

    def setup(self) -> None:
        cfg = self.config
        self.W_E = self.param("W_E", nn.initializers.normal(1e-4), (cfg.d_vocab, cfg.d_model), cfg.param_dtype)
        self.W_pos = self.param("W_pos", nn.initializers.normal(1e-4), (cfg.n_ctx, cfg.d_model), cfg.param_dtype)
        self.W_U = self.param("W_U", uniform_fan_in(cfg.d_model), (cfg.d_model, cfg.d_vocab), cfg.param_dtype)
        self.b_U = self.param("b_U", uniform_fan_in(cfg.d_model), (cfg.d_vocab,), cfg.param_dtype)
        self.hook_embed = HookPoint()
        self.hook_pos_embed = HookPoint()
        self.blocks = [Block(cfg) for _ in range(cfg.n_layers)]

    def __call__(self, tok_ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq d_vocab"]:
        x = self._embed(tok_ids, self.W_pos[: tok_ids.shape[1]])
        for block in self.blocks:
            x, _ = block(x)
        return self.unembed(x)

    def decode(
        self, tok_ids: Int[Array, " batch"], positions: Int[Array, " batch"], cache: KVCache
    ) -> tuple[Float[Array, "batch d_vocab"], KVCache]:
        """Return the logits after one more token per row, at `positions`, and the cache that includes it.

        Args:
            positions: position of each token in its row.
            cache: keys and values of the earlier positions of every block.
        """
        x = self._embed(tok_ids[:, None], self.W_pos[positions][:, None])
        layers = []
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x, extended = block(x, layer_cache, positions)
            layers.append(extended)
        return self.unembed(x)[:, 0], tuple(layers)

    def resume(
        self, resid: Float[Array, "batch seq d_model"], layer: int, at_mlp: bool = False, before: KVCache = ()
    ) -> Float[Array, "batch seq d_model"]:
        """Return the final residual stream, given the stream before a block or before its MLP.

        Args:
            layer: first block to run; n_layers runs none.
            at_mlp: whether `resid` is the stream before this block's MLP rather than before the block.
            before: keys and values of earlier positions, for each block whose attention runs; () if `resid` starts at
                the first position. The result covers the positions of `resid` only.
        """
        if at_mlp:
            resid, layer = self.blocks[layer].after_attention(resid), layer + 1
        blocks = self.blocks[layer:]
        for block, cache in zip(blocks, before or (None,) * len(blocks), strict=True):
            resid, _ = block(resid, cache)
        return resid

    def unembed(self, resid: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_vocab"]:
        """Return the float32 logits of a final residual stream."""
        return _affine(resid, self.W_U.astype(self.config.dtype), self.b_U.astype(jnp.float32))

    def _embed(self, tok_ids: Int[Array, "batch seq"], pos_embed: Array) -> Float[Array, "batch seq d_model"]:
        dtype = self.config.dtype
        embed = self.hook_embed(self.W_E[tok_ids].astype(dtype))
        return embed + self.hook_pos_embed(jnp.broadcast_to(pos_embed.astype(dtype), embed.shape))


def run_with_hooks(
    params: Params,
    config: ModelConfig,
    tok_ids: Int[Array, "batch seq"],
    hooks: Mapping[str, Hook] | None = None,
    keep: Names = (),
) -> tuple[Float[Array, "batch seq d_vocab"], dict[str, Array]]:
    """Run the model with edits; return its logits and the kept activations.

    A pure function of `params`, `tok_ids` and the arrays of `hooks`, for use with `jit`, `vmap` and `grad`. Under
    `jit`, values that the caller does not use are not computed: without the logits, no layer after the last kept hook
    point runs. Without hooks and kept values, the result is bitwise that of `Transformer(config).apply`.

    Args:
        hooks: hook name -> edit. An edit is made by `interventions`, or is any function `(value, acts) -> value`, where
            `acts` contains the values of the hook points so far, and `tok_ids`.
        keep: the hook points whose values are returned (after their edits): names, patterns such as "*hook_mlp_out",
            or a function of the name.

    Raises:
        ValueError: a hook name does not exist, or an edit changes a shape.

    Examples:
        >>> from tinymodel_jax import TinyModel, interventions, run_with_hooks
        >>> lm = TinyModel("mini")
        >>> hooks = interventions.scale("blocks.1.hook_mlp_out", 0.0)
        >>> logits, kept = run_with_hooks(lm.params, lm.config, lm.to_tokens("The dog"), hooks, "blocks.1.hook_mlp_out")
        >>> logits.shape, float(abs(kept["blocks.1.hook_mlp_out"]).max())
        ((1, 3, 1024), 0.0)
    """
    hooks = hooks or {}
    keep = chosen_names(keep, config, hooks)
    check_shape(tok_ids, config)
    return apply_with_hooks(Transformer(config), {"params": params}, tok_ids, tok_ids=tok_ids, hooks=hooks, keep=keep)


def _query_key_init(config: ModelConfig) -> nn.initializers.Initializer:
    """Normal, standard deviation sqrt(2 / (d_model + d_head))."""
    return nn.initializers.normal(math.sqrt(2 / (config.d_model + config.d_head)))


def _affine(x: Float[Array, "*batch d_in"], W: Float[Array, "d_in d_out"], bias: Float[Array, " d_out"]) -> Array:
    """Return `x @ W + bias` in the bias's type.

    Written so that XLA's CPU backend computes the gradients fast. With merged batch axes, the gradient of `W` is one
    plain product; with separate ones, it is a product of transposed copies, up to four times slower. The bias is added
    as a product with ones, which the compiler turns into an addition; its gradient is then a product too, rather than a
    slow sum over columns.
    """
    rows = x.reshape(-1, x.shape[-1])
    ones = jnp.ones((len(rows), 1), bias.dtype)
    added = jnp.matmul(ones, bias[None], precision=jax.lax.Precision.HIGHEST)  # TPUs would round it to bfloat16
    out = jnp.matmul(rows, W, preferred_element_type=bias.dtype) + added
    return out.reshape(*x.shape[:-1], W.shape[1])


def _heads(x: Float[Array, "batch seq d_model"], W: Float[Array, "n_heads d_model d_head"]) -> Array:
    """Return `x` times the matrix of every head, (batch, seq, head, d_head); the batch axes merged as in `_affine`."""
    rows = jnp.einsum("rd,hdk->rhk", x.reshape(-1, x.shape[-1]), W)
    return rows.reshape(*x.shape[:-1], *rows.shape[1:])


def _causal(n_queries: int, n_keys: int, positions: Int[Array, " batch"] | None) -> Array:
    """Return which keys each query sees; without `positions`, the queries are at the last positions of the keys."""
    key_pos = jnp.arange(n_keys)
    if positions is None:
        return key_pos <= jnp.arange(n_keys)[n_keys - n_queries :, None]
    return (key_pos <= positions[:, None])[:, None, None]
