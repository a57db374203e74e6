// Connects the parts: search, sliders, keys of the whole page, light and dark, and the address.
const find = document.getElementById("find");
const results = document.getElementById("results");
const MATCHES = 8;

function applyThresholds() {
  for (const node of nodes) node.shown = node.isTarget || isWithin(nodeRank[node.i], state.nodes) || isPinned(node) || node === state.chosen;
  for (const node of nodes) if (isRest(node)) node.shown = true;
  placed = layout(heightFor);
  const shown = nodes.filter((node) => node.shown).length;
  let links = 0;
  for (let e = 0; e < edges.n; e++) if (isLinkShown(e)) links++;
  document.getElementById("counts").textContent = `${shown.toLocaleString("en")} of ${counted(nodes.length, "node")}, ${links.toLocaleString("en")} of ${counted(edges.n, "link")}`;
}

listeners.push((news) => {
  if (["nodes", "links", "pinned", "chosen"].some((part) => part in news)) applyThresholds();
  if ("chosen" in news) {
    const focused = panel.contains(document.activeElement);
    panel.replaceChildren(...nodePanel());
    if (focused) (document.getElementById("pin") ?? canvas).focus({ preventScroll: true });
    panel.scrollTop = 0;
    document.getElementById("announced").textContent = state.chosen ? `${title(state.chosen)}${at(state.chosen)}${state.chosen.expanded ? `, ${measure(state.chosen)} ${signed(state.chosen.pre)}` : ""}` : "";
  }
  if ("chosen" in news || "pinned" in news) markPin();
  if (["pinned", "groups", "places"].some((part) => part in news)) drawPins();
  for (const part of ["nodes", "links"]) {
    document.getElementById(part).value = state[part];
    document.getElementById(`${part}-said`).textContent = `${Math.round(100 * state[part])} %`;
  }
  document.getElementById("all").checked = state.all;
  if ("hovered" in news && Object.keys(news).length === 1) redraw();
  else {
    repaint();
    writeAddressSoon();
  }
});

for (const part of ["nodes", "links"]) document.getElementById(part).addEventListener("input", (event) => change({ [part]: Number(event.target.value) }));
document.getElementById("all").addEventListener("change", (event) => change({ all: event.target.checked }));
document.getElementById("fit").addEventListener("click", () => fit(true));

const searched = (node) => [title(node), node.id, node.position < 0 ? "" : data.tokens[node.position], ...(node.record?.concepts?.slice(0, 1).map(([called]) => called) ?? []), ...(node.record?.promoted.slice(0, 3).map(([id]) => words[id]) ?? [])].join("\n").toLowerCase();
const haystacks = nodes.map(searched);

function search() {
  const wanted = find.value.toLowerCase().trim();
  const hits = wanted ? nodes.filter((node) => haystacks[node.i].includes(wanted)).sort((a, b) => b.influence + b.start - a.influence - a.start) : [];
  found = new Set(hits);
  results.hidden = !wanted;
  const more = hits.length > MATCHES ? [element("p", { class: "soft" }, `and ${hits.length - MATCHES} more, marked in the graph`)] : [];
  const go = (node) => () => {
    choose(node);
    results.hidden = true;
  };
  results.replaceChildren(...hits.slice(0, MATCHES).map((node) => element("button", { type: "button", click: go(node) }, title(node), element("span", { class: "soft" }, at(node)))), ...more);
  if (wanted && !hits.length) results.append(element("p", {}, "Nothing found."));
  redraw();
}
find.addEventListener("input", search);
find.addEventListener("focus", () => find.value && search());
document.getElementById("tools").addEventListener("submit", (event) => {
  event.preventDefault();
  results.querySelector("button")?.click();
});
document.addEventListener("pointerdown", (event) => {
  if (!event.target.closest("#search")) results.hidden = true;
});

const isTyping = (event) => event.target.matches("input:not([type=range], [type=checkbox])");
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (!results.hidden || document.activeElement === find) {
      find.value = "";
      search();
      canvas.focus({ preventScroll: true });
    } else if (!isTyping(event)) change({ chosen: null, hovered: null });
  }
  if (event.key === "/" && !isTyping(event)) {
    event.preventDefault();
    find.focus();
  }
});

const dark = window.matchMedia("(prefers-color-scheme: dark)");
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  readColours();
  repaint();
}
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

setTheme(dark.matches ? "dark" : "light");
readAddress();
if (!location.hash.includes("node=")) change({ chosen: nodes.find((node) => node.isTarget) });
new ResizeObserver(resize).observe(canvas.parentElement);
new ResizeObserver(drawSketch).observe(sketch.parentElement);
window.addEventListener("hashchange", readAddress);
document.body.removeAttribute("aria-busy");
