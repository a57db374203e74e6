"""Folders of dictionary_learning: `config.json` and `ae.pt`, the eight classes that its `load_dictionary` reads.

Activations are those of `load_dictionary(folder)` with `encode`'s defaults: AutoEncoder's decoder is normalized,
AutoEncoderTopK takes the k largest, BatchTopKSAE and MatryoshkaBatchTopKSAE compare with their threshold. The pickle is
read without running code. Source: dictionary_learning 0.1.0.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io.data_files import about, read_json_object
from tinymodel_jax.io.formats.hook_names import between, of_words
from tinymodel_jax.io.formats.rewriting import decoder_norms, rescaled, with_b_dec_subtracted
from tinymodel_jax.io.formats.stored import Stored, numbers, require_room, require_stated, whole
from tinymodel_jax.io.torch_files import load_torch_file, save_torch_file
from tinymodel_jax.runtime.atomic_files import replaced

CONFIG, WEIGHTS = "config.json", "ae.pt"
UNIT_TOLERANCE = 1e-5
"""Decoder rows with norms this close to 1 are loaded as they are. Source: AutoEncoder.normalize_decoder."""

_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_GATED = {
    "encoder.weight": "W_enc",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
    "r_mag": "r_mag",
    "decoder.weight": "W_dec",
    "decoder_bias": "b_dec",
}
_CLASSES: dict[str, tuple[str, dict[str, str], bool]] = {
    "AutoEncoder": ("relu", _LINEAR | {"bias": "b_dec"}, True),
    "AutoEncoderNew": ("relu", _LINEAR | {"decoder.bias": "b_dec"}, False),
    "GatedAutoEncoder": ("gated", _GATED, True),
    "AutoEncoderTopK": ("topk", _LINEAR | {"b_dec": "b_dec"}, True),
    "BatchTopKSAE": ("batch_topk", _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}, True),
    "MatryoshkaBatchTopKSAE": ("batch_topk", _PLAIN | {"threshold": "threshold"}, True),
    "JumpReluAutoEncoder": ("jumprelu", _PLAIN | {"threshold": "threshold"}, False),
}
"""Class -> architecture, its tensors -> our parameters, whether it subtracts b_dec from the input."""
_UNUSED = {
    "AutoEncoderTopK": ("k", "threshold"),
    "BatchTopKSAE": ("k",),
    "MatryoshkaBatchTopKSAE": ("k", "group_sizes"),
}
"""Tensors that are not parameters."""
_WRITTEN = {
    "topk": "AutoEncoderTopK",
    "batch_topk": "BatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
    "gated": "GatedAutoEncoder",
}


def recognizes(path: Path) -> bool:
    """Whether a path is a folder with `ae.pt` and its configuration, or a `.pt` file of such a folder."""
    config = _files(path)[1]
    named = path.is_dir() or path.suffix == ".pt"
    if not (named and config.is_file() and _files(path)[0].is_file()):
        return False
    with contextlib.suppress(ValueError):
        return isinstance(read_json_object(config).get("trainer"), Mapping)
    return path.is_dir()


def read(path: Path) -> Stored:
    """Read a folder, or a file of one: `ae.pt`, or a checkpoint.

    Raises:
        ValueError: a file is damaged or names code, the two do not fit, or the class is unknown.
    """
    weights, config = _files(path)
    settings = read_json_object(config)
    trainer, buffer = settings.get("trainer"), settings.get("buffer")
    if not isinstance(trainer, Mapping):
        raise ValueError(f"{config} has no 'trainer'; expected the settings of a trainer of dictionary_learning.")
    name = trainer.get("dict_class")
    if not isinstance(name, str) or name not in _CLASSES:
        raise ValueError(f"{config}: dict_class {name!r:.80} is unknown; this package reads {', '.join(_CLASSES)}.")
    architecture, names, subtracted = _CLASSES[name]
    tensors = _state(load_torch_file(weights))
    unused = {key: tensors.pop(key) for key in _UNUSED.get(name, ()) if key in tensors}
    params = numbers(tensors, names, weights)
    if "encoder.weight" in names:
        params |= {"W_enc": params["W_enc"].T, "W_dec": params["W_dec"].T}
    width = trainer.get("activation_dim")
    require_stated({"d_in": width, "d_out": width, "n_features": trainer.get("dict_size")}, params, config, weights)
    if name == "AutoEncoder":
        norms = decoder_norms(params)
        if not np.allclose(norms, 1, rtol=UNIT_TOLERANCE, atol=1e-8):
            params = rescaled(params, norms)
    fields: dict[str, Any] = {"architecture": architecture, "subtract_b_dec": subtracted}
    if architecture in ("topk", "batch_topk"):
        fields["k"] = _k(trainer, unused, config, weights)
    names_of_hooks = (trainer.get("hook_in"), trainer.get("hook_out"))
    submodule, io = trainer.get("submodule_name"), buffer.get("io") if isinstance(buffer, Mapping) else None
    same = io in (None, "in", "out")  # the input and the output of a hook point are the same
    return Stored(
        fields,
        params,
        (config, weights),
        hooks=between(*names_of_hooks) or between(submodule, submodule if same else None),
        guess=of_words(submodule) if io in (None, "out") else None,
        named=f"submodule_name {submodule!r}{'' if io is None else f' with io {io!r}'}" if submodule else "",
    )


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write a folder that `load_dictionary` reads and computes the same with.

    A relu dictionary is written as an AutoEncoder if that class leaves it as it is, else as an AutoEncoderNew, with
    `b_dec` folded into the encoder's bias. The hook points are added to the settings.

    Raises:
        ValueError: dictionary_learning has no room for the dictionary; the message names what has.
    """
    config = dictionary.config
    skip = "for relu and jumprelu: format='saelens'; for topk: format='sparsify'"
    require_room(
        "dictionary_learning",
        (
            (config.architecture != "groupmax", "has no groupmax; sparsify has: format='sparsify'"),
            (not config.skip, f"has no skip connection; others have: {skip}"),
            (config.normalize == "none", f"does not normalize inputs ({config.normalize}); use format='saelens'"),
            (
                config.d_in == config.d_out,
                f"has equal widths only, not {config.d_in} and {config.d_out}; use 'saelens'",
            ),
            (not config.exclude, f"cannot leave out tokens {config.exclude}; use format='saelens'"),
        ),
    )
    name = _WRITTEN.get(config.architecture) or _class_of_relu(dictionary)
    _, names, subtracted = _CLASSES[name]
    written = with_b_dec_subtracted(dictionary, subtracted)
    params = {key: np.asarray(array) for key, array in written.params.items()}
    tensors = {theirs: params[ours] for theirs, ours in names.items()}
    tensors |= {key: tensors[key].T for key in ("encoder.weight", "decoder.weight") if key in tensors}
    if config.k is not None:
        tensors |= {"k": np.array(config.k, np.int32), "threshold": np.array(params.get("threshold", -1), np.float32)}
    _write_both(folder, _settings(dictionary, name), tensors)


def _files(path: Path) -> tuple[Path, Path]:
    """Return the weights and the configuration of a folder, of `ae.pt`, or of a file of its `checkpoints`."""
    if path.is_dir():
        return path / WEIGHTS, path / CONFIG
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return path, folder / CONFIG


def _state(content: dict[Any, Any]) -> dict[Any, Any]:
    """Return the tensors of a file, which during training also holds the optimizer's."""
    return dict(content["ae"]) if isinstance(content.get("ae"), Mapping) else dict(content)


def _k(trainer: Mapping[str, Any], unused: Mapping[str, Any], config: Path, weights: Path) -> int:
    stated = trainer.get("k")
    k = about(weights if "k" in unused else config, lambda: whole(unused.get("k", stated), "k"))
    if stated not in (None, k):
        raise ValueError(f"{config} contradicts {weights.name}: it states k={stated!r:.80} and the tensors have {k}.")
    return k


def _class_of_relu(dictionary: Dictionary) -> str:
    """Return the class of a relu dictionary: loading an AutoEncoder normalizes its decoder."""
    norms = np.linalg.norm(np.asarray(dictionary.params["W_dec"], np.float64), axis=1)
    unit = np.allclose(norms, 1, rtol=0, atol=UNIT_TOLERANCE / 2)
    return "AutoEncoder" if unit and dictionary.config.subtract_b_dec else "AutoEncoderNew"


def _settings(dictionary: Dictionary, name: str) -> dict[str, Any]:
    config = dictionary.config
    layer = config.hook_out.split(".")[1] if config.hook_out.startswith("blocks.") else None
    trainer = {
        "dict_class": name,
        "activation_dim": config.d_in,
        "dict_size": config.n_features,
        **({} if config.k is None else {"k": config.k}),
        "layer": int(layer) if layer is not None and layer.isdigit() else None,
        "submodule_name": config.hook_out,
        "hook_in": config.hook_in,
        "hook_out": config.hook_out,
    }
    io = "in_and_out" if config.is_transcoder else "out"
    return {"trainer": trainer, "buffer": {"d_submodule": config.d_in, "io": io}}


def _write_both(folder: Path, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Write both files; they replace earlier ones only when both are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(folder / WEIGHTS) as weights, replaced(folder / CONFIG) as config:
        save_torch_file(tensors, weights)
        config.write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")
