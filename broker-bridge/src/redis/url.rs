//! Redis URLs: the server's address, the credentials and the database.
//!
//! Owns the syntax and the redaction. [`connection`](super::connection) does the connecting.

use std::{
    fmt,
    net::Ipv6Addr,
    path::{Path, PathBuf},
    str::FromStr,
};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::url::InvalidBrokerUrl;

/// The address of one Redis server:
///
/// - `redis://[user[:password]@]host[:port][/db]`
/// - `rediss://…`, the same over TLS
/// - `redis+unix:///path?db=0&user=…&pass=…` (or `unix:/path`)
///
/// User, password and path are percent-decoded; an IPv6 host stands in brackets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisUrl {
    /// Where the server listens.
    pub endpoint: Endpoint,
    /// The ACL user; `None` is Redis' `default` user.
    pub user: Option<String>,
    /// The password, if any.
    pub password: Option<Secret>,
    /// The database number. Pub/sub ignores databases; this is for keys.
    pub database: u32,
}

/// Where a Redis server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Plain TCP.
    Tcp {
        /// A name or an address, IPv6 without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// TLS over TCP; the certificate must be valid for `host`.
    Tls {
        /// A name or an address, IPv6 without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A unix domain socket.
    Unix(PathBuf),
}

/// A secret text: `Debug` prints `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that sends it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl FromStr for RedisUrl {
    type Err = InvalidBrokerUrl;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (scheme, rest) = text.split_once(':').ok_or(InvalidBrokerUrl::Scheme)?;
        match scheme.to_ascii_lowercase().as_str() {
            "redis" => parse_tcp(rest, |host, port| Endpoint::Tcp { host, port }),
            "rediss" => parse_tcp(rest, |host, port| Endpoint::Tls { host, port }),
            "redis+unix" | "unix" => parse_unix(rest),
            _ => Err(InvalidBrokerUrl::Scheme),
        }
    }
}

/// The address with any password replaced by `***`.
impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, host, port) = match &self.endpoint {
            Endpoint::Tcp { host, port } => ("redis", host, port),
            Endpoint::Tls { host, port } => ("rediss", host, port),
            Endpoint::Unix(path) => return self.fmt_unix(path, f),
        };
        write!(f, "{scheme}://")?;
        if let Some(user) = &self.user {
            write!(f, "{}", encode(user))?;
        }
        if self.password.is_some() {
            f.write_str(":***")?;
        }
        if self.user.is_some() || self.password.is_some() {
            f.write_str("@")?;
        }
        let (open, close) = if host.contains(':') { ("[", "]") } else { ("", "") };
        write!(f, "{open}{host}{close}:{port}")?;
        if self.database == 0 { Ok(()) } else { write!(f, "/{}", self.database) }
    }
}

impl RedisUrl {
    fn fmt_unix(&self, path: &Path, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "redis+unix://{}", utf8_percent_encode(&path.to_string_lossy(), PATH))?;
        let mut separator = '?';
        let mut parameter = |f: &mut fmt::Formatter<'_>, name: &str, value: &dyn fmt::Display| {
            let result = write!(f, "{separator}{name}={value}");
            separator = '&';
            result
        };
        if self.database != 0 {
            parameter(f, "db", &self.database)?;
        }
        if let Some(user) = &self.user {
            parameter(f, "user", &encode(user))?;
        }
        if self.password.is_some() {
            parameter(f, "pass", &"***")?;
        }
        Ok(())
    }
}

/// The characters that need no escape in a user name: RFC 3986 §2.3, unreserved.
const USER: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// The same, and those that need no escape in a path.
const PATH: &AsciiSet = &USER.remove(b'/').remove(b'@').remove(b':').remove(b'+').remove(b',');

const DEFAULT_PORT: u16 = 6379;

fn encode(text: &str) -> percent_encoding::PercentEncode<'_> {
    utf8_percent_encode(text, USER)
}

fn parse_tcp(
    rest: &str,
    endpoint: impl FnOnce(String, u16) -> Endpoint,
) -> Result<RedisUrl, InvalidBrokerUrl> {
    let rest = rest.strip_prefix("//").ok_or(InvalidBrokerUrl::Scheme)?;
    if rest.contains(['?', '#']) {
        return Err(InvalidBrokerUrl::Parameter {
            expected: "redis:// and rediss:// take no '?' or '#'; percent-encode these in a password",
        });
    }
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    // Accept a raw '@' in a password, which is common: the last one ends the password, since a host has none.
    let (credentials, address) = match authority.rsplit_once('@') {
        Some((credentials, address)) => (Some(credentials), address),
        None => (None, authority),
    };
    let (user, password) = match credentials {
        None => (None, None),
        Some(credentials) => match credentials.split_once(':') {
            None => (Some(decode(credentials)?), None),
            Some((user, password)) => (Some(decode(user)?), Some(decode(password)?)),
        },
    };
    // Checked before the address: an invalid database is often the second half of a password that contains '/', and
    // this error explains that better than one about the host.
    let database = parse_database(path)?;
    let (host, port) = parse_address(address)?;
    Ok(RedisUrl {
        endpoint: endpoint(host, port),
        user: user.filter(|user| !user.is_empty()),
        password: password.filter(|password| !password.is_empty()).map(Secret),
        database,
    })
}

fn parse_address(address: &str) -> Result<(String, u16), InvalidBrokerUrl> {
    let (host, port) = if let Some(rest) = address.strip_prefix('[') {
        let (host, after) = rest.split_once(']').ok_or(InvalidBrokerUrl::Host)?;
        let host: Ipv6Addr = host.parse().map_err(|_| InvalidBrokerUrl::Host)?;
        let port = match after {
            "" => None,
            after => Some(after.strip_prefix(':').ok_or(InvalidBrokerUrl::Port)?),
        };
        (host.to_string(), port)
    } else {
        let (host, port) = address.split_once(':').map_or((address, None), |(host, port)| (host, Some(port)));
        let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        if host.is_empty() || !host.chars().all(valid) {
            return Err(InvalidBrokerUrl::Host);
        }
        (host.to_owned(), port)
    };
    let port = match port {
        None => DEFAULT_PORT,
        Some(port) => parse_digits(port).filter(|port| *port != 0).ok_or(InvalidBrokerUrl::Port)?,
    };
    Ok((host, port))
}

fn parse_unix(rest: &str) -> Result<RedisUrl, InvalidBrokerUrl> {
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = decode(path.strip_prefix("//").unwrap_or(path))?;
    if !path.starts_with('/') || path.contains('\0') {
        return Err(InvalidBrokerUrl::SocketPath);
    }
    let mut url = RedisUrl { endpoint: Endpoint::Unix(path.into()), user: None, password: None, database: 0 };
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        match parameter.split_once('=') {
            Some(("db", value)) => url.database = parse_database(value)?,
            Some(("user", value)) => url.user = Some(decode(value)?).filter(|user| !user.is_empty()),
            Some(("pass", value)) => {
                url.password = Some(decode(value)?).filter(|pass| !pass.is_empty()).map(Secret);
            }
            _ => {
                return Err(InvalidBrokerUrl::Parameter {
                    expected: "redis+unix:// takes the parameters db, user and pass",
                });
            }
        }
    }
    Ok(url)
}

fn parse_database(text: &str) -> Result<u32, InvalidBrokerUrl> {
    if text.is_empty() { Ok(0) } else { parse_digits(text).ok_or(InvalidBrokerUrl::Database) }
}

/// A number in plain digits: `str::parse` alone would also accept a sign.
fn parse_digits<T: FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

fn decode(text: &str) -> Result<String, InvalidBrokerUrl> {
    // The decoder accepts a stray '%'; here it is more likely a password that was not encoded.
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let escape = || -> Option<()> {
            (bytes.next()?.is_ascii_hexdigit() && bytes.next()?.is_ascii_hexdigit()).then_some(())
        };
        if byte == b'%' && { escape }().is_none() {
            return Err(InvalidBrokerUrl::Encoding);
        }
    }
    let text = percent_decode_str(text).decode_utf8().map_err(|_| InvalidBrokerUrl::Encoding)?;
    Ok(text.into_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tcp(host: &str, port: u16) -> RedisUrl {
        RedisUrl {
            endpoint: Endpoint::Tcp { host: host.to_owned(), port },
            user: None,
            password: None,
            database: 0,
        }
    }

    fn tls(host: &str, port: u16) -> RedisUrl {
        RedisUrl { endpoint: Endpoint::Tls { host: host.to_owned(), port }, ..tcp(host, port) }
    }

    fn unix(path: &str) -> RedisUrl {
        RedisUrl { endpoint: Endpoint::Unix(path.into()), ..tcp("", 0) }
    }

    fn with(url: RedisUrl, user: Option<&str>, password: Option<&str>, database: u32) -> RedisUrl {
        RedisUrl { user: user.map(str::to_owned), password: password.map(Secret::new), database, ..url }
    }

    #[test]
    fn every_form_of_url_is_parsed() {
        for (text, expected, shown) in [
            ("redis://localhost", tcp("localhost", 6379), "redis://localhost:6379"),
            ("redis://10.0.0.1:6380/", tcp("10.0.0.1", 6380), "redis://10.0.0.1:6380"),
            ("REDIS://[::1]:7/3", with(tcp("::1", 7), None, None, 3), "redis://[::1]:7/3"),
            ("rediss://[::1]", tls("::1", 6379), "rediss://[::1]:6379"),
            ("redis://alice@h", with(tcp("h", 6379), Some("alice"), None, 0), "redis://alice@h:6379"),
            ("redis://:pw@h", with(tcp("h", 6379), None, Some("pw"), 0), "redis://:***@h:6379"),
            (
                "rediss://a%20b:p%40ss%2Fw%C3%A9rd@h:1/2",
                with(tls("h", 1), Some("a b"), Some("p@ss/wérd"), 2),
                "rediss://a%20b:***@h:1/2",
            ),
            ("redis://u:a@b:c@h", with(tcp("h", 6379), Some("u"), Some("a@b:c"), 0), "redis://u:***@h:6379"),
            ("redis+unix:///run/r.sock", unix("/run/r.sock"), "redis+unix:///run/r.sock"),
            ("unix:/run/r.sock", unix("/run/r.sock"), "redis+unix:///run/r.sock"),
            (
                "unix:///a%20b?db=4&user=u&pass=p%26q",
                with(unix("/a b"), Some("u"), Some("p&q"), 4),
                "redis+unix:///a%20b?db=4&user=u&pass=***",
            ),
        ] {
            let url = text.parse::<RedisUrl>();
            assert_eq!(url.as_ref(), Ok(&expected), "{text}");
            assert_eq!(url.unwrap().to_string(), shown, "{text}");
        }
    }

    #[test]
    fn invalid_urls_are_refused_with_the_expected_form() {
        use InvalidBrokerUrl as E;
        for (text, expected) in [
            ("redis:localhost", E::Scheme),
            ("http://localhost", E::Scheme),
            ("redis://", E::Host),
            ("redis:///1", E::Host),
            ("redis://a b", E::Host),
            ("redis://[::1", E::Host),
            ("redis://[10.0.0.1]", E::Host),
            ("redis://::1", E::Host),
            ("redis://h:0", E::Port),
            ("redis://h:65536", E::Port),
            ("redis://h:+1", E::Port),
            ("redis://h:", E::Port),
            ("redis://[::1]6379", E::Port),
            ("redis://h/x", E::Database),
            ("redis://h/-1", E::Database),
            ("redis://h/4294967296", E::Database),
            ("redis://:secret/more@h", E::Database),
            ("redis://:100%@h", E::Encoding),
            ("redis://:%ff@h", E::Encoding),
            ("unix:relative", E::SocketPath),
            ("redis+unix://", E::SocketPath),
            ("unix:/a%00b", E::SocketPath),
        ] {
            assert_eq!(text.parse::<RedisUrl>(), Err(expected), "{text}");
        }
        assert!(matches!("redis://h?protocol=3".parse::<RedisUrl>(), Err(E::Parameter { .. })));
        assert!(matches!("unix:/a?passwort=x".parse::<RedisUrl>(), Err(E::Parameter { .. })));
    }

    proptest! {
        #[test]
        fn no_password_is_ever_shown(user in "[a-z]{0,5}", password in "\\PC{6,20}", tail in "[/?#@a-z]{0,6}") {
            let encoded = utf8_percent_encode(&password, USER).to_string();
            for text in [
                format!("redis://{user}:{encoded}@host{tail}"),
                format!("redis://{user}:{password}@host{tail}"),
                format!("unix:/socket{tail}?user={user}&pass={encoded}"),
            ] {
                let (shown, debugged) = match text.parse::<RedisUrl>() {
                    Ok(url) => (url.to_string(), format!("{url:?}")),
                    Err(error) => (error.to_string(), format!("{error:?}")),
                };
                // Short passwords may be part of the fixed words around them; six characters are not.
                for shown in [shown, debugged] {
                    prop_assert!(!shown.contains(&password) && !shown.contains(&encoded), "{} in {}", password, shown);
                }
            }
        }

        #[test]
        fn any_password_round_trips_through_percent_encoding(password in "\\PC{1,20}") {
            let text = format!("redis://u:{}@host", utf8_percent_encode(&password, USER));
            let url: RedisUrl = text.parse().unwrap();
            prop_assert_eq!(url.password.as_ref().map(Secret::reveal), Some(password.as_str()));
        }

        #[test]
        fn parsing_a_url_never_panics(text in "\\PC*") {
            let _ = text.parse::<RedisUrl>();
            let _ = format!("redis://{text}").parse::<RedisUrl>();
        }

        #[test]
        fn a_url_displayed_without_password_parses_again(
            user in proptest::option::of("\\PC{1,8}"), host in "[a-z0-9.-]{1,12}", port in 1u16.., database: u32
        ) {
            let url = RedisUrl { endpoint: Endpoint::Tls { host, port }, user, password: None, database };
            prop_assert_eq!(url.to_string().parse(), Ok(url));
        }
    }
}
