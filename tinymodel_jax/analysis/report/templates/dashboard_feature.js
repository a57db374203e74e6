// The page of a feature.
async function featurePage(feature) {
  if (!(feature in index.columns.active)) throw new Error(`There is no feature ${feature}; features are numbered 0 to ${index.n_features - 1}.`);
  const shard = String(Math.floor(feature / index.a_shard)).padStart(4, "0");
  const [graphs, ...parts] = await Promise.all(["graphs", `shard-${shard}`, `links-${shard}`].map(dashboard.load));
  const record = Object.assign({}, ...parts.map((records) => records[feature % index.a_shard]));
  lastFeature = feature;
  const step = (to, text) => (to in index.columns.active ? [element("a", { href: `#feature/${to}` }, text)] : []);
  const links = element("nav", { "aria-label": "features" }, element("a", { href: indexAddress }, "all features"), ...step(feature - 1, "← previous"), ...step(feature + 1, "next →"));
  return [
    links,
    element("h1", { tabindex: -1 }, element("code", {}, index.site), ` feature ${feature}`),
    numbers(feature, record),
    ...(index.columns.active[feature] ? [contextSection(feature, record)] : []),
    ...(record.promoted ? [logitSection(record)] : []),
    linkSection("Upstream", "Features that write to the residual stream before this one reads it, by direct weight: what one unit of their activation adds to this feature's pre-activation.", record.upstream),
    linkSection("Downstream", "Features that read the residual stream after this one writes to it, by direct weight: what one unit of this feature's activation adds to their pre-activation.", record.downstream),
    graphSection(feature, graphs),
    section("Related features", element("div", { class: "columns" }, relatedTable("Decoder rows that point the same way", "cosine", record.neighbours), relatedTable("Active at the same tokens", "correlation", record.partners))),
    ...leftOut(),
    pythonSection(feature, record),
  ];
}

function logitSection(record) {
  const about = `Direct effect of ${index.logit_unit} on the logits of the next token, skipping all later layers, minus the mean over the vocabulary.`;
  const tables = [tokenTable("promoted", record.promoted), tokenTable("suppressed", record.suppressed)];
  return section("What it promotes and suppresses", element("p", { class: "about" }, about), element("div", { class: "columns" }, ...tables));
}

// The attribution graphs that have the feature as a node.
function graphSection(feature, graphs) {
  const lines = graphs.flatMap(({ page, title, nodes }) => (nodes[feature] ? [element("li", {}, `${title}: `, ...nodes[feature].flatMap(([id, place], i) => [i ? ", " : "", element("a", { href: `${page}#${new URLSearchParams({ node: id })}` }, place)]))] : []));
  return lines.length ? section("In attribution graphs", element("ul", {}, ...lines)) : "";
}

function pythonSection(feature, record) {
  const context = record.contexts[0];
  const text = context ? context[2].map((id) => vocabulary[id]).join("") : "Once upon a time";
  const about = `Activation at each token of a text, shape (1, positions), [BEGIN] first.${context ? " The text here is the strongest context alone; the activations above are those in its whole row." : ""}`;
  return section("In Python", element("p", { class: "about" }, about), python(`${index.site}N${feature}`, text));
}

function numbers(feature, record) {
  const { active, largest } = index.columns;
  const entries = [
    ["density", `${share(active[feature])}: ${active[feature].toLocaleString("en")} of ${counted(index.n_tokens, "token")}`],
    ["activation", `mean ${number(record.mean)} where active, largest ${number(largest[feature])}`],
    ["quantiles", `activation where active: ${index.quantiles.map((q, i) => `${number(record.quantiles[i])} at ${100 * q} %`).join(", ")}`],
  ];
  if (!active[feature]) entries.splice(1, 2);
  if (record.concepts && active[feature]) entries.push(["concepts", record.concepts.filter(([, f1]) => f1 > 0).map(([c, f1]) => `${index.concepts[c][0]} (${index.concepts[c][1]}), F1 ${f1.toFixed(2)}`).join("; ")]);
  if (record.effects) {
    const { kl_all: all, kl, loss, active_rows: rows } = record.effects;
    const where = rows ? `; KL ${plusMinus(kl)}, loss ${plusMinus(loss)} nats over the ${rows === 1 ? "one" : rows} where it is active` : "";
    const intervals = [all, kl, loss].some(([, half]) => half !== null) ? "95 % intervals; " : ""; // one row has none
    entries.push(["turned off", `KL ${plusMinus(all)} nats per position over ${counted(index.effect_rows, "row")}${where} (${intervals}[BEGIN] and [END] count here)`]);
  }
  const list = element("dl", { class: "numbers" }, ...entries.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]));
  const bars = record.histogram.some((n) => n > 0) ? [histogram(record.histogram)] : []; // the sampled tokens may miss a rare feature
  return active[feature] ? element("div", {}, list, ...bars) : element("div", {}, list, element("p", {}, "Never active on the text of these rows; [BEGIN] and [END] do not count."));
}

function histogram(counts) {
  const first = counts.findIndex((n) => n > 0);
  const last = counts.findLastIndex((n) => n > 0);
  const shown = counts.slice(first, last + 1);
  const most = Math.max(...shown);
  const [from, to] = [number(index.edges[first]), number(index.edges[last + 1])];
  const bars = shown.map((n, i) => element("span", { style: `height: ${(100 * n) / most}%`, title: `${number(index.edges[first + i])} to ${number(index.edges[first + i + 1])}: ${counted(n, "token")}` }));
  const label = `Histogram of activations, ${from} to ${to}; most, ${counted(most, "token")}, from ${number(index.edges[first + shown.indexOf(most)])}`;
  return element("div", {}, element("div", { class: "histogram", role: "img", "aria-label": label }, ...bars), element("p", { class: "ends" }, element("span", {}, from), element("span", {}, `activation, two bins per octave; tallest ${counted(most, "token")}${index.histogram_every > 1 ? `, counting one token in ${index.histogram_every}` : ""}`), element("span", {}, to)));
}

function contextSection(feature, record) {
  const largest = index.columns.largest[feature];
  const bands = record.bands.flatMap((contexts, i) => {
    const [from, to] = [index.bands - 1 - i, index.bands - i].map((n) => number(n / index.bands));
    const lines = contexts.filter(Boolean).map((context) => contextLine(context, largest));
    return lines.length ? [element("h3", {}, `Quantile ${from} to ${to} of the rows' peaks`), ...lines] : [];
  });
  const top = record.contexts.filter(Boolean).map((context) => contextLine(context, largest));
  return element("div", {}, section("Strongest contexts", element("p", { class: "about" }, "In front of each context, the activation at its peak, which is bold. Contexts come from different rows."), ...top), section("Contexts at all levels", element("p", { class: "about" }, "From a sample of all rows at which it is active."), ...bands));
}

function contextLine([row, peak, ids, acts], largest) {
  const say = (place) => `“${vocabulary[ids[place]]}”: activation ${number(acts[place])}`;
  const choose = (place) => show(element("p", {}, say(place)), element("p", { class: "hint" }, `row ${row}; the largest activation of this feature is ${number(largest)}`));
  const [line, tokens] = tokenLine({ "aria-label": `row ${row}, peak ${number(acts[peak])}` }, ids, acts.map((a) => a / largest), peak, say, choose);
  tokens[peak].classList.add("summit");
  return element("div", { class: "context" }, element("span", { class: "peak" }, fixed(acts[peak], decimalsOf([largest]))), line);
}

const tokenTable = (caption, pairs) => table(caption, [["token", "words"], ["logit per unit", null]], aligned(pairs).map(([id, effect]) => [word(id), effect]));

// Pairs (and any further values) with their numbers as text, all with the same number of decimals.
function aligned(pairs) {
  const decimals = decimalsOf(pairs.map(([, value]) => value));
  return pairs.map(([of, value, ...rest]) => [of, sign(value, fixed(value, decimals)), ...rest]);
}

function relatedTable(caption, measure, pairs) {
  if (pairs === null) return element("p", { class: "hint" }, `${caption}: undefined, because the feature is active at all sampled tokens or at none.`);
  if (!pairs.length) return element("p", { class: "hint" }, `${caption}: none.`);
  return table(caption, [["feature", null], [measure, null], ["peaks on", "words"]], aligned(pairs).map(([f, value]) => [featureLink(f), value, index.columns.peaks[f].map(word)]));
}

function linkSection(title, about, dictionaries) {
  const tables = Object.entries(dictionaries).map(([tag, links]) => {
    const said = links.some(([, , ids]) => ids.length) ? [["promotes", "words"]] : []; // not every dictionary has logit effects
    const rows = aligned(links).map(([f, weight, ids]) => [featureLink(f, tag), weight, ...said.map(() => ids.map(word))]);
    return table(tag, [["feature", null], ["weight per unit", null], ...said], rows);
  });
  return tables.length ? section(title, element("p", { class: "about" }, about), element("div", { class: "columns" }, ...tables)) : "";
}
