//! The client's address as trusted proxies report it: `X-Forwarded-For`, or `Forwarded` (RFC 7239).
//!
//! Each proxy appends the address that connected to it. The list is read from its end for as long as each
//! entry was written by a trusted proxy. The first untrusted address is the client; anything before it may be
//! made up by the client.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use http::{HeaderMap, HeaderName, header};

use crate::config::{ForwardedHeader, Networks};

/// The most proxies in a row. Longer chains are attacks, not deployments.
const MAX_HOPS: usize = 32;
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The client's address, and its port if given. `None` if the header is missing or a relevant entry is
/// malformed.
pub fn client(
    headers: &HeaderMap,
    header: ForwardedHeader,
    trusted: &Networks,
) -> Option<(IpAddr, Option<u16>)> {
    let (name, split, read): (_, Split, Read) = match header {
        ForwardedHeader::XForwardedFor => (X_FORWARDED_FOR, |line| line.split(',').collect(), listed),
        ForwardedHeader::Forwarded => (header::FORWARDED, |line| split(line, ','), forwarded),
    };
    let mut last = None;
    let lines = headers.get_all(name).iter().rev();
    let entries = lines.flat_map(|line| {
        let entries = line.to_str().map(split).unwrap_or_default();
        // A line that is not text counts as one malformed entry.
        if entries.is_empty() { vec![""] } else { entries }.into_iter().rev()
    });
    for (hops, entry) in entries.enumerate() {
        let hop = read(entry.trim()).filter(|_| hops < MAX_HOPS)?;
        last = Some(hop);
        if !trusted.contains(hop.0) {
            break;
        }
    }
    last
}

type Hop = (IpAddr, Option<u16>);
/// Splits a line into entries.
type Split = fn(&str) -> Vec<&str>;
/// Parses an entry.
type Read = fn(&str) -> Option<Hop>;

/// Parses an entry of `X-Forwarded-For`: an address, to which some proxies add a port.
fn listed(entry: &str) -> Option<Hop> {
    entry.parse().map(|address| (address, None)).ok().or_else(|| node(entry))
}

/// Parses an element of `Forwarded`: parameters, of which only `for` is used.
fn forwarded(element: &str) -> Option<Hop> {
    let mut nodes = split(element, ';').into_iter().filter_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        name.trim().eq_ignore_ascii_case("for").then_some(value.trim())
    });
    let (value, None) = (nodes.next()?, nodes.next()) else { return None };
    node(value.strip_prefix('"').map_or(Some(value), |rest| rest.strip_suffix('"'))?)
}

/// Parses a node (RFC 7239 §6) that is an address, with IPv6 in brackets. `unknown` and obfuscated names
/// return `None`.
fn node(text: &str) -> Option<Hop> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Some((address.ip(), Some(address.port())));
    }
    let bracketed = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let address = match bracketed {
        Some(inner) => inner.parse::<Ipv6Addr>().ok()?.into(),
        None => text.parse::<IpAddr>().ok().filter(IpAddr::is_ipv4)?,
    };
    Some((address, None))
}

/// Splits a list at separators that are not quoted.
fn split(list: &str, separator: char) -> Vec<&str> {
    let (mut quoted, mut escaped) = (false, false);
    let parts = list.split(|c| {
        let ends = c == separator && !quoted;
        if escaped {
            escaped = false;
        } else if c == '"' {
            quoted = !quoted;
        } else {
            escaped = quoted && c == '\\';
        }
        ends
    });
    parts.collect()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    const X: ForwardedHeader = ForwardedHeader::XForwardedFor;
    const F: ForwardedHeader = ForwardedHeader::Forwarded;

    fn ask(header: ForwardedHeader, lines: &[&str]) -> Option<String> {
        let name = if header == X { X_FORWARDED_FOR } else { header::FORWARDED };
        let trusted = Networks::parse(["10.0.0.0/8", "fd00::/8"]).unwrap();
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(&name, HeaderValue::from_str(line).unwrap());
        }
        let (address, port) = client(&headers, header, &trusted)?;
        Some(port.map_or_else(|| address.to_string(), |port| format!("{address} {port}")))
    }

    #[test]
    fn the_last_untrusted_address_is_the_client() {
        for (lines, client) in [
            (&["192.0.2.1"][..], Some("192.0.2.1")),
            (&["192.0.2.1, 10.0.0.1"], Some("192.0.2.1")),
            (&["203.0.113.9, 192.0.2.1, 10.0.0.1,10.0.0.2"], Some("192.0.2.1")),
            (&["203.0.113.9", "192.0.2.1", "10.0.0.1"], Some("192.0.2.1")),
            (&["nonsense, 192.0.2.1"], Some("192.0.2.1")),
            (&["2001:db8::1"], Some("2001:db8::1")),
            (&["[2001:db8::1]:443, fd00::1"], Some("2001:db8::1 443")),
            (&["192.0.2.1:1234"], Some("192.0.2.1 1234")),
            (&["10.0.0.1, 10.0.0.2"], Some("10.0.0.1")),
            (&[], None),
            (&[""], None),
            (&["192.0.2.1, nonsense, 10.0.0.1"], None),
            (&["192.0.2.1,"], None),
        ] {
            assert_eq!(ask(X, lines).as_deref(), client, "{lines:?}");
        }
    }

    #[test]
    fn forwarded_elements() {
        for (lines, client) in [
            (&["for=192.0.2.1"][..], Some("192.0.2.1")),
            (&["For=\"[2001:db8::1]:4711\";proto=https;by=10.0.0.1"], Some("2001:db8::1 4711")),
            (
                &["for=203.0.113.9, for=192.0.2.1;host=\"a,b;for=203.0.113.8\", for=10.0.0.1"],
                Some("192.0.2.1"),
            ),
            (&["for=\"[2001:db8::1]\""], Some("2001:db8::1")),
            (&["for=unknown"], None),
            (&["for=_hidden"], None),
            (&["for=2001:db8::1"], None),
            (&["proto=https"], None),
            (&["for=192.0.2.1;for=203.0.113.9"], None),
            (&["for=\"192.0.2.1"], None),
        ] {
            assert_eq!(ask(F, lines).as_deref(), client, "{lines:?}");
        }
        // Only the configured header is read.
        let mut headers = HeaderMap::new();
        headers.insert(header::FORWARDED, HeaderValue::from_static("for=192.0.2.1"));
        assert_eq!(client(&headers, X, &Networks::default()), None);
    }

    proptest! {
        /// Whatever a client sends, the proxy's own entry decides.
        #[test]
        fn forged_entries_change_nothing(spoofed in "[ -~]{0,60}", unquoted in "[ -~&&[^\"\\\\]]{0,60}") {
            let client = Some("192.0.2.1".to_owned());
            prop_assert_eq!(&ask(X, &[&spoofed, "192.0.2.1, 10.0.0.1"]), &client);
            prop_assert_eq!(&ask(X, &[&format!("{spoofed}, 192.0.2.1, 10.0.0.1")]), &client);
            prop_assert_eq!(&ask(F, &[&spoofed, "for=192.0.2.1"]), &client);
            prop_assert_eq!(&ask(F, &[&format!("{unquoted}, for=192.0.2.1")]), &client);
            // An unbalanced quotation mark makes only its own line unreadable.
            let line = format!("for=\"{unquoted}, for=192.0.2.1");
            prop_assert_eq!(&ask(F, &[&line]), &None);
        }

        #[test]
        fn arbitrary_input_never_panics(line in "[ -~]{0,200}") {
            ask(X, &[&line]);
            ask(F, &[&line]);
        }
    }
}
