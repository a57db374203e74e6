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
from tinymodel_jax.analysis.evaluation import DictionaryEvaluation, evaluate, evaluate_sparse_model
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
    devices = np.array(jax.local_devices())
    mesh = Mesh(devices.reshape(-1, min(2, len(devices))), ("data", "model"))
    where = {"W_enc": P(None, "model"), "b_enc": P("model"), "W_dec": P("model", None)}
    whole, sharded = lm["A1"].dictionary, lm.splice([])
    params = {name: jax.device_put(p, NamedSharding(mesh, where.get(name, P()))) for name, p in whole.params.items()}
    sharded.attach("A1", Dictionary.from_params(whole.config, params))
    assert sharded["A1"].dictionary.params["W_enc"].sharding.spec == where["W_enc"]
    return _numbers(*evaluate(sharded, "A1", _rows(lm)))


def sparse_model(lm: TinyModel) -> dict[str, Any]:
    """Return the numbers of `evaluate_sparse_model`."""
    return _numbers(evaluate_sparse_model(lm, _rows(lm)))


def importance(lm: TinyModel) -> dict[str, Any]:
    """Return the numbers of `causal_importance`."""
    return _of_importance(causal_importance(lm, "M1", _rows(lm)[:IMPORTANCE_ROWS]))


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
    one.__name__: one for one in (evaluations, evaluations_of_sharded_features, sparse_model, importance, concepts)
}


def measure(folder: str | Path, names: Iterable[str] = tuple(ANALYSES)) -> dict[str, dict[str, Any]]:
    """Return the numbers of analyses of the model in a folder, by the analysis' name, as JSON values."""
    lm = TinyModel(folder)
    return {name: ANALYSES[name](lm) for name in names}


def stopped(folder: str | Path, work_file: str | Path, turns: int) -> None:
    """Start the measurement of `importance`, and stop it after some turns, each of which is saved."""

    class StoppedError(Exception):
        pass

    def stop(left: Any, _: str) -> Any:
        for n, turn in enumerate(left):
            if n == turns:
                raise StoppedError
            yield turn

    lm = TinyModel(folder)
    with mock.patch.object(effects, "SAVE_SECONDS", 0.0), contextlib.suppress(StoppedError):
        causal_importance(lm, "M1", _rows(lm)[:IMPORTANCE_ROWS], work_file=Path(work_file), track=stop)


def resumed(folder: str | Path, work_file: str | Path) -> tuple[list[int], dict[str, Any]]:
    """Return the turns that were left, and the numbers of `importance`."""
    lm, seen = TinyModel(folder), list[int]()
    rows = _rows(lm)[:IMPORTANCE_ROWS]
    found = causal_importance(
        lm, "M1", rows, work_file=Path(work_file), track=lambda left, _: seen.extend(left) or left
    )
    return seen, _of_importance(found)


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
