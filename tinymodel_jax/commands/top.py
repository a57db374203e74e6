"""`tinymodel top`: the tokens that activate the features of a dictionary most."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymodel_jax.bundled import STORY_WORLD
from tinymodel_jax.commands.frame import print_json
from tinymodel_jax.commands.hosts import ONE_PROCESS, HostOptions, join, shows
from tinymodel_jax.commands.inputs import open_rows, require_data, storyworld_truth
from tinymodel_jax.commands.options import (
    ModelAndDictionary,
    ModelAndDictionaryOptions,
    OutFile,
    prepare_output,
    require_positive,
    work_file,
)
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.runtime.progress import Track, with_progress

if TYPE_CHECKING:
    import numpy as np

    from tinymodel_jax.analysis.search.top_activations import TopActivations
    from tinymodel_jax.lm import FeatureReader

CONTEXTS = 20
"""Top contexts per feature that a search keeps by default."""


def top(
    *,
    site: str,
    model: ModelAndDictionary = ModelAndDictionaryOptions("mini"),
    data: str = STORY_WORLD,
    limit: int = 200,
    feature: int | None = None,
    contains: str | None = None,
    concept: str | None = None,
    top: int = 10,
    out: OutFile = None,
    json: bool = False,
    hosts: HostOptions = ONE_PROCESS,
) -> None:
    """Find the tokens that activate each feature of a dictionary most, and list features or show one of them.

    Args:
        site: tag of the dictionary, such as M2; M2N123 means --site M2 --feature 123.
        data: folder of `python -m train prepare`, file of stories (.jsonl, .txt, also .gz), or `storyworld`.
        limit: largest number of rows to read.
        feature: show this feature: contexts, typical and large activations, histogram, logit effects, and the features
            active with it.
        contains: list features whose top contexts peak on this text, those with the largest share first.
        concept: list features by how well they detect this concept of the story world (F1 at the best threshold).
        top: number of features to list, or of contexts of the one feature to show.
        out: file for the result of the search; if it exists, it is read instead. A stopped search is resumed.
        json: print one JSON object per line.
        hosts: processes that take turns at the rows; each runs this same command, and the first prints and writes.
    """
    track = join(hosts)
    place, of_tag = Site.parse(site)
    if of_tag is not None and feature is not None:
        raise ValueError(f"--site {site} names a feature, and so does --feature {feature}; give one of them.")
    chosen = of_tag if feature is None else feature
    _check_options(site, top, limit, (chosen, contains, concept), data, concept)
    require_data(data)
    prepare_output("--out", out if shows(hosts) else None)
    from tinymodel_jax.commands import top_views as views
    from tinymodel_jax.dictionaries.dictionary import resolve_indices
    from tinymodel_jax.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    lm = model.load_with_dictionary(place)
    reader = lm[place.tag]
    if chosen is not None:
        chosen = int(resolve_indices(chosen, reader.dictionary.config.n_features))
    rows = open_rows(lm, data, limit)
    found = search(reader, rows, out, 1 if chosen is None else top, track)
    if not shows(hosts):
        return
    truth = storyworld_truth(lm, rows, limit) if data == STORY_WORLD else None
    if chosen is None:
        order, rank = views.ranked(reader, found, rows, truth, contains, concept)
        records = views.feature_records(reader, found, rows, truth, order[:top], rank)
        show: Any = functools.partial(views.print_features, rank=rank)
    else:
        records = [views.feature_record(reader, found, rows, truth, chosen, top)]
        show = views.print_feature
    if json:
        for record in records:
            print_json(record)
    else:
        show(found, records)


def search(
    reader: FeatureReader,
    rows: np.ndarray,
    out: Path | None,
    n_contexts: int = 1,
    track: Track = with_progress,
) -> TopActivations:
    """Return the result in a file, or search and write it; a stopped search is resumed.

    Args:
        out: the file, which `prepare_output` has checked.
        n_contexts: number of top contexts per feature that are needed; each comes from another row.
        track: wraps the iterator over batches.

    Raises:
        OtherWorkError: the file holds another search.
        ValueError: it is damaged, or has fewer contexts.
    """
    from tinymodel_jax.analysis.search.top_activations import top_activations
    from tinymodel_jax.runtime.collectives import is_first, of_first

    needed = min(n_contexts, len(rows))
    if out is not None and of_first(out.exists()):
        return _saved_search(reader, rows, out, needed)
    work = work_file(out)
    found = top_activations(
        reader.lm,
        reader.site.tag,
        rows,
        k=max(CONTEXTS, needed),
        work_file=work,
        track=track,
    )
    if out is not None and work is not None and is_first():
        found.save(out)
        work.unlink(missing_ok=True)  # last: until the result is written, this file is the only one
    return found


def _saved_search(reader: FeatureReader, rows: np.ndarray, out: Path, needed: int) -> TopActivations:
    from tinymodel_jax.analysis.search.resumable import OtherWorkError
    from tinymodel_jax.analysis.search.top_activations import load_top_activations, search_fingerprints
    from tinymodel_jax.runtime.collectives import on_all

    found = on_all(lambda: load_top_activations(out))
    now = {"tag": reader.site.tag, **search_fingerprints(reader, rows)}
    changed = {name for name, value in now.items() if getattr(found, name) != value}
    if changed:
        raise OtherWorkError(_other_search(out, found, changed, len(rows)))
    if (held := found.top.row.shape[1]) < needed:
        raise ValueError(
            f"--out {out} holds {held} contexts per feature, not {needed}; name another file, or delete it."
        )
    return found


def _other_search(out: Path, found: TopActivations, changed: set[str], n_rows: int) -> str:
    """Return what differs between the search in a file and the one that is asked for, and what to do."""
    differences = {
        "tag": f"of site {found.tag}",
        "data": f"of {found.n_rows:,} rows instead of {n_rows:,}" if found.n_rows != n_rows else "of other rows",
        "model": "of another model",
        "dictionary": "of another dictionary",
    }
    names = [name for name in differences if name in changed]
    what = ", ".join(differences[name] for name in names)
    same = f"give --limit {found.n_rows}, " if names == ["data"] and found.n_rows != n_rows else ""
    return f"--out {out} holds a search {what}; {same}name another file, or delete it."


def _check_options(site: str, top: int, limit: int, questions: tuple[Any, ...], data: str, concept: str | None) -> None:
    require_positive("--top", top)
    require_positive("--limit", limit)
    place, of_tag = Site.parse(site)
    ranking = next((name for name, text in zip(("contains", "concept"), questions[1:], strict=True) if text), None)
    if of_tag is not None and ranking is not None:
        asked = f"--{ranking} {shlex.quote(questions[1] or questions[2])}"
        raise ValueError(
            f"--site {site} shows one feature, and {asked} ranks them all; give --site {site}, or "
            f"--site {place.tag} {asked}."
        )
    if sum(question is not None for question in questions) > 1:
        raise ValueError("--feature, --contains and --concept cannot be combined; give one of them.")
    if questions[1] == "":
        raise ValueError('--contains "": give a text, such as " happy".')
    if concept is None:
        return
    from tinymodel_jax.bundled.storyworld import CONCEPTS

    if concept not in CONCEPTS:
        import difflib

        close = ", ".join(difflib.get_close_matches(concept, CONCEPTS, cutoff=0.3)) or "none"
        raise ValueError(
            f"--concept {concept} is not a concept of the story world. Closest: {close}. "
            "All: docs/concepts/story-world.md."
        )
    if data != STORY_WORLD:
        raise ValueError(f"--concept {concept}: only the story world's tokens have known concepts; leave --data out.")
