//! Tidegate: a horizontally scaled pub/sub WebSocket gateway.
//!
//! A room is a URL, and a room is a Redis topic. Backends publish to topics; any number of nodes hold the
//! clients' sockets and fan each message out. `docs/architecture.md` follows one message through the node.
//!
//! | module | what it owns |
//! |---|---|
//! | [`node`] | a node: everything below, started, drained and stopped |
//! | [`serve`] | from a configuration to a process that serves until it is told to stop |
//! | [`cli`], [`config`], [`telemetry`] | the command line, the configuration, logs |
//! | [`settings`] | what may change while the node runs |
//! | [`reload`] | when the configuration is read again, and whether it is taken |
//! | [`drain`] | the pace at which a leaving node closes its sessions |
//! | [`server`] | listeners, routes, refusals |
//! | [`auth`] | from a token to an identity and what it may do |
//! | [`shard`] | threads that own sockets |
//! | [`websocket`] | the RFC 6455 codec |
//! | [`protocol`] | wire protocols |
//! | [`session`] | what one client may do and is told |
//! | [`hub`] | the rooms of this node |
//! | `room_map` | what a session keeps of each of its rooms |
//! | `shrink` | how containers give memory back after a crowd |
//! | [`delivery`] | what a room's publications may do in a full outbound queue |
//! | [`limits`] | how much anybody may use |
//! | [`budget`] | how much memory is held for clients, and how much may be |
//! | [`descriptors`] | how many sockets there may be |
//! | [`tls`] | the public listener's certificate |
//! | [`file`](mod@file) | reading files that an operator provides |
//! | [`watch`](mod@watch) | noticing that files have changed |
//! | [`metrics`] | what is measured |
//!
//! What carries publications between nodes is the package [`broker_bridge`]; apart from configuration and
//! wiring ([`node`]) nothing here knows that it is Redis.

pub mod auth;
pub mod budget;
pub mod cli;
pub mod config;
pub mod delivery;
pub mod descriptors;
pub mod drain;
pub mod file;
pub mod hub;
pub mod limits;
pub mod metrics;
pub mod node;
pub mod outcome;
pub mod protocol;
pub mod reload;
mod room_map;
pub mod serve;
pub mod server;
pub mod session;
pub mod settings;
pub mod shard;
mod shrink;
pub mod telemetry;
pub mod tls;
pub mod watch;
pub mod websocket;
