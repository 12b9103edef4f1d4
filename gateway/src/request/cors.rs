//! Which pages may use the public listener (Fetch, "CORS protocol").
//!
//! A page may be allowed to connect but not to use the browser's cookies ("credentials"): that requires its
//! origin to be listed by name. A page that sends a token proves that it has it. A cookie proves nothing
//! about the page that made the browser send it (cross-site request forgery and WebSocket hijacking).

use axum::body::Body;
use http::{HeaderName, HeaderValue, Method, Response, StatusCode, header, request::Parts};

use super::gate::{authority, header_text};
use crate::{config::Origins, settings::Settings};

/// How long a browser may cache a preflight, in seconds: the maximum that Chromium honours.
const MAX_AGE: HeaderValue = HeaderValue::from_static("7200");
/// The headers that a page may set. Replacements of `EventSource` send the last two by default.
const ALLOWED_HEADERS: HeaderValue = HeaderValue::from_static(
    "Authorization, Content-Type, Last-Event-ID, X-Event, Idempotency-Key, Cache-Control, X-Requested-With",
);
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const EXPOSED_HEADERS: HeaderValue = HeaderValue::from_static("Retry-After");

/// The origin of the request's page, as the request states it.
pub fn origin(request: &Parts) -> Option<&HeaderValue> {
    request.headers.get(header::ORIGIN)
}

/// The request's origin, if it may connect.
pub fn allowed_origin<'a>(origins: &Origins, request: &'a Parts) -> Option<&'a HeaderValue> {
    let value = origin(request)?;
    let host = authority(request).unwrap_or_default();
    origins.allows(value.to_str().ok()?, host).then_some(value)
}

/// Whether the request comes from a page that may use cookies, judging by headers that the browser sets and
/// pages cannot forge.
///
/// WebSocket handshakes, `POST`s and cross-origin requests have `Origin`. A `GET` to the page's own origin
/// has none; instead the browser sends `Sec-Fetch-Site: same-origin` (Fetch Metadata §2.3).
pub fn may_use_cookies(origins: &Origins, request: &Parts) -> bool {
    let host = authority(request).unwrap_or_default();
    match origin(request) {
        Some(origin) => origin.to_str().is_ok_and(|origin| origins.allows_cookies(origin, host)),
        None => {
            header_text(request, &SEC_FETCH_SITE) == Some("same-origin") && origins.allows_own_cookies(host)
        }
    }
}

/// Lets a page of an allowed origin read the response, and with credentials if its origin is listed by name.
///
/// This does not depend on `auth.cookie`. Browsers send some requests only with credentials
/// (`navigator.sendBeacon`) and withhold them if the preflight does not allow that. If cookies are not used,
/// allowing it reveals nothing.
pub fn expose(settings: &Settings, request: &Parts, mut response: Response<Body>) -> Response<Body> {
    let headers = response.headers_mut();
    headers.append(header::VARY, HeaderValue::from_static("Origin"));
    if let Some(origin) = allowed_origin(&settings.origins, request) {
        if may_use_cookies(&settings.origins, request) {
            headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED_HEADERS);
    }
    response
}

/// The answer to `OPTIONS`: the methods of the path, and the CORS headers for a preflight from an allowed
/// page.
pub fn options(settings: &Settings, request: &Parts, methods: HeaderValue) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    headers.insert(header::ALLOW, methods.clone());
    let preflight = request.method == Method::OPTIONS
        && request.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    if preflight && allowed_origin(&settings.origins, request).is_some() {
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, ALLOWED_HEADERS);
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    }
    expose(settings, request, response)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each row: the allowed origins, headers of a request to `gateway.example`, and whether its cookies
    /// count.
    #[test]
    fn cookies_are_accepted_from_listed_pages() {
        let app = ("origin", "https://app.example");
        let own = ("origin", "https://gateway.example");
        let same = ("sec-fetch-site", "same-origin");
        for (list, headers, counts) in [
            (&["https://app.example"] as &[&str], &[app] as &[(&str, &str)], true),
            (&["https://app.example"], &[own], false),
            (&["https://app.example"], &[own, same], false),
            (&["https://app.example"], &[same], false),
            (&["https://app.example", "http://gateway.example"], &[same], true),
            (&["https://app.example"], &[], false),
            (&[], &[own], true),
            (&[], &[same], true),
            (&[], &[app], false),
            (&[], &[app, same], false),
            (&["*"], &[own], true),
            (&["*"], &[same], true),
            (&["*"], &[app], false),
            (&["*"], &[("origin", "null")], false),
            (&["*"], &[("origin", "null"), same], false),
            (&["*"], &[("origin", "\u{e9}"), same], false),
            (&["*"], &[("sec-fetch-site", "same-site")], false),
            (&["*"], &[("sec-fetch-site", "cross-site")], false),
            (&["*"], &[("sec-fetch-site", "none")], false),
            (&["*"], &[("sec-fetch-site", "")], false),
        ] {
            let origins = Origins::new(list.iter().map(|pattern| pattern.parse().unwrap()).collect());
            let request = http::Request::builder().header("host", "gateway.example");
            let request =
                headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
            let (request, ()) = request.body(()).unwrap().into_parts();
            assert_eq!(may_use_cookies(&origins, &request), counts, "{list:?} {headers:?}");
        }
    }
}
