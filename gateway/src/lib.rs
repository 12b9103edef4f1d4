//! Tidegate: a horizontally scalable pub/sub WebSocket gateway.
//!
//! A room is a URL, and a room is a Redis topic. Backends publish to topics. Any number of nodes hold the
//! clients' sockets and fan each message out. `docs/architecture.md` follows one message through the node.
//!
//! Modules, from the bottom up: each imports only modules above it in this table. `tests/layout.rs` enforces
//! this.
//!
//! | module | what it owns |
//! |---|---|
//! | [`websocket`] | the RFC 6455 codec |
//! | [`vocabulary`] | the values that all others share |
//! | [`clock`] | a clock that ignores time in which the process was suspended |
//! | `timeout` | time limits by that clock |
//! | [`file`](mod@file), [`watch`](mod@watch) | reading files that an operator provides, and noticing changes |
//! | [`auth`] | from a token to an identity and its grants |
//! | [`delivery`] | what happens to a room's publications in a full outbound queue |
//! | [`history`] | how much of a room's publications is kept |
//! | [`config`] | the configuration |
//! | [`descriptors`] | how many sockets the process may open |
//! | [`telemetry`] | logs |
//! | [`tls`] | the public listener's certificate |
//! | [`crypto`] | threads for TLS handshakes and for signatures of tokens |
//! | `shrink` | how containers free memory after a peak |
//! | [`limits`] | rate and connection limits |
//! | [`settings`] | the settings that may change while the node runs |
//! | [`budget`] | memory held for clients, and its limit |
//! | [`traffic`], [`health`] | traffic counters; what each shard reports |
//! | `room_map` | a session's map of rooms |
//! | [`framing`] | how messages become bytes, and which bytes are shared |
//! | [`hub`] | the rooms of this node |
//! | [`http1`] | one HTTP/1.1 connection |
//! | [`request`] | the checks for every HTTP request, and refusals |
//! | [`protocol`] | wire protocols |
//! | [`session`] | what one client may do and receives |
//! | [`drain`] | the pace at which a draining node closes its sessions |
//! | [`shard`] | what happens to the connections of one thread |
//! | [`driver`] | the threads, their sockets, and HTTP on them |
//! | [`server`] | listeners and routes |
//! | [`cli`] | the command line |
//! | [`node`] | a node: everything above, started, drained and stopped |
//! | [`reload`] | when the configuration is read again, and whether it is applied |
//! | [`serve`] | runs a process from a configuration until it is told to stop |
//!
//! The package [`broker_bridge`] carries publications between nodes. Apart from configuration and wiring
//! ([`node`]), nothing here knows that it uses Redis.

pub mod auth;
pub mod budget;
pub mod cli;
pub mod clock;
pub mod config;
pub mod crypto;
pub mod delivery;
pub mod descriptors;
pub mod drain;
pub mod driver;
pub mod file;
pub mod framing;
pub mod health;
pub mod history;
pub mod http1;
pub mod hub;
pub mod limits;
pub mod node;
pub mod protocol;
pub mod reload;
pub mod request;
mod room_map;
pub mod serve;
pub mod server;
pub mod session;
pub mod settings;
pub mod shard;
mod shrink;
pub mod telemetry;
mod timeout;
pub mod tls;
pub mod traffic;
pub mod vocabulary;
pub mod watch;
pub mod websocket;
