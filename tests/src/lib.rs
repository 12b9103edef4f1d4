//! The harness: real `redis-server`s, real nodes, real clients, real faults.
//!
//! A scenario says what happens and what must then be true; this crate owns how to make it happen. Every
//! piece belongs to one test and dies with it: nothing is shared, ports are the system's choice, and
//! nothing waits for a time: each wait names a state, has a bound, and prints the last state it saw.
//!
//! | module | what it gives |
//! |---|---|
//! | [`redis_server`] | a `redis-server` of one's own, to kill and restart |
//! | [`fault_proxy`] | a stable address in front of it that can cut and stall |
//! | [`eventually`] | a poll with a bound |
//! | [`node`] | a `tidegate` process: settings in, addresses, output, signals and exit status out |
//! | [`journal`] | what a client has heard, in order, and how to wait for it |
//! | [`client`] | clients of every kind behind one handle: tungstenite, SSE over a socket, scripts |
//! | [`http`] | one HTTP exchange, byte for byte as the test wants it |
//! | [`proxy`] | a real reverse proxy before a node |
//! | [`raw`] | a WebSocket by hand: frames no client library would send, reads that stop |
//! | [`pages`] | pages in Chromium, used as a person uses them |
//! | [`tls`] | certificates, and connections that trust them |
//! | [`token`] | tokens, good and bad |
//! | [`issuer`] | whoever makes tokens: keys, and a server of key sets |
//! | [`samples`] | what `/metrics` says |
//! | [`witness`] | a healthy client that counts beside those that misbehave |

pub mod client;
pub mod eventually;
pub mod fault_proxy;
pub mod http;
pub mod issuer;
pub mod journal;
pub mod node;
pub mod pages;
pub mod proxy;
pub mod raw;
pub mod redis_server;
pub mod samples;
pub mod tls;
pub mod token;
pub mod witness;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// How long any single wait may take. Far beyond what anything takes on a busy machine: a test that reaches
/// it has failed.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A file of this package, by its path below `tests/`.
pub fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
