"""Plots show the numbers that analyses return, and notebooks show plots."""

import io

import nbformat
import numpy as np
import pytest
from conftest import DATA
from matplotlib.patches import Rectangle
from PIL import Image

from tinymodel_jax import TinyModel, evaluate
from tinymodel_jax.analysis import direct_logit_attribution, logit_difference, logit_lens, patching, report
from tinymodel_jax.bundled import storyworld

PROMPT = "Once upon a time, there was a girl named Lily."
OTHER = "Once upon a time, there was a boy named Tim."


@pytest.fixture(scope="module")
def stories(story_model) -> TinyModel:
    """A small random model with the story world's tokenizer."""
    return TinyModel(story_model)


def drawn(axes) -> np.ndarray:
    """Return the numbers behind a heat map."""
    return np.asarray(axes.images[0].get_array())


def words(axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_the_lens_shows_the_most_likely_token_and_its_probability_in_every_cell(stories):
    figure = report.plot_logit_lens(stories, PROMPT)
    logprobs = logit_lens(stories, PROMPT).logprobs[:, 0]  # streams, positions, tokens
    axes = figure.axes[0]
    np.testing.assert_allclose(drawn(axes), np.exp(logprobs.max(axis=-1)).T, rtol=1e-5)
    shown = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    assert set(shown) == {(stream, place) for stream in range(3) for place in range(logprobs.shape[1])}
    for (stream, place), text in shown.items():
        token = stories.to_string(logprobs[stream, place].argmax()).strip(" ").replace("\n", "↵") or "␣"
        assert text == token or token.startswith(text.removesuffix("…"))
    assert words(axes)[:3] == ["0 [BEGIN]", "1 Once", "2 upon"]


def test_the_lens_draws_chosen_positions_with_their_numbers(stories):
    figure = report.plot_logit_lens(stories, PROMPT, positions=slice(-2, None))
    n = stories.to_tokens(PROMPT).shape[1]
    assert [word.split()[0] for word in words(figure.axes[0])] == [str(n - 2), str(n - 1)]
    with pytest.raises(ValueError, match="chooses none of"):
        report.plot_logit_lens(stories, PROMPT, positions=slice(100, None))
    with pytest.raises(ValueError, match="draws one text, got 2"):
        report.plot_logit_lens(stories, [PROMPT, OTHER])


def test_patching_is_drawn_by_layer_or_by_head_and_position(stories):
    tokens = stories.to_str_tokens(PROMPT)
    metric = logit_difference(" Lily", " Tim")
    found = patching.patch(stories, PROMPT, OTHER, ["hook_resid_pre", "attn.hook_z"], metric=metric)
    positions, heads, _ = report.plot_patching(found, tokens, "title").axes
    np.testing.assert_array_equal(drawn(positions), found.tables[0].effects)
    assert (len(positions.get_xticklabels()), words(heads)) == (len(tokens), ["layer 0", "layer 1"])
    every = patching.patch(stories, PROMPT, OTHER, "attn.hook_z", metric=metric, each_position=True)
    axes = report.plot_patching(every, tokens).axes[0]
    assert words(axes) == ["L0H0", "L0H1", "L1H0", "L1H1"]
    np.testing.assert_array_equal(drawn(axes)[2], every.tables[0].effects[1, 0])
    with pytest.raises(ValueError, match="got 2 tokens for prompts of"):
        report.plot_patching(found, ["a", "b"])


def test_the_bars_of_an_attribution_sum_to_the_logit(stories):
    found = direct_logit_attribution(stories, [PROMPT, OTHER], [" Lily", " Tim"], ["M1"])
    bars = report.plot_attribution(found, 0, 1, row=1, position=3, parts=4)
    widths = [bar.get_width() for bar in bars.axes[0].patches if isinstance(bar, Rectangle)]
    logits = np.asarray(stories.logits([PROMPT, OTHER]))[1, 3, found.tokens]
    assert len(widths) == 5
    assert sum(widths) == pytest.approx(logits[0] - logits[1], abs=1e-4)
    assert abs(widths[0]) == max(map(abs, widths[:4]))
    assert f"{len(found.labels) - 4} others" in words(bars.axes[0])
    whole = report.plot_attribution(found, 1, parts=len(found.labels))
    assert len(whole.axes[0].patches) == len(found.labels)


def test_pareto_fronts_take_evaluations_and_records(stories):
    rows = [story.text for story in storyworld.stories(0, 2)]
    found = evaluate(stories, ["M0", "M1"], rows)
    figure = report.plot_pareto({"MLPs": found})
    assert [axes.get_ylabel() for axes in figure.axes] == ["explained variance", "CE recovered"]
    line = figure.axes[0].lines[0]
    assert sorted(np.asarray(line.get_xdata()).tolist()) == sorted(one.l0 for one in found)
    records = [{"site": "M0", "results": {"l0": 8.0, "explained_variance": 0.9}}]
    assert len(report.plot_pareto(records).axes) == 1
    with pytest.raises(ValueError, match="there are no records"):
        report.plot_pareto([])


def test_a_picture_in_a_notebook_is_small_and_says_what_it_shows(stories):
    png, metadata = report.plot_logit_lens(stories, PROMPT)._repr_png_()
    assert len(png) < 60_000
    assert "most likely next token" in metadata["alt"]
    assert Image.open(io.BytesIO(png)).size[0] > 400


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the Jupyter packages
@pytest.mark.parametrize("before", ["", "import matplotlib.pyplot"])
def test_a_notebook_shows_a_figure_with_and_without_pyplot(before):
    from nbclient import NotebookClient

    code = f"""{before}
from tinymodel_jax.analysis.report import plot_pareto
plot_pareto([{{"site": "M2", "results": {{"l0": 8.0, "explained_variance": 0.9}}}}])"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": DATA}}).execute()
    shown = [output for output in notebook.cells[0].outputs if "image/png" in output.get("data", {})]
    assert len(shown) == 1
