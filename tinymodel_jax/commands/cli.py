"""The `tinymodel` command and its list of subcommands."""

from __future__ import annotations

from collections.abc import Sequence

from tinymodel_jax.commands.concepts import concepts
from tinymodel_jax.commands.dashboard import dashboard
from tinymodel_jax.commands.evaluate import evaluate
from tinymodel_jax.commands.features import features
from tinymodel_jax.commands.frame import run_commands, with_compilation_cache
from tinymodel_jax.commands.generate import generate
from tinymodel_jax.commands.graph import graph
from tinymodel_jax.commands.importance import importance
from tinymodel_jax.commands.patch import patch
from tinymodel_jax.commands.quickstart import quickstart
from tinymodel_jax.commands.sweep import sweep
from tinymodel_jax.commands.top import top

COMMANDS = {
    "quickstart": quickstart,
    "generate": generate,
    "features": features,
    "eval": evaluate,
    "top": top,
    "concepts": concepts,
    "sweep": sweep,
    "importance": importance,
    "patch": patch,
    "graph": graph,
    "dashboard": dashboard,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tinymodel`; return its exit status."""
    description = "TinyModel in JAX: generate stories; read, measure, search and change features."
    commands = {name: with_compilation_cache(command) for name, command in COMMANDS.items()}
    return run_commands("tinymodel", description, commands, argv)
