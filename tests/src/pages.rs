//! Pages in Chromium, used as a person uses them.
//!
//! One browser, several pages by name, each with storage of its own. Waits for what can be seen, and knows
//! nothing of what a page is for.

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{PATIENCE, client::Script};

/// A browser. Closed when dropped.
#[derive(Debug)]
pub struct Pages(Script);

impl Pages {
    /// Starts a browser without any page.
    pub fn launch() -> Result<Self> {
        Ok(Self(Script::node(&["pages.mjs"])?))
    }

    /// Opens a URL in the page of this name and returns the status.
    pub async fn open(&mut self, page: &str, url: &str) -> Result<u16> {
        let status = self.act(page, json!({ "action": "goto", "url": url })).await?;
        Ok(u16::try_from(status.as_u64().context("a status")?)?)
    }

    /// Makes the page of this name an empty one of an origin where no server needs to be.
    pub async fn stand(&mut self, page: &str, origin: &str) -> Result<()> {
        self.act(page, json!({ "action": "stand", "origin": origin })).await.map(drop)
    }

    /// Has the page's browser keep a cookie for the host of `url`, which it sends to pages of the same site
    /// only and shows to no script.
    pub async fn keep_cookie(&mut self, page: &str, url: &str, name: &str, value: &str) -> Result<()> {
        let cookie = json!({ "action": "cookie", "url": url, "name": name, "value": value });
        self.act(page, cookie).await.map(drop)
    }

    /// Whether the page's `WebSocket` opens. The page shows what it hears as `websocket: …`.
    pub async fn opens_websocket(&mut self, page: &str, url: &str) -> Result<bool> {
        self.connects(page, "websocket", url).await
    }

    /// Whether the page's `EventSource` opens, with cookies. The page shows what it hears as `eventsource: …`.
    pub async fn opens_events(&mut self, page: &str, url: &str) -> Result<bool> {
        self.connects(page, "eventsource", url).await
    }

    /// The status of the page's `POST` of a text, with cookies; none if the page may not know it.
    pub async fn post(&mut self, page: &str, url: &str, text: &str) -> Result<Option<u16>> {
        let status = self.act(page, json!({ "action": "post", "url": url, "value": text })).await?;
        Ok(serde_json::from_value(status)?)
    }

    /// Sends JSON by `navigator.sendBeacon`, which has cookies and no answer. Returns whether the browser has
    /// taken it.
    pub async fn beacon(&mut self, page: &str, url: &str, json: &str) -> Result<bool> {
        let taken = self.act(page, json!({ "action": "beacon", "url": url, "value": json })).await?;
        taken.as_bool().context("whether it was taken")
    }

    /// The status of an event stream that the page asks for as replacements of `EventSource` do, with headers of
    /// their own; none if the page may not know it.
    pub async fn fetches_events(&mut self, page: &str, url: &str) -> Result<Option<u16>> {
        let status = self.act(page, json!({ "action": "fetchEvents", "url": url })).await?;
        Ok(serde_json::from_value(status)?)
    }

    /// Writes into a field.
    pub async fn fill(&mut self, page: &str, selector: &str, value: &str) -> Result<()> {
        self.act(page, json!({ "action": "fill", "selector": selector, "value": value })).await.map(drop)
    }

    /// Clicks on something.
    pub async fn click(&mut self, page: &str, selector: &str) -> Result<()> {
        self.act(page, json!({ "action": "click", "selector": selector })).await.map(drop)
    }

    /// Presses a key in a field.
    pub async fn press(&mut self, page: &str, selector: &str, key: &str) -> Result<()> {
        self.act(page, json!({ "action": "press", "selector": selector, "value": key })).await.map(drop)
    }

    /// Waits until something that the selector matches shows the text.
    pub async fn see(&mut self, page: &str, selector: &str, text: &str) -> Result<()> {
        self.act(page, json!({ "action": "see", "selector": selector, "value": text })).await.map(drop)
    }

    /// The visible text of an element.
    pub async fn text(&mut self, page: &str, selector: &str) -> Result<String> {
        let text = self.act(page, json!({ "action": "text", "selector": selector })).await?;
        Ok(text.as_str().context("a text")?.to_owned())
    }

    /// How many elements match the selector and show the text.
    pub async fn count(&mut self, page: &str, selector: &str, text: &str) -> Result<u64> {
        let count = self.act(page, json!({ "action": "count", "selector": selector, "value": text })).await?;
        count.as_u64().context("a count")
    }

    /// Errors on the page's console so far: scripts that failed, things its policy blocked.
    pub async fn complaints(&mut self, page: &str) -> Result<Vec<String>> {
        let complaints = self.act(page, json!({ "action": "complaints" })).await?;
        Ok(serde_json::from_value(complaints)?)
    }

    async fn connects(&mut self, page: &str, kind: &str, url: &str) -> Result<bool> {
        let opened = self.act(page, json!({ "action": "connect", "kind": kind, "url": url })).await?;
        opened.as_bool().context("whether it opened")
    }

    async fn act(&mut self, page: &str, command: Value) -> Result<Value> {
        let what = format!("{page}: {command}");
        let Value::Object(mut command) = command else { bail!("a command is an object: {what}") };
        command.insert("page".to_owned(), json!(page));
        self.0.say(&Value::Object(command)).await?;
        let answer = timeout(PATIENCE, self.0.hear()).await.with_context(|| what.clone())??;
        if answer.get("on").and_then(Value::as_str) != Some("done") {
            bail!("{what}: {}", answer.get("why").unwrap_or(&Value::Null));
        }
        Ok(answer.get("value").cloned().unwrap_or_default())
    }
}
