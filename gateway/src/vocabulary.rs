//! The values that every part of the node talks in, and nothing that acts.
//!
//! This module imports nothing else of the crate but the WebSocket codec's close codes, so that everything may import
//! it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`close`] | [`CloseReason`]: why a session ended |
//! | [`refusal`] | [`Refusal`]: why a request did not become a session |
//! | [`reply_error`] | [`ReplyError`]: why a request within a session failed |
//! | [`outcome`] | the table from the broker's errors to the two above |
//! | [`limit`] | the limits that clients can exceed |
//! | [`peer`] | where a request comes from |
//! | [`session_ids`] | ids for sessions and requests |
//! | [`protocol_name`] | a protocol's name in metrics and logs |
//! | [`metrics`] | how the owners of metrics register them |
//! | [`secret`] | bytes that are never shown |

pub mod close;
pub mod limit;
pub mod metrics;
pub mod outcome;
pub mod peer;
pub mod protocol_name;
pub mod refusal;
pub mod reply_error;
pub mod secret;
pub mod session_ids;

pub use self::{
    close::CloseReason,
    limit::{AddressLimit, Limit},
    outcome::Outcome,
    peer::{Peer, PeerStatus, RequestName},
    protocol_name::ProtocolName,
    refusal::{HandshakeResult, Refusal, Unanswered},
    reply_error::ReplyError,
    secret::Secret,
    session_ids::SessionIds,
};
