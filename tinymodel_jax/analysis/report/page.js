"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tokens = [...document.querySelectorAll(".token")];
const panel = document.getElementById("panel");
let shown = null; // the feature whose activity colours the story

function colour(feature) {
  shown = shown === feature ? null : feature;
  const row = shown === null ? {} : data.features[shown].activity;
  const most = Math.max(...Object.values(row), 1e-9);
  tokens.forEach((token, index) => token.style.setProperty("--strength", (row[index] || 0) / most));
  panel.querySelectorAll(".feature").forEach((button) => {
    button.setAttribute("aria-pressed", String(Number(button.dataset.feature) === shown));
  });
}

function choose(index) {
  tokens.forEach((token, i) => {
    token.classList.toggle("chosen", i === index);
    token.setAttribute("aria-selected", String(i === index));
    token.tabIndex = i === index ? 0 : -1;
  });
  const heading = document.createElement("p");
  heading.textContent = `“${tokens[index].textContent}”`;
  const most = Math.max(...data.tokens[index].map((entry) => entry[1]), 1e-9);
  const buttons = data.tokens[index].map(([feature, amount]) => {
    const about = data.features[feature];
    const button = document.createElement("button");
    button.className = "feature";
    button.type = "button";
    button.dataset.feature = feature;
    button.setAttribute("aria-pressed", String(feature === shown));
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.style.width = `${(5 * amount) / most}rem`;
    button.append(bar, `feature ${feature}: ${about.concept} (F1 ${about.f1.toFixed(2)}), activation ${amount.toFixed(2)}`);
    button.addEventListener("click", () => colour(feature));
    return button;
  });
  panel.replaceChildren(heading, ...buttons);
  if (!buttons.length) panel.append("No feature is active here.");
}

tokens.forEach((token, index) => {
  token.addEventListener("mouseenter", () => choose(index));
  token.addEventListener("focus", () => choose(index));
  token.addEventListener("click", () => choose(index));
  token.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const other = step && tokens[index + step];
    if (event.key === "Enter" && data.tokens[index].length) colour(data.tokens[index][0][0]);
    if (!other) return;
    event.preventDefault();
    other.focus();
  });
});
