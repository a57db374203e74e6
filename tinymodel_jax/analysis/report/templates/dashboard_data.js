"use strict";
// Data comes from script files next to the page, because file:// forbids fetch. Each file calls dashboard.receive once.
const dashboard = (() => {
  const files = new Map(); // name -> { promise, resolve, reject }

  function load(name) {
    if (!files.has(name)) {
      const file = {};
      file.promise = new Promise((resolve, reject) => Object.assign(file, { resolve, reject }));
      files.set(name, file);
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onerror = () => {
        files.delete(name); // so that the next visit tries again
        file.reject(new Error(`data/${name}.js is missing; copy the dashboard's whole folder.`));
      };
      document.head.append(script);
    }
    return files.get(name).promise;
  }

  async function unpack(text) {
    if (typeof DecompressionStream === "undefined") throw new Error("This browser is too old: it has no DecompressionStream.");
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(unpacked).json();
  }

  function receive(name, text) {
    const file = files.get(name);
    unpack(text).then(file.resolve, file.reject);
  }

  return { load, receive };
})();

let index = null; // data/index.js
let vocabulary = null; // data/vocabulary.js: the text of every id

async function loadIndex() {
  if (index === null) {
    const [found, words] = await Promise.all([dashboard.load("index"), dashboard.load("vocabulary")]);
    vocabulary = words;
    index = found;
  }
}
