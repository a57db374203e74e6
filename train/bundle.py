"""Make the bundled model and its dictionaries: `python -m train bundle DEST --work WORK`.

This is how the model that `TinyModel("mini")` loads was made: generate story-world stories, train a language model with
the preset `mini` on them, then a dictionary at every site of every layer. `--model mini` keeps that language model and
trains only new dictionaries for it. The same command resumes a stopped run bit-exactly. DEST is a model folder in
float16 with a card (README.md) that states how the model was made, how long the training took, and how the dictionaries
measure.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from tinymodel_jax.analysis.evaluation.evaluation import evaluate
from tinymodel_jax.analysis.evaluation.model_passes import BATCH_ROWS
from tinymodel_jax.bundled import MINI, storyworld
from tinymodel_jax.bundled.storyworld import cast
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io.artifacts import save_model
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.params import flatten
from tinymodel_jax.runtime.atomic_files import replace_file
from tinymodel_jax.runtime.collectives import say
from tinymodel_jax.runtime.machine import processor
from tinymodel_jax.runtime.paths import user_path
from tinymodel_jax.training.data_folder import open_data
from train.activations import ActivationOptions
from train.dictionaries import dictionaries
from train.lm import lm
from train.prepare import prepare
from train.run import trained_seconds
from train.run_lock import held_folder
from train.sweep import SweepOptions

KINDS = ("M", "A", "Ra", "Rm", "Mo")
STORIES = 100_000
N_FEATURES, K = 512, 28
DICTIONARY_STEPS = 1500
ROW_LENGTH = 256
LIVING_ROWS, LIVING_TOKENS = 1000, 10
"""Training stories, and the number of their tokens on which a feature must be active to be kept."""
MEASURED_ROWS = 512
"""Held-out stories that the card's numbers are measured on."""
ENTROPY_STORIES = 2000
LANGUAGE_MODEL = re.compile(r"^- Language model: .*?(?=\n- )", re.DOTALL | re.MULTILINE)
"""The item of a card that states how the language model was made."""
TOLD, TEMPERATURE = 64, 0.6
"""Stories sampled from the model for the card, and their temperature."""


def bundle(
    dest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    *,
    work: Path,
    model: str | None = None,
) -> None:
    """Make the bundled model and its dictionaries, or resume a stopped run.

    Args:
        dest: folder to write: the model, its dictionaries and its card.
        work: folder for the data and the training runs, which are kept.
        model: language model to train only the dictionaries of, a published name or a folder; without it, one is
            trained.
    """
    for option, folder in (("DEST", dest), ("--work", work)):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{option} {folder} is a file; give a folder, which is created if it does not exist.")
    with held_folder(work):
        _make(dest, work, model)


def _make(dest: Path, work: Path, given: str | None) -> None:
    start = time.monotonic()
    data, lm_run, dictionary_run = (str(work / name) for name in ("data", "lm", "dictionaries"))
    prepare("storyworld", data, limit=STORIES, tokenizer="mini", row_length=ROW_LENGTH)
    if given is None:
        lm("mini", data=data, out=lm_run)
        if not (work / "lm" / "model").is_dir():
            return  # stopped by a signal; `lm` has printed so
    model = given or lm_run
    n_layers = TinyModel(model).config.n_layers
    sites = ",".join(f"{kind}{layer}" for layer in range(n_layers) for kind in KINDS)
    dictionaries(
        steps=DICTIONARY_STEPS,
        sweep=SweepOptions(N_FEATURES, "batch_topk", k=str(K)),
        source=ActivationOptions(model=model, sites=sites, data=data),
        out=dictionary_run,
    )
    if not (work / "dictionaries" / "sweep.json").is_file():
        return
    _pack(work, dest, given)
    say(f"{dest}: {_megabytes(dest):.1f} MB; this command took {(time.monotonic() - start) / 60:.0f} minutes")


def _pack(work: Path, dest: Path, given: str | None) -> None:
    """Write the model folder in float16, and its card."""
    model, data = TinyModel(given or work / "lm"), open_data(work / "data")
    model = model.with_params(model.config, model.params)  # without the dictionaries of a given model
    records = json.loads((work / "dictionaries" / "sweep.json").read_text("utf-8"))["dictionaries"]
    for record in records:
        model.attach(record["site"], work / "dictionaries" / record["folder"])
    for tag, living in _living_features(model, data.train[:LIVING_ROWS]).items():
        model.attach(tag, model.dictionaries[tag].with_features(living))
    found = {
        tag: Dictionary(model.dictionaries[tag].config, _half(model.dictionaries[tag].params))
        for tag in model.dictionary_tags
    }
    save_model(model.config, _half(flatten(model.params)), dest, model.tokenizer, found)
    card = _card(work, model, data.valid[:MEASURED_ROWS], _language_model(work, model, given))
    replace_file(dest / "README.md", card.encode())


def _living_features(model: TinyModel, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the numbers of the features to keep, by tag."""
    found = dict(model.dictionaries)
    active = {tag: np.zeros(dictionary.config.n_features, np.int64) for tag, dictionary in found.items()}
    keep = [dictionary.config.hook_in for dictionary in found.values()]
    for start in range(0, len(rows), BATCH_ROWS):
        ids = rows[start : start + BATCH_ROWS]
        _, acts = model.run_with_hooks(ids, None, keep=keep, return_logprobs=False)
        for tag, dictionary in found.items():
            of_text = np.asarray(dictionary.encode(acts[dictionary.config.hook_in]))[model.config.is_text(ids)]
            active[tag] += np.sum(of_text > 0, axis=0)
    return {tag: np.flatnonzero(counts >= LIVING_TOKENS) for tag, counts in active.items()}


def _half(params: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(array, np.float16) for name, array in params.items()}


def _card(work: Path, model: TinyModel, rows: np.ndarray, language_model: str) -> str:
    run = json.loads((work / "dictionaries" / "config.json").read_text("utf-8"))
    tags = model.dictionary_tags
    measured = evaluate(model, [model.dictionaries[tag] for tag in tags], np.asarray(rows, np.int32))
    lines = [
        f"| `{tag}` | {len(n.frequency)} | {n.l0:.1f} | {n.explained_variance:.3f} | {n.ce_recovered:.3f} | "
        f"{n.dead_fraction:.1%} |"
        for tag, n in zip(tags, measured, strict=True)
    ]
    cfg = model.config
    return f"""# The bundled model

`TinyModel("mini")`: {cfg.n_layers} layers, d_model {cfg.d_model}, {cfg.n_heads} heads, d_mlp {cfg.d_mlp}, context
{cfg.n_ctx}, {cfg.d_vocab} ids, {cfg.n_params:,} parameters; trained on the story world
(docs/concepts/story-world.md), with a dictionary at every site. float16 on disk, float32 in use.
`python -m train bundle DEST --work WORK` makes both from scratch; with `--model mini` it keeps the language model and
makes new dictionaries.

{language_model}
- Dictionaries: `batch_topk`, {N_FEATURES} features, k {K}, recipe `house`, {DICTIONARY_STEPS:,} steps of 4,096
  tokens, all in one run{_time_taken(work / "dictionaries")}. Features active on fewer than {LIVING_TOKENS} tokens of
  {LIVING_ROWS:,} training stories are left out. Measured on {measured[0].tokens:,} held-out tokens; `dead` is the share
  of features that are active on none of them.

| site | features | L0 | explained variance | CE recovered | dead |
|---|---|---|---|---|---|
{chr(10).join(lines)}

Versions (dictionaries): {", ".join(f"{name} {version}" for name, version in run["versions"].items())}; JAX devices:
{jax.device_count()} ({jax.devices()[0].platform}). Licence: that of this repository; the stories are
generated and contain no text by other authors.
"""


def _language_model(work: Path, model: TinyModel, given: str | None) -> str:
    """Return the card's item about the language model: that of the given model's own card, or how it was trained."""
    if given is not None:
        card = (MINI if given == "mini" else user_path(given)) / "README.md"
        found = LANGUAGE_MODEL.search(card.read_text("utf-8")) if card.is_file() else None
        return found[0] if found else f"- Language model: `{given}`, which this command did not train."
    run = json.loads((work / "lm" / "config.json").read_text("utf-8"))
    steps = [json.loads(line) for line in (work / "lm" / "metrics.jsonl").read_text("utf-8").splitlines()]
    held_out = [step["held_out_loss"] for step in steps if "held_out_loss" in step][-1]
    tokens = sum(step["tokens"] for step in steps)
    entropy = storyworld.entropy(storyworld.stories(1, ENTROPY_STORIES))
    return f"""- Language model: preset `mini`, {run["steps"]:,} steps of {run["batch_size"]} rows,
  {tokens / 1e6:.1f} M tokens of {STORIES:,} stories{_time_taken(work / "lm")}.
  Held-out loss {held_out:.3f} nats per token; the stories' entropy is at most {entropy:.3f}, so at least
  {held_out - entropy:.3f} nats per token are left to learn. {_stories_told(model)}"""


def _time_taken(run: Path) -> str:
    seconds = trained_seconds(run)
    return "" if seconds is None else f", in {seconds / 60:.0f} minutes on {processor()}"


def _stories_told(model: TinyModel) -> str:
    told = model.generate(["Once upon a time"] * TOLD, ROW_LENGTH - 8, TEMPERATURE)
    ends = sum(story.endswith("[END]") for story in told)
    kept = sum(len(set(re.findall(r"\w+", story)) & cast.NAMES) <= 2 for story in told)
    return f"""Of {TOLD} stories sampled at temperature {TEMPERATURE}, {ends} end, and {kept} name at most two
  characters, as all generated stories do."""


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
