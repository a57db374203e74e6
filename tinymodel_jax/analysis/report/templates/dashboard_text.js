// The page of a text: the strongest features of each token, and where else in the text they are active.
async function textPage(given) {
  if (!(given - 1 in index.texts)) throw new Error(`There is no text ${given}; the dashboard has ${index.texts.length}.`);
  const record = await dashboard.load(`text-${given}`);
  let coloured = null;
  let place = 0;

  const activation = (feature, at) => {
    const [places, values] = record.activity[feature];
    return places.includes(at) ? values[places.indexOf(at)] : 0;
  };
  const names = (at) => `“${vocabulary[record.tokens[at]]}”: ${record.strongest[at].length ? record.strongest[at].map((f) => `feature ${f} ${number(activation(f, at))}`).join(", ") : "no feature is active"}`;
  const [line, tokens] = tokenLine({ class: "story", "aria-label": "words of the text" }, record.tokens, record.tokens.map(() => 0), 0, names, choose);

  function colour(feature) {
    coloured = coloured === feature ? null : feature;
    const [, values] = coloured === null ? [[], []] : record.activity[coloured];
    const most = Math.max(...values, 1e-9);
    tokens.forEach((token, at) => token.style.setProperty("--strength", coloured === null ? 0 : activation(coloured, at) / most));
    choose(place);
  }

  function choose(at) {
    place = at;
    tokens.forEach((token, i) => token.classList.toggle("chosen", i === at));
    const most = Math.max(...record.strongest[at].map((f) => activation(f, at)), 1e-9);
    const rows = record.strongest[at].map((feature) => {
      const bar = element("span", { class: "bar", style: `width: ${(5 * activation(feature, at)) / most}rem` });
      const told = index.columns.concept && index.columns.f1[feature] ? `: ${index.concepts[index.columns.concept[feature]][0]} (F1 ${index.columns.f1[feature].toFixed(2)})` : "";
      const button = element("button", { type: "button", class: "feature", "aria-pressed": String(feature === coloured), click: () => colour(feature) }, bar, `feature ${feature}${told}, activation ${number(activation(feature, at))}`);
      return element("div", { class: "choice" }, button, element("a", { href: `#feature/${feature}` }, "its page"));
    });
    show(element("p", {}, `“${vocabulary[record.tokens[at]]}”`), ...(rows.length ? rows : ["No feature is active here."]));
  }

  tokens.forEach((token, at) =>
    token.addEventListener("keydown", (event) => {
      if (event.key === " ") event.preventDefault(); // no scrolling
      if (["Enter", " "].includes(event.key) && record.strongest[at].length) colour(record.strongest[at][0]);
    }),
  );
  const about = "Point at a word, or move with the arrow keys, to see its most active features below. Click or tap a word to keep them there; choose it again or press Escape to release it. Then choose a feature (Enter or Space chooses the first) to see where else in the text it is active.";
  return [element("nav", {}, element("a", { href: indexAddress }, "all features")), element("h1", { tabindex: -1 }, `Text ${given}`), element("p", {}, about), line];
}
