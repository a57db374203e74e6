"""The files of a `Tokenizer`: read GPT-2's files, read and write our own two.

Reading returns a `tokenizers.Tokenizer` and a table (model id -> BPE id), the arguments of `Tokenizer`. A file that is
missing, damaged or of another model raises an error of one line that names it and says what would work. A file is
written completely or not at all. Nothing is downloaded.
"""

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tinymodel_jax.runtime.atomic_files import replace_file

SPECIAL_TOKENS = ("[BEGIN]", "[END]", "[PAD]", "[UNK]")
"""The last four ids of every vocabulary, in this order."""

_BPE_FILE = "tokenizer.json"
_TABLE_FILE = "token_table.json"
_GPT2_FILES = ("vocab.json", "merges.txt")
_GPT2_SIZE = 50257
# Other vocabularies of this size, some of them easily mistaken for GPT-2's, have other ids for these tokens.
_GPT2_LANDMARKS = {".": 13, "Ġthe": 262, "<|endoftext|>": 50256}


def read_gpt2(path: Path) -> tuple[tokenizers.Tokenizer, list[int]]:
    """Return GPT-2's BPE, without the prefix space, and the bundled table of the GPT-2 ids that TinyModel knows.

    Args:
        path: a `tokenizer.json`, or a folder with one, or a folder with `vocab.json` and `merges.txt`.
    """
    bpe: Any = _read_gpt2_bpe(path)
    _check_gpt2_vocab(path, bpe.get_vocab())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])  # a single token even within a text, which vocab.json does not state
    with resources.files("tinymodel_jax.bundled").joinpath("gpt2_ids.npy").open("rb") as file:
        return bpe, np.load(file, allow_pickle=False).tolist()


def read_saved(folder: Path) -> tuple[tokenizers.Tokenizer, list[int]]:
    """Return the BPE and the table that `write_saved` wrote."""
    missing = [name for name in (_BPE_FILE, _TABLE_FILE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"no saved tokenizer in {str(folder)!r}: {' and '.join(missing)} not found. Needed: {_BPE_FILE} and "
            f"{_TABLE_FILE}, written by Tokenizer.save_pretrained; for GPT-2's own files use Tokenizer.from_gpt2."
        )
    bpe = _parse(folder / _BPE_FILE, lambda: tokenizers.Tokenizer.from_file(str(folder / _BPE_FILE)))
    tokens = _parse(folder / _TABLE_FILE, lambda: _tokens_from_json((folder / _TABLE_FILE).read_text("utf-8")))
    vocab = bpe.get_vocab()
    unknown = [token for token in tokens if token not in vocab]
    if unknown:
        raise ValueError(
            f"{_TABLE_FILE} and {_BPE_FILE} in {str(folder)!r} do not belong together: {len(unknown)} of {len(tokens)} "
            f"tokens are not in the BPE vocabulary, the first is {unknown[0]!r}. Take both from one save_pretrained."
        )
    return bpe, [vocab[token] for token in tokens]


def saved_form(bpe: tokenizers.Tokenizer, table: list[int]) -> dict[str, str]:
    """Return file name -> text of `tokenizer.json`, which the `tokenizers` library reads, and `token_table.json`.

    The table lists the BPE token of each model id in order, not its BPE id, so that a table that does not belong to the
    BPE is noticed when it is read.
    """
    tokens = [bpe.id_to_token(id_) for id_ in table]
    return {_BPE_FILE: bpe.to_str(), _TABLE_FILE: json.dumps({"tokens": tokens}, ensure_ascii=False, indent=0)}


def write_saved(folder: Path, bpe: tokenizers.Tokenizer, table: list[int]) -> None:
    """Write the files of `saved_form`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in saved_form(bpe, table).items():
        replace_file(folder / name, text.encode("utf-8"))


def _read_gpt2_bpe(path: Path) -> tokenizers.Tokenizer:
    if path.name in _GPT2_FILES:
        path = path.parent
    for file in (path, path / _BPE_FILE):
        if file.is_file():
            return _parse(file, lambda file=file: tokenizers.Tokenizer.from_file(str(file)))
    files = [path / name for name in _GPT2_FILES]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"no GPT-2 tokenizer in {str(path)!r}{'' if path.exists() else ' (which does not exist)'}: looked for "
            f"{_BPE_FILE}, then for {' and '.join(_GPT2_FILES)}, of which {' and '.join(missing)} is missing. Give a "
            f"folder with these files of openai-community/gpt2 or roneneldan/TinyStories, or the path of a {_BPE_FILE}."
        )
    return _parse(path, lambda: tokenizers.Tokenizer(models.BPE.from_file(*map(str, files))))


def _check_gpt2_vocab(path: Path, vocab: dict[str, int]) -> None:
    size = len(vocab.keys() - set(SPECIAL_TOKENS))
    problems = [] if size == _GPT2_SIZE else [f"it has {size} entries, not {_GPT2_SIZE}"]
    problems += [
        f"{token!r} has id {vocab.get(token)}, not {id_}"
        for token, id_ in _GPT2_LANDMARKS.items()
        if vocab.get(token) != id_
    ]
    if problems:
        raise ValueError(
            f"{str(path)!r} is not GPT-2's vocabulary: {'; '.join(problems)}. Use the files of openai-community/gpt2 "
            f"or roneneldan/TinyStories; for another BPE, make a Tokenizer(bpe, table)."
        )


def _parse(path: Path, read: Callable[[], Any]) -> Any:
    """Return the result of `read`; turn any error into one line that names the file."""
    try:
        return read()
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot read a tokenizer from {str(path)!r}: {reason}.") from error


def _tokens_from_json(text: str) -> list[str]:
    tokens = json.loads(text)["tokens"]
    if not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
        raise ValueError("'tokens' is not a list of str")
    return tokens
