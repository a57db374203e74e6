"""The commands, run as a user runs them: output, exit status, one-line errors."""

import gzip
import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import error_line

import convert_torch_weights
import tinymodel_jax
from tinymodel_jax.bundled import MINI
from tinymodel_jax.commands import cli
from tinymodel_jax.commands.inputs import read_stories
from tinymodel_jax.io.artifacts import load_model
from tinymodel_jax.io.torch_files import load_torch_file
from tinymodel_jax.lm import TinyModel
from train.__main__ import PROGRAMS
from train.__main__ import main as train_main

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parent.parent
GOLDEN_PROMPT = "208 5 17 100 3 42"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "lm"
    assert convert_torch_weights.main(["lm", str(DATA / "lm_f32_zip.pt"), str(folder), "--n-heads", "4"]) == 0
    return folder


def test_a_converted_model_gives_the_same_log_probabilities_as_the_file(model_folder: Path) -> None:
    tok_ids = np.arange(20).reshape(2, 10)
    from_file = TinyModel(DATA / "lm_f32_zip.pt", n_heads=4)
    np.testing.assert_array_equal(TinyModel(model_folder)(tok_ids), from_file(tok_ids))


def test_converting_keeps_bfloat16_to_the_bit(tmp_path: Path) -> None:
    assert convert_torch_weights.main(["lm", str(DATA / "lm_bf16_zip.pt"), str(tmp_path / "lm"), "--n-heads", "4"]) == 0
    params = load_model(tmp_path / "lm").params
    original = load_torch_file(DATA / "lm_bf16_zip.pt")["embed.weight"]
    assert params["W_E"].dtype == original.dtype
    np.testing.assert_array_equal(params["W_E"].view(np.uint16), original.view(np.uint16))


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_export_gives_back_the_reference_file(model_folder: Path, tmp_path: Path, ending: str) -> None:
    exported = tmp_path / "new" / f"lm.{ending}"
    assert convert_torch_weights.main(["export-lm", str(model_folder), str(exported)]) == 0
    original = load_torch_file(DATA / "lm_f32_zip.pt")
    if ending == "pt":
        state = load_torch_file(exported)
        assert list(state) == list(original)
    else:
        from safetensors.numpy import load_file

        state = load_file(exported)
    assert set(state) == set(original)
    for key, value in original.items():
        np.testing.assert_array_equal(state[key], value)


def test_inspect_names_every_tensor_and_global(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_torch_weights.main(["inspect", str(DATA / "sparse_T1_f32_zip.pt"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert "collections.OrderedDict" in summary["globals"]
    assert {"name": "encoder.weight", "shape": [48, 64], "dtype": "float32", "is_view": False} in summary["tensors"]


def test_generate_gives_the_reference_s_greedy_ids(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ids", "--model", str(model_folder), "--temperature", "0", "--n-toks", "10", "--json"]
    assert cli.main(["generate", GOLDEN_PROMPT, *options]) == 0
    greedy = json.loads((DATA / "generate.json").read_text())["greedy10"]
    assert json.loads(capsys.readouterr().out)["tok_ids"] == [208, *greedy["ids_after_begin"]]


def test_features_shows_the_largest_activations(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, dictionary = str(DATA / "lm_f32_zip.pt"), DATA / "sparse_T1_f32_zip.pt"
    options = ["--site", "M1", "--dictionary", str(dictionary), "--ids", "--model", file, "--top", "2"]
    assert cli.main(["features", GOLDEN_PROMPT, *options]) == 1
    assert "n_heads" in error_line(capsys)
    assert cli.main(["features", GOLDEN_PROMPT, *options, "--n-heads", "4", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["tokens"]
    lm = TinyModel(model_folder)
    lm.attach("M1", dictionary)
    acts = np.asarray(lm["M1"]([[int(word) for word in GOLDEN_PROMPT.split()]]))[0]
    for row, token in zip(acts, shown, strict=True):
        best = row.argsort()[::-1][:2]
        assert [f["feature"] for f in token["features"]] == best.tolist()
        np.testing.assert_allclose([f["activation"] for f in token["features"]], row[best], atol=1e-4)


def test_features_prints_a_table_for_people(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dictionary = str(DATA / "sparse_T1_f32_zip.pt")
    arguments = [
        "features",
        "208 5",
        "--ids",
        "--site",
        "M1N7",
        "--dictionary",
        dictionary,
        "--model",
        str(model_folder),
    ]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("M1N7 on '208 5'")
    assert re.search(r"208\s.*\b7 \d+\.\d{3}", shown)


def test_features_shows_text_that_looks_like_markup(no_type_checks: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["features", "a [/b] c :dog: [x]", "--site", "M1", "--model", "mini"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("M1 on 'a [/b] c :dog: [x]'")
    assert re.search(r"^│ \[BEGIN\] +│", shown, flags=re.MULTILINE)


def test_stories_are_read_from_json_lines_and_text_also_gzipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n\n{"text": "Two."}\n{"text": "Three."}\n')
    (tmp_path / "b.txt").write_text("One.\nTwo.\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "One."}\n')
    assert read_stories(tmp_path / "a.jsonl", 2) == ["One.", "Two."]
    assert read_stories(tmp_path / "b.txt", 9) == ["One.", "Two."]
    assert read_stories(tmp_path / "c.jsonl.gz", 9) == ["One."]


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        ("", "a.jsonl", "no story"),
        ("not json\n", "a.jsonl", "line 1"),
        ('{"story": "x"}\n', "a.jsonl", "'text'"),
        ("x", "a.csv", "expected a .jsonl"),
        (
            "One.\nOn.\n<|endoftext|>\nTwo.\n",
            "a.txt",
            "a.txt, line 3 is '<|endoftext|>', which divides stories of several",
        ),
    ],
)
def test_a_file_without_stories_is_a_clear_error(tmp_path: Path, content: str, name: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(says)):
        read_stories(tmp_path / name, 5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "1 2", "--ids", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", "1 x", "--ids"], "not a list of whole numbers"),
        (["generate", "1 999", "--ids"], "id 999"),
        (["generate", "9" * 20, "--ids"], f"id {'9' * 20} is outside the vocabulary 0..210"),
        (["generate", "Once"], "no tokenizer"),
        (["features", "1", "--ids", "--site", "M9"], "layer 9"),
        (
            ["features", "1", "--ids", "--site", "M0"],
            "Give one: lm.attach('M0', path). For this command: --dictionary PATH.",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_status_1(
    model_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert cli.main([*arguments, "--model", str(model_folder)]) == 1
    assert says in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate"], "give a prompt, or --stories FILE"),
        (["generate", "--ids"], "give a prompt"),
        (["generate", "--ids", ""], "--ids: '' is not a list of whole numbers"),
        (["features", "--ids", " ", "--site", "M0"], "--ids: ' ' is not a list of whole numbers"),
        (["generate", "--stories", "none.jsonl"], "none.jsonl: No such file or directory"),
        (["generate", "--ids", "1", "--stories", "none.jsonl"], "--ids and --stories cannot be combined"),
        (["generate", "Once", "--prompt-toks", "0"], "--prompt-toks 0"),
        (
            ["generate", "Once", "--temperature", "-1", "--top-k", "0"],
            "temperature=-1.0 must be 0 (greedy) or more; top",
        ),
        (["features", "1", "--ids", "--site", "Q1"], "not a dictionary tag"),
        (["features", "1", "--ids", "--site", "M0", "--top", "0"], "--top 0"),
        (
            ["features", "1", "--site", "M0", "--dictionary", "none"],
            "--dictionary none does not exist",
        ),
    ],
)
def test_what_is_wrong_whatever_the_model_is_found_before_one_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    monkeypatch.setattr("tinymodel_jax.lm.TinyModel.__init__", lambda *_, **__: pytest.fail("a model is loaded"))
    assert cli.main(arguments) == 1
    assert says in error_line(capsys)


def test_no_name_of_a_model_is_not_the_current_folder(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model_folder)
    assert cli.main(["generate", "1", "--ids", "--model", ""]) == 1
    assert "give the path or published name of a model, got ''" in error_line(capsys)


def test_a_dictionary_s_folder_is_not_read_for_another_site(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "M1")
    assert convert_torch_weights.main(["dictionary", str(DATA / "sparse_T1_f32_zip.pt"), folder, "--site", "M1"]) == 0
    capsys.readouterr()
    options = ["1 2", "--ids", "--model", str(model_folder), "--dictionary", folder, "--site"]
    assert cli.main(["features", *options, "M2"]) == 1
    assert f"{folder} is a dictionary from blocks.1.hook_mlp_in to blocks.1.hook_mlp_out; 'M2'" in error_line(capsys)
    assert cli.main(["features", *options, "T1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lm", "{data}/lm_f32_zip.pt", "{tmp}/new"], "n_heads is needed"),
        (["lm", "{data}/lm_f32_zip.pt", "{tmp}/new", "--n-heads", "7"], "does not divide"),
        (["lm", "{data}/sparse_T1_f32_zip.pt", "{tmp}/new"], "not a TinyModel language model"),
        (["lm", "{tmp}/none.pt", "{tmp}/new"], "none.pt"),
        (["lm", "{data}/lm_f32_zip.pt", "{tmp}/taken", "--n-heads", "4"], "Nothing was written"),
        (
            ["lm", "{data}/lm_f32_zip.pt", "{tmp}/thesis", "--n-heads", "4"],
            "holds a.txt, b.txt, c.txt and 1 more, but no",
        ),
        (
            ["lm", "{data}/lm_f32_zip.pt", "{tmp}/thesis/a.txt", "--n-heads", "4"],
            "a.txt is a file. Nothing was written; name a folder",
        ),
        (["dictionary", "{data}/sparse_T1_f32_zip.pt", "{tmp}/thesis", "--site", "M1"], "but no config.json. Nothing"),
        (["dictionary", "{data}/lm_f32_zip.pt", "{tmp}/new", "--site", "M1"], "not a dictionary"),
        (["dictionary", "{mini}/dictionaries/M1", "{tmp}/new", "--site", "A0"], "'A0' is from"),
        (["export-lm", "{tmp}/none", "{tmp}/new.pt"], "is not a folder"),
        (["export-lm", "{data}/lm_f32_zip.pt", "{tmp}/new.pt"], "is a file; convert it to a folder"),
        (["export-lm", "{tmp}", "{tmp}/new.bin"], "must end in .pt or .safetensors"),
        (["inspect", "{tmp}/taken/config.json"], "config.json"),
    ],
)
def test_the_converter_refuses_in_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text('{"model_type": "other"}')
    (tmp_path / "thesis").mkdir()
    for name in "abcd":
        (tmp_path / "thesis" / f"{name}.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    filled = [argument.format(data=DATA, mini=MINI, tmp=tmp_path) for argument in arguments]
    assert convert_torch_weights.main(filled) == 1
    assert says in error_line(capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_converting_again_says_what_it_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["lm", str(DATA / "lm_f32_zip.pt"), str(tmp_path / "lm"), "--n-heads", "4"],
        ["dictionary", str(DATA / "sparse_T1_f32_zip.pt"), str(tmp_path / "M1"), "--site", "M1"],
    ):
        assert convert_torch_weights.main(command) == 0
        assert "replaces" not in capsys.readouterr().out
        assert convert_torch_weights.main(command) == 0
        assert capsys.readouterr().out.endswith("; it replaces what was there\n")


def test_a_model_is_exported_by_its_name(tmp_path: Path) -> None:
    assert convert_torch_weights.main(["export-lm", "mini", str(tmp_path / "lm.safetensors")]) == 0
    lm = TinyModel(tmp_path / "lm.safetensors", n_heads=8)
    np.testing.assert_array_equal(lm.W_U, TinyModel("mini").W_U)


def test_an_exported_safetensors_file_is_a_source_like_a_pt_file(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = str(tmp_path / "lm.safetensors")
    assert convert_torch_weights.main(["export-lm", str(model_folder), exported]) == 0
    assert convert_torch_weights.main(["lm", exported, str(tmp_path / "again"), "--n-heads", "4"]) == 0
    tok_ids = np.arange(20).reshape(2, 10)
    np.testing.assert_array_equal(TinyModel(tmp_path / "again")(tok_ids), TinyModel(model_folder)(tok_ids))
    capsys.readouterr()
    assert convert_torch_weights.main(["inspect", exported, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["form"] == "safetensors"
    assert {"name": "embed.weight", "shape": [211, 64], "dtype": "float32", "is_view": False} in summary["tensors"]


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    for main, program in ((cli.main, "tinymodel"), (convert_torch_weights.main, "tinymodel-convert")):
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"{program} {tinymodel_jax.__version__}\n"


def test_a_terminal_without_utf_8_shows_help_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert cli.main(["--help"]) == 0
    sys.stdout.flush()
    assert b"features" in shown.getvalue()


INTERRUPTED = """
import builtins, runpy, sys
find = builtins.__import__

def interrupted(name, *rest, **options):
    if name == "tyro":
        raise KeyboardInterrupt
    return find(name, *rest, **options)

builtins.__import__ = interrupted
sys.argv[1:] = ["--help"]
runpy.run_module("MODULE.__main__", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["tinymodel_jax", "train"])
def test_ctrl_c_while_a_command_still_loads_ends_it_without_a_traceback(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED.replace("MODULE", module)], capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, b"")


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_the_training_extra_help_works_and_a_program_names_the_extra(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("datasets", "pyarrow", "optax", "orbax", "etils"):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(("train.", "tinymodel_jax.training"))]:
        monkeypatch.delitem(sys.modules, name)
    assert train_main(["--help"]) == 0
    assert program in capsys.readouterr().out
    assert train_main([program, "--help"]) == 1
    assert re.search(rf"{program} needs \w+, which is not .*pip install -e '.\[train\]'$", error_line(capsys).rstrip())


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_list_of_training_programs_shows_the_first_lines_of_their_docstrings(program: str) -> None:
    described = getattr(importlib.import_module(f"train.{program}"), program).__doc__
    assert described.partition("\n")[0] == PROGRAMS[program]


def test_bad_usage_is_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--no-such-option"]) == 2
    assert cli.main(["features", "Once"]) == 2
    assert convert_torch_weights.main(["frobnicate"]) == 2
    capsys.readouterr()


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert convert_torch_weights.main(["inspect", str(tmp_path / "none.pt"), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_help_loads_neither_jax_nor_torch() -> None:
    code = (
        "import sys; from tinymodel_jax.commands.cli import main; main(['--help']);"
        "print([m for m in ('jax', 'torch', 'rich.progress') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "[]"


def test_the_converter_runs_as_a_script(tmp_path: Path) -> None:
    arguments = ["lm", str(DATA / "lm_f32_zip.pt"), str(tmp_path / "lm"), "--n-heads", "4"]
    subprocess.run([sys.executable, "convert_torch_weights.py", *arguments], cwd=ROOT, check=True)
    assert (tmp_path / "lm" / "model.safetensors").is_file()


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", str(DATA / "lm_f32_zip.pt")]])
def test_the_converter_shows_help_and_pytorch_files_without_loading_jax(arguments: list[str]) -> None:
    code = (
        "import sys; from convert_torch_weights import main; status = main(sys.argv[1:]);"
        "print(status, [m for m in ('jax', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "0 []"


def test_a_package_that_a_training_program_needs_later_is_named_too(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "etils", None)
    options = ["--tokenizer", "mini", "--limit", "5"]
    assert train_main(["prepare", "storyworld", str(tmp_path / "data"), *options]) == 1
    assert "prepare needs etils, which is not installed; in the repository's folder: pip install" in error_line(capsys)
