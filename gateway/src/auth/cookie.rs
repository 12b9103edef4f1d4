//! A token in a cookie.
//!
//! Owns the cookie's name and finds it in the `Cookie` header. Does not decide whether the cookie may be
//! used: browsers send cookies with every request, whichever page caused it. A route therefore looks here
//! only if it has found no other token and has checked the page's origin (`request::cors`).

use std::{fmt, str::FromStr};

use http::{HeaderMap, header};

use super::{AuthFailure, Token};

/// The name of a cookie: 1 to 256 characters of an HTTP token (RFC 6265 §4.1.1). Case-sensitive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CookieName(Box<str>);

/// Why a text is not a [`CookieName`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a cookie name: an HTTP token of 1 to {max} characters", max = CookieName::MAX_BYTES)]
pub struct InvalidCookieName;

/// The maximum length of a cookie's name and value together, in bytes. Browsers store no larger cookies (RFC
/// 6265bis §5.6).
const MAX_COOKIE: usize = 4096;

impl CookieName {
    /// The longest name, in bytes.
    pub const MAX_BYTES: usize = 256;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Finds the token in the only cookie of this name.
    ///
    /// Fails with `Missing`, `Ambiguous`, `TooLong` or `Malformed`. Two cookies of the name are ambiguous:
    /// any host of the same domain can add one (RFC 6265 §8.6), and their order has no meaning.
    pub fn find(&self, headers: &HeaderMap) -> Result<Token, AuthFailure> {
        let mut values = cookies(headers).filter(|(name, _)| *name == self.0.as_bytes());
        let (_, value) = values.next().ok_or(AuthFailure::Missing)?;
        if values.next().is_some() {
            return Err(AuthFailure::Ambiguous);
        }
        if self.0.len() + value.len() > MAX_COOKIE {
            return Err(AuthFailure::TooLong);
        }
        Token::new(str::from_utf8(value).map_err(|_| AuthFailure::Malformed)?)
    }
}

impl FromStr for CookieName {
    type Err = InvalidCookieName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let in_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        let valid = (1..=Self::MAX_BYTES).contains(&text.len()) && text.bytes().all(in_token);
        if valid { Ok(Self(text.into())) } else { Err(InvalidCookieName) }
    }
}

impl fmt::Display for CookieName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names and values in their order (RFC 6265 §4.2.1). Bytes, because other cookies of the domain may contain
/// anything. A proxy may split the list over several header lines (RFC 9113 §8.2.3).
fn cookies(headers: &HeaderMap) -> impl Iterator<Item = (&[u8], &[u8])> {
    let lines = headers.get_all(header::COOKIE).iter().flat_map(|line| line.as_bytes().split(|b| *b == b';'));
    lines.filter_map(|pair| {
        // Text without `=` is a value without a name.
        let (name, value) = pair.split_at_checked(pair.iter().position(|b| *b == b'=')?)?;
        Some((name.trim_ascii(), value.get(1..)?.trim_ascii()))
    })
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn found(name: &str, lines: &[&[u8]]) -> Result<String, AuthFailure> {
        let headers: HeaderMap =
            lines.iter().map(|line| (header::COOKIE, HeaderValue::from_bytes(line).unwrap())).collect();
        name.parse::<CookieName>().unwrap().find(&headers).map(|token| token.expose().to_owned())
    }

    #[test]
    fn the_named_cookie_is_found_among_others() {
        for line in [
            "session=a.b-_.c",
            "x=1; session=a.b-_.c; y=2",
            "x=1;session=a.b-_.c;",
            " ; ;\tsession = a.b-_.c \t;x",
            "Session=d.e.f; session=a.b-_.c",
            "session; session=a.b-_.c",
            "=session; session=a.b-_.c",
            "x=session=d.e.f; session=a.b-_.c",
            "x=\u{e9}; \u{e9}=x; session=a.b-_.c",
            "\"; session=a.b-_.c; \"",
        ] {
            assert_eq!(found("session", &[line.as_bytes()]), Ok("a.b-_.c".to_owned()), "{line:?}");
        }
        assert_eq!(found("session", &[b"x=1", b"\xff=\xff; session=a.b.c", b"y"]), Ok("a.b.c".to_owned()));
        assert_eq!(found("__Host-token", &[b"__Host-token=a.b.c; token=d.e.f"]), Ok("a.b.c".to_owned()));
    }

    #[test]
    fn another_name_is_a_missing_cookie() {
        for line in ["", ";", "session", "=session", "Session=a.b.c", "sessions=a.b.c", "x=session=a.b.c"] {
            assert_eq!(found("session", &[line.as_bytes()]), Err(AuthFailure::Missing), "{line:?}");
        }
        assert_eq!(found("session", &[]), Err(AuthFailure::Missing));
    }

    #[test]
    fn two_cookies_of_the_name_are_ambiguous_even_if_equal_or_malformed() {
        for lines in [
            &[b"session=a.b.c; session=d.e.f".as_slice()] as &[&[u8]],
            &[b"session=a.b.c; session=a.b.c"],
            &[b"session=a.b.c; x=1", b"session=d.e.f"],
            &[b"session=; session=a.b.c"],
            &[b"session=a.b.c; session=\xff"],
        ] {
            assert_eq!(found("session", lines), Err(AuthFailure::Ambiguous), "{lines:?}");
        }
    }

    #[test]
    fn a_value_without_the_shape_of_a_token_is_malformed() {
        for line in [
            b"session=".as_slice(),
            b"session= ; x=1",
            b"session=\"a.b.c\"",
            b"session=a b",
            b"session=a=b",
            b"session=a%2Eb",
            b"session=\xe9",
            b"session=\xff",
        ] {
            assert_eq!(found("session", &[line]), Err(AuthFailure::Malformed), "{line:?}");
        }
    }

    #[test]
    fn a_cookie_larger_than_browsers_store_is_too_long() {
        let longest = "a".repeat(MAX_COOKIE - "session".len());
        assert_eq!(found("session", &[format!("session={longest}").as_bytes()]), Ok(longest.clone()));
        for longer in [format!("session={longest}a"), format!("session={longest}\u{e9}")] {
            assert_eq!(found("session", &[longer.as_bytes()]), Err(AuthFailure::TooLong));
        }
    }

    #[test]
    fn names() {
        let longest = "n".repeat(CookieName::MAX_BYTES);
        for name in ["session", "__Host-tidegate", "a.b_c~!#$%&'*+^`|", &longest] {
            assert_eq!(name.parse::<CookieName>().unwrap().as_str(), name);
        }
        for name in ["", " ", "a b", "a=b", "a;b", "a,b", "\"a\"", "a\n", "été", &format!("{longest}n")] {
            assert_eq!(name.parse::<CookieName>(), Err(InvalidCookieName), "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_input_never_panics(junk in any::<Vec<u8>>(), prefix in "(x=1; )?(session=)?") {
            let line = [prefix.as_bytes(), &junk].concat();
            if HeaderValue::from_bytes(&line).is_ok() && let Ok(token) = found("session", &[&line]) {
                prop_assert!(Token::new(&token).is_ok());
            }
        }
    }
}
