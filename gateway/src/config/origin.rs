//! Which web pages may connect.
//!
//! Browsers send the origin of the page with every cross-origin request and every `WebSocket` handshake
//! (`Origin`, RFC 6454 §7). This module defines how allowed origins are written and how the header is
//! compared with them. It does not decide what happens to clients that send no origin.

use std::{fmt, net::Ipv6Addr, str::FromStr};

/// The origins that may connect.
///
/// An empty list allows only pages from the host and port of the gateway itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins(Vec<OriginPattern>);

impl Origins {
    /// Allows these origins and no others.
    pub fn new(patterns: Vec<OriginPattern>) -> Self {
        Self(patterns)
    }

    /// Whether a page of this origin may connect.
    ///
    /// `origin_header` is the value of `Origin`, `host_header` that of `Host` (or the authority of the
    /// request). Scheme, host and port must match, the first two regardless of ASCII case; a missing port
    /// means the scheme's default port. `null`, a list of several origins and malformed values match only
    /// `*`.
    ///
    /// With an empty list, only host and port are compared: a proxy may have terminated TLS, so the scheme is
    /// unknown.
    pub fn allows(&self, origin_header: &str, host_header: &str) -> bool {
        self.has_any() || self.allows_cookies(origin_header, host_header)
    }

    /// Whether to accept a cookie from a page of this origin. Browsers send cookies with every request.
    ///
    /// Like [`Self::allows`], except that `*` allows cookies only for the gateway's own host.
    pub fn allows_cookies(&self, origin_header: &str, host_header: &str) -> bool {
        let Some(origin) = Parts::parse(origin_header) else { return false };
        ((self.0.is_empty() || self.has_any()) && origin.is_at(host_header))
            || self.0.iter().any(|pattern| pattern.0 != Pattern::Any && pattern.matches(&origin))
    }

    /// The same for a page of the gateway's own origin, when only the browser knows the scheme.
    pub fn allows_own_cookies(&self, host_header: &str) -> bool {
        ["https", "http"]
            .iter()
            .any(|scheme| self.allows_cookies(&format!("{scheme}://{host_header}"), host_header))
    }

    fn has_any(&self) -> bool {
        self.0.contains(&OriginPattern(Pattern::Any))
    }
}

/// One entry of the list: `https://app.example`, `https://*.example`, `http://localhost:3000` or `*`.
///
/// `*.` stands for one or more labels: `https://*.example` matches `https://a.example` and
/// `https://a.b.example`, but not `https://example`. Schemes other than `http` and `https` belong to
/// applications that embed a browser (`capacitor://localhost`). `file://`, the only origin without a host,
/// matches all pages that such an application loads from files; applications that send `Origin: null` for
/// them match only `*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OriginPattern(Pattern);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    Any,
    Exactly { scheme: String, host: String, port: Option<u16> },
    Below { scheme: String, domain: String, port: Option<u16> },
}

/// Why a text is not an [`OriginPattern`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected scheme://host or scheme://host:port without a path, or file://, or *")]
pub struct InvalidOriginPattern;

impl OriginPattern {
    fn matches(&self, origin: &Parts<'_>) -> bool {
        match &self.0 {
            Pattern::Any => true,
            Pattern::Exactly { scheme, host, port } => {
                origin.scheme.eq_ignore_ascii_case(scheme)
                    && origin.port == *port
                    && same_host(origin.host, host)
            }
            Pattern::Below { scheme, domain, port } => {
                origin.scheme.eq_ignore_ascii_case(scheme)
                    && origin.port == *port
                    && is_below(origin.host, domain)
            }
        }
    }
}

impl FromStr for OriginPattern {
    type Err = InvalidOriginPattern;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "*" {
            return Ok(Self(Pattern::Any));
        }
        let wildcard = text.replacen("://*.", "://", 1);
        let parts = Parts::parse(&wildcard).ok_or(InvalidOriginPattern)?;
        let (scheme, port) = (parts.scheme.to_ascii_lowercase(), parts.port);
        let name = parts.host.to_ascii_lowercase();
        if wildcard == text {
            Ok(Self(Pattern::Exactly { scheme, host: name, port }))
        } else if name.starts_with('[') || name.is_empty() {
            Err(InvalidOriginPattern)
        } else {
            Ok(Self(Pattern::Below { scheme, domain: name, port }))
        }
    }
}

impl fmt::Display for OriginPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, below, host, port) = match &self.0 {
            Pattern::Any => return f.write_str("*"),
            Pattern::Exactly { scheme, host, port } => (scheme, "", host, port),
            Pattern::Below { scheme, domain, port } => (scheme, "*.", domain, port),
        };
        write!(f, "{scheme}://{below}{host}")?;
        match port {
            Some(port) if Some(*port) != default_port(scheme) => write!(f, ":{port}"),
            _ => Ok(()),
        }
    }
}

/// A parsed serialised origin (RFC 6454 §6.2). Without an explicit port, the port is the scheme's default.
struct Parts<'a> {
    scheme: &'a str,
    host: &'a str,
    port: Option<u16>,
}

impl<'a> Parts<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (scheme, authority) = text.split_once("://")?;
        let valid_scheme = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'));
        if scheme.eq_ignore_ascii_case("file") && authority.is_empty() {
            return Some(Self { scheme, host: "", port: None });
        }
        let (host, port) = split_port(authority)?;
        valid_scheme.then_some(Self { scheme, host, port: port.or_else(|| default_port(scheme)) })
    }

    /// Whether host and port equal those of a `Host` header, assuming the same scheme.
    fn is_at(&self, host_header: &str) -> bool {
        let (host, port) = split_port(host_header).unwrap_or_default();
        !host.is_empty()
            && same_host(self.host, host)
            && self.port == port.or_else(|| default_port(self.scheme))
    }
}

/// Splits `host:port` and validates both. A host is a name of ASCII letters, digits, `-`, `_` and `.`
/// (international names in Punycode), an IPv4 address, or an IPv6 address in brackets.
fn split_port(authority: &str) -> Option<(&str, Option<u16>)> {
    let host_end = match authority.strip_prefix('[') {
        Some(rest) => rest.find(']')? + 2,
        None => authority.find(':').unwrap_or(authority.len()),
    };
    let (host, port) = authority.split_at_checked(host_end)?;
    let valid_host = match ipv6(host) {
        Some(_) => true,
        None => {
            !host.is_empty()
                && host.split('.').all(|label| !label.is_empty())
                && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        }
    };
    if !valid_host {
        return None;
    }
    let Some(port) = port.strip_prefix(':') else { return port.is_empty().then_some((host, None)) };
    let valid_port = port.bytes().all(|b| b.is_ascii_digit());
    valid_port.then(|| port.parse().ok()).flatten().map(|port| (host, Some(port)))
}

/// Compares IPv6 hosts as addresses, because an address has several spellings.
fn same_host(a: &str, b: &str) -> bool {
    match (ipv6(a), ipv6(b)) {
        (Some(a), Some(b)) => a == b,
        _ => a.eq_ignore_ascii_case(b),
    }
}

fn is_below(host: &str, domain: &str) -> bool {
    let Some(split) = host.len().checked_sub(domain.len()) else { return false };
    match host.split_at_checked(split) {
        Some((labels, end)) => labels.len() > 1 && labels.ends_with('.') && end.eq_ignore_ascii_case(domain),
        None => false,
    }
}

fn ipv6(host: &str) -> Option<Ipv6Addr> {
    host.strip_prefix('[')?.strip_suffix(']')?.parse().ok()
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        _ if scheme.eq_ignore_ascii_case("http") => Some(80),
        _ if scheme.eq_ignore_ascii_case("https") => Some(443),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn origins(patterns: &[&str]) -> Origins {
        Origins::new(patterns.iter().map(|pattern| pattern.parse().unwrap()).collect())
    }

    #[track_caller]
    fn check(patterns: &[&str], host: &str, allowed: &[&str], refused: &[&str]) {
        let origins = origins(patterns);
        for origin in allowed {
            assert!(origins.allows(origin, host), "{patterns:?} must allow {origin:?} at {host:?}");
        }
        for origin in refused {
            assert!(!origins.allows(origin, host), "{patterns:?} must refuse {origin:?} at {host:?}");
        }
    }

    const MALFORMED: [&str; 22] = [
        "",
        "null",
        "*",
        "app.example",
        "//app.example",
        "https://",
        "https:///",
        "https://app.example/",
        "https://app.example/path",
        "https://app.example?x",
        "https://app.example#x",
        "https://user@app.example",
        "https://app.example:",
        "https://app.example:+443",
        "https://app.example:65536",
        "https://app.example https://evil.example",
        "https://app.example\n",
        " https://app.example",
        "https://app..example",
        "https://[::1",
        "https://[app.example]",
        "1https://app.example",
    ];

    #[test]
    fn scheme_host_and_port_must_agree() {
        check(
            &["https://app.example", "http://localhost:3000", "capacitor://localhost"],
            "gateway.example",
            &[
                "https://app.example",
                "HTTPS://App.Example",
                "https://app.example:443",
                "http://localhost:3000",
                "capacitor://localhost",
            ],
            &[
                "http://app.example",
                "https://app.example:8443",
                "https://www.app.example",
                "https://app.example.evil.example",
                "https://app.example.",
                "https://evilapp.example",
                "http://localhost",
                "http://localhost:30000",
                "ionic://localhost",
                "https://gateway.example",
            ],
        );
        check(&["https://app.example", "https://*.app.example"], "app.example", &[], &MALFORMED);
    }

    /// Cordova, Android's `WebView` and Electron send it for pages that they load from files.
    #[test]
    fn file_pages_can_be_listed() {
        check(
            &["file://"],
            "gateway.example",
            &["file://", "FILE://"],
            &["null", "file:", "file:///", "file:///index.html", "file://host", "https://", "files://"],
        );
        check(&["https://app.example"], "gateway.example", &[], &["file://"]);
        check(&[], "gateway.example", &[], &["file://"]);
        check(&[], "", &[], &["file://"]);
        assert_eq!("FILE://".parse::<OriginPattern>().unwrap().to_string(), "file://");
        for wrong in ["file:///", "file://*.", "file:", "files://"] {
            assert_eq!(wrong.parse::<OriginPattern>(), Err(InvalidOriginPattern), "{wrong:?}");
        }
    }

    #[test]
    fn a_wildcard_matches_every_subdomain() {
        check(
            &["https://*.example", "http://*.dev.example:8000"],
            "gateway.example",
            &[
                "https://a.example",
                "https://a.b.EXAMPLE",
                "https://x.example:443",
                "http://a.dev.example:8000",
            ],
            &[
                "https://example",
                "https://.example",
                "https://aexample",
                "https://a.example.evil",
                "http://a.example",
                "https://a.example:444",
                "http://a.dev.example",
            ],
        );
    }

    #[test]
    fn without_a_list_only_the_same_host_is_allowed() {
        check(
            &[],
            "gateway.example",
            &["https://gateway.example", "http://gateway.example", "https://GATEWAY.example:443"],
            &["https://gateway.example:80", "https://other.example", "http://gateway.example:8080"],
        );
        check(
            &[],
            "localhost:8080",
            &["http://localhost:8080"],
            &["http://localhost", "http://127.0.0.1:8080", "http://localhost:80800"],
        );
        check(&[], "[::1]:8080", &["http://[::1]:8080", "http://[0:0::1]:8080"], &["http://[::2]:8080"]);
        check(&[], "app.example", &[], &MALFORMED);
        for host in ["", ":80", "app.example:x", "a b", "/"] {
            check(&[], host, &[], &["https://app.example", "http://", "http://:80", ""]);
        }
    }

    #[test]
    fn a_star_allows_every_origin() {
        check(&["*"], "gateway.example", &["https://app.example", "null"], &[]);
        check(&["https://app.example", "*"], "gateway.example", &MALFORMED, &[]);
    }

    /// Each row: the list, the origins whose cookies are accepted at `gateway.example`, and those whose are
    /// not.
    #[test]
    fn cookies_are_accepted_from_listed_origins() {
        let own = "https://gateway.example";
        let (app, evil) = ("https://app.example", "https://evil.example");
        for (list, counts, ignored) in [
            (&[] as &[&str], &[own, "http://gateway.example"] as &[&str], &[app, evil] as &[&str]),
            (&["*"], &[own, "http://gateway.example"], &[app, evil, "https://gateway.example:8443"]),
            (&["*", app], &[own, app], &[evil, "http://app.example"]),
            (&[app], &[app], &[own, evil, "https://app.example.evil.example"]),
            (&["https://*.example"], &[own, app, evil], &["http://app.example", "https://example"]),
        ] {
            let list = origins(list);
            for origin in counts {
                assert!(list.allows_cookies(origin, "gateway.example"), "{list:?} {origin:?}");
                assert!(list.allows(origin, "gateway.example"), "{list:?} {origin:?}");
            }
            for origin in ignored.iter().chain(&MALFORMED) {
                assert!(!list.allows_cookies(origin, "gateway.example"), "{list:?} {origin:?}");
            }
        }
    }

    #[test]
    fn own_cookies_are_accepted_where_the_own_host_is_allowed() {
        for (list, hosts, others) in [
            (
                &[] as &[&str],
                &["gateway.example", "[::1]:8080"] as &[&str],
                &["", "a b", "a:b", "a/b"] as &[&str],
            ),
            (&["*"], &["gateway.example:8080"], &[""]),
            (
                &["https://app.example"],
                &["app.example", "App.Example:443"],
                &["gateway.example", "app.example:80"],
            ),
            (&["http://localhost:8080"], &["localhost:8080"], &["localhost", "127.0.0.1:8080"]),
        ] {
            let list = origins(list);
            assert!(hosts.iter().all(|host| list.allows_own_cookies(host)), "{list:?} {hosts:?}");
            assert!(!others.iter().any(|host| list.allows_own_cookies(host)), "{list:?} {others:?}");
        }
    }

    #[test]
    fn invalid_origins_are_refused() {
        for wrong in MALFORMED.into_iter().filter(|text| *text != "*") {
            assert_eq!(wrong.parse::<OriginPattern>(), Err(InvalidOriginPattern), "{wrong:?}");
        }
        for wrong in [
            "https://*",
            "https://*.",
            "https://**.a",
            "https://a.*",
            "*://a",
            "https://*.[::1]",
            "https://é.example",
        ] {
            assert_eq!(wrong.parse::<OriginPattern>(), Err(InvalidOriginPattern), "{wrong:?}");
        }
    }

    #[test]
    fn a_pattern_is_displayed_without_its_default_port() {
        for (text, written) in [
            ("HTTPS://App.Example:443", "https://app.example"),
            ("http://*.Example:8000", "http://*.example:8000"),
            ("http://[::1]:3000", "http://[::1]:3000"),
            ("*", "*"),
        ] {
            assert_eq!(text.parse::<OriginPattern>().unwrap().to_string(), written);
        }
    }

    proptest! {
        #[test]
        fn a_pattern_without_a_wildcard_allows_exactly_that_origin(
            scheme in "(https?|[a-z][a-z0-9+.-]{0,5})", host in "[a-zA-Z0-9_-]{1,8}(\\.[a-z0-9]{1,5}){0,2}",
            port in proptest::option::of(any::<u16>()), other in "[a-z]{1,8}\\.example",
        ) {
            let port = port.map(|port| format!(":{port}")).unwrap_or_default();
            let origin = format!("{scheme}://{host}{port}");
            prop_assert!(origins(&[&origin]).allows(&origin, &other));
            let same_host = format!("{host}{port}");
            prop_assert!(Origins::default().allows(&origin, &same_host));
            let below = format!("{scheme}://*.{host}{port}");
            prop_assert!(!origins(&[&below]).allows(&origin, &other));
            let origin = format!("{scheme}://{other}.{host}{port}");
            prop_assert!(origins(&[&below]).allows(&origin, &other));
        }

        #[test]
        fn junk_never_panics(origin in any::<String>(), host in any::<String>(), pattern in "[a*:/.\\[\\]0-9é]{0,12}") {
            let _: Result<_, _> = pattern.parse::<OriginPattern>();
            for list in [origins(&[]), origins(&["https://*.example", "http://[::1]"])] {
                list.allows(&origin, &host);
                list.allows(&pattern, &pattern);
            }
        }
    }
}
