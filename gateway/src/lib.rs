//! Tidegate: a horizontally scaled pub/sub WebSocket gateway.
//!
//! A room is a URL, and a room is a Redis topic. Backends publish to topics; any number of nodes hold the
//! clients' sockets and fan each message out. `docs/architecture.md` follows one message through the node.
//!
//! Modules, from the bottom up: each imports only modules above it in this table. `tests/layout.rs` holds them to it.
//!
//! | module | what it owns |
//! |---|---|
//! | [`websocket`] | the RFC 6455 codec |
//! | [`vocabulary`] | the values that all others talk in |
//! | `clock` | time in which this thread was running |
//! | [`file`](mod@file), [`watch`](mod@watch) | reading files that an operator provides, and noticing that they have changed |
//! | [`auth`] | from a token to an identity and what it may do |
//! | [`delivery`] | what happens to a room's publications in a full outbound queue |
//! | [`config`] | the configuration |
//! | [`descriptors`] | how many sockets the process may hold |
//! | [`telemetry`] | logs |
//! | [`tls`] | the public listener's certificate |
//! | `shrink` | how containers give memory back after a crowd |
//! | [`limits`] | how much anybody may use |
//! | [`settings`] | what may change while the node runs |
//! | [`budget`] | how much memory is held for clients, and how much may be |
//! | [`traffic`], [`health`] | counters of traffic; what each shard shows of itself |
//! | `room_map` | a map from rooms, as sessions keep it |
//! | [`framing`] | how messages become bytes, and what is shared of them |
//! | [`hub`] | the rooms of this node |
//! | [`http1`] | one HTTP/1.1 connection |
//! | [`request`] | the checks that every HTTP request goes through, and refusals |
//! | [`protocol`] | wire protocols |
//! | [`session`] | what one client may do and is sent |
//! | [`drain`] | the pace at which a draining node closes its sessions |
//! | [`shard`] | threads that own sockets |
//! | [`server`] | listeners and routes |
//! | [`cli`] | the command line |
//! | [`node`] | a node: everything above, started, drained and stopped |
//! | [`reload`] | when the configuration is read again, and whether it is taken |
//! | [`serve`] | from a configuration to a process that serves until it is told to stop |
//!
//! What carries publications between nodes is the package [`broker_bridge`]; apart from configuration and
//! wiring ([`node`]) nothing here knows that it is Redis.

pub mod auth;
pub mod budget;
pub mod cli;
mod clock;
pub mod config;
pub mod delivery;
pub mod descriptors;
pub mod drain;
pub mod file;
pub mod framing;
pub mod health;
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
pub mod tls;
pub mod traffic;
pub mod vocabulary;
pub mod watch;
pub mod websocket;
