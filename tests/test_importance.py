"""Causal importance: means over rows of single sweeps, the same after an interruption."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_users_run_it

from tinymodel_jax.analysis.effects import importance as module
from tinymodel_jax.analysis.effects import sweeps
from tinymodel_jax.analysis.effects.importance import causal_importance
from tinymodel_jax.analysis.evaluation.row_sums import NORMAL_95
from tinymodel_jax.dictionaries.dictionary import Dictionary


@pytest.fixture
def rows(lm, tok_ids):
    padded = np.array(tok_ids)
    padded[1, 7:] = lm.config.pad_id
    return padded


def test_means_and_intervals_are_those_of_the_rows(lm, rows):
    found = causal_importance(lm, "M1", rows)
    kl, streams = np.full((3, 12), np.nan), np.zeros((3, 12, 16))
    for row, ids in enumerate((rows[0], rows[1, :7], rows[2])):
        effects = sweeps.ablate(lm, "M1", ids)
        kl[row, effects.features], streams[row, effects.features] = effects.kl, effects.final_stream
    active = np.isfinite(kl)
    np.testing.assert_array_equal(found.active_rows, active.sum(axis=0))
    often = found.active_rows > 1
    assert often.sum() > 3
    np.testing.assert_allclose(found.kl.mean[often], np.nanmean(kl[:, often], axis=0), atol=1e-5)
    spread = np.nanstd(kl[:, often], axis=0, ddof=1) / np.sqrt(found.active_rows[often])
    np.testing.assert_allclose(found.kl.half_width[often], NORMAL_95 * spread, atol=1e-5)
    np.testing.assert_allclose(found.kl_all.mean, np.where(active, kl, 0).mean(axis=0), atol=1e-5)
    means = streams.sum(axis=0) / np.maximum(found.active_rows, 1)[:, None]
    np.testing.assert_allclose(found.final_stream, means, atol=1e-5)
    once = found.active_rows == 1
    assert np.isnan(found.kl.half_width[once]).all()


def test_a_planted_feature_comes_first(lm, rows):
    reader = lm["M1"].dictionary
    params = dict(reader.params)
    params["W_dec"] = params["W_dec"].at[:].multiply(1e-3).at[4].set(jnp.arange(16.0))
    params["b_enc"] = params["b_enc"].at[4].set(5.0)
    lm.attach("M1", Dictionary.from_params(reader.config, params))
    assert causal_importance(lm, "M1", rows).order()[0] == 4


def test_stopped_work_goes_on_and_gives_the_same_table(lm, rows, tmp_path, monkeypatch):
    whole = causal_importance(lm, "M1", rows)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    file, seen = tmp_path / "work", []

    def stop_after_two(left, _):
        for row in left:
            if row == 2:
                raise KeyboardInterrupt
            yield row

    with pytest.raises(KeyboardInterrupt):
        causal_importance(lm, "M1", rows, work_file=file, track=stop_after_two)
    resumed = causal_importance(lm, "M1", rows, work_file=file, track=lambda left, _: seen.extend(left) or left)
    assert seen == [2]
    assert_equal(resumed, whole)


def test_finished_work_stays_until_its_result_is_kept(lm, rows, tmp_path, monkeypatch):
    whole = causal_importance(lm, "M1", rows, work_file=tmp_path / "work")
    monkeypatch.setattr(module, "ablate", None)  # nothing is measured again
    assert_equal(causal_importance(lm, "M1", rows, work_file=tmp_path / "work"), whole)


def assert_equal(one, other):
    assert one.n_rows == other.n_rows
    np.testing.assert_array_equal(one.active_rows, other.active_rows)
    np.testing.assert_array_equal(one.final_stream, other.final_stream)
    for name in ("kl", "loss", "kl_all", "loss_all"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_rows_of_padding_count_nowhere(lm, rows):
    padding = np.full((1, rows.shape[1]), lm.config.pad_id, np.int32)
    assert_equal(
        causal_importance(lm, "M1", np.concatenate([rows[:2], padding, rows[2:]])), causal_importance(lm, "M1", rows)
    )
    with as_users_run_it(), pytest.raises(ValueError, match="no row holds a token"):
        causal_importance(lm, "M1", padding)


def test_a_row_without_a_token_to_predict_counts_in_no_mean(lm, rows):
    alone = np.full((1, rows.shape[1]), lm.config.pad_id)
    alone[0, 0] = lm.config.begin_id
    found = causal_importance(lm, "M1", np.concatenate([alone, rows]))
    assert found.n_rows == 3
    assert_equal(found, causal_importance(lm, "M1", rows))
    with as_users_run_it(), pytest.raises(ValueError, match="no row holds a token to predict"):
        causal_importance(lm, "M1", alone)


def test_a_work_file_of_another_site_and_empty_data_are_refused(lm, rows, tmp_path, monkeypatch, no_type_checks):
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)

    def stop_at_once(left, _):
        yield left[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        causal_importance(lm, "M1", rows, work_file=tmp_path / "work", track=stop_at_once)
    with pytest.raises(ValueError, match=r"changed: dictionary .*site"):
        causal_importance(lm, "A1", rows, work_file=tmp_path / "work")
    topk = dataclasses.replace(lm["M1"].dictionary.config, architecture="topk", k=3)
    bfloat16 = dataclasses.replace(lm["M1"].dictionary.config, dtype="bfloat16")
    for config in (topk, bfloat16):
        other = lm.splice([])
        other.attach("M1", Dictionary.from_params(config, lm["M1"].dictionary.params))
        with pytest.raises(ValueError, match=r"changed: dictionary"):
            causal_importance(other, "M1", rows, work_file=tmp_path / "work")
    for other in (lm.splice("M0"), lm.splice("M0", include_error=True)):
        with pytest.raises(ValueError, match=r"changed: model"):
            causal_importance(other, "M1", rows, work_file=tmp_path / "work")
    with pytest.raises(ValueError, match="no row holds a token"):
        causal_importance(lm, "M1", np.zeros((0, 5), np.int32))
