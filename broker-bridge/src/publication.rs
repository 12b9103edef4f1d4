//! One message in a room.

use std::{
    fmt,
    str::FromStr,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;

use crate::json;

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
    /// A session that must not receive this publication, usually its publisher.
    pub exclude: Option<SessionId>,
}

impl Publication {
    /// A publication that carries `data` and nothing else.
    pub fn new(data: Data) -> Self {
        Self { data, event: None, publisher: None, exclude: None }
    }
}

/// A payload and what is known about its bytes.
#[derive(Clone, Debug)]
pub struct Data {
    kind: DataKind,
    bytes: Bytes,
    /// Whether text happens to be JSON, once somebody has asked.
    json: OnceLock<bool>,
}

impl PartialEq for Data {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind && self.bytes == other.bytes
    }
}

impl Eq for Data {}

/// What is known about a payload's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataKind {
    /// JSON text, declared so by its publisher and checked by [`Data::json`].
    Json,
    /// UTF-8. It may still happen to be JSON.
    Text,
    /// Any bytes.
    Binary,
}

impl Data {
    /// Text if `bytes` are UTF-8, binary otherwise, as for a bare `PUBLISH`.
    pub fn detect(bytes: Bytes) -> Self {
        let kind = if std::str::from_utf8(&bytes).is_ok() { DataKind::Text } else { DataKind::Binary };
        Self::of(kind, bytes)
    }

    /// Declares `bytes` to be of `kind`. `None` if the kind is text and the bytes are not UTF-8, or JSON and
    /// [`json`](Self::json) refuses them.
    pub fn declare(kind: DataKind, bytes: Bytes) -> Option<Self> {
        match kind {
            DataKind::Json => Self::json(bytes).ok(),
            DataKind::Text => std::str::from_utf8(&bytes).is_ok().then(|| Self::of(kind, bytes)),
            DataKind::Binary => Some(Self::of(kind, bytes)),
        }
    }

    /// A JSON payload.
    ///
    /// Checks that `bytes` are one JSON text (RFC 8259) that common parsers accept: nested at most
    /// [`MAX_DEPTH`](Self::MAX_DEPTH) deep, without unpaired surrogates in strings, and with numbers that
    /// a double can hold. Protocols copy JSON into their own frames as it is, so this is the only way to make
    /// data of this kind.
    pub fn json(bytes: impl Into<Bytes>) -> Result<Self, InvalidJson> {
        let bytes = bytes.into();
        json::check(&bytes, Self::MAX_DEPTH)?;
        Ok(Self::of(DataKind::Json, bytes))
    }

    /// The same in memory of its own: bytes that arrived may be a part of a larger block.
    #[must_use]
    pub fn copied(&self) -> Self {
        Self { bytes: Bytes::copy_from_slice(&self.bytes), ..self.clone() }
    }

    /// How deep the arrays and objects of a JSON payload may be nested. Common parsers stop at 128 levels, and
    /// protocols wrap a few of their own around the payload.
    pub const MAX_DEPTH: usize = 120;

    /// A text payload.
    pub fn text(text: impl Into<String>) -> Self {
        Self::of(DataKind::Text, Bytes::from(text.into()))
    }

    /// A text payload that is a string even if it could be read as JSON: [`is_json`](Self::is_json) is false. This is not
    /// kept when it is published.
    pub fn string(text: impl Into<String>) -> Self {
        Self { json: OnceLock::from(false), ..Self::text(text) }
    }

    /// A binary payload.
    pub fn binary(bytes: impl Into<Bytes>) -> Self {
        Self::of(DataKind::Binary, bytes.into())
    }

    /// What is known about the bytes.
    pub fn kind(&self) -> DataKind {
        self.kind
    }

    /// The bytes as published.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Whether the payload is JSON as [`json`](Self::json) takes it: declared so, or text that happens to be. Checked
    /// once, however many formats ask.
    pub fn is_json(&self) -> bool {
        match self.kind {
            DataKind::Json => true,
            DataKind::Text => *self.json.get_or_init(|| json::check(&self.bytes, Self::MAX_DEPTH).is_ok()),
            DataKind::Binary => false,
        }
    }

    /// The bytes as text, unless the payload is binary.
    pub fn as_text(&self) -> Option<&str> {
        match self.kind {
            DataKind::Binary => None,
            DataKind::Json | DataKind::Text => std::str::from_utf8(&self.bytes).ok(),
        }
    }

    fn of(kind: DataKind, bytes: Bytes) -> Self {
        Self { kind, bytes, json: OnceLock::new() }
    }
}

/// Why [`Data::json`] rejects bytes, and at which position.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct InvalidJson(#[from] serde_json::Error);

/// An event's name: 1 to 64 bytes of UTF-8 without control characters, and none of the reserved names.
///
/// Control characters are refused because a line break would end the field in an event stream
/// (WHATWG HTML §9.2.6).
///
/// Names that begin with `tidegate.` are reserved for the gateway's own events. `error` and `open` are reserved
/// because an `EventSource` in a browser dispatches them to the handlers of connection events (§9.2.2). White space
/// around a name and the case of `tidegate.` make no difference.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct EventName(Arc<str>);

/// Why a text is not an [`EventName`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEventName {
    /// Too long, empty, or with a control character.
    #[error("an event name has 1 to {max} bytes of UTF-8 and no control characters", max = EventName::MAX_BYTES)]
    Malformed,
    /// It would be mistaken for an event of the gateway, or of the client's connection.
    #[error("the event names `error`, `open` and all that begin with `tidegate.` are reserved")]
    Reserved,
}

impl EventName {
    /// The longest name, in bytes.
    pub const MAX_BYTES: usize = 64;

    /// Validates `name`.
    pub fn new(name: &str) -> Result<Self, InvalidEventName> {
        if !(1..=Self::MAX_BYTES).contains(&name.len()) || name.chars().any(char::is_control) {
            return Err(InvalidEventName::Malformed);
        }
        // Some clients trim the field.
        let bare = name.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}');
        let own = bare.as_bytes().get(..OWN_EVENTS.len());
        if own.is_some_and(|start| start.eq_ignore_ascii_case(OWN_EVENTS))
            || ["error", "open"].contains(&bare)
        {
            return Err(InvalidEventName::Reserved);
        }
        Ok(Self(Arc::from(name)))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The prefix of the gateway's own events.
const OWN_EVENTS: &[u8] = b"tidegate.";

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
    /// The verified subject of the publisher's token, if it has one: 1 to 255 bytes without control characters.
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

/// An idempotency key: recognizes a publication that is published again in the same room.
///
/// The text is chosen by the publisher: 1 to 64 bytes of UTF-8 without control characters and white space. Ids of
/// different owners are different, so that nobody can use up the id of somebody else's publication.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PublicationId {
    owner: Owner,
    id: Arc<str>,
}

/// Who has chosen a [`PublicationId`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    /// A backend. All backends share their ids.
    Backend,
    /// A client whose token has this subject.
    Client(Arc<str>),
}

/// Why a text is not a [`PublicationId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a publication's id has 1 to {max} bytes of UTF-8 and no control characters or white space",
    max = PublicationId::MAX_BYTES
)]
pub struct InvalidPublicationId;

impl PublicationId {
    /// The longest id, in bytes.
    pub const MAX_BYTES: usize = 64;

    /// Validates `id`.
    pub fn new(owner: Owner, id: &str) -> Result<Self, InvalidPublicationId> {
        let forbidden = |c: char| c.is_control() || c.is_whitespace();
        if !(1..=Self::MAX_BYTES).contains(&id.len()) || id.contains(forbidden) {
            return Err(InvalidPublicationId);
        }
        Ok(Self { owner, id: Arc::from(id) })
    }

    /// Who has chosen it.
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_short_and_printable() {
        let id = |text: &str| PublicationId::new(Owner::Backend, text).map(|id| id.as_str().to_owned());
        for text in ["1", "a:b", "{}", "été", &"x".repeat(64)] {
            assert_eq!(id(text), Ok(text.to_owned()));
        }
        for text in ["", " ", "a b", "a\u{a0}b", "a\n", "\0", "\u{85}", &"x".repeat(65)] {
            assert_eq!(id(text), Err(InvalidPublicationId), "{text:?}");
        }
    }

    #[test]
    fn reserved_event_names() {
        for name in [
            "tidegate.gap",
            "tidegate.",
            "Tidegate.Gap",
            " tidegate.gap",
            "\u{feff}\u{2003}tidegate.x",
            "error",
            "open",
            "open ",
        ] {
            assert_eq!(EventName::new(name), Err(InvalidEventName::Reserved), "{name:?}");
        }
        for name in ["tidegate", "tidegate_gap", "my.tidegate.gap", "Error", "opened", "message", "été", " "]
        {
            assert_eq!(
                EventName::new(name).map(|name| name.as_str().to_owned()),
                Ok(name.to_owned()),
                "{name:?}"
            );
        }
        for name in ["", "a\nb", "a\rb", "tidegate.\n", "\0", "\u{85}", &"x".repeat(65)] {
            assert_eq!(EventName::new(name), Err(InvalidEventName::Malformed), "{name:?}");
        }
    }
}
