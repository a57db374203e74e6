"""Loaded models and saved folders stay intact, whatever happens to their inputs and to other files."""

import gzip
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinymodel_jax.commands.inputs import read_stories
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io.artifacts import save_model
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.generate import strip_padding
from tinymodel_jax.model.interventions import clamp, scale
from tinymodel_jax.params import flatten, unflatten

DATA = Path(__file__).parent / "data"
TOK_IDS = np.arange(12)[None]


@pytest.fixture
def lm() -> TinyModel:
    return TinyModel(DATA / "lm_f32_zip.pt", n_heads=4)


def test_a_model_does_not_change_with_the_file_it_came_from(tmp_path: Path) -> None:
    path = tmp_path / "lm.pt"
    path.write_bytes((DATA / "lm_f32_zip.pt").read_bytes())
    lm = TinyModel(path, n_heads=4)
    before = np.array(lm(TOK_IDS))
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    np.testing.assert_array_equal(lm(TOK_IDS), before)
    with open(path, "r+b") as file:
        file.truncate(0)
    np.testing.assert_array_equal(lm(TOK_IDS), before)


def test_a_dictionary_does_not_change_with_the_file_it_came_from(lm: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "M1.pt"
    path.write_bytes((DATA / "sparse_T1_f32_zip.pt").read_bytes())
    lm.attach("M1", path)
    before = np.array(lm["M1"](TOK_IDS))
    with open(path, "r+b") as file:
        file.truncate(0)
    np.testing.assert_array_equal(lm["M1"](TOK_IDS), before)


def test_a_model_does_not_change_with_the_arrays_it_was_built_from(lm: TinyModel) -> None:
    arrays = {name: np.array(array) for name, array in flatten(lm.params).items()}
    built = TinyModel.from_params(lm.config, unflatten(arrays))
    arrays["W_E"][:] = 0
    np.testing.assert_array_equal(built(TOK_IDS), lm(TOK_IDS))


def test_a_folder_without_a_tokenizer_is_saved_again(lm: TinyModel, tmp_path: Path) -> None:
    lm.save_pretrained(tmp_path / "a")
    TinyModel(tmp_path / "a").save_pretrained(tmp_path / "b")
    np.testing.assert_array_equal(TinyModel(tmp_path / "b")(TOK_IDS), lm(TOK_IDS))


def test_saving_over_a_model_with_other_dictionaries_is_refused(lm: TinyModel, tmp_path: Path) -> None:
    lm.attach("M1", DATA / "sparse_T1_f32_zip.pt")
    lm.save_pretrained(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="dictionaries/M1"):
        save_model(lm.config, {name: np.asarray(a) for name, a in flatten(lm.params).items()}, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    TinyModel(tmp_path).save_pretrained(tmp_path)


def test_attaching_another_dictionary_leaves_a_spliced_model_as_it_is(lm: TinyModel) -> None:
    lm.attach("M1", DATA / "sparse_T1_f32_zip.pt")
    spliced = lm.splice("M1")
    before = np.array(spliced(TOK_IDS))
    other = lm.dictionaries["M1"]
    spliced.attach("M1", Dictionary.from_params(other.config, jax.tree.map(jnp.zeros_like, other.params)))
    np.testing.assert_array_equal(spliced(TOK_IDS), before)


def test_a_feature_named_twice_is_refused(lm: TinyModel) -> None:
    lm.attach("M1", DATA / "sparse_T1_f32_zip.pt")
    with pytest.raises(ValueError, match="named twice"):
        clamp(lm.dictionaries["M1"], [3, 5, 3], 2.0)
    with pytest.raises(ValueError, match="named twice"):
        clamp(lm.dictionaries["M1"], [3, -45], 2.0)


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_scaling_attention_scores_keeps_attention_causal(lm: TinyModel, factor: float) -> None:
    name = "blocks.1.attn.hook_pattern"
    logprobs, acts = lm.run_with_hooks(TOK_IDS, scale("blocks.1.attn.hook_attn_scores", factor), keep=(name,))
    assert np.isfinite(np.asarray(logprobs)).all()
    assert not np.triu(np.asarray(acts[name]), 1).any()
    if factor == 0:
        np.testing.assert_allclose(acts[name][0, :, 3, :4], 0.25, rtol=1e-6)


def test_only_padding_at_the_end_is_stripped() -> None:
    assert strip_padding(np.array([9, 1, 9, 2, 9, 9]), 9).tolist() == [9, 1, 9, 2]
    assert strip_padding(np.array([1, 2]), 9).tolist() == [1, 2]


@pytest.mark.parametrize("shape", [(), (1, 2, 3), (1, 33)])
def test_shapes_are_checked_under_jit_too(lm: TinyModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tok_ids"):
        jax.jit(lm)(jnp.zeros(shape, jnp.int32))


@pytest.mark.parametrize("cut", [40, 100])
def test_a_damaged_gzip_file_is_one_line(tmp_path: Path, cut: int) -> None:
    whole = gzip.compress(b'{"text": "Once upon a time, there was a bear."}\n' * 400, 1)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=re.escape("a.jsonl.gz is damaged")):
        read_stories(tmp_path / "a.jsonl.gz", 500)


def test_a_vocabulary_without_room_for_the_special_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="d_vocab=4"):
        ModelConfig(d_vocab=4)
