"""Stories: the text of story i of a seed, and the concepts of every part of it.

A story is a pure function of (seed, index) on every machine and Python version, because Python promises that
`random.Random(n).random()` does not change. It is ASCII, with five paragraphs and 100 to 170 words. The longest of the
first 100,000 stories of seed 0 has 255 tokens of the story world's tokenizer. So all of them fit 256 tokens with
`[BEGIN]`, and all but one with `[BEGIN]` and `[END]`. This file does not deal with tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from tinymodel_jax.bundled.storyworld.cast import cast_characters
from tinymodel_jax.bundled.storyworld.concepts import PHASES, PLOTS, mask, names
from tinymodel_jax.bundled.storyworld.grammar import grammar_digest, plot_phases
from tinymodel_jax.bundled.storyworld.parts import Draw, Piece

MAX_LENGTH = 175
"""Largest number of spaces and punctuation marks in a story; a story with more is drawn again."""
FIRST_UNSEEN = 1_000_000
"""1,000,000: nothing in the package was trained on the stories of seed 0 from this index on."""
_LIMIT = 1 << 63
"""Seeds and indices must be smaller."""
_PLOT_NAMES = tuple(PLOTS)


class Span(NamedTuple):
    """A span of a story's text, and the concepts that hold for all of it."""

    start: int
    """First character."""
    end: int
    """One past the last character."""
    concepts: frozenset[str]
    """Names of concepts, without those that `labels` finds in the characters (marks, first words)."""


@dataclass(frozen=True)
class Story:
    """One story.

    Examples:
        >>> from tinymodel_jax.bundled import storyworld
        >>> told = storyworld.story(seed=0, index=0)
        >>> "".join(told.text[span.start : span.end] for span in told.spans()) == told.text
        True
    """

    text: str
    """The text, five paragraphs."""
    plot: str
    """Name of its plot, such as "lost"; the concepts `plot.…` describe them."""
    hero_kind: str
    """One of "girl", "boy" and "animal"."""
    paragraphs: tuple[tuple[Piece, ...], ...]
    """The text by phase, in pieces with their concepts, without those of the phase, plot and hero."""
    nats: float
    """Minus the log-probability of all choices that made the story, nats (see `entropy`)."""

    def pieces(self) -> Iterator[Piece]:
        """Yield the text in pieces, each with the set (`concepts.mask`) of all its concepts."""
        known = 0
        for number, (phase, paragraph) in enumerate(zip(PHASES, self.paragraphs, strict=True)):
            if number:
                known = mask(f"plot.{self.plot}", f"hero.{self.hero_kind}")
                yield "\n", 0
            here = known | mask(f"phase.{phase}")
            for text, concepts in paragraph:
                yield text, concepts | here

    def spans(self) -> list[Span]:
        """Return the spans of the text, in order and without gaps."""
        found, at = [], 0
        for text, concepts in self.pieces():
            found.append(Span(at, at + len(text), names(concepts)))
            at += len(text)
        return found


def story(seed: int, index: int) -> Story:
    """Return a story of a seed. It is always the same.

    Args:
        seed: seed of the stories, from 0 on.
        index: number of the story, from 0 on.

    Raises:
        ValueError: the seed or the index is negative or not below 2^63.

    Examples:
        >>> from tinymodel_jax.bundled import storyworld
        >>> told = storyworld.story(seed=0, index=3)
        >>> told == storyworld.story(seed=0, index=3)
        True
        >>> told.plot
        'sharing'
    """
    if not (0 <= seed < _LIMIT and 0 <= index < _LIMIT):
        raise ValueError(f"seed and index must be from 0 to 2^63 - 1, got {seed} and {index}.")
    random = Random(seed << 64 | index).random
    told = _tell(Draw(random))
    while sum(map(told.text.count, " .,!?")) > MAX_LENGTH:
        told = _tell(Draw(random))
    return told


def stories(seed: int, count: int, first: int = 0) -> Iterator[Story]:
    """Yield `count` stories of a seed, starting with story `first`.

    Args:
        seed: seed of the stories, from 0 on.
        count: number of stories.
        first: index of the first one. Nothing in the package was trained on stories of seed 0 from `FIRST_UNSEEN` on.

    Raises:
        ValueError: as `story`.

    Examples:
        >>> from tinymodel_jax.bundled import storyworld
        >>> told = list(storyworld.stories(seed=0, count=3))
        >>> len(told), told[1] == storyworld.story(0, 1)
        (3, True)
    """
    return (story(seed, index) for index in range(first, first + count))


def fingerprint() -> str:
    """Return a SHA-256 of the grammar's files and of 100 stories, which changes when the stories change.

    Examples:
        >>> from tinymodel_jax.bundled import storyworld
        >>> len(storyworld.fingerprint())
        64
    """
    texts = "\0".join(told.text for told in stories(0, 100))
    return hashlib.sha256(f"{grammar_digest()}\0{texts}".encode()).hexdigest()


def _tell(draw: Draw) -> Story:
    plot = _PLOT_NAMES[int(draw.random() * len(_PLOT_NAMES))]
    draw.nats += math.log(len(_PLOT_NAMES))
    hero = cast_characters(draw)
    told = []
    for parts in plot_phases(plot):
        draw.pieces = []
        for part in parts:
            part.expand(draw)
        told.append(tuple(draw.pieces))
    _, *paragraphs = told  # the casting comes first and has no text
    text = "\n".join(["".join([text for text, _ in paragraph]) for paragraph in paragraphs])
    kind = hero.kind if hero.kind in ("girl", "boy") else "animal"
    return Story(text, plot, kind, tuple(paragraphs), draw.nats)
