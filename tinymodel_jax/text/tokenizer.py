"""Text to and from TinyModel's token ids: a byte-level BPE followed by a table of the ids that the model knows.

The ids equal those of the reference package on everything that it can encode; docs/coming-from/the-original.md lists
the inputs on which it fails or drops text. A batch gives the same tokens as its stories one by one. Calls need no
network, and importing this file loads neither JAX nor a vocabulary. Nothing here downloads files or filters stories;
`keep_story` says which stories the reference drops.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeGuard, overload

import numpy as np
import numpy.typing as npt
import tokenizers
from jaxtyping import Int32
from tokenizers import pre_tokenizers

from tinymodel_jax.runtime.paths import user_path
from tinymodel_jax.text.tokenizer_files import SPECIAL_TOKENS, read_gpt2, read_saved, saved_form, write_saved
from tinymodel_jax.text.tokenizer_training import SMALLEST_VOCABULARY, train_bpe
from tinymodel_jax.text.transliteration import to_ascii

TokenIds = int | Sequence[Any] | npt.ArrayLike
"""One id, a row of ids, or rows of ids: int, nested list or tuple, NumPy or JAX array."""

# A piece costs about 200 bytes: 13 MB at most. 3,117 TinyStories have 6,447 different ones.
_MAX_CACHED_PIECES = 1 << 16
_MAX_CACHED_CHARACTERS = 64

_ID_BYTES = np.dtype(np.int32).itemsize
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_SPACES = re.compile(" {2,}")
# GPT-2's split into pieces, for ASCII text, where \p{L} is A-Za-z and \p{N} is 0-9.
_GPT2_PIECES = re.compile(
    r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII
).findall


class Tokenizer:
    """Converts text to model ids and back: a `tokenizers.Tokenizer` and a table of the BPE ids that the model uses.

    Model id `i` is BPE id `table[i]`; BPE ids outside the table become `[UNK]`. The last four model ids are
    `[BEGIN] [END] [PAD] [UNK]`. These literals in a text become the special ids, as in the reference.

    Examples:
        >>> from tinymodel_jax.bundled import storyworld
        >>> tokenizer = storyworld.tokenizer()
        >>> ids, mask = tokenizer(["The dog ran.", "The dog"])
        >>> ids.shape == mask.shape
        True
        >>> tokenizer.decode(tokenizer.encode("The dog ran."))
        'The dog ran.'
    """

    vocab_size: int
    """Number of model ids, the special ones included."""
    begin_id: int
    """Id of `[BEGIN]`."""
    end_id: int
    """Id of `[END]`."""
    pad_id: int
    """Id of `[PAD]`."""
    unk_id: int
    """Id of `[UNK]`."""

    def __init__(self, bpe: tokenizers.Tokenizer, table: Sequence[int] | npt.NDArray[np.integer] | None = None):
        """Build a tokenizer from a BPE and a table.

        Args:
            bpe: used directly, not copied: its padding and truncation are switched off, and special tokens that it
                lacks are added. It receives cleaned text, which is ASCII.
            table: (vocab_size,) BPE ids, special tokens last; None is all ids of `bpe` in order, with the special
                tokens moved to the end.

        Raises:
            ValueError: the table repeats an id, contains one that `bpe` lacks, or does not end in the special tokens.
        """
        bpe.no_padding()
        bpe.no_truncation()
        bpe.add_special_tokens(list(SPECIAL_TOKENS))
        token_of = {id_: token for token, id_ in bpe.get_vocab().items()}
        if table is None:
            table = [i for i in sorted(token_of) if token_of[i] not in SPECIAL_TOKENS]
            table += [bpe.get_vocab()[token] for token in SPECIAL_TOKENS]
        self._table = np.asarray(table, dtype=np.int64)
        _check_table(self._table, token_of)

        self._bpe = bpe
        self.vocab_size = len(self._table)
        self.begin_id, self.end_id, self.pad_id, self.unk_id = range(self.vocab_size - 4, self.vocab_size)

        model_ids = np.full(max(token_of) + 1, self.unk_id, dtype=np.int32)
        model_ids[self._table] = np.arange(self.vocab_size)
        self._piece_ids = _PieceIds(bpe, model_ids)
        # `bpe` searches for these before it splits, so a text that contains one is passed to `bpe` as a whole.
        self._added_tokens = [token.content for token in bpe.get_added_tokens_decoder().values()]
        self._splits_as_gpt2 = _splits_as_gpt2(bpe)

    @classmethod
    def from_gpt2(cls, dir_or_file: str | os.PathLike[str]) -> "Tokenizer":
        """Build TinyModel's 10,000-id tokenizer from GPT-2's vocabulary.

        Args:
            dir_or_file: a `tokenizer.json`, or a folder with one, or a folder with `vocab.json` and `merges.txt`.

        Raises:
            FileNotFoundError: the files do not exist.
            ValueError: a file cannot be read, or is not GPT-2's vocabulary.

        Source: ids are ranks by frequency in TinyStoriesV2 (noanabeshima/tiny_model); BPE of openai-community/gpt2.

        Examples:
            >>> from tinymodel_jax import Tokenizer
            >>> Tokenizer.from_gpt2("gpt2")  # a folder with GPT-2's tokenizer.json  # doctest: +SKIP
            Tokenizer(vocab_size=10000)
        """
        return cls(*read_gpt2(user_path(dir_or_file)))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE on texts, which are cleaned first.

        Printable ASCII characters, space and newline always have an id. With the same version of `tokenizers`, the same
        texts give the same tokenizer.

        Args:
            texts: stories, read once.
            vocab_size: largest number of model ids, the four special ones included; few texts give fewer.

        Raises:
            TypeError: `texts` is one str.
            ValueError: `vocab_size` has no room for the single characters and the special tokens.

        Examples:
            >>> from tinymodel_jax import Tokenizer
            >>> tokenizer = Tokenizer.train(["the cat sat on the mat"] * 9, vocab_size=110)
            >>> tokenizer.tok_see("the cat")
            ['the', '⋅cat']
        """
        if isinstance(texts, str):
            raise TypeError("Tokenizer.train takes several texts, such as the lines of a file, got one str.")
        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size={vocab_size} is too small: single characters and special tokens need "
                f"{SMALLEST_VOCABULARY} ids."
            )
        return cls(train_bpe(map(clean_text, texts), vocab_size))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> "Tokenizer":
        """Load a tokenizer that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: the folder, its `tokenizer.json` or its `token_table.json` is missing.
            ValueError: a file cannot be read, or the two do not belong together.

        Examples:
            >>> from tinymodel_jax import TinyModel, Tokenizer
            >>> TinyModel("mini").tokenizer.save_pretrained("tokenizer")
            >>> Tokenizer.from_pretrained("tokenizer")
            Tokenizer(vocab_size=1024)
        """
        return cls(*read_saved(user_path(directory)))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json`, which the `tokenizers` library reads, and `token_table.json`.

        The folder is created if it does not exist. Each file is replaced only when the new one is complete.

        Examples:
            >>> import os
            >>> from tinymodel_jax import TinyModel
            >>> TinyModel("mini").tokenizer.save_pretrained("tokenizer")
            >>> sorted(os.listdir("tokenizer"))
            ['token_table.json', 'tokenizer.json']
        """
        write_saved(user_path(directory), self._bpe, self._table.tolist())

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the files that `save_pretrained` writes."""
        return hashlib.sha256("\0".join(saved_form(self._bpe, self._table.tolist()).values()).encode()).hexdigest()

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        add_begin: bool = True,
        add_end: bool = False,
        max_length: int | None = 256,
        padding: Literal["longest", "max_length", False] = "longest",
    ) -> tuple[Int32[np.ndarray, "batch seq"], Int32[np.ndarray, "batch seq"]]:
        """Clean and encode stories.

        Args:
            texts: one story (a batch of one), or a list or tuple of stories. An empty list gives arrays without rows.
            add_begin: put `[BEGIN]` before every story.
            add_end: put `[END]` after every story, before it is cut to `max_length`. A story that is cut has no
                `[END]`, so that the model does not learn to stop there. If False, the first `[PAD]` of each padded row
                becomes `[END]`, except after an empty story. This is the reference's rule: whether a story has an
                `[END]` depends on its batch.
            max_length: maximum number of tokens per row, including special ones; None for no limit.
            padding: `"longest"` pads on the right to the longest row, `"max_length"` to `max_length`. False does not
                pad, in which case all rows must have the same length.

        Returns:
            `(tok_ids, attn_mask)`. The mask is 1 at `[BEGIN]`, at the story and at the `[END]` of `add_end=True`. It is
            0 at `[PAD]` and, as in the reference, at an `[END]` that replaced a `[PAD]`.

        Raises:
            TypeError: a text is not a str.
            ValueError: `max_length` leaves no room for a token, or rows of different lengths are not to be padded.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> tok_ids, attn_mask = TinyModel("mini").tokenizer(["The dog ran.", "The dog"])
            >>> tok_ids.shape, attn_mask.tolist()
            ((2, 5), [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        """
        stories = _as_stories(texts)
        _check_layout(max_length, padding, add_begin)
        begin = np.int32(self.begin_id).tobytes() if add_begin else b""
        end = np.int32(self.end_id).tobytes() if add_end else b""
        cut = None if max_length is None else max_length * _ID_BYTES
        rows = [(begin + self._encode(story) + end)[:cut] for story in stories]

        lengths = np.array([len(row) // _ID_BYTES for row in rows], dtype=np.int64)
        if padding is False and len(set(lengths.tolist())) > 1:
            raise ValueError(
                f"padding=False needs rows of equal length, got {lengths.min()} to {lengths.max()} tokens; "
                f"use padding='longest' or 'max_length'."
            )
        # `or 0` only for the type checker: `_check_layout` has refused a missing max_length.
        width = (max_length or 0) if padding == "max_length" else int(lengths.max(initial=0))
        is_token = np.arange(width) < lengths[:, None]
        tok_ids = np.full(is_token.shape, self.pad_id, dtype=np.int32)
        tok_ids[is_token] = np.frombuffer(b"".join(rows), dtype=np.int32)
        if not add_end:
            gets_end = np.flatnonzero((lengths < width) & (lengths > add_begin))
            tok_ids[gets_end, lengths[gets_end]] = self.end_id
        return tok_ids, is_token.astype(np.int32)

    def encode(self, text: str, *, max_length: int | None = 256) -> list[int]:
        """Clean and encode one story without `[BEGIN]`, cut to `max_length` tokens (None for no limit).

        Raises:
            TypeError: the text is not a str.
            ValueError: `max_length` is below 1.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> tokenizer = TinyModel("mini").tokenizer
            >>> tokenizer.decode(tokenizer.encode("The dog ran.", max_length=2))
            'The dog'
        """
        if not isinstance(text, str):
            raise TypeError(f"encode takes one str, got {type(text).__name__}; for a list call the tokenizer itself.")
        _check_layout(max_length, "longest", add_begin=False)
        return np.frombuffer(self._encode(text), dtype=np.int32)[:max_length].tolist()

    @overload
    def decode(self, ids: int | list[int]) -> str: ...
    @overload
    def decode(self, ids: TokenIds) -> str | list[str]: ...
    def decode(self, ids: TokenIds) -> str | list[str]:
        """Convert ids to text, including special tokens.

        Args:
            ids: an id or a row of ids (int, list, tuple, NumPy or JAX array), which gives a str; or rows of ids (nested
                lists, possibly of different lengths, or a 2-D array), which give a list of str.

        Raises:
            ValueError: an id is not an integer or not in the vocabulary, or there are more than two dimensions.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> tokenizer = TinyModel("mini").tokenizer
            >>> tokenizer.decode([tokenizer.begin_id, *tokenizer.encode("The dog")])
            '[BEGIN]The dog'
        """
        nested = _is_nested(ids)
        rows = [np.asarray(row) for row in ids] if nested else list(np.atleast_2d(np.asarray(ids)))
        for row in rows:
            if row.ndim != 1:
                raise ValueError(f"decode takes an id, a row of ids or rows of ids; one row is {row.tolist()!r}.")
        texts = [self._bpe.decode(self._to_bpe(row).tolist(), skip_special_tokens=False) for row in rows]
        return texts if nested or np.ndim(ids) > 1 else texts[0]

    def tok_see(
        self, text_or_ids: str | TokenIds, *, symbolic_spaces: bool = True, symbolic_newlines: bool = True
    ) -> list[str]:
        """Return the text of each token for display, by default with `⋅` for a space and `↵` for a newline.

        A text is encoded without `[BEGIN]` and is not cut; ids are one id or one row. Errors are those of `encode` and
        `decode`.

        Args:
            text_or_ids: a text, an id or a row of ids.
            symbolic_spaces: show a space as `⋅`.
            symbolic_newlines: show a newline as `↵`.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> TinyModel("mini").tokenizer.tok_see("The dog ran.\\nIt ran.")
            ['The', '⋅dog', '⋅ran', '.', '↵', 'It', '⋅ran', '.']
        """
        ids = self.encode(text_or_ids, max_length=None) if isinstance(text_or_ids, str) else text_or_ids
        strings = self.decode(np.atleast_1d(np.asarray(ids))[:, None])
        swaps = {" ": "⋅"} if symbolic_spaces else {}
        swaps |= {"\n": "↵"} if symbolic_newlines else {}
        return [string.translate(str.maketrans(swaps)) for string in strings]

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size})"

    def _encode(self, text: str) -> bytes:
        """Return the model ids of a text, without `[BEGIN]` and `[END]`, as the bytes of an int32 array."""
        text = clean_text(text)
        if self._splits_as_gpt2 and not any(token in text for token in self._added_tokens):
            return b"".join(map(self._piece_ids.__getitem__, _GPT2_PIECES(text)))
        return self._piece_ids[text]

    def _to_bpe(self, ids: np.ndarray) -> np.ndarray:
        """Return the BPE ids of a row of model ids, or raise a ValueError that names the first invalid one."""
        if ids.size == 0:
            return ids.astype(np.int64)  # NumPy makes an empty list a float array
        if ids.dtype.kind not in "iu":
            raise ValueError(f"token ids must be integers, got {ids.tolist()[0]!r} ({ids.dtype}).")
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise ValueError(f"token id {outside[0]} is not in the vocabulary: ids go from 0 to {self.vocab_size - 1}.")
        return self._table[ids]


def clean_text(text: str) -> str:
    r"""Clean a text as the model's training data was cleaned, with the same result as the reference.

    Transliterate to ASCII (`to_ascii`); replace a tab by two spaces; remove whitespace before a newline, including
    blank lines and carriage returns; replace a run of spaces by one. Nothing else is stripped.

    Source: noanabeshima/tiny_model, whose steps after the tab are `\s+\n` -> `\n`, `\n\n+` -> `\n`, ` +` -> ` `. The
    second of these never matches after the first. Without regular expressions it is eight to ten times as fast.
    """
    if not text.isascii():
        text = _NOT_ASCII.sub(lambda found: to_ascii(found.group()), text)
    text = text.replace("\t", "  ")
    if "\n" in text:
        first, *lines, last = text.split("\n")
        text = "\n".join([first.rstrip(), *filter(None, map(str.rstrip, lines)), last])
    return _SPACES.sub(" ", text) if "  " in text else text


def keep_story(text: str) -> bool:
    """Return whether the reference keeps this story; it drops stories with `â`, `€`, `«` or `»`, signs of mojibake.

    To build data sets like the published ones, use `[story for story in stories if keep_story(story)]`.

    Examples:
        >>> from tinymodel_jax import keep_story
        >>> keep_story("Tim said: “Hi!”"), keep_story("Tim said: â€œHi!")
        (True, False)
    """
    return not any(sign in text for sign in "â€«»")


class _PieceIds(dict[str, bytes]):
    """Cache from a piece of text to its model ids, as the bytes of an int32 array, computed by the BPE at first use.

    Stories repeat their words, so looking up pieces is several times as fast as the BPE. Bytes are joined into an array
    without a Python integer per token.
    """

    def __init__(self, bpe: tokenizers.Tokenizer, model_ids: np.ndarray):
        super().__init__()
        self._bpe = bpe
        self._model_ids = model_ids

    def __missing__(self, piece: str) -> bytes:
        bpe_ids = np.array(self._bpe.encode(piece, add_special_tokens=False).ids, dtype=np.int64)
        ids = self._model_ids[bpe_ids].tobytes()
        if len(piece) <= _MAX_CACHED_CHARACTERS:
            if len(self) >= _MAX_CACHED_PIECES:
                self.clear()
            self[piece] = ids
        return ids


def _splits_as_gpt2(bpe: tokenizers.Tokenizer) -> bool:
    """Return whether `bpe` encodes each piece of `_GPT2_PIECES` separately, so that pieces can be cached."""
    splitter: Any = bpe.pre_tokenizer
    is_byte_level = isinstance(splitter, pre_tokenizers.ByteLevel)
    return bpe.normalizer is None and is_byte_level and splitter.use_regex and not splitter.add_prefix_space


def _check_table(table: np.ndarray, token_of: dict[int, str]) -> None:
    ids = table.ravel().tolist()
    unknown = [id_ for id_ in ids if id_ not in token_of]
    last = tuple(token_of.get(id_) for id_ in ids[-4:])
    problems = []
    if unknown:
        problems.append(f"{len(unknown)} of {len(ids)} ids are not in the BPE vocabulary, the first is {unknown[0]}")
    if len(set(ids)) < len(ids):
        problems.append(f"{len(ids) - len(set(ids))} ids are repeated")
    if last != SPECIAL_TOKENS:
        problems.append(f"it ends in {last}, not in the special tokens {SPECIAL_TOKENS}")
    if problems:
        raise ValueError(f"the token table does not fit the BPE: {'; '.join(problems)}.")


def _as_stories(texts: object) -> Sequence[str]:
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, list | tuple):
        raise TypeError(f"the tokenizer takes a str or a list of str, got {type(texts).__name__}.")
    wrong = [f"{type(text).__name__} at {position}" for position, text in enumerate(texts) if not isinstance(text, str)]
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise TypeError(f"the tokenizer takes a str or a list of str, got a {type(texts).__name__} with {shown}.")
    return texts


def _check_layout(max_length: int | None, padding: object, add_begin: bool) -> None:
    problems = []
    if max_length is not None and max_length < 1 + add_begin:
        needed = "2 (one token after [BEGIN])" if add_begin else "1"
        problems.append(f"max_length must be at least {needed} or None, got {max_length}")
    if padding not in ("longest", "max_length", False):
        problems.append(f"padding must be 'longest', 'max_length' or False, got {padding!r}")
    if padding == "max_length" and max_length is None:
        problems.append("padding='max_length' needs a max_length")
    if problems:
        raise ValueError(f"{'; '.join(problems)}.")


def _is_nested(ids: object) -> TypeGuard[Sequence[Any]]:
    is_sequence = isinstance(ids, list | tuple)
    return is_sequence and any(isinstance(row, list | tuple) or getattr(row, "ndim", 0) for row in ids)
