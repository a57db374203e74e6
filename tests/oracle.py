"""The oracle of the tests: the model and the dictionaries in NumPy float64, and tolerances.

Written from the published formulas alone, one position and one head at a time where that is clearer: nothing here
shares code or array layout tricks with the package.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from tinymodel_jax.config import DictionaryConfig, ModelConfig


class Tolerance(NamedTuple):
    """Largest difference allowed: `absolute + relative * |expected|`."""

    absolute: float
    relative: float


GOLDEN = Tolerance(1e-4, 1e-5)
"""Against the reference's float32 values; a float64 computation differs from those by up to 1e-4 itself."""
F32 = Tolerance(2e-5, 2e-5)
"""Float32 against float64 on tiny models: sums of under 100 terms of size 1, a few dozen in a row."""
BF16 = Tolerance(0.1, 0.05)
"""Bfloat16 computation: 2^-8 = 0.004 relative an operation, over two layers."""


def assert_close(got: Any, expected: Any, tolerance: Tolerance) -> None:
    """Assert equal shapes, and values within the tolerance."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=tolerance.relative, atol=tolerance.absolute)


def assert_gradient_close(got: Any, expected: Any) -> None:
    """Assert that a gradient is within 2e-5 of its largest entry: small entries are sums of larger ones that cancel."""
    expected = np.asarray(expected, np.float64)
    assert_close(got, expected, Tolerance(2e-5 * float(np.abs(expected).max()), 0))


def error_of(call: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    """Return the message of the error that a call raises, which must be one readable line."""
    try:
        call()
    except kind as error:
        message = str(error.args[0])
        assert message.strip(), "the error says nothing"
        assert len(message.splitlines()) == 1, f"more than one line: {message!r}"
        return message
    raise AssertionError(f"no {kind.__name__} was raised")


Edit = Callable[[np.ndarray, Mapping[str, np.ndarray]], np.ndarray]


def program_of(function: Any, *args: Any, **static: Any) -> tuple[float, list[str]]:
    """Return the floating-point operations of a compiled call, and the lines of its program that compute something."""
    compiled = jax.jit(function, static_argnames=tuple(static)).lower(*args, **static).compile()
    cost, text = compiled.cost_analysis(), compiled.as_text()
    assert cost is not None
    assert text is not None
    return cost["flops"], [line for line in text.splitlines() if "parameter(" not in line]


def forward(
    params: Mapping[str, np.ndarray], config: ModelConfig, tok_ids: Any, edits: Mapping[str, Edit] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return float64 logits and the value at every hook point, after its edit.

    Args:
        params: flat, `blocks.0.attn.W_Q` -> array.
    """
    w = {name: np.asarray(array, np.float64) for name, array in params.items()}
    seen: dict[str, np.ndarray] = {}

    def at(name: str, value: np.ndarray) -> np.ndarray:
        seen[name] = value if name not in (edits or {}) else (edits or {})[name](value, seen)
        return seen[name]

    ids = np.asarray(tok_ids)
    positions = np.broadcast_to(w["W_pos"][: ids.shape[1]], (*ids.shape, config.d_model))
    x = at("hook_embed", w["W_E"][ids]) + at("hook_pos_embed", positions)
    for layer in range(config.n_layers):
        b = f"blocks.{layer}"
        x = at(f"{b}.hook_resid_pre", x)
        attended = _attention(w, b, at, at(f"{b}.hook_attn_in", x), config)
        x = at(f"{b}.hook_resid_mid", x + at(f"{b}.hook_attn_out", attended))
        pre = at(f"{b}.mlp.hook_pre", at(f"{b}.hook_mlp_in", x) @ w[f"{b}.mlp.W_in"] + w[f"{b}.mlp.b_in"])
        post = at(f"{b}.mlp.hook_post", np.maximum(pre, 0))
        x = at(f"{b}.hook_resid_post", x + at(f"{b}.hook_mlp_out", post @ w[f"{b}.mlp.W_out"] + w[f"{b}.mlp.b_out"]))
    return x @ w["W_U"] + w["b_U"], seen


def _attention(w: Mapping[str, np.ndarray], b: str, at: Any, x: np.ndarray, config: ModelConfig) -> np.ndarray:
    heads = range(config.n_heads)
    q, k, v = (
        at(f"{b}.attn.hook_{letter.lower()}", np.stack([x @ w[f"{b}.attn.W_{letter}"][h] for h in heads], axis=2))
        for letter in "QKV"
    )
    scores = np.stack([q[:, :, h] @ k[:, :, h].swapaxes(1, 2) for h in heads], axis=1) / np.sqrt(config.d_head)
    future = np.triu(np.ones(scores.shape[-2:], bool), 1)
    scores = at(f"{b}.attn.hook_attn_scores", np.where(future, -1e9, scores))
    pattern = at(f"{b}.attn.hook_pattern", softmax(scores))
    z = at(f"{b}.attn.hook_z", np.stack([pattern[:, h] @ v[:, :, h] for h in heads], axis=2))
    return sum(z[:, :, h] @ w[f"{b}.attn.W_O"][h] for h in heads) + w[f"{b}.attn.b_O"]


def softmax(x: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Return the log-softmax over the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def next_token_loss(logits: np.ndarray, tok_ids: Any, weights: Any = None) -> float:
    """Return the weighted mean of -log p(token | tokens before it), computed token by token."""
    ids, logprobs = np.asarray(tok_ids), log_softmax(logits)
    weights = np.ones(ids.shape) if weights is None else np.asarray(weights, np.float64)
    total = count = 0.0
    for row in range(ids.shape[0]):
        for position in range(1, ids.shape[1]):
            total -= weights[row, position] * logprobs[row, position - 1, ids[row, position]]
            count += weights[row, position]
    return total / count


def encode(params: Mapping[str, Any], config: DictionaryConfig, x: Any) -> np.ndarray:
    """Return float64 feature activations, position by position and feature by feature."""
    w = {name: np.asarray(array, np.float64) for name, array in params.items()}
    rows = np.asarray(x, np.float64).reshape(-1, config.d_in)
    rows = np.array([_normalized(config, row)[0] for row in rows])
    rows = rows - w["b_dec"] if config.subtract_b_dec else rows
    acts = np.array([_encode_position(w, config, row @ w["W_enc"]) for row in rows])
    return acts.reshape(*np.shape(x)[:-1], config.n_features)


def _normalized(config: DictionaryConfig, row: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Return a vector with its normalization, and the scale and shift that undo it."""
    if config.normalize == "layer_norm":
        scale = float(np.std(row, ddof=1))
        return (row - row.mean()) / (scale + 1e-5), scale, float(row.mean())
    if config.normalize == "constant_norm":
        scale = float(np.linalg.norm(row) / np.sqrt(len(row)))
        return row / scale, scale, 0.0
    return row, 1.0, 0.0


def _encode_position(w: Mapping[str, np.ndarray], config: DictionaryConfig, linear: np.ndarray) -> list[float]:
    features = range(config.n_features)
    if config.architecture == "gated":
        magnitude = linear * np.exp(w["r_mag"]) + w["b_mag"]
        return [max(magnitude[f], 0.0) if linear[f] + w["b_gate"][f] > 0 else 0.0 for f in features]
    pre = linear + w["b_enc"]
    if config.architecture == "relu":
        return [max(pre[f], 0.0) for f in features]
    if config.architecture == "topk":
        best = sorted(features, key=lambda f: -pre[f])[: config.k]
        return [max(pre[f], 0.0) if f in best else 0.0 for f in features]
    if config.architecture == "groupmax":
        group = config.n_features // (config.k or 1)
        best = [max(range(start, start + group), key=lambda f: pre[f]) for start in range(0, config.n_features, group)]
        return [max(pre[f], 0.0) if f in best else 0.0 for f in features]
    threshold = np.broadcast_to(w["threshold"], pre.shape)
    return [pre[f] if pre[f] > max(threshold[f], 0.0) else 0.0 for f in features]


def reconstruct(params: Mapping[str, Any], config: DictionaryConfig, x: Any) -> np.ndarray:
    """Return the dictionary's float64 prediction."""
    w = {name: np.asarray(array, np.float64) for name, array in params.items()}
    prediction = encode(params, config, x) @ w["W_dec"] + w["b_dec"]
    if config.hook_in == config.hook_out:
        undone = [_normalized(config, row)[1:] for row in np.asarray(x, np.float64).reshape(-1, config.d_in)]
        scale, shift = np.array(undone).T.reshape(2, *np.shape(x)[:-1], 1)
        prediction = prediction * scale + shift
    return prediction + np.asarray(x, np.float64) @ w["W_skip"] if config.skip else prediction
