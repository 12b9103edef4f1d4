//! The list of budgets.
//!
//! A budget is data: what to run, where the report has the number, and its bound. To add one, add it here.
//! Words in braces stand for several flags ([`Site`](super::site::Site) defines them all), among them
//! `{node}`: the node's URL, its process, and a secret for the clients' tokens.

use crate::workshop::Wanted;

/// A budget.
#[derive(Clone, Debug)]
pub struct Budget {
    /// Its name for `--only`.
    pub name: &'static str,
    pub title: &'static str,
    /// The unit of the number.
    pub unit: &'static str,
    pub bound: Bound,
    /// The node to start; `None` if there is nothing to connect to.
    pub node: Option<Wanted>,
    /// A run of this program. Budgets with the same run share it.
    pub run: &'static str,
    pub found: Found,
    /// The factor applied to the number in the report.
    pub factor: f64,
}

/// The bound of a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    AtMost(f64),
    AtLeast(f64),
    /// No bound: the number is only reported.
    Any,
}

/// Where the number is: JSON pointers into the report (RFC 6901).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// One run measures all rounds: its median, and the smallest and the largest.
    Rounds { median: &'static str, range: &'static str },
    /// One run for every round, each with a new node.
    Run(&'static str),
    /// Two runs for every round, against one node: the number of `run` divided by that of `to`.
    Ratio { of: &'static str, to: &'static str, at: &'static str },
    /// The size of the gateway's program without its symbols. Nothing is run.
    Stripped,
}

/// A node with the in-process broker, without TLS, with the usual settings.
const PLAIN: Wanted = Wanted { redis: false, tls: false, set: &[] };
const TLS: Wanted = Wanted { tls: true, ..PLAIN };

/// A node on Redis. Every client of `compare-rooms` is in twenty rooms.
const REDIS: Wanted = Wanted { redis: true, ..PLAIN };
const ROOMS: &str = "compare-rooms {centrifuge} {redis} --rounds=1 --expect-lost=0";
const RESUBSCRIBE: &str = "resubscribe {program} {server-cpu} --rounds=1 --expect-lost=0";

/// The rates are those of [`RELAY_CPU`].
const RELAY: &str =
    "compare-relay {program} {server-cpu} --rates=2000,5000,10000,20000,30000 --expect-lost=0";
const RELAY_CENTRIFUGE: &str = "compare-relay {program} {server-cpu} --protocol=centrifuge \
                                --rates=2000,5000,10000,20000,30000 --expect-lost=0";

/// The gateway's CPU over the relay's at each rate of [`RELAY`], and its p50 at 20,000/s.
const RELAY_CPU: [Found; 5] = [
    Found::Rounds { median: "/rates/0/legs/1/cpu_ratio", range: "/rates/0/legs/1/cpu_ratio_range" },
    Found::Rounds { median: "/rates/1/legs/1/cpu_ratio", range: "/rates/1/legs/1/cpu_ratio_range" },
    Found::Rounds { median: "/rates/2/legs/1/cpu_ratio", range: "/rates/2/legs/1/cpu_ratio_range" },
    Found::Rounds { median: "/rates/3/legs/1/cpu_ratio", range: "/rates/3/legs/1/cpu_ratio_range" },
    Found::Rounds { median: "/rates/4/legs/1/cpu_ratio", range: "/rates/4/legs/1/cpu_ratio_range" },
];
const RELAY_P50: Found =
    Found::Rounds { median: "/rates/3/legs/1/p50_ratio", range: "/rates/3/legs/1/p50_ratio_range" };

const IDLE: &str = "idle {node} --connections=3000,15000 --window=25s";
const HEARTBEATS: &str = "idle {node} --connections=15000 --window=25s";
/// `drop_oldest` keeps stalled clients connected: by default the node closes them as slow consumers after
/// seconds, and they cost nothing. The kernel adds its own bound: 16 KiB may be unsent (`TCP_NOTSENT_LOWAT`)
/// when it accepts another buffer of up to 64 KiB.
const STALLED: Wanted =
    Wanted { set: &[("limits.outbound", "256KiB"), ("rooms.\"load:*\".overflow", "drop_oldest")], ..PLAIN };
const SLOW: &str =
    "slow {node} {metrics} --members=1000 --stalled=10 --rate=30 --size=4096 --duration=20s --expect-lost=0";

const DEFLATE: Wanted = Wanted { set: &[("compression.enabled", "true")], ..PLAIN };
const DEFLATED: &str = "cost {node} --deflate --payload=json --size=1024 --members=1000 --messages=1000 --rounds=1 --expect-lost=0";
const UNDEFLATED: &str =
    "cost {node} --payload=json --size=1024 --members=1000 --messages=1000 --rounds=1 --expect-lost=0";

const LIMIT: Found = Found::Rounds { median: "/cpu_ratio", range: "/cpu_ratio_range" };

/// What the budgets of `compare-relay` have in common.
const RELAYED: Budget = Budget {
    name: "",
    title: "",
    unit: "× a bare relay",
    bound: Bound::AtMost(1.20),
    node: None,
    run: RELAY,
    found: RELAY_P50,
    factor: 1.0,
};
const RELAYED_CENTRIFUGE: Budget =
    Budget { unit: "× a bare relay with as many bytes on the wire", run: RELAY_CENTRIFUGE, ..RELAYED };

/// All clients come back at once. The report has four legs: one room and a room for each client, in turn from
/// memory and from the log. With more messages, those of 10,000 rooms and five rounds would not fit into the
/// memory that a node has for histories, and it would read the log.
const RESUMED: Budget = Budget {
    name: "",
    title: "",
    unit: "µs",
    bound: Bound::AtMost(15.0),
    node: None,
    run: "resume {program} {server-cpu} --missed=2 --rooms=one,each --from=memory,log",
    found: RELAY_P50,
    factor: 1.0,
};

/// Publications by Tidegate's function; the report has a leg for each number of rooms.
const RECORDED: Budget = Budget {
    name: "",
    title: "",
    unit: "per second of Redis' CPU",
    bound: Bound::AtLeast(60_000.0),
    node: None,
    run: "history {program} {server-cpu} --rooms=1,1000,100000 --messages=100000",
    found: RELAY_P50,
    factor: 1.0,
};

const REPAIR: &str = "repair {program} {server-cpu}";

/// All budgets.
pub const BUDGETS: &[Budget] = &[
    Budget {
        name: "fanout-1000",
        title: "CPU per delivery, 256 B, one room of 1,000, one message at a time",
        unit: "× a bare send loop",
        bound: Bound::AtMost(1.10),
        node: Some(PLAIN),
        run: "compare-limit {node} {server-cpu} --members=1000 --messages=1000 --expect-lost=0",
        found: LIMIT,
        factor: 1.0,
    },
    Budget {
        name: "fanout-10000",
        title: "CPU per delivery, 256 B, one room of 10,000, one message at a time",
        unit: "× a bare send loop",
        bound: Bound::AtMost(1.10),
        node: Some(PLAIN),
        run: "compare-limit {node} {server-cpu} --members=10000 --messages=100 --expect-lost=0",
        found: LIMIT,
        factor: 1.0,
    },
    Budget {
        name: "fanout-together",
        title: "CPU per delivery, 256 B, one room of 1,000, eight messages together",
        unit: "× a bare loop that coalesces",
        bound: Bound::AtMost(1.15),
        node: Some(PLAIN),
        run: "compare-limit {node} {server-cpu} --members=1000 --messages=4000 --burst=8 --expect-lost=0",
        found: LIMIT,
        factor: 1.0,
    },
    Budget {
        name: "centrifuge",
        title: "CPU per delivery by Centrifuge JSON, 256 B",
        unit: "× plain WebSocket",
        bound: Bound::AtMost(1.15),
        node: Some(PLAIN),
        run: "cost {centrifuge} --members=1000 --messages=1000 --rounds=1 --expect-lost=0",
        found: Found::Ratio {
            of: "/median/server_cpu",
            to: "cost {node} --members=1000 --messages=1000 --rounds=1 --expect-lost=0",
            at: "/median/server_cpu",
        },
        factor: 1.0,
    },
    // Centrifuge turns 256 bytes into 377. On a connection that has sent data, the kernel acknowledges every
    // second frame of that length but only every third of 260 bytes (it assumes segments of 536 bytes until
    // it has seen larger ones), and on loopback the server pays for acknowledgements. This row compares
    // frames of equal length and so avoids that step.
    Budget {
        name: "centrifuge-length",
        title: "CPU per delivery by Centrifuge JSON, 256 B",
        unit: "× plain WebSocket with as many bytes on the wire",
        bound: Bound::AtMost(1.15),
        node: Some(PLAIN),
        run: "cost {centrifuge} --members=1000 --messages=1000 --rounds=1 --expect-lost=0",
        found: Found::Ratio {
            of: "/median/server_cpu",
            to: "cost {node} --size=373 --members=1000 --messages=1000 --rounds=1 --expect-lost=0",
            at: "/median/server_cpu",
        },
        factor: 1.0,
    },
    Budget {
        name: "intake",
        title: "Publications out of Redis, 64 B, 1,000 rooms with one member each",
        unit: "per second on one core",
        bound: Bound::AtLeast(250_000.0),
        node: Some(REDIS),
        run: "intake {node} {on-redis} {server-cpu} --rounds=1 --expect-lost=0",
        found: Found::Run("/median/server_per_second"),
        factor: 1.0,
    },
    Budget {
        name: "publish",
        title: "Publications of 1,000 clients into Redis, 64 B",
        unit: "per second on one core",
        bound: Bound::AtLeast(100_000.0),
        node: Some(REDIS),
        run: "publish {centrifuge} {on-redis} --rounds=1 --expect-lost=0",
        found: Found::Run("/median/server_per_second"),
        factor: 1.0,
    },
    Budget {
        name: "rooms",
        title: "CPU per delivery in 100,000 rooms of one member",
        unit: "× in 10 rooms of 10,000",
        bound: Bound::AtMost(1.5),
        node: Some(REDIS),
        run: ROOMS,
        found: Found::Run("/ratio"),
        factor: 1.0,
    },
    Budget {
        name: "rooms-bytes",
        title: "Memory of a room with its one subscription",
        unit: "bytes",
        bound: Bound::AtMost(1024.0),
        node: Some(REDIS),
        run: ROOMS,
        found: Found::Run("/bytes_per_room"),
        factor: 1.0,
    },
    Budget {
        name: "relay-2000",
        title: "CPU per delivery through Redis, 256 B, 1,000 rooms of two members, 2,000 messages/s",
        found: RELAY_CPU[0],
        ..RELAYED
    },
    Budget {
        name: "relay-5000",
        title: "CPU per delivery through Redis, 256 B, 1,000 rooms of two members, 5,000 messages/s",
        found: RELAY_CPU[1],
        ..RELAYED
    },
    Budget {
        name: "relay-10000",
        title: "CPU per delivery through Redis, 256 B, 1,000 rooms of two members, 10,000 messages/s",
        found: RELAY_CPU[2],
        ..RELAYED
    },
    Budget {
        name: "relay-20000",
        title: "CPU per delivery through Redis, 256 B, 1,000 rooms of two members, 20,000 messages/s",
        found: RELAY_CPU[3],
        ..RELAYED
    },
    Budget {
        name: "relay-30000",
        title: "CPU per delivery through Redis, 256 B, 1,000 rooms of two members, 30,000 messages/s",
        found: RELAY_CPU[4],
        ..RELAYED
    },
    Budget {
        name: "relay-p50",
        title: "p50 through Redis, 256 B, 1,000 rooms of two members, 20,000 messages/s",
        bound: Bound::AtMost(1.5),
        found: RELAY_P50,
        ..RELAYED
    },
    Budget {
        name: "relay-centrifuge-2000",
        title: "CPU per delivery by Centrifuge JSON through Redis, 256 B, 1,000 rooms of two members, 2,000 messages/s",
        found: RELAY_CPU[0],
        ..RELAYED_CENTRIFUGE
    },
    Budget {
        name: "relay-centrifuge-5000",
        title: "CPU per delivery by Centrifuge JSON through Redis, 256 B, 1,000 rooms of two members, 5,000 messages/s",
        found: RELAY_CPU[1],
        ..RELAYED_CENTRIFUGE
    },
    Budget {
        name: "relay-centrifuge-10000",
        title: "CPU per delivery by Centrifuge JSON through Redis, 256 B, 1,000 rooms of two members, 10,000 messages/s",
        found: RELAY_CPU[2],
        ..RELAYED_CENTRIFUGE
    },
    Budget {
        name: "relay-centrifuge-20000",
        title: "CPU per delivery by Centrifuge JSON through Redis, 256 B, 1,000 rooms of two members, 20,000 messages/s",
        found: RELAY_CPU[3],
        ..RELAYED_CENTRIFUGE
    },
    Budget {
        name: "relay-centrifuge-30000",
        title: "CPU per delivery by Centrifuge JSON through Redis, 256 B, 1,000 rooms of two members, 30,000 messages/s",
        found: RELAY_CPU[4],
        ..RELAYED_CENTRIFUGE
    },
    Budget {
        name: "relay-centrifuge-p50",
        title: "p50 by Centrifuge JSON through Redis, 256 B, 1,000 rooms of two members, 20,000 messages/s",
        bound: Bound::AtMost(1.5),
        found: RELAY_P50,
        ..RELAYED_CENTRIFUGE
    },
    Budget {
        name: "resubscribe",
        title: "100,000 topics back after a restart of Redis",
        unit: "seconds",
        bound: Bound::AtMost(3.0),
        node: None,
        run: RESUBSCRIBE,
        found: Found::Run("/median/topics_back"),
        factor: 1.0,
    },
    Budget {
        name: "resubscribe-p99",
        title: "p99 in rooms that are back while the others come back",
        unit: "ms",
        bound: Bound::Any,
        node: None,
        run: RESUBSCRIBE,
        found: Found::Run("/median/storm_p99_us"),
        factor: 1e-3,
    },
    Budget {
        name: "jitter-p99",
        title: "p99 from a return until caught up: 5,000 clients that drop for two seconds again and again",
        unit: "ms",
        bound: Bound::AtMost(500.0),
        node: None,
        run: "jitter {program} {server-cpu} --clients=5000",
        found: Found::Run("/catching_up/p99"),
        factor: 1e-3,
    },
    Budget {
        name: "resume-cpu-one",
        title: "10,000 clients back at once in one room, two messages missed, from memory: CPU of a client beyond a plain connect",
        found: Found::Rounds { median: "/legs/0/median/beyond_cpu", range: "/legs/0/beyond_cpu_range" },
        ..RESUMED
    },
    Budget {
        name: "resume-cpu-each",
        title: "10,000 clients back at once in a room each, two messages missed, from memory: CPU of a client beyond a plain connect",
        found: Found::Rounds { median: "/legs/2/median/beyond_cpu", range: "/legs/2/beyond_cpu_range" },
        ..RESUMED
    },
    Budget {
        name: "resume-reads-one",
        title: "10,000 clients back at once in one room, at a new node: readings of the log",
        unit: "per room",
        bound: Bound::AtMost(1.0),
        found: Found::Rounds {
            median: "/legs/1/median/reads_per_room",
            range: "/legs/1/reads_per_room_range",
        },
        ..RESUMED
    },
    Budget {
        name: "resume-reads-each",
        title: "10,000 clients back at once in a room each, at a new node: readings of the log",
        unit: "per room",
        bound: Bound::AtMost(1.0),
        found: Found::Rounds {
            median: "/legs/3/median/reads_per_room",
            range: "/legs/3/reads_per_room_range",
        },
        ..RESUMED
    },
    Budget {
        name: "resume-live-each",
        title: "10,000 clients back at once in a room each, at a new node: until all have what they missed",
        unit: "seconds",
        bound: Bound::Any,
        found: Found::Rounds { median: "/legs/3/median/seconds", range: "/legs/3/seconds_range" },
        ..RESUMED
    },
    Budget {
        name: "history-1",
        title: "Recorded publications, 64 B, one room",
        found: Found::Rounds { median: "/legs/0/median/per_core", range: "/legs/0/range" },
        ..RECORDED
    },
    Budget {
        name: "history-1000",
        title: "Recorded publications, 64 B, 1,000 rooms",
        found: Found::Rounds { median: "/legs/1/median/per_core", range: "/legs/1/range" },
        ..RECORDED
    },
    Budget {
        name: "history-100000",
        title: "Recorded publications, 64 B, 100,000 rooms",
        found: Found::Rounds { median: "/legs/2/median/per_core", range: "/legs/2/range" },
        ..RECORDED
    },
    Budget {
        name: "history-script",
        title: "Redis' CPU of a recorded publication, 64 B, 1,000 rooms",
        unit: "× a script that counts in a hash",
        bound: Bound::AtMost(1.0),
        found: Found::Rounds { median: "/legs/1/median/to_peer", range: "/legs/1/to_peer_range" },
        ..RECORDED
    },
    Budget {
        name: "repair",
        title: "100,000 rooms with a history repaired after an interruption",
        unit: "seconds",
        bound: Bound::AtMost(5.0),
        node: None,
        run: REPAIR,
        found: Found::Rounds { median: "/median/repaired", range: "/range" },
        factor: 1.0,
    },
    Budget {
        name: "repair-p99",
        title: "p99 of other commands to Redis meanwhile",
        unit: "ms",
        bound: Bound::AtMost(50.0),
        node: None,
        run: REPAIR,
        found: Found::Rounds { median: "/median/others_p99_us", range: "/others_range" },
        factor: 1e-3,
    },
    Budget {
        name: "p99",
        title: "p99 at 30,000 deliveries/s, one room of 1,000",
        unit: "× a bare send loop at the same pace",
        bound: Bound::AtMost(1.25),
        node: Some(PLAIN),
        run: "compare-limit {node} {server-cpu} --members=1000 --rate=30 --messages=300 --expect-lost=0",
        found: Found::Rounds { median: "/p99_ratio", range: "/p99_ratio_range" },
        factor: 1.0,
    },
    Budget {
        name: "stalled-p99",
        title: "p99 of 1,000 members while ten others have stopped reading",
        unit: "× before they stopped",
        bound: Bound::AtMost(1.25),
        node: Some(STALLED),
        run: SLOW,
        found: Found::Run("/p99_ratio"),
        factor: 1.0,
    },
    Budget {
        name: "stalled-bytes",
        title: "Bytes held for each stalled client: limits.outbound is 256 KiB, and the kernel takes 80 KiB",
        unit: "KiB",
        bound: Bound::AtMost(256.0 + 80.0),
        node: Some(STALLED),
        run: SLOW,
        found: Found::Run("/held/each"),
        factor: 1.0 / 1024.0,
    },
    Budget {
        name: "idle-bytes",
        title: "Memory of an idle connection, verified and subscribed",
        unit: "bytes",
        bound: Bound::AtMost(2048.0),
        node: Some(PLAIN),
        run: IDLE,
        found: Found::Run("/slope/rss"),
        factor: 1.0,
    },
    Budget {
        name: "idle-cpu",
        title: "CPU of an idle connection, heartbeats every 25 s",
        unit: "× a bare loop of ping and pong",
        bound: Bound::AtMost(1.2),
        node: Some(PLAIN),
        run: HEARTBEATS,
        found: Found::Ratio {
            of: "/slope/cpu",
            to: "heartbeats {server-cpu} --connections=15000 --window=25s",
            at: "/slope/cpu",
        },
        factor: 1.0,
    },
    Budget {
        name: "idle-bytes-tls",
        title: "Memory of an idle connection under TLS",
        unit: "bytes",
        bound: Bound::AtMost(10_240.0),
        node: Some(TLS),
        run: IDLE,
        found: Found::Run("/slope/rss"),
        factor: 1.0,
    },
    Budget {
        name: "idle-cpu-tls",
        title: "CPU of an idle connection under TLS, heartbeats every 25 s",
        unit: "× a bare loop of ping and pong",
        bound: Bound::AtMost(1.2),
        node: Some(TLS),
        run: HEARTBEATS,
        found: Found::Ratio {
            of: "/slope/cpu",
            to: "heartbeats --tls {server-cpu} --connections=15000 --window=25s",
            at: "/slope/cpu",
        },
        factor: 1.0,
    },
    Budget {
        name: "storm",
        title: "New connections, HS256 verified",
        unit: "per second on one core",
        bound: Bound::AtLeast(10_000.0),
        node: Some(PLAIN),
        run: "storm {node} --connections=15000 --waves=1 --hold=0s --expect-refused=0",
        found: Found::Run("/waves/0/per_second"),
        factor: 1.0,
    },
    Budget {
        name: "handshakes",
        title: "TLS 1.3 connections per second of CPU, full handshakes, ECDSA P-256, HS256 verified",
        unit: "× a bare loop of rustls handshakes",
        bound: Bound::AtLeast(0.7),
        node: Some(TLS),
        run: "handshakes {server-cpu} --connections=4000 --waves=1",
        // Inverted on purpose: the loop's cost divided by the node's.
        found: Found::Ratio {
            of: "/waves/0/server_cpu_us",
            to: "storm {node} --connections=4000 --waves=1 --hold=0s --expect-refused=0",
            at: "/waves/0/server_cpu_us",
        },
        factor: 1.0,
    },
    Budget {
        name: "deflate-cpu",
        title: "CPU per delivery of JSON of 1 KiB by permessage-deflate",
        unit: "× uncompressed",
        bound: Bound::Any,
        node: Some(DEFLATE),
        run: DEFLATED,
        found: Found::Ratio { of: "/median/server_cpu", to: UNDEFLATED, at: "/median/server_cpu" },
        factor: 1.0,
    },
    Budget {
        name: "deflate-bytes",
        title: "Bytes per delivery of JSON of 1 KiB by permessage-deflate",
        unit: "× uncompressed",
        bound: Bound::Any,
        node: Some(DEFLATE),
        run: DEFLATED,
        found: Found::Ratio { of: "/median/wire_bytes", to: UNDEFLATED, at: "/median/wire_bytes" },
        factor: 1.0,
    },
    Budget {
        name: "start",
        title: "Start to ready, broker in its own process",
        unit: "ms",
        bound: Bound::AtMost(100.0),
        node: None,
        run: "start {ready} -- {tidegate}",
        found: Found::Rounds { median: "/median_ms", range: "/range_ms" },
        factor: 1.0,
    },
    Budget {
        name: "size",
        title: "Size of the program, stripped",
        unit: "MB",
        bound: Bound::AtMost(15.0),
        node: None,
        run: "",
        found: Found::Stripped,
        factor: 1e-6,
    },
];

impl Bound {
    /// Whether `number` is within the bound.
    pub fn allows(self, number: f64) -> bool {
        match self {
            Self::AtMost(most) => number <= most,
            Self::AtLeast(least) => number >= least,
            Self::Any => true,
        }
    }
}
