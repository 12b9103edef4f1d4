// Several pages of one browser, as a person would use them. Usage: node pages.mjs
//
// Each command names a page and one action on it, and is answered by one line, {"on":"done"} with what the
// action yields or {"on":"failed"} with why not. A page is opened when it is first named.

import { launch } from "./chromium.mjs";
import { report, serve } from "./lines.mjs";

const browser = await launch();
const pages = new Map();

async function named(name) {
  if (!pages.has(name)) {
    // A context of its own: two pages are two people, who share no storage.
    const page = await (await browser.newContext()).newPage();
    const complaints = [];
    page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
    page.on("pageerror", (error) => complaints.push(error.message));
    pages.set(name, { page, complaints });
  }
  return pages.get(name);
}

const actions = {
  goto: async ({ page }, { url }) => (await page.goto(url))?.status(),
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
