"""`tinymodel graph`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tinymodel_jax.bundled import STORY_WORLD
from tinymodel_jax.commands.inputs import open_rows, require_data, storyworld_truth
from tinymodel_jax.commands.options import (
    Model,
    ModelOptions,
    OutFile,
    dictionary_folders,
    parse_sites,
    prepare_output,
    require_positive,
)
from tinymodel_jax.runtime.progress import with_progress

if TYPE_CHECKING:
    from tinymodel_jax.analysis.circuits import AttributionGraph
    from tinymodel_jax.analysis.report.graph.features import FeatureFacts
    from tinymodel_jax.lm import TinyModel


def graph(
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")],
    *,
    target: str | None = None,
    vs: str | None = None,
    sites: str = "",
    max_nodes: int = 1000,
    node_share: float = 1.0,
    edge_share: float = 0.98,
    model: Model = ModelOptions("mini"),
    dictionaries: Path | None = None,
    data: str = STORY_WORLD,
    limit: int = 50,
    dashboard: Path | None = None,
    out: OutFile = None,
    json: Path | None = None,
) -> None:
    """Write a page about what a prediction is made of: its attribution graph, exact up to rounding.

    The page is one file that needs no network.

    Args:
        prompt: text whose next token is explained.
        target: next token to explain, such as " Lily"; by default the most likely ones.
        vs: explain the logit of --target minus that of this token.
        sites: tags of dictionaries, such as A1,A2, whose features are nodes in addition to those of the transcoders
            M0, M1, …; or `neurons`, for the neurons of the MLPs in their place.
        dictionaries: folder, also hub:OWNER/NAME/PATH, that holds dictionaries, each in a folder named by its tag, to
            use instead of the model's own or the published ones.
        max_nodes: largest number of nodes.
        node_share: keep the fewest nodes with this share of the influence on the targets.
        edge_share: keep the fewest links with this share of the influence that links carry.
        data: what to search for the features' strongest contexts: folder of `python -m train prepare`, file of stories
            (.jsonl, .txt, also .gz), or `storyworld`.
        limit: largest number of rows to search; 0 leaves contexts and concepts out.
        dashboard: folder of `tinymodel dashboard` to take contexts and concepts from, instead of searching. Its pages
            and the graph link to each other.
        out: the page, an .html file.
        json: file for circuit-tracer's front end and Neuronpedia.
    """
    _check(target, vs, max_nodes, node_share, edge_share, limit, out, json)
    if dashboard is None and limit:
        require_data(data)
    from tinymodel_jax.analysis import circuits
    from tinymodel_jax.analysis.effects.metrics import logit_difference
    from tinymodel_jax.analysis.report.graph import save_page
    from tinymodel_jax.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    from tinymodel_jax.analysis.circuits.neurons import NEURONS

    lm, tags = _load(model, dictionaries), NEURONS if sites == NEURONS else parse_sites("--sites", sites)
    chosen: Any = None if target is None else lm.to_single_token(target)
    if vs is not None:
        chosen = logit_difference(chosen, lm.to_single_token(vs))
    try:
        found = circuits.attribution_graph(lm, prompt, chosen, max_nodes, dictionaries=tags, track=with_progress)
    except ValueError as error:
        raise ValueError(_with_options(str(error))) from error
    found = found.prune(node_share, edge_share)
    said = f"{len(found.nodes):,} nodes, {len(found.edges):,} links, {100 * found.scores.unexplained:.1f} % unexplained"
    facts = None if out is None else _facts(lm, found, data, limit, dashboard)
    if json is not None:
        names = facts and facts.concepts()
        circuits.save_circuit_tracer(json, lm, prompt, found, chosen, scan=Path(model.name).name, names=names)
        print(f"{json}: {said}")
    if out is not None:
        save_page(out, lm, prompt, found, chosen, dictionaries=tags, facts=facts, track=with_progress)
        print(f"{out}: {said}, {out.stat().st_size / 1e6:.1f} MB")


def _check(
    target: str | None,
    vs: str | None,
    max_nodes: int,
    node_share: float,
    edge_share: float,
    limit: int,
    out: Path | None,
    json: Path | None,
) -> None:
    if out is None and json is None:
        raise ValueError("nothing to write: give -o graph.html, --json graph.json, or both.")
    for option, path, suffix in (("--out", out, ".html"), ("--json", json, ".json")):
        if path is not None and path.suffix != suffix and not path.is_dir():
            raise ValueError(f"{option} {path}: expected the name of a {suffix} file.")
        prepare_output(option, path)
    if vs is not None and target is None:
        raise ValueError(f"--vs {vs!r} is compared with --target; give both.")
    if vs is not None and vs == target:
        raise ValueError(f"--vs and --target are both {vs!r}, so the difference is always 0; give two tokens.")
    require_positive("--max-nodes", max_nodes)
    for option, share in (("--node-share", node_share), ("--edge-share", edge_share)):
        if not 0 < share <= 1:
            raise ValueError(f"{option} {share} must be above 0 and at most 1.")
    if limit < 0:
        raise ValueError(f"--limit {limit} must be 0 (no contexts) or the number of rows to search.")


def _load(model: ModelOptions, dictionaries: Path | None) -> TinyModel:
    folders = [] if dictionaries is None else dictionary_folders(dictionaries)
    lm = model.load()
    for folder in folders:
        lm.attach(folder.name, folder)
    return lm


def _with_options(message: str) -> str:
    """Return an error of `attribution_graph` with what to do about it in this command."""
    if "lm.attach(" in message:
        return f"{message} For this command: --dictionaries FOLDER, or --sites neurons."
    return message.replace("attribution_graph: max_nodes=", "--max-nodes ")


def _facts(lm: TinyModel, graph: AttributionGraph, data: str, limit: int, dashboard: Path | None) -> FeatureFacts:
    """Return what the page shows about the features."""
    from tinymodel_jax.analysis.report.graph.features import dashboard_facts, logit_facts, measured_facts
    from tinymodel_jax.bundled.storyworld import CONCEPTS

    if dashboard is not None:
        return dashboard_facts(lm, graph, dashboard)
    if not limit:
        return logit_facts(lm, graph)
    rows = open_rows(lm, data, limit)
    if data != STORY_WORLD:
        return measured_facts(lm, graph, rows, track=with_progress)
    return measured_facts(lm, graph, rows, storyworld_truth(lm, rows, limit), CONCEPTS, track=with_progress)
