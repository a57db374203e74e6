"""Patching every layer and position at once equals patching each by hand."""

import numpy as np
import pytest
from conftest import as_users_run_it
from oracle import F32, assert_close

from tinymodel_jax.analysis.effects import patched_passes
from tinymodel_jax.analysis.effects.metrics import Measured, logit_difference
from tinymodel_jax.analysis.effects.patching import patch
from tinymodel_jax.block_order import BLOCK_HOOKS
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model import interventions


@pytest.fixture
def prompts(tok_ids):
    corrupted = tok_ids[:1].copy()
    corrupted[0, 4] = (corrupted[0, 4] + 1) % 19
    return tok_ids[:1], corrupted


def by_hand(lm, prompts, name: str, index: tuple, answer: int, wrong: int) -> float:
    """Return the change of the logit difference."""
    clean, corrupted = prompts
    good, bad = (np.asarray(lm.run_with_cache(ids, [name])[1][name]) for ids in (clean, corrupted))
    value = bad.copy()
    value[index] = good[index]
    patched, _ = lm.run_with_hooks(corrupted, interventions.patch(name, value))
    metric = [float(x[0, -1, answer] - x[0, -1, wrong]) for x in (patched, lm(corrupted))]
    return metric[0] - metric[1]


@pytest.mark.parametrize(
    ("spliced", "kinds"),
    [
        ((), ["hook_resid_pre", "attn.hook_z"]),
        pytest.param(("M0",), ["hook_mlp_out", "attn.hook_pattern"], marks=pytest.mark.slow),
    ],
)
def test_each_effect_is_that_of_the_single_patch(lm, prompts, spliced, kinds):
    lm = lm.splice(spliced)
    found = patch(lm, prompts[0], prompts[1], kinds, metric=logit_difference(3, 5))
    places = {
        "hook_resid_pre": (0, 6),
        "hook_mlp_out": (0, 5),
        "attn.hook_z": (0, slice(None), 1),
        "attn.hook_pattern": (0, 1),
    }
    for table in found.tables:
        index = places[table.kind]
        assert table.effects.shape == (2, 2 if table.axis == "head" else 11)
        for layer in range(2):
            expected = by_hand(lm, prompts, f"blocks.{layer}.{table.kind}", index, 3, 5)
            change = table.effects[layer, index[-1]] * (found.clean - found.corrupted)
            assert change == pytest.approx(expected, abs=1e-5)


def test_the_changed_token_restores_everything_and_earlier_positions_nothing(lm, prompts):
    found = patch(lm, prompts[0], prompts[1], ["hook_resid_pre"], metric="next_logprob", next_ids=[3])
    effects = found.tables[0].effects
    assert effects[0, 4] == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(effects[:, :4], 0, atol=1e-4)
    np.testing.assert_allclose(effects[0, 5:], 0, atol=1e-4)
    assert found.clean == pytest.approx(float(lm(prompts[0])[0, -1, 3]), abs=1e-5)


@pytest.mark.slow
def test_how_many_places_run_at_once_is_bounded_by_memory_and_changes_nothing(lm, prompts, monkeypatch):
    full = ModelConfig()
    assert 1 < patched_passes._places_at_once(full, 256, Measured("next_logprob")) < 256
    kinds = ["attn.hook_z"]
    whole = patch(lm, prompts[0], prompts[1], kinds, metric="next_logprob", next_ids=[3])
    for memory in (0, 50_000):
        monkeypatch.setattr(patched_passes, "MEMORY", memory)
        parts = patch(lm, prompts[0], prompts[1], kinds, metric="next_logprob", next_ids=[3])
        for one, other in zip(whole.tables, parts.tables, strict=True):
            assert_close(one.effects, other.effects, F32)
    assert patched_passes._places_at_once(lm.config, 11, Measured("next_logprob")) in range(2, 11)


def test_the_kinds_pass_by_the_progress(lm, prompts):
    seen: list[str] = []

    def track(kinds, _):
        for kind in kinds:
            yield kind
            seen.append(kind)

    found = patch(
        lm, prompts[0], prompts[1], ["hook_resid_pre", "attn.hook_z"], metric="next_logprob", next_ids=[3], track=track
    )
    assert seen == [table.kind for table in found.tables]


@pytest.mark.slow
def test_every_kind_of_hook_point_can_be_patched_in_one_program_each(lm, prompts, compilations):
    found = patch(lm, prompts[0], prompts[1], BLOCK_HOOKS, metric="next_logprob", next_ids=[1])
    assert [table.kind for table in found.tables] == list(BLOCK_HOOKS)
    with compilations() as count:
        patch(lm, prompts[1], prompts[0], BLOCK_HOOKS, metric="next_logprob", next_ids=[2])
    assert count.value == 0


def test_what_does_not_fit_is_refused(lm, prompts):
    clean, corrupted = prompts
    with as_users_run_it():
        with pytest.raises(ValueError, match="equal length"):
            patch(lm, clean, corrupted[:, :5], metric="next_logprob", next_ids=[1])
        with pytest.raises(ValueError, match="got hook_zz; all: hook_resid_pre"):
            patch(lm, clean, corrupted, ["hook_zz"], metric="next_logprob", next_ids=[1])
        with pytest.raises(ValueError, match="nothing to restore"):
            patch(lm, clean, clean, metric="next_logprob", next_ids=[1])
        with pytest.raises(ValueError, match=r"must be token ids, 0\.\.22"):
            patch(lm, clean, corrupted, metric="next_logprob", next_ids=[23])
        with pytest.raises(ValueError, match="both are token 4"):
            patch(lm, clean, corrupted, metric=logit_difference(4, 4))
        with pytest.raises(ValueError, match="as many of each kind"):
            patch(lm, clean, np.concatenate([corrupted, corrupted]), metric="loss")
        both, others = (np.concatenate([ids, np.where(np.arange(11) < 8, ids, lm.config.pad_id)]) for ids in prompts)
        with pytest.raises(ValueError, match="pairs have 8 to 11 tokens, so their positions do not correspond"):
            patch(lm, both, others, metric="loss")
        padded = np.where(np.arange(11) < 8, corrupted, lm.config.pad_id)
        with pytest.raises(ValueError, match="pair 0 have 11 and 8 tokens"):
            patch(lm, clean, padded, metric="next_logprob", next_ids=[4])
        overflowing = TinyModel.from_params(lm.config, lm.params | {"W_U": lm.params["W_U"] * 3e38})
        with pytest.raises(ValueError, match="output on these prompts is not finite"):
            patch(overflowing, clean, corrupted, ["hook_mlp_out"], metric="next_logprob", next_ids=[4])


def test_one_kind_may_be_named_alone(lm, prompts):
    alone = patch(lm, prompts[0], prompts[1], "hook_resid_pre", metric="next_logprob", next_ids=[3])
    np.testing.assert_array_equal(
        alone.tables[0].effects,
        patch(lm, prompts[0], prompts[1], ["hook_resid_pre"], metric="next_logprob", next_ids=[3]).tables[0].effects,
    )


def mean_logit(logits, tok_ids):
    assert logits.shape == (1, tok_ids.shape[1], 23)
    return logits[..., 3].mean(axis=-1) + logits[:, 2].max(axis=-1)


def pairs_of(tok_ids):
    corrupted = tok_ids.copy()
    corrupted[:, 2] = (corrupted[:, 2] + 1) % 19
    return tok_ids, corrupted


@pytest.mark.parametrize("metric", ["loss", "next_logprob", logit_difference(3, [5, 6, 7]), mean_logit])
def test_pairs_are_normalised_together_and_by_the_clean_prompt_s_tokens(lm, tok_ids, metric):
    clean, corrupted = pairs_of(tok_ids)
    next_ids = [1, 2, 3] if metric == "next_logprob" else None
    found = patch(lm, clean, corrupted, "attn.hook_z", metric=metric, next_ids=next_ids, each_position=True)
    (table,) = found.tables
    assert table.effects.shape == (2, 2, 11)
    W_U, b_U = (np.asarray(lm.params[name]) for name in ("W_U", "b_U"))

    def value(pair: int, hooks) -> float:
        ids = clean if hooks is None else corrupted
        last = "blocks.1.hook_resid_post"
        resid = lm.run_with_hooks(ids[pair : pair + 1], hooks or {}, [last])[1][last]
        logits = np.asarray(resid)[0] @ W_U + b_U
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        if metric == "loss":
            return -float(logprobs[np.arange(10), clean[pair, 1:]].mean())
        if metric == "next_logprob":
            return float(logprobs[-1, pair + 1])
        if metric is mean_logit:
            return float(logits[:, 3].mean() + logits[2].max())
        return float(logits[-1, 3] - logits[-1, 5 + pair])

    name = "blocks.1.attn.hook_z"
    good = np.asarray(lm.run_with_cache(clean, [name])[1][name])
    bad = np.asarray(lm.run_with_cache(corrupted, [name])[1][name])
    ends = np.array(
        [
            [value(pair, None), value(pair, {"hook_embed": interventions.steer("hook_embed", 0.0)["hook_embed"]})]
            for pair in range(3)
        ]
    )
    np.testing.assert_allclose([found.clean, found.corrupted], ends.mean(axis=0), atol=1e-5)
    differences = ends[:, 0] - ends[:, 1]
    for head, position in ((0, 2), (1, 10)):
        moved = []
        for pair in range(3):
            patched = bad[pair : pair + 1].copy()
            patched[0, position, head] = good[pair, position, head]
            moved.append(value(pair, interventions.patch(name, patched)) - ends[pair, 1])
        effect = sum(moved) / differences.sum()
        assert table.effects[1, head, position] == pytest.approx(effect, abs=1e-4 / abs(differences.sum()))
        error = np.sqrt(3 / 2 * np.sum((np.array(moved) - effect * differences) ** 2)) / abs(differences.sum())
        assert table.half_width[1, head, position] == pytest.approx(1.96 * error, rel=1e-2, abs=1e-3)


def test_heads_of_pairs_of_different_lengths_are_averaged(lm, tok_ids):
    clean, corrupted = (np.where(np.arange(11) < [[11], [8], [6]], ids, lm.config.pad_id) for ids in pairs_of(tok_ids))
    found = patch(lm, clean, corrupted, "attn.hook_z", metric=logit_difference(3, 5))
    alone = [
        patch(lm, clean[i, :n], corrupted[i, :n], "attn.hook_z", metric=logit_difference(3, 5))
        for i, n in enumerate((11, 8, 6))
    ]
    shares = np.array([one.clean - one.corrupted for one in alone])
    expected = sum(one.tables[0].effects * share for one, share in zip(alone, shares, strict=True)) / shares.sum()
    np.testing.assert_allclose(found.tables[0].effects, expected, atol=1e-4)
    assert np.isnan(alone[0].tables[0].half_width).all()
