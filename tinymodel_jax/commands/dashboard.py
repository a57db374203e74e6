"""`tinymodel dashboard`: static pages about all features of a dictionary."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tinymodel_jax.bundled import STORY_WORLD
from tinymodel_jax.commands.frame import print_json
from tinymodel_jax.commands.inputs import open_rows, storyworld_truth, token_rows
from tinymodel_jax.commands.options import (
    ModelAndDictionary,
    ModelAndDictionaryOptions,
    make_output_folder,
    parse_sites,
)
from tinymodel_jax.commands.top import search
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.runtime.progress import with_progress

if TYPE_CHECKING:
    import numpy as np

    from tinymodel_jax.analysis.report.dashboard.records import Facts
    from tinymodel_jax.lm import FeatureReader, TinyModel


def dashboard(
    *,
    site: str,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    model: ModelAndDictionary = ModelAndDictionaryOptions("mini"),
    data: str = STORY_WORLD,
    limit: int = 200,
    others: Annotated[str, tyro.conf.arg(name="with")] = "",
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    effects: int = 0,
    json: bool = False,
) -> None:
    """Write pages about all features of a dictionary; open index.html in the folder, no server needed.

    If the command is stopped, run it again: it resumes the search and the measurement of effects.

    Args:
        site: tag of the dictionary, such as M2.
        out: folder for the pages; an older dashboard there is replaced.
        data: folder of `python -m train prepare`, file of stories (.jsonl, .txt, also .gz), or `storyworld`.
        limit: largest number of rows to read.
        others: dictionaries to search for upstream and downstream features, such as M0,M1; by default all.
        text: text to make a page about; can be given several times.
        effects: number of rows on which every feature is turned off to measure its effect; 0 leaves effects out.
        json: print a JSON object about the pages instead of a sentence.
    """
    place = Site.whole(site, "--site ")
    if effects < 0:
        raise ValueError(f"--effects {effects} must be 0 (none) or the number of rows to measure on.")
    make_output_folder("--out", out.absolute().parent)
    from tinymodel_jax.analysis.report.dashboard.build import open_partial, publish, text_records
    from tinymodel_jax.analysis.search.resumable import OtherWorkError
    from tinymodel_jax.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    lm = model.load_with_dictionary(place)
    reader = lm[place.tag]
    tags = _other_tags(lm, place, others)
    rows, texts = open_rows(lm, data, limit), [_encoded(lm, one) for one in text]
    measured = rows[(rows[:, 1:] != lm.config.pad_id).any(axis=1)][:effects]
    if len(measured) < effects:
        raise ValueError(
            f"--effects {effects}: {len(measured)} of the rows read have a token to predict; give at most that many, "
            "or a larger --limit."
        )
    clock = Clock()
    partial = open_partial(out)
    n_stories = limit if data == STORY_WORLD else None
    try:
        facts = _measure(reader, rows, tags, partial, n_stories, measured, clock)
    except OtherWorkError as error:
        raise ValueError(
            f"--out {out}: {partial} holds unfinished work on a dashboard with other options; give those options "
            "to resume it, or delete that folder to start again."
        ) from error
    records = text_records(reader, texts, clock.track)
    _write(reader, model.python(place), partial, facts, rows, data, records, clock)
    publish(partial, out)
    _report(out, reader, clock, json)


class Clock:
    """Measures how long each kind of work takes, in seconds, and shows its progress."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}

    def track(self, things: Sequence[Any], what: str) -> Iterator[Any]:
        """Yield things, and add the time until the last is done to the work `what`."""
        started = time.monotonic()
        yield from with_progress(things, what)
        self.seconds[what] = self.seconds.get(what, 0) + time.monotonic() - started


def _other_tags(lm: TinyModel, place: Site, others: str) -> list[str]:
    """Return the tags of the other dictionaries, checked and loaded."""
    tags = parse_sites("--with", others) or lm.dictionary_tags
    return [lm[tag].site.tag for tag in tags if tag != place.tag]


def _encoded(lm: TinyModel, text: str) -> list[int]:
    (ids,) = token_rows(lm, [text])
    if not 1 < len(ids) <= lm.config.n_ctx:
        raise ValueError(f"--text {text[:30]!r} has {len(ids) - 1} tokens; a page takes 1 to {lm.config.n_ctx - 1}.")
    return ids


def _measure(
    reader: FeatureReader,
    rows: np.ndarray,
    tags: Sequence[str],
    partial: Path,
    n_stories: int | None,
    measured: np.ndarray,
    clock: Clock,
) -> Facts:
    """Return what the pages show.

    Args:
        n_stories: number of stories of the story world that the rows hold; None for other data.
        measured: rows on which every feature is turned off; without rows, effects are left out.
    """
    from tinymodel_jax.analysis.effects.importance import causal_importance
    from tinymodel_jax.analysis.report.dashboard.build import EFFECTS, SEARCH, gather
    from tinymodel_jax.analysis.search.feature_queries import concept_f1

    found = search(reader, rows, partial / SEARCH, track=clock.track)
    facts = gather(reader, rows, found, tags, clock.track)
    if n_stories is not None:
        truth = storyworld_truth(reader.lm, rows, n_stories)
        f1 = concept_f1(reader, rows, truth, track=clock.track)
        facts = dataclasses.replace(facts, f1=f1)
    if len(measured):
        importance = causal_importance(
            reader.lm,
            reader.site.tag,
            measured,
            work_file=partial / EFFECTS,
            track=clock.track,
        )
        facts = dataclasses.replace(facts, importance=importance)
    return facts


def _write(
    reader: FeatureReader,
    setup: tuple[str, ...],
    partial: Path,
    facts: Facts,
    rows: np.ndarray,
    data: str,
    texts: list[dict[str, Any]],
    clock: Clock,
) -> None:
    from tinymodel_jax.analysis.report.dashboard.build import Heading, write_dashboard
    from tinymodel_jax.analysis.search.feature_queries import token_texts
    from tinymodel_jax.bundled.storyworld import CONCEPTS

    place, config = reader.site, reader.lm.config
    heading = Heading(f"{reader.lm!r}", place.tag, place.meaning, setup)
    concepts = CONCEPTS if data == STORY_WORLD else {}
    vocabulary = token_texts(reader.lm)
    write_dashboard(partial, heading, facts, rows, vocabulary, config, concepts, texts, clock.track)


def _report(out: Path, reader: FeatureReader, clock: Clock, json: bool) -> None:
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    record = {
        "page": str(out / "index.html"),
        "site": reader.site.tag,
        "n_features": reader.dictionary.config.n_features,
        "bytes": size,
        "seconds": {
            "all": round(time.monotonic() - clock.started, 1),
            **{name: round(value, 1) for name, value in clock.seconds.items()},
        },
    }
    if json:
        print_json(record)
        return
    steps = ", ".join(f"{name} {value:.1f}" for name, value in clock.seconds.items())
    print(
        f"{record['page']}: {record['n_features']:,} features of {record['site']}, {size / 1e6:.1f} MB, in "
        f"{record['seconds']['all']} s ({steps})"
    )
