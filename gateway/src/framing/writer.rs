//! Writes one message.

use std::io;

use broker_bridge::Cursor;
use bytes::{Buf as _, Bytes};

use super::Transport;
use crate::websocket::{self, Opcode};

/// Collects the bytes of one message, and puts the transport's header before them at the end. The message is
/// text unless [`binary`](Self::binary) is called.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
    transport: Transport,
    /// How many bytes at the front are reserved for the header.
    reserved: usize,
    opcode: Opcode,
    position: Option<Cursor>,
}

impl Writer {
    /// An empty message. Reserves space for a header, unless the header is written elsewhere.
    pub(super) fn new(transport: Transport, with_header: bool) -> Self {
        let has_header = with_header && transport == Transport::WebSocket;
        let reserved = if has_header { websocket::Header::MAX_BYTES } else { 0 };
        Self { bytes: Vec::new(), transport, reserved, opcode: Opcode::Text, position: None }
    }

    /// An empty part of a message, without a header.
    pub fn body() -> Self {
        Self::new(Transport::Body, false)
    }

    /// Sets the position of the publication that is written, if it is recorded.
    #[must_use]
    pub(super) fn at(self, position: Option<Cursor>) -> Self {
        Self { position, ..self }
    }

    /// The position of the publication that is written, if it is recorded in its room's history.
    pub fn position(&self) -> Option<Cursor> {
        self.position
    }

    /// Reserves space for more bytes. Calling this first with the size of the message saves copies.
    pub fn reserve(&mut self, bytes: usize) {
        if self.bytes.is_empty() {
            self.bytes.reserve_exact(self.reserved + bytes);
            self.bytes.resize(self.reserved, 0);
        } else {
            self.bytes.reserve(bytes);
        }
    }

    /// Appends bytes.
    pub fn put(&mut self, bytes: &[u8]) {
        if self.bytes.is_empty() {
            self.reserve(bytes.len());
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Appends text as a JSON string.
    pub fn put_json_string(&mut self, text: &str) {
        serde_json::to_writer(self, text).expect("text is JSON, and a vector grows");
    }

    /// Appends JSON on one line. In JSON a line break can only be white space, and several protocols end a
    /// message at one.
    pub fn put_json_line(&mut self, json: &str) {
        for (number, line) in json.split(['\n', '\r']).enumerate() {
            if number > 0 {
                self.put(b" ");
            }
            self.put(line.as_bytes());
        }
    }

    /// Marks the message as binary. Only a WebSocket tells the difference.
    pub fn binary(&mut self) {
        self.opcode = Opcode::Binary;
    }

    /// The bytes written so far.
    pub fn payload(&self) -> &[u8] {
        self.bytes.get(self.reserved..).unwrap_or_default()
    }

    /// The bytes of the message. Another `tail` bytes of it follow from elsewhere.
    pub(super) fn finish(mut self, tail: usize) -> Bytes {
        if self.reserved == 0 {
            return exact(self.bytes);
        }
        if self.bytes.is_empty() {
            self.reserve(0);
        }
        debug_assert_eq!(self.transport, Transport::WebSocket, "only WebSocket messages have headers");
        let header = websocket::header(self.opcode, self.bytes.len() - self.reserved + tail);
        let header = header.as_slice();
        let unused = self.reserved - header.len();
        if let Some(place) = self.bytes.get_mut(unused..self.reserved) {
            place.copy_from_slice(header);
        }
        let mut bytes = exact(self.bytes);
        bytes.advance(unused);
        bytes
    }
}

/// Frees spare capacity: a frame may wait in queues, which count only its length.
fn exact(mut bytes: Vec<u8>) -> Bytes {
    bytes.shrink_to_fit();
    bytes.into()
}

/// Never fails.
impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.put(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
