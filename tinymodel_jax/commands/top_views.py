"""What `tinymodel top` shows: a record of each feature, printed as JSON or for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape

from tinymodel_jax.analysis.report.page import token_text
from tinymodel_jax.analysis.search.contexts import Contexts
from tinymodel_jax.analysis.search.feature_queries import concept_f1, context_window, find_features
from tinymodel_jax.analysis.search.logit_effects import logit_effects
from tinymodel_jax.analysis.search.top_activations import EDGES, QUANTILES, TopActivations
from tinymodel_jax.bundled.storyworld import CONCEPTS
from tinymodel_jax.commands.frame import print_table
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.runtime.progress import with_progress

BANDS, OF_A_BAND = 5, 2
"""Number of bands of the sampled contexts, and of contexts shown from each."""
BAR = 40
"""Characters of the longest bar."""


class Rank(NamedTuple):
    """What features are ranked by."""

    field: str
    """Name in the JSON."""
    heading: str
    """Name in the table, with its unit."""
    values: np.ndarray
    """(features)."""


def ranked(
    reader: FeatureReader,
    found: TopActivations,
    rows: np.ndarray,
    truth: np.ndarray | None,
    contains: str | None,
    concept: str | None,
) -> tuple[np.ndarray, Rank | None]:
    """Return features in the order that the options ask for, and what they are ranked by; by default the density.

    Args:
        truth: result of `storyworld_truth`, for rows of the story world.
    """
    if concept is not None:
        assert truth is not None
        one = list(CONCEPTS).index(concept)
        score = concept_f1(reader, rows, truth[..., [one]], track=with_progress)[:, 0]
        return np.argsort(-score, kind="stable"), Rank("concept_f1", f"F1 for {concept}", score)
    if contains is None:
        return np.argsort(-found.density, kind="stable"), None
    order, share, _ = find_features(reader.lm, found.tag, rows, contains, search=found)
    score = np.zeros(found.n_features)
    score[order] = share
    return order, Rank("share_of_contexts", f"top contexts on {contains!r}", score)


def feature_records(
    reader: FeatureReader,
    found: TopActivations,
    rows: np.ndarray,
    truth: np.ndarray | None,
    features: np.ndarray,
    rank: Rank | None,
) -> list[dict[str, Any]]:
    """Return a short record of each feature."""
    lm, known = reader.lm, _known(reader, rows, truth, features)
    effects = logit_effects(lm, found.tag, min(5, lm.config.d_vocab), features)
    records = []
    for place, feature in enumerate(features):
        record = _numbers(found, int(feature)) | known[place]
        if rank is not None:
            record[rank.field] = round(float(rank.values[feature]), 4)
        record["top_token"] = _usual_token(lm, found, rows, int(feature))
        record["promoted"] = [lm.tokenizer.decode([token]) for token in effects.promoted[place].tolist()]
        records.append(record)
    return records


def feature_record(
    reader: FeatureReader, found: TopActivations, rows: np.ndarray, truth: np.ndarray | None, feature: int, top: int
) -> dict[str, Any]:
    """Return the full record of one feature."""
    lm, alone = reader.lm, np.array([feature])
    effects = logit_effects(lm, found.tag, min(10, lm.config.d_vocab), alone)
    words = {
        kind: [
            {"token": lm.tokenizer.decode([token]), "effect": round(effect, 4)}
            for token, effect in zip(
                getattr(effects, kind)[0].tolist(), getattr(effects, f"{kind}_effect")[0].tolist(), strict=True
            )
        ]
        for kind in ("promoted", "suppressed")
    }
    shown = found.histogram[feature]
    partners = [
        {"feature": int(partner), "correlation": round(float(phi), 4)}
        for partner, phi in zip(found.partners[feature], found.correlation[feature], strict=True)
        if partner >= 0
    ]
    return {
        **_numbers(found, feature),
        **_known(reader, rows, truth, alone)[0],
        "quantiles": {str(share): round(float(found.quantile(share)[feature]), 4) for share in QUANTILES},
        "histogram": [{"from": float(EDGES[i]), "tokens": int(shown[i])} for i in np.flatnonzero(shown)],
        "histogram_every": found.histogram_every,
        "contexts": _contexts(lm, rows, found.top, feature, top),
        "bands": [_contexts(lm, rows, band, 0, OF_A_BAND) for band in found.bands(feature, BANDS)],
        **words,
        "effect_of": effects.unit,
        "partners": None if np.isnan(found.correlation[feature, 0]) else partners,
    }


def print_features(found: TopActivations, records: Sequence[dict[str, Any]], rank: Rank | None) -> None:
    """Print a table of features."""
    title = f"{found.tag}, {found.n_tokens:,} tokens of {found.n_rows:,} rows"
    with_concept, headings = "concept" in records[0], [] if rank is None else [rank.heading]
    names = ["feature", *headings, "density", "largest activation", "top token"]
    names += [*(["concept (F1)"] if with_concept else []), "promotes"]
    rows = []
    for record in records:
        cells = [str(record["feature"]), *([] if rank is None else [_ranked_by(rank, record)])]
        cells += [f"{record['density']:.3%}", f"{record['largest']:.2f}", _word(record["top_token"])]
        cells += [f"{record['concept']} ({record['f1']:.2f})"] if with_concept else []
        rows.append([*cells, " ".join(map(_word, record["promoted"][:3]))])
    print_table(names, rows, title=title, right=("feature", *headings, "density", "largest activation"))


def print_feature(found: TopActivations, records: Sequence[dict[str, Any]]) -> None:
    """Print a page about one feature."""
    record, console = records[0], Console(highlight=False, emoji=False)
    concept = f", {record['concept']} (F1 {record['f1']:.2f})" if "concept" in record else ""
    console.print(
        f"[bold]{found.tag}N{record['feature']}[/bold]{concept}: active on {record['density']:.3%} of "
        f"{found.n_tokens:,} tokens, mean {record['mean']:.3f}, largest {record['largest']:.3f}"
    )
    below = ", ".join(f"{float(share):.0%} are below {value:.3f}" for share, value in record["quantiles"].items())
    console.print(f"of its activations above 0, {below}")
    if found.histogram_every > 1:
        console.print(f"one token in {found.histogram_every}:")
    most = max((one["tokens"] for one in record["histogram"]), default=1)
    for one in record["histogram"]:
        console.print(f"  from {one['from']:8.4f} {'█' * -(-BAR * one['tokens'] // most)} {one['tokens']:,}")
    _print_contexts(console, "top contexts", record["contexts"])
    for number, band in enumerate(record["bands"]):
        first, last = number / BANDS, (number + 1) / BANDS
        which = f"strongest {last:.0%}" if not number else f"next {last - first:.0%}, to {last:.0%}"
        _print_contexts(console, f"sampled contexts, {which}", band)
    for kind in ("promoted", "suppressed"):
        words = "  ".join(f"{escape(_word(one['token']))} {one['effect']:+.3f}" for one in record[kind])
        console.print(f"{kind} next tokens, in logits for {record['effect_of']}: {words}")
    console.print(f"active together with: {_partners(record['partners'])}")


def _ranked_by(rank: Rank, record: dict[str, Any]) -> str:
    value = record[rank.field]
    return f"{value:.0%}" if rank.field == "share_of_contexts" else f"{value:.2f}"


def _partners(partners: Sequence[dict[str, Any]] | None) -> str:
    if partners is None:
        return "– (undefined: it is active at all sampled tokens, or at none)"
    return "  ".join(f"{one['feature']} ({one['correlation']:.2f})" for one in partners) or "none"


def _print_contexts(console: Console, title: str, contexts: Sequence[dict[str, Any]]) -> None:
    if contexts:
        console.print(f"{title}:")
    for one in contexts:
        before, peak, after = (escape(token_text(one[part])) for part in ("before", "peak", "after"))
        console.print(f"  {one['activation']:7.3f}  {before}[reverse bold]«{peak}»[/]{after}", soft_wrap=True)


def _numbers(found: TopActivations, feature: int) -> dict[str, Any]:
    record: dict[str, Any] = {"site": found.tag, "feature": feature}
    for name in ("density", "mean", "largest"):
        record[name] = round(float(getattr(found, name)[feature]), 6)
    return record


def _known(
    reader: FeatureReader, rows: np.ndarray, truth: np.ndarray | None, features: np.ndarray
) -> list[dict[str, Any]]:
    """Return the concept that each feature detects best; nothing where the truth is unknown."""
    if truth is None:
        return [{} for _ in features]
    f1 = concept_f1(reader, rows, truth, features)
    best, names = f1.argmax(axis=1), list(CONCEPTS)
    return [{"concept": names[c], "f1": round(float(of_one[c]), 4)} for c, of_one in zip(best, f1, strict=True)]


def _contexts(lm: TinyModel, rows: np.ndarray, contexts: Contexts, feature: int, n: int) -> list[dict[str, Any]]:
    found = []
    for number in np.flatnonzero(contexts.row[feature] >= 0)[:n]:
        ids, peak = context_window(rows, contexts, (feature, int(number)))
        before, word, after = (_text(lm, part) for part in (ids[:peak], ids[peak : peak + 1], ids[peak + 1 :]))
        activation = round(float(contexts.value[feature, number]), 4)
        row = int(contexts.row[feature, number])
        found.append({"activation": activation, "row": row, "before": before, "peak": word, "after": after})
    return found


def _usual_token(lm: TinyModel, found: TopActivations, rows: np.ndarray, feature: int) -> str | None:
    """Return the token on which most of the top contexts peak, or None without contexts."""
    present = found.top.row[feature] >= 0
    peaks = rows[found.top.row[feature][present], found.top.position[feature][present]]
    return lm.tokenizer.decode([Counter(peaks.tolist()).most_common(1)[0][0]]) if len(peaks) else None


def _text(lm: TinyModel, ids: list[int]) -> str:
    return lm.tokenizer.decode([token for token in ids if lm.config.is_text(token)])


def _word(token: str | None) -> str:
    """Return a token as tables show it."""
    return "–" if token is None else repr(token_text(token))
