"""Cross-layer transcoders of circuit-tracer, written here as it writes them."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import F32, assert_close, error_of
from safetensors.numpy import save_file

from tinymodel_jax.dictionaries.dictionary import Dictionary

LAYERS, WIDTH, FEATURES = 3, 16, 5


def write(folder: Path, jumprelu: bool) -> dict[str, Any]:
    """Write the files of each layer; return all tensors."""
    random, tensors = np.random.default_rng(0), {}
    for layer in range(LAYERS):
        shapes = {"W_enc": (FEATURES, WIDTH), "b_enc": (FEATURES,), "b_dec": (WIDTH,)}
        shapes |= {"threshold": (FEATURES,)} if jumprelu else {}
        draw = {f"{name}_{layer}": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        draw |= {f"threshold_{layer}": np.abs(draw[f"threshold_{layer}"])} if jumprelu else {}
        decoder = {f"W_dec_{layer}": random.normal(size=(FEATURES, LAYERS - layer, WIDTH)).astype(np.float32)}
        save_file(draw, folder / f"W_enc_{layer}.safetensors")
        save_file(decoder, folder / f"W_dec_{layer}.safetensors")
        tensors |= draw | decoder
    return tensors


@pytest.mark.parametrize("jumprelu", [False, True])
def test_a_folder_of_circuit_tracer_is_one_cross_layer_transcoder(tmp_path: Path, jumprelu: bool) -> None:
    tensors = write(tmp_path, jumprelu)
    (tmp_path / "config.yaml").write_text("model_kind: cross_layer_transcoder\n")
    dictionary = Dictionary.from_pretrained(tmp_path)
    assert dictionary.config.hooks_in == tuple(f"blocks.{layer}.hook_mlp_in" for layer in range(LAYERS))
    x = np.random.default_rng(1).normal(size=(7, LAYERS, WIDTH)).astype(np.float32)
    out = np.stack([np.tile(tensors[f"b_dec_{layer}"], (7, 1)) for layer in range(LAYERS)], axis=1)
    for layer in range(LAYERS):
        pre = x[:, layer] @ tensors[f"W_enc_{layer}"].T + tensors[f"b_enc_{layer}"]
        acts = np.where(pre > (tensors[f"threshold_{layer}"] if jumprelu else 0), pre, 0)
        out[:, layer:] += np.einsum("nf,fld->nld", acts, tensors[f"W_dec_{layer}"])
    assert_close(dictionary(jnp.asarray(x.reshape(7, -1))), out.reshape(7, -1), F32)
    message = error_of(lambda: dictionary.save_pretrained(tmp_path / "out", format="saelens"))
    assert "'saelens' is not written for cross-layer transcoders" in message


def test_missing_and_misshapen_layers_are_named(tmp_path: Path) -> None:
    write(tmp_path, jumprelu=False)
    (tmp_path / "W_dec_1.safetensors").unlink()
    message = error_of(lambda: Dictionary.from_pretrained(tmp_path), FileNotFoundError)
    assert "has no W_dec_1.safetensors" in message
    save_file({"W_dec_1": np.zeros((FEATURES, 1, WIDTH), np.float32)}, tmp_path / "W_dec_1.safetensors")
    assert "the tensors of layer 1 of 3 are" in error_of(lambda: Dictionary.from_pretrained(tmp_path))
