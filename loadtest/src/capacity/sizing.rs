//! The arithmetic: from a load and unit costs to the number of nodes, and the work of each node and of Redis.
//!
//! Everything is a mean over a fleet of equal nodes. Rounds up whatever cannot be fractional, and returns an
//! error when no fleet can carry the load.

use serde::Serialize;

use super::costs::UnitCosts;
use crate::cli::capacity::{Fleet, Load, Spoken};

/// The largest fleet considered.
pub const MAX_NODES: u32 = 10_000;
/// `heartbeat.interval`, in seconds. The CPU cost of an idle connection was measured with it.
pub const HEARTBEAT: f64 = 25.0;
/// Payload of a TCP segment on Ethernet, with timestamps.
pub const SEGMENT: f64 = 1448.0;
/// Headers of IPv4 and TCP with timestamps, in each packet; a packet without data is an acknowledgement.
pub const PACKET: f64 = 52.0;
/// Header, content type and tag of a TLS 1.3 record.
pub const TLS_RECORD: f64 = 22.0;
/// Bytes that Redis' push frame, a topic of 24 bytes, an envelope and packet headers add to a payload.
pub const REDIS_MESSAGE: f64 = 150.0;
/// Ports that Linux has for outgoing connections (`net.ipv4.ip_local_port_range`).
pub const EPHEMERAL_PORTS: f64 = 28_232.0;
/// Descriptors of a node besides its clients' sockets.
pub const OTHER_DESCRIPTORS: f64 = 256.0;
/// The hard limit of Redis' default `client-output-buffer-limit pubsub`, in bytes.
pub const OUTPUT_BUFFER: f64 = 32.0 * 1024.0 * 1024.0;
/// `compression.threshold`, in bytes.
const DEFLATE_FROM: u32 = 256;
/// The payload with which the CPU of a delivery was measured, in bytes.
const MEASURED_SIZE: f64 = 256.0;
const KIB: f64 = 1024.0;
const GIB: f64 = KIB * KIB * KIB;

/// The answer for one number of connections.
#[derive(Clone, Debug, Serialize)]
pub struct Sizing {
    pub demand: Demand,
    /// The nodes that each limit alone would need.
    pub needed: Vec<(Limit, u32)>,
    /// Nodes that remain when the spare ones are lost: they must keep every limit.
    pub left: u32,
    /// Nodes to run.
    pub nodes: u32,
    /// One of the remaining nodes.
    pub node: Node,
    /// One node while none is lost.
    pub usual: Node,
    pub redis: Redis,
    pub storm: Storm,
    pub host: Host,
}

/// The resources of a node that may run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    Connections,
    Cores,
    Memory,
    Bandwidth,
}

/// The work of the whole fleet, independent of its number of nodes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Demand {
    pub connections: f64,
    /// Members of a room.
    pub members: f64,
    pub rooms: f64,
    /// Per second.
    pub publications: f64,
    /// Per second.
    pub deliveries: f64,
    /// Bytes of a publication to a client: after compression, before any framing.
    pub payload: f64,
    /// Bytes of a delivery, with the frame.
    pub frame: f64,
    /// Bytes of a write, with TLS and packet headers.
    pub write: f64,
    /// µs of CPU of a delivery as a plain frame that shares its write with the others of a burst.
    pub plain_us: f64,
    /// µs of CPU of a delivery with the configured protocol, TLS and size.
    pub delivery_us: f64,
    /// µs of CPU per connection and second.
    pub idle_us: f64,
    /// µs of CPU of a new connection.
    pub connect_us: f64,
    /// Resident bytes per connection.
    pub connection_bytes: f64,
    /// µs of CPU for a publication that reaches a node: receiving it, and compressing it if configured.
    pub publication_us: f64,
}

/// The work of one of `n` nodes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Node {
    pub connections: f64,
    pub rooms: f64,
    /// Nodes that are interested in a room.
    pub interested: f64,
    /// Publications received per second.
    pub publications: f64,
    /// Per second.
    pub deliveries: f64,
    /// Busy cores.
    pub cores: f64,
    /// Bytes.
    pub resident: f64,
    /// Kernel bytes for sockets with empty buffers.
    pub kernel: f64,
    /// Bytes that wait for slow clients, in the node and the kernel.
    pub waiting: f64,
    /// Bytes per second, including packet headers.
    pub sent: f64,
    pub received: f64,
}

/// The work of Redis for all nodes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Redis {
    /// Busy cores. One server can use one, because Redis executes commands on one thread.
    pub cores: f64,
    /// Bytes per second.
    pub sent: f64,
    /// Servers, each with its part of the rooms, that keep the utilisation.
    pub shards: u32,
    /// The number of servers that each limit would need.
    pub by_cores: f64,
    pub by_bandwidth: f64,
    pub connections: f64,
    /// Seconds that a node may stop reading before Redis disconnects it; `None` if nothing is published.
    pub patience: Option<f64>,
    /// Bytes that Redis then holds for all nodes.
    pub output_buffers: f64,
}

/// How long clients take to reconnect, in seconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Storm {
    /// Connections of a lost node.
    pub lost: f64,
    /// Cores of each remaining node that its work leaves free.
    pub free_cores: f64,
    /// Connections per second that these cores can handle.
    pub by_free_cores: f64,
    /// Connections per second that such a node accepts.
    pub rate: f64,
    pub after_one_node: f64,
    /// Connections per second that a node without other work can handle.
    pub by_all_cores: f64,
    pub idle_rate: f64,
    pub after_all: f64,
}

/// Requirements of the machines around it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Host {
    pub descriptors: f64,
    /// Addresses that a proxy needs to reach one node.
    pub proxy_addresses: f64,
    /// Bytes in outbound queues if no client of a node reads.
    pub worst_outbound: f64,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Impossible {
    #[error(
        "--members {members}: {connections} connections in {each} rooms each cannot give a room more than {connections} members"
    )]
    Members { members: f64, connections: f64, each: f64 },
    #[error("--rooms {rooms}: {connections} connections in {each} rooms each are in {most} rooms at most")]
    Rooms { rooms: f64, connections: f64, each: f64, most: f64 },
    #[error("--deflate: event streams are not compressed")]
    DeflateStream,
    #[error("--delivery-of-eight: expected between an eighth of --delivery and all of it, {least} to {most}")]
    Eight { least: f64, most: f64 },
    #[error(
        "{connections} connections: no fleet of up to {MAX_NODES} nodes keeps within the {limit} of each; \
         give a node more, raise what may be used of it, or lower the load"
    )]
    NoFleet { connections: f64, limit: &'static str },
}

impl Limit {
    const ALL: [Self; 4] = [Self::Connections, Self::Cores, Self::Memory, Self::Bandwidth];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Cores => "cores",
            Self::Memory => "memory",
            Self::Bandwidth => "bandwidth",
        }
    }

    /// Whether `node` keeps this limit.
    fn allows(self, node: &Node, fleet: &Fleet) -> bool {
        match self {
            Self::Connections => node.connections <= f64::from(fleet.node_connections),
            Self::Cores => node.cores <= fleet.node_cores * fleet.utilisation,
            Self::Memory => node.memory() <= fleet.node_memory * GIB * fleet.memory_utilisation,
            Self::Bandwidth => {
                node.sent.max(node.received) * 8.0 <= fleet.bandwidth * 1e9 * fleet.utilisation
            }
        }
    }
}

impl Sizing {
    /// The smallest fleet that carries `load` on `connections` connections.
    pub fn of(connections: u64, load: &Load, fleet: &Fleet, costs: &UnitCosts) -> Result<Self, Impossible> {
        #[expect(clippy::cast_precision_loss, reason = "a thousand million at most")]
        let demand = Demand::of(connections as f64, load, costs)?;
        let part = |nodes: u32| demand.part(nodes, load, fleet, costs);
        let mut needed = Vec::new();
        for limit in Limit::ALL {
            let nodes = fewest(|nodes| limit.allows(&part(nodes), fleet));
            let impossible = Impossible::NoFleet { connections: demand.connections, limit: limit.as_str() };
            needed.push((limit, nodes.ok_or(impossible)?));
        }
        let left = needed.iter().map(|(_, nodes)| *nodes).max().unwrap_or(1);
        let nodes = left + fleet.spare;
        let (node, usual) = (part(left), part(nodes));
        let redis = demand.redis(nodes, &usual, load, fleet, costs);
        let storm = demand.storm(nodes, &part(nodes.saturating_sub(1).max(1)), fleet);
        let host = Host {
            descriptors: node.connections.ceil() + OTHER_DESCRIPTORS,
            proxy_addresses: (node.connections / EPHEMERAL_PORTS).ceil(),
            worst_outbound: node.connections * f64::from(fleet.outbound),
        };
        Ok(Self { demand, needed, left, nodes, node, usual, redis, storm, host })
    }

    /// The limit that determined the number of nodes.
    pub fn decided_by(&self) -> Limit {
        let most = self.needed.iter().rev().max_by_key(|(_, nodes)| *nodes);
        most.map_or(Limit::Connections, |(limit, _)| *limit)
    }
}

/// The fewest nodes that `fit`, if any number does. What fits also fits with more nodes.
fn fewest(fit: impl Fn(u32) -> bool) -> Option<u32> {
    let (mut below, mut at_least) = (0, MAX_NODES);
    if !fit(at_least) {
        return None;
    }
    while at_least - below > 1 {
        let middle = below.midpoint(at_least);
        if fit(middle) { at_least = middle } else { below = middle }
    }
    Some(at_least)
}

impl Demand {
    fn of(connections: f64, load: &Load, costs: &UnitCosts) -> Result<Self, Impossible> {
        let each = load.rooms_per_connection;
        let memberships = connections * each;
        let rooms = load.rooms.unwrap_or(memberships / load.members);
        let members = memberships / rooms;
        if members > connections {
            return Err(match load.rooms {
                Some(_) => Impossible::Members { members, connections, each },
                None => Impossible::Members { members: load.members, connections, each },
            });
        }
        if members < 1.0 {
            return Err(Impossible::Rooms { rooms, connections, each, most: memberships });
        }
        if load.deflate && load.protocol == Spoken::Sse {
            return Err(Impossible::DeflateStream);
        }
        let (alone, of_eight) = (costs.delivery, costs.delivery_of_eight);
        if !(alone / 8.0..=alone).contains(&of_eight) {
            return Err(Impossible::Eight { least: alone / 8.0, most: alone });
        }
        let publications = load.rate.unwrap_or(rooms * load.room_rate);
        let (size, burst) = (f64::from(load.size), f64::from(load.burst));
        let deflates = load.deflate && load.size >= DEFLATE_FROM;
        let payload = if deflates { size * costs.deflate_ratio } else { size };
        let frame = payload + load.protocol.framing(payload);
        let write = with_heads(burst * frame, load.tls);
        let plain_us = costs.alone_in(burst) + costs.delivery_kib * (payload - MEASURED_SIZE).max(0.0) / KIB;
        let tls_us = if load.tls { costs.tls_record / burst + costs.tls_kib * frame / KIB } else { 0.0 };
        let deflate_us =
            if deflates { costs.deflate_publication + costs.deflate_kib * size / KIB } else { 0.0 };
        let of = |plain, tls| if load.tls { tls } else { plain };
        Ok(Self {
            connections,
            members,
            rooms,
            publications,
            deliveries: publications * members,
            payload,
            frame,
            write,
            plain_us,
            delivery_us: plain_us * load.protocol.factor(costs) + tls_us,
            idle_us: of(costs.idle, costs.idle_tls),
            connect_us: of(costs.connect, costs.connect_tls),
            connection_bytes: of(costs.memory, costs.memory_tls),
            publication_us: costs.publication + deflate_us,
        })
    }

    /// The work of one of `nodes` nodes.
    fn part(&self, nodes: u32, load: &Load, fleet: &Fleet, costs: &UnitCosts) -> Node {
        let nodes = f64::from(nodes);
        let connections = self.connections / nodes;
        // A node is interested in a room unless none of its members is there.
        let interested = nodes * (1.0 - (1.0 - 1.0 / nodes).powf(self.members));
        let publications = self.publications * interested / nodes;
        let deliveries = self.deliveries / nodes;
        let from_clients = self.publications * load.from_clients / nodes;
        let cpu_us = deliveries * self.delivery_us
            + publications * self.publication_us
            + from_clients * costs.client_publish
            + connections * self.idle_us;
        let writes = deliveries / f64::from(load.burst);
        let beats = connections / HEARTBEAT;
        let (beat, answer) = load.protocol.heartbeat();
        let size = f64::from(load.size);
        let redis = publications * (size + REDIS_MESSAGE);
        let said = with_heads(size + load.protocol.client_framing(size), load.tls);
        let acknowledged = (self.write / (SEGMENT + PACKET) / 2.0).ceil() * PACKET;
        Node {
            connections,
            rooms: self.rooms * interested / nodes,
            interested,
            publications,
            deliveries,
            cores: cpu_us / 1e6,
            resident: costs.base_memory
                + connections * self.connection_bytes
                + self.rooms * interested / nodes * costs.room_memory,
            kernel: connections * costs.kernel_memory,
            waiting: connections * load.slow * (f64::from(fleet.outbound) + costs.stalled_memory),
            sent: writes * self.write
                + beats * (with_heads(beat, load.tls) + PACKET)
                + from_clients * (size + REDIS_MESSAGE),
            received: writes * acknowledged
                + beats * (answer.map_or(0.0, |answer| with_heads(answer, load.tls)) + PACKET)
                + from_clients * said
                + redis,
        }
    }

    fn redis(&self, nodes: u32, usual: &Node, load: &Load, fleet: &Fleet, costs: &UnitCosts) -> Redis {
        let copies = self.publications * usual.interested;
        let cores = (self.publications * costs.redis_publish + copies * costs.redis_delivery) / 1e6;
        let message = f64::from(load.size) + REDIS_MESSAGE;
        let sent = copies * message;
        let by_cores = cores / fleet.utilisation;
        let by_bandwidth = sent * 8.0 / (fleet.bandwidth * 1e9 * fleet.utilisation);
        let (nodes, subscribers) = (f64::from(nodes), fleet.subscribers());
        let each = sent / (nodes * subscribers);
        Redis {
            cores,
            sent,
            shards: whole(by_cores.max(by_bandwidth).max(1.0)),
            by_cores,
            by_bandwidth,
            connections: nodes * (subscribers + fleet.publishers() + 4.0),
            patience: (each > 0.0).then(|| OUTPUT_BUFFER / each),
            output_buffers: nodes * subscribers * OUTPUT_BUFFER,
        }
    }

    /// `beside` is the work of one of the remaining nodes while the clients of the lost one reconnect.
    fn storm(&self, nodes: u32, beside: &Node, fleet: &Fleet) -> Storm {
        let lost = self.connections / f64::from(nodes);
        let others = f64::from(nodes.saturating_sub(1).max(1));
        let connects = |cores: f64| cores * 1e6 / self.connect_us.max(0.001);
        // Without a spare node the others may have nothing left: clients reconnect anyway, at some cost to
        // others.
        let free_cores = (fleet.node_cores - beside.cores).max(fleet.node_cores / 100.0);
        let (by_free_cores, by_all_cores) = (connects(free_cores), connects(fleet.node_cores));
        let (rate, idle_rate) = (fleet.accepts.min(by_free_cores), fleet.accepts.min(by_all_cores));
        Storm {
            lost,
            free_cores,
            by_free_cores,
            rate,
            after_one_node: lost / others / rate,
            by_all_cores,
            idle_rate,
            after_all: lost / idle_rate,
        }
    }
}

impl Node {
    /// All of its memory, including the kernel's.
    pub fn memory(&self) -> f64 {
        self.resident + self.kernel + self.waiting
    }
}

impl UnitCosts {
    /// The cost of a delivery whose write carries `burst` of them: the system call is shared, the rest is
    /// not.
    pub fn alone_in(&self, burst: f64) -> f64 {
        (self.delivery + (burst - 1.0) * self.further()) / burst
    }

    /// The cost of each further delivery of a write.
    pub fn further(&self) -> f64 {
        (8.0 * self.delivery_of_eight - self.delivery) / 7.0
    }
}

impl Spoken {
    /// The CPU of a delivery, relative to a plain one.
    pub fn factor(self, costs: &UnitCosts) -> f64 {
        match self {
            Self::Plain => 1.0,
            Self::Centrifuge => costs.centrifuge,
            Self::Sse => costs.sse,
        }
    }

    /// The framing bytes of a publication of this size.
    fn framing(self, payload: f64) -> f64 {
        match self {
            Self::Plain => head(payload),
            // The push around the data, with a channel name of 16 bytes.
            Self::Centrifuge => 55.0 + head(payload + 55.0),
            // `data: `, two line breaks, and an HTTP chunk.
            Self::Sse => 8.0 + 7.0,
        }
    }

    /// The same for a client's message, which is masked; for a POST, its header.
    fn client_framing(self, payload: f64) -> f64 {
        match self {
            Self::Plain => head(payload) + 4.0,
            Self::Centrifuge => 55.0 + head(payload + 55.0) + 4.0,
            Self::Sse => 400.0,
        }
    }

    /// The node's heartbeat and the client's answer, in bytes.
    fn heartbeat(self) -> (f64, Option<f64>) {
        match self {
            Self::Plain => (2.0, Some(6.0)),
            Self::Centrifuge => (4.0, Some(8.0)),
            Self::Sse => (8.0, None),
        }
    }
}

/// The length of a frame's header (RFC 6455 §5.2).
fn head(payload: f64) -> f64 {
    match payload {
        ..126.0 => 2.0,
        126.0..65_536.0 => 4.0,
        _ => 10.0,
    }
}

/// The bytes on the wire of a write, with TLS records and packet headers.
fn with_heads(bytes: f64, tls: bool) -> f64 {
    let bytes = if tls { bytes + (bytes / (16.0 * KIB)).ceil() * TLS_RECORD } else { bytes };
    bytes + (bytes / SEGMENT).ceil() * PACKET
}

/// Rounds up; no fleet comes near the end of the range.
fn whole(number: f64) -> u32 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and is positive")]
    let whole = number.ceil() as u32;
    whole
}
