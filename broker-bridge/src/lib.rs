//! The broker of a gateway node: the contract and its implementations.
//!
//! A gateway node holds sockets; a *broker* carries publications between nodes. This crate owns the
//! contract between the two and its implementations, and knows nothing about `WebSocket`, HTTP or
//! sessions.
//!
//! | module | what it holds |
//! |---|---|
//! | [`broker`] | the [`Broker`] contract: what subscribe, publish and events promise about order, acknowledgement and loss |
//! | [`publication`] | [`Publication`] and its parts, valid by construction |
//! | `json` | whether bytes are JSON, for [`Data::json`] |
//! | [`room`] | [`RoomName`] |
//! | [`history`] | [`Cursor`] and what is read from a room's log |
//! | [`memory`] | [`memory::MemoryBroker`]: one process, the embedded default |
//! | [`redis`] | [`redis::RedisBroker`]: Redis pub/sub between any number of nodes |
//! | [`url`] | [`BrokerUrl`]: which broker, and its address |
//! | [`dial`] | connecting by host name: races all addresses of a host |
//! | [`tls`] | which certificates to trust when connecting over TLS |
//! | [`metrics`] | the metrics of every broker |
//! | `conformance` | the contract as one test suite; every broker runs it (feature `conformance`) |

pub mod broker;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
pub mod dial;
pub mod history;
mod json;
pub mod memory;
pub mod metrics;
pub mod publication;
pub mod redis;
pub mod room;
pub mod tls;
pub mod url;

pub use broker::{
    Accepted, Affinity, Broker, BrokerError, BrokerStatus, GapCause, Positioning, PublishRequest, Reading,
    Receipt, ReceiptSink, Sink, Subscribing, Ticket,
};
pub use history::{Cursor, Follows, Place, Retention};
pub use publication::{
    Data, DataKind, EventName, InvalidEventName, InvalidJson, InvalidPublicationId, Publication,
    PublicationId, Publisher, SessionId,
};
pub use room::{InvalidRoomName, RoomName};
pub use url::{BrokerUrl, InvalidBrokerUrl};
