"""Dictionaries of other libraries: what those compute, round trips through their files, and what is refused.

tests/data/formats holds what the libraries wrote and computed; tests/interop runs them.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA, error_line, make_dictionary
from oracle import Tolerance, assert_close, error_of
from safetensors.numpy import load_file, save_file

from convert_torch_weights import main as convert
from tinymodel_jax import load_transcoder_set, save_transcoder_set
from tinymodel_jax.config import ARCHITECTURES
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io.formats import circuit_tracer, hook_names
from tinymodel_jax.io.formats.names import FORMATS, LIBRARIES
from tinymodel_jax.io.torch_files import load_torch_file, save_torch_file

VECTORS = sorted(path.parent for path in (DATA / "formats").glob("*/*/io.npz"))
EXACT = Tolerance(1e-5, 1e-5)
SAE, TRANSCODER = ("blocks.1.hook_mlp_out",) * 2, ("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out")
APART, COMPARING = {"relu", "batch_topk", "jumprelu", "gated"}, {"topk", "groupmax"}
K = {"topk": 3, "batch_topk": 3, "groupmax": 3}


def inputs(width=16):
    return jnp.asarray(np.random.default_rng(1).normal(size=(5, width)), jnp.float32)


def made(architecture, hooks=SAE, **options):
    return make_dictionary(*hooks, architecture=architecture, k=K.get(architecture), **options)


def joined(hooks):
    """Return a dictionary of the hook points of two blocks."""
    ins, outs = ("+".join((hook.replace("1", "0"), hook)) for hook in hooks)
    return made("relu", (ins, outs), d_in=32, d_out=32)


def assert_same_function(one, other):
    assert_close(one.encode(inputs()), other.encode(inputs()), EXACT)
    assert_close(one(inputs()), other(inputs()), EXACT)


@pytest.mark.parametrize("folder", VECTORS, ids=lambda path: f"{path.parent.name} {path.name}")
def test_activations_and_predictions_are_those_of_the_library_that_wrote_the_files(folder):
    io = np.load(folder / "io.npz")
    dictionary = Dictionary.from_pretrained(folder, str(io["site"]))
    x = jnp.asarray(io["x"])
    assert_close(dictionary.encode(x), io["encode"], EXACT)
    assert_close(dictionary(x), io["forward"], EXACT)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("hooks", "options", "room"),
    [
        (SAE, {"subtract_b_dec": True, "normalize": "layer_norm"}, {"saelens": {*APART, "topk"}}),
        (SAE, {"skip": True, "subtract_b_dec": True}, {"saelens": APART, "sparsify": COMPARING}),
        (SAE, {}, {"saelens": {*APART, "topk"}, "dictionary_learning": {*APART, "topk"}, "sparsify": COMPARING}),
        (
            TRANSCODER,
            {"subtract_b_dec": True, "skip": True},
            {"saelens": APART, "circuit-tracer": APART, "sparsify": COMPARING},
        ),
        (TRANSCODER, {"d_out": 10}, {"saelens": APART}),
    ],
)
def test_what_a_format_takes_comes_back_as_the_same_function_at_the_same_hook_points(
    tmp_path, architecture, hooks, options, room
):
    dictionary = made(architecture, hooks, **options)
    for name in LIBRARIES:
        if architecture not in room.get(name, ()):
            assert "Nothing was written" in error_of(partial(dictionary.save_pretrained, tmp_path / name, name))
            assert not (tmp_path / name).exists()
            continue
        dictionary.save_pretrained(tmp_path / name, format=name)
        again = Dictionary.from_pretrained(tmp_path / name)
        assert (again.config.hook_in, again.config.hook_out) == hooks
        assert_same_function(again, dictionary)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dictionaries_of_fewer_bits_are_written_in_float32(tmp_path, dtype):
    for architecture, hooks, name in (
        ("gated", TRANSCODER, "saelens"),
        ("relu", SAE, "dictionary_learning"),
        ("topk", TRANSCODER, "sparsify"),
        ("jumprelu", TRANSCODER, "circuit-tracer"),
        ("relu", SAE, "tinymodel-pt"),
    ):
        dictionary = made(architecture, hooks, subtract_b_dec=True, param_dtype=dtype)
        assert dictionary.params["W_enc"].dtype == dtype
        path = tmp_path / (f"{name}.safetensors" if name == "tinymodel-pt" else name)
        dictionary.save_pretrained(path, format=name)
        assert_same_function(Dictionary.from_pretrained(path, "Mo1" if name == "tinymodel-pt" else None), dictionary)
    assert json.loads((tmp_path / "saelens" / "cfg.json").read_text())["dtype"] == "float32"
    assert {str(array.dtype) for array in load_file(tmp_path / "sparsify" / "sae.safetensors").values()} == {"float32"}


def test_the_reference_s_file_holds_a_relu_dictionary(tmp_path):
    dictionary = made("relu", subtract_b_dec=True)
    for file in ("a.pt", "a.safetensors"):
        dictionary.save_pretrained(tmp_path / file, format="tinymodel-pt")
        assert_same_function(Dictionary.from_pretrained(tmp_path / file, "Mo1"), dictionary)
    for wrong, says in (
        (made("jumprelu"), "are relu, not jumprelu"),
        (made("relu", skip=True), "no skip connection"),
        (made("relu", normalize="layer_norm"), "do not normalize"),
        (made("relu", exclude=(3,)), r"tokens (3,)"),
    ):
        assert says in error_of(lambda wrong=wrong: wrong.save_pretrained(tmp_path / "b.pt", format="tinymodel-pt"))
    assert "a file that ends in .pt" in error_of(
        lambda: dictionary.save_pretrained(tmp_path / "b", format="tinymodel-pt")
    )
    assert not (tmp_path / "b.pt").exists()


@pytest.mark.parametrize(
    ("dictionary", "name", "says"),
    [
        (made("groupmax"), "saelens", "SAELens has no groupmax; sparsify has"),
        (made("topk", TRANSCODER), "saelens", "SAELens has no topk transcoder"),
        (made("relu", skip=True, normalize="layer_norm"), "saelens", "skip connection that normalizes"),
        (made("relu", skip=True), "dictionary_learning", "has no skip connection"),
        (made("relu", exclude=(3,)), "dictionary_learning", "cannot leave out tokens (3,)"),
        (made("relu"), "sparsify", "has topk and groupmax, not relu"),
        (made("topk", TRANSCODER, d_out=10), "sparsify", "has equal widths only, not 16 and 10"),
        (made("topk", TRANSCODER), "circuit-tracer", "not topk; format='sparsify'"),
        (made("relu"), "circuit-tracer", "are not SAEs"),
        (made("relu"), "gguf", "format 'gguf' is unknown; choose one of saelens, dictionary_learning"),
        *((joined(SAE), name, f"format '{name}' is not written for crosscoders. Nothing was") for name in FORMATS),
        *((joined(TRANSCODER), name, "for cross-layer transcoders. Nothing was written") for name in FORMATS),
    ],
)
def test_what_a_format_has_no_room_for_is_refused_by_name(tmp_path, dictionary, name, says):
    assert says in error_of(lambda: dictionary.save_pretrained(tmp_path / "d", format=name))
    assert not (tmp_path / "d").exists()


@pytest.mark.usefixtures("no_type_checks")
def test_paths_and_formats_that_are_none_are_errors_of_one_line(tmp_path):
    file = tmp_path / "x.safetensors"
    save: Any = made("relu").save_pretrained
    file.write_bytes(b"kept")
    (tmp_path / "folder.pt").mkdir()
    for path, name, says in (
        (None, "saelens", "a dictionary is saved to a folder, got None"),
        ("", "tinymodel-pt", "a dictionary is saved to a folder, got ''"),
        (file, "saelens", f"{file} is a file. Nothing was written; name a folder"),
        (file, None, f"{file} is a file. Nothing was written; name a folder"),
        (tmp_path / "folder.pt", "tinymodel-pt", "give the name of a file that ends in .pt"),
        (tmp_path / "d", ["saelens"], "format ['saelens'] is unknown; choose one of saelens"),
    ):
        assert says in error_of(partial(save, path, format=name))
    assert file.read_bytes() == b"kept"
    assert not (tmp_path / "d").exists()


def test_excluded_tokens_go_into_saelens_s_settings(tmp_path):
    made("relu", exclude=(3, 7)).save_pretrained(tmp_path, format="saelens")
    assert Dictionary.from_pretrained(tmp_path).config.exclude == (3, 7)
    settings = tmp_path / "cfg.json"
    settings.write_text(settings.read_text().replace(json.dumps([3, 7], indent=2).replace("\n", "\n    "), "true"))
    assert Dictionary.from_pretrained(tmp_path).config.exclude == ()


@pytest.mark.parametrize("first", ["saelens", "sparsify", "dictionary_learning", None])
def test_a_folder_of_one_format_is_not_overwritten_by_another(tmp_path, first):
    dictionary = made("topk")
    dictionary.save_pretrained(tmp_path, format=first)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in {"saelens", "sparsify", "dictionary_learning", "circuit-tracer"} - {first}:
        given = made("relu", TRANSCODER) if name == "circuit-tracer" else dictionary
        message = error_of(lambda given=given, name=name: given.save_pretrained(tmp_path, format=name))
        assert "Nothing was written; choose another folder" in message
    if first is not None:
        made("topk", seed=4).save_pretrained(tmp_path, format=first)  # its own kind is replaced
        assert {path.name for path in tmp_path.iterdir()} == set(before)
    else:
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_writing_that_fails_leaves_the_earlier_files(tmp_path, monkeypatch):
    made("relu").save_pretrained(tmp_path, format="saelens")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"cannot write cfg\.json"):
        made("relu", seed=1).save_pretrained(tmp_path, format="saelens")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def edited(folder: Path, file: str, **changes: Any) -> None:
    """Change settings of a JSON file; None removes one."""
    content = json.loads((folder / file).read_text("utf-8")) | changes
    kept = {name: value for name, value in content.items() if value is not None}
    (folder / file).write_text(json.dumps(kept), "utf-8")


@pytest.fixture
def saelens(tmp_path):
    """The folder of a relu SAE at Rm1 as SAELens has it."""
    made("relu", ("blocks.1.hook_resid_mid",) * 2).save_pretrained(tmp_path / "sae", format="saelens")
    return tmp_path / "sae"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "temporal"}, "cfg.json: architecture 'temporal' cannot be represented"),
        ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening' cannot be represented"),
        ({"d_sae": 13}, "cfg.json contradicts sae_weights.safetensors: it states n_features=13"),
        ({"d_in": 15}, "it states d_in=15 and the tensors have 16"),
        ({"architecture": "jumprelu"}, "sae_weights.safetensors: missing 'threshold'"),
        ({"architecture": "topk"}, "cfg.json: k=None; expected a whole number of 1 or more"),
        ({"architecture": "topk", "k": 13}, "k=13 is outside 1..n_features=12"),
        ({"architecture": "transcoder", "apply_b_dec_to_input": True}, "which SAELens refuses for transcoders"),
        (
            {"metadata": {"sae_lens_version": "6.1.0", "hook_head_index": 2}},
            "hook_head_index=2: a dictionary of one attention head cannot be represented",
        ),
        (
            {"metadata": {"sae_lens_version": "6.1.0", "hook_name": "blocks.1.ln_final"}},
            "it says hook_name 'blocks.1.ln_final', which is not a hook point here; give site=",
        ),
    ],
)
def test_settings_of_saelens_that_do_not_fit_are_named(saelens, changes, says):
    edited(saelens, "cfg.json", **changes)
    message = error_of(lambda: Dictionary.from_pretrained(saelens))
    assert says in message
    assert message.startswith(str(saelens))


def test_damaged_files_are_named(saelens):
    weights = saelens / "sae_weights.safetensors"
    whole = weights.read_bytes()
    for content, says in ((whole[: len(whole) // 2], "is damaged or not a safetensors"), (b"", "is damaged or not")):
        weights.write_bytes(content)
        assert f"{weights} {says}" in error_of(lambda: Dictionary.from_pretrained(saelens))
    save_file({"W_enc": np.zeros((2, 3), np.int32)}, weights)
    message = error_of(lambda: Dictionary.from_pretrained(saelens))
    assert "missing 'b_enc'; missing 'W_dec'; missing 'b_dec'; 'W_enc' holds int32" in message
    (saelens / "cfg.json").write_text("[1]")
    assert "cfg.json holds a list; expected a JSON object" in error_of(lambda: Dictionary.from_pretrained(saelens))
    weights.unlink()
    message = error_of(lambda: Dictionary.from_pretrained(saelens), FileNotFoundError)
    assert "nor all files of a format of saelens, dictionary_learning, sparsify, circuit-tracer" in message


def test_numbers_that_are_not_finite_are_refused(saelens):
    weights = saelens / "sae_weights.safetensors"
    tensors = load_file(weights)
    tensors["b_enc"][3] = np.nan
    save_file(tensors, weights)
    assert "NaN or infinite (1 in b_enc)" in error_of(lambda: Dictionary.from_pretrained(saelens))


def test_the_site_is_the_file_s_and_another_one_is_an_error(saelens):
    assert Dictionary.from_pretrained(saelens, "Rm1").config.hook_in == "blocks.1.hook_resid_mid"
    assert Dictionary.from_pretrained(saelens / "sae_weights.safetensors").config.hook_in == "blocks.1.hook_resid_mid"
    assert "is a dictionary from blocks.1.hook_resid_mid" in error_of(
        lambda: Dictionary.from_pretrained(saelens, "Ra2")
    )


def test_a_normalizing_sae_does_not_become_a_transcoder(tmp_path):
    folder = shutil.copytree(DATA / "formats" / "saelens" / "standard_layer_norm", tmp_path / "sae")
    assert "the dictionary is an SAE that normalizes its input" in error_of(
        lambda: Dictionary.from_pretrained(folder, "M1")
    )
    folder = DATA / "formats" / "saelens" / "jumprelu_transcoder_layer_norm"
    assert "the dictionary is a transcoder that normalizes" in error_of(
        lambda: Dictionary.from_pretrained(folder, "Rm1")
    )


def test_folders_of_saelens_before_6_are_read(saelens):
    sae = Dictionary.from_pretrained(saelens)
    flat = {"hook_point": "blocks.1.hook_resid_mid", "activation_fn_str": "relu", "normalize_activations": False}
    edited(saelens, "cfg.json", metadata=None, architecture=None, hook_name=None, **flat)
    assert_same_function(Dictionary.from_pretrained(saelens), sae)
    top = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}}
    edited(saelens, "cfg.json", **top)
    assert Dictionary.from_pretrained(saelens).config.k == 2
    edited(saelens, "cfg.json", activation_fn_str="tanh-relu")
    assert "cfg.json: activation_fn 'tanh-relu' with activation_fn_kwargs {'k': 2} cannot" in error_of(
        lambda: Dictionary.from_pretrained(saelens)
    )


def test_the_scale_of_a_checkpoint_s_activations_is_folded(saelens):
    sae = Dictionary.from_pretrained(saelens)
    edited(saelens, "cfg.json", normalize_activations="expected_average_only_in")
    assert_same_function(Dictionary.from_pretrained(saelens), sae)  # as SAELens, which does nothing at inference
    (saelens / "activation_scaler.json").write_text('{"scaling_factor": 2.0}')
    scaled = Dictionary.from_pretrained(saelens)
    assert_close(scaled.encode(inputs()), sae.encode(2 * inputs()), EXACT)
    assert_close(scaled(inputs()), np.asarray(sae(2 * inputs())) / 2, EXACT)


def test_runs_checkpoints_and_training_files_of_dictionary_learning_are_read(tmp_path):
    run, dictionary = tmp_path / "run", made("topk")
    dictionary.save_pretrained(run / "trainer_0", format="dictionary_learning")
    assert_same_function(Dictionary.from_pretrained(run), dictionary)
    state = load_torch_file(run / "trainer_0" / "ae.pt")
    (run / "trainer_0" / "checkpoints").mkdir()
    checkpoint = run / "trainer_0" / "checkpoints" / "ae_100.pt"
    save_torch_file({**state, "b_dec": state["b_dec"] + 1}, checkpoint)
    assert_close(Dictionary.from_pretrained(checkpoint).params["b_dec"], dictionary.params["b_dec"] + 1, EXACT)
    dictionary.save_pretrained(run / "trainer_1", format="dictionary_learning")
    message = error_of(lambda: Dictionary.from_pretrained(run))
    assert "holds 2 dictionaries: trainer_0, trainer_1. Give the folder of one of them" in message


def test_settings_of_dictionary_learning_that_do_not_fit_are_named(tmp_path):
    made("topk").save_pretrained(tmp_path, format="dictionary_learning")
    settings = json.loads((tmp_path / "config.json").read_text())["trainer"]
    for changes, says in (
        ({"dict_class": "IdentityDict"}, "dict_class 'IdentityDict' is unknown"),
        ({"dict_class": "AutoEncoder"}, "ae.pt: missing 'bias'; unexpected 'b_dec'"),
        ({"dict_size": 9}, "config.json contradicts ae.pt: it states n_features=9"),
        ({"k": 4}, "config.json contradicts ae.pt: it states k=4 and the tensors have 3"),
    ):
        edited(tmp_path, "config.json", trainer=settings | changes)
        assert says in error_of(lambda: Dictionary.from_pretrained(tmp_path))
    (tmp_path / "ae.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    edited(tmp_path, "config.json", trainer=settings)
    assert "ae.pt cannot be read as a PyTorch file" in error_of(lambda: Dictionary.from_pretrained(tmp_path))


def test_a_place_in_words_is_a_default_that_a_site_replaces(tmp_path):
    made("topk").save_pretrained(tmp_path, format="dictionary_learning")
    settings = json.loads((tmp_path / "config.json").read_text())["trainer"]
    words = {"hook_in": None, "hook_out": None, "submodule_name": "resid_post_layer_3"}
    edited(tmp_path, "config.json", trainer=settings | words)
    assert Dictionary.from_pretrained(tmp_path).config.hook_in == "blocks.3.hook_resid_post"
    assert Dictionary.from_pretrained(tmp_path, "Mo1").config.hook_in == "blocks.1.hook_mlp_out"
    edited(tmp_path, "config.json", trainer=settings | {**words, "submodule_name": None})
    assert "the site of this dictionary is unknown" in error_of(lambda: Dictionary.from_pretrained(tmp_path))


def test_sparsify_s_folder_is_named_by_its_module(tmp_path):
    folder = shutil.copytree(DATA / "formats" / "sparsify" / "topk_transcode_skip", tmp_path / "layers.1.mlp")
    config = Dictionary.from_pretrained(folder).config
    assert (config.hook_in, config.hook_out) == TRANSCODER
    assert Dictionary.from_pretrained(tmp_path).config == config  # the folder of the run
    for changes, says in (
        ({"activation": "relu"}, "activation 'relu' is unknown"),
        ({"num_latents": 9}, "cfg.json contradicts sae.safetensors: it states n_features=9"),
        ({"skip_connection": False}, "unexpected 'W_skip'"),
    ):
        edited(folder, "cfg.json", **changes)
        assert says in error_of(lambda: Dictionary.from_pretrained(folder))
        shutil.copy(DATA / "formats" / "sparsify" / "topk_transcode_skip" / "cfg.json", folder)


def transcoders(n_layers: int) -> dict[str, Dictionary]:
    return {
        f"M{n}": made("jumprelu", (f"blocks.{n}.hook_mlp_in", f"blocks.{n}.hook_mlp_out"), seed=n)
        for n in range(n_layers)
    }


def test_a_transcoder_set_is_read_whole_or_by_layer(tmp_path):
    given = transcoders(3)
    save_transcoder_set(given, tmp_path)
    found = load_transcoder_set(tmp_path)
    assert list(found) == ["M0", "M1", "M2"]
    for tag, dictionary in given.items():
        assert_same_function(found[tag], dictionary)
    assert_same_function(Dictionary.from_pretrained(tmp_path, "M2"), given["M2"])
    assert_same_function(Dictionary.from_pretrained(tmp_path / "layer_1.safetensors"), given["M1"])
    assert "is a set of 3 transcoders; give site=" in error_of(lambda: Dictionary.from_pretrained(tmp_path))
    assert "no transcoder of layer 5; its layers are 0, 1, 2" in error_of(
        lambda: Dictionary.from_pretrained(tmp_path, "M5")
    )
    assert "holds other layers: layer_2.safetensors" in error_of(lambda: save_transcoder_set(transcoders(2), tmp_path))
    given["M1"].save_pretrained(tmp_path, format="circuit-tracer")  # one layer of the set
    assert list(load_transcoder_set(tmp_path)) == ["M0", "M1", "M2"]


def test_what_is_not_one_transcoder_set_is_refused(tmp_path):
    hooks = [(f"blocks.{n}.hook_mlp_in", f"blocks.{n}.hook_mlp_out") for n in range(2)]
    first, second = (made("relu", pair) for pair in hooks)
    for given, says in (
        ({}, "one transcoder per layer, and none is given"),
        ({"M0": first, "T0": first}, "one transcoder per layer; layer 0 is given twice"),
        ({"M0": first, "M1": made("relu", hooks[1], n_features=9)}, "the same (features, width) in every layer, not"),
        ({"M0": first, "M1": made("relu", hooks[1], skip=True)}, "a skip connection in every layer or in none, not"),
        ({"M3": first}, "'M3' is given a transcoder from blocks.0.hook_mlp_in to blocks.0.hook_mlp_out"),
        ({"M0+M1": joined(TRANSCODER)}, "is not written for cross-layer transcoders"),
    ):
        assert says in error_of(partial(save_transcoder_set, given, tmp_path / "set"))
        assert not (tmp_path / "set").exists()
    for name in ("saelens", None):
        first.save_pretrained(tmp_path / f"{name}", format=name)
        message = error_of(partial(save_transcoder_set, {"M0": first}, tmp_path / f"{name}"))
        assert f"holds a dictionary of {name or 'this package'}. Nothing was written" in message
    message = error_of(partial(first.save_pretrained, tmp_path / "saelens"))  # without format=
    assert "holds a dictionary of saelens. Nothing was written" in message
    (tmp_path / "config.yaml").write_text("theirs: 1")
    message = error_of(partial(save_transcoder_set, {"M0": first}, tmp_path))
    assert "holds a config.yaml of something else. Nothing was written" in message
    save_transcoder_set({"M0": first, "M1": second}, tmp_path / "set")
    message = error_of(
        partial(made("relu", hooks[0], n_features=9).save_pretrained, tmp_path / "set", "circuit-tracer")
    )
    assert "the same (features, width) in every layer" in message


def test_configurations_of_transcoder_sets_are_checked(tmp_path):
    save_transcoder_set(transcoders(1), tmp_path)
    config, tensors = tmp_path / "config.yaml", load_file(tmp_path / "layer_0.safetensors")
    text = config.read_text()
    listing = "# a set\nmodel_kind: transcoder_set  # kind\nfeature_input_hook: 'mlp.hook_in'\n"
    config.write_text(f"{listing}feature_output_hook: hook_mlp_out\ntranscoders:\n- layer_0.safetensors\n")
    assert list(load_transcoder_set(tmp_path)) == ["M0"]
    for content, says in (
        (text.replace("transcoder_set", "cross_layer_transcoder"), "model_kind is 'cross_layer_transcoder'"),
        (f"{text}transcoders: 3\n", "transcoders is 3; expected a list of files"),
        (f"{text}nonsense\n", "config.yaml is damaged or not YAML: while scanning"),
        (text.replace("mlp.hook_in", "mlp.hook_on"), "feature_input_hook 'mlp.hook_on'"),
    ):
        config.write_text(content)
        assert says in error_of(lambda: load_transcoder_set(tmp_path))
    config.write_text(f"{text}transcoders:\n  - hf://a/b/layer_0.safetensors\n")
    assert "not in the folder: hf://a/b" in error_of(lambda: load_transcoder_set(tmp_path), FileNotFoundError)
    config.write_text(text)
    for wrong, says in (
        ({"W_dec": tensors["W_dec"].T.copy()}, "expected both as (features, width)"),
        ({"activation_function.threshold": -(tensors["b_enc"] ** 2) - 1}, "a threshold is below 0"),
    ):
        save_file({**tensors, **wrong}, tmp_path / "layer_0.safetensors")
        assert says in error_of(lambda: load_transcoder_set(tmp_path))


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_in"),
        ("blocks.3.hook_out", "blocks.3.hook_resid_post"),
        ("blocks.3.attn.hook_z", "blocks.3.attn.hook_z"),
        ("blocks.3.hook_nothing", None),
        ("hook_embed", None),
        (None, None),
    ],
)
def test_names_of_transformer_lens_are_hook_points(name, hook):
    assert hook_names.of_transformer_lens(name) == hook


@pytest.mark.parametrize(
    ("module", "transcoder", "hooks"),
    [
        ("layers.3.mlp", True, ("blocks.3.hook_mlp_in", "blocks.3.hook_mlp_out")),
        ("gpt_neox.layers.3.attention", False, ("blocks.3.hook_attn_out",) * 2),
        ("h.3", False, ("blocks.3.hook_resid_post",) * 2),
        ("sae_0", False, None),
    ],
)
def test_modules_are_hook_points(module, transcoder, hooks):
    assert hook_names.of_module(module, transcoder) == hooks


def test_the_converter_takes_any_format(tmp_path, capsys):
    made("batch_topk", TRANSCODER).save_pretrained(tmp_path / "own")
    command = ["dictionary", str(tmp_path / "own"), str(tmp_path / "theirs"), "--format", "saelens"]
    assert convert(command) == 0
    assert convert(["dictionary", str(tmp_path / "theirs"), str(tmp_path / "again")]) == 0
    assert "reads blocks.1.hook_mlp_in, predicts blocks.1.hook_mlp_out" in capsys.readouterr().out
    again = Dictionary.from_pretrained(tmp_path / "again")
    assert again.config.architecture == "jumprelu"
    assert_same_function(again, Dictionary.from_pretrained(tmp_path / "own"))
    assert convert(["dictionary", str(tmp_path / "own"), str(tmp_path / "x"), "--format", "sparsify"]) == 1
    assert "sparsify has topk and groupmax, not batch_topk" in error_line(capsys)
    assert circuit_tracer.recognizes(tmp_path) is False
