"""`tinymodel concepts`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tinymodel_jax.commands.frame import print_json
from tinymodel_jax.commands.named_dictionaries import dictionary_folders, named_dictionaries
from tinymodel_jax.commands.options import parse_sites, prepare_output
from tinymodel_jax.commands.prompts import load_lm
from tinymodel_jax.commands.rows import unseen_stories
from tinymodel_jax.commands.tables import print_table
from tinymodel_jax.runtime.progress import with_progress

if TYPE_CHECKING:
    from tinymodel_jax.analysis.concepts.recovery import Recovery


def concepts(
    *,
    model: str = "mini",
    sites: str = "",
    dictionaries: tuple[Path, ...] = (),
    stories: int = 100,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Say which concepts of the story world the dictionaries found, beside neurons and random directions.

    Args:
        model: one that was trained on the story world.
        sites: tags, as M0,Rm2, of the model's dictionaries; all of them if there are no --dictionaries either.
        dictionaries: folders of dictionaries, or folders that hold such folders; each knows its site.
        stories: unseen stories to read; half of them choose the features, half score them.
        out: JSON file for the score of every concept at every place.
        plot: PNG file for a heat map of them.
        json: print a JSON object a line: a place and a concept.
    """
    if stories < 2:
        raise ValueError(f"--stories {stories} must be 2 or more: half of them choose the features.")
    tags = parse_sites("--sites", sites)
    folders = [found for folder in dictionaries for found in dictionary_folders(folder)]
    prepare_output("--out", out)
    prepare_output("--plot", plot)
    import json as json_format

    from tinymodel_jax.analysis.concepts.recovery import concept_records, plot_concepts, recover_concepts
    from tinymodel_jax.runtime.atomic_files import replace_file

    lm = load_lm(model)
    told = unseen_stories(lm, stories)
    if not (tags or folders or lm.dictionary_tags):
        raise ValueError(f"--model {model} came without dictionaries; give --dictionaries FOLDER.")
    named = dict(named_dictionaries(lm, tags if tags or folders else lm.dictionary_tags, folders))
    recoveries = recover_concepts(lm, told, named, track=lambda places: with_progress(list(places), "scoring"))
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
