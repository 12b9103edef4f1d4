//! Clients of every kind behind one handle.
//!
//! A [`Client`] listens as soon as it exists, writes a [`Journal`], and sends the messages it is given. The kinds
//! differ in the implementation: a library in this process, a socket read by hand, or a script under Node.js, Python
//! or Chromium.

mod event_stream;
mod script;
mod tungstenite;

use anyhow::{Context as _, Result, ensure};
use tokio::{sync::mpsc, task::JoinSet, time::timeout};

pub use self::event_stream::Parser as EventStreamParser;
pub(crate) use self::script::Script;
use crate::{
    PATIENCE,
    journal::{End, Journal, Message, Payload, Reader},
};

/// Commands that may be queued for a client: enough for any burst of a scenario.
const COMMANDS: usize = 4096;

/// A client of some kind. Dropping it drops its connection.
#[derive(Debug)]
pub struct Client {
    reader: Reader,
    commands: Option<mpsc::Sender<Payload>>,
    tasks: JoinSet<()>,
}

impl Client {
    /// A plain WebSocket with `tokio-tungstenite`. `headers` are added to the handshake.
    pub async fn websocket(url: &str, headers: &[(&str, &str)]) -> Result<Self> {
        tungstenite::connect(url, headers)?.opened().await
    }

    /// An event stream, read from a socket.
    pub async fn events(url: &str) -> Result<Self> {
        event_stream::connect(url)?.opened().await
    }

    /// A plain WebSocket with the `ws` package of Node.js.
    pub async fn node_websocket(url: &str) -> Result<Self> {
        script::node(&["ws.mjs", url])?.opened().await
    }

    /// The same with permessage-deflate, and a window of at most `bits` for data from the server.
    pub async fn node_websocket_deflated(url: &str, bits: u8) -> Result<Self> {
        script::node(&["ws.mjs", url, &bits.to_string()])?.opened().await
    }

    /// An event stream with the `eventsource` package of Node.js, which receives the events `message` and `names`.
    pub async fn node_events(url: &str, names: &[&str]) -> Result<Self> {
        script::node(&[&["eventsource.mjs", url], names].concat())?.opened().await
    }

    /// An event stream with the `@microsoft/fetch-event-source` package of Node.js.
    pub async fn node_fetch_events(url: &str) -> Result<Self> {
        script::node(&["fetch_event_source.mjs", url])?.opened().await
    }

    /// An event stream with the `httpx-sse` package of Python.
    pub async fn python_events(url: &str) -> Result<Self> {
        script::python(&["httpx_sse_client.py", url])?.opened().await
    }

    /// The reader of `gateway/examples/token-stream`: see `tests/clients/token_stream.mjs` for the arguments.
    pub async fn token_stream(arguments: &[&str]) -> Result<Self> {
        script::node(&[&["token_stream.mjs"], arguments].concat())?.opened().await
    }

    /// Polls these URLs of one room in turn, each from where the one before has ended, with the `httpx` package of Python.
    pub async fn python_polls(urls: &[&str]) -> Result<Self> {
        script::python(&[&["long_poll_client.py"], urls].concat())?.opened().await
    }

    /// The status of a `POST` of this many bytes with the `fetch` of Node.js.
    pub async fn node_upload(url: &str, bytes: usize) -> Result<u16> {
        let mut script = Script::node(&["upload.mjs", url, &bytes.to_string()])?;
        let answer = timeout(PATIENCE, script.hear()).await.context("an answer")??;
        let status = answer.get("status").and_then(serde_json::Value::as_u64);
        Ok(u16::try_from(status.with_context(|| format!("a status, not {answer}"))?)?)
    }

    /// A plain WebSocket with the `websockets` package of Python.
    pub async fn python_websocket(url: &str) -> Result<Self> {
        script::python(&["websockets_client.py", url])?.opened().await
    }

    /// The same with permessage-deflate.
    pub async fn python_websocket_deflated(url: &str) -> Result<Self> {
        script::python(&["websockets_client.py", url, "deflate"])?.opened().await
    }

    /// The Centrifuge SDK for JavaScript in a room, with a token and optionally another one for a refresh.
    pub async fn node_centrifuge(url: &str, room: &str, tokens: &[&str]) -> Result<Self> {
        script::node(&[&["centrifuge.mjs", url, room], tokens].concat())?.opened().await
    }

    /// The Centrifuge SDK for JavaScript; it requests various optional features and reports the results.
    pub async fn node_centrifuge_asks(url: &str, room: &str, token: &str) -> Result<Self> {
        script::node(&["centrifuge_asks.mjs", url, room, token])?.opened().await
    }

    /// The Centrifuge SDK for JavaScript; it publishes in a room, reads the room's history and reports what it got.
    pub async fn node_centrifuge_history(url: &str, room: &str, token: &str) -> Result<Self> {
        script::node(&["centrifuge_history.mjs", url, room, token])?.opened().await
    }

    /// The Centrifuge SDK for Python in a room, with a token and optionally another one for a refresh.
    pub async fn python_centrifuge(url: &str, room: &str, tokens: &[&str]) -> Result<Self> {
        script::python(&[&["centrifuge_client.py", url, room], tokens].concat())?.opened().await
    }

    /// A browser's own `WebSocket`, in a page of `origin`.
    pub async fn browser_websocket(url: &str, origin: &str) -> Result<Self> {
        script::node(&["browser.mjs", "websocket", url, origin])?.opened().await
    }

    /// A browser's own `EventSource`, in a page of `origin`.
    pub async fn browser_events(url: &str, origin: &str) -> Result<Self> {
        script::node(&["browser.mjs", "eventsource", url, origin])?.opened().await
    }

    /// Sends a message. Fails if the client is gone.
    pub async fn send(&self, payload: Payload) -> Result<()> {
        let commands = self.commands.as_ref().context("the client was told to disconnect")?;
        commands.send(payload).await.context("the client has ended")
    }

    /// Closes in the way of its kind, and waits for the end. Clients that end without being notified
    /// have ended as well when this returns.
    pub async fn leave(mut self) -> Result<Journal> {
        self.commands = None;
        while self.tasks.join_next().await.is_some() {}
        Ok(self.reader.now())
    }

    fn start<F>(name: &str, work: impl FnOnce(Writer, mpsc::Receiver<Payload>) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (journal, reader) = Reader::new(name);
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let mut tasks = JoinSet::new();
        tasks.spawn(work(Writer(journal), inbox));
        Self { reader, commands: Some(commands), tasks }
    }

    /// Waits until the connection is open.
    async fn opened(self) -> Result<Self> {
        let tried = |journal: &Journal| journal.opened > 0 || journal.end.is_some();
        let journal = self.reader.until("open connection", tried).await?;
        ensure!(journal.opened > 0, "not connected: {:?}", journal.end);
        Ok(self)
    }
}

/// A client can be read like its journal.
impl std::ops::Deref for Client {
    type Target = Reader;

    fn deref(&self) -> &Reader {
        &self.reader
    }
}

/// The writing end of a client's journal.
struct Writer(tokio::sync::watch::Sender<Journal>);

impl Writer {
    fn opened(&self) {
        self.0.send_modify(|journal| journal.opened += 1);
    }

    fn interrupted(&self) {
        self.0.send_modify(|journal| journal.interrupted += 1);
    }

    fn message(&self, message: Message) {
        self.0.send_modify(|journal| journal.messages.push(message));
    }

    fn ended(&self, end: End) {
        self.0.send_if_modified(|journal| {
            let first = journal.end.is_none();
            journal.end.get_or_insert(end);
            first
        });
    }

    fn modify(&self, change: impl FnOnce(&mut Journal)) {
        self.0.send_modify(change);
    }
}
