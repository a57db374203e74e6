"""`tinymodel features`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinymodel_jax.commands.frame import print_json
from tinymodel_jax.commands.options import check_dictionary
from tinymodel_jax.commands.prompts import Prompts, load_lm, read_prompts, shown, token_rows
from tinymodel_jax.commands.tables import print_table
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.runtime.progress import with_progress

if TYPE_CHECKING:
    import numpy as np


def features(
    prompts: Prompts = (),
    *,
    site: str,
    top: int = 5,
    model: str = "tiny_model",
    dictionary: Path | None = None,
    stories: Path | None = None,
    limit: int = 8,
    ids: bool = False,
    n_heads: int | None = None,
    json: bool = False,
) -> None:
    """Show the most active features of a dictionary at each token.

    Args:
        prompts: texts to read.
        site: dictionary's tag, such as M2; with a feature, as M2N123, only that feature is shown.
        top: features shown at each token.
        model: published name, folder, or file (.pt, .safetensors) with the reference's names.
        dictionary: folder or file to use at the site, instead of the model's own or published one.
        stories: file of stories (.jsonl with "text", .txt with a story a line, also .gz) to read.
        limit: stories to read at most.
        ids: prompts are token ids, as "9996 51 56".
        n_heads: attention heads of a file whose width is not the published 768.
        json: print a JSON object a line.
    """
    import numpy as np

    if top < 1:
        raise ValueError(f"--top {top} must be 1 or more.")
    place, _ = Site.parse(site)
    check_dictionary(dictionary)
    given, told = read_prompts(prompts, stories, limit, ids)
    from tinymodel_jax.text.prompts_and_stories import story_ids

    lm = load_lm(model, n_heads, place.tag, dictionary)
    reader = lm[site]
    rows = [*token_rows(lm, given), *(story_ids(lm.tokenizer, story, lm.config.n_ctx) for story in told)]
    for row in with_progress(rows, "reading"):
        acts = np.asarray(reader([row]))[0]
        chosen = _strongest(acts, top) if reader.feature is None else [[(reader.feature, float(a))] for a in acts]
        words = [shown(lm, [tok], ids) for tok in row]
        if json:
            strongest = [[{"feature": f, "activation": round(a, 4)} for f, a in found] for found in chosen]
            tokens = [{"token": word, "features": found} for word, found in zip(words, strongest, strict=True)]
            print_json({"site": reader.site.tag, "text": shown(lm, row, ids), "tokens": tokens})
        else:
            _print_table(f"{site} on {shown(lm, row, ids)[:70]!r}", words, chosen)


def _strongest(acts: np.ndarray, top: int) -> list[list[tuple[int, float]]]:
    """Return the active features of each position, strongest first, `top` at most."""
    order = (-acts).argsort(axis=-1, kind="stable")[:, :top]
    return [[(int(f), float(a[f])) for f in o if a[f] > 0] for a, o in zip(acts, order, strict=True)]


def _print_table(title: str, words: Sequence[str], chosen: Sequence[Sequence[tuple[int, float]]]) -> None:
    from rich.text import Text

    rows = [
        [
            Text(word.replace("\n", "↵"), no_wrap=True),
            Text("  ").join(Text.assemble((str(f), "bold"), f" {a:.3f}") for f, a in found) if found else "–",
        ]
        for word, found in zip(words, chosen, strict=True)
    ]
    print_table(["token", "feature activation, strongest first"], rows, title=title)
