//! The command line.
//!
//! Owns the flags of every scenario and the syntax of their values. A TOML file uses the same names:
//! [`mod@file`] turns it into flags before they are parsed here.

pub mod capacity;
pub mod file;
pub mod flow;
pub mod history;
pub mod load;
pub mod relay;

use std::{path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, Command, CommandFactory, Parser, Subcommand};

pub use self::capacity::Capacity;
pub use self::load::{
    Chat, Fanout, Handshakes, HeartbeatServer, Heartbeats, Idle, Mixed, Rooms, Slow, Storm,
};
use crate::{
    budgets::list::{BUDGETS, Budget},
    compare::peer::Kind,
    exit,
    payload::{Payload, Shape},
    probe::Url,
    room::Load,
    stamp::Stamp,
    target::TargetArgs,
    websocket::MAX_PAYLOAD,
};

/// A load tester for `WebSocket` gateways that counts lost messages.
#[derive(Debug, Parser)]
#[command(name = "tidegate-loadtest", version, max_term_width = 100, args_override_self = true)]
pub struct Cli {
    #[command(subcommand)]
    pub scenario: Scenario,
}

/// The command line, with the exit codes in the help of every scenario.
pub fn command() -> Command {
    let plain = Cli::command();
    let names: Vec<String> = plain.get_subcommands().map(|scenario| scenario.get_name().to_owned()).collect();
    names.into_iter().fold(plain.after_help(exit::help()), |command, name| {
        command.mut_subcommand(name, |scenario| scenario.after_help(exit::help()))
    })
}

#[derive(Debug, Subcommand)]
pub enum Scenario {
    /// One room, many members, a steady rate: latency, throughput, and whether everything arrived
    Fanout(Fanout),
    /// Many rooms with a few members each
    Rooms(Rooms),
    /// Every client publishes
    Chat(Chat),
    /// Some members stop reading: how this affects the others
    Slow(Slow),
    /// Several of these at once, with clients that come and go
    Mixed(Mixed),
    /// Connect as fast as allowed, drop all connections, reconnect
    Storm(Storm),
    /// Hold idle connections: what one costs the server in memory and CPU
    Idle(Idle),
    /// What a delivery costs: rounds in which a batch waits until all members have the previous one
    Cost(Cost),
    /// The physical limit: a bare loop of send(2) over the same number of sockets
    Yardstick(Yardstick),
    /// The physical limit of TLS connects: a `storm` on a bare loop of rustls handshakes
    Handshakes(Handshakes),
    /// The physical limit of idle connections: an `idle` on a bare loop of ping and pong
    Heartbeats(Heartbeats),
    /// `cost` and `yardstick` in alternating rounds, and the ratio between them
    CompareLimit(CompareLimit),
    /// Many rooms of one member compared with a few big ones, same connections and deliveries: CPU and memory
    CompareRooms(flow::CompareRooms),
    /// How much a server takes out of Redis, compared with a bare subscriber
    Intake(flow::Intake),
    /// How much clients can publish into Redis, compared with a pipelined PUBLISH
    Publish(flow::Publish),
    /// The physical limit through Redis: a bare relay of messages between clients, in many small rooms
    Relay(relay::Relay),
    /// Tidegate on Redis and `relay` in alternating rounds, at several rates, and the ratios between them
    CompareRelay(relay::CompareRelay),
    /// Restart Redis under a node with many topics: how soon are they back?
    Resubscribe(flow::Resubscribe),
    /// Clients of rooms with a history that drop again and again: does each get everything, and how soon?
    Jitter(history::Jitter),
    /// All clients of rooms with a history come back at once: what that costs the node and Redis
    Resume(history::Resume),
    /// What recording a publication costs Redis, compared with PUBLISH and with a script that keeps a counter
    History(history::History),
    /// Kill Redis, or a node: how long is a client without messages?
    Outage(history::Outage),
    /// Interrupt a node with many rooms that have a history: how soon is each repaired?
    Repair(history::Repair),
    /// How long a server takes from its start until it is ready
    Start(Start),
    /// Measure the engine's budgets and compare each with its bound
    Budgets(Budgets),
    /// The same scenarios against Tidegate and other gateways, in alternating rounds of one session
    Compare(Compare),
    /// Nodes, memory, bandwidth and Redis capacity for a number of connections: arithmetic, no network
    Capacity(Capacity),
    /// The process that `yardstick` measures
    #[command(hide = true)]
    YardstickServer(YardstickServer),
    /// The bare subscriber that `intake` and `publish` compare with
    #[command(hide = true)]
    TapServer(flow::TapServer),
    /// The process that `relay` measures
    #[command(hide = true)]
    RelayServer(relay::RelayServer),
    /// The process that `handshakes` measures
    #[command(hide = true)]
    HandshakeServer(HandshakeServer),
    /// The process that `heartbeats` measures
    #[command(hide = true)]
    HeartbeatServer(HeartbeatServer),
    /// A process that holds clients for another scenario and takes orders on standard input
    #[command(hide = true)]
    Worker,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Cost {
    #[command(flatten)]
    pub target: TargetArgs,
    /// The server's process, to measure its CPU; several separated by commas
    #[arg(long, value_delimiter = ',')]
    pub server_pid: Vec<u32>,
    /// Fail if more deliveries than this are missing, or any arrived twice or out of order
    #[arg(long)]
    pub expect_lost: Option<u64>,
    #[command(flatten)]
    pub room: RoomArgs,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Yardstick {
    /// Pin the loop of send(2) to this CPU
    #[arg(long)]
    pub server_cpu: Option<usize>,
    /// Use one system call per message, even for messages of one batch
    #[arg(long)]
    pub per_message: bool,
    /// Run one round per line on standard input (its number of messages) and answer with a line of JSON
    #[arg(long, hide = true)]
    pub lockstep: bool,
    /// Spread members over this many source addresses (127.0.0.2 and up)
    #[arg(long, default_value_t = 16)]
    pub addresses: u8,
    #[command(flatten)]
    pub room: RoomArgs,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct CompareLimit {
    #[command(flatten)]
    pub cost: Cost,
    /// Pin the yardstick's loop to this CPU: the one the server is pinned to
    #[arg(long)]
    pub server_cpu: Option<usize>,
    /// Compare with one system call per message, even for messages of one batch
    #[arg(long)]
    pub per_message: bool,
    /// Fail if the server's CPU cost is more than this many times the yardstick's
    #[arg(long)]
    pub expect_ratio: Option<f64>,
    /// Fail if the server's median p99 is more than this many times the yardstick's; needs --rate
    #[arg(long, requires = "rate")]
    pub expect_p99_ratio: Option<f64>,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Compare {
    /// Servers to measure; those that are not installed are skipped with a message
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "tidegate,tidegate-redis,ws,socket-io,nchan"
    )]
    pub servers: Vec<Kind>,
    /// The gateway's program [default: tidegate, beside this program]
    #[arg(long)]
    pub tidegate: Option<PathBuf>,
    /// The directory with the scripts of the other gateways; run `npm ci` there to install what they need
    #[arg(long, default_value = "loadtest/compare")]
    pub scripts: PathBuf,
    /// Rounds of each measurement
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Members of the room
    #[arg(long, default_value_t = 1000)]
    pub members: usize,
    /// Messages per round
    #[arg(long, default_value_t = 400)]
    pub messages: u64,
    /// Messages per second when latency is measured
    #[arg(long, default_value_t = 30.0, value_parser = rate)]
    pub rate: f64,
    /// Connections to hold idle, and connections to open at once
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(10..))]
    pub idle: u32,
    /// Pin every server to this CPU
    #[arg(long)]
    pub server_cpu: Option<usize>,
    /// Pin the tester to this CPU
    #[arg(long)]
    pub client_cpu: Option<usize>,
    /// Start no further round after this time
    #[arg(long, default_value = "1h")]
    pub time_limit: Time,
    /// Write the results as JSON to this file
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Write the results to this Markdown file, such as loadtest/RESULTS.md, and plots to results/ beside it
    #[arg(long)]
    pub results: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct HandshakeServer {
    #[arg(long)]
    pub cert: PathBuf,
    #[arg(long)]
    pub key: PathBuf,
    #[arg(long)]
    pub connections: u32,
    #[arg(long)]
    pub cpu: Option<usize>,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Start {
    /// A URL that answers with status 200 once the server is ready: http://host:port/path
    #[arg(long)]
    pub ready: Url,
    /// Starts to measure
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Time limit for one start
    #[arg(long, default_value = "10s")]
    pub patience: Time,
    /// Fail if the median is longer than this
    #[arg(long)]
    pub expect_ready: Option<Time>,
    #[command(flatten)]
    pub common: Common,
    /// The server's program and its arguments, after `--`
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
}

#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct Budgets {
    /// Budgets to measure, by name, separated by commas [default: all]
    #[arg(long, value_delimiter = ',', value_parser = budget)]
    pub only: Vec<&'static Budget>,
    /// List the budgets and measure nothing
    #[arg(long)]
    pub list: bool,
    /// Rounds of each measurement
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// The gateway's program [default: tidegate, beside this program]
    #[arg(long)]
    pub tidegate: Option<PathBuf>,
    /// Pin every server to this CPU
    #[arg(long)]
    pub server_cpu: Option<usize>,
    /// Pin the tester to this CPU
    #[arg(long)]
    pub client_cpu: Option<usize>,
    /// Start no further budget after this time
    #[arg(long, default_value = "3h")]
    pub time_limit: Time,
    /// Write the results as JSON to this file
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Write the results to this Markdown file, such as loadtest/BUDGETS.md
    #[arg(long)]
    pub results: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct YardstickServer {
    #[arg(long)]
    pub members: usize,
    #[arg(long)]
    pub cpu: Option<usize>,
}

#[derive(Clone, Debug, Args)]
pub struct RoomArgs {
    /// Connections that receive
    #[arg(long, default_value_t = 1000)]
    pub members: usize,
    /// Messages per round
    #[arg(long, default_value_t = 1000)]
    pub messages: u64,
    /// Bytes of payload per message
    #[arg(long, default_value_t = 256, value_parser = size)]
    pub size: usize,
    /// Content of messages
    #[arg(long, value_enum, default_value_t = Payload::Dots)]
    pub payload: Payload,
    /// Messages published together; the next batch waits until all members have this one
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub burst: u64,
    /// Publish this many messages a second instead of waiting for all members: to compare latencies
    #[arg(long, value_parser = rate)]
    pub rate: Option<f64>,
    /// Measured rounds
    #[arg(long, default_value_t = 5)]
    pub rounds: u32,
    /// Messages of an unmeasured round before the first [default: a tenth of a round, at most 100]
    #[arg(long)]
    pub warmup: Option<u64>,
    /// Give up a batch that makes no progress for this long
    #[arg(long, default_value = "2s")]
    pub patience: Time,
}

#[derive(Clone, Debug, Args)]
pub struct Common {
    /// Read flags from a TOML file, by their names; flags on the command line win
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Pin this tester to one CPU
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
}

/// A duration as written on the command line: a number and `us`, `ms`, `s`, `m` or `h`; a number alone is
/// seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time(pub Duration);

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit = match unit.trim_start() {
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" | "" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err("a duration is written 500us, 20ms, 10s, 5m or 1h".into()),
        };
        let number: f64 = number.parse().map_err(|_| "a duration is written 500us, 20ms, 10s, 5m or 1h")?;
        Duration::try_from_secs_f64(number * unit).map(Self).map_err(|error| error.to_string())
    }
}

impl RoomArgs {
    /// The messages of a round.
    pub fn load(&self) -> anyhow::Result<Load> {
        let shape = Shape::asked(self.payload, self.size)?;
        Ok(Load { shape, burst: self.burst, patience: self.patience.0, rate: self.rate })
    }

    /// Messages of the unmeasured round.
    pub fn warmup(&self) -> u64 {
        self.warmup.unwrap_or((self.messages / 10).min(100))
    }
}

/// A payload size, large enough for a stamp.
pub fn size(text: &str) -> Result<usize, String> {
    let size: usize = text.parse().map_err(|_| "not a number".to_owned())?;
    if (Stamp::MIN_SIZE..=MAX_PAYLOAD).contains(&size) {
        Ok(size)
    } else {
        Err(format!("a message has {} to {MAX_PAYLOAD} bytes", Stamp::MIN_SIZE))
    }
}

/// Finds a budget by its name.
fn budget(name: &str) -> Result<&'static Budget, String> {
    BUDGETS.iter().find(|budget| budget.name == name).ok_or_else(|| {
        let names: Vec<_> = BUDGETS.iter().map(|budget| budget.name).collect();
        format!("the budgets are {}", names.join(", "))
    })
}

/// A rate per second.
pub fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (0.001..=1e7).contains(&rate) => Ok(rate),
        _ => Err("a rate is a number from 0.001 to 10000000, per second".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_definition_is_valid() {
        Cli::command().debug_assert();
        for (size, accepted) in [("61", false), ("62", true), ("1048576", true), ("1048577", false)] {
            let parsed = Cli::try_parse_from(["tidegate-loadtest", "cost", "--size", size]);
            assert_eq!(parsed.is_ok(), accepted, "{size}");
        }
        for bad in [["--burst", "0"], ["--rate", "0"], ["--rate", "fast"], ["--patience", "soon"]] {
            let words = ["tidegate-loadtest", "cost"].into_iter().chain(bad);
            assert!(Cli::try_parse_from(words).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn every_flag_has_a_help_text() {
        for scenario in Cli::command().get_subcommands().filter(|scenario| !scenario.is_hide_set()) {
            for flag in scenario.get_arguments().filter(|flag| !flag.is_hide_set()) {
                assert!(flag.get_help().is_some(), "{} {}", scenario.get_name(), flag.get_id());
            }
        }
    }

    #[test]
    fn times() {
        for (text, nanos) in
            [("20ms", 20_000_000), ("1.5s", 1_500_000_000), ("3", 3_000_000_000), ("250us", 250_000)]
        {
            assert_eq!(text.parse(), Ok(Time(Duration::from_nanos(nanos))));
        }
        for bad in ["", "s", "1d", "-1s", "1 2", "ms"] {
            assert!(bad.parse::<Time>().is_err(), "{bad}");
        }
    }
}
