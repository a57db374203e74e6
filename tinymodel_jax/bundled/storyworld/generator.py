"""Stories: story i of a seed, its text, and what holds of every stretch of it.

Rely on: a story is a pure function of (seed, index), on every machine and Python version (`random.Random(n).random()`
is promised not to change); ASCII, five paragraphs, 100 to 170 words. Of the first 100,000 stories of seed 0 the longest
has 255 tokens of the story world's tokenizer, so that all fit 256 with `[BEGIN]`, and all but one with `[END]`, too. It
deliberately keeps nothing and knows nothing of tokens.
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
"""Most spaces and punctuation marks of a story; one with more is told anew."""
FIRST_UNSEEN = 1_000_000
"""Number of the story from which on, with seed 0, nothing that comes with the package was trained on."""
_LIMIT = 1 << 63
"""Seeds and indices are below it."""
_PLOT_NAMES = tuple(PLOTS)


class Span(NamedTuple):
    """A stretch of a story's text, and what holds of all of it."""

    start: int
    """First character."""
    end: int
    """One past the last character."""
    concepts: frozenset[str]
    """Names of `CONCEPTS`; those that `labels` reads off the characters (marks, first words) are not among them."""


@dataclass(frozen=True)
class Story:
    """One story."""

    text: str
    plot: str
    """Name of its plot, one of `PLOTS`."""
    hero_kind: str
    """girl, boy or animal."""
    paragraphs: tuple[tuple[Piece, ...], ...]
    """The text in pieces, by phase, each with the concepts that hold of it whatever the phase and plot."""
    nats: float
    """Minus the log-probability of all choices that made the story: see `entropy`."""

    def pieces(self) -> Iterator[Piece]:
        """Yield the text in pieces, each with the set (`concepts.mask`) of all that holds of it."""
        known = 0
        for number, (phase, paragraph) in enumerate(zip(PHASES, self.paragraphs, strict=True)):
            if number:
                known = mask(f"plot.{self.plot}", f"hero.{self.hero_kind}")
                yield "\n", 0
            here = known | mask(f"phase.{phase}")
            for text, concepts in paragraph:
                yield text, concepts | here

    def spans(self) -> list[Span]:
        """Return the stretches of the text, in order and without gaps."""
        found, at = [], 0
        for text, concepts in self.pieces():
            found.append(Span(at, at + len(text), names(concepts)))
            at += len(text)
        return found


def story(seed: int, index: int) -> Story:
    """Tell story `index` of a seed.

    Raises:
        ValueError: one of them is negative or not below 2^63.
    """
    if not (0 <= seed < _LIMIT and 0 <= index < _LIMIT):
        raise ValueError(f"seed and index must be from 0 to 2^63 - 1, got {seed} and {index}.")
    random = Random(seed << 64 | index).random
    told = _tell(Draw(random))
    while sum(map(told.text.count, " .,!?")) > MAX_LENGTH:
        told = _tell(Draw(random))
    return told


def stories(seed: int, count: int, first: int = 0) -> Iterator[Story]:
    """Tell `count` stories of a seed, from story `first` on."""
    return (story(seed, index) for index in range(first, first + count))


def fingerprint() -> str:
    """Return a SHA-256 that is another one whenever the stories are: of the grammar's files and of 100 stories."""
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
    _, *paragraphs = told  # the casting comes first, and tells nothing
    text = "\n".join(["".join([text for text, _ in paragraph]) for paragraph in paragraphs])
    kind = hero.kind if hero.kind in ("girl", "boy") else "animal"
    return Story(text, plot, kind, tuple(paragraphs), draw.nats)
