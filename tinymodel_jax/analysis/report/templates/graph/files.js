// Files of what is shown and pinned: Save writes one, Load checks one as a whole before it changes anything.
const FORMAT = "tinymodel_jax/graph_view";

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const isText = (value) => typeof value === "string";
const isShare = (value) => typeof value === "number" && value > 0 && value <= 1;
const isList = (value, isPart) => Array.isArray(value) && value.every(isPart);
const PARTS = {
  chosen: (value) => value === null || isText(value),
  pinned: (value) => isList(value, isText),
  groups: (value) => isList(value, (group) => isObject(group) && isText(group.name) && isList(group.members, isText)),
  nodes: isShare,
  links: isShare,
  all: (value) => typeof value === "boolean",
  places: (value) => isObject(value) && Object.values(value).every((place) => isList(place, Number.isFinite) && place.length === 2),
};

function parsed(text) {
  let given;
  try {
    given = JSON.parse(text);
  } catch {
    throw new Error("it is not JSON");
  }
  if (!isObject(given) || given.format !== FORMAT) throw new Error("it is not a file that Save wrote");
  const wrong = Object.keys(PARTS).filter((part) => !PARTS[part](given[part]));
  if (wrong.length) throw new Error(`it has wrong values for ${wrong.join(", ")}`);
  return given;
}

document.getElementById("save").addEventListener("click", () => {
  const text = JSON.stringify({ format: FORMAT, prompt: data.tokens, ...saved() }, null, 1);
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: "graph-view.json" });
  link.click();
  URL.revokeObjectURL(link.href);
});

const file = document.getElementById("file");
document.getElementById("load").addEventListener("click", () => file.click());
file.addEventListener("change", async () => {
  const said = document.getElementById("said");
  try {
    const given = parsed(await file.files[0].text());
    restore(given);
    const missing = [given.chosen, ...given.pinned].filter((id) => id && !byId.has(id)).length;
    said.textContent = missing ? `${counted(missing, "node")} of the file ${missing === 1 ? "is" : "are"} not in this graph.` : "";
  } catch (error) {
    said.textContent = `${file.files[0].name} cannot be loaded: ${error.message}.`;
  }
  file.value = "";
});
