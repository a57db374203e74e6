// Parts of pages: elements, numbers, tables. All text is added as text nodes, because a token may be "<script>".
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Numbers have four significant digits and at most six decimals; in a column, all have as many decimals as the largest.
const decimalsOf = (values) => Math.min(6, Math.max(0, 3 - Math.floor(Math.log10(values.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-6)))));
const fixed = (value, decimals) => (value !== 0 && Number(value.toFixed(decimals)) === 0 ? "≈ 0" : value.toFixed(decimals));
const number = (value) => {
  const text = fixed(value, decimalsOf([value]));
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
};
const sign = (value, text) => (value > 0 && text !== "≈ 0" ? `+${text}` : text);
const signed = (value) => sign(value, number(value));
const counted = (n, thing) => `${n.toLocaleString("en")} ${thing}${n === 1 ? "" : "s"}`;

function table(caption, headings, rows) {
  const heads = headings.map(([text, kind]) => element("th", { scope: "col", class: kind }, text));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell, i) => element("td", { class: headings[i][1] }, ...[cell].flat()))));
  return element("table", {}, element("caption", {}, caption), element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...body));
}
