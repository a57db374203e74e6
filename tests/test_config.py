"""Configurations: validation, JSON round trips, and the sizes that follow from them."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import as_users_run_it
from hypothesis import given
from hypothesis import strategies as st
from oracle import error_of

from tinymodel_jax.config import ARCHITECTURES, DictionaryConfig, ModelConfig
from tinymodel_jax.number_formats import DTYPES, dtype_name

sizes = st.integers(1, 64)


@st.composite
def model_configs(draw) -> ModelConfig:
    heads, head = draw(sizes), draw(sizes)
    dtypes = st.sampled_from(DTYPES)
    return ModelConfig(
        draw(sizes), heads * head, heads, draw(sizes), draw(sizes), draw(sizes) + 4, draw(dtypes), draw(dtypes)
    )


@st.composite
def dictionary_configs(draw) -> DictionaryConfig:
    architecture = draw(st.sampled_from(ARCHITECTURES))
    transcoder, width, features = draw(st.booleans()), draw(sizes), draw(sizes)
    drawn = {
        "k": {"topk": draw(st.integers(1, features)), "batch_topk": 1, "groupmax": features}.get(architecture),
        "skip": draw(st.booleans()),
        "normalize": draw(st.sampled_from(["none", "layer_norm", "constant_norm"])),
        "subtract_b_dec": draw(st.booleans()),
        "exclude": tuple(draw(st.sets(sizes, max_size=3))),
        "dtype": draw(st.sampled_from(DTYPES)),
    }
    hook_in = "blocks.0.hook_mlp_in" if transcoder else "blocks.0.hook_mlp_out"
    with as_users_run_it():  # the type checker looks at random items of a tuple, which hypothesis forbids here
        return DictionaryConfig(hook_in, "blocks.0.hook_mlp_out", width, width, features, architecture, **drawn)


@given(st.one_of(model_configs(), dictionary_configs()))
def test_a_config_survives_json(config):
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_the_defaults_are_the_published_model():
    config = ModelConfig()
    assert (config.n_layers, config.d_model, config.n_heads, config.d_head) == (4, 768, 16, 48)
    assert (config.begin_id, config.end_id, config.pad_id, config.unk_id) == (9996, 9997, 9998, 9999)
    assert config.is_text(np.arange(9994, 10_000)).tolist() == [True, True, False, False, False, True]
    # By hand: embeddings and positions 7,876,608; four blocks of 7,081,728; unembedding 7,690,000.
    assert config.n_params == 7_680_000 + 196_608 + 4 * (4 * 589_824 + 768 + 2 * 2_359_296 + 3072 + 768) + 7_690_000


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().n_layers = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, ml_dtypes.bfloat16, "bfloat16", np.dtype(ml_dtypes.bfloat16)])
def test_a_number_format_may_be_given_as_a_name_or_as_a_dtype(dtype):
    assert ModelConfig(dtype=dtype) == ModelConfig(dtype="bfloat16")


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("dtype", ["int32", "float8_e4m3fn", np.complex64, None, "nonsense", 5])
def test_other_number_formats_are_refused_with_the_supported_ones(dtype):
    assert "choose one of float32, bfloat16, float16, float64" in error_of(lambda: dtype_name(dtype))


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("field", ["n_layers", "d_model", "n_heads", "d_mlp", "n_ctx", "d_vocab"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "4", True, None])
def test_sizes_are_whole_numbers_above_zero(field, value):
    message = error_of(lambda: ModelConfig(**{field: value}))
    assert f"{field}={value!r} must be a whole number" in message


def test_heads_that_do_not_divide_the_width_list_those_that_do():
    assert "n_heads=5 does not divide d_model=12; choose one of [1, 2, 3, 4, 6, 12]" in error_of(
        lambda: ModelConfig(d_model=12, n_heads=5)
    )


def test_unknown_and_missing_fields_are_all_named_with_a_near_miss():
    message = error_of(lambda: DictionaryConfig.from_dict({"hook_in": "a", "hook_out": "a", "n_feature": 3, "zzz": 1}))
    assert "unknown field 'n_feature' (did you mean 'n_features'?)" in message
    assert "unknown field 'zzz';" in message
    assert all(f"missing field '{name}'" in message for name in ("d_in", "d_out", "n_features"))


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "vanilla"}, "architecture 'vanilla' is unknown; choose one of relu, topk"),
        ({"architecture": "topk"}, "'topk' needs k, 1 to n_features=8"),
        ({"architecture": "topk", "k": 9}, "k=9 is outside 1..n_features=8"),
        ({"architecture": "batch_topk", "k": 0}, "k=0 must be a whole number"),
        ({"architecture": "topk", "k": 2.5}, "k=2.5 must be a whole number"),
        ({"architecture": "topk", "k": "3"}, "k='3' must be a whole number"),
        ({"architecture": "relu", "k": 3}, "'relu' takes no k, got k=3"),
        ({"d_out": 5}, "d_in=4 and d_out=5 must be equal"),
        (
            {"normalize": "batch_norm"},
            "normalize 'batch_norm' is unknown; choose one of none, layer_norm, constant_norm",
        ),
        ({"architecture": "groupmax", "k": 3}, "n_features=8 do not divide into k=3 groups"),
        ({"hook_out": "blocks.0.hook_mlp_out", "d_out": 5, "subtract_b_dec": True}, "needs d_in == d_out, got 4 and 5"),
        ({"n_features": 0}, "n_features=0 must be"),
    ],
)
def test_a_dictionary_that_makes_no_sense_is_refused(options, says):
    fields = {"hook_in": "blocks.0.hook_mlp_in", "hook_out": "blocks.0.hook_mlp_in", "d_in": 4, "d_out": 4}
    assert says in error_of(lambda: DictionaryConfig(**{**fields, "n_features": 8, **options}))
