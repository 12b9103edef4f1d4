//! Making tokens and secrets.
//!
//! Owns what `tidegate token` and a first run without a configured key need. Makes only tokens that
//! [`Authenticator::verify`](super::Authenticator::verify) accepts. It is a tool for operators and tests:
//! an application makes its tokens itself, with any JWT library.

use std::{collections::BTreeMap, time::Duration};

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde::Serialize;

use super::{
    AuthFailure, Authenticator, Subject, Token, UnixSeconds,
    grant::{Grant, Operation, Operations},
};

/// Why a token cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MintError {
    /// The secret is shorter than [`Authenticator::MIN_SECRET_BYTES`].
    #[error("a secret has at least {min} bytes", min = Authenticator::MIN_SECRET_BYTES)]
    WeakSecret,
    /// The token would expire at once, or after [`UnixSeconds::MAX`].
    #[error("a token lives for at least a second and ends before the year 10000")]
    Lifetime,
    /// There are more than [`Authenticator::MAX_GRANTS`] patterns.
    #[error("a token holds at most {max} room patterns", max = Authenticator::MAX_GRANTS)]
    TooManyGrants,
    /// The token would be longer than [`Token::MAX_BYTES`].
    #[error("the token would be longer than {max} bytes", max = Token::MAX_BYTES)]
    TooLong,
}

/// A token for `subject` that is good for `ttl` (whole seconds) from `now` on. Grants of the same pattern
/// are taken together.
pub fn mint(
    secret: &[u8],
    subject: &Subject,
    grants: &[Grant],
    ttl: Duration,
    now: UnixSeconds,
) -> Result<Token, MintError> {
    if secret.len() < Authenticator::MIN_SECRET_BYTES {
        return Err(MintError::WeakSecret);
    }
    let expires_at = now.plus(ttl);
    if expires_at <= now || expires_at > UnixSeconds::MAX {
        return Err(MintError::Lifetime);
    }
    let mut rooms = BTreeMap::<String, Operations>::new();
    for grant in grants {
        let operations = rooms.entry(grant.pattern.to_string()).or_default();
        *operations = operations.union(grant.operations);
    }
    if rooms.len() > Authenticator::MAX_GRANTS {
        return Err(MintError::TooManyGrants);
    }
    let claims = MintedClaims {
        sub: subject.as_str(),
        iat: now.0,
        exp: expires_at.0,
        rooms: rooms
            .into_iter()
            .map(|(pattern, operations)| (pattern, operations.iter().map(Operation::as_str).collect()))
            .collect(),
    };
    let token =
        jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &EncodingKey::from_secret(secret))
            .expect("text and numbers become JSON, and a secret fits HS256");
    Token::new(&token).map_err(|failure| {
        debug_assert_eq!(failure, AuthFailure::TooLong, "a JWT has a token's characters");
        MintError::TooLong
    })
}

/// A new secret from the operating system's random source.
pub fn generate_secret() -> Result<[u8; Authenticator::MIN_SECRET_BYTES], getrandom::Error> {
    let mut secret = [0; Authenticator::MIN_SECRET_BYTES];
    getrandom::fill(&mut secret)?;
    Ok(secret)
}

#[derive(Serialize)]
struct MintedClaims<'a> {
    sub: &'a str,
    iat: u64,
    exp: u64,
    rooms: BTreeMap<String, Vec<&'static str>>,
}
