//! The opening handshake (RFC 6455 §4.2), as pure functions on HTTP types.
//!
//! Decides only whether a request is a valid WebSocket handshake, and what the answer is. Who may connect,
//! from which `Origin` and with which subprotocol, is decided elsewhere.

use aws_lc_rs::digest;
use base64::{
    Engine as _,
    alphabet::STANDARD as ALPHABET,
    engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD},
};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Version,
    header::{
        ALLOW, CONNECTION, CONTENT_LENGTH, HOST, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_EXTENSIONS,
        SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, TRANSFER_ENCODING, UPGRADE,
    },
};

use super::Deflate;

/// The only supported version of the protocol.
const VERSION: HeaderValue = HeaderValue::from_static("13");
const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");
const UPGRADE_OPTION: HeaderValue = HeaderValue::from_static("upgrade");

/// A valid handshake, ready to be answered.
#[derive(Clone, Debug)]
pub struct Handshake<'a> {
    /// The value of `Sec-WebSocket-Accept` (§4.2.2).
    pub accept: HeaderValue,
    headers: &'a HeaderMap,
}

impl<'a> Handshake<'a> {
    /// The subprotocols the client offers, in its order of preference.
    ///
    /// Skips empty elements, and header lines that are not visible ASCII.
    pub fn protocols(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        elements(self.headers, &SEC_WEBSOCKET_PROTOCOL)
    }

    /// Negotiates permessage-deflate: the agreed parameters and the header that confirms them.
    pub fn deflate(&self) -> Option<(Deflate, HeaderValue)> {
        Deflate::negotiate(elements(self.headers, &SEC_WEBSOCKET_EXTENSIONS))
    }

    /// The 101 response that makes the connection a WebSocket. Selects `protocol` if it is given.
    ///
    /// `protocol` must be one of [`protocols`](Self::protocols); otherwise the client fails the connection
    /// (§4.1).
    pub fn response(&self, protocol: Option<HeaderValue>) -> Response<()> {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(UPGRADE, WEBSOCKET);
        headers.insert(CONNECTION, UPGRADE_OPTION);
        headers.insert(SEC_WEBSOCKET_ACCEPT, self.accept.clone());
        if let Some(protocol) = protocol {
            headers.insert(SEC_WEBSOCKET_PROTOCOL, protocol);
        }
        response
    }
}

/// Why a request is not a valid handshake. The text says what was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// §4.2.1, 1: the method must be GET.
    #[error("a WebSocket handshake was expected to be a GET request")]
    Method,
    /// §4.2.1, 1: HTTP/1.1. (RFC 8441, over HTTP/2, is not supported.)
    #[error("a WebSocket handshake was expected to be HTTP/1.1")]
    HttpVersion,
    /// §4.2.1, 2: the authority is required.
    #[error("expected exactly one Host header")]
    Host,
    /// §4.2.1, 3.
    #[error("expected the header `Upgrade: websocket`; a proxy may have removed it")]
    Upgrade,
    /// §4.2.1, 4.
    #[error("expected the header `Connection: Upgrade`; a proxy may have removed it")]
    Connection,
    /// §4.2.1, 6 and §4.4: another version of the protocol, or none.
    #[error("expected the header `Sec-WebSocket-Version: 13`")]
    Version,
    /// §4.2.1, 5: the key, 16 bytes in base64.
    #[error("expected exactly one Sec-WebSocket-Key header with 16 bytes in base64")]
    Key,
    /// A body would be between the handshake and the first frame, and two parsers might not agree on where it
    /// ends.
    #[error("a WebSocket handshake was expected to have no body")]
    Body,
}

impl HandshakeError {
    /// The status to refuse the request with.
    pub fn status(self) -> StatusCode {
        match self {
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::Version => StatusCode::UPGRADE_REQUIRED,
            Self::HttpVersion | Self::Host | Self::Upgrade | Self::Connection | Self::Key | Self::Body => {
                StatusCode::BAD_REQUEST
            }
        }
    }

    /// The headers of the refusal: `Allow` with 405 (RFC 9110 §15.5.6), `Upgrade` with 426 (§15.5.22), and
    /// the supported version (RFC 6455 §4.4).
    pub fn headers(self) -> HeaderMap {
        match self {
            Self::Method => HeaderMap::from_iter([(ALLOW, HeaderValue::from_static("GET"))]),
            Self::Version => HeaderMap::from_iter([
                (SEC_WEBSOCKET_VERSION, VERSION),
                (UPGRADE, WEBSOCKET),
                (CONNECTION, UPGRADE_OPTION),
            ]),
            Self::HttpVersion | Self::Host | Self::Upgrade | Self::Connection | Self::Key | Self::Body => {
                HeaderMap::new()
            }
        }
    }
}

/// Whether a request tries to open a WebSocket, correctly or not: it asks for the upgrade, or it has a key.
///
/// The key counts because a proxy that is not configured for WebSocket removes `Upgrade` and `Connection` but
/// not the key. [`accept`] can then tell the client what is missing.
pub fn is_upgrade(headers: &HeaderMap) -> bool {
    names(headers, &UPGRADE, "websocket") || headers.contains_key(SEC_WEBSOCKET_KEY)
}

/// Checks a client's opening handshake (§4.2.1).
pub fn accept<'a>(
    method: &Method,
    version: Version,
    headers: &'a HeaderMap,
) -> Result<Handshake<'a>, HandshakeError> {
    if method != Method::GET {
        return Err(HandshakeError::Method);
    }
    if version != Version::HTTP_11 {
        return Err(HandshakeError::HttpVersion);
    }
    if headers.contains_key(TRANSFER_ENCODING)
        || headers.get(CONTENT_LENGTH).is_some_and(|length| length != "0")
    {
        return Err(HandshakeError::Body);
    }
    if only(headers, &HOST).is_none() {
        return Err(HandshakeError::Host);
    }
    if !names(headers, &UPGRADE, "websocket") {
        return Err(HandshakeError::Upgrade);
    }
    if !names(headers, &CONNECTION, "upgrade") {
        return Err(HandshakeError::Connection);
    }
    // Before the key, so that a client of another version is told so even if its key looks different.
    if only(headers, &SEC_WEBSOCKET_VERSION) != Some(&VERSION) {
        return Err(HandshakeError::Version);
    }
    let key = only(headers, &SEC_WEBSOCKET_KEY).filter(|key| is_key(key)).ok_or(HandshakeError::Key)?;
    Ok(Handshake { accept: accept_value(key), headers })
}

/// The response to a client's key: SHA-1 of the key and a fixed text, in base64 (§4.2.2, 5.4).
fn accept_value(key: &HeaderValue) -> HeaderValue {
    let mut hash = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    hash.update(key.as_bytes());
    hash.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    HeaderValue::from_str(&STANDARD.encode(hash.finish())).expect("base64 is visible ASCII")
}

/// Whether `key` is 16 bytes in base64.
fn is_key(key: &HeaderValue) -> bool {
    // Handwritten keys often end in bits that a strict decoder refuses. Nothing depends on these bits.
    const LENIENT: GeneralPurpose =
        GeneralPurpose::new(&ALPHABET, GeneralPurposeConfig::new().with_decode_allow_trailing_bits(true));
    let mut bytes = [0; 18];
    key.len() == 24 && LENIENT.decode_slice(key.as_bytes(), &mut bytes) == Ok(16)
}

/// The value of a header that occurs exactly once.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a HeaderValue> {
    let mut values = headers.get_all(name).iter();
    values.next().filter(|_| values.next().is_none())
}

/// Whether the list in the header `name` contains `wanted`, regardless of case.
fn names(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    elements(headers, name).any(|element| element.eq_ignore_ascii_case(wanted))
}

/// The elements of a comma-separated list, which may span several header lines (RFC 9110 §5.6.1).
fn elements<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> + use<'a> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|element| element.trim_matches([' ', '\t']))
        .filter(|element| !element.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The handshake of RFC 6455 §1.3.
    const SAMPLE: [(&str, &str); 6] = [
        ("host", "server.example.com"),
        ("upgrade", "websocket"),
        ("connection", "Upgrade"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("sec-websocket-protocol", "chat, superchat"),
        ("sec-websocket-version", "13"),
    ];

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for &(name, value) in lines {
            map.append(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        map
    }

    fn sample_with(name: &'static str, values: &[&str]) -> HeaderMap {
        let mut map = headers(&SAMPLE);
        map.remove(name);
        for value in values {
            map.append(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        map
    }

    fn verdict(map: &HeaderMap) -> Result<HeaderValue, HandshakeError> {
        accept(&Method::GET, Version::HTTP_11, map).map(|handshake| handshake.accept)
    }

    #[test]
    fn section_1_3_the_sample_is_answered() {
        let map = headers(&SAMPLE);
        let handshake = accept(&Method::GET, Version::HTTP_11, &map).unwrap();
        assert_eq!(handshake.protocols().collect::<Vec<_>>(), ["chat", "superchat"]);

        let response = handshake.response(Some(HeaderValue::from_static("chat")));
        assert_eq!(response.status(), 101);
        let expected = headers(&[
            ("upgrade", "websocket"),
            ("connection", "upgrade"),
            ("sec-websocket-accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
            ("sec-websocket-protocol", "chat"),
        ]);
        assert_eq!(response.headers(), &expected);
        assert!(!handshake.response(None).headers().contains_key(SEC_WEBSOCKET_PROTOCOL));
    }

    #[test]
    fn section_4_2_1_method_and_version_of_http() {
        let map = headers(&SAMPLE);
        for method in [Method::POST, Method::HEAD, Method::CONNECT, Method::OPTIONS] {
            let error = accept(&method, Version::HTTP_11, &map).unwrap_err();
            assert_eq!(error, HandshakeError::Method);
            assert_eq!(error.status(), 405);
            assert_eq!(error.headers(), headers(&[("allow", "GET")]));
        }
        for version in [Version::HTTP_09, Version::HTTP_10, Version::HTTP_2] {
            let error = accept(&Method::GET, version, &map).unwrap_err();
            assert_eq!(error, HandshakeError::HttpVersion);
            assert_eq!(error.status(), 400);
        }
    }

    #[test]
    fn section_4_2_1_exactly_one_host_is_required() {
        assert_eq!(verdict(&sample_with("host", &[])), Err(HandshakeError::Host));
        assert_eq!(verdict(&sample_with("host", &["a", "b"])), Err(HandshakeError::Host));
        assert_eq!(HandshakeError::Host.status(), 400);
    }

    #[test]
    fn a_handshake_has_no_body() {
        for (name, value) in
            [("content-length", "1"), ("content-length", "x"), ("transfer-encoding", "chunked")]
        {
            assert_eq!(verdict(&sample_with(name, &[value])), Err(HandshakeError::Body), "{name}: {value}");
        }
        verdict(&sample_with("content-length", &["0"])).unwrap();
        assert_eq!(HandshakeError::Body.status(), 400);
    }

    #[test]
    fn section_4_2_1_upgrade_and_connection_are_lists_without_case() {
        for values in [&["WebSocket"][..], &["h2c, websocket"], &["h2c", "websocket"], &[",websocket ,"]] {
            verdict(&sample_with("upgrade", values)).unwrap();
        }
        for values in [&[][..], &["web socket"], &["websocket2"], &["\u{fc}, websocket"]] {
            assert_eq!(verdict(&sample_with("upgrade", values)), Err(HandshakeError::Upgrade), "{values:?}");
        }
        for values in [&["upgrade"][..], &["keep-alive, Upgrade"], &["keep-alive", "UPGRADE"]] {
            verdict(&sample_with("connection", values)).unwrap();
        }
        for values in [&[][..], &["keep-alive"], &["upgraded"]] {
            assert_eq!(verdict(&sample_with("connection", values)), Err(HandshakeError::Connection));
        }
    }

    #[test]
    fn section_4_4_other_versions_get_the_supported_version() {
        for values in [&[][..], &["8"], &["013"], &["13", "13"], &["13, 8"], &[""]] {
            let error = verdict(&sample_with("sec-websocket-version", values)).unwrap_err();
            assert_eq!(error, HandshakeError::Version, "{values:?}");
            assert_eq!(error.status(), 426);
            let expected =
                [("sec-websocket-version", "13"), ("upgrade", "websocket"), ("connection", "upgrade")];
            assert_eq!(error.headers(), headers(&expected));
        }
    }

    #[test]
    fn section_4_2_1_key_is_sixteen_bytes_in_base64() {
        verdict(&sample_with("sec-websocket-key", &["AAAAAAAAAAAAAAAAAAAAAA=="])).unwrap();
        // The last bits before the padding are not part of any byte.
        verdict(&sample_with("sec-websocket-key", &["AAAAAAAAAAAAAAAAAAAAAB=="])).unwrap();
        let bad: [&[&str]; 9] = [
            &[],
            &[""],
            &["SGVsbG8="],                 // 5 bytes
            &["AAAAAAAAAAAAAAAAAAAA"],     // 15 bytes
            &["AAAAAAAAAAAAAAAAAAAAAAA="], // 17 bytes
            &["AAAAAAAAAAAAAAAAAAAAAAAA"], // 18 bytes
            &["AAAAAAAAAAAAAAAAAAAAAA"],   // no padding
            &["AAAAAAAAAAAAAAAAAAAAA!=="], // not base64
            &["AAAAAAAAAAAAAAAAAAAAAA==", "AAAAAAAAAAAAAAAAAAAAAA=="],
        ];
        for values in bad {
            let error = verdict(&sample_with("sec-websocket-key", values)).unwrap_err();
            assert_eq!(error, HandshakeError::Key, "{values:?}");
            assert_eq!(error.status(), 400);
        }
    }

    #[test]
    fn offered_protocols_span_lines_and_skip_empty_elements() {
        let map = sample_with("sec-websocket-protocol", &["a,, b\t", "", " c ", "\u{fc}"]);
        let handshake = accept(&Method::GET, Version::HTTP_11, &map).unwrap();
        assert_eq!(handshake.protocols().collect::<Vec<_>>(), ["a", "b", "c"]);

        let map = sample_with("sec-websocket-protocol", &[]);
        let handshake = accept(&Method::GET, Version::HTTP_11, &map).unwrap();
        assert_eq!(handshake.protocols().next(), None);
    }

    #[test]
    fn an_attempt_is_detected_behind_a_proxy_that_removes_the_upgrade() {
        assert!(is_upgrade(&headers(&SAMPLE)));
        assert!(is_upgrade(&headers(&[("upgrade", "WebSocket")])));
        assert!(is_upgrade(&headers(&[("sec-websocket-key", "x")])));
        assert!(!is_upgrade(&headers(&[("upgrade", "h2c"), ("connection", "upgrade")])));
        assert!(!is_upgrade(&HeaderMap::new()));
    }
}
