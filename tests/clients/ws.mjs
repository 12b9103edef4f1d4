// A plain WebSocket client: npm `ws`. Usage: node ws.mjs URL [WINDOW_BITS]
//
// With WINDOW_BITS it requires permessage-deflate, and a server window of at most that many bits.

import WebSocket from "ws";
import { report, reportMessage, serve } from "./lines.mjs";

const [url, bits] = process.argv.slice(2);
const deflate = bits && { threshold: 0, serverMaxWindowBits: Number(bits) };
const socket = new WebSocket(url, { perMessageDeflate: deflate ?? false });

socket.on("open", () => {
  if (deflate && !socket.extensions.includes("permessage-deflate")) {
    throw new Error("no compression was agreed on");
  }
  report({ on: "open" });
});
socket.on("message", (data, isBinary) => reportMessage("message", isBinary ? "binary" : "text", data));
socket.on("unexpected-response", (_request, response) => {
  report({ on: "refused", status: response.statusCode });
  response.destroy();
});
socket.on("error", (error) => process.stderr.write(`${error.message}\n`));
socket.on("close", (code, reason) => report({ on: "close", code, reason: reason.toString() }));

await serve(
  ({ kind, data }) => {
    const bytes = Buffer.from(data, "base64");
    socket.send(bytes, { binary: kind === "binary" });
  },
  () => socket.close(1000),
);
