//! The flags of the scenarios with a steady rate and of those about connections.

use std::path::PathBuf;

use clap::Args;

use super::{Time, rate, size};
use crate::{payload::Payload, target::TargetArgs};

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Fanout {
    /// Clients that receive
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub members: u32,
    #[command(flatten)]
    pub target: TargetArgs,
    #[command(flatten)]
    pub pace: Pace,
    #[command(flatten)]
    pub run: Run,
    #[command(flatten)]
    pub expect: Expect,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
#[expect(clippy::struct_field_names, reason = "a field's name is its flag")]
pub struct Rooms {
    /// Number of rooms
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub rooms: u32,
    /// Clients that receive, in each room
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub members: u32,
    /// Rooms that each client is in, on one connection; Centrifuge only; --rooms must be a multiple of it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rooms_per_client: u32,
    #[command(flatten)]
    pub target: TargetArgs,
    #[command(flatten)]
    pub pace: Pace,
    #[command(flatten)]
    pub run: Run,
    #[command(flatten)]
    pub expect: Expect,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Chat {
    /// Number of rooms
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub rooms: u32,
    /// Clients in each room; they publish in turn, and all receive
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub members: u32,
    #[command(flatten)]
    pub target: TargetArgs,
    #[command(flatten)]
    pub pace: Pace,
    #[command(flatten)]
    pub run: Run,
    #[command(flatten)]
    pub expect: Expect,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Slow {
    /// Clients that receive and are measured
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub members: u32,
    /// Clients of the same room that stop reading after half of --duration
    #[arg(long, default_value_t = 10)]
    pub stalled: u32,
    /// Fail if the p99 of the other clients grows to more than this many times its earlier value
    #[arg(long)]
    pub expect_p99_ratio: Option<f64>,
    /// URL of the server's metrics in Prometheus format, to report the most bytes held for the stalled
    /// clients
    #[arg(long)]
    pub metrics: Option<crate::probe::Url>,
    /// The metric that counts the bytes waiting in the server's queues
    #[arg(long, default_value = "tidegate_outbound_bytes")]
    pub metric: String,
    #[command(flatten)]
    pub target: TargetArgs,
    #[command(flatten)]
    pub pace: Pace,
    #[command(flatten)]
    pub run: Run,
    #[command(flatten)]
    pub expect: Expect,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Mixed {
    /// A group of clients, as words like "name=big members=500 rate=20"; repeatable; in a file, tables named
    /// "group". [default: a big room, many small ones, a chat, idle clients, and visitors that come and go]
    #[arg(long)]
    pub group: Vec<String>,
    #[command(flatten)]
    pub target: TargetArgs,
    #[command(flatten)]
    pub pace: Pace,
    #[command(flatten)]
    pub run: Run,
    #[command(flatten)]
    pub expect: Expect,
}

/// The flags of a group of `mixed`. Unset ones come from the command's own flags.
#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct GroupArgs {
    /// Name of the group in the report
    #[arg(long)]
    pub name: Option<String>,
    /// Number of rooms
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub rooms: u32,
    /// Clients that receive, in each room
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub members: u32,
    /// Who publishes: one (per room), members (in turn), nobody
    #[arg(long, value_enum, default_value_t = Publishers::One)]
    pub publishers: Publishers,
    /// Messages per second, over all rooms of the group
    #[arg(long, value_parser = rate)]
    pub rate: Option<f64>,
    /// Bytes of payload per message
    #[arg(long, value_parser = size)]
    pub size: Option<usize>,
    /// Messages published together
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub burst: Option<u64>,
    /// Maximum number of messages
    #[arg(long)]
    pub messages: Option<u64>,
    /// Additional clients that come and go, over all rooms of the group
    #[arg(long, default_value_t = 0)]
    pub visitors: u32,
    /// How many of them leave and come back per second
    #[arg(long, default_value_t = 0.0)]
    pub churn: f64,
    /// URL of this group, instead of the command's
    #[arg(long)]
    pub url: Option<String>,
    /// Protocol of this group, instead of the command's
    #[arg(long, value_enum)]
    pub protocol: Option<crate::target::Protocol>,
    /// Channels of this group, instead of the command's
    #[arg(long)]
    pub channel: Option<String>,
    /// How this group publishes, instead of the command's --publish
    #[arg(long)]
    pub publish: Option<crate::target::PublishArg>,
}

/// Who publishes in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Publishers {
    /// One publisher for each room, as set by `--publish`
    One,
    /// Every member, in turn
    Members,
    /// No publishers
    Nobody,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Storm {
    /// Connections per wave
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..))]
    pub connections: u32,
    /// Number of waves; after each, all connections are dropped at once
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub waves: u32,
    /// Rooms that they join in turn
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub rooms: u32,
    /// Connections that may be in progress at once, in each process
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=16384))]
    pub at_once: u32,
    /// How long a complete wave stays before it is dropped
    #[arg(long, default_value = "1s")]
    pub hold: Time,
    /// Fail if more connections than this were refused or failed, over all waves
    #[arg(long)]
    pub expect_refused: Option<u64>,
    /// Fail if the p99 of the time to connect is longer than this
    #[arg(long)]
    pub expect_connect_p99: Option<Time>,
    #[command(flatten)]
    pub target: TargetArgs,
    #[command(flatten)]
    pub run: Run,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Handshakes {
    /// Pin the loop of handshakes to this CPU
    #[arg(long)]
    pub server_cpu: Option<usize>,
    /// Connections per wave
    #[arg(long, default_value_t = 4000, value_parser = clap::value_parser!(u32).range(1..))]
    pub connections: u32,
    /// Number of waves; after each, all connections are dropped at once
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub waves: u32,
    /// Connections that may be in progress at once, in each process
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=16384))]
    pub at_once: u32,
    /// How long a complete wave stays before it is dropped
    #[arg(long, default_value = "0s")]
    pub hold: Time,
    /// Spread clients over this many source addresses (127.0.0.2 and up)
    #[arg(long, default_value_t = 16)]
    pub addresses: u8,
    #[command(flatten)]
    pub run: Run,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Heartbeats {
    /// Pin the bare loop to this CPU
    #[arg(long)]
    pub server_cpu: Option<usize>,
    /// Numbers of connections to hold, ascending; each level is measured
    #[arg(long, value_delimiter = ',', default_value = "3000,15000")]
    pub connections: Vec<u32>,
    /// How often each connection is pinged
    #[arg(long, default_value = "25s")]
    pub interval: Time,
    /// How long idle CPU is measured at each level
    #[arg(long, default_value = "10s")]
    pub window: Time,
    /// Use TLS 1.3
    #[arg(long)]
    pub tls: bool,
    /// Spread clients over this many source addresses (127.0.0.2 and up)
    #[arg(long, default_value_t = 16)]
    pub addresses: u8,
    #[command(flatten)]
    pub run: Run,
}

#[derive(Clone, Debug, Args)]
pub struct HeartbeatServer {
    #[arg(long)]
    pub cert: Option<PathBuf>,
    #[arg(long)]
    pub key: Option<PathBuf>,
    #[arg(long)]
    pub connections: u32,
    #[arg(long)]
    pub interval: Time,
    #[arg(long)]
    pub cpu: Option<usize>,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Idle {
    /// Numbers of connections to hold, ascending; each level is measured
    #[arg(long, value_delimiter = ',', default_value = "3000,15000")]
    pub connections: Vec<u32>,
    /// Rooms that they join in turn
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub rooms: u32,
    /// How long idle CPU is measured at each level
    #[arg(long, default_value = "10s")]
    pub window: Time,
    /// Fail if a connection costs more resident bytes of the server than this
    #[arg(long)]
    pub expect_bytes: Option<f64>,
    #[command(flatten)]
    pub target: TargetArgs,
    #[command(flatten)]
    pub run: Run,
}

/// What is published, and when.
#[derive(Clone, Debug, Args)]
pub struct Pace {
    /// Messages per second, over all rooms together
    #[arg(long, default_value_t = 30.0, value_parser = rate)]
    pub rate: f64,
    /// How long messages are published
    #[arg(long, default_value = "10s")]
    pub duration: Time,
    /// Maximum number of messages
    #[arg(long)]
    pub messages: Option<u64>,
    /// Bytes of payload per message
    #[arg(long, default_value_t = 256, value_parser = size)]
    pub size: usize,
    /// Content of messages
    #[arg(long, value_enum, default_value_t = Payload::Dots)]
    pub payload: Payload,
    /// Messages published together
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub burst: u64,
    /// The server does not send a client its own publications
    #[arg(long)]
    pub no_echo: bool,
}

/// How to carry out a run, and where its report goes.
#[derive(Clone, Debug, Args)]
pub struct Run {
    /// Read flags from a TOML file, by their names; flags on the command line win
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Open connections evenly over this time instead of as fast as possible
    #[arg(long, default_value = "0s")]
    pub ramp: Time,
    /// Give up missing messages when nothing has arrived for this long
    #[arg(long, default_value = "2s")]
    pub patience: Time,
    /// Processes to spread clients over; each holds as many as its limit of open descriptors allows
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub processes: u32,
    /// The server's process, to measure its CPU and memory; several separated by commas
    #[arg(long, value_delimiter = ',')]
    pub server_pid: Vec<u32>,
    /// Pin the tester's processes to one CPU
    #[arg(long)]
    pub client_cpu: Option<usize>,
    /// End the run after this time, with the report so far
    #[arg(long, default_value = "600s")]
    pub time_limit: Time,
    /// Write the report as JSON to this file
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Write the report as an HTML page with plots to this file
    #[arg(long)]
    pub html: Option<PathBuf>,
    /// Show no progress line
    #[arg(long)]
    pub quiet: bool,
}

/// Conditions for exit code 0.
#[derive(Clone, Debug, Default, Args)]
#[expect(clippy::struct_field_names, reason = "a field's name is its flag")]
pub struct Expect {
    /// Fail if more deliveries than this are missing, or any arrived twice, out of order or altered
    #[arg(long)]
    pub expect_lost: Option<u64>,
    /// Fail if the median latency is above this
    #[arg(long)]
    pub expect_p50: Option<Time>,
    /// Fail if the 99th percentile of latency is above this
    #[arg(long)]
    pub expect_p99: Option<Time>,
    /// Fail if the 99.9th percentile of latency is above this
    #[arg(long)]
    pub expect_p999: Option<Time>,
    /// Fail if the longest latency is above this
    #[arg(long)]
    pub expect_max: Option<Time>,
    /// Fail if less than this fraction of the offered rate was achieved, such as 0.99
    #[arg(long)]
    pub expect_achieved: Option<f64>,
}
