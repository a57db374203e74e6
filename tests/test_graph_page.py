"""The page of `tinymodel graph` in a real browser."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import chromium, needs_browser, open_and_wait, problems, texts, wait
from conftest import as_users_run_it
from test_graph_command import PROMPT, run

from tinymodel_jax.analysis.circuits.graph import Scores
from tinymodel_jax.analysis.report.page import write_page
from tinymodel_jax.commands import cli
from tinymodel_jax.lm import TinyModel

pytestmark = needs_browser
HOSTILE = "<script>document.title = 'broken into'</script>"


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two stories."""
    file = tmp_path_factory.mktemp("stories") / "stories.txt"
    file.write_text("Once upon a time, a cat was happy.\nThe dog ran home.\n")
    return file


@pytest.fixture(scope="module")
def files(story_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page of a graph of a small model."""
    folder = tmp_path_factory.mktemp("graph")
    options = ["--target", " Lily", "--vs", " Tim", "--max-nodes", "120", "--edge-share", "1", "--sites", "A1"]
    assert run(story_model, *options, "--data", str(stories), "-o", str(folder / "graph.html")) == 0
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


def open_page(browser: Any, folder: Path, address: str = "") -> None:
    open_and_wait(browser, folder / "graph.html", address, "body")


def text(browser: Any, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def test_the_inputs_of_each_node_are_shown_to_add_up(files, story_model, browser):
    open_page(browser, files)
    lm = TinyModel(story_model)
    logits = np.asarray(lm.logits(lm.to_tokens(PROMPT)))[0, -1]
    difference = logits[lm.to_single_token(" Lily")] - logits[lm.to_single_token(" Tim")]
    ids = browser.execute_script("return nodes.filter((node) => node.expanded).map((node) => node.id)")
    assert len(ids) > 20
    for node in (ids[-1], *ids[:8]):
        browser.execute_script("change({ chosen: byId.get(arguments[0]) })", node)
        summed, measured, _ = (re.sub(r"≈ ", "", line) for line in texts(browser, ".equation p"))
        inputs, bias, value = map(float, re.findall(r"[+-]?\d+\.\d+", summed))
        assert inputs + bias == pytest.approx(value, abs=2e-4)
        assert float(re.findall(r"[+-]?\d+\.\d+", measured)[0]) == pytest.approx(value, abs=2e-4)
        if node == ids[-1]:
            assert value == pytest.approx(difference, abs=2e-4)
            assert text(browser, "#panel h2").startswith("“ Lily” − “ Tim”")
        browser.execute_script("document.querySelector('.inputs .more-rows')?.click()")
        rows = [row.replace("≈ ", "") for row in texts(browser, ".inputs .weight")]
        rounding = 0.5 * 10 ** -min(len(row.partition(".")[2]) for row in rows)
        assert sum(map(float, rows)) == pytest.approx(inputs, abs=rounding * (len(rows) + 1))
    assert problems(browser) == []


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 2,000 invented nodes, 30,000 links and 40 tokens, one of which is hostile."""
    rng = np.random.default_rng(0)
    n, n_edges, n_tokens, n_layers = 2000, 30_000, 40, 4
    layer = np.sort(rng.integers(-1, n_layers, n))
    layer[-1] = n_layers
    columns = {
        "id": [f"M{one}N{i}@{i % n_tokens}" for i, one in enumerate(layer.tolist())],
        "label": [f"node {i}" for i in range(n)],
        "kind": [{-1: "token", n_layers: "logit"}.get(one, "feature") for one in layer.tolist()],
        "site": [f"M{one}" for one in layer.tolist()],
        "layer": layer.tolist(),
        "position": (np.arange(n) % n_tokens).tolist(),
        "feature": list(range(n)),
        "expanded": (layer >= 0).tolist(),
        "value": np.ones(n).tolist(),
        "pre": np.ones(n).tolist(),
        "bias": np.zeros(n).tolist(),
        "influence": rng.gamma(0.2, 1, n).tolist(),
        "start": [0] * (n - 1) + [1],
    }
    ends = np.sort(rng.choice(n, (2 * n_edges, 2)), axis=1)
    ends = ends[layer[ends[:, 0]] < layer[ends[:, 1]]][:n_edges]
    assert len(ends) == n_edges
    edges = {"source": ends[:, 0].tolist(), "target": ends[:, 1].tolist(), "weight": rng.normal(size=n_edges).tolist()}
    data = {
        "tokens": [HOSTILE, *(f"word{i}" for i in range(1, n_tokens))],
        "layers": n_layers,
        "nodes": columns,
        "edges": {**edges, "paths": [[0]] * n_edges},
        "looks": [],
        "features": {},
        "pages": {},
        "words": {},
        "names": {n - 1: HOSTILE},
        "named_from": 0.5,
    }
    folder = tmp_path_factory.mktemp("many")
    content = {"title": HOSTILE, "targets": [HOSTILE], "scores": Scores(1, 1, 0), "model": "a model", "source": ""}
    write_page(folder / "graph.html", "graph/page.html.jinja", {"data": data, **content})
    return folder


FRAMES = """
  const done = arguments[0];
  const intervals = [];
  let before = performance.now();
  const step = () => {
    const now = performance.now();
    intervals.push(now - before);
    before = now;
    if (intervals.length === 60) return done(intervals.sort((a, b) => a - b));
    view.x += 2;
    redraw();
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
"""
"""Pans for sixty frames, and returns the milliseconds of each, sorted."""


@pytest.mark.parametrize("links", ["chosen", "all"])
def test_2000_nodes_and_30_000_links_are_panned_smoothly(many, browser, links):
    browser.set_script_timeout(60)
    browser.get("about:blank")
    browser.get((many / "graph.html").as_uri())
    wait(browser, "!document.body.hasAttribute('aria-busy')")
    assert browser.execute_script("return performance.now()") < 5000
    browser.execute_script(f"change({{ nodes: 1, links: 1, all: {str(links == 'all').lower()} }})")
    assert text(browser, "#counts") == "2,000 of 2,000 nodes, 30,000 of 30,000 links"
    frames = browser.execute_async_script(FRAMES)
    print(f"{links} links: median {frames[30]:.1f} ms, 95 % below {frames[57]:.1f} ms")
    assert frames[30] < 100  # ten per second, on a busy machine without a GPU
    assert browser.title == f"{HOSTILE}: attribution graph"
    assert problems(browser) == []


def test_heads_say_why_they_looked_and_features_what_they_do(files, browser):
    open_page(browser, files)
    opened = "node.in.some((e) => headButtons(e).some((part) => part.tagName === 'BUTTON'))"
    node = browser.execute_script(f"return nodes.find((node) => node.record && {opened}).id")
    browser.execute_script("change({ chosen: byId.get(arguments[0]) })", node)
    browser.execute_script("document.querySelector('.inputs .more-rows')?.click()")
    browser.execute_script("document.querySelector('button.head').click()")
    assert "looked here" in text(browser, ".look h3")
    assert "A pair that all keys share does not choose this one." in text(browser, ".look")
    scores = [float(cell) for cell in texts(browser, ".look td:last-child")]
    assert 1 <= len(scores) <= 8
    assert [abs(score) for score in scores] == sorted(map(abs, scores), reverse=True)
    shares = browser.execute_script("return shownLook.pattern")
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    browser.execute_script("document.querySelector('button.head').click()")
    assert texts(browser, ".look") == []
    assert "promotes" in text(browser, "#panel")
    assert len(texts(browser, "#panel .word")) == 12
    assert problems(browser) == []


def test_search_keys_and_sliders_find_and_hide_nodes(files, browser):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, files)
    press(browser, "/", "m1n")
    found = texts(browser, "#results button")
    assert len(found) == 8
    assert all("M1N" in one for one in found)
    press(browser, Keys.ENTER)
    assert text(browser, "#panel h2").startswith("M1N")
    browser.execute_script("canvas.focus()")
    press(browser, "p")
    assert len(texts(browser, ".chip")) == 1
    chosen = browser.execute_script("return state.chosen.id")
    press(browser, "i")
    source = browser.execute_script("return state.chosen.id")
    assert source != chosen
    press(browser, Keys.ARROW_UP)
    assert browser.execute_script("return state.chosen.y < byId.get(arguments[0]).y", source)
    press(browser, Keys.ESCAPE)
    assert text(browser, "#panel h2") == "Choose a node"
    shown = "return nodes.filter((node) => node.shown).length"
    before = browser.execute_script(shown)
    set_to = (
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))"
    )
    browser.execute_script(set_to, "nodes", "0.3")
    assert browser.execute_script(shown) < before
    browser.execute_script(set_to, "nodes", "1")
    assert browser.execute_script(shown) > before
    wait(browser, "location.hash.includes('nodes=1')")
    assert problems(browser) == []


def test_a_slider_can_be_moved_often(files, browser):
    open_page(browser, files)
    moves = """
      const slider = document.getElementById("nodes");
      for (let i = 0; i < 400; i++) {
        slider.value = 0.2 + (i % 80) / 100;
        slider.dispatchEvent(new Event("input"));
      }
    """
    browser.execute_script(moves)
    wait(browser, "location.hash.includes('nodes=0.99')")
    assert problems(browser) == []  # a browser complains about, or refuses, hundreds of new addresses


def test_pins_and_groups_are_in_the_address_and_in_a_file(files, browser, tmp_path):
    open_page(browser, files)
    browser.execute_script("change({ pinned: nodes.filter((node) => node.expanded).slice(-4) })")
    buttons = "document.querySelectorAll('.chip button:first-child')"
    browser.execute_script(f"{buttons}[0].click(); {buttons}[1].click(); document.getElementById('group').click()")
    name = "document.querySelector('.group input')"
    browser.execute_script(f"{name}.value = 'girls | names'; {name}.dispatchEvent(new Event('change'))")
    boxes = texts(browser, "#sketch .box .name")
    assert len(boxes) == 3
    assert boxes[0].startswith("girls")
    sums = """
      const [one, other] = [state.groups[0].members, state.pinned.filter((node) => node.isTarget)];
      const between = (e) => one.includes(nodes[edges.source[e]]) && other.includes(nodes[edges.target[e]]);
      return [...Array(edges.n).keys()].filter(between).reduce((sum, e) => sum + edges.weight[e], 0);
    """
    total = browser.execute_script(sums)
    drawn = [line for line in texts(browser, "#sketch title") if line.startswith("girls") and "→ “ Lily” −" in line]
    assert float(drawn[0].rsplit(": ", 1)[1].replace("≈ ", "")) == pytest.approx(total, rel=1e-3)
    wait(browser, "location.hash.includes('girls')")
    address = browser.execute_script("return location.hash")
    state = browser.execute_script("return saved()")

    open_page(browser, files, address)
    again = browser.execute_script("return saved()")
    assert again["pinned"] == state["pinned"]
    assert again["groups"] == [{**state["groups"][0], "name": "girls / names"}]

    open_page(browser, files)
    file = tmp_path / "view.json"
    file.write_text(json.dumps({"format": "tinymodel_jax/graph_view", **state}))
    browser.find_element("id", "file").send_keys(str(file))
    wait(browser, "state.pinned.length === 4")
    assert browser.execute_script("return saved()") == state
    assert problems(browser) == []


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"places": {"id": 5}}, "it has wrong values for places"),
        ({"places": "x", "pinned": None, "chosen": None}, "it has wrong values for pinned, places"),
        ({"groups": [{"name": "n"}], "nodes": "0.5"}, "it has wrong values for groups, nodes"),
        ({"format": "another"}, "it is not a file that Save wrote"),
        (None, "it is not a file that Save wrote"),
        ("{", "it is not JSON"),
    ],
)
def test_a_file_that_save_did_not_write_changes_nothing(files, browser, tmp_path, changed, complaint):
    open_page(browser, files)
    before = browser.execute_script("return saved()")
    file, given = tmp_path / "view.json", {"format": "tinymodel_jax/graph_view", **before, "links": 0.5}
    whole = {**given, **changed} if isinstance(changed, dict) else changed
    file.write_text(whole if isinstance(whole, str) else json.dumps(whole))
    browser.find_element("id", "file").send_keys(str(file))
    wait(browser, "document.getElementById('said').textContent")
    assert text(browser, "#said") == f"view.json cannot be loaded: {complaint}."
    assert browser.execute_script("return saved()") == before
    file.write_text(json.dumps(given))
    browser.find_element("id", "file").send_keys(str(file))
    wait(browser, "state.links === 0.5")
    assert text(browser, "#said") == ""
    assert problems(browser) == []


def test_groups_stay_where_they_were_moved_when_names_change_and_other_groups_go(files, browser):
    open_page(browser, files)
    grouped = """
      const pinned = nodes.filter((node) => node.expanded).slice(-4);
      change({ pinned, groups: [0, 2].map((i) => ({ name: `group ${i}`, members: pinned.slice(i, i + 2) })) });
      change({ places: { [boxes()[1].id]: [30, 40] } });
    """
    browser.execute_script(grouped)
    assert browser.execute_script("return document.querySelectorAll('.box')[1].getAttribute('transform')") == (
        "translate(30 40)"
    )
    name = "document.querySelectorAll('.group input')[1]"
    browser.execute_script(f"{name}.value = 'renamed'; {name}.dispatchEvent(new Event('change'))")
    browser.execute_script("document.querySelector('[aria-label=\"dissolve group 0\"]').click()")
    assert browser.execute_script("return document.querySelector('.box.group').getAttribute('transform')") == (
        "translate(30 40)"
    )
    assert texts(browser, ".box.group .name") == ["renamed"]
    assert problems(browser) == []


def test_the_keyboard_alone_pins_groups_and_chooses(files, browser):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, files)
    focused = "return (document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent)"
    browser.execute_script("change({ pinned: nodes.filter((node) => node.kind === 'feature').slice(-3) })")
    browser.execute_script("document.getElementById('pin').focus()")
    press(browser, Keys.SPACE)
    assert browser.execute_script(focused) == "Unpin"
    press(browser, Keys.SPACE)
    assert browser.execute_script(focused) == "Pin"
    browser.execute_script("document.querySelector('.chip button').focus()")
    press(browser, Keys.SPACE)
    assert browser.execute_script("return document.activeElement.getAttribute('aria-pressed')") == "true"
    browser.execute_script("document.getElementById('group').focus()")
    press(browser, Keys.ENTER)
    assert browser.execute_script(focused) == "name of the group"
    press(browser, "!", Keys.ESCAPE)
    assert browser.execute_script("return state.chosen.isTarget")
    press(browser, Keys.TAB)
    name = browser.execute_script("return state.groups[0].name")
    assert "!" in name
    assert browser.execute_script(focused) == f"dissolve {name}"
    browser.execute_script("document.querySelectorAll('.chip:not(.group) button')[3].focus()")
    press(browser, Keys.SPACE)
    assert browser.execute_script("return state.pinned.length") == 2
    assert browser.execute_script(focused).startswith("unpin")
    browser.execute_script("document.querySelector('.box.group').focus()")
    press(browser, Keys.SPACE)
    assert browser.execute_script("return state.groups[0].members.includes(state.chosen)")
    browser.execute_script("document.querySelector('#panel .node').focus()")
    press(browser, Keys.ENTER)
    assert browser.execute_script("return document.activeElement.id") == "pin"
    browser.execute_script("document.getElementById('nodes').focus()")
    press(browser, "/")
    assert browser.execute_script("return document.activeElement.id") == "find"
    assert problems(browser) == []


@pytest.mark.parametrize("width", [360, 1000, 1600])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_phones_and_desks_in_light_and_dark(files, browser, width, theme):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 400}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    try:
        open_page(browser, files)
        browser.execute_script("change({ pinned: nodes.filter((node) => node.expanded).slice(-6) })")
        browser.execute_script("document.querySelector('#legend summary').click()")
        assert text(browser, "#legend p").startswith("○ feature")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        opened = "node.in.some((e) => headButtons(e).length)"
        browser.execute_script(f"change({{ chosen: nodes.find((node) => {opened}) }})")
        browser.execute_script("document.querySelector('.inputs .more-rows')?.click()")
        edge = "getBoundingClientRect()"
        beside = f"part.{edge}.left >= part.closest('.link').querySelector('.gauge').{edge}.right"
        heads = browser.execute_script(f"return [...document.querySelectorAll('.head')].map((part) => {beside})")
        assert len(heads) > 0
        assert all(heads)
        fits = "return ['a long token', 'token', 'i'].map((one) => pen.measureText(fitting(one, 34)).width)"
        assert max(browser.execute_script(fits)) <= 34
        background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(253, 252, 249)") == (theme == "light")
        drawn = "const at = [size.width - 3, 3]; draw(); return [...pen.getImageData(...at, 1, 1).data].slice(0, 3)"
        assert (min(browser.execute_script(drawn)) > 128) == (theme == "light")
        assert problems(browser) == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_graphs_and_dashboards_lead_to_each_other(story_model, stories, browser, tmp_path):
    pages, page = tmp_path / "some pages", tmp_path / "graphs" / "graph.html"
    with as_users_run_it():
        options = ["--site", "M0,M1", "--model", str(story_model), "--data", str(stories)]
        assert cli.main(["dashboard", *options, "--with", "A1", "-o", str(pages)]) == 0
    for target in (" Tim", " Lily"):  # the second replaces the first
        options = ["--target", target, "--max-nodes", "60", "--dashboard", str(pages), "-o", str(page)]
        assert run(story_model, *options) == 0
    open_page(browser, page.parent)
    assert "Contexts from the dashboard some pages." in text(browser, "header")
    node = browser.execute_script("return nodes.find((node) => node.site === 'M1' && node.record.contexts.length).id")
    browser.execute_script("change({ chosen: byId.get(arguments[0]) })", node)
    contexts = texts(browser, "#panel .context")
    link = "document.querySelector('#panel a')"
    browser.execute_script(f"{link}.click()")
    wait(browser, "document.querySelector('main')?.getAttribute('aria-busy') === null")
    assert browser.title == f"M1 feature {node.split('@')[0].removeprefix('M1N')} · M1"
    shown = texts(browser, ".context p")
    assert all(context.split(" ", 1)[1].strip() in [one.strip() for one in shown] for context in contexts)
    back = [one for one in texts(browser, "li") if one.startswith(f"{PROMPT} → “ Lily”: “")]
    assert len(back) == 1
    assert "Tim" not in " ".join(texts(browser, "li"))
    browser.execute_script("document.querySelector('li a').click()")
    wait(browser, "document.getElementById('canvas') && !document.body.hasAttribute('aria-busy')")
    assert text(browser, "#panel h2").startswith(node.split("@")[0])
    assert problems(browser) == []


def test_neurons_and_several_targets_have_a_page_without_contexts(story_model, browser, tmp_path):
    page = tmp_path / "graph.html"
    assert run(story_model, "--sites", "neurons", "--max-nodes", "60", "--limit", "0", "-o", str(page)) == 0
    open_page(browser, tmp_path)
    assert browser.execute_script("return nodes.filter((node) => node.isTarget).length") == 10
    assert len(set(browser.execute_script("return nodes.map((node) => node.id)"))) == 60
    browser.execute_script("change({ chosen: nodes.find((node) => node.kind === 'feature') })")
    assert re.match(r"L[01] neuron \d+ at", text(browser, "#panel h2"))
    assert "promotes" in text(browser, "#panel")
    assert "contexts" not in text(browser, "body").lower()
    assert problems(browser) == []


def test_the_mouse_and_fingers_point_choose_pin_pan_and_zoom(files, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    open_page(browser, files)
    canvas = browser.find_element("id", "canvas")
    box = canvas.rect
    node = "nodes.filter((node) => node.shown && node.kind === 'feature' && onScreen(node)[0] > LEFT).at(-1)"
    x, y = browser.execute_script(f"return onScreen({node})")
    offset = (round(x - box["width"] / 2), round(y - box["height"] / 2))
    chosen = browser.execute_script(f"return {node}.id")
    ActionChains(browser).move_to_element_with_offset(canvas, *offset).perform()
    assert browser.execute_script("return state.hovered.id") == chosen
    assert chosen.split("@")[0] in text(browser, "#tip")
    ActionChains(browser).click().perform()
    assert browser.execute_script("return state.chosen.id") == chosen
    ActionChains(browser).key_down(Keys.SHIFT).click().key_up(Keys.SHIFT).perform()
    assert browser.execute_script("return saved().pinned") == [chosen]

    open_page(browser, files)
    canvas = browser.find_element("id", "canvas")
    view = "return [view.x, view.y, view.k]"
    before = browser.execute_script(view)
    ActionChains(browser).move_to_element(canvas).click_and_hold().move_by_offset(40, 25).release().perform()
    assert browser.execute_script(view) == [before[0] + 40, before[1] + 25, before[2]]
    ActionChains(browser).move_to_element(canvas).context_click().perform()
    assert browser.execute_script("return state.chosen.isTarget")  # a drag and a right click choose nothing

    browser.execute_script("change({ pinned: nodes.filter((node) => node.isTarget) })")
    place = "return document.querySelector('.box').getAttribute('transform')"
    at_first = browser.execute_script(place)
    moves = """
      const box = document.querySelector(".box");
      box.setPointerCapture = () => {};
      box.dispatchEvent(new PointerEvent("pointerdown", { clientX: 0, clientY: 0 }));
      box.dispatchEvent(new PointerEvent("pointermove", { clientX: 50, clientY: 50 }));
      const moved = box.getAttribute("transform");
      box.dispatchEvent(new PointerEvent("pointercancel"));
      return moved;
    """
    assert browser.execute_script(moves) != at_first
    assert browser.execute_script(place) == at_first
    browser.execute_script("change({ pinned: [] })")

    def touch(kind: str, *fingers: tuple[int, int]) -> None:
        points = [{"x": box["x"] + x, "y": box["y"] + y, "id": i} for i, (x, y) in enumerate(fingers)]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    before = browser.execute_script(view)
    touch("touchStart", (200, 200))
    touch("touchMove", (230, 190))
    touch("touchEnd")
    assert browser.execute_script(view) == [before[0] + 30, before[1] - 10, before[2]]
    touch("touchStart", (200, 200), (300, 200))
    touch("touchMove", (150, 200), (350, 200))
    touch("touchEnd")
    assert browser.execute_script("return view.k") == pytest.approx(2 * before[2])
    assert problems(browser) == []
