"""`tinymodel sweep`, `importance` and `patch` on the bundled model."""

import json
from pathlib import Path

import numpy as np
import pytest

from tinymodel_jax import TinyModel
from tinymodel_jax.analysis.effects import sweeps
from tinymodel_jax.commands.cli import main
from tinymodel_jax.model import interventions

DATA = Path(__file__).parent / "data"
MINI = ("--model", "mini")
PROMPT = "Once upon a time, there was a girl named Lily. One day,"
OTHER = PROMPT.replace("girl named Lily", "boy named Tim")


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line that a command fails with."""
    assert main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_prompt_is_swept(capsys, no_type_checks):
    assert main(["sweep", PROMPT, "--site", "M3", *MINI, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == " Lily"
    assert found["next_logprob_rank_correlation"] > 0.5
    first = found["features"][0]
    lm = TinyModel("mini")
    row = [[lm.config.begin_id, *lm.tokenizer.encode(PROMPT)]]
    edited, _ = lm.run_with_hooks(row, interventions.ablate(lm["M3"].dictionary, first["feature"]))
    token = lm.tokenizer.encode(" Lily")[0]
    assert first["next_logprob"] == pytest.approx(float((edited - lm(row))[0, -1, token]), abs=1e-4)
    moved = np.asarray(edited - lm(row)).mean(axis=(0, 1))
    moved -= moved.mean()
    most = int(np.abs(moved).argmax())
    assert first["tokens"][0] == {"token": lm.tokenizer.decode([most]), "logit": pytest.approx(moved[most], abs=1e-4)}
    smallest = min(entry["kl"] for entry in found["features"] if entry["kl"])
    assert smallest < 1e-7  # which no number of decimals would show


def test_the_token_that_is_followed_is_named(capsys, no_type_checks):
    options = ("sweep", PROMPT, "--site", "M3", *MINI, "--answer", " Tim", "--json")
    assert main(options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == " Tim"
    lm = TinyModel("mini")
    row = [[lm.config.begin_id, *lm.tokenizer.encode(PROMPT)]]
    features = [entry["feature"] for entry in found["features"]]
    changes = sweeps.ablate(lm, "M3", row, features, next_ids=lm.tokenizer.encode(" Tim")).next_logprob
    assert [entry["next_logprob"] for entry in found["features"]] == pytest.approx(changes, abs=1e-5)
    assert np.abs(changes - sweeps.ablate(lm, "M3", row, features).next_logprob).max() > 0.1


def test_features_are_steered_and_read_out(capsys, no_type_checks, monkeypatch):
    monkeypatch.setattr("tinymodel_jax.runtime.progress.SECONDS_OF_SILENCE", 0.0)
    monkeypatch.setattr("tinymodel_jax.analysis.effects.sweeps.SMALL", 0)  # a chunk for each
    options = ("--kind", "steer", "--amount", "0.01", "--features", "3", "4", "--readout", "M3")
    assert main(["sweep", "One day,", "--site", "M2", *MINI, *options]) == 0
    shown = capsys.readouterr()
    assert "steer each of 2 features of M2" in shown.out
    assert "readout" in shown.out
    assert shown.err == "sweeping: 1 of 2\n"
    assert main(["sweep", "One day,", "--site", "M2", *MINI, *options, "--json"]) == 0
    changes = [x["change"] for x in json.loads(capsys.readouterr().out)["features"][0]["readout"]]
    assert changes != [round(change, 6) for change in changes]  # small ones keep their digits


def test_a_reference_file_of_another_width_is_swept(capsys, no_type_checks):
    files = ("--model", str(DATA / "lm_f32_zip.pt"), "--dictionary", str(DATA / "sparse_T1_f32_zip.pt"))
    options = ("sweep", "1 2 3", "--ids", "--site", "M1", *files, "--json")
    assert "n_heads" in failure(capsys, *options)
    assert main([*options, "--n-heads", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "1 2 3"


def test_causal_importance_is_written(capsys, no_type_checks, tmp_path: Path):
    stories, out = tmp_path / "stories.txt", tmp_path / "new" / "importance.json"
    stories.write_text(f"{PROMPT}\n{OTHER}\n")
    assert main(["importance", "--site", "M3", *MINI, "--data", str(stories), "-o", str(out), "--top", "3"]) == 0
    table = json.loads(out.read_text())
    assert (table["rows"], table["site"]) == (2, "M3")
    kl = [entry["kl_all"][0] for entry in table["features"]]
    assert kl == sorted(kl, reverse=True)
    assert "95 % intervals" in " ".join(capsys.readouterr().out.split())
    assert {path.name for path in out.parent.iterdir()} == {"importance.json", "importance.png"}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_importance_that_cannot_be_written_is_not_lost(capsys, no_type_checks, tmp_path: Path, monkeypatch):
    stories, out = tmp_path / "stories.txt", tmp_path / "importance.json"
    stories.write_text("One day,\n")
    options = ("importance", "--site", "M3", *MINI, "--data", str(stories), "-o", str(out), "--json")

    def full(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tinymodel_jax.commands.importance.replace_file", full)
        assert "No space left" in failure(capsys, *options)
    assert (tmp_path / "importance.json.work").exists()
    monkeypatch.setattr("tinymodel_jax.analysis.effects.importance.ablate", None)  # nothing is measured again
    assert main(options) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"stories.txt", "importance.json", "importance.png"}


def test_prompts_that_go_on_alike_are_compared_by_the_answer_s_log_probability(capsys, no_type_checks):
    alike = ("patch", "Once upon a time, there was a dog", "Once upon a time, there was a cat", *MINI)
    assert main([*alike, "--hooks", "hook_mlp_out", "--answer", " named", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["answer"], found["wrong"]) == (" named", None)
    assert found["clean"] < 0
    assert main([*alike, "--hooks", "hook_mlp_out", "--answer", " named"]) == 0
    assert "log-probability of ' named': clean" in capsys.readouterr().out
    assert "--wrong ' named' is the answer itself" in failure(capsys, *alike, "--answer", " named", "--wrong", " named")


def test_patching_finds_the_name_and_draws_it(capsys, no_type_checks, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("tinymodel_jax.runtime.progress.SECONDS_OF_SILENCE", 0.0)
    picture = tmp_path / "new" / "patching.png"
    options = ("--hooks", "hook_resid_pre", "attn.hook_z", "-o", str(picture), "--json")
    assert main(["patch", PROMPT, OTHER, *MINI, *options]) == 0
    shown = capsys.readouterr()
    assert shown.err == "patching: 1 of 2\n"
    found = json.loads(shown.out)
    assert (found["answer"], found["wrong"]) == (" Lily", " Tim")
    stream, heads = found["tables"]
    assert "Lily" in stream["labels"][int(np.argmax(stream["effects"][0]))]
    assert heads["axis"] == "head"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_leaves_the_effects_printed(capsys, no_type_checks, tmp_path, monkeypatch):
    def full(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    options = ("--hooks", "hook_resid_pre", "-o", str(tmp_path / "patching.png"), "--json")
    assert main(["patch", PROMPT, OTHER, *MINI, *options]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["answer"] == " Lily"
    assert "cannot write patching.png" in shown.err
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_one_line(capsys, no_type_checks, tmp_path: Path):
    sweep, importance = ("sweep", "One day,", *MINI, "--site"), ("importance", *MINI, "--data", "storyworld", "--site")
    assert "needs --amount" in failure(capsys, *sweep, "M3", "--kind", "clamp")
    assert "takes no --amount" in failure(capsys, *sweep, "M3", "--amount", "1")
    assert "give a prompt; `tinymodel importance` takes" in failure(capsys, "sweep", "--site", "M3", *MINI)
    assert "out of range" in failure(capsys, *sweep, "M3", "--features", "9999")
    assert "name one, as ' dog'" in failure(capsys, *sweep, "M3", "--answer", "two words")
    assert "finite" in failure(capsys, *sweep, "M3", "--kind", "steer", "--amount", "1e39")
    readout = failure(capsys, *sweep, "M2", "--readout", "Mo2")
    assert "reads blocks.2.hook_mlp_out, and M2 writes to blocks.2.hook_mlp_out: a readout must read further" in readout
    for command in (sweep, importance):
        assert "--site 'M2N5' names a feature; name the site, 'M2'" in failure(capsys, *command, "M2N5")
        assert "--top 0 must be 1 or more" in failure(capsys, *command, "M3", "--top", "0")
    assert "name of a .json file" in failure(capsys, *importance, "M3", "-o", str(tmp_path / "x"))
    assert "is a folder; name a file" in failure(capsys, *importance, "M3", "-o", str(tmp_path))
    assert "17 and 15 tokens" in failure(capsys, "patch", PROMPT, "Once upon a time, there was a girl. One day,", *MINI)
    assert ".png or .svg" in failure(capsys, "patch", PROMPT, OTHER, *MINI, "-o", str(tmp_path / "x.txt"))
