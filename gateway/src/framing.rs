//! How messages become bytes on a transport, and how members with the same encoding share them.
//!
//! Knows no protocol. Protocols define the content ([`Packets`], [`Format`]); this module puts it into
//! WebSocket frames or a response body.
//!
//! | module | what it holds |
//! |---|---|
//! | [`packets`] | [`Packets`]: messages for one session, framed as they are written |
//! | [`encoding`] | [`Encoding`]: what two members must have in common to share bytes |
//! | [`positions`] | [`Positions`]: what a client has received in several rooms |
//! | [`writer`] | [`Writer`]: writes one message |
//! | [`frame`] | [`Frame`]: the bytes of one message: shared, or a private head before a shared tail |
//! | [`cache`] | [`Cache`]: bytes by encoding, created at most once |
//! | [`broadcast`] | [`Broadcast`]: a publication on its way to the sessions of this node |

pub mod broadcast;
pub mod cache;
pub mod encoding;
pub mod frame;
pub mod packets;
pub mod positions;
#[cfg(test)]
mod tests;
pub mod writer;

pub use self::{
    broadcast::{Broadcast, Places},
    cache::Cache,
    encoding::{Encoding, Format, MemberState, Wrap},
    frame::Frame,
    packets::{Framing, Packets},
    positions::Positions,
    writer::Writer,
};

/// The transport of a session's messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Each message is one WebSocket message (RFC 6455).
    WebSocket,
    /// All messages form the body of one HTTP response.
    Body,
}
