"""Sweeps over a dictionary's features, against the PyTorch reference doing the same with hooks in a loop.

    python benchmarks/sweeps.py [--rounds 3] [--only NAME …] [--json FILE]

Needs PyTorch and the reference (PyPI `torch`, `tinymodel`), and Linux. 256 features at Rm2 (the residual stream before
the MLP of layer 2) are turned off one at a time on a prompt of 64 tokens; KL and the change of the loss must agree
before anything is timed. `dense`: the random dictionary's features that are active most. `sparse`: the encoder's bias
is lowered until 30 of the 25,000 features are active a token, as in a trained dictionary, and 256 of the active ones
are drawn; nearly all of these are active at one position. The reference gets the change of the stream handed to it: its
loop is one whole forward pass a feature, with a hook that adds it. Sides, rounds and quiet as in `vs_reference.py`.
"""

import functools
import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, get_args

import numpy as np
import tyro
from machine import describe_machine
from reference import CONFIG, DICTIONARY_FILE, MODEL_FILE, N_FEATURES, load_reference, write_weights
from rich.console import Console
from rich.table import Table
from sides import QUIET, Calls, Measured, Side, once, quiet_rounds

Name = Literal["dense", "sparse"]
GOALS = {"dense": 0.27, "sparse": 0.1}
LAYER, N_SWEPT, LENGTH, L0 = 2, 256, 64, 30
SITE, CHOSEN_FILE = f"Rm{LAYER}", "chosen.npz"
TOLERANCE = 1e-4


def main(
    rounds: int = 3,
    only: tuple[Name, ...] = get_args(Name),
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", metavar="FILE")] = None,
) -> None:
    """Time sweeps against the reference.

    Args:
        rounds: quiet rounds of each case after one untimed call; medians count.
        only: cases to run.
        json_file: file to write all times to.
    """
    console, times, facts = Console(), {}, describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder))
        with Side(our_calls, folder) as ours, Side(reference_calls, folder) as reference:
            ours.ask("choose")
            for name in only:
                check_same(name, ours.ask(name), reference.ask(name))

                def one_round(name: str = name) -> dict[str, Measured]:
                    return {"reference": reference.measure(name), "ours": ours.measure(name)}

                times[name], left_out = quiet_rounds(name, one_round, rounds)
                facts[name] = f"{rounds} rounds; {left_out} left out because others used over {QUIET:.0%} of the cores"
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", highlight=False)
    console.print(as_table(times))
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": facts, "seconds": times, "goals": GOALS}, indent=2) + "\n")


def inputs() -> np.ndarray:
    """Return the ids of the prompt."""
    return np.random.default_rng(1).integers(0, CONFIG.begin_id, (1, LENGTH))


def choose(acts: np.ndarray, path: Path) -> None:
    """Write which features are swept, and by how much the encoder's bias is lowered, for both sides to read.

    Args:
        acts: activations of the random dictionary, (seq, n_features).
    """
    dense = np.argsort(-(acts > 0).sum(axis=0), kind="stable")[:N_SWEPT]
    lowered = np.quantile(acts, 1 - L0 / N_FEATURES).astype(np.float32)
    active = np.flatnonzero((acts > lowered).any(axis=0))
    sparse = np.random.default_rng(0).choice(active, N_SWEPT, replace=False)
    np.savez(path, dense=np.sort(dense), sparse=np.sort(sparse), dense_lowered=np.float32(0), sparse_lowered=lowered)


def our_calls(folder: Path) -> Calls:
    """Load this package; return its calls. `choose` has to come before the others, on either side."""
    from tinymodel_jax.analysis import sweeps
    from tinymodel_jax.dictionary import Dictionary
    from tinymodel_jax.lm import TinyModel

    lm, ids = TinyModel(folder / MODEL_FILE), inputs()
    lm.attach(SITE, folder / DICTIONARY_FILE)
    dictionary = lm[SITE].dictionary

    def case(name: str) -> Callable[[], np.ndarray]:
        chosen, swept = np.load(folder / CHOSEN_FILE), lm.splice([])
        params = dictionary.params | {"b_enc": dictionary.params["b_enc"] - chosen[f"{name}_lowered"]}
        swept.attach(SITE, Dictionary.from_params(dictionary.config, params))

        def call() -> np.ndarray:
            effects = sweeps.ablate(swept, SITE, ids, chosen[name])
            return np.stack([effects.kl, effects.loss])

        return call

    cases = {name: once(functools.partial(case, name)) for name in get_args(Name)}
    return {"choose": lambda: choose(np.asarray(lm[SITE](ids))[0], folder / CHOSEN_FILE), **cases}


def reference_calls(folder: Path) -> Calls:
    """Load the reference; return its calls."""
    lm = load_reference(folder)
    torch: Any = importlib.import_module("torch")
    torch.set_grad_enabled(False)
    ids, weights = torch.tensor(inputs()), torch.load(folder / DICTIONARY_FILE)
    place, seen = lm.torso[LAYER].res_mlp, []
    with place.register_forward_hook(lambda module, args, out: seen.append(out[0])):
        clean = lm(ids)

    def one(removed: Any) -> tuple[float, float]:
        """Return KL and the change of the loss when the stream loses something."""
        with place.register_forward_hook(lambda module, args, out: out - removed):
            moved = lm(ids) - clean
        kl = -(clean.exp() * moved).sum(-1).mean()
        return float(kl), -float(moved[0, :-1].gather(-1, ids[0, 1:, None]).mean())

    def case(name: str) -> Callable[[], np.ndarray]:
        chosen = np.load(folder / CHOSEN_FILE)
        pre = seen[0] @ weights["encoder.weight"].T + weights["encoder.bias"] - float(chosen[f"{name}_lowered"])
        acts, directions = pre.relu(), weights["decoder.weight"].T
        return lambda: np.array([one(acts[:, f, None] * directions[f]) for f in chosen[name]]).T

    return {name: once(functools.partial(case, name)) for name in get_args(Name)}


def check_same(name: str, mine: np.ndarray, theirs: np.ndarray) -> None:
    """Compare KL and loss of every feature.

    Raises:
        SystemExit: they differ.
    """
    difference = float(np.max(np.abs(mine - theirs)))
    if mine.shape != theirs.shape or difference > TOLERANCE:
        raise SystemExit(f"{name}: results differ by {difference} (shapes {mine.shape} and {theirs.shape}).")


def as_table(times: dict[str, dict[str, list[float]]]) -> Table:
    """Lay out medians, the fastest times, and ratios beside their goals."""
    table = Table(title=f"{N_SWEPT} features of {SITE} turned off on {LENGTH} tokens: median (fastest), seconds")
    for column in ("case", "reference", "tinymodel_jax", "ratio", "goal"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, both in times.items():
        cells = [f"{median(both[side]):.2f} ({min(both[side]):.2f})" for side in ("reference", "ours")]
        ratio = median(both["ours"]) / median(both["reference"])
        table.add_row(name, *cells, f"{ratio:.3f}", f"≤ {GOALS[name]}")
    return table


if __name__ == "__main__":
    tyro.cli(main)
