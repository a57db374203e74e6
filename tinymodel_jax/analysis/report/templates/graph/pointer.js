// Pointer, wheel and keys on the drawing. A drag pans, two fingers or the wheel zoom, a click chooses, with Shift it pins.
const tip = document.getElementById("tip");
const pressed = new Map(); // pointers that are down: id -> place
let moved = false;

const placeOf = (event) => {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};

function hover(node) {
  if (node !== state.hovered) change({ hovered: node });
  tip.hidden = !node;
  if (!node) return;
  const [x, y] = onScreen(node);
  const link = state.chosen && [...state.chosen.in, ...state.chosen.out].find((e) => nodes[edges.source[e]] === node || nodes[edges.target[e]] === node);
  const value = node.expanded ? `${measure(node)} ${signed(node.pre)}` : "";
  tip.replaceChildren(element("strong", {}, title(node)), element("span", {}, at(node)), ...[value, link === undefined || link === null ? "" : `link ${signed(edges.weight[link])}`].filter(Boolean).map((text) => element("div", {}, text)));
  tip.style.left = `${Math.min(x + 14, size.width - tip.offsetWidth - 6)}px`;
  tip.style.top = `${y + 14 + tip.offsetHeight > size.height - BOTTOM ? y - 14 - tip.offsetHeight : y + 14}px`;
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  pressed.set(event.pointerId, placeOf(event));
  moved = pressed.size > 1;
  canvas.focus({ preventScroll: true });
});

canvas.addEventListener("pointermove", (event) => {
  const [x, y] = placeOf(event);
  const before = pressed.get(event.pointerId);
  if (!before) {
    if (event.pointerType === "mouse") hover(nodeAt(x, y, 12));
    return;
  }
  if (pressed.size === 1) {
    if (!moved && Math.hypot(x - before[0], y - before[1]) < 4) return;
    moved = true;
    view.x += x - before[0];
    view.y += y - before[1];
  } else if (pressed.size === 2) {
    const [other] = [...pressed].find(([id]) => id !== event.pointerId).slice(1);
    const [was, is] = [before, [x, y]].map(([a, b]) => Math.hypot(a - other[0], b - other[1]));
    if (was > 0) zoom(is / was, (x + other[0]) / 2, (y + other[1]) / 2);
  }
  pressed.set(event.pointerId, [x, y]);
  tip.hidden = true;
  redraw();
});

canvas.addEventListener("pointerup", (event) => {
  const isClick = pressed.delete(event.pointerId) && !moved;
  if (!isClick) return;
  const node = nodeAt(...placeOf(event), event.pointerType === "mouse" ? 12 : 24);
  if (node && event.shiftKey) togglePin(node);
  else change({ chosen: node, hovered: null });
  tip.hidden = true;
});
canvas.addEventListener("pointercancel", (event) => pressed.delete(event.pointerId));
canvas.addEventListener("pointerleave", () => pressed.size || hover(null));
canvas.addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), ...placeOf(event));
  },
  { passive: false },
);

// The nearest node that is shown in a direction, for the arrow keys.
function neighbour(node, dx, dy) {
  const far = (other) => {
    const along = (other.x - node.x) * dx + (other.y - node.y) * dy;
    const aside = Math.abs((other.x - node.x) * dy) + Math.abs((other.y - node.y) * dx);
    return along > 0.5 ? along + 3 * aside : Infinity;
  };
  return nodes.filter((other) => other.shown && other !== node && far(other) < Infinity).reduce((best, other) => (best === null || far(other) < far(best) ? other : best), null);
}

const strongest = (links, end) => {
  const e = links.find((link) => nodes[edges[end][link]].shown && !isRest(nodes[edges[end][link]]));
  return e === undefined ? null : nodes[edges[end][e]];
};

function choose(node) {
  if (!node) return;
  change({ chosen: node, hovered: null });
  const [x, y] = onScreen(node);
  if (x < LEFT || x > size.width - 20) view.x += size.width / 2 - x;
  if (y < 20 || y > size.height - BOTTOM - 20) view.y += size.height / 2 - y;
  redraw();
}

const KEYS = {
  ArrowLeft: (node) => choose(neighbour(node, -1, 0)),
  ArrowRight: (node) => choose(neighbour(node, 1, 0)),
  ArrowUp: (node) => choose(neighbour(node, 0, -1)),
  ArrowDown: (node) => choose(neighbour(node, 0, 1)),
  i: (node) => choose(strongest(node.in, "source")),
  o: (node) => choose(strongest(node.out, "target")),
  p: (node) => togglePin(node),
  "+": () => zoom(1.25),
  "=": () => zoom(1.25),
  "-": () => zoom(0.8),
  0: () => fit(true),
};

canvas.addEventListener("keydown", (event) => {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (!KEYS[key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  KEYS[key](state.chosen ?? nodes.find((node) => node.isTarget));
});
