"""The names of plots, roles and concepts, and sets of concepts as bits of an integer.

The index of a concept in `CONCEPTS` is its column in `labels`. `mask` and `names` are inverse. The files in grammar/
decide which words and passages have a concept (for single words, grammar/lexicon.txt).
"""

from __future__ import annotations

import functools

PLOTS = {
    "lost": "something dear is lost and found",
    "broken": "something is broken and mended",
    "stuck": "a small animal is stuck and set free",
    "sharing": "something good is kept, then shared",
    "fear": "a noise at night turns out to be a small animal",
    "astray": "the two lose their way and are led home",
    "skill": "something is too hard, then learned",
    "gift": "a birthday gift goes wrong, and one made by hand is better",
    "storm": "bad weather spoils a plan, and a shelter saves the day",
    "forbidden": "a rule is broken and the truth told",
    "newcomer": "a stranger becomes a friend",
    "planting": "a seed needs patience",
    "race": "a race is given up to help",
}
"""Plots by name; the grammar file of the same name defines the plot. Their order affects the story of a seed."""
ROLES = {"H": "hero", "F": "friend", "A": "helper"}
"""Roles by their letter in the grammar."""
OTHER = "X"
"""Letter in the grammar of any other speaker or listener."""

_WORDS = {
    "color": "a color: red, brown",
    "size": "a size: tiny, tall",
    "quality": "what a thing is like: shiny, broken, warm",
    "trait": "what someone is like: kind, brave",
    "toy": "a toy or an instrument: kite, drum",
    "wearable": "something to wear: hat, scarf",
    "food": "something to eat or drink: cake, milk",
    "animal": "an animal: fox, snail",
    "plant": "a plant or a part of one: tree, leaf",
    "tool": "a tool or a material to mend with: rope, glue",
    "container": "what holds things: box, basket",
    "object": "a small thing: key, book",
    "nature": "something in the open air: hill, mud, stars",
    "grounds": "a place that people made in the open: park, farm",
    "building": "a building or a part of one: barn, door",
    "water": "a body of water: river, pond",
    "weather": "weather: rain, windy, cloud",
    "family": "a member of a family: mom, grandpa",
    "job": "someone's work: farmer, baker",
    "body": "a part of the body: eyes, feet",
    "time": "a time: morning, week, today",
    "number": "a number, except one: two, half, hundred",
    "motion": "a word of motion, in any sense: ran, climbed, fell",
    "speech": "saying something: said, whispered",
    "perception": "a word of perception, in any sense: saw, heard, looked",
    "thought": "thinking, knowing, wanting: remembered, wished",
    "making": "making or mending: made, painted",
    "giving": "giving, bringing, sharing: gave, brought",
    "helping": "helping: help, helped, saving",
    "music": "music and dance: song, danced",
    "negation": "a negation: not, never, nobody",
    "contrast": "the word but",
    "reason": "the word because",
    "and": "the word and",
    "the": "the definite article",
    "a": "the indefinite article",
    "preposition": "a preposition of place, in any sense: under, behind, over",
    "modal": "a modal verb: can, could, will, must",
    "polite": "polite words: please, thank, sorry",
    "question_word": "a question word: what, where, why, how",
    "joy": "a good feeling: happy, proud",
    "sadness": "sorrow: sad, lonely",
    "fear": "fear or worry: scared, afraid",
    "anger": "anger: angry, cross",
    "smile": "a good feeling that shows: smiled, hugged",
    "tears": "a word of crying, in any sense: cried, tears",
}
_STRUCTURE = {
    "name.girl": "the name of a girl or a female animal",
    "name.boy": "the name of a boy or a male animal",
    "name.new": "the first mention of the hero or friend by name",
    "name.called": "someone called by name, in speech",
    "mark.opening_quote": "an opening quotation mark",
    "mark.closing_quote": "a closing quotation mark",
    "mark.comma": "a comma",
    "mark.period": "a period",
    "mark.exclamation": "an exclamation mark",
    "mark.question": "a question mark",
    "mark.newline": "a line break between two phases",
    "sentence.first_word": "the first word of a sentence or of a quotation",
    "sentence.question": "inside a question",
    "dialogue": "between quotation marks",
    "pronoun.first": "a pronoun for the speaker, in speech: I, me, my",
    "pronoun.second": "a pronoun for the listener, in speech: you, your",
    "pronoun.third": "a pronoun for a character, a thing or an animal: he, she, it",
    "pronoun.plural": "a plural pronoun: we, us, they",
    "pronoun.female": "a female pronoun: she, her",
    "pronoun.male": "a male pronoun: he, him, his",
    "pronoun.neuter": "a pronoun for a thing or an animal: it, its",
    "feeling.good": "a word for a good feeling, or for what shows one: glad, smiled",
    "feeling.bad": "a word for a bad feeling, or for what shows one: sad, cried",
    "mention.thing": "the thing that the story turns on",
    "mention.creature": "the small animal that the story turns on",
    "mention.place": "the place where the story happens",
    "referent.thing": "it, for the thing that the story turns on",
    "referent.creature": "it, for the small animal that the story turns on",
    "referent.both": "we or they, for hero and friend or all together",
    "speaker.other": "said by the small animal or a passer-by",
    "hero.girl": "the hero is a girl (from the trouble phase on)",
    "hero.boy": "the hero is a boy (from the trouble phase on)",
    "hero.animal": "the hero is an animal (from the trouble phase on)",
}
_OF_ROLES = {
    "mention": "the {0}, by name or by what the {0} is",
    "referent": "a pronoun, of any person, for the {0}",
    "speaker": "said by the {0}",
    "listener": "said to the {0}",
}
PHASES = {
    "opening": "who the story is about",
    "trouble": "what happens, and the cause of the trouble",
    "attempt": "what is tried, in vain",
    "turn": "what changes it",
    "ending": "how it ends, and what is learned",
}
"""The phases of every story, in order; each is one paragraph."""

CONCEPTS: dict[str, str] = {
    **{f"word.{name}": text for name, text in _WORDS.items()},
    **_STRUCTURE,
    **{f"{kind}.{role}": text.format(role) for kind, text in _OF_ROLES.items() for role in ROLES.values()},
    **{f"phase.{name}": f"phase of the story: {text}" for name, text in PHASES.items()},
    **{f"plot.{name}": f"the plot, from the trouble phase on: {text}" for name, text in PLOTS.items()},
}
"""Description of each of the 109 concepts by its name, in the order of the columns of `labels`."""


@functools.cache
def mask(*concepts: str) -> int:
    """Return a set of concepts as an integer; bit `i` is the i-th of `CONCEPTS`."""
    return sum(1 << _column(name) for name in set(concepts))


@functools.cache
def names(concepts: int) -> frozenset[str]:
    """Return the names of the concepts in a set made by `mask`."""
    return frozenset(name for column, name in enumerate(CONCEPTS) if concepts >> column & 1)


def _column(name: str) -> int:
    if name not in CONCEPTS:
        raise ValueError(f"{name!r} is not a concept; all are in storyworld.CONCEPTS.")
    return list(CONCEPTS).index(name)
