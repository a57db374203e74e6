"""Concept recovery: a perfect dictionary scores 1, random units chance, and AUC is what its definition says."""

import numpy as np
import pytest
from conftest import as_users_run_it

from tinymodel_jax.analysis.concepts import labels
from tinymodel_jax.analysis.concepts.labels import auc_of_all, score_concepts

POSITIONS, CONCEPTS = 4000, 5


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    shares = np.array([0.5, 0.2, 0.1, 0.03, 0.01])
    return np.random.default_rng(0).random((POSITIONS, CONCEPTS)) < shares


def halves(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return array[: POSITIONS // 2], array[POSITIONS // 2 :]


def scores(acts: np.ndarray, truth: np.ndarray):
    (acts, held_out), (truth, held_out_truth) = halves(acts.astype(np.float32)), halves(truth)
    return score_concepts(acts, truth, held_out, held_out_truth)


def test_a_perfect_dictionary_scores_one_and_its_features_are_named(truth):
    random = np.random.default_rng(1)
    amounts = truth * (1 + random.random(truth.shape))
    noise = np.maximum(random.normal(size=(POSITIONS, 40)), 0)
    found = scores(np.concatenate([noise, amounts], axis=1), truth)
    np.testing.assert_array_equal(found.f1, 1)
    np.testing.assert_array_equal(found.auc, 1)
    np.testing.assert_array_equal(found.f1_unit, 40 + np.arange(CONCEPTS))
    np.testing.assert_array_equal(found.auc_unit, 40 + np.arange(CONCEPTS))


@pytest.mark.parametrize("sparse", [False, True])
def test_random_units_score_the_chance_level(truth, sparse):
    acts = np.random.default_rng(2).normal(size=(POSITIONS, 100))
    found = scores(np.maximum(acts - 1, 0) if sparse else acts, truth)
    assert np.abs(found.auc - 0.5).max() < 0.12  # 20 positives of the rarest: a standard error of 0.065
    assert (found.f1 < found.chance_f1 + 0.05).all()
    np.testing.assert_allclose(found.f1[:3], found.chance_f1[:3], atol=0.03)


def test_a_threshold_tells_a_concept_that_is_an_amount(truth):
    amounts = np.where(truth[:, :1], 3.0, 1.0) + 0.1 * np.random.default_rng(3).random((POSITIONS, 1))
    found = scores(amounts, truth[:, :1])
    assert found.f1[0] > 0.97  # the grid of thresholds has one near the concept's share
    assert 1.0 <= found.threshold[0] < 3.0


def test_auc_is_the_share_of_pairs_in_order_with_ties_for_half():
    random = np.random.default_rng(4)
    acts, truth = random.integers(0, 4, (60, 7)).astype(np.float32), random.random((60, 3)) < 0.3
    for unit in range(7):
        for concept in range(3):
            above, below = acts[truth[:, concept], unit], acts[~truth[:, concept], unit]
            pairs = (above[:, None] > below).mean() + 0.5 * (above[:, None] == below).mean()
            assert auc_of_all(acts, truth)[unit, concept] == pytest.approx(pairs, abs=1e-6)


def test_a_unit_that_fits_only_where_it_was_chosen_gets_no_credit(truth):
    acts = truth[:, :1].astype(np.float32)
    acts[POSITIONS // 2 :] = 0
    found = scores(acts, truth[:, :1])
    assert found.f1[0] == 0
    assert found.auc[0] == pytest.approx(0.5)


def test_the_best_unit_is_found_in_any_chunk(truth, monkeypatch):
    monkeypatch.setattr(labels, "CHUNK", 8)
    acts = np.random.default_rng(5).random((POSITIONS, 19)) * 0.5
    acts[:, -1] = truth[:, 2]
    found = scores(acts, truth)
    assert found.f1_unit[2] == found.auc_unit[2] == 18


def test_a_concept_that_holds_nowhere_has_no_score(truth):
    found = scores(truth * 1.0, truth & np.array([True, False, True, True, True]))
    assert np.isnan(found.f1[1])
    assert np.isnan(found.auc[1])
    assert not np.isnan(np.delete(found.f1, 1)).any()


def test_nothing_to_score_is_refused():
    with as_users_run_it(), pytest.raises(ValueError, match="both must hold positions and units"):
        score_concepts(np.ones((4, 0)), np.ones((4, 2), bool), np.ones((4, 0)), np.ones((4, 2), bool))
