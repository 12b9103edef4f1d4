//! Why requests are refused and connections closed before they become sessions.

use std::ops::RangeInclusive;

use http::StatusCode;

use super::{limit::AddressLimit, metrics::Label};

/// Why a request is refused before it becomes a session. A label of `tidegate_refusals_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Not HTTP/1.1.
    MalformedHttp,
    /// No such path.
    NotFound,
    /// A method that the path does not support.
    Method,
    /// An invalid room name.
    RoomName,
    /// More rooms than `limits.rooms_per_session`.
    TooManyRooms,
    /// A malformed query parameter or header.
    BadRequest,
    /// A WebSocket handshake that violates RFC 6455.
    Handshake,
    /// None of the media types that the client accepts is available.
    NotAcceptable,
    /// The room has no history, which the request needs.
    NeedsHistory,
    /// The page's origin is not allowed.
    Origin,
    /// No valid token.
    Unauthorized,
    /// A valid token that does not grant this.
    Forbidden,
    /// A body larger than `limits.message_size`.
    BodyTooLarge,
    /// The body did not arrive in time.
    BodyTimeout,
    /// The body does not match its content type.
    Body,
    /// A content type or encoding that is not accepted.
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
    /// The node is draining.
    Draining,
    /// The broker cannot be reached.
    Broker,
    /// The broker is temporarily unable to serve the request.
    BrokerNotNow,
    /// The broker does not allow the room.
    BrokerForbidden,
    /// The broker refuses.
    BrokerRefused,
    /// The broker may or may not have accepted the publication.
    BrokerUnknown,
}

impl Label for Refusal {
    const ALL: &'static [Self] = &[
        Self::MalformedHttp,
        Self::NotFound,
        Self::Method,
        Self::RoomName,
        Self::TooManyRooms,
        Self::BadRequest,
        Self::Handshake,
        Self::NotAcceptable,
        Self::NeedsHistory,
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

    fn as_str(self) -> &'static str {
        match self {
            Self::MalformedHttp => "malformed_http",
            Self::NotFound => "not_found",
            Self::Method => "method",
            Self::RoomName => "room_name",
            Self::TooManyRooms => "too_many_rooms",
            Self::BadRequest => "bad_request",
            Self::Handshake => "handshake",
            Self::NotAcceptable => "not_acceptable",
            Self::NeedsHistory => "needs_history",
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
}

impl Refusal {
    /// The status of the response.
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
            Self::NeedsHistory => StatusCode::CONFLICT,
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

    /// Whether this node has no room for the request but another one may have. The connection is then closed,
    /// to free its own place and to let the client reach another node.
    pub fn is_about_this_node(self) -> bool {
        matches!(self, Self::Connections | Self::Memory | Self::Draining)
    }

    /// The range of seconds after which the same request may succeed, if known. A range, because clients
    /// refused together must not come back together.
    pub fn retry_after(self) -> Option<RangeInclusive<u32>> {
        match self {
            Self::Connections | Self::Memory | Self::Broker | Self::BrokerNotNow => Some(2..=8),
            // Another client of this address has to disconnect first.
            Self::AddressConnections => Some(5..=20),
            // Another node serves the next attempt.
            Self::Draining => Some(1..=3),
            _ => None,
        }
    }
}

/// Why a connection is closed without a request to answer. Also a label of `tidegate_refusals_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unanswered {
    /// No TLS handshake, or not in time.
    Tls,
    /// A missing PROXY protocol header, or not in time.
    ProxyHeader,
    /// The request head did not arrive in time; hyper closes the connection.
    HeaderTimeout,
    /// A large request head is incomplete, and `limits.memory` has no room for more of it.
    Memory,
}

impl Label for Unanswered {
    const ALL: &'static [Self] = &[Self::Tls, Self::ProxyHeader, Self::HeaderTimeout, Self::Memory];

    fn as_str(self) -> &'static str {
        match self {
            Self::Tls => "tls",
            Self::ProxyHeader => "proxy_header",
            Self::HeaderTimeout => "header_timeout",
            Self::Memory => "memory_head",
        }
    }
}

/// The result of a request for a session. The label of `tidegate_handshakes_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandshakeResult {
    /// It became a session.
    Ok,
    /// It was invalid.
    BadRequest,
    /// No valid token.
    Unauthorized,
    /// Not granted, or from an origin that is not allowed.
    Forbidden,
    /// The node could not accept it at the time.
    Unavailable,
}

impl Label for HandshakeResult {
    const ALL: &'static [Self] =
        &[Self::Ok, Self::BadRequest, Self::Unauthorized, Self::Forbidden, Self::Unavailable];

    fn as_str(self) -> &'static str {
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

impl From<AddressLimit> for Refusal {
    fn from(limit: AddressLimit) -> Self {
        match limit {
            AddressLimit::Attempts(_) => Self::Attempts,
            AddressLimit::Connections => Self::AddressConnections,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_about_this_node_send_clients_to_another() {
        let found: Vec<_> =
            Refusal::ALL.iter().copied().filter(|it| it.is_about_this_node()).map(Refusal::as_str).collect();
        assert_eq!(found, ["connections", "memory", "draining"]);
    }
}
