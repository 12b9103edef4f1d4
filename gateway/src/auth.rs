//! Who may do what.
//!
//! Owns the way from a request to an [`Identity`]: where a token is carried, whether it is genuine, what it
//! and the configuration's policies grant. Does not answer requests, count failures or end sessions; it says
//! what is so and leaves the acting to others. It never asks for the time: whoever calls says what time it is.
//!
//! | module | what it holds |
//! |---|---|
//! | [`credential`] | where in a request a token is carried: header, query or subprotocol list |
//! | [`cookie`] | a token in a cookie, which counts only for pages that may use it |
//! | [`token`] | [`Authenticator`]: from a token to an [`Identity`] |
//! | [`key`] | algorithms, and keys pinned to them |
//! | [`keyring`] | which keys there are, which of them a token is tried with, how they are replaced |
//! | [`jwks`] | key sets as documents |
//! | [`files`], [`remote`] | keys from files and from a URL, kept up to date |
//! | [`mint`] | making tokens and secrets: `tidegate token` and the first run |
//! | [`grant`] | operations, room patterns, policies and how they match |
//!
//! Nothing is allowed unless something grants it. A token is held in a [`Token`], which no log line and no
//! error message can show.

pub mod cookie;
pub mod credential;
pub mod files;
pub mod grant;
pub mod jwks;
pub mod key;
#[cfg(test)]
mod key_tests;
pub mod keyring;
pub mod mint;
pub mod remote;
#[cfg(test)]
mod rfc8725_tests;
pub mod token;
#[cfg(test)]
mod token_tests;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use broker_bridge::RoomName;

pub use self::{
    cookie::CookieName,
    credential::Token,
    grant::{Grant, Operation, Operations, Policy, PolicyPattern, RoomPattern},
    key::{Algorithm, Key},
    keyring::Keyring,
    token::{AuthConfig, Authenticator},
};

/// What a client hears of a refusal, whatever its reason: the value of `WWW-Authenticate` (RFC 6750 §3).
///
/// The reason is for the operator. A client that could tell a bad signature from an expired token would
/// learn something about the key.
pub const CHALLENGE: &str = "Bearer realm=\"tidegate\"";

/// What a verified token says, and what may be done with it.
///
/// Cloning shares everything; sessions whose tokens grant the same share the grants too.
#[derive(Clone)]
pub struct Identity {
    subject: Subject,
    expires_at: UnixSeconds,
    grants: Arc<[Grant]>,
    policies: Arc<[Policy]>,
}

impl Identity {
    /// Whom the token was made for.
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// From this second on the identity is void: the token's `exp` and the leeway that it was granted.
    pub fn expires_at(&self) -> UnixSeconds {
        self.expires_at
    }

    /// How long the identity is good for; zero once it has expired.
    pub fn remaining(&self, now: UnixSeconds) -> Duration {
        self.expires_at.since(now)
    }

    /// Whether it grants just what another identity of the same subject grants.
    pub fn grants_as(&self, other: &Self) -> bool {
        let same_policies = Arc::ptr_eq(&self.policies, &other.policies) || self.policies == other.policies;
        same_policies && self.grants == other.grants
    }

    /// Whether the token or a policy grants `operation` in `room`. Says nothing about expiry.
    // A scan, because it is a few dozen comparisons of short texts at most, and a session asks once per
    // room and per publication. An index would cost every session more memory than it saves time.
    pub fn may(&self, operation: Operation, room: &RoomName) -> bool {
        self.grants.iter().any(|grant| grant.operations.contains(operation) && grant.pattern.matches(room))
            || self.policies.iter().any(|policy| {
                policy.operations.contains(operation) && policy.pattern.matches(self.subject.as_str(), room)
            })
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("subject", &self.subject)
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

/// Whom a token was made for: 1 to 255 bytes of UTF-8 without control characters. Cloning shares the text.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Subject(Arc<str>);

/// Why a text is not a [`Subject`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a subject has 1 to {max} bytes and no control characters", max = Subject::MAX_BYTES)]
pub struct InvalidSubject;

impl Subject {
    /// The longest subject, in bytes.
    pub const MAX_BYTES: usize = 255;

    /// Checks `text` and takes it.
    pub fn new(text: &str) -> Result<Self, InvalidSubject> {
        let valid = (1..=Self::MAX_BYTES).contains(&text.len()) && !text.chars().any(char::is_control);
        if valid { Ok(Self(Arc::from(text))) } else { Err(InvalidSubject) }
    }

    /// The subject as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The text itself, shared.
    pub fn shared(&self) -> Arc<str> {
        Arc::clone(&self.0)
    }
}

impl std::str::FromStr for Subject {
    type Err = InvalidSubject;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::new(text)
    }
}

impl fmt::Debug for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Whole seconds since 1970-01-01T00:00:00Z, leap seconds not counted: the unit of a token's times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnixSeconds(pub u64);

impl UnixSeconds {
    /// The last second of the year 9999. A later time in a token was meant in another unit.
    pub const MAX: Self = Self(253_402_300_799);

    /// The whole seconds from `earlier` to this, or zero.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_secs(self.0.saturating_sub(earlier.0))
    }

    /// This many whole seconds later.
    #[must_use]
    pub fn plus(self, later: Duration) -> Self {
        Self(self.0.saturating_add(later.as_secs()))
    }
}

/// A clock that stands before 1970 counts as 1970.
impl From<SystemTime> for UnixSeconds {
    fn from(time: SystemTime) -> Self {
        Self(time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
    }
}

/// Why a request has no identity. For the operator's eyes: see [`CHALLENGE`] for what the client hears.
///
/// What it prints holds no part of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum AuthFailure {
    /// The request carries no token.
    #[error(
        "no token: neither a bearer header, nor a `token` query parameter, nor a bearer subprotocol, nor a cookie that counts"
    )]
    Missing,
    /// The request carries more than one token.
    #[error("more than one token in one request")]
    Ambiguous,
    /// The token is longer than [`Token::MAX_BYTES`].
    #[error("the token is longer than {max} bytes", max = Token::MAX_BYTES)]
    TooLong,
    /// The token is not a signed JWT in its compact form.
    #[error("the token is not a signed JWT in compact form")]
    Malformed,
    /// The header names an algorithm that the key is not pinned to, or that no key is for.
    #[error("the token's algorithm is not that of its key, or of any key")]
    WrongAlgorithm,
    /// The header has a `typ` of a token that was made for something else (RFC 8725 §3.11).
    #[error("the token's type (`typ`) is neither JWT nor at+jwt")]
    WrongType,
    /// The header has a `crit`, and none of the extensions it could name is known (RFC 7515 §4.1.11).
    #[error("the token's header demands an extension (`crit`, `b64`)")]
    CriticalHeader,
    /// The header names no key of this node's, or none where it would have to.
    #[error("the token's `kid` names no key of this node, or is missing where several keys would fit")]
    UnknownKey,
    /// The signature was not made with the key, or for another text.
    #[error("the token's signature is wrong")]
    BadSignature,
    /// The signed text is not one JSON object, or has a claim twice.
    #[error("the token's claims are not one JSON object with each claim once")]
    InvalidPayload,
    /// `sub` is missing or not a [`Subject`].
    #[error("claim `sub`: expected text of 1 to 255 bytes without control characters")]
    InvalidSubject,
    /// `exp`, `nbf` or `iat` is not a time, or `exp` is missing.
    #[error(
        "claims `exp` (required), `nbf`, `iat`: expected seconds since 1970, not milliseconds, before the year 10000"
    )]
    InvalidTime,
    /// `iss` is not `auth.issuer` (RFC 8725 §3.8).
    #[error("claim `iss`: not auth.issuer")]
    WrongIssuer,
    /// `aud` has none of `auth.audience`, or is there and nothing is configured (RFC 7519 §4.1.3).
    #[error("claim `aud`: none of auth.audience; without that key, expected no `aud`")]
    ForeignAudience,
    /// `rooms` is not a map from patterns to lists of operations, each pattern once.
    #[error("claim `rooms`: expected a map from room patterns, each once, to lists of operations")]
    InvalidRooms,
    /// `rooms` has a key that is no [`RoomPattern`].
    #[error("claim `rooms`: a key is no room pattern (a room name, or its beginning and `*`; no `{{sub}}`)")]
    InvalidPattern,
    /// `rooms` names an operation that does not exist.
    #[error("claim `rooms`: an operation is none of subscribe, publish, presence, history")]
    UnknownOperation,
    /// `rooms` has more than [`Authenticator::MAX_GRANTS`] keys.
    #[error("claim `rooms`: more than {max} room patterns", max = Authenticator::MAX_GRANTS)]
    TooManyGrants,
    /// The token has expired.
    #[error("the token has expired")]
    Expired,
    /// The token is not valid yet.
    #[error("the token is not valid yet")]
    NotYetValid,
}

impl AuthFailure {
    /// Every reason, for metrics that show each from the start.
    pub const ALL: [Self; 20] = [
        Self::Missing,
        Self::Ambiguous,
        Self::TooLong,
        Self::Malformed,
        Self::WrongAlgorithm,
        Self::WrongType,
        Self::CriticalHeader,
        Self::UnknownKey,
        Self::BadSignature,
        Self::InvalidPayload,
        Self::InvalidSubject,
        Self::InvalidTime,
        Self::WrongIssuer,
        Self::ForeignAudience,
        Self::InvalidRooms,
        Self::InvalidPattern,
        Self::UnknownOperation,
        Self::TooManyGrants,
        Self::Expired,
        Self::NotYetValid,
    ];

    /// The label that metrics use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Ambiguous => "ambiguous",
            Self::TooLong => "too_long",
            Self::Malformed => "malformed",
            Self::WrongAlgorithm => "wrong_algorithm",
            Self::WrongType => "wrong_type",
            Self::CriticalHeader => "critical_header",
            Self::UnknownKey => "unknown_key",
            Self::BadSignature => "bad_signature",
            Self::InvalidPayload => "invalid_payload",
            Self::InvalidSubject => "invalid_subject",
            Self::InvalidTime => "invalid_time",
            Self::WrongIssuer => "wrong_issuer",
            Self::ForeignAudience => "foreign_audience",
            Self::InvalidRooms => "invalid_rooms",
            Self::InvalidPattern => "invalid_pattern",
            Self::UnknownOperation => "unknown_operation",
            Self::TooManyGrants => "too_many_grants",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
        }
    }
}
