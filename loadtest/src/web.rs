//! URLs of HTTP servers, parsed by the `url` crate, and what of them may be shown.
//!
//! Owns the credentials in a URL: they become an `Authorization` header (RFC 7617) and are never shown. A
//! fragment is refused, because it would never be sent (RFC 6455 §3, RFC 9110 §7.1).

use std::{fmt, net::SocketAddr, net::ToSocketAddrs as _};

use anyhow::{Context as _, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use percent_encoding::percent_decode_str;
use url::{Host, Url};

use crate::target::NUMBER;

/// Replaces [`NUMBER`] while a URL is parsed, because braces would be percent-encoded.
const MARK: &str = "tidegate0room0number0mark";

/// The parts of a URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Web {
    /// In lower case.
    pub scheme: String,
    /// A name or an address, IPv6 without brackets.
    pub host: String,
    pub port: u16,
    /// Host and port for the `Host` header.
    pub authority: String,
    /// The path and the query, with `{room}` kept.
    pub path_and_query: String,
    pub basic: Option<Basic>,
}

/// The value of an `Authorization` header; `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Basic(String);

impl Web {
    /// Parses `text`, if its scheme is one of `schemes`. Errors do not repeat the text, which may hold a
    /// password.
    pub fn parse(text: &str, schemes: &[&str]) -> anyhow::Result<Self> {
        let expected = || format!("expected {}://host:port/path", schemes.join(":// or "));
        let url = Url::parse(&text.replace(NUMBER, MARK)).with_context(expected)?;
        if !schemes.contains(&url.scheme()) {
            bail!(expected());
        }
        ensure!(url.fragment().is_none(), "a URL with a fragment (#…) is refused: it would not be sent");
        let host = match url.host().with_context(expected)? {
            Host::Domain(name) => name.to_owned(),
            Host::Ipv4(address) => address.to_string(),
            Host::Ipv6(address) => address.to_string(),
        };
        ensure!(!host.contains(MARK), "{NUMBER} belongs in the path");
        let shown = url.host_str().unwrap_or_default();
        let authority = url.port().map_or_else(|| shown.to_owned(), |port| format!("{shown}:{port}"));
        let query = url.query().map(|query| format!("?{query}")).unwrap_or_default();
        Ok(Self {
            scheme: url.scheme().to_owned(),
            host,
            port: url.port_or_known_default().with_context(expected)?,
            authority,
            path_and_query: format!("{}{query}", url.path()).replace(MARK, NUMBER),
            basic: Basic::of(&url)?,
        })
    }

    /// The first address of the host.
    pub fn resolve(&self) -> anyhow::Result<SocketAddr> {
        resolve(&self.host, self.port)
    }
}

impl Basic {
    fn of(url: &Url) -> anyhow::Result<Option<Self>> {
        if url.username().is_empty() && url.password().is_none() {
            return Ok(None);
        }
        let [user, password] = [url.username(), url.password().unwrap_or_default()]
            .map(|part| percent_decode_str(part).decode_utf8_lossy().into_owned());
        ensure!(!user.contains(':'), "a user name with a colon cannot be sent (RFC 7617 §2)");
        Ok(Some(Self(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))))
    }
}

/// The `Authorization` line of a request: from the credentials in the URL, else from `token`, else empty.
pub fn authorization(basic: Option<&Basic>, token: Option<&str>) -> String {
    match (basic, token) {
        (Some(Basic(value)), _) => format!("Authorization: {value}\r\n"),
        (None, Some(token)) => format!("Authorization: Bearer {token}\r\n"),
        (None, None) => String::new(),
    }
}

/// The first address of `host`.
pub fn resolve(host: &str, port: u16) -> anyhow::Result<SocketAddr> {
    let mut found = (host, port).to_socket_addrs().with_context(|| format!("cannot resolve {host}"))?;
    found.next().with_context(|| format!("{host} has no address"))
}

/// Replaces everything before an `@` in the URLs of `text` with `***`: for messages that repeat their input,
/// such as those of the command line's parser.
pub fn redacted(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("://") {
        shown.push_str(before);
        shown.push_str("://");
        // A password may hold an @, a quote, or an unencoded slash.
        let (url, more) = after.split_at(after.find(char::is_whitespace).unwrap_or(after.len()));
        match url.rsplit_once('@') {
            Some((_, host)) => {
                shown.push_str("***@");
                shown.push_str(host);
            }
            None => shown.push_str(url),
        }
        rest = more;
    }
    shown.push_str(rest);
    shown
}

impl fmt::Debug for Basic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Basic")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WS: [&str; 2] = ["ws", "wss"];

    #[test]
    fn a_url_is_parsed_and_its_placeholder_kept() {
        let web = Web::parse("WS://Example.COM/rooms/a%3A{room}?x={room}", &WS).unwrap();
        assert_eq!((web.scheme.as_str(), web.host.as_str(), web.port), ("ws", "example.com", 80));
        assert_eq!(web.authority, "example.com");
        assert_eq!(web.path_and_query, "/rooms/a%3A{room}?x={room}");
        assert_eq!(web.basic, None);
        let six = Web::parse("wss://[::1]:8443", &WS).unwrap();
        assert_eq!((six.host.as_str(), six.port, six.authority.as_str()), ("::1", 8443, "[::1]:8443"));
        assert_eq!(six.path_and_query, "/");
        for bad in ["", "http://h/", "h:80", "ws://", "ws://h:99999/", "ws://{room}.h/", "ws://h/x#part"] {
            assert!(Web::parse(bad, &WS).is_err(), "{bad}");
        }
        let error = Web::parse("ws://h/x#part", &WS).unwrap_err().to_string();
        assert!(error.contains("fragment"), "{error}");
    }

    #[test]
    fn the_user_part_becomes_basic_credentials_and_is_not_shown() {
        let web = Web::parse("ws://me:p%40ss%2F@h:1/x", &WS).unwrap();
        assert_eq!(web.authority, "h:1");
        let line = authorization(web.basic.as_ref(), None);
        assert_eq!(line, format!("Authorization: Basic {}\r\n", STANDARD.encode("me:p@ss/")));
        assert_eq!(authorization(None, Some("t")), "Authorization: Bearer t\r\n");
        assert!(
            !format!("{web:?}").contains("p@ss")
                && !format!("{web:?}").contains(&STANDARD.encode("me:p@ss/"))
        );
        for bad in
            ["gopher://me:hunter2@h/", "ws://me:hunter2@/", "ws://me:hunter2@h/#x", "ws://a%3Ab:hunter2@h"]
        {
            let error = format!("{:#} {0:?}", Web::parse(bad, &WS).unwrap_err());
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn credentials_in_messages_are_redacted() {
        for (text, shown) in [
            ("invalid value 'ws://u:p@h/x' for", "invalid value 'ws://***@h/x' for"),
            ("ws://u:a@b/c@h and http://h/", "ws://***@h and http://h/"),
            ("'ws://u:p'a\"b`c@h/x'", "'ws://***@h/x'"),
            ("\"ws://u:'@h\" 'x@y'", "\"ws://***@h\" 'x@y'"),
            ("nothing", "nothing"),
        ] {
            assert_eq!(redacted(text), shown);
        }
    }
}
