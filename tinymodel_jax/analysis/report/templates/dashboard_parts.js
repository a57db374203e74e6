// Parts of a dashboard's pages.
const word = (id) => element("span", { class: "word" }, vocabulary[id]);
const share = (active) => `${fixed((100 * active) / index.n_tokens, Math.min(6, Math.max(0, Math.ceil(Math.log10(index.n_tokens / 100)))))} %`;
const plusMinus = ([mean, half]) => signed(mean) + (half === null ? "" : ` ± ${number(half)}`);
const pages = new Map([...document.querySelectorAll("#set [data-site]")].map((link) => [link.dataset.site, link.getAttribute("href")])); // of a set's dictionaries
const leftOut = () => index.left_out.map((reason) => element("p", { class: "about left-out" }, reason));

// A link to a feature's page; the number alone for a dictionary without pages.
function featureLink(feature, site = index.site) {
  if (site === index.site) return element("a", { href: `#feature/${feature}` }, String(feature));
  return pages.has(site) ? element("a", { href: `${pages.get(site)}#feature/${feature}` }, String(feature)) : String(feature);
}

// Python that computes activations of `tag` on a text; a click selects all of it.
function python(tag, text) {
  const call = `lm[${JSON.stringify(tag)}](${JSON.stringify(text.replaceAll("↵", "\n"))})`;
  return element("pre", { class: "python" }, [...index.setup, call].join("\n"));
}

function section(title, ...children) {
  return element("section", {}, element("h2", {}, title), ...children);
}

function show(...children) {
  const panel = document.getElementById("panel");
  panel.hidden = !children.length;
  panel.replaceChildren(...children);
}

let kept = null; // the token that stays chosen while the pointer moves over others

function keep(token) {
  kept?.classList.remove("kept");
  token?.classList.add("kept");
  kept = token;
}

// A line of tokens. The pointer, a click (which keeps the choice) or arrow keys choose one and call `chosen(place)`.
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
    token.addEventListener("focus", () => token.matches(":focus-visible") && choice(true)); // by keyboard; clicks have a handler of their own
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
