"""The search over all features equals what NumPy finds in the whole array of activations, with any batches."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_users_run_it, make_dictionary
from oracle import F32, assert_close, encode

from tinymodel_jax.analysis.search import activation_pass
from tinymodel_jax.analysis.search import top_activations as module
from tinymodel_jax.analysis.search.contexts import uniform
from tinymodel_jax.analysis.search.feature_statistics import feature_chunks, statistics
from tinymodel_jax.analysis.search.top_activations import EDGES, TopActivations, load_top_activations, top_activations
from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel

K, SAMPLED = 4, 6
SPECIAL, UNK = (19, 20, 21), 22
ROUNDING = 4 * np.finfo(np.float32).eps
ARCHITECTURES = {
    "relu": {},
    "topk": {"k": 3},
    "batch_topk": {"k": 3},
    "jumprelu": {},
    "gated": {},
    "groupmax": {"k": 5},
}


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Thirty rows of the tiny model: begin, ordinary ids and unknown words, end, padding."""
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 19, (30, 11))
    for row, length in zip(ids, rng.integers(2, 11, 30), strict=True):
        row[length - 1] = UNK
        row[0], row[length], row[length + 1 :] = SPECIAL
    return ids.astype(np.uint16)


@pytest.fixture(scope="module")
def activations(shared_lm: TinyModel, rows: np.ndarray) -> np.ndarray:
    acts = np.array(shared_lm["M1"](rows))
    acts[np.isin(rows, SPECIAL)] = 0
    return acts


@pytest.fixture(scope="module")
def found(shared_lm: TinyModel, rows: np.ndarray) -> TopActivations:
    return top_activations(shared_lm, "M1", rows, k=K, n_sampled=SAMPLED, batch=7)


def assert_equal(one: TopActivations, other: TopActivations) -> None:
    """Compare results: whole numbers exactly, activations up to float32 rounding of another batch's products."""
    for name in ("tag", "data", "n_rows", "n_tokens", "histogram_every"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("histogram", "active", "partners", "correlation"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_allclose(one.total, other.total, rtol=1e-5)
    for name in ("top", "sampled"):
        a, b = getattr(one, name), getattr(other, name)
        np.testing.assert_array_equal(a.row, b.row)
        np.testing.assert_array_equal(a.position, b.position)
        # An activation is a difference of products and a threshold: it is as inexact as the largest of them.
        np.testing.assert_allclose(a.value, b.value, rtol=1e-5, atol=ROUNDING * np.max(b.value))


def test_top_contexts_are_the_rows_with_the_largest_peaks(found, activations):
    peaks = activations.max(axis=1)
    for feature, peak in enumerate(peaks.T):
        order = np.argsort(-peak, kind="stable")[:K]
        order = order[peak[order] > 0]
        n = len(order)
        np.testing.assert_array_equal(found.top.row[feature], [*order, *[-1] * (K - n)])
        np.testing.assert_allclose(found.top.value[feature, :n], peak[order], rtol=1e-5)
        np.testing.assert_array_equal(found.top.position[feature, :n], activations[order, :, feature].argmax(axis=1))
    assert np.all(found.top.value[found.top.row < 0] == 0)


def test_counts_sums_and_histograms_are_those_of_all_tokens(found, activations, rows):
    real = int(np.sum(~np.isin(rows, SPECIAL)))
    assert (found.n_tokens, found.n_rows) == (real, 30)
    np.testing.assert_allclose(found.density, (activations > 0).sum(axis=(0, 1)) / real)
    np.testing.assert_allclose(found.total, activations.sum(axis=(0, 1), dtype=np.float64), rtol=1e-5)
    for feature in range(found.n_features):
        values = activations[..., feature][activations[..., feature] > 0]
        expected, _ = np.histogram(np.clip(values, EDGES[0], EDGES[-2]), EDGES)
        np.testing.assert_array_equal(found.histogram[feature], expected)
        assert found.mean[feature] == pytest.approx(values.mean() if len(values) else 0, rel=1e-5)
        assert found.largest[feature] == pytest.approx(values.max() if len(values) else 0, rel=1e-5)
        for share in (0.0, 0.3, 0.5, 0.9, 1.0):
            true = np.quantile(values, share, method="inverted_cdf") if len(values) else 0
            assert true / 1.5 <= found.quantile(share)[feature] <= true * 1.5


def test_the_histogram_of_many_tokens_is_of_every_nth_position(lm, rows, activations, monkeypatch):
    monkeypatch.setattr(
        "tinymodel_jax.analysis.search.top_activations.HISTOGRAM_TOKENS", int(np.sum(~np.isin(rows, SPECIAL))) // 3
    )
    found = top_activations(lm, "M1", rows, k=K, n_sampled=SAMPLED, batch=7)
    assert found.histogram_every == 3
    first = (3 * uniform(0, np.arange(30))).astype(int)
    assert set(first) == {0, 1, 2}
    counted = np.arange(11) % 3 == first[:, None]
    np.testing.assert_array_equal(found.histogram.sum(axis=1), (activations[counted] > 0).sum(axis=0))
    np.testing.assert_array_equal(found.active, (activations > 0).sum(axis=(0, 1)))
    unseen = (found.active > 0) & (found.histogram.sum(axis=1) == 0)
    np.testing.assert_array_equal(found.quantile(0.5)[unseen], found.mean[unseen])


def test_the_sample_is_of_the_rows_at_which_a_feature_is_active(found, activations):
    peaks = activations.max(axis=1)
    draws = uniform(0, np.arange(30))
    for feature, peak in enumerate(peaks.T):
        active = np.flatnonzero(peak > 0)
        chosen = active[np.argsort(-draws[active], kind="stable")[:SAMPLED]]
        chosen = chosen[np.argsort(-peak[chosen], kind="stable")]
        np.testing.assert_array_equal(found.sampled.row[feature, : len(chosen)], chosen)
        bands = found.bands(feature, 3)
        np.testing.assert_array_equal(np.concatenate([b.row[0] for b in bands]), chosen)
        assert max(len(b.row[0]) for b in bands) - min(len(b.row[0]) for b in bands) <= 1


def test_partners_are_the_largest_correlations_of_activity(found, activations, rows):
    active = activations[~np.isin(rows, SPECIAL)] > 0
    for i in range(found.n_features):
        phi = {}
        for j in range(found.n_features):
            varies = 0 < active[:, i].sum() < len(active) and 0 < active[:, j].sum() < len(active)
            if i != j and varies and np.sum(active[:, i] & active[:, j]) >= 3:
                phi[j] = np.corrcoef(active[:, i], active[:, j])[0, 1]
        best = [j for j in sorted(phi, key=lambda j: -phi[j]) if phi[j] > 0][:10]
        np.testing.assert_array_equal(found.partners[i], [*best, *[-1] * (10 - len(best))])
        np.testing.assert_allclose(found.correlation[i, : len(best)], [phi[j] for j in best], rtol=1e-5)


@pytest.mark.parametrize("batch", [4, 64])
def test_the_batch_does_not_change_the_result(lm, rows, found, batch):
    assert_equal(top_activations(lm, "M1", rows, k=K, n_sampled=SAMPLED, batch=batch), found)


def test_a_sample_of_tokens_does_not_depend_on_the_batch(lm, rows, monkeypatch):
    monkeypatch.setattr(module, "COACTIVATION_TOKENS", 60)
    one, other = (top_activations(lm, "M1", rows, batch=batch) for batch in (4, 7))
    assert_equal(one, other)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chunks_of_features_do_not_change_the_activations(architecture, monkeypatch):
    monkeypatch.setattr("tinymodel_jax.analysis.search.feature_statistics.TOGETHER", 5)
    options = {"n_features": 10, "subtract_b_dec": True, **ARCHITECTURES[architecture]}
    site = "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"
    dictionary = make_dictionary(*site, architecture=architecture, **options)
    x = np.random.default_rng(0).normal(size=(3, 9, 16)).astype(np.float32)
    acts = encode(dictionary.params, dictionary.config, x)
    chunks = feature_chunks(dictionary.params, dictionary.config)
    assert len(chunks) == (1 if architecture in ("topk", "groupmax") else 2)
    real, first = np.ones((3, 9), bool), np.zeros(3, np.int32)
    parts = [statistics(chunk, x, real, first, config=dictionary.config, every=1) for chunk in chunks]
    assert_close(np.concatenate([p.peak for p in parts], axis=1), acts.max(axis=1), F32)
    assert_close(np.concatenate([p.total for p in parts], axis=1), acts.sum(axis=1), F32)
    active = np.concatenate([p.active for p in parts], axis=1)
    np.testing.assert_array_equal(active, (acts > 0).sum(axis=1))
    counted = np.concatenate([p.histogram[0] for p in parts], axis=1).sum(axis=0)
    np.testing.assert_array_equal(counted, active.sum(axis=0))


def test_a_planted_feature_finds_its_token(lm, rows):
    """A dictionary of the embedding whose features are the directions of two tokens."""
    W_E, W_pos = np.asarray(lm.params["W_E"]), np.asarray(lm.params["W_pos"])
    solved = np.linalg.pinv(np.concatenate([W_E[[3, 7]], W_pos[:1]])).astype(np.float32)
    config = DictionaryConfig("blocks.0.hook_resid_pre", "blocks.0.hook_resid_pre", d_in=16, d_out=16, n_features=2)
    params = {"W_enc": solved[:, :2], "b_enc": np.zeros(2, np.float32)}
    params |= {"W_dec": W_E[[3, 7]], "b_dec": np.zeros(16, np.float32)}
    planted = lm.splice([])
    planted.params = {
        **lm.params,
        "W_E": jnp.asarray(np.where(np.isin(np.arange(23), [3, 7])[:, None], W_E, 0)),
        "W_pos": jnp.zeros_like(lm.params["W_pos"]),
    }
    planted.attach("Ra0", Dictionary.from_params(config, params))
    found = top_activations(planted, "Ra0", rows, k=30, batch=7)
    for feature, token in enumerate((3, 7)):
        holds = np.flatnonzero((rows == token).any(axis=1))
        kept = found.top.row[feature][found.top.value[feature] > 0.5]
        np.testing.assert_array_equal(np.sort(kept), holds)
        assert np.all(rows[kept, found.top.position[feature][: len(kept)]] == token)


def test_a_spliced_model_is_searched_as_it_is(lm, rows, found):
    spliced = lm.splice("M0")
    acts = np.array(spliced["M1"](rows))
    acts[np.isin(rows, SPECIAL)] = 0
    of_spliced = top_activations(spliced, "M1", rows, batch=7)
    np.testing.assert_allclose(of_spliced.largest, acts.max(axis=(0, 1)), rtol=1e-5)
    assert not np.allclose(of_spliced.largest, found.largest)


class Stopped(Exception):
    """Error that stops a search halfway."""


def stop_after(n: int):
    def progress(starts, _):
        for count, start in enumerate(starts):
            if count == n:
                raise Stopped
            yield start

    return progress


def test_a_stopped_search_goes_on_and_gives_the_same(lm, rows, found, tmp_path, monkeypatch):
    monkeypatch.setattr(activation_pass, "SAVE_EVERY", 0.0)
    work = tmp_path / "work"
    done = []
    for n in (2, 3):
        with pytest.raises(Stopped):
            top_activations(lm, "M1", rows, k=K, n_sampled=SAMPLED, batch=4, work_file=work, track=stop_after(n))

    def noting(starts, _):
        for start in starts:
            done.append(start)
            yield start

    resumed = top_activations(lm, "M1", rows, k=K, n_sampled=SAMPLED, batch=4, work_file=work, track=noting)
    assert done == [12, 16, 20, 24, 28]
    assert_equal(resumed, found)


def test_a_finished_search_stays_until_its_result_is_kept(lm, rows, found, tmp_path, monkeypatch):
    options = {"k": K, "n_sampled": SAMPLED, "batch": 7, "work_file": tmp_path / "work"}
    top_activations(lm, "M1", rows, **options)
    monkeypatch.setattr(activation_pass.ActivationPass, "measure", None)  # nothing is measured again
    assert_equal(top_activations(lm, "M1", rows, **options), found)


def test_a_work_file_of_another_search_is_refused(lm, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(activation_pass, "SAVE_EVERY", 0.0)
    work = tmp_path / "work"
    with pytest.raises(Stopped):
        top_activations(lm, "M1", rows, batch=4, work_file=work, track=stop_after(2))
    other = lm.splice([])
    other.params = {**lm.params, "W_pos": lm.params["W_pos"] + 1}
    reader = lm["M1"].dictionary
    bfloat16, shifted = lm.splice([]), lm.splice([])
    changes = ((bfloat16, {"dtype": "bfloat16"}), (shifted, {"subtract_b_dec": True}))
    for other_lm, change in changes:
        other_lm.attach("M1", Dictionary.from_params(dataclasses.replace(reader.config, **change), reader.params))
    for changed, arguments, options in [
        ("dictionary", (bfloat16, "M1", rows), {}),
        ("dictionary", (shifted, "M1", rows), {}),
        ("data", (lm, "M1", rows[:-1]), {}),
        ("k", (lm, "M1", rows), {"k": 3}),
        ("model", (other, "M1", rows), {}),
        ("model", (lm.splice("M0"), "M1", rows), {}),
        ("dictionary", (lm, "Rm1", rows), {}),
    ]:
        with as_users_run_it(), pytest.raises(ValueError, match=f"changed: .*{changed} "):
            top_activations(*arguments, batch=4, work_file=work, **options)


def test_the_file_gives_back_all_of_it(found, tmp_path):
    found.save(tmp_path / "found")
    again = load_top_activations(tmp_path / "found")
    assert_equal(again, found)
    assert {f.name for f in dataclasses.fields(again)} == {f.name for f in dataclasses.fields(found)}


@pytest.mark.parametrize("content", [b"", b"words", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_another_file_is_one_line(tmp_path, content):
    (tmp_path / "found").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or not a result of `tinymodel top`"):
        load_top_activations(tmp_path / "found")


def test_bad_input_is_one_line(lm, rows):
    with as_users_run_it():
        for arguments, options, says in [
            (("M1N3", rows), {}, "names a feature; name the site, 'M1'"),
            (("A0", rows), {}, "has no dictionary there"),
            (("M1", rows[:0]), {}, r"rows have shape \(0, 11\)"),
            (("M1", rows[0]), {}, r"rows have shape \(11,\)"),
            (("M1", np.full((2, 5), 21)), {}, "rows hold only special tokens"),
            (("M1", rows), {"k": 0}, "k=0 must be 1 or more"),
            (("M1", rows), {"seed": -1}, r"seed=-1 must be 0 to 2\*\*64 - 1"),
            (("M1", rows), {"seed": 2**64}, "must be 0 to"),
            (("M1", [[1, 2, 3], [1, 2]]), {}, "rows of different lengths; pad them"),
            (("M1", np.where(rows == 20, 23, rows)), {}, "id 23 at row 0, position 8 is outside the vocabulary"),
        ]:
            with pytest.raises(ValueError, match=says):
                top_activations(lm, *arguments, **options)


def test_bands_that_there_are_not_are_refused(found):
    with as_users_run_it():
        for arguments, says in (
            ((999,), r"feature 999 is out of range; .* 0\.\.11"),
            ((0, 0), "n=0 must be 1 or more"),
        ):
            with pytest.raises(ValueError, match=says):
                found.bands(*arguments)
