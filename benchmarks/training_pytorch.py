"""PyTorch's side of `training.py`: the reference's model and a dictionary written by hand, as its users train them.

The language model's step is autograd over the reference package's own modules, with torch.optim.AdamW; the dictionary's
is the ReLU dictionary of our recipe's loss in a dozen lines, with neither dead features nor anything against them.
"""

import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reference import load_reference_model
from sides import Calls, once
from training_inputs import (
    BETAS,
    CLIP_NORM,
    DICTIONARY_BETAS,
    DICTIONARY_RATE,
    FULL,
    L1,
    LARGE_DICTIONARY,
    LEARNING_RATE,
    SMALL,
    WEIGHT_DECAY,
    DictionaryCase,
    LMCase,
    activations,
    dictionary_rows,
    tokens,
)


def pytorch_calls(folder: Path, fused: bool = False) -> Calls:
    """Return PyTorch's calls; each trains one step and returns its loss.

    Args:
        fused: use the optimizers' fused implementation, rather than the default one.
    """
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(os.cpu_count())
    return {
        "lm-full": once(functools.partial(lm_step, FULL, folder, fused)),
        "lm-small": once(functools.partial(lm_step, SMALL, folder, fused)),
        "by-hand": once(functools.partial(dictionary_step, LARGE_DICTIONARY, fused)),
    }


def lm_step(case: LMCase, folder: Path, fused: bool) -> Callable[[], float]:
    """Return a function that trains the reference's model for a step and returns its loss."""
    torch: Any = importlib.import_module("torch")
    lm = load_reference_model(case.config, folder / case.file)
    ids = torch.tensor(tokens(case))
    undecayed = {id(p) for name, p in lm.named_parameters() if p.ndim < 2 or "embed" in name}
    groups = [
        {"params": [p for p in lm.parameters() if id(p) not in undecayed], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in lm.parameters() if id(p) in undecayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=fused or None)

    def one() -> float:
        optimizer.zero_grad()
        logprobs = lm(ids)[:, :-1]
        loss = torch.nn.functional.nll_loss(logprobs.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), CLIP_NORM)
        optimizer.step()
        return loss.item()

    return one


def dictionary_step(case: DictionaryCase, fused: bool) -> Callable[[], float]:
    """Return a function that trains a ReLU dictionary for a step and returns its loss."""
    torch: Any = importlib.import_module("torch")
    x, rows = torch.tensor(activations(case)), torch.tensor(dictionary_rows(case))
    encoder, decoder, b_enc, b_dec = (
        torch.nn.Parameter(array)
        for array in (rows, rows.clone(), torch.zeros(case.n_features), torch.zeros(case.width))
    )
    parameters = [encoder, decoder, b_enc, b_dec]
    optimizer = torch.optim.Adam(parameters, lr=DICTIONARY_RATE, betas=DICTIONARY_BETAS, fused=fused or None)

    def one() -> float:
        optimizer.zero_grad()
        acts = torch.relu(torch.nn.functional.linear(x, encoder, b_enc))
        error = torch.addmm(b_dec, acts, decoder) - x
        loss = error.square().sum(-1).mean() + L1 * (acts.mean(0) @ decoder.norm(dim=-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        return loss.item()

    return one
