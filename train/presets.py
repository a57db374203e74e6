"""The presets of `python -m train lm`: model sizes, optimizer, batch size and number of steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

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


@dataclass(frozen=True)
class OptimizerOptions:
    """Settings that replace those of a preset's optimizer; None keeps the preset's."""

    method: Annotated[Literal["adamw", "muon"] | None, tyro.conf.arg(name="optimizer")] = None
    """adamw, or muon for the matrices of attention and MLPs"""
    learning_rate: float | None = None
    """peak learning rate"""
    schedule: Literal["wsd", "cosine"] | None = None
    """wsd (constant, then linear to zero) or cosine"""
    warmup_steps: int | None = None
    """steps over which the learning rate rises"""
    weight_decay: float | None = None
    """decoupled weight decay, applied to matrices only"""


AS_PRESET = OptimizerOptions()

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


def chosen_preset(
    name: PresetName,
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
    preset = PRESETS[name]
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
                f"the data has rows of {data.row_length} tokens, but --preset {name} has a context of {model.n_ctx}."
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
