"""The concepts of every token of a story, as a matrix that matches the token ids.

Row r and column t label the token that `tokenizer(texts)` has there, for any `Tokenizer`. A token has a concept if any
of its characters has it; a space has the concepts of the next character. Special tokens have none. Only stories of the
generator can be labelled, because the meaning of other texts is not known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool

from tinymodel_jax.bundled.storyworld.cast import JOBS
from tinymodel_jax.bundled.storyworld.concepts import CONCEPTS
from tinymodel_jax.bundled.storyworld.generator import Story
from tinymodel_jax.text.tokenizer import Tokenizer

_SAID = "said|asked|called|cried|sobbed|shouted|yelled|whispered|thought"
_WHO = rf"(?:(?:{'|'.join(JOBS)})\ )?\w+(?:'s\ \w+)?"
"""Matches a possible speaker, such as Lily, Lily's mom or Farmer Bell, but not `But nobody`."""
MARKS = {
    "mark.opening_quote": re.compile(r'(?<![^\s])"'),
    "mark.closing_quote": re.compile(r'(?<=\S)"'),
    "mark.comma": re.compile(","),
    "mark.period": re.compile(r"\."),
    "mark.exclamation": re.compile("!"),
    "mark.question": re.compile(r"\?"),
    "mark.newline": re.compile(r"\n"),
    "sentence.question": re.compile(r'[^\s.!?"][^.!?"\n]*\?'),
    # After `…!"` and `…?"`, a capital may also start the speaker: `"Oh no!" Lily said.`
    "sentence.first_word": re.compile(
        rf"""(?:(?<![^\n])|(?<=")(?<=[^\S]")|(?<=[.!?]\ )|(?<=\."\ )"""
        rf"""|(?<=[!?]"\ )(?!{_WHO}\ (?:{_SAID})\b))[A-Z][a-z']*""",
        re.VERBOSE,
    ),
}
"""Concepts that are found by patterns in the text."""
_COLUMN = {name: column for column, name in enumerate(CONCEPTS)}


def labels(
    stories: Sequence[Story], tokenizer: Tokenizer, *, width: int | None = None, max_length: int | None = 256
) -> Bool[np.ndarray, "stories seq n_concepts"]:
    """Return which concepts hold at which tokens.

    Args:
        stories: stories of the generator.
        tokenizer: tokenizer of the ids.
        width: number of columns; None takes as many as `tokenizer(texts, max_length=max_length)` has.
        max_length: largest number of tokens of a story, including `[BEGIN]`, as for the tokenizer.

    Returns:
        Values (stories, tokens, concepts), with concepts in the order of `CONCEPTS`; token 0 is `[BEGIN]`.

    Raises:
        ValueError: `width` or `max_length` is too small, or the tokenizer lacks a character of the stories.

    Examples:
        >>> from tinymodel_jax.bundled import storyworld
        >>> told = list(storyworld.stories(seed=0, count=2))
        >>> truth = storyworld.labels(told, storyworld.tokenizer(), width=256)
        >>> truth.shape == (2, 256, len(storyworld.CONCEPTS))
        True
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2 (one token after [BEGIN]) or None, got {max_length}.")
    lengths = _token_lengths(tokenizer)
    rows = [tokenizer.encode(story.text, max_length=max_length and max_length - 1) for story in stories]
    longest = 1 + max(map(len, rows), default=0)
    if width is not None and width < longest:
        raise ValueError(f"width {width} is too small: the longest story has {longest} tokens with [BEGIN].")
    found = np.zeros((len(stories), width or longest, len(CONCEPTS)), dtype=bool)
    for place, story, ids in zip(found, stories, rows, strict=True):
        ends = np.cumsum(lengths[ids])
        if tokenizer.unk_id in ids:
            raise ValueError(f"the tokenizer lacks a character of the story {story.text[:40]!r}….")
        of_characters = _label_characters(story)
        place[1 : len(ids) + 1] = np.logical_or.reduceat(of_characters[: ends[-1]], ends - lengths[ids])
    return found


def _token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Return the number of characters of each token; 0 for special tokens."""
    texts = tokenizer.decode(np.arange(tokenizer.vocab_size - 4)[:, None])
    return np.array([*map(len, texts), 0, 0, 0, 0])


def _label_characters(story: Story) -> Bool[np.ndarray, "characters n_concepts"]:
    found = np.zeros((len(story.text), len(CONCEPTS)), dtype=bool)
    at = 0
    for text, concepts in story.pieces():
        found[at : at + len(text), list(_columns(concepts))] = True
        at += len(text)
    for concept, pattern in MARKS.items():
        for match in pattern.finditer(story.text):
            found[match.start() : match.end(), _COLUMN[concept]] = True
    spaces = np.flatnonzero([character == " " for character in story.text])
    found[spaces] = found[spaces + 1]  # as in tokens, a space belongs to what follows; no story ends in a space
    return found


def _columns(concepts: int) -> Iterator[int]:
    while concepts:
        lowest = concepts & -concepts
        yield lowest.bit_length() - 1
        concepts ^= lowest
