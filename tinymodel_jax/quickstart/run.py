"""The quickstart from beginning to end: every step shows a screen of text, and the last one writes the page."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from tinymodel_jax.analysis.report.page import token_text, write_page
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.quickstart.named_features import NAMED_FROM, SITE, name_features
from tinymodel_jax.quickstart.page_content import describe_feature, interesting_features, script_data
from tinymodel_jax.quickstart.recovery import count_concepts
from tinymodel_jax.quickstart.steps import PROMPT, edit_features, open_place, show_features, sweep, tell
from tinymodel_jax.quickstart.transcoder import Amounts, train_transcoder

FULL = Amounts()


def run_quickstart(
    out: Path, seed: int, train: bool, console: Console, options: str = "", amounts: Amounts = FULL
) -> Path:
    """Show every step, and return the path of the page.

    Args:
        out: folder for the page.
        seed: of the story and of the trained dictionary.
        train: train a transcoder, which takes one to two minutes on two CPU cores.
        options: how the command was called, for the page.
        amounts: how much is looked at and trained on.
    """
    lm = TinyModel("mini")
    story = tell(lm, seed, console)
    told = list(storyworld.stories(seed=0, count=amounts.labelled, first=storyworld.FIRST_UNSEEN))
    named = name_features(lm, told, console)
    acts = np.asarray(lm[SITE]([[lm.config.begin_id, *story]]))[0, 1:]
    tokens = show_features(lm, story, acts, named, console)
    prompt = story[: open_place(lm, story)]
    swept = sweep(lm, prompt, named, console)
    edited = edit_features(lm, prompt, named, int(swept["strongest"]), console)
    training = train_transcoder(lm, amounts, seed, console) if train else None
    commands = next_commands()
    concepts = count_concepts(lm, told, training, console)
    content = {
        "model": f"{lm!r:.80}, trained on the story world",
        "site": SITE,
        "site_words": f"a sparse autoencoder of {named.acts.shape[2]} features of the residual stream in layer 2",
        "options": options,
        "prompt": PROMPT,
        "concept_stories": amounts.labelled,
        "named_from": NAMED_FROM,
        "tokens": [token_text(lm.tokenizer.decode([i])) for i in story],
        "edit": edited,
        "sweep": swept,
        "training": training and {key: training[key] for key in ("sentence", "chart", "rows")},
        "concepts": concepts,
        "n_concepts": len(storyworld.CONCEPTS),
        "features": [describe_feature(lm, named, feature) for feature in interesting_features(named, tokens)],
        "commands": commands,
        "data": script_data(named, tokens, acts),
    }
    path = out / "quickstart.html"
    write_page(path, "quickstart.html.jinja", content)
    console.rule("Done")
    where = f"The page: {path.resolve()}  (open it in a browser; it needs no network)"
    console.print(where, markup=False, soft_wrap=True)
    console.print(
        "Next, in the repository's folder (the last takes about ten minutes):",
        *commands,
        sep="\n  ",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return path


def next_commands() -> list[str]:
    """Return what to run next, with the programs as they are called from here."""
    tinymodel, python = _programs()
    return [
        f'{tinymodel} generate --model mini --n-toks 250 "Once upon a time"',
        f'{tinymodel} features --model mini --site Rm2 "Once upon a time, a fox was sad"',
        f"{python} -m train prepare storyworld data/mini --tokenizer mini --row-length 256 --limit 20000"
        f" && {python} -m train dictionaries --sites M0,M1 --k 8,16 --n-features 1024 --steps 200"
        f" --data data/mini --out runs/mine && {tinymodel} concepts --dictionaries runs/mine/dictionaries",
    ]


def _programs() -> tuple[str, str]:
    """Return how `tinymodel` and its Python are called: by name where a shell finds these, else by their paths."""
    folder = Path(sys.executable).parent
    python = _called(shutil.which("python", path=folder) or sys.executable)
    script = shutil.which("tinymodel", path=folder)
    return _called(script) if script else f"{python} -m tinymodel_jax", python


def _called(program: str) -> str:
    path = Path(program)
    if shutil.which(path.stem) == program:
        return path.stem
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
