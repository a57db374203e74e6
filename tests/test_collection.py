"""Collected activations equal those of each row by itself, in memory and in files, and can be trained on."""

import json
from typing import Any

import numpy as np
import pytest
from conftest import as_users_run_it
from oracle import F32, assert_close, error_of
from runs import train_here

from tinymodel_jax import TinyModel, collect_activations
from tinymodel_jax.lm.collection import Collected

NAMES = ("blocks.1.hook_mlp_in", "blocks.0.attn.hook_z", "blocks.1.hook_mlp_out")


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """More rows than a batch, of 0 to 16 tokens."""
    ids = np.random.default_rng(2).integers(0, 19, (20, 16)).astype(np.int32)
    lengths = 5 * np.arange(20) % 17
    return np.where(np.arange(16) < lengths[:, None], ids, 21)


def expected_of(lm: TinyModel, rows: np.ndarray) -> Collected:
    """Return what is to be collected, one row at a time."""
    acts: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    places = []
    for row, ids in enumerate(rows):
        tokens = ids[ids != lm.config.pad_id]
        found = lm.run_with_cache(tokens, NAMES)[1]
        for name in NAMES:
            acts[name] += [np.asarray(found[name])[0, position].ravel() for position in range(len(tokens))]
        places += [(row, position, tokens[position]) for position in range(len(tokens))]
    return Collected({name: np.stack(parts) for name, parts in acts.items()}, *np.array(places).T)


def assert_collected(found: Collected, expected: Collected) -> None:
    assert list(found.acts) == list(NAMES)
    for name in NAMES:
        assert_close(found.acts[name], expected.acts[name], F32)
    for got, place in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(got, place)


@pytest.mark.parametrize("spliced", [(), ("M0", "M1")])
def test_every_token_has_the_vectors_of_its_row_alone(lm, rows, spliced, tmp_path):
    lm = lm.splice(spliced)
    expected = expected_of(lm, rows)
    assert_collected(collect_activations(lm, rows, NAMES), expected)
    found = collect_activations(lm, rows, NAMES, tmp_path / "new" / "folder")
    assert_collected(found, expected)
    for name in NAMES:
        assert isinstance(found.acts[name], np.memmap)
        np.testing.assert_array_equal(np.load(tmp_path / "new" / "folder" / f"{name}.npy"), found.acts[name])


@pytest.mark.parametrize("names", ["blocks.?.hook_mlp_out", "blocks.[01].hook_mlp_out", lambda name: "mlp_out" in name])
def test_names_are_chosen_as_by_run_with_cache(lm, rows, names):
    chosen = lm.run_with_cache(rows[:2], names)[1]
    assert list(chosen) == ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    assert list(collect_activations(lm, rows[:2], names).acts) == list(chosen)


def test_stories_are_collected_with_their_begin_and_end(story_model):
    lm = TinyModel(story_model)
    found = collect_activations(lm, ["Mia saw a dog.", "Mia saw a dog and a cat."], "hook_embed", dtype="float16")
    for row, story in enumerate(("Mia saw a dog.", "Mia saw a dog and a cat.")):
        ids = found.tok_id[found.row == row]
        assert lm.to_string(ids) == f"[BEGIN]{story}[END]"
        np.testing.assert_array_equal(found.position[found.row == row], np.arange(len(ids)))
        np.testing.assert_array_equal(found.acts["hook_embed"][found.row == row], lm.W_E[ids].astype(np.float16))


def test_rows_of_all_lengths_share_a_few_programs_and_report_progress(lm, rows, compilations):
    shown: list[Any] = []

    def track(batches, what):
        shown.append(what)
        for batch in batches:
            shown.append(batch)
            yield batch

    with compilations() as count:
        collect_activations(lm, rows[:, :9], "blocks.0.hook_resid_mid", track=track)
        collect_activations(lm, rows, "blocks.0.hook_resid_mid")
    assert shown == ["collecting activations", 0, 16]
    assert count.value <= 8  # 5 lengths, and operations of the first call


def test_a_collection_that_stops_leaves_no_file_that_looks_whole(lm, rows, tmp_path):
    wrong = rows.copy()
    wrong[18, 2] = 99
    assert "id 99 at row 18, position 2" in error_of(lambda: collect_activations(lm, wrong, NAMES, tmp_path))
    assert list(tmp_path.iterdir()) == []
    collect_activations(lm, rows, "hook_embed", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    says = error_of(lambda: collect_activations(lm, rows[:2], "hook_embed", tmp_path), FileExistsError)
    assert "already has hook_embed.npy, row.npy, position.npy, tok_id.npy; name another folder" in says
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"names": "blocks.0.hook_mpl_out"}, "closest: blocks.0.hook_mlp_out"),
        ({"names": "blocks.0.attn.hook_pattern"}, "blocks.0.attn.hook_pattern has no vector per token"),
        ({"names": []}, "names is empty; name hook points such as"),
        ({"rows": []}, "the rows hold no token"),
        ({"rows": [[21, 21]]}, "the rows hold no token"),
        ({"rows": [[1.0]]}, "got float64 values"),
        ({"rows": [[21, 3]]}, "row 0 has [PAD] (id 21) at position 0, before a token"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'; it is 'float32' or 'float16'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(lm, tmp_path, change, says):
    with as_users_run_it():
        given: Any = {"rows": [[1, 2]], "names": "hook_embed", "out": tmp_path / "out"} | change
        assert says in error_of(lambda: collect_activations(lm, **given))
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.slow
def test_what_is_collected_is_what_the_training_program_reads(lm, tmp_path):
    ids = np.random.default_rng(3).integers(0, 19, (64, 16))
    found = collect_activations(lm, ids, ["blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"], tmp_path / "acts")
    files = [f"--activations={tmp_path}/acts/blocks.1.hook_mlp_in.npy"]
    files += [f"--targets={tmp_path}/acts/blocks.1.hook_mlp_out.npy"]
    options = ["--n-features=24", "--steps=3", "--batch-size=64", "--architecture=topk", "--k=4"]
    assert train_here("dictionaries", *files, *options, "--out", tmp_path / "run") == 0
    (record,) = json.loads((tmp_path / "run" / "sweep.json").read_text())["dictionaries"]
    assert record["results"]["tokens"] == len(found.tok_id) // 20
    lm.attach("M1", tmp_path / "run" / record["folder"])
    assert lm["M1"](ids[:1]).shape == (1, 16, 24)
