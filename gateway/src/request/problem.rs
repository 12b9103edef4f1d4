//! Refusals as HTTP responses: problem details for HTTP APIs (RFC 9457).

use std::{borrow::Cow, ops::RangeInclusive, time::Duration};

use axum::body::Body;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};

use crate::{auth, vocabulary::Refusal};

/// A refusal of a request.
#[derive(Debug)]
pub struct Problem {
    refusal: Refusal,
    status: StatusCode,
    detail: Cow<'static, str>,
    /// The range of seconds for `Retry-After`.
    retry_after: Option<RangeInclusive<u32>>,
    /// Boxed to keep a `Result` with a problem small.
    headers: Box<HeaderMap>,
}

impl Problem {
    /// A refusal with a detail that says what was wrong and what was expected. The detail must contain no
    /// secret.
    pub fn new(refusal: Refusal, detail: impl Into<Cow<'static, str>>) -> Self {
        let mut headers = Box::new(HeaderMap::new());
        if refusal == Refusal::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(auth::CHALLENGE));
        }
        let retry_after = refusal.retry_after();
        Self { refusal, status: refusal.status(), detail: detail.into(), retry_after, headers }
    }

    /// Sets `Retry-After` to this time or up to twice as much, so clients refused together do not come back
    /// together.
    #[must_use]
    pub fn after(mut self, wait: Duration) -> Self {
        let least = u32::try_from(wait.as_secs()).unwrap_or(u32::MAX / 2).saturating_add(1);
        self.retry_after = Some(least..=least.saturating_mul(2));
        self
    }

    /// Replaces the refusal's usual status.
    #[must_use]
    pub fn with_status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    /// Adds headers.
    #[must_use]
    pub fn with_headers(mut self, headers: HeaderMap) -> Self {
        self.headers.extend(headers);
        self
    }

    /// The reason.
    pub fn refusal(&self) -> Refusal {
        self.refusal
    }

    /// The status of the answer.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// What was wrong and what was expected.
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// A random number of milliseconds after which to retry, different for each call. `None` unless the
    /// problem is temporary.
    pub fn come_back_after(&self) -> Option<u32> {
        let temporary = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE];
        let seconds = self.retry_after.clone().filter(|_| temporary.contains(&self.status))?;
        Some(spread(seconds.start().saturating_mul(1_000)..=seconds.end().saturating_mul(1_000)))
    }

    /// The response: `application/problem+json` with `title`, `status` and `detail`.
    pub fn into_response(self) -> Response<Body> {
        let body = serde_json::json!({
            "title": self.status.canonical_reason().unwrap_or("Error"),
            "status": self.status.as_u16(),
            "detail": self.detail,
        });
        let mut response = Response::new(Body::from(body.to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        *headers = *self.headers;
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(spread(seconds)));
        }
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }
}

/// A random number in the range.
fn spread(range: RangeInclusive<u32>) -> u32 {
    let (least, most) = range.into_inner();
    let spread = getrandom::u32().unwrap_or(0) % (most - least).saturating_add(1);
    least + spread
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let detail = match refusal {
            Refusal::Connections => "this node holds as many connections as it may",
            Refusal::Memory => "this node is short of memory; come back or reach another one",
            Refusal::Attempts => "too many connections in a short time from this address",
            Refusal::AddressConnections => "this address has as many connections as it may",
            Refusal::UserCommands => "this user publishes or polls too often",
            Refusal::UserBytes => "this user publishes too much",
            Refusal::Draining => "this node is leaving; come back and reach another one",
            Refusal::Broker => "the broker cannot be reached; nothing was published or subscribed",
            Refusal::BrokerNotNow => "the broker cannot at the moment; nothing was published or subscribed",
            Refusal::BrokerForbidden => "the broker does not allow this room",
            Refusal::BrokerRefused => "the broker refused; nothing was published or subscribed",
            Refusal::BrokerUnknown => "the publication may or may not have been delivered",
            Refusal::Unauthorized => "a valid token is needed",
            Refusal::Forbidden => "the token does not grant this",
            Refusal::Origin => "pages of this origin may not connect",
            _ => "the request cannot be served",
        };
        Self::new(refusal, detail)
    }
}
