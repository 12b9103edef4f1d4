//! Why requests within a session fail.

use super::limit::Limit;

/// Why a request could not be done. The client hears it; the connection lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// No token where one is needed.
    #[error("unauthorized")]
    Unauthorized,
    /// The token has expired: come with a new one.
    #[error("token expired")]
    TokenExpired,
    /// The token's key is being fetched; the same request may succeed in a moment.
    #[error("try again in a moment")]
    KeyAwaited,
    /// The token does not grant this.
    #[error("permission denied")]
    Forbidden,
    /// The session is in the room already.
    #[error("already subscribed")]
    AlreadySubscribed,
    /// As many rooms as a session may have.
    #[error("limit exceeded")]
    LimitExceeded,
    /// More, or faster, than a limit allows; the same request may succeed later.
    #[error("too many requests")]
    TooManyRequests(Limit),
    /// Understood, but wrong.
    #[error("bad request")]
    BadRequest,
    /// No such method.
    #[error("method not found")]
    UnknownMethod,
    /// Not offered by this node.
    #[error("not available")]
    NotAvailable,
    /// The broker could not be reached; the same request may succeed later.
    #[error("the broker cannot be reached")]
    Unavailable,
    /// The broker cannot at the moment; the same request may succeed later.
    #[error("the broker cannot at the moment")]
    NotNow,
    /// The broker refused; the same request fails again.
    #[error("the broker refused")]
    Refused,
    /// It may or may not have been done.
    #[error("internal server error")]
    Internal,
}

impl ReplyError {
    /// All of them, with one limit for all limits.
    pub const ALL: &'static [Self] = &[
        Self::Unauthorized,
        Self::TokenExpired,
        Self::KeyAwaited,
        Self::Forbidden,
        Self::AlreadySubscribed,
        Self::LimitExceeded,
        Self::TooManyRequests(Limit::Commands),
        Self::BadRequest,
        Self::UnknownMethod,
        Self::NotAvailable,
        Self::Unavailable,
        Self::NotNow,
        Self::Refused,
        Self::Internal,
    ];

    /// Whether the same request may succeed later, without any change on the client's side.
    pub fn is_temporary(self) -> bool {
        matches!(self, Self::Unavailable | Self::NotNow | Self::KeyAwaited | Self::TooManyRequests(_))
    }
}
