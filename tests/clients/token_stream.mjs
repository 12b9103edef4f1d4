// The reader of gateway/examples/token-stream with npm `eventsource`. Usage: node token_stream.mjs BASE TOKEN ask QUESTION,
// or … read ROOM SINCE, or … stop ROOM. Reports the event `room` with the room and the position, `text`, `done`, and gaps.

import { EventSource } from "eventsource";
import { ask, read, stop } from "../../gateway/examples/token-stream/answer.mjs";
import { report, reportMessage, serve } from "./lines.mjs";

const [base, token, what, ...rest] = process.argv.slice(2);
const tell = (event, text) => reportMessage(event, "text", Buffer.from(text, "utf8"));
let leave = () => {};

if (what === "stop") {
  await stop(base, token, rest[0]);
  report({ on: "open" });
} else {
  const answer = what === "ask" ? await ask(base, token, rest[0]) : { room: rest[0], since: rest[1] };
  const on = {
    onOpen: () => {
      report({ on: "open" });
      tell("room", `${answer.room} ${answer.since}`);
    },
    onText: (text) => tell("text", text),
    onDone: (end) => tell("done", end),
    onGap: (cause) => tell("gap", cause),
  };
  leave = read(base, token, answer, on, EventSource);
}

await serve(
  () => {
    throw new Error("this client only reads");
  },
  () => leave(),
);
