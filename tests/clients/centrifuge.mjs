// The Centrifuge SDK for JavaScript, as published: npm `centrifuge`.
// Usage: node centrifuge.mjs URL ROOM TOKEN [NEXT_TOKEN]
//
// "open" means an active subscription, "interrupted" one that the SDK is about to make again by itself. The
// event "refresh" means that the SDK asked for NEXT_TOKEN, "error" that a publication was refused, "recovered" that it
// came back to a room with a history, with `true` if nothing is missing.

import { Centrifuge } from "centrifuge";
import WebSocket from "ws";
import { report, reportMessage, serve } from "./lines.mjs";

const [url, room, token, nextToken] = process.argv.slice(2);

const tell = (event, value) => reportMessage(event, "text", Buffer.from(JSON.stringify(value)));

const client = new Centrifuge(url, {
  websocket: WebSocket,
  token,
  getToken: async () => {
    tell("refresh", 1);
    return nextToken ?? token;
  },
  minReconnectDelay: 20,
  maxReconnectDelay: 500,
});
client.on("disconnected", ({ code, reason }) => report({ on: "close", code, reason }));
client.on("error", ({ error }) => process.stderr.write(`${JSON.stringify(error)}\n`));

const subscription = client.newSubscription(room, { minResubscribeDelay: 20, maxResubscribeDelay: 500 });
subscription.on("subscribed", ({ wasRecovering, recovered }) => {
  report({ on: "open" });
  wasRecovering && tell("recovered", recovered);
});
subscription.on("subscribing", ({ code }) => code !== 0 && report({ on: "interrupted" }));
subscription.on("publication", ({ data, tags }) => tell(tags?.event ?? "message", data));
subscription.on("unsubscribed", ({ code, reason }) => code !== 0 && report({ on: "close", code, reason }));
subscription.subscribe();
client.connect();

await serve(
  async ({ data }) => {
    const value = JSON.parse(Buffer.from(data, "base64").toString());
    await subscription.publish(value).catch(({ code }) => tell("error", code));
  },
  () => client.disconnect(),
);
