// The site's search is a worker, and browsers start none for a page that was opened as a file: its script then runs in
// a hidden frame instead, and messages go both ways as events.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.documentElement.append(frame)
      const inside = frame.contentWindow
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const run = source => new Promise(resolve => {
        const script = inside.document.createElement("script")
        script.onload = resolve
        script.src = source
        inside.document.documentElement.append(script)
      })
      inside.importScripts = (...sources) => sources.reduce((before, source) => before.then(() => run(source)), Promise.resolve())
      this.inside = inside
      this.ready = run(url)
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data })))
    }

    terminate() {
      this.inside.frameElement.remove()
    }
  }
}
