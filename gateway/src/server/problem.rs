//! Answers that say no: problem details for HTTP APIs (RFC 9457).

use std::{borrow::Cow, ops::RangeInclusive, time::Duration};

use axum::body::Body;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};

use crate::auth;

/// Why a request is refused before it becomes a session. A label of `tidegate_refusals_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Not HTTP/1.1.
    MalformedHttp,
    /// No such path.
    NotFound,
    /// A method that the path does not have.
    Method,
    /// The room's name breaks the rules.
    RoomName,
    /// More rooms than `limits.rooms_per_session`.
    TooManyRooms,
    /// A query parameter or header that cannot be understood.
    BadRequest,
    /// A WebSocket handshake that breaks RFC 6455.
    Handshake,
    /// Nothing that the client accepts can be given.
    NotAcceptable,
    /// The page's origin is not allowed.
    Origin,
    /// No valid token.
    Unauthorized,
    /// A valid token that does not grant this.
    Forbidden,
    /// A body over `limits.message_size`.
    BodyTooLarge,
    /// No whole body in time.
    BodyTimeout,
    /// A body that is not what its type says.
    Body,
    /// A type or encoding that is not taken.
    MediaType,
    /// `limits.attempts_per_address` is used up.
    Attempts,
    /// `limits.connections_per_address` is reached.
    AddressConnections,
    /// `limits.user_commands` is used up.
    UserCommands,
    /// `limits.user_bytes` is used up.
    UserBytes,
    /// `limits.connections` is reached.
    Connections,
    /// `limits.memory` has no room for a body.
    Memory,
    /// The node is leaving.
    Draining,
    /// The broker cannot be reached.
    Broker,
    /// The broker cannot at the moment.
    BrokerNotNow,
    /// The broker does not allow the room.
    BrokerForbidden,
    /// The broker refuses.
    BrokerRefused,
    /// The broker may or may not have taken the publication.
    BrokerUnknown,
}

impl Refusal {
    /// Every reason.
    pub const ALL: [Self; 27] = [
        Self::MalformedHttp,
        Self::NotFound,
        Self::Method,
        Self::RoomName,
        Self::TooManyRooms,
        Self::BadRequest,
        Self::Handshake,
        Self::NotAcceptable,
        Self::Origin,
        Self::Unauthorized,
        Self::Forbidden,
        Self::BodyTooLarge,
        Self::BodyTimeout,
        Self::Body,
        Self::MediaType,
        Self::Attempts,
        Self::AddressConnections,
        Self::UserCommands,
        Self::UserBytes,
        Self::Connections,
        Self::Memory,
        Self::Draining,
        Self::Broker,
        Self::BrokerNotNow,
        Self::BrokerForbidden,
        Self::BrokerRefused,
        Self::BrokerUnknown,
    ];

    /// The metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MalformedHttp => "malformed_http",
            Self::NotFound => "not_found",
            Self::Method => "method",
            Self::RoomName => "room_name",
            Self::TooManyRooms => "too_many_rooms",
            Self::BadRequest => "bad_request",
            Self::Handshake => "handshake",
            Self::NotAcceptable => "not_acceptable",
            Self::Origin => "origin",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::BodyTooLarge => "body_too_large",
            Self::BodyTimeout => "body_timeout",
            Self::Body => "body",
            Self::MediaType => "media_type",
            Self::Attempts => "attempts",
            Self::AddressConnections => "address_connections",
            Self::UserCommands => "user_commands",
            Self::UserBytes => "user_bytes",
            Self::Connections => "connections",
            Self::Memory => "memory",
            Self::Draining => "draining",
            Self::Broker => "broker",
            Self::BrokerNotNow => "broker_not_now",
            Self::BrokerForbidden => "broker_forbidden",
            Self::BrokerRefused => "broker_refused",
            Self::BrokerUnknown => "broker_unknown",
        }
    }

    /// The answer's status.
    pub fn status(self) -> StatusCode {
        match self {
            Self::MalformedHttp
            | Self::RoomName
            | Self::TooManyRooms
            | Self::BadRequest
            | Self::Handshake
            | Self::Body => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Origin | Self::Forbidden | Self::BrokerForbidden => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::NotAcceptable => StatusCode::NOT_ACCEPTABLE,
            Self::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::MediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Attempts | Self::AddressConnections | Self::UserCommands | Self::UserBytes => {
                StatusCode::TOO_MANY_REQUESTS
            }
            Self::BrokerRefused => StatusCode::BAD_GATEWAY,
            Self::Connections | Self::Memory | Self::Draining | Self::Broker | Self::BrokerNotNow => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::BrokerUnknown => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// Whether another node may well take the request: this one has no place for it. The connection is then closed, so
    /// that it takes no place either, and the client reaches another node when it comes back.
    pub fn is_about_this_node(self) -> bool {
        matches!(self, Self::Connections | Self::Memory | Self::Draining)
    }

    /// The least and the most seconds after which the same request may succeed, where that is known. A
    /// range, because all who are refused together must not come back together.
    fn retry_after(self) -> Option<RangeInclusive<u32>> {
        match self {
            Self::Connections | Self::Memory | Self::Broker | Self::BrokerNotNow => Some(2..=8),
            // Somebody else of this address has to leave first.
            Self::AddressConnections => Some(5..=20),
            // Another node takes the next attempt.
            Self::Draining => Some(1..=3),
            _ => None,
        }
    }
}

/// Why a connection is closed before there is a request to be answered. A label of `tidegate_refusals_total`,
/// too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unanswered {
    /// No TLS handshake, or not in time.
    Tls,
    /// No PROXY protocol header where there must be one, or not in time.
    ProxyHeader,
    /// No whole request head in time, upon which hyper closes the connection.
    HeaderTimeout,
    /// A request head that is large and not whole, while `limits.memory` has no room for more of it.
    Memory,
}

impl Unanswered {
    /// Every reason.
    pub const ALL: [Self; 4] = [Self::Tls, Self::ProxyHeader, Self::HeaderTimeout, Self::Memory];

    /// The metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tls => "tls",
            Self::ProxyHeader => "proxy_header",
            Self::HeaderTimeout => "header_timeout",
            Self::Memory => "memory_head",
        }
    }
}

/// How a request for a session ended. The label of `tidegate_handshakes_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandshakeResult {
    /// It became a session.
    Ok,
    /// It broke the rules.
    BadRequest,
    /// No valid token.
    Unauthorized,
    /// Not granted, or from a foreign origin.
    Forbidden,
    /// The node could not take it now.
    Unavailable,
}

impl HandshakeResult {
    /// Every result.
    pub const ALL: [Self; 5] =
        [Self::Ok, Self::BadRequest, Self::Unauthorized, Self::Forbidden, Self::Unavailable];

    /// The metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::BadRequest => "bad_request",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::Unavailable => "unavailable",
        }
    }
}

impl From<Refusal> for HandshakeResult {
    fn from(refusal: Refusal) -> Self {
        match refusal.status() {
            StatusCode::UNAUTHORIZED => Self::Unauthorized,
            StatusCode::FORBIDDEN => Self::Forbidden,
            status if status.is_server_error() => Self::Unavailable,
            _ => Self::BadRequest,
        }
    }
}

/// An answer that says no.
#[derive(Debug)]
pub struct Problem {
    refusal: Refusal,
    status: StatusCode,
    detail: Cow<'static, str>,
    /// The least and the most seconds after which it may be tried again.
    retry_after: Option<RangeInclusive<u32>>,
    /// Boxed, so that a `Result` with a problem in it stays small.
    headers: Box<HeaderMap>,
}

impl Problem {
    /// A refusal, and what was wrong and what was expected. The detail must hold no secret.
    pub fn new(refusal: Refusal, detail: impl Into<Cow<'static, str>>) -> Self {
        let mut headers = Box::new(HeaderMap::new());
        if refusal == Refusal::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(auth::CHALLENGE));
        }
        let retry_after = refusal.retry_after();
        Self { refusal, status: refusal.status(), detail: detail.into(), retry_after, headers }
    }

    /// To be tried again after this time, or up to twice of it: all who are told together must not come back
    /// together.
    #[must_use]
    pub fn after(mut self, wait: Duration) -> Self {
        let least = u32::try_from(wait.as_secs()).unwrap_or(u32::MAX / 2).saturating_add(1);
        self.retry_after = Some(least..=least.saturating_mul(2));
        self
    }

    /// With another status than the refusal's usual one.
    #[must_use]
    pub fn with_status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    /// With more headers.
    #[must_use]
    pub fn with_headers(mut self, headers: HeaderMap) -> Self {
        self.headers.extend(headers);
        self
    }

    /// Why.
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

    /// Some number of milliseconds after which it may be tried again, if it is over by itself. Each call gives
    /// another one.
    pub fn come_back_after(&self) -> Option<u32> {
        let temporary = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE];
        let seconds = self.retry_after.clone().filter(|_| temporary.contains(&self.status))?;
        Some(spread(seconds.start().saturating_mul(1_000)..=seconds.end().saturating_mul(1_000)))
    }

    /// The answer: `application/problem+json` with `title`, `status` and `detail`.
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

/// Some number of the range.
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
            Refusal::UserCommands => "this user publishes too often",
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_without_a_place_sends_clients_to_another_one() {
        let found: Vec<_> =
            Refusal::ALL.into_iter().filter(|it| it.is_about_this_node()).map(Refusal::as_str).collect();
        assert_eq!(found, ["connections", "memory", "draining"]);
    }
}
