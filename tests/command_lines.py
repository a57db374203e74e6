"""Command lines as they are printed for users, run in the process of the tests."""

import contextlib
import functools
import io
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import convert_torch_weights
from tinymodel_jax.commands import cli
from train.__main__ import main as train_main

PROGRAMS = {
    "tinymodel": cli.main,
    "tinymodel-convert": convert_torch_weights.main,
    "python -m tinymodel_jax": cli.main,
    "python -m train": train_main,
}
NOT_RUN = ("python3 -m venv", "pip", "python -m pytest")
"""Programs that do not belong to the project."""


def command_lines(text: str) -> list[list[str]]:
    """Return the words of every command of a shell's text, which may be joined by `&&`."""
    whole = text.replace("\\\n", " ")
    return [words for line in re.split(r"\n|&&", whole) if (words := shlex.split(line, comments=True))]


def split_program(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of the program, without its folder, and its arguments."""
    name = Path(words[0]).name
    if words[1:2] == ["-m"]:
        return f"{name} -m {words[2]}", list(words[3:])
    return name, list(words[1:])


def run(words: Sequence[str], replaced: Mapping[str, str] | None = None) -> None:
    """Run a command, which must succeed. Programs of `NOT_RUN` are skipped; other unknown programs are errors.

    Args:
        replaced: parts of commands, such as `--steps 1000`, and what replaces them here.
    """
    program, arguments = split_program(words)
    if program in NOT_RUN:
        return
    assert program in PROGRAMS, f"{program}: neither a program of the project nor one that is not to be run"
    line = shlex.join(arguments)
    for part, other in (replaced or {}).items():
        line = line.replace(part, other)
    assert PROGRAMS[program](shlex.split(line)) == 0, shlex.join(words)


@functools.cache
def options_of(main: Callable[[Sequence[str]], int], command: str | None) -> set[str]:
    """Return the options that `--help` of a program or one of its commands names."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert main([*([command] if command else []), "--help"]) == 0, f"there is no command {command}"
    return {"--help", "--debug", "--version", *re.findall(r"--[a-z][a-z0-9-]*", shown.getvalue())}
