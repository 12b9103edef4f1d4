// Launches Debian's Chromium for a script.

import { chromium } from "playwright-core";

/** A fresh headless browser with its own profile, and no traffic except the page's. */
export function launch() {
  return chromium.launch({
    executablePath: process.env.TIDEGATE_CHROMIUM ?? "/usr/bin/chromium",
    args: [
      "--no-sandbox",
      "--disable-gpu",
      "--disable-quic",
      "--disable-dev-shm-usage",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
      // A page that a script provides has no address, and by default such a page may not reach loopback addresses.
      "--disable-features=LocalNetworkAccessChecks",
    ],
  });
}
