// The Centrifuge SDK for JavaScript reading the history of a room.
// Usage: node centrifuge_history.mjs URL ROOM TOKEN
//
// Publishes the numbers 0 to 19, reads them in pages of 7, forwards and backwards, and reports each as the event
// "forwards" or "backwards"; then the position's offset, and the code of the error for a position that nobody knows.

import { Centrifuge } from "centrifuge";
import WebSocket from "ws";
import { report, reportMessage, serve } from "./lines.mjs";

const [url, room, token] = process.argv.slice(2);

const tell = (event, value) => reportMessage(event, "text", Buffer.from(JSON.stringify(value)));

const client = new Centrifuge(url, { websocket: WebSocket, token });
client.on("disconnected", ({ code, reason }) => report({ on: "close", code, reason }));
const subscription = client.newSubscription(room);
subscription.on("subscribed", () => report({ on: "open" }));
subscription.subscribe();
client.connect();

for (let number = 0; number < 20; number += 1) {
  await subscription.publish(number);
}

async function all(reverse) {
  const read = [];
  let since = null;
  for (;;) {
    const { publications, epoch } = await subscription.history({ limit: 7, since, reverse });
    if (publications.length === 0) {
      return read;
    }
    read.push(...publications.map(({ data }) => data));
    const { offset } = publications.at(-1);
    if (reverse && offset === 1) {
      return read;
    }
    since = { epoch, offset };
  }
}

tell("forwards", await all(false));
tell("backwards", await all(true));
const { publications, offset } = await subscription.history();
tell("position", [publications.length, offset]);
const unknown = { limit: 1, since: { epoch: "1", offset: 1 } };
tell("unknown", await subscription.history(unknown).then(() => "read", ({ code }) => code));

await serve(
  async () => {},
  () => client.disconnect(),
);
