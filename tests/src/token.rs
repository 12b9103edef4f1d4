//! Tokens, valid and invalid.
//!
//! Signs whatever claims it is given, including those that no honest issuer would sign. Does not know which of
//! them a node accepts.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Map, Value, json};

/// The secret that nodes of the scenarios are configured with.
pub const SECRET: &str = "a secret of the scenarios, never to be seen in a log";

/// Claims to be made into a token.
#[derive(Clone, Debug, Default)]
pub struct Token {
    claims: Map<String, Value>,
    rooms: Map<String, Value>,
}

impl Token {
    /// A token for `subject` that grants nothing and is valid for an hour.
    pub fn new(subject: &str) -> Self {
        let token = Self::default().claim("sub", json!(subject));
        token.expires_in(3600)
    }

    /// Grants `operations` in the rooms of `pattern`.
    #[must_use]
    pub fn room(mut self, pattern: &str, operations: &[&str]) -> Self {
        self.rooms.insert(pattern.to_owned(), json!(operations));
        self
    }

    /// Expires this many seconds from now; a negative number means in the past.
    #[must_use]
    pub fn expires_in(self, seconds: i64) -> Self {
        self.claim("exp", json!(now() + seconds))
    }

    /// Becomes valid this many seconds from now.
    #[must_use]
    pub fn begins_in(self, seconds: i64) -> Self {
        self.claim("nbf", json!(now() + seconds))
    }

    /// Sets this claim, whatever it is.
    #[must_use]
    pub fn claim(mut self, name: &str, value: Value) -> Self {
        self.claims.insert(name.to_owned(), value);
        self
    }

    /// Removes this claim.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.claims.remove(name);
        self
    }

    /// Signs with the secret of the scenarios.
    pub fn sign(self) -> String {
        self.sign_with(Algorithm::HS256, SECRET)
    }

    /// Signs with another secret or another HMAC.
    pub fn sign_with(self, algorithm: Algorithm, secret: &str) -> String {
        let key = EncodingKey::from_secret(secret.as_bytes());
        jsonwebtoken::encode(&Header::new(algorithm), &self.into_claims(), &key)
            .expect("claims of plain JSON can be encoded, and an HMAC key can have any length")
    }

    /// Does not sign at all: `alg` is `none` (RFC 7519 §6).
    pub fn unsigned(self) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        format!("{}.{}.", part(&json!({ "alg": "none", "typ": "JWT" })), part(&self.into_claims()))
    }

    /// The claims as JSON.
    pub(crate) fn into_claims(mut self) -> Value {
        if !self.rooms.is_empty() {
            self.claims.insert("rooms".to_owned(), Value::Object(self.rooms));
        }
        Value::Object(self.claims)
    }
}

/// A token with grants to publish and subscribe everywhere.
pub fn anywhere(subject: &str) -> String {
    Token::new(subject).room("*", &["subscribe", "publish"]).sign()
}

fn now() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since_epoch.as_secs()).expect("the clock shows a year before 292 billion")
}
