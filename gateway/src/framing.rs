//! How messages become bytes on a transport, and what is shared between the members who are sent the same bytes.
//!
//! Knows no protocol. Protocols say what they mean ([`Packets`], [`Format`]); this module puts it into WebSocket
//! frames or into the body of a response.
//!
//! | module | what it holds |
//! |---|---|
//! | [`packets`] | [`Packets`]: what one session is told, framed as it is written |
//! | [`encoding`] | [`Encoding`]: what two members must have in common to be sent the same bytes |
//! | [`writer`] | [`Writer`]: one message while it is written |
//! | [`frame`] | [`Frame`]: one message's bytes: shared, or a private head before a shared tail |
//! | [`cache`] | [`Cache`]: bytes by encoding, made at most once |
//! | [`broadcast`] | [`Broadcast`]: a publication on its way to the sessions of this node |

pub mod broadcast;
pub mod cache;
pub mod encoding;
pub mod frame;
pub mod packets;
#[cfg(test)]
mod tests;
pub mod writer;

pub use self::{
    broadcast::Broadcast,
    cache::Cache,
    encoding::{Encoding, Format, MemberState, Wrap},
    frame::Frame,
    packets::{Framing, Packets},
    writer::Writer,
};

/// What a session's messages travel in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// One WebSocket message each (RFC 6455).
    WebSocket,
    /// The body of one HTTP response, as the protocol wrote them.
    Body,
}
