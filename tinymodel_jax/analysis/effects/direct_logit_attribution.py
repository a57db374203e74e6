"""Direct logit attribution: what each part of the model adds to the logits of chosen tokens.

There is no layer norm, so the logits are a sum: what a part writes to the residual stream, times W_U. The parts are the
embeddings, every head, every MLP and the biases. A dictionary replaces the part whose value it predicts by its active
features, its b_dec, its skip connection and its error; one of the residual stream replaces all parts before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tinymodel_jax.block_order import BLOCK_HOOKS, STREAM, WRITERS, block_and_hook
from tinymodel_jax.dictionaries.linear import require_fixed_directions, require_no_copy
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.lm.text import token_ids
from tinymodel_jax.model.forward import forward
from tinymodel_jax.model.hook_points import as_names, position_axes
from tinymodel_jax.model.padding import check_tok_ids, cut, pad_to_bucket

Part = tuple[str, np.ndarray]
"""Label of a part, and what it adds to the logits, which broadcasts to (batch, seq, tokens)."""


class DirectLogitAttribution(NamedTuple):
    """What each part adds to the logits of the tokens. The sum over parts is the logits, up to rounding."""

    labels: tuple[str, ...]
    """`embed`, `pos_embed`, `L0H2` (layer 0, head 2), `L0 b_O`, `L0 MLP`, `L0 b_out`, `b_U`; of a dictionary at M1,
    `M1N123` (active features only), `M1 b_dec`, `M1 skip` and `M1 error`."""
    values: Float[np.ndarray, "parts batch seq tokens"]
    """What each part adds, in logits."""
    tokens: Int[np.ndarray, " tokens"]
    """Ids of the tokens."""


def direct_logit_attribution(
    lm: TinyModel, tok_ids: Any, tokens: Any, dictionaries: str | Iterable[str] = ()
) -> DirectLogitAttribution:
    """Divide the logits of tokens, at every position, among the parts of the model.

        logit = b_U + sum over parts of  (what the part writes) . W_U[:, token]

    The effect is direct: what a part changes through later layers is counted as theirs. In bfloat16, the sum differs
    from the logits by the rounding of the model's own additions.

    Args:
        tok_ids: integers (batch, seq) or (seq,), a text or a list of texts.
        tokens: ids or texts of one token each, such as `[" Lily", " Tim"]`, or a single one.
        dictionaries: tags of dictionaries to divide values by, at outputs of attention and MLPs or at the residual
            stream. Dictionaries spliced into the model there are always included. Of several at one hook point, the
            last counts.

    Raises:
        ValueError: an argument is not valid for the model, a dictionary is at another hook point, or it is an SAE
            that normalizes its input or has a skip connection.

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; exact without layer norm.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import direct_logit_attribution
        >>> lm = TinyModel("mini")
        >>> parts = direct_logit_attribution(lm, "The dog ran to the", " woods")
        >>> parts.values.shape  # parts, rows, positions, tokens
        (47, 1, 6, 1)
        >>> parts.labels[:3]
        ('embed', 'pos_embed', 'L0H0')
    """
    chosen, readers = token_ids(lm, tokens), _readers(lm, dictionaries)
    ids = check_tok_ids(lm.to_tokens(tok_ids), lm.config)
    acts = _values(lm, ids, readers)
    W_U = np.asarray(lm.W_U, np.float32)[:, chosen]
    parts = [("embed", acts["hook_embed"] @ W_U), ("pos_embed", acts["hook_pos_embed"] @ W_U)]
    for layer in range(lm.config.n_layers):
        for name in (f"blocks.{layer}.{hook}" for hook in BLOCK_HOOKS):
            if name in readers:
                kept = [] if block_and_hook(name)[1] in STREAM else parts
                parts = [*kept, *_of_dictionary(readers[name], ids, acts, W_U)]
            elif name.endswith("hook_attn_out"):
                parts += _of_attention(lm, layer, acts, W_U)
            elif name.endswith("hook_mlp_out"):
                b_out = np.asarray(lm.params[f"blocks_{layer}"]["mlp"]["b_out"], np.float32)
                parts += [(f"L{layer} MLP", (acts[name] - b_out) @ W_U), (f"L{layer} b_out", b_out @ W_U)]
    parts.append(("b_U", np.asarray(lm.b_U, np.float32)[chosen]))
    labels, values = zip(*parts, strict=True)
    shape = (*ids.shape, len(chosen))
    return DirectLogitAttribution(labels, np.stack([np.broadcast_to(value, shape) for value in values]), chosen)


def _readers(lm: TinyModel, dictionaries: str | Iterable[str]) -> dict[str, FeatureReader]:
    """Return hook point -> the last of the dictionaries that predict its value."""
    sites = [Site.whole(tag, "direct_logit_attribution: ") for tag in as_names(dictionaries)]
    for site in sites:
        if not _is_divided(site):
            raise ValueError(
                f"direct_logit_attribution: a dictionary at {site.hook_out} does not divide what is added to the "
                f"residual stream; give one at {', '.join((*WRITERS, *STREAM))}."
            )
    sites += [site for site in map(Site.whole, lm.spliced) if _is_divided(site)]
    for config in (lm[site.tag].dictionary.config for site in sites):
        require_fixed_directions(config, "direct_logit_attribution")
        require_no_copy(config, "direct_logit_attribution")
    return {site.hook_out: lm[site.tag] for site in sorted(sites, key=lambda site: site.order)}


def _is_divided(site: Site) -> bool:
    return block_and_hook(site.hook_out)[1] in STREAM + WRITERS


def _values(lm: TinyModel, ids: np.ndarray, readers: dict[str, FeatureReader]) -> dict[str, np.ndarray]:
    """Return the values that are divided, in float32."""
    blocks = [
        f"blocks.{layer}.{hook}" for layer in range(lm.config.n_layers) for hook in ("attn.hook_z", "hook_mlp_out")
    ]
    read = [hook for reader in readers.values() for hook in (reader.site.hook_in, reader.site.hook_out)]
    names = tuple(dict.fromkeys(["hook_embed", "hook_pos_embed", *blocks, *read]))
    padded, length = pad_to_bucket(ids, lm.config)
    _, acts = forward(lm.hooked(), padded, keep=names, output="none")
    return {name: np.asarray(cut(acts[name], position_axes(name), length), np.float32) for name in names}


def _of_attention(lm: TinyModel, layer: int, acts: dict[str, np.ndarray], W_U: np.ndarray) -> Iterator[Part]:
    attn, z = lm.params[f"blocks_{layer}"]["attn"], acts[f"blocks.{layer}.attn.hook_z"]
    to_logits = np.asarray(attn["W_O"], np.float32) @ W_U
    for head in range(lm.config.n_heads):
        yield f"L{layer}H{head}", z[:, :, head] @ to_logits[head]
    yield f"L{layer} b_O", np.asarray(attn["b_O"], np.float32) @ W_U


def _of_dictionary(
    reader: FeatureReader, ids: np.ndarray, acts: dict[str, np.ndarray], W_U: np.ndarray
) -> Iterator[Part]:
    tag, params = reader.site.tag, reader.dictionary.params
    found = np.asarray(reader(ids), np.float32)
    active = np.flatnonzero(found.any(axis=(0, 1)))
    effects = np.asarray(params["W_dec"], np.float32)[active] @ W_U
    rest = acts[reader.site.hook_out] @ W_U - found[..., active] @ effects
    for number, feature in enumerate(active):
        yield f"{tag}N{feature}", found[..., feature, None] * effects[number]
    others = {"b_dec": np.asarray(params["b_dec"], np.float32) @ W_U}
    if reader.dictionary.config.skip:
        others["skip"] = acts[reader.site.hook_in] @ (np.asarray(params["W_skip"], np.float32) @ W_U)
    for name, value in others.items():
        yield f"{tag} {name}", value
        rest = rest - value
    yield f"{tag} error", rest
