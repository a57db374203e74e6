"""Which features are active together: exact on the sample, undefined where a feature does not vary."""

import json
from pathlib import Path

import numpy as np
import pytest

from tinymodel_jax import TinyModel
from tinymodel_jax.analysis.report.dashboard.records import _partners
from tinymodel_jax.analysis.search import coactivation
from tinymodel_jax.analysis.search.coactivation import partners_of_all
from tinymodel_jax.analysis.search.top_activations import TopActivations, top_activations
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.commands import cli
from tinymodel_jax.commands.inputs import open_rows


def draw(tokens: int, n_features: int, share: float, always: int = 2) -> np.ndarray:
    """Draw an activity with features that go together, `always` that are active everywhere, and one that never is."""
    rng = np.random.default_rng(0)
    active = rng.random((tokens, n_features)) < share
    active[:, 1::3] |= active[:, ::3][:, : active[:, 1::3].shape[1]] & (rng.random(tokens) < 0.6)[:, None]
    active[:, 5 : 5 + always] = True
    active[:, -1] = False
    return active


def expected_phi(active: np.ndarray) -> np.ndarray:
    """Return phi of all pairs; 0 for a feature with itself and where too few met, NaN where it is undefined."""
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = np.corrcoef(active, rowvar=False)
    met = active.astype(int).T @ active
    return np.where(np.isnan(phi), np.nan, np.where((met < 3) | np.eye(len(phi), dtype=bool), 0, phi))


def assert_partners(active: np.ndarray, partners: np.ndarray, correlation: np.ndarray) -> None:
    phi, n = expected_phi(active), partners.shape[1]
    varies = np.asarray(active.any(axis=0) & ~active.all(axis=0))
    assert np.isnan(correlation[~varies]).all()
    assert (partners[~varies] == -1).all()
    for feature in np.flatnonzero(varies):
        best = np.sort(np.maximum(np.nan_to_num(phi[feature]), 0))[::-1][:n]
        np.testing.assert_allclose(correlation[feature], best, atol=1e-6)
        for partner, value in zip(partners[feature], correlation[feature], strict=True):
            assert (partner == -1) == (value == 0)
            if partner >= 0:
                assert varies[partner]
                assert phi[feature, partner] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("share", [0.01, 0.04, 0.5, 0.95])
def test_all_active_features_of_a_token_count_however_many_there_are(share):
    active = draw(400, 301, share)
    assert active.sum(axis=1).max() > 64 or share < 0.2
    assert_partners(active, *partners_of_all(np.packbits(active, axis=1), 301, 6))


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_where_counting_takes_long_the_sample_is_thinned_evenly(share, monkeypatch):
    active = draw(999, 96, share)
    work = min(np.square(active.sum(axis=1)).sum(), 999 * 96**2 / coactivation.DENSE_SPEEDUP)
    monkeypatch.setattr(coactivation, "PAIRS", work / 2.5)
    assert_partners(active[::3], *partners_of_all(np.packbits(active, axis=1), 96, 6))


def test_without_tokens_every_correlation_is_undefined():
    partners, correlation = partners_of_all(np.zeros((0, 2), np.uint8), 9, 3)
    assert (partners == -1).all()
    assert np.isnan(correlation).all()


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of short stories: the paragraphs of one of the story world."""
    path = tmp_path_factory.mktemp("stories") / "stories.txt"
    path.write_text(storyworld.story(0, 0).text + "\n")
    return path


@pytest.fixture(scope="module")
def found(stories: Path) -> tuple[TopActivations, np.ndarray]:
    """A search of a bundled dictionary of which up to 89 features are active at a token, and the activity."""
    lm = TinyModel("mini")
    rows = open_rows(lm, str(stories), 10)
    return top_activations(lm, "M0", rows), np.asarray(lm["M0"](rows))[lm.config.is_text(rows)] > 0


def test_a_bundled_dictionary_s_partners_are_those_of_its_activity(found):
    result, active = found
    assert active.sum(axis=1).max() > 64
    assert (active.all(axis=0)).any()
    assert_partners(active, result.partners, result.correlation)


def test_the_command_and_the_pages_agree_on_what_is_undefined(found, stories, capsys):
    result, active = found
    always, varies = int(np.argmax(active.all(axis=0))), int(np.argmax(result.partners[:, 0] >= 0))
    assert _partners(result)[always] is None
    listed = _partners(result)[varies]
    assert listed is not None
    assert listed[0][0] == result.partners[varies, 0]
    command = ["top", "--site", "M0", "--feature", str(always), "--data", str(stories)]
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["partners"] is None
    assert cli.main(command) == 0
    assert "active together with: – (undefined: " in capsys.readouterr().out
