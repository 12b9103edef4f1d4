//! The WebSocket protocol (RFC 6455), server side, as bytes in and bytes out.
//!
//! This module owns the wire format: the opening handshake's headers, the frames a client sends, the
//! frames a server sends, and every rule of the RFC about them. It owns no socket, no timer and no
//! queue, and it does not decide what a message means: it turns bytes into [`Event`]s and messages into
//! [`Bytes`](bytes::Bytes), and whoever holds the socket does the rest.
//!
//! | module | what it holds |
//! |---|---|
//! | [`decoder`] | [`Decoder`]: client bytes → [`Event`]s, for any split of the stream |
//! | [`frame`] | the layout of a frame in both directions; frames to send, made once and shared |
//! | [`close`] | [`CloseCode`], [`CloseFrame`] |
//! | [`error`] | [`ProtocolError`]: each way a client can break the protocol |
//! | [`handshake`] | the opening handshake as pure functions |
//! | [`deflate`] | permessage-deflate (RFC 7692): the agreement, messages compressed once and shared |

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
