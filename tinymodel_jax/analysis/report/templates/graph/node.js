// The panel about the chosen node: what adds up to its value, what it adds to, and what is known about its feature.
const panel = document.getElementById("panel");
const ROWS = 12;
let shownLook = null; // the attention score that the panel explains; its pattern colours the tokens

const measure = (node) => (node.kind === "feature" ? (node.value > 0 ? "activation" : "pre-activation") : node.kind === "logit" ? "logit" : "value");
const word = (id) => element("span", { class: "word" }, words[id]);
const strongText = (value, decimals) => element("b", { class: value < 0 ? "less" : "more" }, sign(value, fixed(value, decimals)));

// One decimal more than the whole has, so that the parts can be added by hand.
const decimalsFor = (node) => Math.min(5, decimalsOf([node.whole || node.pre]) + 1);

function equation(node) {
  const sum = node.in.reduce((all, e) => all + edges.weight[e], 0);
  const decimals = decimalsFor(node);
  const off = Math.abs(sum + node.bias - node.pre);
  const more = node.in.reduce((all, e) => all + Math.max(0, edges.weight[e]), 0);
  return element(
    "div",
    { class: "equation" },
    element("p", {}, `${counted(node.in.length, "input")} `, strongText(sum, decimals), " + bias ", strongText(node.bias, decimals), " = ", strongText(sum + node.bias, decimals)),
    element("p", {}, `${measure(node)} in the model's pass `, strongText(node.pre, decimals), element("span", { class: "soft" }, `, difference ${off < 1e-6 ? "below 0.000001" : number(off)}`)),
    element("p", { class: "soft" }, `inputs above 0 add ${signed(more)}, those below 0 add ${signed(sum - more)}`),
  );
}

function nodeButton(node) {
  const place = node.position < 0 || node.kind === "position" ? "" : ` @${node.position}`;
  const hint = node.record && !concept(node) ? [element("span", { class: "soft", title: "promotes" }, ` ↑${words[node.record.promoted[0][0]]}`)] : [];
  return element("button", { type: "button", class: "node", click: () => choose(node), mouseenter: () => change({ hovered: node }), mouseleave: () => change({ hovered: null }) }, title(node), element("span", { class: "soft" }, place), ...hint);
}

// Buttons of the heads that carry a link; those whose attention scores are in the page can be opened.
function headButtons(e, row) {
  const [direct, ...rest] = edges.paths[e];
  const [query, key] = [nodes[edges.target[e]].position, nodes[edges.source[e]].position];
  if (key < 0) return []; // a bias is read at all positions
  const found = [];
  for (let i = 0; i < rest.length; i += 3) {
    const [layer, head, part] = rest.slice(i, i + 3);
    if (Math.abs(part) < 0.1 * Math.abs(edges.weight[e])) continue;
    const look = looks.get([layer, head, query, key].join());
    const text = `L${layer}H${head} ${signed(part)}`;
    found.push(look ? element("button", { type: "button", class: "head", title: "why this head looked here", click: () => openLook(look, row) }, text) : element("span", { class: "head" }, text));
  }
  return found.length && Math.abs(direct) > 0.1 * Math.abs(edges.weight[e]) ? [element("span", { class: "head" }, `direct ${signed(direct)}`), ...found] : found;
}

function openLook(look, row) {
  const old = panel.querySelector(".look");
  const again = shownLook === look && old?.previousElementSibling === row;
  old?.remove();
  shownLook = again ? null : look;
  if (!again) row.after(lookBox(look));
  redraw();
}

function lookBox(look) {
  const [layer, head, query, key] = look.place;
  const from = `${quoted(data.tokens[query])} (position ${query})`;
  const to = `${quoted(data.tokens[key])} (position ${key})`;
  const named = (label) => (byLabel.has(label) ? nodeButton(byLabel.get(label)) : label);
  const rows = look.pairs.map(([a, b, value]) => [named(a), named(b), signed(value)]);
  const box = element("div", {}, element("h3", {}, `Why head ${head} of layer ${layer} looked here`));
  box.append(
    element("p", {}, `From ${from}, it gives ${to} ${number(100 * look.pattern[key])} % of its attention. Tokens below the graph are coloured by their shares. The score of the two positions is ${number(look.score)}, a sum over all pairs of what its query and its key are made of.`),
    element("p", { class: "soft" }, "A key is made of all that has reached its position, also from [BEGIN] through earlier heads. A pair that all keys share does not choose this one."),
    table("strongest pairs", [["query", "words"], ["key", "words"], ["score", null]], rows),
  );
  return element("div", { class: "look" }, box);
}

function linkList(heading, about, links, end) {
  const decimals = decimalsOf(links.map((e) => edges.weight[e]));
  const list = element("div", { class: "links" });
  const row = (e) => {
    const weight = edges.weight[e];
    const bar = element("span", { class: weight < 0 ? "bar less" : "bar more", style: `width: ${Math.max(2, 44 * Math.sqrt(edges.share[e]))}px` });
    const other = nodes[edges[end][e]];
    const line = element("div", { class: other.shown ? "link" : "link hidden" }, element("span", { class: "weight" }, sign(weight, fixed(weight, decimals))), element("span", { class: "gauge" }, bar));
    line.append(element("span", { class: "called" }, nodeButton(other), ...headButtons(e, line)));
    return line;
  };
  list.append(...links.slice(0, ROWS).map(row));
  if (links.length > ROWS) {
    const more = element("button", { type: "button", class: "more-rows", click: () => more.replaceWith(...links.slice(ROWS).map(row)) }, `show all ${links.length}`);
    list.append(more);
  }
  return element("section", { class: heading.toLowerCase() }, element("h3", {}, heading), element("p", { class: "soft" }, about), list);
}

function contextLine([row, peak, ids, acts], largest) {
  const tokens = ids.map((id, i) => element("span", { class: i === peak ? "token peak" : "token", style: `--strength: ${acts[i] / largest}`, title: `activation ${number(acts[i])}` }, words[id]));
  return element("p", { class: "context", title: `row ${row}` }, element("span", { class: "soft" }, `${number(acts[peak])} `), ...tokens);
}

const tokenList = (caption, pairs) => element("p", {}, element("span", { class: "soft" }, `${caption} `), ...pairs.flatMap(([id, effect]) => [word(id), element("span", { class: "soft" }, ` ${signed(effect)}  `)]));

function featureParts(node) {
  const { record } = node;
  const parts = [];
  if (record.concepts) parts.push(element("h3", {}, "Concepts"), element("p", {}, record.concepts.length ? record.concepts.map(([called, meaning, f1]) => `${called} (${meaning}), F1 ${f1.toFixed(2)}`).join("; ") : "no concept fits its activity"));
  const page = data.pages[node.site];
  if (page) parts.push(element("p", {}, element("a", { href: `${page}#feature/${node.feature}` }, "its page in the dashboard")));
  parts.push(element("h3", {}, "Effect on the logits"), element("p", { class: "soft" }, "Direct, per unit of activation."), tokenList("promotes", record.promoted), tokenList("suppresses", record.suppressed));
  if (record.contexts) {
    const largest = Math.max(node.value, ...record.contexts.flatMap((context) => context[3]), 1e-9);
    parts.push(element("h3", {}, "Strongest contexts"), ...(record.contexts.length ? record.contexts.map((context) => contextLine(context, largest)) : [element("p", {}, "Never active on these rows.")]));
  }
  return parts;
}

const KINDS = {
  token: "The embedding of a token.",
  position: "The embedding of a position.",
  bias: "A bias, which is written at all positions.",
  rest: "All sources that are not nodes of this graph, and the links that were left out of it.",
  error: "What the dictionary does not predict of the value at this position.",
};

function markPin() {
  const pin = document.getElementById("pin");
  if (!pin) return;
  pin.setAttribute("aria-pressed", String(isPinned(state.chosen)));
  pin.textContent = isPinned(state.chosen) ? "Unpin" : "Pin";
}

function nodePanel() {
  const node = state.chosen;
  shownLook = null;
  if (!node) return [element("h2", {}, "Choose a node"), element("p", {}, "Point at a node to see its links, and click it to see what adds up to its value. Shift-click pins it.")];
  const pin = element("button", { type: "button", id: "pin", click: () => togglePin(node) });
  const parts = [element("h2", {}, title(node), element("span", { class: "soft" }, at(node))), pin];
  if (KINDS[node.kind]) parts.push(element("p", {}, KINDS[node.kind]));
  if (node.expanded) {
    parts.push(equation(node), linkList("Inputs", `What each adds to the ${measure(node)}, and through which heads.`, node.in, "source"));
  }
  if (node.out.length) parts.push(linkList("Outputs", "What it adds to each of these.", node.out, "target"));
  if (node.record) parts.push(...featureParts(node));
  if (!node.isTarget) parts.push(element("p", { class: "soft" }, `Influence on the targets: ${number(node.influence)}`));
  return parts;
}
