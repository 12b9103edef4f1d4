//! Where a request carries its token.
//!
//! Owns the three places where a client deliberately puts a token, and the [`Token`] type, which keeps it out
//! of logs. Does not verify: what [`find`] returns has the shape of a token and may be forged. Cookies, which
//! browsers send on their own, are handled by [`super::cookie`].
//!
//! 1. `Authorization: Bearer <token>` (RFC 6750 §2.1): backends, command-line clients, anything that can set
//!    a header. A header with another scheme is ignored.
//! 2. `?token=<token>`: `EventSource`, and clients that can only choose the URL. Prefer the others: URLs end
//!    up in the logs of proxies.
//! 3. `Sec-WebSocket-Protocol: tidegate, tidegate.bearer.<token>`: browsers, whose `WebSocket` accepts a list
//!    of subprotocols but no headers. The Kubernetes API server established the idea. It encodes the token in
//!    base64url once more, because its tokens may contain any bytes; a JWT has only characters that the
//!    header allows.
//!
//! A browser closes a socket if the server selects none of the offered subprotocols (WHATWG standard), and
//! the token must not be sent back. So a client also offers [`PLAIN_SUBPROTOCOL`], and the server selects
//! from [`offered_subprotocols`], which omits tokens.
//!
//! A request may carry exactly one token (RFC 6750 §2). With two, a proxy and this node could each check a
//! different one. A cookie beside the token is ignored, because the client may not know that it was sent.

use std::fmt;

use http::{HeaderMap, header};
use percent_encoding::percent_decode_str;

use super::AuthFailure;

/// The subprotocol for plain frames. Clients offer it beside a token, and the server selects it.
pub const PLAIN_SUBPROTOCOL: &str = "tidegate";

/// The prefix of a token in a subprotocol list.
pub const BEARER_SUBPROTOCOL_PREFIX: &str = "tidegate.bearer.";

/// The query parameter that carries a token.
pub const QUERY_PARAMETER: &str = "token";

/// A string with the shape of a token: at most [`Token::MAX_BYTES`] of the characters that a compact JWT
/// consists of. Only [`Token::expose`] reveals it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(Box<str>);

impl Token {
    /// The longest accepted token, in bytes.
    pub const MAX_BYTES: usize = 8 * 1024;

    /// Checks the length, then the characters.
    pub fn new(text: &str) -> Result<Self, AuthFailure> {
        if text.len() > Self::MAX_BYTES {
            return Err(AuthFailure::TooLong);
        }
        let in_shape = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if text.is_empty() || !text.bytes().all(in_shape) {
            return Err(AuthFailure::Malformed);
        }
        Ok(Self(text.into()))
    }

    /// The token's text, to verify it or to hand it to its owner.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(hidden)")
    }
}

/// Finds the only token of a request. `query` is the text after the `?`.
///
/// Fails with `Missing`, `Ambiguous`, `TooLong` or `Malformed`.
pub fn find(headers: &HeaderMap, query: Option<&str>) -> Result<Token, AuthFailure> {
    let mut found =
        bearer_headers(headers).chain(query_parameters(query)).chain(bearer_subprotocols(headers));
    let token = found.next().ok_or(AuthFailure::Missing)?;
    if found.next().is_some() { Err(AuthFailure::Ambiguous) } else { token }
}

/// The subprotocols that a client offers, in its order, without tokens.
pub fn offered_subprotocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    subprotocols(headers).flatten().filter(|name| !name.starts_with(BEARER_SUBPROTOCOL_PREFIX))
}

type Found = Result<Token, AuthFailure>;

fn bearer_headers(headers: &HeaderMap) -> impl Iterator<Item = Found> {
    headers.get_all(header::AUTHORIZATION).iter().filter_map(|value| {
        let Ok(text) = value.to_str() else {
            return Some(Err(AuthFailure::Malformed));
        };
        let (scheme, rest) = text.split_once(' ').unwrap_or((text, ""));
        scheme.eq_ignore_ascii_case("bearer").then(|| Token::new(rest.trim_matches(' ')))
    })
}

fn query_parameters(query: Option<&str>) -> impl Iterator<Item = Found> {
    query.unwrap_or_default().split('&').filter_map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        // Decode the name too, or `%74oken` would hide a second token.
        let is_token = percent_decode_str(name).eq(QUERY_PARAMETER.bytes());
        is_token.then(|| {
            // Decoding shortens a value to a third at most, so a longer one cannot be within bounds.
            if value.len() > 3 * Token::MAX_BYTES {
                return Err(AuthFailure::TooLong);
            }
            let value = percent_decode_str(value).decode_utf8().map_err(|_| AuthFailure::Malformed)?;
            Token::new(&value)
        })
    })
}

fn bearer_subprotocols(headers: &HeaderMap) -> impl Iterator<Item = Found> {
    subprotocols(headers).filter_map(|name| match name {
        Ok(name) => name.strip_prefix(BEARER_SUBPROTOCOL_PREFIX).map(Token::new),
        Err(failure) => Some(Err(failure)),
    })
}

/// The elements of the list, which may span several header lines (RFC 6455 §4.1).
fn subprotocols(headers: &HeaderMap) -> impl Iterator<Item = Result<&str, AuthFailure>> {
    headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().flat_map(|line| {
        let (names, unreadable) = match line.to_str() {
            Ok(names) => (names, None),
            Err(_) => ("", Some(Err(AuthFailure::Malformed))),
        };
        let names = names.split(',').map(|name| name.trim_matches([' ', '\t']));
        names.filter(|name| !name.is_empty()).map(Ok).chain(unreadable)
    })
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;

    const AUTHORIZATION: HeaderName = header::AUTHORIZATION;
    const PROTOCOL: HeaderName = header::SEC_WEBSOCKET_PROTOCOL;

    fn headers(lines: &[(HeaderName, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(name.clone(), HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        headers
    }

    fn found(lines: &[(HeaderName, &str)], query: Option<&str>) -> Result<String, AuthFailure> {
        find(&headers(lines), query).map(|token| token.expose().to_owned())
    }

    #[test]
    fn a_token_is_found_in_each_place() {
        let token = Ok("a.b-_.c".to_owned());
        for header in ["Bearer a.b-_.c", "bearer a.b-_.c", "BEARER   a.b-_.c "] {
            assert_eq!(found(&[(AUTHORIZATION, header)], None), token, "{header:?}");
        }
        for query in ["token=a.b-_.c", "x=1&token=a.b-_.c&y", "token=a%2Eb-_%2ec", "%74oken=a.b-_.c"] {
            assert_eq!(found(&[], Some(query)), token, "{query:?}");
        }
        for list in [
            "tidegate, tidegate.bearer.a.b-_.c",
            "tidegate.bearer.a.b-_.c,tidegate",
            "tidegate.bearer.a.b-_.c",
            " , tidegate ,\ttidegate.bearer.a.b-_.c ,",
        ] {
            assert_eq!(found(&[(PROTOCOL, list)], None), token, "{list:?}");
        }
        let lines = [(PROTOCOL, "tidegate"), (PROTOCOL, "tidegate.bearer.a.b-_.c")];
        assert_eq!(found(&lines, None), token);
    }

    #[test]
    fn a_request_without_a_token_is_missing_it() {
        for query in [None, Some(""), Some("room=token"), Some("Token=a.b.c"), Some("tokens=a.b.c")] {
            assert_eq!(found(&[], query), Err(AuthFailure::Missing), "{query:?}");
        }
        let others = [(AUTHORIZATION, "Basic YTpi"), (PROTOCOL, "tidegate, centrifuge-json, bearer.a.b.c")];
        assert_eq!(found(&others, Some("x=y")), Err(AuthFailure::Missing));
    }

    #[test]
    fn two_tokens_are_ambiguous_even_if_equal_or_malformed() {
        let header = (AUTHORIZATION, "Bearer a.b.c");
        let list = (PROTOCOL, "tidegate, tidegate.bearer.a.b.c");
        for (lines, query) in [
            (vec![header.clone(), list.clone()], None),
            (vec![header.clone()], Some("token=a.b.c")),
            (vec![list.clone()], Some("token=a.b.c")),
            (vec![header.clone(), header.clone()], None),
            (vec![list.clone(), list], None),
            (vec![(PROTOCOL, "tidegate.bearer.a, tidegate.bearer.b")], None),
            (vec![], Some("token=a.b.c&token=d.e.f")),
            (vec![], Some("token=a.b.c&%74oken=a.b.c")),
            (vec![header], Some("token=")),
        ] {
            assert_eq!(found(&lines, query), Err(AuthFailure::Ambiguous), "{lines:?} {query:?}");
        }
    }

    #[test]
    fn a_value_without_the_shape_of_a_token_is_malformed() {
        for header in ["Bearer", "Bearer ", "Bearer a b", "Bearer a,b", "Bearer \"a\"", "Bearer é"] {
            assert_eq!(found(&[(AUTHORIZATION, header)], None), Err(AuthFailure::Malformed), "{header:?}");
        }
        for query in ["token", "token=", "token=a+b", "token=a%ff", "token=a%00", "token=a%0Ab", "token=a=b"]
        {
            assert_eq!(found(&[], Some(query)), Err(AuthFailure::Malformed), "{query:?}");
        }
        for list in ["tidegate.bearer.", "tidegate, tidegate.bearer.a/b", "tidegate, é"] {
            assert_eq!(found(&[(PROTOCOL, list)], None), Err(AuthFailure::Malformed), "{list:?}");
        }
    }

    #[test]
    fn the_length_is_checked_first() {
        let longest = "a".repeat(Token::MAX_BYTES);
        assert!(found(&[(AUTHORIZATION, &format!("Bearer {longest}"))], None).is_ok());
        assert!(found(&[], Some(&format!("token={}", "%61".repeat(Token::MAX_BYTES)))).is_ok());
        let longer = format!("{longest}\u{fc}");
        for (lines, query) in [
            (vec![(AUTHORIZATION, format!("Bearer {longest}!"))], None),
            (vec![(PROTOCOL, format!("tidegate.bearer.{longest}!"))], None),
            (vec![], Some(format!("token={longer}"))),
            (vec![], Some(format!("token={}", "%".repeat(1 << 20)))),
        ] {
            let lines: Vec<_> = lines.iter().map(|(name, value)| (name.clone(), value.as_str())).collect();
            assert_eq!(found(&lines, query.as_deref()), Err(AuthFailure::TooLong));
        }
    }

    #[test]
    fn a_token_is_never_returned_as_a_subprotocol() {
        let headers = headers(&[(PROTOCOL, "x, tidegate.bearer.a.b.c, tidegate"), (PROTOCOL, "y")]);
        assert_eq!(offered_subprotocols(&headers).collect::<Vec<_>>(), ["x", PLAIN_SUBPROTOCOL, "y"]);
    }

    #[test]
    fn debug_output_does_not_show_a_token() {
        let token = Token::new("very.secret.token").unwrap();
        assert_eq!(format!("{token:?} {:?}", Some(&token)), "Token(hidden) Some(Token(hidden))");
    }

    proptest! {
        #[test]
        fn arbitrary_input_never_panics(header in any::<Vec<u8>>(), query in "\\PC*", prefix in "(Bearer |tidegate.bearer.)?") {
            let mut headers = HeaderMap::new();
            let value = [prefix.as_bytes(), &header].concat();
            if let Ok(value) = HeaderValue::from_bytes(&value) {
                headers.append(AUTHORIZATION, value.clone());
                headers.append(PROTOCOL, value);
            }
            if let Ok(token) = find(&headers, Some(&query)) {
                prop_assert!(Token::new(token.expose()).is_ok());
            }
            prop_assert!(offered_subprotocols(&headers).all(|name| !name.starts_with(BEARER_SUBPROTOCOL_PREFIX)));
        }
    }
}
