"""What notebooks show as HTML: text coloured by activations, and attention patterns in a real browser."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import chromium, needs_browser, problems, wait

from tinymodel_jax import TinyModel
from tinymodel_jax.analysis import report
from tinymodel_jax.analysis.report.notebook import NotebookHtml

PROMPT = "Once upon a time, there was a girl named Lily."
HOSTILE = "One day, <img src=x onerror='document.title=1'> & \"x\" said hello.\nThe dog ran."


@pytest.fixture(scope="module")
def stories(story_model: Path) -> TinyModel:
    """A small random model with the story world's tokenizer."""
    return TinyModel(story_model)


class Shown(HTMLParser):
    """The coloured text: for each line its name, its tokens, their shares and their values."""

    def __init__(self, shown: NotebookHtml):
        super().__init__()
        self.names: list[str] = []
        self.lines: list[list[dict[str, Any]]] = []
        self.tags: set[str] = set()
        self.inside: list[str] = []
        self.feed(shown.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        if tag == "p" and given["class"] == "tm-text":
            self.lines.append([])
        if tag == "span":
            style = given.get("style") or ""
            share = float(style.removeprefix("--share:")) if style else None
            self.lines[-1].append({"text": "", "share": share, "value": None, "class": given.get("class")})
        if tag != "br":
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self.inside[-1] if self.inside else ""
        if where == "b":
            self.names.append(data)
        elif where == "span":
            self.lines[-1][-1]["text"] += data
        elif where == "i":
            self.lines[-1][-1]["value"] = float(data)


def test_every_token_is_shown_with_its_activation(stories):
    reader = stories["M1N3"]
    acts = np.asarray(reader(PROMPT))[0]
    shown = Shown(reader.show(PROMPT))
    (line,) = shown.lines
    assert shown.names == ["M1N3"]
    assert [token["text"] for token in line] == stories.to_str_tokens(PROMPT)
    assert [token["class"] for token in line] == ["tm-special", *[None] * (len(line) - 1)]
    assert (acts > 0).any()
    for token, act in zip(line, acts, strict=True):
        if act > 0:
            assert token["value"] == pytest.approx(act, rel=0.01)
            assert token["share"] == pytest.approx(act / acts.max(), abs=0.01)
        else:
            assert token["value"] is token["share"] is None
    assert f"largest activation {acts.max():.3g}" in reader.show(PROMPT).html


def test_colours_have_one_scale_in_all_texts_and_padding_is_not_shown(stories):
    texts = [PROMPT, "One day, a dog"]
    acts = np.asarray(stories["M1"](texts, [3, 5]))
    shown = Shown(stories["M1"].show(texts, [3, 5]))
    assert shown.names == ["M1N3", "M1N5"] * 2
    for i, line in enumerate(shown.lines):
        tokens = stories.to_str_tokens(texts[i // 2])
        assert [token["text"] for token in line] == tokens
        shares = acts[i // 2, : len(tokens), i % 2] / acts[..., i % 2].max()
        np.testing.assert_allclose([token["share"] or 0 for token in line], shares, atol=0.01)
    ids = stories.to_tokens(texts)
    assert stories["M1"].show(ids, [3, 5]).html == stories["M1"].show(texts, [3, 5]).html
    assert Shown(stories["M1"].show(ids[0], -1)).names == ["M1N23"]


def test_a_whole_dictionary_shows_the_features_that_are_strongest_on_the_text(stories):
    acts = np.asarray(stories["M1"](PROMPT))[0]
    peaks = acts[1:].max(axis=0)  # without [BEGIN]
    assert Shown(stories["M1"].show(PROMPT)).names == [f"M1N{i}" for i in np.argsort(-peaks)[:5]]


def test_a_feature_that_is_not_active_is_said_to_be_so(stories):
    acts = np.asarray(stories["M1"](PROMPT))[0]
    silent = int(np.flatnonzero(~(acts > 0).any(axis=0))[0])
    assert "is not active" in stories[f"M1N{silent}"].show(PROMPT).html


def test_text_is_never_read_as_html(stories):
    shown = Shown(stories["M1N3"].show(HOSTILE))
    assert shown.tags == {"div", "style", "p", "b", "span", "i", "br"}
    text = "".join(token["text"] for token in shown.lines[0])
    assert text == "".join(stories.to_str_tokens(HOSTILE)).replace("\n", "↵")
    attention = report.attention_patterns(stories, HOSTILE).html
    assert re.findall(r"<[^>]*>", attention)[0].startswith("<iframe")
    assert len(re.findall("<", attention)) == 2  # the frame's tags; its page is an attribute


def test_html_has_no_empty_lines_so_that_markdown_keeps_it(stories):
    for shown in (stories["M1"].show([HOSTILE, PROMPT]), report.attention_patterns(stories, HOSTILE)):
        assert "" not in [line.strip() for line in shown.html.split("\n")]
        assert repr(shown).startswith("NotebookHtml(")


def test_what_cannot_be_shown_is_said_in_one_line(stories):
    with pytest.raises(ValueError, match="shows one text, got 2"):
        report.attention_patterns(stories, [PROMPT, PROMPT])
    with pytest.raises(ValueError, match=r"layer 2 is outside 0\.\.1"):
        report.attention_patterns(stories, PROMPT, layer=2)
    with pytest.raises(ValueError, match="is one feature"):
        stories["M1N3"].show(PROMPT, [5])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


def open_frame(browser: Any, page: Path, shown: NotebookHtml, style: str) -> None:
    """Show HTML in a page, as a notebook does, and enter its frame."""
    page.write_text(f"<!doctype html><title>page</title><body style='{style}'><div>{shown.html}</div></body>", "utf-8")
    browser.switch_to.default_content()
    browser.get(page.as_uri())
    browser.switch_to.frame(0)
    wait(browser, "document.querySelectorAll('canvas').length")


def shares(browser: Any) -> list[float]:
    return browser.execute_script(
        "return [...document.querySelectorAll('.token')].map((t) => Number(t.style.getPropertyValue('--share')))"
    )


@needs_browser
def test_attention_is_explored_with_the_pointer_and_with_keys(stories, browser, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    _, acts = stories.run_with_cache(PROMPT, "blocks.*.attn.hook_pattern")
    patterns = np.stack([np.asarray(pattern)[0] for pattern in acts.values()])  # layer, head, query, key
    open_frame(browser, tmp_path / "page.html", report.attention_patterns(stories, PROMPT), "color: black")
    tokens = browser.find_elements("class name", "token")
    assert [token.get_attribute("textContent") for token in tokens] == stories.to_str_tokens(PROMPT)
    heads = browser.find_elements("css selector", "input[name=head]")
    assert [head.get_attribute("aria-label") for head in heads][-1] == "layer 1, head 1"
    heads[2].send_keys(Keys.SPACE)
    ActionChains(browser).move_to_element(tokens[4]).perform()
    np.testing.assert_allclose(shares(browser), patterns[1, 0, 4] * (np.arange(len(tokens)) <= 4), atol=6e-4)
    heads[2].send_keys(Keys.ARROW_RIGHT)
    np.testing.assert_allclose(shares(browser), patterns[1, 1, 4] * (np.arange(len(tokens)) <= 4), atol=6e-4)
    tokens[4].click()
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    np.testing.assert_allclose(shares(browser), patterns[1, 1, 5] * (np.arange(len(tokens)) <= 5), atol=6e-4)
    ActionChains(browser).move_to_element(tokens[2]).perform()  # a query that was chosen stays
    assert browser.find_element("css selector", "[aria-selected=true]").text.strip() == ","
    largest = patterns[1, 1, 5].argmax()
    assert f"({largest}) {patterns[1, 1, 5, largest]:.3f}" in browser.find_element("id", "panel").text
    assert problems(browser) == []


@needs_browser
def test_attention_has_the_theme_of_the_page_around_it_and_its_whole_height(stories, browser, tmp_path):
    shown = report.attention_patterns(stories, HOSTILE, layer=1)
    open_frame(browser, tmp_path / "page.html", shown, "color: #eee; background: black")
    assert browser.execute_script("return 'dark' in document.documentElement.dataset")
    wait(browser, "document.documentElement.scrollHeight <= innerHeight + 1")
    browser.switch_to.default_content()
    browser.execute_script("document.body.style.color = 'black'")
    browser.switch_to.frame(0)
    wait(browser, "!('dark' in document.documentElement.dataset)")
    assert problems(browser) == []
