"""The content of a dashboard's data files: columns of the index, and records of features, their links, and texts.

All values are JSON values. Tokens are ids of the vocabulary; numbers have four significant digits, and effects in the
index six. Features that are never active have records like all others. The script of the pages
(analysis/report/templates/dashboard_*.js) reads these names.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, Integer

from tinymodel_jax.analysis.report.dashboard.weights_graph import Links, WeightsGraph
from tinymodel_jax.analysis.report.dashboard.windows import BANDS, BEFORE, OF_A_BAND, TOP, window_positions
from tinymodel_jax.analysis.search.contexts import Contexts
from tinymodel_jax.analysis.search.logit_effects import LogitEffects
from tinymodel_jax.analysis.search.top_activations import EDGES, QUANTILES, TopActivations
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.neighbours import Neighbours

if TYPE_CHECKING:
    from tinymodel_jax.analysis.effects.importance import CausalImportance

PEAKS, PROMOTED = 3, 3
"""Tokens per feature in the index: those that its top contexts peak on most often, and those that it promotes most."""
CONCEPTS = 3
"""Concepts that the page of a feature names."""
STRONGEST = 8
"""Features listed for each token of a text."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """Everything that the pages show about the features of one dictionary, except their links to other dictionaries."""

    found: TopActivations
    contexts: Contexts
    """`windows.shown_contexts`."""
    acts: Float[np.ndarray, "n_features contexts window"]
    """`windows.window_activations`."""
    logits: LogitEffects | None
    """Logit effects of all features, in order; None where the dictionary has none."""
    neighbours: Neighbours
    """The nearest features of each feature."""
    f1: Float[np.ndarray, "n_features concepts"] | None = None
    """F1 of each feature for each concept; None if the concepts of the tokens are not known."""
    importance: CausalImportance | None = None
    """Effects of turning each feature off; None if they were not measured."""
    left_out: tuple[str, ...] = ()
    """Sentences about what cannot be computed at the dictionary's place."""


def index_columns(facts: Facts, rows: Integer[np.ndarray, "rows seq"]) -> dict[str, list[Any]]:
    """Return the columns of the index, with one value per feature."""
    found = facts.found
    columns = {
        "active": found.active.tolist(),
        "largest": rounded(found.largest),
        "peaks": _peak_tokens(found, rows),
    }
    if facts.logits is not None:
        columns["promoted"] = facts.logits.promoted[:, :PROMOTED].tolist()
    if facts.f1 is not None:
        columns["concept"] = facts.f1.argmax(axis=1).tolist()
        columns["f1"] = rounded(facts.f1.max(axis=1), 3)
    if facts.importance is not None:
        columns["effect"] = rounded(facts.importance.kl_all.mean, 6)
    return columns


def shard_records(
    facts: Facts, rows: Integer[np.ndarray, "rows seq"], config: ModelConfig, first: int, last: int
) -> list[dict[str, Any]]:
    """Return the records of features `first` to `last - 1`.

    Args:
        rows: the rows that were searched.
        config: determines which ids are text; other tokens are not shown.
    """
    part = slice(first, last)
    found, contexts = _some(facts.found, part), Contexts(*(field[part] for field in facts.contexts))
    shown = context_records(contexts, facts.acts[part], rows, config)
    quantiles = np.stack([found.quantile(share) for share in QUANTILES], axis=1)
    columns: dict[str, list[Any]] = {
        "mean": rounded(found.mean),
        "quantiles": rounded(quantiles),
        "histogram": found.histogram.tolist(),
        "contexts": [of_one[:TOP] for of_one in shown],
        "bands": [[of_one[i : i + OF_A_BAND] for i in range(TOP, len(of_one), OF_A_BAND)] for of_one in shown],
        "partners": _partners(found),
        "neighbours": _pairs(facts.neighbours.features[part], facts.neighbours.cosine[part]),
    }
    if (logits := facts.logits) is not None:
        columns["promoted"] = _pairs(logits.promoted[part], logits.promoted_effect[part])
        columns["suppressed"] = _pairs(logits.suppressed[part], logits.suppressed_effect[part])
    if facts.f1 is not None:
        best = np.argsort(-facts.f1[part], axis=1, kind="stable")[:, :CONCEPTS]
        columns["concepts"] = _pairs(best, np.take_along_axis(facts.f1[part], best, axis=1))
    if facts.importance is not None:
        columns["effects"] = _effects(facts.importance, part)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def link_records(
    graph: WeightsGraph, promoted: Mapping[str, Int[np.ndarray, "n_features n"]], first: int, last: int
) -> list[dict[str, Any]]:
    """Return the links of features `first` to `last - 1` to each dictionary upstream and downstream.

    Args:
        promoted: the tokens that each feature of another dictionary promotes most, by the dictionary's tag.
    """
    records: list[dict[str, Any]] = [{"upstream": {}, "downstream": {}} for _ in range(first, last)]
    for direction in ("upstream", "downstream"):
        for tag, links in getattr(graph, direction).items():
            of_tag = _links(links, promoted[tag], slice(first, last))
            for record, listed in zip(records, of_tag, strict=True):
                record[direction][tag] = listed
    return records


def text_record(
    tokens: Integer[np.ndarray, " seq"], acts: Float[np.ndarray, "seq n_features"], config: ModelConfig
) -> dict[str, Any]:
    """Return the record of a text: the strongest features at each token, and where each of these is active."""
    real = config.is_text(np.asarray(tokens))
    tokens, acts = np.asarray(tokens)[real], np.asarray(acts)[real]
    order = np.argsort(-acts, axis=1, kind="stable")[:, :STRONGEST]
    strongest = [[int(f) for f in chosen if row[f] > 0] for row, chosen in zip(acts, order, strict=True)]
    present = sorted({feature for chosen in strongest for feature in chosen})
    active = {feature: np.flatnonzero(acts[:, feature]) for feature in present}
    return {
        "tokens": tokens.tolist(),
        "strongest": strongest,
        "activity": {str(f): [places.tolist(), rounded(acts[places, f])] for f, places in active.items()},
    }


def fixed_facts() -> dict[str, Any]:
    """Return what the script needs to know about the layout of the records."""
    return {"quantiles": list(QUANTILES), "bands": BANDS, "edges": rounded(EDGES)}


def rounded(values: Any, digits: int = 4) -> Any:
    """Return numbers rounded to significant digits, as nested lists."""
    array = np.asarray(values, np.float64)
    with np.errstate(divide="ignore"):
        size = np.floor(np.log10(np.abs(array)))
    scale = 10.0 ** (digits - 1 - np.where(np.isfinite(size), size, 0))
    return (np.round(array * scale) / scale + 0.0).tolist()  # no -0.0


def _some(found: TopActivations, part: slice) -> TopActivations:
    """Return the result for a slice of the features."""
    names = ("histogram", "active", "total", "partners", "correlation")
    arrays = {name: getattr(found, name)[part] for name in names}
    contexts = {name: Contexts(*(field[part] for field in getattr(found, name))) for name in ("top", "sampled")}
    return dataclasses.replace(found, **arrays, **contexts)


def _peak_tokens(found: TopActivations, rows: np.ndarray) -> list[list[int]]:
    """Return for each feature the tokens that its top contexts peak on, most often first."""
    present = found.top.row >= 0
    peaks = rows[np.maximum(found.top.row, 0), found.top.position]
    listed = []
    for tokens, there in zip(peaks, present, strict=True):
        values, firsts, counts = np.unique(tokens[there], return_index=True, return_counts=True)
        listed.append(values[np.lexsort((firsts, -counts))][:PEAKS].tolist())
    return listed


def context_records(contexts: Contexts, acts: np.ndarray, rows: np.ndarray, config: ModelConfig) -> list[list[Any]]:
    """Return each context as [row, index of the peak, tokens, activations], or None for a missing one."""
    places = window_positions(contexts, rows.shape[1])
    ids = np.asarray(rows[np.maximum(contexts.row, 0)[..., None], np.maximum(places, 0)])
    real = (places >= 0) & config.is_text(ids)
    peak = real[..., :BEFORE].sum(axis=-1)  # index among the tokens shown
    shown: list[list[Any]] = []
    fields = (contexts.row.tolist(), peak.tolist(), ids.tolist(), rounded(acts), real, np.all(real, axis=-1))
    for of_feature in zip(*fields, strict=True):
        listed: list[Any] = []
        for row, at, tokens, values, there, all_there in zip(*of_feature, strict=True):
            if not all_there:
                tokens, values = (list(itertools.compress(part, there)) for part in (tokens, values))
            listed.append([row, at, tokens, values] if row >= 0 else None)
        shown.append(listed)
    return shown


def _pairs(features: np.ndarray, values: np.ndarray) -> list[list[list[Any]]]:
    """Return the [feature, value] pairs of each row, without those of feature -1."""
    return [
        [[f, value] for f, value in zip(row, of_row, strict=True) if f >= 0]
        for row, of_row in zip(features.tolist(), rounded(values), strict=True)
    ]


def _partners(found: TopActivations) -> list[list[list[Any]] | None]:
    """Return the [feature, correlation] pairs of each feature, or None where the correlation is undefined."""
    pairs, undefined = _pairs(found.partners, found.correlation), np.isnan(found.correlation[:, 0])
    return [None if unknown else of_one for of_one, unknown in zip(pairs, undefined, strict=True)]


def _links(links: Links, promoted: np.ndarray, part: slice) -> list[list[list[Any]]]:
    """Return [feature, weight, promoted tokens] for each link of each row."""
    words = promoted[links.features[part]].tolist()
    return [
        [[*pair, of_pair] for pair, of_pair in zip(pairs, of_row, strict=True)]
        for pairs, of_row in zip(_pairs(links.features[part], links.values[part]), words, strict=True)
    ]


def _effects(importance: CausalImportance, part: slice) -> list[dict[str, Any]]:
    """Return {measure: [mean, half width]} and the number of active rows of each feature; None is unknown."""
    names = ("kl_all", "kl", "loss")
    columns = [importance.active_rows[part].tolist()]
    for name in names:
        columns += [[_known(v) for v in rounded(values[part])] for values in getattr(importance, name)]
    return [
        {"active_rows": rows, **{name: list(rest[2 * i : 2 * i + 2]) for i, name in enumerate(names)}}
        for rows, *rest in zip(*columns, strict=True)
    ]


def _known(value: int | float) -> int | float | None:
    return None if value != value else value
