"""What every command shares: progress of long work, and JSON that every program can read."""

import json

import pytest
from etils import epath

from tinymodel_jax.commands import frame, options
from tinymodel_jax.commands.options import make_output_folder, parse_sites, prepare_output, work_file
from tinymodel_jax.runtime import progress
from train import dictionary_results


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests advance."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_long_work_says_how_far_it_is_where_there_is_no_terminal(clock, capsys):
    done = []
    for row in progress.with_progress(list(range(60)), "reading"):
        done.append(row)
        clock[0] += 1
    assert done == list(range(60))
    assert capsys.readouterr().err.splitlines() == [
        "reading: 2 of 60",
        "reading: 22 of 60",
        "reading: 42 of 60",
    ]


def test_what_is_said_of_long_work_may_change_as_it_goes_on(clock, capsys):
    done: list[int] = []
    for row in progress.with_progress(range(3), lambda: f"done {done}"):
        done.append(row)
        clock[0] += 30
    assert capsys.readouterr().err.splitlines() == ["done [0]: 1 of 3", "done [0, 1]: 2 of 3"]


def test_quick_work_says_nothing(clock, capsys):
    for _ in progress.with_progress(list(range(60)), "reading"):
        clock[0] += 0.01
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_no_json_is_an_error(number, capsys):
    def command() -> None:
        frame.print_json({"a": [1.0, number]})

    def other() -> None:
        frame.print_json({"a": 1.0})

    commands = {"one": command, "other": other}
    assert frame.run_commands("program", "", commands, ["one"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("program: --json: JSON cannot hold a number of the result")
    assert frame.run_commands("program", "", commands, ["other"]) == 0
    assert json.loads(capsys.readouterr().out) == {"a": 1.0}


def test_the_table_of_a_training_run_shows_any_folder(capsys):
    results = {**dict.fromkeys(dictionary_results.HELD_OUT, 0.5), "tokens": 9}
    record = {"folder": "dictionaries/M1[topk]:dog:", "results": results, "margins": {}}
    dictionary_results._print_table([record], epath.Path("r[un]"))
    shown = capsys.readouterr().out
    assert "r[un]/sweep.json" in shown
    assert "│ M1[topk]:dog: │" in shown


def test_a_table_that_is_piped_is_whole(capsys):
    columns = [f"column {number}" for number in range(30)]
    frame.print_table(columns, [["a value of its own"] * 30], title="title")
    shown = capsys.readouterr().out
    assert all(column in shown for column in columns)
    assert shown.count("a value of its own") == 30
    assert "…" not in shown


def test_a_list_of_sites_may_have_spaces_and_repeat():
    assert parse_sites("--sites", "M1, A0,M1,") == ["M1", "A0"]
    assert parse_sites("--sites", "") == []
    for text, says in [
        ("M1N5", "--sites 'M1N5' names a feature; name the site, 'M1'"),
        ("X", "not a dictionary tag"),
    ]:
        with pytest.raises(ValueError, match=says):
            parse_sites("--sites", text)


def test_what_cannot_be_written_is_refused_before(tmp_path):
    prepare_output("--out", None)
    prepare_output("--out", tmp_path / "file")
    with pytest.raises(ValueError, match="is a folder; name a file"):
        prepare_output("--out", tmp_path)
    prepare_output("--out", tmp_path / "its" / "folder" / "file")
    assert list((tmp_path / "its" / "folder").iterdir()) == []
    (tmp_path / "made").write_text("")
    for folder in (tmp_path / "made", tmp_path / "made" / "inside"):
        with pytest.raises(OSError, match=f"--out: the folder {folder} cannot be made"):
            make_output_folder("--out", folder)
    make_output_folder("--out", tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    assert work_file(tmp_path / "file") == tmp_path / "file.work"
    assert work_file(None) is None


def test_a_folder_that_refuses_files_is_refused_before(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(options.tempfile, "NamedTemporaryFile", refuse)  # root may write anywhere
    for prepare in (prepare_output, make_output_folder):
        with pytest.raises(PermissionError, match="cannot be written to: Permission denied"):
            prepare("--out", tmp_path / "new")
