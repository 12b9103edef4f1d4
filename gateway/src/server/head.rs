//! Rules for the head of every request, on both listeners.
//!
//! hyper refuses what it cannot parse. The rules here are those of RFC 9110 and RFC 9112 that are left to the
//! server. They apply to all routes and are checked before any route runs, so no route can forget them.

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

/// Headers that are used here and have a single value (RFC 9110 §5.3). If there were two lines, different
/// readers could use different ones.
const SINGLE: [HeaderName; 4] = [ORIGIN, CONTENT_TYPE, publish::X_EVENT, publish::IDEMPOTENCY_KEY];

/// A layer around all routes of the public listener.
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

/// A layer around all routes of the ops listener.
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

/// RFC 9112 §3.2: exactly one `Host`, with a valid value. HTTP/1.0 requests may have none.
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
    // RFC 9110 §4.2.4: user information before the host is usually an attempt to mislead.
    if request.uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err(Problem::new(Refusal::BadRequest, "expected a target without a user's name"));
    }
    Ok(())
}

/// `uri-host [ ":" port ]` (RFC 9110 §7.2). May be empty, if the target URI has no authority.
fn is_host(value: &HeaderValue) -> bool {
    if value.is_empty() {
        return true;
    }
    let Ok(authority) = Authority::try_from(value.as_bytes()) else { return false };
    // `Authority` accepts user information, and anything as a port.
    let rest = authority.as_str().strip_prefix(authority.host());
    rest.is_some_and(|rest| {
        rest.is_empty()
            || rest.strip_prefix(':').is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
    })
}

/// Refuses a transfer coding other than `chunked` (RFC 9112 §6.1): the layers below would use the body
/// undecoded.
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
        for name in ["origin", "content-type", "x-event", "idempotency-key"] {
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
