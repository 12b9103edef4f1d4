//! Authentication and authorization.
//!
//! Turns a request into an [`Identity`]: finds the token, verifies it, and combines its grants with the
//! configured policies. Does not answer requests, count failures or end sessions; the callers do. Callers
//! also pass the current time: this module never reads a clock.
//!
//! | module | what it holds |
//! |---|---|
//! | [`credential`] | where a request carries a token: header, query or subprotocol list |
//! | [`cookie`] | a token in a cookie, which only pages of allowed origins may use |
//! | [`token`] | [`Authenticator`]: verifies a token and returns an [`Identity`] |
//! | [`key`] | algorithms, and keys pinned to them |
//! | [`keyring`] | the node's keys, which of them to try for a token, and their replacement |
//! | [`jwks`] | parsing of key sets (JWKS) |
//! | [`files`], [`remote`] | keys from files and from a URL, kept up to date |
//! | [`mint`] | creation of tokens and secrets, for `tidegate token` and the first run |
//! | [`grant`] | operations, room patterns, policies and how they match |
//!
//! Everything that no grant allows is forbidden. A [`Token`] never appears in logs or error messages.

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

use crate::vocabulary::metrics::Label;

pub use self::{
    cookie::CookieName,
    credential::Token,
    grant::{Grant, Operation, Operations, Policy, PolicyPattern, RoomPattern},
    key::{Algorithm, Key},
    keyring::Keyring,
    token::{AuthConfig, Authenticator},
};

/// The value of `WWW-Authenticate` (RFC 6750 §3) in every refusal, whatever the reason.
///
/// Only the operator sees the reason. A client that can tell a bad signature from an expired token learns
/// something about the key.
pub const CHALLENGE: &str = "Bearer realm=\"tidegate\"";

/// The subject of a verified token and what it is allowed to do.
///
/// Clones share all data. Sessions whose tokens carry equal grants share those grants as well.
#[derive(Clone)]
pub struct Identity {
    subject: Subject,
    expires_at: UnixSeconds,
    grants: Arc<[Grant]>,
    policies: Arc<[Policy]>,
}

impl Identity {
    /// The subject that the token was issued to.
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// The identity is invalid from this second on: the token's `exp` plus the leeway.
    pub fn expires_at(&self) -> UnixSeconds {
        self.expires_at
    }

    /// How long the identity stays valid; zero once it has expired.
    pub fn remaining(&self, now: UnixSeconds) -> Duration {
        self.expires_at.since(now)
    }

    /// Whether it grants exactly what `other`, an identity of the same subject, grants.
    pub fn grants_as(&self, other: &Self) -> bool {
        let same_policies = Arc::ptr_eq(&self.policies, &other.policies) || self.policies == other.policies;
        same_policies && self.grants == other.grants
    }

    /// Whether the token or a policy grants `operation` in `room`. Does not check expiry.
    // A linear scan: it compares a few dozen short strings at most, and a session calls it once per room and
    // per publication. An index would cost every session more memory than it saves time.
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

/// The subject of a token: 1 to 255 bytes of UTF-8 without control characters. Clones share the text.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Subject(Arc<str>);

/// Why a text is not a [`Subject`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a subject has 1 to {max} bytes and no control characters", max = Subject::MAX_BYTES)]
pub struct InvalidSubject;

impl Subject {
    /// The longest subject, in bytes.
    pub const MAX_BYTES: usize = 255;

    /// Validates `text` and copies it.
    pub fn new(text: &str) -> Result<Self, InvalidSubject> {
        let valid = (1..=Self::MAX_BYTES).contains(&text.len()) && !text.chars().any(char::is_control);
        if valid { Ok(Self(Arc::from(text))) } else { Err(InvalidSubject) }
    }

    /// The subject as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The text as a shared pointer.
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

/// Whole seconds since 1970-01-01T00:00:00Z, without leap seconds: the unit of a token's times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnixSeconds(pub u64);

impl UnixSeconds {
    /// The last second of the year 9999. A later time in a token is probably in another unit, such as
    /// milliseconds.
    pub const MAX: Self = Self(253_402_300_799);

    /// Whole seconds from `earlier` to `self`, or zero.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_secs(self.0.saturating_sub(earlier.0))
    }

    /// `self` plus the whole seconds of `later`.
    #[must_use]
    pub fn plus(self, later: Duration) -> Self {
        Self(self.0.saturating_add(later.as_secs()))
    }
}

/// A clock before 1970 counts as 1970.
impl From<SystemTime> for UnixSeconds {
    fn from(time: SystemTime) -> Self {
        Self(time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
    }
}

/// Why a request has no identity. Only operators see this; clients get [`CHALLENGE`].
///
/// No message contains any part of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum AuthFailure {
    /// The request carries no token.
    #[error(
        "no token: expected a bearer header, a `token` query parameter, a bearer subprotocol, or the configured cookie from an allowed origin"
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
    /// The header names an algorithm that its key is not pinned to, or for which there is no key.
    #[error("the token's algorithm does not match its key, or no key has that algorithm")]
    WrongAlgorithm,
    /// The header has the `typ` of a token that was issued for another purpose (RFC 8725 §3.11).
    #[error("the token's type (`typ`) is neither JWT nor at+jwt")]
    WrongType,
    /// The header has `crit`. The node supports no extension that it could name (RFC 7515 §4.1.11).
    #[error("the token's header requires an extension (`crit`, `b64`); none is supported")]
    CriticalHeader,
    /// `kid` names no key of this node, or is missing although too many keys fit.
    #[error("the token's `kid` names no key of this node, or is missing although too many keys fit")]
    UnknownKey,
    /// The signature does not verify with the key.
    #[error("the token's signature is wrong")]
    BadSignature,
    /// The payload is not one JSON object, or repeats a claim.
    #[error("the token's payload is not a JSON object, or it repeats a claim")]
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
    #[error("claim `iss`: expected the value of auth.issuer")]
    WrongIssuer,
    /// `aud` contains none of `auth.audience`, or is present although that key is unset (RFC 7519 §4.1.3).
    #[error("claim `aud`: expected one of auth.audience, or no `aud` if that key is unset")]
    ForeignAudience,
    /// `rooms` is not a map from room patterns to lists of operations, or it repeats a pattern.
    #[error("claim `rooms`: expected a map from room patterns, each once, to lists of operations")]
    InvalidRooms,
    /// `rooms` has a key that is not a [`RoomPattern`].
    #[error(
        "claim `rooms`: a key is not a room pattern (a room name, or a prefix followed by `*`; no `{{sub}}`)"
    )]
    InvalidPattern,
    /// `rooms` names an operation that does not exist.
    #[error("claim `rooms`: expected operations out of subscribe, publish, presence, history")]
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

impl Label for AuthFailure {
    const ALL: &'static [Self] = &[
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

    fn as_str(self) -> &'static str {
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
