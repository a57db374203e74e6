"""Frozen passes of the tiny model, computed by hand: what the tests of circuits compare with."""

from typing import Any

import numpy as np
from conftest import make_dictionary

from tinymodel_jax.lm import TinyModel

ROUNDING = 1e-9
"""Largest difference of two float64 computations of numbers of size 10."""
PROMPT = np.array([0, 5, 7, 3, 7, 11, 2], np.int32)


def with_transcoders(lm: TinyModel, **options: Any) -> TinyModel:
    lm = lm.splice([])
    for layer in range(lm.config.n_layers):
        block = f"blocks.{layer}"
        lm.attach(f"M{layer}", make_dictionary(f"{block}.hook_mlp_in", f"{block}.hook_mlp_out", layer + 7, **options))
    return lm


class ByHand:
    """The frozen pass in NumPy float64, one source at a time: `run(scales)` writes each source scale times."""

    def __init__(self, lm: TinyModel, tok_ids: np.ndarray, tags: dict[tuple[str, int], str], respond: bool) -> None:
        self.lm, self.ids, self.tags, self.respond = lm, tok_ids, tags, respond
        kept = lm.run_with_cache(tok_ids)[1]
        self.kept = {name: np.asarray(value, np.float64)[0] for name, value in kept.items()}
        self.acts: dict[str, np.ndarray] = {}
        self.errors: dict[str, np.ndarray] = {}
        self.clean = self.run({})

    def run(self, scales: dict[tuple[Any, ...], float]) -> dict[str, np.ndarray]:
        """Return pre-activations by tag, and the final stream as "final"."""
        found = {}
        params, length = self.lm.params, len(self.ids)
        scale = np.array([[scales.get((kind, p), 1.0) for p in range(length)] for kind in ("token", "position")])
        x = np.asarray(params["W_E"], np.float64)[self.ids] * scale[0][:, None]
        x = x + np.asarray(params["W_pos"], np.float64)[:length] * scale[1][:, None]
        for layer in range(self.lm.config.n_layers):
            attn = {n: np.asarray(v, np.float64) for n, v in params[f"blocks_{layer}"]["attn"].items()}
            pattern = self.kept[f"blocks.{layer}.attn.hook_pattern"]
            out = np.zeros_like(x)
            for head in range(self.lm.config.n_heads):
                out = out + pattern[head] @ (x @ attn["W_V"][head]) @ attn["W_O"][head]
            out = out + attn["b_O"] * scales.get(("bias", f"blocks.{layer}.attn.b_O"), 1.0)
            if ("attn", layer) in self.tags:
                out = self.through(
                    self.tags["attn", layer], out, self.kept[f"blocks.{layer}.hook_attn_out"], scales, found
                )
            x = x + out
            x = x + self.through(self.tags["mlp", layer], x, self.kept[f"blocks.{layer}.hook_mlp_out"], scales, found)
        return {**found, "final": x}

    def through(self, tag: str, x: Any, value: Any, scales: Any, found: dict[str, np.ndarray]) -> np.ndarray:
        own = self.lm[tag].dictionary
        w = {name: np.asarray(array, np.float64) for name, array in own.params.items()}
        given = x - w["b_dec"] if own.config.subtract_b_dec else x
        pre, acting = given @ w["W_enc"], own.config.acts_at(self.ids)[:, None]
        if own.config.architecture == "gated":
            on = pre + w["b_gate"] > 0
            pre = pre * np.exp(w["r_mag"]) + w["b_mag"]
            acts = np.maximum(pre, 0) * on
        else:
            pre = pre + w["b_enc"]
            acts = np.where(pre > np.maximum(w.get("threshold", 0), 0), pre, 0)
            if own.config.architecture == "topk":
                kept = np.zeros_like(acts)
                for row, largest in enumerate(np.argsort(-pre, axis=1, kind="stable")[:, : own.config.k]):
                    kept[row, largest] = acts[row, largest]
                acts = kept
            if own.config.architecture == "groupmax":
                groups = acts.reshape(len(acts), own.config.k or 1, -1)
                acts = np.where(groups == groups.max(axis=2, keepdims=True), groups, 0).reshape(acts.shape)
        found[tag] = pre
        acts = acts * acting
        self.acts.setdefault(tag, acts)
        many = (acts if self.respond else self.acts[tag]).copy()
        for (kind, site, *where), factor in scales.items():
            if (kind, site) == ("feature", tag):
                many[tuple(where)] *= factor
        out = many @ w["W_dec"] + w["b_dec"] * scales.get(("bias", f"{tag} b_dec"), 1.0)
        if own.config.skip:
            out = out + x @ w["W_skip"]
        out = out * acting
        if tag not in self.errors:
            self.errors[tag] = value - out
        scale = np.array([scales.get(("error", tag, p), 1.0) for p in range(len(x))])
        return out + self.errors[tag] * scale[:, None]


def key_of(node: np.void) -> tuple[Any, ...]:
    """Return the key under which `ByHand.run` scales a source."""
    kind, site, position, feature = (node[name].item() for name in ("kind", "site", "position", "feature"))
    return {
        "token": ("token", position),
        "position": ("position", position),
        "bias": ("bias", site),
        "error": ("error", site, position),
        "feature": ("feature", site, position, feature),
    }[kind]


def tags_of(lm: TinyModel, saes: bool) -> dict[tuple[str, int], str]:
    tags = {("mlp", layer): f"M{layer}" for layer in range(lm.config.n_layers)}
    return tags | ({("attn", layer): f"A{layer}" for layer in (1,)} if saes else {})
