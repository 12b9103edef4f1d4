// A browser's own WebSocket or EventSource, in a page whose origin the scenario chooses.
// Usage: node browser.mjs websocket|eventsource URL ORIGIN
//
// This script provides the page itself: no server has to exist at ORIGIN.

import { launch } from "./chromium.mjs";
import { report, reportMessage, serve } from "./lines.mjs";

const [kind, url, origin] = process.argv.slice(2);
const browser = await launch();
const page = await browser.newPage();
await page.route(`${origin}/**`, (route) =>
  route.fulfill({ contentType: "text/html", body: "<!doctype html><title>A client</title>" }),
);
await page.goto(`${origin}/`);
await page.exposeFunction("tell", (happening) => {
  if (happening.on === "message") {
    reportMessage("message", happening.kind, Buffer.from(happening.data, "base64"));
  } else {
    report(happening);
  }
});

// The functions from here on run in the page.

await page.evaluate(() => {
  // Calls are chained so that reports keep the order of the events.
  let telling = Promise.resolve();
  window.report = (happening) => {
    telling = telling.then(() => window.tell(happening));
  };
  window.reportMessage = (kind, bytes) => {
    const data = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
    window.report({ on: "message", kind, data });
  };
});

const openSocket = (url) => {
  const socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => window.report({ on: "open" });
  socket.onmessage = ({ data }) => {
    if (typeof data === "string") {
      window.reportMessage("text", new TextEncoder().encode(data));
    } else {
      window.reportMessage("binary", new Uint8Array(data));
    }
  };
  socket.onclose = ({ code, reason }) => window.report({ on: "close", code, reason });
  window.socket = socket;
};

const openSource = (url) => {
  const source = new EventSource(url);
  source.onopen = () => window.report({ on: "open" });
  source.onmessage = ({ data }) => window.reportMessage("text", new TextEncoder().encode(data));
  source.onerror = () =>
    window.report({ on: source.readyState === EventSource.CLOSED ? "close" : "interrupted" });
};

const send = ({ kind, data }) => {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  window.socket.send(kind === "binary" ? bytes : new TextDecoder().decode(bytes));
};

await page.evaluate(kind === "websocket" ? openSocket : openSource, url);
await serve(
  (command) => page.evaluate(send, command),
  () => browser.close(),
);
