//! Behaviour visible from outside: real nodes, a real Redis, real clients.
//!
//! One file per theme. Every scenario has its own Redis, nodes and clients; they run in parallel.

mod access;
mod addresses;
mod autobahn;
mod backends;
mod bad_input;
mod centrifuge;
mod commands;
mod compression;
mod cookies;
mod crowd;
mod descriptors;
mod doors;
mod endurance;
mod event_streams;
mod fault_table;
mod faults;
mod first_run;
mod forgery;
mod haproxy;
mod heartbeat;
mod idempotency;
mod idle_timeouts;
mod interruptions;
mod junk;
mod keys;
mod leaving;
mod limits;
mod log;
mod memory;
mod metrics;
mod ndjson;
mod outgoing;
mod overflow;
mod pace;
mod parting;
mod rebalance;
mod reload;
mod rooms;
mod shards;
mod slow;
mod smuggling;
mod spine;
mod stage;
mod tls;
