//! What the head of a request must keep to, whatever it asks for and whichever listener it reaches.
//!
//! hyper refuses what it cannot parse. The rules here are those of RFC 9110 and RFC 9112 that need a server's
//! judgement. They hold for all routes, and are checked before any of them runs: a rule that only one route
//! checks is a rule that the next route forgets.

use axum::{
    body::Body,
    extract::{Request, State},
    middleware::Next,
};
use http::{
    HeaderName, HeaderValue, Response, StatusCode, Version,
    header::{CONTENT_TYPE, HOST, ORIGIN, TRANSFER_ENCODING},
    request::Parts,
    uri::Authority,
};

use crate::{
    protocol::publish,
    request::{Gate, Problem},
    vocabulary::Refusal,
};

/// Fields that mean something here and hold one value (RFC 9110 §5.3). Of two lines, two readers might each
/// believe another one.
const SINGLE: [HeaderName; 3] = [ORIGIN, CONTENT_TYPE, publish::X_EVENT];

/// Stands before all routes of the public listener.
pub async fn check_public(
    State(gate): State<std::sync::Arc<Gate>>,
    request: Request,
    next: Next,
) -> Response<Body> {
    let (parts, body) = request.into_parts();
    match check(&parts) {
        Ok(()) => next.run(Request::from_parts(parts, body)).await,
        Err(problem) => gate.refuse(&parts, problem),
    }
}

/// Stands before all routes of the ops listener.
pub async fn check_ops(request: Request, next: Next) -> Response<Body> {
    let (parts, body) = request.into_parts();
    match check(&parts) {
        Ok(()) => next.run(Request::from_parts(parts, body)).await,
        Err(problem) => problem.into_response(),
    }
}

fn check(request: &Parts) -> Result<(), Problem> {
    check_host(request)?;
    check_coding(request)?;
    for name in &SINGLE {
        if request.headers.get_all(name).iter().nth(1).is_some() {
            let detail = format!("expected the header `{name}` once, found it several times");
            return Err(Problem::new(Refusal::BadRequest, detail));
        }
    }
    Ok(())
}

/// RFC 9112 §3.2: one `Host`, with a value that can be one. HTTP/1.0 has none of its own.
fn check_host(request: &Parts) -> Result<(), Problem> {
    let mut hosts = request.headers.get_all(HOST).iter();
    let sound = match (hosts.next(), hosts.next()) {
        (Some(host), None) => is_host(host),
        (None, _) => request.version < Version::HTTP_11,
        (Some(_), Some(_)) => false,
    };
    if !sound {
        return Err(Problem::new(
            Refusal::BadRequest,
            "expected exactly one Host header, with a host's name",
        ));
    }
    // RFC 9110 §4.2.4: a user's name in front of the host is there to mislead.
    if request.uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err(Problem::new(Refusal::BadRequest, "expected a target without a user's name"));
    }
    Ok(())
}

/// `uri-host [ ":" port ]` (RFC 9110 §7.2). It may be empty: the target of a client that knows no name has
/// none.
fn is_host(value: &HeaderValue) -> bool {
    if value.is_empty() {
        return true;
    }
    let Ok(authority) = Authority::try_from(value.as_bytes()) else { return false };
    // `Authority` takes a user's name, and anything for a port.
    let rest = authority.as_str().strip_prefix(authority.host());
    rest.is_some_and(|rest| {
        rest.is_empty()
            || rest.strip_prefix(':').is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
    })
}

/// Refuses a body in a coding besides `chunked` (RFC 9112 §6.1): what lies below would be taken undecoded.
fn check_coding(request: &Parts) -> Result<(), Problem> {
    let mut codings = request.headers.get_all(TRANSFER_ENCODING).iter();
    let chunked = |coding: &HeaderValue| coding.as_bytes().eq_ignore_ascii_case(b"chunked");
    if codings.next().is_none_or(chunked) && codings.next().is_none() {
        return Ok(());
    }
    let detail = "expected no Transfer-Encoding but chunked";
    Err(Problem::new(Refusal::MediaType, detail).with_status(StatusCode::NOT_IMPLEMENTED))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(version: Version, target: &str, headers: &[(&str, &str)]) -> Parts {
        let request = http::Request::builder().version(version).uri(target);
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn a_request_has_one_host() {
        for value in ["gateway.example", "gateway.example:8080", "[::1]:8080", "a_b", ""] {
            let request = head(Version::HTTP_11, "/", &[("host", value)]);
            assert!(check(&request).is_ok(), "{value:?}");
        }
        for values in [
            &[] as &[&str],
            &["a", "b"],
            &["a", "a"],
            &["a b"],
            &["a, b"],
            &["user@a"],
            &["a/b"],
            &["a:x"],
            &["a?b"],
            &["\u{e9}"],
        ] {
            let hosts: Vec<_> = values.iter().map(|value| ("host", *value)).collect();
            for target in ["/", "http://gateway.example/"] {
                let problem = check(&head(Version::HTTP_11, target, &hosts)).unwrap_err();
                assert_eq!(problem.status(), 400, "{values:?} {target}");
            }
        }
        assert!(check(&head(Version::HTTP_10, "/", &[])).is_ok());
        assert!(check(&head(Version::HTTP_10, "/", &[("host", "a"), ("host", "b")])).is_err());
    }

    #[test]
    fn a_field_with_one_value_stands_once() {
        for name in ["origin", "content-type", "x-event"] {
            let request = head(Version::HTTP_11, "/", &[("host", "a"), (name, "x"), (name, "x")]);
            assert_eq!(check(&request).unwrap_err().refusal(), Refusal::BadRequest, "{name}");
        }
    }

    #[test]
    fn a_body_is_chunked_or_plain() {
        for (values, status) in [
            (&[] as &[&str], None),
            (&["Chunked"], None),
            (&["gzip, chunked"], Some(501)),
            (&["x", "chunked"], Some(501)),
        ] {
            let mut headers = vec![("host", "a")];
            headers.extend(values.iter().map(|value| ("transfer-encoding", *value)));
            let status_found =
                check(&head(Version::HTTP_11, "/", &headers)).err().map(|it| it.status().as_u16());
            assert_eq!(status_found, status, "{values:?}");
        }
    }

    #[test]
    fn an_absolute_target_names_no_user() {
        let host = ("host", "gateway.example");
        assert!(check(&head(Version::HTTP_11, "http://other.example:80/", &[host])).is_ok());
        assert!(check(&head(Version::HTTP_11, "http://gateway.example@other.example/", &[host])).is_err());
    }
}
