"""Text in place of token ids: the functions of TransformerLens, and every method and analysis that takes ids."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from oracle import error_of

from tinymodel_jax.analysis.effects import attribution, importance, patching, sweeps
from tinymodel_jax.analysis.effects.metrics import logit_difference
from tinymodel_jax.analysis.evaluation.evaluation import evaluate
from tinymodel_jax.analysis.evaluation.sparse_lm import evaluate_sparse_model
from tinymodel_jax.analysis.search.top_activations import top_activations
from tinymodel_jax.lm import TinyModel

SHORT, LONG = "Mia saw a dog.", "Mia saw a dog and a cat."


@pytest.fixture(scope="module")
def story_lm(story_model: Path) -> TinyModel:
    """A tiny model with the story world's tokenizer."""
    return TinyModel(story_model)


def ids_of(lm: TinyModel, *texts: str, end: bool = False) -> np.ndarray:
    """Return the rows of texts, written by hand."""
    tokenizer = lm.tokenizer
    rows = [[tokenizer.begin_id, *tokenizer.encode(text), *([tokenizer.end_id] if end else [])] for text in texts]
    width = max(map(len, rows))
    return np.array([row + [tokenizer.pad_id] * (width - len(row)) for row in rows])


def test_texts_become_begin_and_their_ids_padded_on_the_right(story_lm):
    np.testing.assert_array_equal(story_lm.to_tokens(SHORT), ids_of(story_lm, SHORT))
    rows = story_lm.to_tokens([SHORT, LONG])
    np.testing.assert_array_equal(rows, ids_of(story_lm, SHORT, LONG))
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(story_lm.to_tokens((f"[BEGIN]{SHORT}", LONG)), rows)
    np.testing.assert_array_equal(story_lm.to_tokens(np.array([SHORT, LONG])), rows)
    np.testing.assert_array_equal(story_lm.to_tokens(SHORT, prepend_bos=False)[0], story_lm.tokenizer.encode(SHORT))
    assert story_lm.to_tokens(rows) is rows


def test_the_tokens_of_a_text_join_to_the_text(story_lm):
    tokens = story_lm.to_str_tokens(SHORT)
    assert tokens[0] == "[BEGIN]"
    assert "".join(tokens[1:]) == SHORT
    assert story_lm.to_str_tokens(SHORT, prepend_bos=False) == tokens[1:]
    assert story_lm.to_str_tokens([SHORT, LONG]) == [tokens, story_lm.to_str_tokens(LONG)]  # without [PAD]
    rows = story_lm.to_tokens([SHORT, LONG])
    for row in (rows[:1], rows[0], rows[0].tolist(), jax.numpy.asarray(rows[0])):
        assert story_lm.to_str_tokens(row)[: len(tokens)] == tokens
    assert [len(row) for row in story_lm.to_str_tokens(rows)] == [rows.shape[1]] * 2


def test_ids_become_the_text_they_came_from(story_lm):
    rows = story_lm.to_tokens([SHORT, LONG])
    assert story_lm.to_string(rows[1]) == f"[BEGIN]{LONG}"
    assert story_lm.to_string(rows.tolist())[0].startswith(f"[BEGIN]{SHORT}[PAD]")
    assert story_lm.to_single_token(story_lm.to_string(rows[0, 2])) == rows[0, 2]


PROMPT_CALLS = {
    "log-probabilities": lambda lm, ids: lm(ids),
    "logits": lambda lm, ids: lm.logits(ids),
    "residual": lambda lm, ids: lm.residual(ids, 1),
    "loss": lambda lm, ids: lm.loss(ids),
    "cache": lambda lm, ids: lm.run_with_cache(ids, "hook_embed"),
    "hooks": lambda lm, ids: lm.run_with_hooks(ids, {}, "hook_embed"),
    "features": lambda lm, ids: lm["M1"](ids),
    "generation": lambda lm, ids: lm.generate_ids(ids, 2),
    "sweep": lambda lm, ids: sweeps.ablate(lm, "M1", ids),
    "attribution": lambda lm, ids: attribution.attribute(lm, "M1", ids),
}
STORY_CALLS = {
    "evaluation": lambda lm, rows: evaluate(lm, "M1", rows)[0]._replace(margins=0),
    "sparse model": lambda lm, rows: evaluate_sparse_model(lm, rows, "M1")._replace(margins=0),
    "importance": lambda lm, rows: importance.causal_importance(lm, "M1", rows),
    "search": lambda lm, rows: top_activations(lm, "M1", rows, k=2).top,
}


def assert_equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("call", PROMPT_CALLS.values(), ids=PROMPT_CALLS)
def test_a_method_that_takes_ids_takes_texts(story_lm, call):
    assert_equal(call(story_lm, [SHORT, LONG]), call(story_lm, ids_of(story_lm, SHORT, LONG)))
    assert_equal(call(story_lm, SHORT), call(story_lm, ids_of(story_lm, SHORT)))


@pytest.mark.parametrize("call", STORY_CALLS.values(), ids=STORY_CALLS)
def test_an_analysis_of_rows_takes_stories_which_have_an_end(story_lm, call):
    assert_equal(call(story_lm, [SHORT, LONG]), call(story_lm, ids_of(story_lm, SHORT, LONG, end=True)))


def test_prompts_to_patch_are_texts_as_well(story_lm):
    other = "Mia saw a cat."
    tables = [
        patching.patch(story_lm, clean, corrupted, "hook_resid_pre", metric=logit_difference(3, 5)).tables
        for clean, corrupted in ((SHORT, other), (ids_of(story_lm, SHORT), ids_of(story_lm, other)))
    ]
    np.testing.assert_array_equal(tables[0][0].effects, tables[1][0].effects)


def test_texts_that_cannot_be_ids_are_refused_in_one_line(story_lm):
    too_long = LONG * 20
    length = len(story_lm.tokenizer.encode(too_long, max_length=None)) + 1
    says = f"has {length} tokens with [BEGIN]; the context is 64"
    assert says in error_of(lambda: story_lm(too_long))
    assert says in error_of(lambda: story_lm["M1"]([SHORT, too_long]))
    assert "holds [END]" in error_of(lambda: story_lm.loss(f"{SHORT}[END]"))
    assert "got text where ids are expected" in error_of(lambda: story_lm([SHORT, 3]))
    assert "is 7 tokens ('M', 'i', 'a', ' saw'" in error_of(lambda: story_lm.to_single_token(SHORT))
