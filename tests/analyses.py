"""Analyses of a small model whose numbers do not depend on how many devices and processes compute them."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinymodel_jax.analysis.concepts import labels
from tinymodel_jax.analysis.concepts.recovery import recover_concepts
from tinymodel_jax.analysis.effects import importance as effects
from tinymodel_jax.analysis.effects.importance import CausalImportance, causal_importance
from tinymodel_jax.analysis.effects.patching import patch
from tinymodel_jax.analysis.evaluation import DictionaryEvaluation, evaluate, evaluate_sparse_model
from tinymodel_jax.analysis.search import activation_pass, coactivation
from tinymodel_jax.analysis.search.top_activations import TopActivations, top_activations
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.commands.inputs import open_rows
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel

N_ROWS, IMPORTANCE_ROWS = 37, 5
"""Numbers that neither batches nor processes divide."""


def evaluations(lm: TinyModel) -> dict[str, Any]:
    """Return the numbers of `evaluate`."""
    return _numbers(*evaluate(lm, "M1", _rows(lm)))


def evaluations_of_sharded_features(lm: TinyModel) -> dict[str, Any]:
    """Return the numbers of `evaluate`, of a dictionary whose features are shared by pairs of devices."""
    return _numbers(*evaluate(_with_sharded_features(lm, "A1"), "A1", _rows(lm)))


def sparse_model(lm: TinyModel) -> dict[str, Any]:
    """Return the numbers of `evaluate_sparse_model`."""
    return _numbers(evaluate_sparse_model(lm, _rows(lm)))


def importance(lm: TinyModel, **options: Any) -> dict[str, Any]:
    """Return the numbers of `causal_importance`."""
    return _of_importance(causal_importance(lm, "M1", _rows(lm)[:IMPORTANCE_ROWS], **options))


def search(lm: TinyModel, tag: str = "M1", **options: Any) -> dict[str, Any]:
    """Return the numbers of `top_activations`, which counts co-activation on every n-th token.

    It starts more programs than XLA lets wait on a device, so if devices waited for each other, it would never end.
    """
    few = mock.patch.multiple(coactivation, TOKENS_AT_ONCE=4, PAIRS=1000)
    with few, mock.patch.object(activation_pass, "SAVE_EVERY", 0.0):
        return _of_search(top_activations(lm, tag, _rows(lm), k=5, n_sampled=5, batch=2, **options))


def search_of_sharded_features(lm: TinyModel) -> dict[str, Any]:
    """Return the numbers of `top_activations`, of a dictionary whose features are shared by pairs of devices."""
    return search(_with_sharded_features(lm, "A1"), "A1")


def patches(lm: TinyModel) -> dict[str, Any]:
    """Return the numbers of `patch`, of three pairs of prompts and of one pair."""
    clean = _rows(lm)[:3, :11]
    corrupted = np.where(np.arange(11) == 2, clean[::-1], clean)
    several = patch(lm, clean, corrupted, ("hook_resid_pre", "attn.hook_z"), metric="loss")
    one = patch(lm, clean[:1], corrupted[:1], "attn.hook_z", metric=_third_logits, each_position=True)
    found = {"clean": [several.clean, one.clean], "corrupted": [several.corrupted, one.corrupted]}
    for n, table in enumerate((*several.tables, *one.tables)):
        found |= {f"effects {n}": table.effects.tolist(), f"half-width {n}": table.half_width.tolist()}
    return found


def concepts(lm: TinyModel) -> dict[str, Any]:
    """Return the scores of `recover_concepts`."""
    told = list(storyworld.stories(seed=0, count=7, first=3_000_000))
    with mock.patch.object(labels, "CHUNK", 5):  # several chunks, which processes divide
        found = recover_concepts(lm, told, ["M1", "A1"])
    return {
        f"{one.name} {field}": np.asarray(value).tolist()
        for one in found
        for field, value in one.scores._asdict().items()
        if field != "threshold"  # infinite where predicting the concept everywhere is best
    }


ANALYSES: dict[str, Callable[[TinyModel], dict[str, Any]]] = {
    one.__name__: one
    for one in (
        evaluations,
        evaluations_of_sharded_features,
        sparse_model,
        importance,
        concepts,
        search,
        search_of_sharded_features,
        patches,
    )
}
RESUMABLE = {"importance": importance, "search": search}


def measure(folder: str | Path, names: Iterable[str] = tuple(ANALYSES)) -> dict[str, dict[str, Any]]:
    """Return the numbers of analyses of the model in a folder, by the analysis' name, as JSON values."""
    lm = TinyModel(folder)
    return {name: ANALYSES[name](lm) for name in names}


def stopped(folder: str | Path, work: str | Path, turns: int) -> None:
    """Start the measurements that can be resumed, and stop them after some turns, each of which is saved.

    Args:
        work: folder for the work files.
    """

    class StoppedError(Exception):
        pass

    def stop(left: Any, _: str) -> Any:
        for n, turn in enumerate(left):
            if n == turns:
                raise StoppedError
            yield turn

    lm = TinyModel(folder)
    for name, measured in RESUMABLE.items():
        with mock.patch.object(effects, "SAVE_SECONDS", 0.0), contextlib.suppress(StoppedError):
            measured(lm, work_file=Path(work) / name, track=stop)


def resumed(folder: str | Path, work: str | Path) -> tuple[dict[str, list[int]], dict[str, dict[str, Any]]]:
    """Return the turns that were left, and the numbers, of the measurements that were stopped."""
    lm, left, found = TinyModel(folder), dict[str, list[int]](), dict[str, dict[str, Any]]()
    for name, measured in RESUMABLE.items():
        turns = left.setdefault(name, [])
        found[name] = measured(
            lm, work_file=Path(work) / name, track=lambda rest, _, turns=turns: turns.extend(rest) or rest
        )
    return left, found


def assert_same(found: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Require that the numbers of all analyses are equal to 1e-5."""
    assert found.keys() == expected.keys()
    for analysis, numbers in expected.items():
        assert found[analysis].keys() == numbers.keys()
        for name, value in numbers.items():
            np.testing.assert_allclose(
                np.array(found[analysis][name], float), np.array(value, float), 1e-5, 1e-5, err_msg=f"{analysis} {name}"
            )


def _rows(lm: TinyModel) -> np.ndarray:
    return np.asarray(open_rows(lm, "storyworld", N_ROWS))


def _with_sharded_features(lm: TinyModel, tag: str) -> TinyModel:
    """Return the model with a dictionary whose features are shared by pairs of devices."""
    devices = np.array(jax.local_devices())
    mesh = Mesh(devices.reshape(-1, min(2, len(devices))), ("data", "model"))
    where = {"W_enc": P(None, "model"), "b_enc": P("model"), "W_dec": P("model", None)}
    whole, sharded = lm[tag].dictionary, lm.splice([])
    params = {name: jax.device_put(p, NamedSharding(mesh, where.get(name, P()))) for name, p in whole.params.items()}
    sharded.attach(tag, Dictionary.from_params(whole.config, params))
    assert sharded[tag].dictionary.params["W_enc"].sharding.spec == where["W_enc"]
    return sharded


def _third_logits(logits: jax.Array, tok_ids: jax.Array) -> jax.Array:
    del tok_ids
    return logits[:, -1, 3] + logits[:, 2].max(axis=-1)


def _numbers(evaluation: DictionaryEvaluation | Any) -> dict[str, Any]:
    """Return all numbers of an evaluation by name."""
    found = evaluation._asdict()
    margins = {f"± {name}": value for name, value in found.pop("margins").items()}
    found.pop("sites", None)
    return {name: np.asarray(value).tolist() for name, value in (found | margins).items()}


def _of_importance(found: CausalImportance) -> dict[str, Any]:
    parts = {name: getattr(found, name) for name in ("kl", "loss", "kl_all", "loss_all")}
    effects = {f"{name} {field}": array for name, one in parts.items() for field, array in one._asdict().items()}
    whole = {"n_rows": found.n_rows, "active_rows": found.active_rows, "final_stream": found.final_stream}
    return {name: np.asarray(value).tolist() for name, value in (effects | whole).items()}


def _of_search(found: TopActivations) -> dict[str, Any]:
    names = ("n_tokens", "histogram", "active", "total", "partners", "correlation")
    numbers = {name: getattr(found, name) for name in names}
    for name in ("top", "sampled"):
        numbers |= {f"{name} {field}": array for field, array in getattr(found, name)._asdict().items()}
    return {name: np.asarray(value).tolist() for name, value in numbers.items()}
