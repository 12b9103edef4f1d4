//! The command line.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};

use crate::{
    room::Load,
    stamp::Stamp,
    target::{PublishArg, Target},
    websocket::MAX_PAYLOAD,
};

/// A load tester for `WebSocket` gateways that counts what was lost.
#[derive(Debug, Parser)]
#[command(name = "tidegate-loadtest", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub scenario: Scenario,
}

#[derive(Debug, Subcommand)]
pub enum Scenario {
    /// One room, many members: what a delivery costs, and whether every one arrived
    Fanout(Fanout),
    /// The physical limit: a bare loop of send(2) over as many sockets
    Yardstick(Yardstick),
    /// `fanout` and `yardstick` in alternating rounds, and the ratio between them
    CompareLimit(CompareLimit),
    /// Hold idle connections: what one costs the server in memory and CPU
    Idle(Idle),
    /// The process that `yardstick` measures
    #[command(hide = true)]
    YardstickServer(YardstickServer),
}

#[derive(Clone, Debug, Args)]
pub struct Fanout {
    /// The room that members join
    #[arg(long, default_value = "ws://127.0.0.1:8080/rooms/demo:load")]
    pub url: Target,
    /// How to publish: ws or http (the same room), or a ws://, http://, redis:// or redis+unix:// URL
    #[arg(long, default_value = "ws")]
    pub publish: PublishArg,
    /// The Redis topic to publish to [default: room: and what follows /rooms/ in the URL]
    #[arg(long)]
    pub topic: Option<String>,
    /// The server's process, to measure its CPU; several with commas
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
pub struct Yardstick {
    /// Pin the loop of send(2) to this CPU
    #[arg(long)]
    pub server_cpu: Option<usize>,
    /// Run one round per line on standard input (its number of messages) and answer with a line of JSON
    #[arg(long, hide = true)]
    pub lockstep: bool,
    #[command(flatten)]
    pub room: RoomArgs,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Clone, Debug, Args)]
pub struct CompareLimit {
    #[command(flatten)]
    pub fanout: Fanout,
    /// Pin the yardstick's loop to this CPU: the one the server is pinned to
    #[arg(long)]
    pub server_cpu: Option<usize>,
    /// Fail if the server costs more than this many times the yardstick
    #[arg(long)]
    pub expect_ratio: Option<f64>,
}

#[derive(Clone, Debug, Args)]
pub struct Idle {
    /// The room that connections join
    #[arg(long, default_value = "ws://127.0.0.1:8080/rooms/demo:load")]
    pub url: Target,
    /// How many connections to hold, ascending; measured at each
    #[arg(long, value_delimiter = ',', default_value = "3000,15000")]
    pub connections: Vec<usize>,
    /// The server's process; several with commas
    #[arg(long, value_delimiter = ',', required = true)]
    pub server_pid: Vec<u32>,
    /// Seconds over which idle CPU is measured, at each level
    #[arg(long, default_value_t = 10)]
    pub window: u64,
    /// Over how many addresses (127.0.0.2 and up) connections to this machine are spread
    #[arg(long, default_value_t = 16)]
    pub addresses: u8,
    #[command(flatten)]
    pub common: Common,
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
    /// Connections that listen
    #[arg(long, default_value_t = 1000)]
    pub members: usize,
    /// Messages per round
    #[arg(long, default_value_t = 1000)]
    pub messages: u64,
    /// Bytes of payload per message
    #[arg(long, default_value_t = 256, value_parser = size)]
    pub size: usize,
    /// Messages published together; the next batch waits until everybody has this one
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub burst: u64,
    /// Measured rounds
    #[arg(long, default_value_t = 5)]
    pub rounds: u32,
    /// Messages of an unmeasured round before the first [default: a tenth of a round, at most 100]
    #[arg(long)]
    pub warmup: Option<u64>,
    /// Seconds without progress after which a batch is given up
    #[arg(long, default_value_t = 2)]
    pub patience: u64,
    /// Over how many addresses (127.0.0.2 and up) members on this machine are spread
    #[arg(long, default_value_t = 16)]
    pub addresses: u8,
}

#[derive(Clone, Debug, Args)]
pub struct Common {
    /// Pin this tester to one CPU
    #[arg(long)]
    pub client_cpu: Option<usize>,
    /// Seconds after which the run ends with the report so far
    #[arg(long, default_value_t = 600)]
    pub time_limit: u64,
    /// Write the report as JSON to this file
    #[arg(long)]
    pub json: Option<PathBuf>,
}

impl RoomArgs {
    /// What is sent in a round.
    pub fn load(&self) -> Load {
        Load { size: self.size, burst: self.burst, patience: Duration::from_secs(self.patience) }
    }

    /// Messages of the unmeasured round.
    pub fn warmup(&self) -> u64 {
        self.warmup.unwrap_or((self.messages / 10).min(100))
    }
}

impl Common {
    /// How long the whole run may take.
    pub fn time_limit(&self) -> Duration {
        Duration::from_secs(self.time_limit)
    }
}

fn size(text: &str) -> Result<usize, String> {
    let size: usize = text.parse().map_err(|_| "not a number".to_owned())?;
    if (Stamp::MIN_SIZE..=MAX_PAYLOAD).contains(&size) {
        Ok(size)
    } else {
        Err(format!("a message has {} to {MAX_PAYLOAD} bytes", Stamp::MIN_SIZE))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        for (size, accepted) in [("41", false), ("42", true), ("1048576", true), ("1048577", false)] {
            let parsed = Cli::try_parse_from(["tidegate-loadtest", "fanout", "--size", size]);
            assert_eq!(parsed.is_ok(), accepted, "{size}");
        }
        assert!(Cli::try_parse_from(["tidegate-loadtest", "fanout", "--url", "gopher://x"]).is_err());
        assert!(Cli::try_parse_from(["tidegate-loadtest", "fanout", "--burst", "0"]).is_err());
    }
}
