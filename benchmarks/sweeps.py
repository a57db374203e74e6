"""Sweeps over a dictionary's features, compared with the PyTorch reference, which uses hooks in a loop.

    python benchmarks/sweeps.py [--rounds 3] [--only NAME …] [--json FILE] [--quiet 0.05]

It needs Linux; `dense` and `sparse` also need PyTorch and the reference (PyPI `torch`, `tinymodel`). 256 features at
Rm2 (the residual stream before the MLP of layer 2) are turned off one at a time on a prompt of 64 tokens. KL and the
change of the loss must agree before anything is timed. `dense` uses the most active features of a random dictionary.
`sparse` lowers the encoder's bias until 30 of the 25,000 features are active per token, as in a trained dictionary, and
draws 256 of the active ones, nearly all of which are active at one position. The reference is given the change of the
stream: its loop runs one whole forward pass per feature, with a hook that adds the change.

Three cases measure this package alone. `evaluate` evaluates eight dictionaries of one site of the bundled model on 32
stories, together and one after the other; `sites` does so with those of eight sites. `top` compares the search over
25,000 features of a full-size model with the encoder's matrix products alone, on 65,536 of the 600,000 tokens that the
sample sizes are meant for. `vs_reference.py` explains sides, rounds and `--quiet`.
"""

import functools
import importlib
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import tyro
from machine import describe_machine
from reference import CONFIG, DICTIONARY_FILE, MODEL_FILE, N_FEATURES, load_reference, write_weights
from rich.console import Console
from rich.table import Table
from sides import QUIET, Calls, Side, once, quiet_rounds

from tinymodel_jax.commands.frame import USER_PATHS


class Case(NamedTuple):
    """A comparison."""

    title: str
    other: str
    """Description of the other side."""
    goal: float
    """Largest ratio of our time to the other side's."""


Swept = Literal["dense", "sparse"]
Name = Literal["dense", "sparse", "evaluate", "sites", "top"]
CASES: dict[str, Case] = {
    "dense": Case("256 features active nearly everywhere", "the reference's loop", 0.25),
    "sparse": Case("256 features active at few positions", "the reference's loop", 0.17),
    "evaluate": Case("8 dictionaries of one site evaluated together", "one after the other", 0.5),
    "sites": Case("8 dictionaries of different sites evaluated together", "one after the other", 0.45),
    "top": Case("search over 25,000 features", "the encoder's products", 1.2),
}
LAYER, N_SWEPT, LENGTH, L0 = 2, 256, 64, 30
EVALUATED, STORIES, SEARCHED_TOKENS = 8, 32, 65_536
SITES = ("Rm0", "M0", "Rm1", "M1", "Rm2", "M2", "Rm3", "M3")
"""Sites of the bundled model whose dictionaries are evaluated."""
SITE, CHOSEN_FILE = f"Rm{LAYER}", "chosen.npz"
DECODER_SCALE = 300.0
"""Factor on the random decoder on both sides, which makes the effects of features large enough to compare."""
TOLERANCE, LEAST_EFFECT = 1e-3, 1e-3
"""Largest difference as a share of the largest effect, and smallest value of that effect in nats."""


def main(
    rounds: int = 3,
    only: tuple[Name, ...] = get_args(Name),
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", metavar="FILE")] = None,
    quiet: float = QUIET,
) -> None:
    """Time sweeps against the reference.

    Args:
        rounds: quiet rounds of each case after one untimed call; medians count.
        only: cases to run.
        json_file: file to write all times to.
        quiet: largest share of the cores that others may use in a round that counts; 1 counts every round, for a trial.
    """
    console, times, facts = Console(), {}, describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        if {*only} & {*get_args(Swept)}:
            write_weights(Path(folder))
        for name in only:
            times[name], left_out = measure(name, folder, rounds, quiet)
            facts[name] = f"{rounds} rounds; {left_out} left out because others used over {quiet:.0%} of the cores"
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", highlight=False)
    console.print(as_table(times))
    if json_file is not None:
        goals = {name: CASES[name].goal for name in times}
        json_file.write_text(json.dumps({"machine": facts, "seconds": times, "goals": goals}, indent=2) + "\n")


def measure(name: str, folder: str, rounds: int, quiet: float) -> tuple[dict[str, list[float]], int]:
    """Return both sides' times of a case, and the number of rounds left out as not quiet."""
    with ExitStack() as stack:
        if name in get_args(Swept):
            ours, other = (stack.enter_context(Side(make, folder)) for make in (our_calls, reference_calls))
            ours.ask("choose")
            check_same(name, ours.ask(name), other.ask(name))
            calls = {"ours": (ours, name), "other": (other, name)}
        else:
            ours = stack.enter_context(Side(our_calls, folder))
            calls = {"ours": (ours, name), "other": (ours, f"{name} other")}
            for side, call in calls.values():
                side.ask(call)
        return quiet_rounds(
            name, lambda: {who: side.measure(call) for who, (side, call) in calls.items()}, rounds, quiet
        )


def inputs() -> np.ndarray:
    """Return the ids of the prompt."""
    return np.random.default_rng(1).integers(0, CONFIG.begin_id, (1, LENGTH))


def choose(acts: np.ndarray, path: Path) -> None:
    """Write which features are swept and by how much the encoder's bias is lowered; both sides read it.

    Args:
        acts: activations of the random dictionary, (seq, n_features).
    """
    dense = np.argsort(-(acts > 0).sum(axis=0), kind="stable")[:N_SWEPT]
    lowered = np.quantile(acts, 1 - L0 / N_FEATURES).astype(np.float32)
    active = np.flatnonzero((acts > lowered).any(axis=0))
    sparse = np.random.default_rng(0).choice(active, N_SWEPT, replace=False)
    np.savez(path, dense=np.sort(dense), sparse=np.sort(sparse), dense_lowered=np.float32(0), sparse_lowered=lowered)


def our_calls(folder: Path) -> Calls:
    """Return this package's calls, which create what they hold on first use. `choose` must run before sweeps."""
    full_size = functools.cache(functools.partial(_full_size, folder))
    evaluations, searches = functools.cache(evaluation_calls), functools.cache(search_calls)
    at_sites = functools.cache(functools.partial(evaluation_calls, SITES))

    def chosen() -> None:
        lm = full_size()
        choose(np.asarray(lm[SITE](inputs()))[0], folder / CHOSEN_FILE)

    def case(name: str) -> Callable[[], np.ndarray]:
        from tinymodel_jax.analysis.effects import sweeps
        from tinymodel_jax.dictionaries.dictionary import Dictionary

        chosen, swept = np.load(folder / CHOSEN_FILE), full_size().splice([])
        dictionary = swept[SITE].dictionary
        params = dictionary.params | {"b_enc": dictionary.params["b_enc"] - chosen[f"{name}_lowered"]}
        params["W_dec"] = DECODER_SCALE * params["W_dec"]
        swept.attach(SITE, Dictionary.from_params(dictionary.config, params))

        def call() -> np.ndarray:
            effects = sweeps.ablate(swept, SITE, inputs(), chosen[name])
            return np.stack([effects.kl, effects.loss])

        return call

    return {
        "choose": chosen,
        **{name: once(functools.partial(case, name)) for name in get_args(Swept)},
        "evaluate": lambda: evaluations()[0](),
        "evaluate other": lambda: evaluations()[1](),
        "sites": lambda: at_sites()[0](),
        "sites other": lambda: at_sites()[1](),
        "top": lambda: searches()[0](),
        "top other": lambda: searches()[1](),
    }


def _full_size(folder: Path) -> Any:
    from tinymodel_jax.lm import TinyModel

    lm = TinyModel(folder / MODEL_FILE)
    lm.attach(SITE, folder / DICTIONARY_FILE)
    return lm


def evaluation_calls(sites: tuple[str, ...] = ()) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the evaluation of dictionaries together, and one after the other.

    Args:
        sites: whose dictionaries; without them, those of M1 with eight thresholds.
    """
    from tinymodel_jax.analysis.evaluation.evaluation import evaluate
    from tinymodel_jax.bundled import storyworld
    from tinymodel_jax.dictionaries.dictionary import Dictionary
    from tinymodel_jax.lm import TinyModel
    from tinymodel_jax.text.prompts_and_stories import story_rows

    lm = TinyModel("mini")
    told = storyworld.stories(0, STORIES, storyworld.FIRST_UNSEEN)
    rows = story_rows(lm.tokenizer, [story.text for story in told], lm.config.n_ctx)
    config, params = lm["M1"].dictionary.config, lm["M1"].dictionary.params
    thresholds = [params | {"threshold": params["threshold"] * (1 + i / 8)} for i in range(EVALUATED)]
    dictionaries = [lm[site].dictionary for site in sites]
    dictionaries = dictionaries or [Dictionary.from_params(config, changed) for changed in thresholds]

    def together() -> None:
        evaluate(lm, dictionaries, rows)

    def apart() -> None:
        for dictionary in dictionaries:
            evaluate(lm, [dictionary], rows)

    return together, apart


def search_calls() -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the search over all features, and its encoder's products alone."""
    from sweeps_top import search_and_products

    return search_and_products(SEARCHED_TOKENS, N_FEATURES)


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
        """Return KL and the change of the loss when a vector is removed from the stream."""
        with place.register_forward_hook(lambda module, args, out: out - removed):
            moved = lm(ids) - clean
        kl = -(clean.exp() * moved).sum(-1).mean()
        return float(kl), -float(moved[0, :-1].gather(-1, ids[0, 1:, None]).mean())

    def case(name: str) -> Callable[[], np.ndarray]:
        chosen = np.load(folder / CHOSEN_FILE)
        pre = seen[0] @ weights["encoder.weight"].T + weights["encoder.bias"] - float(chosen[f"{name}_lowered"])
        acts, directions = pre.relu(), DECODER_SCALE * weights["decoder.weight"].T
        return lambda: np.array([one(acts[:, f, None] * directions[f]) for f in chosen[name]]).T

    return {name: once(functools.partial(case, name)) for name in get_args(Swept)}


def check_same(name: str, mine: np.ndarray, theirs: np.ndarray) -> None:
    """Compare KL and the change of the loss of every feature, each with its largest.

    Raises:
        SystemExit: they differ, or are so small that they could not.
    """
    for what, ours, others in zip(("KL", "loss"), mine, theirs, strict=True):
        largest, difference = np.max(np.abs(others)), np.max(np.abs(ours - others))
        if largest < LEAST_EFFECT or difference > TOLERANCE * largest:
            raise SystemExit(f"{name}: {what} differs by {difference}; the largest is {largest}.")


def as_table(times: dict[str, dict[str, list[float]]]) -> Table:
    """Return a table of medians, fastest times, ratios and goals."""
    table = Table(title="median (fastest), seconds")
    for column in ("case", "other", "", "tinymodel_jax", "ratio", "goal"):
        table.add_column(column, justify="left" if column in ("case", "other") else "right")
    for name, both in times.items():
        theirs, ours = (f"{median(both[side]):.2f} ({min(both[side]):.2f})" for side in ("other", "ours"))
        ratio = median(both["ours"]) / median(both["other"])
        case = CASES[name]
        table.add_row(case.title, case.other, theirs, ours, f"{ratio:.3f}", f"≤ {case.goal}")
    return table


if __name__ == "__main__":
    tyro.cli(main, registry=USER_PATHS)
