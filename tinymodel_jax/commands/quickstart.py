"""`tinymodel quickstart`: the steps in order, the page, and what to run next."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tinymodel_jax.commands.options import make_output_folder

if TYPE_CHECKING:
    from rich.console import Console

    from tinymodel_jax.commands.quickstart_steps import Amounts


def quickstart(*, out: Path = Path("runs/quickstart"), seed: int = 0, no_train: bool = False) -> None:
    """Tour the bundled model, train a dictionary as you watch, and write a page about both.

    It needs no network and takes two to four minutes on two CPU cores.

    Args:
        out: folder for the page, quickstart.html.
        seed: seed of the story and of the trained dictionary.
        no_train: leave out the training.
    """
    if not 0 <= seed < 2**32 - 1:
        raise ValueError(f"--seed {seed}: seeds are 0 to {2**32 - 2}.")
    make_output_folder("--out", out)
    from rich.console import Console

    console = Console()
    console.print(f"Looking into the bundled model; it takes {'one to two' if no_train else 'two to four'} minutes …")
    from tinymodel_jax.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    options = f"{f' --seed {seed}' if seed else ''}{' --no-train' if no_train else ''}"
    run_quickstart(out, seed, not no_train, console, options)


def run_quickstart(
    out: Path, seed: int, train: bool, console: Console, options: str = "", amounts: Amounts | None = None
) -> Path:
    """Run every step, and return the path of the page.

    Args:
        out: folder for the page.
        seed: seed of the story and of the trained dictionary.
        train: train a transcoder, which takes one to two minutes on two CPU cores.
        options: options of the command line, for the page.
        amounts: how much is read and trained on; a minute's training by default.
    """
    import numpy as np

    from tinymodel_jax.bundled import storyworld
    from tinymodel_jax.commands import quickstart_steps as steps
    from tinymodel_jax.commands.quickstart_page import write_quickstart_page
    from tinymodel_jax.lm import TinyModel

    amounts = amounts or steps.Amounts()
    lm = TinyModel("mini")
    story = steps.tell(lm, seed, console)
    labelled = list(storyworld.stories(seed=0, count=amounts.labelled, first=storyworld.FIRST_UNSEEN))
    named = steps.name_features(lm, labelled, console)
    acts = np.asarray(lm[steps.SITE]([[lm.config.begin_id, *story]]))[0, 1:]
    strongest = steps.show_features(lm, story, acts, named, console)
    prompt = story[: steps.open_place(lm, story)]
    swept = steps.sweep(lm, prompt, named, console)
    edited = steps.edit_features(lm, prompt, named, int(swept["strongest"]), console)
    training = steps.train_transcoder(lm, amounts, seed, console) if train else None
    concepts = steps.count_concepts(lm, amounts.scored, labelled, training, console)
    commands = next_commands()
    found = {
        "options": options,
        "concept_stories": amounts.labelled,
        "edit": edited,
        "sweep": swept,
        "training": training and {key: training[key] for key in ("sentence", "chart", "rows")},
        "concepts": concepts,
        "commands": commands,
    }
    path = out / "quickstart.html"
    write_quickstart_page(path, lm, story, named, strongest, acts, found)
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
    """Return how `tinymodel` and its Python are called: by name where a shell finds these, otherwise by their paths."""
    folder = Path(sys.executable).parent
    python = _called(shutil.which("python", path=folder) or sys.executable)
    script = shutil.which("tinymodel", path=folder)
    return _called(script) if script else f"{python} -m tinymodel_jax", python


def _called(program: str) -> str:
    path = Path(program)
    if shutil.which(path.stem) == program:
        return path.stem
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
