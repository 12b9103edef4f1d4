//! The tokens of the clients.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::json;

use crate::target::NUMBER;

/// The lifetime of a token signed here: longer than any run.
const VALIDITY: Duration = Duration::from_secs(24 * 3600);

/// A client's token, or how to sign one. `Debug` does not show secrets.
#[derive(Clone)]
pub enum Credentials {
    None,
    /// One token for all clients.
    Token(String),
    /// A token for each client, with its own `sub`, valid for these rooms.
    Mint {
        key: Box<EncodingKey>,
        rooms: String,
    },
}

impl Credentials {
    /// From the flags. `channel` names the rooms that a signed token grants.
    pub fn new(token: Option<&str>, secret: Option<&str>, channel: &str) -> Self {
        match (token, secret) {
            (Some(token), _) => Self::Token(token.to_owned()),
            (None, Some(secret)) => Self::Mint {
                key: Box::new(EncodingKey::from_secret(secret.as_bytes())),
                // A room pattern may end in an asterisk and must not have one elsewhere.
                rooms: channel
                    .split_once(NUMBER)
                    .map_or(channel.to_owned(), |(front, _)| format!("{front}*")),
            },
            (None, None) => Self::None,
        }
    }

    /// The token of client `number`.
    pub fn of(&self, number: u32) -> anyhow::Result<Option<String>> {
        let (key, rooms) = match self {
            Self::None => return Ok(None),
            Self::Token(token) => return Ok(Some(token.clone())),
            Self::Mint { key, rooms } => (key, rooms),
        };
        let until = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() + VALIDITY;
        let claims = json!({
            "sub": format!("load-{number}"),
            "exp": until.as_secs(),
            "rooms": { rooms.as_str(): ["subscribe", "publish"] },
        });
        encode(&Header::new(Algorithm::HS256), &claims, key).map(Some).context("cannot sign a token")
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Token(_) => "Token",
            Self::Mint { .. } => "Mint",
        })
    }
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{DecodingKey, Validation, decode};
    use serde_json::Value;

    use super::*;

    #[test]
    fn each_client_has_a_token_of_its_own() {
        let credentials = Credentials::new(None, Some("secret"), "load:{room}");
        let token = credentials.of(7).unwrap().unwrap();
        let key = DecodingKey::from_secret(b"secret");
        let claims = decode::<Value>(&token, &key, &Validation::new(Algorithm::HS256)).unwrap().claims;
        assert_eq!(claims["sub"], "load-7");
        assert_eq!(claims["rooms"]["load:*"], json!(["subscribe", "publish"]));
        assert_ne!(credentials.of(8).unwrap().unwrap(), token);
        assert!(!format!("{credentials:?}").contains("secret"));
    }

    #[test]
    fn a_given_token_is_shared_by_all_clients() {
        let credentials = Credentials::new(Some("t"), None, "x");
        assert_eq!(
            (credentials.of(0).unwrap(), credentials.of(1).unwrap()),
            (Some("t".into()), Some("t".into()))
        );
        assert_eq!(Credentials::new(None, None, "x").of(0).unwrap(), None);
    }
}
