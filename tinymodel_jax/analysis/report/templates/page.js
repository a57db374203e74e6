"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tokens = [...document.querySelectorAll(".token")];
const panel = document.getElementById("panel");
let shown = null; // the feature whose activity colours the story
let kept = null; // the token whose features stay in the panel, whatever the pointer passes over
const legend = document.createElement("p"); // which feature colours the story

function name(feature) {
  const about = data.features[feature];
  return `feature ${feature}: ${about.concept} (F1 ${about.f1.toFixed(2)})`;
}

function colour(feature) {
  shown = shown === feature ? null : feature;
  const row = shown === null ? {} : data.features[shown].activity;
  const most = Math.max(...Object.values(row), 1e-9);
  tokens.forEach((token, index) => token.style.setProperty("--strength", (row[index] || 0) / most));
  legend.textContent = shown === null ? "" : `The story is coloured by the activation of ${name(shown)}.`;
  panel.querySelectorAll(".feature").forEach((button) => {
    button.setAttribute("aria-pressed", String(Number(button.dataset.feature) === shown));
  });
}

function keep(index) {
  kept = index;
  if (index !== null) choose(index);
  tokens.forEach((token, i) => token.classList.toggle("kept", i === index));
}

function choose(index) {
  tokens.forEach((token, i) => {
    token.classList.toggle("chosen", i === index);
    token.setAttribute("aria-selected", String(i === index));
    token.tabIndex = i === index ? 0 : -1;
  });
  const heading = document.createElement("p");
  const word = document.createElement("code");
  word.className = "word";
  word.textContent = tokens[index].textContent;
  heading.append("Features at ", word);
  const most = Math.max(...data.tokens[index].map((entry) => entry[1]), 1e-9);
  const buttons = data.tokens[index].map(([feature, amount]) => {
    const button = document.createElement("button");
    button.className = data.features[feature].f1 < data.named_from ? "feature weak" : "feature";
    button.type = "button";
    button.dataset.feature = feature;
    button.setAttribute("aria-pressed", String(feature === shown));
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.style.width = `${(5 * amount) / most}rem`;
    button.append(bar, `${name(feature)}, activation ${amount.toFixed(2)}`);
    button.addEventListener("click", () => colour(feature));
    return button;
  });
  panel.replaceChildren(legend, heading, ...buttons);
  if (!buttons.length) panel.append("No feature is active here.");
}

tokens.forEach((token, index) => {
  token.addEventListener("mouseenter", () => kept === null && choose(index));
  token.addEventListener("focus", () => token.matches(":focus-visible") && keep(index)); // by keyboard; a click decides itself
  token.addEventListener("click", () => keep(kept === index ? null : index));
  token.addEventListener("keydown", (event) => {
    const other = tokens[index + { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key]];
    const strongest = ["Enter", " "].includes(event.key) && data.tokens[index][0];
    if (strongest) colour(strongest[0]);
    if (other) other.focus();
    if (other || event.key === " ") event.preventDefault(); // no scrolling
  });
});
document.addEventListener("keydown", (event) => event.key === "Escape" && keep(null));
if (data.opening) {
  const [token, feature] = data.opening;
  choose(token);
  colour(feature);
}
