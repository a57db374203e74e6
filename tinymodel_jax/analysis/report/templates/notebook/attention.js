"use strict";
const { tokens, layers, ...data } = JSON.parse(document.getElementById("data").textContent);
// Layer, head -> the rows of the pattern one after the other, in parts per thousand, without what is above the diagonal.
const patterns = data.patterns.map((heads) => heads.map((text) => text.match(/../g).map((pair) => parseInt(pair, 36))));
const SHOWN = 5; // keys that the panel lists
const PIXELS = 44; // of a thumbnail, at most
const root = document.documentElement;
let query = tokens.length - 1;
let kept = false; // whether the query stays, whatever the pointer passes over
let [place, head] = [layers.length - 1, 0]; // the head with which the picture opens attends most to one earlier word
const attention = (row, key) => patterns[place][head][(row * (row + 1)) / 2 + key] / 1000;
const quoted = (at) => `“${tokens[at]}”`;
function open() {
  let most = -1;
  patterns.forEach((heads, i) => heads.forEach((flat, h) => {
    const last = flat.slice(-tokens.length).slice(1, -1);
    const largest = Math.max(0, ...last);
    if (largest > most) [most, place, head] = [largest, i, h];
  }));
}
// A pixel is the largest attention of the queries and keys that share it, so that few places of a long text stay visible.
function thumbnail(flat) {
  const size = Math.min(tokens.length, PIXELS);
  const largest = new Map();
  for (let row = 0, i = 0; row < tokens.length; row += 1)
    for (let key = 0; key <= row; key += 1, i += 1) {
      const pixel = [row, key].map((at) => Math.floor((at * size) / tokens.length)).join();
      largest.set(pixel, Math.max(largest.get(pixel) ?? 0, flat[i]));
    }
  const canvas = element("canvas", { width: size, height: size, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const colour = getComputedStyle(root).getPropertyValue("--accent");
  for (const [pixel, most] of largest) {
    const [y, x] = pixel.split(",");
    context.fillStyle = `rgba(${colour}, ${most / 1000})`;
    context.fillRect(x, y, 1, 1);
  }
  return canvas;
}
function drawHeads() {
  const rows = layers.map((layer, i) => {
    const heads = patterns[i].map((flat, h) => {
      const choose = () => {
        [place, head] = [i, h];
        show();
      };
      const input = element("input", { type: "radio", name: "head", "aria-label": `layer ${layer}, head ${h}`, change: choose });
      input.checked = i === place && h === head;
      return element("label", { title: `layer ${layer}, head ${h}` }, input, thumbnail(flat));
    });
    return element("div", { class: "layer" }, element("span", {}, `layer ${layer}`), ...heads);
  });
  document.getElementById("heads").replaceChildren(...rows);
}
function show() {
  spans.forEach((span, at) => {
    const chosen = at === query;
    span.setAttribute("aria-selected", String(chosen));
    span.tabIndex = chosen ? 0 : -1;
    span.style.setProperty("--share", at <= query ? attention(query, at) : 0);
    span.title = at <= query ? `${attention(query, at).toFixed(3)} of the attention from ${quoted(query)}` : "";
  });
  const keys = [...tokens.keys()].slice(0, query + 1).sort((a, b) => attention(query, b) - attention(query, a)).slice(0, SHOWN);
  const listed = keys.filter((key) => attention(query, key) > 0).flatMap((key, i) => [i ? ", " : " ", element("span", { class: "word" }, tokens[key].trim() || "␣"), ` (${key}) ${attention(query, key).toFixed(3)}`]);
  const from = element("span", { class: "word" }, tokens[query].trim() || "␣");
  document.getElementById("panel").replaceChildren(
    element("p", {}, element("b", {}, `Layer ${layers[place]}, head ${head}`), ": from ", from, ` (${query}) to`, ...listed),
    element("p", { class: "hint" }, "Choose a head, then point at a token or tap it. Arrow keys move among heads and tokens."),
  );
}
function move(at) {
  if (!(at in tokens)) return;
  query = at;
  show();
}
const spans = tokens.map((token, at) =>
  element("span", {
    class: data.special.includes(at) ? "token special" : "token",
    role: "option",
    mouseenter: () => kept || move(at),
    click: () => {
      kept = !(kept && query === at);
      move(at);
    },
    keydown: (event) => {
      const to = at + ({ ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key] ?? NaN);
      if (!(to in tokens)) return;
      event.preventDefault();
      kept = true;
      move(to);
      spans[to].focus();
    },
  }, token),
);
// The theme is that of the page around the frame: light ink means a dark page. Without access to it, the system's.
function theme() {
  let dark = matchMedia("(prefers-color-scheme: dark)").matches;
  try {
    const [red, green, blue] = getComputedStyle(frameElement.parentElement).color.match(/[\d.]+/g).map(Number);
    dark = 0.3 * red + 0.6 * green + 0.1 * blue > 128;
  } catch {} // the page around is of another origin
  if (dark !== "dark" in root.dataset) {
    root.toggleAttribute("data-dark", dark);
    drawHeads();
  }
}
function fit() {
  if (frameElement) frameElement.style.height = `${document.body.scrollHeight + 2}px`;
}
spans.forEach((span, at) => document.getElementById("text").append(span, ...(tokens[at] === "↵" ? [element("br")] : [])));
open();
drawHeads();
show();
theme();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", theme);
new ResizeObserver(fit).observe(document.body);
try {
  const watcher = new MutationObserver(theme);
  for (const outer of [parent.document.documentElement, parent.document.body]) watcher.observe(outer, { attributes: true });
} catch {} // the page around is of another origin
