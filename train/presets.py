"""The language models that `python -m train lm` knows by name: sizes, optimizer, batch, length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.training.lm_step import Initialization, LMOptimizer

PresetName = Literal["tiny_model", "tiny_model_2L", "mini", "smoke"]


@dataclass(frozen=True)
class Preset:
    """One recipe."""

    model: ModelConfig
    """Sizes; where `any_vocabulary`, d_vocab is a placeholder."""
    optimizer: LMOptimizer
    batch_size: int
    """Rows a step."""
    steps: int
    initialization: Initialization
    any_vocabulary: bool
    """Whether the data says the vocabulary size, rather than the preset."""


@dataclass(frozen=True)
class OptimizerOptions:
    """What replaces single settings of a preset's optimizer; None: the preset's."""

    method: Annotated[Literal["adamw", "muon"] | None, tyro.conf.arg(name="optimizer")] = None
    """adamw, or muon for the matrices of attention and MLPs"""
    learning_rate: float | None = None
    """peak learning rate"""
    schedule: Literal["wsd", "cosine"] | None = None
    """wsd (constant, then linear to zero) or cosine"""
    warmup_steps: int | None = None
    """steps in which the learning rate rises"""
    weight_decay: float | None = None
    """decoupled weight decay of the matrices"""


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
