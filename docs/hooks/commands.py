"""MkDocs hook: a page for every program, with the `--help` of each of its commands."""

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import convert_torch_weights
from tinymodel_jax.commands import cli
from train import __main__ as train

Program = Callable[[Sequence[str]], int]

PROGRAMS: dict[str, tuple[Program, Iterable[str]]] = {
    "tinymodel": (cli.main, cli.COMMANDS),
    "python -m train": (train.main, train.PROGRAMS),
    "tinymodel-convert": (convert_torch_weights.main, convert_torch_weights.COMMANDS),
}
"""The function that runs a program, and the names of its commands."""
WIDTH = 92
"""Columns of the help, which fit beside the navigation of a laptop's window."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add reference/commands/PROGRAM.md for every program."""
    for name, (main, commands) in PROGRAMS.items():
        parts = [f"# `{name}`", _help_block(main, ["--help"])]
        for command in commands:
            parts += [f"## {name} {command}", _help_block(main, [command, "--help"])]
        path = f"reference/commands/{name.removeprefix('python -m ')}.md"
        files.append(File.generated(config, path, content="\n\n".join(parts)))
    return files


def _help_block(main: Program, arguments: Sequence[str]) -> str:
    shown = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS=str(WIDTH)), contextlib.redirect_stdout(shown):
        status = main(arguments)
    assert status == 0, f"{arguments} failed"
    return f"```text\n{shown.getvalue().strip()}\n```"
