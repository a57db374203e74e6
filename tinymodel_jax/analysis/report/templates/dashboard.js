// The address selects the page: "#" and "#?find=…" show the index, "#feature/12" a feature, "#text/1" a text.
let shownIndex = false;
let first = true;

async function route() {
  const address = location.hash;
  const [kind, given] = address.slice(1).split("/");
  const page = document.getElementById("page");
  let content;
  let opened = () => {};
  try {
    await loadIndex();
    if (kind === "text") ({ content, opened } = await textPage(Number(given)));
    else content = kind === "feature" ? await featurePage(Number(given)) : indexPage();
  } catch (error) {
    content = [element("h1", { tabindex: -1 }, "This page cannot be shown"), element("p", { role: "alert" }, error.message), element("p", {}, element("a", { href: "#" }, "all features"))];
  }
  if (location.hash !== address) return; // the reader has followed another link in the meantime
  shownIndex = content.some((part) => part.id === "features");
  show();
  keep(null);
  page.replaceChildren(...content);
  // a text has the same number in each dictionary of a set
  for (const [site, to] of pages) if (site !== index?.site) document.querySelector(`#set [data-site="${site}"]`).href = kind === "text" ? `${to}${address}` : to;
  opened();
  page.removeAttribute("aria-busy");
  const title = page.querySelector("h1");
  document.title = `${title.textContent}${shownIndex ? "" : ` · ${document.getElementById("home").textContent}`}`;
  const last = shownIndex && [...page.querySelectorAll("#features a")].find((link) => link.textContent === String(lastFeature));
  if (last) last.focus();
  else if (!first) title.focus();
  if (!last) window.scrollTo(0, 0);
  first = false;
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") keep(null);
  if (event.key !== "/" || event.target.matches("input, select")) return;
  event.preventDefault();
  if (!shownIndex) location.hash = "";
  const focus = () => document.getElementById("find")?.focus();
  if (shownIndex) focus();
  else window.addEventListener("hashchange", () => setTimeout(focus), { once: true });
});
window.addEventListener("hashchange", route);
route();
