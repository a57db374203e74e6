"""`tinymodel importance`."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymodel_jax.commands.frame import print_json, print_table, significant
from tinymodel_jax.commands.hosts import ONE_PROCESS, HostOptions, join, shows
from tinymodel_jax.commands.inputs import open_rows, require_data
from tinymodel_jax.commands.options import (
    ModelAndDictionary,
    ModelAndDictionaryOptions,
    OutFile,
    prepare_json_output,
    require_positive,
    work_file,
)
from tinymodel_jax.commands.sweep import moved_tokens, tokens_cell
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.runtime.atomic_files import replace_file

if TYPE_CHECKING:
    from tinymodel_jax.analysis.effects.importance import CausalImportance
    from tinymodel_jax.lm import TinyModel


def importance(
    *,
    site: str,
    data: str,
    limit: int = 64,
    top: int = 10,
    model: ModelAndDictionary = ModelAndDictionaryOptions(),
    out: OutFile = None,
    json: bool = False,
    hosts: HostOptions = ONE_PROCESS,
) -> None:
    """Measure the causal importance of every feature of a dictionary: turn it off on every row of a data set.

    To resume a run that was stopped, give the same command with the same --out. A finished file is read instead of
    measuring again.

    Args:
        site: tag of the dictionary, such as M2.
        data: folder of `python -m train prepare`, file of stories (.jsonl, .txt, also .gz), or `storyworld`.
        limit: largest number of rows to measure on.
        top: number of features in the table, the most important ones; --json and --out have all.
        out: JSON file to write; the plots are written beside it, as a PNG of the same name. A file of another run is
            never replaced.
        json: print the JSON instead of a table.
        hosts: processes that take turns at the rows; each runs this same command, and the first prints and writes.
    """
    track = join(hosts)
    place = Site.whole(site, "--site ")
    for option, number in (("--top", top), ("--limit", limit)):
        require_positive(option, number)
    require_data(data)
    prepare_json_output("--out", out if shows(hosts) else None)
    asked = {
        "format": "tinymodel_jax/importance",
        "format_version": 1,
        "model": model.name,
        "dictionary": None if model.dictionary is None else str(model.dictionary),
        "site": place.tag,
        "data": data,
        "limit": limit,
    }
    from tinymodel_jax.analysis.effects.importance import causal_importance, importance_key
    from tinymodel_jax.runtime.collectives import of_first, on_all

    table = on_all(lambda: _finished(out, asked) if shows(hosts) else None, "the first process")
    finished = of_first(table is not None)

    lm = model.load_with_dictionary(place)
    rows = open_rows(lm, data, limit)
    key = importance_key(lm, place.tag, rows)
    work = work_file(out)
    if not finished:
        found = causal_importance(lm, place.tag, rows, work_file=work, track=track)
        table = {**asked, "rows": found.n_rows, "key": key, "features": _entries(lm, found)}
    elif table is not None and table["key"] != key:
        changed = ", ".join(name for name in key if table["key"].get(name) != key[name])
        raise ValueError(f"--out {out} was measured with other {changed}; name another file, or delete it.")
    if table is None or not shows(hosts):
        return
    if out is not None:
        _write(table, out)
    if work is not None:
        work.unlink(missing_ok=True)  # last: until the table is written, this file is the only result
    if json:
        print_json(table)
    else:
        _print_importance(table, top)


def _finished(out: Path | None, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return the table that `out` holds, or None if there is no file.

    Raises:
        ValueError: the file is of another run, or not of this command.
    """
    if out is None or not out.exists():
        return None
    try:
        held = json_format.loads(out.read_bytes())
    except ValueError:
        held = None
    if not isinstance(held, dict) or held.get("format") != asked["format"] or "key" not in held:
        raise ValueError(
            f"--out {out} exists and is not a file of this version of `tinymodel importance`; name another file, or "
            "delete it."
        )
    changed = [
        f"{name} {held.get(name)!r:.60}, not {value!r:.60}" for name, value in asked.items() if held.get(name) != value
    ]
    if changed:
        raise ValueError(f"--out {out} holds a run with {'; '.join(changed)}. Name another file, or delete it.")
    return held


def _entries(lm: TinyModel, found: CausalImportance) -> list[dict[str, Any]]:
    """Return the features that were active, the most important first; unknown numbers are None."""
    order = found.order()
    order = order[found.active_rows[order] > 0]
    moved = moved_tokens(lm, found.final_stream[order], ids=_has_no_tokenizer(lm))
    return [
        {"feature": int(feature), "active_rows": int(found.active_rows[feature])}
        | {
            name: [significant(part[feature]) for part in getattr(found, name)]
            for name in ("kl", "loss", "kl_all", "loss_all")
        }
        | {"tokens": tokens}
        for feature, tokens in zip(order, moved, strict=True)
    ]


def _has_no_tokenizer(lm: TinyModel) -> bool:
    """Whether tokens can be shown as ids only: prepared rows are read without a tokenizer."""
    try:
        return lm.tokenizer.vocab_size != lm.config.d_vocab
    except (ValueError, OSError):  # the model has none, or the published one cannot be loaded
        return True


def _write(table: dict[str, Any], out: Path) -> None:
    from tinymodel_jax.analysis.report.charts import plot_importance

    replace_file(out, json_format.dumps(table, allow_nan=False).encode() + b"\n")
    if table["features"]:
        plot_importance(table, out.with_suffix(".png"))


def _print_importance(table: dict[str, Any], top: int) -> None:
    columns = ["feature", "rows", "KL, all rows", "loss, where active"]
    numbers = [
        [
            str(entry["feature"]),
            str(entry["active_rows"]),
            *(_interval(entry[name]) for name in ("kl_all", "loss")),
            tokens_cell(entry["tokens"]),
        ]
        for entry in table["features"][:top]
    ]
    on = "one row: nats" if table["rows"] == 1 else f"{table['rows']} rows: nats, 95 % intervals"
    title = f"turning off each of {len(table['features'])} active features of {table['site']} on {on}"
    print_table([*columns, "tokens: mean logit"], numbers, title=title, right=columns)


def _interval(effect: list[float | None]) -> str:
    mean, half_width = effect
    return f"{mean:+.5f}" + ("" if half_width is None else f" ± {half_width:.5f}")
