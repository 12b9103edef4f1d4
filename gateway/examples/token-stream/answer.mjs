// Asks a question, and reads its answer. For pages, and for Node.js with an EventSource of npm.

/** The URL of a room. */
function url(base, token, room, query = "") {
  return `${base}/rooms/${encodeURIComponent(room)}?token=${encodeURIComponent(token)}${query}`;
}

async function post(base, token, room, message) {
  const response = await fetch(url(base, token, room), {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(message),
  });
  if (!response.ok) throw new Error(`${room}: ${response.status} ${await response.text()}`);
}

/**
 * Asks a question. Returns where its answer begins: keep that, for instance in the page's address. Whoever has it can read
 * the whole answer, at any time and from any node.
 */
export async function ask(base, token, question) {
  const room = `answer:${crypto.randomUUID()}`;
  // The position before the first token.
  const response = await fetch(url(base, token, room), { headers: { Accept: "application/json" } });
  if (!response.ok) throw new Error(`${room}: ${response.status} ${await response.text()}`);
  const { cursor } = await response.json();
  await post(base, token, "ask", { room, question });
  return { room, since: cursor };
}

/** Tells the worker to stop. Leaving the room does not. */
export function stop(base, token, room) {
  return post(base, token, "stop", { room });
}

/**
 * Reads an answer from where it begins: `onText` gets what is there already, in large pieces, and then each token as it
 * comes. After a lost connection the EventSource continues by itself where it was. `onGap` is called if something is missing:
 * the answer is then no longer kept in full. Returns a function that leaves.
 */
export function read(base, token, { room, since }, { onText, onDone, onGap, onOpen }, Source = EventSource) {
  const source = new Source(url(base, token, room, `&since=${since}`));
  if (onOpen) source.addEventListener("open", onOpen);
  source.addEventListener("message", (event) => onText(event.data));
  source.addEventListener("tidegate.gap", (event) => onGap(JSON.parse(event.data).cause));
  source.addEventListener("done", (event) => {
    source.close();
    onDone(event.data);
  });
  return () => source.close();
}
