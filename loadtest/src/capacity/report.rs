//! The output of `capacity`: a table of results, and below it every calculation that led to them.
//!
//! Calculations are printed with their numbers; a test evaluates each of them again from the printed text.

use std::fmt;

use serde::Serialize;

use super::{
    costs::UnitCosts,
    sizing::{EPHEMERAL_PORTS, Limit, OTHER_DESCRIPTORS, OUTPUT_BUFFER, REDIS_MESSAGE, Sizing},
};
use crate::{
    cli::capacity::{Fleet, Load, Spoken},
    report::document::Table,
};

/// The input, the unit costs and the result.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub load: Load,
    pub fleet: Fleet,
    pub costs: UnitCosts,
    pub sizings: Vec<Sizing>,
}

/// A calculation as it is printed.
struct Line {
    /// The name of its result.
    what: String,
    /// In numbers; empty for results found by trial.
    sum: String,
    result: String,
    unit: &'static str,
}

impl Line {
    fn written(&self, width: usize) -> String {
        let Self { what, sum, result, unit } = self;
        let equals = if sum.is_empty() { "" } else { " = " };
        let space = if unit.is_empty() { "" } else { " " };
        format!("{what:<width$}  {sum}{equals}{result}{space}{unit}")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.asked())?;
        writeln!(f, "{}", self.given())?;
        write!(f, "\n{}", self.table())?;
        for sizing in &self.sizings {
            writeln!(f, "\n{} connections", number(sizing.demand.connections))?;
            let lines = self.lines(sizing);
            let width = lines.iter().map(|line| line.what.chars().count()).max().unwrap_or(0);
            lines.iter().try_for_each(|line| writeln!(f, "  {}", line.written(width)))?;
        }
        self.notes().iter().try_for_each(|note| write!(f, "\nnote: {note}"))?;
        if self.notes().is_empty() { Ok(()) } else { writeln!(f) }
    }
}

impl Report {
    fn asked(&self) -> String {
        let Load { members, rooms, rooms_per_connection, room_rate, rate, size, burst, from_clients, .. } =
            &self.load;
        let rooms = rooms.map_or_else(
            || format!("rooms of {} members", number(*members)),
            |rooms| format!("{} rooms", number(rooms)),
        );
        let rate = rate.map_or_else(
            || format!("{} publications/s in each", number(*room_rate)),
            |rate| format!("{} publications/s in all", number(rate)),
        );
        let spoken = match self.load.protocol {
            Spoken::Plain => "plain WebSocket",
            Spoken::Centrifuge => "Centrifuge",
            Spoken::Sse => "event streams",
        };
        let tls = if self.load.tls { ", TLS at the nodes" } else { ", no TLS at the nodes" };
        let deflate = if self.load.deflate { ", compressed" } else { "" };
        format!(
            "load: {rooms}, {} of them per connection, {rate}, {size} B, {burst} together, {} from clients; \
             {spoken}{tls}{deflate}",
            number(*rooms_per_connection),
            percent(*from_clients)
        )
    }

    fn given(&self) -> String {
        let Fleet { node_cores, node_memory, node_connections, bandwidth, spare, .. } = &self.fleet;
        format!(
            "nodes: {} cores, {} GiB, {} connections, {} Gbit/s; with {spare} of them lost, at most {} of cores and \
             bandwidth and {} of memory in use",
            number(*node_cores),
            number(*node_memory),
            number(f64::from(*node_connections)),
            number(*bandwidth),
            percent(self.fleet.utilisation),
            percent(self.fleet.memory_utilisation),
        )
    }

    /// One column for each number of connections.
    fn table(&self) -> Table {
        type Cell = fn(&Sizing) -> String;
        let spare = self.fleet.spare;
        let rows: [(String, Cell); 17] = [
            ("nodes".into(), |it| number(f64::from(it.nodes))),
            ("decided by".into(), |it| it.decided_by().as_str().into()),
            ("connections per node".into(), |it| number(it.usual.connections)),
            (format!("  with {spare} lost"), |it| number(it.node.connections)),
            ("cores busy, all nodes".into(), |it| number(it.usual.cores * f64::from(it.nodes))),
            (format!("cores busy per node, {spare} lost"), |it| number(it.node.cores)),
            ("memory, all nodes".into(), |it| bytes(it.usual.memory() * f64::from(it.nodes))),
            (format!("memory per node, {spare} lost"), |it| bytes(it.node.memory())),
            ("sent to clients, all nodes".into(), |it| bits(it.usual.sent * f64::from(it.nodes))),
            ("received, all nodes".into(), |it| bits(it.usual.received * f64::from(it.nodes))),
            ("Redis shards".into(), |it| number(f64::from(it.redis.shards))),
            ("Redis cores busy".into(), |it| number(it.redis.cores)),
            ("sent by Redis".into(), |it| bits(it.redis.sent)),
            ("descriptors per node".into(), |it| number(it.host.descriptors)),
            ("addresses of a proxy per node".into(), |it| number(it.host.proxy_addresses)),
            ("all back after a node is lost".into(), |it| seconds(it.storm.after_one_node)),
            ("all back after all connections are cut".into(), |it| seconds(it.storm.after_all)),
        ];
        let head = self.sizings.iter().map(|sizing| number(sizing.demand.connections));
        let mut table = Table {
            head: std::iter::once("connections".to_owned()).chain(head).collect(),
            ..Table::default()
        };
        for (name, cell) in rows {
            table.row(std::iter::once(name).chain(self.sizings.iter().map(cell)));
        }
        table
    }

    /// Every calculation, in the order in which one would do them by hand.
    fn lines(&self, sizing: &Sizing) -> Vec<Line> {
        let mut lines = self.lines_of_load(sizing);
        lines.extend(self.lines_of_nodes(sizing));
        lines.extend(self.lines_of_one(sizing));
        lines.extend(self.lines_of_redis(sizing));
        lines.extend(self.lines_of_storm(sizing));
        lines
    }

    fn lines_of_load(&self, sizing: &Sizing) -> Vec<Line> {
        let Self { load, costs, .. } = self;
        let it = &sizing.demand;
        let memberships = format!("{} × {}", number(it.connections), number(load.rooms_per_connection));
        let mut lines = vec![match load.rooms {
            None => line("rooms", format!("{memberships} ÷ {}", number(it.members)), number(it.rooms), ""),
            Some(rooms) => line(
                "members of a room",
                format!("{memberships} ÷ {}", number(rooms)),
                number(it.members),
                "",
            ),
        }];
        if load.rate.is_none() {
            let sum = format!("{} × {}", number(it.rooms), number(load.room_rate));
            lines.push(line("publications", sum, number(it.publications), "/s"));
        }
        let sum = format!("{} × {}", number(it.publications), number(it.members));
        lines.push(line("deliveries", sum, number(it.deliveries), "/s"));
        if load.deflate {
            let sum = format!("{} × {}", load.size, number(it.payload / f64::from(load.size).max(1.0)));
            lines.push(line("payload, compressed if 256 B or more", sum, number(it.payload), "B"));
        }
        let sum = format!("{} + {}", number(it.payload), number(it.frame - it.payload));
        lines.push(line("bytes of a delivery, with its frame", sum, number(it.frame), "B"));
        let packets = it.write - f64::from(load.burst) * it.frame;
        let sum = format!("{} × {} + {}", load.burst, number(it.frame), number(packets));
        let heads = if load.tls {
            "bytes of a write, with TLS and packet headers"
        } else {
            "bytes of a write, with packet headers"
        };
        lines.push(line(heads, sum, number(it.write), "B"));
        let further = it.plain_us - costs.alone_in(f64::from(load.burst));
        let mut sum = if load.burst == 1 {
            number(costs.delivery)
        } else {
            format!(
                "({} + {} × {}) ÷ {}",
                number(costs.delivery),
                load.burst - 1,
                number(costs.further()),
                load.burst
            )
        };
        if further > 0.0 {
            sum = format!("{sum} + {}", number(further));
        }
        let factor = load.protocol.factor(costs);
        if load.protocol != Spoken::Plain {
            sum = format!("({sum}) × {}", number(factor));
        }
        if load.tls {
            sum = format!("{sum} + {}", number(it.delivery_us - it.plain_us * factor));
        }
        let what = if load.tls { "CPU of a delivery, and of its TLS" } else { "CPU of a delivery" };
        lines.push(line(what, sum, number(it.delivery_us), "µs"));
        lines
    }

    fn lines_of_nodes(&self, sizing: &Sizing) -> Vec<Line> {
        let Self { fleet, .. } = self;
        let Sizing { demand, left, .. } = sizing;
        let mut lines = Vec::new();
        for (limit, nodes) in &sizing.needed {
            let (what, sum) = match limit {
                Limit::Connections => (
                    "fewest nodes by connections",
                    format!(
                        "⌈{} ÷ {}⌉",
                        number(demand.connections),
                        number(f64::from(fleet.node_connections))
                    ),
                ),
                // The work depends on the fleet's size, so the other limits are found by trial.
                Limit::Cores => ("fewest nodes by cores, found by trial", String::new()),
                Limit::Memory => ("fewest nodes by memory, likewise", String::new()),
                Limit::Bandwidth => ("fewest nodes by bandwidth, likewise", String::new()),
            };
            lines.push(line(what, sum, nodes.to_string(), "nodes"));
        }
        let sum = format!("{left} + {}", fleet.spare);
        lines.push(line("nodes, with the spare ones", sum, sizing.nodes.to_string(), "nodes"));
        lines
    }

    /// The calculations for one of the remaining nodes.
    fn lines_of_one(&self, sizing: &Sizing) -> Vec<Line> {
        let Self { load, fleet, costs, .. } = self;
        let Sizing { demand, node, left, .. } = sizing;
        let mut lines = Vec::new();
        let sum = format!("{} ÷ {left}", number(demand.connections));
        lines.push(line(
            format!("connections of each of the {left} remaining nodes"),
            sum,
            number(node.connections),
            "",
        ));
        let sum = format!("{left} × (1 − (1 − 1 ÷ {left}) ^ {})", number(demand.members));
        lines.push(line("nodes with a member of a room, on average", sum, number(node.interested), ""));
        let sum = format!("{} × {} ÷ {left}", number(demand.publications), number(node.interested));
        lines.push(line("publications that each receives", sum, number(node.publications), "/s"));
        let sum = format!("{} ÷ {left}", number(demand.deliveries));
        lines.push(line("deliveries of each", sum, number(node.deliveries), "/s"));
        let mut sum = format!(
            "({} × {} + {} × {} + {} × {}",
            number(node.deliveries),
            number(demand.delivery_us),
            number(node.publications),
            number(demand.publication_us),
            number(node.connections),
            number(demand.idle_us),
        );
        let from_clients = demand.publications * load.from_clients / f64::from(*left);
        if from_clients > 0.0 {
            sum = format!("{sum} + {} × {}", number(from_clients), number(costs.client_publish));
        }
        sum += ") ÷ 1,000,000";
        let what = "cores busy: deliveries, publications, connections";
        lines.push(line(what, sum, number(node.cores), ""));
        let sum = format!("{} × {}", number(fleet.node_cores), number(fleet.utilisation));
        lines.push(line("  may be busy", sum, number(fleet.node_cores * fleet.utilisation), ""));

        let sum = format!(
            "{} + {} × {} + {} × {}",
            number(costs.base_memory),
            number(node.connections),
            number(demand.connection_bytes),
            number(node.rooms),
            number(costs.room_memory)
        );
        lines.push(line("resident memory: base, connections, rooms", sum, bytes(node.resident), ""));
        let sum = format!("{} × {}", number(node.connections), number(costs.kernel_memory));
        lines.push(line("kernel memory of idle sockets", sum, bytes(node.kernel), ""));
        let sum = format!(
            "{} × {} × ({} + {})",
            number(node.connections),
            number(load.slow),
            number(f64::from(fleet.outbound)),
            number(costs.stalled_memory)
        );
        lines.push(line("memory for slow clients: limits.outbound, kernel", sum, bytes(node.waiting), ""));
        let sum = format!("{} + {} + {}", bytes(node.resident), bytes(node.kernel), bytes(node.waiting));
        lines.push(line("memory", sum, bytes(node.memory()), ""));
        let sum = format!("{} × {}", number(node.connections), number(f64::from(fleet.outbound)));
        lines.push(line(
            "bound of all outbound queues, if no client read",
            sum,
            bytes(sizing.host.worst_outbound),
            "",
        ));

        let writes = node.deliveries / f64::from(load.burst);
        let other = node.sent - writes * demand.write;
        let sum =
            format!("({} × {} + {}) × 8 ÷ 1,000,000", number(writes), number(demand.write), number(other));
        lines.push(line("sent: writes, and heartbeats", sum, number(node.sent * 8.0 / 1e6), "Mbit/s"));
        let redis = f64::from(load.size) + REDIS_MESSAGE;
        let other = node.received - node.publications * redis;
        let sum = format!(
            "({} × {} + {}) × 8 ÷ 1,000,000",
            number(node.publications),
            number(redis),
            number(other)
        );
        lines.push(line(
            "received: publications, and answers of clients",
            sum,
            number(node.received * 8.0 / 1e6),
            "Mbit/s",
        ));
        let sum = format!("⌈{}⌉ + {OTHER_DESCRIPTORS}", number(node.connections));
        lines.push(line("descriptors", sum, number(sizing.host.descriptors), ""));
        let sum = format!("⌈{} ÷ {}⌉", number(node.connections), number(EPHEMERAL_PORTS));
        lines.push(line(
            "addresses that a proxy needs for a node",
            sum,
            number(sizing.host.proxy_addresses),
            "",
        ));
        lines
    }

    fn lines_of_redis(&self, sizing: &Sizing) -> Vec<Line> {
        let Self { load, fleet, costs, .. } = self;
        let Sizing { demand, usual, redis, nodes, .. } = sizing;
        let message = f64::from(load.size) + REDIS_MESSAGE;
        let sum = format!(
            "{} × ({} + {} × {}) ÷ 1,000,000",
            number(demand.publications),
            number(costs.redis_publish),
            number(usual.interested),
            number(costs.redis_delivery)
        );
        let mut lines =
            vec![line("cores of Redis busy: PUBLISH, copies to nodes", sum, number(redis.cores), "")];
        let sum = format!(
            "{} × {} × {} × 8 ÷ 1,000,000",
            number(demand.publications),
            number(usual.interested),
            number(message)
        );
        lines.push(line("sent by Redis", sum, number(redis.sent * 8.0 / 1e6), "Mbit/s"));
        let sum = format!("⌈{} ÷ {}⌉", number(redis.cores), number(fleet.utilisation));
        lines.push(line("shards of Redis by cores", sum, number(redis.by_cores.ceil()), ""));
        let (sent, most) = (number(redis.sent * 8.0 / 1e9), number(fleet.bandwidth));
        let sum = format!("⌈{sent} ÷ ({most} × {})⌉", number(fleet.utilisation));
        lines.push(line("shards of Redis by Gbit/s", sum, number(redis.by_bandwidth.ceil()), ""));
        let sum = format!("{nodes} × ({} + {} + 4)", fleet.subscribers(), fleet.publishers());
        lines.push(line(
            "connections to Redis: subscribers, publishers, pool",
            sum,
            number(redis.connections),
            "",
        ));
        let sum = format!("{nodes} × {} × {}", fleet.subscribers(), number(OUTPUT_BUFFER));
        lines.push(line(
            "output buffers of Redis at most (pubsub 32mb)",
            sum,
            bytes(redis.output_buffers),
            "",
        ));
        if let Some(patience) = redis.patience {
            let each = redis.sent / f64::from(*nodes) / fleet.subscribers();
            let sum = format!("{} ÷ {}", number(OUTPUT_BUFFER), number(each));
            lines.push(line("a node may stop reading for", sum, number(patience), "s"));
        }
        lines
    }

    fn lines_of_storm(&self, sizing: &Sizing) -> Vec<Line> {
        let Sizing { demand, storm, nodes, .. } = sizing;
        let connect = |cores: f64| format!("{} × 1,000,000 ÷ {}", number(cores), number(demand.connect_us));
        let taken = |rate: f64| format!("the lesser of {} and {}", number(self.fleet.accepts), number(rate));
        let others = nodes.saturating_sub(1).max(1);
        let after_one = format!("{} ÷ {others} ÷ {}", number(storm.lost), number(storm.rate));
        let after_all = format!("{} ÷ {}", number(storm.lost), number(storm.idle_rate));
        vec![
            line(
                "connects that free cores can handle",
                connect(storm.free_cores),
                number(storm.by_free_cores),
                "/s",
            ),
            line("  limits.accepts allows", taken(storm.by_free_cores), number(storm.rate), "/s"),
            line("a node lost: all its clients are back after", after_one, number(storm.after_one_node), "s"),
            line(
                "connects that all cores can handle",
                connect(self.fleet.node_cores),
                number(storm.by_all_cores),
                "/s",
            ),
            line("  limits.accepts allows", taken(storm.by_all_cores), number(storm.idle_rate), "/s"),
            line("all connections cut: all are back after", after_all, number(storm.after_all), "s"),
        ]
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for sizing in self.sizings.iter().filter(|sizing| sizing.redis.shards > 1) {
            notes.push(format!(
                "{} connections: a fleet of this version uses one Redis server, so {} shards mean as many \
                 separate fleets, each with its own rooms",
                number(sizing.demand.connections),
                sizing.redis.shards
            ));
        }
        notes
    }
}

fn line(what: impl Into<String>, sum: String, result: String, unit: &'static str) -> Line {
    Line { what: what.into(), sum, result, unit }
}

/// Four significant digits, with thousands separators.
fn number(value: f64) -> String {
    let (mut digits, mut scaled) = (0, value.abs());
    while value != 0.0 && scaled < 1000.0 && digits < 9 {
        scaled *= 10.0;
        digits += 1;
    }
    let text = format!("{value:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    let (whole, rest) = text.split_once('.').map_or((text, None), |(whole, rest)| (whole, Some(rest)));
    let mut parted = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            parted.push(',');
        }
        parted.push(digit);
    }
    rest.map_or_else(|| parted.clone(), |rest| format!("{parted}.{rest}"))
}

fn percent(part: f64) -> String {
    format!("{} %", number(part * 100.0))
}

/// In MiB, or in GiB from 10,000 MiB.
fn bytes(value: f64) -> String {
    let mib = value / 1024.0 / 1024.0;
    if mib < 10_000.0 { format!("{} MiB", number(mib)) } else { format!("{} GiB", number(mib / 1024.0)) }
}

/// Bytes per second in bits, as network bandwidth is given.
fn bits(value: f64) -> String {
    let mega = value * 8.0 / 1e6;
    if mega < 10_000.0 {
        format!("{} Mbit/s", number(mega))
    } else {
        format!("{} Gbit/s", number(mega / 1000.0))
    }
}

fn seconds(value: f64) -> String {
    format!("{} s", number(value))
}
