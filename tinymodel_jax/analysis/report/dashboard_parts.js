// What pages are made of. Text goes in as text nodes only: a token may be "<script>".
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const word = (id) => element("span", { class: "word" }, vocabulary[id]);
const number = (value) => (value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(2) : String(Number(value.toPrecision(4))));
const signed = (value) => (value > 0 ? `+${number(value)}` : number(value));
const share = (active) => `${number((100 * active) / index.n_tokens)} %`;
const plusMinus = ([mean, half]) => signed(mean) + (half === null ? "" : ` ± ${number(half)}`);
const featureLink = (feature) => element("a", { href: `#feature/${feature}` }, String(feature));

function table(caption, headings, rows) {
  const heads = headings.map(([text, kind]) => element("th", { scope: "col", class: kind }, text));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell, i) => element("td", { class: headings[i][1] }, ...[cell].flat()))));
  return element("table", {}, element("caption", {}, caption), element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...body));
}

function section(title, ...children) {
  return element("section", {}, element("h2", {}, title), ...children);
}

function show(...children) {
  const panel = document.getElementById("panel");
  panel.hidden = !children.length;
  panel.replaceChildren(...children);
}

let kept = null; // the token that stays chosen, whatever the pointer passes over

function keep(token) {
  kept?.classList.remove("kept");
  token?.classList.add("kept");
  kept = token;
}

// A line of tokens: the pointer, a click (which keeps it) and arrow keys choose one, `chosen(place)` says what that means.
function tokenLine(attributes, ids, strengths, start, names, chosen) {
  const tokens = ids.map((id, place) => {
    const marks = { class: "token", role: "option", tabindex: place === start ? 0 : -1, style: `--strength: ${strengths[place]}`, "aria-label": names(place) };
    return element("span", marks, vocabulary[id]);
  });
  const choose = (place) => {
    tokens.forEach((token, i) => {
      token.setAttribute("aria-selected", String(i === place));
      token.tabIndex = i === place ? 0 : -1;
    });
    chosen(place);
  };
  tokens.forEach((token, place) => {
    const choice = (keeps) => {
      keep(keeps ? token : null);
      choose(place);
    };
    token.addEventListener("mouseenter", () => kept === null && choose(place));
    token.addEventListener("focus", () => token.matches(":focus-visible") && choice(true)); // by keyboard; a click decides itself
    token.addEventListener("click", () => choice(kept !== token));
    token.addEventListener("keydown", (event) => {
      const other = tokens[place + { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key]];
      if (!other) return;
      event.preventDefault();
      other.focus();
    });
  });
  return [element("p", { role: "listbox", ...attributes }, ...tokens), tokens];
}
