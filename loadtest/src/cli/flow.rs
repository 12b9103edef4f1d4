//! The flags of the scenarios about Redis and about many rooms.

use std::{path::PathBuf, str::FromStr};

use clap::Args;

use super::{Common, Time, size};
use crate::target::TargetArgs;

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Intake {
    /// Rooms that publications go to in turn; each has one member
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub rooms: u32,
    /// Rooms that each client is in, on one connection; Centrifuge only; --rooms must be a multiple of it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rooms_per_client: u32,
    /// Consecutive publications to the same room
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub burst: u32,
    /// Connections of the bare subscriber: as many as the server has to Redis
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub subscribers: u32,
    /// Pin the bare subscriber to this CPU: the one the server is pinned to
    #[arg(long)]
    pub server_cpu: Option<usize>,
    #[command(flatten)]
    pub flow: Flow,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Publish {
    /// Clients that publish
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub sessions: u32,
    /// Rooms that they publish to, distributed evenly
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub rooms: u32,
    /// Publications that a client sends in a row before the next client's turn
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub burst: u32,
    #[command(flatten)]
    pub flow: Flow,
}

/// The flags that both scenarios share.
#[derive(Clone, Debug, Args)]
pub struct Flow {
    /// The Redis that the server uses
    #[arg(long, default_value = "redis://127.0.0.1:6379")]
    pub redis: String,
    /// Publications per round
    #[arg(long, default_value_t = 500_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub messages: u64,
    /// Bytes of payload per publication
    #[arg(long, default_value_t = 64, value_parser = size)]
    pub size: usize,
    /// Publications that may be in flight at once
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub window: u64,
    /// Measured rounds of each kind
    #[arg(long, default_value_t = 5)]
    pub rounds: u32,
    /// Publications of an unmeasured round before the first [default: a tenth of a round]
    #[arg(long)]
    pub warmup: Option<u64>,
    /// Give up missing publications when nothing has arrived for this long
    #[arg(long, default_value = "5s")]
    pub patience: Time,
    /// The server's process, to measure its CPU; several separated by commas
    #[arg(long, value_delimiter = ',')]
    pub server_pid: Vec<u32>,
    /// Fail if more publications than this are missing, or any arrived twice, out of order or altered
    #[arg(long)]
    pub expect_lost: Option<u64>,
    /// Fail if the rate is less than this many times the rate without a server; with --expect-per-core,
    /// either is enough
    #[arg(long)]
    pub expect_ratio: Option<f64>,
    /// Fail if the server takes fewer publications per second of its CPU time; with --expect-ratio, either is
    /// enough
    #[arg(long)]
    pub expect_per_core: Option<f64>,
    #[command(flatten)]
    pub target: TargetArgs,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct CompareRooms {
    /// Clients; each is in --rooms-per-client big rooms and in as many small rooms of its own
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub connections: u32,
    /// Big rooms that every client is in, and small rooms that each client has alone
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rooms_per_client: u32,
    /// Deliveries to each client in a round
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    pub messages: u32,
    /// Deliveries to each client that arrive together, each in another room
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub burst: u32,
    /// Bytes of payload per message
    #[arg(long, default_value_t = 256, value_parser = size)]
    pub size: usize,
    /// Measured rounds of each kind
    #[arg(long, default_value_t = 5)]
    pub rounds: u32,
    /// Give up missing deliveries when nothing has arrived for this long
    #[arg(long, default_value = "5s")]
    pub patience: Time,
    /// The server's process, to measure its CPU and memory; several separated by commas
    #[arg(long, value_delimiter = ',', required = true)]
    pub server_pid: Vec<u32>,
    /// Fail if more deliveries than this are missing, or any arrived twice, out of order or altered
    #[arg(long)]
    pub expect_lost: Option<u64>,
    /// Fail if a delivery in small rooms costs more than this many times the CPU of one in big rooms
    #[arg(long)]
    pub expect_ratio: Option<f64>,
    /// Fail if a room with its member costs more resident bytes of the server than this
    #[arg(long)]
    pub expect_bytes: Option<f64>,
    #[command(flatten)]
    pub target: TargetArgs,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Resubscribe {
    /// Clients of the node
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub connections: u32,
    /// Rooms of each client's own; the number of topics is this times --connections
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rooms_per_client: u32,
    /// How long Redis is down
    #[arg(long, default_value = "500ms")]
    pub outage: Time,
    /// Publications per second to rooms that are back
    #[arg(long, default_value_t = 1000.0, value_parser = super::rate)]
    pub rate: f64,
    /// How long publications are measured undisturbed before each restart
    #[arg(long, default_value = "2s")]
    pub peace: Time,
    /// How often Redis is restarted
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Give up the run if the rooms are not back after this time
    #[arg(long, default_value = "60s")]
    pub patience: Time,
    /// The gateway's program [default: tidegate, beside this program]
    #[arg(long)]
    pub tidegate: Option<PathBuf>,
    /// Pin the gateway to this CPU
    #[arg(long)]
    pub server_cpu: Option<usize>,
    /// Fail if the median time until all topics are back is longer than this
    #[arg(long)]
    pub expect_back: Option<Time>,
    /// Fail if p99 in rooms that are back is more than this many times the undisturbed p99
    #[arg(long)]
    pub expect_p99_ratio: Option<f64>,
    /// Fail if more publications to rooms that are back than this are missing, or any arrived twice
    #[arg(long)]
    pub expect_lost: Option<u64>,
    #[command(flatten)]
    pub common: Common,
}

/// The process that receives from Redis and only counts.
#[derive(Clone, Debug, Args)]
pub struct TapServer {
    #[arg(long)]
    pub rooms: u32,
    #[arg(long)]
    pub connections: u32,
    #[arg(long)]
    pub cpu: Option<usize>,
    #[arg(long)]
    pub verify: Option<Verify>,
}

/// Run, publishers and size: what a bare subscriber verifies.
#[derive(Clone, Copy, Debug)]
pub struct Verify(pub [u32; 3]);

impl FromStr for Verify {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let numbers: Result<Vec<u32>, _> = text.split(',').map(str::parse).collect();
        let numbers = numbers.ok().and_then(|numbers| numbers.try_into().ok());
        numbers.map(Self).ok_or("expected run,publishers,size")
    }
}
