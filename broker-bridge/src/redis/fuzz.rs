//! Access for the fuzz targets to the two parsers of bytes from Redis.

use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::io::AsyncReadExt as _;

use super::{
    envelope,
    resp::{Frame, Reader},
};
use crate::Publication;

/// Decodes one Redis message.
pub fn decode(message: Bytes) -> Publication {
    envelope::decode(message)
}

/// Encodes one Redis message.
pub fn encode(publication: &Publication) -> Vec<u8> {
    let encoded = envelope::encode(publication);
    let mut message = Vec::with_capacity(encoded.header_bytes() + encoded.data().len());
    encoded.put_header(&mut message);
    message.extend_from_slice(encoded.data());
    message
}

/// One frame from a server, or the error that ended the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// A publication: its topic and its payload.
    Message(Vec<u8>, Bytes),
    /// Any other frame, in its debug format.
    Other(String),
    /// It violated the protocol or a bound.
    Malformed,
}

/// Parses a server's bytes in pieces of `piece` bytes, with payloads of at most `max_payload`. Returns the frames, and
/// whether bytes are left over.
pub fn read(mut bytes: &[u8], piece: usize, max_payload: usize) -> (Vec<Said>, bool) {
    let mut reader = Reader::new(max_payload);
    let mut said = Vec::new();
    loop {
        let filled = reader.fill(&mut (&mut bytes).take(piece as u64)).now_or_never();
        if filled.expect("bytes that are there are not waited for").expect("nor can they fail") == 0 {
            return (said, !reader.is_empty());
        }
        loop {
            said.push(match reader.next() {
                Ok(None) => break,
                Ok(Some(Frame::Message { topic, payload })) => Said::Message(topic.to_vec(), payload),
                Ok(Some(other)) => Said::Other(format!("{other:?}")),
                Err(_) => {
                    said.push(Said::Malformed);
                    return (said, false);
                }
            });
        }
    }
}
