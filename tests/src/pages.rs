//! Pages in Chromium, operated like a user.
//!
//! One browser with several named pages, each with its own storage. Waits for visible state, and knows
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

    /// Turns the named page into an empty one of an origin where no server has to exist.
    pub async fn stand(&mut self, page: &str, origin: &str) -> Result<()> {
        self.act(page, json!({ "action": "stand", "origin": origin })).await.map(drop)
    }

    /// Stores a cookie for the host of `url` in the page's browser, sent to pages of the same site
    /// only and invisible to scripts.
    pub async fn keep_cookie(&mut self, page: &str, url: &str, name: &str, value: &str) -> Result<()> {
        let cookie = json!({ "action": "cookie", "url": url, "name": name, "value": value });
        self.act(page, cookie).await.map(drop)
    }

    /// Whether the page's `WebSocket` opens. The page shows received messages as `websocket: …`.
    pub async fn opens_websocket(&mut self, page: &str, url: &str) -> Result<bool> {
        self.connects(page, "websocket", url).await
    }

    /// Whether the page's `EventSource` opens, with cookies. The page shows received messages as `eventsource: …`.
    pub async fn opens_events(&mut self, page: &str, url: &str) -> Result<bool> {
        self.connects(page, "eventsource", url).await
    }

    /// The status of the page's `POST` of a text, with cookies; `None` if the page may not read it.
    pub async fn post(&mut self, page: &str, url: &str, text: &str) -> Result<Option<u16>> {
        let status = self.act(page, json!({ "action": "post", "url": url, "value": text })).await?;
        Ok(serde_json::from_value(status)?)
    }

    /// Sends JSON by `navigator.sendBeacon`, which sends cookies and gets no answer. Returns whether the browser
    /// accepted it.
    pub async fn beacon(&mut self, page: &str, url: &str, json: &str) -> Result<bool> {
        let taken = self.act(page, json!({ "action": "beacon", "url": url, "value": json })).await?;
        taken.as_bool().context("whether it was taken")
    }

    /// The status of an event stream requested like replacements of `EventSource` do, with their additional headers;
    /// `None` if the page may not read it.
    pub async fn fetches_events(&mut self, page: &str, url: &str) -> Result<Option<u16>> {
        let status = self.act(page, json!({ "action": "fetchEvents", "url": url })).await?;
        Ok(serde_json::from_value(status)?)
    }

    /// Types into a field.
    pub async fn fill(&mut self, page: &str, selector: &str, value: &str) -> Result<()> {
        self.act(page, json!({ "action": "fill", "selector": selector, "value": value })).await.map(drop)
    }

    /// Clicks an element.
    pub async fn click(&mut self, page: &str, selector: &str) -> Result<()> {
        self.act(page, json!({ "action": "click", "selector": selector })).await.map(drop)
    }

    /// Presses a key in a field.
    pub async fn press(&mut self, page: &str, selector: &str, key: &str) -> Result<()> {
        self.act(page, json!({ "action": "press", "selector": selector, "value": key })).await.map(drop)
    }

    /// Waits until an element that matches the selector shows the text.
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

    /// Errors on the page's console so far: failed scripts, and what the content security policy blocked.
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
