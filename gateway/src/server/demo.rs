//! The demo page: everything that a first visitor needs, served by the node itself.

use std::sync::Arc;

use axum::{Router, body::Body, routing::get};
use http::{HeaderValue, Response, header};

use crate::request::Gate;

/// Allows scripts, styles and connections only from this node.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
    img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page and its assets.
pub fn routes() -> Router<Arc<Gate>> {
    Router::new()
        .route("/", get(async || asset("text/html; charset=utf-8", include_str!("../../assets/demo.html"))))
        .route(
            "/demo.css",
            get(async || asset("text/css; charset=utf-8", include_str!("../../assets/demo.css"))),
        )
        .route(
            "/demo.js",
            get(async || asset("text/javascript; charset=utf-8", include_str!("../../assets/demo.js"))),
        )
}

fn asset(content_type: &'static str, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}
