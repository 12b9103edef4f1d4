//! The flags of the limit through Redis and of its comparison with the gateway.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{Common, Time, rate, size};

/// What clients of the gateway speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Speech {
    /// A `WebSocket` whose text frames are the messages
    Plain,
    /// The Centrifuge protocol in JSON
    Centrifuge,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Relay {
    /// Bytes that the relay adds to every message, as the envelope of a protocol
    #[arg(long, default_value_t = 0)]
    pub envelope: u16,
    /// Bytes of payload with which the relay answers every publication; 0 for no answer
    #[arg(long, default_value_t = 0)]
    pub answer: u16,
    #[command(flatten)]
    pub small: SmallRooms,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct CompareRelay {
    /// The gateway's program, or several separated by commas, such as an old and a new one
    /// [default: tidegate, beside this program]
    #[arg(long, value_delimiter = ',')]
    pub tidegate: Vec<PathBuf>,
    /// A setting of the gateway, as its own --set; repeatable
    #[arg(long)]
    pub set: Vec<String>,
    /// What the gateway's clients speak; the relay sends as many bytes
    #[arg(long, value_enum, default_value_t = Speech::Plain)]
    pub protocol: Speech,
    /// Fail if a delivery costs the gateway more than this many times the relay's CPU, at any rate
    #[arg(long)]
    pub expect_ratio: Option<f64>,
    /// Fail if the gateway's median latency is more than this many times the relay's, at any rate
    #[arg(long)]
    pub expect_p50_ratio: Option<f64>,
    #[command(flatten)]
    pub small: SmallRooms,
}

/// Many small rooms, each with a publisher, at several rates.
#[derive(Clone, Debug, Args)]
pub struct SmallRooms {
    /// Number of rooms
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub rooms: u32,
    /// Clients that receive, in each room; one more publishes and does not receive
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    pub members: u32,
    /// Messages per second, over all rooms together; each rate is measured
    #[arg(long, value_delimiter = ',', default_value = "2000,5000,10000,20000,30000", value_parser = rate)]
    pub rates: Vec<f64>,
    /// How long messages are published in a round
    #[arg(long, default_value = "4s")]
    pub duration: Time,
    /// Bytes of payload per message
    #[arg(long, default_value_t = 256, value_parser = size)]
    pub size: usize,
    /// Send a publisher its own messages too, as plain clients ask for by default
    #[arg(long)]
    pub echo: bool,
    /// Measured rounds at each rate
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// How long messages are published in the unmeasured round before the first
    #[arg(long, default_value = "1s")]
    pub warmup: Time,
    /// Also count the server's system calls, by `perf`, in one more round at each rate
    #[arg(long)]
    pub syscalls: bool,
    /// Give up missing messages when nothing has arrived for this long
    #[arg(long, default_value = "2s")]
    pub patience: Time,
    /// Pin the relay and the gateway to this CPU; Redis runs on --client-cpu
    #[arg(long)]
    pub server_cpu: Option<usize>,
    /// Spread clients over this many source addresses (127.0.0.2 and up)
    #[arg(long, default_value_t = 16)]
    pub addresses: u8,
    /// Fail if more deliveries than this are missing, or any arrived twice, out of order or altered
    #[arg(long)]
    pub expect_lost: Option<u64>,
    #[command(flatten)]
    pub common: Common,
}

/// The process that `relay` measures.
#[derive(Clone, Debug, Args)]
pub struct RelayServer {
    #[arg(long)]
    pub clients: u32,
    #[arg(long)]
    pub envelope: usize,
    #[arg(long)]
    pub answer: usize,
    #[arg(long)]
    pub cpu: Option<usize>,
}
