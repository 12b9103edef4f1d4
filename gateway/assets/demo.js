// The demo page: a plain WebSocket client of the node that served it.
//
// Owns one socket per open room and what is shown of it. Uses nothing but what the node offers everybody:
// /rooms/{room}, text frames both ways. Whatever arrives is shown by textContent, never as HTML.
//
// The token comes from the fragment of the page's URL (/#token=…), which browsers do not send, and travels in
// the subprotocol list, so that it is in no URL that a server or a proxy sees.
//
// For tests and for the curious, these stay as they are:
//   #welcome                        shown instead of #chat while there is no usable token
//   #token-form input               takes a pasted token
//   #room-list button[data-room]    one per room; data-state as below; aria-current="true" on the one shown;
//                                   holds .unread with the number of unread messages (absent when none)
//   #room-form input                opens demo:<what is typed>
//   #state[data-state]              of the room shown: open | connecting | closed (a retry may be pending)
//   #retry                          visible while a retry is pending: connect now
//   #messages li[data-kind]         chat (with data-from) | raw | gap (something was, or may have been, missed)
//   #messages li .text              what was said, or the raw payload
//   #nickname, #composer input      who speaks, and what is said
//   #curl, #redis                   command lines for the room shown
"use strict";

const ROOM_PREFIX = "demo:";
const FIRST_ROOMS = ["demo:lobby", "demo:tide", "demo:harbour"];
const MAX_ROOMS = 12;
const MAX_ROOM_BYTES = 200;
const MAX_ENTRIES = 500; // per room, in memory and on the page
const MAX_SHOWN = 4000; // characters of one message
const BACKOFF_FIRST_MS = 500;
const BACKOFF_MAX_MS = 20_000;
const STEADY_MS = 5_000; // a connection that lasts this long has proved itself: back-off starts over

const STATE_NAMES = { open: "connected", connecting: "connecting", closed: "not connected" };

const $ = (id) => document.getElementById(id);
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });

const NO_TOKEN = "Nothing is allowed here unless a token grants it, and this page was opened without one.";

let token = null;
let shown = null; // the room on the page
const rooms = new Map(); // name → Room, in the order in which they were opened

// A room and its socket ------------------------------------------------------------------------------------

class Room {
  constructor(name) {
    this.name = name;
    this.state = "closed";
    this.said = "Not connected";
    this.entries = []; // the newest MAX_ENTRIES
    this.count = 0; // of entries ever added
    this.unread = 0;
    this.draft = "";
    this.sent = []; // payloads under way, to recognise our own when they come back
    this.attempts = 0;
    this.lostAt = null; // when an open connection ended, until the next one opens
    this.retryAt = null;
    this.timer = null;
    this.socket = null;
  }

  connect() {
    this.abandon();
    this.become("connecting", "Connecting");
    const url = new URL(roomPath(this.name), location.href);
    url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    // A plain socket has no word for a gap; asked to, the node closes instead, and the page can tell.
    url.searchParams.set("gap", "close");
    const socket = (this.socket = new WebSocket(url, ["tidegate", `tidegate.bearer.${token}`]));
    socket.binaryType = "arraybuffer";
    let openedAt = null;
    socket.onopen = () => {
      openedAt = Date.now();
      this.become("open", "Connected");
      if (this.lostAt !== null) {
        this.add({ kind: "gap", text: missed(this.lostAt, openedAt) });
        this.lostAt = null;
      }
    };
    socket.onmessage = ({ data }) => this.receive(data);
    socket.onclose = ({ code, reason }) => {
      this.socket = null;
      this.sent = [];
      if (openedAt === null) {
        this.explainRefusal();
        return;
      }
      this.lostAt ??= Date.now();
      if (Date.now() - openedAt >= STEADY_MS) {
        this.attempts = 0;
      }
      if (code === 1008) {
        // The node will not have us back as we are: expired, or not allowed to publish.
        this.become("closed", sentence(reason) || "Closed by the node");
        this.offerRetry();
      } else {
        this.retryLater(sentence(reason) || "Connection lost");
      }
    };
  }

  /** A browser does not say why a handshake failed, so ask for the same over HTTP. */
  async explainRefusal() {
    const abandoned = (this.probe = new AbortController());
    let status = null;
    let welcome = true;
    try {
      const headers = { Accept: "text/event-stream", Authorization: `Bearer ${token}` };
      const signal = AbortSignal.any([abandoned.signal, AbortSignal.timeout(5_000)]);
      ({ status } = await fetch(roomPath(this.name), { method: "HEAD", headers, signal, cache: "no-store" }));
      if (status === 200) {
        // To its own host a page sends its origin with some methods only, and HEAD is none of them.
        const options = await fetch(roomPath(this.name), { method: "OPTIONS", signal });
        welcome = options.headers.has("Access-Control-Allow-Origin");
      }
    } catch {
      // Not reachable over HTTP either.
    }
    if (abandoned.signal.aborted) {
      return;
    }
    this.probe = null;
    if (status === 401) {
      refuseToken("The node does not accept this token: it has expired, or was made with another key. A node without a configured key makes a new one at every start.");
    } else if (status === 403) {
      this.become("closed", "The token does not grant this room");
      this.offerRetry();
    } else if (!welcome) {
      const here = location.origin;
      this.become("closed", `The node refuses pages of ${here}: a proxy changed Host, or origins lacks it`);
      this.offerRetry();
    } else if (status === 200) {
      this.retryLater("No WebSocket gets through: does a proxy stop it?");
    } else {
      this.retryLater(status === null ? "Node unreachable" : "Node takes no connections");
    }
  }

  /** Full jitter: anything between nothing and a bound that doubles, so that pages do not come back as one. */
  retryLater(said) {
    const bound = Math.min(BACKOFF_MAX_MS, BACKOFF_FIRST_MS * 2 ** this.attempts);
    this.attempts = Math.min(this.attempts + 1, 16);
    const delay = Math.random() * bound;
    this.retryAt = Date.now() + delay;
    this.timer = setTimeout(() => this.connect(), delay);
    this.become("closed", said);
  }

  offerRetry() {
    this.retryAt = Infinity;
    showState();
  }

  /** Lets go of the socket and of every plan to make one. */
  abandon() {
    clearTimeout(this.timer);
    this.retryAt = null;
    this.probe?.abort();
    if (this.socket) {
      this.socket.onopen = this.socket.onmessage = this.socket.onclose = null;
      this.socket.close();
      this.socket = null;
    }
  }

  become(state, said) {
    this.state = state;
    this.said = said;
    showRoomButton(this);
    showState();
  }

  say(from, text) {
    const payload = JSON.stringify({ from, text });
    this.socket.send(payload);
    this.sent.push(payload);
    this.sent.splice(0, this.sent.length - 100);
  }

  receive(data) {
    const own = this.sent.indexOf(data);
    if (own >= 0) {
      this.sent.splice(own, 1);
    }
    this.add({ ...understand(data), own: own >= 0 });
    if (own < 0 && (this !== shown || document.hidden)) {
      this.unread += 1;
      showRoomButton(this);
      showTitle();
    }
  }

  add(entry) {
    this.entries.push({ ...entry, at: new Date() });
    this.count += 1;
    if (this.entries.length > MAX_ENTRIES) {
      this.entries.shift();
    }
    if (this === shown) {
      drawSoon();
    }
  }
}

/** What a payload is. Anybody may publish anything; only what this page writes is a chat message. */
function understand(data) {
  if (typeof data !== "string") {
    const bytes = new Uint8Array(data);
    const hex = Array.from(bytes.subarray(0, 64), (byte) => byte.toString(16).padStart(2, "0")).join(" ");
    return { kind: "raw", label: `${bytes.length} bytes`, text: bytes.length > 64 ? `${hex} …` : hex };
  }
  try {
    const { from, text } = JSON.parse(data);
    if (typeof from === "string" && from.trim() && typeof text === "string") {
      return { kind: "chat", from: cut(from.trim(), 32), text: cut(text, MAX_SHOWN) };
    }
  } catch {
    // Not JSON, or not an object.
  }
  return { kind: "raw", label: "raw", text: cut(data, MAX_SHOWN) };
}

function cut(text, length) {
  return text.length > length ? `${text.slice(0, length)}… (${text.length - length} more characters)` : text;
}

function sentence(text) {
  return text && text[0].toUpperCase() + text.slice(1);
}

function missed(from, to) {
  const seconds = Math.max(1, Math.round((to - from) / 1000));
  return `Not connected from ${clock.format(from)} to ${clock.format(to)} (${seconds} s). What was said then is missing here.`;
}

function roomPath(name) {
  return `/rooms/${encodeURIComponent(name).replaceAll("%3A", ":")}`;
}

// What is shown --------------------------------------------------------------------------------------------

function showRoomButton(room) {
  const { button } = room;
  button.dataset.state = room.state;
  button.setAttribute("aria-current", String(room === shown));
  button.querySelector(".dot").setAttribute("aria-label", STATE_NAMES[room.state]);
  let badge = button.querySelector(".unread");
  if (room.unread === 0) {
    badge?.remove();
    return;
  }
  if (!badge) {
    badge = element("span", "unread");
    button.append(badge);
  }
  badge.textContent = room.unread > 99 ? "99+" : String(room.unread);
  badge.setAttribute("aria-label", `${room.unread} unread`);
}

function showState() {
  if (!shown) {
    return;
  }
  $("state").dataset.state = shown.state;
  // Only what changed: a status that is written again is read out again.
  if ($("state-text").textContent !== shown.said) {
    $("state-text").textContent = shown.said;
  }
  $("retry").hidden = shown.retryAt === null;
  $("send").disabled = shown.state !== "open";
  showCountdown();
}

function showCountdown() {
  const wait = shown?.retryAt ? shown.retryAt - Date.now() : NaN;
  $("countdown").textContent = Number.isFinite(wait) ? `again in ${Math.max(0, Math.ceil(wait / 1000))} s` : "";
}

function showTitle() {
  const unread = [...rooms.values()].reduce((sum, room) => sum + room.unread, 0);
  document.title = unread ? `(${unread}) Tidegate demo` : "Tidegate demo";
}

function show(room) {
  if (shown) {
    shown.draft = $("draft").value;
  }
  shown = room;
  room.unread = 0;
  $("room-name").textContent = room.name;
  $("draft").value = room.draft;
  $("leave").hidden = FIRST_ROOMS.includes(room.name);
  for (const each of rooms.values()) {
    showRoomButton(each);
  }
  room.button.scrollIntoView({ block: "nearest", inline: "nearest" });
  showState();
  showTitle();
  showCommands();
  // Old messages are not news: nothing is read out while they are put in place.
  $("log-view").setAttribute("aria-live", "off");
  $("messages").replaceChildren();
  drawn = room.count - room.entries.length;
  draw();
  scrollToEnd();
  requestAnimationFrame(() => $("log-view").setAttribute("aria-live", "polite"));
}

let drawn = 0; // how many of the shown room's entries ever added are on the page, or have been
let drawing = false;
let following = true; // the log stays at its end until somebody scrolls up

/** Draws once per frame however much arrives; a page in the background draws nothing at all. */
function drawSoon() {
  if (!drawing) {
    drawing = true;
    requestAnimationFrame(() => {
      drawing = false;
      draw();
    });
  }
}

function draw() {
  const list = $("messages");
  const fresh = Math.min(shown.count - drawn, shown.entries.length);
  for (const entry of shown.entries.slice(shown.entries.length - fresh)) {
    const item = entryElement(entry);
    list.append(item);
    joinWithPrevious(item);
  }
  drawn = shown.count;
  while (list.childElementCount > MAX_ENTRIES) {
    list.firstElementChild.remove();
  }
  $("empty").hidden = list.childElementCount > 0;
  if (following) {
    scrollToEnd();
  } else if (fresh > 0) {
    $("jump").hidden = false;
  }
}

/** Messages in a row from one person carry the name once. */
function joinWithPrevious(item) {
  const previous = item.previousElementSibling;
  if (item.dataset.kind === "chat" && previous?.dataset.kind === "chat") {
    const joins = previous.dataset.from === item.dataset.from && previous.className.includes("own") === item.className.includes("own");
    item.classList.toggle("joined", joins);
  }
}

function scrollToEnd() {
  following = true;
  $("log-view").scrollTop = $("log-view").scrollHeight;
  $("jump").hidden = true;
}

function entryElement(entry) {
  const item = element("li");
  item.dataset.kind = entry.kind;
  const text = element("p", "text", entry.text);
  if (entry.kind === "gap") {
    item.append(text);
    return item;
  }
  item.classList.toggle("own", Boolean(entry.own));
  const meta = element("p", "meta");
  if (entry.kind === "chat") {
    item.dataset.from = entry.from;
    item.dataset.hue = hue(entry.from);
    meta.append(element("span", "from", entry.from));
  } else {
    meta.append(element("span", "label", entry.label));
  }
  const time = element("time", "", clock.format(entry.at));
  time.dateTime = entry.at.toISOString();
  meta.append(time);
  item.append(meta, text);
  return item;
}

function element(tag, classes, text) {
  const made = document.createElement(tag);
  if (classes) {
    made.className = classes;
  }
  if (text !== undefined) {
    made.textContent = text;
  }
  return made;
}

/** One of eight colours of the style sheet, always the same for a name. */
function hue(name) {
  let hash = 0;
  for (const character of name) {
    hash = (hash * 31 + character.codePointAt(0)) >>> 0;
  }
  return hash % 8;
}

// Command lines --------------------------------------------------------------------------------------------

const commands = {
  curl: (bearer) =>
    `curl ${quote(new URL(roomPath(shown.name), location.href).href)} -H ${quote(`Authorization: Bearer ${bearer}`)} --json ${quote('{"from":"curl","text":"hello"}')}`,
  redis: () => `redis-cli PUBLISH ${quote(`room:${shown.name}`)} ${quote('{"from":"redis","text":"hello"}')}`,
};

function quote(text) {
  return /^[\w:/.@%+-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}

function showCommands() {
  $("curl").textContent = commands.curl(`${token.slice(0, 8)}…`);
  $("redis").textContent = commands.redis();
}

async function copy(button) {
  const which = button.dataset.copy;
  let said = "Copied";
  try {
    await navigator.clipboard.writeText(commands[which](token));
  } catch {
    // No clipboard without HTTPS, except on this very machine: leave the line selected, in full.
    $(which).textContent = commands[which](token);
    getSelection().selectAllChildren($(which));
    said = "Selected";
  }
  button.textContent = said;
  $("copied").textContent = said;
  setTimeout(() => {
    button.textContent = "Copy";
    $("copied").textContent = "";
  }, 2_000);
}

// What the user does ---------------------------------------------------------------------------------------

function open(name) {
  if (!rooms.has(name)) {
    const room = new Room(name);
    rooms.set(name, room);
    const button = element("button");
    button.type = "button";
    button.dataset.room = name;
    const dot = element("span", "dot");
    dot.setAttribute("role", "img");
    button.append(dot, element("span", "name", name.slice(ROOM_PREFIX.length)));
    button.addEventListener("click", () => show(room));
    const item = element("li");
    item.append(button);
    $("room-list").append(item);
    room.button = button;
    room.connect();
  }
  return rooms.get(name);
}

function leave(room) {
  room.abandon();
  rooms.delete(room.name);
  room.button.parentElement.remove();
  show(rooms.values().next().value);
  shown.button.focus();
}

/** Why this is no room name, or null. The node has the same rules and the last word. */
function complaintAbout(name) {
  if (name === ROOM_PREFIX) {
    return "A room needs a name.";
  }
  if (/[\s{}\p{Cc}]/u.test(name)) {
    return "No spaces and no braces in a room's name.";
  }
  if (new TextEncoder().encode(name).length > MAX_ROOM_BYTES) {
    return `A room's name has at most ${MAX_ROOM_BYTES} bytes.`;
  }
  if (rooms.size >= MAX_ROOMS && !rooms.has(name)) {
    return `This page holds ${MAX_ROOMS} rooms at most. Leave one first.`;
  }
  return null;
}

$("room-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = $("room-input").value.trim();
  const name = typed.startsWith(ROOM_PREFIX) ? typed : ROOM_PREFIX + typed;
  const complaint = complaintAbout(name);
  $("room-error").textContent = complaint ?? "";
  $("room-input").setAttribute("aria-invalid", String(complaint !== null));
  if (complaint === null) {
    $("room-input").value = "";
    show(open(name));
    $("draft").focus();
  }
});

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("draft").value.trim();
  // What was typed stays in the field until there is a connection to send it by.
  if (text && shown.socket?.readyState === WebSocket.OPEN) {
    shown.say($("nickname").value.trim() || "somebody", text);
    $("draft").value = "";
    scrollToEnd();
  }
});

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const pasted = $("token-input").value.trim().replace(/^.*#token=/, "");
  $("token-input").value = "";
  if (pasted) {
    const unchanged = location.hash;
    location.hash = `token=${encodeURIComponent(pasted)}`;
    if (location.hash === unchanged) {
      start();
    }
  }
});

$("retry").addEventListener("click", () => {
  shown.connect();
  retryNow();
  // The button is gone now; keyboards must not be left nowhere.
  $("draft").focus();
});
$("leave").addEventListener("click", () => leave(shown));
$("jump").addEventListener("click", scrollToEnd);
$("skip").addEventListener("click", (event) => {
  // A plain link would overwrite the fragment, and the token with it.
  event.preventDefault();
  ($("chat").hidden ? $("token-input") : $("draft")).focus();
});
$("log-view").addEventListener("scroll", () => {
  const view = $("log-view");
  following = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
  $("jump").hidden ||= following;
});
new ResizeObserver(() => following && scrollToEnd()).observe($("log-view"));
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", () => copy(button));
}

$("nickname").value = sessionStorage.getItem("nickname") ?? inventName();
$("nickname").addEventListener("input", () => sessionStorage.setItem("nickname", $("nickname").value));

function inventName() {
  const pick = (list) => list[Math.floor(Math.random() * list.length)];
  const how = pick(["calm", "brisk", "bright", "quiet", "swift", "keen", "merry", "salty"]);
  const who = pick(["heron", "otter", "plover", "seal", "tern", "crab", "gull", "whelk", "dunlin", "puffin"]);
  return `${how}-${who}`;
}

// Network and visibility -----------------------------------------------------------------------------------

/** Whoever is waiting need not wait any longer: something has changed. */
function retryNow() {
  for (const room of rooms.values()) {
    if (Number.isFinite(room.retryAt ?? NaN)) {
      room.attempts = 0;
      room.connect();
    }
  }
}

addEventListener("online", retryNow);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) {
    if (shown) {
      shown.unread = 0;
      showRoomButton(shown);
      showTitle();
    }
    retryNow();
  }
});
setInterval(showCountdown, 250);

// Start ----------------------------------------------------------------------------------------------------

function start() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token") ?? "";
  if (!/^[\w.-]+$/.test(found)) {
    closeRooms();
    token = null;
    welcome(found ? "What follows #token= in this page's address is not a token." : NO_TOKEN);
    return;
  }
  if (token === found) {
    return;
  }
  token = found;
  $("welcome").hidden = true;
  $("chat").hidden = $("nickname-label").hidden = false;
  if (rooms.size === 0) {
    show(FIRST_ROOMS.map(open)[0]);
    return;
  }
  // A new token for rooms that are open already: everything but the sockets stays.
  for (const room of rooms.values()) {
    room.lostAt ??= room.state === "open" ? Date.now() : null;
    room.attempts = 0;
    room.connect();
  }
  showCommands();
}

function closeRooms() {
  for (const room of rooms.values()) {
    room.abandon();
    room.lostAt ??= room.state === "open" ? Date.now() : null;
    room.become("closed", "Not connected");
  }
}

/** No room takes this token. What was read so far comes back with a better one. */
function refuseToken(reason) {
  if (token !== null) {
    closeRooms();
    token = null;
    welcome(reason);
  }
}

function welcome(reason) {
  $("welcome-reason").textContent = reason;
  $("chat").hidden = $("nickname-label").hidden = true;
  $("welcome").hidden = false;
  $("welcome-title").focus();
}

addEventListener("hashchange", start);
start();
