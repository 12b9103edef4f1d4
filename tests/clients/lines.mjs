// The line protocol between a scenario and a client script: one JSON object a line, commands on standard
// input, happenings on standard output. Owns the framing and nothing of what is said.

import { createInterface } from "node:readline";

/** Reports a happening to the scenario. */
export function report(happening) {
  process.stdout.write(`${JSON.stringify(happening)}\n`);
}

/** Reports one received message, byte for byte. */
export function reportMessage(event, kind, bytes) {
  report({ on: "message", event, kind, data: Buffer.from(bytes).toString("base64") });
}

/**
 * Calls `handle` for each command, one after the other, and `finish` when the scenario has let go.
 * A command that fails is the end of the script: the scenario sees why on standard error.
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
