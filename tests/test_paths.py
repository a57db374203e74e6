"""`~` means the home folder in every path that users give."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import as_users_run_it
from runs import write_counting_data

import convert_torch_weights
from tinymodel_jax import TinyModel
from tinymodel_jax.analysis.search.top_activations import load_top_activations, top_activations
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.commands import cli
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io import default_tokenizer
from tinymodel_jax.io.hub import published
from tinymodel_jax.io.torch_files import describe_torch_file, load_torch_file, save_torch_file
from tinymodel_jax.runtime.paths import CACHE_VARIABLE, user_path
from tinymodel_jax.text.tokenizer import Tokenizer
from tinymodel_jax.training.data_folder import open_data
from train.prepare import prepare
from train.run import open_run
from train.sweep import _fields_of


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder other than the current folder; fail if a test creates anything in the current folder."""
    folder, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(elsewhere)
    yield folder
    assert not list(elsewhere.iterdir())


def run(*arguments: str) -> None:
    with as_users_run_it():
        assert cli.main(list(arguments)) == 0


def test_what_is_no_home_stays_as_it_is(home):
    assert user_path("~/a") == home / "a"
    for path in ("a/~", "~nobody-of-this-name/a", "./~/a", "gs://a/~"):
        assert str(user_path(path)) == str(Path(path))


def test_models_and_dictionaries_are_saved_and_loaded_at_home(lm, home):
    lm.save_pretrained("~/model")
    lm["M0"].dictionary.save_pretrained(Path("~/dictionary"))
    assert (home / "model/config.json").is_file()
    assert (home / "dictionary/config.json").is_file()
    again = TinyModel("~/model")
    again.attach("M0", "~/dictionary")
    np.testing.assert_array_equal(again([[1, 2]]), lm([[1, 2]]))
    assert Dictionary.from_pretrained("~/dictionary").config == lm["M0"].dictionary.config


def test_tokenizers_are_saved_and_loaded_at_home(home, monkeypatch):
    storyworld.tokenizer().save_pretrained("~/tokenizer")
    assert Tokenizer.from_pretrained("~/tokenizer").vocab_size == storyworld.tokenizer().vocab_size
    with pytest.raises(FileNotFoundError, match=str(home / "gpt2")):
        Tokenizer.from_gpt2("~/gpt2")
    monkeypatch.setenv(default_tokenizer.ENVIRONMENT_VARIABLE, "~/tokenizer")
    default_tokenizer.default_tokenizer.cache_clear()
    assert default_tokenizer.default_tokenizer().fingerprint == storyworld.tokenizer().fingerprint
    default_tokenizer.default_tokenizer.cache_clear()


def test_the_cache_may_be_at_home(home, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, "~/cache")
    assert home / "cache" in published.cache_folder().parents


def test_torch_files_are_written_and_read_at_home(home, capsys):
    save_torch_file({"a": np.ones(3, np.float32)}, "~/a.pt")
    assert load_torch_file("~/a.pt")["a"].tolist() == [1, 1, 1]
    assert describe_torch_file("~/a.pt").tensors[0].shape == (3,)
    TinyModel("mini").save_pretrained("~/model")
    assert convert_torch_weights.main(["export-lm", "~/model", "~/model.safetensors"]) == 0
    assert convert_torch_weights.main(["lm", "~/model.safetensors", "~/copy", "--n-heads", "4"]) == 0
    assert convert_torch_weights.main(["inspect", "~/a.pt"]) == 0
    assert (home / "copy/config.json").is_file()
    assert str(home / "a.pt") in capsys.readouterr().out


def test_a_search_is_saved_and_found_at_home(lm, home):
    found = top_activations(lm, "M0", np.array([[3, 1, 4, 1]]), work_file=Path("~/work"))
    found.save("~/found.safetensors")
    assert {path.name for path in home.iterdir()} == {"work", "found.safetensors"}
    assert load_top_activations("~/found.safetensors").tag == "M0"


def test_prepared_data_is_opened_at_home(home):
    (home / "data").mkdir()
    write_counting_data(home / "data")
    assert open_data("~/data").folder == home / "data"


def test_training_programs_read_and_write_at_home(home):
    (home / "stories.txt").write_text("Mia saw a dog.\nLeo saw a cat.\n")
    storyworld.tokenizer().save_pretrained(home / "tokenizer")
    prepare("~/stories.txt", "~/data", tokenizer="~/tokenizer", row_length=16, workers=1)
    assert (home / "data/data.json").is_file()
    with open_run("~/run", {"steps": 1}, ()) as opened:
        assert str(opened.folder) == str(home / "run")
    (home / "recipe.json").write_text('{"k": 4}')
    assert _fields_of("~/recipe.json") == {"k": 4}


def test_commands_read_and_write_at_home(home):
    mini = TinyModel("mini")
    (home / "stories.txt").write_text("Mia saw a dog.\nLeo saw a cat.\n")
    mini["M0"].dictionary.save_pretrained(home / "own")
    of_data = ("--model", "mini", "--data", "~/stories.txt")
    run("eval", *of_data, "--dictionaries", "~/own", "--out", "~/e.json")
    run("top", *of_data, "--site", "M0", "--dictionary", "~/own", "-o", "~/top.safetensors")
    run("patch", "Mia saw a dog", "Mia saw a cat", "--model", "mini", "--hooks", "hook_mlp_out", "--out=~/p.svg")
    run("features", "--model", "mini", "--site", "M0", "--stories", "~/stories.txt", "--limit", "1")
    assert {"e.json", "e.png", "top.safetensors", "p.svg"} <= {path.name for path in home.iterdir()}
    assert json.loads((home / "e.json").read_text())["dictionaries"][0]["name"] == "own"
