"""`tinymodel top` and `tinymodel concepts`."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import error_line, param_shapes, random_params
from oracle import error_of
from runs import write_counting_data

from tinymodel_jax.analysis.concepts.labels import ConceptScores, best_f1_of_all
from tinymodel_jax.analysis.concepts.recovery import Recovery
from tinymodel_jax.analysis.search.feature_queries import concept_f1, find_features
from tinymodel_jax.analysis.search.logit_effects import logit_effects
from tinymodel_jax.analysis.search.top_activations import TopActivations, load_top_activations, top_activations
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.commands import cli
from tinymodel_jax.commands.concepts import _print_table as print_concepts
from tinymodel_jax.commands.inputs import open_rows, unseen_stories
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.padding import pad_right
from tinymodel_jax.text.prompts_and_stories import story_rows

LIMIT = 12


@pytest.fixture(scope="module")
def top(story_model):
    """The beginning of a command on the model of these tests."""
    return ["top", "--model", str(story_model), "--limit", str(LIMIT)]


@pytest.fixture(scope="module")
def searched(top, tmp_path_factory):
    """A file of a search of M1, which the commands read."""
    path = tmp_path_factory.mktemp("top") / "new" / "m1.top"
    assert cli.main([*top, "--site", "M1", "-o", str(path), "--json"]) == 0
    return path


@pytest.fixture(scope="module")
def lm(story_model):
    return TinyModel(story_model)


@pytest.fixture(scope="module")
def rows(lm):
    return open_rows(lm, "storyworld", LIMIT)


@pytest.fixture
def records(capsys, top, searched):
    """Run a command that reads the search; return the objects that it prints."""

    def run(*options):
        capsys.readouterr()
        assert cli.main([*top, "--site", "M1", "-o", str(searched), "--json", *options]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_without_a_question_the_densest_features_come_first(records, searched):
    found, shown = load_top_activations(searched), records("--top", "4")
    order = np.argsort(-found.density, kind="stable")[:4]
    assert [one["feature"] for one in shown] == order.tolist()
    assert [one["density"] for one in shown] == pytest.approx(found.density[order], abs=1e-6)


def test_one_feature_shows_the_tokens_at_its_peaks(records, searched, lm, rows):
    found = load_top_activations(searched)
    feature = int(found.largest.argmax())
    (one,) = records("--feature", str(feature), "--top", "3")
    assert [c["row"] for c in one["contexts"]] == found.top.row[feature, :3].tolist()
    for number, context in enumerate(one["contexts"]):
        row, position = found.top.row[feature, number], found.top.position[feature, number]
        assert context["peak"] == lm.tokenizer.decode([int(rows[row, position])])
        story = lm.tokenizer.decode([int(i) for i in rows[row] if i < lm.config.begin_id])
        assert context["before"] + context["peak"] + context["after"] in story
    assert sum(part["tokens"] for part in one["histogram"]) == found.active[feature]
    assert len(one["bands"]) == 5


def test_contains_lists_features_that_peak_on_the_text(records, searched, lm, rows):
    found = load_top_activations(searched)
    shown = records("--contains", "a", "--top", "5")
    pieces = np.array([lm.tokenizer.decode([token]) for token in range(lm.config.d_vocab)])
    for one in shown:
        kept = found.top.row[one["feature"]] >= 0
        peaks = rows[found.top.row[one["feature"]][kept], found.top.position[one["feature"]][kept]]
        assert one["share_of_contexts"] >= round(float(np.mean(["a" in pieces[token] for token in peaks])), 4)
        assert {one["top_token"], *one["promoted"]} <= set(pieces)
    shares = [one["share_of_contexts"] for one in shown]
    assert shares == sorted(shares, reverse=True)
    several = records("--contains", "Once upon a time", "--top", "24")  # a text of several tokens
    assert all(one["share_of_contexts"] > 0 for one in several)


def test_features_for_a_word_are_those_whose_top_contexts_peak_on_it(lm):
    stories = [story.text for story in unseen_stories(lm, LIMIT)]
    ids, word = story_rows(lm.tokenizer, stories, lm.config.n_ctx), " the"
    search = top_activations(lm, "M1", ids)
    shares = {}
    for feature in range(search.n_features):
        places = [(r, p) for r, p in zip(search.top.row[feature], search.top.position[feature], strict=True) if r >= 0]
        hits = [lm.tokenizer.decode(ids[place].item()) == word for place in places]  # " the" is one token
        if any(hits):
            shares[feature] = np.mean(hits)
    found = find_features(lm, "M1", stories, word)
    assert dict(zip(found.features.tolist(), found.share, strict=True)) == pytest.approx(shares)
    order = [(-shares[feature], -search.density[feature]) for feature in found.features]
    assert order == sorted(order)
    again = find_features(lm, "M1", ids, word, search=found.search)
    np.testing.assert_array_equal(again.features, found.features)
    other = lm.splice([])
    dictionary = lm["M1"].dictionary
    other.attach(
        "M1", Dictionary.from_params(dictionary.config, {**dictionary.params, "b_dec": 1 + dictionary.params["b_dec"]})
    )
    for model, tag, asked, differs in (
        (lm, "M1", ids[:3], "of other rows;"),
        (lm, "M0", ids, "of another site and another dictionary;"),
        (other, "M1", ids, "of another dictionary;"),
        (lm.splice("M0"), "M1", ids, "of another model;"),
    ):
        error = error_of(
            lambda model=model, tag=tag, asked=asked: find_features(model, tag, asked, word, search=found.search)
        )
        assert differs in error
        assert "\n" not in error
    assert "the text is empty" in error_of(lambda: find_features(lm, "M1", ids, ""))


def test_json_holds_the_tokens_themselves(records, lm):
    (one,) = records("--feature", "3", "--top", "1")
    effects = logit_effects(lm, "M1", 10, np.array([3]))
    for kind, ids in (("promoted", effects.promoted[0]), ("suppressed", effects.suppressed[0])):
        assert [word["token"] for word in one[kind]] == [lm.tokenizer.decode([int(i)]) for i in ids]


def test_a_concept_lists_features_by_their_best_f1(records, lm, rows):
    shown = records("--concept", "word.the", "--top", "3")
    truth = storyworld.labels(unseen_stories(lm, LIMIT), lm.tokenizer, width=rows.shape[1], max_length=rows.shape[1])
    f1 = concept_f1(lm["M1"], rows, truth)[:, list(storyworld.CONCEPTS).index("word.the")]
    assert shown[0]["feature"] == int(f1.argmax())
    assert shown[0]["concept_f1"] == pytest.approx(f1.max(), abs=1e-4)


def test_the_best_f1_takes_a_threshold_where_a_dense_unit_needs_one():
    truth = np.arange(1024)[:, None] >= 1024 - 128
    acts = np.stack([1 + np.arange(1024), np.ones(1024)], axis=1)  # always active: its size detects the concept
    f1 = best_f1_of_all(acts.astype(np.float32), truth)[:, 0]
    assert f1[0] == 1
    assert f1[1] == pytest.approx(2 * 128 / (1024 + 128))


def test_people_get_a_table_and_a_page(capsys, top, searched):
    assert cli.main([*top, "-o", str(searched), "--site", "M1", "--top", "3"]) == 0
    assert "promotes" in capsys.readouterr().out
    for ranked, heading in (
        (["--contains", " the"], "top contexts on ' the'"),
        (["--concept", "dialogue"], "F1 for dialogue"),
    ):
        assert cli.main([*top, "-o", str(searched), "--site", "M1", "--top", "3", *ranked]) == 0
        assert heading in capsys.readouterr().out
    assert cli.main([*top, "-o", str(searched), "--site", "M1N5", "--top", "2"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("M1N5, ")
    parts = ("of its activations above 0, 10% are below ", "top contexts:", "sampled contexts, strongest 20%:")
    parts += ("sampled contexts, next 20%, to 40%:", "«", "promoted next tokens", "together")
    assert [part for part in parts if part not in page] == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--site", "M1", "--feature", "9999"], "feature 9999 is out of range; the dictionary has features 0.."),
        (["--site", "M1N9999"], "feature 9999 is out of range"),
        (["--site", "M7"], "layer 7 does not exist"),
        (["--site", "X"], "not a dictionary tag"),
        (["--site", "M1", "--top", "0"], "--top 0 must be 1 or more"),
        (["--site", "M1", "--limit", "0"], "--limit 0 must be 1 or more"),
        (["--site", "M1", "--contains", "a", "--feature", "1"], "cannot be combined"),
        (["--site", "M1N5", "--concept", "dialogue"], "give --site M1N5, or --site M1 --concept dialogue."),
        (["--site", "M1N5", "--contains", " a"], "give --site M1N5, or --site M1 --contains ' a'."),
        (["--site", "M1", "--contains", ""], "give a text"),
        (["--site", "M1", "--contains", "qqqq"], "no top context of a feature of M1 peaks on 'qqqq' in "),
        (["--site", "M1", "--concept", "feeling.badd"], "Closest: feeling.bad"),
        (["--site", "M1", "--concept", "feeling.bad", "--data", "x.txt"], "leave --data out"),
        (["--site", "M1", "--data", "nothing.txt"], "nothing.txt"),
        (["--site", "M1", "-o", f"{__file__}/where"], "test_top_command.py cannot be made"),
        (["--site", "M1", "-o", "."], "--out . is a folder; name a file"),
        (["--site", "M1N5", "--feature", "7"], "--site M1N5 names a feature, and so does --feature 7"),
        (["--site", "M1", "--dictionary", "none"], "--dictionary none does not exist"),
    ],
)
def test_bad_input_is_one_line(top, options, says, capsys):
    assert cli.main([*top, *options]) == 1
    assert says in error_line(capsys)


def test_data_of_another_kind_is_refused(top, tmp_path, capsys):
    counting = write_counting_data(tmp_path)
    assert cli.main([*top, "--site", "M1", "--data", str(counting)]) == 1
    assert "has 64 ids in rows of 24; the model takes 1024" in error_line(capsys)
    (tmp_path / "a.txt").write_text("\n")
    assert cli.main([*top, "--site", "M1", "--data", str(tmp_path / "a.txt")]) == 1
    assert "no story found" in error_line(capsys)


def test_short_stories_are_searched_at_the_width_that_they_need(lm, tmp_path):
    (tmp_path / "a.txt").write_text("One day, a fox was sad.\nMia went to the lake.\n")
    rows = open_rows(lm, str(tmp_path / "a.txt"), 9)
    assert rows.shape == (2, lm.config.n_ctx // 4)
    wide = top_activations(lm, "M1", pad_right(rows, lm.config.n_ctx, lm.config.pad_id))
    narrow = top_activations(lm, "M1", rows)
    assert narrow.data != wide.data
    np.testing.assert_array_equal(narrow.active, wide.active)
    np.testing.assert_array_equal(narrow.top.position, wide.top.position)
    np.testing.assert_allclose(narrow.total, wide.total, rtol=1e-5, atol=1e-5)


def test_the_file_of_another_search_is_refused(top, searched, capsys):
    assert cli.main([*top, "--site", "M1", "--limit", "5", "-o", str(searched)]) == 1
    same = f"holds a search of {LIMIT} rows instead of 5; give --limit {LIMIT}, name another file, or delete it."
    assert same in error_line(capsys)
    assert cli.main([*top, "--site", "M0", "--limit", "5", "-o", str(searched)]) == 1
    said = f"holds a search of site M1, of {LIMIT} rows instead of 5, of another dictionary; name another file"
    assert said in error_line(capsys)


def test_a_feature_shows_as_many_contexts_as_asked_for(story_model, searched, top, capsys):
    options = ["top", "--model", str(story_model), "--limit", "30", "--json", "--site", "M1N5"]
    assert cli.main([*options, "--top", "25"]) == 0
    (one,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert len(one["contexts"]) == 25


def test_a_file_with_fewer_contexts_is_refused(lm, rows, top, tmp_path, capsys):
    few = tmp_path / "few"
    top_activations(lm, "M1", rows, k=3).save(few)
    options = [*top, "-o", str(few), "--json"]
    assert cli.main([*options, "--site", "M1N5", "--top", "4"]) == 1
    assert "holds 3 contexts per feature, not 4; name another file" in error_line(capsys)
    assert cli.main([*options, "--site", "M1N5", "--top", "3"]) == 0


def test_the_f1_of_some_features_is_theirs_among_all(lm, rows, monkeypatch):
    truth = storyworld.labels(unseen_stories(lm, LIMIT), lm.tokenizer, width=rows.shape[1], max_length=rows.shape[1])
    real = rows < lm.config.begin_id
    expected = best_f1_of_all(np.asarray(lm["M1"](rows))[real], truth[real])
    monkeypatch.setattr("tinymodel_jax.analysis.search.feature_queries.TOKENS_AT_ONCE", 1000)
    seen = []
    f1 = concept_f1(lm["M1"], rows, truth, track=lambda parts, _: seen.extend(parts) or parts)
    np.testing.assert_allclose(f1, expected, atol=0.02)  # a threshold may fall between two equal activations
    assert np.mean(np.abs(f1 - expected) > 1e-6) < 1e-3
    some = np.array([5, 3])
    np.testing.assert_allclose(concept_f1(lm["M1"], rows, truth, some), f1[some], atol=0.02)


@pytest.mark.parametrize("question", [(), ("--feature", "5"), ("--contains", "a")])
def test_only_the_features_shown_are_scored_on_concepts(records, monkeypatch, question):
    scored = []

    def noting(acts, truth):
        scored.append(acts.shape[1])
        return best_f1_of_all(acts, truth)

    monkeypatch.setattr("tinymodel_jax.analysis.search.feature_queries.best_f1_of_all", noting)
    shown = records(*question, "--top", "3")
    assert scored == [len(shown)]
    assert all("concept" in one for one in shown)


def test_a_result_that_cannot_be_written_is_not_lost(top, tmp_path, capsys, monkeypatch):
    options = [*top, "--site", "M1", "-o", str(tmp_path / "m1.top"), "--json"]

    def full(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TopActivations, "save", full)
        assert cli.main(options) == 1
    assert "No space left" in error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["m1.top.work"]
    assert cli.main(options) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m1.top"]


def test_concepts_prints_writes_and_plots(story_model, tmp_path, capsys):
    out, plot = tmp_path / "new" / "concepts.json", tmp_path / "plots" / "concepts.png"
    options = ["--model", str(story_model), "--sites", "Ra1", "--stories", "4", "-o", str(out), "--plot", str(plot)]
    assert cli.main(["concepts", *options]) == 0
    shown = capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert len(rows) == 3 * len(storyworld.CONCEPTS)
    found = sum(row["place"] == "Ra1" and row["f1"] is not None and row["f1"] >= 0.8 for row in rows)
    line = next(line for line in shown.splitlines() if line.startswith("│ Ra1"))
    assert line.split("│")[3].strip() == str(found)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_table_of_concepts_shows_any_name(capsys):
    numbers = [np.full(2, 0.5)] * 6
    print_concepts([Recovery("M1[topk]:dog:", "dictionary", 1, 3, ConceptScores(*numbers))], 4)
    assert "│ M1[topk]:dog: │" in capsys.readouterr().out


def test_concepts_scores_dictionaries_of_folders(story_model, lm, tmp_path, capsys):
    for name in ("one", "two"):
        lm["M1"].dictionary.save_pretrained(tmp_path / name)
    both = ["--model", str(story_model), "--sites", "M1", "--dictionaries", str(tmp_path)]
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
        (["--sites", "M1, M1N5"], "--sites 'M1N5' names a feature; name the site, 'M1'"),
    ],
)
def test_bad_input_of_concepts_is_one_line(story_model, options, says, capsys):
    assert cli.main(["concepts", "--model", str(story_model), *options]) == 1
    assert says in error_line(capsys)
