//! What clients are told when the broker has not done what it was asked: one table for HTTP and all protocols.
//!
//! Close codes follow from the replies, protocol by protocol; see [`crate::protocol`] and
//! [`crate::session::CloseReason`]. What the broker said itself is logged and never sent.

use broker_bridge::BrokerError;

use crate::{protocol::ReplyError, server::Refusal};

/// What clients are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// In answer to an HTTP request.
    pub refusal: Refusal,
    /// Within a session.
    pub reply: ReplyError,
}

impl From<&BrokerError> for Told {
    fn from(error: &BrokerError) -> Self {
        let (refusal, reply) = match error {
            // Nothing was done, and the same request may succeed later.
            BrokerError::Unavailable | BrokerError::Closed => (Refusal::Broker, ReplyError::Unavailable),
            BrokerError::NotNow(_) => (Refusal::BrokerNotNow, ReplyError::NotNow),
            // Nothing was done, and coming back does not help.
            BrokerError::Forbidden(_) => (Refusal::BrokerForbidden, ReplyError::Forbidden),
            BrokerError::Refused(_) => (Refusal::BrokerRefused, ReplyError::Refused),
            // It may have been done: coming back may do it twice.
            BrokerError::Unknown => (Refusal::BrokerUnknown, ReplyError::Internal),
        };
        Self { refusal, reply }
    }
}

#[cfg(test)]
mod tests {
    use broker_bridge::RoomName;

    use super::*;
    use crate::{
        protocol::{Notice, Protocol, Reply, centrifuge::Centrifuge, plain::Plain},
        session::CloseReason,
    };

    /// A client comes back by itself exactly where that is safe and of use, whatever it speaks.
    #[test]
    fn every_protocol_is_told_the_same() {
        let room = RoomName::new("lobby").unwrap();
        let plain = Protocol::Plain(Plain { room, echo: true, close_on_gap: false });
        let centrifuge = Protocol::Centrifuge(Centrifuge { ping_seconds: 25 });
        let text = || "BUSY".into();
        for (error, status, temporary, close) in [
            (BrokerError::Unavailable, 503, true, CloseReason::PublishFailed),
            (BrokerError::Closed, 503, true, CloseReason::PublishFailed),
            (BrokerError::NotNow(text()), 503, true, CloseReason::PublishFailed),
            (BrokerError::Forbidden(text()), 403, false, CloseReason::Forbidden),
            (BrokerError::Refused(text()), 502, false, CloseReason::BrokerRefused),
            (BrokerError::Unknown, 504, false, CloseReason::PublishFailed),
        ] {
            let Told { refusal, reply } = Told::from(&error);
            assert_eq!(refusal.status().as_u16(), status, "{error}");
            assert_eq!(error.is_retryable() || error == BrokerError::Closed, temporary, "{error}");

            let failed = Reply::Failed(reply);
            assert_eq!(plain.reply(0, &failed), Notice::Close(close), "{error}");
            let Notice::Send(frame) = centrifuge.reply(1, &failed) else { panic!("{error}: no reply") };
            let frame = String::from_utf8_lossy(&frame).into_owned();
            assert!(frame.contains(&format!("\"temporary\":{temporary}")), "{error}: {frame}");
            assert!(!frame.contains("BUSY"), "what the broker said is not sent: {frame}");
        }
    }
}
