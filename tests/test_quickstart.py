"""`tinymodel quickstart`, run whole on the bundled model, and its page in a real browser."""

import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from browsers import chromium, needs_browser, problems
from command_lines import command_lines
from command_lines import run as run_command
from conftest import as_users_run_it
from rich.console import Console

from tinymodel_jax.analysis.report.charts import training_curve
from tinymodel_jax.analysis.report.page import write_page
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.commands import cli, quickstart, quickstart_page, quickstart_steps
from tinymodel_jax.commands.quickstart_steps import Amounts, Named
from tinymodel_jax.lm import TinyModel

SMALL = Amounts(
    labelled=8,
    held_out=8,
    trained_stories=32,
    steps=4,
    batch=256,
    stories_per_step=4,
    scored=(quickstart_steps.TRAINED,),
)


class Run(NamedTuple):
    """The results of a run."""

    page: Path
    text: str
    """What was printed."""
    content: dict[str, Any]
    """What the page was made from."""


def already_trained(lm: TinyModel, *rest: Any) -> dict[str, Any]:
    """Return what `train_transcoder` returns, with the bundled dictionary as the one just trained."""
    del rest
    numbers = {"l0": 21.0, "explained_variance": 0.9, "ce_recovered": 0.8, "dead_fraction": 0.294}
    rows = [{"name": name, **numbers} for name in (quickstart_steps.JUST_NOW, "bundled")]
    dictionary = lm[quickstart_steps.TRAINED].dictionary
    chart = training_curve([1, 2], [0.1, 0.9], [28.0, 28.0])
    return {"sentence": "No step was taken.", "chart": chart, "rows": rows, "dictionary": dictionary}


def run_small(out: Path, train: bool) -> Run:
    """Run all steps, on fewer stories."""
    content: dict[str, Any] = {}

    def write(path: Path, template: str, found: Mapping[str, Any]) -> None:
        content.update(found)
        write_page(path, template, found)

    console = Console(record=True, width=100, file=io.StringIO())
    with pytest.MonkeyPatch.context() as patch, as_users_run_it(), jax.numpy_dtype_promotion("standard"):
        patch.setattr(quickstart_page, "write_page", write)
        page = quickstart.run_quickstart(out, 3, train, console, " --seed 3", SMALL)
    return Run(page, console.export_text(), content)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart_steps, "train_transcoder", already_trained)  # a slow test trains
        return run_small(tmp_path_factory.mktemp("quickstart"), train=True)


def test_every_step_shows_something_and_the_last_line_is_what_to_run_next(run):
    text = run.text
    for step in (1, 2, 3, 4, 6):
        assert f"{step} · " in text
    assert str(run.page) in text.replace("\n", "")
    assert "Once upon a time" in text
    assert re.search(r"trained just now: L0 \d", text)
    assert all(command in text for command in quickstart.next_commands())


SMALLER = {
    "generate": "generate --n-toks 2",
    "--limit 20000": "--limit 100 --valid-fraction 0.1 --workers 1",
    "--sites M0,M1 --k 8,16": "--sites M0 --k 8",
    "--n-features 1024 --steps 200": "--n-features 32 --steps 2 --batch-size 256",
    "concepts": "concepts --stories 4",
}
"""Parts of the next commands, and their replacements in the test."""


def test_the_next_commands_hold_every_part_that_is_made_smaller():
    assert [part for part in SMALLER if part not in " ".join(quickstart.next_commands())] == []


@pytest.mark.slow
def test_the_next_commands_run(tmp_path, monkeypatch, standard_promotion, no_type_checks, capsys):
    monkeypatch.chdir(tmp_path)
    for command in quickstart.next_commands():
        for words in command_lines(command):
            run_command(words, SMALLER)
    assert "│ M0 " in capsys.readouterr().out


def test_the_next_commands_begin_as_the_shell_finds_the_programs(tmp_path, monkeypatch):
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "tinymodel"):
        (folder / name).touch(0o755)
    monkeypatch.setattr(quickstart.sys, "executable", str(folder / "python3"))
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.chdir(tmp_path)
    generate, _, train = quickstart.next_commands()
    assert generate.startswith(".venv/bin/tinymodel generate ")
    assert [part.split(" -")[0] for part in train.split(" && ")] == [
        ".venv/bin/python",
        ".venv/bin/python",
        ".venv/bin/tinymodel concepts",
    ]
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)  # an environment that is active
    generate, _, train = quickstart.next_commands()
    assert generate.startswith("tinymodel generate ")
    assert train.startswith("python -m train ")
    (folder / "tinymodel").unlink()
    assert quickstart.next_commands()[0].startswith("python -m tinymodel_jax generate ")


def test_the_page_is_one_file_that_asks_for_nothing(run):
    html = run.page.read_text("utf-8")
    links = re.findall(r"""(?:src|href|url\()=?["']?([^"'\s>)]*)""", html)
    assert {link for link in links if not link.startswith(("#", "data:"))} == set()
    assert "tinymodel quickstart --seed 3" in html


def test_the_page_says_what_the_run_found(run):
    html = run.page.read_text("utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])  # type: ignore[index]
    assert len(data["tokens"]) == html.count('class="token"')
    for number, features in enumerate(data["tokens"]):
        for feature, activation in features:
            known = data["features"][str(feature)]
            assert known["activity"][str(number)] == pytest.approx(activation, abs=2e-3)
            assert known["concept"] in storyworld.CONCEPTS


def test_text_is_shown_as_text(tmp_path, run):
    content = run.content | {"tokens": ["<script>alert(1)</script>"]}
    write_page(tmp_path / "page.html", "quickstart.html.jinja", content)
    assert "&lt;script&gt;alert(1)" in (tmp_path / "page.html").read_text("utf-8")


def test_a_page_without_training_has_the_other_parts(tmp_path, run):
    write_page(tmp_path / "page.html", "quickstart.html.jinja", run.content | {"training": None})
    html = (tmp_path / "page.html").read_text("utf-8")
    assert "A transcoder trained from scratch" not in html
    assert "Which concepts were found" in html


@pytest.mark.slow
def test_a_run_trains_a_transcoder_unless_it_is_told_not_to(tmp_path):
    whole, without = (run_small(tmp_path, train) for train in (True, False))
    assert "5 · A transcoder from scratch" in whole.text
    assert re.search(r"trained just now: L0 28.*, explained variance ", whole.text)
    assert "5 · " not in without.text
    assert without.content["training"] is None


def test_each_feature_is_a_closed_row_with_its_histogram_and_the_tokens_it_promotes(run):
    features = run.content["features"]
    html = run.page.read_text("utf-8")
    assert html.count('<details class="card"') == len(features)
    assert '<details class="card" open' not in html
    lm = TinyModel("mini")
    effects = lm["Rm2"].dictionary.params["W_dec"] @ lm.params["W_U"]
    effects = np.asarray(effects - effects.mean(axis=1, keepdims=True))
    for one in features:
        assert sum(one["histogram"]) == one["active"] > 0
        best = np.sort(effects[one["id"]])[::-1][:3]
        assert [logits for _, logits in one["promoted"]] == pytest.approx(best.tolist(), rel=1e-3)


def named(f1: list[float]) -> Named:
    nothing = np.zeros((1, 1))
    return Named(nothing, nothing, nothing, ["word.the"] * len(f1), np.array(f1), np.ones(len(f1)))


def test_the_page_opens_with_the_named_feature_that_colours_most_of_at_most_a_third_of_the_story():
    acts = np.array([[9, 2, 0, 1, 0], [9, 4, 1, 0, 0], [9, 0, 3, 0, 0], [0] * 5, [0] * 5, [0] * 5, [0] * 5], float)
    tokens = [[(f, a) for f, a in enumerate(row) if a > 0] for row in acts.tolist()]
    assert quickstart_page.opening(named([0.9, 0.8, 0.7, 0.9, 0.9]), tokens, acts) == (1, 1)  # 0 colours too much
    assert quickstart_page.opening(named([0.9, 0.4, 0.7, 0.4, 0.9]), tokens, acts) == (2, 2)
    assert quickstart_page.opening(named([0.9, 0.4, 0.4, 0.4, 0.9]), tokens, acts) == (0, 0)
    assert quickstart_page.opening(named([0.4] * 5), tokens, acts) is None
    unlisted = [[(0, 9.0)], *([] for _ in acts[1:])]
    assert quickstart_page.opening(named([0.5, 0.9, 0.9, 0.9, 0.9]), unlisted, acts) == (0, 0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@needs_browser
@pytest.mark.parametrize("width", [1000, 400])
def test_the_page_works_in_a_browser(run, browser, width):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.set_window_size(width, 900)
    browser.get(run.page.as_uri())
    for name in ("story", "edit", "sweep", "training", "concepts", "features", "next"):
        assert browser.find_element(By.ID, name).is_displayed()
    assert len(browser.find_elements(By.CSS_SELECTOR, "svg.chart")) == 3
    tokens, panel = browser.find_elements(By.CSS_SELECTOR, ".token"), browser.find_element(By.ID, "panel")

    token, feature = run.content["data"]["opening"]  # the story is coloured before anything is chosen
    assert float(browser.execute_script("return arguments[0].style.getPropertyValue('--strength')", tokens[token])) == 1
    assert f"coloured by the activation of feature {feature}: " in panel.text
    assert panel.find_element(By.CSS_SELECTOR, "[aria-pressed=true]").get_attribute("data-feature") == str(feature)
    wrapped = """return [...document.querySelectorAll("td")].filter((cell) => {
      const text = document.createRange();
      text.selectNodeContents(cell);
      return new Set([...text.getClientRects()].map((box) => box.top)).size > 1;
    }).length"""
    assert browser.execute_script(wrapped) == 0

    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[5])
    ActionChains(browser).move_to_element(tokens[5]).perform()  # hover
    assert tokens[5].text.strip() in panel.text
    assert "feature " in panel.text

    tokens[2].click()
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()  # the keyboard alone
    assert browser.switch_to.active_element == tokens[3]
    assert tokens[3].get_attribute("aria-selected") == "true"

    strongest = panel.find_element(By.CSS_SELECTOR, ".feature")
    if strongest.get_attribute("aria-pressed") == "false":
        ActionChains(browser).send_keys(Keys.ENTER).perform()  # the strongest feature colours the story
    assert strongest.get_attribute("aria-pressed") == "true"
    strength = browser.execute_script("return arguments[0].style.getPropertyValue('--strength')", tokens[3])
    assert float(strength) > 0

    fits = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert browser.execute_script(fits)
    assert problems(browser) == []


def centre(driver: Any, element: Any) -> tuple[int, int]:
    """Return where an element's middle is in the window."""
    script = """const box = arguments[0].getClientRects()[0];
    return [box.left + box.width / 2, box.top + box.height / 2].map(Math.round)"""
    x, y = driver.execute_script(script, element)
    return x, y


@needs_browser
def test_the_pointer_reaches_the_features_of_a_word_over_other_words(run, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.set_window_size(1000, 900)
    browser.get(run.page.as_uri())
    tokens, panel = browser.find_elements(By.CSS_SELECTOR, ".token"), browser.find_element(By.ID, "panel")
    number = next(i for i, features in enumerate(run.content["data"]["tokens"]) if i > 3 and len(features) > 1)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[number])
    tokens[number].click()
    heading, button = panel.text.splitlines()[1], panel.find_elements(By.CSS_SELECTOR, ".feature")[1]

    (x, y), (to_x, to_y) = centre(browser, tokens[number]), centre(browser, button)
    crossed = [[round(a + (b - a) * part / 20) for a, b in ((x, to_x), (y, to_y))] for part in range(21)]
    over = "return document.elementFromPoint(...arguments)?.closest('.token')?.dataset.index"
    assert {browser.execute_script(over, *place) for place in crossed} - {None, str(number)}  # else nothing is tested
    path = ActionChains(browser, duration=10)
    for (x, y), (next_x, next_y) in itertools.pairwise(crossed):
        path.move_by_offset(next_x - x, next_y - y)
    path.click().perform()
    assert heading.startswith("Features at ")
    assert panel.text.splitlines()[1] == heading
    assert button.get_attribute("aria-pressed") == "true"

    ActionChains(browser).send_keys(Keys.ESCAPE).move_to_element(tokens[number - 1]).perform()
    assert tokens[number - 1].get_attribute("aria-selected") == "true"  # released: the pointer selects again
    tokens[number].click()
    tokens[number].click()
    ActionChains(browser).move_to_element(tokens[number - 1]).perform()
    assert tokens[number - 1].get_attribute("aria-selected") == "true"  # a second click lets go too


@needs_browser
def test_a_finger_and_the_keyboard_alone_choose_words_and_features(run, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.set_window_size(400, 757)
    browser.get(run.page.as_uri())
    tokens, panel = browser.find_elements(By.CSS_SELECTOR, ".token"), browser.find_element(By.ID, "panel")

    def tap(element: Any) -> None:
        fingers = ActionBuilder(browser, mouse=PointerInput("touch", "finger"))
        fingers.pointer_action.move_to_location(*centre(browser, element)).pointer_down().pointer_up()
        fingers.perform()

    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[4])
    tap(tokens[4])
    assert tokens[4].get_attribute("aria-selected") == "true"
    assert panel.rect["height"] <= 0.45 * browser.execute_script("return innerHeight") + 1
    button = panel.find_element(By.CSS_SELECTOR, ".feature")
    tap(button)
    assert button.get_attribute("aria-pressed") == "true"

    browser.execute_script("arguments[0].focus()", tokens[4])
    before = browser.execute_script("return scrollY")
    ActionChains(browser).send_keys(Keys.SPACE).perform()  # the same feature again: its colours go
    assert button.get_attribute("aria-pressed") == "false"
    assert browser.execute_script("return scrollY") == before
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT, Keys.TAB, Keys.TAB, Keys.ENTER).perform()
    pressed = [one.get_attribute("aria-pressed") for one in panel.find_elements(By.CSS_SELECTOR, ".feature")]
    assert pressed.index("true") == 1


def test_no_two_parts_of_the_page_have_one_id(run):
    ids = re.findall(r'\bid="([^"]*)"', run.page.read_text("utf-8"))
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]*)', run.page.read_text("utf-8")))
    assert used
    assert used <= set(ids)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--seed", "-1"], "--seed -1: seeds are 0 to"),
        (["--out", f"{__file__}/page"], "cannot be made: Not a directory"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, problem, capsys):
    assert cli.main(["quickstart", *arguments]) == 1
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
