//! One message in a room.

use std::{fmt, str::FromStr, sync::Arc};

use bytes::Bytes;

/// One message in a room, as it travels between nodes.
///
/// Cloning shares all bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publication {
    /// The payload, byte for byte as it was published.
    pub data: Data,
    /// The event's name; `None` means the default, `message`.
    pub event: Option<EventName>,
    /// Who published, when a gateway node knows it. `None` for a backend's bare `PUBLISH`.
    pub publisher: Option<Publisher>,
    /// A session that must not hear this publication: its own echo.
    pub exclude: Option<SessionId>,
}

impl Publication {
    /// A publication that carries `data` and nothing else.
    pub fn new(data: Data) -> Self {
        Self { data, event: None, publisher: None, exclude: None }
    }
}

/// A payload and what is known about its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    kind: DataKind,
    bytes: Bytes,
}

/// What is known about a payload's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataKind {
    /// UTF-8 that its publisher declared to be JSON and the gateway has checked.
    Json,
    /// UTF-8. It may still happen to be JSON.
    Text,
    /// Any bytes.
    Binary,
}

impl Data {
    /// Text if `bytes` are UTF-8, binary otherwise: how a bare `PUBLISH` is understood.
    pub fn detect(bytes: Bytes) -> Self {
        let kind = if std::str::from_utf8(&bytes).is_ok() { DataKind::Text } else { DataKind::Binary };
        Self { kind, bytes }
    }

    /// Declares `bytes` to be of `kind`. `None` if the kind is text or JSON and the bytes are not UTF-8.
    ///
    /// Whether a payload declared JSON *is* JSON is checked where it enters the gateway, not here.
    pub fn declare(kind: DataKind, bytes: Bytes) -> Option<Self> {
        (kind == DataKind::Binary || std::str::from_utf8(&bytes).is_ok()).then_some(Self { kind, bytes })
    }

    /// A text payload.
    pub fn text(text: impl Into<String>) -> Self {
        Self { kind: DataKind::Text, bytes: Bytes::from(text.into()) }
    }

    /// A binary payload.
    pub fn binary(bytes: impl Into<Bytes>) -> Self {
        Self { kind: DataKind::Binary, bytes: bytes.into() }
    }

    /// What is known about the bytes.
    pub fn kind(&self) -> DataKind {
        self.kind
    }

    /// The bytes as published.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The bytes as text, unless the payload is binary.
    pub fn as_text(&self) -> Option<&str> {
        match self.kind {
            DataKind::Binary => None,
            DataKind::Json | DataKind::Text => std::str::from_utf8(&self.bytes).ok(),
        }
    }
}

/// An event's name: 1 to 64 bytes of UTF-8 without control characters.
///
/// Control characters are refused because a line break would end the field in an event stream
/// (WHATWG HTML §9.2.6).
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct EventName(Arc<str>);

/// Why a text is not an [`EventName`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event name has 1 to {max} bytes of UTF-8 and no control characters", max = EventName::MAX_BYTES)]
pub struct InvalidEventName;

impl EventName {
    /// The longest name, in bytes.
    pub const MAX_BYTES: usize = 64;

    /// Checks `name` and takes it.
    pub fn new(name: &str) -> Result<Self, InvalidEventName> {
        let valid = (1..=Self::MAX_BYTES).contains(&name.len()) && !name.chars().any(char::is_control);
        if valid { Ok(Self(Arc::from(name))) } else { Err(InvalidEventName) }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for EventName {
    type Err = InvalidEventName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::new(name)
    }
}

impl fmt::Debug for EventName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Who published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publisher {
    /// The verified subject of the publisher's token, if it has one. At most 255 bytes.
    pub user: Option<Arc<str>>,
    /// The publisher's session.
    pub session: SessionId,
}

/// Names a session across all nodes. Written as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u128);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
