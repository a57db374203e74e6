"""The PyTorch reference (PyPI `tinymodel`) on random weights of the published sizes, to compare with.

`write_weights` makes one set of files that both packages load. `load_reference` imports the reference without the
network: a stand-in takes the place of its tokenization module, which would ask the hub for a tokenizer at import, and
its downloads of dictionaries read the local file instead, as often as the reference really reads it. PyTorch and the
reference are needed only when it is called.
"""

import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.io.convert import TensorMap, dictionary_tensors, model_tensors
from tinymodel_jax.io.torch_files import save_torch_file

MODEL_FILE, DICTIONARY_FILE = "model.pt", "dictionary.pt"
CONFIG = ModelConfig()
N_FEATURES = 25_000

_EMBEDDINGS = ("embed.weight", "pos_embed")
_TOKENIZATION_NAMES = ("tok_see", "tokenizer", "raw_toks", "pretty_toks", "multi_tok_words", "words")


def write_weights(folder: Path, seed: int = 0) -> None:
    """Write `model.pt` and `dictionary.pt` (one dictionary of 25,000 features) in float32.

    Numbers are uniform, within 1/sqrt(inputs) for linear maps as in an untrained model, and within 1 for embeddings, so
    that predictions depend on the tokens as a trained model's do.
    """
    rng = np.random.default_rng(seed)
    write_model(CONFIG, folder / MODEL_FILE, rng)
    dictionary = dictionary_tensors(N_FEATURES, CONFIG.d_model, CONFIG.d_model)
    save_torch_file(_random_state(dictionary, rng), folder / DICTIONARY_FILE)


def write_model(config: ModelConfig, path: Path, rng: np.random.Generator) -> None:
    """Write a model's weights, as `write_weights` draws them."""
    save_torch_file(_random_state(model_tensors(config), rng), path)


def load_reference(folder: Path) -> Any:
    """Return the reference's model with the weights in `folder`; it computes on all cores.

    Its `generate` takes and returns a (1, seq) tensor of ids, `[BEGIN]` included in what it takes, and indexing it
    (`lm["T1"]`) reads `folder / dictionary.pt`.
    """
    lm = load_reference_model(CONFIG, folder / MODEL_FILE)
    sparse_mlp: Any = importlib.import_module("tiny_model.sparse_mlp")
    sparse_mlp.hf_hub_download = lambda repo_id, filename: str(folder / DICTIONARY_FILE)
    return lm


def load_reference_model(config: ModelConfig, path: Path) -> Any:
    """Return the reference's model of any sizes with the weights of a file; d_mlp is 4 d_model there."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(os.cpu_count())
    _stand_in_for_tokenization()
    package: Any = importlib.import_module("tiny_model")
    lm = package.TinyModel(
        d_model=config.d_model,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        max_seq_len=config.n_ctx,
        vocab_size=config.d_vocab,
        from_pretrained=False,
    )
    lm.load_state_dict(torch.load(path))
    return lm


def _random_state(maps: list[TensorMap], rng: np.random.Generator) -> dict[str, np.ndarray]:
    state = {}
    for tensor in maps:
        bound = 1 if tensor.key in _EMBEDDINGS else tensor.torch_shape[-1] ** -0.5
        state[tensor.key] = rng.uniform(-bound, bound, tensor.torch_shape).astype(np.float32)
    return state


def _stand_in_for_tokenization() -> None:
    module: Any = types.ModuleType("tiny_model.tokenization.tokenization")
    module.enc = lambda tok_ids, add_begin: tok_ids
    module.dec = lambda tok_ids: tok_ids
    for name in _TOKENIZATION_NAMES:
        setattr(module, name, None)
    package: Any = types.ModuleType("tiny_model.tokenization")
    package.__path__ = []
    package.tokenization = module
    sys.modules |= {package.__name__: package, module.__name__: module}
