"""Questions: prompts that end where a story mentions somebody again, with the right answer and a wrong one.

A question is a pure function of the story's seed and index, as the story is.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from tinymodel_jax.bundled.storyworld.cast import BOYS, FEMALE_ANIMALS, GIRLS, MALE_ANIMALS
from tinymodel_jax.bundled.storyworld.generator import Story, story

Kind = Literal["name", "speaker", "animal"]
CREATURES = ("bird", "kitten", "puppy", "turtle", "lamb", "chick", "bunny", "frog", "snail")
"""Words for the small animal that a story turns on."""
_SAID = re.compile(r'" (?:said|asked|cried|shouted|whispered|called)$')


class Question(NamedTuple):
    """A story up to a word that it mentions again."""

    text: str
    """The beginning of a story; the next character is the space before the answer."""
    answer: str
    """The next word, with the space: " Lily"."""
    wrong: str
    """Another word of the same kind."""
    source: int
    """One past the last character of the answer's first mention in `text`."""


class _Mention(NamedTuple):
    word: str
    start: int
    end: int


def questions(kind: Kind, seed: int, count: int, first: int = 0) -> Iterator[Question]:
    """Yield questions about the stories of a seed from story `first` on, at most one for each story.

    Args:
        kind: "name": the first name that comes up twice before any other, against one that the story does not mention.
            "speaker": hero or friend after `" said`, against the other of the two. "animal": the small animal, the
            second time, against another one.
        seed: seed of the stories.
        count: number of questions.
        first: index of the first story to ask about.

    Raises:
        ValueError: there is no such kind, or as `story`.

    Examples:
        >>> from tinymodel_jax.bundled import storyworld
        >>> (question,) = storyworld.questions("name", seed=0, count=1)
        >>> question.answer, question.wrong
        (' Cleo', ' Coco')
    """
    makers: dict[str, Callable[[Story, int], Question | None]] = {
        "name": _name, "speaker": _speaker, "animal": _animal
    }  # fmt: skip
    if kind not in makers:
        raise ValueError(f"questions: kind={kind!r}; it must be one of {', '.join(makers)}.")
    found = (makers[kind](story(seed, index), index) for index in itertools.count(first))
    return itertools.islice((question for question in found if question is not None), count)


def _name(told: Story, index: int) -> Question | None:
    one, *others = _mentions(told, "name.girl", "name.boy")
    again = others[0] if others else one
    if again.word != one.word or again is one:
        return None
    names = next(group for group in (GIRLS, BOYS, FEMALE_ANIMALS, MALE_ANIMALS) if one.word in group)
    return _question(told, again, one, _another(names, told, index))


def _speaker(told: Story, index: int) -> Question | None:
    del index
    known: dict[str, _Mention] = {}
    for mention in _mentions(told, "name.girl", "name.boy"):
        if len(known) == 2 and mention.word in known and _SAID.search(told.text[: mention.start].rstrip(" ")):
            return _question(told, mention, known[mention.word], next(word for word in known if word != mention.word))
        known.setdefault(mention.word, mention)
    return None


def _animal(told: Story, index: int) -> Question | None:
    one, *others = _mentions(told, "mention.creature") or [_Mention("", 0, 0)]
    again = next((mention for mention in others if mention.word == one.word), None)
    return None if again is None else _question(told, again, one, _another(CREATURES, told, index))


def _mentions(told: Story, *concepts: str) -> list[_Mention]:
    spans = [span for span in told.spans() if span.concepts & set(concepts)]
    return [_Mention(told.text[span.start : span.end].strip(), span.start, span.end) for span in spans]


def _question(told: Story, again: _Mention, source: _Mention, wrong: str) -> Question | None:
    """Return the question; None if no space stands before the word."""
    before = told.text[: again.start]
    return Question(before[:-1], f" {again.word}", f" {wrong}", source.end) if before.endswith(" ") else None


def _another(words: tuple[str, ...], told: Story, index: int) -> str:
    """Return one of the words that the story does not contain."""
    others = [word for word in words if word not in told.text]
    return others[index % len(others)]
