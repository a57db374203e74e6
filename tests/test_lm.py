"""`TinyModel` against the reference's vectors, and what a user may count on: compilations, hooks, splices, errors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from conftest import DATA, N_HEADS, OUR_KIND, make_dictionary, random_params
from oracle import BF16, F32, GOLDEN, Tolerance, assert_close, error_of, forward, log_softmax, next_token_loss

from tinymodel_jax import interventions
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionary import Dictionary
from tinymodel_jax.hook_points import hook_names
from tinymodel_jax.io.torch_files import load_torch_file, save_torch_file
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.transformer import Transformer, param_shapes
from tinymodel_jax.weights import flatten

THEIR_TAGS = [f"{kind}{layer}" for layer in range(4) for kind in ("A", "T", "M", "Ra", "Rm")]

AFTER_LAYER_1 = "blocks.1.hook_resid_post"


def ours(tag: str) -> str:
    """Return our tag of a dictionary that the reference version of the golden vectors calls `tag`."""
    return f"{OUR_KIND[tag[:-1]]}{tag[-1]}"


# The reference's numbers


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
    if theirs == "T1":  # the other forms are programs of their own
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


# The model against NumPy


def test_a_pass_equals_numpy_s_whatever_the_length(lm, config):
    flat = flatten(lm.params)
    ids = np.random.default_rng(3).integers(0, 23, (2, config.n_ctx))
    expected, values = forward(flat, config, ids)
    for length in range(1, config.n_ctx + 1):
        assert_close(lm(ids[:, :length]), log_softmax(expected[:, :length]), F32)
    logprobs, acts = lm.run_with_cache(ids[:, :7])  # computed at length 8, and cut
    assert tuple(acts) == hook_names(config)
    assert_close(logprobs, log_softmax(expected[:, :7]), F32)
    for name, act in acts.items():
        square = name.endswith(("scores", "pattern"))
        assert_close(act, values[name][:, :, :7, :7] if square else values[name][:, :7], F32)


def test_one_sequence_may_come_without_a_batch_axis(lm, tok_ids):
    np.testing.assert_array_equal(lm(tok_ids[0]), lm(tok_ids[:1]))
    assert lm["M0N3"](tok_ids[0].tolist()).shape == (1, 11)


def test_no_tokens_give_no_positions(lm):
    assert lm([]).shape == (1, 0, 23)
    assert lm(np.zeros((0, 4), int)).shape == (0, 4, 23)


def test_right_padding_changes_nothing_before_it(lm, tok_ids):
    padded = np.pad(tok_ids, ((0, 0), (0, 5)), constant_values=lm.config.pad_id)
    assert_close(lm(padded)[:, :11], lm(tok_ids), F32)


@pytest.mark.parametrize("mask", [None, "list", "array", "bool"])
def test_the_loss_is_the_mean_over_the_tokens_that_count(lm, tok_ids, mask):
    weights = np.ones(tok_ids.shape, int)
    if mask is not None:
        weights[1, 4:] = 0
    given = {None: None, "list": weights.tolist(), "array": weights, "bool": weights.astype(bool)}[mask]
    logits, _ = forward(flatten(lm.params), lm.config, tok_ids)
    assert_close(lm.loss(tok_ids, given), next_token_loss(logits, tok_ids, weights), F32)


def test_activations_equal_the_dictionary_s_on_the_site_s_input(lm, tok_ids):
    _, values = forward(flatten(lm.params), lm.config, tok_ids)
    for tag in ("M0", "Rm1"):
        dictionary = lm.dictionaries[tag]
        expected = oracle.encode(dictionary.params, dictionary.config, values[dictionary.config.hook_in])
        assert_close(lm[tag](tok_ids), expected, F32)
        assert_close(lm[f"{tag}.4"](tok_ids), expected[..., 4], F32)
        assert_close(lm[tag](tok_ids, indices=[3, -1]), expected[..., [3, -1]], F32)


# jit, grad, vmap


def test_its_methods_work_inside_jit_vmap_and_grad(lm, tok_ids):
    ids = jnp.asarray(tok_ids)
    expected = lm(tok_ids)
    assert_close(jax.jit(lm)(ids), expected, F32)
    assert_close(jax.vmap(lambda row: lm(row[None])[0])(ids), expected, F32)
    assert_close(jax.jit(lambda shift: lm(tok_ids) + shift)(jnp.float32(1)), expected + 1, F32)
    assert_close(jax.jit(lm["M0"])(ids), lm["M0"](tok_ids), F32)

    def loss(params):
        return TinyModel.from_params(lm.config, params).loss(tok_ids)

    def loss_by_hand(params):
        logprobs = TinyModel.from_params(lm.config, params)(tok_ids)
        return -jnp.take_along_axis(logprobs[:, :-1], ids[:, 1:, None], axis=-1).mean()

    by_hand = flatten(jax.jit(jax.grad(loss_by_hand))(lm.params))
    for name, grad in flatten(jax.jit(jax.grad(loss))(lm.params)).items():
        oracle.assert_gradient_close(grad, by_hand[name])


def test_the_gradient_flows_through_an_edit_into_its_vector(lm, tok_ids):
    @jax.jit
    def loss(vector):
        return lm.run_with_hooks(tok_ids, interventions.steer("blocks.1.hook_mlp_out", vector))[0][..., 0].sum()

    zero, direction = jnp.zeros(16), jnp.linspace(-1, 1, 16)
    slope = jnp.vdot(jax.grad(loss)(zero), direction)
    step = 1e-2  # float32: rounding of the sum, 1e-5, over 2e-2, and h² of the third derivative
    assert_close(slope, (loss(direction * step) - loss(-direction * step)) / (2 * step), Tolerance(5e-3, 5e-3))


# Compilations


def test_every_length_up_to_256_compiles_at_most_six_programs(compilations):
    config = ModelConfig(n_layers=1, d_model=8, n_heads=2, d_mlp=8, n_ctx=256, d_vocab=17)
    lm = TinyModel.from_params(config, random_params(param_shapes(config), 0))
    ids = np.random.default_rng(0).integers(0, 17, (1, 256))
    with compilations() as compiled:
        for length in range(1, 257):
            assert jax.block_until_ready(lm(ids[:, :length])).shape == (1, length, 17)
    assert 1 <= compiled.value <= 6
    again = TinyModel.from_params(ModelConfig(**config.to_dict()), random_params(param_shapes(config), 1))
    with compilations() as compiled:
        for length in (1, 100, 256):
            jax.block_until_ready(again(ids[:, :length]))
    assert compiled.value == 0, "an equal configuration shares the compiled functions"


def test_the_other_reads_compile_for_few_lengths_too(compilations):
    config = ModelConfig(n_layers=1, d_model=8, n_heads=1, d_mlp=8, n_ctx=16, d_vocab=17)
    lm = TinyModel.from_params(config, random_params(param_shapes(config), 0))
    lm.attach("Ra0", make_dictionary("any", "any", d_in=8, d_out=8))
    ids = np.random.default_rng(0).integers(0, 17, (1, 16))
    for read in (lm["Ra0"], lm["Ra0N3"], lm.loss, lambda ids: lm.residual(ids, 0)):
        with compilations() as compiled:
            for length in range(2, 17):
                jax.block_until_ready(read(ids[:, :length]))
        assert compiled.value <= 6


def test_features_of_other_indices_compile_nothing(lm, tok_ids, compilations):
    for tag, indices in (("M0N3", None), ("M0", [1, 2, 3])):
        lm[tag](tok_ids, indices)
    with compilations() as compiled:
        lm["M0N7"](tok_ids)
        lm["M0"](tok_ids, indices=5)
        lm["M0"](tok_ids, indices=slice(0, 9, 3))
    assert compiled.value == 0


def test_a_compiled_model_never_ignores_a_hook(lm, tok_ids):
    """The same model, ids and place with ever other edits, each compared with NumPy's."""
    flat, name, scale = flatten(lm.params), "blocks.0.hook_mlp_out", [1.0]
    vector = np.linspace(-1, 1, 16)
    steps = [
        ({}, {}),
        (interventions.steer(name, jnp.asarray(vector, jnp.float32)), {name: lambda v, seen: v + vector}),
        (interventions.steer(name, jnp.asarray(-vector, jnp.float32)), {name: lambda v, seen: v - vector}),
        (interventions.scale(name, 0.5), {name: lambda v, seen: v * 0.5}),
        (interventions.patch(name, 0.5), {name: lambda v, seen: np.full_like(v, 0.5)}),
        ({name: lambda v, acts: v * 2}, {name: lambda v, seen: v * 2}),
        ({name: lambda v, acts: v * scale[0]}, {name: lambda v, seen: v * scale[0]}),
        ({}, {}),
    ]
    for hooks, edits in steps:
        for factor in (1.0, 3.0):
            scale[0] = factor  # a plain function runs as it is now, not as it was when first seen
            expected, values = forward(flat, lm.config, tok_ids, edits)
            logprobs, acts = lm.run_with_hooks(tok_ids, hooks, keep=[name])
            assert_close(logprobs, log_softmax(expected), F32)
            assert_close(acts[name], values[name], F32)
    assert_close(lm(tok_ids), log_softmax(forward(flat, lm.config, tok_ids)[0]), F32)


def test_kept_activations_come_in_the_order_asked_for(lm, tok_ids):
    names = ["blocks.1.hook_mlp_out", "hook_embed", "blocks.0.attn.hook_z"]
    assert list(lm.run_with_cache(tok_ids, names)[1]) == names
    assert list(lm.run_with_hooks(tok_ids, {}, names)[1]) == names


def test_hooks_and_splices_act_together_splices_first(lm, tok_ids):
    name, dictionary = "blocks.1.hook_mlp_out", lm.dictionaries["Mo1"]
    expected, _ = forward(
        flatten(lm.params),
        lm.config,
        tok_ids,
        {name: lambda v, seen: oracle.reconstruct(dictionary.params, dictionary.config, v) * 2},
    )
    logprobs, _ = lm.splice("Mo1").run_with_hooks(tok_ids, interventions.scale(name, 2.0))
    assert_close(logprobs, log_softmax(expected), F32)


# Dictionaries


def test_splicing_returns_another_model_and_leaves_this_one_alone(lm, tok_ids):
    before = np.asarray(lm(tok_ids))
    spliced = lm.splice(["M1", "A1"])
    assert (spliced.spliced, lm.spliced) == (("A1", "M1"), ())
    np.testing.assert_array_equal(lm(tok_ids), before)
    assert np.abs(spliced(tok_ids) - before).max() > 0.01
    lm.attach("A1", make_dictionary("any", "any", 9))
    after = np.asarray(spliced(tok_ids))
    np.testing.assert_array_equal(spliced(tok_ids), after)
    assert spliced.dictionaries["A1"] is not lm.dictionaries["A1"]


def test_splicing_again_adds_sites_and_changes_switches(lm, tok_ids):
    twice = lm.splice("M1").splice(["Ra1", "M1"], include_error=True)
    assert twice.spliced == ("Ra1", "M1")
    assert_close(twice(tok_ids), lm(tok_ids), F32)
    assert_close(lm.splice("M1").splice("A1")(tok_ids), lm.splice(["A1", "M1"])(tok_ids), F32)


def test_a_read_of_a_spliced_site_is_the_dictionary_s_input_not_its_output(lm, tok_ids):
    assert_close(lm.splice("Mo1")["Mo1"](tok_ids), lm["Mo1"](tok_ids), F32)
    assert np.abs(lm.splice("M1")["Mo1"](tok_ids) - lm["Mo1"](tok_ids)).max() > 0.01


def test_a_residual_is_read_before_the_site_s_own_splice(lm, tok_ids):
    assert_close(lm.splice("Ra1").residual(tok_ids, 1), lm.residual(tok_ids, 1), F32)
    assert np.abs(lm.splice("Ra1").residual(tok_ids, 2) - lm.residual(tok_ids, 2)).max() > 0.01


def test_a_dictionary_takes_the_place_where_it_is_attached(lm, tok_ids):
    lm.attach("M1", make_dictionary("elsewhere", "nowhere", 7))
    assert lm.dictionaries["M1"].config.hook_in == "blocks.1.hook_mlp_in"
    assert lm.dictionaries["M1"].config.hook_out == "blocks.1.hook_mlp_out"
    assert lm["M1"](tok_ids).shape == (3, 11, 12)


def test_dictionaries_are_attached_from_files(golden_lm, golden, tmp_path):
    ids, stored = golden("lm_outputs.npz")["tok"], golden("sparse_acts_readonly.npz")
    lm = TinyModel.from_params(golden_lm.config, golden_lm.params)
    lm.attach("M1", DATA / "sparse_T1_f32_zip.pt")
    lm.attach("Mo2", str(DATA / "sparse_M2_f32_legacy.pt"))
    assert_close(lm["M1"](ids), stored["T1"], GOLDEN)
    assert_close(lm["Mo2"](ids), stored["M2"], GOLDEN)
    lm.dictionaries["M1"].save_pretrained(tmp_path / "m1")
    lm.attach("T2", tmp_path / "m1")
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


# Folders


def test_a_saved_model_loads_as_the_same_model(lm, tok_ids, tmp_path):
    lm.save_pretrained(tmp_path / "lm")
    again = TinyModel(tmp_path / "lm")
    assert again.config == lm.config
    np.testing.assert_array_equal(again(tok_ids), lm(tok_ids))
    np.testing.assert_array_equal(again["M1"](tok_ids), lm["M1"](tok_ids))
    assert again.dictionaries.keys() == {"M1"}, "the others are loaded when they are used"


def test_a_training_run_s_folder_holds_its_model_in_a_folder_of_that_name(lm, tok_ids, tmp_path):
    lm.save_pretrained(tmp_path / "run" / "model")
    np.testing.assert_array_equal(TinyModel(str(tmp_path / "run"))(tok_ids), lm(tok_ids))


def test_a_saved_model_may_be_loaded_for_bfloat16(lm, tok_ids, tmp_path):
    lm.save_pretrained(tmp_path / "lm")
    half = TinyModel(tmp_path / "lm", dtype=jnp.bfloat16)
    assert half.config.dtype == "bfloat16"
    assert half(tok_ids).dtype == jnp.float32
    assert_close(half(tok_ids), lm(tok_ids), BF16)


# Errors


def test_its_repr_says_what_it_is(lm):
    assert repr(lm) == f"TinyModel(2 layers, d_model 16, {lm.config.n_params:,} parameters)"
    assert repr(lm.splice(["M1", "A1"])).endswith("parameters, spliced: A1, M1)")


IDS = [[1, 2, 3]]
CALLS = {
    "id": (lambda lm: lm([[1, 23]]), "id 23 at row 0, position 1 is outside the vocabulary 0..22"),
    "too long": (lambda lm: lm(np.zeros((1, 17), int)), "sequences of 17 tokens; the model's context is 16"),
    "float": (lambda lm: lm["M0"]([[1.0]]), "got float64 values; token ids are integers"),
    "rank": (lambda lm: lm.loss([[[1]]]), "got shape (1, 1, 1); expected (batch, seq)"),
    "ragged": (lambda lm: lm.run_with_cache([[1], [1, 2]]), "rows of different lengths"),
    "layer": (lambda lm: lm["M2"], "'M2': layer 2 does not exist; the layers are 0..1"),
    "residual": (lambda lm: lm.residual(IDS, 3), "layer 3 is outside 0..2 (2 is the final residual)"),
    "negative residual": (lambda lm: lm.residual(IDS, -1), "layer -1 is outside 0..2"),
    "feature": (lambda lm: lm["M0N12"], "feature 12 is out of range; the dictionary has features 0..11"),
    "index": (lambda lm: lm["M0"](IDS, indices=[3, 12]), "feature 12 is out of range"),
    "tag": (lambda lm: lm["M"], "'M' is no dictionary tag. A tag is a kind"),
    "no dictionary": (lambda lm: lm["A0"], "'A0': this model has no dictionary there (it has: M0, Ra1"),
    "attach feature": (lambda lm: lm.attach("M0N1", lm.dictionaries["M0"]), "name the site, 'M0'"),
    "attach layer": (lambda lm: lm.attach("M5", lm.dictionaries["M0"]), "layer 5 does not exist"),
    "attach width": (
        lambda lm: lm.attach("A0", make_dictionary("a", "a", d_in=8, d_out=8)),
        "has d_in=8, but blocks.0.hook_attn_out (A0) is 16 wide",
    ),
    "attach output": (
        lambda lm: lm.attach("M0", make_dictionary("a", "b", d_out=8)),
        "has d_out=8, but blocks.0.hook_mlp_out (M0) is 16 wide",
    ),
    "attach transcoder": (
        lambda lm: lm.attach("A0", make_dictionary("a", "b", skip=True)),
        "skip=True needs a transcoder",
    ),
    "attach unbound": (lambda lm: lm.attach("M0", Dictionary(lm.dictionaries["M0"].config)), "holds no parameters"),
    "splice feature": (lambda lm: lm.splice("M0N3"), "a whole dictionary is spliced, 'M0'"),
    "splice none": (lambda lm: lm.splice(["M0", "A0"]), "'A0': this model has no dictionary"),
    "hook": (
        lambda lm: lm.run_with_hooks(IDS, interventions.scale("blocks.0.hook_mpl_out", 0.0)),
        "closest: blocks.0.hook_mlp_out",
    ),
    "keep": (lambda lm: lm.run_with_cache(IDS, ["hook_embd"]), "'hook_embd' (closest: hook_embed"),
    "edit shape": (
        lambda lm: lm.run_with_hooks(IDS, interventions.steer("hook_embed", jnp.ones((2, 1, 1, 16)))),
        "the hook at 'hook_embed' returned shape (2, 1, 3, 16)",
    ),
    "mask": (lambda lm: lm.loss(IDS, np.ones((1, 4))), "attn_mask has shape (1, 4), tok_ids (1, 3)"),
    "mask rank": (lambda lm: lm.loss(IDS, np.ones(3)), "attn_mask has shape (3,), tok_ids (1, 3)"),
    "all masked": (lambda lm: lm.loss(IDS, [[1, 0, 0]]), "loss: no token to predict"),
    "one token": (lambda lm: lm.loss([[1]]), "loss: no token to predict"),
    "no tokenizer": (lambda lm: lm.generate("Once"), "this model has no tokenizer"),
}


@pytest.mark.parametrize("case", CALLS)
def test_bad_input_gets_a_one_line_error_that_names_the_value(lm, case):
    call, says = CALLS[case]
    assert says in error_of(lambda: call(lm))


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("call", "says"),
    [(lambda lm: lm[3], "3 is no dictionary tag"), (lambda lm: lm.residual(IDS, 1.0), "layer 1.0 is outside 0..2")],
)
def test_input_of_another_type_gets_one_too(lm, call, says):
    assert says in error_of(lambda: call(lm))


def test_after_an_error_the_model_works_as_before(lm, tok_ids):
    before = np.asarray(lm(tok_ids))
    error_of(lambda: lm([[99]]))
    error_of(lambda: lm.run_with_hooks(tok_ids, {"hook_embed": lambda value, acts: value[:1]}))
    np.testing.assert_array_equal(lm(tok_ids), before)


def test_parameters_of_a_fresh_transformer_make_a_model():
    config = ModelConfig(n_layers=1, d_model=8, n_heads=1, d_mlp=8, n_ctx=4, d_vocab=17)
    variables = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    logprobs = TinyModel.from_params(config, variables["params"])([[1, 2, 3, 4]])
    assert_close(np.exp(np.asarray(logprobs, np.float64)).sum(-1), np.ones((1, 4)), F32)
