"""This package's side of `gpu.py`, and the sizes of all its workloads.

Every call runs some steps, queued one after the other, and returns the seconds per step once all are done. A call is
compiled and warmed up when it is first requested. A workload has the same code at all sizes.
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from floors import measured_rates
from sides import Calls, once
from training_inputs import DictionaryCase, activations

from tinymodel_jax.config import ModelConfig

TOTAL_STEPS = 1_000_000
ABLATED_SITE = "M1"


@dataclass(frozen=True)
class Sizes:
    """Sizes of all workloads."""

    model: ModelConfig
    batch: tuple[int, int]
    """Rows, and tokens per row, in a step of the language model."""
    width: int
    n_features: int
    dictionary_batch: int
    """Vectors per step of a dictionary."""
    sweep_features: int
    """Features of each member of a sweep."""
    sweep_batch: int
    k: int
    steps: int
    """Steps per call."""
    sweep_members: tuple[int, ...]
    generated: tuple[int, ...]
    """Numbers of prompts that are continued together."""
    prompt_tokens: int
    new_tokens: int
    ablated: int
    """Features that are turned off one at a time, on a prompt of `graph_tokens`."""
    graph_tokens: int
    """Tokens of the prompt of an attribution graph, and its nodes below."""
    graph_nodes: int
    product: int
    """Rows and columns of the operands of the product that measures the device, and of the matrix that it reads."""


LARGE = Sizes(
    ModelConfig(dtype="bfloat16"),
    batch=(256, 128),
    width=768,
    n_features=25_000,
    dictionary_batch=32_768,
    sweep_features=4096,
    sweep_batch=8192,
    k=32,
    steps=20,
    sweep_members=(1, 2, 4, 8),
    generated=(1, 32, 512),
    prompt_tokens=13,
    new_tokens=50,
    ablated=2048,
    graph_tokens=64,
    graph_nodes=2000,
    product=16_384,
)
SMALL = Sizes(
    ModelConfig(n_layers=2, d_model=16, n_heads=2, d_mlp=64, n_ctx=16, d_vocab=32, dtype="bfloat16"),
    batch=(2, 16),
    width=16,
    n_features=64,
    dictionary_batch=32,
    sweep_features=32,
    sweep_batch=16,
    k=4,
    steps=2,
    sweep_members=(1, 2),
    generated=(1, 2),
    prompt_tokens=3,
    new_tokens=4,
    ablated=4,
    graph_tokens=8,
    graph_nodes=60,
    product=64,
)


def our_calls(folder: Path, sizes: Sizes) -> Calls:
    """Return this package's calls; `device` describes the device, `rates` measures it."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other side needs memory too
    random_lm = functools.cache(functools.partial(_random_lm, sizes))
    one = functools.partial(_our_dictionaries, sizes, n_features=sizes.n_features, batch=sizes.dictionary_batch)
    calls: dict[str, Callable[[], Any]] = {
        "device": _device,
        "rates": lambda: measured_rates(sizes.product, sizes.product, sizes.product, "bfloat16"),
        "lm": once(functools.partial(_our_lm, sizes)),
        "relu": once(functools.partial(one, "relu")),
        "topk": once(functools.partial(one, "topk")),
        "ablate": once(lambda: _our_ablations(random_lm(), sizes)),
        "graph": once(lambda: _our_graphs(random_lm(), sizes)),
    }
    for prompts in sizes.generated:
        calls[f"generate-{prompts}"] = once(lambda prompts=prompts: _our_generation(random_lm(), sizes, prompts))
    for members in sizes.sweep_members:
        sweep = functools.partial(_our_dictionaries, sizes, "topk", sizes.sweep_features, sizes.sweep_batch, members)
        calls[f"sweep-{members}"] = once(sweep)
    return calls


def _device() -> tuple[str, str, float | None]:
    """Return the platform, the device's name, and its dense bfloat16 peak in FLOP/s if known."""
    import jax

    from tinymodel_jax.training.flops import peak_flops

    device = jax.devices()[0]
    return device.platform, device.device_kind, peak_flops(device)


def _our_lm(sizes: Sizes) -> Callable[[], float]:
    import jax

    from tinymodel_jax.training.lm_step import (
        LMOptimizer,
        init_state,
        learning_rate_schedule,
        make_optimizer,
        train_step,
    )

    settings = LMOptimizer()
    optimizer = make_optimizer(settings, TOTAL_STEPS)
    step = functools.partial(
        train_step, config=sizes.model, optimizer=optimizer, schedule=learning_rate_schedule(settings, TOTAL_STEPS)
    )
    state = init_state(jax.random.key(0), sizes.model, optimizer)
    return _our_steps(step, state, jax.numpy.asarray(random_tokens(sizes), jax.numpy.int32), sizes.steps)


def _our_dictionaries(
    sizes: Sizes, architecture: Any, n_features: int, batch: int, members: int = 1
) -> Callable[[], float]:
    """Return a call that trains one dictionary, or a sweep of dictionaries with different seeds."""
    import jax

    from tinymodel_jax.training.dictionary_recipe import recipe_preset
    from tinymodel_jax.training.dictionary_state import ActivationStatistics, init_state
    from tinymodel_jax.training.dictionary_step import stack_members, sweep_step, train_step

    knobs: dict[str, Any] = {"k": sizes.k} if architecture == "topk" else {}
    recipe = recipe_preset("house", architecture, n_features, TOTAL_STEPS, batch_size=batch, **knobs)
    x = jax.numpy.asarray(activations(DictionaryCase(sizes.width, n_features, batch)))
    statistics = ActivationStatistics.zero(sizes.width).update(x)
    states = [init_state(jax.random.key(seed), recipe, statistics) for seed in range(members)]
    if members == 1:
        step, state = functools.partial(train_step, hyper=recipe.hyper(), recipe=recipe), states[0]
    else:
        hypers = stack_members([recipe.hyper()] * members)
        step, state = functools.partial(sweep_step, hypers=hypers, recipe=recipe), stack_members(states)
    return _our_steps(lambda state, x: step(state, x=x), state, x, sizes.steps)


def _random_lm(sizes: Sizes) -> Any:
    """Return a model in float32 with a dictionary at each layer."""
    from circuits_case import random_lm

    return random_lm(sizes.model, sizes.n_features, sizes.k)


def _our_generation(lm: Any, sizes: Sizes, prompts: int) -> Callable[[], float]:
    """Return a call that continues prompts together, and gives the seconds per token of all of them."""
    ids = np.random.default_rng(1).integers(0, lm.config.begin_id, (prompts, sizes.prompt_tokens))

    def run() -> float:
        start = time.perf_counter()
        lm.generate_ids(ids, sizes.new_tokens, 0, break_on_end=False)
        return (time.perf_counter() - start) / sizes.new_tokens

    run()
    return run


def _our_ablations(lm: Any, sizes: Sizes) -> Callable[[], float]:
    """Return a call that turns off features one at a time."""
    from circuits_case import random_prompt

    from tinymodel_jax.analysis.effects import sweeps

    prompt, features = random_prompt(lm, sizes.graph_tokens)[None], np.arange(sizes.ablated)

    def run() -> float:
        start = time.perf_counter()
        sweeps.ablate(lm, ABLATED_SITE, prompt, features)
        return time.perf_counter() - start

    run()
    return run


def _our_graphs(lm: Any, sizes: Sizes) -> Callable[[], float]:
    """Return a call that builds an attribution graph."""
    from circuits_case import random_prompt, seconds_of_graph

    run = functools.partial(seconds_of_graph, lm, random_prompt(lm, sizes.graph_tokens), sizes.graph_nodes)
    run()
    return run


def _our_steps(step: Any, state: Any, batch: Any, steps: int) -> Callable[[], float]:
    import jax

    from tinymodel_jax.runtime.compilation import fast_compiler_options

    compiled = jax.jit(step, donate_argnums=0, compiler_options=fast_compiler_options())

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, _ = compiled(state, batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / steps

    run()
    return run


def random_tokens(sizes: Sizes) -> np.ndarray:
    """Return the language model's batch."""
    return np.random.default_rng(1).integers(0, sizes.model.begin_id, sizes.batch)
