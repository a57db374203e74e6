"""Patching every layer and position at once equals patching each by hand."""

import numpy as np
import pytest
from conftest import as_users_run_it
from oracle import F32, assert_close

from tinymodel_jax.analysis.effects import patching
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
    found = patch(lm, prompts[0], prompts[1], kinds, answer=3, wrong=5)
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
    found = patch(lm, prompts[0], prompts[1], ["hook_resid_pre"], answer=3)
    effects = found.tables[0].effects
    assert effects[0, 4] == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(effects[:, :4], 0, atol=1e-4)
    np.testing.assert_allclose(effects[0, 5:], 0, atol=1e-4)
    assert found.clean == pytest.approx(float(lm(prompts[0])[0, -1, 3]), abs=1e-5)


@pytest.mark.slow
def test_how_many_places_run_at_once_is_bounded_by_memory_and_changes_nothing(lm, prompts, monkeypatch):
    full = ModelConfig()
    assert 1 < patching._places_at_once(full, 256) < 256
    kinds = ["attn.hook_z"]
    whole = patch(lm, prompts[0], prompts[1], kinds, answer=3)
    for memory in (0, 50_000):
        monkeypatch.setattr(patching, "MEMORY", memory)
        parts = patch(lm, prompts[0], prompts[1], kinds, answer=3)
        for one, other in zip(whole.tables, parts.tables, strict=True):
            assert_close(one.effects, other.effects, F32)
    assert patching._places_at_once(lm.config, 11) in range(2, 11)


def test_the_kinds_pass_by_the_progress(lm, prompts):
    seen: list[str] = []

    def track(kinds, _):
        for kind in kinds:
            yield kind
            seen.append(kind)

    found = patch(lm, prompts[0], prompts[1], ["hook_resid_pre", "attn.hook_z"], answer=3, track=track)
    assert seen == [table.kind for table in found.tables]


@pytest.mark.slow
def test_every_kind_of_hook_point_can_be_patched_in_one_program_each(lm, prompts, compilations):
    found = patch(lm, prompts[0], prompts[1], BLOCK_HOOKS, answer=1)
    assert [table.kind for table in found.tables] == list(BLOCK_HOOKS)
    with compilations() as count:
        patch(lm, prompts[1], prompts[0], BLOCK_HOOKS, answer=2)
    assert count.value == 0


def test_what_does_not_fit_is_refused(lm, prompts):
    clean, corrupted = prompts
    with as_users_run_it():
        with pytest.raises(ValueError, match="equal length"):
            patch(lm, clean, corrupted[:, :5], answer=1)
        with pytest.raises(ValueError, match="got hook_zz; all: hook_resid_pre"):
            patch(lm, clean, corrupted, ["hook_zz"], answer=1)
        with pytest.raises(ValueError, match="nothing to restore"):
            patch(lm, clean, clean, answer=1)
        with pytest.raises(ValueError, match=r"token ids, 0\.\.22"):
            patch(lm, clean, corrupted, answer=23)
        with pytest.raises(ValueError, match="answer and wrong are the same token, 4"):
            patch(lm, clean, corrupted, answer=4, wrong=4)
        padded = np.where(np.arange(11) < 8, corrupted, lm.config.pad_id)
        with pytest.raises(ValueError, match=r"a prompt holds \[PAD\]"):
            patch(lm, clean, padded, answer=4)
        overflowing = TinyModel.from_params(lm.config, lm.params | {"W_U": lm.params["W_U"] * 3e38})
        with pytest.raises(ValueError, match="output on these prompts is not finite"):
            patch(overflowing, clean, corrupted, ["hook_mlp_out"], answer=4)


def test_one_kind_may_be_named_alone(lm, prompts):
    alone = patch(lm, prompts[0], prompts[1], "hook_resid_pre", answer=3)
    np.testing.assert_array_equal(
        alone.tables[0].effects, patch(lm, prompts[0], prompts[1], ["hook_resid_pre"], answer=3).tables[0].effects
    )
