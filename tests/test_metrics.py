"""What a sweep follows is the change of the metric in whole passes, one feature at a time."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from oracle import error_of

from tinymodel_jax.analysis import logit_difference
from tinymodel_jax.analysis.effects import attribution, sweeps
from tinymodel_jax.analysis.effects.importance import causal_importance
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model import interventions

ENDS = np.array([11, 8, 6])
ROWS = np.arange(3)
F32 = 1e-5


@pytest.fixture
def rows(lm, tok_ids) -> np.ndarray:
    """Rows of different lengths, narrower than what is compiled."""
    return np.where(np.arange(11) < ENDS[:, None], tok_ids, lm.config.pad_id)


def spread_of_logits(logits, tok_ids):
    """Return a number that depends on all positions, on raw logits, and on the tokens."""
    assert logits.shape == (3, 11, 23)
    return logits.max(axis=-1).mean(axis=-1) - logits[:, 0, 5] * (tok_ids[:, 1] % 3).astype(logits.dtype)


def numpy_rank(logits, tok_ids):
    """Return how far token 7 is from the top after the last position, which no gradient can follow."""
    at_end = np.asarray(logits)[ROWS, ENDS - 1]
    return np.sort(at_end, axis=-1)[:, -1] - at_end[:, 7]


def by_hand(lm: TinyModel, ids: np.ndarray, hooks: Any, metric: Any) -> float:
    """Return a metric of one edit, from a whole pass."""
    logprobs, acts = lm.run_with_hooks(ids, hooks, ["blocks.1.hook_resid_post"])
    W_U = lm.params["W_U"].astype(lm.config.dtype).astype("float32")
    logits = np.asarray(acts["blocks.1.hook_resid_post"].astype("float32") @ W_U + lm.params["b_U"])
    at_end = np.asarray(logprobs)[ROWS, ENDS - 1]
    if metric == "loss":
        picked = np.take_along_axis(np.asarray(logprobs)[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
        return -float(picked[np.arange(1, 11) < ENDS[:, None]].mean())
    if metric == "next_logprob":
        return float(at_end[ROWS, [3, 1, 2]].mean())
    if callable(metric):
        return float(np.asarray(metric(jax.numpy.asarray(logits), ids)).mean())
    return float((at_end[:, 4] - at_end[ROWS, [1, 2, 3]]).mean())


@pytest.mark.parametrize("tag", ["M0", "A1"])
@pytest.mark.parametrize(
    "metric", ["loss", "next_logprob", logit_difference(4, (1, 2, 3)), spread_of_logits, numpy_rank]
)
def test_each_change_of_a_metric_is_that_of_the_single_intervention(lm, rows, tag, metric):
    late = np.isin(np.arange(11), [3]) | (np.arange(11) == ENDS[:, None] - 1)  # the first ones are the clean pass's
    effects = sweeps.clamp(lm, tag, rows, 0.7, range(12), positions=late, next_ids=[3, 1, 2], metric=metric)
    assert effects.metric is not None
    clean = by_hand(lm, rows, {}, metric)
    changes = [
        by_hand(lm, rows, interventions.clamp(lm[tag].dictionary, feature, 0.7, late), metric) - clean
        for feature in range(12)
    ]
    np.testing.assert_allclose(effects.metric, changes, atol=F32)
    assert np.abs(changes).max() > 1e-3


def test_every_strength_of_steering_has_its_metric(lm, rows):
    metric = logit_difference(4, 5)
    effects = sweeps.steer(lm, "Mo1", rows, [-1.0, 0.0, 2.0], [2, 5], metric=metric)
    columns = np.asarray(lm.params["W_U"])[:, 4] - np.asarray(lm.params["W_U"])[:, 5]
    along = np.asarray(lm["Mo1"].dictionary.params["W_dec"])[[2, 5]] @ columns  # the last layer's output: linear
    assert effects.metric is not None
    np.testing.assert_allclose(effects.metric, along[:, None] * [-1.0, 0.0, 2.0], atol=F32)


def test_a_spliced_model_and_a_bfloat16_model_are_measured_by_their_own_logits(lm, tok_ids):
    through = lm.splice(["Rm1"])
    half = TinyModel.from_params(dataclasses.replace(lm.config, dtype="bfloat16"), lm.params)
    half.attach("M0", lm["M0"].dictionary)
    for model, tolerance in ((through, F32), (half, 0.05)):
        found = sweeps.ablate(model, "M0", tok_ids, [1, 2], metric=spread_of_logits).metric
        clean = by_hand(model, tok_ids, {}, spread_of_logits)
        for place, feature in enumerate([1, 2]):
            edited = by_hand(model, tok_ids, interventions.ablate(lm["M0"].dictionary, feature), spread_of_logits)
            assert found is not None
            assert found[place] == pytest.approx(edited - clean, abs=tolerance)


def test_a_function_reads_variables_as_they_are_at_the_call(lm, rows):
    token = 4

    def logit(logits, tok_ids):
        return logits[:, 0, token]

    found = []
    for token in (4, 5):  # noqa: B007 (read by the function)
        values = sweeps.steer(lm, "M0", rows, 1.0, [3], metric=logit).metric
        found.append(float(values[0]))  # pyright: ignore[reportOptionalSubscript]
        estimate = attribution.attribute(lm, "M0", rows, [3], metric=logit)
        found.append(float(estimate.change[0]))
    assert abs(found[0] - found[2]) > 1e-3
    assert abs(found[1] - found[3]) > 1e-3


def test_without_a_metric_nothing_is_computed_for_one(lm, rows, compilations):
    plain = sweeps.ablate(lm, "M0", rows)
    assert plain.metric is None
    with compilations() as count:
        named = [sweeps.ablate(lm, "M0", rows, metric=metric) for metric in ("loss", "next_logprob")]
    assert count.value == 0  # the same programs
    np.testing.assert_array_equal(named[0].metric, plain.loss)
    np.testing.assert_array_equal(named[1].metric, plain.next_logprob)
    sweeps.ablate(lm, "M0", rows, metric=logit_difference(4, 5))
    with compilations() as count:
        sweeps.ablate(lm, "M0", rows, metric=logit_difference(6, [7, 8, 9]))
    assert count.value == 0  # tokens are arguments


def test_a_feature_that_is_not_run_changes_no_metric(lm, rows):
    positions = np.zeros(11, bool)
    effects = sweeps.ablate(lm, "M0", rows, [1], positions=positions, metric=spread_of_logits)
    np.testing.assert_array_equal(effects.metric, [0.0])


@pytest.mark.parametrize("call", [sweeps.ablate, attribution.attribute, causal_importance])
def test_a_dictionary_may_be_given_itself_or_as_what_the_model_returns(lm, rows, call):
    other = lm.splice([])
    other.attach("M0", lm["M1"].dictionary)
    tag, *same = (jax.tree.leaves(call(lm, given, rows)) for given in ("M0", lm["M0"], lm["M0"].dictionary))
    for leaves in same:
        assert all(map(np.array_equal, tag, leaves))
    assert not all(map(np.array_equal, tag, jax.tree.leaves(call(lm, other["M0"], rows))))


def test_a_reader_keeps_its_dictionary_when_another_is_attached(lm, rows):
    reader, expected = lm["M0"], sweeps.ablate(lm, "M0", rows, [1, 2])
    config, params = reader.dictionary.config, reader.dictionary.params
    lm.attach("M0", Dictionary.from_params(config, params | {"W_dec": 2 * params["W_dec"]}))
    np.testing.assert_array_equal(sweeps.ablate(lm, reader, rows, [1, 2]).kl, expected.kl)
    assert np.all(sweeps.ablate(lm, "M0", rows, [1, 2]).kl != expected.kl)
    vectors = np.eye(16, dtype=np.float32)[:1]
    by_reader, by_tag = (sweeps.steer(lm, tag, rows, 1.0, vectors=vectors).kl for tag in (reader, "M0"))
    np.testing.assert_array_equal(by_reader, by_tag)


def test_a_readout_may_be_a_reader(lm, rows):
    by_reader, by_tag = (sweeps.ablate(lm, "M0", rows, [1], readout=readout) for readout in (lm["M1"], "M1"))
    np.testing.assert_array_equal(by_reader.readout_changes, by_tag.readout_changes)


def test_tokens_are_named_by_their_texts(story_model: Path):
    lm = TinyModel(story_model)
    texts = ["Mia saw a dog.", "Mia saw a cat and"]
    by_text = sweeps.ablate(lm, "M0", texts, [1, 2], metric=logit_difference(" dog", [" cat", " Mia"]))
    dog, cat, mia = (lm.to_single_token(text) for text in (" dog", " cat", " Mia"))
    by_id = sweeps.ablate(lm, "M0", texts, [1, 2], metric=logit_difference(dog, np.array([cat, mia])))
    np.testing.assert_array_equal(by_text.metric, by_id.metric)
    assert "is 2 tokens" in error_of(lambda: sweeps.ablate(lm, "M0", texts, metric=logit_difference(" dog", "a b")))


def test_a_logit_difference_is_frozen_and_hashable():
    one = logit_difference([1, " Tim"], 2)
    assert one == logit_difference((1, " Tim"), 2)
    assert len({one, logit_difference(np.array([1, 3]), 2), logit_difference((1, 3), 2)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.a = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("kl", "metric='kl'; expected 'loss', 'next_logprob', logit_difference(a, b), or a function (logits, tok_ids)"),
        (3, "metric=3; expected 'loss'"),
        (logit_difference(4, 4), "logit_difference(4, 4): both are token 4, so the difference is always 0"),
        (logit_difference([1, 2], 3), "got 2 and 1 tokens for 3 rows; give one token, or one for each row"),
        (logit_difference(23, 3), "tokens=23; expected one or more ids, 0..22"),
        (
            lambda logits, tok_ids: logits[:, -1],
            "the metric <lambda> returned shape (3, 23); expected (3,), one number",
        ),
        (lambda logits, tok_ids: logits[:, -1, 0] * np.nan, "the metric <lambda> is nan without any change"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_before_anything_is_swept(
    lm, rows, metric, says, monkeypatch, no_type_checks
):
    monkeypatch.setattr(sweeps, "effects_of_changes", None)
    for call in (sweeps.ablate, attribution.attribute):
        assert says in error_of(lambda call=call: call(lm, "M0", rows, metric=metric))
