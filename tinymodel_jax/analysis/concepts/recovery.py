"""Which of the story world's concepts the dictionaries of a language model found.

The concepts that hold at every token are known (`bundled.storyworld`), so the features of a dictionary can be scored
against them. Scores of MLP neurons and of random directions show what the dictionary adds. Stories are split: the first
half chooses units and thresholds, and the second half scores them.

All devices of all processes are used. Each process runs the model on a part of the stories; all then have the
activations of all stories, and each scores a part of the units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from tinymodel_jax.analysis.concepts import labels
from tinymodel_jax.analysis.concepts.labels import ChosenUnits, ConceptScores, best_of, choose_units
from tinymodel_jax.analysis.report.charts import heat_map_figure, save_figure
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.config import split_hooks
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.lm.collection import collect_activations
from tinymodel_jax.model.hook_points import as_names
from tinymodel_jax.model.padding import pad_below
from tinymodel_jax.runtime.collectives import gathered, on_all
from tinymodel_jax.runtime.progress import Track, no_progress
from tinymodel_jax.runtime.rows import row_devices, share
from tinymodel_jax.text.prompts_and_stories import story_rows

ENCODED_TOGETHER = 4096
"""Features whose activations are computed together."""

Kind = Literal["dictionary", "neurons", "random directions"]


class Recovery(NamedTuple):
    """How well the units of one dictionary or baseline predict the concepts."""

    name: str
    """`M1` or the name given to the dictionary; for baselines `neurons 1` or `random M1`."""
    kind: Kind
    """One of "dictionary", "neurons" and "random directions"."""
    layer: int
    """Layer of the site, counted from 0."""
    n_units: int
    """Number of units that were scored."""
    scores: ConceptScores
    """In the order of `storyworld.CONCEPTS`."""


class _Units(NamedTuple):
    """Units to score."""

    name: str
    kind: Kind
    site: Site
    n: int
    activations: Callable[[_Half, slice], np.ndarray]
    """Computes the activations of some of the units, (positions, units), from those that the model gave."""


class _Half(NamedTuple):
    """Half of the stories: what the model computes at each token of text, and the concepts that hold there."""

    acts: dict[str, Float[np.ndarray, "positions width"]]
    truth: Bool[np.ndarray, "positions concepts"]


def recover_concepts(
    lm: TinyModel,
    stories: Iterable[storyworld.Story],
    dictionaries: str | Sequence[str] | Mapping[str, Dictionary] | None = None,
    *,
    baselines: bool = True,
    seed: int = 0,
    track: Track = no_progress,
) -> list[Recovery]:
    """Score the best single feature of each dictionary for each concept.

    Args:
        lm: a model whose tokenizer covers the characters of the stories, such as `TinyModel("mini")`.
        stories: stories of the story world; a hundred hold about 20,000 tokens. Special tokens do not count.
        dictionaries: one tag or several, or dictionaries by name, at any sites of the model. None takes all
            dictionaries of the model.
        baselines: also score the MLP neurons of the same layers, and as many random directions at each dictionary's
            input as it has features (once for dictionaries that share input and size).
        seed: seed of the random directions.
        track: wraps the iterator over dictionaries and baselines, for example with a progress bar.

    Raises:
        ValueError: there are fewer than two stories, a site has no dictionary, a tag names a feature, a dictionary
            does not fit the model, or the tokenizer does not fit the stories.

    Examples:
        >>> from tinymodel_jax.bundled import storyworld
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import recovery
        >>> lm = TinyModel("mini")
        >>> told = list(storyworld.stories(seed=1, count=8))
        >>> (found,) = recovery.recover_concepts(lm, told, "M1", baselines=False)
        >>> found.name, found.n_units, found.scores.f1.shape == (len(storyworld.CONCEPTS),)
        ('M1', 511, True)
    """
    told = list(stories)
    if len(told) < 2:
        raise ValueError(
            f"recover_concepts takes at least two stories, got {len(told)}: half of them choose the units."
        )
    readers = _readers(lm, lm.dictionary_tags if dictionaries is None else dictionaries)
    layers = sorted({reader.site.layer for reader in readers.values()})
    neurons = {layer: f"blocks.{layer}.mlp.hook_post" for layer in layers if baselines}
    names = {name for reader in readers.values() for name in split_hooks(reader.site.hook_in)} | set(neurons.values())
    middle = len(told) // 2
    choosing, scoring = (_read(lm, half, tuple(sorted(names))) for half in (told[:middle], told[middle:]))
    units = list(_units_of(lm, readers, neurons, seed if baselines else None))
    return [_scored(one, choosing, scoring) for one in track(units, "scoring")]


def n_found(recovery: Recovery, f1: float = 0.8) -> int:
    """Return the number of concepts for which a unit has at least this F1.

    Args:
        recovery: one of the results of `recover_concepts`.
        f1: smallest F1 that counts, between 0 and 1.

    Examples:
        >>> from tinymodel_jax.bundled import storyworld
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import recovery
        >>> lm = TinyModel("mini")
        >>> told = storyworld.stories(1, 8)
        >>> (found,) = recovery.recover_concepts(lm, told, "M1", baselines=False)
        >>> 0 < recovery.n_found(found, f1=0.9) <= recovery.n_found(found)
        True
    """
    return int(np.sum(recovery.scores.f1 >= f1))


def concept_records(recoveries: Sequence[Recovery]) -> list[dict[str, object]]:
    """Return a record for each recovery and concept, for JSON or a table. NaN becomes None.

    Args:
        recoveries: results of `recover_concepts`.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import recovery
        >>> from tinymodel_jax.bundled import storyworld
        >>> lm, told = TinyModel("mini"), storyworld.stories(seed=0, count=8)
        >>> found = recovery.recover_concepts(lm, told, "M2", baselines=False)
        >>> recovery.concept_records(found)[0]["concept"]
        'word.color'
    """
    rows: list[dict[str, object]] = []
    for recovery in recoveries:
        scores = recovery.scores
        for column, concept in enumerate(storyworld.CONCEPTS):
            numbers = {
                "share": scores.share[column],
                "f1": scores.f1[column],
                "chance_f1": scores.chance_f1[column],
                "auc": scores.auc[column],
            }
            rows.append(
                {
                    "place": recovery.name,
                    "kind": recovery.kind,
                    "layer": recovery.layer,
                    "concept": concept,
                    **{key: None if np.isnan(value) else round(float(value), 4) for key, value in numbers.items()},
                    "f1_unit": int(scores.f1_unit[column]),
                    "auc_unit": int(scores.auc_unit[column]),
                }
            )
    return rows


def concept_table(
    recoveries: Sequence[Recovery],
) -> tuple[Float[np.ndarray, "concepts recoveries"], list[str], list[str]]:
    """Return the F1 of every concept in every recovery, best concepts first, and the names of both.

    Concepts that hold nowhere in the scored stories have no F1 and are left out.

    Args:
        recoveries: results of `recover_concepts`.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import recovery
        >>> from tinymodel_jax.bundled import storyworld
        >>> lm, told = TinyModel("mini"), storyworld.stories(seed=0, count=8)
        >>> found = recovery.recover_concepts(lm, told, "M2", baselines=False)
        >>> f1, concepts, names = recovery.concept_table(found)
        >>> f1.shape == (len(concepts), len(names))
        True
    """
    table = np.stack([recovery.scores.f1 for recovery in recoveries], axis=1)
    order = np.argsort(-np.nan_to_num(table).max(axis=1), kind="stable")
    order = order[~np.isnan(table[order]).all(axis=1)]
    names = list(storyworld.CONCEPTS)
    return table[order], [names[row] for row in order], [recovery.name for recovery in recoveries]


def plot_concepts(recoveries: Sequence[Recovery], path: Path) -> None:
    """Draw the F1 of every concept (rows) in every recovery (columns) as a heat map, as PNG.

    Args:
        recoveries: results of `recover_concepts`.
        path: the file to write.

    Raises:
        OSError: the file cannot be written.

    Examples:
        >>> import pathlib, tempfile
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import recovery
        >>> from tinymodel_jax.bundled import storyworld
        >>> lm, told = TinyModel("mini"), storyworld.stories(seed=0, count=8)
        >>> found = recovery.recover_concepts(lm, told, "M2", baselines=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     recovery.plot_concepts(found, pathlib.Path(folder) / "concepts.png")
    """
    save_figure(heat_map_figure(*concept_table(recoveries)), path, dpi=130)


def _readers(lm: TinyModel, dictionaries: str | Sequence[str] | Mapping[str, Dictionary]) -> dict[str, FeatureReader]:
    if not isinstance(dictionaries, Mapping):
        sites = [Site.whole(tag) for tag in as_names(dictionaries)]
        return {site.tag: lm[site.tag] for site in sites}
    return {name: FeatureReader.of(lm, dictionary) for name, dictionary in dictionaries.items()}


def _read(lm: TinyModel, told: Sequence[storyworld.Story], names: tuple[str, ...]) -> _Half:
    """Return activations and concepts at every text token of the stories, of which each process reads a part."""
    if len(told) < jax.process_count():
        return _read_all(lm, told, names)
    mine = on_all(lambda: _read_all(lm, told[share(len(told))], names))
    acts = {name: np.concatenate(gathered(mine.acts[name])) for name in names}
    return _Half(acts, np.concatenate(gathered(mine.truth)))


def _read_all(lm: TinyModel, told: Sequence[storyworld.Story], names: tuple[str, ...]) -> _Half:
    config, tokenizer = lm.config, lm.tokenizer
    tok_ids = story_rows(tokenizer, [story.text for story in told], config.n_ctx)
    truth = storyworld.labels(told, tokenizer, width=tok_ids.shape[1], max_length=config.n_ctx)
    found = collect_activations(lm, tok_ids, names)
    text = config.is_text(found.tok_id)
    truth = truth[found.row, found.position]
    return _Half({name: acts[text] for name, acts in found.acts.items()}, truth[text])


def _units_of(
    lm: TinyModel, readers: Mapping[str, FeatureReader], neurons: dict[int, str], seed: int | None
) -> Iterator[_Units]:
    """Yield the units to score: dictionaries, each with random directions if there is a seed, then neurons."""
    drawn = set()
    for name, reader in readers.items():
        n_features = reader.dictionary.config.n_features
        site, size = reader.site, (reader.site.hook_in, n_features)
        yield _Units(name, "dictionary", site, n_features, partial(_encoded, reader))
        if seed is not None and size not in drawn:
            drawn.add(size)
            yield _Units(f"random {name}", "random directions", site, n_features, partial(_projected, reader, seed))
    for layer, name in neurons.items():
        yield _Units(
            f"neurons {layer}",
            "neurons",
            Site("M", layer),
            lm.config.d_mlp,
            lambda half, part, name=name: half.acts[name][:, part],
        )


def _encoded(reader: FeatureReader, half: _Half, units: slice) -> np.ndarray:
    devices, x = row_devices(reader.dictionary), _input(reader, half)
    dictionary = devices.shared(reader.dictionary)
    spread = jnp.asarray(devices.rows(pad_below(x, len(x) + -len(x) % devices.n, 0)))
    starts = range(units.start, units.stop, ENCODED_TOGETHER)
    slices = (slice(start, min(start + ENCODED_TOGETHER, units.stop)) for start in starts)
    parts = [np.asarray(dictionary.encode(spread, features))[: len(x)] for features in slices]
    return np.concatenate(parts, axis=1)


def _projected(reader: FeatureReader, seed: int, half: _Half, units: slice) -> np.ndarray:
    """Return projections on as many random directions as there are features, the same for each half."""
    config = reader.dictionary.config
    directions = np.random.default_rng(seed).normal(size=(config.d_in, config.n_features)).astype(np.float32)
    return _input(reader, half) @ directions[:, units]


def _input(reader: FeatureReader, half: _Half) -> np.ndarray:
    """Return what a dictionary reads; several hook points' vectors are concatenated."""
    return np.concatenate([half.acts[name] for name in split_hooks(reader.site.hook_in)], axis=-1)


def _part(n_units: int) -> slice:
    """Return this process's part: whole chunks, so that ties go to the same unit as in one process.

    Where there are fewer chunks than processes, all of them take all units.
    """
    n_chunks = -(-n_units // labels.CHUNK)
    mine = share(n_chunks) if n_chunks >= jax.process_count() else slice(0, n_chunks)
    return slice(mine.start * labels.CHUNK, min(mine.stop * labels.CHUNK, n_units))


def _scored(units: _Units, choosing: _Half, scoring: _Half) -> Recovery:
    """Score the units, of which each process takes a part."""
    mine = _part(units.n)
    chosen_on, scored_on = units.activations(choosing, mine), units.activations(scoring, mine)
    part = choose_units(chosen_on, choosing.truth, scored_on, scoring.truth, mine.start)
    parts = [ChosenUnits(*arrays) for arrays in np.concatenate(gathered(np.stack(part)[None]))]
    scores = best_of(parts, scoring.truth)
    return Recovery(units.name, units.kind, units.site.layer, units.n, scores)
