//! Why requests within a session fail.

use super::limit::Limit;

/// Why a request failed. The client gets a reply; the connection stays open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// A token is required.
    #[error("unauthorized")]
    Unauthorized,
    /// The token has expired: send a new one.
    #[error("token expired")]
    TokenExpired,
    /// The token's key is being fetched; the same request may succeed in a moment.
    #[error("try again in a moment")]
    KeyAwaited,
    /// The token does not grant this.
    #[error("permission denied")]
    Forbidden,
    /// The room's history does not go back to the position from which the client wants to continue.
    #[error("unrecoverable position")]
    Unrecoverable,
    /// The session is already in the room.
    #[error("already subscribed")]
    AlreadySubscribed,
    /// The session is in as many rooms as allowed.
    #[error("limit exceeded")]
    LimitExceeded,
    /// A rate limit is exceeded; the same request may succeed later.
    #[error("too many requests")]
    TooManyRequests(Limit),
    /// Well-formed, but invalid.
    #[error("bad request")]
    BadRequest,
    /// No such method.
    #[error("method not found")]
    UnknownMethod,
    /// Not supported by this node.
    #[error("not available")]
    NotAvailable,
    /// The broker cannot be reached; the same request may succeed later.
    #[error("the broker cannot be reached")]
    Unavailable,
    /// The broker is temporarily unable to serve the request, which may succeed later.
    #[error("the broker cannot at the moment")]
    NotNow,
    /// The broker refused; the same request will fail again.
    #[error("the broker refused")]
    Refused,
    /// It may or may not have been done.
    #[error("internal server error")]
    Internal,
}

impl ReplyError {
    /// All of them, with one limit as an example.
    pub const ALL: &'static [Self] = &[
        Self::Unauthorized,
        Self::TokenExpired,
        Self::KeyAwaited,
        Self::Forbidden,
        Self::Unrecoverable,
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

    /// Whether the same request may succeed later without a change by the client.
    pub fn is_temporary(self) -> bool {
        matches!(self, Self::Unavailable | Self::NotNow | Self::KeyAwaited | Self::TooManyRequests(_))
    }
}
