"""The compiled functions of a dictionary run: its step, its first states, and where their arrays live.

Built for the devices of a mesh, whether they are there or, with `--compile-for`, known to the compiler only. The step
runs the language model once, and then every member of every place's sweep on the vectors drawn from that pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinymodel_jax.runtime.compilation import fast_compiler_options
from tinymodel_jax.training.dictionary_forward import execution_for
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe
from tinymodel_jax.training.dictionary_state import ActivationStatistics, DictionaryTrainState
from tinymodel_jax.training.dictionary_step import settle_thresholds, stack_members, sweep_step, threshold_batches
from tinymodel_jax.training.sharding import DICTIONARY_RULES, abstract_arrays, shardings
from train.activation_sources import ActivationSource, Place
from train.hosts import settled
from train.sweep import Member, init_members

STATISTICS_BATCHES = 16
"""Batches that the mean and the scale of the activations are taken from."""
RECORDED = ("loss", "l0", "explained_variance", "dead_fraction", "sparsity_coefficient", "gradient_norm")
"""What `metrics.jsonl` keeps of a step's metrics, of every member."""

States = dict[str, DictionaryTrainState]
"""Place -> the stacked states of its sweep."""


class Program(NamedTuple):
    """The compiled functions of a run, and where its state lives."""

    step: Callable[..., tuple[States, dict[str, Any]]]
    """(states, context, batch) -> (states, metrics)."""
    settle: Callable[..., States]
    """(states after the last step, context, batch, step of the batch, batches before) -> states with that batch counted
    into the threshold of batch_topk."""
    init: Callable[..., States]
    """Statistics of every place -> the states before the first step."""
    abstract: States
    """Shapes, number formats and shardings of the states."""


def build_program(
    source: ActivationSource, recipes: Mapping[str, DictionaryRecipe], members: list[Member], mesh: Mesh
) -> Program:
    """Return the run's compiled functions; nothing is computed yet."""
    ks = {int(member.values["k"]) for member in members if "k" in member.values}
    hypers = {name: stack_members([m.hyper(shared) for m in members]) for name, shared in recipes.items()}
    init = functools.partial(_init, recipes=recipes, members=members)
    statistics = jax.eval_shape(lambda: _no_statistics(source.places))
    shapes = jax.eval_shape(init, statistics)
    placed = {name: shardings(state, DICTIONARY_RULES, mesh) for name, state in shapes.items()}

    def step(states: States, context: Any, batch: Any) -> tuple[States, dict[str, Any]]:
        done = next(iter(states.values())).step[0]
        after, metrics = {}, {}
        for name, vectors in source.vectors(context, batch, done).items():
            execution = execution_for(recipes[name], mesh=mesh, ks=ks)
            after[name], found = sweep_step(
                states[name], hypers[name], vectors.x, vectors.y, recipe=recipes[name], execution=execution
            )
            metrics[name] = {metric: found[metric] for metric in RECORDED}
        return after, metrics

    def settle(states: States, context: Any, batch: Any, step: Any, counted: Any) -> States:
        vectors = source.vectors(context, batch, step)
        return {
            name: settle_thresholds(
                state,
                hypers[name],
                vectors[name].x,
                counted,
                recipe=recipes[name],
                execution=execution_for(recipes[name], mesh=mesh),
            )
            for name, state in states.items()
        }

    options = fast_compiler_options(mesh.devices.flat[0].platform)
    return Program(
        step=jax.jit(
            step, out_shardings=(placed, NamedSharding(mesh, P())), donate_argnums=0, compiler_options=options
        ),
        settle=jax.jit(settle, out_shardings=placed, donate_argnums=0, compiler_options=options),
        init=jax.jit(init, out_shardings=placed),
        abstract=abstract_arrays(shapes, placed),
    )


def _no_statistics(places: Mapping[str, Place]) -> dict[str, Any]:
    return {
        name: (
            ActivationStatistics.zero(place.d_in),
            None if place.is_sae else ActivationStatistics.zero(place.d_out),
        )
        for name, place in places.items()
    }


def first_statistics(source: ActivationSource) -> dict[str, Any]:
    """Return the statistics of every place over the first batches.

    Raises:
        ValueError: activations are NaN or infinite.
    """

    @functools.partial(jax.jit, compiler_options=fast_compiler_options())
    def add(statistics: dict[str, Any], context: Any, batch: Any, step: Any) -> dict[str, Any]:
        vectors = source.vectors(context, batch, step, split=False)
        return {
            name: (ins.update(vectors[name].x), None if outs is None else outs.update(vectors[name].y))
            for name, (ins, outs) in statistics.items()
        }

    statistics = _no_statistics(source.places)
    for step in range(STATISTICS_BATCHES):
        statistics = add(statistics, source.context, source.make_batch(step), jnp.int32(step))
    finite = jax.jit(lambda tree: [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])
    bad = [name for name, pair in statistics.items() if not all(finite(pair))]
    if bad:
        raise ValueError(
            f"the activations at {', '.join(bad)} are NaN or infinite, so nothing can be learnt from them; "
            "take a language model whose parameters and outputs are finite."
        )
    return statistics


def settle_all(
    program: Program, source: ActivationSource, states: States, recipes: Mapping[str, DictionaryRecipe]
) -> States:
    """Return the states with thresholds of the finished dictionaries, from the batches that follow the training."""
    shared = next(iter(recipes.values()))
    if shared.architecture != "batch_topk":
        return states
    for counted in range(threshold_batches(shared.batch_size)):
        step = shared.steps + counted
        batch = source.make_batch(step)
        states = settled(program.settle(states, source.context, batch, np.int32(step), np.int32(counted)))
    return states


def _init(statistics: dict[str, Any], *, recipes: Mapping[str, DictionaryRecipe], members: list[Member]) -> States:
    return {name: init_members(recipes[name], members, *pair) for name, pair in statistics.items()}
