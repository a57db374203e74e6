"""`tinymodel sweep`, `importance` and `patch`."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import error_line

from tinymodel_jax import TinyModel
from tinymodel_jax.analysis.effects import sweeps
from tinymodel_jax.commands.cli import main
from tinymodel_jax.model import interventions

PROMPT = "Once upon a time, there was a girl named Lily. One day,"
OTHER = PROMPT.replace("girl named Lily", "boy named Tim")


@pytest.fixture
def run(story_model: Path, no_type_checks: None, capsys: pytest.CaptureFixture[str]):
    """Run a command on the model of these tests, which must succeed; return what it prints."""

    def run(*arguments: str) -> str:
        assert main([*arguments, "--model", str(story_model)]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def failure(story_model: Path, no_type_checks: None, capsys: pytest.CaptureFixture[str]):
    """Run a command on the model of these tests, which must fail; return its one line."""

    def run(*arguments: str) -> str:
        assert main([*arguments, "--model", str(story_model)]) == 1
        return error_line(capsys)

    return run


@pytest.fixture
def lm(story_model: Path) -> TinyModel:
    return TinyModel(story_model)


def test_a_prompt_is_swept(run, lm):
    found = json.loads(run("sweep", PROMPT, "--site", "M1", "--json"))
    row = [[lm.config.begin_id, *lm.tokenizer.encode(PROMPT)]]
    token = int(np.asarray(lm(row))[0, -1].argmax())
    assert found["answer"] == lm.tokenizer.decode([token])
    assert -1 <= found["next_logprob_rank_correlation"] <= 1
    first = found["features"][0]
    edited, _ = lm.run_with_hooks(row, interventions.ablate(lm["M1"].dictionary, first["feature"]))
    assert first["next_logprob"] == pytest.approx(float((edited - lm(row))[0, -1, token]), abs=1e-4)
    moved = np.asarray(edited - lm(row)).mean(axis=(0, 1))
    moved -= moved.mean()
    assert abs(first["tokens"][0]["logit"]) == pytest.approx(np.abs(moved).max(), abs=1e-4)
    kl = [entry["kl"] for entry in found["features"]]
    assert kl == sorted(kl, reverse=True)


def test_the_token_that_is_followed_is_named(run, lm):
    found = json.loads(run("sweep", PROMPT, "--site", "M1", "--answer", " Tim", "--json"))
    assert found["answer"] == " Tim"
    row = [[lm.config.begin_id, *lm.tokenizer.encode(PROMPT)]]
    features = [entry["feature"] for entry in found["features"]]
    changes = sweeps.ablate(lm, "M1", row, features, next_ids=lm.tokenizer.encode(" Tim")).next_logprob
    assert [entry["next_logprob"] for entry in found["features"]] == pytest.approx(changes, abs=1e-5)


@pytest.mark.parametrize("metric", ["loss", "next_logprob"])
def test_the_features_are_ranked_by_the_metric(run, lm, metric):
    found = json.loads(run("sweep", PROMPT, "--site", "M1", "--metric", metric, "--json"))
    assert found["ranked_by"] == metric
    changes = [abs(entry[metric]) for entry in found["features"]]
    assert changes == sorted(changes, reverse=True)
    assert max(changes) > 0


def test_a_logit_difference_ranks_the_features_and_is_shown(run, lm, monkeypatch):
    options = ("sweep", PROMPT, "--site", "M1", "--logit-difference", " Lily", " Tim")
    found = json.loads(run(*options, "--json"))
    assert (found["ranked_by"], found["logit_difference"]) == ("logit_difference", [" Lily", " Tim"])
    assert -1 <= found["logit_difference_rank_correlation"] <= 1
    row = [[lm.config.begin_id, *lm.tokenizer.encode(PROMPT)]]
    lily, tim = (lm.to_single_token(text) for text in (" Lily", " Tim"))
    clean = lm.logits(row)[0, -1]
    for entry in found["features"][:3]:
        hooks = interventions.ablate(lm["M1"].dictionary, entry["feature"])
        changed = lm.run_with_hooks(row, hooks)[0][0, -1]
        change = (changed[lily] - changed[tim]) - (clean[lily] - clean[tim])
        assert entry["logit_difference"] == pytest.approx(float(change), abs=1e-4)
    changes = [abs(entry["logit_difference"]) for entry in found["features"]]
    assert changes == sorted(changes, reverse=True)
    monkeypatch.setenv("COLUMNS", "200")
    table = run(*options, "--top", "2")
    assert "logit ' Lily' - ' Tim'" in table
    shown = [int(line.split("│")[1]) for line in table.splitlines() if line.startswith("│")]
    assert shown == [entry["feature"] for entry in found["features"][:2]]
    assert f"logit difference {found['logit_difference_rank_correlation']}" in table


def test_metric_options_are_refused_before_a_model_is_loaded(failure, monkeypatch):
    monkeypatch.setattr("tinymodel_jax.lm.TinyModel", None)
    difference = ("--logit-difference", " Lily", " Tim")
    for command in (("sweep", PROMPT, "--site", "M1"), ("patch", PROMPT, OTHER)):
        assert "cannot be combined with --metric loss; give one" in failure(*command, *difference, "--metric", "loss")
        assert "both tokens are ' Tim'" in failure(*command, "--logit-difference", " Tim", " Tim")
    assert "--readout 'M2N5' names a feature" in failure("sweep", PROMPT, "--site", "M1", "--readout", "M2N5")


@pytest.mark.parametrize(
    "command",
    [
        ("importance", "--site", "M1"),
        ("top", "--site", "M1"),
        ("eval", "--sites", "M1"),
        ("dashboard", "--site", "M1", "-o", "pages"),
    ],
)
def test_missing_data_is_reported_before_a_model_is_loaded(failure, tmp_path: Path, monkeypatch, command):
    monkeypatch.setattr("tinymodel_jax.lm.TinyModel", None)
    monkeypatch.chdir(tmp_path)
    for name in ("none.txt", "none.jsonl.gz", "none"):
        data = tmp_path / name
        assert f"{data} does not exist" in failure(*command, "--data", str(data))


def test_the_table_of_patches_numbers_repeated_tokens(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    prompts = ("Tim and Tim saw  Tim", "Lily and Lily saw  Lily")
    shown = run("patch", *prompts, "--logit-difference", " Lily", " Tim", "--hooks", "hook_resid_pre", "hook_mlp_out")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["hook_resid_pre", *[""] * 4, "hook_mlp_out", *[""] * 4]
    assert {len(row[2].split()) for row in rows} == {2}  # a number and a token
    assert "-0.00" not in shown


def test_features_are_steered_and_read_out(story_model, no_type_checks, capsys, monkeypatch):
    monkeypatch.setattr("tinymodel_jax.runtime.progress.SECONDS_OF_SILENCE", 0.0)
    monkeypatch.setattr("tinymodel_jax.analysis.effects.sweeps.SMALL", 0)  # one chunk per feature
    options = ("--kind", "steer", "--amount", "1e-5", "--features", "3", "4", "--readout", "M1")
    command = ["sweep", "One day,", "--site", "M0", "--model", str(story_model), *options]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "steer each of 2 features of M0" in shown.out
    assert "readout" in shown.out
    assert shown.err == "sweeping: 1 of 2\n"
    assert main([*command, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["features"][0]
    changes = [x["change"] for x in first["readout"]] + [first["kl"]]
    assert changes != [round(change, 6) for change in changes]  # small ones keep their digits


def test_causal_importance_is_written(run, tmp_path: Path):
    stories, out = tmp_path / "stories.txt", tmp_path / "new" / "importance.json"
    stories.write_text(f"{PROMPT}\n{OTHER}\n")
    shown = run("importance", "--site", "M1", "--data", str(stories), "-o", str(out), "--top", "3")
    table = json.loads(out.read_text())
    assert (table["rows"], table["site"], table["limit"], table["data"]) == (2, "M1", 64, str(stories))
    assert Path(table["model"]).is_dir()
    kl = [entry["kl_all"][0] for entry in table["features"]]
    assert kl == sorted(kl, reverse=True)
    assert "95 % intervals" in " ".join(shown.split())
    assert {path.name for path in out.parent.iterdir()} == {"importance.json", "importance.png"}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_file_of_another_run_is_never_replaced_and_the_same_run_is_read(run, failure, tmp_path: Path, monkeypatch):
    stories, out = tmp_path / "stories.txt", tmp_path / "importance.json"
    stories.write_text(f"{PROMPT}\n{OTHER}\n")
    options = ("importance", "--site", "M1", "--data", str(stories), "-o", str(out))
    run(*options, "--limit", "1")
    before = out.read_bytes()
    monkeypatch.setattr("tinymodel_jax.analysis.effects.importance.ablate", None)  # nothing is measured again
    assert json.loads(run(*options, "--limit", "1", "--json")) == json.loads(before)
    with monkeypatch.context() as patch:
        patch.setattr("tinymodel_jax.lm.TinyModel", None)  # refused before a model is loaded
        assert "holds a run with limit 1, not 2" in failure(*options, "--limit", "2")
    stories.write_text(f"{OTHER}\n")
    assert "was measured with other rows; name another file" in failure(*options, "--limit", "1")
    assert out.read_bytes() == before
    out.write_text("{}")
    assert "is not a file of this version of `tinymodel importance`" in failure(*options)
    assert out.read_text() == "{}"


def test_importance_that_cannot_be_written_is_not_lost(run, failure, tmp_path: Path, monkeypatch):
    stories, out = tmp_path / "stories.txt", tmp_path / "importance.json"
    stories.write_text(f"{PROMPT}\n")
    options = ("importance", "--site", "M1", "--data", str(stories), "-o", str(out), "--json")

    def full(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tinymodel_jax.commands.importance.replace_file", full)
        assert "No space left" in failure(*options)
    assert (tmp_path / "importance.json.work").exists()
    monkeypatch.setattr("tinymodel_jax.analysis.effects.importance.ablate", None)  # nothing is measured again
    assert json.loads(run(*options))["rows"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"stories.txt", "importance.json", "importance.png"}


def test_prompts_with_one_answer_are_compared_by_its_log_probability(run, failure):
    alike = ("patch", "Once upon a time, there was a dog", "Once upon a time, there was a cat")
    assert "--answer ' named' is the token of --metric next_logprob" in failure(*alike, "--answer", " named")
    assert "cannot be combined" in failure(*alike, "--logit-difference", " Tim", " Lily", "--metric", "loss")
    assert "--hooks hook_zz: expected hook points of a block" in failure(*alike, "--hooks", "hook_zz")
    answer = json.loads(run(*alike, "--hooks", "hook_mlp_out", "--json"))["answer"]
    found = json.loads(run(*alike, "--hooks", "hook_mlp_out", "--json"))
    assert (found["answer"], found["wrong"]) == (answer, None)
    assert found["clean"] < 0
    assert f"log-probability of {answer!r}: clean" in run(*alike, "--hooks", "hook_mlp_out")


def test_patching_compares_two_answers_and_draws_it(story_model, no_type_checks, capsys, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("tinymodel_jax.runtime.progress.SECONDS_OF_SILENCE", 0.0)
    picture = tmp_path / "new" / "patching.png"
    tokens = ("--logit-difference", " Lily", " Tim", "--model", str(story_model))
    options = ("--hooks", "hook_resid_pre", "attn.hook_z", "-o", str(picture), "--json")
    assert main(["patch", PROMPT, OTHER, *tokens, *options]) == 0
    shown = capsys.readouterr()
    assert shown.err == "patching: 1 of 2\n"
    found = json.loads(shown.out)
    assert (found["answer"], found["wrong"]) == (" Lily", " Tim")
    stream, heads = found["tables"]
    changed = np.abs(stream["effects"][0]) > 1e-4
    assert {stream["labels"][place].split()[1] for place in np.flatnonzero(changed)} == {"girl", "Lily"}
    assert heads["axis"] == "head"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_leaves_the_effects_printed(
    story_model, no_type_checks, capsys, tmp_path, monkeypatch
):
    def full(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    options = (
        "--logit-difference",
        " Lily",
        " Tim",
        "--hooks",
        "hook_resid_pre",
        "-o",
        str(tmp_path / "patching.png"),
    )
    assert main(["patch", PROMPT, OTHER, *options, "--json", "--model", str(story_model)]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["answer"] == " Lily"
    assert "cannot write patching.png" in shown.err
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_one_line(failure, tmp_path: Path):
    sweep, importance = ("sweep", "One day,", "--site"), ("importance", "--data", "storyworld", "--site")
    assert "needs --amount" in failure(*sweep, "M1", "--kind", "clamp")
    assert "takes no --amount" in failure(*sweep, "M1", "--amount", "1")
    assert "give a prompt; `tinymodel importance` takes" in failure("sweep", "--site", "M1")
    assert "out of range" in failure(*sweep, "M1", "--features", "9999")
    assert "name one, as ' dog'" in failure(*sweep, "M1", "--answer", "two words")
    assert "name one, as ' dog'" in failure(*sweep, "M1", "--logit-difference", " dog", "two words")
    assert "finite" in failure(*sweep, "M1", "--kind", "steer", "--amount", "1e39")
    readout = failure(*sweep, "M1", "--readout", "Mo1")
    assert "reads blocks.1.hook_mlp_out, and M1 writes to blocks.1.hook_mlp_out: a readout must come later" in readout
    for command in (sweep, importance):
        assert "--site 'M1N5' names a feature; name the site, 'M1'" in failure(*command, "M1N5")
        assert "--top 0 must be 1 or more" in failure(*command, "M1", "--top", "0")
    assert "--limit 0 must be 1 or more" in failure(*importance, "M1", "--limit", "0")
    assert "name of a .json file" in failure(*importance, "M1", "-o", str(tmp_path / "x"))
    assert "is a folder; name a file" in failure(*importance, "M1", "-o", str(tmp_path))
    assert "17 and 15 tokens" in failure("patch", PROMPT, "Once upon a time, there was a girl. One day,")
    assert ".png or .svg" in failure("patch", PROMPT, OTHER, "-o", str(tmp_path / "x.txt"))
