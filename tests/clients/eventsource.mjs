// A server-sent events client: npm `eventsource`. Usage: node eventsource.mjs URL [EVENT-NAME…]
// It reconnects by itself, like every EventSource: `open` is reported each time.

import { EventSource } from "eventsource";
import { report, reportMessage, serve } from "./lines.mjs";

const [url, ...names] = process.argv.slice(2);
const source = new EventSource(url);

source.addEventListener("open", () => report({ on: "open" }));
for (const name of ["message", ...names]) {
  source.addEventListener(name, (event) => reportMessage(name, "text", Buffer.from(event.data, "utf8")));
}
source.addEventListener("error", (event) => {
  if (source.readyState === EventSource.CLOSED) {
    report(event.code === undefined ? { on: "close" } : { on: "refused", status: event.code });
  } else {
    report({ on: "interrupted" });
  }
});

await serve(
  () => {
    throw new Error("an EventSource cannot send");
  },
  () => source.close(),
);
