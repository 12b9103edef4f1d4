//! Every way a session can end, by name.

use super::{limit::Limit, metrics::Label};
use crate::websocket::CloseCode;

/// Why a session ended. One value per cause; also the label in metrics and the word in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The client closed the connection.
    Client,
    /// The session was one answer, which is complete.
    Answered,
    /// The connection was lost without a close.
    Lost,
    /// The peer acknowledged or accepted nothing for so long that the kernel gave up the connection.
    NoProgress,
    /// The client violated RFC 6455.
    ProtocolError,
    /// Text that is not UTF-8.
    InvalidText,
    /// A message larger than `limits.message_size`.
    MessageTooBig,
    /// The token has expired.
    TokenExpired,
    /// The client published without a grant.
    Forbidden,
    /// An invalid token was sent within the session.
    InvalidToken,
    /// The client sent something that its protocol does not allow, or not at this point.
    BadRequest,
    /// The client asked for something that this node does not support, and its protocol has no reply.
    NotAvailable,
    /// The client did not begin its session in time.
    Stale,
    /// The client exceeded a limit too often, or its protocol has no error reply.
    OverLimit(Limit),
    /// The outbound queue was full.
    SlowConsumer,
    /// The node held more than `limits.memory` for its clients, and this session was among the fullest.
    OutOfMemory,
    /// A publication of this session could not be delivered, and its protocol has no error reply.
    PublishFailed,
    /// The broker permanently refused a publication of this session, and its protocol has no error reply.
    BrokerRefused,
    /// Publications may have been missed, and the client asked to be closed at a gap.
    Gap,
    /// Nothing was received from the client for `heartbeat.timeout`.
    HeartbeatTimeout,
    /// The node is draining.
    Drain,
    /// The session has reached `public.max_session_age`.
    MaxAge,
    /// A bug in the node.
    Internal,
}

impl Label for CloseReason {
    const ALL: &'static [Self] = &[
        Self::Client,
        Self::Answered,
        Self::Lost,
        Self::NoProgress,
        Self::ProtocolError,
        Self::InvalidText,
        Self::MessageTooBig,
        Self::TokenExpired,
        Self::Forbidden,
        Self::InvalidToken,
        Self::BadRequest,
        Self::NotAvailable,
        Self::Stale,
        Self::OverLimit(Limit::Commands),
        Self::SlowConsumer,
        Self::OutOfMemory,
        Self::PublishFailed,
        Self::BrokerRefused,
        Self::Gap,
        Self::HeartbeatTimeout,
        Self::Drain,
        Self::MaxAge,
        Self::Internal,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Answered => "answered",
            Self::Lost => "lost",
            Self::NoProgress => "no_progress",
            Self::ProtocolError => "protocol_error",
            Self::InvalidText => "invalid_text",
            Self::MessageTooBig => "message_too_big",
            Self::TokenExpired => "token_expired",
            Self::Forbidden => "forbidden",
            Self::InvalidToken => "invalid_token",
            Self::BadRequest => "bad_request",
            Self::NotAvailable => "not_available",
            Self::Stale => "stale",
            Self::OverLimit(_) => "over_limit",
            Self::SlowConsumer => "slow_consumer",
            Self::OutOfMemory => "memory",
            Self::PublishFailed => "publish_failed",
            Self::BrokerRefused => "broker_refused",
            Self::Gap => "gap",
            Self::HeartbeatTimeout => "heartbeat_timeout",
            Self::Drain => "drain",
            Self::MaxAge => "max_age",
            Self::Internal => "internal",
        }
    }
}

impl CloseReason {
    /// Whether an unchanged client may expect to be served when it reconnects.
    pub fn come_back(self) -> bool {
        matches!(
            self,
            Self::OverLimit(_)
                | Self::SlowConsumer
                | Self::OutOfMemory
                | Self::PublishFailed
                | Self::Gap
                | Self::HeartbeatTimeout
                | Self::Drain
                | Self::MaxAge
                | Self::Internal
        )
    }

    /// The close code (RFC 6455 §7.4 and the IANA registry) and text on a plain WebSocket. `None` if the peer
    /// is gone, if the client has sent a code of its own, which is echoed, or if no WebSocket ends like this.
    pub fn plain_close(self) -> Option<(CloseCode, &'static str)> {
        Some(match self {
            Self::Client | Self::Answered | Self::Lost | Self::NoProgress => return None,
            Self::ProtocolError => (CloseCode::PROTOCOL_ERROR, "protocol error"),
            Self::InvalidText => (CloseCode::INVALID_PAYLOAD, "text must be UTF-8"),
            Self::MessageTooBig => (CloseCode::MESSAGE_TOO_BIG, "message too big"),
            Self::TokenExpired => (CloseCode::POLICY_VIOLATION, "token expired"),
            Self::Forbidden => (CloseCode::POLICY_VIOLATION, "no grant to publish in this room"),
            Self::InvalidToken => (CloseCode::POLICY_VIOLATION, "invalid token"),
            Self::BadRequest => (CloseCode::POLICY_VIOLATION, "bad request"),
            Self::NotAvailable => (CloseCode::POLICY_VIOLATION, "not available"),
            Self::Stale => (CloseCode::POLICY_VIOLATION, "no token in time"),
            Self::OverLimit(limit) => (CloseCode::POLICY_VIOLATION, limit.close_text()),
            Self::SlowConsumer => (CloseCode::TRY_AGAIN_LATER, "too slow: outbound queue full"),
            Self::OutOfMemory => (CloseCode::TRY_AGAIN_LATER, "node is short of memory, come back"),
            Self::PublishFailed => (CloseCode::TRY_AGAIN_LATER, "publication not delivered"),
            Self::BrokerRefused => (CloseCode::INTERNAL_ERROR, "the broker refused the publication"),
            Self::Gap => (CloseCode::SERVICE_RESTART, "messages may have been missed"),
            Self::HeartbeatTimeout => (CloseCode::GOING_AWAY, "no answer to pings"),
            Self::Drain => (CloseCode::SERVICE_RESTART, "node is leaving, come back"),
            Self::MaxAge => (CloseCode::SERVICE_RESTART, "time to change the node, come back"),
            Self::Internal => (CloseCode::INTERNAL_ERROR, "internal error"),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// A new reason does not compile here until it is added to the list.
    #[test]
    fn every_reason_is_listed_once() {
        for (place, reason) in CloseReason::ALL.iter().copied().enumerate() {
            let listed_at = match reason {
                CloseReason::Client => 0,
                CloseReason::Answered => 1,
                CloseReason::Lost => 2,
                CloseReason::NoProgress => 3,
                CloseReason::ProtocolError => 4,
                CloseReason::InvalidText => 5,
                CloseReason::MessageTooBig => 6,
                CloseReason::TokenExpired => 7,
                CloseReason::Forbidden => 8,
                CloseReason::InvalidToken => 9,
                CloseReason::BadRequest => 10,
                CloseReason::NotAvailable => 11,
                CloseReason::Stale => 12,
                CloseReason::OverLimit(_) => 13,
                CloseReason::SlowConsumer => 14,
                CloseReason::OutOfMemory => 15,
                CloseReason::PublishFailed => 16,
                CloseReason::BrokerRefused => 17,
                CloseReason::Gap => 18,
                CloseReason::HeartbeatTimeout => 19,
                CloseReason::Drain => 20,
                CloseReason::MaxAge => 21,
                CloseReason::Internal => 22,
            };
            assert_eq!(listed_at, place, "{reason:?}");
        }
        let labels: HashSet<_> = CloseReason::ALL.iter().copied().map(CloseReason::as_str).collect();
        assert_eq!(labels.len(), CloseReason::ALL.len());
    }
}
