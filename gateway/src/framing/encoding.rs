//! Formats, and what decides whether two members share bytes.

use std::{cell::Cell, fmt, ptr, rc::Rc};

use broker_bridge::{Cursor, Publication, RoomName};
use bytes::Bytes;

use super::{Positions, Transport, Writer};
use crate::websocket::Deflate;

/// How a protocol writes publications.
///
/// Formats are statics, identified by their address. Members with the same format, variant, wrap, transport
/// and compression share one copy of the bytes, so `write` must depend on nothing but its arguments.
pub struct Format {
    /// Writes one publication. `variant` is a protocol-defined number for anything else that the bytes depend
    /// on, such as a version. A client must never be able to choose it freely.
    pub write: fn(&RoomName, &Publication, variant: u32, &mut Writer),
    /// Writes a head for one member that precedes the shared bytes, such as the id of its subscription. Such
    /// messages are text and are not compressed.
    pub head: Option<fn(&MemberState, &mut Writer)>,
}

/// The state that [`Format::head`] uses: bytes chosen by the member's client, and a protocol-defined counter.
#[derive(Debug, Default)]
pub struct MemberState {
    /// The client's bytes, such as the id of its subscription.
    pub id: Box<[u8]>,
    /// A counter, such as the number of the next message.
    pub count: Cell<u64>,
    /// The positions in the session's rooms, shared by its memberships, and which of them belongs to this room.
    pub positions: Option<(Rc<Positions>, usize)>,
}

/// What an outer protocol adds around each message (the arrays of `SockJS`, the record separators of
/// `SignalR`). A static, like [`Format`].
pub struct Wrap {
    /// Before the message.
    pub begin: &'static [u8],
    /// Writes the message itself, escaped as the outer protocol requires.
    pub item: fn(&[u8], &mut Writer),
    /// After the message.
    pub end: &'static [u8],
}

/// What two members must have in common to share bytes.
#[derive(Clone, Copy)]
pub struct Encoding {
    format: &'static Format,
    wrap: Option<&'static Wrap>,
    variant: u32,
    transport: Transport,
    deflate: Option<Deflate>,
}

impl Encoding {
    /// A format on a transport, without compression.
    pub fn new(format: &'static Format, transport: Transport) -> Self {
        Self { format, wrap: None, variant: 0, transport, deflate: None }
    }

    /// Sets the protocol-defined variant.
    #[must_use]
    pub fn with_variant(self, variant: u32) -> Self {
        Self { variant, ..self }
    }

    /// Adds an outer protocol. Not for formats with heads, which would be outside of it.
    #[must_use]
    pub fn with_wrap(self, wrap: Option<&'static Wrap>) -> Self {
        debug_assert!(wrap.is_none() || self.format.head.is_none(), "a head cannot stand within a wrap");
        Self { wrap, ..self }
    }

    /// Adds compression as negotiated, if possible: on a WebSocket, in a format without heads.
    #[must_use]
    pub fn with_deflate(self, deflate: Option<Deflate>) -> Self {
        let possible = self.transport == Transport::WebSocket && self.format.head.is_none();
        Self { deflate: deflate.filter(|_| possible), ..self }
    }

    /// How frames are compressed.
    pub fn deflate(self) -> Option<Deflate> {
        self.deflate
    }

    /// The same encoding without compression.
    #[must_use]
    pub fn uncompressed(self) -> Self {
        Self { deflate: None, ..self }
    }

    /// Encodes a publication: a whole message, or its shared part if the format has heads. `position` is that of a
    /// recorded one.
    pub fn encode(self, room: &RoomName, publication: &Publication, position: Option<Cursor>) -> Bytes {
        let mut out = Writer::new(self.transport, self.format.head.is_none()).at(position);
        match self.wrap {
            None => (self.format.write)(room, publication, self.variant, &mut out),
            Some(wrap) => {
                let mut inner = Writer::new(Transport::Body, false).at(position);
                (self.format.write)(room, publication, self.variant, &mut inner);
                out.put(wrap.begin);
                (wrap.item)(inner.payload(), &mut out);
                out.put(wrap.end);
            }
        }
        out.finish(0)
    }

    /// Encodes one member's head for a message whose shared part has `tail` bytes; `None` if the format has
    /// no heads. `position` is as for [`encode`](Self::encode).
    pub fn head(self, state: &MemberState, position: Option<Cursor>, tail: usize) -> Option<Bytes> {
        let write = self.format.head?;
        let mut out = Writer::new(self.transport, true).at(position);
        write(state, &mut out);
        Some(out.finish(tail))
    }

    /// Whether each member's messages have a head of their own.
    pub fn has_heads(self) -> bool {
        self.format.head.is_some()
    }
}

/// Formats and wraps are compared by their addresses.
impl PartialEq for Encoding {
    fn eq(&self, other: &Self) -> bool {
        let same_wrap = match (self.wrap, other.wrap) {
            (None, None) => true,
            (Some(one), Some(other)) => ptr::eq(one, other),
            _ => false,
        };
        ptr::eq(self.format, other.format)
            && same_wrap
            && self.variant == other.variant
            && self.transport == other.transport
            && self.deflate == other.deflate
    }
}

impl Eq for Encoding {}

/// Without addresses, which differ from run to run.
impl fmt::Debug for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoding")
            .field("variant", &self.variant)
            .field("transport", &self.transport)
            .field("deflate", &self.deflate)
            .finish_non_exhaustive()
    }
}
