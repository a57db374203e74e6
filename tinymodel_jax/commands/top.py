"""`tinymodel top`: what the features of a dictionary react to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from tinymodel_jax.commands.frame import print_json
from tinymodel_jax.commands.options import check_dictionary, prepare_output
from tinymodel_jax.commands.prompts import load_lm
from tinymodel_jax.commands.rows import STORY_WORLD, open_rows
from tinymodel_jax.commands.searches import search, storyworld_truth
from tinymodel_jax.dictionaries.sites import Site


def top(
    *,
    site: str,
    model: str = "mini",
    data: str = STORY_WORLD,
    limit: int = 200,
    feature: int | None = None,
    contains: str | None = None,
    concept: str | None = None,
    top: int = 10,
    dictionary: Path | None = None,
    n_heads: int | None = None,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    json: bool = False,
) -> None:
    """Search tokens for what every feature of a dictionary reacts to, and show features or one of them.

    Args:
        site: dictionary's tag, such as M2; M2N123 is --site M2 --feature 123.
        model: published name, folder, or file (.pt, .safetensors) with the reference's names.
        data: folder of `python -m train prepare`, file of stories (.jsonl, .txt, also .gz), or `storyworld`.
        limit: rows to read at most.
        feature: show this one: contexts, quantiles, histogram, logit effects, partners.
        contains: list features whose top contexts peak on this text, the largest share first.
        concept: list features by how well they tell this concept of the story world (F1 at the best threshold).
        top: features, or contexts of the one, that are shown.
        dictionary: folder or file to use at the site, instead of the model's own or published one.
        n_heads: attention heads of a file whose width is not the published 768.
        out: file of the search's result: read if it is there, else written; a stopped search goes on.
        json: print a JSON object a line.
    """
    place, of_tag = Site.parse(site)
    if of_tag is not None and feature is not None:
        raise ValueError(f"--site {site} names a feature, and so does --feature {feature}; give one of them.")
    chosen = of_tag if feature is None else feature
    _check_options(top, (chosen, contains, concept), data, concept)
    check_dictionary(dictionary)
    prepare_output("--out", out)
    from tinymodel_jax.commands import top_views as views
    from tinymodel_jax.dictionaries.dictionary import resolve_indices
    from tinymodel_jax.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    lm = load_lm(model, n_heads, place.tag, dictionary)
    reader = lm[place.tag]
    if chosen is not None:
        chosen = int(resolve_indices(chosen, reader.dictionary.config.n_features))
    rows = open_rows(lm, data, limit)
    found = search(reader, rows, out, 1 if chosen is None else top)
    truth = storyworld_truth(lm, rows, limit) if data == STORY_WORLD else None
    if chosen is None:
        order, why = views.ranked(reader, found, rows, truth, contains, concept)
        records = views.feature_records(reader, found, rows, truth, order[:top], why)
        show: Any = views.print_features
    else:
        records = [views.feature_record(reader, found, rows, truth, chosen, top)]
        show = views.print_feature
    if json:
        for record in records:
            print_json(record)
    else:
        show(found, records)


def _check_options(top: int, questions: tuple[Any, ...], data: str, concept: str | None) -> None:
    if top < 1:
        raise ValueError(f"--top {top} must be 1 or more.")
    if sum(question is not None for question in questions) > 1:
        raise ValueError("--feature, --contains and --concept do not go together; give one of them.")
    if questions[1] == "":
        raise ValueError('--contains "": give a text, such as " happy".')
    if concept is None:
        return
    from tinymodel_jax.bundled.storyworld import CONCEPTS

    if concept not in CONCEPTS:
        import difflib

        close = ", ".join(difflib.get_close_matches(concept, CONCEPTS, cutoff=0.3)) or "none"
        raise ValueError(
            f"--concept {concept}: no concept of the story world. Closest: {close}. All: docs/storyworld.md."
        )
    if data != STORY_WORLD:
        raise ValueError(f"--concept {concept}: only the story world's tokens have known concepts; leave --data out.")
