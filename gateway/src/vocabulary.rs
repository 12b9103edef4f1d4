//! The values that all parts of the node share, without behaviour.
//!
//! This module imports nothing else of the crate except the WebSocket codec's close codes, so everything may
//! import it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`close`] | [`CloseReason`]: why a session ended |
//! | [`refusal`] | [`Refusal`]: why a request did not become a session |
//! | [`reply_error`] | [`ReplyError`]: why a request within a session failed |
//! | [`outcome`] | maps the broker's errors to the two above |
//! | [`limit`] | the limits that clients can exceed |
//! | [`peer`] | the origin of a request |
//! | [`session_ids`] | ids for sessions and requests |
//! | [`protocol_name`] | a protocol's name in metrics and logs |
//! | [`metrics`] | how modules register their metrics |
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
