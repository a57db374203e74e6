"""What `TinyModel` says to bad input: one line that names the value and what would be right."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_dictionary
from oracle import error_of

from tinymodel_jax import interventions
from tinymodel_jax.dictionary import Dictionary

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
