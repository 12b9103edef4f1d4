//! Which broker a node uses, and its address.
//!
//! Selects the broker by scheme, and owns the error type. [`RedisUrl`] parses Redis URLs. Nothing here opens a
//! connection, and neither `Display`, `Debug` nor an error ever shows a password.

use std::{fmt, str::FromStr};

use crate::redis::RedisUrl;

/// A broker's address, as the configuration writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BrokerUrl {
    /// `memory:`: one process, no server.
    Memory,
    /// `redis://`, `rediss://` or `redis+unix://`: one Redis server.
    Redis(RedisUrl),
}

/// Why a text is not a [`BrokerUrl`]. Never repeats what might be part of a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidBrokerUrl {
    /// Not one of the known schemes, or none.
    #[error("expected memory:, redis://, rediss:// or redis+unix://")]
    Scheme,
    /// A known scheme that this version does not support.
    #[error("{scheme}:// is not yet supported in this version; use redis://, rediss:// or redis+unix://")]
    NotYet {
        /// The scheme.
        scheme: &'static str,
    },
    /// `memory:` with something behind it.
    #[error("memory: takes nothing after the colon")]
    MemoryTakesNothing,
    /// The host is missing or invalid.
    #[error("expected a host name, an IPv4 address or an IPv6 address in brackets")]
    Host,
    /// The port is invalid.
    #[error("expected a port from 1 to 65535")]
    Port,
    /// The database number is invalid.
    #[error(
        "expected a database number after the host; if the password contains '/', '?', '#' or '@', percent-encode it"
    )]
    Database,
    /// The path of a socket is missing or relative.
    #[error("expected an absolute socket path, as in redis+unix:///run/redis/redis.sock")]
    SocketPath,
    /// An unknown query parameter.
    #[error("{expected}")]
    Parameter {
        /// Which parameters there are.
        expected: &'static str,
    },
    /// Invalid percent-encoding, or bytes that are not UTF-8.
    #[error("user name, password and path must be UTF-8 with each '%' followed by two hexadecimal digits")]
    Encoding,
}

impl FromStr for BrokerUrl {
    type Err = InvalidBrokerUrl;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (scheme, rest) = text.split_once(':').ok_or(InvalidBrokerUrl::Scheme)?;
        match scheme.to_ascii_lowercase().as_str() {
            "memory" if rest.is_empty() || rest == "//" => Ok(Self::Memory),
            "memory" => Err(InvalidBrokerUrl::MemoryTakesNothing),
            "redis+sentinel" | "rediss+sentinel" => {
                Err(InvalidBrokerUrl::NotYet { scheme: "redis+sentinel" })
            }
            "redis+cluster" | "rediss+cluster" => Err(InvalidBrokerUrl::NotYet { scheme: "redis+cluster" }),
            _ => text.parse().map(Self::Redis),
        }
    }
}

/// The address with any password replaced by `***`.
impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory:"),
            Self::Redis(url) => url.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_selects_the_broker() {
        assert_eq!("memory:".parse(), Ok(BrokerUrl::Memory));
        assert!(matches!("redis://localhost".parse(), Ok(BrokerUrl::Redis(_))));
        assert!(matches!("REDISS://localhost".parse(), Ok(BrokerUrl::Redis(_))));
        assert!(matches!("unix:/run/redis.sock".parse(), Ok(BrokerUrl::Redis(_))));
    }

    #[test]
    fn unsupported_urls_are_refused_with_the_reason() {
        for (text, expected) in [
            ("", InvalidBrokerUrl::Scheme),
            ("localhost", InvalidBrokerUrl::Scheme),
            ("localhost:6379", InvalidBrokerUrl::Scheme),
            ("http://localhost", InvalidBrokerUrl::Scheme),
            ("memory:x", InvalidBrokerUrl::MemoryTakesNothing),
            ("redis+sentinel://a,b/mymaster", InvalidBrokerUrl::NotYet { scheme: "redis+sentinel" }),
            ("redis+cluster://a:7000", InvalidBrokerUrl::NotYet { scheme: "redis+cluster" }),
        ] {
            assert_eq!(text.parse::<BrokerUrl>(), Err(expected), "{text}");
        }
        let error = "redis+cluster://a".parse::<BrokerUrl>().unwrap_err().to_string();
        assert!(error.contains("not yet supported in this version"), "{error}");
    }
}
