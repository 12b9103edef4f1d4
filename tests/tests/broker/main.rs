//! The Redis broker against real servers: its contract, and what it does when things fail.
//!
//! - `conformance`: the suite that every broker runs, over TCP and over a unix socket
//! - `connections`: pub/sub connections that are lost, wedged, blackholed, or not there yet
//! - `health`: connections that answer and are of no use, and errors that are no faults
//! - `publishing`: what becomes of publications when their connection fails
//! - `access`: TLS, users, permissions, and that no secret is shown
//! - `payloads`: raw messages and sizes

mod access;
mod conformance;
mod connections;
mod health;
mod payloads;
mod publishing;
mod stage;
