"""The parts of a template and how they expand: fixed words, slots, choices.

Expansion is a pure function of the random numbers and the slots. A draw records the probability of all its choices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Piece = tuple[str, int]
"""Text, and the set (`concepts.mask`) of its concepts."""
Slots = dict[str, tuple[Piece, ...]]


class Draw:
    """The state of one expansion."""

    def __init__(self, random: Callable[[], float]):
        self.random = random
        """Uniform in [0, 1)."""
        self.slots: Slots = {}
        self.nats = 0.0
        """Minus the log-probability of the choices so far."""
        self.pieces: list[Piece] = []


class Part(ABC):
    """A part of a template."""

    @abstractmethod
    def expand(self, draw: Draw) -> None:
        """Add the pieces of this part to the draw."""


@dataclass(frozen=True, slots=True)
class Fixed(Part):
    """Words without choices."""

    pieces: tuple[Piece, ...]

    def expand(self, draw: Draw) -> None:
        """Add the words."""
        draw.pieces += self.pieces


@dataclass(frozen=True, slots=True)
class Slot(Part):
    """The content of a slot."""

    name: str
    capital: bool
    concepts: int
    """Concepts that hold here, in addition to those of the slot's content."""

    def expand(self, draw: Draw) -> None:
        """Add the pieces of the slot."""
        pieces: Sequence[Piece] = draw.slots[self.name]
        if self.capital:
            text, concepts = pieces[0]
            pieces = ((text[0].upper() + text[1:], concepts), *pieces[1:])
        if self.concepts:
            pieces = [(text, concepts | self.concepts) for text, concepts in pieces]
        draw.pieces += pieces


@dataclass(frozen=True, slots=True)
class Choice(Part):
    """One of several sequences of parts."""

    options: tuple[tuple[Part, ...], ...]
    nats: tuple[float, ...]
    """Minus the log-probability of each option; equal options count as one."""

    def expand(self, draw: Draw) -> None:
        """Choose a sequence and expand it."""
        chosen = int(draw.random() * len(self.options))
        draw.nats += self.nats[chosen]
        for part in self.options[chosen]:
            part.expand(draw)


@dataclass(frozen=True, slots=True)
class WordChoice(Part):
    """A `Choice` of fixed words. Most choices are, and avoiding the inner calls makes the generator a third faster."""

    options: tuple[tuple[Piece, ...], ...]
    nats: tuple[float, ...]

    def expand(self, draw: Draw) -> None:
        """Choose words."""
        chosen = int(draw.random() * len(self.options))
        draw.nats += self.nats[chosen]
        draw.pieces += self.options[chosen]


@dataclass(frozen=True, slots=True)
class Fill(Part):
    """Fills a slot without adding text."""

    slot: str
    parts: tuple[Part, ...]
    concepts: int
    """Concepts that the content of the slot always has."""

    def expand(self, draw: Draw) -> None:
        """Expand the parts into the slot."""
        told, draw.pieces = draw.pieces, []
        for part in self.parts:
            part.expand(draw)
        draw.slots[self.slot] = tuple([(text, concepts | self.concepts) for text, concepts in draw.pieces])
        draw.pieces = told


def choice(options: Sequence[tuple[Part, ...]]) -> tuple[Part, ...]:
    """Return the parts that choose among equally likely options; options that are equal count as one."""
    if len(set(options)) == 1:
        return options[0]
    nats = tuple(math.log(len(options) / options.count(option)) for option in options)
    words = [pieces for option in options if (pieces := _fixed_pieces(option)) is not None]
    return (Choice(tuple(options), nats) if len(words) < len(options) else WordChoice(tuple(words), nats),)


def joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return the parts with neighbouring fixed words as one."""
    found: list[Part] = []
    for part in parts:
        if found and isinstance(part, Fixed) and isinstance(before := found[-1], Fixed):
            found[-1] = Fixed(before.pieces + part.pieces)
        else:
            found.append(part)
    return tuple(found)


def _fixed_pieces(parts: tuple[Part, ...]) -> tuple[Piece, ...] | None:
    """Return the pieces of parts that are all fixed, or None if some are not."""
    pieces: tuple[Piece, ...] = ()
    for part in parts:
        if not isinstance(part, Fixed):
            return None
        pieces += part.pieces
    return pieces
