// The drawing: a canvas that is panned, zoomed and pointed at. Links are drawn for what is chosen, hovered or pinned.
const canvas = document.getElementById("canvas");
const pen = canvas.getContext("2d");
const view = { x: 0, y: 0, k: 1, whole: false };
const LEFT = 84; // width of the rows' names
const BOTTOM = 26; // height of the tokens
const size = { width: 0, height: 0 };
let placed = { columns: [], rows: [], width: 1, height: 1 };
let colours = {};
let found = new Set(); // nodes that the search has found
let asked = false;

function redraw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    draw();
  });
}

function readColours() {
  const style = getComputedStyle(document.documentElement);
  colours = Object.fromEntries(["paper", "card", "band", "ink", "soft", "line", "more", "less", "mark"].map((part) => [part, style.getPropertyValue(`--${part}`).trim()]));
  colours.font = getComputedStyle(document.body).fontFamily;
}

function resize() {
  const box = canvas.parentElement.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  const changed = box.width !== size.width || box.height !== size.height;
  Object.assign(size, { width: box.width, height: box.height });
  canvas.width = Math.round(box.width * ratio);
  canvas.height = Math.round(box.height * ratio);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  if (changed) fit(false);
  repaint();
}

// The scale at which the columns fit, but no smaller than can be read unless all is to be seen, and the height that
// fills the canvas at this scale.
const scaleFor = (width) => Math.min(2.5, Math.max((size.width - LEFT - 12) / width, view.whole ? 0 : 0.8));
const heightFor = (width) => (size.height - BOTTOM - 16) / scaleFor(width);

// Shows the end of a wide graph, with the targets, at a scale that can be read; or, if `whole`, all of it.
function fit(whole) {
  view.whole = whole;
  placed = layout(heightFor);
  const down = (size.height - BOTTOM - 12) / placed.height;
  view.k = Math.min(scaleFor(placed.width), whole ? down : Math.max(down, 0.35));
  const room = size.width - LEFT - placed.width * view.k;
  view.x = room > 0 ? LEFT + room / 2 : size.width - 8 - placed.width * view.k;
  view.y = Math.max(8, (size.height - BOTTOM - placed.height * view.k) / 2);
  redraw();
}

function zoom(factor, x = size.width / 2, y = size.height / 2) {
  const k = Math.min(6, Math.max(0.1, view.k * factor));
  view.x = x - ((x - view.x) * k) / view.k;
  view.y = y - ((y - view.y) * k) / view.k;
  view.k = k;
  redraw();
}

const onScreen = (node) => [node.x * view.k + view.x, node.y * view.k + view.y];

function draw() {
  pen.fillStyle = colours.card;
  pen.fillRect(0, 0, size.width, size.height);
  drawBands();
  const focus = [...new Set([state.chosen, state.hovered].filter(Boolean))];
  const strong = new Map(); // node -> signed share of its link with a node of the focus
  if (state.all) drawAll();
  for (const node of state.pinned) for (const e of [...node.in, ...node.out]) if (isLinkShown(e)) drawLink(e, 0.5);
  for (const node of focus) {
    for (const e of [...node.in, ...node.out]) {
      if (!isLinkShown(e)) continue;
      drawLink(e, 1);
      const other = nodes[edges.source[e] === node.i ? edges.target[e] : edges.source[e]];
      strong.set(other, Math.sign(edges.weight[e]) * edges.share[e]);
    }
  }
  pen.globalAlpha = 1;
  for (const node of nodes) if (node.shown) drawNode(node, strong.get(node) ?? 0, focus.length > 0 && !focus.includes(node) && !strong.has(node));
  for (const node of nodes) if (node.shown && node.isTarget) drawName(node, "right");
  for (const node of [...state.pinned, ...focus]) if (node.shown && !node.isTarget) drawName(node, "left");
  drawEdges();
}

const isLinkShown = (e) => isWithin(edgeRank[e], state.links) && nodes[edges.source[e]].shown && nodes[edges.target[e]].shown;

function drawBands() {
  for (const [i, row] of placed.rows.entries()) {
    if (i % 2) continue;
    pen.fillStyle = colours.band;
    pen.fillRect(0, row.y * view.k + view.y, size.width, row.height * view.k);
  }
  pen.strokeStyle = colours.line;
  pen.lineWidth = 1;
  pen.beginPath();
  for (const column of placed.columns) {
    const x = Math.round(column.x * view.k + view.x) + 0.5;
    pen.moveTo(x, 0);
    pen.lineTo(x, size.height);
  }
  pen.globalAlpha = 0.6;
  pen.stroke();
  pen.globalAlpha = 1;
}

function drawLink(e, strength) {
  const share = Math.sqrt(edges.share[e]);
  pen.globalAlpha = strength * (0.15 + 0.75 * share);
  pen.strokeStyle = edges.weight[e] > 0 ? colours.more : colours.less;
  pen.lineWidth = 0.6 + 6 * share;
  pen.beginPath();
  pen.moveTo(...onScreen(nodes[edges.source[e]]));
  pen.lineTo(...onScreen(nodes[edges.target[e]]));
  pen.stroke();
}

// All links together. 30,000 lines take longer than a frame, so they are drawn into a picture that is moved with the
// view, and drawn anew when the view has come to rest.
const picture = { canvas: document.createElement("canvas"), drawn: null, wait: 0 };
const MARGIN = 200;

function drawAll() {
  const at = [view.x, view.y, view.k];
  if (!picture.drawn) paintAll();
  else if (picture.drawn.some((value, i) => value !== at[i])) {
    clearTimeout(picture.wait);
    picture.wait = setTimeout(repaint, 250);
  }
  const [x, y, k] = picture.drawn;
  const scale = view.k / k;
  pen.drawImage(picture.canvas, view.x - (x + MARGIN) * scale, view.y - (y + MARGIN) * scale, (size.width + 2 * MARGIN) * scale, (size.height + 2 * MARGIN) * scale);
}

function repaint() {
  picture.drawn = null;
  redraw();
}

function paintAll() {
  picture.drawn = [view.x, view.y, view.k];
  const ratio = window.devicePixelRatio || 1;
  picture.canvas.width = (size.width + 2 * MARGIN) * ratio;
  picture.canvas.height = (size.height + 2 * MARGIN) * ratio;
  const brush = picture.canvas.getContext("2d");
  brush.setTransform(ratio, 0, 0, ratio, MARGIN * ratio, MARGIN * ratio);
  const paths = new Map(); // few strokes: by sign and by size
  for (let e = 0; e < edges.n; e++) {
    if (!isLinkShown(e)) continue;
    const key = `${edges.weight[e] > 0 ? "more" : "less"} ${Math.min(3, Math.floor(Math.sqrt(edges.share[e]) * 6))}`;
    if (!paths.has(key)) paths.set(key, new Path2D());
    const path = paths.get(key);
    path.moveTo(...onScreen(nodes[edges.source[e]]));
    path.lineTo(...onScreen(nodes[edges.target[e]]));
  }
  for (const [key, path] of paths) {
    const [kind, level] = key.split(" ");
    brush.strokeStyle = colours[kind];
    brush.globalAlpha = 0.06 + 0.1 * level;
    brush.lineWidth = 0.6 + Number(level);
    brush.stroke(path);
  }
}

function drawNode(node, link, dim) {
  const [x, y] = onScreen(node);
  if (x < -10 || y < -10 || x > size.width + 10 || y > size.height + 10) return;
  const r = Math.max(2, Math.min(9, (3.2 + 3 * Math.min(1, Math.sqrt(node.influence))) * Math.sqrt(view.k)));
  pen.globalAlpha = dim ? 0.35 : 1;
  pen.beginPath();
  if (node.kind === "feature") pen.arc(x, y, r, 0, 2 * Math.PI);
  else if (node.kind === "error") {
    pen.moveTo(x, y - r - 1);
    pen.lineTo(x + r + 1, y);
    pen.lineTo(x, y + r + 1);
    pen.lineTo(x - r - 1, y);
    pen.closePath();
  } else if (node.kind === "position") {
    pen.moveTo(x, y - r);
    pen.lineTo(x + r, y + r * 0.8);
    pen.lineTo(x - r, y + r * 0.8);
    pen.closePath();
  } else pen.rect(x - r, y - r, 2 * r, 2 * r);
  pen.fillStyle = link ? (link > 0 ? colours.more : colours.less) : node.kind === "feature" || node.isTarget ? colours.card : colours.line;
  pen.fill();
  pen.strokeStyle = found.has(node) ? colours.mark : isPinned(node) ? colours.ink : colours.soft;
  pen.lineWidth = found.has(node) ? 3 : node === state.chosen || isPinned(node) ? 2.5 : 1;
  pen.stroke();
  if (node === state.chosen) {
    pen.beginPath();
    pen.arc(x, y, r + 4, 0, 2 * Math.PI);
    pen.strokeStyle = colours.ink;
    pen.lineWidth = 1.5;
    pen.stroke();
  }
  pen.globalAlpha = 1;
}

function drawName(node, align) {
  const [x, y] = onScreen(node);
  if (x < 0 || y < 0 || x > size.width || y > size.height - BOTTOM) return;
  const text = node.isTarget ? `${title(node)}  ${signed(node.pre)}` : shortened(title(node), 28);
  pen.font = `12px ${colours.font}`;
  pen.textBaseline = "middle";
  const width = pen.measureText(text).width;
  const left = Math.min(Math.max(4, align === "right" ? x - 12 - width : x + 10), size.width - width - 6);
  pen.globalAlpha = 0.85;
  pen.fillStyle = colours.card;
  pen.fillRect(left - 3, y - 8, width + 6, 16);
  pen.globalAlpha = 1;
  pen.fillStyle = colours.ink;
  pen.textAlign = "left";
  pen.fillText(text, left, y + 0.5);
}

const shortened = (text, n) => (text.length > n ? `${text.slice(0, n - 1)}…` : text);

// The text, shortened to a width in pixels of the pen's font.
function fitting(text, width) {
  let n = text.length;
  while (n > 1 && pen.measureText(shortened(text, n)).width > width) n--;
  return shortened(text, n);
}

// The names of rows and the tokens stay in view at the edges.
function drawEdges() {
  pen.font = `12px ${colours.font}`;
  pen.textBaseline = "middle";
  pen.fillStyle = colours.soft;
  pen.textAlign = "left";
  for (const row of placed.rows) {
    const y = (row.y + row.height / 2) * view.k + view.y;
    pen.globalAlpha = 0.85;
    pen.fillStyle = colours.card;
    pen.fillRect(0, y - 9, pen.measureText(rowName(row.row)).width + 12, 18);
    pen.globalAlpha = 1;
    pen.fillStyle = colours.soft;
    pen.fillText(rowName(row.row), 6, y);
  }
  pen.fillStyle = colours.paper;
  pen.fillRect(0, size.height - BOTTOM, size.width, BOTTOM);
  pen.fillStyle = colours.ink;
  pen.textAlign = "center";
  const look = shownLook;
  const every = Math.ceil(32 / (NARROWEST * view.k)); // narrow columns: not all tokens have room
  for (const [i, column] of placed.columns.entries()) {
    const x = (column.x + column.width / 2) * view.k + view.x;
    const width = column.width * view.k;
    const weight = look && column.position >= 0 ? (look.pattern[column.position] ?? 0) : 0;
    if (weight > 0.005) {
      pen.globalAlpha = 0.05 + 0.7 * weight;
      pen.fillStyle = colours.mark;
      pen.fillRect(column.x * view.k + view.x + 1, size.height - BOTTOM + 2, width - 2, BOTTOM - 4);
      pen.globalAlpha = 1;
      pen.fillStyle = colours.ink;
    }
    if (i % every) continue;
    const text = column.position < 0 ? "all" : data.tokens[column.position].trim() || "␣";
    pen.fillText(fitting(text, every * width - 4), x, size.height - BOTTOM / 2);
  }
}

// The node at a place of the canvas, at most `reach` pixels away.
function nodeAt(x, y, reach) {
  let best = null;
  let least = reach * reach;
  for (const node of nodes) {
    if (!node.shown) continue;
    const [a, b] = onScreen(node);
    const far = (a - x) ** 2 + (b - y) ** 2;
    if (far < least) [best, least] = [node, far];
  }
  return best;
}
