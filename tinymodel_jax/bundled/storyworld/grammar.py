"""The story grammar: templates read from grammar/*.txt.

    = rule                      a rule; each line after it is one of its alternatives, all equally likely
    [red|blue]                  one of these, equally likely; may contain anything a line may
    {rule}  {T}  {^T}           a rule (lower case); the content of slot T (upper case); the same, capitalized
    {T:=[ball|kite]}            fill slot T without adding text
    "H>F:Hello, {F}!"           speech: said by H (hero) to F (friend); A is the helper, X anyone else

A plot's file has a rule `cast`, which fills slots, and a rule for each phase. Its rules override shared rules of the
same name. Words in grammar/synonyms.txt are interchangeable; words in grammar/lexicon.txt always have concepts.

Every piece of text comes with its concepts. A mistake in a grammar file raises an error that quotes it.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tinymodel_jax.bundled.storyworld.concepts import OTHER, PHASES, ROLES, mask
from tinymodel_jax.bundled.storyworld.parts import Fill, Fixed, Part, Piece, Slot, choice, joined

_FOLDER = Path(__file__).parent / "grammar"
_SLOT_CONCEPTS = {
    **dict.fromkeys(("T", "Seed", "Plant", "Made"), "mention.thing"),
    "C": "mention.creature",
    "P": "mention.place",
}
_FIRST_PERSON = {"i", "me", "my", "mine", "i'm", "i'll", "i've"}
_SECOND_PERSON = {"you", "your", "yours", "you're"}
_PLURAL = {"we", "us", "our", "they", "them", "their", "let's", "we're", "we'll"}
_WORDS = re.compile(r"[A-Za-z]+(?:'[a-z]+)?|[^A-Za-z]+")
_LETTERS = "".join(ROLES) + OTHER
_SPEECH = re.compile(rf'"([{_LETTERS}])>([{_LETTERS}]):')
_BRACES = re.compile(r"\{(\^?)([A-Za-z][\w.]*)(:=|\})")


class _Speech(NamedTuple):
    """The speaker and the listener of the text that is being read; None outside of speech."""

    speaker: str | None = None
    listener: str | None = None

    def concepts(self) -> int:
        """Return the concepts of everything that is said."""
        if self.speaker is None:
            return 0
        found = ["dialogue", f"speaker.{ROLES.get(self.speaker, 'other')}"]
        if self.listener in ROLES:
            found.append(f"listener.{ROLES[self.listener]}")
        return mask(*found)


@functools.cache
def plot_phases(plot: str) -> tuple[tuple[Part, ...], ...]:
    """Return the parts of a plot's casting, which has no text, then those of each of `PHASES`."""
    reader = _Reader(read_rules("shared.txt") | read_rules(f"{plot}.txt"))
    return tuple(reader.rule(name, _Speech()) for name in ("cast", *PHASES))


@functools.cache
def lexicon() -> dict[str, int]:
    """Return the concepts of every word of the lexicon, in lower case."""
    found: dict[str, int] = {}
    for concept, lines in read_rules("lexicon.txt").items():
        for word in " ".join(lines).split():
            found[word] = found.get(word, 0) | mask(concept)
    return found


def read_rules(file: str) -> dict[str, list[str]]:
    """Return the rules of a file in grammar/: their lines by name.

    Raises:
        ValueError: a line comes before the first rule, or two rules share a name.
    """
    rules: dict[str, list[str]] = {}
    name = None
    for line in (_FOLDER / file).read_text("utf-8").splitlines():
        if line.startswith("= "):
            name = line.removeprefix("= ")
            if name in rules:
                raise ValueError(f"{file}: the rule {name!r} is defined twice.")
            rules[name] = []
        elif line and not line.startswith("#"):
            if name is None:
                raise ValueError(f"{file}: {line!r} comes before the first rule.")
            rules[name].append(line)
    return rules


def grammar_digest() -> str:
    """Return the SHA-256 of the grammar's files."""
    whole = hashlib.sha256()
    for path in sorted(_FOLDER.glob("*.txt")):
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


class _Reader:
    """Parses templates into parts, with the rules of one plot."""

    def __init__(self, rules: dict[str, list[str]]):
        self._rules = rules
        self._done: dict[tuple[str, _Speech], tuple[Part, ...]] = {}

    def rule(self, name: str, speech: _Speech) -> tuple[Part, ...]:
        """Return the parts of a rule, when said as part of `speech`."""
        if name not in self._rules:
            raise ValueError(f"the grammar has no rule {name!r}.")
        if (name, speech) not in self._done:
            options = [self._sequence(line, 0, "", speech)[0] for line in self._rules[name]]
            self._done[name, speech] = choice(options)
        return self._done[name, speech]

    def _sequence(self, text: str, at: int, stops: str, speech: _Speech) -> tuple[tuple[Part, ...], int]:
        """Parse from `at` up to a character in `stops`; return the parts and the index of that character."""
        parts: list[Part] = []
        while at < len(text) and text[at] not in stops:
            if text[at] == "[":
                found, at = self._inline_choice(text, at, speech)
            elif text[at] == "{":
                found, at = self._braces(text, at, speech)
            elif text[at] == '"':
                found, at = self._quotation(text, at)
            else:
                end = next((i for i in range(at, len(text)) if text[i] in '[{"' + stops), len(text))
                found, at = _words(text[at:end], speech), end
            parts += found
        if stops and at == len(text):
            raise ValueError(f"the grammar's line {text!r} lacks one of {stops!r}.")
        return joined(parts), at

    def _inline_choice(self, text: str, at: int, speech: _Speech) -> tuple[tuple[Part, ...], int]:
        options = []
        while text[at] != "]":
            option, at = self._sequence(text, at + 1, "|]", speech)
            options.append(option)
        return choice(options), at + 1

    def _braces(self, text: str, at: int, speech: _Speech) -> tuple[tuple[Part, ...], int]:
        match = _BRACES.match(text, at)
        if match is None:
            raise ValueError(f"the grammar's line {text!r} has braces without a name: {text[at : at + 20]!r}.")
        capital, name, after = match.groups()
        if after == ":=":
            parts, end = self._sequence(text, match.end(), "}", _Speech())
            concept = _SLOT_CONCEPTS.get(name)
            return (Fill(name, parts, mask(concept) if concept else 0),), end + 1
        if name[0].islower():
            return self.rule(name, speech), match.end()
        concepts = speech.concepts()
        if speech.listener and name in (speech.listener, f"{speech.listener}.voc"):
            concepts |= mask("name.called")
        return (Slot(name, bool(capital), concepts),), match.end()

    def _quotation(self, text: str, at: int) -> tuple[tuple[Part, ...], int]:
        match = _SPEECH.match(text, at)
        if match is None:
            raise ValueError(f"the grammar's line {text!r} has a quotation without a speaker: {text[at : at + 20]!r}.")
        said, end = self._sequence(text, match.end(), '"', _Speech(*match.groups()))
        mark = Fixed((('"', 0),))
        return (mark, *said, mark), end + 1


@functools.cache
def _synonyms() -> tuple[re.Pattern[str], dict[str, list[str]]]:
    """Return a pattern that matches phrases with synonyms, and the synonyms of each phrase, including itself."""
    groups = [line.split("|") for line in read_rules("synonyms.txt")["synonyms"]]
    group_of = {phrase.lower(): group for group in groups for phrase in group}
    # A contraction cannot end a clause: "Yes, I will." never becomes "Yes, I'll."
    contracts = {phrase for phrase, group in group_of.items() if any("'" in other for other in group)}
    longest_first = sorted(group_of, key=len, reverse=True)
    phrases = "|".join(phrase + ("(?= )" if phrase in contracts else "") for phrase in longest_first)
    return re.compile(rf"(?<![\w'])({phrases})(?![\w'])", re.IGNORECASE), group_of


def _words(text: str, speech: _Speech) -> tuple[Part, ...]:
    """Return the parts of a text, each phrase unchanged or replaced by a synonym."""
    pattern, group_of = _synonyms()
    parts: list[Part] = []
    # Every second substring is a match of the pattern.
    for number, phrase in enumerate(pattern.split(text)):
        phrases: Sequence[str] = group_of[phrase.lower()] if number % 2 else (phrase,)
        if number % 2 and phrase[0].isupper():
            phrases = [one[0].upper() + one[1:] for one in phrases]
        parts += choice([(_fixed(one, speech),) for one in phrases])
    return tuple(parts)


def _fixed(text: str, speech: _Speech) -> Fixed:
    """Return a text as pieces, joining neighbouring words with the same concepts."""
    pieces: list[Piece] = []
    for word in _WORDS.findall(text):
        concepts = lexicon().get(word.lower(), 0) | speech.concepts() | _person(word.lower(), speech)
        if pieces and pieces[-1][1] == concepts:
            pieces[-1] = (pieces[-1][0] + word, concepts)
        else:
            pieces.append((word, concepts))
    return Fixed(tuple(pieces))


def _person(word: str, speech: _Speech) -> int:
    """Return the concepts of a word as a pronoun of the first or second person or the plural; 0 if it is none."""
    if word in _PLURAL:
        return mask("pronoun.plural", "referent.both")
    for words, person, who in (
        (_FIRST_PERSON, "first", speech.speaker),
        (_SECOND_PERSON, "second", speech.listener),
    ):
        if word in words and who is not None:
            return mask(f"pronoun.{person}", *([f"referent.{ROLES[who]}"] if who in ROLES else []))
    return 0
