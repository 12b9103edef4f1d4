//! The flags of the scenarios about rooms with a history.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{Common, Time, rate, size};
use crate::target::Protocol;

/// The protocols in which a client knows its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Follower {
    /// Server-sent events with `Last-Event-ID`
    Sse,
    /// The subprotocol `tidegate.json` with `?since=`
    Json,
    /// The Centrifuge protocol with recovery
    Centrifuge,
}

/// The servers that these scenarios start, and their messages.
#[derive(Clone, Debug, Args)]
pub struct Stage {
    /// Messages that a room keeps; 0: rooms have no history
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(..=10_000))]
    pub history_size: u32,
    /// Bytes of payload per message
    #[arg(long, default_value_t = 64, value_parser = size)]
    pub size: usize,
    /// Give up missing messages when nothing has arrived for this long
    #[arg(long, default_value = "5s")]
    pub patience: Time,
    /// The gateway's program [default: tidegate, beside this program]
    #[arg(long)]
    pub tidegate: Option<PathBuf>,
    /// Pin what is measured to this CPU: the nodes, or for `history` Redis
    #[arg(long)]
    pub server_cpu: Option<usize>,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Jitter {
    /// Clients
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
    pub clients: u32,
    /// Their protocols, in turn
    #[arg(long, value_enum, value_delimiter = ',', default_value = "sse,json")]
    pub protocols: Vec<Follower>,
    /// Nodes; a client that comes back chooses any
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub nodes: u32,
    /// Rooms; each client is in one
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub rooms: u32,
    /// Messages per second, in all rooms together
    #[arg(long, default_value_t = 200.0, value_parser = rate)]
    pub rate: f64,
    /// How long clients come and go
    #[arg(long, default_value = "30s")]
    pub duration: Time,
    /// How long a client stays connected on average: from half of this to one and a half
    #[arg(long, default_value = "5s")]
    pub up: Time,
    /// How long it is away on average: from half of this to one and a half
    #[arg(long, default_value = "2s")]
    pub down: Time,
    /// Fail if p99 from a client's return until it has caught up is longer than this
    #[arg(long)]
    pub expect_p99: Option<Time>,
    #[command(flatten)]
    pub stage: Stage,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Resume {
    /// Clients that come back at once
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub clients: u32,
    /// Their protocol
    #[arg(long, value_enum, default_value_t = Follower::Json)]
    pub protocol: Follower,
    /// Rooms that they are in: one room for all, or one for each client
    #[arg(long, value_delimiter = ',', value_enum, default_value = "one,each")]
    pub rooms: Vec<Sharing>,
    /// Where the missed messages come from: the memory of the node that they were connected to, or the log,
    /// because they come back to a new node
    #[arg(long, value_delimiter = ',', value_enum, default_value = "memory,log")]
    pub from: Vec<Source>,
    /// Messages that each client has missed
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(..=1000))]
    pub missed: u32,
    /// Rounds of each kind
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Fail if a client that comes back to the node's memory costs more µs of CPU beyond a plain connect
    #[arg(long)]
    pub expect_cpu: Option<f64>,
    /// Fail if the log is read more often than this for each room and node
    #[arg(long)]
    pub expect_reads: Option<f64>,
    #[command(flatten)]
    pub stage: Stage,
}

/// How clients share rooms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sharing {
    One,
    Each,
}

/// Where missed messages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Source {
    Memory,
    Log,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct History {
    /// Numbers of rooms that publications go to in turn
    #[arg(long, value_delimiter = ',', default_value = "1,1000,100000",
          value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub rooms: Vec<u32>,
    /// Publications of each kind per round
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub messages: u64,
    /// Publications that may be in flight at once
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub window: u64,
    /// Measured rounds of each kind
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Fail if Redis records fewer publications per second of its CPU time, in any number of rooms
    #[arg(long)]
    pub expect_per_core: Option<f64>,
    #[command(flatten)]
    pub stage: Stage,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Outage {
    /// What is killed
    #[arg(long, value_delimiter = ',', value_enum, default_value = "redis,node")]
    pub kill: Vec<Victim>,
    /// Clients; half of them are on each of two nodes
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(2..))]
    pub clients: u32,
    /// Their protocols, in turn
    #[arg(long, value_enum, value_delimiter = ',', default_value = "sse,json")]
    pub protocols: Vec<Follower>,
    /// Rooms; each client is in one
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub rooms: u32,
    /// Messages per second, in all rooms together
    #[arg(long, default_value_t = 1000.0, value_parser = rate)]
    pub rate: f64,
    /// How long messages are published before and after
    #[arg(long, default_value = "2s")]
    pub peace: Time,
    /// How long Redis is down
    #[arg(long, default_value = "500ms")]
    pub down: Time,
    /// How often each is killed
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Fail if any client was without messages for longer than this
    #[arg(long)]
    pub expect_pause: Option<Time>,
    #[command(flatten)]
    pub stage: Stage,
}

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Victim {
    Redis,
    Node,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Repair {
    /// Clients of the node, with the Centrifuge protocol
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub connections: u32,
    /// Rooms of each client's own; the number of rooms is this times --connections
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rooms_per_client: u32,
    /// Interruptions
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Fail if the median time until all rooms are repaired is longer than this
    #[arg(long)]
    pub expect_repaired: Option<Time>,
    /// Fail if p99 of other commands to Redis meanwhile is longer than this, in any round
    #[arg(long)]
    pub expect_p99: Option<Time>,
    #[command(flatten)]
    pub stage: Stage,
}

impl From<Follower> for Protocol {
    fn from(follower: Follower) -> Self {
        match follower {
            Follower::Sse => Self::Sse,
            Follower::Json => Self::Json,
            Follower::Centrifuge => Self::Centrifuge,
        }
    }
}
