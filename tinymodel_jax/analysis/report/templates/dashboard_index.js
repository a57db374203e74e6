// The index: of up to 25,000 features, one page of rows is in the document. The address holds the search, order and page.
const ROWS = 50;
let indexAddress = "#"; // target of links back to the index, as it was last shown
let lastFeature = null; // opened last; has the keyboard focus after going back

const COLUMNS = {
  feature: { cell: (f) => featureLink(f), key: (f) => f },
  density: { title: "share of the tokens at which it is active", cell: (f) => share(index.columns.active[f]), key: (f) => index.columns.active[f] },
  largest: { label: "largest activation", cell: (f) => fixed(index.columns.largest[f], largestDecimals()), key: (f) => index.columns.largest[f] },
  effect: { needs: "effect", label: "effect (nats)", title: "KL divergence of the predictions when it is turned off, nats per position, over all rows; [BEGIN] and [END] count here", cell: (f) => fixed(index.columns.effect[f], 6), key: (f) => index.columns.effect[f] },
  concept: { needs: "concept", kind: "words", cell: (f) => (index.columns.f1[f] ? index.concepts[index.columns.concept[f]][0] : "–"), key: (f) => (index.columns.f1[f] ? index.concepts[index.columns.concept[f]][0] : "") },
  F1: { needs: "f1", title: "F1 of its activity for the concept, at the best threshold", cell: (f) => index.columns.f1[f].toFixed(2), key: (f) => index.columns.f1[f] },
  "peaks on": { kind: "words", cell: (f) => index.columns.peaks[f].map(word), key: (f) => firstWord(index.columns.peaks[f]) },
  promotes: { needs: "promoted", kind: "words", cell: (f) => index.columns.promoted[f].map(word), key: (f) => firstWord(index.columns.promoted[f]) },
};
const largestDecimals = () => (index.largest_decimals ??= decimalsOf(index.columns.largest));
const firstWord = (ids) => (ids.length ? vocabulary[ids[0]] : "");

function readState() {
  const given = new URLSearchParams(location.hash.startsWith("#?") ? location.hash.slice(2) : "");
  const sort = given.get("sort") || "-density";
  const known = COLUMNS[sort.replace(/^-/, "")];
  return { find: given.get("find") || "", show: given.get("show") || "active", sort: known ? sort : "-density", page: Math.max(0, Number(given.get("page")) || 0) };
}

function writeState(state) {
  const said = { find: state.find, show: state.show === "active" ? "" : state.show, sort: state.sort === "-density" ? "" : state.sort, page: state.page || "" };
  const text = new URLSearchParams(Object.entries(said).filter(([, value]) => value !== "")).toString();
  indexAddress = text ? `#?${text}` : "#";
  history.replaceState(null, "", indexAddress);
}

// A feature is found by its number, its concept, or the text of a token that it peaks on or promotes.
function finder(find) {
  const wanted = find.toLowerCase();
  if (!wanted.trim()) return () => true;
  const id = /^(?:[a-z]+\d+n)?(\d+)$/.exec(wanted.trim());
  const hit = vocabulary.map((text) => text.toLowerCase().includes(wanted));
  const named = index.concepts.map(([name]) => name.toLowerCase().includes(wanted.trim()));
  const { peaks, promoted, concept, f1 } = index.columns;
  return (f) =>
    (id && Number(id[1]) === f) || (concept && f1[f] > 0 && named[concept[f]]) || peaks[f].some((i) => hit[i]) || (promoted && promoted[f].some((i) => hit[i]));
}

function chosenFeatures({ find, show, sort }) {
  const found = finder(find);
  const { active } = index.columns;
  const features = active.map((_, f) => f).filter((f) => (show === "all" || active[f] > 0 === (show === "active")) && found(f));
  const key = COLUMNS[sort.replace(/^-/, "")].key;
  const keys = active.map((_, f) => key(f));
  const way = sort.startsWith("-") ? -1 : 1;
  const order = typeof keys[0] === "string" ? (a, b) => keys[a].localeCompare(keys[b]) : (a, b) => keys[a] - keys[b];
  return features.sort((a, b) => way * order(a, b) || a - b);
}

const label = (name) => COLUMNS[name].label || name;

function indexPage() {
  const state = readState();
  const names = Object.keys(COLUMNS).filter((name) => !COLUMNS[name].needs || index.columns[COLUMNS[name].needs]);
  indexAddress = location.hash || "#";
  if (!names.includes(state.sort.replace(/^-/, ""))) state.sort = "-density";
  const count = element("p", { class: "hint", role: "status", id: "count" });
  const body = element("tbody", { keydown: moveBetweenRows });
  const pager = element("div", { class: "pager" });
  const [kindsOfText, examples] = index.columns.concept ? ["number, concept or token", "12, animal, happy"] : ["number or token", "12, happy"];
  const find = element("input", { type: "search", id: "find", "aria-label": `search: ${kindsOfText}`, placeholder: `${kindsOfText}, as in ${examples}  ( / )` });
  find.value = state.find;
  const kinds = [["active", "active on text"], ["dead", "never active on text"], ["all", "all"]].map(([value, text]) => element("option", { value }, text));
  const kind = element("select", { id: "show", "aria-label": "which features" }, ...kinds);
  kind.value = state.show;
  const heads = names.map((name) => {
    const button = element("button", { type: "button", title: COLUMNS[name].title || null, click: () => sortBy(name) }, label(name));
    return element("th", { scope: "col", class: COLUMNS[name].kind || null, "data-column": name }, button);
  });

  function draw() {
    const features = chosenFeatures(state);
    const pages = Math.max(1, Math.ceil(features.length / ROWS));
    state.page = Math.min(state.page, pages - 1);
    count.textContent = `${features.length.toLocaleString("en")} of ${counted(index.n_features, "feature")}`;
    const shown = features.slice(state.page * ROWS, (state.page + 1) * ROWS);
    body.replaceChildren(...shown.map((f) => element("tr", {}, ...names.map((name) => element("td", { class: COLUMNS[name].kind || null, "data-label": label(name) }, ...[COLUMNS[name].cell(f)].flat())))));
    const turn = (step, text) => {
      const button = element("button", { type: "button", click: () => change({ page: state.page + step }) }, text);
      button.disabled = !(state.page + step in [...Array(pages).keys()]);
      return button;
    };
    pager.replaceChildren(turn(-1, "← previous"), `page ${state.page + 1} of ${pages}`, turn(1, "next →"));
    heads.forEach((head) => head.setAttribute("aria-sort", { [head.dataset.column]: "ascending", [`-${head.dataset.column}`]: "descending" }[state.sort] || "none"));
  }

  function change(news) {
    Object.assign(state, { page: 0 }, news);
    draw();
    writeState(state);
  }

  function sortBy(name) {
    const down = ["density", "largest", "effect", "F1"].includes(name) ? state.sort !== `-${name}` : state.sort === name;
    change({ sort: down ? `-${name}` : name });
  }

  find.addEventListener("input", () => change({ find: find.value }));
  kind.addEventListener("change", () => change({ show: kind.value }));
  draw();
  const texts = index.texts.map((ids, i) => element("a", { href: `#text/${i + 1}` }, textName(ids)));
  const form = element("form", { role: "search", submit: (event) => openFirst(event, body) }, find, kind);
  const caption = element("caption", {}, "Click a heading to sort, or a number to open the feature's page.");
  const wide = element("table", { id: "features", class: "blocks" }, caption, element("thead", {}, element("tr", {}, ...heads)), body);
  const title = element("h1", { tabindex: -1 }, `${counted(index.n_features, "feature")} of `, element("code", {}, index.site));
  return [title, ...leftOut(), ...(texts.length ? [element("nav", { "aria-label": "texts" }, "Texts:", ...texts)] : []), form, count, wide, pager];
}

const textName = (ids) => ids.slice(0, index.text_start).map((id) => vocabulary[id]).join("") + (ids.length > index.text_start ? "…" : "");

function openFirst(event, body) {
  event.preventDefault();
  const link = body.querySelector("a");
  if (link) location.hash = link.getAttribute("href");
}

function moveBetweenRows(event) {
  const row = event.target.closest("tr");
  const other = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling }[event.key];
  if (!other) return;
  event.preventDefault();
  other.querySelector("a").focus();
}
