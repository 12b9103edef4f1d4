//! What clients are told when the broker fails: one table for HTTP and all protocols.
//!
//! Close codes follow from the replies, protocol by protocol; see [`crate::protocol`] and
//! [`CloseReason`](super::CloseReason). The broker's own message is logged and never sent.

use broker_bridge::BrokerError;

use super::{Refusal, ReplyError};

/// What the client is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// In answer to an HTTP request.
    pub refusal: Refusal,
    /// Within a session.
    pub reply: ReplyError,
}

impl From<&BrokerError> for Outcome {
    fn from(error: &BrokerError) -> Self {
        let (refusal, reply) = match error {
            // Nothing was done, and the same request may succeed later.
            BrokerError::Unavailable | BrokerError::Closed => (Refusal::Broker, ReplyError::Unavailable),
            BrokerError::NotNow(_) => (Refusal::BrokerNotNow, ReplyError::NotNow),
            // Nothing was done, and a retry does not help.
            BrokerError::Forbidden(_) => (Refusal::BrokerForbidden, ReplyError::Forbidden),
            BrokerError::Refused(_) => (Refusal::BrokerRefused, ReplyError::Refused),
            // It may have been done: a retry may do it twice.
            BrokerError::Unknown => (Refusal::BrokerUnknown, ReplyError::Internal),
        };
        Self { refusal, reply }
    }
}
