"""`tinymodel top` and `tinymodel concepts`, run as a user runs them."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import param_shapes, random_params
from runs import write_counting_data
from test_commands import error_line

from tinymodel_jax.analysis.concepts.labels import ConceptScores, best_f1_of_all
from tinymodel_jax.analysis.concepts.recovery import Recovery
from tinymodel_jax.analysis.search.feature_queries import concept_f1
from tinymodel_jax.analysis.search.logit_effects import logit_effects
from tinymodel_jax.analysis.search.top_activations import TopActivations, load_top_activations, top_activations
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.commands import cli
from tinymodel_jax.commands.concepts import _print_table as print_concepts
from tinymodel_jax.commands.inputs import open_rows, unseen_stories
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.padding import pad_right

LIMIT = 12


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A file of a search of M2, which the commands read."""
    path = tmp_path_factory.mktemp("top") / "new" / "m2.top"
    assert cli.main(["top", "--model", "mini", "--site", "M2", "--limit", str(LIMIT), "-o", str(path), "--json"]) == 0
    return path


@pytest.fixture(scope="module")
def lm():
    return TinyModel("mini")


@pytest.fixture(scope="module")
def rows(lm):
    return open_rows(lm, "storyworld", LIMIT)


def records(capsys, searched, *options):
    capsys.readouterr()
    common = ["top", "--model", "mini", "--site", "M2", "--limit", str(LIMIT), "-o", str(searched), "--json"]
    assert cli.main([*common, *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_without_a_question_the_densest_features_come_first(capsys, searched):
    found, shown = load_top_activations(searched), records(capsys, searched, "--top", "4")
    order = np.argsort(-found.density, kind="stable")[:4]
    assert [one["feature"] for one in shown] == order.tolist()
    assert [one["density"] for one in shown] == pytest.approx(found.density[order], abs=1e-6)


def test_one_feature_shows_the_tokens_at_its_peaks(capsys, searched, lm, rows):
    found = load_top_activations(searched)
    feature = int(found.largest.argmax())
    (one,) = records(capsys, searched, "--feature", str(feature), "--top", "3")
    assert [c["row"] for c in one["contexts"]] == found.top.row[feature, :3].tolist()
    for number, context in enumerate(one["contexts"]):
        row, position = found.top.row[feature, number], found.top.position[feature, number]
        assert context["peak"] == lm.tokenizer.decode([int(rows[row, position])])
        story = lm.tokenizer.decode([int(i) for i in rows[row] if i < lm.config.begin_id])
        assert context["before"] + context["peak"] + context["after"] in story
    assert sum(part["tokens"] for part in one["histogram"]) == found.active[feature]
    assert len(one["bands"]) == 5


def test_contains_lists_features_that_peak_on_the_text(capsys, searched, lm, rows):
    found = load_top_activations(searched)
    shown = records(capsys, searched, "--contains", ".", "--top", "5")
    pieces = np.array([lm.tokenizer.decode([token]) for token in range(lm.config.d_vocab)])
    for one in shown:
        kept = found.top.row[one["feature"]] >= 0
        peaks = rows[found.top.row[one["feature"]][kept], found.top.position[one["feature"]][kept]]
        assert one["score"] == pytest.approx(np.mean(["." in pieces[token] for token in peaks]), abs=1e-4)
        assert {one["top_token"], *one["promoted"]} <= set(pieces)
    assert [one["score"] for one in shown] == sorted((one["score"] for one in shown), reverse=True)
    assert shown[0]["score"] > 0.9


def test_json_holds_the_tokens_themselves(capsys, searched, lm):
    shown = records(capsys, searched, "--contains", "\n", "--top", "1")
    assert shown[0]["top_token"] == "\n"
    (one,) = records(capsys, searched, "--feature", str(shown[0]["feature"]), "--top", "1")
    assert one["contexts"][0]["peak"] == "\n"
    effects = logit_effects(lm, "M2", 10, np.array([one["feature"]]))
    for kind, ids in (("promoted", effects.promoted[0]), ("suppressed", effects.suppressed[0])):
        assert [word["token"] for word in one[kind]] == [lm.tokenizer.decode([int(i)]) for i in ids]


def test_a_text_of_several_tokens_is_found_too(capsys, searched):
    shown = records(capsys, searched, "--contains", "Once upon a time", "--top", "1")
    assert shown[0]["score"] > 0


def test_a_concept_lists_features_by_their_best_f1(capsys, searched, lm, rows):
    shown = records(capsys, searched, "--concept", "word.the", "--top", "3")
    truth = storyworld.labels(unseen_stories(lm, LIMIT), lm.tokenizer, width=rows.shape[1])
    f1 = concept_f1(lm["M2"], rows, truth)[:, list(storyworld.CONCEPTS).index("word.the")]
    assert shown[0]["feature"] == int(f1.argmax())
    assert shown[0]["score"] == pytest.approx(f1.max(), abs=1e-4)
    assert shown[0]["score"] > 0.8


def test_the_best_f1_takes_a_threshold_where_a_dense_unit_needs_one():
    truth = np.arange(1024)[:, None] >= 1024 - 128
    acts = np.stack([1 + np.arange(1024), np.ones(1024)], axis=1)  # a unit that is always active, and says it by size
    f1 = best_f1_of_all(acts.astype(np.float32), truth)[:, 0]
    assert f1[0] == 1
    assert f1[1] == pytest.approx(2 * 128 / (1024 + 128))


def test_people_get_a_table_and_a_page(capsys, searched):
    common = ["top", "--model", "mini", "--limit", str(LIMIT), "-o", str(searched)]
    assert cli.main([*common, "--site", "M2", "--top", "3"]) == 0
    assert "promotes" in capsys.readouterr().out
    assert cli.main([*common, "--site", "M2N358", "--top", "2"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("M2N358, ")
    for part in (
        "quantiles: 10%",
        "top contexts:",
        "from quantile 0.8 to 1.0",
        "«",
        "promoted next tokens",
        "together",
    ):
        assert part in page


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--site", "M2", "--feature", "9999"], "feature 9999 is out of range; the dictionary has features 0.."),
        (["--site", "M2N9999"], "feature 9999 is out of range"),
        (["--site", "M7"], "layer 7 does not exist"),
        (["--site", "X"], "no dictionary tag"),
        (["--site", "M2", "--top", "0"], "--top 0 must be 1 or more"),
        (["--site", "M2", "--limit", "0"], "--limit 0 must be 1 or more"),
        (["--site", "M2", "--contains", "a", "--feature", "1"], "do not go together"),
        (["--site", "M2", "--contains", ""], "give a text"),
        (["--site", "M2", "--contains", "qqqq", "--limit", "2"], "no feature's top contexts peak on it"),
        (["--site", "M2", "--concept", "feeling.badd"], "Closest: feeling.bad"),
        (["--site", "M2", "--concept", "feeling.bad", "--data", "x.txt"], "leave --data out"),
        (["--site", "M2", "--data", "nothing.txt"], "nothing.txt"),
        (["--site", "M2", "-o", f"{__file__}/where"], "test_top_command.py cannot be made"),
        (["--site", "M2", "-o", "."], "--out . is a folder; name a file"),
        (["--site", "M2N5", "--feature", "7"], "--site M2N5 names a feature, and so does --feature 7"),
        (["--site", "M2", "--dictionary", "none"], "--dictionary none does not exist"),
    ],
)
def test_bad_input_is_one_line(options, says, capsys):
    assert cli.main(["top", "--model", "mini", *options]) == 1
    assert says in error_line(capsys)


def test_prepared_data_of_another_vocabulary_is_refused(tmp_path, capsys):
    folder = write_counting_data(tmp_path)
    assert cli.main(["top", "--model", "mini", "--site", "M2", "--data", str(folder)]) == 1
    assert "ids in rows of" in error_line(capsys)


def test_short_stories_are_searched_at_the_width_that_they_need(lm, tmp_path):
    (tmp_path / "a.txt").write_text("One day, a fox was sad.\nMia went to the lake.\n")
    rows = open_rows(lm, str(tmp_path / "a.txt"), 9)
    assert rows.shape == (2, lm.config.n_ctx // 16)
    narrow, wide = (
        top_activations(lm, "M2", part) for part in (rows, pad_right(rows, lm.config.n_ctx, lm.config.pad_id))
    )
    assert narrow.data != wide.data
    np.testing.assert_array_equal(narrow.active, wide.active)
    np.testing.assert_array_equal(narrow.top.position, wide.top.position)
    np.testing.assert_allclose(narrow.total, wide.total, rtol=1e-5, atol=1e-5)


def test_an_empty_file_of_stories_is_one_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n")
    assert cli.main(["top", "--model", "mini", "--site", "M2", "--data", str(tmp_path / "a.txt")]) == 1
    assert "no story found" in error_line(capsys)


def test_the_file_of_another_search_is_refused(searched, capsys):
    assert cli.main(["top", "--model", "mini", "--site", "M2", "--limit", "5", "-o", str(searched)]) == 1
    assert "holds a search with another data; name another file" in error_line(capsys)


def test_a_feature_shows_as_many_contexts_as_asked_for(searched, capsys):
    options = ["top", "--limit", "30", "--json", "--data", "storyworld"]  # the default model is that of the data
    assert cli.main([*options, "--site", "M2N358", "--top", "25"]) == 0
    (one,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert len(one["contexts"]) == 25


def test_a_file_with_fewer_contexts_is_refused(lm, rows, tmp_path, capsys):
    few = tmp_path / "few"
    top_activations(lm, "M2", rows, k=3).save(few)
    options = ["top", "--limit", str(LIMIT), "-o", str(few), "--json"]
    assert cli.main([*options, "--site", "M2N358", "--top", "4"]) == 1
    assert "holds 3 contexts of a feature, not 4; name another file" in error_line(capsys)
    assert cli.main([*options, "--site", "M2N358", "--top", "3"]) == 0


def test_the_f1_of_some_features_is_theirs_among_all(lm, rows, monkeypatch):
    truth = storyworld.labels(unseen_stories(lm, LIMIT), lm.tokenizer, width=rows.shape[1])
    real = rows < lm.config.begin_id
    expected = best_f1_of_all(np.asarray(lm["M2"](rows))[real], truth[real])
    monkeypatch.setattr("tinymodel_jax.analysis.search.feature_queries.TOKENS_AT_ONCE", 1000)
    seen = []
    f1 = concept_f1(lm["M2"], rows, truth, track=lambda parts: seen.extend(parts) or parts)
    np.testing.assert_allclose(f1, expected, atol=0.02)  # a threshold may fall between two equal activations
    assert np.mean(np.abs(f1 - expected) > 1e-6) < 1e-3
    assert len(seen) > 1
    some = np.array([358, 3])
    np.testing.assert_allclose(concept_f1(lm["M2"], rows, truth, some), f1[some], atol=0.02)


@pytest.mark.parametrize("question", [(), ("--feature", "358"), ("--contains", ".")])
def test_concepts_are_told_of_the_features_shown_alone(capsys, searched, monkeypatch, question):
    scored = []

    def noting(acts, truth):
        scored.append(acts.shape[1])
        return best_f1_of_all(acts, truth)

    monkeypatch.setattr("tinymodel_jax.analysis.search.feature_queries.best_f1_of_all", noting)
    shown = records(capsys, searched, *question, "--top", "3")
    assert scored == [len(shown)]
    assert all("concept" in one for one in shown)


def test_a_result_that_cannot_be_written_is_not_lost(tmp_path, capsys, monkeypatch):
    out = tmp_path / "m2.top"
    options = ["top", "--site", "M2", "--limit", "2", "-o", str(out), "--json"]

    def full(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TopActivations, "save", full)
        assert cli.main(options) == 1
    assert "No space left" in error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["m2.top.work"]
    assert cli.main(options) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m2.top"]


def test_concepts_prints_writes_and_plots(tmp_path, capsys):
    out, plot = tmp_path / "new" / "concepts.json", tmp_path / "plots" / "concepts.png"
    options = ["--sites", "Ra0", "--stories", "8", "-o", str(out), "--plot", str(plot)]
    assert cli.main(["concepts", *options]) == 0
    shown = capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert len(rows) == 3 * len(storyworld.CONCEPTS)
    found = sum(row["place"] == "Ra0" and row["f1"] is not None and row["f1"] >= 0.8 for row in rows)
    line = next(line for line in shown.splitlines() if line.startswith("│ Ra0"))
    assert line.split("│")[3].strip() == str(found)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_table_of_concepts_shows_any_name(capsys):
    numbers = [np.full(2, 0.5)] * 6
    print_concepts([Recovery("M1[topk]:dog:", "dictionary", 1, 3, ConceptScores(*numbers))], 4)
    assert "│ M1[topk]:dog: │" in capsys.readouterr().out


def test_concepts_scores_dictionaries_of_folders(lm, tmp_path, capsys):
    for name in ("one", "two"):
        lm["M1"].dictionary.save_pretrained(tmp_path / name)
    both = ["--sites", "M1", "--dictionaries", str(tmp_path)]
    assert cli.main(["concepts", *both, "--stories", "4", "--json"]) == 0
    scores: dict[str, list[float]] = {}
    for record in map(json.loads, capsys.readouterr().out.splitlines()):
        scores.setdefault(record["place"], []).append(record["f1"])
    assert list(scores) == ["M1", "random M1", "one", "two", "neurons 1"]  # one comparison for all three
    assert scores["M1"] == scores["one"] == scores["two"]


def test_concepts_of_a_model_that_has_nothing_to_score_are_one_line(lm, tmp_path, capsys):
    TinyModel.from_params(lm.config, lm.params, tokenizer=lm.tokenizer).save_pretrained(tmp_path / "bare")
    other = dataclasses.replace(lm.config, n_layers=1, d_model=8, n_heads=2, d_mlp=8, d_vocab=1030)
    TinyModel.from_params(other, random_params(param_shapes(other), 0)).save_pretrained(tmp_path / "other")
    assert cli.main(["concepts", "--model", str(tmp_path / "bare"), "--plot", str(tmp_path / "plot.png")]) == 1
    assert "came without dictionaries; give --dictionaries FOLDER" in error_line(capsys)
    assert cli.main(["concepts", "--model", str(tmp_path / "other")]) == 1
    says = error_line(capsys)
    assert "stories of the story world take 1024 ids, the model has 1030; give a model that was trained on them" in says
    assert "--data" not in says


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--dictionaries", "none"], "--dictionaries none does not exist"),
        (["--dictionaries", "."], "holds no dictionary"),
        (["--stories", "1"], "--stories 1 must be 2 or more"),
        (["--plot", f"{__file__}/where.png"], "test_top_command.py cannot be made"),
        (["--plot", "."], "--plot . is a folder; name a file"),
        (["-o", "."], "--out . is a folder; name a file"),
        (["--sites", "M9"], "layer 9 does not exist"),
        (["--sites", "M2, M1N5"], "--sites 'M1N5' names a feature; name the site, 'M1'"),
    ],
)
def test_bad_input_of_concepts_is_one_line(options, says, capsys):
    assert cli.main(["concepts", *options]) == 1
    assert says in error_line(capsys)
