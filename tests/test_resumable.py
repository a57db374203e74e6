"""Work files: only the same work resumes from them, and they are whole or absent."""

import dataclasses

import numpy as np
import pytest
from conftest import make_dictionary

from tinymodel_jax.analysis.search.resumable import Progress, fingerprint, fingerprints
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel


def test_what_is_saved_comes_back(tmp_path):
    progress = Progress(tmp_path / "work", {"tag": "M1", "k": 3, "shape": (2, 3)})
    assert progress.load() is None
    arrays = {"a": np.arange(6).reshape(2, 3).T, "empty": np.zeros((0, 2), np.float32)}
    progress.save(arrays, 7)
    found = Progress(tmp_path / "work", {"k": 3, "tag": "M1", "shape": [2, 3]}).load()
    assert found is not None
    assert found.done == 7
    assert set(found.arrays) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)


def test_other_work_is_refused_by_the_name_of_what_changed(tmp_path):
    Progress(tmp_path / "work", {"tag": "M1", "k": 3}).save({}, 1)
    with pytest.raises(ValueError, match=r"changed: k \(was 3, now 4\)\. Use the same input, or delete the file"):
        Progress(tmp_path / "work", {"tag": "M1", "k": 4}).load()


@pytest.mark.parametrize("content", [b"", b"something else", b"\x00" * 64])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "work").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or not a work file"):
        Progress(tmp_path / "work", {}).load()


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    progress = Progress(tmp_path / "work", {})
    progress.save({"a": np.ones(2)}, 1)

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        progress.save({"a": np.zeros(2)}, 2)
    found = progress.load()
    assert found is not None
    assert found.done == 1
    assert found.arrays["a"].tolist() == [1, 1]


def test_a_fingerprint_tells_bits_shapes_and_types_apart():
    array = np.arange(4, dtype=np.int32)
    others = [array.reshape(2, 2), array.astype(np.int64), array + 1, array.view(np.float32)]
    assert len({fingerprint(one) for one in [array, *others]}) == 5
    assert fingerprint(array, array) != fingerprint(array)
    assert fingerprint(array[::1].copy()) == fingerprint(array)
    assert fingerprint(np.zeros((0,))) != fingerprint(np.zeros((0, 2)))


def test_fingerprints_tell_dictionaries_of_the_same_arrays_apart(lm):
    dictionary = make_dictionary("blocks.1.hook_attn_out", "blocks.1.hook_attn_out", architecture="topk", k=3)
    seen = set()
    for change in ({}, {"k": 4}, {"subtract_b_dec": True}, {"dtype": "bfloat16"}, {"architecture": "relu", "k": None}):
        config = dataclasses.replace(dictionary.config, **change)
        lm.attach("A1", Dictionary.from_params(config, dictionary.params))
        seen.add(fingerprints(lm["A1"], lm.hooked())["dictionary"])
    assert len(seen) == 5


def test_fingerprints_tell_models_of_the_same_arrays_apart(lm):
    bfloat16 = TinyModel.from_params(dataclasses.replace(lm.config, dtype="bfloat16"), lm.params)
    bfloat16.attach("M1", lm["M1"].dictionary)
    splices = [lm.splice("M0", **switches) for switches in ({}, {"include_error": True}, {"detach_error": False})]
    seen = [fingerprints(one["M1"], one.hooked()) for one in (lm, bfloat16, *splices)]
    assert len({one["model"] for one in seen}) == 5
    assert len({one["dictionary"] for one in seen}) == 1
