"""`find`: the nodes that carry a behaviour; `score`: how much of it they carry on other prompts.

The search starts with all nodes and ablates half of the remaining ones at a time, those with the smallest estimated
effects, until the circuit has its size. A node's effect is estimated by the derivative of the metric with respect to
its gate, times -1, in the pass of the nodes that remain: one backward pass gives the effects of all nodes. Source:
attribution patching (Nanda 2023; Syed et al. 2023), repeated as the circuit shrinks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from tinymodel_jax.analysis.circuits.neurons import NEURONS
from tinymodel_jax.analysis.circuits.node_sets.circuit import (
    Circuit,
    aligned_like,
    gated_like,
    gated_model,
    transcoder_tags,
)
from tinymodel_jax.analysis.circuits.node_sets.mean_ablation import Gated, LayerMeans
from tinymodel_jax.analysis.circuits.node_sets.places import Places, align
from tinymodel_jax.analysis.effects.metrics import LogitDifference, check_metric
from tinymodel_jax.analysis.evaluation.row_sums import Estimate, RowSums
from tinymodel_jax.lm import TinyModel


class CircuitScore(NamedTuple):
    """How much of a behaviour a circuit carries; each share is an `Estimate` with its 95 % interval over prompts.

    With m(S), the metric with all nodes outside S ablated, summed over prompts, C the circuit and M the model:

        faithfulness = (m(C) - m(nothing)) / (m(M) - m(nothing))
        completeness = (m(M) - m(everything but C)) / (m(M) - m(nothing))

    Source: faithfulness of Marks et al. 2024 (sparse feature circuits); completeness is 1 minus that of the complement.
    """

    faithfulness: Estimate
    """Share that the circuit keeps by itself; 1 is the whole model, 0 is every node ablated."""
    completeness: Estimate
    """Share that is lost when the circuit is ablated; 1 if nothing outside the circuit does the same."""
    random: tuple[Estimate, ...]
    """Faithfulness of random sets of as many heads, features and errors, of those active on the circuit's prompts."""
    model: float
    """Mean of the metric in the model, in logits."""
    circuit: float
    """Mean of the metric with everything outside the circuit ablated, in logits."""
    complement: float
    """Mean of the metric with the circuit ablated, in logits."""
    nothing: float
    """Mean of the metric with every node ablated, in logits."""


def find(
    lm: TinyModel,
    prompts: Any,
    metric: LogitDifference,
    budget: int,
    *,
    places: Places | None = None,
    dictionaries: str | Iterable[str] | None = None,
) -> Circuit:
    """Return the `budget` nodes that carry a behaviour over many prompts.

    Everything outside the circuit is ablated to its mean over the prompts, at each place. Score the circuit on other
    prompts than these.

    Args:
        prompts: a list of texts, or token ids (prompts, seq), right-padded.
        metric: `logit_difference(a, b)`, with one token for each prompt on at least one side.
        budget: nodes of the circuit: heads, features and errors, each at one place.
        places: which positions correspond: name -> one position per prompt, or one for all; negative ones count from
            the prompt's end. All other positions are the place "other". None: prompts of equal length, whose positions
            are places.
        dictionaries: tags of transcoders (`M`, `T`); layers without one take `M`. "neurons": the MLPs' neurons.

    Raises:
        ValueError: the prompts, places, metric, budget or dictionaries are not valid for the model, or a layer has no
            transcoder.

    Source: attribution patching (Nanda 2023; Syed et al. 2023), repeated as the circuit shrinks by halves.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import circuits
        >>> lm = TinyModel("mini")
        >>> from tinymodel_jax.analysis import logit_difference
        >>> prompts = ["Tim saw Lily. Then", "Lily saw Tim. Then"]
        >>> metric = logit_difference([" Tim", " Lily"], [" Lily", " Tim"])
        >>> circuit = circuits.find(lm, prompts, metric, budget=5)
        >>> len(circuit.nodes)
        5
    """
    aligned = align(lm, prompts, places)
    tokens = _tokens(lm, metric, len(aligned.tok_ids))
    if (tokens == tokens[0]).all():
        raise ValueError(
            "circuits.find: the metric compares the same two tokens on every prompt, and the mean of that difference "
            "is the same without any node; give prompts with different answers, and logit_difference a token for each."
        )
    tags = transcoder_tags(lm, dictionaries)
    gated = gated_model(lm, tags, len(aligned.names))
    means = gated.means(aligned)
    kept = _varying(gated, means, tags)
    if not isinstance(budget, int | np.integer) or not 1 <= budget <= kept.sum():
        raise ValueError(
            f"circuits.find: budget={budget!r}; it must be an integer, 1 to {kept.sum()}, the number of active nodes."
        )
    while True:
        effects = gated.slopes(means, kept, aligned, tokens)
        order = np.argsort(-np.where(kept, np.abs(effects), -1), kind="stable")
        if kept.sum() == budget:
            break
        kept = np.isin(np.arange(len(kept)), order[: max(budget, kept.sum() // 2)])
    nodes = gated.space.nodes(order[:budget])
    nodes["effect"] = effects[order[:budget]]
    return Circuit(nodes, aligned.names, tags, means)


def score(
    lm: TinyModel,
    circuit: Circuit,
    prompts: Any,
    metric: LogitDifference,
    *,
    places: Places | None = None,
    n_random: int = 10,
    seed: int = 0,
) -> CircuitScore:
    """Measure how faithful and complete a circuit is on prompts, beside random sets of nodes.

    Args:
        circuit: result of `find`.
        prompts: as for `find`: other prompts than the circuit was found on.
        metric: `logit_difference(a, b)`, with one token or one for each prompt.
        places: as for `find`: the same names, for these prompts.
        n_random: number of random sets.
        seed: seed of the random sets.

    Raises:
        ValueError: as `run`, the metric does not fit the prompts, or its change when every node is ablated may be 0.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import circuits
        >>> lm = TinyModel("mini")
        >>> from tinymodel_jax.analysis import logit_difference
        >>> metric = logit_difference([" Tim", " Lily"], [" Lily", " Tim"])
        >>> prompts = ["Tim saw Lily. Then", "Lily saw Tim. Then"]
        >>> circuit = circuits.find(lm, prompts, metric, budget=5)
        >>> others = ["Tim saw Lily. So", "Lily saw Tim. So"]
        >>> found = circuits.score(lm, circuit, others, metric, n_random=2)
        >>> len(found.random)
        2
    """
    if n_random < 0:
        raise ValueError(f"circuits.score: n_random={n_random}; it must be at least 0.")
    aligned, gated = aligned_like(lm, circuit, prompts, places), gated_like(lm, circuit)
    tokens = _tokens(lm, metric, len(aligned.tok_ids))
    inside = circuit.gates(gated.space)
    sets = {"model": np.ones_like(inside), "circuit": inside, "complement": ~inside, "nothing": np.zeros_like(inside)}
    candidates = _varying(gated, circuit.means, circuit.dictionaries)
    for number in range(n_random):
        sets[f"random {number}"] = _random_like(gated, inside, candidates, np.random.default_rng((seed, number)))
    sums = RowSums((*sets, "prompts"))
    values = {name: gated.differences(circuit.means, gates, aligned, tokens) for name, gates in sets.items()}
    sums.add({**values, "prompts": np.ones(len(tokens))})
    whole = ("model", "nothing")
    carried = sums.ratio(whole, "prompts")
    if abs(carried.value) <= max(1e-6, carried.margin):  # the margin of a single prompt is NaN
        raise ValueError(
            f"circuits.score: all nodes together add {carried.value:.3g} ± {carried.margin:.2g} to the logit difference"
            ", which may be nothing; choose tokens that the model tells apart on these prompts, or give more prompts."
        )
    return CircuitScore(
        sums.ratio(("circuit", "nothing"), whole),
        sums.ratio(("model", "complement"), whole),
        tuple(sums.ratio((f"random {number}", "nothing"), whole) for number in range(n_random)),
        *(sums.total(name) / len(tokens) for name in ("model", "circuit", "complement", "nothing")),
    )


def _tokens(lm: TinyModel, metric: LogitDifference, n_prompts: int) -> Int[np.ndarray, "prompts 2"]:
    if not isinstance(metric, LogitDifference):
        raise ValueError(f"circuits: metric={metric!r:.80}; give logit_difference(a, b).")
    tokens = check_metric(lm, metric, n_prompts).tokens
    assert tokens is not None
    return tokens


def _varying(gated: Gated, means: tuple[LayerMeans, ...], tags: tuple[str, ...]) -> Bool[np.ndarray, " nodes"]:
    """Return which nodes may differ from their mean: features that are active somewhere in their place, and the others.

    Neurons leave no errors.
    """
    found = np.ones(gated.space.size, bool)
    for (_, features, errors), layer in zip(gated.space.split(found), means, strict=True):
        features[:] = np.asarray(layer.acts) > 0  # a view
        errors[:] = tags != (NEURONS,)
    return found


def _random_like(
    gated: Gated, inside: Bool[np.ndarray, " nodes"], candidates: Bool[np.ndarray, " nodes"], rng: np.random.Generator
) -> Bool[np.ndarray, " nodes"]:
    """Return a random set of as many nodes of each kind as `inside` has."""
    found = np.zeros_like(inside)
    kinds = np.concatenate([np.full(gated.space.n_places * part.width, part.kind) for part in gated.space.parts()])
    for kind in ("head", "feature", "error"):
        of_kind = np.flatnonzero(candidates & (kinds == kind))
        found[rng.choice(of_kind, int((inside & (kinds == kind)).sum()), replace=False)] = True
    return found
