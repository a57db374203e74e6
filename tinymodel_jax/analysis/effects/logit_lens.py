"""The logit lens: what the model would predict from the residual stream in front of each layer.

    log-probabilities = log_softmax(residual stream @ W_U + b_U)

There is no layer norm, so the unembedding applies to every layer's stream as it is. Source: nostalgebraist (2020),
interpreting GPT: the logit lens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinymodel_jax.block_order import final_stream
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.lm.text import token_ids
from tinymodel_jax.model.forward import HookedModel, compiled_pass
from tinymodel_jax.model.hook_points import Hook, require_edits, require_hook_names


class LogitLens(NamedTuple):
    """The predictions from the residual stream before each layer, and after the last one."""

    names: tuple[str, ...]
    """Hook point of each stream: `hook_resid_pre` of every layer, and `hook_resid_post` of the last."""
    logprobs: Float[np.ndarray, "streams batch seq tokens"]
    """Log-probabilities of the next token, in nats; the last stream's are the model's own."""


def logit_lens(
    lm: TinyModel, tok_ids: Any, tokens: Any = None, *, hooks: Mapping[str, Hook] | None = None
) -> LogitLens:
    """Return the log-probabilities of the next token that each layer's residual stream gives.

        logprobs = log_softmax(stream @ W_U + b_U)

    With splices or edits, the streams are those of the changed pass, after any change of the stream itself.

    Args:
        tok_ids: integers (batch, seq) or (seq,), a text or a list of texts.
        tokens: ids or texts of one token whose log-probabilities to return, which keeps the result small; None returns
            those of all ids.
        hooks: edits, as `lm.run_with_hooks` takes them.

    Raises:
        ValueError: `tok_ids` are not valid for the model, an entry of `tokens` is not one token, or as
            `lm.run_with_hooks`.

    Source: nostalgebraist 2020, interpreting GPT: the logit lens.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import logit_lens
        >>> lm = TinyModel("mini")
        >>> lens = logit_lens(lm, "The dog ran to the", " woods")
        >>> lens.logprobs.shape
        (5, 1, 6, 1)
        >>> lens.names[0], lens.names[-1]
        ('blocks.0.hook_resid_pre', 'blocks.3.hook_resid_post')
    """
    n_layers = lm.config.n_layers
    names = (*(f"blocks.{i}.hook_resid_pre" for i in range(n_layers)), final_stream(n_layers))
    chosen = None if tokens is None else token_ids(lm, tokens)
    require_edits(hooks or {})
    require_hook_names(hooks or {}, lm.config)
    model, ids, length = lm.padded_pass(tok_ids, hooks or {})
    return LogitLens(names, np.asarray(_lens(model, ids, chosen, names=names))[:, :, :length])


@partial(compiled_pass, static_argnames=("names",))
def _lens(
    model: HookedModel,
    tok_ids: Int[Array, "batch seq"],
    tokens: Int[Array, " tokens"] | None,
    *,
    names: tuple[str, ...],
) -> Float[Array, "streams batch seq tokens"]:
    _, acts = model.run(tok_ids, names)

    def of_stream(resid: Array) -> Array:
        logprobs = jax.nn.log_softmax(model.unembed(resid))
        return logprobs if tokens is None else logprobs[..., tokens]

    return jax.lax.map(of_stream, jnp.stack([acts[name] for name in names]))  # one stream's logits at a time
