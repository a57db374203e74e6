"""Circuits over many prompts: what a run keeps, what its score says, and what the search chooses."""

from typing import Any

import numpy as np
import oracle
import pytest
from conftest import make_dictionary
from oracle import F32, assert_close, error_of

from tinymodel_jax.analysis import circuits
from tinymodel_jax.analysis.circuits.node_sets.nodes import CIRCUIT_NODE
from tinymodel_jax.analysis.effects.metrics import LogitDifference, logit_difference
from tinymodel_jax.analysis.evaluation.row_sums import NORMAL_95
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.params import flatten

PAD = 0
PROMPTS = np.array([[1, 5, 7, 3, 7, 11], [1, 9, 4, 4, 2, 6], [1, 8, 13, 2, 12, 5], [1, 3, 17, 18, 4, 9]], np.int32)
ANSWERS, WRONG = [10, 11, 12, 19], [2, 19, 11, 18]  # tokens that the nodes of the model tell apart
METRIC = logit_difference(ANSWERS, WRONG)
ROWS = np.arange(4)


@pytest.fixture(scope="module")
def small(shared_lm: TinyModel) -> TinyModel:
    lm = shared_lm.splice([])
    for layer, options in enumerate(({"architecture": "jumprelu", "skip": True}, {"exclude": (7,)})):
        block = f"blocks.{layer}"
        lm.attach(f"M{layer}", make_dictionary(f"{block}.hook_mlp_in", f"{block}.hook_mlp_out", layer + 3, **options))
    return lm


@pytest.fixture(scope="module")
def everything(small: TinyModel) -> circuits.Circuit:
    """All nodes that are active on the prompts."""
    return circuits.find(small, PROMPTS, METRIC, n_active(small))


def n_active(lm: TinyModel) -> int:
    """Number of heads, errors and features active at each position, two layers."""
    active = sum(int((np.asarray(lm[tag](PROMPTS)) > 0).any(axis=0).sum()) for tag in ("M0", "M1"))
    return active + 2 * 6 * (lm.config.n_heads + 1)


def some_of(circuit: circuits.Circuit, nodes: np.ndarray) -> circuits.Circuit:
    return circuits.Circuit(nodes, circuit.places, circuit.dictionaries, circuit.means)


def differences(logits: Any) -> np.ndarray:
    last = np.asarray(logits, np.float64)[:, -1]
    return last[ROWS, ANSWERS] - last[ROWS, WRONG]


def run_by_hand(lm: TinyModel, nodes: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return float64 logits, node by node: every value outside of the nodes is its mean over the place."""
    params = flatten(lm.params)
    kept = {(str(n["kind"]), int(n["layer"]), int(n["place"]), int(n["index"])) for n in nodes}
    _, clean = oracle.forward(params, lm.config, PROMPTS)

    def mean(values: np.ndarray) -> np.ndarray:
        """Put the mean over a place at each of its positions."""
        found = np.zeros_like(values)
        for one in np.unique(place):
            found[place == one] = values[place == one].mean(axis=0)
        return found

    def heads(layer: int, value: np.ndarray, seen: Any) -> np.ndarray:
        del seen
        found = mean(clean[f"blocks.{layer}.attn.hook_z"])
        for row, position in np.ndindex(*PROMPTS.shape):
            for head in range(lm.config.n_heads):
                if ("head", layer, place[row, position], head) in kept:
                    found[row, position, head] = value[row, position, head]
        return found

    def output(layer: int, value: np.ndarray, seen: Any) -> np.ndarray:
        own = lm[f"M{layer}"].dictionary
        W_dec, b_dec = (np.asarray(own.params[name], np.float64) for name in ("W_dec", "b_dec"))
        hook = f"blocks.{layer}.hook_mlp_in"
        acts_at = ~np.isin(PROMPTS, own.config.exclude)[..., None]
        clean_acts, acts = (oracle.encode(own.params, own.config, x[hook]) * acts_at for x in (clean, seen))
        errors, used = value - acts @ W_dec - b_dec, mean(clean_acts)
        error = mean(clean[f"blocks.{layer}.hook_mlp_out"] - clean_acts @ W_dec - b_dec)
        for row, position in np.ndindex(*PROMPTS.shape):
            for feature in range(own.config.n_features):
                if ("feature", layer, place[row, position], feature) in kept:
                    used[row, position, feature] = acts[row, position, feature]
            if ("error", layer, place[row, position], 0) in kept:
                error[row, position] = errors[row, position]
        return used @ W_dec + b_dec + error

    edits: dict[str, oracle.Edit] = {}
    for layer in range(lm.config.n_layers):
        edits[f"blocks.{layer}.attn.hook_z"] = lambda value, seen, layer=layer: heads(layer, value, seen)
        edits[f"blocks.{layer}.hook_mlp_out"] = lambda value, seen, layer=layer: output(layer, value, seen)
    return oracle.forward(params, lm.config, PROMPTS, edits)[0]


def test_all_nodes_are_the_model_and_none_leaves_the_embeddings(small, everything):
    assert_close(circuits.run(small, everything, PROMPTS), small.logits(PROMPTS), F32)
    place = np.broadcast_to(np.arange(6), PROMPTS.shape)
    nothing = circuits.run(small, some_of(everything, everything.nodes[:0]), PROMPTS)
    assert_close(nothing, run_by_hand(small, everything.nodes[:0], place), F32)
    assert not np.allclose(nothing, small.logits(PROMPTS), atol=0.1)


@pytest.mark.parametrize("named", [False, True])
def test_a_run_has_means_outside_of_the_circuit_and_its_own_values_inside(small, named):
    places = {"second": [1, 2, 1, 3], "end": -1} if named else None
    place = np.broadcast_to(np.arange(6), PROMPTS.shape)
    if named:
        place = np.full(PROMPTS.shape, 2)
        place[ROWS, [1, 2, 1, 3]], place[:, -1] = 0, 1
    circuit = circuits.find(small, PROMPTS, METRIC, 25, places=places)
    assert set(circuit.nodes["kind"]) == {"head", "feature", "error"}
    assert circuit.places == (("second", "end", "other") if named else tuple("012345"))
    assert_close(circuits.run(small, circuit, PROMPTS, places=places), run_by_hand(small, circuit.nodes, place), F32)
    n_places = len(circuit.places)
    outside = np.zeros(0, CIRCUIT_NODE)
    inside = {node.tolist()[:5] for node in circuit.nodes}
    for layer in range(2):
        widths = {"head": (f"L{layer}", 2), "feature": (f"M{layer}", 12), "error": (f"M{layer}", 1)}
        keys = [
            (kind, site, layer, at, index)
            for kind, (site, width) in widths.items()
            for at, index in np.ndindex(n_places, width)
        ]
        others = [(*key, 0.0) for key in keys if key not in inside]
        outside = np.concatenate([outside, np.array(others, CIRCUIT_NODE)])
    complement = circuits.run(small, circuit, PROMPTS, places=places, complement=True)
    assert_close(complement, run_by_hand(small, outside, place), F32)


def test_the_effect_of_a_node_that_writes_linearly_is_what_its_ablation_changes(small):
    circuit = circuits.find(small, PROMPTS, METRIC, 20)
    whole = differences(circuits.run(small, circuit, PROMPTS)).mean()
    last_mlp = (circuit.nodes["layer"] == 1) & (circuit.nodes["kind"] != "head")  # the logits are linear in these
    assert last_mlp.sum() > 3
    for number in np.flatnonzero(last_mlp):
        without = some_of(circuit, np.delete(circuit.nodes, number))
        change = whole - differences(circuits.run(small, without, PROMPTS)).mean()
        assert_close(circuit.nodes["effect"][number], change, F32)
    assert (np.diff(np.abs(circuit.nodes["effect"])) <= 0).all()


def test_the_search_ablates_the_smaller_effects_by_halves(small, everything):
    found = everything
    while len(found.nodes) > 10:
        nodes = found.nodes[: max(10, len(found.nodes) // 2)]
        found = circuits.find(small, PROMPTS, METRIC, len(nodes))
        assert {n.tolist()[:5] for n in found.nodes} == {n.tolist()[:5] for n in nodes}
    again = circuits.find(small, PROMPTS[::-1].copy(), logit_difference(ANSWERS[::-1], WRONG[::-1]), 10)
    assert again.labels == found.labels
    assert len(found.nodes) == 10


def test_the_score_is_a_ratio_of_runs_with_an_interval_over_prompts(small, everything):
    circuit = circuits.find(small, PROMPTS, METRIC, 12)
    score = circuits.score(small, circuit, PROMPTS, METRIC, n_random=3, seed=5)
    model = differences(small.logits(PROMPTS))
    nothing = differences(circuits.run(small, some_of(everything, everything.nodes[:0]), PROMPTS))
    kept = differences(circuits.run(small, circuit, PROMPTS))
    without = differences(circuits.run(small, circuit, PROMPTS, complement=True))
    assert_close(score[3:], [x.mean() for x in (model, kept, without, nothing)], F32)
    for estimate, above in ((score.faithfulness, kept - nothing), (score.completeness, model - without)):
        below = model - nothing
        ratio = above.sum() / below.sum()
        margin = NORMAL_95 * np.sqrt(4 / 3 * ((above - ratio * below) ** 2).sum()) / abs(below.sum())
        np.testing.assert_allclose(estimate, (ratio, margin), rtol=1e-4, atol=1e-4)
    assert len({estimate.value for estimate in score.random}) == 3
    assert circuits.score(small, circuit, PROMPTS, METRIC, n_random=3, seed=5) == score
    assert circuits.score(small, circuit, PROMPTS, METRIC, n_random=3, seed=6).random != score.random
    whole = circuits.score(small, everything, PROMPTS, METRIC, n_random=1)
    np.testing.assert_allclose([whole.faithfulness.value, whole.completeness.value], 1, atol=1e-4)
    np.testing.assert_allclose(whole.random[0].value, 1, atol=1e-4)  # there are no other nodes to draw


def test_prompts_of_different_lengths_run_together_as_they_run_alone(small):
    ids = np.full((3, 7), small.config.pad_id, np.int32)
    lengths = [5, 7, 6]
    for row, length in enumerate(lengths):
        ids[row, :length] = PROMPTS[row].tolist()[:length] if length < 7 else [*PROMPTS[row], 4]
    metric = logit_difference(ANSWERS[:3], WRONG[:3])
    places = {"name": [2, 1, 3], "end": -1}
    circuit = circuits.find(small, ids, metric, 15, places=places)
    together = np.asarray(circuits.run(small, circuit, ids, places=places))
    for row, length in enumerate(lengths):
        own = {"end": [length - 1], "name": [places["name"][row]]}
        alone = circuits.run(small, circuit, ids[row : row + 1, :length], places=own)
        assert_close(together[row : row + 1, :length], alone, F32)
    score = circuits.score(small, circuit, ids, metric, places=places, n_random=0)
    last = together[np.arange(3), np.array(lengths) - 1]
    assert_close(score.circuit, (last[np.arange(3), ANSWERS[:3]] - last[np.arange(3), WRONG[:3]]).mean(), F32)


def test_more_prompts_than_run_at_once_are_averaged_alike(small):
    many, metric = np.repeat(PROMPTS, 10, axis=0), logit_difference(np.repeat(ANSWERS, 10), np.repeat(WRONG, 10))
    few, more = circuits.find(small, PROMPTS, METRIC, 12), circuits.find(small, many, metric, 12)
    assert few.labels == more.labels
    assert_close(few.nodes["effect"], more.nodes["effect"], F32)
    for one, other in zip(few.means, more.means, strict=True):
        assert_close(one.z, other.z, F32)


def test_neurons_have_no_errors_and_all_of_them_are_the_model(small):
    circuit = circuits.find(small, PROMPTS, METRIC, 30, dictionaries="neurons")
    assert set(circuit.nodes["kind"]) == {"head", "feature"}
    assert any(label.startswith("L1 MLPN") for label in circuit.labels)
    post = [f"blocks.{layer}.mlp.hook_post" for layer in range(2)]
    _, acts = small.run_with_cache(PROMPTS, post)
    active = sum(int((np.asarray(acts[name]) > 0).any(axis=0).sum()) for name in post)
    whole = circuits.find(small, PROMPTS, METRIC, active + 2 * 6 * 2, dictionaries="neurons")
    assert_close(circuits.run(small, whole, PROMPTS), small.logits(PROMPTS), F32)


def test_circuits_are_saved_and_loaded(small, tmp_path):
    circuit = circuits.find(small, PROMPTS, METRIC, 9, places={"end": -1})
    circuit.save(tmp_path / "circuit")
    again = circuits.Circuit.load(tmp_path / "circuit")
    np.testing.assert_array_equal(again.nodes, circuit.nodes)
    assert (again.labels, again.places, again.dictionaries) == (circuit.labels, circuit.places, circuit.dictionaries)
    one, other = (circuits.run(small, each, PROMPTS, places={"end": -1}) for each in (circuit, again))
    np.testing.assert_array_equal(one, other)
    assert "holds no circuit" in error_of(lambda: circuits.Circuit.load(tmp_path), FileNotFoundError)
    (tmp_path / "damaged").mkdir()
    for name, content in (("circuit.safetensors", b"short"), ("circuit.json", b"{}")):
        (tmp_path / "damaged" / name).write_bytes(content)
    assert "holds a damaged circuit" in error_of(lambda: circuits.Circuit.load(tmp_path / "damaged"))


def test_bad_input_is_refused_in_one_line(small, everything, golden_lm, no_type_checks):
    find, run = circuits.find, circuits.run
    ragged = PROMPTS.copy()
    ragged[1, -1] = small.config.pad_id
    inside = PROMPTS.copy()
    inside[1, 2] = small.config.pad_id
    inside[:, 0] = 2
    named = find(small, PROMPTS, METRIC, 3, places={"name": 1})
    everywhere = find(small, PROMPTS, METRIC, 3, places={str(position): position for position in range(6)})
    longer = np.concatenate([PROMPTS, PROMPTS[:, 1:2]], axis=1)
    cases = {
        "budget=0; it must be an integer, 1 to": lambda: find(small, PROMPTS, METRIC, 0),
        f"budget={n_active(small) + 1}": lambda: find(small, PROMPTS, METRIC, n_active(small) + 1),
        "budget=2.5; it must be an integer": lambda: find(small, PROMPTS, METRIC, 2.5),  # type: ignore[arg-type]
        "have 5 to 6 tokens": lambda: find(small, ragged, METRIC, 5),
        "prompt 1 has [PAD] before a token": lambda: find(small, inside, METRIC, 5),
        "got no prompts": lambda: find(small, PROMPTS[:0], METRIC, 5),
        "give logit_difference(a, b)": lambda: find(small, PROMPTS, "loss", 5),  # type: ignore[arg-type]
        "got 3 and 1 tokens for 4 rows": lambda: find(small, PROMPTS, LogitDifference((1, 2, 3), 4), 5),
        "is not a transcoder": lambda: find(small, PROMPTS, METRIC, 5, dictionaries="A1"),
        "predict the same value": lambda: find(small, PROMPTS, METRIC, 5, dictionaries=["M1", "T1"]),
        "which has positions 0..5": lambda: find(small, PROMPTS, METRIC, 5, places={"end": 6}),
        "give one position, or one for each": lambda: find(small, PROMPTS, METRIC, 5, places={"end": [1, 2]}),
        "are both position 5": lambda: find(small, PROMPTS, METRIC, 5, places={"a": 5, "b": -1}),
        "places has the names other": lambda: find(small, PROMPTS, METRIC, 5, places={"other": 1}),
        "got places: end": lambda: run(small, named, PROMPTS, places={"end": -1}),
        "got places: none": lambda: run(small, named, PROMPTS),
        "positions without names": lambda: run(small, everything, PROMPTS, places={"end": -1}),
        "have 5 tokens and the circuit's had 6": lambda: run(small, everything, PROMPTS[:, :5]),
        "found in another model": lambda: run(golden_lm, everything, PROMPTS),
        "n_random=-1": lambda: circuits.score(small, everything, PROMPTS, METRIC, n_random=-1),
        "there are no means for 'other'": lambda: run(small, everywhere, longer, places={str(i): i for i in range(6)}),
        "compares the same two tokens on every prompt": lambda: find(small, PROMPTS, logit_difference(4, 9), 3),
        "which may be nothing": lambda: circuits.score(small, everything, PROMPTS, logit_difference(4, 9)),
    }
    for words, call in cases.items():
        assert words in error_of(call)
    bare = TinyModel.from_params(small.config, small.params)
    assert "lm.attach('M0', path)" in error_of(lambda: find(bare, PROMPTS, METRIC, 5))


@pytest.mark.slow
def test_thirty_nodes_copy_the_name_in_unseen_stories():
    lm = TinyModel("mini")

    def copied(count: int, first: int) -> tuple[Any, LogitDifference, dict[str, Any]]:
        asked = list(storyworld.questions("name", 0, count, first))
        names = [len(lm.to_tokens(one.text[: one.source])[0]) - 1 for one in asked]
        metric = logit_difference([one.answer for one in asked], [one.wrong for one in asked])
        return lm.to_tokens([one.text for one in asked]), metric, {"name": names, "end": -1}

    prompts, metric, places = copied(64, storyworld.FIRST_UNSEEN + 100_000)
    circuit = circuits.find(lm, prompts, metric, 30, places=places)
    assert circuit.labels[0] == "L3H5 @end"
    prompts, metric, places = copied(200, storyworld.FIRST_UNSEEN)
    score = circuits.score(lm, circuit, prompts, metric, places=places)
    assert 0.9 < score.faithfulness.value < 1.1
    assert score.completeness.value > 0.9
    assert np.median([estimate.value for estimate in score.random]) < 0.1
