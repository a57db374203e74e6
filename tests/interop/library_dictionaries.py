"""Random dictionaries of SAELens, dictionary_learning, sparsify and circuit-tracer, saved and computed by them.

`CASES` lists what each library can write. `their_numbers` loads what this package wrote.
"""

# pyright: reportMissingImports=false

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, load_transcoder_set
from dictionary_learning import dictionary as dl
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sparsify import SparseCoder, SparseCoderConfig

WIDTH, FEATURES, K = 16, 40, 5


class Sizes(NamedTuple):
    """Sizes of the dictionaries."""

    d: int = WIDTH
    features: int = FEATURES
    k: int = K


class Numbers(NamedTuple):
    """What a library computes for inputs (n, d)."""

    encode: np.ndarray
    forward: np.ndarray


class Case(NamedTuple):
    """A dictionary that a library wrote."""

    library: str
    name: str
    site: str
    """Tag to load it at, where its files do not say."""
    make: Callable[[Path, Sizes], Callable[[torch.Tensor], Numbers]]
    """Writes a folder, and returns the library's own function."""


def randomized(module: torch.nn.Module, seed: int = 0) -> Any:
    """Give all parameters random values; biases and thresholds too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        if "threshold" in name:
            parameter.data = parameter.data.abs()
    return module.eval()


def _dense(indices: torch.Tensor, values: torch.Tensor, features: int) -> np.ndarray:
    acts = torch.zeros(len(indices), features)
    return acts.scatter_(1, indices, values).numpy(force=True)


def _saelens(name: str, training: bool = False, **options: Any) -> Callable[..., Any]:
    """Return a maker of a SAELens dictionary; training ones are saved as checkpoints and computed as for inference."""

    def make(folder: Path, sizes: Sizes) -> Callable[[torch.Tensor], Numbers]:
        module_class, config_class = (get_sae_training_class if training else get_sae_class)(name)
        fields = {"d_in": sizes.d, "d_sae": sizes.features, **options}
        fields |= {"k": sizes.k} if "topk" in name else {}
        fields |= {"matryoshka_widths": [sizes.features // 2, sizes.features]} if "matryoshka" in name else {}
        fields |= {"d_out": sizes.d - 2} if "transcoder" in name else {}
        sae: Any = randomized(module_class(config_class(**fields)))
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold = torch.tensor(0.31, dtype=torch.float64)
        sae.save_model(folder)
        if training:
            sae.save_inference_model(folder / "inference")
            sae = SAE.load_from_disk(folder / "inference")
            for path in sorted((folder / "inference").iterdir()):
                path.unlink()
            (folder / "inference").rmdir()
        return lambda x: _of_saelens(sae, x)

    return make


def _of_saelens(sae: Any, x: torch.Tensor) -> Numbers:
    heads = sae.cfg.reshape_activations == "hook_z"
    given = x.reshape(len(x), 2, -1) if heads else x
    return Numbers(sae.encode(given).numpy(force=True), sae(given).reshape(len(x), -1).numpy(force=True))


def _dictionary_learning(name: str, unit: bool = False) -> Callable[..., Any]:
    def make(folder: Path, sizes: Sizes) -> Callable[[torch.Tensor], Numbers]:
        k = {"k": sizes.k}
        groups = {"group_sizes": [sizes.features // 2, sizes.features // 2]}
        classes: dict[str, tuple[Any, dict[str, Any]]] = {
            "AutoEncoderTopK": (AutoEncoderTopK, k),
            "BatchTopKSAE": (BatchTopKSAE, k),
            "MatryoshkaBatchTopKSAE": (MatryoshkaBatchTopKSAE, k | groups),
        }
        made, options = classes.get(name) or (getattr(dl, name), {})
        module = randomized(made(sizes.d, sizes.features, **options))
        if unit:
            module.decoder.weight.data /= module.decoder.weight.data.norm(dim=0)
        if "threshold" in dict(module.named_buffers()):
            module.threshold = torch.tensor(0.27)
        trainer = {"dict_class": name, "activation_dim": sizes.d, "dict_size": sizes.features, **(k if options else {})}
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": {**trainer, "layer": 1, "lm_name": "tiny_model"}}))
        return lambda x: _of_dictionary_learning(folder, x)

    return make


def _of_dictionary_learning(folder: Path, x: torch.Tensor) -> Numbers:
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it normalizes the decoder
        loaded, _ = load_dictionary(str(folder), "cpu")
    return Numbers(loaded.encode(x).numpy(force=True), loaded(x).numpy(force=True))


def _sparsify(**options: Any) -> Callable[..., Any]:
    def make(folder: Path, sizes: Sizes) -> Callable[[torch.Tensor], Numbers]:
        config = SparseCoderConfig(k=sizes.k, **{"num_latents": sizes.features, **options})
        coder = randomized(SparseCoder(sizes.d, config))
        coder.save_to_disk(folder)
        return lambda x: _of_sparsify(coder, x)

    return make


def _of_sparsify(coder: Any, x: torch.Tensor) -> Numbers:
    found = coder.encode(x)
    forward = coder.decode(found.top_acts, found.top_indices)  # `forward` takes 4k after training with multi_topk
    if coder.W_skip is not None:
        forward = forward + x @ coder.W_skip.mT
    if not coder.cfg.multi_topk:
        torch.testing.assert_close(forward, coder(x).sae_out)
    return Numbers(_dense(found.top_indices, found.top_acts, coder.num_latents), forward.numpy(force=True))


def _circuit_tracer(threshold: bool, skip: bool) -> Callable[..., Any]:
    def make(folder: Path, sizes: Sizes) -> Callable[[torch.Tensor], Numbers]:
        activation = JumpReLU(torch.full((sizes.features,), 0.2)) if threshold else torch.nn.functional.relu
        cpu = torch.device("cpu")
        given = (sizes.d, sizes.features, activation, 0, skip)
        module = randomized(SingleLayerTranscoder(*given, device=cpu, dtype=torch.float32))
        folder.mkdir(parents=True, exist_ok=True)
        module.to_safetensors(str(folder / "layer_0.safetensors"))
        settings = (
            "model_kind: transcoder_set",
            "feature_input_hook: mlp.hook_in",
            "feature_output_hook: mlp.hook_out",
        )
        (folder / "config.yaml").write_text("\n".join((*settings, "scan: ''", "")))
        return lambda x: Numbers(module.encode(x).numpy(force=True), module(x).numpy(force=True))

    return make


def _named() -> Iterator[Case]:
    for normalize in ("none", "layer_norm", "constant_norm_rescale"):
        options: dict[str, Any] = {"normalize_activations": normalize}
        for name in ("standard", "topk", "jumprelu", "gated"):
            yield Case("saelens", f"{name} {normalize}", "Rm1", _saelens(name, **options))
        transcoder = _saelens("jumprelu_transcoder", apply_b_dec_to_input=False, **options)
        yield Case("saelens", f"jumprelu_transcoder {normalize}", "M1", transcoder)
    for name in ("standard", "topk", "gated"):
        yield Case("saelens", f"{name} on x", "Rm1", _saelens(name, apply_b_dec_to_input=False))
    yield Case("saelens", "topk rescaled", "Rm1", _saelens("topk", rescale_acts_by_decoder_norm=True))
    yield Case("saelens", "standard hook_z", "blocks.1.attn.hook_z", _saelens("standard", reshape_activations="hook_z"))
    for name in ("transcoder", "skip_transcoder", "jumprelu_skip_transcoder"):
        yield Case("saelens", name, "M1", _saelens(name, apply_b_dec_to_input=False))
    for name in ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk"):
        yield Case("saelens", f"{name} checkpoint", "Rm1", _saelens(name, training=True))
    for name in ("batchtopk", "matryoshka_batchtopk"):
        options = {"rescale_acts_by_decoder_norm": False}
        yield Case("saelens", f"{name} checkpoint as is", "Rm1", _saelens(name, training=True, **options))
    for name in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"):
        yield Case("dictionary_learning", name, "Rm1", _dictionary_learning(name))
    for name in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        yield Case("dictionary_learning", name, "Rm1", _dictionary_learning(name))
    yield Case("dictionary_learning", "AutoEncoder of unit rows", "Rm1", _dictionary_learning("AutoEncoder", unit=True))
    for activation in ("topk", "groupmax"):
        for transcode in (False, True):
            for skip in (False, True):
                options = {"activation": activation, "transcode": transcode, "skip_connection": skip}
                name = f"{activation}{' transcode' * transcode}{' skip' * skip}"
                yield Case("sparsify", name, "M1" if transcode else "Rm1", _sparsify(**options))
    yield Case("sparsify", "topk multi_topk", "Rm1", _sparsify(multi_topk=True))
    yield Case("sparsify", "topk expansion_factor", "Rm1", _sparsify(num_latents=0, expansion_factor=2))
    for threshold in (False, True):
        for skip in (False, True):
            name = f"{'jumprelu' if threshold else 'relu'}{' skip' * skip}"
            yield Case("circuit-tracer", name, "M0", _circuit_tracer(threshold, skip))


CASES = list(_named())


def their_numbers(library: str, folder: Path, x: torch.Tensor) -> Numbers:
    """Load a folder with a library, and compute."""
    if library == "saelens":
        return _of_saelens(SAE.load_from_disk(folder), x)
    if library == "dictionary_learning":
        return _of_dictionary_learning(folder, x)
    if library == "sparsify":
        return _of_sparsify(SparseCoder.load_from_disk(folder), x)
    paths, hooks = {0: str(folder / "layer_0.safetensors")}, ("mlp.hook_in", "mlp.hook_out")
    cpu = torch.device("cpu")
    loaded = load_transcoder_set(paths, "", *hooks, device=cpu, lazy_encoder=False, lazy_decoder=False)[0]
    return Numbers(loaded.encode(x).numpy(force=True), loaded(x).numpy(force=True))
