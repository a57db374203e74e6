"""The presets of `python -m train lm`: model sizes, optimizer, batch size and number of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import tyro
from jax.sharding import Mesh

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.training.data import TokenData
from tinymodel_jax.training.lm_step import Initialization, LMOptimizer

DType = Literal["auto", "float32", "bfloat16"]
PresetName = Literal["tiny_model", "tiny_model_2L", "mini", "smoke"]


@dataclass(frozen=True)
class Preset:
    """Everything that `train lm` needs besides data; options change single settings."""

    model: ModelConfig
    """Sizes; if `any_vocabulary`, d_vocab is replaced by the data's."""
    optimizer: LMOptimizer
    batch_size: int
    """Rows per step."""
    steps: int
    initialization: Initialization
    any_vocabulary: bool
    """Whether the vocabulary size comes from the data instead of the preset."""

    def describe(self) -> str:
        """Return what is trained, on one line."""
        model, optimizer = self.model, self.optimizer
        return (
            f"{model.n_layers} layers, d_model {model.d_model}, {model.n_heads} heads, d_mlp {model.d_mlp}, "
            f"context {model.n_ctx}, {model.d_vocab:,} ids: {model.n_params:,} parameters in {model.dtype}; "
            f"{optimizer.method}, learning rate {optimizer.learning_rate:g}, {self.steps:,} steps of "
            f"{self.batch_size} rows"
        )


def of_presets(value: Callable[[Preset], Any]) -> Any:
    """Return the annotation of an option whose default is the preset's; its help states the value of each preset."""

    def hint(default: str) -> str:
        del default
        values = {name: value(preset) for name, preset in PRESETS.items()}
        same = len(set(values.values())) == 1
        listed = [f"{one}" for one in values.values()][:1] if same else [f"{one} {values[one]}" for one in values]
        return f"(default: {', '.join(listed)})"

    return tyro.conf.arg(help_behavior_hint=hint)


@dataclass(frozen=True)
class SizeOptions:
    """Sizes that replace those of a preset's model; None keeps the preset's."""

    n_layers: Annotated[int | None, of_presets(lambda preset: preset.model.n_layers)] = None
    """transformer blocks"""
    d_model: Annotated[int | None, of_presets(lambda preset: preset.model.d_model)] = None
    """width of the residual stream"""
    n_heads: Annotated[int | None, of_presets(lambda preset: preset.model.n_heads)] = None
    """attention heads per layer; must divide d-model"""
    d_mlp: Annotated[int | None, of_presets(lambda preset: preset.model.d_mlp)] = None
    """neurons per layer"""
    n_ctx: Annotated[int | None, of_presets(lambda preset: preset.model.n_ctx)] = None
    """largest sequence length (tokens); at least the data's row length"""


@dataclass(frozen=True)
class OptimizerOptions:
    """Settings that replace those of a preset's optimizer; None keeps the preset's."""

    method: Annotated[
        Literal["adamw", "muon"] | None,
        tyro.conf.arg(name="optimizer"),
        of_presets(lambda preset: preset.optimizer.method),
    ] = None
    """adamw, or muon for the matrices of attention and MLPs"""
    learning_rate: Annotated[float | None, of_presets(lambda preset: preset.optimizer.learning_rate)] = None
    """peak learning rate"""
    schedule: Annotated[Literal["wsd", "cosine"] | None, of_presets(lambda preset: preset.optimizer.schedule)] = None
    """wsd (constant, then linear to zero) or cosine"""
    warmup_steps: Annotated[int | None, of_presets(lambda preset: preset.optimizer.warmup_steps)] = None
    """steps over which the learning rate rises"""
    weight_decay: Annotated[float | None, of_presets(lambda preset: preset.optimizer.weight_decay)] = None
    """decoupled weight decay, applied to matrices only"""


AS_PRESET, PRESET_SIZES = OptimizerOptions(), SizeOptions()

_TINY_MODEL = Preset(
    ModelConfig(),
    LMOptimizer(learning_rate=1e-3, warmup_steps=500),
    batch_size=256,
    steps=30_100,
    initialization="reference",
    any_vocabulary=False,
)
"""The published training: 2.57 M rows of 128, three epochs."""

PRESETS: dict[PresetName, Preset] = {
    "tiny_model": _TINY_MODEL,
    "tiny_model_2L": replace(_TINY_MODEL, model=ModelConfig(n_layers=2)),
    "mini": Preset(
        ModelConfig(n_layers=4, d_model=128, n_heads=8, d_mlp=512, n_ctx=256, d_vocab=1024),
        LMOptimizer(method="muon", learning_rate=4e-3, warmup_steps=200),
        batch_size=8,
        steps=6_000,
        initialization="wide",
        any_vocabulary=True,
    ),
    "smoke": Preset(
        ModelConfig(n_layers=2, d_model=32, n_heads=4, d_mlp=128, n_ctx=128, d_vocab=1024),
        LMOptimizer(learning_rate=3e-3, warmup_steps=10),
        batch_size=8,
        steps=60,
        initialization="wide",
        any_vocabulary=True,
    ),
}


def sized_preset(name: PresetName, sizes: SizeOptions) -> Preset:
    """Return a preset with the given sizes.

    Raises:
        ValueError: a size is below 1, or the sizes do not fit together.
    """
    preset = PRESETS[name]
    given = {field: value for field, value in asdict(sizes).items() if value is not None}
    try:
        return replace(preset, model=replace(preset.model, **given))
    except ValueError as error:
        options = " ".join(f"--{field.replace('_', '-')} {value}" for field, value in given.items())
        raise ValueError(f"--preset {name} {options}: {error}") from None


def chosen_preset(
    name: PresetName,
    sizes: SizeOptions,
    data: TokenData | None,
    *,
    steps: int | None,
    batch_size: int | None,
    optimizer: OptimizerOptions,
    initialization: Initialization | None,
    dtype: str,
) -> Preset:
    """Return a preset with the given options applied, and the data's vocabulary size where the preset allows any.

    Raises:
        ValueError: an option is out of its range, or the data does not fit the preset.
    """
    preset = sized_preset(name, sizes)
    model = preset.model
    if data is not None:
        if preset.any_vocabulary:
            model = replace(model, d_vocab=data.vocab_size)
        elif model.d_vocab != data.vocab_size:
            raise ValueError(
                f"--preset {name} has {model.d_vocab} ids, the data {data.vocab_size}; "
                "prepare the data with the preset's tokenizer."
            )
        if data.row_length > model.n_ctx:
            raise ValueError(
                f"the data has rows of {data.row_length} tokens, but the model a context of {model.n_ctx}; give "
                f"--n-ctx {data.row_length} or more, or prepare the data with a shorter --row-length."
            )
    steps = preset.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"--steps {steps} must be 1 or more.")
    given = {field: value for field, value in asdict(optimizer).items() if value is not None}
    return replace(
        preset,
        model=replace(model, dtype=dtype),
        optimizer=replace(preset.optimizer, **given),
        steps=steps,
        batch_size=preset.batch_size if batch_size is None else batch_size,
        initialization=initialization or preset.initialization,
    )


def number_format(dtype: DType, mesh: Mesh) -> str:
    """Return the compute dtype of a language model: auto is bfloat16 on an accelerator, float32 on a CPU."""
    if dtype != "auto":
        return dtype
    return "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
