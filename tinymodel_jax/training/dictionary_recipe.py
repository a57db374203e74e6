"""`DictionaryRecipe`: all settings of a dictionary's training, and the presets `house` and `reference`.

Recipes are frozen, hashable, validated once, and survive JSON. They do not contain the source of the activations or the
devices. A sweep varies the numbers of `DictionaryHyper` without compiling again.

Units. Inputs and targets are scaled once so that their mean norm is the square root of their width (`scale_inputs`).
The reconstruction loss is the squared error, summed over the width and averaged over inputs. Sparsity penalties act on
activations times the norms of their decoder rows, summed over features and averaged over inputs. Dimensionless terms
(AuxK, the target-L0 loss) are multiplied by the variance of the scaled targets, summed over the width, so that their
weight relative to the reconstruction does not depend on the targets' mean.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from tinymodel_jax.config import TRAINED_ARCHITECTURES, TrainedArchitecture
from tinymodel_jax.json_config import JsonConfig

Penalty = Literal["l1", "log"]
PRESETS = ("house", "reference")
NOT_NEGATIVE = ("sparsity", "warmup_steps", "sparsity_warmup_steps", "aux_coefficient", "controller_rate")
POSITIVE = (
    "encoder_norm",
    "decoder_norm",
    "learning_rate",
    "threshold_rate",
    "bandwidth",
    "clip_norm",
    "target_l0",
)
SHARES = ("decay_fraction", "final_learning_rate")


class DictionaryHyper(NamedTuple):
    """The numbers that a sweep varies: traced scalars, or arrays with a leading axis of members."""

    sparsity: Array
    """Coefficient of the sparsity loss, in the recipe's units (float32)."""
    k: Array
    """Active features per input, at most the recipe's `k` (int32; only topk and batch_topk read it)."""
    target_l0: Array
    """Target number of active features per input (float32; only a controller or the target-L0 loss reads it)."""
    learning_rate: Array
    """Largest learning rate of the schedule (float32)."""


@dataclass(frozen=True)
class DictionaryRecipe(JsonConfig):
    """How to train one dictionary. Build one with `recipe_preset`, or field by field.

    Source: topk and AuxK, Gao et al. 2024; batch_topk, Bussmann et al. 2024; jumprelu and its L0 loss, Rajamanoharan et
    al. 2024 (JumpReLU); gated, Rajamanoharan et al. 2024 (Gated SAEs); Matryoshka prefixes, Bussmann et al. 2025.

    Raises:
        ValueError: a number is out of its range, or fields do not fit together; the message names all problems.

    Examples:
        >>> from tinymodel_jax.training import DictionaryRecipe
        >>> recipe = DictionaryRecipe("batch_topk", n_features=512, steps=1000, k=16)
        >>> recipe.takes_k, recipe.n_prefixes
        (True, 1)
    """

    architecture: TrainedArchitecture
    """Activation function, which decides which features are active."""
    n_features: int
    """Dictionary size (features)."""
    steps: int
    """Length of the training (steps); the schedules end with it."""
    batch_size: int = 4096
    """Activation vectors per step."""
    k: int | None = None
    """Active features per input of topk and batch_topk, the largest in a sweep; None for other architectures."""
    encoder_norm: float = 0.1
    """Norm of every encoder row before the first step."""
    decoder_norm: float = 0.1
    """Norm of every decoder row before the first step."""
    penalty: Penalty = "l1"
    """Sparsity penalty of relu and gated on weighted activations z: `l1` is sum(z), `log` is sum(log(1 + z))."""
    sparsity: float = 0.0
    """Coefficient of the sparsity loss: the penalty (relu, gated), the L0 or target-L0 loss (jumprelu)."""
    target_l0: float | None = None
    """Target number of active features per input, for a controller of `sparsity` (relu, gated) or a loss (jumprelu)."""
    controller_rate: float = 0.01
    """Largest relative change of the controlled sparsity coefficient per step."""
    sparsity_warmup_steps: int = 0
    """Steps over which the sparsity coefficient grows linearly from 0; the controller starts after them."""
    learning_rate: float = 2e-4
    """Adam's largest learning rate."""
    beta1: float = 0.9
    """Adam's decay of the mean gradient per step."""
    beta2: float = 0.999
    """Adam's decay of the mean squared gradient per step."""
    warmup_steps: int = 0
    """Steps over which the learning rate grows linearly from 0."""
    decay_fraction: float = 0.0
    """Last share of the training over which the learning rate falls linearly."""
    final_learning_rate: float = 0.0
    """Learning rate at the end of the decay, as a share of the largest."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None does not clip."""
    scale_inputs: bool = True
    """Whether inputs and targets are scaled to a mean norm of sqrt(width) in training; folded into the result."""
    subtract_b_dec: bool = False
    """Whether the encoder reads `x - b_dec` (SAEs only)."""
    skip: bool = False
    """Whether a linear map from input to prediction is trained beside the features (transcoders only)."""
    bandwidth: float = 0.1
    """Width of the window around jumprelu's threshold that passes gradient, in units of weighted activations."""
    threshold_rate: float = 1.0
    """Learning rate of jumprelu's thresholds, as a multiple of the learning rate."""
    dead_after: int = 10_000_000
    """Number of inputs without activation after which a feature counts as dead."""
    aux_coefficient: float = 0.0
    """Coefficient of AuxK: dead features predict the residual, as a share of its variance. 0 turns it off."""
    aux_features: int | None = None
    """Dead features that take part in AuxK per step; None is twice the width of the target."""
    aux_k: int | None = None
    """Dead features active per input in AuxK; None is an eighth of the width of the target."""
    reinit_every: int | None = None
    """Steps between re-initialisations of dead features from high-error inputs, until the learning rate decays; None
    turns them off."""
    reservoir_size: int = 5_000
    """High-error inputs kept for re-initialisation."""
    prefix_widths: tuple[int, ...] | None = None
    """Matryoshka: sizes of the nested dictionaries, increasing, the last being `n_features`."""
    random_prefixes: int | None = None
    """Matryoshka: number of nested dictionaries whose sizes are drawn at every step; the last has all features."""

    def __post_init__(self) -> None:
        problems = [*self._problems_of_numbers(), *self._problems_of_architecture(), *self._problems_of_prefixes()]
        if problems:
            raise ValueError(f"DictionaryRecipe: {'; '.join(problems)}.")

    @property
    def takes_k(self) -> bool:
        """Whether the architecture keeps a fixed number of features (topk and batch_topk)."""
        return self.architecture in ("topk", "batch_topk")

    @property
    def is_controlled(self) -> bool:
        """Whether a controller adjusts the sparsity coefficient."""
        return self.target_l0 is not None and self.architecture in ("relu", "gated")

    @property
    def n_prefixes(self) -> int:
        """Number of nested dictionaries whose losses are averaged; 1 for a plain dictionary."""
        return len(self.prefix_widths) if self.prefix_widths is not None else self.random_prefixes or 1

    def hyper(self, **changes: float | int) -> DictionaryHyper:
        """Return the recipe's numbers as scalars for a step, with `changes` applied.

        Raises:
            ValueError: a name is unknown, `k` is larger than the recipe's, or the recipe has no `target_l0` to change.
        """
        values = {name: getattr(self, name) for name in DictionaryHyper._fields} | changes
        unknown = sorted(set(changes) - set(DictionaryHyper._fields))
        problems = [f"{name!r} cannot vary in a sweep; choose from {DictionaryHyper._fields}" for name in unknown]
        if changes.get("k") is not None and not 1 <= changes["k"] <= (self.k or 0):
            problems.append(
                f"k={changes['k']} is outside 1..{self.k or 0}; the recipe's k must be the largest of the sweep"
            )
        if changes.get("target_l0") is not None and self.target_l0 is None:
            problems.append("target_l0 needs a recipe with a target_l0")
        if problems:
            raise ValueError(f"hyper: {'; '.join(problems)}.")
        return DictionaryHyper(
            sparsity=jnp.asarray(values["sparsity"], jnp.float32),
            k=jnp.asarray(values["k"] or 0, jnp.int32),
            target_l0=jnp.asarray(values["target_l0"] or 0, jnp.float32),
            learning_rate=jnp.asarray(values["learning_rate"], jnp.float32),
        )

    def _problems_of_numbers(self) -> list[str]:
        names = ("n_features", "steps", "batch_size", "reservoir_size", "dead_after")
        optional = ("aux_features", "aux_k", "reinit_every", "random_prefixes")
        names += tuple(name for name in optional if getattr(self, name) is not None)
        problems = [
            f"{n}={getattr(self, n)!r} must be a whole number of 1 or more" for n in names if not _is_whole(self, n)
        ]
        wants: list[tuple[str, Callable[[float], bool], tuple[str, ...]]] = [
            ("must be 0 or more", lambda v: 0 <= v < math.inf, NOT_NEGATIVE),
            ("must be above 0", lambda v: 0 < v < math.inf, POSITIVE),
            ("is outside 0..1", lambda v: 0 <= v <= 1, SHARES),
            ("must be 0 or more and below 1", lambda v: 0 <= v < 1, ("beta1", "beta2")),
        ]
        for want, holds, fields in wants:
            values = {name: getattr(self, name) for name in fields}
            problems += [f"{n}={v!r} {want}" for n, v in values.items() if v is not None and not holds(v)]
        return problems

    def _problems_of_architecture(self) -> list[str]:
        if self.architecture not in TRAINED_ARCHITECTURES:
            known = ", ".join(TRAINED_ARCHITECTURES)
            return [f"architecture {self.architecture!r} cannot be trained; choose one of {known}"]
        if self.penalty not in ("l1", "log"):
            return [f"penalty {self.penalty!r} is unknown; choose l1 or log"]
        problems = []
        if self.takes_k != (self.k is not None):
            wants = "needs a k" if self.takes_k else f"takes no k (got {self.k}); set sparsity or target_l0"
            problems.append(f"architecture {self.architecture!r} {wants}")
        elif self.k is not None and not (_is_whole(self, "k") and self.k <= self.n_features):
            problems.append(f"k={self.k!r} is outside 1..n_features={self.n_features}")
        if self.takes_k and (self.sparsity or self.target_l0 is not None):
            problems.append(f"architecture {self.architecture!r} takes no sparsity or target_l0; set k")
        if self.target_l0 is not None and self.target_l0 > self.n_features:
            problems.append(f"target_l0={self.target_l0} is above n_features={self.n_features}")
        if self.aux_coefficient and self.architecture in ("relu", "gated"):
            problems.append(
                f"aux_coefficient needs features below a threshold; for {self.architecture} use reinit_every"
            )
        if self.target_l0 is not None and not self.takes_k and not self.sparsity:
            problems.append("target_l0 needs a sparsity coefficient above 0 to start from")
        return problems

    def _problems_of_prefixes(self) -> list[str]:
        widths = self.prefix_widths
        if widths is None and self.random_prefixes is None:
            return []
        problems = ["gated takes no Matryoshka prefixes"] if self.architecture == "gated" else []
        if widths is not None and self.random_prefixes is not None:
            problems.append("prefix_widths and random_prefixes exclude each other")
        if widths is not None and not (widths and widths[0] >= 1 and widths[-1] == self.n_features and _rises(widths)):
            problems.append(f"prefix_widths={widths} must rise from 1 or more to n_features={self.n_features}")
        return problems


def recipe_preset(
    name: str, architecture: TrainedArchitecture, n_features: int, steps: int, **changes: Any
) -> DictionaryRecipe:
    """Return the recipe of a preset with some fields changed.

    `house` is this package's recipe, tuned on activations of small TinyStories models (docs/results/training.md).
    Encoder rows start at norm 1, because features with smaller rows are shut out by the first that grow; decoder rows
    start at norm 0.1. The learning rate falls with the square root of the dictionary's size, from 4e-3 at 1,024
    features. A feature is dead after 10 million silent inputs, or a fortieth of a shorter training; with `relu` and
    `gated`, a tenth.

    `reference` follows the configurations of the published dictionaries: log penalty, Adam with betas 0.5 and 0.9375, a
    constant learning rate of 2^-10 with a decay at the end, and dead features re-initialised every 800 steps from 5,000
    high-error inputs. Those configurations do not specify the penalty's form and units, the length of the decay and
    when a feature counts as dead, which are chosen here.

    The L1 coefficient of both, 5, suits widths near 768. The loss of scaled inputs grows with their width and the
    penalty with its square root, so scale the coefficient with the square root of the width for other activations.

    Args:
        name: `house` or `reference`.
        architecture: `relu`, `gated`, `jumprelu`, `topk` or `batch_topk`.
        n_features: dictionary size (features).
        steps: length of the training (steps).
        changes: fields of `DictionaryRecipe` and their values.

    Raises:
        ValueError: the preset is unknown, or the fields do not fit together.

    Examples:
        >>> from tinymodel_jax.training import recipe_preset
        >>> recipe = recipe_preset("house", "batch_topk", n_features=1024, steps=1000, k=16)
        >>> recipe.learning_rate, recipe.decoder_norm
        (0.004, 0.1)
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}.")
    fields: dict[str, Any] = {"warmup_steps": min(1000, steps // 20), "decay_fraction": 0.2}
    if architecture in ("topk", "batch_topk"):
        fields |= {"k": min(32, n_features)}
    elif architecture == "jumprelu":
        fields |= {"sparsity": 1.0, "target_l0": min(32.0, n_features / 2), "sparsity_warmup_steps": steps // 20}
    else:
        fields |= {"sparsity": 5.0, "sparsity_warmup_steps": steps // 20}
    if name == "house":
        inputs = steps * changes.get("batch_size", DictionaryRecipe.batch_size)
        rate = min(4e-3, 1e-3 / (n_features / 16384) ** 0.5)
        fields |= {"encoder_norm": 1.0, "learning_rate": rate}
        if architecture in ("relu", "gated"):
            fields |= {"dead_after": max(1, min(10**7, inputs // 10))}
            fields |= {"reinit_every": max(100, min(1000, steps // 20))}
            fields |= {"controller_rate": max(0.01, min(0.03, 10 / max(1, steps)))}
        else:
            fields |= {"dead_after": max(1, min(10**7, inputs // 40)), "aux_coefficient": 1 / 8}
        if architecture == "jumprelu":
            fields |= {"threshold_rate": 4.0}
    else:
        fields |= {"learning_rate": 2**-10, "beta1": 0.5, "beta2": 0.9375, "final_learning_rate": 0.1}
        fields |= {"penalty": "log", "reinit_every": 800, "reservoir_size": 5_000, "dead_after": 1_000_000}
    return DictionaryRecipe(architecture, n_features, steps, **(fields | changes))


def _is_whole(recipe: DictionaryRecipe, name: str) -> bool:
    value = getattr(recipe, name)
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _rises(widths: tuple[int, ...]) -> bool:
    return all(low < high for low, high in itertools.pairwise(widths))
