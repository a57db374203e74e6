"""The peers' side of `quality.py`: each trains a TopK SAE as its own trainer does, and hands it back as a `Dictionary`.

A peer runs with its own defaults, or `matched`: its own method with the learning rate 2e-3 and a schedule fitted to the
number of steps (a twentieth of warm-up, a fifth of linear decay where it can decay). sparsify trains inside a loop over
a language model, so its step's lines are repeated here around its module; matched, it uses its Adam.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary

MATCHED_RATE = 2e-3
Batches = Callable[[int], np.ndarray]
"""The activations (batch, width) of a step."""


def saelens(batches: Batches, steps: int, n_features: int, k: int, hook: str, matched: bool) -> Dictionary:
    """Train SAELens' TopK SAE."""
    torch: Any = importlib.import_module("torch")
    saes: Any = importlib.import_module("sae_lens.saes")
    trainers: Any = importlib.import_module("sae_lens.training.sae_trainer")
    first = batches(0)
    sae = saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(d_in=first.shape[1], d_sae=n_features, k=k))
    schedule = {"lr": MATCHED_RATE, "lr_warm_up_steps": steps // 20, "lr_decay_steps": steps // 5} if matched else {}
    config: Any = importlib.import_module("sae_lens.config").SAETrainerConfig
    settings = config(
        total_training_samples=steps * len(first),
        train_batch_size_samples=len(first),
        lr_end=schedule.get("lr", 3e-4) / 10,  # as its runner sets it
        **schedule,
    )
    trainer = trainers.SAETrainer(settings, sae, iter(()))
    for i in range(steps):
        trainer._train_step(sae, torch.tensor(batches(i)))
    norms = sae.W_dec.norm(dim=1) if sae.cfg.rescale_acts_by_decoder_norm else torch.ones(n_features)
    return _dictionary(hook, k, sae.W_enc * norms, sae.b_enc * norms, sae.W_dec / norms[:, None], sae.b_dec)


def dictionary_learning(batches: Batches, steps: int, n_features: int, k: int, hook: str, matched: bool) -> Dictionary:
    """Train dictionary_learning's TopK SAE."""
    torch: Any = importlib.import_module("torch")
    top_k: Any = importlib.import_module("dictionary_learning.trainers.top_k")
    schedule = {"warmup_steps": min(1000, steps - 1)}  # its default of 1,000, which must be below the steps
    if matched:
        schedule = {"lr": MATCHED_RATE, "warmup_steps": steps // 20, "decay_start": steps * 4 // 5}
    trainer = top_k.TopKTrainer(
        steps=steps,
        activation_dim=batches(0).shape[1],
        dict_size=n_features,
        k=k,
        layer=0,
        lm_name="none",
        device="cpu",
        **schedule,
    )
    for i in range(steps):
        trainer.update(i, torch.tensor(batches(i)))
    ae = trainer.ae
    return _dictionary(hook, k, ae.encoder.weight.T, ae.encoder.bias, ae.decoder.weight.T, ae.b_dec)


def sparsify(batches: Batches, steps: int, n_features: int, k: int, hook: str, matched: bool) -> Dictionary:
    """Train sparsify's TopK SAE."""
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels need a GPU
    torch: Any = importlib.import_module("torch")
    package: Any = importlib.import_module("sparsify")
    first = torch.tensor(batches(0))
    coder = package.SparseCoder(first.shape[1], package.SparseCoderConfig(num_latents=n_features, k=k))
    coder.b_dec.data = first.mean(0)
    optimizer, schedule = _sparsify_optimizer(coder, n_features, steps, matched)
    for i in range(steps):
        coder.set_decoder_norm_to_unit_norm()
        coder(torch.tensor(batches(i)), dead_mask=None).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        schedule()
    if not matched:
        optimizer.eval()  # the averaged weights, which its trainer saves
    coder.set_decoder_norm_to_unit_norm()
    return _dictionary(hook, k, coder.encoder.weight.T, coder.encoder.bias, coder.W_dec, coder.b_dec)


def _sparsify_optimizer(coder: Any, n_features: int, steps: int, matched: bool) -> tuple[Any, Callable[[], None]]:
    """Return sparsify's optimizer and a call that moves its schedule: signum by default, Adam if matched."""
    torch: Any = importlib.import_module("torch")
    if not matched:
        sign: Any = importlib.import_module("sparsify.sign_sgd")
        wrapper: Any = importlib.import_module("schedulefree").ScheduleFreeWrapper
        optimizer = wrapper(sign.SignSGD(coder.parameters(), lr=5e-3 / (n_features / 2**14) ** 0.5), momentum=0.95)
        optimizer.train()
        return optimizer, lambda: None
    optimizer, warm_up = torch.optim.Adam(coder.parameters(), lr=MATCHED_RATE), max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, max(0.0, (steps - i) / max(1, steps - warm_up)))
    )
    return optimizer, schedule.step


def _dictionary(hook: str, k: int, W_enc: Any, b_enc: Any, W_dec: Any, b_dec: Any) -> Dictionary:
    parts = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    params = {name: np.ascontiguousarray(part.detach().float().numpy()) for name, part in parts.items()}
    d, f = params["W_enc"].shape
    config = DictionaryConfig(
        hook_in=hook, hook_out=hook, d_in=d, d_out=d, n_features=f, architecture="topk", k=k, subtract_b_dec=True
    )
    return Dictionary.from_params(config, params)
