"""Concept recovery on the bundled model: its dictionaries against random directions and neurons."""

import json

import numpy as np
import pytest
from conftest import as_users_run_it

from tinymodel_jax.analysis.concepts.recovery import concept_records, n_found, plot_concepts, recover_concepts
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.lm import TinyModel


@pytest.fixture(scope="module")
def told() -> list[storyworld.Story]:
    return list(storyworld.stories(seed=0, count=24, first=3_000_000))


@pytest.fixture(scope="module")
def found(told):
    return recover_concepts(TinyModel("mini"), told, ["Ra0", "M2"])


def test_every_place_is_scored_beside_its_baselines(found):
    assert [r.name for r in found] == ["Ra0", "random Ra0", "M2", "random M2", "neurons 0", "neurons 2"]
    sizes = [TinyModel("mini")[tag].dictionary.config.n_features for tag in ("Ra0", "M2")]
    assert [r.n_units for r in found] == [sizes[0]] * 2 + [sizes[1]] * 2 + [512] * 2
    assert all(r.scores.f1.shape == (len(storyworld.CONCEPTS),) for r in found)


def test_dictionaries_find_more_than_random_directions(found):
    of = {r.name: r for r in found}
    for tag in ("Ra0", "M2"):
        assert n_found(of[tag], 0.7) > n_found(of[f"random {tag}"], 0.7)


def test_a_word_is_told_by_a_feature_of_the_embedding(found):
    place = list(storyworld.CONCEPTS).index("mark.period")
    assert found[0].scores.f1[place] > 0.9


def test_the_records_are_json_and_the_plot_is_a_picture(found, tmp_path):
    rows = json.loads(json.dumps(concept_records(found)))
    assert len(rows) == 6 * len(storyworld.CONCEPTS)
    assert rows[0]["place"] == "Ra0"
    assert rows[0]["f1"] == pytest.approx(found[0].scores.f1[0], abs=1e-4)
    plot_concepts(found, tmp_path / "concepts.png")
    assert (tmp_path / "concepts.png").read_bytes().startswith(b"\x89PNG")


def test_the_result_does_not_depend_on_what_else_is_scored(found, told):
    alone = recover_concepts(TinyModel("mini"), told, ["M2"], baselines=False)
    np.testing.assert_array_equal(alone[0].scores.f1, found[2].scores.f1)


def test_bad_input_is_one_line(told):
    with as_users_run_it():
        with pytest.raises(ValueError, match="at least two stories, got 1"):
            recover_concepts(TinyModel("mini"), told[:1])
        with pytest.raises(ValueError, match="'M2N5' names a feature; name the site, 'M2'"):
            recover_concepts(TinyModel("mini"), told, ["M2N5"])
