"""The inputs of commands (prompts, stories, rows of tokens), and how commands show tokens."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tinymodel_jax.bundled import STORY_WORLD
from tinymodel_jax.commands.options import require_positive
from tinymodel_jax.runtime.paths import user_path

if TYPE_CHECKING:
    import numpy as np

    from tinymodel_jax.bundled.storyworld import Story
    from tinymodel_jax.lm import TinyModel

Prompts = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT…")]
STORY_FILES = (".jsonl", ".txt")
"""Suffixes of files of stories; each may be followed by .gz."""


def read_prompts(
    prompts: Sequence[str], stories: Path | None, limit: int, ids: bool
) -> tuple[list[str] | list[list[int]], list[str]]:
    """Return prompts (rows of ids with `ids`) and stories; wrong input is reported before a model is loaded.

    Raises:
        ValueError: there is nothing to read, or it cannot be read.
    """
    if ids and stories:
        raise ValueError("--ids and --stories cannot be combined: stories are text.")
    if not prompts and not stories:
        raise ValueError("nothing to read: give a prompt, or --stories FILE.")
    from_file = read_stories(stories, limit) if stories else []
    return ([_parse_ids(text) for text in prompts] if ids else list(prompts)), from_file


def read_stories(path: Path, limit: int) -> list[str]:
    """Return the first stories of a `.jsonl` file (field `text`) or a `.txt` file (one story per line), also gzipped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or holds no stories in this form.
    """
    kind = path.name.removesuffix(".gz")
    if not kind.endswith(STORY_FILES):
        raise ValueError(f"{path}: expected a .jsonl or .txt file, or one of them with .gz.")
    require_positive("--limit", limit)
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
        raise ValueError(f"{path} is damaged, or is not the kind of file that its name says: {error}.") from error
    if not found:
        raise ValueError(f"{path}: no story found (limit {limit}).")
    return found


def require_data(data: str) -> None:
    """Refuse `--data` that does not exist, before a model is loaded.

    Raises:
        FileNotFoundError: there is no such file, or no prepared folder.
        ValueError: the folder holds something else, or is damaged.
    """
    if data == STORY_WORLD:
        return
    if data.removesuffix(".gz").endswith(STORY_FILES):
        if not user_path(data).exists():
            raise FileNotFoundError(f"--data {data} does not exist.")
        return
    from tinymodel_jax.training.data_folder import open_data

    open_data(data)


def open_rows(lm: TinyModel, data: str, limit: int) -> np.ndarray:
    """Return rows of token ids (rows, seq) with `[BEGIN]` first, padded with `[PAD]`.

    A story that fits the context ends with `[END]`. Stories are padded to the shortest compiled length that holds the
    longest of them; prepared rows keep their length.

    Args:
        data: folder of `python -m train prepare`, of which the held-out rows are read; a file of stories (.jsonl,
            .txt, also .gz); or `storyworld`, for stories that no bundled model was trained on.
        limit: largest number of rows.

    Raises:
        FileNotFoundError: the folder or file does not exist.
        ValueError: it holds nothing to read, does not fit the model's vocabulary and context, or a story holds a
            special token.
    """
    require_positive("--limit", limit)
    if data == STORY_WORLD:
        instead = "--data takes a folder of python -m train prepare, or a file of stories, too"
        return _rows_of_stories(lm, [story.text for story in unseen_stories(lm, limit, instead)], data)
    path = user_path(data)
    if data.removesuffix(".gz").endswith(STORY_FILES):
        return _rows_of_stories(lm, read_stories(path, limit), f"{path}, story")
    from tinymodel_jax.training.data_folder import open_data

    prepared = open_data(data)
    # special ids are the last of the vocabulary: in a larger one they would be words
    if prepared.vocab_size != lm.config.d_vocab or prepared.row_length > lm.config.n_ctx:
        raise ValueError(
            f"--data {data} has {prepared.vocab_size} ids in rows of {prepared.row_length}; the model takes "
            f"{lm.config.d_vocab} ids in rows of {lm.config.n_ctx} at most. Prepare it with the model's tokenizer."
        )
    if not len(prepared.valid):
        raise ValueError(f"--data {data} has no held-out rows; prepare more stories.")
    return prepared.valid[:limit]


def unseen_stories(
    lm: TinyModel, count: int, instead: str = "give a model that was trained on them, such as mini"
) -> Sequence[Story]:
    """Return stories of the story world that no bundled model was trained on.

    Args:
        instead: what to do, for the error.

    Raises:
        ValueError: the model has another vocabulary.
    """
    from tinymodel_jax.bundled import storyworld

    vocab_size = storyworld.tokenizer().vocab_size
    if lm.config.d_vocab != vocab_size:
        raise ValueError(
            f"stories of the story world take {vocab_size} ids, the model has {lm.config.d_vocab}; {instead}."
        )
    return list(storyworld.stories(seed=0, count=count, first=storyworld.FIRST_UNSEEN))


def storyworld_truth(lm: TinyModel, rows: np.ndarray, limit: int) -> np.ndarray:
    """Return where each concept holds, (rows, seq, concepts), in rows of `limit` unseen stories."""
    from tinymodel_jax.bundled.storyworld import labels

    return labels(unseen_stories(lm, limit), lm.tokenizer, width=rows.shape[1], max_length=rows.shape[1])


def token_rows(lm: TinyModel, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """Return rows of token ids; text gets `[BEGIN]` in front unless it has it.

    Raises:
        ValueError: a text holds another special token.
    """
    from tinymodel_jax.text.prompts_and_stories import prompt_ids

    return [prompt_ids(lm.tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def token_id(lm: TinyModel, text: str | None, row: Sequence[int]) -> int:
    """Return the id of a text of one token, or of the most likely token after a row if there is no text.

    Raises:
        ValueError: the text is not one token.
    """
    import numpy as np

    if text is None:
        return int(np.asarray(lm([row]))[0, -1].argmax())
    return lm.to_single_token(text)


def shown(lm: TinyModel, row: Sequence[int], ids: bool) -> str:
    """Return the text of a row without a `[BEGIN]` in front; with `ids`, the ids themselves."""
    if ids:
        return " ".join(map(str, row))
    begin = row[:1] == [lm.config.begin_id] and len(row) > 1
    return lm.tokenizer.decode(list(row[1:] if begin else row))


def _rows_of_stories(lm: TinyModel, texts: Sequence[str], name: str) -> np.ndarray:
    from tinymodel_jax.model.padding import bucket, pad_right
    from tinymodel_jax.text.prompts_and_stories import story_rows

    tok_ids = story_rows(lm.tokenizer, texts, lm.config.n_ctx, name=name)
    return pad_right(tok_ids, bucket(tok_ids.shape[1], lm.config.n_ctx), lm.config.pad_id)


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
        raise ValueError(f"--ids: {text!r:.80} is not a list of whole numbers, such as '9996 51 56'.")
    return row
