"""What commands read: a model, prompts, stories; and how tokens are shown."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from tinymodel_jax.lm import TinyModel

Prompts = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT…")]
STORY_FILES = (".jsonl", ".txt")
"""Endings of files of stories; each also with .gz."""


def load_lm(model: str, n_heads: int | None = None, tag: str = "", dictionary: Path | None = None) -> TinyModel:
    """Load a model, and put a dictionary, if there is one, at the site `tag`; JAX loads here, not for `--help`."""
    from tinymodel_jax.lm import TinyModel

    lm = TinyModel(model, n_heads=n_heads)
    if dictionary is not None:
        lm.attach(tag, dictionary)
    return lm


def read_prompts(
    prompts: Sequence[str], stories: Path | None, limit: int, ids: bool
) -> tuple[list[str] | list[list[int]], list[str]]:
    """Return prompts, as rows if they are ids, and stories; what is wrong with them shows before a model is loaded."""
    if ids and stories:
        raise ValueError("--ids and --stories do not go together: stories are text.")
    if not prompts and not stories:
        raise ValueError("nothing to read: give a prompt, or --stories FILE.")
    told = read_stories(stories, limit) if stories else []
    return ([_parse_ids(text) for text in prompts] if ids else list(prompts)), told


def read_stories(path: Path, limit: int) -> list[str]:
    """Return the first stories of a `.jsonl` (field `text`) or `.txt` file (a story a line), also gzipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line holds no story, or divides stories of several lines, or the file has none.
    """
    kind = path.name.removesuffix(".gz")
    if not kind.endswith(STORY_FILES):
        raise ValueError(f"{path}: expected a .jsonl or .txt file, or one of them with .gz.")
    if limit < 1:
        raise ValueError(f"--limit {limit} must be 1 or more.")
    found: list[str] = []
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if len(found) == limit:
                    break
                if line.strip():
                    found.append(_story(line, kind.endswith(".jsonl"), f"{path}, line {number}"))
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or no such file as its name says: {error}.") from error
    if not found:
        raise ValueError(f"{path}: no story found (limit {limit}).")
    return found


def token_rows(lm: TinyModel, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """Return rows of token ids; text gets `[BEGIN]` in front unless it has it.

    Raises:
        ValueError: a text holds another special token.
    """
    from tinymodel_jax.text.prompts_and_stories import prompt_ids

    return [prompt_ids(lm.tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def token_id(lm: TinyModel, text: str | None, row: Sequence[int]) -> int:
    """Return the id of the token that a text is, or without one of the most likely token after a row.

    Raises:
        ValueError: the text is not one token.
    """
    import numpy as np

    if text is None:
        return int(np.asarray(lm([row]))[0, -1].argmax())
    ids = lm.tokenizer.encode(text, max_length=None)
    if len(ids) != 1:
        pieces = ", ".join(repr(lm.tokenizer.decode([i])) for i in ids)
        raise ValueError(f"{text!r} is {len(ids)} tokens ({pieces}); name one, as ' dog' with its space.")
    return ids[0]


def shown(lm: TinyModel, row: Sequence[int], ids: bool) -> str:
    """Return the text of ids, without a `[BEGIN]` in front; with `ids`, the ids themselves."""
    if ids:
        return " ".join(map(str, row))
    begin = row[:1] == [lm.config.begin_id] and len(row) > 1
    return lm.tokenizer.decode(list(row[1:] if begin else row))


def _story(line: str, is_json: bool, where: str) -> str:
    from tinymodel_jax.text.prompts_and_stories import refuse_divider  # loads NumPy, not for --help

    if not is_json:
        refuse_divider(line, where)
        return line.rstrip("\n")
    try:
        story = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error
    if not isinstance(story, dict) or not isinstance(story.get("text"), str):
        raise ValueError(f"{where}: expected an object with a string 'text'.")
    return story["text"]


def _parse_ids(text: str) -> list[int]:
    try:
        row = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        row = []
    if not row:
        raise ValueError(f"--ids: {text!r:.80} is no list of whole numbers, as '9996 51 56'.")
    return row
