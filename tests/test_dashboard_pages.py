"""The pages of a dashboard in a real browser: of the bundled model, and of 25,000 features."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import chromium, needs_browser, open_and_wait, problems, texts, wait
from conftest import as_users_run_it

from tinymodel_jax.analysis.effects.importance import CausalImportance, MeanEffect
from tinymodel_jax.analysis.report.dashboard.build import (
    A_SHARD,
    Heading,
    LinkedTokens,
    write_front,
    write_links,
    write_measured,
)
from tinymodel_jax.analysis.report.dashboard.folders import GENERATOR
from tinymodel_jax.analysis.report.dashboard.records import Facts
from tinymodel_jax.analysis.report.dashboard.weights_graph import Links, WeightsGraph
from tinymodel_jax.analysis.report.dashboard.windows import AFTER, BEFORE, shown_contexts
from tinymodel_jax.analysis.search.contexts import Contexts
from tinymodel_jax.analysis.search.logit_effects import LogitEffects
from tinymodel_jax.analysis.search.top_activations import TopActivations
from tinymodel_jax.commands import cli
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.neighbours import Neighbours
from tinymodel_jax.lm import TinyModel

pytestmark = needs_browser
MANY, VOCABULARY, ROWS, SEQ = 25_000, 10_000, 300, 64
HOSTILE = "<script>document.title = 'broken into'</script>"
TEXT = "Once upon a time, a fox was sad."
STRENGTHS = "return [...document.querySelectorAll('.token')].map((t) => Number(t.style.getPropertyValue('--strength')))"
FIRST_CONTEXT = "return [...document.querySelector('.context').querySelectorAll('.token')].map((t) => t.textContent)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dashboard of the bundled model that replaced an older one."""
    out = tmp_path_factory.mktemp("mini") / "pages"
    (out / "data").mkdir(parents=True)
    (out / "data/shard-0999.js").touch()
    (out / "index.html").write_text(GENERATOR)
    options = ["--site", "M2", "--model", "mini", "--limit", "8", "--with", "M1,Rm3"]
    with as_users_run_it():
        assert cli.main(["dashboard", *options, "--text", TEXT, "-o", str(out)]) == 0
    assert not (out / "data/shard-0999.js").exists()
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dashboard of sixty invented features without concepts, with effects that were measured on one row."""
    out = tmp_path_factory.mktemp("plain")
    facts, rows = invented(60)
    effect = MeanEffect(np.random.default_rng(1).gamma(0.5, 0.01, 60), np.full(60, np.nan))
    stream = np.zeros((60, 1), np.float32)
    importance = CausalImportance(1, np.ones(60, int), effect, effect, effect, effect, stream)
    words = [f" word{i}" for i in range(VOCABULARY)]
    facts = dataclasses.replace(facts, importance=importance)
    write(out, facts, rows, words)
    return out


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two stories."""
    file = tmp_path_factory.mktemp("stories") / "stories.txt"
    file.write_text("Once upon a time, a cat was happy.\nThe dog ran home.\n")
    return file


@pytest.fixture(scope="module")
def pair(story_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of dashboards of two dictionaries of a small model."""
    out = tmp_path_factory.mktemp("pair") / "pages"
    options = ["--site", "M0,M1", "--model", str(story_model), "--data", str(stories), "--with", "A1"]
    with as_users_run_it():
        assert cli.main(["dashboard", *options, "--text", TEXT, "-o", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def queries(story_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dashboard of random directions of queries, which have no logit effects."""
    folder = tmp_path_factory.mktemp("queries")
    np.save(folder / "rows.npy", np.random.default_rng(0).normal(size=(5, 16)))
    options = ["--site", "blocks.1.attn.hook_q", "--directions", str(folder / "rows.npy")]
    with as_users_run_it():
        given = [*options, "--model", str(story_model), "--data", str(stories), "-o", str(folder / "pages")]
        assert cli.main(["dashboard", *given]) == 0
    return folder / "pages"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dashboard of 25,000 invented features of a vocabulary of 10,000, one token of which is hostile.

    It has only the feature pages that the tests open.
    """
    out = tmp_path_factory.mktemp("many")
    facts, rows = invented(MANY)
    words = [HOSTILE, *(f" word{i}" for i in range(1, VOCABULARY))]
    opened = {feature // A_SHARD for feature in (7, 64, 12345)}

    def track(things: Sequence[Any], what: str) -> Sequence[Any]:
        return [shard for shard in things if shard[0] in opened] if what == "pages" else things

    write(out, facts, rows, words, track)
    return out


def write(out: Path, facts: Facts, rows: np.ndarray, words: list[str], track: Any = lambda things, _: things) -> None:
    heading, config = Heading("a model", "M2", "about", ()), ModelConfig(d_vocab=VOCABULARY)
    write_measured(out, heading, facts, rows, words, config, {}, [], track)
    write_front(out, heading)
    n = facts.found.n_features
    listed = Links(facts.found.partners, facts.found.correlation)
    graph = WeightsGraph({"M0": listed}, {"M3": listed})
    words_of = facts.logits.promoted[:, :3] if facts.logits else np.zeros((n, 0), np.int32)
    write_links(out, LinkedTokens(graph, {"M0": words_of, "M3": words_of}), n, track)


def invented(n: int) -> tuple[Facts, np.ndarray]:
    """Return facts of features that no model has; feature 7 and every hundredth are never active on text.

    Feature 7 has an effect, as if it were active on [BEGIN]. Feature 13 is active, but at none of the tokens that the
    histogram is of.
    """
    rng = np.random.default_rng(0)
    rows = rng.integers(0, VOCABULARY, (ROWS, SEQ))
    shape = (n, 6)
    value = -np.sort(-rng.gamma(2, 1, shape).astype(np.float32), axis=1)
    row, position = (rng.integers(0, size, shape).astype(np.int32) for size in (ROWS, SEQ))
    histogram = rng.integers(0, 50, (n, 32))
    for dead in [7, *range(100, n, 100)]:
        value[dead], row[dead], histogram[dead] = 0, -1, 0
    histogram[13] = 0
    rows[row[12, 0], position[12, 0]] = 0
    top = Contexts(value, row, position)
    partners = rng.integers(0, n, (n, 5)).astype(np.int32)
    phi = rng.random((n, 5)).astype(np.float32)
    found = TopActivations(
        tag="M2",
        data="",
        model="",
        dictionary="",
        n_rows=ROWS,
        n_tokens=ROWS * SEQ,
        histogram=histogram,
        histogram_every=9,
        active=np.where(np.arange(n) == 13, 5, histogram.sum(axis=1)),
        total=histogram @ np.ones(32),
        top=top,
        sampled=top,
        partners=partners,
        correlation=phi,
    )
    tokens = rng.integers(0, VOCABULARY, (n, 5)).astype(np.int32)
    logits = LogitEffects(np.arange(n), tokens, phi, tokens, -phi)
    contexts = shown_contexts(found)
    acts = np.zeros((*contexts.row.shape, BEFORE + 1 + AFTER), np.float32)
    acts[..., BEFORE] = contexts.value
    effect = MeanEffect(*(np.where(np.arange(n) == 7, number, 0) for number in (0.5, 0.25)))
    importance = CausalImportance(
        8, np.where(np.arange(n) == 7, 2, 0), effect, effect, effect, effect, np.zeros((n, 1), np.float32)
    )
    return Facts(found, contexts, acts, logits, Neighbours(partners, phi), importance=importance), rows


def open_page(browser: Any, page: Path, address: str = "") -> None:
    """Load a page anew, and wait until it shows what it was asked for."""
    open_and_wait(browser, page / "index.html", address, "main")


def go(browser: Any, address: str) -> None:
    """Follow a link to a feature."""
    browser.execute_script("location.hash = arguments[0]", address)
    heading = f"feature {address.removeprefix('#feature/')}"
    wait(browser, f"document.querySelector('h1').textContent.endsWith('{heading}')")


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def test_25_000_features_are_painted_sorted_and_searched_in_two_seconds(many, browser):
    open_page(browser, many)
    paint = "return performance.getEntriesByName('first-contentful-paint')[0].startTime"
    shown = "return performance.now()"
    assert browser.execute_script(paint) < 2000
    assert browser.execute_script(shown) < 2000  # from the navigation to the table
    assert texts(browser, "#count") == ["24,750 of 25,000 features"]
    assert len(texts(browser, "#features tbody tr")) == 50

    timed = """
      const start = performance.now();
      document.querySelector('th[data-column="largest"] button').click();
      const sorted = performance.now();
      const find = document.getElementById("find");
      find.value = "word77";
      find.dispatchEvent(new Event("input"));
      return [sorted - start, performance.now() - sorted];
    """
    assert max(browser.execute_script(timed)) < 2000
    assert all(" word77" in row for row in texts(browser, "#features tbody tr"))
    largest = [float(text) for text in texts(browser, "#features td:nth-child(3)")]
    assert largest == sorted(largest, reverse=True)
    assert problems(browser) == []


def test_a_link_to_a_feature_loads_its_files_alone(many, browser):
    open_page(browser, many, "#feature/12345")
    assert texts(browser, "h1") == ["M2 feature 12345"]
    loaded = "return [...document.querySelectorAll('script[src]')].map((s) => s.getAttribute('src'))"
    assert sorted(browser.execute_script(loaded)) == [
        "data/graphs.js",
        "data/index.js",
        "data/links-0192.js",
        "data/shard-0192.js",
        "data/vocabulary.js",
    ]
    assert browser.execute_script("return performance.now()") < 2000
    assert problems(browser) == []


def test_a_token_is_text_whatever_it_says(many, browser):
    open_page(browser, many, "#feature/12")
    assert HOSTILE in texts(browser, ".token")
    assert browser.title == "M2 feature 12 · M2"
    open_page(browser, many, "#?find=broken")
    assert any(HOSTILE in text for text in texts(browser, ".word"))
    assert "broken" not in browser.title
    assert problems(browser) == []


def test_features_that_were_never_active_on_text_are_there_when_asked_for(many, browser):
    open_page(browser, many, "#?show=dead")
    assert texts(browser, "#count") == ["250 of 25,000 features"]
    go(browser, "#feature/7")
    assert "Never active on the text of these rows; [BEGIN] and [END] do not count." in texts(browser, "main")[0]
    assert "over the 2 where it is active (95 % intervals; [BEGIN] and [END] count here)" in texts(browser, "main")[0]
    assert "Strongest contexts" not in texts(browser, "main")[0]
    assert problems(browser) == []


def test_effects_of_one_row_have_no_interval_to_speak_of(plain, browser):
    open_page(browser, plain, "#?sort=-effect")
    first = texts(browser, "#features tbody td")[0]
    go(browser, f"#feature/{first}")
    said = texts(browser, ".numbers dd")[-1]
    assert "nats per position over 1 row; KL +" in said
    assert said.endswith(" nats over the one where it is active ([BEGIN] and [END] count here)")
    assert "±" not in said
    assert "Measured on 19,200 tokens of 300 rows." in " ".join(texts(browser, "header p")[0].split())
    assert problems(browser) == []


def test_the_search_speaks_of_concepts_only_where_there_are_some(plain, mini, browser):
    hint = "return document.getElementById('find').placeholder + document.getElementById('find').ariaLabel"
    open_page(browser, plain)
    assert "concept" not in browser.execute_script(hint) + texts(browser, "main")[0]
    open_page(browser, mini)
    assert browser.execute_script(hint).count("number, concept or token") == 2


def test_a_column_s_numbers_have_the_same_decimals(plain, mini, many, browser):
    for page, columns in ((plain, "density largest effect"), (mini, "density largest F1"), (many, "density largest")):
        open_page(browser, page)
        for name in columns.split():
            label = {"effect": "effect (nats)", "largest": "largest activation"}.get(name, name)
            shown = texts(browser, f"#features td[data-label='{label}']")
            numbers = [text.removesuffix(" %") for text in shown if text not in ("≈ 0", "≈ 0 %")]
            assert len(numbers) > 10
            assert len({len(text.partition(".")[2]) for text in numbers}) == 1
    open_page(browser, plain, "#feature/3")
    assert "e-" not in " ".join(texts(browser, "dd") + texts(browser, "td"))
    assert problems(browser) == []


def test_small_and_large_numbers_are_written_alike(mini, browser):
    open_page(browser, mini)
    values = [0, 0.000143, 0.001284, 0.02, -1.23456, 12.3456, 1234.56, 3e-8]
    shown = browser.execute_script("return arguments[0].map(number)", values)
    assert shown == ["0", "0.000143", "0.001284", "0.02", "-1.235", "12.35", "1235", "≈ 0"]


def test_on_a_phone_nothing_of_the_table_is_cut(plain, mini, many, pair, queries, browser):
    size = {"width": 360, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.get((pair / "index.html").as_uri())
        assert fits(browser)
        own = [(page, address) for page in (plain, mini, many) for address in ("", "#?find=word0", "#feature/12")]
        for page, address in [*own, (pair / "M1", ""), (pair / "M1", "#feature/3"), (queries, "#feature/3")]:
            open_page(browser, page, address)
            assert fits(browser)
            outside = """
              const width = document.documentElement.clientWidth;
              const parts = document.querySelectorAll("td, th, .word, input, select");
              const isOutside = (e) => e.getBoundingClientRect().right > width + 0.5;
              return [...parts].filter(isOutside).map((e) => e.textContent);
            """
            assert browser.execute_script(outside) == []
        open_page(browser, mini)
        assert texts(browser, "#features tbody tr:first-child td")[0].isdecimal()
        browser.execute_script("document.querySelector('th[data-column=\"F1\"] button').click()")
        assert texts(browser, "th[aria-sort=descending]") == ["F1"]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert problems(browser) == []


def test_a_histogram_of_some_tokens_says_so_and_is_left_out_where_it_counts_none(many, browser):
    open_page(browser, many, "#feature/14")
    assert "counting one token in 9" in texts(browser, ".ends")[0]
    go(browser, "#feature/13")
    assert texts(browser, ".histogram") == []
    assert "Strongest contexts" in texts(browser, "main")[0]
    assert problems(browser) == []


def test_what_is_not_there_is_said(many, browser):
    open_page(browser, many, "#feature/25000")
    assert texts(browser, "[role=alert]") == ["There is no feature 25000; features are numbered 0 to 24999."]
    moved = many / "data/shard-0001.js"
    moved.rename(many / "data/away.js")
    open_page(browser, many, "#feature/64")
    assert "data/shard-0001.js is missing" in texts(browser, "[role=alert]")[0]
    (many / "data/away.js").rename(moved)
    go(browser, "#feature/65")
    assert len(problems(browser)) == 1  # the missing file


def test_the_keyboard_alone_finds_opens_and_goes_back(mini, browser):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, mini)
    press(browser, "/", "i", "n", "g")
    wait(browser, "document.getElementById('find').value === 'ing'")
    features = texts(browser, "#features tbody td:first-child")
    assert 1 < len(features) < 51
    press(browser, Keys.ENTER)  # opens the first
    wait(browser, f"document.querySelector('h1').textContent === 'M2 feature {features[0]}'")
    assert browser.execute_script("return document.activeElement.tagName") == "H1"
    browser.back()
    wait(browser, "document.getElementById('find')")
    assert browser.execute_script("return document.getElementById('find').value") == "ing"
    assert browser.switch_to.active_element.text == features[0]
    press(browser, Keys.ARROW_DOWN)
    assert browser.switch_to.active_element.text == features[1]
    press(browser, Keys.ENTER)
    wait(browser, f"document.querySelector('h1').textContent === 'M2 feature {features[1]}'")
    press(browser, "/")
    wait(browser, "document.activeElement.id === 'find'")
    assert problems(browser) == []


@pytest.mark.parametrize("width", [1000, 400])
def test_a_feature_page_tells_each_activation(mini, browser, width):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.set_window_size(width, 900)
    open_page(browser, mini, "#?sort=-F1")
    assert texts(browser, "th[aria-sort=descending]") == ["F1"]
    first = texts(browser, "#features tbody td")[0]
    assert fits(browser)
    go(browser, f"#feature/{first}")
    wait(browser, "document.querySelector('.context')")
    assert texts(browser, "h2") == [
        "Strongest contexts",
        "Contexts at all levels",
        "What it promotes and suppresses",
        "Upstream",
        "Downstream",
        "Related features",
        "In Python",
    ]
    assert texts(browser, "caption")[2:4] == ["M1", "Rm3"]
    token = browser.find_element(By.CSS_SELECTOR, ".context .token[tabindex='0']")
    peak = texts(browser, ".context .peak")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
    ActionChains(browser).move_to_element(token).perform()
    assert f"activation {peak}" in texts(browser, "#panel")[0]
    token.click()
    press(browser, Keys.ARROW_LEFT)
    before = browser.switch_to.active_element
    assert before.get_attribute("aria-label") in texts(browser, "#panel")[0]
    assert fits(browser)
    assert problems(browser) == []


def test_a_text_page_shows_where_a_feature_is_active(mini, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    open_page(browser, mini)
    assert texts(browser, "a[href^='#text']") == [TEXT]
    open_page(browser, mini, "#text/1")
    assert "".join(texts(browser, ".token")) == TEXT
    press(browser, Keys.TAB, Keys.TAB, Keys.TAB, Keys.TAB)  # past the links to the chosen word
    press(browser, *[Keys.ARROW_LEFT] * len(texts(browser, ".token")), Keys.ARROW_RIGHT, Keys.ENTER)
    assert texts(browser, "#panel p") == [f"“{texts(browser, '.token')[1]}”"]
    assert len(texts(browser, "#panel [aria-pressed=true]")) == 1
    strengths = browser.execute_script(STRENGTHS)
    assert max(strengths) == 1
    assert strengths[1] > 0
    press(browser, Keys.ESCAPE)
    words = browser.find_elements(By.CSS_SELECTOR, ".token")
    ActionChains(browser).move_to_element(words[3]).click().move_to_element(words[5]).perform()
    assert texts(browser, "#panel p") == [
        f"“{texts(browser, '.token')[3]}”"
    ]  # the pointer passes over words to the panel
    ActionChains(browser).click(words[3]).move_to_element(words[5]).perform()
    assert texts(browser, "#panel p") == [f"“{texts(browser, '.token')[5]}”"]
    link = browser.execute_script("return document.querySelector('#panel a').getAttribute('href')")
    go(browser, link)
    assert texts(browser, "h1") == [f"M2 {link[1:].replace('/', ' ')}"]
    assert problems(browser) == []


def test_a_text_opens_coloured_by_the_feature_that_is_most_active_in_it(mini, browser):
    acts = np.asarray(TinyModel("mini")["M2"](TEXT))[0, 1:]
    place, feature = np.unravel_index(acts.argmax(), acts.shape)
    open_page(browser, mini, "#text/1")
    assert texts(browser, "#legend a") == [f"feature {feature}"]
    np.testing.assert_allclose(browser.execute_script(STRENGTHS), acts[:, feature] / acts.max(), atol=1e-3)
    assert texts(browser, "#panel p") == [f"“{texts(browser, '.token')[place]}”"]
    assert texts(browser, "#panel [aria-pressed=true]")[0].startswith(f"feature {feature}")
    assert texts(browser, ".token[tabindex='0']") == [texts(browser, ".token")[place]]
    assert problems(browser) == []


def test_the_python_of_a_page_computes_what_it_shows(mini, browser):
    names: dict[str, Any] = {}
    for address in ("#text/1", "#feature/96"):
        open_page(browser, mini, address)
        [code] = texts(browser, ".python")
        *setup, call = code.splitlines()
        exec("\n".join(setup), names)
        acts = np.asarray(eval(call, names))
        assert acts.shape == (1, acts.size)
        if address == "#text/1":
            strengths = browser.execute_script(STRENGTHS)
            np.testing.assert_allclose(acts[0, 1:] / acts[0, 1:].max(), strengths, atol=1e-3)
        else:
            excerpt = call.partition("(")[2].strip('()"').encode().decode("unicode_escape").replace("\n", "↵")
            assert excerpt == "".join(browser.execute_script(FIRST_CONTEXT))
            assert call.startswith('lm["M2N96"](')
    assert problems(browser) == []


def test_the_dictionaries_of_a_set_lead_to_each_other(pair, browser):
    def follow(selector: str) -> None:
        before = browser.current_url
        browser.execute_script("document.querySelector(arguments[0]).click()", selector)
        wait(browser, f"location.href !== {before!r} && document.readyState === 'complete'")
        wait(browser, "!document.querySelector('main').hasAttribute('aria-busy')")

    open_page(browser, pair / "M1", "#feature/3")
    assert texts(browser, "#set a") == ["all dictionaries", "M0", "M1"]
    assert texts(browser, "#set [aria-current=page]") == ["M1"]
    count = "(t) => [t.caption.textContent, t.querySelectorAll('td a').length]"
    counts = dict(browser.execute_script(f"return [...document.querySelectorAll('table')].map({count})"))
    assert (counts["M0"], counts["A1"]) == (8, 0)  # A1 has no pages in this set
    upstream = browser.execute_script("return document.querySelector('a[href^=\"../M0\"][href*=feature]').textContent")
    follow("a[href^='../M0'][href*=feature]")
    assert texts(browser, "h1") == [f"M0 feature {upstream}"]
    follow("a[href^='../M1'][href*=feature]")
    assert texts(browser, "h1")[0].startswith("M1 feature ")
    follow("#set a")
    assert texts(browser, "h1") == ["2 dictionaries"]
    follow("a[href='M0/index.html#text/1']")
    assert "".join(texts(browser, ".token")) == TEXT
    follow("#set [data-site=M1]")  # the same text
    assert texts(browser, "h1, #set [aria-current=page]") == ["M1", "Text 1"]
    follow("#home")
    follow("#set [data-site=M0]")
    assert texts(browser, "h1") == ["24 features of M0"]
    assert problems(browser) == []


def test_pages_without_logit_effects_say_why(queries, browser):
    reason = "Logit effects and downstream features are left out"
    open_page(browser, queries)
    assert texts(browser, "#features thead th") == ["feature", "density", "largest activation", "peaks on"]
    assert texts(browser, ".left-out")[0].startswith(reason)
    feature = texts(browser, "#features tbody td")[0]
    word = texts(browser, "#features tbody .word")[0]
    type_it = "const find = document.getElementById('find'); find.value = arguments[0];"
    browser.execute_script(f"{type_it} find.dispatchEvent(new Event('input'))", word)
    assert feature in texts(browser, "#features tbody td:first-child")
    open_page(browser, queries, f"#feature/{feature}")
    assert "What it promotes and suppresses" not in texts(browser, "h2")
    assert "Upstream" in texts(browser, "h2")
    assert texts(browser, ".left-out")[0].startswith(reason)
    assert f'lm["blocks.1.attn.hook_qN{feature}"](' in texts(browser, ".python")[0]
    assert problems(browser) == []


def test_the_page_shows_something_without_its_data(mini, browser, tmp_path):
    alone = tmp_path / "index.html"
    alone.write_bytes((mini / "index.html").read_bytes())
    browser.get(alone.as_uri())
    wait(browser, "document.querySelector('[role=alert]')")
    assert "copy the dashboard's whole folder" in texts(browser, "[role=alert]")[0]
    problems(browser)  # the missing files


def fits(browser: Any) -> bool:
    return browser.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
