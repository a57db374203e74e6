"""`TinyModel` against the reference's vectors: log-probabilities, residuals, activations, spliced models, files."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import DATA, N_HEADS, OUR_KIND
from oracle import F32, GOLDEN, Tolerance, assert_close, log_softmax

from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io.torch_files import load_torch_file, save_torch_file
from tinymodel_jax.lm import TinyModel

THEIR_TAGS = [f"{kind}{layer}" for layer in range(4) for kind in ("A", "T", "M", "Ra", "Rm")]

AFTER_LAYER_1 = "blocks.1.hook_resid_post"


def ours(tag: str) -> str:
    """Return our tag of a dictionary that the reference version of the golden vectors calls `tag`."""
    return f"{OUR_KIND[tag[:-1]]}{tag[-1]}"


@pytest.mark.parametrize(("ids", "expected"), [("tok", "logp"), ("tok_full", "logp_full"), ("tok1", "logp_tok1")])
def test_log_probabilities_are_the_reference_s(golden_lm, golden, ids, expected):
    outputs = golden("lm_outputs.npz")
    logprobs = golden_lm(outputs[ids])
    assert logprobs.dtype == jnp.float32
    assert_close(logprobs, outputs[expected], GOLDEN)


def test_logits_are_log_probabilities_up_to_a_constant(golden_lm, golden):
    outputs = golden("lm_outputs.npz")
    logits = np.asarray(golden_lm.logits(outputs["tok"]), np.float64)
    assert_close(log_softmax(logits), outputs["logp"], GOLDEN)


@pytest.mark.parametrize("layer", range(5))
def test_residuals_are_the_reference_s(golden_lm, golden, layer):
    ids, hooks = golden("lm_outputs.npz")["tok"][:1], golden("lm_hooks.npz")
    name = f"torso.{layer}.res_attn" if layer < 4 else "torso.3.res_final"
    assert_close(golden_lm.residual(ids, layer), hooks[name], GOLDEN)


def test_a_bfloat16_file_loads_exactly(golden):
    outputs = golden("lm_outputs.npz")
    lm = TinyModel(DATA / "lm_bf16_zip.pt", n_heads=N_HEADS)
    stored = load_torch_file(DATA / "lm_bf16_zip.pt")["embed.weight"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(lm.W_E, stored.astype(np.float32))
    assert_close(lm(outputs["tok"]), outputs["logp_bf16_weights_in_f32"], GOLDEN)


def test_a_float16_file_loads_exactly(tmp_path, golden):
    halves = {key: array.astype(np.float16) for key, array in load_torch_file(DATA / "lm_f32_zip.pt").items()}
    save_torch_file(halves, tmp_path / "half.pt")
    lm = TinyModel(tmp_path / "half.pt", n_heads=N_HEADS)
    assert lm.W_E.dtype == jnp.float32
    np.testing.assert_array_equal(lm.W_E, halves["embed.weight"].astype(np.float32))


def test_bfloat16_computation_is_as_close_to_float32_as_the_reference_s(golden):
    """The reference's own bfloat16 computation differs from its float32 by up to 0.32 on these ids."""
    outputs = golden("lm_outputs.npz")
    lm = TinyModel(DATA / "lm_f32_zip.pt", n_heads=N_HEADS, dtype="bfloat16")
    logprobs = lm(outputs["tok"])
    assert logprobs.dtype == jnp.float32
    assert_close(np.exp(np.asarray(logprobs, np.float64)).sum(-1), np.ones((2, 16)), F32)
    assert_close(logprobs, outputs["logp"], Tolerance(2 * 0.32, 0))
    assert lm.params["W_E"].dtype == jnp.float32


def test_activations_at_every_site_are_the_reference_s(golden_lm, golden):
    ids, stored = golden("lm_outputs.npz")["tok"], golden("sparse_acts_readonly.npz")
    _, acts = golden_lm.run_with_cache(ids)
    for theirs in THEIR_TAGS:
        dictionary = golden_lm.dictionaries[ours(theirs)]
        assert_close(dictionary.encode(acts[dictionary.config.hook_in]), stored[theirs], GOLDEN)


@pytest.mark.parametrize("theirs", ["Ra1", "A1", "Rm1", "T1", "M1", "A3"])
def test_indexing_by_a_tag_gives_the_reference_s_activations(golden_lm, golden, theirs):
    ids, stored = golden("lm_outputs.npz")["tok"], golden("sparse_acts_readonly.npz")
    assert_close(golden_lm[ours(theirs)](ids), stored[theirs], GOLDEN)


@pytest.mark.parametrize("theirs", ["T1", "A2", "Rm3"])
def test_every_form_of_indices_is_the_reference_s(golden_lm, golden, theirs):
    ids, stored, dictionary = golden("lm_outputs.npz")["tok"], golden("sparse_acts_readonly.npz"), ours(theirs)
    read = golden_lm[dictionary]
    forms = {"int7": 7, "neg": -1}
    if theirs == "T1":  # the other forms are separate programs
        forms |= {"list": [1, 5, 40], "slice": slice(0, 10, 3)}
    for name, indices in forms.items():
        assert_close(read(ids, indices=indices), stored[f"{theirs}/{name}"], GOLDEN)
    assert_close(golden_lm[f"{dictionary}N7"](ids), stored[f"{theirs}N7"], GOLDEN)


def test_the_twin_of_a_transcoder_reads_the_same_place(golden_lm, golden_dictionaries, golden):
    golden_lm.attach("T1", golden_dictionaries["M1"])
    ids = golden("lm_outputs.npz")["tok"]
    np.testing.assert_array_equal(golden_lm["T1"](ids), golden_lm["M1"](ids))


@pytest.mark.parametrize("tag", ["A1", "T1", "M1", "Ra1", "Rm1"])
def test_a_spliced_model_is_the_reference_s(golden_lm, golden, tag):
    ids, stored = golden("lm_outputs.npz")["tok"], golden("splice.npz")
    spliced = golden_lm.splice(ours(tag))
    case = f"{tag}|err=0|detach_error=0|detach_pred=0"
    logprobs, acts = spliced.run_with_cache(ids, [AFTER_LAYER_1])
    assert_close(logprobs[:1], stored[f"{case}/logp"], GOLDEN)
    assert_close(acts[AFTER_LAYER_1][:1], stored[f"{case}/resid_2"], GOLDEN)


@pytest.mark.parametrize("tag", ["Ra1", "A1", "Rm1", "T1", "M1"])
def test_with_the_error_term_a_spliced_model_is_the_plain_one(golden_lm, golden, tag):
    """So in the reference, which raises for Ra and Rm."""
    outputs = golden("lm_outputs.npz")
    assert_close(golden_lm.splice(ours(tag), include_error=True)(outputs["tok"]), outputs["logp"], GOLDEN)


@pytest.mark.parametrize(
    ("case", "tags"), [("T2+M2|err=0", ["M2", "Mo2"]), ("all20|err=0", [ours(tag) for tag in THEIR_TAGS])]
)
def test_several_spliced_dictionaries_are_the_reference_s(golden_lm, golden, case, tags):
    ids, stored = golden("lm_outputs.npz")["tok"], golden("splice.npz")
    spliced = golden_lm.splice(tags)
    assert_close(spliced(ids)[:1], stored[f"{case}/logp"], GOLDEN)
    assert_close(spliced.residual(ids, 2)[:1], stored[f"{case}/resid_2"], GOLDEN)
    assert golden_lm.splice(reversed(tags)).spliced == spliced.spliced


@pytest.mark.parametrize("tags", [["A2", "M2", "Mo2"], [ours(tag) for tag in THEIR_TAGS]])
def test_several_dictionaries_with_the_error_term_change_nothing(golden_lm, golden, tags):
    outputs = golden("lm_outputs.npz")
    assert_close(golden_lm.splice(tags, include_error=True)(outputs["tok"]), outputs["logp"], GOLDEN)


def test_reads_of_a_spliced_model_pass_all_that_acts_before_the_site(golden_lm, golden):
    """The reference leaves out the site's own layer; here a read sees what the spliced pass sees there."""
    ids, stored = golden("lm_outputs.npz")["tok"], golden("splice.npz")
    layer_0 = [ours(tag) for tag in THEIR_TAGS if tag.endswith("0")]
    for theirs, tag in (("T1", "M1"), ("A1", "A1")):
        expected = stored[f"all20|err=0/acts_{theirs}_readonly_on_spliced"]
        assert_close(golden_lm.splice(layer_0)[tag](ids)[:1], expected, GOLDEN)
        own_layer_too = golden_lm.splice([*layer_0, "Ra1", "Rm1"])[tag](ids)[:1]
        assert np.abs(own_layer_too - expected).max() > 0.1


def test_dictionaries_are_attached_from_files(golden_lm, golden, tmp_path):
    ids, stored = golden("lm_outputs.npz")["tok"], golden("sparse_acts_readonly.npz")
    lm = TinyModel.from_params(golden_lm.config, golden_lm.params)
    lm.attach("M1", DATA / "sparse_T1_f32_zip.pt")
    lm.attach("Mo2", str(DATA / "sparse_M2_f32_legacy.pt"))
    assert_close(lm["M1"](ids), stored["T1"], GOLDEN)
    assert_close(lm["Mo2"](ids), stored["M2"], GOLDEN)
    lm.dictionaries["M1"].save_pretrained(tmp_path / "m1")
    lm.attach("T2", Dictionary.from_pretrained(tmp_path / "m1"))  # the folder itself is for layer 1
    assert lm.dictionaries["T2"].config.hook_out == "blocks.2.hook_mlp_out"
    np.testing.assert_array_equal(lm.dictionaries["T2"].params["W_enc"], lm.dictionaries["M1"].params["W_enc"])


def test_dictionaries_registered_in_a_file_come_with_the_model(golden_dictionaries, golden, tmp_path):
    state = dict(load_torch_file(DATA / "lm_f32_zip.pt"))
    tensors = golden("sparse_all_tags.npz")
    for module, tag in (("transcoder", "T1"), ("res_pre_attn_sae", "Ra1")):
        for key in ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"):
            state[f"torso.1.{module}.{key}"] = tensors[f"{tag}/{key}"]
    save_torch_file(state, tmp_path / "with.pt")
    lm = TinyModel(tmp_path / "with.pt", n_heads=N_HEADS)
    ids, stored = golden("lm_outputs.npz")["tok"], golden("sparse_acts_readonly.npz")
    assert_close(lm["M1N7"](ids), stored["T1"][..., 7], GOLDEN)
    assert_close(lm.splice("M1")(ids)[:1], golden("splice.npz")["T1|err=0|detach_error=0|detach_pred=0/logp"], GOLDEN)
    lm.save_pretrained(tmp_path / "saved")  # Ra1 was never used, and is saved all the same
    saved = TinyModel(tmp_path / "saved")
    assert_close(saved["M1"](ids), stored["T1"], GOLDEN)
    assert_close(saved["Ra1"](ids), stored["Ra1"], GOLDEN)
