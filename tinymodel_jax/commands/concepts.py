"""`tinymodel concepts`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinymodel_jax.commands.frame import print_json, print_table
from tinymodel_jax.commands.hosts import ONE_PROCESS, HostOptions, join, shows
from tinymodel_jax.commands.inputs import unseen_stories
from tinymodel_jax.commands.options import (
    Model,
    ModelOptions,
    OutFile,
    dictionary_folders,
    named_dictionaries,
    parse_sites,
    prepare_output,
)

if TYPE_CHECKING:
    from tinymodel_jax.analysis.concepts.recovery import Recovery


def concepts(
    *,
    model: Model = ModelOptions("mini"),
    sites: str = "",
    dictionaries: tuple[Path, ...] = (),
    stories: int = 100,
    out: OutFile = None,
    plot: Path | None = None,
    json: bool = False,
    hosts: HostOptions = ONE_PROCESS,
) -> None:
    """Score how well dictionaries find the known concepts of the story world, next to neurons and random directions.

    The model has to be trained on the story world, as `mini` is.

    Args:
        sites: tags of the model's dictionaries, such as M0,Rm2; by default all, unless --dictionaries are given.
        dictionaries: folders of dictionaries, or folders of such folders, also hub:OWNER/NAME/PATH; each dictionary
            stores its site.
        stories: number of unseen stories to read; half of them choose the features, half score them.
        out: JSON file for the score of every concept in every dictionary and baseline.
        plot: PNG file for a heat map of these scores.
        json: print one JSON object per line, for each concept in each dictionary and baseline.
        hosts: processes that share stories and features; each runs this same command, and the first prints and writes.
    """
    track = join(hosts)
    if stories < 2:
        raise ValueError(f"--stories {stories} must be 2 or more: half of them choose the features.")
    tags = parse_sites("--sites", sites)
    folders = [found for folder in dictionaries for found in dictionary_folders(folder)]
    if shows(hosts):
        prepare_output("--out", out)
        prepare_output("--plot", plot)
    import json as json_format

    from tinymodel_jax.analysis.concepts.recovery import concept_records, plot_concepts, recover_concepts
    from tinymodel_jax.runtime.atomic_files import replace_file

    lm = model.load()
    unseen = unseen_stories(lm, stories)
    if not (tags or folders or lm.dictionary_tags):
        raise ValueError(f"--model {model.name} came without dictionaries; give --dictionaries FOLDER.")
    named = dict(named_dictionaries(lm, tags if tags or folders else lm.dictionary_tags, folders))
    recoveries = recover_concepts(lm, unseen, named, track=track)
    if not shows(hosts):
        return
    records = concept_records(recoveries)
    if out is not None:
        replace_file(out, (json_format.dumps(records, indent=1) + "\n").encode())
    if plot is not None:
        plot_concepts(recoveries, plot)
    if json:
        for record in records:
            print_json(record)
    else:
        _print_table(recoveries, stories)


def _print_table(recoveries: Sequence[Recovery], stories: int) -> None:
    import numpy as np

    from tinymodel_jax.analysis.concepts.recovery import n_found
    from tinymodel_jax.bundled.storyworld import CONCEPTS

    title = f"{len(CONCEPTS)} concepts, {stories} unseen stories: the best unit of each"
    numbers = ["units", "found (F1 ≥ 0.8)", "F1 ≥ 0.5", "mean F1", "mean AUC"]
    rows = []
    for one in recoveries:
        f1, auc = (f"{np.nanmean(values):.3f}" for values in (one.scores.f1, one.scores.auc))
        rows.append([one.name, str(one.n_units), str(n_found(one)), str(n_found(one, 0.5)), f1, auc])
    print_table(["place", *numbers], rows, title=title, right=numbers)
