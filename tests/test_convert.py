"""The reference's checkpoints and ours: round trips, and errors that name the problem."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import DATA, N_HEADS
from hypothesis import given
from hypothesis import strategies as st
from oracle import error_of

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.io.convert import convert_dictionary, convert_model, export_model, model_tensors
from tinymodel_jax.io.torch_files import load_torch_file

DTYPES = [np.float32, np.float16, np.float64, ml_dtypes.bfloat16]


def reference_state(config: ModelConfig, dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random tensors under the reference's keys, in the shapes that its modules have."""
    rng = np.random.default_rng(seed)
    d, m = config.d_model, config.d_mlp
    shapes = {"pos_embed": (1, config.n_ctx, d), "embed.weight": (config.d_vocab, d)}
    for layer in range(config.n_layers):
        shapes |= {f"torso.{layer}.attn.{letter}.weight": (d, d) for letter in "QKVO"}
        shapes |= {
            f"torso.{layer}.attn.O.bias": (d,),
            f"torso.{layer}.mlp.read_in.weight": (m, d),
            f"torso.{layer}.mlp.read_in.bias": (m,),
            f"torso.{layer}.mlp.write_out.weight": (d, m),
            f"torso.{layer}.mlp.write_out.bias": (d,),
        }
    shapes |= {"lm_head.weight": (config.d_vocab, d), "lm_head.bias": (config.d_vocab,)}
    return {key: rng.normal(size=shape).astype(dtype) for key, shape in shapes.items()}


def dictionary_state(features=5, d_in=4, d_out=4, prefix="") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {
        "encoder.weight": (features, d_in),
        "encoder.bias": (features,),
        "decoder.weight": (d_out, features),
        "decoder.bias": (d_out,),
    }
    return {prefix + key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


@st.composite
def exportable_configs(draw) -> ModelConfig:
    heads, head, layers = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return ModelConfig(layers, heads * head, heads, 4 * heads * head, draw(st.integers(1, 9)), draw(st.integers(5, 9)))


TINY = ModelConfig(n_layers=2, d_model=4, n_heads=2, d_mlp=16, n_ctx=6, d_vocab=7)


@given(exportable_configs(), st.sampled_from(DTYPES))
def test_there_and_back_is_the_same_file(config, dtype):
    state = reference_state(config, dtype)
    converted = convert_model(state, config.n_heads)
    assert converted.config == config
    assert converted.dictionaries == {}
    back = export_model(converted.config, converted.params)
    assert list(back) == list(state)
    for key, tensor in state.items():
        assert (back[key].dtype, back[key].shape) == (tensor.dtype, tensor.shape)
        assert back[key].tobytes() == tensor.tobytes()
        assert back[key].flags.c_contiguous


def test_each_parameter_is_the_reference_s_slice_transposed():
    """By the formulas: heads are rows of Q, K and V, and columns of O; y = x @ weight.T."""
    state, d_head = reference_state(TINY), 2
    params = convert_model(state, 2).params
    for layer in range(2):
        theirs, ours = f"torso.{layer}", f"blocks.{layer}"
        for head in range(2):
            rows = slice(head * d_head, (head + 1) * d_head)
            for letter in "QKV":
                weight = state[f"{theirs}.attn.{letter}.weight"]
                np.testing.assert_array_equal(params[f"{ours}.attn.W_{letter}"][head], weight[rows].T)
            np.testing.assert_array_equal(params[f"{ours}.attn.W_O"][head], state[f"{theirs}.attn.O.weight"][:, rows].T)
        np.testing.assert_array_equal(params[f"{ours}.mlp.W_in"], state[f"{theirs}.mlp.read_in.weight"].T)
        np.testing.assert_array_equal(params[f"{ours}.mlp.W_out"], state[f"{theirs}.mlp.write_out.weight"].T)
        np.testing.assert_array_equal(params[f"{ours}.mlp.b_in"], state[f"{theirs}.mlp.read_in.bias"])
    np.testing.assert_array_equal(params["W_U"], state["lm_head.weight"].T)
    np.testing.assert_array_equal(params["W_pos"], state["pos_embed"][0])


def test_exporting_the_reference_s_own_file_gives_its_keys_in_its_order():
    state = load_torch_file(DATA / "lm_f32_zip.pt")
    back = export_model(*convert_model(state, N_HEADS)[:2])
    assert list(back) == list(state)
    assert all(np.array_equal(back[key], state[key]) for key in state)


def test_conversion_copies_nothing():
    state = reference_state(TINY)
    params = convert_model(state, 2).params
    assert all(any(np.shares_memory(array, tensor) for tensor in state.values()) for array in params.values())


def test_names_and_shapes_are_those_of_the_parameter_tree(config, params):
    from tinymodel_jax.params import flatten

    assert {t.name: t.shape for t in model_tensors(config)} == {n: a.shape for n, a in flatten(params).items()}


def test_the_published_width_has_sixteen_heads():
    config = ModelConfig(n_layers=1, d_model=768, n_heads=16, d_mlp=8, n_ctx=2, d_vocab=5)
    assert convert_model(reference_state(config, np.float16)).config.n_heads == 16


@pytest.mark.parametrize(
    ("module", "tag"),
    [
        ("attn_sae", "A1"),
        ("transcoder", "M1"),
        ("mlp_sae", "Mo1"),
        ("res_pre_attn_sae", "Ra1"),
        ("res_pre_mlp_sae", "Rm1"),
    ],
)
def test_a_registered_dictionary_comes_out_under_its_tag(module, tag):
    state = reference_state(TINY) | dictionary_state(prefix=f"torso.1.{module}.")
    found = convert_model(state, 2).dictionaries
    assert list(found) == [tag]
    config, params = found[tag].config, found[tag].params
    site = Site.parse(tag)[0]
    assert (config.hook_in, config.hook_out) == (site.hook_in, site.hook_out)
    assert (config.d_in, config.d_out, config.n_features) == (4, 4, 5)
    np.testing.assert_array_equal(params["W_enc"], state[f"torso.1.{module}.encoder.weight"].T)
    np.testing.assert_array_equal(params["W_dec"], state[f"torso.1.{module}.decoder.weight"].T)


def test_a_dictionary_file_s_sizes_come_from_its_shapes():
    converted = convert_dictionary(dictionary_state(5, 3, 4), Site("M", 0))
    config, params = converted.config, converted.params
    assert (config.d_in, config.d_out, config.n_features, config.architecture) == (3, 4, 5, "relu")
    assert {name: array.shape for name, array in params.items()} == {
        "W_enc": (3, 5), "b_enc": (5,), "W_dec": (5, 4), "b_dec": (4,)
    }  # fmt: skip


def test_missing_unexpected_and_wrong_tensors_are_all_named():
    state = reference_state(TINY)
    del state["torso.1.attn.O.bias"]
    state["torso.0.attn.Q.bias"] = np.zeros(4, np.float32)
    state["lm_head.weight"] = state["lm_head.weight"].T
    state["embed.weight"] = state["embed.weight"].astype(np.int64)
    state["torso.0.mlp.read_in.bias"] = 3  # pyright: ignore[reportArgumentType]
    message = error_of(lambda: convert_model(state, 2))
    for part in (
        "missing torso.1.attn.O.bias (4,)",
        "unexpected 'torso.0.attn.Q.bias'",
        "lm_head.weight has shape (4, 7), expected (7, 4)",
        "embed.weight holds int64, expected one of float32",
        "torso.0.mlp.read_in.bias is a int, not a tensor",
    ):
        assert part in message


@given(st.data())
def test_any_one_missing_or_misshapen_tensor_is_named(data):
    state = reference_state(TINY)
    key = data.draw(st.sampled_from(sorted(state)))
    if data.draw(st.booleans()):
        del state[key]
    else:
        state[key] = state[key][..., None]
    assert key.split(".weight")[0] in error_of(lambda: convert_model(state, 2))


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({}, "got nothing"),
        (dictionary_state(), "got encoder.weight, encoder.bias, decoder.weight, decoder.bias"),
        ({str(i): i for i in range(20)}, "(20 in all)"),
        ({3: 4}, "not a TinyModel language model: expected the tensors pos_embed"),
    ],
)
def test_what_is_no_language_model_is_listed(state, says):
    assert says in error_of(lambda: convert_model(state, 2))


def test_heads_are_asked_for_where_no_shape_tells_them():
    assert "n_heads is needed" in error_of(lambda: convert_model(reference_state(TINY)))
    assert "n_heads=3 does not divide d_model=4" in error_of(lambda: convert_model(reference_state(TINY), 3))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("decoder.weight"), "not a dictionary"),
        (lambda s: s.pop("encoder.bias"), "missing encoder.bias (5,)"),
        (lambda s: s.update(scale=s["encoder.bias"]), "unexpected 'scale'"),
        (lambda s: s.update({"decoder.bias": s["encoder.bias"]}), "decoder.bias has shape (5,), expected (4,)"),
        (lambda s: s.update({"decoder.weight": s["decoder.weight"].T}), "expected (5, 5)"),
    ],
)
def test_a_wrong_dictionary_is_described(change, says):
    state = dictionary_state()
    change(state)
    assert says in error_of(lambda: convert_dictionary(state, Site("A", 0)))


def test_a_registered_dictionary_beyond_the_model_is_an_error():
    state = reference_state(TINY) | dictionary_state(prefix="torso.7.mlp_sae.")
    assert "layer 7 of a model with 2 layers" in error_of(lambda: convert_model(state, 2))


def test_a_model_that_the_reference_cannot_hold_is_not_exported():
    config = ModelConfig(**{**TINY.to_dict(), "d_mlp": 12})
    params = convert_model(reference_state(config), 2).params
    assert "d_mlp=12 is not 4 * d_model = 16" in error_of(lambda: export_model(config, params))
