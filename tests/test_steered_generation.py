"""Edits while generating: with the cache as in an uncached loop, token by token, for every kind of edit and rule."""

import jax
import numpy as np
import pytest
from conftest import make_dictionary, param_shapes, random_params
from oracle import F32, assert_close, error_of

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model import interventions
from tinymodel_jax.model.edits import Add
from tinymodel_jax.model.generate import continue_in_steps
from tinymodel_jax.model.interventions import ablate, clamp, combine, patch, scale, scale_features, splice, steer

LENGTHS, N_TOKS = (3, 5, 2), 6
BATCH, SEQ = len(LENGTHS), max(LENGTHS)
PAD = 21
MLP_OUT, RESID, Z = "blocks.1.hook_mlp_out", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"
SCORES, PATTERN = "blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"


@pytest.fixture(scope="module")
def prompts():
    """Rows of three lengths, padded on the right."""
    ids = np.random.default_rng(0).integers(0, 19, (BATCH, SEQ)).astype(np.int32)
    return np.where(np.arange(SEQ) < np.array(LENGTHS)[:, None], ids, PAD)


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2


def mask_of(given, positions, length):
    """Return the mask (batch, length) of the rule: `given` on the prompts, then whatever the rule says."""
    given = np.ones((BATCH, SEQ), bool) if given is None else np.broadcast_to(given, (BATCH, SEQ))
    full = np.pad(given, ((0, 0), (0, max(0, length - SEQ))))[:, :length]
    is_prompt = np.arange(length) < np.array(LENGTHS)[:, None]
    return np.where(is_prompt, full & (positions != "generated"), positions != "prompt")


def over(array, axis, length):
    """Return an array over the prompts' positions with zeros for later ones."""
    room = [(0, 0)] * array.ndim
    room[axis] = (0, max(0, length - SEQ))
    return np.take(np.pad(array, room), range(length), axis)


GIVEN = np.array([True, False, True, False, True])
ROWS = draws(BATCH, SEQ, seed=9) > 0
PER_ROW, PER_POSITION, FACTORS = draws(BATCH, 1, 16), draws(SEQ, 16), draws(2, 1)

# name -> (lm, masks) -> hooks, where masks(mask, width) is the mask to use at the length of the pass
EDITS = {
    "steer": lambda lm, m: steer(RESID, PER_ROW[0, 0], m(None)),
    "steer each row": lambda lm, m: steer(RESID, PER_ROW, m(None)),
    "steer some positions": lambda lm, m: steer(RESID, PER_ROW, m(GIVEN)),
    "patch some positions of rows": lambda lm, m: patch(MLP_OUT, PER_ROW[0, 0], m(ROWS)),
    "scale heads": lambda lm, m: scale(Z, FACTORS, m(GIVEN)),
    "scale scores of heads": lambda lm, m: scale(SCORES, FACTORS[..., None], m(ROWS)),
    "scale the pattern": lambda lm, m: scale(PATTERN, 0.3, m(GIVEN)),
    "steer embeddings": lambda lm, m: steer("hook_pos_embed", PER_ROW[0, 0], m(GIVEN)),
    "ablate": lambda lm, m: ablate(lm.dictionaries["M1"], [0, 5, 7], m(GIVEN)),
    "clamp each row": lambda lm, m: clamp(lm.dictionaries["Ra1"], [3, 4], draws(BATCH, 1, 2), m(ROWS)),
    "scale features": lambda lm, m: scale_features(lm.dictionaries["Mo1"], slice(None), -2.0, m(None)),
    "all together": lambda lm, m: combine(
        steer(RESID, PER_ROW, m(GIVEN)),
        clamp(lm.dictionaries["Ra1"], 3, 2.0, m(ROWS)),
        ablate(lm.dictionaries["M1"], [1, 2], m(None)),
        clamp(lm.dictionaries["M1"], [2, 5], 1.5, m(GIVEN)),
        scale(MLP_OUT, 0.5, m(ROWS)),
    ),
}


def uncached(lm, prompts, hooks_at, n_toks, choose):
    """Continue rows by whole forward passes; return the ids, and the log-probability of each generated token."""
    lengths = np.array(LENGTHS)
    ids = np.pad(prompts, ((0, 0), (0, n_toks)), constant_values=PAD)
    logprobs = np.full(ids.shape, np.nan)
    for step in range(n_toks):
        width = SEQ + n_toks
        after = np.asarray(lm.run_with_hooks(ids, hooks_at(width))[0])
        for row, length in enumerate(lengths):
            token = choose(after[row, length + step - 1], row, step)
            ids[row, length + step], logprobs[row, length + step] = token, after[row, length + step - 1, token]
    return ids, logprobs


def most_likely(logprobs, row, step):
    return int(logprobs.argmax())


def drawn(logprobs, row, step):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), row), step)
    return int(jax.random.categorical(key, logprobs / np.float32(0.9)))


def drawn_alike(logprobs, row, step):
    return drawn(logprobs, 0, step)


OPTIONS = {
    most_likely: {"temperature": 0.0},
    drawn: {"temperature": 0.9, "seed": 3},
    drawn_alike: {"temperature": 0.9, "seed": 3, "same_noise": True},
}


RULES = {"all": drawn_alike, "prompt": drawn, "generated": most_likely}


@pytest.mark.parametrize(
    ("name", "positions", "tags"),
    [
        ("steer each row", "prompt", []),
        ("scale scores of heads", "all", []),
        ("all together", "all", ["M1", "Ra1"]),
        ("all together", "generated", ["M1", "Ra1"]),
    ],
)
def test_edited_generation_is_that_of_whole_passes(lm, prompts, name, positions, tags):
    check(lm.splice(tags), prompts, EDITS[name], positions, RULES[positions])


@pytest.mark.slow
@pytest.mark.parametrize("tags", [[], ["M1", "Ra1"]], ids=["plain", "spliced"])
@pytest.mark.parametrize("name", EDITS)
def test_generation_with_any_edit_is_that_of_whole_passes(lm, prompts, name, tags):
    for positions, choose in RULES.items():
        check(lm.splice(tags), prompts, EDITS[name], positions, choose)


def check(lm, prompts, edit, positions, choose):
    ids, logprobs = lm.generate_ids(
        prompts,
        N_TOKS,
        break_on_end=False,
        hooks=edit(lm, lambda mask: mask),
        positions=positions,
        return_logprobs=True,
        **OPTIONS[choose],
    )

    def hooks_at(length):
        return edit(lm, lambda mask: mask_of(mask, positions, length))

    expected, expected_logprobs = uncached(lm, prompts, hooks_at, N_TOKS, choose)
    assert ids.tolist() == expected.tolist()
    assert_close(logprobs, expected_logprobs.astype(np.float32), F32)


def test_the_rules_give_different_texts(lm, prompts):
    hooks = steer(RESID, PER_ROW)
    texts = [lm.generate_ids(prompts, N_TOKS, 0.0, hooks=hooks, positions=p) for p in ("all", "prompt", "generated")]
    assert len({text.tobytes() for text in (*texts, lm.generate_ids(prompts, N_TOKS, 0.0))}) == 4


@pytest.mark.parametrize(
    "edit",
    [
        lambda length, m: steer(RESID, over(PER_POSITION, 0, length), m),
        lambda length, m: patch(PATTERN, over(over(draws(2, SEQ, SEQ), 1, length), 2, length), m),
    ],
    ids=["vectors", "pattern"],
)
def test_arrays_over_positions_edit_the_prompt_only(lm, prompts, edit):
    ids = lm.generate_ids(prompts, N_TOKS, 0.0, break_on_end=False, hooks=edit(SEQ, None), positions="prompt")
    expected, _ = uncached(
        lm, prompts, lambda length: edit(length, mask_of(None, "prompt", length)), N_TOKS, most_likely
    )
    assert ids.tolist() == expected.tolist()


def test_a_dictionary_is_spliced_in_by_an_edit(lm, prompts):
    hooks = splice([lm.dictionaries["Ra1"], lm.dictionaries["M1"]])
    expected = lm.splice(["Ra1", "M1"]).generate_ids(prompts, N_TOKS, 0.0)
    assert lm.generate_ids(prompts, N_TOKS, 0.0, hooks=hooks).tolist() == expected.tolist()
    assert expected.tolist() != lm.generate_ids(prompts, N_TOKS, 0.0).tolist()


def test_a_function_is_traced_anew_in_each_call_with_the_prompts_as_they_are(lm, prompts):
    shapes, factor = [], -1.5

    def edit(value, acts):
        shapes.append(value.shape)
        assert "blocks.1.hook_mlp_in" in acts
        return value * np.float32(factor)

    for factor in (-1.5, 0.25):
        hooks = combine(steer(MLP_OUT, PER_ROW, GIVEN), {MLP_OUT: edit})
        expected = combine(steer(MLP_OUT, PER_ROW, GIVEN), scale(MLP_OUT, factor))
        ids = lm.generate_ids(prompts, N_TOKS, 0.0, hooks=hooks)
        assert ids.tolist() == lm.generate_ids(prompts, N_TOKS, 0.0, hooks=expected).tolist()
    assert set(shapes) == {(BATCH, SEQ, 16), (BATCH, 1, 16)}


def test_rows_with_the_same_noise_differ_by_the_edit_only(lm):
    strengths = np.array([0, 0, 3, 3, -3], np.float32)[:, None, None]

    def rows(strengths, same_noise):
        hooks = steer(RESID, strengths * PER_ROW[0])
        return lm.generate_ids(
            [[3, 1, 4]] * 5, N_TOKS, 1.0, break_on_end=False, seed=5, hooks=hooks, same_noise=same_noise
        )

    out = rows(strengths, True)
    assert out[0].tolist() == out[1].tolist() == rows(0 * strengths, False)[0].tolist()
    assert out[2].tolist() == out[3].tolist()
    assert len({row.tobytes() for row in out}) == 3


@pytest.fixture(scope="module")
def long_lm():
    """A context of 256 and a dictionary, so that several lengths share a program."""
    config = ModelConfig(n_layers=2, d_model=16, n_heads=2, d_mlp=32, n_ctx=256, d_vocab=23)
    model = TinyModel.from_params(config, random_params(param_shapes(config), 0))
    model.attach("M0", make_dictionary("x", "y", 1))
    return model


def test_prompts_vectors_features_and_strengths_reuse_two_programs(long_lm, compilations):
    def run(length, features, strength, **options):
        hooks = combine(
            steer(RESID, strength * draws(2, 1, 16, seed=length), np.arange(length) % 2 == 0),
            clamp(long_lm.dictionaries["M0"], features, strength),
        )
        long_lm.generate_ids(np.full((2, length), 3), hooks=hooks, **options)

    run(3, [1], 1.0, n_toks=9)
    with compilations() as compiled:
        for length in range(4, 8):
            run(length, list(range(length)), length / 2, n_toks=length, positions="all", seed=length, same_noise=True)
    assert compiled.value == 0


def test_steps_pass_through_the_texts_of_shorter_calls(lm, prompts):
    options = {"temperature": 1.0, "hooks": steer(RESID, PER_ROW)}
    steps = [s.tok_ids for s in continue_in_steps(lm.hooked(), prompts, 8, every=3, **options)]
    (whole,) = continue_in_steps(lm.hooked(), prompts, 8, **options)
    assert len(steps) == 4
    for n, ids in zip((1, 4, 7, 8), steps, strict=True):
        is_kept = np.arange(SEQ + n) < np.array(LENGTHS)[:, None] + n
        assert ids.tolist() == np.where(is_kept, whole.tok_ids[:, : SEQ + n], PAD).tolist()


def test_steps_stop_when_every_row_is_finished(lm):
    end = int(lm.generate_ids([[3, 1, 4]], 2, 0.0)[0, -1])
    steps = list(continue_in_steps(lm.hooked(), np.array([[3, 1, 4]]), 9, 0.0, end, every=1))
    assert [bool(s.done[0]) for s in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].tok_ids[0, -1] == end
    assert len(steps) <= 2


@pytest.mark.parametrize(
    ("hooks", "options", "says"),
    [
        (steer(RESID, PER_ROW), {}, "array has shape (3, 1, 16), the value that is edited (1, 2, 16)"),
        (steer(RESID, PER_ROW), {}, "For 3 rows, repeat the prompt: [prompt] * 3."),
        (steer(RESID, draws(2, 16)), {}, "a value for each position of the prompt and none for generated tokens"),
        (patch(PATTERN, draws(1, 2)), {}, "positions='prompt' edits the prompt only"),
        (Add(1.0, np.ones((1, 2, 2), bool)), {}, "positions has shape (1, 2, 2), a mask of heads"),
        (
            steer(RESID, PER_ROW[0], np.ones(3, bool)),
            {},
            "positions has shape (3,), the value that is edited (1, 2, 16)",
        ),
        (steer(RESID, 1.0), {"positions": "new"}, "positions='new' must be 'all', 'prompt' or 'generated'"),
        (steer("blocks.1.hook_mlp", 1.0), {}, "unknown hook points in a 2-layer model: 'blocks.1.hook_mlp'"),
        ({RESID: 3}, {}, f"the hook at '{RESID}' is a int"),
        ({RESID: lambda value, acts: value[0]}, {}, f"the hook at '{RESID}' returned shape (2, 16)"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_an_edit_that_does_not_fit_is_named(lm, hooks, options, says):
    hooks = {Z: hooks} if isinstance(hooks, Add) else hooks
    assert says in error_of(lambda: lm.generate_ids([[1, 2]], 3, hooks=hooks, **options))


def test_edits_that_are_traced_are_refused(lm):
    def run(vector):
        return lm.generate_ids([[1, 2]], 3, hooks=interventions.steer(RESID, vector))

    assert "call it outside of jit" in error_of(lambda: jax.jit(run)(PER_ROW[0]))
