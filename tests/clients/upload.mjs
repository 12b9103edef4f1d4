// A POST with the fetch of Node.js (undici). Usage: node upload.mjs URL BYTES
// Reports the status, or the error.

import { report } from "./lines.mjs";

const [url, bytes] = process.argv.slice(2);
try {
  const { status } = await fetch(url, { method: "POST", body: Buffer.alloc(Number(bytes), "x") });
  report({ on: "answer", status });
} catch (error) {
  report({ on: "failed", why: `${error} ${error.cause}` });
}
