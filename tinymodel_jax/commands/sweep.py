"""`tinymodel sweep`."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from tinymodel_jax.commands.frame import print_json, significant
from tinymodel_jax.commands.options import check_dictionary, prepare_json_output, work_file
from tinymodel_jax.commands.prompts import Prompts, load_lm, read_prompts, shown, token_id, token_rows
from tinymodel_jax.commands.tables import print_table
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.runtime.progress import with_progress

if TYPE_CHECKING:
    import numpy as np

    from tinymodel_jax.analysis.effects.importance import CausalImportance
    from tinymodel_jax.analysis.effects.sweeps import FeatureEffects
    from tinymodel_jax.lm import TinyModel

Kind = Literal["ablate", "clamp", "steer"]
MOVED_TOKENS = 10
"""Tokens told of each feature."""
ROWS = 64
"""Rows of --data that are measured on, if --limit is left out."""


def sweep(
    prompts: Prompts = (),
    *,
    site: str,
    kind: Kind = "ablate",
    amount: float | None = None,
    features: tuple[int, ...] = (),
    answer: str | None = None,
    readout: str | None = None,
    top: int = 10,
    model: str = "tiny_model",
    dictionary: Path | None = None,
    n_heads: int | None = None,
    data: str | None = None,
    limit: int | None = None,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    ids: bool = False,
    json: bool = False,
) -> None:
    """Change every feature of a dictionary, one at a time, and show what that does to the model's predictions.

    On a prompt: all active features, or the named ones. Over a data set (--data): every feature turned off on every
    row, as a table of causal importance; started again with the same --out, it goes on where it was stopped.

    Args:
        prompts: texts; each is swept by itself.
        site: dictionary's tag, such as M2.
        kind: turn features off, hold them at --amount, or add --amount times their decoder direction.
        amount: activation for clamp, strength for steer.
        features: indices; by default all that are active on the prompt.
        answer: next token whose log-probability is followed; by default the model's most likely one.
        readout: tag of a later dictionary, whose most changed features are shown.
        top: features in the table, those that change the predictions most; --json prints all.
        model: published name, folder, or file (.pt, .safetensors) with the reference's names.
        dictionary: folder or file to use at the site, instead of the model's own or published one.
        n_heads: attention heads of a file whose width is not the published 768.
        data: prepared folder, file of stories, or storyworld: measure over its rows instead of prompts.
        limit: rows of --data at most; 64 if left out.
        out: JSON file for the whole table of --data; a PNG of the same name with the plots is written beside it.
        ids: prompts are token ids, as "9996 51 56".
        json: print a JSON object for each prompt, or one for --data.
    """
    place = Site.whole(site, "--site ")
    _check(prompts, kind, amount, features, answer, readout, top, data, limit, out, ids)
    check_dictionary(dictionary)
    given, _ = ([], []) if data is not None else read_prompts(prompts, None, 1, ids)
    lm = load_lm(model, n_heads, place.tag, dictionary)
    if data is not None:
        _over_data(lm, site, data, ROWS if limit is None else limit, top, out, json)
        return
    for row in token_rows(lm, given):
        token = token_id(lm, answer, row)
        effects = _effects(lm, site, row, kind, amount, features, token, readout)
        report = _report(lm, site, row, effects, kind, token, ids)
        if json:
            print_json(report | {"features": _entries(lm, effects, len(effects.features), ids)})
        else:
            _print_effects(report, _entries(lm, effects, top, ids), len(effects.features))


def _check(
    prompts: Prompts,
    kind: Kind,
    amount: float | None,
    features: tuple[int, ...],
    answer: str | None,
    readout: str | None,
    top: int,
    data: str | None,
    limit: int | None,
    out: Path | None,
    ids: bool,
) -> None:
    if top < 1:
        raise ValueError(f"--top {top} must be 1 or more.")
    if (amount is None) != (kind == "ablate"):
        raise ValueError(f"--kind {kind} {'takes no --amount' if kind == 'ablate' else 'needs --amount NUMBER'}.")
    if data is None:
        if not prompts:
            raise ValueError("nothing to sweep: give a prompt, or --data FOLDER, FILE or storyworld.")
        if out is not None:
            raise ValueError("--out holds the table of --data; for prompts there is --json.")
        if limit is not None:
            raise ValueError(f"--limit {limit} is for the rows of --data; prompts are all swept.")
        return
    if prompts or features or answer is not None or readout or kind != "ablate" or ids:
        raise ValueError(
            "--data measures every feature turned off: it takes no prompt, --ids, --features, --answer, --readout or "
            "--kind."
        )
    prepare_json_output("--out", out)


def _effects(
    lm: TinyModel,
    site: str,
    row: list[int],
    kind: Kind,
    amount: float | None,
    features: tuple[int, ...],
    token: int,
    readout: str | None,
) -> FeatureEffects:
    from tinymodel_jax.analysis.effects import sweeps

    def track(chunks: list[Any]) -> Iterable[Any]:
        return with_progress(chunks, "sweeping")

    chosen = list(features) or None
    if amount is None:
        return sweeps.ablate(lm, site, [row], chosen, next_ids=[token], readout=readout, track=track)
    changed = {"clamp": sweeps.clamp, "steer": sweeps.steer}[kind]
    return changed(lm, site, [row], amount, chosen, next_ids=[token], readout=readout, track=track)


def _report(
    lm: TinyModel, site: str, row: list[int], effects: FeatureEffects, kind: Kind, token: int, ids: bool
) -> dict[str, Any]:
    """Return what there is to say besides the features; for ablations with the quality of the gradient's estimate."""
    import numpy as np

    report: dict[str, Any] = {
        "site": site,
        "kind": kind,
        "text": shown(lm, row, ids),
        "answer": shown(lm, [token], ids),
    }
    if kind == "ablate" and len(effects.features) > 1:
        from tinymodel_jax.analysis.effects.attribution import attribute, rank_correlation

        for measure in ("loss", "next_logprob"):
            estimate = attribute(lm, site, [row], effects.features, measure=measure, next_ids=[token])
            correlation = rank_correlation(estimate.change, getattr(effects, measure))
            report[f"{measure}_rank_correlation"] = round(correlation, 4) if np.isfinite(correlation) else None
    return report


def _entries(lm: TinyModel, effects: FeatureEffects, top: int, ids: bool) -> list[dict[str, Any]]:
    """Return the features that change the predictions most, the most important first."""
    entries = []
    order = (-effects.kl).argsort(kind="stable")[:top]
    for place, tokens in zip(order, _moved_tokens(lm, effects.final_stream[order], ids), strict=True):
        numbers = {name: significant(getattr(effects, name)[place]) for name in ("kl", "loss", "next_logprob")}
        entry: dict[str, Any] = {"feature": int(effects.features[place]), **numbers, "tokens": tokens}
        if effects.readout_features is not None and effects.readout_changes is not None:
            changed = zip(effects.readout_features[place], effects.readout_changes[place], strict=True)
            entry["readout"] = [{"feature": int(f), "change": significant(change)} for f, change in changed]
        entries.append(entry)
    return entries


def _moved_tokens(lm: TinyModel, final_streams: np.ndarray, ids: bool) -> list[list[dict[str, Any]]]:
    """Return, for each change of the final stream, the tokens whose mean logit it moves most."""
    import numpy as np

    from tinymodel_jax.analysis.search.logit_effects import strongest_tokens

    up, raised, down, lowered = strongest_tokens(lm, final_streams, MOVED_TOKENS)
    tokens, logits = np.concatenate([up, down], axis=1), np.concatenate([raised, lowered], axis=1)
    order = np.argsort(-np.abs(logits), axis=1, kind="stable")[:, :MOVED_TOKENS]
    moved = zip(np.take_along_axis(tokens, order, 1).tolist(), np.take_along_axis(logits, order, 1), strict=True)
    return [
        [{"token": shown(lm, [t], ids), "logit": significant(x)} for t, x in zip(*one, strict=True)] for one in moved
    ]


def _tokens_cell(tokens: list[dict[str, Any]], count: int = 2) -> str:
    return "  ".join(f"{one['token']!r} {one['logit']:+.3f}" for one in tokens[:count])


def _print_effects(report: dict[str, Any], entries: list[dict[str, Any]], n: int) -> None:
    columns = ["feature", "KL", "loss", f"log p({report['answer']!r})"]
    has_readout = any("readout" in entry for entry in entries)
    rows = []
    for entry in entries:
        row = [str(entry["feature"]), f"{entry['kl']:.4f}", f"{entry['loss']:+.4f}", f"{entry['next_logprob']:+.4f}"]
        row.append(_tokens_cell(entry["tokens"]))
        if has_readout:
            row.append("  ".join(f"{x['feature']} {x['change']:+.3f}" for x in entry["readout"][:4]))
        rows.append(row)
    title = f"{report['kind']} each of {n} features of {report['site']} on {_end(report['text'])!r}: changes, nats"
    print_table(
        [*columns, "tokens: mean logit", *["readout: mean change"] * has_readout], rows, title=title, right=columns
    )
    if report.get("loss_rank_correlation") is not None:
        print(
            "activation x gradient ranks the features like this (Spearman): loss "
            f"{report['loss_rank_correlation']}, next token {report['next_logprob_rank_correlation']}"
        )


def _end(text: str, width: int = 60) -> str:
    return text if len(text) <= width else "…" + text[-width:]


def _over_data(lm: TinyModel, site: str, data: str, limit: int, top: int, out: Path | None, json: bool) -> None:
    from tinymodel_jax.analysis.effects.importance import causal_importance
    from tinymodel_jax.commands.rows import open_rows
    from tinymodel_jax.runtime.atomic_files import replace_file

    def track(left: list[int]) -> Iterable[int]:
        return with_progress(left, "ablating")

    rows = open_rows(lm, data, limit)
    work = work_file(out)
    ids = _has_no_tokenizer(lm)
    found = causal_importance(lm, site, rows, work_file=work, track=track)
    table = {"site": site, "data": data, "rows": found.n_rows, "features": _importance(lm, found, ids)}
    if out is not None:
        from tinymodel_jax.analysis.report.charts import plot_importance

        replace_file(out, json_format.dumps(table, allow_nan=False).encode() + b"\n")
        if table["features"]:
            plot_importance(table, out.with_suffix(".png"))
    if work is not None:
        work.unlink(missing_ok=True)  # only now: until the table is written, it is all there is of the work
    if json:
        print_json(table)
        return
    columns = ["feature", "rows", "KL, all rows", "loss, where active"]
    numbers = [
        [
            str(entry["feature"]),
            str(entry["active_rows"]),
            *(_interval(entry[name]) for name in ("kl_all", "loss")),
            _tokens_cell(entry["tokens"]),
        ]
        for entry in table["features"][:top]
    ]
    n_active = int((found.active_rows > 0).sum())
    on = "one row: nats" if found.n_rows == 1 else f"{found.n_rows} rows: nats, 95 % intervals"
    title = f"turning off each of {n_active} active features of {site} on {on}"
    print_table([*columns, "tokens: mean logit"], numbers, title=title, right=columns)


def _has_no_tokenizer(lm: TinyModel) -> bool:
    """Say whether tokens can be shown as ids only: prepared rows are read without a tokenizer."""
    try:
        return lm.tokenizer.vocab_size != lm.config.d_vocab
    except (ValueError, OSError):  # the model has none, or the published one cannot be loaded
        return True


def _importance(lm: TinyModel, found: CausalImportance, ids: bool) -> list[dict[str, Any]]:
    """Return the features that were active, the most important first; what is not known is None."""
    order = found.order()
    order = order[found.active_rows[order] > 0]
    return [
        {"feature": int(feature), "active_rows": int(found.active_rows[feature])}
        | {
            name: [significant(part[feature]) for part in getattr(found, name)]
            for name in ("kl", "loss", "kl_all", "loss_all")
        }
        | {"tokens": tokens}
        for feature, tokens in zip(order, _moved_tokens(lm, found.final_stream[order], ids), strict=True)
    ]


def _interval(effect: list[float | None]) -> str:
    mean, half_width = effect
    return f"{mean:+.5f}" + ("" if half_width is None else f" ± {half_width:.5f}")
