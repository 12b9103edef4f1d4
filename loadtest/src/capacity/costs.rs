//! Unit costs: the figures that a capacity plan is based on.
//!
//! Owns the single table of them. The flags that override them, the rows of `deploy/CAPACITY.md` and the JSON
//! are all derived from it; a new measurement changes only this table.

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};
use serde::Serialize;

/// A unit cost.
pub struct Row {
    /// The flag that overrides it; also its name.
    pub flag: &'static str,
    /// As measured.
    pub default: f64,
    pub unit: Unit,
    /// What it is the cost of.
    pub what: &'static str,
    /// How to measure it: a command of this program, and the number to take from its report.
    pub measured_by: &'static str,
    field: fn(&mut UnitCosts) -> &mut f64,
}

/// The unit of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Microseconds,
    Bytes,
    /// A factor: a multiple of the named cost.
    Times,
}

/// One figure for each row of [`TABLE`].
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct UnitCosts {
    pub delivery: f64,
    pub delivery_of_eight: f64,
    pub delivery_kib: f64,
    pub sse: f64,
    pub centrifuge: f64,
    pub tls_record: f64,
    pub tls_kib: f64,
    pub deflate_publication: f64,
    pub deflate_kib: f64,
    pub deflate_ratio: f64,
    pub publication: f64,
    pub client_publish: f64,
    pub idle: f64,
    pub idle_tls: f64,
    pub connect: f64,
    pub connect_tls: f64,
    pub base_memory: f64,
    pub memory: f64,
    pub memory_tls: f64,
    pub kernel_memory: f64,
    pub stalled_memory: f64,
    pub room_memory: f64,
    pub redis_publish: f64,
    pub redis_delivery: f64,
}

/// Every unit cost, as measured on two cores of a virtual AMD EPYC with Linux 6.18: a release build, the node
/// with one shard on one core and the tester on the other, over loopback. Loopback charges the sender with
/// the receiver's path through the network stack, so a node behind a network card spends less on a delivery
/// than these figures.
pub const TABLE: &[Row] = &[
    Row {
        flag: "delivery",
        default: 4.9,
        unit: Unit::Microseconds,
        what: "CPU of a delivery of 256 B in its own write, plain WebSocket",
        measured_by: "`cost`: server CPU s/M",
        field: |costs| &mut costs.delivery,
    },
    Row {
        flag: "delivery-of-eight",
        default: 0.77,
        unit: Unit::Microseconds,
        what: "CPU of each of eight such deliveries that share a write",
        measured_by: "`cost --burst 8`: server CPU s/M",
        field: |costs| &mut costs.delivery_of_eight,
    },
    Row {
        flag: "delivery-kib",
        default: 0.1,
        unit: Unit::Microseconds,
        what: "CPU of each further KiB of a delivery",
        measured_by: "`cost --burst 8 --size 4096` less `cost --burst 8`: server CPU s/M ÷ 3.75",
        field: |costs| &mut costs.delivery_kib,
    },
    Row {
        flag: "centrifuge",
        default: 1.4,
        unit: Unit::Times,
        what: "a delivery in the Centrifuge protocol, relative to a plain one",
        measured_by: "`cost --protocol centrifuge`: server CPU s/M ÷ that of `cost`",
        field: |costs| &mut costs.centrifuge,
    },
    Row {
        flag: "sse",
        default: 1.9,
        unit: Unit::Times,
        what: "a delivery on an event stream, relative to a plain one",
        measured_by: "`cost --protocol sse`: server CPU s/M ÷ that of `cost`",
        field: |costs| &mut costs.sse,
    },
    Row {
        flag: "tls-record",
        default: 0.7,
        unit: Unit::Microseconds,
        what: "CPU of TLS for each write",
        measured_by: "`cost` with `wss://`, `--burst` 1 and 8, less the same without TLS: the constant part",
        field: |costs| &mut costs.tls_record,
    },
    Row {
        flag: "tls-kib",
        default: 0.7,
        unit: Unit::Microseconds,
        what: "CPU of TLS for each KiB written",
        measured_by: "the same: the part that grows with the bytes",
        field: |costs| &mut costs.tls_kib,
    },
    Row {
        flag: "deflate-publication",
        default: 8.0,
        unit: Unit::Microseconds,
        what: "CPU of compressing a publication, once per node and window size that clients request",
        measured_by: "`cargo bench -p tidegate --bench websocket -- compress`, wide: the constant part",
        field: |costs| &mut costs.deflate_publication,
    },
    Row {
        flag: "deflate-kib",
        default: 6.9,
        unit: Unit::Microseconds,
        what: "the same for each KiB",
        measured_by: "the same: JSON of 64 KiB ÷ 64",
        field: |costs| &mut costs.deflate_kib,
    },
    Row {
        flag: "deflate-ratio",
        default: 0.4,
        unit: Unit::Times,
        what: "fraction of a payload that remains after compression",
        measured_by: "your own messages with any raw DEFLATE: JSON of 300 B that repeats its keys keeps 0.38, a sentence in JSON of 220 B 0.8",
        field: |costs| &mut costs.deflate_ratio,
    },
    Row {
        flag: "publication",
        default: 15.0,
        unit: Unit::Microseconds,
        what: "CPU of a publication that a node receives from Redis, without its deliveries",
        measured_by: "`rooms --rooms 1000 --members 1 --rate 15000 --publish redis://…`: CPU per delivery, less `cost`",
        field: |costs| &mut costs.publication,
    },
    Row {
        flag: "client-publish",
        default: 8.0,
        unit: Unit::Microseconds,
        what: "CPU of a publication that a client sends, on the way to Redis",
        measured_by: "`chat --rooms 1000 --members 1 --rate 15000`: CPU per delivery, less that of `rooms`",
        field: |costs| &mut costs.client_publish,
    },
    Row {
        flag: "idle",
        default: 0.53,
        unit: Unit::Microseconds,
        what: "CPU per second of a connection, with heartbeats every 25 s",
        measured_by: "`idle --connections 3000,15000 --window 25s`: the slope",
        field: |costs| &mut costs.idle,
    },
    Row {
        flag: "idle-tls",
        default: 0.67,
        unit: Unit::Microseconds,
        what: "the same with TLS",
        measured_by: "the same with `wss://`",
        field: |costs| &mut costs.idle_tls,
    },
    Row {
        flag: "connect",
        default: 67.1,
        unit: Unit::Microseconds,
        what: "CPU of a new connection: TCP, upgrade, a token (HS256), the room",
        measured_by: "`storm --connections 15000`: 14,897 upgrades per second and core",
        field: |costs| &mut costs.connect,
    },
    Row {
        flag: "connect-tls",
        default: 210.0,
        unit: Unit::Microseconds,
        what: "the same with a full TLS 1.3 handshake (ECDSA P-256)",
        measured_by: "`storm` with `wss://`: server CPU, µs each",
        field: |costs| &mut costs.connect_tls,
    },
    Row {
        flag: "base-memory",
        default: 6.5e6,
        unit: Unit::Bytes,
        what: "resident memory of a node without connections",
        measured_by: "`idle`: RSS at 0 connections",
        field: |costs| &mut costs.base_memory,
    },
    Row {
        flag: "memory",
        default: 1402.0,
        unit: Unit::Bytes,
        what: "resident memory of a connection that is in one room",
        measured_by: "`idle --connections 3000,15000`: the slope",
        field: |costs| &mut costs.memory,
    },
    Row {
        flag: "memory-tls",
        default: 9088.0,
        unit: Unit::Bytes,
        what: "the same with TLS",
        measured_by: "the same with `wss://`",
        field: |costs| &mut costs.memory_tls,
    },
    Row {
        flag: "kernel-memory",
        default: 5120.0,
        unit: Unit::Bytes,
        what: "kernel memory of a socket whose buffers are empty; not part of RSS, but counted in a container's memory",
        measured_by: "`Slab` of `/proc/meminfo` before and after 15,000 connections of `idle` on loopback: half of the difference is the server's",
        field: |costs| &mut costs.kernel_memory,
    },
    Row {
        flag: "stalled-memory",
        default: 151e3,
        unit: Unit::Bytes,
        what: "kernel memory that a client takes that does not read, in addition to `limits.outbound`",
        measured_by: "`slow --stalled 10`, and `ss -m` of the server's sockets",
        field: |costs| &mut costs.stalled_memory,
    },
    Row {
        flag: "room-memory",
        default: 600.0,
        unit: Unit::Bytes,
        what: "resident memory of a room on a node",
        measured_by: "`compare-rooms`: bytes of a room with its one subscription, less those of a subscription",
        field: |costs| &mut costs.room_memory,
    },
    Row {
        flag: "redis-publish",
        default: 7.8,
        unit: Unit::Microseconds,
        what: "CPU of Redis for a single PUBLISH; 0.74 if sixteen arrive in one pipeline",
        measured_by: "`redis-benchmark -c 50 -n 100000 PUBLISH room:bench …` without a subscriber: `INFO cpu` before and after",
        field: |costs| &mut costs.redis_publish,
    },
    Row {
        flag: "redis-delivery",
        default: 0.3,
        unit: Unit::Microseconds,
        what: "CPU of Redis for each interested node, while Redis is busy; up to 5 while it is not",
        measured_by: "the same with 16 subscribers (`redis-cli SUBSCRIBE room:bench`): a sixteenth of the difference",
        field: |costs| &mut costs.redis_delivery,
    },
];

impl UnitCosts {
    /// The figures of the table.
    pub fn measured() -> Self {
        let mut costs = Self::default();
        for row in TABLE {
            *(row.field)(&mut costs) = row.default;
        }
        costs
    }

    /// Applies the values given on the command line.
    fn take(&mut self, matches: &ArgMatches) {
        for row in TABLE {
            if let Some(value) = matches.get_one::<f64>(row.flag) {
                *(row.field)(self) = *value;
            }
        }
    }
}

/// The table as the guide shows it.
#[cfg(test)]
pub fn reference() -> String {
    let mut page = "| flag | measured | unit | cost of | measured by |\n|---|---|---|---|---|\n".to_owned();
    for Row { flag, default, unit, what, measured_by, .. } in TABLE {
        let unit = match unit {
            Unit::Microseconds => "µs",
            Unit::Bytes => "B",
            Unit::Times => "×",
        };
        page = format!("{page}| `--{flag}` | {default} | {unit} | {what} | {measured_by} |\n");
    }
    page
}

impl FromArgMatches for UnitCosts {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut costs = Self::measured();
        costs.take(matches);
        Ok(costs)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.take(matches);
        Ok(())
    }
}

impl Args for UnitCosts {
    fn augment_args(command: Command) -> Command {
        TABLE.iter().fold(command, |command, row| {
            let name = match row.unit {
                Unit::Microseconds => "US",
                Unit::Bytes => "BYTES",
                Unit::Times => "TIMES",
            };
            let flag = Arg::new(row.flag)
                .long(row.flag)
                .value_name(name)
                .value_parser(figure)
                .allow_negative_numbers(true)
                .help(format!("{} [default: {}]", row.what, row.default))
                .long_help(format!(
                    "{} [default: {}]\nMeasured by {}",
                    row.what, row.default, row.measured_by
                ))
                .help_heading("Unit costs, as measured");
            command.arg(flag)
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn figure(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(figure) if (0.0..=1e12).contains(&figure) => Ok(figure),
        _ => Err("a cost is a number from 0 to 1000000000000".into()),
    }
}
