"""The peers' side of `training.py`: SAELens, dictionary_learning and sparsify, each training as its own trainer does.

Every call is one step of the package's own code on the same activations with its own defaults, k aside. sparsify trains
inside a loop over a language model, so its step's lines are repeated here around its module. None of them has dead
features, which saves them AuxK.
"""

import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sides import Calls, once
from training_inputs import LARGE_DICTIONARY, SMALL_DICTIONARY, DictionaryCase, activations

SIZES = {"768": LARGE_DICTIONARY, "128": SMALL_DICTIONARY}
STEPS = 1_000_000
MakeStep = Callable[[DictionaryCase, str], Callable[[], None]]


def _calls(make_step: MakeStep, architectures: tuple[str, ...]) -> Calls:
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(os.cpu_count())
    return {
        f"{architecture}-{size}": once(functools.partial(make_step, case, architecture))
        for size, case in SIZES.items()
        for architecture in architectures
    }


def saelens_calls(folder: Path) -> Calls:
    """Return SAELens' calls."""
    return _calls(_saelens_step, ("relu", "topk", "batch_topk"))


def dictionary_learning_calls(folder: Path) -> Calls:
    """Return dictionary_learning's calls."""
    return _calls(_dictionary_learning_step, ("relu", "topk", "batch_topk"))


def sparsify_calls(folder: Path) -> Calls:
    """Return sparsify's calls."""
    return _calls(_sparsify_step, ("topk",))


def _saelens_step(case: DictionaryCase, architecture: str) -> Callable[[], None]:
    torch: Any = importlib.import_module("torch")
    saes: Any = importlib.import_module("sae_lens.saes")
    config: Any = importlib.import_module("sae_lens.config")
    trainers: Any = importlib.import_module("sae_lens.training.sae_trainer")
    kind = {"relu": "Standard", "topk": "TopK", "batch_topk": "BatchTopK"}[architecture]
    knob = {"relu": {}, "topk": {"k": case.k}, "batch_topk": {"k": float(case.k)}}[architecture]
    sae_config = getattr(saes, f"{kind}TrainingSAEConfig")(d_in=case.width, d_sae=case.n_features, **knob)
    sae = getattr(saes, f"{kind}TrainingSAE")(sae_config)
    settings = config.SAETrainerConfig(
        total_training_samples=STEPS * case.batch, train_batch_size_samples=case.batch, lr_end=3e-5
    )
    trainer = trainers.SAETrainer(settings, sae, iter(()))
    x = torch.tensor(activations(case))

    def one() -> None:
        trainer._train_step(sae, x)

    return one


def _dictionary_learning_step(case: DictionaryCase, architecture: str) -> Callable[[], None]:
    torch: Any = importlib.import_module("torch")
    trainers: Any = importlib.import_module(
        "dictionary_learning.trainers."
        + {"relu": "standard", "topk": "top_k", "batch_topk": "batch_top_k"}[architecture]
    )
    name = {"relu": "StandardTrainer", "topk": "TopKTrainer", "batch_topk": "BatchTopKTrainer"}[architecture]
    trainer = getattr(trainers, name)(
        steps=STEPS,
        activation_dim=case.width,
        dict_size=case.n_features,
        layer=0,
        lm_name="none",
        device="cpu",
        **({} if architecture == "relu" else {"k": case.k}),
    )
    x = torch.tensor(activations(case))
    step = 0

    def one() -> None:
        nonlocal step
        trainer.update(step, x)
        step += 1

    return one


def _sparsify_step(case: DictionaryCase, architecture: str) -> Callable[[], None]:
    torch: Any = importlib.import_module("torch")
    sparsify: Any = importlib.import_module("sparsify")
    config = sparsify.SparseCoderConfig(num_latents=case.n_features, k=case.k, activation=architecture)
    coder = sparsify.SparseCoder(case.width, config)
    optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4 / (case.n_features / 16384) ** 0.5)
    x = torch.tensor(activations(case))
    coder.b_dec.data = x.mean(0)
    silent_for = torch.zeros(case.n_features, dtype=torch.long)

    def one() -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, dead_mask=None)
        fired = torch.zeros_like(silent_for, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        silent_for.add_(case.batch)
        silent_for[fired] = 0

    return one
