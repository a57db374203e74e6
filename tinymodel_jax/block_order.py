"""The hook points of a block, in the order of the forward pass, and how they relate to the residual stream.

Names only: `model/hook_points.py` has the module that marks them, and `dictionaries/sites.py` the tags of the places
where dictionaries are attached.
"""

from __future__ import annotations

BLOCK_HOOKS = (
    "hook_resid_pre",
    "hook_attn_in",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_in",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
"""Hook points of one block, in the order of the forward pass."""

STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
"""Those whose value is the residual stream: before a block's attention, before its MLP, and after the block."""
READERS = ("hook_attn_in", "hook_mlp_in")
"""Those whose value is a copy of the stream, for attention or the MLP to read."""
WRITERS = ("hook_attn_out", "hook_mlp_out")
"""Those whose value is added to the stream; the next point of the stream holds the sum."""


def block_and_hook(name: str) -> tuple[int, str]:
    """Split the name of a block's hook point: `blocks.2.attn.hook_z` is (2, "attn.hook_z")."""
    _, layer, hook = name.split(".", 2)
    return int(layer), hook


def forward_order(name: str) -> tuple[int, int]:
    """Return a sort key that puts hook points in the order of the forward pass."""
    if not name.startswith("blocks."):
        return -1, ("hook_embed", "hook_pos_embed").index(name)
    layer, hook = block_and_hook(name)
    return layer, BLOCK_HOOKS.index(hook)


def comes_after(name: str, other: str) -> bool:
    """Whether a hook point comes after another one in the forward pass."""
    return forward_order(name) > forward_order(other)


def stream_before(name: str) -> str:
    """Return the last hook point of the stream at or before a hook point; an embedding is returned unchanged."""
    if not name.startswith("blocks."):
        return name
    layer, hook = block_and_hook(name)
    met = BLOCK_HOOKS[: BLOCK_HOOKS.index(hook) + 1]
    return f"blocks.{layer}.{[point for point in met if point in STREAM][-1]}"


def final_stream(n_layers: int) -> str:
    """Return the hook point of the stream after the last block."""
    return f"blocks.{n_layers - 1}.hook_resid_post"


def resumes_at(point: str) -> tuple[int, bool]:
    """Return the block that runs after a hook point of `STREAM` or `WRITERS`, and whether only its MLP is left."""
    layer, hook = block_and_hook(point)
    met = BLOCK_HOOKS.index(hook)
    if met >= BLOCK_HOOKS.index("hook_mlp_out"):
        return layer + 1, False
    return layer, met >= BLOCK_HOOKS.index("hook_attn_out")
