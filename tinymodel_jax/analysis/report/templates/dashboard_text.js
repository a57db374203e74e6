// The page of a text: the strongest features of each token, and where else in the text they are active.
async function textPage(given) {
  if (!(given - 1 in index.texts)) throw new Error(`There is no text ${given}; the dashboard has ${index.texts.length}.`);
  const record = await dashboard.load(`text-${given}`);
  const text = record.tokens.map((id) => vocabulary[id]).join("");
  const legend = element("p", { id: "legend" });
  const code = element("div");
  let coloured = null;
  let place = 0;

  const activation = (feature, at) => {
    const [places, values] = record.activity[feature];
    return places.includes(at) ? values[places.indexOf(at)] : 0;
  };
  const largest = (feature) => Math.max(...record.activity[feature][1]);
  const told = (feature) => (index.columns.concept && index.columns.f1[feature] ? ` (${index.concepts[index.columns.concept[feature]][0]}, F1 ${index.columns.f1[feature].toFixed(2)})` : "");
  const names = (at) => `“${vocabulary[record.tokens[at]]}”: ${record.strongest[at].length ? record.strongest[at].map((f) => `feature ${f} ${number(activation(f, at))}`).join(", ") : "no feature is active"}`;
  // The page opens with the feature that is most active anywhere in the text, at the token of its peak.
  const strongest = Object.keys(record.activity).map(Number).reduce((best, f) => (best === null || largest(f) > largest(best) ? f : best), null);
  const start = strongest === null ? 0 : record.tokens.findIndex((_, at) => activation(strongest, at) === largest(strongest));
  const [line, tokens] = tokenLine({ class: "story", "aria-label": "words of the text" }, record.tokens, record.tokens.map(() => 0), start, names, choose);

  function colour(feature) {
    coloured = coloured === feature ? null : feature;
    tokens.forEach((token, at) => token.style.setProperty("--strength", coloured === null ? 0 : activation(coloured, at) / largest(coloured)));
    const said = coloured === null ? ["No feature colours the text."] : ["Coloured by ", element("a", { href: `#feature/${coloured}` }, `feature ${coloured}`), `${told(coloured)}: activation 0 (white) to ${number(largest(coloured))}.`];
    legend.replaceChildren(...said);
    code.replaceChildren(python(coloured === null ? index.site : `${index.site}N${coloured}`, text));
  }

  function choose(at) {
    place = at;
    tokens.forEach((token, i) => token.classList.toggle("chosen", i === at));
    const most = Math.max(...record.strongest[at].map((f) => activation(f, at)), 1e-9);
    const rows = record.strongest[at].map((feature) => {
      const width = (5 * activation(feature, at)) / most;
      const bar = element("span", { class: "bar", style: `width: ${width}rem; margin-right: ${5 - width}rem` });
      const colourBy = () => {
        colour(feature);
        choose(place);
      };
      const button = element("button", { type: "button", class: "feature", "aria-pressed": String(feature === coloured), click: colourBy }, bar, `feature ${feature}${told(feature)}: activation ${fixed(activation(feature, at), decimalsOf([most]))}`);
      return element("div", { class: "choice" }, button, element("a", { href: `#feature/${feature}` }, "its page"));
    });
    show(element("p", {}, `“${vocabulary[record.tokens[at]]}”`), ...(rows.length ? rows : ["No feature is active here."]));
  }

  tokens.forEach((token, at) =>
    token.addEventListener("keydown", (event) => {
      if (event.key === " ") event.preventDefault(); // no scrolling
      if (!["Enter", " "].includes(event.key) || !record.strongest[at].length) return;
      colour(record.strongest[at][0]);
      choose(at);
    }),
  );
  colour(strongest);
  const about = "Point at a word, or move with the arrow keys, to see its most active features below. Click or tap a word to keep them there; choose it again or press Escape to release it. Choose a feature (Enter or Space chooses the first) to colour the text by it.";
  const content = [element("nav", {}, element("a", { href: indexAddress }, "all features")), element("h1", { tabindex: -1 }, `Text ${given}`), legend, line, element("p", { class: "about" }, about), code];
  return { content, opened: () => tokens.length && choose(start) };
}
