"""Sweeps over features equal single interventions written by hand, however they are chunked."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_users_run_it

from tinymodel_jax import interventions
from tinymodel_jax.analysis import sweeps


@pytest.fixture
def row(tok_ids) -> np.ndarray:
    return tok_ids[:1]


@pytest.mark.parametrize("tag", ["M1", "Rm1", "A1"])
def test_each_row_is_the_single_ablation(lm, row, tag):
    effects = sweeps.ablate(lm, tag, row, next_ids=[3])
    clean = lm(row)
    assert len(effects.features) > 3
    for place, feature in enumerate(effects.features):
        edited, _ = lm.run_with_hooks(row, interventions.ablate(lm[tag].dictionary, int(feature)))
        kl = jnp.mean(jnp.sum(jnp.exp(clean) * (clean - edited), axis=-1))
        loss = -jnp.mean(jnp.take_along_axis(edited[:, :-1] - clean[:, :-1], row[:, 1:, None], axis=-1))
        assert effects.kl[place] == pytest.approx(float(kl), abs=1e-5)
        assert effects.loss[place] == pytest.approx(float(loss), abs=1e-5)
        assert effects.next_logprob[place] == pytest.approx(float((edited - clean)[0, -1, 3]), abs=1e-5)


def test_the_size_of_chunks_does_not_change_the_result(lm, row, monkeypatch):
    whole = sweeps.ablate(lm, "M1", row)
    monkeypatch.setattr(sweeps, "MEMORY", 5 * np.asarray(lm(row)).nbytes)
    for one, other in zip(whole, sweeps.ablate(lm, "M1", row), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_inactive_features_are_exactly_zero_and_not_run(lm, row):
    acts = np.asarray(lm["M1"](row))
    inactive = np.flatnonzero((acts == 0).all(axis=(0, 1)))
    assert len(inactive)
    effects = sweeps.ablate(lm, "M1", row, inactive)
    assert not np.any([effects.kl, effects.loss, effects.next_logprob])
    np.testing.assert_array_equal(effects.features, inactive)


def test_a_spliced_model_is_swept_as_it_is(lm, row):
    spliced = lm.splice("M0")
    plain, through = sweeps.ablate(lm, "M1", row, [0, 1, 2]), sweeps.ablate(spliced, "M1", row, [0, 1, 2])
    edited, _ = spliced.run_with_hooks(row, interventions.ablate(lm["M1"].dictionary, 1))
    clean = spliced(row)
    token = int(jnp.argmax(clean[0, -1]))
    assert through.next_logprob[1] == pytest.approx(float((edited - clean)[0, -1, token]), abs=1e-5)
    assert not np.allclose(plain.kl, through.kl)


def test_features_out_of_range_and_tokens_for_other_rows_are_refused(lm, row):
    with as_users_run_it():
        with pytest.raises(ValueError, match=r"feature 12 is out of range; the dictionary has features 0\.\.11"):
            sweeps.ablate(lm, "M1", row, [12])
        with pytest.raises(ValueError, match="one token for each of 1 rows"):
            sweeps.ablate(lm, "M1", row, next_ids=[1, 2])
