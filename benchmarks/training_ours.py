"""This package's side of `training.py`: the steps as `python -m train` compiles them, and its sweep program.

The language-model and dictionary steps are the library's own, with the compiler options and the memory setting of the
programs. A dictionary step is the whole `house` recipe: scaling, loss, clipping, Adam, decoder norms, counting silent
features, AuxK or the reservoir of badly reconstructed inputs; a hundredth of the features is dead and stays so.
"""

import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sides import Calls, once
from training_inputs import (
    BETAS,
    CLIP_NORM,
    DATA,
    DEAD_SHARE,
    DICTIONARY_BETAS,
    DICTIONARY_RATE,
    FULL,
    L1,
    LARGE_DICTIONARY,
    LEARNING_RATE,
    MODEL,
    SMALL,
    SMALL_DICTIONARY,
    SWEEP_KS,
    WEIGHT_DECAY,
    DictionaryCase,
    LMCase,
    activations,
    dictionary_rows,
    tokens,
)

from tinymodel_jax.runtime.allocator import keep_freed_memory

ROOT = Path(__file__).parents[1]
STEPS = 1_000_000
"""Number of steps of the schedules: all measured steps have the largest learning rate."""
SWEEP_STEPS = 100


def our_calls(folder: Path) -> Calls:
    """Return this package's calls; each trains one step and returns its loss, or runs a whole program."""
    keep_freed_memory()
    calls = {
        "lm-full": once(functools.partial(lm_step, FULL, folder)),
        "lm-small": once(functools.partial(lm_step, SMALL, folder)),
        "by-hand": once(functools.partial(dictionary_step, LARGE_DICTIONARY, "relu", as_by_hand=True)),
        "sweep": functools.partial(run_sweep, folder, ",".join(map(str, SWEEP_KS))),
        "facts": facts,
    }
    for size, case in (("768", LARGE_DICTIONARY), ("128", SMALL_DICTIONARY)):
        for architecture in ("relu", "topk", "batch_topk"):
            calls[f"{architecture}-{size}"] = once(functools.partial(dictionary_step, case, architecture))
    return calls


def solo_calls(folder: Path) -> Calls:
    """Return the sweep's other contender: its members one after the other, each in a separate program."""
    return {"sweep": lambda: sum(run_sweep(folder, str(k)) for k in SWEEP_KS)}


def lm_step(case: LMCase, folder: Path) -> Callable[[], float]:
    """Return a function that trains the language model for a step and returns its loss."""
    import jax

    from tinymodel_jax.lm import TinyModel
    from tinymodel_jax.runtime.compilation import fast_compiler_options
    from tinymodel_jax.training.lm_step import (
        LMOptimizer,
        LMState,
        learning_rate_schedule,
        make_optimizer,
        train_step,
    )

    settings = LMOptimizer("adamw", LEARNING_RATE, "wsd", 0, 0.0, *BETAS, WEIGHT_DECAY, CLIP_NORM)
    optimizer = make_optimizer(settings, STEPS)
    params = TinyModel(folder / case.file, n_heads=case.config.n_heads).params
    step = functools.partial(
        train_step, config=case.config, optimizer=optimizer, schedule=learning_rate_schedule(settings, STEPS)
    )
    state = LMState(jax.numpy.zeros((), jax.numpy.int32), params, optimizer.init(params))
    return _stepper(step, state, jax.numpy.asarray(tokens(case), jax.numpy.int32), fast_compiler_options())


def dictionary_step(case: DictionaryCase, architecture: Any, as_by_hand: bool = False) -> Callable[[], float]:
    """Return a function that trains a dictionary for a step and returns its loss.

    Args:
        as_by_hand: start without dead features, and keep learning rate and penalty constant, as the other side does.
    """
    import jax
    import jax.numpy as jnp

    from tinymodel_jax.runtime.compilation import fast_compiler_options
    from tinymodel_jax.training.dictionary_recipe import recipe_preset
    from tinymodel_jax.training.dictionary_state import ActivationStatistics, init_state
    from tinymodel_jax.training.dictionary_step import train_step

    changes: dict[str, Any] = {"batch_size": case.batch}
    if architecture != "relu":
        changes |= {"k": case.k}
    if as_by_hand:
        changes |= {"warmup_steps": 0, "sparsity_warmup_steps": 0, "scale_inputs": False, "sparsity": L1}
        changes |= {"learning_rate": DICTIONARY_RATE, "beta1": DICTIONARY_BETAS[0], "beta2": DICTIONARY_BETAS[1]}
    recipe = recipe_preset("house", architecture, case.n_features, STEPS, **changes)
    x = jnp.asarray(activations(case))
    state = init_state(jax.random.key(0), recipe, ActivationStatistics.zero(case.width).update(x))
    if as_by_hand:
        rows = dictionary_rows(case)
        zeros = {"b_enc": jnp.zeros(case.n_features), "b_dec": jnp.zeros(case.width)}
        state = state._replace(params={"W_enc_T": jnp.array(rows), "W_dec": jnp.array(rows), **zeros})
    else:
        dead = jnp.arange(case.n_features) < DEAD_SHARE * case.n_features
        b_enc = jnp.where(dead, -1e6, state.params["b_enc"])  # so low that they stay dead
        silent_for = jnp.where(dead, recipe.dead_after, 0).astype(jnp.int32)
        state = state._replace(params=state.params | {"b_enc": b_enc}, silent_for=silent_for)
    step = functools.partial(train_step, hyper=recipe.hyper(), recipe=recipe)
    return _stepper(lambda state, x: step(state, x=x), state, x, fast_compiler_options())


def run_sweep(folder: Path, ks: str) -> float:
    """Train dictionaries with `python -m train dictionaries` in a new folder, and return the seconds it took.

    Raises:
        RuntimeError: the program failed.
    """
    out = folder / "sweep"
    options = {
        "model": folder / MODEL,
        "sites": "M0",
        "architecture": "topk",
        "k": ks,
        "n-features": SMALL_DICTIONARY.n_features,
        "steps": SWEEP_STEPS,
        "data": folder / DATA,
        "out": out,
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "train", "dictionaries", *arguments], capture_output=True, text=True, env=environment
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"python -m train dictionaries failed:\n{done.stdout}{done.stderr}")
    shutil.rmtree(out)
    return seconds


def facts() -> str:
    """Return the settings of XLA and the allocator."""
    from tinymodel_jax.runtime.compilation import fast_compiler_options

    return f"YNN fusion {'off' if fast_compiler_options() else 'as XLA does'}, freed memory kept"


def _stepper(step: Any, state: Any, batch: Any, options: dict[str, str]) -> Callable[[], float]:
    import jax

    compiled = jax.jit(step, donate_argnums=0, compiler_options=options)

    def one() -> float:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return one
