"""Sweeps over features equal single interventions written by hand, with any division into chunks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_users_run_it, make_dictionary
from eight_devices import on_eight_devices
from scipy.special import logsumexp

from tinymodel_jax.analysis.effects import attribution, patching, sweeps
from tinymodel_jax.analysis.effects.upper_layers import kl_of_changes
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model import interventions
from tinymodel_jax.model.hook_points import Hooks

TAGS = ("Ra1", "A1", "Rm1", "M1", "Mo1", "M0", "Ra0")
F32 = 1e-5
kl_compiled = jax.jit(kl_of_changes)


@pytest.fixture
def row(tok_ids) -> np.ndarray:
    return tok_ids[:1]


@pytest.fixture
def lm(lm: TinyModel) -> TinyModel:
    site = Site.parse("Ra0")[0]
    lm.attach("Ra0", make_dictionary(site.hook_in, site.hook_out, 9))
    return lm


def by_hand(lm: TinyModel, ids: np.ndarray, hooks: Hooks, next_ids: list[int]) -> list[float]:
    """Return KL and the changes of loss and of the next tokens' log-probability of one edit, from whole passes."""
    clean, real = np.asarray(lm(ids)), ids != lm.config.pad_id
    moved = np.asarray(lm.run_with_hooks(ids, hooks)[0]) - clean
    kl = -np.sum(np.exp(clean) * moved, axis=-1)[real]
    loss = -np.take_along_axis(moved[:, :-1], ids[:, 1:, None], axis=-1)[real[:, 1:]]
    chosen = moved[np.arange(len(ids)), real.sum(axis=1) - 1, next_ids]
    return [float(numbers.mean()) for numbers in (kl, loss, chosen)]


def measured(effects: sweeps.FeatureEffects, place: int) -> list[float]:
    return [float(x[place]) for x in (effects.kl, effects.loss, effects.next_logprob)]


@pytest.mark.parametrize("tag", TAGS)
def test_each_ablation_is_the_single_one(lm, row, tag):
    effects = sweeps.ablate(lm, tag, row, next_ids=[3])
    assert len(effects.features) > 3
    for place, feature in enumerate(effects.features):
        hooks = interventions.ablate(lm[tag].dictionary, int(feature))
        assert measured(effects, place) == pytest.approx(by_hand(lm, row, hooks, [3]), abs=F32)


@pytest.mark.parametrize("tag", ["Ra1", "A1", "M0"])
def test_each_clamp_at_chosen_positions_of_rows_of_different_lengths_is_the_single_one(lm, tok_ids, tag):
    ids = np.where(np.arange(11) < [[11], [8], [6]], tok_ids, lm.config.pad_id)
    positions = np.isin(np.arange(11), [4, 7])
    next_ids = [3, 1, 2]
    effects = sweeps.clamp(lm, tag, ids, 0.7, range(12), positions=positions, next_ids=next_ids)
    for place in (0, 5, 11):
        hooks = interventions.clamp(lm[tag].dictionary, place, 0.7, positions)
        assert measured(effects, place) == pytest.approx(by_hand(lm, ids, hooks, next_ids), abs=F32)


def test_each_strength_of_steering_is_the_single_one(lm, row):
    effects = sweeps.steer(lm, "M1", row, [-1.0, 0.0, 2.0], [2, 5], next_ids=[3])
    assert effects.kl.shape == (2, 3)
    assert not effects.kl[:, 1].any()
    directions = lm["M1"].dictionary.params["W_dec"]
    for place, feature in enumerate([2, 5]):
        hooks = interventions.steer("blocks.1.hook_mlp_out", 2.0 * directions[feature])
        found = [float(x[place, 2]) for x in (effects.kl, effects.loss, effects.next_logprob)]
        assert found == pytest.approx(by_hand(lm, row, hooks, [3]), abs=F32)
        change = np.asarray(lm.run_with_hooks(row, hooks)[0] - lm(row)).mean(axis=(0, 1))
        logits = effects.final_stream[place, 2] @ np.asarray(lm.params["W_U"])
        np.testing.assert_allclose(logits - logits.mean(), change - change.mean(), atol=F32)


def test_in_bfloat16_the_unembedding_is_the_rounded_one_that_the_model_computes_with(lm, row):
    # eighths, which bfloat16 adds exactly, so that only W_U is rounded
    eighths = {name: jnp.round(lm.params[name] * 8) / 8 for name in ("W_E", "W_pos")}
    blocks = {name: jax.tree.map(jnp.zeros_like, lm.params[name]) for name in ("blocks_0", "blocks_1")}
    config = dataclasses.replace(lm.config, dtype="bfloat16")
    half = TinyModel.from_params(config, {**lm.params, **eighths, **blocks})
    vectors = np.random.default_rng(0).integers(-1, 2, (8, 16)).astype(np.float32) / 8
    effects = sweeps.steer(half, "Mo1", row, 1.0, vectors=vectors, next_ids=[3])
    for place, vector in enumerate(vectors):
        hooks = interventions.steer("blocks.1.hook_mlp_out", jnp.asarray(vector, jnp.bfloat16))
        assert measured(effects, place) == pytest.approx(by_hand(half, row, hooks, [3]), abs=F32)


def test_the_smallest_and_the_largest_kl_are_exact(lm, row):
    direction = np.eye(16, dtype=np.float32)[:1]
    kl = sweeps.steer(lm, "Mo1", row, [1e-5, 1e-3, 1e4], vectors=direction).kl[0]
    assert kl[0] / kl[1] == pytest.approx(1e-4, rel=0.02)  # KL of a small change is quadratic in it
    assert np.isfinite(kl[2])


def test_vectors_steer_where_no_dictionary_is(lm, row):
    vectors = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    effects = sweeps.steer(lm, "A0", row, 0.5, vectors=vectors, next_ids=[3])
    for place, vector in enumerate(vectors):
        hooks = interventions.steer("blocks.0.hook_attn_out", 0.5 * vector)
        assert measured(effects, place) == pytest.approx(by_hand(lm, row, hooks, [3]), abs=F32)


@pytest.mark.parametrize(
    ("tag", "spliced"), [("M0", ("Ra1", "M1", "Rm1")), ("A1", ("M0", "Rm1")), *((tag, (tag,)) for tag in TAGS[:6])]
)
def test_a_spliced_model_is_swept_as_it_is(lm, row, tag, spliced):
    through = lm.splice(spliced)
    effects = sweeps.ablate(through, tag, row, [1, 2, 3], next_ids=[3])
    for place, feature in enumerate([1, 2, 3]):
        hooks = interventions.ablate(lm[tag].dictionary, feature)
        assert measured(effects, place) == pytest.approx(by_hand(through, row, hooks, [3]), abs=F32)
    changed = [measured(effects, place) for place in range(3)]
    clean = [by_hand(lm, row, interventions.ablate(lm[tag].dictionary, f), [3]) for f in (1, 2, 3)]
    assert np.abs(np.subtract(changed, clean)).max() > F32


@pytest.mark.parametrize(("tag", "readout"), [("M0", "M1"), ("M0", "Ra1"), ("A1", "M1"), ("Ra1", "Rm1"), ("Rm1", "M1")])
def test_the_readout_is_the_mean_change_of_the_other_dictionary(lm, row, tag, readout):
    effects = sweeps.clamp(lm, tag, row, 1.5, [4], readout=readout)
    reader = lm[readout].dictionary
    hooks = interventions.clamp(lm[tag].dictionary, 4, 1.5)
    values = [lm.run_with_hooks(row, edit, [reader.config.hook_in])[1] for edit in (hooks, {})]
    after, before = (np.asarray(reader.encode(acts[reader.config.hook_in])) for acts in values)
    change = (after - before).mean(axis=(0, 1))
    assert effects.readout_features is not None
    assert effects.readout_changes is not None
    np.testing.assert_allclose(change[effects.readout_features[0]], effects.readout_changes[0], atol=F32)
    assert np.all(np.diff(np.abs(effects.readout_changes[0])) <= 0)
    assert np.abs(change).max() > 1e-3


@pytest.mark.slow
def test_neither_the_size_of_chunks_nor_the_positions_they_leave_out_change_the_result(lm, row, monkeypatch):
    positions = np.arange(11) >= 3  # so that some features start late
    whole = sweeps.ablate(lm, "M0", row, positions=positions)
    monkeypatch.setattr(sweeps, "SMALL", 0)
    for chunks in (4, 100):
        monkeypatch.setattr(sweeps, "CHUNKS", chunks)
        parts = sweeps.ablate(lm, "M0", row, positions=positions)
        for one, other in zip(whole[:4], parts[:4], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_late_changes_run_on_the_late_positions_only(monkeypatch):
    amounts = np.zeros((3, 1, 64), np.float32)
    amounts[0, 0, 60], amounts[2, 0, 10] = 1, 1
    (both,) = sweeps._chunks(amounts, 23)
    assert (both[0].tolist(), both[1:]) == ([2, 0], (2, 56))
    monkeypatch.setattr(sweeps, "SMALL", 0)
    assert [(items.tolist(), size, length) for items, size, length in sweeps._chunks(amounts, 23)] == [
        ([2], 1, 56),
        ([0], 1, 8),
    ]


def test_chunks_hold_what_memory_allows():
    # full size: 4 bytes x 10,000 ids x 256 positions
    assert sweeps._chunk_size(25_000, 10_240_000, 1) == sweeps.MEMORY // 10_240_000
    assert sweeps._chunk_size(256, 2_560_000, 1) == 32
    assert sweeps._chunk_size(3, 10_000, 8) == 8


def test_the_activations_of_a_large_readout_count_in_a_chunk(lm, row, monkeypatch):
    seen: list[int] = []

    def track(chunks, _):
        seen.extend(size for _, size, _ in chunks)
        return chunks

    lm.attach("M1", make_dictionary("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out", n_features=100))
    monkeypatch.setattr(sweeps, "MEMORY", 2 * 4 * 100 * 12)  # two interventions of 100 features at 12 positions
    sweeps.clamp(lm, "M0", row, 1.0, readout="M1", track=track)
    assert seen == [2] * 6
    seen.clear()
    sweeps.clamp(lm, "M0", row, 1.0, track=track)
    assert seen == [8, 8]  # 23 ids


def test_inactive_features_are_exactly_zero_and_not_run(lm, row, monkeypatch):
    acts = np.asarray(lm["M1"](row))
    inactive = np.flatnonzero((acts == 0).all(axis=(0, 1)))
    assert len(inactive)
    monkeypatch.setattr(sweeps, "effects_of_changes", None)
    effects = sweeps.ablate(lm, "M1", row, inactive)
    assert not np.any([effects.kl, effects.loss, effects.next_logprob])
    np.testing.assert_array_equal(effects.features, inactive)


def test_padding_counts_nowhere(lm, row):
    padded = np.pad(row, ((0, 0), (0, 4)), constant_values=lm.config.pad_id)
    for one, other in zip(sweeps.ablate(lm, "M1", row)[:4], sweeps.ablate(lm, "M1", padded)[:4], strict=True):
        np.testing.assert_allclose(one, other, atol=F32)


def test_prompts_of_similar_lengths_share_their_programs(lm, row, compilations):
    def measure(ids: np.ndarray) -> None:
        sweeps.clamp(lm, "M1", ids, 1.0)
        attribution.attribute(lm, "M1", ids)
        patching.patch(lm, ids, (ids + 1) % 19, "hook_resid_pre", metric="next_logprob", next_ids=[3])

    measure(row[:, :9])
    with compilations() as count:
        measure(row[:, :10])
        measure(row)
    assert count.value == 0


@pytest.mark.slow
def test_spreading_features_over_devices_does_not_change_the_result():
    code = """
import json, sys
sys.path.insert(0, "tests")
import jax, numpy as np
from tinymodel_jax.analysis.effects import sweeps
from tinymodel_jax.lm import TinyModel
lm = TinyModel("mini")
ids = np.arange(20)[None]
spread = sweeps.ablate(lm, "M2", ids)
sweeps._over_devices = lambda: None
alone = sweeps.ablate(lm, "M2", ids)
apart = max(float(np.abs(a - b).max()) for a, b in zip(spread[:4], alone[:4]))
print(json.dumps([len(jax.devices()), len(alone.features), apart, float(alone.kl.max())]))
"""
    devices, features, apart, largest = on_eight_devices(code)
    assert devices == 8
    assert features > 8
    assert apart < F32 < largest


def test_every_intervention_passes_by_the_progress(lm, row, monkeypatch):
    monkeypatch.setattr(sweeps, "SMALL", 0)
    seen: list[int] = []

    def track(chunks, _):
        for items, size, length in chunks:
            yield items, size, length
            seen.extend(items)

    steered = sweeps.steer(lm, "M1", row, [1.0, 2.0], track=track)
    assert sorted(seen) == list(range(steered.kl.size))
    for sweep in (sweeps.ablate, functools.partial(sweeps.clamp, value=1.0)):
        seen.clear()
        assert len(sweep(lm, "M1", row, track=track).features) == len(seen)


def test_what_is_not_finite_is_refused_by_its_cause(lm, row):
    dictionary = lm["M1"].dictionary
    large = dict(dictionary.params)
    large["b_enc"] = large["b_enc"].at[3].set(3e38)
    large["W_enc"] = large["W_enc"].at[:, 3].set(3e38)
    overflowing, broken = lm.splice([]), lm.splice([])
    overflowing.attach("M1", Dictionary.from_params(dictionary.config, large))
    broken.params = {**lm.params, "b_U": lm.params["b_U"].at[2].set(jnp.nan)}
    with as_users_run_it():
        for measure in (sweeps.ablate, attribution.attribute):
            with pytest.raises(ValueError, match=r"the activation of feature 3 of M1 is too large .*1 such"):
                measure(overflowing, "M1", row)
            with pytest.raises(ValueError, match=r"the model's own next-token probabilities are not finite"):
                measure(broken, "M1", row)
        with pytest.raises(ValueError, match="the change by feature 2 is too large for float32"):
            sweeps.steer(lm, "M0", row, 3e38, [2, 1])


def test_what_does_not_fit_is_refused_in_one_line(lm, row):
    bad = {
        r"feature 12 is out of range; the dictionary has features 0\.\.11": lambda: sweeps.ablate(lm, "M1", row, [12]),
        "one token for each of 1 rows": lambda: sweeps.ablate(lm, "M1", row, next_ids=[1, 2]),
        "must be token ids, 0..22": lambda: sweeps.ablate(lm, "M1", row, next_ids=[23]),
        "has no dictionary there": lambda: sweeps.ablate(lm, "A0", row),
        "names a feature": lambda: sweeps.ablate(lm, "M1N3", row),
        "strengths=.*finite": lambda: sweeps.steer(lm, "M1", row, [1.0, np.inf]),
        "value=nan; expected a finite number": lambda: sweeps.clamp(lm, "M1", row, np.nan),
        r"value=1e\+39; expected a finite number": lambda: sweeps.clamp(lm, "M1", row, 1e39),
        "boolean mask of shape": lambda: sweeps.ablate(lm, "M1", row, positions=[1, 2]),
        "a row has no token": lambda: sweeps.ablate(lm, "M1", [[lm.config.pad_id] * 3]),
        "readout 'M1N3' names a feature": lambda: sweeps.ablate(lm, "M0", row, readout="M1N3"),
        r"'M9': layer 9 does not exist; the layers are 0\.\.1": lambda: sweeps.ablate(lm, "M9", row),
        "every row needs at least one": lambda: sweeps.ablate(lm, "M1", np.zeros((0, 5), int)),
        "vectors must be numbers": lambda: sweeps.steer(lm, "M1", row, 1.0, vectors=[[1.0], [1.0, 2.0]]),
        "an effect is not finite": lambda: sweeps.steer(lm, "M0", row, 3e38, [1]),
        "a readout must come later in the forward pass": lambda: sweeps.ablate(lm, "M1", row, readout="A1"),
        r"vectors has shape \(16,\)": lambda: sweeps.steer(lm, "M1", row, 1.0, vectors=np.ones(16)),
        "features and vectors": lambda: sweeps.steer(lm, "M1", row, 1.0, [1], vectors=np.ones((1, 16))),
    }
    with as_users_run_it():
        for message, call in bad.items():
            with pytest.raises(ValueError, match=message) as caught:
                call()
            assert "\n" not in str(caught.value)


def kl_in_float64(change: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the change without its mean, and the KL divergence by its definition."""
    logprobs = logprobs - logsumexp(logprobs)
    changed = logprobs + change
    changed = changed - logsumexp(changed)
    return change - np.exp(logprobs) @ change, float(np.exp(logprobs) @ (logprobs - changed))


def kl_found(change: np.ndarray, logprobs: np.ndarray) -> float:
    one, other = (jnp.asarray(array, jnp.float32) for array in (change, logprobs))
    return float(kl_compiled(one[None, None, None], other[None, None])[0, 0, 0])


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 20.0, 60.0, 100.0, 1000.0])
def test_the_kl_divergence_of_changes_of_every_size_equals_that_of_float64(size):
    rng = np.random.default_rng(0)
    for _ in range(20):
        logprobs = rng.normal(size=50) * 20
        logprobs -= logsumexp(logprobs)
        change, expected = kl_in_float64(rng.normal(size=50) * size, logprobs)
        assert kl_found(change, logprobs) == pytest.approx(expected, rel=F32, abs=F32 * size**2)


@pytest.mark.parametrize("logprob", [-59.0, -61.0, -80.0, -88.0, -120.0])
@pytest.mark.parametrize("above", [-30.0, -1.0, 0.0, 0.6, 30.0])
def test_the_kl_divergence_when_a_token_that_the_model_excluded_is_raised(logprob, above):
    """Its probability, and even exp of the log-probability, may be 0 in float32."""
    logprobs = np.array([0.0, logprob])
    change, expected = kl_in_float64(np.array([0.0, above - logprob]), logprobs)
    assert kl_found(change, logprobs) == pytest.approx(expected, rel=F32, abs=1e-7)


def test_the_kl_divergence_of_a_change_that_is_not_finite_is_not_either():
    assert np.isnan(kl_found(np.array([0.0, np.nan]), np.log([0.5, 0.5])))
