"""The tokenizer: cleaning, ids, padding, decoding and files, on a small BPE; ids of the reference, on GPT-2's.

GPT-2's files are not in the repository: tests that need them look in the folder named by TINYMODEL_TEST_GPT2, or beside
the repository in shared/data/gpt2, and are skipped when neither is there.
"""

import functools
import gzip
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from unidecode import unidecode

from tinymodel_jax.text import tokenizer as tokenization
from tinymodel_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer, clean_text, keep_story

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"
STORIES = SHARED / "tinystories_3k.jsonl.gz"
CASES = {
    case["name"]: case
    for case in json.loads((REPOSITORY / "tests/data/tokenizer_cases.json").read_text("utf-8"))["cases"]
}
SENTENCES = [
    "Once upon a time, there was a little girl named Lily. She didn't like the dark forest.",
    "Tim said, \"I am happy! We're going to the park, and you'll see 12 birds.\"",
    "In the end, they played together.\nThey were friends and lived happily ever after.",
    "!\x1c" * 20,  # no space for GPT-2's split, although one for Python
]

# What our tokenizer does where the reference fails, drops text or answers wrongly. All other cases must be equal.
FILTERED = "the reference drops stories with â € « »; here nothing is dropped"
EMPTY = "the reference fails when no row has a token"
TOO_SHORT = "the reference fails with an IndexError; here a ValueError says what max_length must be"
DECODE = "the reference fails on this kind of argument"
NOT_AN_ID = "the reference fails with an error of its array library, or reads -1 as the last id"
DEVIATIONS: dict[str, tuple[Any, str]] = {
    "str_filter_a_circ": ([[3349, 1937, 6, 461]], FILTERED),
    "str_filter_a_circ_begin": ([[9996, 3349, 1937, 6, 461]], FILTERED),
    "str_filter_euro": ([[337, 4640, 9999, 8604]], FILTERED),
    "str_filter_euro_begin": ([[9996, 337, 4640, 9999, 8604]], FILTERED),
    "str_filter_guill_r": ([[1333, 15, 9999, 4683, 9999]], FILTERED),
    "str_filter_guill_r_begin": ([[9996, 1333, 15, 9999, 4683, 9999]], FILTERED),
    "str_filter_guill_l": ([[9999, 4683]], FILTERED),
    "str_filter_guill_l_begin": ([[9996, 9999, 4683]], FILTERED),
    "batch_filtered_one": (
        [
            [[51, 56, 9997, 9998], [337, 4640, 9999, 8604], [163, 178, 9997, 9998]],
            [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]],
        ],
        FILTERED,
    ),
    "batch_all_filtered": ([[2758, 9999], [9999, 9997]], FILTERED),
    "tok_encode_filtered": ([337, 4640, 9999, 8604], FILTERED),
    "str_emoji_only": ([[]], EMPTY),
    "str_emoji_only_begin": ([[9996]], EMPTY),
    "str_empty": ([[]], EMPTY),
    "str_empty_begin": ([[9996]], EMPTY),
    "list_empty": ([], EMPTY),
    "list_empty_begin": ([], EMPTY),
    "list_of_empty": ([[]], EMPTY),
    "list_two_empty": ([[], []], EMPTY),
    "tok_encode_empty": ([], EMPTY),
    "max_length_1_begin": (ValueError, TOO_SHORT),
    "max_length_0": (ValueError, TOO_SHORT),
    "max_length_0_begin": (ValueError, TOO_SHORT),
    "tok_encode_list": (TypeError, "the reference fails with an AssertionError without a message"),
    "dec_empty_list": ("", DECODE),
    "dec_np1d": ("Once upon", DECODE),
    "dec_npint": ("Once", DECODE),
    "dec_tuple": ("Once upon", DECODE),
    "dec_uint16": ("Once upon", "the reference takes a uint8 array for a mask"),
    "dec_t11": (["Once"], "the reference gives a str for any array of size one; two dimensions give a list here"),
    "dec_t3d": (ValueError, NOT_AN_ID),
    "dec_out_of_range": (ValueError, NOT_AN_ID),
    "dec_negative": (ValueError, NOT_AN_ID),
}

PIECES = [*SPECIAL_TOKENS, "<|endoftext|>", " ", "  ", "\n", "\r", "\t", "\v", "\x1c", "\x00", "'", "'s", "'re", "'LL"]
PIECES += [
    "Lily",
    "a",
    "time",
    "12",
    "3",
    "!",
    '."',
    "_",
    "[",
    "]",
    "é",
    "…",
    "½",
    "北",
    "😀",
    "\u2028",
    "\ud800",
    "x" * 70,
]
tangled_text = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text()


def small_bpe(text_before: str | None = None, **byte_level: Any) -> Any:
    """A byte-level BPE of 320 ids that has every byte, trained on SENTENCES."""
    bpe: Any = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | byte_level)
    bpe.decoder = decoders.ByteLevel()
    if text_before is not None:
        bpe.normalizer = normalizers.Prepend(text_before)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer
    bpe.train_from_iterator(SENTENCES, trainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    return bpe


def five_steps(text: str) -> str:
    """The cleaning steps of the reference, one after the other."""
    text = "".join(unidecode(sign) for sign in text if not "\ud800" <= sign <= "\udfff")
    for pattern, replacement in (("\t", "  "), (r"\s+\n", "\n"), (r"\n\n+", "\n"), (" +", " ")):
        text = re.sub(pattern, replacement, text)
    return text


def library_ids(bpe: tokenizers.Tokenizer, table: list[int], text: str) -> list[int]:
    """Model ids by one library call and a dictionary, without the tokenizer's look-ups."""
    model_ids = {bpe_id: model_id for model_id, bpe_id in enumerate(table)}
    return [model_ids.get(id_, len(table) - 1) for id_ in bpe.encode(five_steps(text)).ids]


@pytest.fixture(scope="session")
def whole() -> Tokenizer:
    """Every BPE id is a model id, so that nothing becomes [UNK]."""
    return Tokenizer(small_bpe())


@pytest.fixture(scope="session")
def partial_table() -> list[int]:
    """Every other id of `small_bpe`, backwards, then the special tokens."""
    return [*range(318, -1, -2), 320, 321, 322, 323]


@pytest.fixture(scope="session")
def partial(partial_table: list[int]) -> Tokenizer:
    """Half of the BPE ids are model ids, so that the other half becomes [UNK]."""
    return Tokenizer(small_bpe(), partial_table)


@pytest.fixture(scope="session")
def oracle() -> tokenizers.Tokenizer:
    """The BPE of `whole` and `partial` as the library runs it."""
    bpe = small_bpe()
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    return bpe


@pytest.fixture(scope="session", params=[{"add_prefix_space": True}, {"use_regex": False}, {"text_before": "_"}])
def other_split(request: pytest.FixtureRequest) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """A tokenizer whose BPE does not divide a text as GPT-2 does, and the same BPE as the library runs it."""
    library = small_bpe(**request.param)
    library.add_special_tokens(list(SPECIAL_TOKENS))
    return Tokenizer(small_bpe(**request.param)), library


@pytest.fixture(scope="session")
def gpt2_folder() -> Path:
    folder = Path(os.environ.get("TINYMODEL_TEST_GPT2", SHARED / "gpt2")).expanduser()
    if not (folder / "vocab.json").is_file():
        pytest.skip(f"GPT-2's vocab.json and merges.txt are not in {folder}; TINYMODEL_TEST_GPT2 names another folder")
    return folder


@pytest.fixture(scope="session")
def gpt2(gpt2_folder: Path) -> Tokenizer:
    return Tokenizer.from_gpt2(gpt2_folder)


@pytest.fixture(scope="session")
def gpt2_library(gpt2_folder: Path) -> tokenizers.Tokenizer:
    """GPT-2 as the library runs it, with its added token and the reference's four."""
    files = gpt2_folder / "vocab.json", gpt2_folder / "merges.txt"
    bpe: Any = tokenizers.Tokenizer(models.BPE.from_file(*map(str, files)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.add_special_tokens(["<|endoftext|>", *SPECIAL_TOKENS])
    return bpe


# Cleaning


@given(tangled_text)
@settings(deadline=None)
def test_cleaning_equals_the_five_steps(text: str) -> None:
    assert clean_text(text) == five_steps(text)


@given(st.text(alphabet=" \t\n\r\v\f\x1c\x1fab\u2029\u00a0", max_size=30))
@settings(deadline=None, max_examples=500)
def test_cleaning_of_whitespace_equals_the_five_steps(text: str) -> None:
    assert clean_text(text) == five_steps(text)


@given(tangled_text)
@settings(deadline=None)
def test_cleaned_text_is_ascii(text: str) -> None:
    assert clean_text(text).isascii()


@pytest.mark.parametrize(
    ("text", "kept"),
    [("pâté", False), ("€5", False), ("«hi", False), ("hi»", False), ("Âge", True), ("pa\u0302te", True), ("", True)],
)
def test_keep_story_refuses_exactly_the_four_signs(text: str, kept: bool) -> None:
    assert keep_story(text) is kept


# Ids


@given(tangled_text)
@example("Wow!\x1c!\x1c")
@settings(deadline=None)
def test_ids_are_those_of_the_library_and_the_table(
    partial: Tokenizer, oracle: tokenizers.Tokenizer, partial_table: list[int], text: str
) -> None:
    assert partial.encode(text, max_length=None) == library_ids(oracle, partial_table, text)


@given(text=tangled_text)
@settings(deadline=None)
def test_a_bpe_that_splits_in_another_way_gives_the_librarys_ids(
    other_split: tuple[Tokenizer, tokenizers.Tokenizer], text: str
) -> None:
    tokenizer, library = other_split
    assert tokenizer.encode(text, max_length=None) == library_ids(library, list(range(tokenizer.vocab_size)), text)


@given(tangled_text)
@settings(deadline=None)
def test_decoding_gives_the_cleaned_text_back(whole: Tokenizer, text: str) -> None:
    assert whole.decode(whole.encode(text, max_length=None)) == clean_text(text)


def test_special_tokens_are_the_last_four_ids_in_order(whole: Tokenizer) -> None:
    ids = [whole.begin_id, whole.end_id, whole.pad_id, whole.unk_id]
    assert ids == list(range(whole.vocab_size - 4, whole.vocab_size))
    assert [whole.decode(id_) for id_ in ids] == list(SPECIAL_TOKENS)
    assert whole.encode("".join(SPECIAL_TOKENS)) == ids


def test_special_tokens_that_a_bpe_has_first_become_the_last_ids() -> None:
    bpe = small_bpe()
    first: Any = trainers.BpeTrainer
    trainer = first(special_tokens=list(SPECIAL_TOKENS), vocab_size=300, show_progress=False)
    bpe.train_from_iterator(SENTENCES, trainer)
    assert bpe.token_to_id("[BEGIN]") == 0
    tokenizer = Tokenizer(bpe)
    assert tokenizer.encode("Lily[END]")[-1] == tokenizer.end_id == tokenizer.vocab_size - 3
    assert tokenizer.decode(tokenizer("Lily")[0]) == ["[BEGIN]Lily"]


def test_ids_do_not_change_when_the_look_ups_are_full(monkeypatch: pytest.MonkeyPatch, whole: Tokenizer) -> None:
    monkeypatch.setattr(tokenization, "_MAX_CACHED_PIECES", 3)
    forgetful = Tokenizer(small_bpe())
    assert [forgetful.encode(text) for text in SENTENCES] == [whole.encode(text) for text in SENTENCES]
    assert len(forgetful._piece_ids) <= 3


def test_a_text_of_one_long_word_is_not_remembered() -> None:
    tokenizer = Tokenizer(small_bpe())
    assert tokenizer.decode(tokenizer.encode("x" * 1000, max_length=None)) == "x" * 1000
    assert len(tokenizer._piece_ids) == 0


def test_padding_and_truncation_of_the_bpe_are_switched_off(whole: Tokenizer) -> None:
    bpe = small_bpe()
    bpe.enable_padding(length=50)
    bpe.enable_truncation(2)
    assert Tokenizer(bpe).encode(SENTENCES[0]) == whole.encode(SENTENCES[0])


# Batches


@given(st.lists(tangled_text, max_size=5), st.booleans(), st.booleans(), st.none() | st.integers(2, 12))
@settings(deadline=None)
def test_a_row_is_its_story_alone_then_end_then_pad(
    partial: Tokenizer, texts: list[str], add_begin: bool, add_end: bool, max_length: int | None
) -> None:
    tok_ids, attn_mask = partial(texts, add_begin=add_begin, add_end=add_end, max_length=max_length)
    begin, end = [partial.begin_id] * add_begin, [partial.end_id] * add_end
    alone = [(begin + partial.encode(text, max_length=None) + end)[:max_length] for text in texts]
    width = max((len(row) for row in alone), default=0)
    for row, mask, story in zip(tok_ids.tolist(), attn_mask.tolist(), alone, strict=True):
        padding = [partial.pad_id] * (width - len(story))
        if padding and not add_end and len(story) > len(begin):
            padding[0] = partial.end_id
        assert row == story + padding
        assert mask == [1] * len(story) + [0] * len(padding)
    assert tok_ids.shape == attn_mask.shape == (len(texts), width)
    assert tok_ids.dtype == attn_mask.dtype == np.int32


def test_add_end_does_not_depend_on_the_batch_and_is_cut_with_the_story(whole: Tokenizer) -> None:
    short, long = "Lily", SENTENCES[0]
    n_short = len(whole.encode(short)) + 2
    for texts in ([short], [short, long], [long, short]):
        tok_ids, attn_mask = whole(texts, add_end=True, max_length=n_short)
        assert tok_ids[texts.index(short), -1] == whole.end_id
        assert attn_mask.all()
    assert whole.end_id not in whole(long, add_end=True, max_length=n_short)[0]
    assert whole.end_id not in whole(short, add_end=True, max_length=n_short - 1)[0]


def test_padding_to_max_length_gives_that_width_and_an_end(whole: Tokenizer) -> None:
    tok_ids, attn_mask = whole("Lily", max_length=20, padding="max_length")
    n = int(attn_mask.sum())
    assert tok_ids.shape == (1, 20)
    assert tok_ids[0, n:].tolist() == [whole.end_id] + [whole.pad_id] * (19 - n)
    assert whole([], max_length=20, padding="max_length")[0].shape == (0, 20)


def test_no_padding_takes_equal_rows_and_refuses_unequal_ones(whole: Tokenizer) -> None:
    np.testing.assert_array_equal(whole(["Lily", "Lily"], padding=False)[0], whole(["Lily", "Lily"])[0])
    n = len(whole.encode("Lily")) + 1
    with pytest.raises(ValueError, match=rf"padding=False needs rows of equal length, got 1 to {n} tokens"):
        whole(["Lily", ""], padding=False)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, r"a str or a list of str, got NoneType\."),
        (5, r"a str or a list of str, got int\."),
        (b"Lily", r"got bytes\."),
        ((text for text in SENTENCES), r"got generator\."),
        (["a", None, "b", 3], r"got a list with NoneType at 1, int at 3\."),
        (("a", ["b"]), r"got a tuple with list at 1\."),
        ([1, 2, 3, 4, 5], r"int at 0, int at 1, int at 2 and 2 more\."),
    ],
)
def test_what_is_not_text_is_named_with_its_position(whole: Tokenizer, texts: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message) as error:
        without_type_checks(whole.__call__)(texts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0, "add_begin": False}, r"max_length must be at least 1 or None, got 0"),
        ({"max_length": 1}, r"max_length must be at least 2 \(one token after \[BEGIN\]\) or None, got 1"),
        ({"max_length": None, "padding": "max_length"}, r"padding='max_length' needs a max_length"),
        ({"max_length": -1, "padding": "left"}, r"max_length .* got -1; padding must be .* got 'left'\."),
    ],
)
def test_an_impossible_layout_is_refused(whole: Tokenizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        without_type_checks(whole.__call__)("Lily", **options)


def test_encode_refuses_a_list_and_an_empty_max_length(whole: Tokenizer) -> None:
    with pytest.raises(TypeError, match="encode takes one str, got list"):
        without_type_checks(whole.encode)(["a"])
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        whole.encode("a", max_length=0)


# Decoding


@pytest.mark.parametrize(
    "ids",
    [
        65,
        np.int64(65),
        np.array(65),
        [65],
        (65,),
        np.array([65], np.uint8),
        jnp.array(65),
        jnp.array([65]),
        [jnp.array(65)],
    ],
    ids=lambda ids: f"{type(ids).__module__}.{type(ids).__name__}",
)
def test_an_id_or_a_row_decodes_to_a_str(whole: Tokenizer, ids: Any) -> None:
    assert whole.decode(ids) == whole._bpe.id_to_token(65)


@pytest.mark.parametrize(
    "ids",
    [
        [[65], [65, 66]],
        ([65], (65, 66)),
        [np.array([65]), np.array([65, 66], np.uint16)],
        [jnp.array([65]), jnp.array([65, 66])],
    ],
)
def test_rows_of_unequal_length_decode_to_a_list(whole: Tokenizer, ids: Any) -> None:
    assert whole.decode(ids) == [whole.decode(65), whole.decode([65, 66])]


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray, list])
def test_a_2d_array_always_decodes_to_a_list(whole: Tokenizer, as_array: Any) -> None:
    assert whole.decode(as_array([[65]])) == [whole.decode(65)]
    assert whole.decode(as_array([[65, 66], [67, 68]])) == [whole.decode([65, 66]), whole.decode([67, 68])]


def test_no_ids_decode_to_no_text(whole: Tokenizer) -> None:
    assert whole.decode([]) == ""
    assert whole.decode(np.zeros(0, np.int32)) == ""
    assert whole.decode([[], [65]]) == ["", whole.decode(65)]
    assert whole.decode(np.zeros((2, 0), np.int32)) == ["", ""]
    assert whole.decode(np.zeros((0, 5), np.int32)) == []


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3, -1], r"token id -1 is not in the vocabulary: ids go from 0 to 323\."),
        ([[3], [324]], r"token id 324 is not"),
        (np.array([[3, 500]]), r"token id 500 is not"),
        ([3, 2**70], r"must be integers, got 3 \(object\)"),
        (1.5, r"token ids must be integers, got 1\.5 \(float64\)"),
        (np.array([7.0], np.float32), r"must be integers, got 7\.0 \(float32\)"),
        (jnp.array([[0.5]]), r"must be integers, got 0\.5"),
        ([True], r"must be integers, got True \(bool\)"),
        ("Lily", r"must be integers, got 'Lily'"),
        (np.zeros((1, 1, 2), int), r"one row is \[\[0, 0\]\]\."),
        ([[[1, 2]]], r"decode takes an id, a row of ids or rows of ids; one row is \[\[1, 2\]\]\."),
        ([[1, 2], 3], r"one row is 3\."),
    ],
)
def test_what_is_not_an_id_is_named(whole: Tokenizer, ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        without_type_checks(whole.decode)(ids)
    assert "\n" not in str(error.value)


@given(st.lists(st.integers(0, 323), max_size=20))
@settings(deadline=None)
def test_any_ids_of_the_vocabulary_decode(whole: Tokenizer, ids: list[int]) -> None:
    assert whole.decode([ids, ids[:1]]) == [whole.decode(ids), whole.decode(ids[:1])]


def test_a_trained_tokenizer_merges_frequent_words_and_reads_any_ascii_text() -> None:
    texts = ["the cat  sat on the mat", "The caf\u00e9 sat"] * 9
    trained = Tokenizer.train(iter(texts), vocab_size=120)
    assert trained.vocab_size <= 120
    assert trained.tok_see("the cat") == ["the", "⋅cat"]
    assert trained.tok_see("cafe")[-1] == "e", "texts are cleaned before the training, as before encoding"
    printable = "".join(map(chr, range(33, 127)))
    assert trained.decode(trained.encode(printable)) == printable
    assert Tokenizer.train(texts, vocab_size=120).fingerprint == trained.fingerprint


def test_training_a_tokenizer_refuses_one_text_and_too_few_ids() -> None:
    with pytest.raises(TypeError, match="got one str"):
        Tokenizer.train("the cat", vocab_size=200)
    with pytest.raises(ValueError, match=r"vocab_size=50 is too small: .* need 100 ids"):
        Tokenizer.train(["the cat"], vocab_size=50)


def test_tok_see_shows_each_token_by_itself(whole: Tokenizer) -> None:
    text = "Once upon\n a time"
    strings = whole.tok_see(text, symbolic_spaces=False, symbolic_newlines=False)
    assert "".join(strings) == text
    assert whole.tok_see(text) == [string.replace(" ", "⋅").replace("\n", "↵") for string in strings]
    assert whole.tok_see(whole.encode(text)) == whole.tok_see(text)
    assert whole.tok_see(np.array(whole.begin_id)) == ["[BEGIN]"]
    assert whole.tok_see([]) == []


# Files


def test_a_saved_tokenizer_gives_the_same_ids(tmp_path: Path, partial: Tokenizer) -> None:
    partial.save_pretrained(tmp_path / "new" / "folder")
    loaded = Tokenizer.from_pretrained(tmp_path / "new" / "folder")
    np.testing.assert_array_equal(loaded(SENTENCES)[0], partial(SENTENCES)[0])
    assert loaded.vocab_size == partial.vocab_size
    assert loaded.decode(loaded(SENTENCES)[0]) == partial.decode(partial(SENTENCES)[0])
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "token_table.json",
        "tokenizer.json",
    ]


def test_the_tokenizers_library_reads_what_is_saved(tmp_path: Path, whole: Tokenizer) -> None:
    whole.save_pretrained(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(SENTENCES[0] + "[END]").ids == whole.encode(SENTENCES[0] + "[END]")


def test_a_failed_save_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Tokenizer, partial: Tokenizer
) -> None:
    whole.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        partial.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_pickled_tokenizer_gives_the_same_ids(partial: Tokenizer) -> None:
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(partial))(SENTENCES)[0], partial(SENTENCES)[0])


def test_from_pretrained_names_what_is_missing(tmp_path: Path, whole: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json and token_table\.json not found.*from_gpt2\.$"):
        Tokenizer.from_pretrained(tmp_path)
    whole.save_pretrained(tmp_path)
    (tmp_path / "token_table.json").unlink()
    with pytest.raises(FileNotFoundError, match=r": token_table\.json not found"):
        Tokenizer.from_pretrained(tmp_path)


def test_from_pretrained_refuses_a_table_of_another_bpe(tmp_path: Path, whole: Tokenizer) -> None:
    whole.save_pretrained(tmp_path)
    other: Any = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"do not belong together: 323 of 324 tokens .* the first is '!'"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("tokenizer.json", "{", "EOF"),
        ("token_table.json", "{", "Expecting"),
        ("token_table.json", "{}", "'tokens'"),
        ("token_table.json", '{"tokens": [1]}', "'tokens' is not a list of str"),
    ],
)
def test_from_pretrained_names_a_broken_file(
    tmp_path: Path, whole: Tokenizer, name: str, text: str, reason: str
) -> None:
    whole.save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"cannot read a tokenizer from .*{re.escape(name)}'.*{reason}") as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0, 1, 9999, 320, 321, 322, 323], r"1 of 7 ids are not in the BPE vocabulary, the first is 9999"),
        ([0, 0, 320, 321, 322, 323], r"1 ids are repeated"),
        ([0, 1, 2, 3], r"it ends in \('!', .*not in the special tokens \('\[BEGIN\]'"),
        ([-1, -1], r"2 of 2 ids are not .*; 1 ids are repeated; it ends in \(None, None\)"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer(small_bpe(), table)


def test_from_gpt2_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"\(which does not exist\): looked for tokenizer\.json, then for vocab"
    ):
        Tokenizer.from_gpt2(tmp_path / "nothing")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"of which merges\.txt is missing\. Give a folder") as error:
        Tokenizer.from_gpt2(tmp_path)
    assert "\n" not in str(error.value)


def test_from_gpt2_refuses_another_vocabulary(tmp_path: Path) -> None:
    small_bpe().model.save(str(tmp_path))
    with pytest.raises(ValueError, match=r"not GPT-2's vocabulary: it has 320 entries, not 50257; '") as error:
        Tokenizer.from_gpt2(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "merges.txt").write_text("no such merge\n")
    with pytest.raises(ValueError, match="cannot read a tokenizer from"):
        Tokenizer.from_gpt2(tmp_path)


def test_from_gpt2_refuses_a_vocabulary_of_the_same_size_in_another_order(tmp_path: Path) -> None:
    tokens = [".", "Ġthe", "<|endoftext|>", *(f"token{i}" for i in range(50254))]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(
        ValueError, match=r"GPT-2's vocabulary: '\.' has id 0, not 13; 'Ġthe' has id 1, not 262; '<\|end"
    ):
        Tokenizer.from_gpt2(tmp_path)


def test_importing_loads_no_jax_and_opens_no_connection() -> None:
    program = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise OSError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import tinymodel_jax.text.tokenizer\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)


# The reference


def test_the_list_of_cases_is_complete_and_every_deviation_is_one() -> None:
    assert len(CASES) == 208
    assert DEVIATIONS.keys() <= CASES.keys()
    for name, (ours, _) in DEVIATIONS.items():
        same_error = isinstance(ours, type) and CASES[name].get("error") == ours.__name__
        same_value = "output" in CASES[name] and reference_answer(CASES[name]) == ours
        assert not same_error, name
        assert not same_value, name


@pytest.mark.parametrize("name", CASES)
def test_ids_and_texts_equal_the_reference(gpt2: Tokenizer, name: str) -> None:
    case = CASES[name]
    expected = DEVIATIONS[name][0] if name in DEVIATIONS else reference_answer(case)
    if isinstance(expected, type):
        with pytest.raises(expected) as error:
            our_answer(gpt2, case)
        assert "\n" not in str(error.value)
    else:
        assert our_answer(gpt2, case) == expected


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "decoded" in case and name not in DEVIATIONS])
def test_decoded_ids_equal_the_reference(gpt2: Tokenizer, name: str) -> None:
    ids = reference_answer(CASES[name])
    if is_pair(CASES[name]):
        ids = ids[0]
    decoded = CASES[name]["decoded"]
    # A str is treated as an array of size one: the deviation `dec_t11`.
    assert gpt2.decode(np.array(ids)) == ([decoded] if isinstance(decoded, str) else decoded)


def test_a_published_row_is_reproduced(gpt2: Tokenizer) -> None:
    # The first row of noanabeshima/TinyModelTokIds.
    row = [9996, 51, 56, 4, 36, 1, 38, 6, 4, 1683, 2296]
    assert gpt2("Once upon a time, there was a reliable otter")[0][0, : len(row)].tolist() == row


@given(tangled_text)
@settings(deadline=None)
def test_gpt2_ids_are_those_of_the_library_and_the_table(
    gpt2: Tokenizer, gpt2_library: tokenizers.Tokenizer, text: str
) -> None:
    assert gpt2.encode(text, max_length=None) == library_ids(gpt2_library, gpt2._table.tolist(), text)


@pytest.mark.slow
def test_stories_get_the_ids_of_the_library_and_the_table(gpt2: Tokenizer, gpt2_library: tokenizers.Tokenizer) -> None:
    if not STORIES.is_file():
        pytest.skip(f"no stories at {STORIES}")
    with gzip.open(STORIES, "rt", encoding="utf-8") as lines:
        stories = [json.loads(line)["text"] for line in lines]
    table = gpt2._table.tolist()
    assert [gpt2.encode(story) for story in stories] == [
        library_ids(gpt2_library, table, story)[:256] for story in stories
    ]


def test_every_form_of_gpt2s_files_gives_the_same_ids(tmp_path: Path, gpt2: Tokenizer, gpt2_folder: Path) -> None:
    bpe: Any = tokenizers.Tokenizer(
        models.BPE.from_file(str(gpt2_folder / "vocab.json"), str(gpt2_folder / "merges.txt"))
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # to be switched off
    bpe.save(str(tmp_path / "tokenizer.json"))
    gpt2.save_pretrained(tmp_path / "saved")
    loaded = [Tokenizer.from_gpt2(tmp_path), Tokenizer.from_gpt2(tmp_path / "tokenizer.json")]
    loaded += [Tokenizer.from_gpt2(str(gpt2_folder / "vocab.json")), Tokenizer.from_pretrained(tmp_path / "saved")]
    text = "Once upon<|endoftext|> a time, [END] photosynthesis"
    assert [tokenizer.encode(text) for tokenizer in loaded] == [gpt2.encode(text)] * 4


def test_from_gpt2_refuses_a_gpt2_with_more_tokens(tmp_path: Path, gpt2_folder: Path) -> None:
    vocab = json.loads((gpt2_folder / "vocab.json").read_text("utf-8"))
    (tmp_path / "merges.txt").write_bytes((gpt2_folder / "merges.txt").read_bytes())
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"one more": 50257}), "utf-8")
    with pytest.raises(ValueError, match="it has 50258 entries, not 50257"):
        Tokenizer.from_gpt2(tmp_path)


def our_answer(tokenizer: Tokenizer, case: dict[str, Any]) -> Any:
    """Our result for a case, as plain lists."""
    given, options = case["input"], dict(case["kwargs"])
    wants_mask = options.pop("return_attn_mask", False) or case["fn"] == "tokenizer.__call__"
    match case["fn"]:
        case "enc" | "tokenizer.__call__":
            options = {"add_begin": case["fn"] != "enc"} | options
            texts = tuple(given) if case["name"] == "tuple_input" else given
            tok_ids, attn_mask = without_type_checks(tokenizer.__call__)(texts, **options)
            return [tok_ids.tolist(), attn_mask.tolist()] if wants_mask else tok_ids.tolist()
        case "tokenizer.encode":
            return without_type_checks(tokenizer.encode)(given)
        case "dec" | "tokenizer.decode":
            return tokenizer.decode(AS_ARGUMENT[case.get("arg_type", "list")](given))
        case "dec(enc)":
            return tokenizer.decode(tokenizer(given, add_begin=False)[0])
        case "tok_see":
            return tokenizer.tok_see(given, **options)
        case "clean_text":
            return clean_text(given)
    raise AssertionError(f"no such function: {case['fn']}")


AS_ARGUMENT: dict[str, Any] = {
    "list": lambda ids: ids,
    "int": int,
    "tuple": tuple,
    "numpy scalar": np.int64,
    "numpy 1-D": np.array,
    "numpy size 1": np.array,
    "torch 0-D": np.array,
    "torch 1-D": np.array,
    "torch 2-D": np.array,
    "torch 3-D": np.array,
    "torch (1,1)": np.array,
    "torch int32": lambda ids: np.array(ids, np.int32),
    "torch uint8": lambda ids: np.array(ids, np.uint8),
}


def reference_answer(case: dict[str, Any]) -> Any:
    """The reference's result for a case, as plain lists, or the type of its error."""
    if "error" in case:
        return {"TypeError": TypeError, "ValueError": ValueError}[case["error"]]
    output = case["output"]
    if is_pair(case):
        return [part["tensor"] for part in output]
    return output["tensor"] if isinstance(output, dict) else output


def is_pair(case: dict[str, Any]) -> bool:
    """Whether the reference gave ids and mask."""
    return isinstance(case["output"], list) and isinstance(case["output"][0], dict)


def without_type_checks(method: Any) -> Any:
    """A method without the run-time type checks of the test session, to see its own errors."""
    return functools.partial(inspect.unwrap(method.__func__), method.__self__)
