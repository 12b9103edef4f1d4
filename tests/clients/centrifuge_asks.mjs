// The Centrifuge SDK for JavaScript, requesting features that a node may not support.
// Usage: node centrifuge_asks.mjs URL ROOM TOKEN
//
// "open" means an open connection. Each request is reported as an event of its name with its result: the code of
// the error, or the SDK's context of the subscription. Finally a message is published in ROOM and received there.

import { Centrifuge } from "centrifuge";
import WebSocket from "ws";
import { report, reportMessage, serve } from "./lines.mjs";

const [url, room, token] = process.argv.slice(2);

const tell = (event, value) => reportMessage(event, "text", Buffer.from(JSON.stringify(value)));

const client = new Centrifuge(url, { websocket: WebSocket, token, name: "asks", data: { any: 1 }, headers: { x: "y" } });
client.on("connected", () => report({ on: "open" }));
client.on("connecting", ({ code }) => code !== 0 && report({ on: "interrupted" }));
client.on("disconnected", ({ code, reason }) => report({ on: "close", code, reason }));

const subscribed = (subscription) =>
  new Promise((resolve) => {
    subscription.on("subscribed", ({ wasRecovering, recovered, positioned, recoverable }) =>
      resolve({ wasRecovering, recovered, positioned, recoverable }),
    );
    subscription.on("unsubscribed", ({ code }) => resolve(code));
    subscription.subscribe();
  });
const published = (publishing) => publishing.then(() => "published", ({ code }) => code);
const since = { offset: 1, epoch: "x" };

const asks = {
  filter: (channel) => subscribed(client.newSubscription(channel, { tagsFilter: { key: "a", cmp: "eq", val: "b" } })),
  token: (channel) => subscribed(client.newSubscription(channel, { token: "a.b.c" })),
  joinLeave: (channel) => subscribed(client.newSubscription(channel, { joinLeave: true })),
  map: (channel) => subscribed(client.newMapSubscription(channel)),
  sharedPoll: (channel) => subscribed(client.newSharedPollSubscription(channel)),
  state: (channel) => subscribed(client.newSubscription(channel, { getState: async () => since })),
  since: (channel) => subscribed(client.newSubscription(channel, { since })),
  declined: (channel) =>
    subscribed(client.newSubscription(channel, { positioned: true, recoverable: true, delta: "fossil", data: { any: 1 } })),
  mapPublish: (channel) => published(client.mapPublish(channel, "key", 1)),
  history: (channel) => published(client.history(channel, { limit: 1 })),
  mapRemove: (channel) => published(client.mapRemove(channel, "key")),
};

client.connect();
await client.ready();
const plain = client.newSubscription(room);
plain.on("publication", ({ data }) => tell("message", data));
await subscribed(plain);
for (const [name, ask] of Object.entries(asks)) {
  tell(name, await ask(`${room}:${name}`));
}
await plain.publish("still here");

await serve(
  async () => {},
  () => client.disconnect(),
);
