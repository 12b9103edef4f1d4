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
    pub fn retry_after(self) -> Option<RangeInclusive<u32>> {
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
    fn a_node_without_a_place_sends_clients_to_another_one() {
        let found: Vec<_> =
            Refusal::ALL.iter().copied().filter(|it| it.is_about_this_node()).map(Refusal::as_str).collect();
        assert_eq!(found, ["connections", "memory", "draining"]);
    }
}
