// A plain WebSocket client: npm `ws`. Usage: node ws.mjs URL

import WebSocket from "ws";
import { report, reportMessage, serve } from "./lines.mjs";

const socket = new WebSocket(process.argv[2], { perMessageDeflate: false });

socket.on("open", () => report({ on: "open" }));
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
