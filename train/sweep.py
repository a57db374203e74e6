"""What a dictionary run trains: the recipe of every site, and the members of the sweep.

Every value of a comma-separated option makes a member; several such options make all combinations. The members of a
site share one compiled recipe and differ in the numbers of `DictionaryHyper` and in the seed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import tyro

from tinymodel_jax.config import TrainedArchitecture
from tinymodel_jax.runtime.paths import user_path
from tinymodel_jax.training.dictionary_recipe import PRESETS, DictionaryHyper, DictionaryRecipe, recipe_preset
from tinymodel_jax.training.dictionary_state import ActivationStatistics, DictionaryTrainState, init_state
from tinymodel_jax.training.dictionary_step import stack_members
from train.activations import Place


def of_recipe(architecture: TrainedArchitecture, field: str) -> Any:
    """Return the annotation of an option whose default is the house recipe's for large dictionaries."""

    def hint(default: str) -> str:
        del default
        return f"(default: {getattr(recipe_preset('house', architecture, 1 << 16, 10_000), field):g})"

    return tyro.conf.arg(help_behavior_hint=hint)


AS_RECIPE = tyro.conf.arg(help_behavior_hint="(default: the recipe's; the run prints it)")


@dataclass(frozen=True)
class SweepOptions:
    """The dictionaries to train at every place."""

    n_features: int
    """features per dictionary"""
    architecture: TrainedArchitecture = "batch_topk"
    """activation function"""
    recipe: str = "house"
    """house, reference, or a .json file with fields of DictionaryRecipe"""
    k: Annotated[str | None, of_recipe("topk", "k")] = None
    """active features per vector (topk and batch_topk)"""
    l1: Annotated[str | None, AS_RECIPE] = None
    """coefficient of the sparsity loss (relu, gated and jumprelu)"""
    target_l0: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(default: 32 for jumprelu)")] = None
    """target number of active features per vector (relu, gated and jumprelu)"""
    learning_rate: Annotated[str | None, AS_RECIPE] = None
    """largest learning rate"""
    seed: str = "0"
    """seed of the initial parameters; --data-seed sets the order of the data"""
    skip: bool = False
    """also train a linear skip connection (transcoders)"""
    matryoshka: str | None = None
    """sizes of nested dictionaries, separated by commas; the last is n-features"""
    random_prefixes: int | None = None
    """number of nested dictionaries whose sizes are drawn again at every step"""
    dead_after: Annotated[int | None, AS_RECIPE] = None
    """number of vectors without activation after which a feature counts as dead"""


VARIED: dict[str, tuple[str, Callable[[str], float]]] = {
    "l1": ("sparsity", float),
    "k": ("k", int),
    "target_l0": ("target_l0", float),
    "learning_rate": ("learning_rate", float),
    "seed": ("seed", int),
}
"""Option that takes a comma-separated list -> the recipe's field (or the seed), and the type of its values."""

PUBLISHED_WIDTH = 768
_DESCRIBED = {"k": "k", "sparsity": "sparsity", "target_l0": "target L0", "learning_rate": "learning rate"}


@dataclass(frozen=True)
class Member:
    """One dictionary of a site's sweep."""

    values: Mapping[str, float]
    """Field -> value, for the fields that options set, and always the seed."""
    name: str
    """Name among the members, such as `k=16_seed=1`; empty if there is only one."""

    def recipe(self, shared: DictionaryRecipe) -> DictionaryRecipe:
        """Return the recipe of this member alone."""
        fields = {name: value for name, value in self.values.items() if name != "seed"}
        return dataclasses.replace(shared, **fields)

    def hyper(self, shared: DictionaryRecipe) -> DictionaryHyper:
        """Return the member's numbers for the shared, compiled recipe."""
        return shared.hyper(**{name: value for name, value in self.values.items() if name != "seed"})


class Sweep(NamedTuple):
    """The recipes and members of a run."""

    recipes: dict[str, DictionaryRecipe]
    """Place -> recipe that its members share."""
    members: list[Member]

    def of_length(self, steps: int) -> Sweep:
        """Return the sweep in a run of another length: the same recipes, with a decay that ends later."""
        return Sweep(
            {name: dataclasses.replace(shared, steps=steps) for name, shared in self.recipes.items()}, self.members
        )

    def describe(self) -> str:
        """Return what is trained, on one line, with every value that an option can set."""
        shared = next(iter(self.recipes.values()))
        each = [member.recipe(recipe) for recipe in self.recipes.values() for member in self.members]
        texts = [f"{shared.architecture}, {shared.n_features:,} features"]
        for field, label in _DESCRIBED.items():
            values = dict.fromkeys(getattr(recipe, field) for recipe in each)
            if values.keys() - {None, 0}:
                texts.append(f"{label} {' | '.join(f'{value:.4g}' for value in values)}")
        texts.append(f"{shared.steps:,} steps of {shared.batch_size:,} vectors")
        return f"{', '.join(self.recipes)}: {', '.join(texts)}"


def make_sweep(options: SweepOptions, places: Mapping[str, Place], steps: int, batch_size: int) -> Sweep:
    """Return the recipes and members for the options.

    Raises:
        ValueError: an option is invalid, or the options do not fit together.
    """
    members = parse_members({name: getattr(options, name) for name in VARIED})
    changes: dict[str, Any] = {"batch_size": batch_size, "skip": options.skip}
    given = {
        "prefix_widths": _widths(options.matryoshka),
        "random_prefixes": options.random_prefixes,
        "dead_after": options.dead_after,
    }
    changes |= {name: value for name, value in given.items() if value is not None}
    recipes = {
        name: site_recipe(
            options.recipe, options.architecture, options.n_features, steps, place.d_in, members, **changes
        )
        for name, place in places.items()
    }
    return Sweep(recipes, members)


def parse_members(lists: Mapping[str, str | None]) -> list[Member]:
    """Return one member for every combination of values (option -> comma-separated text; None if not given).

    Raises:
        ValueError: a value is not a number, or a list contains one twice.
    """
    values: dict[str, list[float]] = {}
    for option, text in lists.items():
        if text is not None:
            field, number = VARIED[option]
            values[field] = _numbers(option, text, number)
    combinations = itertools.product(*values.values())
    return named_members([dict(zip(values, combination, strict=True)) for combination in combinations])


def named_members(values: Sequence[Mapping[str, float]]) -> list[Member]:
    """Return members with these values of fields, named by the fields in which they differ."""
    labels = {field: option for option, (field, _) in VARIED.items()}
    varied = [field for field in values[0] if len({chosen[field] for chosen in values}) > 1]
    return [Member(chosen, "_".join(f"{labels[field]}={chosen[field]:g}" for field in varied)) for chosen in values]


def recorded_sweep(settings: Mapping[str, Any]) -> Sweep:
    """Return the sweep of a run's settings, in the run's length."""
    recipes = {name: DictionaryRecipe.from_dict(fields) for name, fields in settings["recipes"].items()}
    return Sweep(recipes, named_members(settings["members"])).of_length(settings["steps"])


def site_recipe(
    preset: str,
    architecture: TrainedArchitecture,
    n_features: int,
    steps: int,
    width: int,
    members: list[Member],
    **changes: Any,
) -> DictionaryRecipe:
    """Return the recipe that the members of a site share: `house`, `reference`, or the fields of a JSON file.

    Unless an option sets the sparsity coefficient of `relu` and `gated`, the preset's is scaled with the square root of
    the width, as `recipe_preset` recommends.

    Args:
        width: width of the activations that the dictionary reads.
        changes: fields of the recipe that the options set.

    Raises:
        ValueError: the preset or a field is unknown, or the fields do not fit together.
    """
    for field in ("k", "target_l0", "sparsity", "learning_rate"):
        given = [member.values[field] for member in members if field in member.values]
        if given:
            changes[field] = max(given)
    if preset.endswith(".json"):
        return DictionaryRecipe.from_dict(
            {**_fields_of(preset), **changes, "architecture": architecture, "n_features": n_features, "steps": steps}
        )
    if preset not in PRESETS:
        raise ValueError(f"--recipe {preset!r} is unknown; choose {' or '.join(PRESETS)}, or a .json file.")
    recipe = recipe_preset(preset, architecture, n_features, steps, **changes)
    if architecture in ("relu", "gated") and "sparsity" not in changes:
        recipe = dataclasses.replace(recipe, sparsity=recipe.sparsity * (width / PUBLISHED_WIDTH) ** 0.5)
    return recipe


def init_members(
    recipe: DictionaryRecipe,
    members: list[Member],
    statistics_in: ActivationStatistics,
    statistics_out: ActivationStatistics | None,
) -> DictionaryTrainState:
    """Return the stacked states before the first step; each equals the start of a run with that member alone."""
    return stack_members(
        [
            init_state(jax.random.key(int(m.values["seed"])), m.recipe(recipe), statistics_in, statistics_out)
            for m in members
        ]
    )


def _numbers(option: str, text: str, number: Callable[[str], float]) -> list[float]:
    flag = f"--{option.replace('_', '-')}"
    try:
        values = [number(part) for part in text.split(",")]
    except ValueError:
        kind = "whole numbers" if number is int else "numbers"
        raise ValueError(f"{flag} {text!r} is not a comma-separated list of {kind}.") from None
    if len(set(values)) < len(values):
        raise ValueError(f"{flag} {text!r} contains a value twice; list each value once.")
    if option == "seed" and not all(0 <= value < 2**32 for value in values):
        raise ValueError(f"{flag} {text!r}: seeds are 0 to {2**32 - 1}.")
    return values


def _widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not all(part.isdecimal() for part in text.split(",")):
        raise ValueError(f"--matryoshka {text!r} is not a comma-separated list of sizes.")
    return tuple(map(int, text.split(",")))


def _fields_of(path: str) -> dict[str, Any]:
    try:
        fields = json.loads(user_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--recipe {path} cannot be read as JSON ({error}).") from None
    if not isinstance(fields, dict):
        raise ValueError(f"--recipe {path} is not a JSON object with fields of DictionaryRecipe.")
    return fields
