"""The steps of `tinymodel dashboard`: measuring a dictionary, writing its pages, and writing those of a set."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinymodel_jax.analysis.effects.importance import causal_importance
from tinymodel_jax.analysis.effects.stream_entry import has_entry
from tinymodel_jax.analysis.report.dashboard import build, folders, sets
from tinymodel_jax.analysis.report.dashboard.build import Heading, LinkedTokens
from tinymodel_jax.analysis.report.dashboard.records import Facts
from tinymodel_jax.analysis.search.feature_queries import concept_f1, token_texts
from tinymodel_jax.bundled.storyworld import CONCEPTS
from tinymodel_jax.commands.inputs import storyworld_truth
from tinymodel_jax.commands.top import search
from tinymodel_jax.config import split_hooks
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.runtime.progress import with_progress


class Place(NamedTuple):
    """A dictionary of which pages are made, and how they name it."""

    reader: FeatureReader
    about: str
    """`Heading.about`."""
    setup: tuple[str, ...]
    """`Heading.setup`."""

    @property
    def tag(self) -> str:
        """The dictionary's tag."""
        return self.reader.site.tag

    @property
    def heading(self) -> Heading:
        """The text of the pages' header."""
        return Heading(f"{self.reader.lm!r}", self.tag, self.about, self.setup)


class Clock:
    """Measures how long each kind of work takes, in seconds, and shows its progress."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.of = ""
        """Name of the dictionary that is worked on, in front of the kind of work; empty if there is only one."""

    def track(self, things: Sequence[Any], what: str) -> Iterator[Any]:
        """Yield things, and add the time until the last is done to the work `what`."""
        started = time.monotonic()
        yield from with_progress(things, f"{self.of} {what}".strip())
        self.seconds[what] = self.seconds.get(what, 0) + time.monotonic() - started

    def rounded(self) -> dict[str, float]:
        """Return the seconds of `all` work, and of each kind."""
        seconds = {"all": time.monotonic() - self.started, **self.seconds}
        return {name: round(value, 1) for name, value in seconds.items()}


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured."""

    lm: TinyModel
    rows: np.ndarray
    n_stories: int | None
    """Number of stories of the story world that the rows hold; None for other data."""
    effect_rows: np.ndarray
    """Rows on which every feature is turned off; without rows, effects are left out."""
    texts: Sequence[list[int]]
    """Token ids of the texts that get a page."""
    linked: Sequence[str]
    """Tags of the dictionaries in which upstream and downstream features are looked for."""
    clock: Clock

    def measure(self, reader: FeatureReader, folder: Path) -> Facts:
        """Return what the pages of a dictionary show, without links; the folder holds the work files."""
        track = self.clock.track
        found = search(reader, self.rows, folder / folders.SEARCH, track=track)
        facts = build.gather(reader, self.rows, found, track)
        if self.n_stories is not None:
            truth = storyworld_truth(self.lm, self.rows, self.n_stories)
            facts = dataclasses.replace(facts, f1=concept_f1(reader, self.rows, truth, track=track))
        if not len(self.effect_rows):
            return facts
        if not all(map(has_entry, split_hooks(hook_out := reader.dictionary.config.hook_out))):
            reason = f"Effects are left out: {hook_out} is neither the residual stream nor added to it."
            return dataclasses.replace(facts, left_out=(*facts.left_out, reason))
        work_file = folder / folders.EFFECTS
        importance = causal_importance(self.lm, reader.site.tag, self.effect_rows, work_file=work_file, track=track)
        return dataclasses.replace(facts, importance=importance)

    def write(self, place: Place, folder: Path) -> None:
        """Measure a dictionary and write its data files, without links."""
        facts, track = self.measure(place.reader, folder), self.clock.track
        texts = build.text_records(place.reader, self.texts, track)
        concepts = {} if self.n_stories is None else CONCEPTS
        vocabulary, config = token_texts(self.lm), self.lm.config
        build.write_measured(folder, place.heading, facts, self.rows, vocabulary, config, concepts, texts, track)

    def links(self, tag: str, promoted: Callable[[str], np.ndarray]) -> LinkedTokens:
        """Return the links of a dictionary's features."""
        others = [other for other in self.linked if other != tag]
        return build.gather_links(self.lm, tag, others, promoted, self.clock.track)

    def promoted(self) -> Callable[[str], np.ndarray]:
        """Return a function of a tag, which gives the tokens that each feature promotes, and computes them once."""
        return functools.cache(functools.partial(build.promoted_tokens, self.lm))

    def key(self, place: Place) -> dict[str, Any]:
        """Return what the data files of a dictionary depend on."""
        inputs = (self.rows, self.texts, self.effect_rows, self.n_stories is not None)
        return sets.measured_key(place.reader, place.setup, *inputs)


def build_one(work: Work, place: Place, out: Path) -> dict[str, int]:
    """Write the pages of one dictionary; return its number of features by its tag.

    Raises:
        OtherWorkError: there is unfinished work with other options.
    """
    n_features = place.reader.dictionary.config.n_features
    partial = folders.open_partial(out)
    work.write(place, partial)
    build.write_links(partial, work.links(place.tag, work.promoted()), n_features, work.clock.track)
    build.write_front(partial, place.heading)
    folders.publish(partial, out)
    return {place.tag: n_features}


def build_set(work: Work, places: Sequence[Place], out: Path) -> dict[str, int]:
    """Write pages of several dictionaries that link to each other; return their numbers of features by their tags.

    Raises:
        OtherWorkError: there is unfinished work with other options.
    """
    tags = [place.tag for place in places]
    partial = folders.open_partial(out, tags)
    for place in places:
        folder, key = partial / place.tag, work.key(place)
        folder.mkdir(exist_ok=True)
        work.clock.of = place.tag
        if not sets.has_measured(folder, key, out / place.tag):
            work.write(place, folder)
            sets.finish_measured(folder, key)
    promoted, members = work.promoted(), {}
    for place in places:
        work.clock.of, config = place.tag, place.reader.dictionary.config
        member = sets.Member(place.heading, config, work.links(place.tag, promoted))
        build.write_links(partial / place.tag, member.links, config.n_features, work.clock.track)
        build.write_front(partial / place.tag, place.heading, tags)
        members[place.tag] = member
    sets.write_set_page(partial, members)
    folders.publish(partial, out)
    return {tag: member.config.n_features for tag, member in members.items()}
