"""The rows of tokens that a command measures on: prepared data, a file of stories, or the story world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinymodel_jax.commands.prompts import STORY_FILES, read_stories
from tinymodel_jax.runtime.paths import user_path

if TYPE_CHECKING:
    import numpy as np

    from tinymodel_jax.bundled.storyworld import Story
    from tinymodel_jax.lm import TinyModel

STORY_WORLD = "storyworld"


def open_rows(lm: TinyModel, data: str, limit: int) -> np.ndarray:
    """Return rows of token ids (rows, seq), `[BEGIN]` first and padded with `[PAD]`.

    A story that fits the context ends with `[END]`. Stories are padded to the compiled length that holds the longest;
    prepared rows have a length of their own.

    Args:
        data: folder of `python -m train prepare`, whose held-out rows are read; a file of stories (.jsonl, .txt, also
            .gz); or `storyworld`, whose unseen stories are told.
        limit: rows at most.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: it holds nothing to read, does not fit the model's vocabulary and context, or a story holds a
            special token.
    """
    if limit < 1:
        raise ValueError(f"--limit {limit} must be 1 or more.")
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
        ValueError: the model's vocabulary is another.
    """
    from tinymodel_jax.bundled import storyworld

    vocab_size = storyworld.tokenizer().vocab_size
    if lm.config.d_vocab != vocab_size:
        raise ValueError(
            f"stories of the story world take {vocab_size} ids, the model has {lm.config.d_vocab}; {instead}."
        )
    return list(storyworld.stories(seed=0, count=count, first=storyworld.FIRST_UNSEEN))


def _rows_of_stories(lm: TinyModel, texts: Sequence[str], name: str) -> np.ndarray:
    from tinymodel_jax.model.padding import bucket, pad_right
    from tinymodel_jax.text.prompts_and_stories import story_rows

    tok_ids = story_rows(lm.tokenizer, texts, lm.config.n_ctx, name=name)
    return pad_right(tok_ids, bucket(tok_ids.shape[1], lm.config.n_ctx), lm.config.pad_id)
