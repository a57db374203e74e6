"""The hook points of the forward pass, and the one mechanism that reads and edits their values.

A `HookPoint` is an identity module with no parameters. `apply_with_hooks` runs a Linen module while intercepting its
hook points: it returns the requested values and applies the edits. It knows only names and shapes; `interventions.py`
builds the usual edits.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinymodel_jax.block_order import BLOCK_HOOKS, comes_after
from tinymodel_jax.config import DictionaryConfig, ModelConfig, split_hooks

Hook = Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array]
"""An edit: `(value, acts) -> new value` of the same shape.

`acts` has the values of earlier hook points by name, and the tokens, (batch, seq), as `"tok_ids"`."""
Hooks = dict[str, Hook]
"""Hook name -> edit."""
Names = str | Iterable[str] | Callable[[str], Any]
"""Hook points: a name or pattern, several, or a function of the name that returns whether it is meant."""


class HookPoint(nn.Module):
    """Identity that gives a value of the forward pass a name.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from tinymodel_jax import HookPoint
        >>> class Doubled(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return HookPoint(name="hook_doubled")(2 * x)
        ...
        >>> Doubled().apply({}, jnp.float32(3)).item()
        6.0
    """

    @nn.nowrap
    def hook_name(self) -> str:
        """Return the point's name, such as `blocks.2.attn.hook_z`."""
        return ".".join(self.path).replace("blocks_", "blocks.", 1)

    def __call__(self, value: jax.Array) -> jax.Array:
        return value

    def is_used(self) -> bool:
        """Whether somebody may read or edit the value in this call; if not, it need not be computed."""
        return False


def hook_names(config: ModelConfig) -> tuple[str, ...]:
    """Return every hook point of a model, in the order of the forward pass (TransformerLens names).

    Raises:
        ValueError: `config` is not a `ModelConfig`.

    Examples:
        >>> from tinymodel_jax import ModelConfig, hook_names
        >>> names = hook_names(ModelConfig())
        >>> len(names), names[0], names[-1]
        (62, 'hook_embed', 'blocks.3.hook_resid_post')
    """
    ModelConfig.require(config, "hook_names")
    return _names(config.n_layers)


@functools.cache
def _names(n_layers: int) -> tuple[str, ...]:
    blocks = (f"blocks.{layer}.{name}" for layer in range(n_layers) for name in BLOCK_HOOKS)
    return ("hook_embed", "hook_pos_embed", *blocks)


def hooks_after(hooks: Mapping[str, Hook], name: str) -> Hooks:
    """Return the hooks at the hook points after the named one."""
    return {hook: edit for hook, edit in hooks.items() if comes_after(hook, name)}


def hook_width(name: str, config: ModelConfig) -> int | None:
    """Return the size of a hook point's last axis; None for scores and pattern, whose last axis is a position."""
    if name.endswith(("hook_attn_scores", "hook_pattern")):
        return None
    if has_heads(name):
        return config.d_head
    return config.d_mlp if ".mlp.hook_" in name else config.d_model


def has_heads(name: str) -> bool:
    """Whether a hook point's value has one vector per position and head: (batch, seq, n_heads, d_head)."""
    return name.endswith(("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z"))


def vector_width(name: str, config: ModelConfig) -> int | None:
    """Return the width of a hook point's `vectors`, or of several joined by "+"; None for scores and pattern."""
    if len(parts := split_hooks(name)) > 1:
        widths = [vector_width(part, config) for part in parts]
        return None if None in widths else sum(widths)  # type: ignore[arg-type]
    return config.n_heads * config.d_head if has_heads(name) else hook_width(name, config)


def require_widths(dictionary: DictionaryConfig, config: ModelConfig, asker: str) -> None:
    """Check that a dictionary is as wide as the hook points that it reads and predicts.

    Args:
        asker: start of the error message.

    Raises:
        ValueError: it is not, or joined hook points have different widths.
    """
    for name, hooks, width in (
        ("d_in", dictionary.hooks_in, dictionary.d_in),
        ("d_out", dictionary.hooks_out, dictionary.d_out),
    ):
        for hook in hooks:
            if vector_width(hook, config) != width // len(hooks):
                joined = f", {width // len(hooks)} for each of {len(hooks)} hook points" if len(hooks) > 1 else ""
                raise ValueError(
                    f"{asker}: the dictionary has {name}={width}{joined}, but {hook} is {vector_width(hook, config)} "
                    "wide in this model."
                )


def vectors(value: jax.Array) -> jax.Array:
    """Return a value as one vector per position, (batch, seq, width); the heads of q, k, v and z are concatenated."""
    return value.reshape(*value.shape[:2], -1)


def vectors_at(acts: Mapping[str, jax.Array], name: str) -> jax.Array:
    """Return the `vectors` at a hook point, or at several joined by "+", concatenated."""
    parts = [vectors(acts[part]) for part in split_hooks(name)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def value_shape(name: str, config: ModelConfig, batch: int, length: int) -> tuple[int, ...]:
    """Return the shape of a hook point's value."""
    width = hook_width(name, config)
    if width is None:
        return batch, config.n_heads, length, length
    return (batch, length, config.n_heads, width) if has_heads(name) else (batch, length, width)


def is_scores(name: str) -> bool:
    """Whether a hook point's values are attention scores."""
    return name.endswith("hook_attn_scores")


def masked_score(dtype: Any) -> float:
    """Return the score of a key that the query does not see: -1e9, or the lowest number of a smaller format.

    It is finite because 0 times infinity is NaN, also in gradients.
    """
    return max(-1e9, float(jnp.finfo(dtype).min))


def position_axes(name: str) -> tuple[int, ...]:
    """Return the axes of a hook point's value that run over positions."""
    return (2, 3) if name.endswith(("hook_attn_scores", "hook_pattern")) else (1,)


def as_names(names: str | Iterable[str]) -> tuple[str, ...]:
    """Return names as a tuple; a string is one name.

    Raises:
        ValueError: they are not names.
    """
    if not isinstance(names, Iterable):
        raise ValueError(
            f"names: got a {type(names).__name__}; expected a name or several. For hook points, a pattern such as "
            "'*hook_resid_*' or a function of the name also works."
        )
    return (names,) if isinstance(names, str) else tuple(names)


def chosen_names(names: Names, config: ModelConfig, hooks: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the hook points that are chosen by names, patterns or a function; each once.

    Args:
        names: a name or several. A name may be a pattern of `fnmatch`: `*` matches any characters, `?` one, `[01]` one
            of those, so "blocks.*.hook_mlp_out" chooses one hook point per block. Or a function of the name that
            returns whether the hook point is chosen.
        hooks: names of hooks, which are checked with them.

    Raises:
        ValueError: names do not exist (all are listed), or nothing is chosen by a pattern or the function.
    """
    valid = hook_names(config)
    if callable(names):
        chosen = [name for name in valid if names(name)]
        if not chosen:
            raise ValueError(f"the function given for names chooses none of the {len(valid)} hook points.")
    else:
        given = (_matches(one, valid) or [one] for one in as_names(names))
        chosen = dict.fromkeys(name for group in given for name in group)
    require_hook_names((*hooks, *chosen), config)
    return tuple(chosen)


def _matches(pattern: Any, names: Iterable[str]) -> list[str]:
    return [name for name in names if isinstance(pattern, str) and fnmatch.fnmatchcase(name, pattern)]


def require_hook_names(names: Iterable[str], config: ModelConfig) -> None:
    """Raise an error that lists names without a hook point in the model, and the closest valid names.

    Raises:
        ValueError: at least one name does not exist.
    """
    valid = hook_names(config)
    problems = []
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.5)
            problems.append(f"{name!r}" + (f" (closest: {', '.join(close)})" if close else ""))
    if problems:
        raise ValueError(
            f"unknown hook points in a {config.n_layers}-layer model: {'; '.join(problems)}. "
            "All names: tinymodel_jax.hook_names(config)."
        )


def require_edits(hooks: Mapping[str, Any]) -> None:
    """Require a mapping from hook names to edits.

    Raises:
        ValueError: `hooks` is not a mapping, or a hook is neither an edit nor a function.
    """
    if not isinstance(hooks, Mapping):
        raise ValueError(
            f"hooks is a {type(hooks).__name__}; expected a mapping from hook names to edits, such as "
            "{'blocks.1.hook_mlp_out': edit}. For a list of pairs: dict(hooks)."
        )
    for name, hook in hooks.items():
        if not callable(hook):
            raise ValueError(
                f"the hook at {name!r} is a {type(hook).__name__}; a hook is an edit of tinymodel_jax.interventions, "
                "such as Replace(value), or a function (value, acts) -> value."
            )


def apply_with_hooks(
    model: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    tok_ids: jax.Array,
    hooks: Mapping[str, Hook],
    keep: Iterable[str] = (),
    method: str | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """Run `model.apply` with hooks; return its output and the values of the hook points in `keep`.

    Kept values are those after the edit. Edits of crosscoders, which read hook points that come later than those they
    write, have an attribute `reads_ahead`. With them, a first pass runs without them; they find its values in `acts`
    under the names `in_first_pass(name)`. Hooks act only during this call and cannot reach a function that was compiled
    before it, so compile the function that calls this one.

    Args:
        tok_ids: (batch, seq) tokens at the positions that this call computes, for the hooks.

    Raises:
        ValueError: a hook is not an edit, an edit raised a ValueError (the new message names the hook) or changed the
            shape, or `method` does not reach a hook point in `keep`.
    """
    require_edits(hooks)
    seen: dict[str, jax.Array] = {"tok_ids": tok_ids}
    if ahead := read_ahead(hooks):
        if method is not None:
            raise ValueError(
                f"{min(ahead)}: splices and edits of a crosscoder read a first pass over whole rows, "
                "which generation and passes that resume at a later layer do not have."
            )
        earlier = {name: kept for name, hook in hooks.items() if (kept := _before_reading_ahead(hook)) is not None}
        _, first = apply_with_hooks(model, variables, *args, tok_ids=tok_ids, hooks=earlier, keep=sorted(ahead))
        seen |= {in_first_pass(name): value for name, value in first.items()}
    used = {*hooks, *keep}
    edits = [edit for hook in hooks.values() for edit in getattr(hook, "edits", (hook,))]
    may_read_all = not all(hasattr(edit, "padded") for edit in edits)  # functions, which are not edits of ours

    def tap(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        value = call(*args, **kwargs)
        if not isinstance(context.module, HookPoint):
            return value
        name = context.module.hook_name()
        if context.method_name == "is_used":
            return may_read_all or name in used
        if context.method_name == "__call__":
            if name in hooks:
                value = _edited(name, value, hooks[name], seen)
            seen[name] = value
        return value

    with nn.intercept_methods(tap):
        output = model.apply(variables, *args, method=method)
    unmet = [name for name in (*hooks, *keep) if name not in seen]
    if unmet:
        raise ValueError(f"hook points not reached by {method or '__call__'}: {', '.join(unmet)}.")
    return output, {name: seen[name] for name in keep}


def read_ahead(hooks: Mapping[str, Hook]) -> set[str]:
    """Return the hook points whose values of a first pass the hooks read; none without edits of crosscoders."""
    return {name for hook in hooks.values() for name in getattr(hook, "reads_ahead", ())}


def in_first_pass(name: str) -> str:
    """Return the name under which an edit that reads ahead finds a hook point's value of the first pass."""
    return f"first_pass.{name}"


def _before_reading_ahead(hook: Hook) -> Hook | None:
    """Return the part of a hook that acts in the first pass."""
    return getattr(hook, "before_reading_ahead", None) if getattr(hook, "reads_ahead", ()) else hook


@contextlib.contextmanager
def naming_the_hook(name: str) -> Iterator[None]:
    """Put the name of a hook point in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"the hook at {name!r}: {error}") from error


def _edited(name: str, value: jax.Array, hook: Hook, seen: Mapping[str, jax.Array]) -> jax.Array:
    with naming_the_hook(name):
        edited = hook(value, seen)
    shape = getattr(edited, "shape", None)
    if shape != value.shape:
        returned = f"a {type(edited).__name__}" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(
            f"the hook at {name!r} returned {returned}; the value there has shape "
            f"{tuple(value.shape)}, and an edit must keep it."
        )
    edited = edited.astype(value.dtype)
    return jnp.maximum(edited, masked_score(edited.dtype)) if is_scores(name) else edited
