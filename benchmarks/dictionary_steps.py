"""Activations per second of one dictionary training step, whole recipes included, on this machine.

Measures the `house` recipe as it trains: scaling, loss, clipping, Adam, counting dead features, and AuxK where the
recipe has it. A share of the features is marked dead beforehand, so that AuxK's branch is measured too; `--dead 0` is a
dictionary without dead features. The cases take turns and the medians count.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from machine import describe_machine

from tinymodel_jax.compilation import fast_compiler_options
from tinymodel_jax.config import Architecture
from tinymodel_jax.training.dictionary_recipe import recipe_preset
from tinymodel_jax.training.dictionary_state import ActivationStatistics, init_state
from tinymodel_jax.training.dictionary_step import train_step

SHAPES = {"768x25000": (768, 25_000), "128x1024": (128, 1024)}


@dataclass
class Case:
    """One compiled step and its state, which every call replaces."""

    step: Callable[..., Any]
    state: Any
    x: jax.Array

    def run(self, steps: int) -> float:
        """Take steps and return the seconds one took."""
        start = time.perf_counter()
        for _ in range(steps):
            self.state, _ = self.step(self.state, x=self.x)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / steps


def main(
    shapes: tuple[str, ...] = tuple(SHAPES),
    architectures: tuple[Architecture, ...] = ("relu", "topk", "batch_topk"),
    batch: int = 4096,
    k: int = 32,
    dead: float = 0.01,
    rounds: int = 3,
    json_output: bool = False,
) -> None:
    """Time the steps.

    Args:
        shapes: which of 768x25000 and 128x1024 (width x features) to measure.
        architectures: which to measure.
        batch: activations a step.
        k: active features an input of topk and batch_topk.
        dead: share of the features that are dead.
        rounds: how often each case takes its turn.
        json_output: print one JSON object rather than a table.
    """
    cases = {
        (shape, name): make_case(*SHAPES[shape], name, batch, k, dead) for shape in shapes for name in architectures
    }
    times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for key, case in cases.items():
            times[key].append(case.run(1 if key[0] == "768x25000" else 10))
    rates = {f"{shape} {name}": sorted(batch / t for t in taken) for (shape, name), taken in times.items()}
    if json_output:
        print(json.dumps({"machine": describe_machine(), "activations_per_second": rates}))
        return
    for what, value in describe_machine().items():
        print(f"{what:12}{value}")
    print(f"batch {batch}, k {k}, {dead:.0%} of the features dead; activations per second: median (slowest to fastest)")
    for case, sorted_rates in rates.items():
        print(f"{case:24}{statistics.median(sorted_rates):12,.0f}  ({sorted_rates[0]:,.0f} to {sorted_rates[-1]:,.0f})")


def make_case(width: int, n_features: int, architecture: Architecture, batch: int, k: int, dead: float) -> Case:
    """Return a compiled step, warmed up until it selects as a dictionary in training does."""
    takes_k = architecture in ("topk", "batch_topk")
    recipe = recipe_preset("house", architecture, n_features, 100_000, **({"k": k} if takes_k else {}))
    key = jax.random.key(0)
    # sparse sums of directions: Gaussian noise has no features to select
    directions = jax.random.normal(jax.random.fold_in(key, 1), (256, width))
    amounts = jax.random.exponential(jax.random.fold_in(key, 2), (batch, 256))
    x = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 3), 0.05, amounts.shape), amounts, 0) @ directions
    state = init_state(key, recipe, ActivationStatistics.zero(width).update(x))
    silent = jnp.where(jnp.arange(n_features) < dead * n_features, recipe.dead_after, 0)
    state = state._replace(silent_for=silent.astype(jnp.int32))
    step = functools.partial(train_step, hyper=recipe.hyper(), recipe=recipe)
    case = Case(jax.jit(step, donate_argnums=0, compiler_options=fast_compiler_options()), state, x)
    case.run(2)
    return case


if __name__ == "__main__":
    tyro.cli(main)
