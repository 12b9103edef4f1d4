//! What a protocol tells one session.

use bytes::Bytes;

use super::{Transport, Wrap, Writer};
use crate::websocket::{self, CloseCode, Opcode};

/// How a session's messages are framed.
#[derive(Clone, Copy)]
pub struct Framing {
    /// What they travel in.
    pub transport: Transport,
    /// What a carrier protocol puts around each.
    pub wrap: Option<&'static Wrap>,
}

impl Framing {
    /// On a transport, without a carrier protocol.
    pub fn on(transport: Transport) -> Self {
        Self { transport, wrap: None }
    }
}

impl std::fmt::Debug for Framing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}{}", self.transport, if self.wrap.is_some() { ", wrapped" } else { "" })
    }
}

/// Messages to one session, each framed as soon as it is written. Keeps its memory, so that most messages cost no
/// allocation until they have to be queued.
#[derive(Debug)]
pub struct Packets {
    framing: Framing,
    bytes: Vec<u8>,
    /// Where each message ends.
    ends: Vec<usize>,
}

/// Bytes that are kept when no message is in it.
const KEPT: usize = 16 * 1024;

impl Default for Packets {
    fn default() -> Self {
        Self { framing: Framing::on(Transport::Body), bytes: Vec::new(), ends: Vec::new() }
    }
}

impl Packets {
    /// The messages that follow are for a session with this framing.
    pub fn begin(&mut self, framing: Framing) {
        debug_assert!(self.ends.is_empty(), "messages for another session");
        self.framing = framing;
    }

    /// A text message.
    pub fn text(&mut self, payload: &[u8]) {
        self.message(Opcode::Text, payload);
    }

    /// A text message that holds this value as JSON.
    pub fn json(&mut self, value: &serde_json::Value) {
        self.text(value.to_string().as_bytes());
    }

    /// A binary message.
    pub fn binary(&mut self, payload: &[u8]) {
        self.message(Opcode::Binary, payload);
    }

    /// A ping of the transport, if it has one (RFC 6455 §5.5.2).
    pub fn ping(&mut self) {
        if self.framing.transport == Transport::WebSocket {
            self.frame(Opcode::Ping, &[]);
        }
    }

    /// The transport's close with a code and a text, if it has one (RFC 6455 §5.5.1).
    pub fn close(&mut self, code: CloseCode, text: &str) {
        if self.framing.transport == Transport::WebSocket {
            self.bytes.extend_from_slice(&websocket::close_frame(code, text));
            self.ends.push(self.bytes.len());
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Takes all of them out, each in memory of its own.
    pub fn take(&mut self) -> impl Iterator<Item = Bytes> {
        let bytes = std::mem::take(&mut self.bytes);
        let mut ends = std::mem::take(&mut self.ends);
        let mut start = 0;
        let packets: smallvec::SmallVec<[Bytes; 2]> = ends
            .iter()
            .map(|&end| {
                let packet = bytes.get(start..end).unwrap_or_default();
                start = end;
                Bytes::copy_from_slice(packet)
            })
            .collect();
        ends.clear();
        self.ends = ends;
        self.keep(bytes);
        packets.into_iter()
    }

    /// Takes all of them out as one piece; `None` if there are none.
    pub fn take_joined(&mut self) -> Option<Bytes> {
        let joined = (!self.ends.is_empty()).then(|| Bytes::copy_from_slice(&self.bytes));
        self.clear();
        joined
    }

    /// The bytes of all of them, one after the other.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Forgets them.
    pub fn clear(&mut self) {
        self.ends.clear();
        let bytes = std::mem::take(&mut self.bytes);
        self.keep(bytes);
    }

    fn keep(&mut self, mut bytes: Vec<u8>) {
        bytes.clear();
        if bytes.capacity() <= KEPT {
            self.bytes = bytes;
        }
    }

    fn message(&mut self, opcode: Opcode, payload: &[u8]) {
        let Some(wrap) = self.framing.wrap else { return self.frame(opcode, payload) };
        let mut out = Writer::new(Transport::Body, false);
        out.put(wrap.begin);
        (wrap.item)(payload, &mut out);
        out.put(wrap.end);
        self.frame(Opcode::Text, out.payload());
    }

    fn frame(&mut self, opcode: Opcode, payload: &[u8]) {
        if self.framing.transport == Transport::WebSocket {
            self.bytes.extend_from_slice(websocket::header(opcode, payload.len()).as_slice());
        }
        self.bytes.extend_from_slice(payload);
        self.ends.push(self.bytes.len());
    }
}
