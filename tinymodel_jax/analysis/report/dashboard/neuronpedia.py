"""A dashboard's data files in the layout of Neuronpedia's exports, which its tools import.

    DEST/MODEL/LAYER-SET/  release.jsonl  model.jsonl  sourceset.jsonl  source.jsonl
                           features/batch-N.jsonl.gz  activations/batch-N.jsonl.gz

Each line is one JSON object, a row of the database table of the same fields. The numbers are those of the pages.
Fields that the dashboard does not measure are empty, and those that the database fills in, such as `createdAt`, are
left out, so that the same dashboard gives the same bytes.

Source: docs.neuronpedia.org/api-and-data/exports; the tables and the import of hijohnnylin/neuronpedia at ebb8426
(utils/neuronpedia-utils/neuronpedia_utils/db_models/, apps/webapp/lib/db/import.ts, apps/webapp/prisma/schema.prisma);
jbloomAus/SAEDashboard at db4839a (sae_dashboard/neuronpedia/neuronpedia_export.py).
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinymodel_jax.analysis.report.dashboard.build import Heading, read_data
from tinymodel_jax.analysis.report.dashboard.records import rounded
from tinymodel_jax.analysis.search.feature_queries import token_texts
from tinymodel_jax.analysis.search.logit_effects import logit_histogram
from tinymodel_jax.analysis.search.stream_directions import is_written
from tinymodel_jax.block_order import block_and_hook
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import FeatureReader

CREATOR = "clkht01d40000jv08hvalcvly"
"""Id of the user whose rows these are: the one that Neuronpedia's own installation creates."""
RELEASE = "tinymodel-jax"
"""Name of the release that all source sets belong to."""
LOGIT_BINS = 50
"""Bins of a histogram of logit effects."""
_EMPTY = (
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1"),
    *("correlated_features_indices", "correlated_features_pearson", "correlated_features_l1"),
    *("decoder_weights_dist", "vector"),
)
"""Lists of a feature that are left empty."""


class Source(NamedTuple):
    """What Neuronpedia calls the dictionary."""

    model_id: str
    set_name: str
    layer: int

    @property
    def id(self) -> str:
        """The id of the source, whose beginning is the layer."""
        return f"{self.layer}-{self.set_name}"

    @property
    def folder(self) -> Path:
        """The folder of the source in an export."""
        return Path(self.model_id, self.id)

    @property
    def of_row(self) -> dict[str, Any]:
        """The fields by which rows of features and activations name the source."""
        return {"modelId": self.model_id, "layer": self.id, "creatorId": CREATOR}


def source_of(model: str, site: Site) -> Source:
    """Return the names of the dictionary at a site.

    Args:
        model: name or path of the model, of which letters, digits, `_` and `-` remain.
    """
    hooks = dict.fromkeys(block_and_hook(name)[1] for name in (site.hook_in, site.hook_out))
    return Source(_identifier(Path(model).name), "-".join(map(_identifier, hooks)), site.layer)


def write_source(
    pages: Path, dest: Path, source: Source, reader: FeatureReader, heading: Heading, data: str, row_length: int
) -> None:
    """Write the export of a dashboard of one dictionary.

    Args:
        pages: folder of the dashboard.
        dest: folder of the export, where the source's folder does not exist yet.
        heading: the header of the pages.
        data: what the rows were read from.
        row_length: tokens per row.

    Raises:
        OSError: a file cannot be read or written.
    """
    folder = dest / source.folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("features", "activations"):
        (partial / name).mkdir(parents=True)
    index, texts = read_data(pages, "index"), token_texts(reader.lm)
    for name, row in _about(source, reader, heading, data, index["n_rows"], row_length).items():
        (partial / f"{name}.jsonl").write_text(_line(row), "utf-8")
    for first in range(0, index["n_features"], index["a_shard"]):
        number = first // index["a_shard"]
        records = dict(enumerate(read_data(pages, f"shard-{number:04d}"), first))
        histograms = _logit_histograms(reader, list(records))
        features = [feature_row(source, reader.site, index, texts, *pair) for pair in records.items()]
        rows = [row | histogram for row, histogram in zip(features, histograms, strict=True)]
        activations = [row for pair in records.items() for row in activation_rows(source, texts, *pair)]
        for kind, lines in (("features", rows), ("activations", activations)):
            content = "".join(map(_line, lines)).encode()
            (partial / kind / f"batch-{number}.jsonl.gz").write_bytes(gzip.compress(content, 6, mtime=0))
    os.replace(partial, folder)


def feature_row(
    source: Source,
    site: Site,
    index: Mapping[str, Any],
    texts: Sequence[str],
    feature: int,
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the row of a feature, without its histogram of logit effects.

    Args:
        index, record: data of the dashboard.
        texts: text of every token id.
    """
    counts, edges = record["histogram"], index["edges"]
    used = [i for i, count in enumerate(counts) if count]
    bins = range(used[0], used[-1] + 1) if used else ()
    promoted, suppressed = record.get("promoted", []), record.get("suppressed", [])
    return {
        **source.of_row,
        "index": str(feature),
        "sourceSetName": source.set_name,
        "maxActApprox": index["columns"]["largest"][feature],
        "frac_nonzero": index["columns"]["active"][feature] / index["n_tokens"],
        "hasVector": False,
        "hookName": site.hook_out,
        "topkCosSimIndices": [other for other, _ in record["neighbours"]],
        "topkCosSimValues": [cosine for _, cosine in record["neighbours"]],
        "pos_str": [texts[token] for token, _ in promoted],
        "pos_values": [effect for _, effect in promoted],
        "neg_str": [texts[token] for token, _ in suppressed],
        "neg_values": [effect for _, effect in suppressed],
        "freq_hist_data_bar_heights": [counts[i] * index["histogram_every"] for i in bins],
        "freq_hist_data_bar_values": rounded([(edges[i] + edges[i + 1]) / 2 for i in bins]),
        **{name: [] for name in _EMPTY},
    }


def activation_rows(
    source: Source, texts: Sequence[str], feature: int, record: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the rows of a feature's contexts: the strongest, then those of each band.

    Neuronpedia marks the strongest by bounds of -1. A band has the smallest and the largest of its peaks that the
    dashboard shows, and the share of the feature's contexts that it holds.
    """
    groups = [([c for c in record["contexts"] if c], -1.0, -1.0)]
    for band in record["bands"]:
        shown = [context for context in band if context]
        smallest = min((max(values) for _, _, _, values in shown), default=0.0)
        groups.append((shown, smallest, 1 / len(record["bands"])))
    rows = []
    for shown, smallest, share in groups:
        largest = max((max(values) for _, _, _, values in shown), default=0.0)
        for row, at, tokens, values in shown:
            rows.append(
                {
                    "id": f"{source.model_id}-{source.id}-{feature}-{len(rows)}",
                    **source.of_row,
                    "index": str(feature),
                    "tokens": [texts[token] for token in tokens],
                    "values": values,
                    "maxValue": values[at],
                    "maxValueTokenIndex": at,
                    "minValue": min(values),
                    "binMin": smallest,
                    "binMax": largest,
                    "binContains": share,
                    "qualifyingTokenIndex": at,
                    "dataIndex": str(row),
                    "dataSource": None,
                    "dfaValues": [],
                    "dfaTargetIndex": None,
                    "dfaMaxValue": None,
                    "lossValues": [],
                    "logitContributions": None,
                }
            )
    return rows


def _about(
    source: Source, reader: FeatureReader, heading: Heading, data: str, n_rows: int, row_length: int
) -> dict[str, dict[str, Any]]:
    """Return the row of each file about the model and the dictionary."""
    config, owner = reader.lm.config, {"creatorId": CREATOR, "visibility": "PUBLIC"}
    return {
        "release": {
            **owner, "name": RELEASE, "description": "tinymodel_jax", "descriptionShort": "tinymodel_jax",
            "creatorName": "tinymodel_jax", "creatorNameShort": "tinymodel_jax", "urls": [],
        },
        "model": {
            **owner, "id": source.model_id, "displayName": source.model_id, "displayNameShort": source.model_id,
            "instruct": False, "inferenceEnabled": False, "owner": "", "dimension": config.d_model,
            "layers": config.n_layers, "neuronsPerLayer": config.d_mlp,
        },
        "sourceset": {
            **owner, "modelId": source.model_id, "name": source.set_name, "releaseName": RELEASE, "type": "",
            "description": heading.about, "creatorName": "tinymodel_jax", "urls": [], "hasDashboards": True,
        },
        "source": {
            **owner, "id": source.id, "modelId": source.model_id, "setName": source.set_name, "hasDashboards": True,
            "inferenceEnabled": False, "dataset": data, "num_prompts": n_rows, "num_tokens_in_prompt": row_length,
            "notes": "\n".join(heading.setup),
        },
    }  # fmt: skip


def _logit_histograms(reader: FeatureReader, features: list[int]) -> list[dict[str, Any]]:
    """Return the fields of the histogram of each feature's logit effects; empty lists where there are none."""
    names = ("logits_hist_data_bar_heights", "logits_hist_data_bar_values")
    if not is_written(reader.dictionary.config.hook_out):
        return [{name: [] for name in names}] * len(features)
    heights, values = logit_histogram(reader.lm, reader.site.tag, features, LOGIT_BINS)
    pairs = zip(heights.tolist(), rounded(values), strict=True)
    return [dict(zip(names, pair, strict=True)) for pair in pairs]


def _identifier(name: str) -> str:
    """Return a name of lower-case letters, digits, `_` and `-`, the characters of Neuronpedia's ids."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-") or "model"


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
