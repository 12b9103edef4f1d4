// Writes every dashboard as JSON into the given directory.

import { writeFileSync } from "node:fs";
import { join } from "node:path";

import { fleet } from "./fleet.js";
import { node } from "./node.js";
import { redis } from "./redis.js";
import { rooms } from "./rooms.js";

const [directory] = process.argv.slice(2);
if (directory === undefined) throw new Error("usage: write.js DIRECTORY");
for (const dashboard of [fleet, node, rooms, redis]) {
  writeFileSync(join(directory, `${dashboard.uid}.json`), `${JSON.stringify(dashboard, null, 2)}\n`);
}
