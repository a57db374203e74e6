"""Models in TransformerLens's form: the round trip, and what is refused. tests/interop/ runs the real library."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import error_line, param_shapes, random_params
from oracle import error_of

from convert_torch_weights import main as convert
from tinymodel_jax import ModelConfig, TinyModel
from tinymodel_jax.params import flatten

WIDE = ModelConfig(n_layers=2, d_model=16, n_heads=2, d_mlp=40, n_ctx=16, d_vocab=23)
WRITTEN_BY_IT = {
    "act_fn": "relu", "attention_dir": "causal", "attn_scale": np.float64(8**0.5), "attn_scores_soft_cap": -1.0,
    "checkpoint_value": None, "d_head": 8, "d_mlp": 40, "d_model": 16, "d_vocab": 23, "d_vocab_out": 23,
    "default_prepend_bos": True, "device": "cpu", "dtype": "torch.float32", "eps": 1e-05, "final_rms": False,
    "gated_mlp": False, "init_mode": "gpt2", "initializer_range": 0.2, "n_ctx": 16, "n_devices": 1, "n_heads": 2,
    "n_key_value_heads": None, "n_layers": 2, "normalization_type": None, "NTK_by_parts_factor": 8.0,
    "positional_embedding_type": "standard", "rotary_base": 10000, "tokenizer_prepends_bos": True,
    "use_attn_scale": True, "use_hook_mlp_in": True, "use_local_attn": False, "window_size": None, "yarn_factor": 1.0,
}  # fmt: skip
"""Fields as `HookedTransformerConfig.to_dict` gives them, after JSON; other fields that are off are left out."""


@pytest.fixture(scope="module")
def wide() -> TinyModel:
    return TinyModel.from_params(WIDE, random_params(param_shapes(WIDE), 0))


def test_there_and_back_is_the_same_model(wide: TinyModel) -> None:
    config, state = wide.to_hooked_transformer_state_dict()
    json.dumps(config)
    for fields in (config, WRITTEN_BY_IT):
        back = TinyModel.from_transformer_lens(fields, state)
        assert back.config == wide.config
        expected = flatten(wide.params)
        assert set(flatten(back.params)) == set(expected)
        for name, array in flatten(back.params).items():
            np.testing.assert_array_equal(array, expected[name])


def test_the_state_has_the_names_and_shapes_of_hooked_transformer(wide: TinyModel) -> None:
    _, state = wide.to_hooked_transformer_state_dict()
    blocks = {name.partition("1.")[2]: array.shape for name, array in state.items() if name.startswith("blocks.1.")}
    assert blocks == {
        **{f"attn.W_{letter}": (2, 16, 8) for letter in "QKV"},
        **{f"attn.b_{letter}": (2, 8) for letter in "QKV"},
        "attn.W_O": (2, 8, 16), "attn.b_O": (16,),
        "mlp.W_in": (16, 40), "mlp.b_in": (40,), "mlp.W_out": (40, 16), "mlp.b_out": (16,),
    }  # fmt: skip
    outside = {name for name in state if not name.startswith("blocks.")}
    assert outside == {"embed.W_E", "pos_embed.W_pos", "unembed.W_U", "unembed.b_U"}
    assert not any(state[f"blocks.{layer}.attn.b_{letter}"].any() for layer in (0, 1) for letter in "QKV")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalization_type", "LN"),
        ("act_fn", "gelu"),
        ("positional_embedding_type", "rotary"),
        ("attention_dir", "bidirectional"),
        ("use_attn_scale", False),
        ("attn_scale", 1.0),
        ("d_head", 4),
        ("d_vocab_out", 7),
        ("attn_only", True),
        ("gated_mlp", True),
        ("parallel_attn_mlp", True),
        ("use_local_attn", True),
        ("use_qk_norm", True),
        ("n_key_value_heads", 1),
        ("num_experts", 8),
        ("attn_scores_soft_cap", 50.0),
        ("final_rms", True),
        ("scale_attn_by_inverse_layer_idx", True),
        ("post_embedding_ln", True),
        ("a_field_of_a_later_version", "value"),
    ],
)
def test_a_configuration_of_another_kind_of_model_is_refused_by_the_field(
    wide: TinyModel, field: str, value: Any
) -> None:
    config, state = wide.to_hooked_transformer_state_dict()
    message = error_of(lambda: TinyModel.from_transformer_lens({**config, field: value}, state))
    assert f"{field}={value!r}" in message


def test_what_a_configuration_leaves_out_has_their_default(wide: TinyModel) -> None:
    config, state = wide.to_hooked_transformer_state_dict()
    few = {name: config[name] for name in ("n_layers", "d_model", "d_head", "d_mlp", "n_ctx", "d_vocab")}
    message = error_of(lambda: TinyModel.from_transformer_lens(few, state))
    assert "normalization_type='LN' (only None)" in message
    assert TinyModel.from_transformer_lens({**few, "normalization_type": None}, state).config == WIDE
    del few["n_ctx"]
    assert "n_ctx=None" in error_of(lambda: TinyModel.from_transformer_lens(few, state))


def test_a_state_with_more_or_less_is_refused_by_the_name(wide: TinyModel) -> None:
    config, state = wide.to_hooked_transformer_state_dict()
    buffers = {"blocks.0.attn.mask": np.zeros((16, 16), bool), "blocks.0.attn.IGNORE": np.array(-np.inf, np.float32)}
    assert TinyModel.from_transformer_lens(config, state | buffers).config == WIDE
    for name in ("b_Q", "b_K", "b_V"):
        biased = {**state, f"blocks.1.attn.{name}": np.ones((2, 8), np.float32)}
        assert f"blocks.1.attn.{name}: biases" in error_of(lambda b=biased: TinyModel.from_transformer_lens(config, b))
    wrong = {
        **state,
        "blocks.0.ln1.w": np.ones(16, np.float32),
        "unembed.W_U": state["unembed.W_U"].T,
    }
    del wrong["blocks.1.mlp.b_in"]
    message = error_of(lambda: TinyModel.from_transformer_lens(config, wrong))
    for part in ("unexpected 'blocks.0.ln1.w'", "'unembed.W_U' has shape (23, 16)", "missing 'blocks.1.mlp.b_in'"):
        assert part in message
    integers = {**state, "embed.W_E": state["embed.W_E"].astype(np.int64)}
    assert "embed.W_E holds int64" in error_of(lambda: TinyModel.from_transformer_lens(config, integers))


def test_a_number_of_layers_that_the_state_does_not_have_is_refused_at_once(wide: TinyModel) -> None:
    config, state = wide.to_hooked_transformer_state_dict()
    message = error_of(lambda: TinyModel.from_transformer_lens({**config, "n_layers": 10**7}, state))
    assert "states n_layers=10000000, and the state dict has 2 blocks" in message
    for name in ("d_head", "attn_scale"):
        changed = {**config, name: 10**400}
        message = error_of(lambda c=changed: TinyModel.from_transformer_lens(c, state))
        assert f"needs numbers below 1e+09 for {name}=1000" in message


def test_tensors_that_numpy_cannot_read_are_named(wide: TinyModel) -> None:
    class Bfloat16:
        """A tensor of PyTorch in a number format that NumPy does not have."""

        def __array__(self, *_: Any, **__: Any) -> Any:
            raise TypeError("Got unsupported ScalarType BFloat16")

    config, state = wide.to_hooked_transformer_state_dict()
    changed = {**state, "blocks.1.mlp.W_in": Bfloat16()}
    message = error_of(lambda: TinyModel.from_transformer_lens(config, changed))
    assert f"1 of {len(state)} tensors of the state dict; the first is blocks.1.mlp.W_in: Got unsupported" in message
    assert "model.cpu().float()" in message


def test_neurons_with_thresholds_are_refused() -> None:
    config = dataclasses.replace(WIDE, mlp_activation="jumprelu")
    lm = TinyModel.from_params(config, random_params(param_shapes(config), 0))
    assert "mlp_activation='jumprelu'" in error_of(lm.to_hooked_transformer_state_dict)


@pytest.mark.parametrize("file", ["lm.safetensors", "lm.pt"])
def test_exported_files_convert_back_to_the_same_folder(wide: TinyModel, tmp_path: Path, file: str) -> None:
    wide.save_pretrained(tmp_path / "ours")
    exported = tmp_path / "new" / file
    assert convert(["export-lm", str(tmp_path / "ours"), str(exported), "--format", "transformer-lens"]) == 0
    assert json.loads((tmp_path / "new" / "lm.json").read_text()) == wide.to_hooked_transformer_state_dict()[0]
    assert convert(["lm", str(exported), str(tmp_path / "back")]) == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    assert TinyModel(exported).config == WIDE


def test_files_without_a_sound_configuration_are_refused_in_one_line(
    wide: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide.save_pretrained(tmp_path / "ours")
    exported = tmp_path / "lm.safetensors"
    assert convert(["export-lm", str(tmp_path / "ours"), str(exported), "--format", "transformer-lens"]) == 0
    capsys.readouterr()
    for content, arguments, says in (
        (
            '{"d_model": 16}',
            (),
            "lm.safetensors: a configuration of TransformerLens needs numbers below 1e+09 for n_layers=None",
        ),
        ('{"d_head": 8, "d_model": "16"}', (), "d_model='16'"),
        ("[]", (), "lm.json holds a list"),
        ("{", (), "lm.json cannot be read"),
        ("[" * 100_000, (), "lm.json cannot be read"),
        ("{}", ("--n-heads", "2"), "lm.json already states the number of heads"),
        (None, (), "lm.json does not exist"),
    ):
        (tmp_path / "lm.json").unlink() if content is None else (tmp_path / "lm.json").write_text(content)
        assert convert(["lm", str(exported), str(tmp_path / "back"), *arguments]) == 1
        assert says in error_line(capsys)
        assert not (tmp_path / "back").exists()
