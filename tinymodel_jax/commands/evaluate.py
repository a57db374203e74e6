"""`tinymodel eval`."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymodel_jax.commands.frame import finite_or_none, print_json, print_table
from tinymodel_jax.commands.hosts import ONE_PROCESS, HostOptions, join, shows
from tinymodel_jax.commands.inputs import open_rows, require_data
from tinymodel_jax.commands.options import (
    Model,
    ModelOptions,
    OutFile,
    dictionary_folders,
    named_dictionaries,
    parse_sites,
    prepare_json_output,
    require_positive,
)
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.runtime.atomic_files import replace_file
from tinymodel_jax.runtime.progress import Track

if TYPE_CHECKING:
    from tinymodel_jax.dictionaries.dictionary import Dictionary
    from tinymodel_jax.lm import TinyModel

COLUMNS = {
    "l0": "L0",
    "explained_variance": "explained variance",
    "ce_recovered": "CE recovered",
    "kl": "KL",
    "dead_fraction": "dead",
}
"""Results that the table shows, with their headings; the file has all results."""
WITH_MARGIN = ("explained_variance", "ce_recovered")


def evaluate(
    *,
    data: str,
    sites: str = "",
    dictionaries: tuple[Path, ...] = (),
    sparse_model: bool = False,
    model: Model = ModelOptions(),
    limit: int = 256,
    count_begin: bool = False,
    out: OutFile = None,
    json: bool = False,
    hosts: HostOptions = ONE_PROCESS,
) -> None:
    """Measure dictionaries: sparsity, reconstruction, and the loss of the model when it runs through them.

    Args:
        data: folder of `python -m train prepare`, file of stories (.jsonl, .txt, also .gz), or `storyworld`.
        sites: tags of the model's own or published dictionaries to measure, such as M0,A1.
        dictionaries: folders of dictionaries to measure, or folders of such folders, also hub:OWNER/NAME/PATH; each
            dictionary stores its site.
        sparse_model: also measure the model with every MLP replaced by its transcoder, of --dictionaries or its own.
        limit: largest number of rows (stories) to read.
        count_begin: count [BEGIN], the same in every story, in all measures except cross-entropy and KL.
        out: JSON file to write; the plots are written beside it, as a PNG of the same name.
        json: print the JSON instead of a table.
        hosts: processes that share the rows; each runs this same command, and the first prints and writes.
    """
    track = join(hosts)
    tags = parse_sites("--sites", sites)
    if not (tags or dictionaries or sparse_model):
        raise ValueError("nothing to measure: give --sites M0,A1, --dictionaries FOLDER, or --sparse-model.")
    require_positive("--limit", limit)
    require_data(data)
    prepare_json_output("--out", out if shows(hosts) else None)
    folders = [found for folder in dictionaries for found in dictionary_folders(folder)]
    lm = model.load()
    named = named_dictionaries(lm, tags, folders)
    sparse_lm = _with_transcoders(lm, named[len(tags) :]) if sparse_model else None
    rows = open_rows(lm, data, limit)
    content = {
        "format": "tinymodel_jax/evaluation",
        "format_version": 1,
        "model": model.name,
        "data": data,
        "rows": len(rows),
        "count_begin": count_begin,
        "dictionaries": _measure(lm, named, rows, count_begin, track) if named else [],
        "sparse_model": None if sparse_lm is None else _measure_sparse_model(sparse_lm, rows, track),
    }
    if not shows(hosts):
        return
    if out is not None:
        _write(content, out)
    if json:
        print_json(content)
    else:
        _print_tables(content)


def _measure(
    lm: TinyModel, named: Sequence[tuple[str, Dictionary]], rows: Any, begin: bool, track: Track
) -> list[dict[str, Any]]:
    from tinymodel_jax.analysis.evaluation import evaluation

    dictionaries = [dictionary for _, dictionary in named]
    found = evaluation.evaluate(lm, dictionaries, rows, count_begin=begin, track=track)
    records = []
    for (name, dictionary), one in zip(named, found, strict=True):
        features, dead = evaluation.density_histogram(one.frequency)
        edges = evaluation.DENSITY_EDGES.tolist()
        record = {
            "name": name,
            "site": Site.at(dictionary.config.hook_in, dictionary.config.hook_out).tag,
            "architecture": dictionary.config.architecture,
            "n_features": dictionary.config.n_features,
            "results": _finite(evaluation.numbers_of(one)),
            "margins": _finite(one.margins),
            "sites": {tag: _finite(numbers) for tag, numbers in one.sites.items()},
            "density": {"log10_edges": edges, "features": features, "dead": dead},
        }
        records.append(record)
    return records


def _with_transcoders(lm: TinyModel, given: Sequence[tuple[str, Dictionary]]) -> TinyModel:
    """Return the model with a transcoder attached at every MLP: the given ones, and its own for the other layers.

    Raises:
        ValueError: two are of one layer, or a layer has none.
    """
    from tinymodel_jax.analysis.evaluation.sparse_lm import mlp_tags

    attached, names = lm.splice([]), dict[str, str]()
    for name, dictionary in given:
        tag = Site.at(dictionary.config.hook_in, dictionary.config.hook_out).tag
        if tag not in mlp_tags(lm):
            continue
        if tag in names:
            raise ValueError(f"--sparse-model: {names[tag]} and {name} are both of {tag}; give one for each layer.")
        attached.attach(tag, dictionary)
        names[tag] = name
    for tag in mlp_tags(lm):
        attached[tag]  # raises now, not after hours of measuring, if a layer has no dictionary
    return attached


def _measure_sparse_model(lm: TinyModel, rows: Any, track: Track) -> dict[str, Any]:
    from tinymodel_jax.analysis.evaluation.evaluation import numbers_of
    from tinymodel_jax.analysis.evaluation.sparse_lm import evaluate_sparse_model, mlp_tags

    found = evaluate_sparse_model(lm, rows, track=track)
    return {
        "sites": list(mlp_tags(lm)),
        "results": _finite(numbers_of(found)),
        "margins": _finite(found.margins),
    }


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: finite_or_none(value) for name, value in numbers.items()}


def _write(content: Mapping[str, Any], out: Path) -> None:
    replace_file(out, (json_format.dumps(content, indent=2) + "\n").encode())
    if content["dictionaries"]:
        from tinymodel_jax.analysis.report.charts import plot_evaluations

        plot_evaluations(content["dictionaries"], out.with_suffix(".png"))


def print_dictionaries(records: Sequence[Mapping[str, Any]], data: str) -> None:
    """Print a table of dictionaries.

    Args:
        records: `name`, `results` and `margins` of each, with the names of `DictionaryEvaluation`'s fields, and the
            numbers of its `sites`, if it joins several; columns that the first record has no result for are left out.
        data: what they were measured on, for the title.
    """
    first = records[0]
    columns = {name: heading for name, heading in COLUMNS.items() if name in first["results"]}
    clean = f"; CE clean {_cell(first, 'ce_clean', False)} nats" if "ce_clean" in first["results"] else ""
    lines = [line for record in records for line in (record, *_sites(record))]
    rows = [[line["name"], *(_cell(line, name, name in WITH_MARGIN) for name in columns)] for line in lines]
    title = f"{first['results']['tokens']:,} tokens of {data}{clean}"
    print_table(["dictionary", *columns.values()], rows, title=title)


def _sites(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a line for each site that a crosscoder or cross-layer transcoder joins."""
    sites = record.get("sites", {})
    return [{"name": f"  {tag}", "results": numbers, "margins": {}} for tag, numbers in sites.items()]


def say_units(with_margins: bool) -> None:
    """Print the units of the tables' numbers."""
    print(f"CE and KL are in nats{'; ± is half of a 95 % confidence interval over rows' * with_margins}.")


def _print_tables(content: Mapping[str, Any]) -> None:
    if content["dictionaries"]:
        print_dictionaries(content["dictionaries"], f"{content['rows']:,} rows")
    sparse = content["sparse_model"]
    if sparse is not None:
        rows = [
            [name.replace("_", " ").replace("ce ", "CE ").replace("kl", "KL"), _cell(sparse, name, True)]
            for name in sparse["results"]
        ]
        print_table([f"{', '.join(sparse['sites'])} at once", ""], rows)
    say_units(with_margins=content["rows"] > 1)


def _cell(record: Mapping[str, Any], name: str, with_margin: bool) -> str:
    value, margin = record["results"].get(name), record["margins"].get(name)
    digits = 1 if name == "l0" else 4
    if value is None:
        return "–"
    rounded = round(value, digits) + 0.0  # not -0.0
    return f"{rounded:.{digits}f}" + (f" ± {margin:.{digits}f}" if with_margin and margin is not None else "")
