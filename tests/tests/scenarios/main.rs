//! What a stranger could see: real nodes, a real Redis, real clients.
//!
//! One file per theme. Every scenario has a Redis, nodes and clients of its own; they run side by side.

mod access;
mod autobahn;
mod bad_input;
mod centrifuge;
mod compression;
mod doors;
mod faults;
mod first_run;
mod heartbeat;
mod leaving;
mod metrics;
mod rooms;
mod slow;
mod spine;
mod stage;
