// Where nodes are drawn: a column for each token and one for what is at all positions, rows from the embeddings up.
const SPACING = 15;
const NARROWEST = 46; // so that tokens can be read
const GAP = 22;

// Attention has rows where SAEs divide its outputs into features; otherwise only its biases are nodes.
const hasAttention = nodes.some((node) => /^A\d/.test(node.site));
const TOP = (hasAttention ? 2 : 1) * data.layers + 1;
const rowOf = (node) => {
  if (node.isTarget) return TOP;
  if (node.layer < 0) return 0;
  const isAttention = /^A\d/.test(node.site) || node.site.endsWith("attn.b_O");
  return hasAttention ? 2 * node.layer + (isAttention ? 1 : 2) : node.layer + 1;
};
function rowName(row) {
  if (row === 0) return "embeddings";
  if (row === TOP) return "targets";
  return hasAttention ? `${row % 2 ? "attention" : "MLP"} ${Math.floor((row - 1) / 2)}` : `layer ${row - 1}`;
}

// Places the nodes that are shown; returns the columns and rows, in the coordinates of the nodes. Rows that
// are lower are stretched to the height for their width, `heightFor(width)`.
function layout(heightFor) {
  const cells = new Map();
  for (const node of nodes) {
    if (!node.shown) continue;
    const key = `${node.position} ${rowOf(node)}`;
    if (!cells.has(key)) cells.set(key, { column: node.position, row: rowOf(node), members: [] });
    cells.get(key).members.push(node);
  }
  const wide = new Map(); // nodes side by side, by column
  for (const { column, row, members } of cells.values()) {
    members.sort((a, b) => b.influence - a.influence || a.i - b.i);
    const across = row === TOP ? 1 : Math.ceil(Math.sqrt(members.length * 1.5)); // targets have long names
    wide.set(column, Math.max(wide.get(column) ?? 1, across));
  }
  const high = new Map();
  for (const { column, row, members } of cells.values()) {
    const across = row === TOP ? 1 : wide.get(column);
    high.set(row, Math.max(high.get(row) ?? 1, Math.ceil(members.length / across)));
  }
  const columns = [];
  let x = 0;
  for (let position = wide.has(-1) ? -1 : 0; position < data.tokens.length; position++) {
    const width = Math.max(NARROWEST, (wide.get(position) ?? 1) * SPACING + 12);
    columns.push({ position, x, width });
    x += width;
  }
  const rows = [];
  let y = 0;
  const needed = [...high.values()].reduce((sum, n) => sum + n * SPACING + GAP, 0);
  const stretched = Math.max(0, heightFor(x) - needed) / high.size;
  for (const row of [...high.keys()].sort((a, b) => b - a)) {
    const height = high.get(row) * SPACING + GAP + stretched;
    rows.push({ row, y, height });
    y += height;
  }
  const columnAt = new Map(columns.map((column) => [column.position, column]));
  const rowAt = new Map(rows.map((row) => [row.row, row]));
  for (const { column, row, members } of cells.values()) {
    const { x: left, width } = columnAt.get(column);
    const { y: top, height } = rowAt.get(row);
    const across = row === TOP ? 1 : Math.min(wide.get(column), members.length);
    const down = Math.ceil(members.length / across);
    members.forEach((node, k) => {
      node.x = left + width / 2 + ((k % across) - (across - 1) / 2) * SPACING;
      node.y = top + height / 2 + (Math.floor(k / across) - (down - 1) / 2) * SPACING;
    });
  }
  return { columns, rows, width: x, height: y };
}
