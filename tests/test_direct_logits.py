"""The logit lens, and direct logit attribution: what parts write to the stream adds up to the logits."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import make_dictionary
from oracle import F32, assert_close, error_of, log_softmax

from tinymodel_jax.analysis import direct_logit_attribution, logit_lens
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model import interventions
from tinymodel_jax.params import flatten

TOKENS = [3, 11, 22]


@pytest.mark.parametrize("spliced", [(), ("M0", "Ra1")])
def test_the_lens_unembeds_the_stream_of_every_layer(lm, tok_ids, spliced):
    lm = lm.splice(spliced)
    found = logit_lens(lm, tok_ids)
    assert found.names == ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post")
    W_U, b_U = np.asarray(lm.W_U, np.float64), np.asarray(lm.b_U, np.float64)
    streams = lm.run_with_cache(tok_ids, found.names)[1].values()
    for stream, logprobs in zip(streams, found.logprobs, strict=True):
        assert_close(logprobs, log_softmax(np.asarray(stream, np.float64) @ W_U + b_U), F32)
    assert_close(found.logprobs[-1], lm(tok_ids), F32)
    assert_close(logit_lens(lm, tok_ids, TOKENS).logprobs, found.logprobs[..., TOKENS], F32)
    assert logit_lens(lm, tok_ids[0], 3).logprobs.shape == (3, 1, 11, 1)


def test_the_lens_reads_the_streams_of_an_edited_pass(lm, tok_ids):
    spliced, vector = lm.splice("M0"), np.linspace(-1, 1, 16, dtype=np.float32)
    name = "blocks.1.hook_resid_pre"
    edit, function = interventions.steer(name, vector), {name: lambda value, acts: value + vector}
    plain, found = logit_lens(spliced, tok_ids), logit_lens(spliced, tok_ids, hooks=edit)
    np.testing.assert_array_equal(found.logprobs[0], plain.logprobs[0])
    stream = np.asarray(spliced.run_with_cache(tok_ids, name)[1][name], np.float64) + vector
    unembedded = stream @ np.asarray(lm.W_U, np.float64) + np.asarray(lm.b_U, np.float64)
    assert_close(found.logprobs[1], log_softmax(unembedded), F32)
    assert_close(found.logprobs[-1], spliced.run_with_hooks(tok_ids, edit)[0], F32)
    assert_close(logit_lens(spliced, tok_ids, hooks=function).logprobs, found.logprobs, F32)
    assert "closest: hook_embed" in error_of(
        lambda: logit_lens(lm, tok_ids, hooks=interventions.steer("hook_embd", 1.0))
    )


def part(found: Any, label: str) -> np.ndarray:
    return found.values[found.labels.index(label)]


def test_each_part_is_what_it_writes_times_the_unembedding(lm, tok_ids):
    flat, config = flatten(lm.params), lm.config
    logits, values = oracle.forward(flat, config, tok_ids)
    found = direct_logit_attribution(lm, tok_ids, TOKENS)
    W_U = np.asarray(lm.W_U, np.float64)[:, TOKENS]
    expected = {"embed": flat["W_E"][tok_ids], "pos_embed": np.broadcast_to(flat["W_pos"][:11], (3, 11, 16))}
    for layer in range(2):
        z, W_O = values[f"blocks.{layer}.attn.hook_z"], np.asarray(lm.W_O[layer], np.float64)
        expected |= {f"L{layer}H{head}": z[:, :, head] @ W_O[head] for head in range(2)}
        expected[f"L{layer} b_O"] = np.broadcast_to(lm.b_O[layer], (3, 11, 16))
        expected[f"L{layer} MLP"] = values[f"blocks.{layer}.mlp.hook_post"] @ np.asarray(lm.W_out[layer], np.float64)
        expected[f"L{layer} b_out"] = np.broadcast_to(lm.b_out[layer], (3, 11, 16))
    assert found.labels == (*expected, "b_U")
    for label, written in expected.items():
        assert_close(part(found, label), np.asarray(written, np.float64) @ W_U, F32)
    assert_close(found.values.sum(axis=0), logits[..., TOKENS], F32)
    np.testing.assert_array_equal(found.tokens, TOKENS)


@pytest.mark.parametrize(
    ("tags", "spliced"),
    [
        (("M0", "A1", "Mo1"), None),
        (("Ra1", "Rm1", "M1"), None),
        (("M0", "A1", "Mo1"), False),
        (("M0", "Rm1", "M1"), False),
        (("M0", "A1"), True),
    ],
)
def test_features_biases_and_errors_of_dictionaries_add_up_to_the_logits(lm, tok_ids, tags, spliced):
    lm.attach("M0", make_dictionary("blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out", seed=3, skip=True))
    lm = lm if spliced is None else lm.splice(tags, include_error=spliced)
    found = direct_logit_attribution(lm, tok_ids, TOKENS, tags if spliced is None else ())
    assert_close(found.values.sum(axis=0), np.asarray(lm.logits(tok_ids))[..., TOKENS], F32)
    assert np.abs(found.values[found.labels.index("b_U")]).max() > 0.1  # the biases are not zero
    W_U = np.asarray(lm.W_U, np.float64)[:, TOKENS]
    for tag in tags if "Rm1" not in tags else tags[tags.index("Rm1") :]:
        W_dec, acts = np.asarray(lm[tag].dictionary.params["W_dec"]), np.asarray(lm[tag](tok_ids))
        for feature in range(12):
            if acts[..., feature].any():
                assert_close(part(found, f"{tag}N{feature}"), acts[..., [feature]] * (W_dec[feature] @ W_U), F32)
            else:
                assert f"{tag}N{feature}" not in found.labels
        assert (np.abs(part(found, f"{tag} error")).max() < 1e-4) == (spliced is False)
    assert ("M0 skip" in found.labels) == ("M0" in tags and "Rm1" not in tags)


def test_a_dictionary_of_the_stream_takes_the_place_of_what_came_before(lm, tok_ids):
    found = direct_logit_attribution(lm, tok_ids, 3, "Rm1")
    before = found.labels[: found.labels.index("Rm1 error") + 1]
    assert all(label.startswith("Rm1") for label in before)
    assert found.labels[len(before) :] == ("L1 MLP", "L1 b_out", "b_U")
    stream = np.asarray(lm.run_with_cache(tok_ids, "blocks.1.hook_resid_mid")[1]["blocks.1.hook_resid_mid"])
    error = stream - np.asarray(lm["Rm1"].dictionary(jnp.asarray(stream)))
    assert_close(part(found, "Rm1 error"), error @ np.asarray(lm.W_U)[:, [3]], F32)


def test_texts_are_prompts_and_tokens(story_model: Path):
    lm = TinyModel(story_model)
    ids, dog = lm.to_tokens("Mia saw a dog."), lm.to_single_token(" dog")
    for given, expected in (
        (direct_logit_attribution(lm, "Mia saw a dog.", " dog"), direct_logit_attribution(lm, ids, dog)),
        (logit_lens(lm, "Mia saw a dog.", [" dog", 5]), logit_lens(lm, ids, [dog, 5])),
    ):
        np.testing.assert_array_equal(given[1], expected[1])


def test_bad_arguments_are_refused_in_one_line(lm):
    ids = [[1, 2]]
    says = "direct_logit_attribution: a dictionary at blocks.0.attn.hook_z does not divide what is added"
    assert says in error_of(lambda: direct_logit_attribution(lm, ids, 3, "blocks.0.attn.hook_z"))
    assert "'M0N3' names a feature" in error_of(lambda: direct_logit_attribution(lm, ids, 3, "M0N3"))
    assert "tokens=23; expected one or more ids, 0..22" in error_of(lambda: direct_logit_attribution(lm, ids, 23))
    assert "tokens=[1.5]; expected" in error_of(lambda: logit_lens(lm, ids, [1.5]))
    assert "id 23 at row 0" in error_of(lambda: logit_lens(lm, [[23]]))
