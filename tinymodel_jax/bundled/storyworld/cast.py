"""The characters of a story, and every form in which a story may mention them.

Hero and friend never share a name or, among animals, a species. Pronouns follow the character's sex. Where `her mom`
could be the hero's or the friend's, the hero's name replaces the pronoun.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from tinymodel_jax.bundled.storyworld.concepts import ROLES, mask
from tinymodel_jax.bundled.storyworld.grammar import lexicon
from tinymodel_jax.bundled.storyworld.parts import Draw, Slots

GIRLS = (
    *("Lily", "Mia", "Anna", "Sue", "Emma", "Lucy", "Sara", "Amy", "Ella", "Zoe", "Nina", "Kate"),
    *("Jane", "Molly", "Eva", "Lola", "Maya", "Nora", "Tina", "Mary", "Lena", "Ada", "Clara", "Sally"),
)
BOYS = (
    *("Tim", "Tom", "Ben", "Max", "Sam", "Jack", "Leo", "Bob", "Joe", "Dan", "Finn", "Luke"),
    *("Noah", "Adam", "Peter", "Billy", "Jake", "Mike", "Owen", "Paul", "Theo", "Fred", "Hugo", "Andy"),
)
FEMALE_ANIMALS = ("Coco", "Misty", "Cleo", "Dot", "Lulu", "Kiki", "Fifi", "Nala", "Mimi", "Tilly")
MALE_ANIMALS = ("Rusty", "Bruno", "Milo", "Rocky", "Ziggy", "Toto", "Pip", "Momo", "Gus", "Bobo")
NAMES = frozenset({*GIRLS, *BOYS, *FEMALE_ANIMALS, *MALE_ANIMALS})
SPECIES = (
    *("fox", "rabbit", "bear", "mouse", "cat", "dog", "duck"),
    *("pig", "goat", "sheep", "pony", "deer", "wolf", "lion"),
)
FAMILY = (("mom", True), ("dad", False), ("grandma", True), ("grandpa", False))
"""Members of the hero's family, and whether they are female."""
JOBS = ("Farmer", "Baker", "Doctor", "Captain")
SURNAMES = ("Bell", "Lane", "Moss", "Reed", "Cole", "Nash", "Hill", "Webb")
WISE_SPECIES = ("owl", "turtle", "crow", "horse", "swan")

Option = TypeVar("Option")


class Character(NamedTuple):
    """The hero or the friend."""

    name: str
    female: bool
    kind: str
    """girl, boy, or a species."""


class Helper(NamedTuple):
    """The character who knows what to do."""

    name: str
    """A word of `FAMILY` or `WISE_SPECIES`, or a job and a surname."""
    female: bool


def cast_characters(draw: Draw) -> Character:
    """Draw hero, friend and helper, put every form of them into the draw's slots, and return the hero.

    The slots start with the letter of a role: `H` is the name, `H.new` the name at its first mention, `H.kind`, `H.he`,
    `H.him` and `H.his` are as they read, and `H.the` is a noun instead of the name. The helper also has `A.own`,
    `A.my`, `A.your`, `A.voc` (form of address) and `A.of` (possessive). `T.it` and `C.it` are pronouns for the thing
    and the small animal that the story is about, `O.it` and `O.them` for any others. An `it` that refers to nothing, as
    in "it rained", has no slot.
    """
    in_animal_world = _pick(draw, (False, False, True))
    hero = _character(draw, in_animal_world, None)
    friend = _character(draw, in_animal_world, hero)
    draw.slots |= _thing_forms() | _character_forms("H", hero) | _character_forms("F", friend)
    draw.slots |= _other_names(hero, friend)
    draw.slots |= _helper_forms(_helper(draw, in_animal_world), hero, by_name=hero.female == friend.female)
    return hero


def _pick(draw: Draw, options: Sequence[Option]) -> Option:
    draw.nats += math.log(len(options))
    return options[int(draw.random() * len(options))]


def _character(draw: Draw, animal: bool, other: Character | None) -> Character:
    """Draw a character whose name and species differ from those of `other`."""
    female = _pick(draw, (True, False))
    all_names = (FEMALE_ANIMALS if female else MALE_ANIMALS) if animal else GIRLS if female else BOYS
    name = _pick(draw, _without(all_names, other.name if other else ""))
    kind = _pick(draw, _without(SPECIES, other.kind if other else "")) if animal else "girl" if female else "boy"
    return Character(name, female, kind)


@functools.cache
def _without(options: tuple[str, ...], left_out: str) -> tuple[str, ...]:
    return tuple(option for option in options if option != left_out)


def _helper(draw: Draw, animal: bool) -> Helper:
    if _pick(draw, (True, False)):
        return Helper(*_pick(draw, FAMILY))
    female = _pick(draw, (True, False))
    return Helper(_pick(draw, WISE_SPECIES) if animal else f"{_pick(draw, JOBS)} {_pick(draw, SURNAMES)}", female)


def _pronouns(letter: str, female: bool) -> Slots:
    sex = "female" if female else "male"
    concepts = mask(f"referent.{ROLES[letter]}", "pronoun.third", f"pronoun.{sex}")
    he, him, his = ("she", "her", "her") if female else ("he", "him", "his")
    return {f"{letter}.{form}": ((word, concepts),) for form, word in (("he", he), ("him", him), ("his", his))}


@functools.cache
def _thing_forms() -> Slots:
    """Return the pronouns for the thing and the animal that the story is about, and for any others."""
    neuter = mask("pronoun.third", "pronoun.neuter")
    forms: Slots = {
        f"{letter}.{word}": ((word, neuter | mask(f"referent.{what}")),)
        for letter, what in (("T", "thing"), ("C", "creature"))
        for word in ("it", "its")
    }
    return {**forms, "O.it": (("it", neuter),), "O.them": (("them", mask("pronoun.plural")),)}


@functools.cache
def _character_forms(letter: str, character: Character) -> Slots:
    mention = mask(f"mention.{ROLES[letter]}")
    named = mention | mask("name.girl" if character.female else "name.boy")
    return {
        letter: ((character.name, named),),
        f"{letter}.new": ((character.name, named | mask("name.new")),),
        f"{letter}.kind": ((character.kind, mention | lexicon().get(character.kind, 0)),),
        **_pronouns(letter, character.female),
    }


@functools.cache
def _other_names(hero: Character, friend: Character) -> Slots:
    """Return nouns for hero and friend in place of their names: their kinds, if these differ."""
    the, hero_noun, friend_noun = ("the", lexicon()["the"]), mask("mention.hero"), mask("mention.friend")
    forms: Slots = {"F.noun": (("friend", friend_noun),)}
    if hero.kind == friend.kind:
        names = _character_forms("H", hero)
        forms["H.the"] = (("little ", hero_noun | lexicon()["little"]), *names["H"])
        forms["F.the"] = (*names["H.his"], (" friend", friend_noun))
    else:
        forms["H.the"] = (the, (f" {hero.kind}", hero_noun | lexicon().get(hero.kind, 0)))
        forms["F.the"] = (the, (f" {friend.kind}", friend_noun | lexicon().get(friend.kind, 0)))
    return forms


@functools.cache
def _helper_forms(helper: Helper, hero: Character, by_name: bool) -> Slots:
    """Return the forms of the helper, who may be a relative of the hero.

    Args:
        helper: the helper.
        hero: the hero, whose relative the helper may be.
        by_name: whether the hero's name must replace the possessive pronoun.
    """
    mention, the = mask("mention.helper"), ("the", lexicon()["the"])
    word, *surname = helper.name.split()
    first = (word, mention | lexicon().get(word.lower(), 0))
    called = (first[0].capitalize(), first[1])
    after = (f" {first[0].lower()}", first[1])
    if surname:
        plain = (first, (f" {surname[0]}", mention))  # a name, so Bell has no concept of the word bell
        forms: Slots = dict.fromkeys(("A", "A.own", "A.my", "A.your", "A.voc"), plain)
        forms["A.the"] = (the, after)
    elif helper in FAMILY:
        whose = _character_forms("H", hero)
        forms = {
            "A": (*whose["H"], ("'s", 0), after) if by_name else (*whose["H.his"], after),
            "A.own": (*whose["H.his"], after),
            "A.my": (("my", mask("pronoun.first", "referent.hero")), after),
            "A.your": (("your", mask("pronoun.second", "referent.hero")), after),
            **dict.fromkeys(("A.voc", "A.the"), (called,)),
        }
    else:
        forms = dict.fromkeys(("A", "A.own", "A.my", "A.your"), (the, (" old", mention | lexicon()["old"]), after))
        forms |= dict.fromkeys(("A.voc", "A.the"), (called,))
    return {**forms, "A.of": (*forms["A"], ("'s", 0)), **_pronouns("A", helper.female)}
