"""`tinymodel sweep`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tinymodel_jax.commands.frame import print_json, print_table, significant
from tinymodel_jax.commands.inputs import Prompts, read_prompts, shown, token_id, token_rows
from tinymodel_jax.commands.options import ModelAndDictionary, ModelAndDictionaryOptions, require_positive
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.runtime.progress import with_progress

if TYPE_CHECKING:
    import numpy as np

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
        answer: next token whose log-probability is measured; by default the model's most likely one.
        readout: tag of a later dictionary, to show which of its features change most.
        top: number of features in the table, those with the largest effect; --json prints all.
        ids: read prompts as token ids, such as "9996 51 56", and print ids.
        json: print one JSON object per prompt.
    """
    place = Site.whole(site, "--site ")
    require_positive("--top", top)
    if (amount is None) != (kind == "ablate"):
        raise ValueError(f"--kind {kind} {'takes no --amount' if kind == 'ablate' else 'needs --amount NUMBER'}.")
    if not prompts:
        raise ValueError("nothing to sweep: give a prompt; `tinymodel importance` takes a data set.")
    given, _ = read_prompts(prompts, None, 1, ids)
    lm = model.load_with_dictionary(place)
    for row in token_rows(lm, given):
        token = token_id(lm, answer, row)
        effects = _effects(lm, site, row, kind, amount, features, token, readout)
        report = _report(lm, site, row, effects, kind, token, ids)
        if json:
            print_json(report | {"features": _entries(lm, effects, len(effects.features), ids)})
        else:
            _print_effects(report, _entries(lm, effects, top, ids), len(effects.features))


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
    return "  ".join(f"{one['token']!r} {one['logit']:+.3f}" for one in tokens[:count])


def _effects(
    lm: TinyModel,
    site: str,
    row: list[int],
    kind: Kind,
    amount: float | None,
    features: tuple[int, ...],
    token: int,
    readout: str | None,
) -> FeatureEffects:
    from tinymodel_jax.analysis.effects import sweeps

    chosen = list(features) or None
    if amount is None:
        return sweeps.ablate(lm, site, [row], chosen, next_ids=[token], readout=readout, track=with_progress)
    changed = {"clamp": sweeps.clamp, "steer": sweeps.steer}[kind]
    return changed(lm, site, [row], amount, chosen, next_ids=[token], readout=readout, track=with_progress)


def _report(
    lm: TinyModel, site: str, row: list[int], effects: FeatureEffects, kind: Kind, token: int, ids: bool
) -> dict[str, Any]:
    """Return what is reported besides the features: for ablations, also how well gradients rank the features."""
    import numpy as np

    report: dict[str, Any] = {
        "site": site,
        "kind": kind,
        "text": shown(lm, row, ids),
        "answer": shown(lm, [token], ids),
    }
    if kind == "ablate" and len(effects.features) > 1:
        from tinymodel_jax.analysis.effects.attribution import attribute, rank_correlation

        for measure in ("loss", "next_logprob"):
            estimate = attribute(lm, site, [row], effects.features, metric=measure, next_ids=[token])
            correlation = rank_correlation(estimate.change, getattr(effects, measure))
            report[f"{measure}_rank_correlation"] = round(correlation, 4) if np.isfinite(correlation) else None
    return report


def _entries(lm: TinyModel, effects: FeatureEffects, top: int, ids: bool) -> list[dict[str, Any]]:
    """Return the features that change the predictions most, largest effect first."""
    entries = []
    order = (-effects.kl).argsort(kind="stable")[:top]
    for place, tokens in zip(order, moved_tokens(lm, effects.final_stream[order], ids), strict=True):
        numbers = {name: significant(getattr(effects, name)[place]) for name in ("kl", "loss", "next_logprob")}
        entry: dict[str, Any] = {"feature": int(effects.features[place]), **numbers, "tokens": tokens}
        if effects.readout_features is not None and effects.readout_changes is not None:
            changed = zip(effects.readout_features[place], effects.readout_changes[place], strict=True)
            entry["readout"] = [{"feature": int(f), "change": significant(change)} for f, change in changed]
        entries.append(entry)
    return entries


def _print_effects(report: dict[str, Any], entries: list[dict[str, Any]], n: int) -> None:
    columns = ["feature", "KL", "loss", f"log p({report['answer']!r})"]
    has_readout = any("readout" in entry for entry in entries)
    rows = []
    for entry in entries:
        row = [str(entry["feature"]), f"{entry['kl']:.4f}", f"{entry['loss']:+.4f}", f"{entry['next_logprob']:+.4f}"]
        row.append(tokens_cell(entry["tokens"]))
        if has_readout:
            row.append("  ".join(f"{x['feature']} {x['change']:+.3f}" for x in entry["readout"][:4]))
        rows.append(row)
    title = f"{report['kind']} each of {n} features of {report['site']} on {_end(report['text'])!r}: changes, nats"
    print_table(
        [*columns, "tokens: mean logit", *["readout: mean change"] * has_readout], rows, title=title, right=columns
    )
    if report.get("loss_rank_correlation") is not None:
        print(
            "rank correlation (Spearman) of activation x gradient with the measured effects: loss "
            f"{report['loss_rank_correlation']}, next token {report['next_logprob_rank_correlation']}"
        )


def _end(text: str, width: int = 60) -> str:
    return text if len(text) <= width else "…" + text[-width:]
