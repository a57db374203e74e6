"""A dictionary as another library's files describe it, before it has a site, and how it gets one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinymodel_jax.config import DictionaryConfig, split_hooks
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.encoding import param_shapes
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.io.data_files import about, replaced_tensors
from tinymodel_jax.number_formats import DTYPES
from tinymodel_jax.params import require_shapes
from tinymodel_jax.runtime.atomic_files import replaced

Hooks = tuple[str, str]
"""Hook points that a dictionary reads and predicts."""


class Stored(NamedTuple):
    """What files say about a dictionary."""

    fields: dict[str, Any]
    """Fields of `DictionaryConfig` other than hook points and sizes."""
    params: dict[str, np.ndarray]
    """Under this package's names and in its orientation."""
    files: tuple[Path, Path]
    """The files of the settings and of the tensors, for messages."""
    hooks: Hooks | None = None
    """Hook points that the files state; None if they state none that this package has."""
    guess: Hooks | None = None
    """Hook points that a name in free text suggests; a site that is given replaces them."""
    is_transcoder: bool | None = None
    """None if the format does not tell SAEs and transcoders apart."""
    named: str = ""
    """What the files call the place, for messages."""


def placed(stored: Stored, site: Site | None) -> Dictionary:
    """Return the dictionary at the hook points that the files state, else at the given site; arrays stay NumPy's.

    Raises:
        ValueError: the files state no site and none is given, parameters are missing, unexpected or of the wrong shape
            or type, or an SAE that normalizes its input would become a transcoder, which does not undo this.
    """
    path, weights = stored.files
    given = None if site is None else (site.hook_in, site.hook_out)
    hooks = stored.hooks or given or stored.guess
    if hooks is None:
        said = f"it says {stored.named}, which is not a hook point here" if stored.named else "its files do not say it"
        raise ValueError(f"{path}: the site of this dictionary is unknown, because {said}; give site=, such as 'M2'.")
    becomes_transcoder = hooks[0] != hooks[1]
    normalize = stored.fields.get("normalize", "none")
    about(path, lambda: require_undone(normalize, stored.is_transcoder, becomes_transcoder))
    sizes = about(weights, lambda: sizes_of(stored.params))
    if becomes_transcoder:  # a cross-layer transcoder's features read one of several hook points
        sizes["d_in"] *= len(split_hooks(hooks[0]))
    config = about(path, lambda: DictionaryConfig(*hooks, **sizes, **stored.fields))
    expected = param_shapes(config)
    about(weights, lambda: require_shapes(stored.params, expected, f"a dictionary of {config.n_features} features"))
    return Dictionary(config, {name: stored.params[name] for name in expected})


def require_undone(normalize: str, was_transcoder: bool | None, is_transcoder: bool) -> None:
    """Require that a dictionary that normalizes its input stays an SAE, which undoes this, or a transcoder.

    Args:
        was_transcoder: what it was made as; None if that is not known.
        is_transcoder: what it is at the site where it is wanted.

    Raises:
        ValueError: it would become the other.
    """
    if normalize != "none" and was_transcoder is not None and was_transcoder != is_transcoder:
        kinds = ("an SAE", "a transcoder")
        raise ValueError(
            f"the dictionary is {kinds[was_transcoder]} that normalizes its input, which only an SAE undoes on its "
            f"output, so it cannot be {kinds[is_transcoder]}; give the tag of another site."
        )


def require_room(writer: str, checks: Iterable[tuple[bool, str]]) -> None:
    """Require that a format has room for a dictionary.

    Args:
        writer: start of the error message: the library.
        checks: whether it has room, and the rest of the message if not.

    Raises:
        ValueError: a check fails; the message is of the first.
    """
    for fits, what in checks:
        if not fits:
            raise ValueError(f"{writer} {what}. Nothing was written.")


def sizes_of(params: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return d_in, d_out and n_features.

    Raises:
        ValueError: one of the two matrices is missing or not one, or they and the encoder's biases have different
            numbers of features.
    """
    for name in ("W_enc", "W_dec"):
        if name not in params or params[name].ndim != 2:
            found = params[name].shape if name in params else "missing"
            raise ValueError(f"{name} is {found}; expected a matrix. The tensors are {listed(params)}.")
    d_in, n_features = params["W_enc"].shape
    vectors = [name for name in ("b_enc", "b_gate", "b_mag", "r_mag") if name in params]
    wrong = [name for name in vectors if params[name].shape != (n_features,)]
    wrong += ["W_dec"] if len(params["W_dec"]) != n_features else []
    if wrong:
        shown = ", ".join(f"{name} is {params[name].shape}" for name in wrong)
        raise ValueError(f"{shown}, and W_enc is {params['W_enc'].shape}: the numbers of features differ.")
    return {"d_in": d_in, "d_out": params["W_dec"].shape[1], "n_features": n_features}


def require_stated(stated: Mapping[str, Any], params: Mapping[str, np.ndarray], config: Path, weights: Path) -> None:
    """Check sizes that a configuration states against the tensors.

    Args:
        stated: sizes by the names of `sizes_of`; None if not stated.
        config, weights: the files, for the message.

    Raises:
        ValueError: they differ; the message names all.
    """
    sizes = about(weights, lambda: sizes_of(params))
    wrong = [
        f"{name}={value!r:.80} and the tensors have {sizes[name]}"
        for name, value in stated.items()
        if value is not None and value != sizes[name]
    ]
    if wrong:
        raise ValueError(f"{config} contradicts {weights.name}: it states {'; '.join(wrong)}.")


def numbers(tensors: Mapping[Any, Any], names: Mapping[str, str], file: Path) -> dict[str, np.ndarray]:
    """Return exactly the expected tensors of a file under this package's names.

    Args:
        names: the file's name -> this package's.

    Raises:
        ValueError: tensors are missing, unexpected or not of floating-point numbers; the message names all.
    """
    problems = [f"missing {name!r}" for name in names if name not in tensors]
    problems += [f"unexpected {name!r}" for name in tensors if name not in names]
    for name in names:
        array = tensors.get(name)
        if name in tensors and (not isinstance(array, np.ndarray) or array.dtype.name not in DTYPES):
            kind = array.dtype.name if isinstance(array, np.ndarray) else type(array).__name__
            problems.append(f"{name!r} holds {kind}, expected floating-point numbers")
    if problems:
        raise ValueError(f"{file}: {'; '.join(problems)}. Expected the tensors {', '.join(names)}.")
    return {ours: tensors[name] for name, ours in names.items()}


def whole(value: Any, name: str) -> int:
    """Return a setting that must be a whole number above 0.

    Raises:
        ValueError: it is something else.
    """
    number = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if isinstance(number, bool) or not isinstance(number, int | float) or number % 1 != 0 or number < 1:
        shown = " ".join(repr(value).split())  # an array's has several lines
        raise ValueError(f"{name}={shown:.80}; expected a whole number of 1 or more.")
    return int(number)


def flag(settings: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return a setting that must be true or false.

    Raises:
        ValueError: it is something else, such as the text "false".
    """
    value = settings.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r:.80}; expected true or false.")
    return value


def listed(names: Iterable[Any], most: int = 8) -> str:
    """Return the first of some names, for a message."""
    shown = [str(name) for name in names]
    return (", ".join(shown[:most]) + (", …" if len(shown) > most else "")) or "none"


def pair_in(path: Path, config: str, weights: str) -> tuple[Path, Path]:
    """Return the files of settings and of tensors of a folder, which may be named by the second of them."""
    folder = path.parent if path.name == weights else path
    return folder / config, folder / weights


def write_pair(folder: Path, config: tuple[str, Any], tensors: tuple[str, Mapping[str, Any]]) -> None:
    """Write a folder's JSON and safetensors files; both replace earlier ones only when both are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as files:
        files.enter_context(replaced_tensors(tensors[1], folder / tensors[0]))
        temporary = files.enter_context(replaced(folder / config[0]))
        temporary.write_text(json.dumps(config[1], indent=2) + "\n", encoding="utf-8")
