"""What all command-line programs of the project share: arguments, exit status, errors, JSON and tables.

The exit status is 0, 1 (failed) or 2 (bad usage). An error is one line on stderr; `--debug` shows its traceback.
Modules that take long to load are imported inside commands, so `--help` is fast.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from tinymodel_jax import __version__
from tinymodel_jax.runtime.paths import user_path

if TYPE_CHECKING:
    from rich.text import Text

WIDEST = 10_000
"""Columns of the widest table."""
USER_PATHS = tyro.constructors.ConstructorRegistry()
"""Expands `~` in every option that is a `Path`: shells leave it in `--out=~/x`, and other programs call without one."""


@USER_PATHS.primitive_rule
def _path_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: user_path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def run_commands(
    program: str,
    description: str,
    commands: Mapping[str, Callable[..., None]],
    argv: Sequence[str] | None = None,
) -> int:
    """Run the command that the arguments name; return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _let_every_character_print()
    if arguments == ["--version"]:
        print(f"{program} {__version__}")
        return 0
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with USER_PATHS:
            tyro.extras.subcommand_cli_from_dict(
                dict(commands),
                prog=program,
                description=f"{description} Every command accepts --debug, which shows the traceback of an error; "
                "--version alone prints the version.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:  # tyro's own, after --help or bad usage
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python complains at exit
        return 1
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, LookupError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"{program}: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def with_compilation_cache(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command, which then keeps the programs that it compiles for the next process."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        from tinymodel_jax.runtime.compilation_cache import use_compilation_cache

        use_compilation_cache()
        command(*arguments, **options)

    return run


def print_json(value: Any) -> None:
    """Print a value as one line of JSON in ASCII, which every terminal and file can hold.

    Raises:
        ValueError: a number is infinite or NaN.
    """
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"--json: JSON cannot hold a number of the result ({error}).") from error
    print(text)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    title: str | None = None,
    right: Collection[str] = (),
) -> None:
    """Print a table, in which brackets and `:words:` of prompts and names are shown as they are.

    On a terminal it fits the window; elsewhere it is as wide as its content.

    Args:
        rows: a cell for each column; a `rich.text.Text` where parts have a style.
        right: columns that are aligned on the right, such as numbers.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None if title is None else Text(title, "table.title"), title_justify="left")
    for column in columns:
        table.add_column(Text(column), justify="right" if column in right else "left")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.measure(table, options=console.options.update(width=WIDEST)).maximum, 1)
    console.print(table)


def finite_or_none(number: int | float) -> int | float | None:
    """Return a number, or None for infinity and NaN, which JSON cannot hold."""
    return number if math.isfinite(number) else None


def significant(number: float, digits: int = 6) -> float | None:
    """Return a number rounded to significant digits, or None for infinity and NaN."""
    return finite_or_none(float(f"{number:.{digits}g}"))


def signed(number: float, digits: int = 2) -> str:
    """Return a number with its sign and some decimals; one that rounds to zero is `+0.00`, never `-0.00`."""
    return f"{round(float(number), digits) + 0.0:+.{digits}f}"


def _let_every_character_print() -> None:
    """Print `?` for a character that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"  # without the number that str() puts in front
    return " ".join(str(error).split()) or type(error).__name__
