"""What does a feature do? Sweeps, importance, attribution, patching."""

PATCHED_HOOKS = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "attn.hook_z")
"""Hook points of a block that `patching.patch` patches by default; here, so that commands need not import JAX."""
