"""Metrics: the numbers that sweeps, attribution and patching follow through an intervention.

    "loss"                    mean loss of the next tokens, nats
    "next_logprob"            log-probability of `next_ids` after the last token of each row, nats
    logit_difference(a, b)    logit of `a` minus logit of `b` after the last token of each row
    a function                (logits, tok_ids) -> (batch,), one number per row

A function gets float32 logits (batch, seq, d_vocab) and token ids (batch, seq) of rows as they were given, with their
`[PAD]`. It is called on every measurement and never compiled, so it may read variables that change. Attribution
differentiates it, so there it must be a function of JAX arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tinymodel_jax.lm import TinyModel
from tinymodel_jax.lm.text import token_ids

Token = int | str
"""A token's id, or a text of one token such as `" Tim"`."""
Tokens = Token | Sequence[Token] | np.ndarray
"""One token, or one for each row."""
Kind = Literal["loss", "next_logprob", "logit_difference", "function"]


@dataclass(frozen=True)
class LogitDifference:
    """The logit of one token minus that of another, after the last token of each row; made by `logit_difference`."""

    a: Token | tuple[Token, ...]
    """One token (its id or text), or one for each row."""
    b: Token | tuple[Token, ...]
    """The same."""


MetricFunction = Callable[[Float[Array, "batch seq d_vocab"], Int[Array, "batch seq"]], Any]
Metric = Literal["loss", "next_logprob"] | LogitDifference | MetricFunction


def logit_difference(a: Tokens, b: Tokens) -> LogitDifference:
    """Return the metric `logit of a - logit of b` after the last token of each row.

    Args:
        a: id or text of one token, such as `" Tim"`; or one for each row.
        b: the same.

    Returns:
        A metric for `sweeps`, `attribution`, `patching` and `circuits`. Its unit is logits.

    Functions that take the metric raise a ValueError if a text is not one token, or an id is out of range.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import logit_difference, sweeps
        >>> lm = TinyModel("mini")
        >>> metric = logit_difference(" woods", " dog")
        >>> effects = sweeps.ablate(lm, "M2", "The dog ran to the", [0, 1], metric=metric)
        >>> effects.metric.shape
        (2,)
    """

    def hashable(tokens: Any) -> Any:
        tokens = tokens.tolist() if isinstance(tokens, np.ndarray | np.integer) else tokens
        return tuple(tokens) if isinstance(tokens, list) else tokens

    return LogitDifference(hashable(a), hashable(b))


class Weights(NamedTuple):
    """Weights of the positions, and the tokens whose log-probabilities are measured."""

    real: Float[Array, "batch seq"]
    """Equal weights of all positions except `[PAD]`; sums to 1."""
    loss: Float[Array, "batch seq"]
    """Weights of the predictions made at the positions; sums to 1."""
    last: Float[Array, "batch seq"]
    """Equal weights of the last position of each row; sums to 1."""
    targets: Int[Array, "batch seq"]
    next_ids: Int[Array, "batch 1"]


class Measured(NamedTuple):
    """A metric that has been checked against the model and the rows."""

    kind: Kind
    tokens: Int[np.ndarray, "batch 2"] | None = None
    """Both tokens of a logit difference, for each row."""
    function: MetricFunction | None = None


class FunctionValue(NamedTuple):
    """A function that is a metric, and its value in the pass without changes."""

    function: MetricFunction
    tok_ids: Int[Array, "batch length"]
    """The rows as they were given."""
    logits: Float[Array, "batch seq d_vocab"]
    """Logits of the rows with the padding to a compiled length, which the function does not see."""
    value: float

    @classmethod
    def of(
        cls,
        function: MetricFunction,
        tok_ids: Int[np.ndarray, "batch length"],
        logits: Float[Array, "batch seq d_vocab"],
    ) -> FunctionValue:
        """Call the function on a pass without changes.

        Raises:
            ValueError: it does not return one finite number per row.
        """
        ids = jnp.asarray(tok_ids)
        value = float(value_of_function(function, logits[:, : ids.shape[1]], ids))
        if not np.isfinite(value):
            raise ValueError(
                f"the metric {_name(function)} is {value} without any change; it must be finite on these rows."
            )
        return cls(function, ids, logits, value)

    def changes(self, logits: Float[Array, "n batch seq d_vocab"]) -> Float[np.ndarray, " n"]:
        """Return by how much the value changes with each of several logits."""
        length = self.tok_ids.shape[1]
        values = [float(value_of_function(self.function, one[:, :length], self.tok_ids)) for one in logits]
        return np.array(values, np.float32) - np.float32(self.value)

    def gradient(self) -> Float[Array, "batch seq d_vocab"]:
        """Return the derivative of the value with respect to the logits; 0 at the padding."""
        length = self.tok_ids.shape[1]
        value = partial(value_of_function, self.function, tok_ids=self.tok_ids)
        try:
            return jax.grad(lambda logits: value(logits[:, :length]))(self.logits)
        except jax.errors.TracerArrayConversionError as error:
            raise ValueError(
                f"the metric {_name(self.function)} cannot be differentiated, because it uses NumPy; write it with "
                "jax.numpy."
            ) from error


def check_metric(lm: TinyModel, metric: Metric, n_rows: int) -> Measured:
    """Return what to compute for a metric.

    Raises:
        ValueError: it is not a metric, or the tokens of a logit difference do not fit the model or the rows.
    """
    if isinstance(metric, LogitDifference):
        return Measured("logit_difference", _both_tokens(lm, metric, n_rows))
    if isinstance(metric, str) and metric in ("loss", "next_logprob"):
        return Measured(metric)
    if callable(metric):
        return Measured("function", function=metric)
    raise ValueError(
        f"metric={metric!r:.80}; expected 'loss', 'next_logprob', logit_difference(a, b), or a function "
        "(logits, tok_ids) -> (batch,)."
    )


def last_positions(real: Bool[np.ndarray, "batch seq"]) -> Int[np.ndarray, " batch"]:
    """Return the position of each row's last token."""
    return real.shape[1] - 1 - real[:, ::-1].argmax(axis=1)


def weights_of(
    ids: Int[np.ndarray, "batch seq"],
    real: Bool[np.ndarray, "batch seq"],
    next_ids: Any,
    d_vocab: int,
) -> Weights:
    """Return the weights for rows of which `real` are not `[PAD]`.

    Raises:
        ValueError: `next_ids` is not one token id for each row.
    """
    chosen = np.asarray(next_ids)
    if chosen.shape != (len(ids),):
        raise ValueError(f"next_ids has shape {chosen.shape}; expected one token for each of {len(ids)} rows.")
    if chosen.dtype.kind not in "iu" or (chosen < 0).any() or (chosen >= d_vocab).any():
        raise ValueError(f"next_ids={chosen.tolist()!r:.80} must be token ids, 0..{d_vocab - 1}.")
    targets, predicted = np.roll(ids, -1, axis=1), np.roll(real, -1, axis=1)
    predicted[:, -1] = False
    at_last = np.arange(ids.shape[1]) == last_positions(real)[:, None]
    shares = [mask.astype(np.float32) / max(1, mask.sum()) for mask in (real, predicted, at_last)]
    return Weights(*map(jnp.asarray, (*shares, targets, chosen.astype(np.int32)[:, None])))


def value_from_logits(
    kind: Kind,
    logits: Float[Array, "batch seq d_vocab"],
    weights: Weights,
    tokens: Int[Array, "batch 2"] | None = None,
) -> Float[Array, ""]:
    """Return the mean over rows of a metric that is not a function."""

    def of_tokens(values: Array, ids: Array) -> Array:
        return jnp.take_along_axis(values, jnp.broadcast_to(ids, logits.shape[:2])[..., None], axis=-1)[..., 0]

    if kind == "logit_difference":
        assert tokens is not None
        return jnp.sum((of_tokens(logits, tokens[:, :1]) - of_tokens(logits, tokens[:, 1:])) * weights.last)
    logprobs = jax.nn.log_softmax(logits)
    if kind == "loss":
        return -jnp.sum(of_tokens(logprobs, weights.targets) * weights.loss)
    return jnp.sum(of_tokens(logprobs, weights.next_ids) * weights.last)


def value_of_function(
    function: MetricFunction, logits: Float[Array, "batch seq d_vocab"], tok_ids: Int[Array, "batch seq"]
) -> Array:
    """Return the mean over rows of a function.

    Raises:
        ValueError: it does not return one number per row.
    """
    returned = function(logits, tok_ids)
    if not isinstance(returned, jax.Array | np.ndarray):
        raise ValueError(
            f"the metric {_name(function)} returned {type(returned).__name__}; expected an array of one number per row."
        )
    values = jnp.asarray(returned)
    if values.shape != (len(tok_ids),):
        raise ValueError(
            f"the metric {_name(function)} returned shape {values.shape}; expected ({len(tok_ids)},), one "
            f"number per row of tok_ids, whose shape is {tok_ids.shape}."
        )
    return jnp.mean(values.astype(jnp.float32))


def _name(function: MetricFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _both_tokens(lm: TinyModel, metric: LogitDifference, n_rows: int) -> Int[np.ndarray, "batch 2"]:
    found = [token_ids(lm, token) for token in (metric.a, metric.b)]
    if any(len(ids) not in (1, n_rows) for ids in found):
        counts = " and ".join(str(len(ids)) for ids in found)
        raise ValueError(
            f"logit_difference({metric.a!r:.60}, {metric.b!r:.60}): got {counts} tokens for {n_rows} rows; give one "
            "token, or one for each row."
        )
    both = np.stack([np.broadcast_to(ids, n_rows) for ids in found], axis=1)
    same = np.flatnonzero(both[:, 0] == both[:, 1])
    if len(same):
        raise ValueError(
            f"logit_difference({metric.a!r:.60}, {metric.b!r:.60}): both are token {both[same[0], 0]}, so the "
            "difference is always 0; give two different tokens."
        )
    return both
