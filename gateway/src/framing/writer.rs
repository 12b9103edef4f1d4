//! One message while it is written.

use std::io;

use bytes::{Buf as _, Bytes};

use super::Transport;
use crate::websocket::{self, Opcode};

/// Takes the bytes of one message, and puts the transport's header before them when they are complete. The message is
/// text unless [`binary`](Self::binary) says otherwise.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
    transport: Transport,
    /// How many bytes are kept free at the front for the header.
    reserved: usize,
    opcode: Opcode,
}

impl Writer {
    /// An empty message; with place for a header, unless it is to follow one that is written elsewhere.
    pub(super) fn new(transport: Transport, with_header: bool) -> Self {
        let has_header = with_header && transport == Transport::WebSocket;
        let reserved = if has_header { websocket::Header::MAX_BYTES } else { 0 };
        Self { bytes: Vec::new(), transport, reserved, opcode: Opcode::Text }
    }

    /// Makes place for so many more bytes at once. Called first, with the size of the message, it saves copies.
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

    /// Appends a text as a JSON string.
    pub fn put_json_string(&mut self, text: &str) {
        serde_json::to_writer(self, text).expect("text is JSON, and a vector grows");
    }

    /// Appends a JSON text on one line. Within JSON a line break can only be white space, and several protocols end a
    /// message at it.
    pub fn put_json_line(&mut self, json: &str) {
        for (number, line) in json.split(['\n', '\r']).enumerate() {
            if number > 0 {
                self.put(b" ");
            }
            self.put(line.as_bytes());
        }
    }

    /// The message is binary data. Only a WebSocket tells the difference.
    pub fn binary(&mut self) {
        self.opcode = Opcode::Binary;
    }

    /// What has been written.
    pub(super) fn payload(&self) -> &[u8] {
        self.bytes.get(self.reserved..).unwrap_or_default()
    }

    /// The message's bytes. `tail` more bytes belong to it, which follow from elsewhere.
    pub(super) fn finish(mut self, tail: usize) -> Bytes {
        if self.reserved == 0 {
            return self.bytes.into();
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
        let mut bytes = Bytes::from(self.bytes);
        bytes.advance(unused);
        bytes
    }
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
