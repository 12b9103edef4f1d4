//! What a client has received, in order, and how to wait for it.
//!
//! Clients of every kind write the same journal, so that a browser's can be compared with a raw socket's. Owns the
//! vocabulary and the waiting, not how anything is received.

use std::fmt;

use anyhow::{Context as _, Result, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use tokio::{sync::watch, time::timeout};

use crate::PATIENCE;

/// Everything that has happened to one client so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Journal {
    /// How often its connection was opened: more than once for clients that reconnect by themselves.
    pub opened: usize,
    /// How often its connection was lost while the client was going to reconnect by itself.
    pub interrupted: usize,
    /// The messages it received.
    pub messages: Vec<Message>,
    /// The reconnection times it received (`retry:` of an event stream), in milliseconds.
    pub retries: Vec<u64>,
    /// Comments in its event stream.
    pub comments: usize,
    /// How it ended, if it has.
    pub end: Option<End>,
}

/// One message as a client receives it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Message {
    /// The event's name: `message` if the protocol has none.
    pub event: String,
    /// The event's id: empty if the protocol has none.
    pub id: String,
    /// The payload.
    pub payload: Payload,
}

/// A payload, byte for byte.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Payload {
    /// Received as text.
    Text(String),
    /// Received as bytes.
    Binary(Vec<u8>),
}

/// How a client's connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The server refused with this HTTP status.
    Refused(u16),
    /// With a close frame, or a properly ended response. An event stream has neither code nor reason.
    Closed {
        /// The close code; 1005 if the frame had none, 1000 for an event stream that ended in order.
        code: u16,
        /// The reason that came with it.
        reason: String,
    },
    /// Without a close frame or an orderly end.
    Lost,
}

impl Payload {
    /// A text payload.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// A binary payload.
    pub fn binary(bytes: impl Into<Vec<u8>>) -> Self {
        Self::Binary(bytes.into())
    }

    /// The bytes of either kind.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Text(text) => text.as_bytes(),
            Self::Binary(bytes) => bytes,
        }
    }

    /// The payload as an event stream delivers it, see `gateway/docs/protocols.md`: binary becomes a `data:`
    /// URL, and every line end becomes LF.
    #[must_use]
    pub fn as_event_data(&self) -> Self {
        Self::Text(match self {
            Self::Text(text) => text.replace("\r\n", "\n").replace('\r', "\n"),
            Self::Binary(bytes) => {
                format!("data:application/octet-stream;base64,{}", BASE64.encode(bytes))
            }
        })
    }
}

impl Message {
    /// A message without a name or id.
    pub fn plain(payload: Payload) -> Self {
        Self { event: "message".to_owned(), id: String::new(), payload }
    }
}

impl End {
    /// The close code, if there was one.
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Closed { code, .. } => Some(*code),
            Self::Refused(_) | Self::Lost => None,
        }
    }
}

impl Journal {
    /// The payloads of all messages.
    pub fn payloads(&self) -> Vec<Payload> {
        self.messages.iter().map(|message| message.payload.clone()).collect()
    }

    /// How many messages have this event name.
    pub fn events(&self, name: &str) -> usize {
        self.messages.iter().filter(|message| message.event == name).count()
    }
}

/// Long payloads are truncated so that a failed comparison stays readable.
impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 60;
        match self {
            Self::Text(text) if text.len() <= SHOWN => write!(f, "{text:?}"),
            Self::Text(text) => {
                let start: String = text.chars().take(SHOWN / 2).collect();
                write!(f, "{start:?}… ({} bytes)", text.len())
            }
            Self::Binary(bytes) => match bytes.get(..SHOWN / 2) {
                Some(start) => write!(f, "{start:x?}… ({} bytes)", bytes.len()),
                None => write!(f, "{bytes:x?}"),
            },
        }
    }
}

/// The reading end of a client's journal.
#[derive(Clone, Debug)]
pub struct Reader {
    name: String,
    journal: watch::Receiver<Journal>,
}

impl Reader {
    /// A named journal, and its writing end.
    pub(crate) fn new(name: &str) -> (watch::Sender<Journal>, Self) {
        let (writer, journal) = watch::channel(Journal::default());
        (writer, Self { name: name.to_owned(), journal })
    }

    /// What has happened so far.
    pub fn now(&self) -> Journal {
        self.journal.borrow().clone()
    }

    /// Waits until `state` holds. Fails with the end of the journal if that takes too long.
    pub async fn until(&self, what: &str, state: impl FnMut(&Journal) -> bool) -> Result<Journal> {
        let mut journal = self.journal.clone();
        match timeout(PATIENCE, journal.wait_for(state)).await {
            Ok(Ok(journal)) => Ok(journal.clone()),
            Ok(Err(_)) => bail!("{}: its client ended before {what}: {}", self.name, self.tail()),
            Err(_) => bail!("{}: no {what} within {PATIENCE:?}: {}", self.name, self.tail()),
        }
    }

    /// Waits for at least `count` messages and returns all that have arrived by then.
    pub async fn heard(&self, count: usize) -> Result<Vec<Message>> {
        let what = format!("{count} messages");
        let journal = self
            .until(&what, |journal| journal.messages.len() >= count || journal.end.is_some())
            .await
            .with_context(|| format!("waiting for {count} messages"))?;
        if journal.messages.len() < count {
            bail!("{}: ended before {count} messages: {}", self.name, self.tail());
        }
        Ok(journal.messages)
    }

    /// Waits for a message with this payload.
    pub async fn hears(&self, payload: &Payload) -> Result<Journal> {
        self.until(&format!("message {payload:?}"), |journal| {
            journal.messages.iter().any(|message| message.payload == *payload)
        })
        .await
    }

    /// Waits for the end of the connection.
    pub async fn ended(&self) -> Result<End> {
        let journal = self.until("end", |journal| journal.end.is_some()).await?;
        journal.end.context("the state that was waited for has an end")
    }

    fn tail(&self) -> String {
        let journal = self.journal.borrow();
        let last = journal.messages.iter().rev().take(3).rev().collect::<Vec<_>>();
        format!(
            "opened {}, interrupted {}, {} messages, the last {last:?}, end {:?}",
            journal.opened,
            journal.interrupted,
            journal.messages.len(),
            journal.end
        )
    }
}
