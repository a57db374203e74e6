"""Folders of SAELens: `cfg.json` and `sae_weights.safetensors`, of inference models and of training checkpoints.

Read: SAELens 6, and folders from before 6.0. Written: as SAELens 6 does. Where a checkpoint's scale of activations
lies beside it (`activation_scaler.json`), it is folded into the weights; otherwise `expected_average_only_in` changes
nothing, as in SAELens. Source: SAELens 6.54.12.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io.data_files import about, read_json_object, read_safetensors
from tinymodel_jax.io.formats.hook_names import between
from tinymodel_jax.io.formats.rewriting import as_jumprelu, decoder_norms, rescaled, with_b_dec_subtracted
from tinymodel_jax.io.formats.stored import Stored, flag, numbers, pair_in, require_stated, sizes_of, whole, write_pair

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
WRITTEN_VERSION = "6.54.12"

_SAES = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
}
_TRANSCODERS = {
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_RESCALED = ("topk", "batchtopk", "matryoshka_batchtopk")
"""Architectures with the setting rescale_acts_by_decoder_norm."""
_NORMALIZE = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
_LARGEST = float(np.finfo(np.float32).max)
_UNSCALED = "expected_average_only_in"
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""Settings before 6.0 -> since."""


def recognizes(path: Path) -> bool:
    """Whether a path is a folder with SAELens's two files, or the second of them."""
    return all(file.is_file() for file in pair_in(path, CONFIG, WEIGHTS))


def read(path: Path) -> Stored:
    """Read a folder, which may be named by its weights.

    Raises:
        ValueError: a file is damaged, the two do not fit, or this package cannot represent a setting, which is named.
    """
    path, weights = pair_in(path, CONFIG, WEIGHTS)
    folder = path.parent
    given = read_json_object(path)
    settings = about(path, lambda: _current(given))
    architecture = about(path, lambda: _architecture(settings))
    about(path, lambda: _refuse_unknown(settings))
    rescales = about(path, lambda: _rescales(settings))
    other_fields = about(path, lambda: _other_fields(settings))
    params = _params(weights, settings, architecture)
    stated = {"d_in": settings.get("d_in"), "n_features": settings.get("d_sae")}
    if settings["architecture"] in _TRANSCODERS:
        stated["d_out"] = settings.get("d_out")
    require_stated(stated, params, path, weights)
    params = about(folder / SCALER, lambda: _scaled(params, settings, folder, rescales))
    threshold = params.pop("topk_threshold", None)
    if rescales:
        params = about(weights, lambda: rescaled(params, decoder_norms(params)))
    fields: dict[str, Any] = {"architecture": architecture}
    if architecture == "topk":
        fields["k"] = about(path, lambda: whole(settings.get("k"), "k"))
    if threshold is not None:
        fields, params = _with_threshold(fields, params, threshold, settings.get("k"))
    return Stored(fields | other_fields, params, (path, weights), **_place(settings))


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write a folder that SAELens loads and computes the same with.

    Raises:
        ValueError: SAELens has no class for the dictionary; the message names what does.
    """
    config = dictionary.config
    alike = config.is_transcoder or config.skip  # its transcoders may also read and predict the same hook point
    if config.skip and not config.is_transcoder and config.normalize != "none":
        raise ValueError("SAELens has no SAE with a skip connection that normalizes its input. Nothing was written.")
    written, architecture = (_as_transcoder if alike else _as_sae)(dictionary)
    params = {name: np.asarray(array) for name, array in written.params.items()}
    if config.skip:
        params["W_skip"] = params["W_skip"].T
    settings = _settings(written, architecture)
    write_pair(folder, (CONFIG, settings), (WEIGHTS, params))


def _current(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a folder as SAELens 6 names them."""
    metadata = settings.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    version = re.match(r"\d{1,9}\b", str(settings.get("sae_lens_version") or metadata.get("sae_lens_version")))
    if version is not None and int(version[0]) >= 6:
        return {"architecture": "standard", **settings, "metadata": metadata}
    found: dict[str, Any] = {_RENAMED.get(name, name): value for name, value in settings.items()}
    found = {"architecture": "standard", "activation_fn": "relu", **found}
    kwargs = found.get("activation_fn_kwargs")
    if found["activation_fn"] == "topk" and isinstance(kwargs, Mapping) and kwargs.get("k") is not None:
        found |= {"architecture": "topk", "k": kwargs["k"]}
    elif found["activation_fn"] not in ("relu", None):
        shown = f"activation_fn {found['activation_fn']!r:.80} with activation_fn_kwargs {kwargs!r:.80}"
        raise ValueError(f"{shown} cannot be represented; this package reads 'relu', and 'topk' with its k.")
    normalize = found.get("normalize_activations")
    if normalize is None or isinstance(normalize, bool):
        found["normalize_activations"] = _UNSCALED if normalize else "none"
    return found | {"metadata": {**metadata, **{name: value for name, value in found.items() if name != "metadata"}}}


def _architecture(settings: Mapping[str, Any]) -> str:
    name = settings["architecture"]
    known = _SAES | _TRANSCODERS
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"architecture {name!r:.80} cannot be represented; this package reads {', '.join(known)}.")
    if name in _TRANSCODERS and flag(settings, "apply_b_dec_to_input", False):
        raise ValueError("apply_b_dec_to_input is true, which SAELens refuses for transcoders; set it to false.")
    return known[name]


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    normalize = settings.get("normalize_activations", "none")
    if normalize not in (*_NORMALIZE, _UNSCALED):
        raise ValueError(
            f"normalize_activations {normalize!r:.80} cannot be represented; save the SAE with SAELens's "
            f"save_inference_model, which folds it. This package reads {', '.join((*_NORMALIZE, _UNSCALED))}."
        )
    for name in ("hook_head_index", "hook_head_index_out"):
        if settings["metadata"].get(name) is not None:
            raise ValueError(
                f"{name}={settings['metadata'][name]!r:.80}: a dictionary of one attention head cannot be represented; "
                "hook points of heads are read whole."
            )


def _rescales(settings: Mapping[str, Any]) -> bool:
    """Whether activations are multiplied by the norms of the decoder; other architectures ignore the setting."""
    return settings["architecture"] in _RESCALED and flag(settings, "rescale_acts_by_decoder_norm", False)


def _params(path: Path, settings: Mapping[str, Any], architecture: str) -> dict[str, np.ndarray]:
    """Return parameters under our names, and `topk_threshold` of a checkpoint."""
    tensors = read_safetensors(path)
    if "log_threshold" in tensors:
        tensors["threshold"] = np.exp(tensors.pop("log_threshold"))
    biases = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    expected = ["W_enc", *biases, "W_dec", "b_dec"]
    if architecture == "jumprelu":
        expected.append("threshold")
    if architecture == "batch_topk":
        expected.append("topk_threshold")
    if "skip" in settings["architecture"]:
        expected.append("W_skip")
    expected += ["scaling_factor"] if "scaling_factor" in tensors else []
    params = numbers(tensors, dict(zip(expected, expected, strict=True)), path)
    if "W_skip" in params:
        params["W_skip"] = params["W_skip"].T
    shapes = {"scaling_factor": (about(path, lambda: sizes_of(params))["n_features"],), "topk_threshold": ()}
    for name, shape in shapes.items():
        if name in params and params[name].shape != shape:
            raise ValueError(f"{path}: {name} has shape {params[name].shape}; expected {shape}.")
    finetuned = params.pop("scaling_factor", None)
    if finetuned is not None and not np.allclose(finetuned, 1):
        if not about(path.parent / CONFIG, lambda: flag(settings, "finetuning_scaling_factor", False)):
            raise ValueError(f"{path} holds a scaling_factor, and {CONFIG} says that there is none.")
        params["W_dec"] = params["W_dec"] * finetuned[:, None]
    return params


def _scaled(
    params: dict[str, np.ndarray], settings: Mapping[str, Any], folder: Path, rescales: bool
) -> dict[str, np.ndarray]:
    """Return parameters for activations as they are, by the factor that a checkpoint's were multiplied by."""
    if settings.get("normalize_activations") != _UNSCALED or not (folder / SCALER).is_file():
        return params
    factor = read_json_object(folder / SCALER).get("scaling_factor")
    if factor is None:
        return params
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= _LARGEST:
        raise ValueError(f"scaling_factor={factor!r:.80}; expected a finite number above 0.")
    if settings["architecture"] in _TRANSCODERS:
        raise ValueError("the scale of a transcoder's outputs is unknown; fold it in SAELens.")
    params = dict(params) | {"W_enc": params["W_enc"] * factor}
    params |= {name: params[name] / factor for name in ("W_dec", "b_dec")}
    if "topk_threshold" in params and rescales:
        params["topk_threshold"] = params["topk_threshold"] / factor
    return params


def _with_threshold(
    fields: dict[str, Any], params: dict[str, np.ndarray], threshold: np.ndarray, k: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the fields and parameters of a batch_topk checkpoint; with a k that is not whole, those of a jumprelu."""
    dtype = params["W_enc"].dtype
    if isinstance(k, int | float) and k % 1 == 0 and 1 <= k <= params["W_enc"].shape[1]:
        return fields | {"k": int(k)}, params | {"threshold": threshold.astype(dtype)}
    constant = np.full(params["W_enc"].shape[1], threshold, dtype)
    return {"architecture": "jumprelu"}, params | {"threshold": constant}


def _other_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    excluded = settings["metadata"].get("exclude_special_tokens") or []
    if not isinstance(excluded, list | bool):
        raise ValueError(f"exclude_special_tokens={excluded!r:.80}; expected true, false or a list of token ids.")
    is_transcoder = settings["architecture"] in _TRANSCODERS
    return {
        "skip": "skip" in settings["architecture"],
        "normalize": _NORMALIZE.get(settings.get("normalize_activations", "none"), "none"),
        "subtract_b_dec": not is_transcoder and flag(settings, "apply_b_dec_to_input", True),
        # true names the special tokens of a tokenizer, whose ids the files do not have
        "exclude": tuple(excluded) if isinstance(excluded, list) else (),
    }


def _place(settings: Mapping[str, Any]) -> dict[str, Any]:
    metadata, is_transcoder = settings["metadata"], settings["architecture"] in _TRANSCODERS
    name = metadata.get("hook_name")
    name_out = metadata.get("hook_name_out") if is_transcoder else name
    shown = f"hook_name {name!r}" + (f", hook_name_out {name_out!r}" if is_transcoder else "")
    named = "" if name is None and name_out is None else shown
    return {"hooks": between(name, name_out), "is_transcoder": is_transcoder, "named": named}


def _as_sae(dictionary: Dictionary) -> tuple[Dictionary, str]:
    architecture = dictionary.config.architecture
    if architecture == "groupmax":
        raise ValueError("SAELens has no groupmax; sparsify has: format='sparsify'. Nothing was written.")
    if architecture == "batch_topk":
        return as_jumprelu(dictionary), "jumprelu"
    return dictionary, {"relu": "standard"}.get(architecture, architecture)


def _as_transcoder(dictionary: Dictionary) -> tuple[Dictionary, str]:
    config = dictionary.config
    if config.compares_features:
        raise ValueError(
            f"SAELens has no {config.architecture} transcoder and no SAE with a skip connection of that architecture; "
            "sparsify has, for equal widths: format='sparsify'. Nothing was written."
        )
    dictionary = with_b_dec_subtracted(dictionary, False)
    skip = "skip_" if config.skip else ""
    if config.architecture == "relu":
        return dictionary, f"{skip}transcoder"
    return as_jumprelu(dictionary), f"jumprelu_{skip}transcoder"


def _settings(dictionary: Dictionary, architecture: str) -> dict[str, Any]:
    """Return the content of cfg.json."""
    config = dictionary.config
    is_transcoder = architecture in _TRANSCODERS
    name_in, block = config.hook_in, config.hook_in.removesuffix(".hook_mlp_in")
    if config.hook_out == f"{block}.hook_mlp_out":
        name_in = f"{block}.hook_resid_mid"  # TransformerLens always runs this one
    metadata = {"hook_name": name_in, "hook_head_index": None, "exclude_special_tokens": list(config.exclude) or False}
    if is_transcoder:
        metadata |= {"hook_name_out": config.hook_out, "hook_head_index_out": None}
    normalize = {ours: theirs for theirs, ours in _NORMALIZE.items()}[config.normalize]
    return {
        "d_in": config.d_in,
        "d_sae": config.n_features,
        "dtype": np.asarray(dictionary.params["W_enc"]).dtype.name,
        "device": "cpu",
        "apply_b_dec_to_input": config.subtract_b_dec,
        "normalize_activations": normalize,
        "reshape_activations": "hook_z" if config.hook_in.endswith("attn.hook_z") and not is_transcoder else "none",
        "metadata": {
            "sae_lens_version": WRITTEN_VERSION,
            "sae_lens_training_version": None,
            **metadata,
        },
        **({"k": config.k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
        **({"d_out": config.d_out} if is_transcoder else {}),
        "architecture": architecture,
    }
