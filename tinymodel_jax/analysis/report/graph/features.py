"""What the page of a graph shows about its features: logit effects, strongest contexts, concepts, and their pages.

Logit effects follow from the weights. Contexts and concepts are measured on rows of tokens (`measured_facts`), or read
from a dashboard (`dashboard_facts`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Integer

from tinymodel_jax.analysis.circuits.graph import AttributionGraph, texts_of
from tinymodel_jax.analysis.circuits.neurons import dictionary_at, is_neurons
from tinymodel_jax.analysis.concepts.labels import NAMED_FROM
from tinymodel_jax.analysis.report.dashboard.build import A_SHARD, GRAPHS, read_data
from tinymodel_jax.analysis.report.dashboard.folders import FOLDER, INDEX
from tinymodel_jax.analysis.report.dashboard.records import context_records, rounded
from tinymodel_jax.analysis.report.dashboard.windows import window_activations
from tinymodel_jax.analysis.report.page import token_text
from tinymodel_jax.analysis.search.contexts import Contexts
from tinymodel_jax.analysis.search.feature_queries import concept_f1
from tinymodel_jax.analysis.search.logit_effects import strongest_tokens
from tinymodel_jax.analysis.search.top_activations import top_activations
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.runtime.progress import Track, no_progress

TOKENS, CONTEXTS, CONCEPTS = 6, 5, 3
"""Tokens promoted and suppressed, contexts, and concepts that the page shows of each feature."""

Record = dict[str, Any]
Records = dict[str, dict[int, Record]]
"""Records by the dictionary's tag and the feature. A record has `promoted` and `suppressed`, pairs [token id, logits
per unit]; and where they are known, `contexts`, each [row, index of the peak, token ids, activations], and `concepts`,
triples [name, meaning, F1]."""


@dataclasses.dataclass(frozen=True)
class FeatureFacts:
    """What is known about the features of a graph."""

    records: Records
    pages: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    """The page of each dictionary's dashboard, by its tag."""
    source: str = ""
    """Where contexts and concepts are from, for the page."""

    def concepts(self) -> dict[tuple[str, int], str]:
        """Return the name of each feature, by tag and number, that its best concept describes well."""
        best = {
            (tag, feature): record["concepts"][0]
            for tag, records in self.records.items()
            for feature, record in records.items()
            if record.get("concepts")
        }
        return {key: f"{key[0]}N{key[1]} {name}" for key, (name, _, f1) in best.items() if f1 >= NAMED_FROM}


def logit_facts(lm: TinyModel, graph: AttributionGraph) -> FeatureFacts:
    """Return the logit effects of a graph's features."""
    records: Records = {}
    top = min(TOKENS, lm.config.d_vocab)
    for tag, features in _features_of(graph).items():
        rows = dictionary_at(lm, tag).params["W_dec"][features]
        promoted, up, suppressed, down = strongest_tokens(lm, rows, top)
        records[tag] = {
            int(feature): {
                "promoted": _pairs(promoted[i], up[i]),
                "suppressed": _pairs(suppressed[i], down[i]),
            }
            for i, feature in enumerate(features)
        }
    return FeatureFacts(records)


def measured_facts(
    lm: TinyModel,
    graph: AttributionGraph,
    rows: Integer[np.ndarray, "rows seq"],
    truth: Bool[np.ndarray, "rows seq concepts"] | None = None,
    concepts: Mapping[str, str] | None = None,
    *,
    track: Track = no_progress,
) -> FeatureFacts:
    """Return logit effects, and the strongest contexts of the features in rows of tokens. Neurons have no contexts.

    Args:
        truth: which concepts hold at each token.
        concepts: names and meanings of the concepts; None if they are not known.
        track: wraps iterators over batches, for example with a progress bar.
    """
    facts = logit_facts(lm, graph)
    for tag, features in _features_of(graph).items():
        if is_neurons(tag):
            continue
        reader = lm[tag]

        def of_tag(things: Sequence[Any], what: str, tag: str = tag) -> Any:
            return track(things, f"{tag} {what}")

        found = top_activations(lm, tag, rows, k=min(CONTEXTS, len(rows)), track=of_tag)
        contexts = Contexts(*(field.copy() for field in found.top))
        contexts.row[~np.isin(np.arange(found.n_features), features)] = -1
        acts = window_activations(reader, rows, contexts, track=of_tag)
        shown = context_records(Contexts(*(f[features] for f in contexts)), acts[features], rows, lm.config)
        for feature, listed in zip(features.tolist(), shown, strict=True):
            facts.records[tag][feature]["contexts"] = [context for context in listed if context]
        if truth is None or not concepts:
            continue
        f1 = concept_f1(reader, rows, truth, features, track=of_tag)
        for feature, scores in zip(features.tolist(), f1, strict=True):
            facts.records[tag][feature]["concepts"] = _best_concepts(list(concepts.items()), scores)
    return dataclasses.replace(facts, source=f"{len(rows):,} rows of text")


def dashboard_facts(lm: TinyModel, graph: AttributionGraph, folder: Path) -> FeatureFacts:
    """Return logit effects, and what a dashboard says about the features of the dictionaries that it has.

    Args:
        folder: a dashboard, or a set of dashboards.

    Raises:
        FileNotFoundError: the folder holds no dashboard.
        ValueError: it has none of the graph's dictionaries, or is of another model or dictionary.
    """
    facts, pages = logit_facts(lm, graph), {}
    for tag, features in _features_of(graph).items():
        own = _dashboard_of(folder, tag)
        if own is None:
            continue
        if not (own / FOLDER / f"{GRAPHS}.js").is_file():
            raise ValueError(f"{own} is a dashboard of another version; run `tinymodel dashboard` again.")
        index, pages[tag] = read_data(own, "index"), own / INDEX
        for number in np.unique(features // A_SHARD):
            shard = read_data(own, f"shard-{number:04d}")
            for feature in features[features // A_SHARD == number].tolist():
                if feature % A_SHARD >= len(shard):
                    raise ValueError(_other_dashboard(own, tag))
                record, known = shard[feature % A_SHARD], facts.records[tag][feature]
                if not np.allclose(record["promoted"][0][1], known["promoted"][0][1], rtol=1e-2):
                    raise ValueError(_other_dashboard(own, tag))
                known["contexts"] = [context for context in record["contexts"] if context][:CONTEXTS]
                if "concepts" in record:
                    names = index["concepts"]
                    known["concepts"] = [[*names[concept], f1] for concept, f1 in record["concepts"] if f1 > 0]
    if not pages:
        wanted = ", ".join(_features_of(graph))
        raise ValueError(f"{folder} has no dashboard of a dictionary of this graph ({wanted}); make one of these.")
    return dataclasses.replace(facts, pages=pages, source=f"the dashboard {folder.name}")


def words_of(lm: TinyModel, graph: AttributionGraph, facts: FeatureFacts) -> dict[int, str]:
    """Return the text of each token id that the page shows; for a model without a tokenizer, the id."""
    used = set(graph.nodes["feature"][graph.nodes["kind"] == "logit"].tolist())
    for records in facts.records.values():
        for record in records.values():
            used |= {token for token, _ in (*record["promoted"], *record["suppressed"])}
            used |= {token for _, _, ids, _ in record.get("contexts", ()) for token in ids}
    return dict(zip(sorted(used), map(token_text, texts_of(lm, sorted(used))), strict=True))


def _features_of(graph: AttributionGraph) -> dict[str, Int[np.ndarray, " n"]]:
    """Return the numbers of the features that a graph has of each dictionary, each once."""
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    tags = dict.fromkeys(features["site"].tolist())
    return {tag: np.unique(features["feature"][features["site"] == tag]) for tag in tags}


def _pairs(tokens: np.ndarray, effects: np.ndarray) -> list[list[Any]]:
    return [[token, effect] for token, effect in zip(tokens.tolist(), rounded(effects), strict=True)]


def _best_concepts(concepts: Sequence[tuple[str, str]], f1: np.ndarray) -> list[list[Any]]:
    best = np.argsort(-f1, kind="stable")[:CONCEPTS]
    return [[*concepts[i], round(float(f1[i]), 3)] for i in best if f1[i] > 0]


def _dashboard_of(folder: Path, tag: str) -> Path | None:
    """Return the folder of a dictionary's dashboard: one of a set, or the folder itself.

    Raises:
        FileNotFoundError: the folder holds no dashboard.
    """
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} holds no dashboard; `tinymodel dashboard --site {tag} …` writes one.")
    if (folder / tag / FOLDER).is_dir():
        return folder / tag
    return folder if (folder / FOLDER).is_dir() and read_data(folder, "index")["site"] == tag else None


def _other_dashboard(folder: Path, tag: str) -> str:
    return f"{folder} is a dashboard of another model, or of another dictionary at {tag}; make one of this graph's."
