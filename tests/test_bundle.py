"""The bundled model: what comes with the package is whole and good, and the command that makes it works."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import as_users_run_it

from tinymodel_jax.bundled import MINI, storyworld
from tinymodel_jax.lm import TinyModel
from train import bundle
from train.presets import PRESETS

TAGS = [f"{kind}{layer}" for layer in range(4) for kind in ("Ra", "A", "Rm", "M", "Mo")]
UNSEEN = 2_000_000


@pytest.fixture(scope="module")
def mini() -> TinyModel:
    return TinyModel("mini")


@pytest.fixture(scope="module")
def unseen(mini: TinyModel) -> tuple[np.ndarray, np.ndarray]:
    stories = storyworld.stories(seed=0, count=24, first=UNSEEN)
    return mini.tokenizer([story.text for story in stories])


def test_a_dictionary_is_at_every_site_and_all_is_under_eight_megabytes(mini):
    assert set(mini.dictionary_tags) == set(TAGS)
    assert sum(path.stat().st_size for path in MINI.rglob("*")) < 8e6


def test_it_predicts_stories_that_it_never_saw(mini, unseen):
    tok_ids, mask = unseen
    card = (MINI / "README.md").read_text("utf-8")
    stated = float(re.search(r"Held-out loss ([0-9.]+)", card)[1])  # type: ignore[index]
    # 5,000 tokens of other stories: the standard error over stories is about 0.02
    assert float(mini.loss(tok_ids, mask)) == pytest.approx(stated, abs=0.08)


@pytest.mark.parametrize("tag", TAGS)
def test_a_model_that_runs_through_a_dictionary_predicts_nearly_as_well(mini, unseen, tag):
    tok_ids, mask = unseen
    clean, spliced = (float(model.loss(tok_ids, mask)) for model in (mini, mini.splice(tag)))
    assert spliced < clean + 0.25
    active = np.asarray(mini[tag](tok_ids))[mask == 1] > 0
    assert active.sum(axis=1).mean() <= 30


def test_its_stories_end_and_keep_their_hero(mini):
    told = mini.generate(["Once upon a time"] * 8, 250, 0.6)
    assert sum(story.endswith("[END]") for story in told) >= 6
    named = [re.findall(r"\b(?:named|called) ([A-Z][a-z]+)", story) for story in told]
    kept = [story.count(names[0]) >= 2 for story, names in zip(told, named, strict=True) if names]
    assert sum(kept) >= 0.6 * len(kept)


@pytest.mark.slow
def test_the_command_makes_a_model_with_its_dictionaries_and_goes_on(tmp_path: Path, monkeypatch: Any, capsys: Any):
    monkeypatch.setitem(PRESETS, "mini", dataclasses.replace(PRESETS["mini"], steps=3))
    for name, value in {"STORIES": 150, "DICTIONARY_STEPS": 2, "ENTROPY_STORIES": 20, "KINDS": ("M", "A")}.items():
        monkeypatch.setattr(bundle, name, value)
    with as_users_run_it(), jax.numpy_dtype_promotion("standard"):
        bundle.bundle(tmp_path / "mini", work=tmp_path / "work")
        made = {path: path.read_bytes() for path in (tmp_path / "mini").rglob("*.safetensors")}
        bundle.bundle(tmp_path / "mini", work=tmp_path / "work")
    assert "nothing left to do" in capsys.readouterr().out
    assert len(made) == 9
    assert all(path.read_bytes() == content for path, content in made.items())
    lm = TinyModel(tmp_path / "mini")
    assert len(lm.dictionary_tags) == 8
    n_features = lm["M3"].dictionary.config.n_features
    assert lm["M3"]([[1, 2, 3]]).shape == (1, 3, n_features)
    assert 0 < n_features <= 512
    assert "| `A3` |" in (tmp_path / "mini" / "README.md").read_text("utf-8")
