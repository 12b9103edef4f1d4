//! What the scenarios with a steady rate, and those about connections, may be told.

use std::path::PathBuf;

use clap::Args;

use super::{Time, rate, size};
use crate::{payload::Payload, target::TargetArgs};

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Fanout {
    /// Clients that listen
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
    /// How many rooms
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub rooms: u32,
    /// Clients that listen, in each room
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub members: u32,
    /// How many rooms each client is in, on one connection; Centrifuge only; --rooms is a multiple of it
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
    /// How many rooms
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub rooms: u32,
    /// Clients in each room; they publish in turn, and everybody listens
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
    /// Clients that listen and are measured
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub members: u32,
    /// Clients of the same room that stop reading when half of --duration is over
    #[arg(long, default_value_t = 10)]
    pub stalled: u32,
    /// Fail if the others' p99 grows to more than this many times what it was
    #[arg(long)]
    pub expect_p99_ratio: Option<f64>,
    /// The server's metrics in Prometheus' format: how much it holds for the stalled, the most at any time
    #[arg(long)]
    pub metrics: Option<crate::probe::Url>,
    /// The metric that says how many bytes wait in the server's queues
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
    /// One group of clients: words like "name=big members=500 rate=20"; repeatable; in a file, tables called "group".
    /// [default: a big room, many small ones, a chat, idle clients, and visitors that come and go]
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

/// What a group of `mixed` may be told; what it is not told comes from the command's own flags.
#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct GroupArgs {
    /// Its name in the report
    #[arg(long)]
    pub name: Option<String>,
    /// How many rooms
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub rooms: u32,
    /// Clients that listen, in each room
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub members: u32,
    /// Who publishes: one (per room), members (in turn), nobody
    #[arg(long, value_enum, default_value_t = Publishers::One)]
    pub publishers: Publishers,
    /// Messages per second, over all its rooms
    #[arg(long, value_parser = rate)]
    pub rate: Option<f64>,
    /// Bytes of payload per message
    #[arg(long, value_parser = size)]
    pub size: Option<usize>,
    /// Messages published together
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub burst: Option<u64>,
    /// At most so many messages
    #[arg(long)]
    pub messages: Option<u64>,
    /// Further clients, in all its rooms together, that come and go
    #[arg(long, default_value_t = 0)]
    pub visitors: u32,
    /// How many of them leave and come back per second
    #[arg(long, default_value_t = 0.0)]
    pub churn: f64,
    /// Another URL than the command's
    #[arg(long)]
    pub url: Option<String>,
    /// Another protocol than the command's
    #[arg(long, value_enum)]
    pub protocol: Option<crate::target::Protocol>,
    /// Other channels than the command's
    #[arg(long)]
    pub channel: Option<String>,
    /// Another way to publish than the command's
    #[arg(long)]
    pub publish: Option<crate::target::PublishArg>,
}

/// Who publishes in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Publishers {
    /// One for each room, as `--publish` says
    One,
    /// Every member, in turn
    Members,
    /// Nobody
    Nobody,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Storm {
    /// Connections of a wave
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..))]
    pub connections: u32,
    /// How many times everybody comes; in between all are dropped at once
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub waves: u32,
    /// Rooms that they join in turn
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub rooms: u32,
    /// How many connections may be on their way at once, in each process
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=16384))]
    pub at_once: u32,
    /// How long everybody stays before all are dropped
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
    /// Connections of a wave
    #[arg(long, default_value_t = 4000, value_parser = clap::value_parser!(u32).range(1..))]
    pub connections: u32,
    /// How many times everybody comes; in between all are dropped at once
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub waves: u32,
    /// How many connections may be on their way at once, in each process
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=16384))]
    pub at_once: u32,
    /// How long everybody stays before all are dropped
    #[arg(long, default_value = "0s")]
    pub hold: Time,
    /// Over how many addresses (127.0.0.2 and up) clients are spread
    #[arg(long, default_value_t = 16)]
    pub addresses: u8,
    #[command(flatten)]
    pub run: Run,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Idle {
    /// How many connections to hold, ascending; measured at each
    #[arg(long, value_delimiter = ',', default_value = "3000,15000")]
    pub connections: Vec<u32>,
    /// Rooms that they join in turn
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub rooms: u32,
    /// Over how long idle CPU is measured, at each level
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
    /// At most so many messages
    #[arg(long)]
    pub messages: Option<u64>,
    /// Bytes of payload per message
    #[arg(long, default_value_t = 256, value_parser = size)]
    pub size: usize,
    /// What messages are made of
    #[arg(long, value_enum, default_value_t = Payload::Dots)]
    pub payload: Payload,
    /// Messages published together
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub burst: u64,
    /// The server does not send a client what it has published itself
    #[arg(long)]
    pub no_echo: bool,
}

/// How a run is carried out and where its report goes.
#[derive(Clone, Debug, Args)]
pub struct Run {
    /// Flags from a TOML file, by their names; those on the command line win
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Open connections evenly over this time in place of as fast as they come
    #[arg(long, default_value = "0s")]
    pub ramp: Time,
    /// How long nothing may arrive before what is missing is given up
    #[arg(long, default_value = "2s")]
    pub patience: Time,
    /// Processes that clients are spread over; each holds as many as it may open descriptors
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub processes: u32,
    /// The server's process, to measure its CPU and memory; several with commas
    #[arg(long, value_delimiter = ',')]
    pub server_pid: Vec<u32>,
    /// Pin the tester's processes to one CPU
    #[arg(long)]
    pub client_cpu: Option<usize>,
    /// After this time the run ends with the report so far
    #[arg(long, default_value = "600s")]
    pub time_limit: Time,
    /// Write the report as JSON to this file
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Write the report as a page with plots to this file
    #[arg(long)]
    pub html: Option<PathBuf>,
    /// Show no live progress
    #[arg(long)]
    pub quiet: bool,
}

/// What must hold for the exit code to be 0.
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
    /// Fail if less than this part of the offered rate was achieved, such as 0.99
    #[arg(long)]
    pub expect_achieved: Option<f64>,
}
