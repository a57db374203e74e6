"""What `TinyModel` says to bad input: one line that names the value and what would be right."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_dictionary
from oracle import error_of

from tinymodel_jax import evaluate
from tinymodel_jax.analysis.effects import attribution, patching, sweeps
from tinymodel_jax.analysis.effects.importance import causal_importance
from tinymodel_jax.analysis.evaluation.sparse_lm import evaluate_sparse_model
from tinymodel_jax.analysis.search.top_activations import top_activations
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model import interventions
from tinymodel_jax.model.interventions import Add
from tinymodel_jax.model.transformer import run_with_hooks

IDS = [[1, 2, 3]]
LEFT_PADDED = [[19, 2, 3], [21, 21, 3]]
PADDED = "row 1 has [PAD] (id 21) at position 1, before a token. Pad on the right"
NOTHING: Any = None


def untyped(value: Any) -> Any:
    """Return a value of a type that the function it goes to does not take."""
    return value


def not_finite() -> Dictionary:
    """Return a dictionary with one decoder row and one bias that are not finite."""
    whole = make_dictionary("a", "b")
    W_dec, b_enc = whole.params["W_dec"].at[4].set(jnp.inf), whole.params["b_enc"].at[3].set(jnp.nan)
    return Dictionary.from_params(whole.config, whole.params | {"W_dec": W_dec, "b_enc": b_enc})


CALLS = {
    "id": (lambda lm: lm([[1, 23]]), "id 23 at row 0, position 1 is outside the vocabulary 0..22"),
    "left padding": (lambda lm: lm(LEFT_PADDED), PADDED),
    "padding within": (
        lambda lm: lm.logits([[19, 21, 3], [19, 21, 3]]),
        "row 0 has [PAD] (id 21) at position 1, before a token (2",
    ),
    "left padding, residual": (lambda lm: lm.residual(LEFT_PADDED, 1), PADDED),
    "left padding, loss": (lambda lm: lm.loss(LEFT_PADDED), PADDED),
    "left padding, features": (lambda lm: lm["M0"](LEFT_PADDED), PADDED),
    "left padding, hooks": (lambda lm: lm.run_with_hooks(LEFT_PADDED, {}), PADDED),
    "left padding, cache": (lambda lm: lm.run_with_cache(LEFT_PADDED, "hook_embed"), PADDED),
    "left padding, generation": (lambda lm: lm.generate_ids(LEFT_PADDED, 2), PADDED),
    "left padding, evaluation": (lambda lm: evaluate(lm, "M0", LEFT_PADDED), PADDED),
    "left padding, sparse model": (lambda lm: evaluate_sparse_model(lm, LEFT_PADDED, "M0"), PADDED),
    "left padding, sweep": (lambda lm: sweeps.ablate(lm, "M0", LEFT_PADDED), PADDED),
    "left padding, importance": (lambda lm: causal_importance(lm, "M0", LEFT_PADDED), PADDED),
    "left padding, attribution": (lambda lm: attribution.attribute(lm, "M0", LEFT_PADDED), PADDED),
    "left padding, search": (lambda lm: top_activations(lm, "M0", LEFT_PADDED), PADDED),
    "left padding, search in batches": (lambda lm: top_activations(lm, "M0", LEFT_PADDED, batch=1), PADDED),
    "too long": (lambda lm: lm(np.zeros((1, 17), int)), "sequences of 17 tokens; the model's context is 16"),
    "float": (lambda lm: lm["M0"]([[1.0]]), "got float64 values; give integers"),
    "rank": (lambda lm: lm.loss([[[1]]]), "got shape (1, 1, 1); expected (batch, seq)"),
    "ragged": (lambda lm: lm.run_with_cache([[1], [1, 2]]), "rows of different lengths"),
    "layer": (lambda lm: lm["M2"], "'M2': layer 2 does not exist; the layers are 0..1"),
    "residual": (lambda lm: lm.residual(IDS, 3), "layer 3 is outside 0..2 (2 is the final residual)"),
    "negative residual": (lambda lm: lm.residual(IDS, -1), "layer -1 is outside 0..2"),
    "feature": (lambda lm: lm["M0N12"], "feature 12 is out of range; the dictionary has features 0..11"),
    "index": (lambda lm: lm["M0"](IDS, indices=[3, 12]), "feature 12 is out of range"),
    "tag": (lambda lm: lm["M"], "'M' is not a dictionary tag, such as 'M1' or 'Ra0N12'. Closest: M0, "),
    "no dictionary": (lambda lm: lm["A0"], "'A0': this model has no dictionary there (it has: M0, Ra1"),
    "attach feature": (lambda lm: lm.attach("M0N1", lm.dictionaries["M0"]), "name the site, 'M0'"),
    "attach layer": (lambda lm: lm.attach("M5", lm.dictionaries["M0"]), "layer 5 does not exist"),
    "attach width": (
        lambda lm: lm.attach("A0", make_dictionary("a", "a", d_in=8, d_out=8)),
        "has d_in=8, but blocks.0.hook_attn_out is 16 wide",
    ),
    "attach output": (
        lambda lm: lm.attach("M0", make_dictionary("a", "b", d_out=8)),
        "has d_out=8, but blocks.0.hook_mlp_out is 16 wide",
    ),
    "attach transcoder": (
        lambda lm: lm.attach("A0", make_dictionary("a", "b", normalize="layer_norm")),
        "the dictionary is a transcoder that normalizes its input, which only an SAE undoes on its output",
    ),
    "attach not finite": (
        lambda lm: lm.attach("M0", not_finite()),
        "attach: the dictionary for M0 has values that are NaN or infinite (16 in W_dec, 1 in b_enc)",
    ),
    "attach without parameters": (
        lambda lm: lm.attach("M0", Dictionary(lm.dictionaries["M0"].config)),
        "missing 'W_enc' (16, 12)",
    ),
    "evaluate feature": (lambda lm: evaluate(lm, ["M0N3"], IDS), "whole dictionaries; got feature 3 of M0"),
    "evaluate without site": (
        lambda lm: evaluate(lm, make_dictionary("x", "y"), IDS),
        "has no site yet: it was trained on arrays. Attach it",
    ),
    "edit without site": (
        lambda lm: interventions.ablate(make_dictionary("x", "x"), 1),
        "has no site yet: it was trained on arrays. Attach it",
    ),
    "splice feature": (lambda lm: lm.splice("M0N3"), "splice: 'M0N3' names a feature; name the site, 'M0'"),
    "splice none": (lambda lm: lm.splice(["M0", "A0"]), "'A0': this model has no dictionary"),
    "hook": (
        lambda lm: lm.run_with_hooks(IDS, interventions.scale("blocks.0.hook_mpl_out", 0.0)),
        "closest: blocks.0.hook_mlp_out",
    ),
    "keep": (lambda lm: lm.run_with_cache(IDS, ["hook_embd"]), "'hook_embd' (closest: hook_embed"),
    "edit shape": (
        lambda lm: lm.run_with_hooks(IDS, {"hook_embed": lambda value, acts: value[None]}),
        "the hook at 'hook_embed' returned shape (1, 1, 3, 16)",
    ),
    "edit width": (
        lambda lm: lm.run_with_hooks(IDS, interventions.steer("hook_embed", jnp.ones(8))),
        "the hook at 'hook_embed': the edit's array has shape (8,), the value that is edited (1, 3, 16)",
    ),
    "positions that are no mask": (
        lambda lm: lm.run_with_hooks(IDS, interventions.scale("hook_embed", 0.0, positions=slice(0, 2))),
        "the hook at 'hook_embed': positions holds object values",
    ),
    "amount shape": (
        lambda lm: lm.run_with_hooks(IDS, interventions.scale_features(lm.dictionaries["M0"], [1, 2], np.ones(3))),
        "the edit's array has shape (3,), the activations of its features (1, 3, 2)",
    ),
    "values for one feature": (
        lambda lm: lm.run_with_hooks(IDS, interventions.clamp(lm.dictionaries["M0"], 1, [1.0, 2.0])),
        "the edit's array has shape (2,), the activations of its features (1, 3, 1)",
    ),
    "no features": (
        lambda lm: interventions.ablate(lm.dictionaries["M0"], NOTHING),
        "features is None; name one feature or more",
    ),
    "text as an amount": (
        lambda lm: lm.run_with_hooks(IDS, interventions.clamp(lm.dictionaries["M0"], 1, ["x"])),
        "expected a number or an array of numbers",
    ),
    "nothing to add": (
        lambda lm: lm.run_with_hooks(IDS, interventions.steer("hook_embed", NOTHING)),
        "the hook at 'hook_embed': the edit holds None; expected a number",
    ),
    "positions": (
        lambda lm: lm.run_with_hooks(IDS, interventions.scale("hook_embed", 0.0, positions=[2])),
        "the hook at 'hook_embed': positions holds int64 values, shape (1,); expected a boolean mask",
    ),
    "feature and indices": (
        lambda lm: lm["M0N7"](IDS, indices=[1]),
        "'M0N7' is one feature; indices=[1] belong to the whole dictionary: lm['M0'](tok_ids, indices=…)",
    ),
    "feature and the same index": (lambda lm: lm["M0N7"](IDS, 7), "'M0N7' is one feature; indices=7 belong to"),
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


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_number_format_that_it_does_not_compute_in_is_refused_before_anything_is_read(lm, dtype):
    says = f"dtype '{dtype}': a TinyModel computes in float32 or bfloat16"
    assert says in error_of(lambda: TinyModel("no such model", dtype=dtype))
    config = dataclasses.replace(lm.config, dtype=dtype)
    assert says in error_of(lambda: TinyModel.from_params(config, lm.params))


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda lm: lm[3], "3 is not a dictionary tag"),
        (lambda lm: lm["m1"], "'m1' is not a dictionary tag, such as 'M1' or 'Ra0N12'. Closest: M1, "),
        (lambda lm: lm["blocks.1.hook_mlp_ot"], "Closest: blocks.1.hook_mlp_out, "),
        (lambda lm: interventions.ablate(untyped("M0"), 5), "expected a dictionary, got 'M0'; lm['M0'] is the one"),
        (
            lambda lm: interventions.steer("hook_embed", 1.0, positions="prompt"),
            "positions='prompt': an edit takes a boolean mask of shape (seq,) or (batch, seq); lm.generate(",
        ),
        (lambda lm: interventions.clamp(lm["M0"], 5, 1.0, positions="all"), "positions='all': an edit takes a boolean"),
        (lambda lm: lm.residual(IDS, 1.0), "layer 1.0 is outside 0..2"),
        (lambda lm: lm("Once"), "this model has no tokenizer"),
        (lambda lm: lm(["Once", 3]), "got text where ids are expected; lm.to_tokens(texts) turns a text"),
        (lambda lm: lm.run_with_hooks(IDS, {"hook_embed": 3}), "the hook at 'hook_embed' is a int; a hook is an edit"),
        (lambda lm: lm.run_with_hooks(IDS, untyped([("hook_embed", Add(1.0))])), "hooks is a list; expected a mapping"),
        (
            lambda lm: interventions.combine(untyped([interventions.steer("hook_embed", 1.0)])),
            "hooks is a list; expected a map",
        ),
        (lambda lm: TinyModel.from_params(lm.config.to_dict(), lm.params), "takes a ModelConfig; got a dict"),
        (lambda lm: TinyModel.from_params(NOTHING, lm.params), "takes a ModelConfig; got a NoneType"),
        (lambda lm: TinyModel.from_params(lm.config, NOTHING), "params is a NoneType; expected names and arrays"),
        (lambda lm: TinyModel.from_params(lm.config, {"params": lm.params}), "params is {'params': …}; expected names"),
        (
            lambda lm: TinyModel.from_params(lm.config, lm.params, untyped("mini")),
            "the tokenizer is 'mini'; Tokenizer.from_pre",
        ),
        (lambda lm: lm.with_params({}, lm.params), "takes a ModelConfig; got a dict"),
        (
            lambda lm: Dictionary.from_params(untyped({}), {}),
            "Dictionary.from_params takes a DictionaryConfig; got a dict",
        ),
        (lambda lm: Dictionary.from_params(lm.dictionaries["M0"].config, NOTHING), "params is a NoneType"),
        (lambda lm: run_with_hooks(lm.params, untyped({}), jnp.ones((1, 3), int)), "takes a ModelConfig; got a dict"),
        (lambda lm: lm.save_pretrained(""), "a model is saved to a folder, got ''; name one"),
        (lambda lm: lm.save_pretrained(NOTHING), "a model is saved to a folder, got None"),
        (lambda lm: lm.dictionaries["M0"].save_pretrained(""), "a dictionary is saved to a folder, got ''"),
        (
            lambda lm: lm.run_with_cache(IDS, lambda name: "rseid" in name),
            "the function given for names chooses none of the 32 hook points",
        ),
        (lambda lm: lm.run_with_cache(IDS, "*rseid*"), "unknown hook points in a 2-layer model: '*rseid*'"),
        (lambda lm: lm.run_with_hooks(IDS, {}, keep=3), "names: got a int; expected a name or several"),
        (lambda lm: sweeps.ablate(lm, lm["M0N3"], IDS), "'M0N3' names a feature; name the site, 'M0'"),
        (lambda lm: sweeps.ablate(lm, untyped(3), IDS), "got a int as dictionary; give a tag such as 'M2', lm['M2']"),
        (lambda lm: lm.splice([lm.dictionaries["M0"]]), "is not a dictionary tag, such as 'M1' or 'Ra0N12'. All"),
        (
            lambda lm: patching.patch(lm, [1, 2], [1, 3], metric=untyped([3])),
            "metric=[3]; expected 'loss', 'next_logprob', logit_difference(a, b)",
        ),
        (lambda lm: lm.attach("M0", 5), "expected a dictionary, got 5; lm"),
        (lambda lm: lm.generate(None), "generate takes a text or a list of texts, got None"),
        (lambda lm: evaluate(lm, untyped({"M0": None}), IDS), "takes a tag such as 'M2'"),
        (lambda lm: evaluate(lm, NOTHING, IDS), "takes a tag such as 'M2', lm['M2'] or a Dictionary, or a list"),
        (lambda lm: evaluate(lm, [NOTHING], IDS), "takes a tag such as 'M2', lm['M2'] or a Dictionary"),
        (lambda lm: attribution.attribute(lm, "M0", IDS, next_ids=untyped(3)), "next_ids has shape ()"),
        (lambda lm: TinyModel(NOTHING), "give the path or published name of a model, got None"),
        (lambda lm: TinyModel(""), "give the path or published name of a model, got ''"),
    ],
)
def test_input_of_another_type_gets_one_too(lm, call, says):
    assert says in error_of(lambda: call(lm))


def test_after_an_error_the_model_works_as_before(lm, tok_ids):
    before = np.asarray(lm(tok_ids))
    error_of(lambda: lm([[99]]))
    error_of(lambda: lm.run_with_hooks(tok_ids, {"hook_embed": lambda value, acts: value[:1]}))
    np.testing.assert_array_equal(lm(tok_ids), before)
