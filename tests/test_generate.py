"""Generation against the reference's text, the uncached forward pass, and sampling in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import error_of, forward, reconstruct, softmax

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model import interventions
from tinymodel_jax.model.generate import continue_in_steps
from tinymodel_jax.model.sampling import keep_likely
from tinymodel_jax.params import flatten

GREEDY = [
    "greedy10",
    "greedy50_hits_max_seq_len",
    "greedy_break_on_end",
    "greedy_no_break",
    "n_toks0",
    "prompt_30",
    "empty_prompt",
]


def uncached(lm, prompt, n_toks, end_id=None, edits=None):
    """Continue one prompt by the argmax of NumPy's forward pass, recomputed for every token."""
    ids, params = list(prompt), flatten(lm.params)
    for _ in range(min(n_toks, lm.config.n_ctx - len(ids))):
        ids.append(int(forward(params, lm.config, [ids], edits)[0][0, -1].argmax()))
        if ids[-1] == end_id:
            break
    return ids


def continue_prompts(model, prompts, *options, **more):
    """Return the ids of `continue_in_steps` at the end."""
    (end,) = continue_in_steps(model, prompts, *options, **more)
    return end.tok_ids


def ragged(rows, pad_id):
    """Return rows of different lengths as one array, padded on the right."""
    width = max(map(len, rows))
    return np.array([[*row, *[pad_id] * (width - len(row))] for row in rows], np.int32)


@pytest.fixture(scope="module")
def golden_prompt(golden):
    case = golden("generate.json")["greedy10"]
    return np.array([[case["begin"], *map(int, case["prompt"].split())]], np.int32)


def test_greedy_text_is_the_reference_s(golden_lm, golden):
    """All cases in one batch, since fewer tokens are the start of more."""
    cases = [golden("generate.json")[name] for name in GREEDY]
    prompts = ragged([[c["begin"], *map(int, c["prompt"].split())] for c in cases], golden_lm.config.pad_id)
    ends = [c["end"] if c["kwargs"].get("break_on_end", True) else None for c in cases]
    texts = {end: continue_prompts(golden_lm.hooked(), prompts, 50, 0.0, end) for end in {*ends}}
    for row, (case, end) in enumerate(zip(cases, ends, strict=True)):
        expected = [case["begin"], *case["ids_after_begin"]]
        assert texts[end][row, : len(expected)].tolist() == expected
        if expected[-1] == end:
            assert (texts[end][row, len(expected) :] == golden_lm.config.pad_id).all()


def test_a_prompt_that_fills_the_context_gets_no_token_more(golden_lm, golden):
    """The reference adds one beyond the context (33 of 32), read with positions it was never trained on."""
    case = golden("generate.json")["prompt_31"]
    prompt = [case["begin"], *map(int, case["prompt"].split())]
    assert len(prompt) == golden_lm.config.n_ctx == len(case["ids_after_begin"])
    assert golden_lm.generate_ids([prompt], temperature=0.0).tolist() == [prompt]


def test_a_prompt_beyond_the_context_is_an_error_that_names_both_lengths(golden_lm):
    assert "33 tokens; the model's context is 32" in error_of(lambda: golden_lm.generate_ids([range(33)]))


def test_batched_prompts_of_different_lengths_equal_the_uncached_argmax(lm):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 19, length).tolist() for length in (1, 2, 5, 8, 9, 15, 16)]
    out = continue_prompts(lm.hooked(), ragged(prompts, lm.config.pad_id), 6, 0.0)
    expected = [uncached(lm, prompt, 6) for prompt in prompts]
    assert out.tolist() == ragged(expected, lm.config.pad_id).tolist()


def test_a_row_stops_at_the_end_token_and_the_others_continue(lm):
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    end = uncached(lm, prompts[0], 4)[-1]
    expected = [uncached(lm, prompt, 10, end) for prompt in prompts]
    assert len(expected[0]) - len(prompts[0]) == 4 < len(expected[1]) - len(prompts[1])
    pad = lm.config.pad_id
    out = continue_prompts(lm.hooked(), ragged(prompts, pad), 10, 0.0, end)
    assert out.tolist() == ragged(expected, pad).tolist()


def test_a_prompt_that_ends_is_finished_unless_told_otherwise(lm):
    config = lm.config
    rows = [[config.begin_id, 5, 17], [config.begin_id, 5, config.end_id]]
    out = lm.generate_ids(rows, 4, 0.0)
    assert out.shape[1] > 3
    assert out[1].tolist() == [*rows[1], *[config.pad_id] * (out.shape[1] - 3)]
    assert (lm.generate_ids(rows, 4, 0.0, break_on_end=False)[1] != config.pad_id).sum() == 7


def test_padding_inside_a_prompt_is_a_token_like_any_other(lm):
    pad = lm.config.pad_id
    row = [4, pad, 5]
    out = continue_prompts(lm.hooked(), np.array([[*row, pad, pad]]), 3, 0.0)
    assert out.tolist() == [uncached(lm, row, 3)]


def test_rows_are_as_long_as_the_longest_needs(lm):
    prompts = np.full((2, 9), lm.config.pad_id)
    prompts[0, :2], prompts[1, :4] = 3, 5
    assert continue_prompts(lm.hooked(), prompts, 3, 0.0).shape == (2, 7)
    np.testing.assert_array_equal(continue_prompts(lm.hooked(), prompts, 0, 0.0), prompts[:, :4])


def test_a_spliced_model_generates_as_numpy_does(lm):
    tags, prompts = ["M1", "A1", "Rm1", "Ra1"], [[19, 5, 17], [19, 10, 3, 4, 9, 7]]
    edits = dict(splice_edit(lm.dictionaries[tag]) for tag in tags)
    expected = [uncached(lm, prompt, 8, edits=edits) for prompt in prompts]
    assert expected != [uncached(lm, prompt, 8) for prompt in prompts]
    out = lm.splice(tags).generate_ids(ragged(prompts, lm.config.pad_id), 8, 0.0, break_on_end=False)
    assert out.tolist() == ragged(expected, lm.config.pad_id).tolist()


def splice_edit(dictionary):
    """Return the hook point that a dictionary predicts, and the edit that puts the prediction there."""
    params, config = dictionary.params, dictionary.config

    def edit(value, seen):
        return reconstruct(params, config, value if config.hook_in == config.hook_out else seen[config.hook_in])

    return config.hook_out, edit


def test_hooks_act_on_the_prompt_and_on_every_new_token(lm):
    hooks = interventions.steer("blocks.0.hook_mlp_out", jnp.linspace(-2, 2, 16))
    vector, prompt = np.linspace(-2, 2, 16), [3, 1, 4]
    ids = uncached(lm, prompt, 8, edits={"blocks.0.hook_mlp_out": lambda value, seen: value + vector})
    assert ids != uncached(lm, prompt, 8)
    assert continue_prompts(lm.hooked().with_hooks(hooks), np.array([[3, 1, 4]]), 8, 0.0).tolist() == [ids]


def test_bfloat16_generation_is_its_own_uncached_argmax(lm):
    half = TinyModel.from_params(ModelConfig(**{**lm.config.to_dict(), "dtype": "bfloat16"}), lm.params)
    prompt = [3, 1, 4]
    out = half.generate_ids([prompt], 8, 0.0, break_on_end=False)
    logits = np.asarray(half.logits(out))[0]
    # Cached and uncached products round differently in bfloat16, so the choice need only be within that of the best.
    for position in range(len(prompt), out.shape[1]):
        row = logits[position - 1]
        assert row.max() - row[out[0, position]] <= 2**-7 * np.abs(row).max()


def test_sampled_frequencies_are_the_model_s_probabilities(golden_lm, golden, golden_prompt):
    """A frequency deviates by sqrt(p (1 - p) / n), by five of those once in 8,000 runs of 211 tokens."""
    n = 2048
    prompts = np.repeat(golden_prompt, n, axis=0)
    for temperature in (0.8, 2.0):
        expected = np.array(golden("generate.json")[f"next_tok_probs_T{temperature}"])
        out = continue_prompts(golden_lm.hooked(), prompts, 1, temperature, seed=3)
        frequencies = np.bincount(out[:, -1], minlength=211) / n
        # Rare tokens are Poisson: one or two draws of an expected 0.01 are no deviation, hence the term in 1 / n.
        assert (np.abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 3 / n).all()
        assert (frequencies > 0).sum() > 5


def test_filtered_sampling_draws_the_kept_tokens_only_and_each_in_its_share(golden_lm, golden, golden_prompt):
    n, temperature, k, p = 2048, 2.0, 12, 0.6
    probabilities = np.array(golden("generate.json")[f"next_tok_probs_T{temperature}"])
    prompts = np.repeat(golden_prompt, n, axis=0)
    cases: list[tuple[dict[str, Any], np.ndarray]] = [
        ({"top_k": k}, likely(probabilities, k, 1)),
        ({"top_p": p}, likely(probabilities, 211, p)),
        ({"top_k": k, "top_p": p}, likely(probabilities, k, p)),
    ]
    for options, kept in cases:
        out = continue_prompts(golden_lm.hooked(), prompts, 1, temperature, seed=4, **options)
        expected = np.where(kept, probabilities, 0) / probabilities[kept].sum()
        frequencies = np.bincount(out[:, -1], minlength=211) / n
        assert set(np.flatnonzero(frequencies)) <= set(np.flatnonzero(kept))
        # Every kept token has at least 1 percent here, 20 expected draws: all appear.
        assert expected[kept].min() > 0.01
        assert set(np.flatnonzero(frequencies)) == set(np.flatnonzero(kept))
        assert (np.abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all()


def likely(probabilities, top_k, top_p):
    """Return a mask of the kept tokens: the k likeliest, then of these the fewest that reach p of their sum."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])[:top_k]
    total, reached, kept = probabilities[order].sum(), 0.0, np.zeros(len(probabilities), bool)
    for token in order:
        if reached >= top_p and top_p < 1:
            break
        kept[token] = True
        reached += probabilities[token] / total
    return kept


compiled_keep = jax.jit(keep_likely)


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 30),
    st.sampled_from([0.05, 0.3, 0.62, 0.9, 0.999, 1.0]),
    st.sampled_from([0.1, 1.0, 30.0]),
)
def test_what_is_kept_is_what_numpy_keeps(seed, top_k, top_p, spread):
    logits = (np.random.default_rng(seed).normal(size=(3, 23)) * spread).astype(np.float32)
    kept = np.asarray(compiled_keep(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p)))
    for row, out in zip(logits.astype(np.float64), kept, strict=True):
        expected = likely(softmax(row), top_k, top_p)
        np.testing.assert_array_equal(np.isfinite(out), expected)
        np.testing.assert_array_equal(out[expected], row[expected])


def test_ties_with_the_last_kept_token_are_kept():
    logits = jnp.array([[1.0, 3.0, 1.0, 0.0]])
    assert np.isfinite(compiled_keep(logits, jnp.int32(2), jnp.float32(1))).tolist() == [[True, True, True, False]]


def sample(lm, prompts=((3, 1, 4),), **options):
    """Continue the tiny model's prompts; all tests that use this share a few programs."""
    options = {"n_toks": 5, "temperature": 1.0, "break_on_end": False, **options}
    return lm.generate_ids(np.array(prompts), **options).tolist()


def test_one_candidate_is_the_greedy_choice(lm):
    greedy = [uncached(lm, [3, 1, 4], 5)]
    assert sample(lm, temperature=0.0) == greedy
    for options in ({"temperature": 1.5, "top_k": 1}, {"temperature": 1.5, "top_p": 1e-6}, {"temperature": 1e-5}):
        assert sample(lm, seed=5, **options) == greedy


@pytest.mark.parametrize("temperature", [1.17e-38, 1e-46, 5e-324])
def test_a_temperature_that_float32_holds_as_a_subnormal_number_is_greedy(lm, temperature):
    greedy = sample(lm, temperature=0.0)
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}):
        assert sample(lm, temperature=temperature, **options) == greedy


@pytest.mark.parametrize("options", [{"temperature": 1.2e-38}, {"top_p": 1.2e-38}])
def test_the_smallest_normal_numbers_take_the_most_likely_token(lm, options):
    greedy = sample(lm, temperature=0.0)
    assert sample(lm, **options) == greedy
    assert sample(lm, **options, top_k=3) == greedy


def test_the_largest_temperature_draws_every_token_alike(lm):
    drawn = sample(lm, prompts=[(3, 1, 4)] * 2, temperature=3.4e38, n_toks=13)
    assert len({token for row in drawn for token in row[3:]}) > lm.config.d_vocab / 2


def test_filters_that_let_everything_pass_change_nothing(lm):
    plain = sample(lm, seed=6)
    assert sample(lm, seed=6, top_k=10**12) == plain
    assert sample(lm, seed=6, top_p=1.0) == plain


def test_the_seed_decides_the_text_and_rows_draw_differently(lm):
    first = sample(lm, [[3, 1, 4]] * 2)
    assert sample(lm, [[3, 1, 4]] * 2) == first
    assert sample(lm) == first[:1]
    assert first[0] != first[1]
    assert len({str(sample(lm, seed=seed)) for seed in (0, 1, 2, 2**31, 2**32 - 1)}) == 5


def test_a_longer_continuation_starts_with_the_shorter_one(lm):
    short, long = sample(lm, seed=7), sample(lm, seed=7, n_toks=10**12)
    assert len(long[0]) == lm.config.n_ctx
    assert long[0][: len(short[0])] == short[0]


def test_changing_the_numbers_of_the_sampling_compiles_nothing(lm, compilations):
    sample(lm)
    sample(lm, top_k=3)
    with compilations() as compiled:
        sample(lm, top_k=5, temperature=0.9, seed=4)
        sample(lm, temperature=1.3, seed=9, n_toks=4, break_on_end=True)
        sample(lm, top_p=0.5)
    assert compiled.value == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_toks": -1}, "n_toks=-1 must be a whole number, 0 or more"),
        ({"n_toks": 2.5}, "n_toks=2.5 must be"),
        ({"temperature": -0.1}, "temperature=-0.1 must be 0 (greedy) or more"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"temperature": float("inf")}, "temperature=inf must be"),
        ({"temperature": 1e39}, r"temperature=1e+39 must be at most 3.403e+38, the largest float32"),
        ({"top_p": 1e-46}, "top_p=1e-46 is 0 in float32; top_k=1 takes the most likely token"),
        ({"top_p": 1e-40}, "top_p=1e-40 is 0 in float32"),
        ({"top_p": float("nan")}, "top_p=nan must be above 0"),
        ({"temperature": "0.8"}, "temperature='0.8' must be a number"),
        ({"temperature": None}, "temperature=None must be a number"),
        ({"temperature": [0.8]}, "temperature=[0.8] must be a number"),
        ({"temperature": True}, "temperature=True must be a number"),
        ({"top_p": "0.9"}, "top_p='0.9' must be a number"),
        ({"top_p": True}, "top_p=True must be a number"),
        ({"top_k": True}, "top_k=True must be a whole number"),
        ({"n_toks": "5"}, "n_toks='5' must be a whole number"),
        ({"n_toks": True}, "n_toks=True must be a whole number"),
        ({"seed": True}, "seed=True must be a whole number"),
        ({"top_k": 0}, "top_k=0 must be a whole number, 1 or more"),
        ({"top_k": 1.5}, "top_k=1.5 must be a whole number, 1 or more"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1 must be above 0"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number, 0 to 4294967295"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"seed": 2**32}, "seed=4294967296 must be"),  # JAX would take it for 0
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_an_option_out_of_range_is_named(lm, options, says):
    assert says in error_of(lambda: lm.generate_ids([[1, 2]], **options))


def test_all_options_out_of_range_are_named_at_once(lm):
    message = error_of(lambda: lm.generate_ids([[1, 2]], n_toks=-1, top_k=0, top_p=2.0))
    assert all(name in message for name in ("n_toks=-1", "top_k=0", "top_p=2.0"))


@pytest.mark.parametrize("ids", [[], [[]], [[21, 21]], [[1, 2], [21, 21]], np.zeros((0, 3), int)])
def test_a_prompt_without_tokens_is_an_error(lm, ids):
    assert "every row needs at least one, usually [BEGIN]" in error_of(lambda: lm.generate_ids(ids))


def test_edited_values_of_the_prompt_reach_the_cache(lm):
    name, prompt = "blocks.0.attn.hook_v", [3, 1, 4, 1, 5]
    ids = uncached(lm, prompt, 8, edits={name: lambda value, seen: value * -9})
    assert ids != uncached(lm, prompt, 8)
    hooks = interventions.scale(name, -9.0)
    assert continue_prompts(lm.hooked().with_hooks(hooks), np.array([[3, 1, 4, 1, 5]]), 8, 0.0).tolist() == [ids]
