//! The configuration of a node.
//!
//! [`Config`] is what the rest of the program sees: typed, checked and complete. A value in it cannot be
//! wrong, so nobody checks it again.

pub mod origin;
pub mod value;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use broker_bridge::BrokerUrl;

pub use self::origin::Origins;
pub use self::value::{ByteSize, LogFilter, LogFormat, Secret};
use crate::auth::grant::Policy;

/// The configuration of a node. Each field is a key of the reference in `docs/configuration.md`, which
/// says more about it.
#[derive(Clone, Debug)]
pub struct Config {
    /// What clients reach.
    pub public: Public,
    /// What operators reach.
    pub ops: Ops,
    /// Threads that own sockets. `auto` is resolved already.
    pub shards: usize,
    /// What carries publications between nodes.
    pub broker: Broker,
    /// How tokens are verified.
    pub auth: Auth,
    /// Web pages that may connect.
    pub origins: Origins,
    /// Whether the demo page is served. `auto` is resolved already.
    pub demo: bool,
    /// What every verified identity may do, in the order in which it was written.
    pub rooms: Vec<Policy>,
    /// How much anybody may use.
    pub limits: Limits,
    /// How a dead peer is noticed.
    pub heartbeat: Heartbeat,
    /// Server-sent events.
    pub sse: Sse,
    /// How the node leaves.
    pub drain: Drain,
    /// What is logged, and how.
    pub log: Log,
}

/// `public.*`: what clients reach.
#[derive(Clone, Debug)]
pub struct Public {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Time for the head of a request.
    pub header_timeout: Duration,
    /// Time for the body of a request.
    pub body_timeout: Duration,
}

/// `ops.*`: what operators reach.
#[derive(Clone, Debug)]
pub struct Ops {
    /// Where metrics and probes are served.
    pub listen: SocketAddr,
}

/// `broker.*`: what carries publications between nodes.
#[derive(Clone, Debug)]
pub struct Broker {
    /// Which broker, and where.
    pub url: BrokerUrl,
    /// Comes before `room:` in every topic. 0 to 64 bytes without white space, braces and control characters.
    pub prefix: String,
    /// Connections that receive publications.
    pub subscribers: usize,
    /// Connections that send publications.
    pub publishers: usize,
    /// Bytes of publications that may wait to be sent.
    pub publish_queue: ByteSize,
    /// The largest publication that is taken from the broker.
    pub max_publication: ByteSize,
    /// Time for a connection to be made.
    pub connect_timeout: Duration,
    /// Time for a subscription to be acknowledged.
    pub subscribe_timeout: Duration,
    /// Time for a publication to be acknowledged.
    pub publish_timeout: Duration,
    /// Time between two messages of a receiving connection to itself.
    pub canary_interval: Duration,
    /// A receiving connection that got no canary for this long is made anew.
    pub canary_timeout: Duration,
    /// Certificates that a TLS broker's own must descend from, in place of the built-in ones.
    pub ca_file: Option<PathBuf>,
}

/// `auth.*`: how tokens are verified.
#[derive(Clone, Debug)]
pub struct Auth {
    /// The shared key of HS256 tokens, from `auth.hs256_secret` or `auth.hs256_secret_file`; at least 32 bytes.
    pub hs256_secret: Option<Secret>,
    /// How far clocks may be apart.
    pub leeway: Duration,
}

/// `limits.*`: how much anybody may use.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Open connections on this node; new ones get 503 beyond.
    pub connections: usize,
    /// The largest message of a client, 1 byte to 16 MiB.
    pub message_size: ByteSize,
    /// Bytes queued per session.
    pub outbound: ByteSize,
    /// Rooms per session.
    pub rooms_per_session: usize,
}

/// `heartbeat.*`: how a dead peer is noticed.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    /// Time between two pings.
    pub interval: Duration,
    /// A client that sent no byte for this long is closed.
    pub timeout: Duration,
}

/// `sse.*`: server-sent events.
#[derive(Clone, Debug)]
pub struct Sse {
    /// Base of the `retry:` field, before jitter.
    pub retry: Duration,
}

/// `drain.*`: how the node leaves.
#[derive(Clone, Debug)]
pub struct Drain {
    /// Not ready, still serving, before closing starts.
    pub pause: Duration,
    /// Closes are spread evenly over this time.
    pub window: Duration,
    /// The whole drain; beyond it the node gives up and exits with 1.
    pub deadline: Duration,
}

/// `log.*`: what is logged, and how.
#[derive(Clone, Debug)]
pub struct Log {
    /// How lines are written.
    pub format: LogFormat,
    /// Which events are logged.
    pub filter: LogFilter,
}
