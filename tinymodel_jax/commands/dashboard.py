"""`tinymodel dashboard`: static pages about all features of a dictionary, or of several that link to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from tinymodel_jax.bundled import STORY_WORLD
from tinymodel_jax.commands.frame import print_json
from tinymodel_jax.commands.inputs import open_rows, require_data, token_rows
from tinymodel_jax.commands.options import (
    ModelAndDictionary,
    ModelAndDictionaryOptions,
    make_output_folder,
    parse_sites,
    quoted,
    require_positive,
)
from tinymodel_jax.dictionaries.sites import Site

if TYPE_CHECKING:
    import numpy as np

    from tinymodel_jax.analysis.report.dashboard.neuronpedia import Source
    from tinymodel_jax.commands.dashboard_steps import Clock, Place
    from tinymodel_jax.lm import TinyModel


def dashboard(
    *,
    site: str,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    model: ModelAndDictionary = ModelAndDictionaryOptions("mini"),
    directions: Path | None = None,
    data: str = STORY_WORLD,
    limit: int = 200,
    others: Annotated[str, tyro.conf.arg(name="with")] = "",
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    effects: int = 0,
    export: tuple[Literal["neuronpedia"], Path] | None = None,
    json: bool = False,
) -> None:
    """Write pages about all features of dictionaries; open index.html in the folder, no server needed.

    If the command is stopped, run it again: it resumes the search and the measurement of effects.

    Args:
        site: tag of the dictionary, such as M2. Several, such as M0,M1,M2, make a set of pages that link to each other;
            --dictionary is then a folder that holds each dictionary in a folder named by its tag.
        out: folder for the pages; an older dashboard there is replaced, but a set keeps what was measured on the same
            input.
        directions: .npy file of directions (n, width) at the hook point that --site names, in place of a dictionary.
        data: folder of `python -m train prepare`, file of stories (.jsonl, .txt, also .gz), or `storyworld`.
        limit: largest number of rows to read.
        others: dictionaries to search for upstream and downstream features, such as M0,M1; by default all, and for a
            set its own.
        text: text to make a page about; can be given several times.
        effects: number of rows on which every feature is turned off to measure its effect; 0 leaves effects out.
        export: also write what the pages show in the layout of Neuronpedia's exports, into this folder.
        json: print a JSON object about the pages instead of a sentence.
    """
    require_positive("--limit", limit)
    sites = _sites(site, model.dictionary, directions)
    if effects < 0:
        raise ValueError(f"--effects {effects} must be 0 (none) or the number of rows to measure on.")
    require_data(data)
    make_output_folder("--out", out.absolute().parent)
    from tinymodel_jax.analysis.report.dashboard.neuronpedia import write_source
    from tinymodel_jax.analysis.search.resumable import OtherWorkError
    from tinymodel_jax.commands.dashboard_steps import Clock, Work, build_one, build_set
    from tinymodel_jax.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    lm, places = _load(model, sites, directions)
    sources = [] if export is None else _new_sources(export[1], model.name, places)
    linked = _linked_tags(lm, sites, others)
    rows, texts = open_rows(lm, data, limit), [_encoded(lm, one) for one in text]
    measured = _effect_rows(lm, rows, effects)
    clock = Clock()
    work = Work(lm, rows, limit if data == STORY_WORLD else None, measured, texts, linked, clock)
    try:
        pages = build_one(work, places[0], out) if len(places) == 1 else build_set(work, places, out)
    except OtherWorkError as error:
        raise ValueError(
            f"--out {out}: {out.absolute()}.partial holds unfinished work on a dashboard with other options; give "
            "those options to resume it, or delete that folder to start again."
        ) from error
    if export is not None:
        for place, source in zip(places, sources, strict=True):
            folder = out if len(places) == 1 else out / place.tag
            write_source(folder, export[1], source, place.reader, place.heading, data, rows.shape[1])
    _report(out, pages, clock, json)


def _sites(given: str, dictionary: Path | None, directions: Path | None) -> list[Site]:
    """Return the sites of `--site`, each once, in the order of the forward pass.

    Raises:
        ValueError: one is not a tag, names a feature, or does not go with the other options.
    """
    sites = sorted({Site.whole(tag) for tag in parse_sites("--site", given) or [given]}, key=lambda site: site.order)
    if directions is None:
        return sites
    if len(sites) > 1:
        raise ValueError(f"--directions {directions} belongs to one --site, not to {given}.")
    if dictionary:
        raise ValueError("--directions and --dictionary cannot be combined; give one of them.")
    if sites[0].hook_in != sites[0].hook_out:
        raise ValueError(
            f"--directions: {given} reads {sites[0].hook_in} and predicts {sites[0].hook_out}; name one hook point, "
            f"such as --site {sites[0].hook_out}."
        )
    return sites


def _load(
    model: ModelAndDictionaryOptions, sites: Sequence[Site], directions: Path | None
) -> tuple[TinyModel, list[Place]]:
    """Load the model and its dictionaries, and say how the pages name them."""
    from tinymodel_jax.commands.dashboard_steps import Place

    if directions is not None:
        return _load_directions(model, sites[0], directions)
    own = [model] * len(sites)
    if len(sites) > 1 and (folder := model.dictionary) is not None:
        from tinymodel_jax.io.hub.folders import local_dictionaries

        folder = local_dictionaries(folder)
        own = [dataclasses.replace(model, dictionary=folder / site.tag) for site in sites]
        missing = [str(one.dictionary) for one in own if one.dictionary and not one.dictionary.exists()]
        if missing:
            raise FileNotFoundError(
                f"--dictionary {folder}: {', '.join(missing)} does not exist; for several sites, give a folder that "
                "holds each dictionary in a folder named by its tag."
            )
    lm = own[0].load_with_dictionary(sites[0])
    for one, site in zip(own[1:], sites[1:], strict=True):
        if one.dictionary is not None:
            lm.attach(site.tag, one.dictionary)
    return lm, [Place(lm[site.tag], site.meaning, one.python(site)) for one, site in zip(own, sites, strict=True)]


def _load_directions(model: ModelAndDictionaryOptions, site: Site, path: Path) -> tuple[TinyModel, list[Place]]:
    """Load the model, with directions of a file at a hook point.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it holds no directions of the width at the site, or the model has no such site.
    """
    import numpy as np

    from tinymodel_jax.commands.dashboard_steps import Place
    from tinymodel_jax.dictionaries.dictionary import Dictionary
    from tinymodel_jax.dictionaries.sites import require_layer
    from tinymodel_jax.model.hook_points import vector_width

    if not path.is_file():
        raise FileNotFoundError(f"--directions {path} is not a file; write one: numpy.save({quoted(path)}, array).")
    try:
        array = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except (ValueError, EOFError) as error:
        raise ValueError(f"--directions {path} is not a .npy file of numbers ({error}).") from error
    lm = model.load()
    require_layer(site, lm.config, "--site ")
    width = vector_width(site.hook_in, lm.config)
    if array.ndim != 2 or array.shape[1] != width:
        raise ValueError(
            f"--directions {path} has shape {array.shape}; directions at {site.hook_in} have shape (n, {width})."
        )
    lm.attach(site.tag, Dictionary.from_directions(site.hook_in, array))
    setup = (
        "import numpy as np",
        "from tinymodel_jax import Dictionary, TinyModel",
        *model.python(site)[1:],
        f"directions = Dictionary.from_directions({quoted(site.hook_in)}, np.load({quoted(path)}))",
        f"lm.attach({quoted(site.tag)}, directions)",
    )
    about = f"directions of {path.name} at {site.hook_in}, activation max(0, direction · value)"
    return lm, [Place(lm[site.tag], about, setup)]


def _new_sources(dest: Path, model: str, places: Sequence[Place]) -> list[Source]:
    """Return what Neuronpedia calls each dictionary.

    Raises:
        ValueError: the folder of one exists.
    """
    from tinymodel_jax.analysis.report.dashboard.neuronpedia import source_of

    make_output_folder("--export", dest)
    sources = [source_of(model, place.reader.site) for place in places]
    for source in sources:
        if (dest / source.folder).exists():
            raise ValueError(
                f"--export neuronpedia {dest}: {dest / source.folder} exists; remove it or name another folder."
            )
    return sources


def _linked_tags(lm: TinyModel, sites: Sequence[Site], others: str) -> list[str]:
    """Return the tags of the dictionaries to look for links in, checked and loaded."""
    own = [site.tag for site in sites]
    given = [lm[tag].site.tag for tag in parse_sites("--with", others)]
    if len(own) > 1:
        return list(dict.fromkeys([*own, *given]))
    return given or [lm[tag].site.tag for tag in lm.dictionary_tags]


def _effect_rows(lm: TinyModel, rows: np.ndarray, effects: int) -> np.ndarray:
    """Return the rows on which every feature is turned off.

    Raises:
        ValueError: there are not as many.
    """
    measured = rows[(rows[:, 1:] != lm.config.pad_id).any(axis=1)][:effects]
    if len(measured) < effects:
        raise ValueError(
            f"--effects {effects}: {len(measured)} of the rows read have a token to predict; give at most that many, "
            "or a larger --limit."
        )
    return measured


def _encoded(lm: TinyModel, text: str) -> list[int]:
    (ids,) = token_rows(lm, [text])
    if not 1 < len(ids) <= lm.config.n_ctx:
        raise ValueError(f"--text {text[:30]!r} has {len(ids) - 1} tokens; a page takes 1 to {lm.config.n_ctx - 1}.")
    return ids


def _report(out: Path, pages: dict[str, int], clock: Clock, json: bool) -> None:
    """Print what was written.

    Args:
        pages: number of features by the dictionary's tag.
    """
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    page, n_features, seconds = str(out / "index.html"), sum(pages.values()), clock.rounded()
    if json:
        place: dict[str, Any] = {"site": next(iter(pages))} if len(pages) == 1 else {"sites": list(pages)}
        print_json({"page": page, **place, "n_features": n_features, "bytes": size, "seconds": seconds})
        return
    steps = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "all")
    print(
        f"{page}: {n_features:,} features of {', '.join(pages)}, {size / 1e6:.1f} MB, in {seconds['all']} s ({steps})"
    )
