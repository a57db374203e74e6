"""The activations that a dictionary run trains on: those at a language model's sites, or arrays in files.

A source makes batches, turns them into vectors inside the compiled step, and evaluates finished dictionaries on
held-out data. Batches and vectors depend only on the step, not on the mesh. Both kinds have the same methods.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinymodel_jax.analysis.evaluation.evaluation import DictionaryEvaluation, evaluate
from tinymodel_jax.analysis.evaluation.reconstruction import ReconstructionEvaluation, evaluate_reconstruction
from tinymodel_jax.config import ModelConfig, split_hooks
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.sites import Site, require_layer
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.hook_points import vector_width
from tinymodel_jax.model.transformer import Transformer
from tinymodel_jax.runtime.collectives import on_first
from tinymodel_jax.training.array_training import require_finite_rows
from tinymodel_jax.training.data import TokenData, batch_indices, open_data
from tinymodel_jax.training.data_folder import DEFAULT_ROW_LENGTH
from tinymodel_jax.training.sharding import MESH_AXES, abstract_arrays, rows_on_devices
from tinymodel_jax.training.site_activations import Vectors, site_vectors
from train.presets import PRESETS, DType, number_format

MARGIN = 1.05
"""Tokens in an average batch of stories per token drawn from it."""
EVALUATION_VECTORS = 4096
"""Held-out vectors per batch; the evaluations during the training are on one batch."""
QUICK_STORIES = 64
"""Held-out stories that the evaluations during the training are on."""
STORIES_MULTIPLE = 8
"""The default number of stories per step is a multiple of this, so that most meshes divide it."""
HELD_OUT_SHARE = 0.05
"""Share of an array's rows, the last ones, that is held out."""

Evaluation = DictionaryEvaluation | ReconstructionEvaluation


@dataclass(frozen=True)
class ActivationOptions:
    """Where a run's vectors come from: sites of a language model, or files."""

    model: str = "mini"
    """language model: a published name, a folder or hub:OWNER/NAME; with --compile-for also a preset of
    `python -m train lm`"""
    sites: str = ""
    """sites, separated by commas, such as M0,M1,A0: a kind (A, M, T, Mo, Ra, Rm) and a layer, or a hook point's name;
    Ra0+Ra1 trains a crosscoder, M0+M1 a cross-layer transcoder"""
    data: str | None = None
    """folder written by `python -m train prepare`; without it, --compile-for assumes stories of 128 tokens"""
    activations: Path | None = None
    """.npy file (rows, width) to train on instead of a model's sites"""
    targets: Path | None = None
    """.npy file (rows, width) that a transcoder predicts from --activations"""
    batch_size: int = 4096
    """vectors per step"""
    stories: int | None = None
    """stories per step from which the vectors are drawn; by default as many as needed"""
    exclude: str = ""
    """tokens at which the dictionaries are not trained and do not act, separated by commas: begin, end, unk, or ids"""
    data_seed: int = 0
    """seed of the order of the stories and of the tokens drawn from them"""
    held_out_stories: int = 512
    """largest number of held-out stories that dictionaries are evaluated on (during the training, at most 64)"""
    dtype: DType = "auto"
    """number format of the language model; auto is bfloat16 on an accelerator, float32 on a CPU"""


@dataclass(frozen=True)
class Place:
    """What a dictionary reads and predicts."""

    hook_in: str
    hook_out: str
    d_in: int
    d_out: int
    exclude: tuple[int, ...] = ()
    """Ids of tokens that are left out."""

    @property
    def is_sae(self) -> bool:
        """Whether it predicts what it reads."""
        return self.hook_in == self.hook_out

    @property
    def parts(self) -> int:
        """Number of hook points whose vectors are concatenated."""
        return len(split_hooks(self.hook_in))

    @property
    def layers(self) -> int:
        """Number of layers of a cross-layer transcoder; 1 for other dictionaries."""
        return 1 if self.is_sae else self.parts


class ActivationSource(Protocol):
    """The interface of both kinds of source."""

    places: Mapping[str, Place]
    """Name of a place (a site's tag) -> what a dictionary there reads and predicts."""
    context: Any
    """Parameters of the language model, an argument of the compiled step that `vectors` reads."""
    batch_size: int
    """Vectors per step."""
    abstract_batch: Any
    """Shape, number format and sharding of a batch."""
    flops_per_vector: float
    """Floating-point operations to compute one vector of every place."""
    rows_are: str
    """What the rows are, for messages."""
    steps_per_epoch: float
    """Steps in which every row is read once."""

    def make_batch(self, step: int) -> Any:
        """Return a step's batch on the devices."""
        ...

    def vectors(self, context: Any, batch: Any, step: Any, *, split: bool = True) -> dict[str, Vectors]:
        """Return the vectors of every place, for use inside a compiled function.

        Args:
            split: shard them over the mesh's `data` axis. Otherwise every device holds all of them, and sums over them
                have the same bits on every mesh.
        """
        ...

    def evaluate(self, dictionaries: Sequence[Dictionary], quick: bool = False) -> list[Evaluation]:
        """Evaluate dictionaries on held-out data.

        Args:
            quick: only on a small part of it, always the same.
        """
        ...


def open_activations(
    options: ActivationOptions, mesh: Mesh, only_compiled: bool = False
) -> tuple[ActivationSource, dict[str, Any]]:
    """Return the source of a run's activations, and its entries in the run's configuration.

    Args:
        only_compiled: nothing will be run, so the mesh's devices may be absent and the model a preset of `train lm`.

    Raises:
        ValueError: the options do not fit together, the model, the data or the mesh.
        FileNotFoundError: the model or the data does not exist.
    """
    if min(options.batch_size, options.held_out_stories) < 1:
        raise ValueError("--batch-size and --held-out-stories must be 1 or more.")
    if options.stories is not None and options.stories < 1:
        raise ValueError(f"--stories {options.stories} must be 1 or more.")
    if not 0 <= options.data_seed < 2**32:
        raise ValueError(f"--data-seed {options.data_seed}: seeds are 0 to {2**32 - 1}.")
    parts = mesh.shape["data"]
    if options.batch_size % parts:
        raise ValueError(f"--batch-size {options.batch_size} must be a multiple of {parts}, the data axis.")
    if options.activations is not None:
        source, origin = _open_arrays(options, options.activations, mesh)
    else:
        source, origin = _open_model(options, mesh, only_compiled)
    places = {name: dataclasses.asdict(place) for name, place in source.places.items()}
    return source, {**origin, "places": places, "data_seed": options.data_seed}


class ModelActivations:
    """Activations of a language model at some sites, all from one pass over the same stories."""

    rows_are = "the prepared rows"

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        sites: Sequence[Site],
        data: TokenData | None,
        options: ActivationOptions,
        mesh: Mesh,
    ) -> None:
        """Prepare to draw `options.batch_size` vectors per step.

        Args:
            params: parameters of the language model on every device of the mesh, or abstract arrays to compile with.
            data: None if nothing will be run; stories are then assumed to have `DEFAULT_ROW_LENGTH` tokens.

        Raises:
            ValueError: the data does not fit the model, or has no held-out stories.
        """
        row_length, tokens_per_story = DEFAULT_ROW_LENGTH, float(DEFAULT_ROW_LENGTH)
        if data is not None:
            _check_data(config, data)
            row_length, tokens_per_story = data.row_length, data.meta.tokens["train"] / data.meta.rows["train"]
        words = [int(word) if word.isdigit() else word for word in options.exclude.split(",") if word]
        self._exclude = config.named_tokens(words)
        self.places: Mapping[str, Place] = {site.tag: _place(site, config, self._exclude) for site in sites}
        self.context = params
        self._config, self._sites, self._data = config, list(sites), data
        self._options, self._mesh, self.batch_size = options, mesh, options.batch_size
        least = math.ceil(options.batch_size * MARGIN / tokens_per_story)
        self.stories = options.stories or math.ceil(least / STORIES_MULTIPLE) * STORIES_MULTIPLE
        rows = NamedSharding(mesh, P(_axes_that_divide(mesh, self.stories), None))
        self.abstract_batch = jax.ShapeDtypeStruct((self.stories, row_length), np.int32, sharding=rows)
        layers = max(site.layer for site in sites) + 1
        matrices = layers * (4 * config.d_model**2 + 2 * config.d_model * config.d_mlp)
        self.flops_per_vector = 2.0 * matrices * self.stories * row_length / options.batch_size
        self.steps_per_epoch = math.inf if data is None else len(data.train) / self.stories

    def make_batch(self, step: int) -> jax.Array:
        """Return the token ids of a step's stories."""
        assert self._data is not None
        rows = batch_indices(len(self._data.train), self.stories, self._options.data_seed, step)
        return rows_on_devices(self._data.train, rows, self.abstract_batch.sharding, np.int32)

    def vectors(self, context: Any, batch: Any, step: Any, *, split: bool = True) -> dict[str, Vectors]:
        """Return the vectors of every site at the tokens drawn in this step."""
        key = jax.random.fold_in(jax.random.key(self._options.data_seed), step)
        layout = NamedSharding(self._mesh, P("data" if split else None, None))
        return site_vectors(context, self._config, batch, self._sites, self.batch_size, key, layout, self._exclude)

    def evaluate(self, dictionaries: Sequence[Dictionary], quick: bool = False) -> list[Evaluation]:
        """Evaluate dictionaries on the held-out stories, all in one pass, in float32."""
        assert self._data is not None
        config = dataclasses.replace(self._config, dtype="float32")
        lm = TinyModel.from_params(config, self.context)
        stories = min(self._options.held_out_stories, QUICK_STORIES if quick else len(self._data.valid))
        return [*evaluate(lm, dictionaries, np.asarray(self._data.valid[:stories], np.int32))]


class ArrayActivations:
    """Vectors in the rows of `.npy` files; the last rows are held out."""

    context = ()
    flops_per_vector = 0.0
    rows_are = "the rows of the file"

    def __init__(self, x: Path, y: Path | None, options: ActivationOptions, mesh: Mesh) -> None:
        """Map the files into memory, and check each once.

        Raises:
            ValueError: a file is not a matrix of floating-point numbers, a row is not finite in float32, or the two
                files have different lengths.
        """
        paths = (x,) if y is None else (x, y)
        arrays = [_map_matrix(path) for path in paths]
        if len({len(array) for array in arrays}) > 1:
            raise ValueError(
                f"{x} has {len(arrays[0])} rows and {y} has {len(arrays[1])}; every input needs its target."
            )
        n_rows = len(arrays[0])
        self._trained_rows = n_rows - int(n_rows * HELD_OUT_SHARE)
        if self._trained_rows == n_rows:
            raise ValueError(
                f"{x} has {n_rows} rows; it needs {math.ceil(1 / HELD_OUT_SHARE)} or more, to hold some out."
            )
        on_first(lambda: [require_finite_rows(*each) for each in zip(arrays, map(str, paths), strict=True)])
        self._arrays, self._options, self.batch_size = arrays, options, options.batch_size
        self.steps_per_epoch = self._trained_rows / options.batch_size
        self._layout = NamedSharding(mesh, P("data", None))
        widths = arrays[0].shape[1], arrays[-1].shape[1]
        self.abstract_batch = tuple(
            jax.ShapeDtypeStruct((options.batch_size, array.shape[1]), np.float32, sharding=self._layout)
            for array in arrays
        )
        self.places: Mapping[str, Place] = {"activations": Place("x", "x" if y is None else "y", *widths)}

    def make_batch(self, step: int) -> tuple[jax.Array, ...]:
        """Return a step's rows of every array."""
        rows = batch_indices(self._trained_rows, self.batch_size, self._options.data_seed, step)
        return tuple(rows_on_devices(array, rows, self._layout, np.float32) for array in self._arrays)

    def vectors(self, context: Any, batch: Any, step: Any, *, split: bool = True) -> dict[str, Vectors]:
        """Return the batch itself."""
        del context, step
        layout = self._layout if split else NamedSharding(self._layout.mesh, P())
        batch = jax.lax.with_sharding_constraint(batch, layout)
        return {"activations": Vectors(batch[0], batch[1] if len(batch) == 2 else None)}

    def evaluate(self, dictionaries: Sequence[Dictionary], quick: bool = False) -> list[Evaluation]:
        """Evaluate dictionaries on the held-out rows."""
        batches = 1 if quick else None
        return [
            evaluate_reconstruction(dictionary, itertools.islice(self._held_out_batches(), batches))
            for dictionary in dictionaries
        ]

    def _held_out_batches(self) -> Iterator[tuple[jax.Array, jax.Array]]:
        everywhere = NamedSharding(self._layout.mesh, P())
        for start in range(self._trained_rows, len(self._arrays[0]), EVALUATION_VECTORS):
            parts = [np.asarray(array[start : start + EVALUATION_VECTORS], np.float32) for array in self._arrays]
            x, y = (jax.device_put(part, everywhere) for part in (parts[0], parts[-1]))
            yield x, y


def _open_arrays(options: ActivationOptions, activations: Path, mesh: Mesh) -> tuple[ActivationSource, dict[str, Any]]:
    if options.sites or options.data is not None:
        raise ValueError("--activations replaces --sites and --data; give one or the other.")
    if options.exclude:
        raise ValueError(
            "--exclude needs --sites: the rows of --activations have no tokens; leave rows out of the file."
        )
    if options.stories is not None:
        raise ValueError("--stories needs --sites: the rows of --activations do not come from stories.")
    names = {"activations": activations.name, "targets": options.targets.name if options.targets else None}
    return ArrayActivations(activations, options.targets, options, mesh), {"arrays": names}


def _open_model(options: ActivationOptions, mesh: Mesh, only_compiled: bool) -> tuple[ActivationSource, dict[str, Any]]:
    if options.targets is not None:
        raise ValueError("--targets needs --activations; a model's sites have their own targets.")
    if not options.sites or (options.data is None and not only_compiled):
        raise ValueError("give --sites and --data, or --activations.")
    sites = [Site.whole(tag, "--sites ") for tag in options.sites.split(",")]
    if len({site.tag for site in sites}) < len(sites):
        raise ValueError(f"--sites {options.sites!r} contains a site twice.")
    config, params = _load_model(options.model, number_format(options.dtype, mesh), mesh, only_compiled)
    for site in sites:
        require_layer(site, config, "--sites ")
        if len({vector_width(hook, config) for hook in split_hooks(site.hook_in)}) > 1:
            raise ValueError(f"--sites {site.tag}: joined hook points must have the same width.")
    data = None if options.data is None else open_data(options.data)
    found = ModelActivations(config, params, sites, data, options, mesh)
    origin = {
        "model": {"name": options.model, "config": config.to_dict()},
        "data": data.fingerprint if data else None,
        "stories": found.stories,
        "held_out_stories": options.held_out_stories,
    }
    return found, origin


def _load_model(model: str, dtype: str, mesh: Mesh, only_compiled: bool) -> tuple[ModelConfig, Any]:
    """Return a language model's configuration and its parameters on the mesh, or only their shapes."""
    everywhere = NamedSharding(mesh, P())
    if only_compiled and model in PRESETS:
        config = dataclasses.replace(PRESETS[model].model, dtype=dtype)
        params = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    else:
        lm = TinyModel(model, dtype=dtype)
        config, params = lm.config, lm.params
    if only_compiled:
        return config, abstract_arrays(params, jax.tree.map(lambda leaf: everywhere, params))
    return config, jax.device_put(params, everywhere)


def _place(site: Site, config: ModelConfig, exclude: tuple[int, ...]) -> Place:
    d_in, d_out = vector_width(site.hook_in, config), vector_width(site.hook_out, config)
    assert d_in is not None
    assert d_out is not None
    return Place(site.hook_in, site.hook_out, d_in, d_out, exclude)


def _check_data(config: ModelConfig, data: TokenData) -> None:
    if data.vocab_size != config.d_vocab:
        raise ValueError(
            f"the data has {data.vocab_size} ids, the model {config.d_vocab}; prepare it with the model's tokenizer."
        )
    if data.row_length > config.n_ctx:
        raise ValueError(f"the data has rows of {data.row_length} tokens, the model a context of {config.n_ctx}.")
    if not len(data.valid):
        raise ValueError(f"{data.folder} has no held-out stories; prepare it with a --valid-fraction above 0.")


def _axes_that_divide(mesh: Mesh, rows: int) -> tuple[str, ...]:
    """Return the mesh axes to shard rows over: all of them if they divide the rows, otherwise as many as do."""
    choices = [MESH_AXES[:n] for n in range(len(MESH_AXES), -1, -1)]
    return next(axes for axes in choices if rows % math.prod(mesh.shape[axis] for axis in axes) == 0)


def _map_matrix(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a .npy file: {' '.join(str(error).split())}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.shape[1] == 0 or array.dtype.kind != "f":
        what = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise ValueError(f"{path} holds {what}; expected floating-point numbers of shape (rows, width).")
    return array
