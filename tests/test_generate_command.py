"""`tinymodel generate`: edits of features, and text that appears as it is generated."""

import io

import numpy as np
import pytest
from conftest import error_line

from tinymodel_jax.commands import cli
from tinymodel_jax.commands.generate import _print_as_it_grows
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model import interventions
from tinymodel_jax.model.generate import Continued


def ids_of(capsys, story_model, *options):
    arguments = ["generate", "51 56 7", "--ids", "--model", str(story_model), "--n-toks", "6", "--temperature", "0"]
    assert cli.main([*arguments, *options]) == 0
    return [int(word) for word in capsys.readouterr().out.split()]


def test_features_are_steered_and_held_as_by_hand(story_model, capsys):
    lm = TinyModel(story_model)
    ablated, direction = lm["M0"].dictionary, np.asarray(lm["A1"].dictionary.params["W_dec"])
    hooks = interventions.combine(
        interventions.clamp(ablated, [3, 5], np.array([2, 0], np.float32)),
        interventions.steer("blocks.1.hook_attn_out", 9 * direction[1] - 5 * direction[2]),
    )
    options = ["--steer", "A1N1=9", "--steer", "A1N2=-5", "--ablate", "M0N5", "--clamp", "M0N3=2"]
    edited = ids_of(capsys, story_model, *options)
    assert edited == lm.generate_ids([[51, 56, 7]], 6, 0.0, hooks=hooks)[0].tolist()
    assert edited != ids_of(capsys, story_model)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steer", "M2N1"], "--steer M2N1: expected a feature and a number, such as M2N123=4.0"),
        (["--clamp", "M2N1=high"], "--clamp M2N1=high: expected a feature and a number"),
        (["--steer", "M2=1"], "--steer M2=1: M2 is a whole dictionary; name a feature, such as M2N123"),
        (["--ablate", "Q1N1"], "--ablate Q1N1: 'Q1N1' is not a dictionary tag"),
        (["--ablate", "M0N1", "--clamp", "M0N1=1"], "M0N1 is named twice"),
        (["--ablate", "M2N5=1"], "takes no number; give --ablate M2N5, or --clamp M2N5=1."),
    ],
)
def test_an_edit_in_another_form_is_one_line_before_a_model_is_loaded(monkeypatch, capsys, options, says):
    monkeypatch.setattr("tinymodel_jax.lm.TinyModel.__init__", lambda *_, **__: pytest.fail("a model is loaded"))
    assert cli.main(["generate", "Once", *options]) == 1
    assert says in error_line(capsys)


def test_a_feature_that_does_not_exist_is_one_line(story_model, capsys):
    assert cli.main(["generate", "5", "--ids", "--model", str(story_model), "--steer", "M0N24=1"]) == 1
    assert "24" in error_line(capsys)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_the_same_text_in_parts(story_model, capsys, monkeypatch):
    arguments = ["generate", "One day", "Tom", "--model", str(story_model), "--n-toks", "9", "--temperature", "0"]
    assert cli.main(arguments) == 0
    whole = capsys.readouterr().out
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert cli.main(arguments) == 0
    assert terminal.getvalue() == whole


def test_a_character_of_several_tokens_is_printed_when_it_is_complete(lm, capsys, monkeypatch):
    letter = "é".encode()
    monkeypatch.setattr(
        "tinymodel_jax.commands.generate.shown",
        lambda lm, row, ids: bytes(letter[i] if i < 2 else 97 for i in row).decode(errors="replace"),
    )
    printed = []
    rows = [[2, 0], [2, 0, 1], [2, 0, 1, 2]]

    def steps():
        for row in rows:
            yield Continued(np.array([row]), None, np.array([len(row) == 4]))
            printed.append(capsys.readouterr().out)

    _print_as_it_grows(lm, steps(), False)
    assert [*printed, capsys.readouterr().out] == ["a", "é", "a", "\n"]
