// The line protocol between a scenario and a client script: one JSON object a line, commands on standard
// input, events on standard output. Owns the framing, not the contents.

import { createInterface } from "node:readline";

/** Reports an event to the scenario. */
export function report(happening) {
  process.stdout.write(`${JSON.stringify(happening)}\n`);
}

/** Reports one received message, byte for byte. */
export function reportMessage(event, kind, bytes) {
  report({ on: "message", event, kind, data: Buffer.from(bytes).toString("base64") });
}

/**
 * Calls `handle` for each command, one after the other, and `finish` when the scenario closes the input.
 * A command that fails ends the script: the scenario sees the error on standard error.
 */
export async function serve(handle, finish) {
  try {
    for await (const line of createInterface({ input: process.stdin })) {
      await handle(JSON.parse(line));
    }
  } catch (error) {
    process.stderr.write(`${error.stack}\n`);
    process.exitCode = 1;
  }
  await finish();
}
