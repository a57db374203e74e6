"""The two sides of `gpu.py`: this package's training steps and graphs, and PyTorch's training with torch.compile.

Every call runs some steps, queued one after the other, and returns the seconds per step once all are done. A call is
compiled and warmed up when it is first requested.
"""

import functools
import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from reference import load_reference_model, write_model
from sides import Calls, once
from training_inputs import DictionaryCase, activations

from tinymodel_jax.config import ModelConfig

SWEEP_MEMBERS = (1, 2, 4, 8)
TOTAL_STEPS = 1_000_000
MODEL_FILE = "model.pt"


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
    graph_tokens: int = 64
    """Tokens of the prompt of an attribution graph, and its nodes below."""
    graph_nodes: int = 2000


LARGE = Sizes(ModelConfig(dtype="bfloat16"), (256, 128), 768, 25_000, 32_768, 4096, 8192, k=32, steps=20)
SMALL = Sizes(
    ModelConfig(n_layers=1, d_model=16, n_heads=2, d_mlp=64, n_ctx=16, d_vocab=32, dtype="bfloat16"),
    batch=(2, 16),
    width=16,
    n_features=64,
    dictionary_batch=32,
    sweep_features=32,
    sweep_batch=16,
    k=4,
    steps=2,
    graph_tokens=8,
    graph_nodes=60,
)


def our_calls(folder: Path, sizes: Sizes) -> Calls:
    """Return this package's calls; `device` describes the device."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other side needs memory too
    calls = {
        "device": _device,
        "lm": once(functools.partial(_our_lm, sizes)),
        "relu": once(functools.partial(_our_dictionaries, sizes, "relu", sizes.n_features, sizes.dictionary_batch)),
        "topk": once(functools.partial(_our_dictionaries, sizes, "topk", sizes.n_features, sizes.dictionary_batch)),
    }
    calls["graph"] = once(functools.partial(_our_graphs, sizes))
    for members in SWEEP_MEMBERS:
        sweep = functools.partial(_our_dictionaries, sizes, "topk", sizes.sweep_features, sizes.sweep_batch, members)
        calls[f"sweep-{members}"] = once(sweep)
    return calls


def pytorch_calls(folder: Path, sizes: Sizes) -> Calls:
    """Return PyTorch's calls; `device` returns the name of the GPU, or "cpu"."""
    torch: Any = importlib.import_module("torch")
    torch.set_float32_matmul_precision("high")  # as XLA's default on a GPU
    return {
        "device": lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "lm": once(functools.partial(_pytorch_lm, sizes, folder)),
        "relu": once(functools.partial(_pytorch_dictionary, sizes, "relu")),
        "topk": once(functools.partial(_pytorch_dictionary, sizes, "topk")),
    }


def _device() -> tuple[str, str, float | None]:
    """Return the platform, the name of the device, and its dense bfloat16 peak in FLOP/s, if known."""
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
    return _our_steps(step, state, jax.numpy.asarray(_tokens(sizes), jax.numpy.int32), sizes.steps)


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


def _our_graphs(sizes: Sizes) -> Callable[[], float]:
    """Return a call that builds an attribution graph of a model with a dictionary at each layer."""
    from circuits_case import random_lm, random_prompt, seconds_of_graph

    lm = random_lm(sizes.model, sizes.n_features, sizes.k)
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


def _pytorch_lm(sizes: Sizes, folder: Path) -> Callable[[], float]:
    torch: Any = importlib.import_module("torch")
    write_model(sizes.model, folder / MODEL_FILE, np.random.default_rng(0))
    lm = load_reference_model(sizes.model, folder / MODEL_FILE).to(_torch_device())
    ids = torch.tensor(_tokens(sizes), device=_torch_device())
    targets = ids[:, 1:].flatten()

    def loss() -> Any:
        return torch.nn.functional.nll_loss(lm(ids)[:, :-1].flatten(0, 1), targets)

    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return _pytorch_steps(loss, list(lm.parameters()), optimizer, sizes.steps)


def _pytorch_dictionary(sizes: Sizes, architecture: str) -> Callable[[], float]:
    torch: Any = importlib.import_module("torch")
    device = _torch_device()
    x = torch.tensor(activations(DictionaryCase(sizes.width, sizes.n_features, sizes.dictionary_batch)), device=device)
    rows = torch.nn.functional.normalize(torch.randn(sizes.n_features, sizes.width, device=device), dim=-1) / 10
    first = (rows, rows.clone(), torch.zeros(sizes.n_features, device=device), x.mean(0))
    parameters = encoder, decoder, b_enc, b_dec = [torch.nn.Parameter(array) for array in first]

    def loss() -> Any:
        acts = torch.relu(torch.nn.functional.linear(x, encoder, b_enc))
        if architecture == "topk":
            values, places = acts.topk(sizes.k, dim=-1, sorted=False)
            acts = torch.zeros_like(acts).scatter(-1, places, values)
        error = (acts @ decoder.to(acts.dtype) + b_dec - x).square().sum(-1).mean()
        return error if architecture == "topk" else error + 5.0 * (acts.mean(0) @ decoder.norm(dim=-1))

    return _pytorch_steps(loss, parameters, torch.optim.Adam(parameters, lr=2e-4, fused=True), sizes.steps)


def _pytorch_steps(loss: Any, parameters: list[Any], optimizer: Any, steps: int) -> Callable[[], float]:
    """Compile the loss on a GPU (compiling for a CPU would need a C++ compiler), in bfloat16 autocast."""
    torch: Any = importlib.import_module("torch")
    on_gpu = _torch_device() == "cuda"
    forward = torch.compile(loss) if on_gpu else loss

    def run() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast(_torch_device(), torch.bfloat16):
                value = forward()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    run()
    return run


def _torch_device() -> str:
    torch: Any = importlib.import_module("torch")
    return "cuda" if torch.cuda.is_available() else "cpu"


def _tokens(sizes: Sizes) -> np.ndarray:
    return np.random.default_rng(1).integers(0, sizes.model.begin_id, sizes.batch)
