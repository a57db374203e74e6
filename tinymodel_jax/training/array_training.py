"""Train a dictionary on arrays of activations, such as those of a toy model or of a model from another package.

The arrays may be memory-mapped files of any width and length; only one batch at a time is on the device. Batches are a
pure function of (seed, step), so a run can be repeated exactly.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tinymodel_jax.config import split_hooks
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.readers import Reader
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.runtime.compilation import fast_compiler_options
from tinymodel_jax.runtime.progress import Track, no_progress
from tinymodel_jax.training.data import batch_indices
from tinymodel_jax.training.dictionary_forward import ExtraLoss
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe
from tinymodel_jax.training.dictionary_state import ActivationStatistics, finalize, init_state
from tinymodel_jax.training.dictionary_step import settle_threshold, threshold_batches, train_step
from tinymodel_jax.training.warm_start import start_from

STATISTICS_ROWS = 65_536
"""Rows from which the mean and the scale are computed, at most."""
CHECKED_VALUES = 1 << 22
"""Values that `require_finite_rows` reads at once (16 MiB of float32)."""


def train_on_arrays(
    x: np.ndarray,
    y: np.ndarray | None = None,
    *,
    recipe: DictionaryRecipe,
    site: str | None = None,
    seed: int = 0,
    init_from: Dictionary | Reader | None = None,
    track: Track = no_progress,
    extra_loss: ExtraLoss | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[Dictionary, dict[str, np.ndarray]]:
    """Train a dictionary for `recipe.steps` steps.

    Args:
        x: activations (rows, d_in) of any floating-point type, in memory or memory-mapped.
        y: targets (rows, d_out) of a transcoder; None trains an SAE.
        site: tag of the place that the arrays come from, such as "Rm2", which the dictionary stores; None stores the
            hook points "x" and "y".
        seed: seed of the initial parameters and of the order of the rows.
        init_from: a dictionary of the same sizes to start from, or `lm["M2"]`; None starts at random.
        track: wraps the iterator over steps, for example with a progress bar.
        extra_loss: a function `(x, y, activations, reconstruction)` of the scaled batch, whose scalar is added to the
            loss: scaled inputs and targets, activations times the norms of their decoder rows, and the prediction.
        optimizer: any optax transformation, instead of the recipe's clipping, Adam and learning rate.

    Returns:
        The dictionary, and every metric of `train_step` as an array over steps.

    Raises:
        ValueError: the arrays are not two-dimensional, empty, or of different lengths; a row is not finite in float32;
            `site` is not the tag of an SAE of one hook point, or with `y` of a transcoder; `init_from` is not a
            dictionary or does not fit; the training diverges.

    Examples:
        >>> import numpy as np
        >>> from tinymodel_jax.training import recipe_preset, train_on_arrays
        >>> x = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
        >>> recipe = recipe_preset("house", "topk", n_features=32, steps=20, batch_size=64, k=4)
        >>> dictionary, metrics = train_on_arrays(x, recipe=recipe)
        >>> dictionary.config.n_features, metrics["loss"].shape
        (32, (20,))
    """
    x, y = np.asarray(x), None if y is None else np.asarray(y)
    _check(x, y)
    hooks = _hooks(site, is_sae=y is None)
    statistics = array_statistics(x, seed), None if y is None else array_statistics(y, seed)
    state = init_state(jax.random.key(seed), recipe, *statistics, optimizer=optimizer)
    if init_from is not None:
        state = start_from(state, recipe, init_from)
    # not fast_jit, which cannot donate: the state's buffers are reused for the next state
    step = jax.jit(
        functools.partial(train_step, recipe=recipe, extra_loss=extra_loss, optimizer=optimizer),
        donate_argnums=0,
        compiler_options=fast_compiler_options(),
    )
    hyper, history = recipe.hyper(), []
    for i in track(range(recipe.steps), "training"):
        rows = batch_indices(len(x), recipe.batch_size, seed, i)
        state, metrics = step(state, hyper, to_device(x[rows]), None if y is None else to_device(y[rows]))
        if history:
            _require_finite_step(history[-1], i)  # check the previous step while this one runs
        history.append(metrics)
    _require_finite_step(history[-1], recipe.steps)
    if recipe.architecture == "batch_topk":
        settle = jax.jit(functools.partial(settle_threshold, recipe=recipe), compiler_options=fast_compiler_options())
        for i in range(threshold_batches(recipe.batch_size)):
            rows = batch_indices(len(x), recipe.batch_size, seed, recipe.steps + i)
            state = settle(state, hyper, to_device(x[rows]), jnp.int32(i))
    config, params = finalize(state, recipe, *hooks)
    recorded = {name: np.array([metrics[name] for metrics in history]) for name in history[0]}
    return Dictionary.from_params(config, params), recorded


def array_statistics(array: np.ndarray, seed: int) -> ActivationStatistics:
    """Return the statistics of the first rows in the order of a seed, computed chunk by chunk.

    Args:
        array: activation vectors (rows, d), in memory or memory-mapped.
        seed: seed of the order of the rows, as for `train_on_arrays`.

    Examples:
        >>> import numpy as np
        >>> from tinymodel_jax.training import array_statistics
        >>> statistics = array_statistics(np.ones((100, 4), np.float32), seed=0)
        >>> statistics.mean.shape, round(float(statistics.scale), 3)
        ((4,), 1.0)
    """
    statistics = ActivationStatistics.zero(array.shape[1])
    chunk = min(len(array), 4096)
    for i in range(max(1, min(len(array), STATISTICS_ROWS) // chunk)):
        statistics = statistics.update(to_device(array[batch_indices(len(array), chunk, seed, i)]))
    return statistics


def to_device(rows: np.ndarray) -> jax.Array:
    """Return rows as a float32 array on the device."""
    return jnp.asarray(np.asarray(rows, np.float32))


def require_finite_rows(array: np.ndarray, name: str) -> None:
    """Check every row of a matrix, reading a part at a time, so that it may be a memory-mapped file.

    Args:
        name: name of the array in the error message.

    Raises:
        ValueError: a row contains NaN, infinity, or numbers whose squares overflow float32.
    """
    rows_together = max(1, CHECKED_VALUES // array.shape[1])
    for start in range(0, len(array), rows_together):
        with np.errstate(over="ignore", invalid="ignore"):
            rows = np.asarray(array[start : start + rows_together], np.float32)
            bad = np.flatnonzero(~np.isfinite(np.einsum("ij,ij->i", rows, rows)))
        if bad.size:
            value = array[start + bad[0]][np.argmax(np.abs(rows[bad[0]]))]  # argmax returns the position of a NaN
            raise ValueError(
                f"{name}: row {start + bad[0]} (the first is 0) contains {value}; training needs finite numbers whose "
                "squares do not overflow float32. Leave the row out, or correct its source."
            )


def _hooks(tag: str | None, is_sae: bool) -> tuple[str, str]:
    """Return the hook points of the input and of the target."""
    if tag is None:
        return "x", "x" if is_sae else "y"
    site = Site.whole(tag, "train_on_arrays: site=")
    if len(split_hooks(site.hook_in)) > 1 or (site.hook_in == site.hook_out) != is_sae:
        wanted = "an SAE, as y is not given" if is_sae else "a transcoder, as y is given"
        raise ValueError(f"train_on_arrays: site={tag!r} is not that of {wanted}, at one hook point.")
    return site.hook_in, site.hook_out


def _require_finite_step(metrics: dict[str, jax.Array], step: int) -> None:
    bad = next((name for name in ("loss", "gradient_norm") if not np.isfinite(metrics[name])), None)
    if bad is not None:
        raise ValueError(
            f"train_on_arrays: {bad} is {metrics[bad]} at step {step}, on finite data; "
            "try a lower learning_rate in the recipe."
        )


def _check(x: np.ndarray, y: np.ndarray | None) -> None:
    arrays = {name: array for name, array in (("x", x), ("y", y)) if array is not None}
    for name, array in arrays.items():
        if array.ndim != 2 or not array.size:
            raise ValueError(
                f"train_on_arrays: {name} has shape {array.shape}; expected (rows, width), neither of them 0."
            )
    if y is not None and len(y) != len(x):
        raise ValueError(f"train_on_arrays: x has {len(x)} rows and y has {len(y)}; every input needs its target.")
    for name, array in arrays.items():
        require_finite_rows(array, f"train_on_arrays: {name}")
