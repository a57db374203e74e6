"""Dashboards of several dictionaries, which link to each other, and dashboards of directions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import as_users_run_it
from oracle import F32, assert_close

from tinymodel_jax.analysis.report.dashboard import build, folders, sets
from tinymodel_jax.analysis.report.dashboard.build import read_data
from tinymodel_jax.commands import cli, dashboard_steps
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel

TEXT = "Once upon a time, a fox was sad."


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of three stories, whose concepts are not known."""
    file = tmp_path_factory.mktemp("stories") / "stories.txt"
    file.write_text("Once upon a time, a cat was happy.\nThe dog ran home.\nA girl had a red ball.\n")
    return file


@pytest.fixture(scope="module")
def make(story_model: Path, stories: Path) -> Any:
    """A function that runs the command on a small model: sites, folder, further options."""

    def run(sites: str, out: Path, *options: str) -> int:
        given = ["--site", sites, "--model", str(story_model), "--data", str(stories), "-o", str(out)]
        with as_users_run_it():
            return cli.main(["dashboard", *given, *options])

    return run


@pytest.fixture(scope="module")
def pair(make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of M0 and M1."""
    out = tmp_path_factory.mktemp("pair") / "pages"
    assert make("M1,M0", out, "--text", TEXT) == 0
    return out


@pytest.fixture(scope="module")
def three(make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of M0, A1 and M1."""
    out = tmp_path_factory.mktemp("three") / "pages"
    assert make("M0,A1,M1", out, "--text", TEXT) == 0
    return out


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files under a folder, by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def measuring(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that fills with the tags that the command measures."""
    measured, write = [], dashboard_steps.Work.write

    def noted(work: Any, place: Any, folder: Path) -> None:
        measured.append(place.tag)
        write(work, place, folder)

    monkeypatch.setattr(dashboard_steps.Work, "write", noted)
    return measured


def test_a_set_names_its_dictionaries_in_the_order_of_the_forward_pass(pair):
    page = (pair / "index.html").read_text()
    assert page.index('href="M0/index.html"') < page.index('href="M1/index.html"')
    assert folders.SET_GENERATOR in page
    assert TEXT in page
    active = np.asarray(read_data(pair / "M0", "index")["columns"]["active"])
    n_tokens = read_data(pair / "M0", "index")["n_tokens"]
    assert f'data-label="active features per token">{active.sum() / n_tokens:.2f}<' in page
    assert f'data-label="features active on text">{np.count_nonzero(active)}<' in page
    for tag, other in (("M0", "M1"), ("M1", "M0")):
        assert f'href="../{other}/index.html" data-site="{other}"' in (pair / tag / "index.html").read_text()


def test_the_links_of_a_set_are_those_of_its_own_dictionaries(pair, three, story_model):
    lm = TinyModel(story_model)
    weights = np.asarray(lm["M0"].dictionary.params["W_dec"] @ lm["M1"].dictionary.params["W_enc"])
    for folder, upstream in ((pair, ["M0"]), (three, ["M0", "A1"])):
        records = read_data(folder / "M1", "links-0000")
        assert [list(record["upstream"]) for record in records] == [upstream] * 24
        for feature, record in enumerate(records):
            order = np.argsort(-np.abs(weights[:, feature]))[:8]
            assert [f for f, _, _ in record["upstream"]["M0"]] == order.tolist()
            np.testing.assert_allclose([w for _, w, _ in record["upstream"]["M0"]], weights[order, feature], rtol=1e-3)


def test_a_dictionary_is_added_to_a_set_without_measuring_the_others_again(make, pair, three, tmp_path, monkeypatch):
    out = tmp_path / "pages"
    assert make("M0,M1", out, "--text", TEXT) == 0
    assert files(out) == files(pair)
    measured = measuring(monkeypatch)
    assert make("M0,A1,M1", out, "--text", TEXT) == 0
    assert measured == ["A1"]
    assert files(out) == files(three)
    assert make("M0,M1", out, "--text", TEXT) == 0
    assert measured == ["A1"]
    assert files(out) == files(pair)


def test_what_was_measured_on_other_input_is_measured_again(make, tmp_path, monkeypatch):
    out = tmp_path / "pages"
    assert make("M0,M1", out, "--limit", "2") == 0
    measured = measuring(monkeypatch)
    assert make("M0,M1", out) == 0
    assert measured == ["M0", "M1"]
    monkeypatch.setattr(sets, "FORM", 0)
    assert make("M0,M1", out) == 0
    assert measured == ["M0", "M1"] * 2


@pytest.mark.parametrize("place", ["write_data", "write_front", "write_set_page", "copytree", "search"])
def test_a_stopped_set_resumes_to_the_same_bytes(make, pair, three, tmp_path, monkeypatch, capsys, place):
    """Stopped in the middle of a dictionary's data, of the pages, and of what an older set lends."""
    out, calls = tmp_path / "pages", []
    if place == "copytree":
        assert make("M0,M1", out, "--text", TEXT) == 0
    owner = {
        "write_data": build,
        "write_front": build,
        "write_set_page": sets,
        "copytree": sets.shutil,
        "search": dashboard_steps,
    }[place]
    real, stop_at = getattr(owner, place), {"write_data": 9, "write_set_page": 1}.get(place, 2)

    def stop(*given: Any, **options: Any) -> Any:
        calls.append(given)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, stop)
        assert make("M0,A1,M1", out, "--text", TEXT) == 130
    assert out.exists() == (place == "copytree")
    capsys.readouterr()
    assert make("M0,M1", out, "--text", TEXT, "--limit", "2") == 1
    assert "holds unfinished work on a dashboard with other options" in capsys.readouterr().err
    if place == "copytree":
        assert files(out) == files(pair)  # the older set is whole until the new one is
    measured = measuring(monkeypatch)
    assert make("M0,A1,M1", out, "--text", TEXT) == 0
    assert files(out) == files(three)
    assert "M0" not in measured  # finished before the stop
    assert [path.name for path in tmp_path.iterdir()] == ["pages"]


def test_a_set_and_a_single_dashboard_replace_each_other(make, tmp_path):
    out = tmp_path / "pages"
    assert make("M0", out) == 0
    assert make("M0,M1", out) == 0
    assert {path.name for path in out.iterdir()} == {"index.html", "M0", "M1"}
    assert {path.name for path in (out / "M1").iterdir()} == {"index.html", "data"}
    assert make("M0", out) == 0
    assert {path.name for path in out.iterdir()} == {"index.html", "data"}


@pytest.mark.parametrize("strange", ["M0/notes", "notes", "mine/index.html"])
def test_a_set_with_a_file_of_the_user_s_is_kept(tmp_path, strange):
    page = tmp_path / "pages/index.html"
    (tmp_path / "pages/M0/data").mkdir(parents=True)
    page.write_text(folders.SET_GENERATOR)
    (tmp_path / "pages/M0/index.html").write_text(folders.GENERATOR)
    folders.open_partial(tmp_path / "pages")
    (page.parent / strange).parent.mkdir(exist_ok=True)
    (page.parent / strange).write_text(folders.GENERATOR)
    with pytest.raises(ValueError, match="exists and is not a dashboard"):
        folders.open_partial(tmp_path / "pages")
    assert (page.parent / strange).exists()


def test_a_set_of_dictionaries_in_a_folder_is_made_of_them(make, story_model, pair, tmp_path):
    lm, kept = TinyModel(story_model), tmp_path / "kept"
    for tag, other in (("M0", "M1"), ("M1", "M0")):
        lm.attach(
            tag, Dictionary.from_params(lm[tag].dictionary.config, TinyModel(story_model)[other].dictionary.params)
        )
        lm[tag].dictionary.save_pretrained(kept / tag)
    assert make("M0,M1", tmp_path / "pages", "--dictionary", str(kept)) == 0
    for tag in ("M0", "M1"):
        index, names = read_data(tmp_path / "pages" / tag, "index"), {}
        assert index["columns"]["active"] != read_data(pair / tag, "index")["columns"]["active"]
        exec("\n".join(index["setup"]), names)
        assert_close(np.asarray(names["lm"][tag](TEXT)), np.asarray(lm[tag](TEXT)), F32)


def test_a_set_says_which_pages_it_wrote(make, tmp_path, capsys):
    out = tmp_path / "pages"
    assert make("M0,M1", out, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["sites"], record["n_features"]) == (["M0", "M1"], 48)
    assert record["bytes"] == sum(len(content) for content in files(out).values())


def test_neurons_have_the_pages_of_a_dictionary(make, story_model, stories, tmp_path, capsys):
    neurons = tmp_path / "neurons.npy"
    np.save(neurons, np.eye(32))
    out = tmp_path / "pages"
    assert make("blocks.0.mlp.hook_post", out, "--directions", str(neurons), "--effects", "1") == 0, capsys.readouterr()
    lm, index = TinyModel(story_model), read_data(out, "index")
    ids = lm.to_tokens(stories.read_text().splitlines())
    post = np.array(lm.run_with_cache(ids, "blocks.0.mlp.hook_post")[1]["blocks.0.mlp.hook_post"])
    post[~lm.config.is_text(np.asarray(ids))] = 0
    assert index["columns"]["active"] == (post > 0).sum(axis=(0, 1)).tolist()
    np.testing.assert_allclose(index["columns"]["largest"], post.max(axis=(0, 1)), rtol=1e-3)
    assert [line.partition(":")[0] for line in index["left_out"]] == [
        "Upstream features are left out",
        "Effects are left out",
    ]
    effects = np.asarray(lm.params["blocks_0"]["mlp"]["W_out"] @ lm.params["W_U"])
    record = read_data(out, "shard-0000")[3]
    assert [token for token, _ in record["promoted"]] == np.argsort(-effects[3])[:10].tolist()
    weights = np.asarray(lm.params["blocks_0"]["mlp"]["W_out"] @ lm["M1"].dictionary.params["W_enc"])
    [strongest, *_] = read_data(out, "links-0000")[3]["downstream"]["M1"]
    assert strongest[0] == np.abs(weights[3]).argmax()


def test_directions_where_nothing_can_be_said_of_the_logits_have_the_other_pages(make, story_model, tmp_path):
    rows = tmp_path / "rows.npy"
    np.save(rows, np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32))
    out = tmp_path / "pages"
    assert make("blocks.1.attn.hook_q", out, "--directions", str(rows), "--text", TEXT) == 0
    index = read_data(out, "index")
    assert "promoted" not in index["columns"]
    assert index["left_out"] == [
        "Logit effects and downstream features are left out: a direction at blocks.1.attn.hook_q does not reach the "
        "residual stream through one matrix."
    ]
    names: dict[str, Any] = {}
    exec("\n".join(index["setup"]), names)
    lm, name = TinyModel(story_model), "blocks.1.attn.hook_q"
    ids = lm.to_tokens(TEXT)
    q = np.asarray(lm.run_with_cache(ids, name)[1][name])
    expected = np.maximum(q.reshape(*q.shape[:2], -1) @ np.load(rows).T, 0)
    assert_close(np.asarray(names["lm"][name](TEXT)), expected, F32)
    record = read_data(out, "text-1")
    assert record["activity"] == {
        str(f): [np.flatnonzero(acts).tolist(), pytest.approx(acts[acts > 0], rel=1e-3)]
        for f, acts in enumerate(expected[0, 1:].T)
        if np.any(acts > 0)
    }


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--site", "M0,M1N3"], "--site 'M1N3' names a feature"),
        (["--site", "M0,M7"], "layer 7 does not exist"),
        (["--site", "M0,T1"], "'T1': this model has no dictionary there"),
        (["--site", ""], "'' is not a dictionary tag"),
        (["--site", "M0,M1", "--dictionary", "here"], "here/M0, here/M1 does not exist; for several sites, give a"),
        (["--site", "Ra1,A1", "--directions", "d.npy"], "--directions d.npy belongs to one --site, not to Ra1,A1"),
        (["--site", "M1", "--directions", "d.npy"], "such as --site blocks.1.hook_mlp_out"),
        (["--site", "A1", "--directions", "d.npy", "--dictionary", "here"], "cannot be combined"),
        (["--site", "A1", "--directions", "none.npy"], "--directions none.npy is not a file"),
        (["--site", "A1", "--directions", "text.npy"], "--directions text.npy is not a .npy file"),
        (
            ["--site", "A1", "--directions", "d.npy"],
            "has shape (3, 5); directions at blocks.1.hook_attn_out have shape",
        ),
        (["--site", "A1", "--directions", "nan.npy"], "pass finite numbers (n, width)"),
        (["--site", "blocks.9.mlp.hook_post", "--directions", "d.npy"], "layer 9 does not exist"),
    ],
)
def test_wrong_sets_and_directions_are_one_line(story_model, options, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("d.npy", np.zeros((3, 5)))
    np.save("nan.npy", np.full((3, 16), np.nan))
    Path("text.npy").write_text("no numbers")
    with as_users_run_it():
        assert cli.main(["dashboard", "--model", str(story_model), "-o", "pages", *options]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not Path("pages").exists()
