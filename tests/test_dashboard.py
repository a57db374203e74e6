"""The numbers of a dashboard equal NumPy's, and its folder appears whole or not at all."""

import dataclasses
import importlib
import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_users_run_it, make_dictionary
from oracle import F32, assert_close, encode, forward

from tinymodel_jax.analysis.effects.importance import CausalImportance, MeanEffect
from tinymodel_jax.analysis.report.dashboard import build, folders, windows
from tinymodel_jax.analysis.report.dashboard.build import (
    Heading,
    LinkedTokens,
    gather,
    gather_links,
    promoted_tokens,
    read_data,
    text_records,
    write_data,
    write_front,
    write_links,
    write_measured,
)
from tinymodel_jax.analysis.report.dashboard.records import Facts, link_records, rounded, shard_records, text_record
from tinymodel_jax.analysis.report.dashboard.weights_graph import strongest_products, weights_graph
from tinymodel_jax.analysis.report.dashboard.windows import BEFORE, TOP, window_activations
from tinymodel_jax.analysis.search.contexts import Contexts
from tinymodel_jax.analysis.search.top_activations import top_activations
from tinymodel_jax.commands import cli
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.hook_points import vector_width
from tinymodel_jax.params import flatten

SPECIAL, UNK = (19, 20, 21), 22
MINI = ["dashboard", "--site", "M2", "--model", "mini", "--limit", "6"]


def silent(things, what):
    del what
    return things


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Thirty rows of the tiny model: begin, ordinary ids and unknown words, end, padding."""
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 19, (30, 16))
    for row, length in zip(ids, rng.integers(2, 16, 30), strict=True):
        row[length - 1] = UNK
        row[0], row[length], row[length + 1 :] = SPECIAL
    return ids.astype(np.uint16)


@pytest.fixture(scope="module")
def facts(shared_lm: TinyModel, rows: np.ndarray) -> Facts:
    found = top_activations(shared_lm, "M1", rows)
    rng = np.random.default_rng(0)
    f1, stream = rng.random((12, 5)), rng.normal(size=(12, 16)).astype(np.float32)
    kl, loss, kl_all, loss_all = (MeanEffect(*rng.normal(size=(2, 12))) for _ in range(4))
    importance = CausalImportance(3, rng.integers(0, 4, 12), kl, loss, kl_all, loss_all, stream)
    measured = gather(shared_lm["M1"], rows, found, silent)
    return dataclasses.replace(measured, f1=f1, importance=importance)


@pytest.fixture(scope="module")
def links(shared_lm: TinyModel) -> LinkedTokens:
    others = shared_lm.dictionary_tags[:-1]
    return gather_links(shared_lm, "M1", others, lambda tag: promoted_tokens(shared_lm, tag), silent)


@pytest.mark.parametrize(
    ("tag", "upstream", "downstream"),
    [
        ("M0", [], ["Ra1", "Rm1", "M1"]),
        ("Ra1", ["M0"], ["Rm1", "M1"]),
        ("A1", [], ["Rm1", "M1"]),
        ("Rm1", ["M0", "A1"], ["M1"]),
        ("M1", ["M0", "A1"], []),
        ("Mo1", [], []),
    ],
)
def test_the_forward_pass_decides_who_can_speak_to_whom(lm, tag, upstream, downstream):
    graph = weights_graph(lm, tag, [other for other in lm.dictionary_tags if other != tag], top=3)
    assert (list(graph.upstream), list(graph.downstream)) == (upstream, downstream)
    own = lm[tag].dictionary.params
    for other, links in [*graph.upstream.items(), *graph.downstream.items()]:
        theirs = lm[other].dictionary.params
        up = other in upstream
        weights = np.asarray(theirs["W_dec"] @ own["W_enc"]).T if up else np.asarray(own["W_dec"] @ theirs["W_enc"])
        order = np.argsort(-np.abs(weights), axis=1)[:, :3]
        np.testing.assert_array_equal(links.features, order)
        np.testing.assert_allclose(links.values, np.take_along_axis(weights, order, axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    ("source", "target", "fixed"),
    [
        ("M0", "M1", ["blocks.1.hook_attn_out"]),
        ("blocks.0.mlp.hook_post", "blocks.1.attn.hook_k", []),
        ("blocks.0.attn.hook_z", "blocks.1.mlp.hook_pre", ["blocks.0.hook_mlp_out", "blocks.1.hook_attn_out"]),
    ],
)
def test_a_direct_weight_is_what_a_unit_of_activation_adds(lm, tok_ids, source, target, fixed):
    """With everything in between held fixed, steering a feature moves the target's pre-activations by the weights."""
    for name in (source, target):
        if name not in lm.dictionary_tags:
            width = vector_width(name, lm.config)
            lm.attach(name, make_dictionary(name, name, d_in=width, d_out=width))
    links = weights_graph(lm, target, [source], top=12).upstream[source]
    weights = weights_graph(lm, source, [target], top=12).downstream[target]
    written, read = lm[source].dictionary.config.hook_out, lm[target].dictionary.config.hook_in
    direction, W_enc = (
        np.asarray(lm[tag].dictionary.params[name]) for tag, name in ((source, "W_dec"), (target, "W_enc"))
    )
    _, clean = forward(flatten(lm.params), lm.config, tok_ids)
    edits: dict[str, Any] = {name: lambda x, seen, name=name: clean[name] for name in fixed}
    edits[written] = lambda x, seen: x + 0.5 * direction[5].reshape(x.shape[2:])
    _, steered = forward(flatten(lm.params), lm.config, tok_ids, edits)
    moved = (steered[read] - clean[read]).reshape(*tok_ids.shape, -1) @ W_enc
    expected = np.broadcast_to(0.5 * links.values[links.features == 5], moved.shape)
    np.testing.assert_allclose(moved, expected, atol=1e-5)
    in_order = weights.values[5][np.argsort(weights.features[5])]
    np.testing.assert_allclose(moved[0, 0], 0.5 * in_order, atol=1e-5)


def test_the_strongest_products_are_the_same_whatever_the_chunks(monkeypatch):
    monkeypatch.setattr(importlib.import_module("tinymodel_jax.analysis.circuits.virtual_weights"), "TOGETHER", 5)
    W = np.random.default_rng(0).normal(size=(13, 6)).astype(np.float32)
    products = strongest_products(jnp.asarray(W), jnp.asarray(W[:7]), 7)
    np.testing.assert_allclose(np.take_along_axis(W @ W[:7].T, products.features, axis=1), products.values, atol=1e-5)


@pytest.fixture(scope="module")
def read(shared_lm: TinyModel, rows: np.ndarray) -> np.ndarray:
    """The input of a dictionary at M1 when the model runs through the one at M0."""
    name = "blocks.1.hook_mlp_in"
    return np.asarray(shared_lm.splice("M0").run_with_cache(rows, name)[1][name])


def strongest_rows(acts: np.ndarray, n: int) -> Contexts:
    """Return the rows with the largest peaks of each feature."""
    peaks = acts.max(axis=1).T
    order = np.argsort(-peaks, axis=1)[:, :n]
    value = np.take_along_axis(peaks, order, axis=1)
    position = np.take_along_axis(acts.argmax(axis=1).T, order, axis=1)
    return Contexts(value, np.where(value > 0, order, -1).astype(np.int32), position.astype(np.int32))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("relu", {}), ("topk", {"k": 3}), ("batch_topk", {"k": 3}), ("jumprelu", {}), ("gated", {})],
)
def test_windows_hold_the_activations_of_the_whole_dictionary(lm, rows, read, architecture, options, monkeypatch):
    monkeypatch.setattr(windows, "TOGETHER", 7)
    site = "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"
    lm.attach("M1", make_dictionary(*site, architecture=architecture, subtract_b_dec=True, **options))
    spliced = lm.splice("M0")
    dense = encode(spliced["M1"].dictionary.params, spliced["M1"].dictionary.config, read)
    dense[np.isin(rows, SPECIAL)] = 0
    contexts = strongest_rows(dense, 9)
    acts = window_activations(spliced["M1"], rows, contexts, batch=4)
    assert np.any(contexts.row >= 0)
    for (feature, number), row in np.ndenumerate(contexts.row):
        expected = np.zeros(acts.shape[2])
        for i in range(acts.shape[2]):
            place = contexts.position[feature, number] - BEFORE + i
            if row >= 0 and 0 <= place < rows.shape[1]:
                expected[i] = dense[row, place, feature]
        assert_close(acts[feature, number], expected, F32)
    present = contexts.row >= 0
    np.testing.assert_allclose(acts[..., BEFORE][present], contexts.value[present], rtol=1e-4)


def test_a_band_shows_contexts_from_its_whole_width(facts):
    for feature in range(12):
        for band, kept in enumerate(facts.found.bands(feature, windows.BANDS)):
            first = TOP + band * windows.OF_A_BAND
            shown = facts.contexts.row[feature, first : first + windows.OF_A_BAND]
            shown = shown[shown >= 0]
            size = kept.row.shape[1]
            assert len(shown) == min(size, windows.OF_A_BAND)
            assert not size or (shown[0], shown[-1] if size > 1 else shown[0]) == (kept.row[0, 0], kept.row[0, -1])


def test_a_record_says_what_was_found(facts, rows, lm):
    records = shard_records(facts, rows, lm.config, 3, 9)
    assert len(records) == 6
    found = facts.found
    for feature, record in enumerate(records, 3):
        assert record["histogram"] == found.histogram[feature].tolist()
        assert record["mean"] == pytest.approx(found.mean[feature], rel=1e-3)
        assert [f for f, _ in record["partners"] or []] == [f for f in found.partners[feature] if f >= 0]
        assert [token for token, _ in record["promoted"]] == facts.logits.promoted[feature].tolist()
        assert [f for f, _ in record["neighbours"]] == lm["M1"].dictionary.neighbours(feature, 8).features.tolist()
        assert record["concepts"][0] == [facts.f1[feature].argmax(), pytest.approx(facts.f1[feature].max(), rel=1e-3)]
        assert record["effects"]["kl_all"][0] == pytest.approx(facts.importance.kl_all.mean[feature], rel=1e-3)
        shown = [context for context in record["contexts"] if context]
        assert len(shown) == np.sum(found.top.row[feature, :TOP] >= 0)
        at = (facts.contexts.row[feature], facts.contexts.position[feature], facts.contexts.value[feature])
        for (row, peak, ids, acts), own_row, position, value in zip(shown, *at, strict=False):
            assert row == own_row
            assert ids == [token for token in rows[row, max(0, position - 12) : position + 7] if token not in SPECIAL]
            assert ids[peak] == rows[row, position]
            assert acts[peak] == pytest.approx(value, rel=1e-3)
            assert len(acts) == len(ids)


def test_a_record_lists_the_links_of_its_feature(links):
    for feature, record in enumerate(link_records(links.graph, links.promoted, 3, 9), 3):
        for tag, listed in record["upstream"].items():
            found = links.graph.upstream[tag]
            assert [f for f, _, _ in listed] == found.features[feature].tolist()
            assert [weight for _, weight, _ in listed] == pytest.approx(found.values[feature], rel=1e-3)
            assert [words for _, _, words in listed] == [links.promoted[tag][f].tolist() for f, _, _ in listed]
        assert list(record["upstream"]) == ["M0", "A1"]
        assert record["downstream"] == {}


def test_a_text_lists_the_strongest_features_of_each_token():
    acts = np.zeros((5, 20), np.float32)
    acts[1, 2:15] = np.arange(13) + 1
    acts[2, 3] = 0.5
    record = text_record(np.array([19, 4, UNK, 6, 20]), acts, ModelConfig(d_vocab=23))
    assert record["tokens"] == [4, UNK, 6]
    assert record["strongest"] == [[14, 13, 12, 11, 10, 9, 8, 7], [3], []]
    assert record["activity"]["3"] == [[0, 1], [2, 0.5]]
    assert set(record["activity"]) == {"3", *map(str, range(7, 15))}


def test_numbers_keep_four_digits():
    assert rounded([0.0, -0.0, 1.23456, -0.000123456, 98765.4]) == [0, 0, 1.235, -0.0001235, 98770]
    assert rounded(np.array([[1 / 3], [0]]), 2) == [[0.33], [0]]
    assert rounded(np.zeros((2, 0))) == [[], []]


def test_what_is_written_is_read_and_is_never_code(tmp_path):
    (tmp_path / "data").mkdir()
    value = {"text": '</script><script>alert("1")', "é": [1, None]}
    write_data(tmp_path, "index", value)
    assert read_data(tmp_path, "index") == value
    assert "<" not in (tmp_path / "data/index.js").read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_data(tmp_path, "index", [float("nan")])


def test_the_shards_hold_every_feature_once(facts, links, rows, tmp_path, lm, monkeypatch):
    monkeypatch.setattr(build, "A_SHARD", 5)
    texts = text_records(lm["M1"], [[19, 4, 5]], silent)
    words, concepts = [f"w{i}" for i in range(23)], {f"c{i}": "what it means" for i in range(5)}
    write_measured(tmp_path, Heading("lm", "M1", "about", ()), facts, rows, words, lm.config, concepts, texts, silent)
    write_links(tmp_path, links, 12, silent)
    assert [len(read_data(tmp_path, f"links-000{i}")) for i in range(3)] == [5, 5, 2]
    shards = [read_data(tmp_path, f"shard-000{i}") for i in range(3)]
    assert [len(shard) for shard in shards] == [5, 5, 2]
    assert [*shards[0], *shards[1], *shards[2]] == json.loads(json.dumps(shard_records(facts, rows, lm.config, 0, 12)))
    index = read_data(tmp_path, "index")
    assert index["columns"]["active"] == facts.found.active.tolist()
    assert index["logit_unit"] == facts.logits.unit == "one unit of activation"
    assert index["columns"]["concept"] == facts.f1.argmax(axis=1).tolist()
    assert index["columns"]["effect"] == pytest.approx(facts.importance.kl_all.mean, rel=1e-3)
    for feature, peaks in enumerate(index["columns"]["peaks"]):
        at = facts.found.top
        tokens = [int(rows[r, p]) for r, p in zip(at.row[feature], at.position[feature], strict=True) if r >= 0]
        assert peaks == sorted(set(tokens), key=lambda t: (-tokens.count(t), tokens.index(t)))[:3]
    assert read_data(tmp_path, "vocabulary") == words
    assert read_data(tmp_path, "text-1")["tokens"] == [4, 5]


def test_one_feature_that_is_never_active_makes_pages_too(lm, rows, tmp_path):
    dictionary = make_dictionary("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out", n_features=1)
    lm.attach("M1", Dictionary.from_params(dictionary.config, dictionary.params | {"b_enc": jnp.full(1, -1e6)}))
    alone, heading = gather(lm["M1"], rows, top_activations(lm, "M1", rows), silent), Heading("lm", "M1", "", ())
    write_measured(tmp_path, heading, alone, rows, [""] * 23, lm.config, {}, [], silent)
    write_front(tmp_path, heading)
    [record] = read_data(tmp_path, "shard-0000")
    assert record["neighbours"] == []
    assert record["partners"] is None
    assert record["contexts"] == [None] * TOP
    assert read_data(tmp_path, "index")["columns"]["active"] == [0]


@pytest.mark.slow
def test_a_stopped_dashboard_leaves_no_pages_and_goes_on_from_its_search(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "pages"

    def stop(*given, **options):
        raise KeyboardInterrupt

    with as_users_run_it(), monkeypatch.context() as patch:
        patch.setattr(build, "write_page", stop)
        assert cli.main([*MINI, "-o", str(out)]) == 130
    assert not out.exists()
    assert {path.name for path in (out.parent / "pages.partial").iterdir()} == {"search.safetensors", "data"}
    capsys.readouterr()
    with as_users_run_it():
        assert cli.main([*MINI, "-o", str(out), "--limit", "5"]) == 1
    assert (
        f"--out {out}: {out}.partial holds unfinished work on a dashboard with other options" in capsys.readouterr().err
    )
    with as_users_run_it(), monkeypatch.context() as patch:
        patch.setattr("tinymodel_jax.analysis.search.top_activations.top_activations", stop)
        assert cli.main([*MINI, "-o", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["n_features"] == TinyModel("mini")["M2"].dictionary.config.n_features
    assert record["bytes"] == sum(path.stat().st_size for path in out.rglob("*.*"))
    assert [path.name for path in out.parent.iterdir()] == ["pages"]
    assert {path.name for path in out.iterdir()} == {"index.html", "data"}


def pages_of(folder: Path, name: str) -> Path:
    """Make a folder like a dashboard's, with `name` on its page."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(f"{folders.GENERATOR} {name}")
    return folder


@pytest.mark.parametrize("stopped_at", ["rmtree", "replace"])
def test_a_run_that_is_stopped_while_it_takes_its_place_leaves_nothing_to_the_next(tmp_path, monkeypatch, stopped_at):
    out, partial = pages_of(tmp_path / "pages", "first"), pages_of(tmp_path / "pages.partial", "second")
    kept = pages_of(tmp_path / "pages.old", "kept")  # a user's own

    def stop(*given, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil if stopped_at == "rmtree" else folders.os, stopped_at, stop)
        with pytest.raises(KeyboardInterrupt):
            folders.publish(partial, out)
    assert folders.open_partial(out) == partial
    folders.publish(pages_of(partial, "third"), out)
    assert (out / "index.html").read_text().endswith("third")
    assert (kept / "index.html").read_text().endswith("kept")
    assert {path.name for path in tmp_path.iterdir()} == {"pages", "pages.old"}


@pytest.mark.parametrize("error", [OSError("disk gone"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_the_older_pages_survive_a_replacement_that_fails(tmp_path, monkeypatch, error):
    out, partial = pages_of(tmp_path / "pages", "first"), pages_of(tmp_path / "pages.partial", "second")
    (out / "data/index.js").write_text("first")
    move = os.replace

    def fail(source, target):
        if source == partial:
            raise error
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "replace", fail)
        with pytest.raises(type(error)):
            folders.publish(partial, out)
    assert (out / "index.html").read_text().endswith("first")
    assert (out / "data/index.js").read_text() == "first"
    assert folders.open_partial(out) == partial


def test_the_older_pages_come_back_from_a_run_that_was_killed_while_it_replaced_them(tmp_path):
    out, partial = tmp_path / "pages", pages_of(tmp_path / "pages.partial", "second")
    pages_of(partial / folders.REPLACED, "first")
    assert folders.open_partial(out) == partial
    assert (out / "index.html").read_text().endswith("first")
    assert not list(partial.iterdir())


def test_a_file_that_appeared_among_the_older_pages_is_kept_with_them(tmp_path):
    out, partial = pages_of(tmp_path / "pages", "first"), tmp_path / "pages.partial"
    folders.open_partial(out)
    (out / "notes").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not a dashboard"):
        folders.publish(pages_of(partial, "second"), out)
    assert (out / "notes").read_text() == "mine"
    assert (out / "index.html").read_text().endswith("first")
    assert (out / "data").is_dir()


def test_an_older_dashboard_is_replaced(tmp_path):
    older, partial = pages_of(tmp_path / "pages", "first"), pages_of(tmp_path / "pages.partial", "second")
    (older / "data/shard-0999.js").touch()
    for name in folders.WORK:
        (partial / name).touch()
    assert folders.open_partial(older) == partial
    folders.publish(pages_of(partial, "third"), older)
    assert {path.name for path in older.iterdir()} == {"index.html", "data"}
    assert not list((older / "data").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["pages"]


def test_a_folder_that_holds_something_else_is_refused(tmp_path, capsys):
    other = pages_of(tmp_path / "other", "")
    (other / "index.html").write_text("my own page")
    mixed = pages_of(tmp_path / "mixed", "")
    (mixed / "notes").touch()
    for folder in (other, mixed):
        with pytest.raises(ValueError, match="exists and is not a dashboard; name another folder"):
            folders.open_partial(folder)
    with as_users_run_it():
        assert cli.main([*MINI, "-o", str(mixed)]) == 1
    error = capsys.readouterr().err
    assert f"{mixed} exists and is not a dashboard" in error
    assert error.count("\n") == 1
    assert (other / "index.html").read_text() == "my own page"
    assert (mixed / "notes").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--site", "M2N5"], "--site 'M2N5' names a feature"),
        (["--site", "M9"], "layer 9 does not exist"),
        (["--effects", "-1"], "--effects -1 must be 0"),
        (["--with", "M0N3"], "--with 'M0N3' names a feature"),
        (["--with", "T1"], "'T1': this model has no dictionary there"),
        (["--text", ""], "--text '' has 0 tokens"),
        (["--dictionary", "no/where"], "--dictionary no/where does not exist"),
        (["-o", f"{__file__}/where"], f"--out: the folder {__file__} cannot be made"),
        (["--limit", "0"], "--limit 0 must be 1 or more"),
        (["--limit", "2", "--effects", "3"], "--effects 3: 2 of the rows read have a token to predict"),
    ],
)
def test_bad_input_is_one_line(options, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with as_users_run_it():
        assert cli.main([*MINI, "-o", "pages", *options]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(Path().iterdir())
