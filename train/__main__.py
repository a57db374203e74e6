"""`python -m train prepare | lm | dictionaries | export | bundle`: the training programs.

Only the program that is named is imported, so `--help` works without the packages of the `train` extra. Ctrl-C ends
every program without a traceback.
"""

from __future__ import annotations

import functools
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

PROGRAMS = {
    "prepare": "Turn stories into a folder of token ids to train on.",
    "lm": "Train a language model, or resume a stopped run.",
    "dictionaries": "Train dictionaries on activations of a language model or of files, or resume a stopped run.",
    "export": "Write the dictionaries or the model of a run that is still going on, or was stopped.",
    "bundle": "Make the bundled model and its dictionaries, or resume a stopped run.",
}
"""Name of a function, and of its module in `train` -> the first line of its docstring."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a training program; return its exit status."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str]) -> int:
    from tinymodel_jax.commands.frame import run_commands, with_compilation_cache

    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    commands = {name: _listed(line) for name, line in PROGRAMS.items()}
    if named in PROGRAMS:
        try:
            program = getattr(importlib.import_module(f"train.{named}"), named)
            commands = {named: _with_hint(with_compilation_cache(program))}
        except ModuleNotFoundError as error:
            print(f"train: {_hint(named, error)}", file=sys.stderr)
            return 1
    return run_commands("train", "Prepare data and train models.", commands, arguments)


def _with_hint(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command; if a package is missing when it runs, its error says what to install."""

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
    """Return a command that only appears in the list of commands."""

    def command() -> None:
        raise AssertionError("the program of this name runs instead")

    command.__doc__ = line
    return command


if __name__ == "__main__":
    from tinymodel_jax.runtime.allocator import keep_freed_memory
    from tinymodel_jax.runtime.hosts import end_all

    keep_freed_memory()  # not in main: it changes the whole process, which belongs to whoever calls main
    try:
        status = main()
    except Exception:  # a defect; the other processes must not wait for this one
        traceback.print_exc()
        status = 1
    if status:
        end_all(status)
    sys.exit(status)
