//! The endpoint of event streams: which requests open one, its response head, and how temporary refusals are
//! sent.
//!
//! An `EventSource` reconnects by itself when its connection is lost or its stream ends, but never again
//! after a response with another status than 200 (WHATWG HTML §9.2.3, "fail the connection"). A temporary
//! refusal, a 429 or 503, would end it for good. So it gets a stream that only says when to reconnect, and
//! ends.

use axum::body::Body;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, header, request::Parts};

use crate::{
    request::{Problem, accept},
    vocabulary::metrics::Label as _,
    websocket::handshake,
};

pub const MEDIA_TYPE: &str = "text/event-stream";
/// Tells nginx not to buffer the response.
const BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Sets the response headers of an event stream.
pub fn head(headers: &mut HeaderMap) {
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    // `no-transform`: a proxy that compresses would hold events back until its buffer is full.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store, no-transform"));
    headers.insert(BUFFERING, HeaderValue::from_static("no"));
}

/// The refusal as a stream that says when to reconnect, if it is temporary and the client asks for an event
/// stream explicitly. A client that accepts anything may not be an `EventSource`, and a status tells it more.
pub fn come_back(request: &Parts, problem: &Problem) -> Option<Response<Body>> {
    let asks = matches!(request.method, Method::GET | Method::HEAD)
        && !handshake::is_upgrade(&request.headers)
        && accept::asks_for(&request.headers, MEDIA_TYPE);
    let millis = problem.come_back_after().filter(|_| asks)?;
    let reason = problem.refusal().as_str();
    let mut response = Response::new(Body::from(format!("retry: {millis}\n: tidegate.retry {reason}\n")));
    head(response.headers_mut());
    Some(response)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::vocabulary::Refusal;

    fn request(method: Method, headers: &[(&str, &str)]) -> Parts {
        let request = http::Request::builder().method(method);
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn only_temporary_refusals_of_requested_streams_are_streams() {
        let stream = &[("accept", "text/event-stream")] as &[(&str, &str)];
        let upgrade = &[("accept", "text/event-stream"), ("upgrade", "websocket")];
        for (refusal, method, headers, expected) in [
            (Refusal::Broker, Method::GET, stream, true),
            (Refusal::Connections, Method::GET, stream, true),
            (Refusal::Draining, Method::GET, stream, true),
            (Refusal::AddressConnections, Method::GET, stream, true),
            (Refusal::Attempts, Method::GET, stream, true),
            (Refusal::Draining, Method::HEAD, stream, true),
            (Refusal::Draining, Method::GET, &[("accept", "text/html, text/event-stream")], true),
            (Refusal::Draining, Method::POST, stream, false),
            (Refusal::Draining, Method::GET, &[("accept", "*/*")], false),
            (Refusal::Draining, Method::GET, &[], false),
            (Refusal::Draining, Method::GET, upgrade, false),
            (Refusal::Unauthorized, Method::GET, stream, false),
            (Refusal::Forbidden, Method::GET, stream, false),
            (Refusal::Origin, Method::GET, stream, false),
            (Refusal::RoomName, Method::GET, stream, false),
            (Refusal::NotFound, Method::GET, stream, false),
        ] {
            let problem = match refusal {
                Refusal::Attempts => Problem::from(refusal).after(Duration::from_secs(4)),
                _ => Problem::from(refusal),
            };
            let answer = come_back(&request(method.clone(), headers), &problem);
            assert_eq!(answer.is_some(), expected, "{refusal:?} {method} {headers:?}");
        }
    }

    #[tokio::test]
    async fn the_retry_time_is_spread_over_retry_after() {
        let parts = request(Method::GET, &[("accept", "text/event-stream")]);
        let mut times = Vec::new();
        for _ in 0..50 {
            let answer = come_back(&parts, &Problem::from(Refusal::Draining)).unwrap();
            assert_eq!(answer.status(), 200);
            assert_eq!(answer.headers()["content-type"], "text/event-stream");
            let body = axum::body::to_bytes(answer.into_body(), 100).await.unwrap();
            let text = std::str::from_utf8(&body).unwrap();
            let millis = text.strip_prefix("retry: ").unwrap().strip_suffix("\n: tidegate.retry draining\n");
            times.push(millis.unwrap().parse::<u32>().unwrap());
        }
        assert!(times.iter().all(|millis| (1_000..=3_000).contains(millis)), "{times:?}");
        times.sort_unstable();
        times.dedup();
        assert!(times.len() > 25, "{times:?}");
    }
}
