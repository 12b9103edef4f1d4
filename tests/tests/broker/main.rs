//! The Redis broker against real servers: its contract, and its behaviour under failures.
//!
//! - `conformance`: the suite that every broker runs, over TCP and over a Unix socket
//! - `connections`: pub/sub connections that are lost, stuck, blackholed, or not there yet
//! - `health`: connections that answer but are useless, and errors that are not faults
//! - `publishing`: what happens to publications when their connection fails
//! - `requests`: many requests at once, on connections that are lost, at servers that have been demoted
//! - `history`: rooms with history: what a log survives, and what is told when it does not
//! - `outcomes`: publications into such rooms whose answer is lost
//! - `access`: TLS, users, permissions, and that secrets are never logged
//! - `payloads`: raw messages and sizes
//! - `functions`: the library of functions in Redis
//! - `loading`: how that gets there
//! - `reigns`: its positions across restarts, failovers, deleted logs and clocks

mod access;
mod conformance;
mod connections;
mod functions;
mod health;
mod history;
mod loading;
mod outcomes;
mod payloads;
mod publishing;
mod reigns;
mod requests;
mod stage;
