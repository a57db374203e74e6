"""The hook points: their names, widths and order, and the mechanism that reads and edits them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import F32, assert_close, error_of, forward, program_of

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.model.edits import Scale
from tinymodel_jax.model.hook_points import (
    HookPoint,
    apply_with_hooks,
    hook_names,
    hook_width,
    position_axes,
    require_hook_names,
)
from tinymodel_jax.model.transformer import Transformer, run_with_hooks
from tinymodel_jax.params import flatten


class Doubler(nn.Module):
    """Two hook points, the second of which sees twice the first."""

    @nn.compact
    def __call__(self, x):
        x = HookPoint(name="before")(x)
        return HookPoint(name="after")(2 * x)


IDS = jnp.zeros((1, 3), jnp.int32)


def run(hooks, keep=()):
    return apply_with_hooks(Doubler(), {}, jnp.arange(3.0), tok_ids=IDS, hooks=hooks, keep=keep)


def test_names_are_those_that_the_forward_pass_meets_in_its_order(config, params, tok_ids):
    met = []
    hooks = {name: lambda value, acts, name=name: met.append(name) or value for name in hook_names(config)}
    run_with_hooks(params, config, jnp.asarray(tok_ids), hooks)
    assert tuple(met) == hook_names(config)


def test_names_are_those_of_transformer_lens():
    assert hook_names(ModelConfig(n_layers=12))[-15:] == tuple(
        f"blocks.11.{name}"
        for name in [
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
        ]
    )
    assert hook_names(ModelConfig())[:2] == ("hook_embed", "hook_pos_embed")


def test_widths_and_position_axes_are_those_of_the_values(config, params, tok_ids):
    _, values = forward(flatten(params), config, tok_ids)
    for name, value in values.items():
        assert all(value.shape[axis] == tok_ids.shape[1] for axis in position_axes(name)), name
        assert hook_width(name, config) == (None if len(position_axes(name)) == 2 else value.shape[-1]), name


def test_a_kept_value_is_the_one_after_its_edit():
    out, acts = run({"before": lambda value, acts: value + 1}, keep=("after", "before"))
    np.testing.assert_array_equal(acts["before"], [1, 2, 3])
    np.testing.assert_array_equal(acts["after"], [2, 4, 6])
    np.testing.assert_array_equal(out, [2, 4, 6])
    assert list(acts) == ["after", "before"]


def test_an_edit_sees_the_edited_values_before_it_and_none_after_it():
    seen = {}

    def look(value, acts):
        seen.update(acts)
        return value

    run({"before": lambda value, acts: value * 10, "after": look})
    assert list(seen) == ["tok_ids", "before"]
    np.testing.assert_array_equal(seen["before"], [0, 10, 20])


def test_without_hooks_nothing_comes_back_but_the_output():
    out, acts = run({})
    np.testing.assert_array_equal(out, [0, 2, 4])
    assert acts == {}


def test_the_interceptor_ends_with_the_call_even_when_an_edit_fails():
    with pytest.raises(ZeroDivisionError):
        run({"before": lambda value, acts: value / (1 // 0)})
    np.testing.assert_array_equal(Doubler().apply({}, jnp.arange(3.0)), [0, 2, 4])


def test_an_edit_keeps_the_number_format():
    x = jnp.arange(3, dtype=jnp.bfloat16)
    out, _ = apply_with_hooks(
        Doubler(), {}, x, tok_ids=IDS, hooks={"before": lambda value, acts: value.astype(jnp.float32) + 1}, keep=()
    )
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("edit", "returned"), [(lambda value, acts: value[:2], "shape (2,)"), (lambda value, acts: None, "a NoneType")]
)
def test_an_edit_that_changes_the_shape_is_an_error_that_names_the_place(edit, returned):
    message = error_of(lambda: run({"after": edit}))
    assert f"the hook at 'after' returned {returned}; the value there has shape (3,)" in message


@pytest.mark.usefixtures("no_type_checks")
def test_a_hook_that_cannot_be_called_is_an_error_that_names_the_place():
    assert "the hook at 'after' is a int; a hook is an edit of" in error_of(lambda: run({"after": 3}))


@pytest.mark.usefixtures("no_type_checks")
def test_the_names_are_those_of_a_configuration(config, lm):
    assert hook_names(lm.config) == hook_names(config)
    assert "hook_names takes a ModelConfig; got a TinyModel" in error_of(lambda: hook_names(lm))


def test_a_hook_point_that_the_method_does_not_pass_is_an_error(config, params):
    message = error_of(
        lambda: apply_with_hooks(
            Transformer(config),
            {"params": params},
            jnp.zeros((1, 1, 16)),
            tok_ids=IDS[:, :1],
            hooks={},
            keep=("hook_embed",),
            method="unembed",
        )
    )
    assert message == "hook points not reached by unembed: hook_embed."


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("blocks.0.hook_mlp_ot", "blocks.0.hook_mlp_out"),
        ("blocks.2.hook_mlp_out", "blocks.0.hook_mlp_out"),
        ("blocks.1.attn.hook_patern", "blocks.1.attn.hook_pattern"),
        ("hook_embedding", "hook_embed"),
    ],
)
def test_an_unknown_name_lists_the_closest(config, name, closest):
    message = error_of(lambda: require_hook_names(["hook_embed", name], config))
    assert repr(name) in message
    assert closest in message
    assert "'hook_embed'" not in message
    assert "2-layer model" in message
    assert "hook_names(config)" in message


def test_all_unknown_names_are_named_at_once(config, params, tok_ids):
    message = error_of(
        lambda: run_with_hooks(
            params, config, jnp.asarray(tok_ids), {"xyzzy": lambda value, acts: value}, ("hook_embd",)
        )
    )
    assert "'xyzzy'" in message
    assert "'hook_embd' (closest: hook_embed" in message


def test_edits_and_values_go_through_jit():
    @jax.jit
    def compiled(shift):
        return apply_with_hooks(
            Doubler(), {}, jnp.arange(3.0), tok_ids=IDS, hooks={"before": lambda v, a: v + shift}, keep=("after",)
        )

    out, acts = compiled(1.0)
    np.testing.assert_array_equal(out, [2, 4, 6])
    np.testing.assert_array_equal(acts["after"], out)


def test_hook_points_are_chosen_by_names_patterns_or_a_function(lm, tok_ids):
    per_block = [f"blocks.{layer}.hook_mlp_out" for layer in range(2)]
    _, every = lm.run_with_cache(tok_ids)
    for names, expected in (
        ("blocks.*.hook_mlp_out", per_block),
        (lambda name: name.endswith("mlp_out"), per_block),
        (["hook_embed", "*1.hook_mlp_out", per_block[1]], ["hook_embed", per_block[1]]),
        ("*", list(hook_names(lm.config))),
    ):
        kept = [
            lm.run_with_cache(tok_ids, names)[1],
            lm.run_with_hooks(tok_ids, {}, names)[1],
            run_with_hooks(lm.params, lm.config, jnp.asarray(tok_ids), keep=names)[1],
        ]
        for acts in kept:
            assert list(acts) == expected
            for name in expected:
                assert_close(acts[name], every[name], F32)


def test_without_logprobs_a_pass_computes_only_what_is_kept(lm, tok_ids):
    name = "blocks.0.hook_mlp_in"
    logprobs, acts = lm.run_with_cache(tok_ids, name, return_logprobs=False)
    assert logprobs is None
    assert_close(acts[name], lm.run_with_cache(tok_ids, name)[1][name], F32)
    for hooks in ({name: Scale(2.0)}, {name: lambda value, acts: value * 2}):
        logprobs, edited = lm.run_with_hooks(tok_ids, hooks, name, return_logprobs=False)
        assert logprobs is None
        assert_close(edited[name], np.asarray(acts[name]) * 2, F32)

    all_of_it, only_kept = (
        program_of(lambda ids, wanted=wanted: lm.run_with_cache(ids, name, wanted), tok_ids)[0]
        for wanted in (True, False)
    )
    assert only_kept < all_of_it / 3  # half a layer of two
