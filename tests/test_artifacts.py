"""Folders of models and dictionaries: round trips, damage, and what a name or path means."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from conftest import DATA, make_dictionary
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import error_of
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tinymodel_jax.config import ARCHITECTURES, ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.io import data_files
from tinymodel_jax.io.artifacts import (
    config_at,
    load_dictionary,
    load_model,
    read_dictionary,
    save_dictionary,
    save_model,
)
from tinymodel_jax.io.convert import export_model, model_tensors
from tinymodel_jax.io.torch_files import save_torch_file
from tinymodel_jax.number_formats import DTYPES
from tinymodel_jax.runtime.atomic_files import replace_file
from tinymodel_jax.text.tokenizer import Tokenizer

CONFIG = ModelConfig(n_layers=2, d_model=4, n_heads=2, d_mlp=6, n_ctx=5, d_vocab=7)


def flat_params(dtype: Any = "float32"):
    rng = np.random.default_rng(0)
    return {t.name: rng.normal(size=t.shape).astype(dtype) for t in model_tensors(CONFIG)}


def assert_same_arrays(got, expected):
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        assert got[name].tobytes() == np.ascontiguousarray(array).tobytes()


@pytest.fixture
def folder(tmp_path):
    """A saved model with a dictionary at M1."""
    dictionary = make_dictionary("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out", d_in=4, d_out=4)
    save_model(CONFIG, flat_params(), tmp_path / "lm", dictionaries={"M1": dictionary})
    return tmp_path / "lm"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_comes_back_bit_for_bit_in_its_number_format(tmp_path, dtype):
    params = flat_params(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    config = ModelConfig(**{**CONFIG.to_dict(), "param_dtype": dtype})
    save_model(config, params, tmp_path / "deep" / "lm")
    files = load_model(tmp_path / "deep" / "lm")
    assert (files.config, files.dictionaries, files.directory) == (config, {}, tmp_path / "deep" / "lm")
    assert_same_arrays(files.params, params)


def test_arrays_that_are_views_are_saved_as_they_read(tmp_path):
    params = {name: np.asfortranarray(array) for name, array in flat_params().items()}
    save_model(CONFIG, params, tmp_path)
    assert_same_arrays(load_model(tmp_path).params, params)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dictionary_comes_back_bit_for_bit(tmp_path, architecture):
    options = {"k": 3} if architecture in ("topk", "batch_topk", "groupmax") else {}
    dictionary = make_dictionary("a", "b", architecture=architecture, skip=True, **options)
    dictionary.save_pretrained(tmp_path / "d")
    again = Dictionary.from_pretrained(tmp_path / "d")
    assert again.config == dictionary.config
    assert_same_arrays(jax.tree.map(np.asarray, again.params), jax.tree.map(np.asarray, dictionary.params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dictionary_s_folder_whose_numbers_are_not_finite_is_refused(tmp_path, dtype):
    dictionary = make_dictionary("a", "b", param_dtype=dtype)
    params = {name: np.array(array) for name, array in dictionary.params.items()}
    params["b_dec"][2] = np.nan
    save_dictionary(Dictionary(dictionary.config, params), tmp_path)
    says = f"the dictionary {tmp_path} has values that are NaN or infinite (1 in b_dec)"
    assert says in error_of(lambda: load_dictionary(tmp_path))


def test_a_bfloat16_dictionary_file_keeps_its_numbers(tmp_path):
    exact = read_dictionary(DATA / "sparse_T1_f32_zip.pt", Site("M", 1))
    half = read_dictionary(DATA / "sparse_T1_bf16_zip.pt", Site("M", 1))
    assert half.params["W_enc"].dtype == ml_dtypes.bfloat16
    save_dictionary(half, tmp_path)
    assert_same_arrays(read_dictionary(tmp_path).params, half.params)
    np.testing.assert_array_equal(half.params["W_enc"], exact.params["W_enc"].astype(ml_dtypes.bfloat16))


def test_a_folder_and_a_pt_file_are_told_where_the_dictionary_belongs(tmp_path):
    loaded = load_dictionary(DATA / "sparse_T1_f32_zip.pt", "M1")
    assert loaded.config.hook_in == "blocks.1.hook_mlp_in"
    loaded.save_pretrained(tmp_path)
    assert load_dictionary(tmp_path).config == loaded.config
    assert load_dictionary(tmp_path, "T1").config == loaded.config
    assert "give site=, such as 'M2'" in error_of(lambda: load_dictionary(DATA / "sparse_T1_f32_zip.pt"))


def test_a_folder_s_dictionary_does_not_move_to_another_site_by_itself(tmp_path):
    loaded = load_dictionary(DATA / "sparse_T1_f32_zip.pt", "M1")
    loaded.save_pretrained(tmp_path)
    for tag in ("M2", "Mo1"):
        message = error_of(lambda tag=tag: load_dictionary(tmp_path, tag))
        assert "from blocks.1.hook_mlp_in to blocks.1.hook_mlp_out" in message
        assert f"{tag!r} is from {Site.parse(tag)[0].hook_in} to {Site.parse(tag)[0].hook_out}" in message
        assert f"lm.attach({tag!r}, Dictionary.from_pretrained({str(tmp_path)!r}))" in message


@pytest.mark.parametrize("hooks", [("x", "x"), ("x", "y")])
def test_a_dictionary_that_was_trained_on_arrays_goes_anywhere(tmp_path, hooks):
    made = make_dictionary(*hooks)
    made.save_pretrained(tmp_path)
    assert load_dictionary(tmp_path, "Mo2").config == config_at(made.config, Site("Mo", 2))


def test_a_tokenizer_of_another_vocabulary_is_refused_before_anything_is_written(tmp_path):
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, [])))
    message = error_of(lambda: save_model(CONFIG, flat_params(), tmp_path, tokenizer))
    assert message == "the tokenizer has 6 ids, the model's vocabulary 7."
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16])
def test_a_safetensors_file_with_the_reference_s_names_is_read_as_a_pt_file(tmp_path, dtype):
    config = ModelConfig(**{**CONFIG.to_dict(), "d_mlp": 16})
    rng = np.random.default_rng(1)
    params = {t.name: rng.normal(size=t.shape).astype(dtype) for t in model_tensors(config)}
    state = export_model(config, params)
    save_torch_file(state, tmp_path / "lm.pt")
    save_file(state, tmp_path / "lm.safetensors")
    for ending in ("pt", "safetensors"):
        files = load_model(tmp_path / f"lm.{ending}", 2)
        assert files.config == config
        assert_same_arrays(files.params, params)
    assert "n_heads is needed" in error_of(lambda: load_model(tmp_path / "lm.safetensors"))
    (tmp_path / "lm.safetensors").write_bytes(b"damaged")
    message = error_of(lambda: load_model(tmp_path / "lm.safetensors", 2))
    assert message.startswith(f"{tmp_path / 'lm.safetensors'} is damaged")


def test_a_model_s_folder_lists_its_dictionaries_without_reading_them(folder):
    files = load_model(folder)
    assert files.dictionaries == {"M1": folder / "dictionaries" / "M1"}
    (folder / "dictionaries" / "M1" / "dictionary.safetensors").write_bytes(b"damaged")
    assert load_model(folder).dictionaries == files.dictionaries


def test_a_training_run_s_folder_is_its_model(folder, tmp_path):
    os.rename(folder, tmp_path / "model")
    (tmp_path / "checkpoints").mkdir()
    assert_same_arrays(load_model(tmp_path).params, flat_params())


def test_saving_leaves_no_other_files_and_replaces_earlier_ones(folder):
    shutil.rmtree(folder / "dictionaries")
    save_model(CONFIG, flat_params(), folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_that_cannot_be_written_names_the_folder_and_the_reason(tmp_path, monkeypatch):
    def refused(self, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "touch", refused)  # a file's mode would not stop root
    message = error_of(lambda: save_model(CONFIG, flat_params(), tmp_path), PermissionError)
    assert message == f"cannot write model.safetensors to the folder {tmp_path}: Permission denied"


def test_a_full_disk_is_an_error_of_the_system_s_kind(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(data_files, "save_file", full)
    message = error_of(lambda: save_model(CONFIG, flat_params(), tmp_path), OSError)
    assert f"to the folder {tmp_path}: I/O error: No space left on device" in message
    assert os.listdir(tmp_path) == []


def test_the_config_is_readable_json_that_says_what_it_is(folder):
    content = json.loads((folder / "config.json").read_text("utf-8"))
    assert content == {"format": "tinymodel_jax/model", "format_version": 1, **CONFIG.to_dict()}


def edited(**values):
    """Return a change of config.json that sets (or, by None, drops) fields."""

    def change(folder):
        path = folder / "config.json"
        content = {**json.loads(path.read_text("utf-8")), **values}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), "utf-8")

    return change


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (written("config.json", b""), "config.json cannot be read"),
        (written("config.json", b"{"), "config.json cannot be read"),
        (written("config.json", b"\xff\xfe"), "config.json cannot be read"),
        (written("config.json", b"[" * 100_000), "config.json cannot be read"),
        (written("config.json", b"[1, 2]"), "holds a list; expected a JSON object"),
        (
            edited(format="tinymodel_jax/dictionary"),
            "describes 'tinymodel_jax/dictionary', expected 'tinymodel_jax/model'",
        ),
        (edited(format_version=2), "has format version 2; this release reads 1"),
        (edited(format_version=None), "has format version None"),
        (edited(d_modle=3), "unknown field 'd_modle' (did you mean 'd_model'?)"),
        (edited(d_model="4"), "d_model='4' must be a whole number"),
        (edited(n_heads=3), "n_heads=3 does not divide d_model=4"),
        (edited(dtype="int8"), "dtype 'int8' is not supported"),
        (edited(dtype=["float32"]), "is not supported"),
        (edited(n_layers=1), "unexpected 'blocks.1.attn.W_Q'"),
        (edited(n_layers=3), "missing 'blocks.2.attn.W_Q' (2, 4, 2)"),
        (edited(d_vocab=8), "'W_E' has shape (7, 4), expected (8, 4)"),
        (written("model.safetensors", b""), "model.safetensors is damaged or not a safetensors file"),
        (written("model.safetensors", b"\x08" + b"\0" * 7 + b"{}      "), "missing 'W_E' (7, 4)"),
        (written("model.safetensors", b"\xff" * 64), "model.safetensors is damaged"),
    ],
)
def test_a_damaged_folder_is_a_one_line_error_that_names_the_file(folder, change, says):
    change(folder)
    message = error_of(lambda: load_model(folder))
    assert says in message
    assert message.startswith(str(folder))


@pytest.mark.usefixtures("no_type_checks")
def test_a_damaged_dictionary_folder_is_one_too(tmp_path):
    make_dictionary("a", "a").save_pretrained(tmp_path)
    edited(architecture="topk", k="3")(tmp_path)
    assert f"{tmp_path / 'config.json'}: DictionaryConfig: k='3' must be" in error_of(lambda: load_dictionary(tmp_path))
    (tmp_path / "dictionary.safetensors").unlink()
    assert "it has neither dictionary.safetensors" in error_of(lambda: load_dictionary(tmp_path), FileNotFoundError)


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_byte_gives_an_error_or_arrays_but_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("lm")
    save_model(CONFIG, flat_params(), folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    del content[data.draw(st.sampled_from([len(content), len(content) - 1, header, 7, 0])) :]
    (folder / "model.safetensors").write_bytes(content)
    try:
        params = load_model(folder).params
    except ValueError:
        assert str(folder) in error_of(lambda: load_model(folder))
    else:
        assert set(params) == set(flat_params())


def test_a_folder_without_a_model_says_what_was_looked_for(tmp_path):
    message = error_of(lambda: load_model(tmp_path), FileNotFoundError)
    assert str(tmp_path) in message
    assert "looked for config.json and model.safetensors there and in its folder 'model'" in message


def test_heads_are_for_files_only(folder):
    assert "n_heads=4 is for files" in error_of(lambda: load_model(folder, n_heads=4))


def test_an_error_about_a_pt_file_names_the_file(tmp_path):
    path = DATA / "sparse_T1_f32_zip.pt"
    assert error_of(lambda: load_model(path, 4)).startswith(f"{path}: not a TinyModel language model")
    (tmp_path / "x.pt").write_bytes(b"not a checkpoint")
    assert str(tmp_path / "x.pt") in error_of(lambda: load_model(tmp_path / "x.pt", 4))
