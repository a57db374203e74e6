"""Where changes at a site enter the residual stream, and which hook points they reach first."""

from __future__ import annotations

from typing import NamedTuple

from tinymodel_jax.block_order import STREAM, WRITERS, block_and_hook, resumes_at, stream_before
from tinymodel_jax.config import ModelConfig


class Entry(NamedTuple):
    """Where changes at a hook point enter the residual stream."""

    edited: str
    """Hook point of the changes."""
    point: str
    """Hook point after which the layers above run; edits up to it have acted."""
    terms: tuple[str, ...]
    """Hook points whose values add up to the stream after that point."""
    joined: str
    """First hook point of the stream in front of a block's attention: from there on, positions act on each other."""

    @property
    def at_mlp(self) -> bool:
        """Whether the rest of a block, its MLP, comes before `joined`."""
        return resumes_at(self.point)[1]

    @property
    def first_block(self) -> int:
        """The first block whose attention the changes reach."""
        return resumes_at(self.joined)[0]

    def linear_hooks(self, config: ModelConfig) -> tuple[str, ...]:
        """Return the first hook points that a change reaches through weights; their values are linear in it."""
        return (f"blocks.{resumes_at(self.point)[0]}.mlp.hook_pre",) if self.at_mlp else self.attention_hooks(config)

    def attention_hooks(self, config: ModelConfig) -> tuple[str, ...]:
        """Return the queries, keys and values of the first block; () where no block is left."""
        left = self.first_block < config.n_layers
        return tuple(f"blocks.{self.first_block}.attn.hook_{kind}" for kind in "qkv") if left else ()


def has_entry(hook_name: str) -> bool:
    """Whether the value at a hook point is the stream or is added to it, so that `entry_of` knows where it enters."""
    return block_and_hook(hook_name)[1] in STREAM + WRITERS


def entry_of(hook_name: str) -> Entry:
    """Return where changes at a site's hook point, such as `blocks.1.hook_mlp_out`, enter the stream.

    Raises:
        ValueError: the value there is neither the stream nor added to it.
    """
    layer, hook = block_and_hook(hook_name)
    if not has_entry(hook_name):
        raise ValueError(
            f"{hook_name} is neither the residual stream nor added to it, so a change there enters through weights; "
            f"sweeps take dictionaries at {', '.join(STREAM + WRITERS)}. Edit one feature at a time instead: "
            "lm.run_with_hooks(tok_ids, interventions.ablate(dictionary, feature))."
        )
    after_block = f"blocks.{layer}.hook_resid_post"
    if hook == "hook_mlp_out":
        return Entry(hook_name, after_block, (after_block,), after_block)
    stream = stream_before(hook_name)
    terms = (stream,) if stream == hook_name else (stream, hook_name)
    return Entry(hook_name, hook_name, terms, hook_name if hook == "hook_resid_pre" else after_block)
