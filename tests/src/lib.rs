//! The harness: real `redis-server`s, real nodes, real clients, real faults.
//!
//! A scenario describes what happens and what must then be true; this crate makes it happen. Every
//! piece belongs to one test and ends with it: nothing is shared, the system chooses the ports, and
//! nothing waits for a time. Each wait names a state, has a bound, and prints the last state on failure.
//!
//! | module | what it gives |
//! |---|---|
//! | [`redis_server`] | a private `redis-server`, to kill and restart |
//! | [`fault_proxy`] | a stable address in front of it that can cut and stall |
//! | [`eventually`] | a bounded poll |
//! | [`node`] | a `tidegate` process: settings, addresses, output, signals and exit status |
//! | [`journal`] | what a client has received, in order, and how to wait for it |
//! | [`client`] | clients of every kind behind one handle: tungstenite, SSE over a socket, scripts |
//! | [`http`] | one HTTP exchange, byte for byte as the test wants it |
//! | [`proxy`] | a real reverse proxy in front of a node |
//! | [`raw`] | a WebSocket by hand: frames that no client library would send, reads that stop |
//! | [`pages`] | pages in Chromium, operated like a user |
//! | [`tls`] | certificates, and connections that trust them |
//! | [`token`] | tokens, valid and invalid |
//! | [`issuer`] | token issuers: keys, and a server of key sets |
//! | [`samples`] | the samples of `/metrics` |
//! | [`witness`] | a healthy client that counts while others misbehave |

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

/// The bound of any single wait. It is far beyond what anything takes on a busy machine: a test that reaches
/// it has failed.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A file of this package, by its path relative to `tests/`.
pub fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
