"""`python -m train prepare | lm | dictionaries | bundle`: the training programs.

Only the program that is named loads, once it runs: `--help` needs none of the extra's packages, and Ctrl-C ends without
a traceback from the beginning on.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

PROGRAMS = {
    "prepare": "Turn stories into a folder of token ids to train on.",
    "lm": "Train a language model, or go on with a run that was stopped.",
    "dictionaries": (
        "Train dictionaries on activations of a language model or of files, or go on with a run that was stopped."
    ),
    "bundle": "Make the bundled model and its dictionaries, or go on where it was stopped.",
}
"""Each is the function of that name in the module of that name; the line is the first of its docstring."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a training program; return its exit status."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str]) -> int:
    from tinymodel_jax.commands.frame import run_commands

    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    commands = {name: _listed(line) for name, line in PROGRAMS.items()}
    if named in PROGRAMS:
        try:
            commands = {named: _with_hint(getattr(importlib.import_module(f"train.{named}"), named))}
        except ModuleNotFoundError as error:
            print(f"train: {_hint(named, error)}", file=sys.stderr)
            return 1
    return run_commands("train", "Prepare data and train models.", commands, arguments)


def _with_hint(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command, which says what to install where it needs a package once it runs."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except ModuleNotFoundError as error:
            raise ImportError(_hint(command.__name__, error)) from error

    return run


def _hint(named: str, error: ModuleNotFoundError) -> str:
    needs = f"{named} needs {error.name}, which is not installed"
    return f"{needs}; in the repository's folder: pip install -e '.[train]'"


def _listed(line: str) -> Callable[[], None]:
    """Return a command for the list of commands only."""

    def command() -> None:
        raise AssertionError("a command that is named is loaded instead")

    command.__doc__ = line
    return command


if __name__ == "__main__":
    from tinymodel_jax.runtime.allocator import keep_freed_memory

    keep_freed_memory()  # not in main: it holds for the whole process, and who calls main has one of their own
    status = main()
    if status and "train.hosts" in sys.modules:
        sys.modules["train.hosts"].end_all(status)
    sys.exit(status)
