"""The `tinymodel` command. `run_commands` is the frame that every command of the project runs in.

Exit status 0, 1 (failed) or 2 (bad usage); an error is one line on stderr, with `--debug` its traceback. Heavy parts
load when a command uses them, so `--help` is quick.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tinymodel_jax import __version__
from tinymodel_jax.sites import Site

if TYPE_CHECKING:
    import numpy as np

    from tinymodel_jax.lm import TinyModel

Prompts = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT…")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tinymodel`; return its exit status."""
    commands = {"quickstart": quickstart, "generate": generate, "features": features}
    return run_commands("tinymodel", "TinyModel in JAX: generate stories, read features.", commands, argv)


def quickstart(*, out: Path = Path("runs/quickstart"), seed: int = 0, no_train: bool = False) -> None:
    """Show the bundled model at work, train a dictionary before your eyes, and write a page about both.

    Offline; under three minutes on two CPU cores.

    Args:
        out: folder for the page, quickstart.html.
        seed: of the story and of the trained dictionary.
        no_train: leave the training out.
    """
    if not 0 <= seed < 2**32 - 1:
        raise ValueError(f"--seed {seed}: seeds are 0 to {2**32 - 2}.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder, which is made if there is none.")
    from rich.console import Console

    from tinymodel_jax.allocator import keep_freed_memory
    from tinymodel_jax.quickstart.run import run_quickstart

    keep_freed_memory()
    options = f"{f' --seed {seed}' if seed else ''}{' --no-train' if no_train else ''}"
    run_quickstart(out, seed, not no_train, Console(), options)


def generate(
    prompts: Prompts = (),
    *,
    model: str = "tiny_model",
    n_toks: int = 50,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stories: Path | None = None,
    limit: int = 8,
    prompt_toks: int = 16,
    ids: bool = False,
    n_heads: int | None = None,
    json: bool = False,
) -> None:
    """Continue prompts.

    Args:
        prompts: texts to continue, all in one batch.
        model: published name, folder, or file (.pt, .safetensors) with the reference's names.
        n_toks: tokens to add at most.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the fewest tokens whose probabilities reach this sum.
        seed: of the random draws.
        stories: file of stories (.jsonl with "text", .txt with a story a line, also .gz) whose beginnings to continue.
        limit: stories to read at most.
        prompt_toks: tokens of each story that make its prompt.
        ids: prompts are token ids, as "9996 51 56", and so is the answer.
        n_heads: attention heads of a file whose width is not the published 768.
        json: print a JSON object a line.
    """
    given, told = _read_prompts(prompts, stories, limit, ids)
    if prompt_toks < 1:
        raise ValueError(f"--prompt-toks {prompt_toks} must be 1 or more.")
    from tinymodel_jax.generate import check_options, strip_padding  # JAX loads here, not for --help

    check_options(n_toks, temperature, top_k, top_p, seed)
    lm = _load(model, n_heads)
    rows = _rows(lm, given, told, prompt_toks)
    width = max(map(len, rows))
    padded = [[*row, *[lm.config.pad_id] * (width - len(row))] for row in rows]
    out = lm.generate_ids(padded, n_toks, temperature, top_k=top_k, top_p=top_p, seed=seed)
    for row, continued in zip(rows, out, strict=True):
        kept = strip_padding(continued, lm.config.pad_id).tolist()
        if json:
            print_json({"prompt": _shown(lm, row, ids), "text": _shown(lm, kept, ids), "tok_ids": kept})
        else:
            print(_shown(lm, kept, ids))


def features(
    prompts: Prompts = (),
    *,
    site: str,
    top: int = 5,
    model: str = "tiny_model",
    dictionary: Path | None = None,
    stories: Path | None = None,
    limit: int = 8,
    ids: bool = False,
    n_heads: int | None = None,
    json: bool = False,
) -> None:
    """Show the most active features of a dictionary at each token.

    Args:
        prompts: texts to read.
        site: dictionary's tag, such as M2; with a feature, as M2N123, only that feature is shown.
        top: features shown at each token.
        model: published name, folder, or file (.pt, .safetensors) with the reference's names.
        dictionary: folder or file to use at the site, instead of the model's own or published one.
        stories: file of stories (.jsonl with "text", .txt with a story a line, also .gz) to read.
        limit: stories to read at most.
        ids: prompts are token ids, as "9996 51 56".
        n_heads: attention heads of a file whose width is not the published 768.
        json: print a JSON object a line.
    """
    import numpy as np

    if top < 1:
        raise ValueError(f"--top {top} must be 1 or more.")
    place, _ = Site.parse(site)
    if dictionary is not None and not dictionary.exists():
        raise FileNotFoundError(f"--dictionary {dictionary}: there is no such folder or file.")
    given, told = _read_prompts(prompts, stories, limit, ids)
    lm = _load(model, n_heads)
    if dictionary is not None:
        lm.attach(place.tag, dictionary)
    reader = lm[site]
    rows = _rows(lm, given, told, lm.config.n_ctx)
    for row in _with_progress(rows, "reading"):
        acts = np.asarray(reader([row]))[0]
        chosen = _strongest(acts, top) if reader.feature is None else [[(reader.feature, float(a))] for a in acts]
        words = [_shown(lm, [tok], ids) for tok in row]
        if json:
            strongest = [[{"feature": f, "activation": round(a, 4)} for f, a in found] for found in chosen]
            tokens = [{"token": word, "features": found} for word, found in zip(words, strongest, strict=True)]
            print_json({"site": reader.site.tag, "text": _shown(lm, row, ids), "tokens": tokens})
        else:
            _print_table(f"{site} on {_shown(lm, row, ids)[:70]!r}", words, chosen)


def run_commands(
    program: str,
    description: str,
    commands: Mapping[str, Callable[..., None]],
    argv: Sequence[str] | None = None,
) -> int:
    """Run one of several commands, as the command line says; return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _let_every_character_print()
    if arguments == ["--version"]:
        print(f"{program} {__version__}")
        return 0
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        tyro.extras.subcommand_cli_from_dict(
            dict(commands),
            prog=program,
            description=f"{description} Any command takes --debug, which shows the traceback of an error; "
            "--version alone says which release this is.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as stop:  # tyro's own, after --help or bad usage
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at exit
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


def print_json(value: Any) -> None:
    """Print a value as one line of JSON, in ASCII, so that every terminal and file can hold it."""
    print(json.dumps(value))


def read_stories(path: Path, limit: int) -> list[str]:
    """Return the first stories of a `.jsonl` (field `text`) or `.txt` file (a story a line), also gzipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line holds no story, or the file has none.
    """
    kind = path.name.removesuffix(".gz")
    if not kind.endswith((".jsonl", ".txt")):
        raise ValueError(f"{path}: expected a .jsonl or .txt file, or one of them with .gz.")
    if limit < 1:
        raise ValueError(f"--limit {limit} must be 1 or more.")
    found: list[str] = []
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if len(found) == limit:
                    break
                if line.strip():
                    found.append(_story(line, kind.endswith(".jsonl"), f"{path}, line {number}"))
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or no such file as its name says: {error}.") from error
    if not found:
        raise ValueError(f"{path}: no story found (limit {limit}).")
    return found


def _story(line: str, is_json: bool, where: str) -> str:
    if not is_json:
        return line.rstrip("\n")
    try:
        story = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error
    if not isinstance(story, dict) or not isinstance(story.get("text"), str):
        raise ValueError(f"{where}: expected an object with a string 'text'.")
    return story["text"]


def _let_every_character_print() -> None:
    """Show a character that the terminal's encoding lacks as `?`, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"  # without the number that str() puts in front
    return " ".join(str(error).split()) or type(error).__name__


def _load(model: str, n_heads: int | None) -> TinyModel:
    from tinymodel_jax.lm import TinyModel

    return TinyModel(model, n_heads=n_heads)


def _read_prompts(
    prompts: Sequence[str], stories: Path | None, limit: int, ids: bool
) -> tuple[list[str] | list[list[int]], list[str]]:
    """Return prompts, as rows if they are ids, and stories; what is wrong with them shows before a model is loaded."""
    if ids and stories:
        raise ValueError("--ids and --stories do not go together: stories are text.")
    if not prompts and not stories:
        raise ValueError("nothing to read: give a prompt, or --stories FILE.")
    told = read_stories(stories, limit) if stories else []
    return ([_parse_ids(text) for text in prompts] if ids else list(prompts)), told


def _rows(lm: TinyModel, prompts: Sequence[str | list[int]], told: Sequence[str], story_toks: int) -> list[list[int]]:
    """Return rows of token ids; text gets `[BEGIN]` in front, and stories are cut to `story_toks` tokens with it."""

    def encoded(text: str) -> list[int]:
        return [lm.config.begin_id, *lm.tokenizer.encode(text, max_length=None)]

    rows = [encoded(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return [*rows, *(encoded(story)[:story_toks] for story in told)]


def _parse_ids(text: str) -> list[int]:
    try:
        row = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        row = []
    if not row:
        raise ValueError(f"--ids: {text!r:.80} is no list of whole numbers, as '9996 51 56'.")
    return row


def _shown(lm: TinyModel, row: Sequence[int], ids: bool) -> str:
    if ids:
        return " ".join(map(str, row))
    begin = row[:1] == [lm.config.begin_id] and len(row) > 1
    return lm.tokenizer.decode(list(row[1:] if begin else row))


def _strongest(acts: np.ndarray, top: int) -> list[list[tuple[int, float]]]:
    """Return the active features of each position, strongest first, `top` at most."""
    order = (-acts).argsort(axis=-1, kind="stable")[:, :top]
    return [[(int(f), float(a[f])) for f in o if a[f] > 0] for a, o in zip(acts, order, strict=True)]


def _print_table(title: str, words: Sequence[str], chosen: Sequence[Sequence[tuple[int, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("token", no_wrap=True)
    table.add_column("feature activation, strongest first")
    for word, found in zip(words, chosen, strict=True):
        shown = word.replace("\n", "↵").replace("[", r"\[")
        table.add_row(shown, "  ".join(f"[bold]{f}[/bold] {a:.3f}" for f, a in found) or "–")
    Console().print(table)


def _with_progress(rows: list[Any], what: str) -> Iterator[Any]:
    """Yield rows; on a terminal, a bar on stderr shows how many are done."""
    if len(rows) < 2 or not sys.stderr.isatty():
        yield from rows
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(rows, description=what, console=Console(stderr=True), transient=True)
