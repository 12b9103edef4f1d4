//! The WebSocket protocol (RFC 6455), server side: bytes in, bytes out.
//!
//! Owns the wire format: the headers of the opening handshake, the frames in both directions, and every rule
//! of the RFC about them. It has no sockets, timers or queues, and does not interpret messages. It turns
//! bytes into [`Event`]s and messages into [`Bytes`](bytes::Bytes); the owner of the socket does the rest.
//!
//! | module | what it holds |
//! |---|---|
//! | [`decoder`] | [`Decoder`]: client bytes → [`Event`]s, however the stream is split |
//! | [`frame`] | the layout of frames in both directions; outgoing frames, encoded once and shared |
//! | [`close`] | [`CloseCode`], [`CloseFrame`] |
//! | [`error`] | [`ProtocolError`]: the ways in which a client can violate the protocol |
//! | [`handshake`] | the opening handshake as pure functions |
//! | [`deflate`] | permessage-deflate (RFC 7692): negotiation, and messages that are compressed once and shared |

pub mod close;
pub mod decoder;
pub mod deflate;
pub mod error;
pub mod frame;
pub mod handshake;
mod utf8;

#[cfg(test)]
mod differential;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use close::{CloseCode, CloseFrame, close_answer, close_frame};
pub use decoder::{Decoder, Event, Feed, Payload};
pub use deflate::{Deflate, compressed};
pub use error::ProtocolError;
pub use frame::{Header, Opcode, encode, header, ping, pong};
