"""Where a change at a hook point enters the residual stream, and which hook points the forward pass meets later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.model.hook_points import Hook, Hooks, hook_names

_STREAM_AT = {
    "hook_resid_pre": ("hook_resid_pre",),
    "hook_attn_out": ("hook_resid_pre", "hook_attn_out"),
    "hook_resid_mid": ("hook_resid_mid",),
    "hook_mlp_out": ("hook_resid_post",),
}
"""Hook points of a block where changes may be made, and those whose values add up to the stream that they change."""


class Entry(NamedTuple):
    """Where changes at a hook point enter the residual stream."""

    edited: str
    """Hook point of the changes."""
    terms: tuple[str, ...]
    """Hook points whose values add up to the stream at the entry."""
    layer: int
    """Block in front of which, or of whose MLP, that is."""
    at_mlp: bool
    joined: str
    """First hook point of the whole stream in front of a block's attention: from there on positions act together."""

    @property
    def first_block(self) -> int:
        """The first block whose attention the changes reach."""
        return self.layer + self.at_mlp

    def linear_hooks(self, config: ModelConfig) -> tuple[str, ...]:
        """Return the first hook points that a change reaches through weights; their values are linear in it."""
        return (f"blocks.{self.layer}.mlp.hook_pre",) if self.at_mlp else self.attention_hooks(config)

    def attention_hooks(self, config: ModelConfig) -> tuple[str, ...]:
        """Return the queries, keys and values of the first block; () where no block is left."""
        left = self.first_block < config.n_layers
        return tuple(f"blocks.{self.first_block}.attn.hook_{kind}" for kind in "qkv") if left else ()


def entry_of(hook_name: str) -> Entry:
    """Return where changes at a site's hook point, such as `blocks.1.hook_mlp_out`, enter the stream."""
    block, name = hook_name.rsplit(".", 1)
    layer = int(block.split(".")[1])
    at_mlp = name in ("hook_attn_out", "hook_resid_mid")
    joined = name if name == "hook_resid_pre" else "hook_resid_post"
    terms = tuple(f"{block}.{term}" for term in _STREAM_AT[name])
    return Entry(hook_name, terms, layer + (name == "hook_mlp_out"), at_mlp, f"{block}.{joined}")


def hooks_after(hooks: Mapping[str, Hook], name: str, config: ModelConfig) -> Hooks:
    """Return the hooks at later points than one."""
    return {hook: edit for hook, edit in hooks.items() if comes_after(hook, name, config)}


def comes_after(name: str, other: str, config: ModelConfig) -> bool:
    """Return whether the forward pass meets a hook point after another."""
    names = hook_names(config)
    return names.index(name) > names.index(other)
