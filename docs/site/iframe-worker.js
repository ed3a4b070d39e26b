// A browser starts no worker of a page that lies in a folder: there the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.body.appendChild(document.createElement("iframe"));
      frame.hidden = true;
      this.inside = frame.contentWindow;
      // What the search sends arrives here.
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      // The English search needs no further script.
      this.inside.importScripts = () => Promise.resolve();
      const script = this.inside.document.createElement("script");
      script.src = new URL(url, document.baseURI).href;
      this.ready = new Promise((done) => script.addEventListener("load", done));
      this.inside.document.body.append(script);
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data })));
    }
  };
}
