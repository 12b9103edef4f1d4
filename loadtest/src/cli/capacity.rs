//! The flags of `capacity`: the load, the nodes, and the unit costs.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::capacity::UnitCosts;

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Capacity {
    /// Connections of the whole fleet; several separated by commas, for a column each
    #[arg(long, value_delimiter = ',', default_value = "10000", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub connections: Vec<u64>,
    #[command(flatten)]
    pub load: Load,
    #[command(flatten)]
    pub fleet: Fleet,
    #[command(flatten)]
    pub costs: UnitCosts,
    /// Read flags from a TOML file, by their names; flags on the command line win
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Write the result as JSON to this file
    #[arg(long)]
    pub json: Option<PathBuf>,
}

/// The load on the fleet, for any number of connections.
#[derive(Clone, Debug, Args, Serialize)]
pub struct Load {
    /// Members of a room
    #[arg(long, default_value_t = 100.0, value_parser = at_least_one, conflicts_with = "rooms")]
    pub members: f64,
    /// Rooms of the whole fleet, instead of --members
    #[arg(long, value_parser = at_least_one)]
    pub rooms: Option<f64>,
    /// Rooms that each connection is in
    #[arg(long, default_value_t = 1.0, value_parser = at_least_one)]
    pub rooms_per_connection: f64,
    /// Publications per second in each room
    #[arg(long, default_value_t = 1.0, value_parser = rate, conflicts_with = "rate")]
    pub room_rate: f64,
    /// Publications per second in all rooms together, instead of the rate per room
    #[arg(long, value_parser = rate)]
    pub rate: Option<f64>,
    /// Bytes of payload per publication
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(0..=16 * 1024 * 1024))]
    pub size: u32,
    /// Publications of a room that arrive together and so share a write
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub burst: u32,
    /// Fraction of the publications that clients send; backends publish the others directly to Redis
    #[arg(long, default_value_t = 0.0, value_parser = part)]
    pub from_clients: f64,
    /// The protocol of the clients
    #[arg(long, value_enum, default_value_t = Spoken::Plain)]
    pub protocol: Spoken,
    /// The nodes terminate TLS themselves
    #[arg(long)]
    pub tls: bool,
    /// Clients and nodes use permessage-deflate (compression.enabled)
    #[arg(long)]
    pub deflate: bool,
    /// Fraction of the connections that do not keep up and fill their outbound queue
    #[arg(long, default_value_t = 0.001, value_parser = part)]
    pub slow: f64,
}

/// The protocol of the clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Spoken {
    /// A `WebSocket` whose frames are the messages
    Plain,
    /// The Centrifuge protocol in JSON, over a `WebSocket`
    Centrifuge,
    /// Server-sent events
    Sse,
}

/// The size of a node, and how much of it may be used.
#[derive(Clone, Debug, Args, Serialize)]
pub struct Fleet {
    /// Cores of a node
    #[arg(long, default_value_t = 4.0, value_parser = positive)]
    pub node_cores: f64,
    /// GiB of memory of a node
    #[arg(long, default_value_t = 8.0, value_parser = positive)]
    pub node_memory: f64,
    /// Connections of a node: limits.connections
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub node_connections: u32,
    /// Gbit/s that a node, and Redis, can send
    #[arg(long, default_value_t = 10.0, value_parser = positive)]
    pub bandwidth: f64,
    /// Nodes that may fail, or be replaced by a rollout, without overloading the others
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub spare: u32,
    /// Maximum utilisation of cores and bandwidth, of nodes and of Redis, while these nodes are missing
    #[arg(long, default_value_t = 0.6, value_parser = share)]
    pub utilisation: f64,
    /// Maximum utilisation of memory while these nodes are missing
    #[arg(long, default_value_t = 0.75, value_parser = share)]
    pub memory_utilisation: f64,
    /// Bytes that may wait for one session: limits.outbound
    #[arg(long, default_value_t = 1024 * 1024)]
    pub outbound: u32,
    /// New connections per second that a node accepts: limits.accepts
    #[arg(long, default_value_t = 10_000.0, value_parser = positive)]
    pub accepts: f64,
    /// Connections on which a node receives from Redis: broker.subscribers [default: one per core, at most 8]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub subscribers: Option<u32>,
    /// Connections on which a node publishes to Redis: broker.publishers [default: one per core, at most 8]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub publishers: Option<u32>,
}

impl Fleet {
    /// How many connections a node receives on.
    pub fn subscribers(&self) -> f64 {
        self.one_per_core(self.subscribers)
    }

    /// How many connections a node publishes on.
    pub fn publishers(&self) -> f64 {
        self.one_per_core(self.publishers)
    }

    /// The number of connections of a node with one shard per core: no shard uses more than one, and by default there
    /// are no more than eight.
    fn one_per_core(&self, configured: Option<u32>) -> f64 {
        f64::from(configured.unwrap_or(8)).min(self.node_cores.ceil())
    }
}

fn number(text: &str, range: impl std::ops::RangeBounds<f64>, expected: &str) -> Result<f64, String> {
    text.parse().ok().filter(|number| range.contains(number)).ok_or_else(|| format!("expected {expected}"))
}

fn at_least_one(text: &str) -> Result<f64, String> {
    number(text, 1.0..=1e9, "a number from 1 to 1000000000")
}

fn rate(text: &str) -> Result<f64, String> {
    number(text, 0.0..=1e9, "a number from 0 to 1000000000, per second")
}

fn positive(text: &str) -> Result<f64, String> {
    number(text, 0.001..=1e7, "a number from 0.001 to 10000000")
}

fn part(text: &str) -> Result<f64, String> {
    number(text, 0.0..=1.0, "a fraction from 0 to 1")
}

fn share(text: &str) -> Result<f64, String> {
    number(text, 0.01..=0.95, "a fraction from 0.01 to 0.95")
}
