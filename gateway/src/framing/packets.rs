//! The messages that a protocol writes for one session.

use bytes::Bytes;

use super::{Transport, Wrap, Writer};
use crate::websocket::{self, CloseCode, Opcode};

/// How a session's messages are framed.
#[derive(Clone, Copy)]
pub struct Framing {
    /// The transport.
    pub transport: Transport,
    /// The outer protocol around each message, if any.
    pub wrap: Option<&'static Wrap>,
}

impl Framing {
    /// Framing for a transport without an outer protocol.
    pub fn on(transport: Transport) -> Self {
        Self { transport, wrap: None }
    }
}

impl std::fmt::Debug for Framing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}{}", self.transport, if self.wrap.is_some() { ", wrapped" } else { "" })
    }
}

/// Messages for one session, each framed as soon as it is written. The buffer is reused, so most messages
/// cost no allocation unless they are queued.
#[derive(Debug)]
pub struct Packets {
    framing: Framing,
    bytes: Vec<u8>,
    /// Where each message ends.
    ends: Vec<usize>,
    /// The only message, if it needs no framing and is a static.
    fixed: Option<&'static [u8]>,
}

/// The capacity in bytes that is kept while it is empty.
const KEPT: usize = 16 * 1024;

impl Default for Packets {
    fn default() -> Self {
        Self { framing: Framing::on(Transport::Body), bytes: Vec::new(), ends: Vec::new(), fixed: None }
    }
}

impl Packets {
    /// Starts messages for a session with this framing.
    pub fn begin(&mut self, framing: Framing) {
        debug_assert!(self.ends.is_empty(), "messages for another session");
        self.framing = framing;
    }

    /// Adds a text message.
    pub fn text(&mut self, payload: &[u8]) {
        self.message(Opcode::Text, payload);
    }

    /// Adds a text message that is a static, such as a heartbeat.
    pub fn text_static(&mut self, payload: &'static [u8]) {
        let is_bare = self.framing.transport == Transport::Body && self.framing.wrap.is_none();
        self.fixed = Some(payload).filter(|_| is_bare && self.ends.is_empty());
        self.text(payload);
    }

    /// Adds a text message with this value as JSON.
    pub fn json(&mut self, value: &serde_json::Value) {
        self.text(value.to_string().as_bytes());
    }

    /// Adds a binary message.
    pub fn binary(&mut self, payload: &[u8]) {
        self.message(Opcode::Binary, payload);
    }

    /// Adds a ping, if the transport has pings (RFC 6455 §5.5.2).
    pub fn ping(&mut self) {
        if self.framing.transport == Transport::WebSocket {
            self.frame(Opcode::Ping, &[]);
        }
    }

    /// Adds a close frame with a code and a text, if the transport has one (RFC 6455 §5.5.1).
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

    /// Takes all messages out, each in memory of its own.
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
        self.fixed = None;
        self.keep(bytes);
        packets.into_iter()
    }

    /// Takes all messages out in one piece; `None` if there are none.
    pub fn take_joined(&mut self) -> Option<Bytes> {
        let joined = (!self.ends.is_empty()).then(|| self.to_bytes());
        self.clear();
        joined
    }

    /// A copy of the bytes of all messages. A static is not copied.
    pub fn to_bytes(&self) -> Bytes {
        match self.fixed {
            Some(fixed) if self.ends.len() == 1 => Bytes::from_static(fixed),
            _ => Bytes::copy_from_slice(&self.bytes),
        }
    }

    /// The bytes of all messages, in order.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Drops all messages.
    pub fn clear(&mut self) {
        self.ends.clear();
        self.fixed = None;
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
