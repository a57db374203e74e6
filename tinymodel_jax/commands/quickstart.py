"""`tinymodel quickstart`."""

from __future__ import annotations

from pathlib import Path

from tinymodel_jax.commands.options import make_output_folder


def quickstart(*, out: Path = Path("runs/quickstart"), seed: int = 0, no_train: bool = False) -> None:
    """Show the bundled model at work, train a dictionary before your eyes, and write a page about both.

    Offline; two to four minutes on two CPU cores.

    Args:
        out: folder for the page, quickstart.html.
        seed: of the story and of the trained dictionary.
        no_train: leave the training out.
    """
    if not 0 <= seed < 2**32 - 1:
        raise ValueError(f"--seed {seed}: seeds are 0 to {2**32 - 2}.")
    make_output_folder("--out", out)
    from rich.console import Console

    console = Console()
    console.print(f"Looking into the bundled model; it takes {'one to two' if no_train else 'two to four'} minutes …")

    from tinymodel_jax.quickstart.run import run_quickstart
    from tinymodel_jax.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    options = f"{f' --seed {seed}' if seed else ''}{' --no-train' if no_train else ''}"
    run_quickstart(out, seed, not no_train, console, options)
