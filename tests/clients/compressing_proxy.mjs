// A proxy that compresses responses with Express's middleware: npm `compression`.
// Usage: node compressing_proxy.mjs HOST:PORT. Reports its own port.

import http from "node:http";
import compression from "compression";
import { report } from "./lines.mjs";

const [host, port] = process.argv[2].split(":");
const compress = compression({ threshold: 0 });

const server = http.createServer((request, response) => {
  // By default text/event-stream is not considered for compression.
  compress(request, response, () => {
    const { method, url: path, headers } = request;
    const onward = http.request({ host, port, method, path, headers }, (answer) => {
      response.writeHead(answer.statusCode, answer.headers);
      answer.pipe(response);
    });
    onward.on("error", () => response.destroy());
    response.on("close", () => onward.destroy());
    request.pipe(onward);
  });
});
server.listen(0, "127.0.0.1", () => report({ port: server.address().port }));
process.stdin.on("end", () => process.exit()).resume();
