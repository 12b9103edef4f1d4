//! Creation of tokens and secrets.
//!
//! Serves `tidegate token` and a first run without a configured key. Creates only tokens that
//! [`Authenticator::verify`](super::Authenticator::verify) accepts with the same key. This is for operators
//! and tests; applications create their tokens themselves, with any JWT library.

use std::{collections::BTreeMap, time::Duration};

use jsonwebtoken::{EncodingKey, Header};
use serde::Serialize;

use super::{
    AuthFailure, Authenticator, Subject, Token, UnixSeconds,
    grant::{Grant, Operation, Operations},
    key::{Algorithm, Family, Key, KeyError, holds_pem},
};

/// Why a token cannot be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MintError {
    /// The secret cannot be used.
    #[error(transparent)]
    Secret(#[from] KeyError),
    /// Not a private key, or one for another algorithm.
    #[error(
        "expected a private key for {0} in PEM: BEGIN PRIVATE KEY (convert other formats with `openssl pkcs8 -topk8 -nocrypt`)"
    )]
    PrivateKey(&'static str),
    /// The token would expire at once, or after [`UnixSeconds::MAX`].
    #[error("expected a lifetime of at least one second that ends before the year 10000")]
    Lifetime,
    /// There are more than [`Authenticator::MAX_GRANTS`] patterns.
    #[error("expected at most {max} room patterns in a token", max = Authenticator::MAX_GRANTS)]
    TooManyGrants,
    /// The token would be longer than [`Token::MAX_BYTES`].
    #[error("the token would be longer than {max} bytes", max = Token::MAX_BYTES)]
    TooLong,
}

/// The contents of a token to create.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The subject.
    pub subject: &'a Subject,
    /// The grants. Grants with the same pattern are merged.
    pub grants: &'a [Grant],
    /// The issuer (`iss`).
    pub issuer: Option<&'a str>,
    /// The audience (`aud`); none if empty.
    pub audience: &'a [String],
    /// The lifetime. Fractions of a second are dropped.
    pub ttl: Duration,
}

/// Signs tokens.
pub struct Signer {
    key: EncodingKey,
    header: Header,
}

impl Signer {
    /// Signs with a secret, or with a private key in PEM (PKCS #8; for RSA also PKCS #1). `id` becomes the
    /// header's `kid`.
    pub fn new(algorithm: Algorithm, key: &[u8], id: Option<&str>) -> Result<Self, MintError> {
        let private = || MintError::PrivateKey(algorithm.as_str());
        let key = match algorithm.family() {
            Family::Shared => {
                Key::shared(id, algorithm, key)?;
                EncodingKey::from_secret(key)
            }
            _ if !holds_pem(key) => return Err(private()),
            Family::Rsa => EncodingKey::from_rsa_pem(key).map_err(|_| private())?,
            Family::Ec => EncodingKey::from_ec_pem(key).map_err(|_| private())?,
            Family::Ed => EncodingKey::from_ed_pem(key).map_err(|_| private())?,
        };
        let header = Header { kid: id.map(str::to_owned), ..Header::new(algorithm.into()) };
        let signer = Self { key, header };
        // Sign once: the library does not check the key before that.
        jsonwebtoken::encode(&signer.header, &(), &signer.key).map_err(|_| private())?;
        Ok(signer)
    }

    /// Creates a token that is valid from `now` on.
    pub fn sign(&self, wanted: &Wanted<'_>, now: UnixSeconds) -> Result<Token, MintError> {
        let expires_at = now.plus(wanted.ttl);
        if expires_at <= now || expires_at > UnixSeconds::MAX {
            return Err(MintError::Lifetime);
        }
        let mut rooms = BTreeMap::<String, Operations>::new();
        for grant in wanted.grants {
            let operations = rooms.entry(grant.pattern.to_string()).or_default();
            *operations = operations.union(grant.operations);
        }
        if rooms.len() > Authenticator::MAX_GRANTS {
            return Err(MintError::TooManyGrants);
        }
        let claims = MintedClaims {
            iss: wanted.issuer,
            aud: wanted.audience,
            sub: wanted.subject.as_str(),
            iat: now.0,
            exp: expires_at.0,
            rooms: rooms
                .into_iter()
                .map(|(pattern, operations)| (pattern, operations.iter().map(Operation::as_str).collect()))
                .collect(),
        };
        let token = jsonwebtoken::encode(&self.header, &claims, &self.key)
            .expect("text and numbers are valid JSON, and `new` has signed with this key");
        Token::new(&token).map_err(|failure| {
            debug_assert_eq!(failure, AuthFailure::TooLong, "a JWT has only the characters of a token");
            MintError::TooLong
        })
    }
}

impl From<Algorithm> for jsonwebtoken::Algorithm {
    fn from(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Hs256 => Self::HS256,
            Algorithm::Hs384 => Self::HS384,
            Algorithm::Hs512 => Self::HS512,
            Algorithm::Rs256 => Self::RS256,
            Algorithm::Rs384 => Self::RS384,
            Algorithm::Rs512 => Self::RS512,
            Algorithm::Ps256 => Self::PS256,
            Algorithm::Ps384 => Self::PS384,
            Algorithm::Ps512 => Self::PS512,
            Algorithm::Es256 => Self::ES256,
            Algorithm::Es384 => Self::ES384,
            Algorithm::EdDsa => Self::EdDSA,
        }
    }
}

/// Creates a token for `subject`, signed with a secret (HS256) and valid for `ttl` from `now` on.
pub fn mint(
    secret: &[u8],
    subject: &Subject,
    grants: &[Grant],
    ttl: Duration,
    now: UnixSeconds,
) -> Result<Token, MintError> {
    let wanted = Wanted { subject, grants, issuer: None, audience: &[], ttl };
    Signer::new(Algorithm::Hs256, secret, None)?.sign(&wanted, now)
}

/// Generates a secret from the operating system's random source.
pub fn generate_secret() -> Result<[u8; Authenticator::MIN_SECRET_BYTES], getrandom::Error> {
    let mut secret = [0; Authenticator::MIN_SECRET_BYTES];
    getrandom::fill(&mut secret)?;
    Ok(secret)
}

#[derive(Serialize)]
struct MintedClaims<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    iss: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    aud: &'a [String],
    sub: &'a str,
    iat: u64,
    exp: u64,
    rooms: BTreeMap<String, Vec<&'static str>>,
}
