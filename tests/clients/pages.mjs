// Several pages of one browser, operated like a user. Usage: node pages.mjs
//
// Each command names a page and one action on it, and is answered with one line: {"on":"done"} with the
// action's result, or {"on":"failed"} with the error. A page is opened when it is first named.

import { launch } from "./chromium.mjs";
import { report, serve } from "./lines.mjs";

const browser = await launch();
const pages = new Map();

async function named(name) {
  if (!pages.has(name)) {
    // A separate context: two pages are two users, who share no storage.
    const page = await (await browser.newContext()).newPage();
    const complaints = [];
    page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
    page.on("pageerror", (error) => complaints.push(error.message));
    pages.set(name, { page, complaints });
  }
  return pages.get(name);
}

// The next four run in the page.

const connect = ({ kind, url }) =>
  new Promise((resolve) => {
    const connection =
      kind === "websocket" ? new WebSocket(url) : new EventSource(url, { withCredentials: true });
    connection.onopen = () => resolve(true);
    connection.onerror = () => resolve(false);
    connection.onmessage = ({ data }) => {
      const line = document.createElement("p");
      line.textContent = `${kind}: ${data}`;
      document.body.append(line);
    };
  });

const post = ({ url, value }) =>
  fetch(url, { method: "POST", credentials: "include", body: value }).then(
    ({ status }) => status,
    () => null,
  );

const beacon = ({ url, value }) => navigator.sendBeacon(url, new Blob([value], { type: "application/json" }));

const fetchEvents = async ({ url }) => {
  const controller = new AbortController();
  const headers = {
    Accept: "text/event-stream",
    "Cache-Control": "no-cache",
    "Last-Event-ID": "1",
    "X-Requested-With": "XMLHttpRequest",
  };
  try {
    const { status } = await fetch(url, { headers, signal: controller.signal });
    return status;
  } catch {
    return null;
  } finally {
    controller.abort();
  }
};

const actions = {
  goto: async ({ page }, { url }) => (await page.goto(url))?.status(),
  // This script provides the page: no server has to exist at the origin.
  stand: async ({ page }, { origin }) => {
    const url = `${origin}/`;
    await page.route(url, (route) =>
      route.fulfill({ contentType: "text/html", body: "<!doctype html><title>A page</title>" }),
    );
    await page.goto(url);
  },
  cookie: async ({ page }, { url, name, value }) => {
    await page.context().addCookies([{ url, name, value, httpOnly: true, sameSite: "Strict" }]);
  },
  // Whether the page's own WebSocket or EventSource opens. The page shows what it receives.
  connect: async ({ page }, { kind, url }) => page.evaluate(connect, { kind, url }),
  // The status of the page's own POST, if the page may read it.
  post: async ({ page }, { url, value }) => page.evaluate(post, { url, value }),
  // Whether the browser has accepted the page's beacon.
  beacon: async ({ page }, { url, value }) => page.evaluate(beacon, { url, value }),
  // The status of an event stream that the page fetches by itself, if the page may read it.
  fetchEvents: async ({ page }, { url }) => page.evaluate(fetchEvents, { url }),
  fill: async ({ page }, { selector, value }) => page.fill(selector, value),
  click: async ({ page }, { selector }) => page.click(selector),
  press: async ({ page }, { selector, value }) => page.press(selector, value),
  text: async ({ page }, { selector }) => page.innerText(selector),
  // Waits until some element that the selector matches shows the text.
  see: async ({ page }, { selector, value }) => {
    await page.locator(selector).filter({ hasText: value }).first().waitFor({ timeout: 20_000 });
  },
  count: async ({ page }, { selector, value }) => page.locator(selector).filter({ hasText: value }).count(),
  complaints: async ({ complaints }) => complaints,
  screenshot: async ({ page }, { value }) => {
    await page.screenshot({ path: value });
  },
};

await serve(
  async (command) => {
    try {
      const value = await actions[command.action](await named(command.page), command);
      report({ on: "done", value: value ?? null });
    } catch (error) {
      report({ on: "failed", why: error.message });
    }
  },
  () => browser.close(),
);
