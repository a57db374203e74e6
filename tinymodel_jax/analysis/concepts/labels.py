"""How well single features detect known concepts: the best F1 and AUC for each concept.

Units are columns of activations: features of a dictionary, neurons, or projections on directions. A unit predicts a
concept where its activation is above a threshold. For each concept, the best unit, and for F1 its threshold, are chosen
on one set of positions and scored on another, so that having many units gives no advantage by chance.

    AUC  = P(activation where the concept holds > activation where it does not), counting ties half; chance is 0.5
    F1   = 2 * hits / (predicted + true); always predicting a concept of share p gives 2 p / (1 + p), the chance level

Everything is NumPy: the work is sorting, and products with the matrix of concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

LEVELS = np.array([2.0**-power for power in range(1, 13)])
"""Shares of the positions above a unit's thresholds; two more thresholds are 0 and -inf."""
NAMED_FROM = 0.5
"""F1 from which a feature is named by its best concept; below, that is a weak guess."""
CHUNK = 256
"""Units that are scored together."""


class ConceptScores(NamedTuple):
    """Scores of the best unit for each concept, on held-out positions."""

    share: Float[np.ndarray, " concepts"]
    """Share of the scored positions at which the concept holds."""
    f1: Float[np.ndarray, " concepts"]
    """F1 of the best unit; NaN where the concept never holds."""
    f1_unit: Int[np.ndarray, " concepts"]
    """Unit with the best F1."""
    threshold: Float[np.ndarray, " concepts"]
    """Threshold of that unit; -inf where predicting the concept everywhere is best."""
    auc: Float[np.ndarray, " concepts"]
    """AUC of the best unit; NaN where the concept never or always holds."""
    auc_unit: Int[np.ndarray, " concepts"]
    """Unit with the best AUC."""

    @property
    def chance_f1(self) -> Float[np.ndarray, " concepts"]:
        """F1 of predicting each concept everywhere."""
        return 2 * self.share / (1 + self.share)


class _Best(NamedTuple):
    """The best unit seen so far for each concept."""

    score: np.ndarray
    unit: np.ndarray
    threshold: np.ndarray


class ChosenUnits(NamedTuple):
    """The best of some units for each concept; arrays have one entry per concept."""

    f1_where_chosen: Float[np.ndarray, " concepts"]
    """F1 on the positions that the units are chosen on; -inf where no unit has one, as for the AUC."""
    f1: Float[np.ndarray, " concepts"]
    f1_unit: np.ndarray
    threshold: Float[np.ndarray, " concepts"]
    auc_where_chosen: Float[np.ndarray, " concepts"]
    auc: Float[np.ndarray, " concepts"]
    auc_unit: np.ndarray


def score_concepts(
    acts: Float[np.ndarray, "chosen_on units"],
    truth: Bool[np.ndarray, "chosen_on concepts"],
    held_out_acts: Float[np.ndarray, "scored_on units"],
    held_out_truth: Bool[np.ndarray, "scored_on concepts"],
) -> ConceptScores:
    """Choose the best unit for each concept on some positions, and score it on held-out ones.

        AUC = P(activation where it holds > activation where it does not) + P(equal) / 2
        F1  = 2 * hits / (predicted + true)

    Chance is 0.5 for the AUC, and 2 p / (1 + p) for the F1 of a concept that holds at a share p of the positions.

    Args:
        acts: activations of the units at the positions to choose on.
        truth: which concepts hold there.
        held_out_acts: activations at the positions to score on.
        held_out_truth: which concepts hold there.

    Raises:
        ValueError: there are no units, or no positions to choose or score on.

    Examples:
        >>> import numpy as np
        >>> from tinymodel_jax.analysis import labels
        >>> truth = np.array([[True], [False], [True], [False]])
        >>> acts = np.array([[0.0, 2.0], [1.0, 0.0], [0.0, 3.0], [0.0, 0.5]], np.float32)
        >>> scores = labels.score_concepts(acts, truth, acts, truth)
        >>> int(scores.f1_unit[0]), float(scores.f1[0])
        (1, 1.0)
    """
    return best_of([choose_units(acts, truth, held_out_acts, held_out_truth)], held_out_truth)


def choose_units(
    acts: Float[np.ndarray, "chosen_on units"],
    truth: Bool[np.ndarray, "chosen_on concepts"],
    held_out_acts: Float[np.ndarray, "scored_on units"],
    held_out_truth: Bool[np.ndarray, "scored_on concepts"],
    first: int = 0,
) -> ChosenUnits:
    """Do `score_concepts` for a part of the units, of which `first` is the number of the first one."""
    if not acts.shape[1] or not len(acts) or not len(held_out_acts):
        raise ValueError(
            f"score_concepts: activations of shapes {acts.shape} and {held_out_acts.shape}; both must hold positions "
            "and units."
        )
    by_auc = by_f1 = _Best(
        np.full(truth.shape[1], -np.inf), np.zeros(truth.shape[1], int), np.full(truth.shape[1], -np.inf)
    )
    for start in range(0, acts.shape[1], CHUNK):
        part = np.asarray(acts[:, start : start + CHUNK], np.float32)
        by_auc = _better(by_auc, auc_of_all(part, truth), start)
        for thresholds in _thresholds(part):
            by_f1 = _better(by_f1, _f1_of_all(part > thresholds, truth), start, thresholds)
    chosen = np.asarray(held_out_acts[:, by_auc.unit], np.float32)
    auc = [auc_of_all(chosen[:, [c]], held_out_truth[:, [c]])[0, 0] for c in range(truth.shape[1])]
    predicted = held_out_acts[:, by_f1.unit] > by_f1.threshold
    hits = np.sum(predicted & held_out_truth, axis=0)
    positives = held_out_truth.sum(axis=0)
    with np.errstate(invalid="ignore"):
        f1 = np.where(positives > 0, 2 * hits / (predicted.sum(axis=0) + positives), np.nan)
    of_f1 = (by_f1.score, f1, by_f1.unit + first, by_f1.threshold)
    return ChosenUnits(*of_f1, by_auc.score, np.array(auc), by_auc.unit + first)


def best_of(parts: Sequence[ChosenUnits], held_out_truth: Bool[np.ndarray, "scored_on concepts"]) -> ConceptScores:
    """Return the scores of the best units of all parts; units of earlier parts win ties."""
    all_parts = ChosenUnits(*(np.stack(arrays) for arrays in zip(*parts, strict=True)))
    places = np.arange(held_out_truth.shape[1])
    by_f1, by_auc = all_parts.f1_where_chosen.argmax(axis=0), all_parts.auc_where_chosen.argmax(axis=0)
    of_f1 = (array[by_f1, places] for array in (all_parts.f1, all_parts.f1_unit.astype(int), all_parts.threshold))
    of_auc = (array[by_auc, places] for array in (all_parts.auc, all_parts.auc_unit.astype(int)))
    return ConceptScores(held_out_truth.sum(axis=0) / len(held_out_truth), *of_f1, *of_auc)


def concepts_of_units(
    acts: Float[np.ndarray, "positions units"], truth: Bool[np.ndarray, "positions concepts"]
) -> tuple[Int[np.ndarray, " units"], Float[np.ndarray, " units"]]:
    """Return the concept that each unit's activity (above 0) predicts best, and its F1.

    Args:
        acts: activations.
        truth: which concepts hold at the positions.

    Examples:
        >>> import numpy as np
        >>> from tinymodel_jax.analysis import labels
        >>> acts = np.array([[0.0], [2.0], [1.0]])
        >>> truth = np.array([[False], [True], [False]])
        >>> concepts, f1 = labels.concepts_of_units(acts, truth)
        >>> concepts, f1.round(2)  # active at two positions, right at one
        (array([0]), array([0.67]))
    """
    f1 = _f1_of_all(np.asarray(acts) > 0, truth)
    return f1.argmax(axis=1), f1.max(axis=1)


def best_f1_of_all(
    acts: Float[np.ndarray, "positions units"], truth: Bool[np.ndarray, "positions concepts"]
) -> Float[np.ndarray, "units concepts"]:
    """Return the F1 of every unit for every concept, each at its best threshold on these positions.

    The threshold that predicts a concept everywhere is left out. No positions are held out, so the maximum over many
    units is biased upwards.

    Args:
        acts: activations.
        truth: which concepts hold at the positions.

    Examples:
        >>> import numpy as np
        >>> from tinymodel_jax.analysis import labels
        >>> acts = np.array([[0.0], [2.0], [1.0]])
        >>> truth = np.array([[False], [True], [False]])
        >>> labels.best_f1_of_all(acts, truth)
        array([[1.]])
    """
    found = []
    for start in range(0, acts.shape[1], CHUNK):
        part = np.asarray(acts[:, start : start + CHUNK], np.float32)
        found.append(np.max([_f1_of_all(part > t, truth) for t in _thresholds(part)[1:]], axis=0))
    return np.concatenate(found)


def auc_of_all(
    acts: Float[np.ndarray, "positions units"], truth: Bool[np.ndarray, "positions concepts"]
) -> Float[np.ndarray, "units concepts"]:
    """Return the AUC of every unit for every concept; NaN where a concept never or always holds.

    It is computed from the average ranks of the activations (Mann and Whitney 1947), which is exact with ties, too.

    Args:
        acts: activations.
        truth: which concepts hold at the positions.

    Examples:
        >>> import numpy as np
        >>> from tinymodel_jax.analysis import labels
        >>> acts = np.array([[0.0], [2.0], [1.0]])
        >>> truth = np.array([[False], [True], [False]])
        >>> labels.auc_of_all(acts, truth)
        array([[1.]])
    """
    above_middle = np.stack([_centred_ranks(column) for column in acts.T]).astype(np.float32)
    positives = truth.sum(axis=0)
    pairs = positives * (len(truth) - positives)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, 0.5 + (above_middle @ truth.astype(np.float32)) / pairs, np.nan)


def _centred_ranks(column: np.ndarray) -> np.ndarray:
    """Return average ranks minus their mean. Inactive positions, which are the majority, share one rank."""
    ordered = np.sort(column)
    return (np.searchsorted(ordered, column, "left") + np.searchsorted(ordered, column, "right") - len(column)) / 2


def _thresholds(acts: np.ndarray) -> np.ndarray:
    """Return thresholds (levels, units): -inf, 0, and those that the shares in `LEVELS` exceed."""
    ordered = np.sort(acts, axis=0)
    places = np.maximum(len(acts) - np.ceil(len(acts) * LEVELS).astype(int) - 1, 0)
    fixed = np.stack([np.full(acts.shape[1], -np.inf), np.zeros(acts.shape[1])])
    return np.concatenate([fixed, ordered[places]]).astype(np.float32)


def _f1_of_all(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    hits = predicted.T.astype(np.float32) @ truth.astype(np.float32)
    sizes = predicted.sum(axis=0)[:, None] + truth.sum(axis=0)
    return 2 * hits / np.maximum(sizes, 1)


def _better(best: _Best, scores: np.ndarray, start: int, thresholds: np.ndarray | None = None) -> _Best:
    """Return the best units after a further chunk; earlier units win ties."""
    scores = np.nan_to_num(scores, nan=-np.inf)
    winner = scores.argmax(axis=0)
    score = scores[winner, np.arange(scores.shape[1])]
    wins = score > best.score
    return _Best(
        np.where(wins, score, best.score),
        np.where(wins, winner + start, best.unit),
        best.threshold if thresholds is None else np.where(wins, thresholds[winner], best.threshold),
    )
