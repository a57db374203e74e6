"""`tinymodel eval`: its files, its output and its errors."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import as_users_run_it, error_line, make_dictionary, param_shapes, random_params
from runs import write_counting_data

from tinymodel_jax import TinyModel, evaluate
from tinymodel_jax.analysis.evaluation.evaluation import density_histogram, numbers_of
from tinymodel_jax.analysis.evaluation.sparse_lm import evaluate_sparse_model
from tinymodel_jax.commands import cli
from tinymodel_jax.commands.inputs import open_rows
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary

STORIES = ["Once upon a time there was a dog.", "Mia went to the lake.", "Leo was happy."]


@pytest.fixture
def stories(tmp_path: Path) -> str:
    path = tmp_path / "stories.txt"
    path.write_text("\n".join(STORIES) + "\n")
    return str(path)


@pytest.fixture
def failing(story_model: Path, capsys: pytest.CaptureFixture[str]):
    """Run a command that must fail; return its one-line message."""

    def run(*arguments: str) -> str:
        with as_users_run_it():
            assert cli.main(["eval", "--model", str(story_model), *arguments]) == 1
        return error_line(capsys)

    return run


def test_the_file_holds_what_the_function_measures_and_the_table_shows_it(story_model, stories, tmp_path, capsys):
    lm, out = TinyModel(story_model), tmp_path / "runs" / "eval.json"
    lm["M1"].dictionary.save_pretrained(tmp_path / "kept" / "M1[topk]:dog:")
    options = ["--sites", "A1", "--dictionaries", str(tmp_path / "kept"), "--data", stories, "-o", str(out)]
    assert cli.main(["eval", "--model", str(story_model), *options]) == 0
    content = json.loads(out.read_text())
    assert [(d["name"], d["site"]) for d in content["dictionaries"]] == [("A1", "A1"), ("M1[topk]:dog:", "M1")]
    assert (content["rows"], content["model"]) == (3, str(story_model))
    rows = np.asarray(open_rows(lm, stories, 256))
    expected = evaluate(lm, [lm["A1"].dictionary, lm["M1"].dictionary], rows)
    for record, found in zip(content["dictionaries"], expected, strict=True):
        assert record["results"] == pytest.approx(numbers_of(found), rel=1e-6)
        assert record["margins"] == pytest.approx(found.margins, rel=1e-6)
        assert sum(record["density"]["features"]) + record["density"]["dead"] == len(found.frequency)
    assert (tmp_path / "runs" / "eval.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "M1[topk]:dog:" in shown
    assert f"{content['dictionaries'][0]['results']['explained_variance']:.4f} ±" in shown


def test_the_sparse_model_takes_the_transcoders_that_are_given(story_model, stories, tmp_path, failing, capsys):
    lm = TinyModel(story_model)
    own = lm["M1"].dictionary
    silent = Dictionary.from_params(own.config, own.params | {"W_dec": 0 * own.params["W_dec"]})
    silent.save_pretrained(tmp_path / "silent")
    data = ["--data", stories, "--sparse-model"]

    def measured(*options: str, named: Sequence[str] = ()) -> dict:
        assert cli.main(["eval", "--model", str(story_model), *data, *options, "--json"]) == 0
        content = json.loads(capsys.readouterr().out)
        assert content["sparse_model"]["sites"] == ["M0", "M1"]
        assert [record["name"] for record in content["dictionaries"]] == list(named)
        return content["sparse_model"]["results"]

    results = measured()
    assert results["ce_with_errors"] == pytest.approx(results["ce_clean"], abs=1e-4)
    changed = measured("--dictionaries", str(tmp_path / "silent"), named=["silent"])
    lm.attach("M1", silent)
    expected = evaluate_sparse_model(lm, np.asarray(open_rows(lm, stories, 256)))
    assert changed["ce_sparse"] == pytest.approx(expected.ce_sparse, abs=1e-4)
    assert changed["ce_sparse"] != pytest.approx(results["ce_sparse"], abs=1e-4)
    own.save_pretrained(tmp_path / "other")
    both = ["--dictionaries", str(tmp_path / "silent"), str(tmp_path / "other")]
    assert "silent and other are both of M1" in failing(*data, *both)


def test_what_cannot_be_measured_is_one_line(failing, stories, tmp_path):
    make_dictionary("blocks.0.hook_attn_out", "blocks.0.hook_attn_out", d_in=8, d_out=8).save_pretrained(
        tmp_path / "narrow"
    )
    make_dictionary("x", "x").save_pretrained(tmp_path / "arrays")
    (tmp_path / "empty").mkdir()
    data = ["--data", stories]
    assert "nothing to measure" in failing(*data)
    assert "layer 9 does not exist" in failing("--sites", "A9", *data)
    assert "--sites 'M1N5' names a feature" in failing("--sites", "M1N5", *data)
    assert "give the name of a .json file" in failing("--sites", "A1", *data, "-o", "eval.png")
    assert "cannot be made" in failing("--sites", "A1", *data, "-o", f"{stories}/eval.json")
    assert "does not exist" in failing("--dictionaries", str(tmp_path / "none"), *data)
    assert f"--dictionaries {stories} is a file; name a" in failing("--dictionaries", stories, *data)
    assert "holds no dictionary" in failing("--dictionaries", str(tmp_path / "empty"), *data)
    assert "d_in=8" in failing("--dictionaries", str(tmp_path / "narrow"), *data)
    assert "has no site yet" in failing("--dictionaries", str(tmp_path / "arrays"), *data)
    (tmp_path / "counting").mkdir()
    counting = str(write_counting_data(tmp_path / "counting"))  # fewer ids than the model's: its specials are words
    assert "has 64 ids in rows of 24; the model takes 1024" in failing("--sites", "A1", "--data", counting)


def test_a_model_whose_output_overflows_has_a_dash_for_its_cross_entropy(tmp_path, capsys, monkeypatch, no_type_checks):
    config = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_mlp=32, n_ctx=32, d_vocab=64)
    params = random_params(param_shapes(config), 0)
    lm = TinyModel.from_params(config, params | {"W_U": params["W_U"] * 3e38})
    lm.attach("A0", make_dictionary("blocks.0.hook_attn_out", "blocks.0.hook_attn_out"))
    lm.save_pretrained(tmp_path / "lm")
    options = ["--model", str(tmp_path / "lm"), "--sites", "A0", "--data", str(write_counting_data(tmp_path))]
    assert cli.main(["eval", *options, "--limit", "2"]) == 0
    assert "CE clean – nats" in capsys.readouterr().out
    # missing dictionaries are reported before measuring
    monkeypatch.setattr("tinymodel_jax.analysis.evaluation.evaluation.evaluate", None)
    assert cli.main(["eval", *options, "--sparse-model"]) == 1
    assert "'M0': this model has no dictionary there (it has: A0)" in error_line(capsys)


@pytest.mark.parametrize("command", ["eval", "importance", "top", "dashboard"])
def test_a_limit_of_no_rows_is_refused_before_anything_is_loaded(monkeypatch, tmp_path, capsys, command):
    monkeypatch.setattr("tinymodel_jax.lm.TinyModel.__init__", lambda *_, **__: pytest.fail("a model is loaded"))
    sites = ["--sites", "M0"] if command == "eval" else ["--site", "M0"]
    out = ["--out", str(tmp_path / "pages")] if command == "dashboard" else []
    assert cli.main([command, *sites, "--data", "storyworld", "--limit", "0", *out]) == 1
    assert "--limit 0 must be 1 or more" in error_line(capsys)


def test_densities_count_every_feature_once():
    features, dead = density_histogram(np.array([0, 0, 1e-9, 0.02, 0.5, 1.0]))
    assert (sum(features), dead) == (4, 2)
    assert (features[0], features[-1]) == (1, 2)


def test_one_row_has_no_interval(story_model, stories, capsys):
    command = ["--model", str(story_model), "--data", stories, "--limit", "1"]
    with as_users_run_it():
        assert cli.main(["eval", "--sites", "A1", *command]) == 0
        assert cli.main(["importance", "--site", "M1", *command]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "CE and KL are in nats." in shown
    assert "on one row: nats" in shown
    assert "±" not in shown
    assert "interval" not in shown
