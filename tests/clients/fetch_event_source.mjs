// A server-sent events client: npm `@microsoft/fetch-event-source`. Usage: node fetch_event_source.mjs URL

import { report, reportMessage, serve } from "./lines.mjs";

// Browser globals that the package expects.
globalThis.window = globalThis;
globalThis.document = { hidden: false, addEventListener() {}, removeEventListener() {} };

const { fetchEventSource, EventStreamContentType } = await import("@microsoft/fetch-event-source");

const controller = new AbortController();
const stream = fetchEventSource(process.argv[2], {
  signal: controller.signal,
  openWhenHidden: true,
  onopen: async (response) => {
    if (!response.ok || !response.headers.get("content-type")?.startsWith(EventStreamContentType)) {
      report({ on: "refused", status: response.status });
      throw new Error("refused");
    }
    report({ on: "open" });
  },
  onmessage: ({ event, data }) => reportMessage(event || "message", "text", Buffer.from(data, "utf8")),
  onclose: () => report({ on: "close" }),
  onerror: (error) => {
    throw error;
  },
});
stream.catch((error) => process.stderr.write(`${error.stack}\n`));

await serve(
  () => {
    throw new Error("an event stream cannot send");
  },
  () => controller.abort(),
);
