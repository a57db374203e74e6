"use strict";
// The graph: nodes with their links, and what is shown of them. Links are numbers, so that 30,000 of them stay cheap.
const data = JSON.parse(document.getElementById("data").textContent);
const words = data.words; // text by token id

const nodes = data.nodes.id.map((id, i) => {
  const node = { i, id, in: [], out: [], x: 0, y: 0, shown: true };
  for (const [name, column] of Object.entries(data.nodes)) node[name] = column[i];
  return node;
});
const byId = new Map(nodes.map((node) => [node.id, node]));
const byLabel = new Map(nodes.map((node) => [node.label, node]));
const edges = { ...data.edges, n: data.edges.source.length };
for (let e = 0; e < edges.n; e++) {
  nodes[edges.source[e]].out.push(e);
  nodes[edges.target[e]].in.push(e);
}
for (const node of nodes) {
  node.whole = node.in.reduce((sum, e) => sum + Math.abs(edges.weight[e]), 0);
  node.isTarget = node.start > 0;
  node.record = (node.kind === "feature" && data.features[node.site]?.[node.feature]) || null;
}
// Share of a link in the sizes of all links to its target, and the influence that it carries.
edges.share = edges.weight.map((weight, e) => Math.abs(weight) / (nodes[edges.target[e]].whole || 1));
edges.carried = edges.share.map((share, e) => share * (nodes[edges.target[e]].influence + nodes[edges.target[e]].start));
for (const node of nodes) {
  node.in.sort((a, b) => edges.share[b] - edges.share[a]);
  node.out.sort((a, b) => edges.carried[b] - edges.carried[a]);
}
const looks = new Map(data.looks.map((look) => [look.place.join(), look]));

// For each value, the share of the sum that larger values have: the fewest that make up a share are those below it.
function ranks(values) {
  const order = values.map((_, i) => i).sort((a, b) => values[b] - values[a]);
  const whole = values.reduce((sum, value) => sum + value, 0) || 1;
  const found = new Float64Array(values.length);
  let before = 0;
  for (const i of order) {
    found[i] = before / whole;
    before += values[i];
  }
  return found;
}
const isRest = (node) => node.kind === "rest";
const nodeRank = ranks(nodes.map((node) => (isRest(node) ? 0 : node.influence)));
const edgeRank = ranks(edges.carried);
const isWithin = (rank, share) => share >= 1 || rank < share;

const quoted = (text) => `“${text}”`;
const at = (node) => (node.position < 0 ? "" : ` at ${quoted(data.tokens[node.position])} (position ${node.position})`);
const concept = (node) => (node.record?.concepts?.[0]?.[2] >= data.named_from ? node.record.concepts[0] : null);

// A short name, as in lists: what the node is, without its position.
function name(node) {
  switch (node.kind) {
    case "token":
      return quoted(data.tokens[node.position]);
    case "position":
      return `position ${node.position}`;
    case "bias":
      return node.site.replace(/^blocks\.(\d+)\.attn\.b_O$/, "bias of attention $1").replace(/^(.*) b_dec$/, "bias of $1");
    case "rest":
      return "everything else";
    case "error":
      return `${node.site} error`;
    case "feature":
      return node.site.endsWith(" MLP") ? `${node.site.replace(" MLP", "")} neuron ${node.feature}` : `${node.site}N${node.feature}`;
    case "logit":
      return `logit ${quoted(data.names[node.i])}`;
    default:
      return data.names[node.i] ?? node.label;
  }
}

function title(node) {
  const known = concept(node);
  return known ? `${name(node)} ${known[0]}` : name(node);
}

// The state of the page. `change` changes all of it but the names of groups: the listeners redraw, and write the address soon after.
const state = { chosen: null, hovered: null, pinned: [], groups: [], nodes: 0.95, links: 0.9, all: false, places: {} };
const listeners = [];
function change(news) {
  Object.assign(state, news);
  if ("pinned" in news || "groups" in news) {
    const pinned = new Set(state.pinned);
    state.groups = state.groups.map((group) => ({ ...group, members: group.members.filter((node) => pinned.has(node)) })).filter((group) => group.members.length);
  }
  for (const listener of listeners) listener(news);
}
const isPinned = (node) => state.pinned.includes(node);
const togglePin = (node) => change({ pinned: isPinned(node) ? state.pinned.filter((other) => other !== node) : [...state.pinned, node] });

// The same state as an object of plain values, for the address and for files. Nodes have the same ids in all graphs of a prompt.
function saved() {
  const groups = state.groups.map(({ name: called, members }) => ({ name: called, members: members.map((node) => node.id) }));
  return { chosen: state.chosen?.id ?? null, pinned: state.pinned.map((node) => node.id), groups, nodes: state.nodes, links: state.links, all: state.all, places: state.places };
}

function restore(given) {
  const known = (ids) => [...new Set(ids)].map((id) => byId.get(id)).filter(Boolean);
  const groups = given.groups.map((group) => ({ name: group.name, members: known(group.members) }));
  const limit = (value, otherwise) => (Number(value) > 0 && Number(value) <= 1 ? Number(value) : otherwise);
  const pinned = [...new Set([...known(given.pinned), ...groups.flatMap((group) => group.members)])];
  change({ chosen: byId.get(given.chosen) ?? null, hovered: null, pinned, groups, nodes: limit(given.nodes, 0.95), links: limit(given.links, 0.9), all: Boolean(given.all), places: given.places ?? {} });
}

// Browsers allow some 100 to 200 changes of the address in ten seconds; a drag of a slider makes more.
const address = { wait: 0 };
function writeAddressSoon() {
  clearTimeout(address.wait);
  address.wait = setTimeout(writeAddress, 200);
}

// #node=M2N123@5&pin=…&pin=…&group=name|id|id&nodes=0.9&links=0.8&all=1
function writeAddress() {
  const { chosen, pinned, groups, nodes: share, links, all } = saved();
  const parts = new URLSearchParams();
  if (chosen) parts.append("node", chosen);
  for (const id of pinned) parts.append("pin", id);
  for (const group of groups) parts.append("group", [group.name.replaceAll("|", "/"), ...group.members].join("|"));
  if (share !== 0.95) parts.append("nodes", share);
  if (links !== 0.9) parts.append("links", links);
  if (all) parts.append("all", 1);
  history.replaceState(null, "", `#${parts}`);
}

function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const groups = parts.getAll("group").map((text) => text.split("|")).map(([called, ...members]) => ({ name: called, members }));
  restore({ chosen: parts.get("node"), pinned: parts.getAll("pin"), groups, nodes: parts.get("nodes"), links: parts.get("links"), all: parts.get("all") });
}
