"""Evaluation of crosscoders and cross-layer transcoders, against passes with the replaced values."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import error_of
from test_cross_layer import CROSSCODER, TRANSCODER, WIDTH, dictionary_at

from tinymodel_jax import interventions
from tinymodel_jax.analysis.evaluation import evaluate, evaluate_sparse_model, export_sparse_lm
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.interventions import combine

CLOSE = 1e-4


@pytest.fixture
def rows(tok_ids: np.ndarray) -> np.ndarray:
    """Stories of a [BEGIN] and ten tokens."""
    return np.concatenate([np.full((3, 1), 19, np.int32), tok_ids[:, 1:]], axis=1)


def test_the_numbers_of_joined_sites_are_those_of_passes_with_replaced_values(lm: TinyModel, rows: np.ndarray) -> None:
    lm.attach(CROSSCODER, dictionary_at(CROSSCODER, 1))
    lm.attach(TRANSCODER, dictionary_at(TRANSCODER, 2, exclude=(3,)))
    of_crosscoder, of_transcoder, of_sae = evaluate(lm, [CROSSCODER, TRANSCODER, "Ra1"], rows)
    acting = rows != 3
    _, clean = lm.run_with_cache(rows)

    def loss(hooks: interventions.Hooks) -> float:
        return float(lm.loss(rows, np.ones(rows.shape), hooks=hooks))

    def explained(y: np.ndarray, prediction: np.ndarray, counted: np.ndarray) -> float:
        y, prediction = y[counted], prediction[counted]
        return float(1 - np.square(y - prediction).sum() / np.square(y - y.mean(axis=0)).sum())

    # the crosscoder: one site at a time, from the clean pass
    crosscoder = lm[CROSSCODER].dictionary
    x = jnp.concatenate([clean[name] for name in crosscoder.config.hooks_in], axis=-1)
    prediction, counted = np.asarray(crosscoder(x)), np.arange(rows.shape[1]) > 0
    counted = np.broadcast_to(counted, rows.shape)
    assert of_crosscoder.explained_variance == pytest.approx(explained(np.asarray(x), prediction, counted), abs=CLOSE)
    assert of_crosscoder.l0 == pytest.approx((np.asarray(crosscoder.encode(x)) > 0)[counted].sum(axis=1).mean())
    spliced, zeroed = [], []
    for part, (tag, name) in enumerate(zip(("Ra0", "Ra1"), crosscoder.config.hooks_out, strict=True)):
        found, value = of_crosscoder.sites[tag], prediction[..., part * WIDTH : (part + 1) * WIDTH]
        spliced.append(loss(interventions.patch(name, value)))
        zeroed.append(loss(interventions.scale(name, 0.0)))
        assert found["ce_spliced"] == pytest.approx(spliced[-1], abs=CLOSE)
        recovered = (zeroed[-1] - spliced[-1]) / (zeroed[-1] - of_crosscoder.ce_clean)
        assert found["ce_recovered"] == pytest.approx(recovered, abs=CLOSE)
        assert found["explained_variance"] == pytest.approx(
            explained(np.asarray(clean[name]), value, counted), abs=CLOSE
        )
    assert of_crosscoder.ce_spliced == pytest.approx(np.mean(spliced), abs=CLOSE)
    assert of_crosscoder.ce_zero_ablated == pytest.approx(np.mean(zeroed), abs=CLOSE)

    # the cross-layer transcoder: all MLP outputs in one pass, but not at the excluded token
    transcoder = lm[TRANSCODER].dictionary
    assert of_transcoder.ce_spliced == pytest.approx(loss(interventions.splice(transcoder)), abs=CLOSE)
    hooks = [interventions.scale(name, 0.0, acting) for name in transcoder.config.hooks_out]
    assert of_transcoder.ce_zero_ablated == pytest.approx(loss(combine(*hooks)), abs=CLOSE)
    x = jnp.concatenate([clean[name] for name in transcoder.config.hooks_in], axis=-1)
    acts, prediction = np.asarray(transcoder.encode(x)), np.asarray(transcoder(x))
    counted = counted & acting
    for layer, name in enumerate(transcoder.config.hooks_out):
        found, value = of_transcoder.sites[f"M{layer}"], prediction[..., layer * WIDTH : (layer + 1) * WIDTH]
        own = acts[counted][:, layer * 6 : (layer + 1) * 6]
        assert found["l0"] == pytest.approx((own > 0).sum(axis=1).mean())
        assert found["explained_variance"] == pytest.approx(
            explained(np.asarray(clean[name]), value, counted), abs=CLOSE
        )
    assert of_transcoder.l0 == pytest.approx(sum(site["l0"] for site in of_transcoder.sites.values()))
    assert of_sae.sites == {}


def test_a_model_that_is_spliced_with_joined_sites_is_evaluated_elsewhere(lm: TinyModel, rows: np.ndarray) -> None:
    lm.attach(TRANSCODER, dictionary_at(TRANSCODER, 2))
    spliced = lm.splice(TRANSCODER)
    (found,) = evaluate(spliced, "Ra1", rows)
    hooks = interventions.splice(lm["Ra1"])
    assert found.ce_spliced == pytest.approx(float(spliced.loss(rows, np.ones(rows.shape), hooks=hooks)), abs=CLOSE)
    lm.attach(CROSSCODER, dictionary_at(CROSSCODER, 1))
    message = error_of(lambda: evaluate(lm.splice(CROSSCODER), "M1", rows))
    assert "is spliced with a crosscoder (spliced: Ra0+Ra1)" in message


def test_a_cross_layer_transcoder_is_a_sparse_model_that_is_not_exported(lm: TinyModel, rows: np.ndarray) -> None:
    lm.attach(TRANSCODER, dictionary_at(TRANSCODER, 2))
    (of_dictionary,) = evaluate(lm, TRANSCODER, rows)
    of_model = evaluate_sparse_model(lm, rows, TRANSCODER)
    assert of_model.ce_sparse == pytest.approx(of_dictionary.ce_spliced, abs=CLOSE)
    assert "its features write to several MLPs" in error_of(lambda: export_sparse_lm(lm, TRANSCODER))
