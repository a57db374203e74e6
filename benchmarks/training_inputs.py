"""What every contender of `training.py` trains on: sizes, token ids, activations, first weights, a prepared folder.

The same numbers for everybody, made from seeds with NumPy. Needs neither JAX nor PyTorch to be imported.
"""

import dataclasses
from pathlib import Path

import numpy as np
from reference import write_model

import convert_torch_weights
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.training.data_folder import DataMeta


@dataclasses.dataclass(frozen=True)
class LMCase:
    """A language model and its batch."""

    config: ModelConfig
    batch: tuple[int, int]
    """Rows, and tokens per row, in a step."""
    file: str
    """File of its initial weights in the benchmark's folder."""


@dataclasses.dataclass(frozen=True)
class DictionaryCase:
    """A dictionary's sizes."""

    width: int
    n_features: int
    batch: int = 4096
    """Activation vectors per step."""
    k: int = 32
    """Active features per vector, for topk and batch_topk."""


FULL = LMCase(ModelConfig(), (8, 256), "full.pt")
SMALL = LMCase(ModelConfig(d_model=128, n_heads=8, d_mlp=512, n_ctx=128, d_vocab=4096), (8, 128), "small.pt")
LARGE_DICTIONARY, SMALL_DICTIONARY = DictionaryCase(768, 25_000), DictionaryCase(128, 1024)
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP_NORM = 1e-3, (0.9, 0.95), 0.1, 1.0
"""AdamW of the language models."""
DICTIONARY_RATE, DICTIONARY_BETAS, L1 = 2e-4, (0.9, 0.999), 5.0
"""Adam and penalty of the dictionary that is compared with one written by hand."""
SWEEP_KS = (4, 8, 12, 16, 24, 32, 48, 64)
DEAD_SHARE = 0.01
MODEL, DATA = "small", "data"
"""The small model converted, and a prepared folder of token ids, in the benchmark's folder."""
_DATA_ROWS, _HELD_OUT_ROWS = 4096, 64


def write_inputs(folder: Path) -> None:
    """Write what contenders read from files: the language models' weights, and `MODEL` and `DATA` for the sweep."""
    rng = np.random.default_rng(0)
    for case in (FULL, SMALL):
        write_model(case.config, folder / case.file, rng)
    status = convert_torch_weights.main(
        ["lm", str(folder / SMALL.file), str(folder / MODEL), "--n-heads", str(SMALL.config.n_heads)]
    )
    assert status == 0
    write_data(SMALL.config, folder / DATA, rng)


def tokens(case: LMCase) -> np.ndarray:
    """Return one batch of ids, none of them special."""
    return np.random.default_rng(1).integers(0, case.config.begin_id, case.batch)


def activations(case: DictionaryCase) -> np.ndarray:
    """Return one batch of float32 vectors, of mean norm sqrt(width).

    They are sparse sums of directions: noise has no features to select, and makes selection look harder than it is.
    """
    rng = np.random.default_rng(2)
    directions = rng.standard_normal((256, case.width), dtype=np.float32)
    amounts = rng.standard_exponential((case.batch, 256), dtype=np.float32)
    x = np.where(rng.random(amounts.shape) < 0.05, amounts, 0) @ directions
    return (x * (case.width**0.5 / np.linalg.norm(x, axis=1).mean())).astype(np.float32)


def dictionary_rows(case: DictionaryCase) -> np.ndarray:
    """Return the first decoder, (feature, width), with rows of norm 0.1; the encoder is its transpose."""
    rows = np.random.default_rng(3).standard_normal((case.n_features, case.width), dtype=np.float32)
    return 0.1 * rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_data(config: ModelConfig, folder: Path, rng: np.random.Generator) -> None:
    """Write what `python -m train prepare` writes, of random ids."""
    folder.mkdir()
    counts = {"train": _DATA_ROWS, "valid": _HELD_OUT_ROWS}
    for split, rows in counts.items():
        ids = rng.integers(0, config.begin_id, (rows, config.n_ctx))
        ids[:, 0] = config.begin_id
        ids.astype("<u2").tofile(folder / f"{split}.bin")
    meta = DataMeta(
        row_length=config.n_ctx,
        vocab_size=config.d_vocab,
        packed=False,
        rows=counts,
        tokens={split: rows * config.n_ctx for split, rows in counts.items()},
        stories=counts,
        left_out={"refused": 0, "empty": 0},
        source="random ids",
        source_fingerprint="0",
        tokenizer_fingerprint="0",
        limit=None,
        valid_fraction=None,
        seed=0,
    )
    (folder / "data.json").write_text(meta.to_json())
