"""`tinymodel features`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinymodel_jax.commands.frame import print_json, print_table
from tinymodel_jax.commands.inputs import Prompts, read_prompts, shown, token_rows
from tinymodel_jax.commands.options import ModelAndDictionary, ModelAndDictionaryOptions, require_positive
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.runtime.progress import with_progress

if TYPE_CHECKING:
    import numpy as np


def features(
    prompts: Prompts = (),
    *,
    site: str,
    top: int = 5,
    model: ModelAndDictionary = ModelAndDictionaryOptions(),
    stories: Path | None = None,
    limit: int = 8,
    ids: bool = False,
    json: bool = False,
) -> None:
    """Show the most active features of a dictionary at each token.

    Args:
        prompts: texts to read.
        site: tag of the dictionary, such as M2, or of one feature, such as M2N123.
        top: number of features to show at each token.
        stories: file of stories to read: .jsonl with "text", or .txt with one story per line; also .gz.
        limit: largest number of stories to read.
        ids: read prompts as token ids, such as "9996 51 56", and print ids.
        json: print one JSON object per line.
    """
    import numpy as np

    require_positive("--top", top)
    place, _ = Site.parse(site)
    texts, from_file = read_prompts(prompts, stories, limit, ids)
    from tinymodel_jax.text.prompts_and_stories import story_ids

    lm = model.load_with_dictionary(place)
    reader = lm[site]
    rows = [*token_rows(lm, texts), *(story_ids(lm.tokenizer, story, lm.config.n_ctx) for story in from_file)]
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
    """Return up to `top` active features of each position, strongest first."""
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
