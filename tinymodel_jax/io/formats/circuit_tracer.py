"""Transcoder sets of circuit-tracer: `config.yaml` and one `layer_{l}.safetensors` per layer.

relu and jumprelu transcoders, optionally with a skip connection. Sets of cross-layer transcoders have another form.
Source: circuit-tracer 0.5.0.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io.data_files import read_safetensors, read_yaml_object, replaced_tensors, tensor_names
from tinymodel_jax.io.formats.hook_names import between
from tinymodel_jax.io.formats.rewriting import as_jumprelu, with_b_dec_subtracted
from tinymodel_jax.io.formats.stored import Stored, listed, numbers, require_room
from tinymodel_jax.runtime.atomic_files import replaced

CONFIG, KIND = "config.yaml", "transcoder_set"
LAYERS = "layer_*.safetensors"
_LAYER = re.compile(r"layer_(\d{1,4})\.safetensors")
_NAMES = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_OPTIONAL = {"activation_function.threshold": "threshold", "W_skip": "W_skip"}
_WRITTEN = {"hook_mlp_in": "mlp.hook_in", "hook_mlp_out": "mlp.hook_out"}
"""Hook points under names that circuit-tracer's replacement model always has."""


class Layer(NamedTuple):
    """A transcoder of a set, as its file has it."""

    number: int
    hooks: tuple[str, str]
    """Hook points that it reads and predicts, without the block."""
    tensors: dict[str, np.ndarray]


def layer_file(layer: int) -> str:
    """Return the name of a layer's file."""
    return f"layer_{layer}.safetensors"


def recognizes(path: Path) -> bool:
    """Whether a path is a folder of a set, or a layer's file."""
    if path.is_dir():
        return (path / CONFIG).is_file() and "model_kind" in (path / CONFIG).read_text("utf-8", "ignore")
    with contextlib.suppress(ValueError):  # of a damaged file
        return path.is_file() and _LAYER.fullmatch(path.name) is not None and "W_enc" in tensor_names(path)
    return False


def layers(folder: Path) -> dict[int, Path]:
    """Return the file of each layer of a set, in order.

    Raises:
        FileNotFoundError: there is no config.yaml, or a file that it lists.
        ValueError: it describes something else, or lists files of the hub.
    """
    settings = _settings(folder)
    listed_files = settings.get("transcoders")
    if listed_files is None:
        found = {int(m[1]): path for path in folder.iterdir() if (m := _LAYER.fullmatch(path.name))}
        if not found:
            raise FileNotFoundError(f"{folder} has no layer_0.safetensors, nor another layer of a transcoder set.")
        return dict(sorted(found.items()))
    files = {layer: folder / name for layer, name in enumerate(listed_files)}
    missing = [listed_files[layer] for layer, path in files.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder / CONFIG} lists files that are not in the folder: {', '.join(missing[:3])}. Download them, and "
            "list their names."
        )
    return files


def read(path: Path) -> Stored:
    """Read one layer's file.

    Raises:
        ValueError: the file is damaged or not of a transcoder, has thresholds below 0, which let negative activations
            through, or config.yaml states another activation.
    """
    tensors = read_safetensors(path)
    names = _NAMES | {theirs: ours for theirs, ours in _OPTIONAL.items() if theirs in tensors}
    params = numbers(tensors, names, path)
    if params["W_enc"].shape != params["W_dec"].shape or params["W_enc"].ndim != 2:
        raise ValueError(
            f"{path}: W_enc is {params['W_enc'].shape} and W_dec {params['W_dec'].shape}; expected both as (features, "
            "width). Files of circuit-tracer before 0.2 have another W_dec; convert them with its own loader."
        )
    params["W_enc"] = params["W_enc"].T
    if "W_skip" in params:
        params["W_skip"] = params["W_skip"].T
    require_positive_jumps(params, path)
    fields = {"architecture": "jumprelu" if "threshold" in params else "relu", "skip": "W_skip" in params}
    config = path.parent / CONFIG
    if not config.is_file():
        return Stored(fields, params, (path, path), is_transcoder=True)
    settings = _settings(path.parent)
    require_activation(settings, "threshold" in params, config)
    return Stored(fields, params, (config, path), is_transcoder=True, **_place(path, settings))


def require_positive_jumps(params: Mapping[str, np.ndarray], path: Path) -> None:
    """Check that thresholds, if there are any, let only positive activations through.

    Raises:
        ValueError: one is below 0; the message names the path.
    """
    if "threshold" in params and (params["threshold"] < 0).any():
        raise ValueError(f"{path}: a threshold is below 0, which lets negative activations through; clamp it to 0.")


def require_activation(settings: Mapping[str, Any], has_thresholds: bool, config: Path) -> None:
    """Check the activation that a configuration states; without one, files with thresholds are jumprelu, others relu.

    Raises:
        ValueError: it is not relu, such as topk, which has no ReLU after the selection; or it contradicts thresholds.
    """
    activation = settings.get("activation")
    if activation not in (None, "relu"):
        raise ValueError(
            f"{config}: activation {activation!r:.80} cannot be represented; this package reads relu, and jumprelu by "
            "the thresholds in the files."
        )
    if activation == "relu" and has_thresholds:
        raise ValueError(f"{config}: activation 'relu' contradicts the thresholds in the files; remove one of them.")


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write one layer's file and the set's config.yaml; other layers of the same set remain.

    Raises:
        ValueError: the format has no room for the dictionary, or it does not fit the folder's set.
    """
    layer = as_layer(dictionary)
    hooks = _hooks(_settings(folder)) if (folder / CONFIG).exists() else layer.hooks
    for name in _other_files(folder, [layer])[:1]:  # the others fit this one
        match = _LAYER.fullmatch(name)
        if match is None:
            raise ValueError(f"{folder / CONFIG} lists {name}, which would be lost. Nothing was written.")
        require_one_set([Layer(int(match[1]), hooks, read_safetensors(folder / name)), layer])
    _write(folder, [layer])


def write_set(found: Sequence[Layer], folder: Path) -> None:
    """Write all layers of a set, and its config.yaml.

    Raises:
        ValueError: they are not one set, or the folder holds other layers, which would be mistaken for this set's.
    """
    require_one_set(found)
    if (folder / CONFIG).exists():
        _settings(folder)
    left = _other_files(folder, found)
    if left:
        raise ValueError(f"{folder} holds other layers: {', '.join(left)}. Nothing was written; delete them first.")
    _write(folder, found)


def require_one_set(found: Sequence[Layer]) -> None:
    """Require what circuit-tracer requires of the layers of a set.

    Raises:
        ValueError: there are none, two are of one layer, or they differ in hook points, features or skip connections.
    """
    numbers = [layer.number for layer in found]
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    sizes = {layer.number: layer.tensors["W_enc"].shape for layer in found}
    skips = {layer.number: "W_skip" in layer.tensors for layer in found}
    hooks = sorted({layer.hooks for layer in found})
    require_room(
        "a transcoder set has",
        (
            (bool(found), "one transcoder per layer, and none is given"),
            (not twice, f"one transcoder per layer; layer {listed(twice)} is given twice"),
            (len(hooks) < 2, f"the same hook points in every layer, not {hooks}"),
            (len(set(sizes.values())) < 2, f"the same (features, width) in every layer, not {sizes}"),
            (len(set(skips.values())) < 2, f"a skip connection in every layer or in none, not {skips}"),
        ),
    )


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no transcoder set: there is no {CONFIG} in it.")
    settings = read_yaml_object(path)
    kind = settings.get("model_kind")
    if kind != KIND:
        raise ValueError(f"{path}: model_kind is {kind!r:.80}; expected {KIND!r}.")
    files = settings.get("transcoders")
    if files is not None and not (isinstance(files, list) and files and all(isinstance(name, str) for name in files)):
        raise ValueError(f"{path}: transcoders is {files!r:.80}; expected a list of files.")
    return settings


def _hooks(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    return settings.get("feature_input_hook"), settings.get("feature_output_hook")


def _place(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hook points of a layer's file, from the set's configuration."""
    match = _LAYER.fullmatch(path.name)
    names = _hooks(settings)
    files = settings.get("transcoders")
    layer = files.index(path.name) if files and path.name in files else int(match[1]) if match else None
    named = f"feature_input_hook {names[0]!r}, feature_output_hook {names[1]!r}"
    return {
        "hooks": between(*(f"blocks.{layer}.{name}" for name in names)),
        "named": named,
    }


def as_layer(dictionary: Dictionary) -> Layer:
    """Return what the file of a transcoder holds.

    Raises:
        ValueError: the format has no room for the dictionary; the message names what has.
    """
    config = dictionary.config
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", config.hook_in)
    out = re.fullmatch(r"blocks\.(\d+)\.(.+)", config.hook_out)
    known = "relu, jumprelu, batch_topk and gated"
    require_room(
        "transcoders of circuit-tracer",
        (
            (config.is_transcoder, "are not SAEs; format='saelens' has room for those"),
            (match is not None and out is not None and match[1] == out[1], "are of the hook points of one block"),
            (
                not config.compares_features,
                f"are {known}, not {config.architecture}; format='sparsify' has room for it",
            ),
            (
                config.normalize == "none",
                f"do not normalize inputs ({config.normalize}); format='saelens' has room for it",
            ),
            (
                config.d_in == config.d_out,
                f"have equal widths, not {config.d_in} and {config.d_out}; use format='saelens'",
            ),
            (not config.exclude, f"cannot leave out tokens {config.exclude}; format='saelens' has room for them"),
        ),
    )
    assert match is not None
    assert out is not None
    plain = with_b_dec_subtracted(dictionary, False)
    plain = plain if config.architecture == "relu" else as_jumprelu(plain)
    params = {name: np.asarray(array) for name, array in plain.params.items()}
    params |= {name: params[name].T for name in ("W_enc", "W_skip") if name in params}
    theirs = {ours: theirs for theirs, ours in (_NAMES | _OPTIONAL).items()}
    hooks = tuple(_WRITTEN.get(name, name) for name in (match[2], out[2]))
    return Layer(int(match[1]), (hooks[0], hooks[1]), {theirs[name]: array for name, array in params.items()})


def _other_files(folder: Path, found: Sequence[Layer]) -> list[str]:
    """Return the files of a set, present or listed, that are of other layers."""
    present = {path.name for path in folder.glob(LAYERS)}
    if (folder / CONFIG).exists():
        present |= {*(_settings(folder).get("transcoders") or ())}
    return sorted(present - {layer_file(layer.number) for layer in found})


def _write(folder: Path, found: Sequence[Layer]) -> None:
    """Write layers and the configuration; they replace earlier files only when all are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    hook_in, hook_out = found[0].hooks
    settings = {"model_kind": KIND, "feature_input_hook": hook_in, "feature_output_hook": hook_out, "scan": ""}
    with contextlib.ExitStack() as files:
        for layer in found:
            files.enter_context(replaced_tensors(layer.tensors, folder / layer_file(layer.number)))
        temporary = files.enter_context(replaced(folder / CONFIG))
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
