"""PyTorch's side of `gpu.py`: the same steps, written by hand and compiled with `torch.compile` where it has a GPU.

The language model is the reference's and computes in bfloat16 autocast. Dictionaries compute in float32, whose products
a GPU rounds to TF32 in both libraries.
"""

import functools
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_steps import Sizes, random_tokens
from reference import load_reference_model, write_model
from sides import Calls, once
from training_inputs import DictionaryCase, activations

MODEL_FILE = "model.pt"


def pytorch_calls(folder: Path, sizes: Sizes) -> Calls:
    """Return PyTorch's calls; `device` returns the name of the GPU, or "cpu"."""
    torch: Any = importlib.import_module("torch")
    torch.set_float32_matmul_precision("high")  # as XLA's default on a GPU
    return {
        "device": lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "lm": once(functools.partial(_pytorch_lm, sizes, folder)),
        "relu": once(functools.partial(_pytorch_dictionary, sizes, "relu")),
        "topk": once(functools.partial(_pytorch_dictionary, sizes, "topk")),
    }


def _pytorch_lm(sizes: Sizes, folder: Path) -> Callable[[], float]:
    torch: Any = importlib.import_module("torch")
    write_model(sizes.model, folder / MODEL_FILE, np.random.default_rng(0))
    lm = load_reference_model(sizes.model, folder / MODEL_FILE).to(_torch_device())
    ids = torch.tensor(random_tokens(sizes), device=_torch_device())
    targets = ids[:, 1:].flatten()

    def loss() -> Any:
        return torch.nn.functional.nll_loss(lm(ids)[:, :-1].flatten(0, 1), targets)

    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return _pytorch_steps(loss, list(lm.parameters()), optimizer, sizes.steps, autocast=True)


def _pytorch_dictionary(sizes: Sizes, architecture: str) -> Callable[[], float]:
    torch: Any = importlib.import_module("torch")
    device = _torch_device()
    x = torch.tensor(activations(DictionaryCase(sizes.width, sizes.n_features, sizes.dictionary_batch)), device=device)
    rows = torch.nn.functional.normalize(torch.randn(sizes.n_features, sizes.width, device=device), dim=-1) / 10
    first = (rows, rows.clone(), torch.zeros(sizes.n_features, device=device), x.mean(0))
    parameters = encoder, decoder, b_enc, b_dec = [torch.nn.Parameter(array) for array in first]

    def loss() -> Any:
        acts = torch.relu(torch.nn.functional.linear(x, encoder, b_enc))
        if architecture == "topk":
            values, places = acts.topk(sizes.k, dim=-1, sorted=False)
            acts = torch.zeros_like(acts).scatter(-1, places, values)
        error = (acts @ decoder.to(acts.dtype) + b_dec - x).square().sum(-1).mean()
        return error if architecture == "topk" else error + 5.0 * (acts.mean(0) @ decoder.norm(dim=-1))

    optimizer = torch.optim.Adam(parameters, lr=2e-4, fused=True)
    return _pytorch_steps(loss, parameters, optimizer, sizes.steps, autocast=False)


def _pytorch_steps(loss: Any, parameters: list[Any], optimizer: Any, steps: int, autocast: bool) -> Callable[[], float]:
    """Compile the loss on a GPU (compiling for a CPU would need a C++ compiler)."""
    torch: Any = importlib.import_module("torch")
    on_gpu = _torch_device() == "cuda"
    forward = torch.compile(loss) if on_gpu else loss

    def run() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast(_torch_device(), torch.bfloat16, enabled=autocast):
                value = forward()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    run()
    return run


def _torch_device() -> str:
    torch: Any = importlib.import_module("torch")
    return "cuda" if torch.cuda.is_available() else "cpu"
