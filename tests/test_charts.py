"""Charts show names and tokens unchanged."""

import io

import numpy as np

from tinymodel_jax.analysis.report.charts import bars, effects_figure, heat_map, plot_evaluations

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
