//! Which pages may talk to the public listener (Fetch, "CORS protocol").
//!
//! Tokens are carried by the page itself, never by a cookie, so credentials are not allowed for.

use axum::body::Body;
use http::{HeaderValue, Method, Response, StatusCode, header, request::Parts};

use super::gate::header_text;
use crate::config::Origins;

/// How long a browser may remember a preflight, in seconds: the most that Chromium honours.
const MAX_AGE: HeaderValue = HeaderValue::from_static("7200");
const ALLOWED_HEADERS: HeaderValue =
    HeaderValue::from_static("Authorization, Content-Type, Last-Event-ID, X-Event");
const EXPOSED_HEADERS: HeaderValue = HeaderValue::from_static("Retry-After");

/// What the request says its page's origin is.
pub fn origin(request: &Parts) -> Option<&HeaderValue> {
    request.headers.get(header::ORIGIN)
}

/// The request's origin, if it may connect.
pub fn allowed_origin<'a>(origins: &Origins, request: &'a Parts) -> Option<&'a HeaderValue> {
    let value = origin(request)?;
    let host = header_text(request, &header::HOST).unwrap_or_default();
    origins.allows(value.to_str().ok()?, host).then_some(value)
}

/// Lets a page of an allowed origin read the response.
pub fn expose(origins: &Origins, request: &Parts, mut response: Response<Body>) -> Response<Body> {
    let headers = response.headers_mut();
    headers.append(header::VARY, HeaderValue::from_static("Origin"));
    if let Some(origin) = allowed_origin(origins, request) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED_HEADERS);
    }
    response
}

/// The answer to `OPTIONS`: what the path can do, and to an allowed page's preflight, that it may.
pub fn options(origins: &Origins, request: &Parts, methods: HeaderValue) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    headers.insert(header::ALLOW, methods.clone());
    let preflight = request.method == Method::OPTIONS
        && request.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    if preflight && allowed_origin(origins, request).is_some() {
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, ALLOWED_HEADERS);
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    }
    expose(origins, request, response)
}
