"""Files of other libraries with settings and tensors that no library writes: one line each, naming the file."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_dictionary
from oracle import error_of
from safetensors.numpy import load_file, save_file

from tinymodel_jax import load_transcoder_set, save_transcoder_set
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io.data_files import read_safetensors

SAE, TRANSCODER = ("blocks.1.hook_mlp_out",) * 2, ("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out")
CONFIGS = {
    "saelens": "cfg.json",
    "sparsify": "cfg.json",
    "dictionary_learning": "config.json",
    "circuit-tracer": "config.yaml",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a dictionary in a format; the same one for every call with a name."""
    root = tmp_path_factory.mktemp("written")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            hooks = TRANSCODER if name == "circuit-tracer" else SAE
            architecture = {"circuit-tracer": "relu", "saelens": "relu"}.get(name, "topk")
            dictionary = make_dictionary(
                hooks[0], hooks[1], architecture=architecture, k=3 if architecture == "topk" else None
            )
            dictionary.save_pretrained(root / name, format=name)
        return root / name

    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change settings, also those inside `trainer` of dictionary_learning."""
    content = json.loads(path.read_text("utf-8"))
    if "trainer" in content:
        content["trainer"] |= changes
    else:
        content |= changes
    path.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("saelens", {"architecture": ["topk"]}, "architecture ['topk'] cannot be represented"),
        ("saelens", {"architecture": "topk", "k": float("inf")}, "k=inf; expected a whole number"),
        ("saelens", {"architecture": "topk", "k": float("nan")}, "k=nan; expected a whole number"),
        ("saelens", {"architecture": "topk", "k": 99}, "k=99 is outside 1..n_features=12"),
        ("saelens", {"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input='false'; expected true or false"),
        (
            "saelens",
            {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": 1},
            "rescale_acts_by_decoder_norm=1; expected true or false",
        ),
        ("saelens", {"metadata": {"sae_lens_version": "²"}, "activation_fn": ["x"]}, "activation_fn ['x'] with"),
        (
            "saelens",
            {"metadata": {"sae_lens_version": "6.1.0", "exclude_special_tokens": "all"}},
            "exclude_special_tokens='all'; expected true, false or a list of token ids",
        ),
        (
            "saelens",
            {"metadata": {"sae_lens_version": "6.1.0", "hook_name": SAE[0], "exclude_special_tokens": [-1]}},
            "exclude=(-1,); expected token ids",
        ),
        ("sparsify", {"k": float("inf")}, "k=inf; expected a whole number"),
        ("sparsify", {"transcode": "false"}, "transcode='false'; expected true or false"),
        ("sparsify", {"k": 99}, "k=99 is outside 1..n_features=12"),
        ("dictionary_learning", {"dict_class": ["x"]}, "dict_class ['x'] is unknown"),
    ],
)
def test_settings_of_the_wrong_type_or_value_are_named_with_their_file(
    written: Callable[[str], Path], tmp_path: Path, name: str, changes: dict[str, Any], says: str
) -> None:
    folder = shutil.copytree(written(name), tmp_path / "d")
    edit(folder / CONFIGS[name], **changes)
    message = error_of(lambda: Dictionary.from_pretrained(folder))
    assert says in message
    assert message.startswith(str(folder / CONFIGS[name]))


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ("transcoders: []", "transcoders is []; expected a list of files"),
        ("transcoders: {}", "transcoders is {}; expected a list of files"),
        ("transcoders: 0", "transcoders is 0; expected a list of files"),
        ("date: 2020-99-99", "is damaged or not YAML: month must be in 1..12"),
        ("number: !!int ''", "is damaged or not YAML"),
        (f"deep: {'[' * 1000}", "is damaged or not YAML"),
        ("activation: topk\nk: 3", "activation 'topk' cannot be represented"),
    ],
)
def test_a_configuration_of_a_set_that_does_not_fit_is_named(
    written: Callable[[str], Path], tmp_path: Path, added: str, says: str
) -> None:
    folder = shutil.copytree(written("circuit-tracer"), tmp_path / "d")
    config = folder / "config.yaml"
    config.write_text(f"{config.read_text()}{added}\n", "utf-8")
    for read in (load_transcoder_set, Dictionary.from_pretrained):
        message = error_of(lambda read=read: read(folder))
        assert says in message
        assert message.startswith(str(config))


def test_a_stated_relu_is_read_and_contradicts_thresholds(written: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(written("circuit-tracer"), tmp_path / "d")
    config = folder / "config.yaml"
    config.write_text(f"{config.read_text()}activation: relu\n", "utf-8")
    assert load_transcoder_set(folder)["M1"].config.architecture == "relu"
    tensors = load_file(folder / "layer_1.safetensors")
    thresholds = {"activation_function.threshold": np.ones(12, np.float32)}
    save_file({**tensors, **thresholds}, folder / "layer_1.safetensors")
    assert "activation 'relu' contradicts the thresholds" in error_of(lambda: load_transcoder_set(folder))


def test_a_set_with_numbers_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    dictionary = make_dictionary(*TRANSCODER)
    save_transcoder_set({"M1": dictionary}, tmp_path)
    tensors = load_file(tmp_path / "layer_1.safetensors")
    tensors["b_enc"][3] = np.inf
    save_file(tensors, tmp_path / "layer_1.safetensors")
    assert "layer_1.safetensors has values that are NaN or infinite (1 in b_enc)" in error_of(
        lambda: load_transcoder_set(tmp_path)
    )


def test_a_scaling_factor_of_another_shape_is_named(written: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(written("saelens"), tmp_path / "d")
    weights = folder / "sae_weights.safetensors"
    tensors = load_file(weights)
    for shape in ((), (5,), (12, 1)):
        save_file({**tensors, "scaling_factor": np.full(shape, 2, np.float32)}, weights)
        message = error_of(lambda: Dictionary.from_pretrained(folder))
        assert message == f"{weights}: scaling_factor has shape {shape}; expected (12,)."
    for factor in ("Infinity", "NaN", str(10**400)):
        edit(folder / "cfg.json", normalize_activations="expected_average_only_in")
        save_file(tensors, weights)
        (folder / "activation_scaler.json").write_text(f'{{"scaling_factor": {factor}}}')
        assert "expected a finite number above 0" in error_of(lambda: Dictionary.from_pretrained(folder))


def test_tensors_of_the_wrong_shape_are_named_with_their_file(written: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(written("saelens"), tmp_path / "d")
    weights = folder / "sae_weights.safetensors"
    tensors = load_file(weights)
    edit(folder / "cfg.json", architecture="topk", k=3, rescale_acts_by_decoder_norm=True)
    for name, shape in (("b_enc", (5,)), ("b_enc", ()), ("W_dec", (5, 16)), ("b_dec", (5,))):
        save_file({**tensors, name: np.zeros(shape, np.float32)}, weights)
        assert error_of(lambda: Dictionary.from_pretrained(folder)).startswith(f"{weights}: ")


def test_a_setting_that_the_architecture_does_not_have_changes_nothing(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(written("saelens"), tmp_path / "d")
    before = Dictionary.from_pretrained(folder)
    edit(folder / "cfg.json", rescale_acts_by_decoder_norm=True)
    np.testing.assert_array_equal(Dictionary.from_pretrained(folder).params["W_enc"], before.params["W_enc"])


def test_the_input_of_a_module_is_not_its_output(written: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(written("dictionary_learning"), tmp_path / "d")
    edit(folder / "config.json", hook_in=None, hook_out=None, submodule_name="resid_post_layer_1")
    content = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**content, "buffer": {"io": "in"}}), "utf-8")
    message = error_of(lambda: Dictionary.from_pretrained(folder))
    assert "it says submodule_name 'resid_post_layer_1' with io 'in', which is not a hook point here" in message
    assert Dictionary.from_pretrained(folder, "Ra1").config.hook_in == "blocks.1.hook_resid_pre"
    (folder / "config.json").write_text(json.dumps({**content, "buffer": {"io": "out"}}), "utf-8")
    assert Dictionary.from_pretrained(folder).config.hook_in == "blocks.1.hook_resid_post"


@pytest.mark.parametrize("block", [0, 1])
def test_hook_points_of_two_blocks_come_back_from_saelens(tmp_path: Path, block: int) -> None:
    hooks = f"blocks.{block}.hook_mlp_in", "blocks.1.hook_mlp_out"
    make_dictionary(*hooks).save_pretrained(tmp_path, format="saelens")
    stated = json.loads((tmp_path / "cfg.json").read_text("utf-8"))["metadata"]["hook_name"]
    assert stated == ("blocks.0.hook_mlp_in" if block == 0 else "blocks.1.hook_resid_mid")
    config = Dictionary.from_pretrained(tmp_path).config
    assert (config.hook_in, config.hook_out) == hooks


def test_a_file_of_the_reference_may_have_the_name_of_a_layer_s(tmp_path: Path) -> None:
    dictionary = make_dictionary(*TRANSCODER)
    dictionary.save_pretrained(tmp_path / "layer_0.safetensors", format="tinymodel-pt")
    found = Dictionary.from_pretrained(tmp_path / "layer_0.safetensors", "M1")
    np.testing.assert_array_equal(found.params["W_enc"], dictionary.params["W_enc"])
    (tmp_path / "layer_0.safetensors").write_bytes(b"nothing")
    message = error_of(lambda: Dictionary.from_pretrained(tmp_path / "layer_0.safetensors", "M1"))
    assert "layer_0.safetensors is damaged or not a safetensors file" in message


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": np.zeros(2, np.float32)}, path)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # permissions do not apply to root
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError) as error:
            read_safetensors(path)
    finally:
        os.seteuid(user)
    assert error.value.filename == str(path)


def test_a_cross_layer_transcoder_with_another_activation_is_refused(tmp_path: Path) -> None:
    shapes = {"W_enc_0": (5, 16), "b_enc_0": (5,), "b_dec_0": (16,)}
    save_file({n: np.ones(shape, np.float32) for n, shape in shapes.items()}, tmp_path / "W_enc_0.safetensors")
    save_file({"W_dec_0": np.ones((5, 1, 16), np.float32)}, tmp_path / "W_dec_0.safetensors")
    (tmp_path / "config.yaml").write_text("model_kind: cross_layer_transcoder\nactivation: topk\n")
    assert "config.yaml: activation 'topk' cannot be" in error_of(lambda: Dictionary.from_pretrained(tmp_path))
