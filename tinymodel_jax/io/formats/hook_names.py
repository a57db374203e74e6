"""What other libraries call the hook points of a block: names of TransformerLens, of its bridge, and of modules."""

from __future__ import annotations

import re

from tinymodel_jax.block_order import BLOCK_HOOKS
from tinymodel_jax.io.formats.stored import Hooks

_SAME = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "attn.hook_in": "hook_attn_in",
    "attn.hook_out": "hook_attn_out",
    "ln1.hook_normalized": "hook_attn_in",
    "mlp.hook_in": "hook_mlp_in",
    "mlp.hook_out": "hook_mlp_out",
    "ln2.hook_normalized": "hook_mlp_in",
}
"""Hook points whose values are the same here; there is no layer norm."""
_BRANCHES = {("hook_resid_mid", "hook_mlp_out"): "hook_mlp_in", ("hook_resid_pre", "hook_attn_out"): "hook_attn_in"}
"""What a transcoder reads, if it is said to read the stream before a branch that it predicts."""
_BLOCK = re.compile(r"blocks\.(\d{1,4})\.(.+)")
_MODULE = re.compile(r"(?:.*\.)?(?:layers|h|blocks|torso)\.(\d{1,4})(?:\.(attn|self_attn|attention|mlp))?")
_WORDS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "attention": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "mlp": "hook_mlp_out",
}
_IN_WORDS = re.compile(rf"({'|'.join(_WORDS)})(?:_layer)?_(\d{{1,4}})")


def of_transformer_lens(name: object) -> str | None:
    """Return the hook point with a name of TransformerLens; None if there is none."""
    match = _BLOCK.fullmatch(name) if isinstance(name, str) else None
    hook = None if match is None else _SAME.get(match[2], match[2])
    return None if match is None or hook not in BLOCK_HOOKS else f"blocks.{int(match[1])}.{hook}"


def between(name_in: object, name_out: object) -> Hooks | None:
    """Return the hook points of a dictionary by names of TransformerLens; None if one of them does not exist here."""
    hook_in, hook_out = of_transformer_lens(name_in), of_transformer_lens(name_out)
    if hook_in is None or hook_out is None:
        return None
    block, _, hook = hook_in.partition(".hook_")
    branch = _BRANCHES.get((f"hook_{hook}", hook_out.removeprefix(f"{block}.")))
    return (hook_in if branch is None else f"{block}.{branch}"), hook_out


def of_module(name: str, is_transcoder: bool) -> Hooks | None:
    """Return the hook points at the input and output of a module, such as `layers.3.mlp`; None if it is not known."""
    match = _MODULE.fullmatch(name)
    if match is None:
        return None
    part = {None: "resid", "mlp": "mlp"}.get(match[2], "attn")
    hook_in, hook_out = ("resid_pre", "resid_post") if part == "resid" else (f"{part}_in", f"{part}_out")
    block = f"blocks.{int(match[1])}.hook_"
    return (f"{block}{hook_in}" if is_transcoder else f"{block}{hook_out}"), f"{block}{hook_out}"


def of_words(text: object) -> Hooks | None:
    """Return the hook point of an SAE that is named in words, such as `resid_post_layer_3`; None if it is not known."""
    match = _IN_WORDS.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return None
    hook = f"blocks.{int(match[2])}.{_WORDS[match[1]]}"
    return hook, hook
