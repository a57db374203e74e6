// Pinned nodes: a list, groups with names (supernodes), and their subgraph.
const pins = document.getElementById("pins");
const chips = document.getElementById("chips");
const sketch = document.getElementById("sketch");
const selected = new Set(); // pinned nodes that the next group will have
const SVG = "http://www.w3.org/2000/svg";

const isGrouped = (node) => state.groups.some((group) => group.members.includes(node));

function drawPins() {
  for (const node of selected) if (!isPinned(node) || isGrouped(node)) selected.delete(node);
  pins.classList.toggle("empty", !state.pinned.length);
  const chip = (node) => {
    const select = () => {
      if (!selected.delete(node)) selected.add(node);
      drawPins();
    };
    return element("span", { class: "chip" }, element("button", { type: "button", "aria-pressed": String(selected.has(node)), title: "select for a group", click: select }, title(node), element("span", { class: "soft" }, node.position < 0 ? "" : ` @${node.position}`)), element("button", { type: "button", "aria-label": `unpin ${title(node)}`, click: () => togglePin(node) }, "×"));
  };
  const groups = state.groups.map((group) => {
    // The name changes in place: new chips would lose the focus, or the click, that ends the change.
    const rename = () => {
      group.name = called.value ||= "group";
      dissolve.setAttribute("aria-label", `dissolve ${group.name}`);
      drawSketch();
      writeAddressSoon();
    };
    const called = element("input", { "aria-label": "name of the group", value: group.name, change: rename });
    const dissolve = element("button", { type: "button", "aria-label": `dissolve ${group.name}`, click: () => change({ groups: state.groups.filter((other) => other !== group) }) }, "×");
    const members = group.members.map((node) => element("span", { class: "member" }, title(node)));
    return element("span", { class: "chip group" }, called, ...members, dissolve);
  });
  replaceFocused(chips, ...groups, ...state.pinned.filter((node) => !isGrouped(node)).map(chip));
  document.getElementById("group").disabled = !selected.size;
  document.getElementById("clear").disabled = !state.pinned.length;
  drawSketch();
}

document.getElementById("group").addEventListener("click", () => {
  const members = [...selected];
  selected.clear();
  change({ groups: [...state.groups, { name: title(members[0]), members }] });
  [...chips.querySelectorAll(".group input")].at(-1).focus();
});
document.getElementById("clear").addEventListener("click", () => change({ pinned: [], groups: [], places: {} }));

// The subgraph: a box for each group and each other pinned node; a link is the sum of the links between their members.
function boxes() {
  const alone = state.pinned.filter((node) => !isGrouped(node));
  const made = [...state.groups.map((group) => ({ id: `group ${group.members.map((node) => node.id).join()}`, text: group.name, members: group.members, group: true })), ...alone.map((node) => ({ id: node.id, text: title(node), members: [node] }))];
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  for (const box of made) {
    box.row = Math.round(mean(box.members.map(rowOf)));
    box.column = mean(box.members.map((node) => node.position));
    box.detail = box.group ? counted(box.members.length, "node") : box.members[0].position < 0 ? "all positions" : `${quoted(data.tokens[box.members[0].position])} @${box.members[0].position}`;
    box.width = Math.max(60, Math.min(190, 14 + 7 * Math.max(box.text.length, box.detail.length)));
  }
  return made;
}

// Rows from the targets down, and along a row the order of the tokens; boxes that would overlap are moved apart.
function place(made, width) {
  const rows = [...new Set(made.map((box) => box.row))].sort((a, b) => b - a);
  let y = 8;
  for (const row of rows) {
    const own = made.filter((box) => box.row === row).sort((a, b) => a.column - b.column);
    while (own.length) {
      let fits = 1; // as many side by side as there is room for
      let sum = own[0].width;
      while (fits < own.length && sum + own[fits].width + 16 <= width - 16) sum += own[fits++].width + 16;
      const line = own.splice(0, fits);
      let left = 8;
      for (const box of line) {
        box.x = Math.max(left, ((box.column + 1.5) / (data.tokens.length + 1)) * width - box.width / 2);
        left = box.x + box.width + 16;
      }
      let right = width - 8;
      for (const box of line.reverse()) {
        [box.x, box.y] = state.places[box.id] ?? [Math.min(box.x, right - box.width), y];
        right = Math.min(box.x, right - box.width) - 16;
      }
      y += 84;
    }
  }
  return Math.max(y - 34, ...made.map((box) => box.y + 50));
}

function drawSketch() {
  const made = boxes();
  const width = Math.max(280, sketch.parentElement.clientWidth - 4);
  const height = made.length ? place(made, width) : 0;
  sketch.setAttribute("viewBox", `0 0 ${width} ${height}`);
  sketch.style.height = `${height}px`;
  const boxOf = new Map(made.flatMap((box) => box.members.map((node) => [node, box])));
  const sums = new Map();
  for (const box of made) {
    box.whole = box.members.reduce((sum, node) => sum + node.whole, 0) || 1;
    for (const node of box.members) {
      for (const e of node.in) {
        const from = boxOf.get(nodes[edges.source[e]]);
        if (!from || from === box) continue;
        const key = `${made.indexOf(from)} ${made.indexOf(box)}`;
        sums.set(key, (sums.get(key) ?? 0) + edges.weight[e]);
      }
    }
  }
  const draw = (tag, attributes, ...children) => {
    const part = document.createElementNS(SVG, tag);
    for (const [attribute, value] of Object.entries(attributes)) part.setAttribute(attribute, value);
    part.append(...children);
    return part;
  };
  const lines = [...sums].map(([key, weight]) => {
    const [from, to] = key.split(" ").map((i) => made[i]);
    const share = Math.sqrt(Math.min(1, Math.abs(weight) / to.whole));
    const ends = { x1: from.x + from.width / 2, y1: from.y + (from.y > to.y ? 0 : 40), x2: to.x + to.width / 2, y2: to.y + (from.y > to.y ? 40 : 0) };
    const line = draw("line", { ...ends, class: weight < 0 ? "less" : "more", "stroke-width": 1 + 7 * share, opacity: 0.25 + 0.7 * share });
    const label = draw("text", { x: (ends.x1 + ends.x2) / 2, y: (ends.y1 + ends.y2) / 2 + 4, class: share > 0.25 ? "sum" : "sum small" }, signed(Number(weight.toPrecision(3))));
    return draw("g", {}, draw("title", {}, `${from.text} → ${to.text}: ${signed(weight)}`), line, label);
  });
  const drawn = made.map((box) => {
    const text = (y, what, kind) => draw("text", { x: box.width / 2, y, class: kind }, shortened(what, Math.floor((box.width - 8) / 6.8)));
    const part = draw("g", { class: box.group ? "box group" : "box", transform: `translate(${box.x} ${box.y})`, tabindex: 0, role: "button", "aria-label": `${box.text}, ${box.detail}` }, draw("rect", { width: box.width, height: 40, rx: 5 }), text(17, box.text, "name"), text(32, box.detail, "detail"));
    drag(part, box);
    return part;
  });
  replaceFocused(sketch, ...lines, ...drawn);
}

// Puts new parts in place of the old; the focus goes to the control at the same place of the order, or to the last one.
function replaceFocused(parent, ...parts) {
  const controls = () => [...parent.querySelectorAll("button, input, [tabindex]")];
  const focused = controls().indexOf(document.activeElement);
  parent.replaceChildren(...parts);
  if (focused >= 0) (controls()[focused] ?? controls().at(-1) ?? canvas).focus({ preventScroll: true });
}

// A drag moves a box; a click chooses its node.
function drag(part, box) {
  let start = null;
  part.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    part.setPointerCapture(event.pointerId);
    start = [event.clientX - box.x, event.clientY - box.y, event.clientX, event.clientY];
  });
  part.addEventListener("pointermove", (event) => {
    if (!start) return;
    [box.x, box.y] = [event.clientX - start[0], Math.max(0, event.clientY - start[1])];
    part.setAttribute("transform", `translate(${box.x} ${box.y})`);
  });
  part.addEventListener("pointerup", (event) => {
    if (!start) return;
    const far = Math.hypot(event.clientX - start[2], event.clientY - start[3]);
    start = null;
    if (far < 4) choose(box.members[0]);
    else change({ places: { ...state.places, [box.id]: [box.x, box.y] } });
  });
  part.addEventListener("pointercancel", drawSketch);
  part.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    choose(box.members[0]);
  });
}
