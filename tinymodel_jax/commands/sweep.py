"""`tinymodel sweep`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from tinymodel_jax.commands.frame import print_json, print_table, signed, significant
from tinymodel_jax.commands.inputs import Prompts, read_prompts, shown, token_id, token_rows
from tinymodel_jax.commands.options import (
    MetricName,
    ModelAndDictionary,
    ModelAndDictionaryOptions,
    TokenPair,
    check_metric_options,
    require_positive,
)
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.runtime.progress import with_progress

if TYPE_CHECKING:
    import numpy as np

    from tinymodel_jax.analysis.effects.metrics import Metric
    from tinymodel_jax.analysis.effects.sweeps import FeatureEffects
    from tinymodel_jax.lm import TinyModel

Kind = Literal["ablate", "clamp", "steer"]
MOVED_TOKENS = 10
"""Tokens listed for each feature in JSON."""


def sweep(
    prompts: Prompts = (),
    *,
    site: str,
    kind: Kind = "ablate",
    amount: float | None = None,
    features: tuple[int, ...] = (),
    metric: MetricName | None = None,
    logit_difference: TokenPair | None = None,
    answer: str | None = None,
    readout: str | None = None,
    top: int = 10,
    model: ModelAndDictionary = ModelAndDictionaryOptions(),
    ids: bool = False,
    json: bool = False,
) -> None:
    """Change the features of a dictionary on a prompt, one at a time, and show how the predictions change.

    To measure every feature over a data set, use `tinymodel importance`.

    Args:
        prompts: texts; features are changed on each text separately.
        site: tag of the dictionary, such as M2.
        kind: turn features off, hold them at --amount, or add --amount times their decoder direction.
        amount: activation for clamp, strength for steer.
        features: indices of the features to change; by default all that are active on the prompt.
        metric: rank features by the change of the loss, or of the log-probability of --answer, instead of the KL
            divergence.
        logit_difference: two next tokens, such as " Lily" " Tim"; rank features by the change of the logit of the first
            minus the second, and show it.
        answer: next token whose log-probability is measured; by default the model's most likely one.
        readout: tag of a later dictionary, to show which of its features change most.
        top: number of features in the table, those with the largest effect; --json prints all.
        ids: read prompts as token ids, such as "9996 51 56", and print ids.
        json: print one JSON object per prompt.
    """
    place = Site.whole(site, "--site ")
    require_positive("--top", top)
    check_metric_options(metric, logit_difference)
    if readout is not None:
        Site.whole(readout, "--readout ")
    if (amount is None) != (kind == "ablate"):
        raise ValueError(f"--kind {kind} {'takes no --amount' if kind == 'ablate' else 'needs --amount NUMBER'}.")
    if not prompts:
        raise ValueError("nothing to sweep: give a prompt; `tinymodel importance` takes a data set.")
    given, _ = read_prompts(prompts, None, 1, ids)
    lm = model.load_with_dictionary(place)
    difference = None if logit_difference is None else [lm.to_single_token(text) for text in logit_difference]
    ranked_by = metric or ("kl" if difference is None else "logit_difference")
    for row in token_rows(lm, given):
        token = token_id(lm, answer, row)
        effects = _effects(lm, site, row, kind, amount, features, token, readout, difference)
        report = _report(lm, site, row, effects, kind, token, ids, difference) | {"ranked_by": ranked_by}
        if json:
            print_json(report | {"features": _entries(lm, effects, ranked_by, len(effects.features), ids)})
        else:
            _print_effects(report, _entries(lm, effects, ranked_by, top, ids), len(effects.features))


def moved_tokens(lm: TinyModel, final_streams: np.ndarray, ids: bool) -> list[list[dict[str, Any]]]:
    """Return, for each change of the final stream, the tokens whose mean logit changes most.

    Args:
        ids: show tokens as their ids.
    """
    import numpy as np

    from tinymodel_jax.analysis.search.logit_effects import strongest_tokens

    up, raised, down, lowered = strongest_tokens(lm, final_streams, MOVED_TOKENS)
    tokens, logits = np.concatenate([up, down], axis=1), np.concatenate([raised, lowered], axis=1)
    order = np.argsort(-np.abs(logits), axis=1, kind="stable")[:, :MOVED_TOKENS]
    moved = zip(np.take_along_axis(tokens, order, 1).tolist(), np.take_along_axis(logits, order, 1), strict=True)
    return [
        [{"token": shown(lm, [t], ids), "logit": significant(x)} for t, x in zip(*one, strict=True)] for one in moved
    ]


def tokens_cell(tokens: list[dict[str, Any]], count: int = 2) -> str:
    """Return the first of the `moved_tokens` as tables show them."""
    return "  ".join(f"{one['token']!r} {signed(one['logit'], 3)}" for one in tokens[:count])


def _effects(
    lm: TinyModel,
    site: str,
    row: list[int],
    kind: Kind,
    amount: float | None,
    features: tuple[int, ...],
    token: int,
    readout: str | None,
    difference: list[int] | None,
) -> FeatureEffects:
    from tinymodel_jax.analysis.effects import metrics, sweeps

    chosen = list(features) or None
    metric = None if difference is None else metrics.logit_difference(*difference)
    run = partial({"ablate": sweeps.ablate, "clamp": sweeps.clamp, "steer": sweeps.steer}[kind], lm, site, [row])
    if amount is not None:
        run = partial(run, amount)
    return run(chosen, next_ids=[token], readout=readout, metric=metric, track=with_progress)


def _report(
    lm: TinyModel,
    site: str,
    row: list[int],
    effects: FeatureEffects,
    kind: Kind,
    token: int,
    ids: bool,
    difference: list[int] | None,
) -> dict[str, Any]:
    """Return what is reported besides the features: for ablations, also how well gradients rank the features."""
    import numpy as np

    report: dict[str, Any] = {
        "site": site,
        "kind": kind,
        "text": shown(lm, row, ids),
        "answer": shown(lm, [token], ids),
    }
    if difference is not None:
        report["logit_difference"] = [shown(lm, [one], ids) for one in difference]
    has_estimates = kind == "ablate" and not lm[site].dictionary.config.is_crosscoder
    if has_estimates and len(effects.features) > 1:
        from tinymodel_jax.analysis.effects import metrics
        from tinymodel_jax.analysis.effects.attribution import attribute, rank_correlation

        asked: dict[str, Metric] = {"loss": "loss", "next_logprob": "next_logprob"}
        if difference is not None:
            asked["logit_difference"] = metrics.logit_difference(*difference)
        for measure, metric in asked.items():
            estimate = attribute(lm, site, [row], effects.features, metric=metric, next_ids=[token])
            correlation = rank_correlation(estimate.change, _changes(effects, measure))
            report[f"{measure}_rank_correlation"] = round(correlation, 4) if np.isfinite(correlation) else None
    return report


def _changes(effects: FeatureEffects, measure: str) -> np.ndarray:
    """Return the changes of a measure, which is a field of the effects or the metric that was asked for."""
    changes = effects.metric if measure == "logit_difference" else getattr(effects, measure)
    assert changes is not None
    return changes


def _entries(lm: TinyModel, effects: FeatureEffects, ranked_by: str, top: int, ids: bool) -> list[dict[str, Any]]:
    """Return the features that change a measure most in either direction, largest effect first."""
    entries = []
    measures = ["kl", "loss", "next_logprob"] + ["logit_difference"] * (effects.metric is not None)
    order = (-abs(_changes(effects, ranked_by))).argsort(kind="stable")[:top]
    for place, tokens in zip(order, moved_tokens(lm, effects.final_stream[order], ids), strict=True):
        numbers = {name: significant(float(_changes(effects, name)[place])) for name in measures}
        entry: dict[str, Any] = {"feature": int(effects.features[place]), **numbers, "tokens": tokens}
        if effects.readout_features is not None and effects.readout_changes is not None:
            changed = zip(effects.readout_features[place], effects.readout_changes[place], strict=True)
            entry["readout"] = [{"feature": int(f), "change": significant(change)} for f, change in changed]
        entries.append(entry)
    return entries


def _print_effects(report: dict[str, Any], entries: list[dict[str, Any]], n: int) -> None:
    names = {"kl": "KL", "loss": "loss", "next_logprob": f"log p({report['answer']!r})"}
    if "logit_difference" in report:
        names["logit_difference"] = "logit {!r} - {!r}".format(*report["logit_difference"])
    # the measure that ranks the features comes first
    names = {report["ranked_by"]: names[report["ranked_by"]]} | names
    columns = ["feature", *names.values()]
    has_readout = any("readout" in entry for entry in entries)
    rows = []
    for entry in entries:
        row = [str(entry["feature"])]
        row += [f"{entry[name]:.4f}" if name == "kl" else signed(entry[name], 4) for name in names]
        row.append(tokens_cell(entry["tokens"]))
        if has_readout:
            row.append("  ".join(f"{x['feature']} {signed(x['change'], 3)}" for x in entry["readout"][:4]))
        rows.append(row)
    title = f"{report['kind']} each of {n} features of {report['site']} on {_end(report['text'])!r}: changes in nats"
    title += ", of the logit difference in logits" if "logit_difference" in report else ""
    print_table(
        [*columns, "tokens: mean logit", *["readout: mean change"] * has_readout], rows, title=title, right=columns
    )
    if report.get("loss_rank_correlation") is not None:
        labels = {"loss": "loss", "next_logprob": "next token", "logit_difference": "logit difference"}
        found = [f"{labels[name]} {report[f'{name}_rank_correlation']}" for name in names if name in labels]
        print(f"rank correlation (Spearman) of activation x gradient with the measured effects: {', '.join(found)}")


def _end(text: str, width: int = 60) -> str:
    return text if len(text) <= width else "…" + text[-width:]
