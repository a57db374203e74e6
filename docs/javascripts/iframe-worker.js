/* Search from file://, where browsers start no workers: the worker's script runs in a hidden frame instead. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.body.appendChild(document.createElement("iframe"));
      frame.hidden = true;
      const inner = frame.contentWindow;
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = frame.contentDocument.createElement("script");
      const loaded = new Promise((resolve) => (script.onload = resolve));
      script.src = new URL(url, location);
      frame.contentDocument.body.append(script);
      this.postMessage = (data) => loaded.then(() => inner.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
