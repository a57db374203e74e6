"""`tinymodel patch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tinymodel_jax.analysis.effects import PATCHED_HOOKS
from tinymodel_jax.block_order import BLOCK_HOOKS
from tinymodel_jax.commands.frame import print_json, print_table, signed
from tinymodel_jax.commands.hosts import ONE_PROCESS, HostOptions, join, shows
from tinymodel_jax.commands.inputs import shown, token_id, token_rows
from tinymodel_jax.commands.options import (
    MetricName,
    Model,
    ModelOptions,
    OutFile,
    TokenPair,
    check_metric_options,
    prepare_output,
)

if TYPE_CHECKING:
    from tinymodel_jax.analysis.effects.patching import Patching
    from tinymodel_jax.lm import TinyModel


def patch(
    clean: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CLEAN")],
    corrupted: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CORRUPTED")],
    *,
    metric: MetricName | None = None,
    logit_difference: TokenPair | None = None,
    answer: str | None = None,
    hooks: tuple[str, ...] = PATCHED_HOOKS,
    model: Model = ModelOptions(),
    out: OutFile = None,
    json: bool = False,
    hosts: HostOptions = ONE_PROCESS,
) -> None:
    """Patch activations of a clean prompt into a corrupted one, and show which restore the clean answer.

    The effect is 0 where patching changes nothing and 1 where it restores the clean run. By default it is measured by
    the logit difference of the most likely next tokens of both prompts, or by the log-probability of the token if both
    have the same one.

    Args:
        clean: text that leads to the answer.
        corrupted: text of the same number of tokens that does not.
        metric: measure the loss of the clean text's tokens, or the log-probability of --answer.
        logit_difference: two next tokens, such as " Lily" " Tim"; measure the logit of the first minus the second.
        answer: next token for --metric next_logprob; by default the model's most likely one after the clean text.
        hooks: hook points of a block to patch, by position, or by head where there are heads.
        out: .png or .svg file for heat maps of the effects.
        json: print a JSON object.
        hosts: processes that divide the positions and heads; each runs this same command, and the first prints and
            writes.
    """
    track = join(hosts)
    if out is not None and out.suffix not in (".png", ".svg"):
        raise ValueError(f"--out {out}: expected the name of a .png or .svg file.")
    check_metric_options(metric, logit_difference)
    if answer is not None and metric != "next_logprob":
        raise ValueError(
            f"--answer {answer!r} is the token of --metric next_logprob; give both, or --logit-difference."
        )
    unknown = [hook for hook in hooks if hook not in BLOCK_HOOKS]
    if unknown:
        raise ValueError(f"--hooks {' '.join(unknown)}: expected hook points of a block: {', '.join(BLOCK_HOOKS)}.")
    prepare_output("--out", out if shows(hosts) else None)
    lm = model.load()
    rows = token_rows(lm, [clean, corrupted])
    if len(rows[0]) != len(rows[1]):
        raise ValueError(
            f"the prompts have {len(rows[0])} and {len(rows[1])} tokens; they need the same number, so that positions "
            "correspond."
        )
    from tinymodel_jax.analysis.effects import metrics, patching
    from tinymodel_jax.analysis.report.charts import save_figure
    from tinymodel_jax.analysis.report.plots import patching_labels, plot_patching

    if logit_difference is not None:
        tokens = [lm.to_single_token(text) for text in logit_difference]
    else:
        tokens = [token_id(lm, answer, rows[0])] if metric != "loss" else []
        tokens += [token_id(lm, None, rows[1])] if metric is None else []
        tokens = list(dict.fromkeys(tokens))
    found = patching.patch(
        lm,
        rows[0],
        rows[1],
        hooks,
        metric=metrics.logit_difference(*tokens) if len(tokens) == 2 else metric or "next_logprob",
        next_ids=tokens if len(tokens) == 1 else None,
        track=track,
    )
    if not shows(hosts):
        return
    words = [shown(lm, [token], False) for token in rows[0]]
    measured = _metric_title([shown(lm, [token], False) for token in tokens])
    title = f"{measured}: clean {signed(found.clean)}, corrupted {signed(found.corrupted)}"
    labels = {table.kind: patching_labels(table, words) for table in found.tables}
    if json:
        print_json(_as_json(lm, found, labels, metric, tokens))
    else:
        print(title)
        _print_strongest(found, labels)
    if out is not None:  # last: the effects are printed even if the picture cannot be written
        save_figure(plot_patching(found, words, title), out, dpi=110, kind=out.suffix[1:])


def _metric_title(words: list[str]) -> str:
    if not words:
        return "loss of the clean text's tokens"
    if len(words) == 1:
        return f"log-probability of {words[0]!r}"
    return f"logit of {words[0]!r} minus {words[1]!r}"


def _as_json(
    lm: TinyModel, found: Patching, labels: dict[str, list[str]], metric: str | None, tokens: list[int]
) -> dict[str, Any]:
    tables = [
        {"hook": t.kind, "axis": t.axis, "labels": labels[t.kind], "effects": t.effects.round(6).tolist()}
        for t in found.tables
    ]
    answer, wrong = (*(shown(lm, [token], False) for token in tokens), None, None)[:2]
    named = {"metric": metric or "logit_difference", "answer": answer, "wrong": wrong}
    return {**named, "clean": found.clean, "corrupted": found.corrupted, "tables": tables}


def _print_strongest(found: Patching, labels: dict[str, list[str]], count: int = 5) -> None:
    rows = []
    for one in found.tables:
        order = (-abs(one.effects)).ravel().argsort(kind="stable")[:count]
        places = [divmod(int(place), one.effects.shape[1]) for place in order]
        for first, (layer, n) in enumerate(places):
            name = "" if first else one.kind
            rows.append([name, str(layer), labels[one.kind][n], signed(one.effects[layer, n])])
    print_table(
        ["hook point", "layer", "position or head", "effect"], rows, title="largest effects", right=["layer", "effect"]
    )
