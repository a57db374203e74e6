"""Charts show names and tokens unchanged."""

import io
import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tinymodel_jax.analysis.concepts.labels import ConceptScores
from tinymodel_jax.analysis.concepts.recovery import Recovery, concept_table
from tinymodel_jax.analysis.report.charts import (
    bars,
    draw_pareto,
    effects_figure,
    heat_map,
    plot_evaluations,
    training_curve,
)
from tinymodel_jax.bundled import storyworld

DOLLARS = "$$ a $5_b$"
"""What Matplotlib would take for formulas, the first of which is an error."""


def test_a_dollar_begins_no_formula():
    table = np.full((2, 1), 0.5)
    figure = effects_figure({"hook_resid_pre": table}, {"hook_resid_pre": [DOLLARS]}, DOLLARS)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    assert drawn.getvalue().count(f"<!-- {DOLLARS} -->") == 2  # the label and the title
    assert heat_map(table, [DOLLARS, "other"], [DOLLARS], "title").count(f">{DOLLARS}<") == 2
    assert bars({DOLLARS: 1.0}, DOLLARS, "title").count(f">{DOLLARS}<") == 2


def test_a_dictionary_is_called_as_its_folder_in_the_legend(tmp_path):
    density = {"log10_edges": [-1, -0.5, 0], "features": [1, 2], "dead": 0}
    results = {"l0": 2.0, "explained_variance": 0.5, "ce_recovered": 0.5}
    record = {"name": DOLLARS, "site": "M1", "results": results, "density": density}
    plot_evaluations([record], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("l0s", [[8.1, 9, 11.5], [15.9, 16.3], [8, 16, 31], [3, 20, 210], [0.02, 5, 3000], [16.0]])
def test_the_labels_of_l0_are_plain_numbers_that_do_not_overlap(l0s):
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    results = [{"l0": l0, "ev": place} for place, l0 in enumerate(l0s)]
    draw_pareto(axes, [{"site": "M1", "results": one} for one in results], "ev", "")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    low, high = axes.get_xlim()
    labels = [label for label in axes.get_xticklabels(which="both") if low <= label.get_position()[0] <= high]
    assert [float(label.get_text()) for label in labels] == pytest.approx([one.get_position()[0] for one in labels])
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    assert 2 <= len(boxes) <= 10
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))


def test_a_constant_l0_is_left_out_of_the_training_curve():
    assert "L0 (active" not in training_curve([1, 2], [0.1, 0.2], [8.0, 8.0])
    assert "L0 (active features per token)" in training_curve([1, 2], [0.1, 0.2], [8.0, 7.0])


def test_a_concept_without_a_score_has_no_row():
    f1 = np.full((2, len(storyworld.CONCEPTS)), np.nan)
    f1[:, 3], f1[0, 5] = 0.25, 0.75
    scores = [ConceptScores(*[one] * 6) for one in f1]
    table, rows, columns = concept_table([Recovery(f"M{i}", "dictionary", i, 1, one) for i, one in enumerate(scores)])
    names = list(storyworld.CONCEPTS)
    assert (rows, columns) == ([names[5], names[3]], ["M0", "M1"])
    np.testing.assert_array_equal(table, [[0.75, np.nan], [0.25, 0.25]])
