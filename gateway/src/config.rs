//! The configuration of a node.
//!
//! The rest of the program uses [`Config`]: typed, validated and complete, so that nobody checks a value
//! again. [`Config::load`] builds it from [`Sources`]: the defaults, then a TOML file, then the environment,
//! then flags. If anything is wrong, it returns all errors at once.
//!
//! | module | what it holds |
//! |---|---|
//! | `table` | every key: its kind, default and documentation |
//! | `kind` | the kinds of values, with their bounds |
//! | [`value`] | sizes, times, secrets |
//! | [`origin`] | which web pages may connect |
//! | [`log_filter`] | which events are logged |
//! | [`rate`], [`networks`] | rates; sets of addresses |
//! | `machine` | how much memory is available |
//! | `layers`, `raw` | reading and merging the layers |
//! | `reader` | conversion of raw values to typed ones |
//! | [`Snapshot`] | the value of each key, to find what a new configuration changes |
//! | [`document`] | the commented default file and the reference, generated from the table |
//!
//! This module opens no port and no connection. It reads the files that `*_file` keys name.

pub mod document;
mod error;
mod kind;
mod layers;
pub mod log_filter;
mod machine;
pub mod networks;
pub mod origin;
pub mod rate;
mod raw;
mod reader;
mod snapshot;
mod suggest;
mod table;
#[cfg(test)]
mod tests;
pub mod value;

use std::{net::SocketAddr, num::NonZero, path::PathBuf, thread, time::Duration};

use broker_bridge::{
    BrokerUrl,
    redis::{Endpoint, Prefix, RedisUrl},
};

pub use self::{
    error::{ConfigError, ConfigErrors, Source},
    layers::Sources,
    log_filter::LogFilter,
    networks::Networks,
    origin::Origins,
    rate::{ByteRate, Rate},
    snapshot::{Changes, Snapshot},
    value::{ByteSize, ForwardedHeader, LogFormat},
};
use self::{reader::Reader, table as key, value::format_time};
use crate::{
    auth::{
        CookieName,
        files::{Contents, LocalKeys},
        grant::Policy,
        remote::JwksUrl,
    },
    delivery::DeliveryPolicy,
    history::HistoryPolicy,
};

/// The configuration of a node. Each field is a key of the reference in `docs/configuration.md`, which has
/// the details.
#[derive(Clone, Debug)]
pub struct Config {
    /// The listener for clients.
    pub public: Public,
    /// The public listener's certificate; without one it is plain.
    pub tls: Option<Tls>,
    /// The listener for operators.
    pub ops: Ops,
    /// Number of shards, the threads that own sockets. `auto` is already resolved.
    pub shards: usize,
    /// The broker that carries publications between nodes.
    pub broker: Broker,
    /// How tokens are verified.
    pub auth: Auth,
    /// Web pages that may connect.
    pub origins: Origins,
    /// Whether to serve the demo page. `auto` is already resolved.
    pub demo: bool,
    /// What every verified identity may do, in the order in which it was written.
    pub rooms: Vec<Policy>,
    /// How rooms behave in the outbound queues of their members.
    pub delivery: Vec<DeliveryPolicy>,
    /// How much of a room's publications is kept.
    pub history: Vec<HistoryPolicy>,
    /// Limits of what clients may use.
    pub limits: Limits,
    /// Whether messages are compressed.
    pub compression: Compression,
    /// How dead peers are detected.
    pub heartbeat: Heartbeat,
    /// Server-sent events.
    pub sse: Sse,
    /// How the node drains.
    pub drain: Drain,
    /// What is logged, and how.
    pub log: Log,
    /// The value of each key.
    pub snapshot: Snapshot,
}

/// A configuration and its sources, which allow it to be read again.
#[derive(Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// The sources.
    pub sources: Sources,
}

/// `public.*`: the listener for clients.
#[derive(Clone, Debug)]
pub struct Public {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Time limit for the head of a request to arrive.
    pub header_timeout: Duration,
    /// Time limit for the body of a request to arrive.
    pub body_timeout: Duration,
    /// How long an idle connection waits for the next request.
    pub keep_alive: Duration,
    /// The age at which clients are asked to reconnect, before jitter.
    pub max_session_age: Option<Duration>,
    /// Proxies that may report a client's address.
    pub trusted_proxies: Networks,
    /// The header in which they report it.
    pub forwarded_header: ForwardedHeader,
    /// Whether their connections begin with a PROXY protocol header.
    pub proxy_protocol: bool,
}

/// `tls.*`: the public listener's certificate.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The file of the certificate chain (PEM).
    pub cert: PathBuf,
    /// The file of its private key (PEM).
    pub key: PathBuf,
}

/// `ops.*`: the listener for operators.
#[derive(Clone, Debug)]
pub struct Ops {
    /// Where metrics and probes are served.
    pub listen: SocketAddr,
}

/// `broker.*`: the broker that carries publications between nodes.
#[derive(Clone, Debug)]
pub struct Broker {
    /// Which broker, and where.
    pub url: BrokerUrl,
    /// Prefix of every topic name, before `room:`.
    pub prefix: Prefix,
    /// Number of connections that receive publications; at most one per shard.
    pub subscribers: usize,
    /// Number of connections that send publications; at most one per shard.
    pub publishers: usize,
    /// Maximum total size of the publications that wait to be sent.
    pub publish_queue: ByteSize,
    /// The largest publication that is accepted from the broker.
    pub max_publication: ByteSize,
    /// Time limit for connecting.
    pub connect_timeout: Duration,
    /// Time limit for the acknowledgement of a subscription.
    pub subscribe_timeout: Duration,
    /// Time limit for the acknowledgement of a publication.
    pub publish_timeout: Duration,
    /// Time between two canary messages to a receiving connection.
    pub canary_interval: Duration,
    /// A receiving connection that got no canary for this long is replaced.
    pub canary_timeout: Duration,
    /// Certificates to trust for a TLS broker, instead of the system's.
    pub ca_file: Option<PathBuf>,
}

/// `auth.*`: how tokens are verified.
#[derive(Clone, Debug)]
pub struct Auth {
    /// Keys on this machine: `auth.hs256_secret` or `auth.hs256_secret_file`, `auth.keys`, `auth.jwks_file`.
    pub keys: LocalKeys,
    /// The validated contents of their files at the time of loading.
    pub key_files: Contents,
    /// The URL of a key set.
    pub jwks_url: Option<JwksUrl>,
    /// Time between two fetches.
    pub jwks_interval: Duration,
    /// Certificates to trust for the URL, instead of the system's.
    pub jwks_ca_file: Option<PathBuf>,
    /// The required `iss`.
    pub issuer: Option<String>,
    /// `aud` must contain one of these names. If empty, there must be no `aud`.
    pub audience: Vec<String>,
    /// The cookie that may carry a token. Without it, no cookie is read.
    pub cookie: Option<CookieName>,
    /// The tolerated difference between clocks.
    pub leeway: Duration,
}

/// `limits.*`: limits of what clients may use.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Open connections on this node; beyond it, new ones get 503.
    pub connections: usize,
    /// The largest message of a client, 1 byte to 16 MiB.
    pub message_size: ByteSize,
    /// Bytes queued per session.
    pub outbound: ByteSize,
    /// Bytes held for clients, all kinds together. `auto` is already resolved.
    pub memory: ByteSize,
    /// Rooms per session.
    pub rooms_per_session: usize,
    /// New connections on this node; further ones wait in the kernel.
    pub accepts: Option<Rate>,
    /// New connections from one address.
    pub attempts_per_address: Option<Rate>,
    /// Open connections from one address.
    pub connections_per_address: Option<usize>,
    /// Commands of one session.
    pub commands: Option<Rate>,
    /// Bytes from one session.
    pub bytes: Option<ByteRate>,
    /// Commands of one user on this node.
    pub user_commands: Option<Rate>,
    /// Bytes from one user on this node.
    pub user_bytes: Option<ByteRate>,
}

/// `compression.*`: whether messages are compressed (RFC 7692).
#[derive(Clone, Debug)]
pub struct Compression {
    /// Whether to accept compression when a client offers it.
    pub enabled: bool,
    /// Smaller payloads are sent uncompressed.
    pub threshold: ByteSize,
}

/// `heartbeat.*`: how dead peers are detected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// Time between two pings.
    pub interval: Duration,
    /// A client that has sent nothing for this long is closed.
    pub timeout: Duration,
}

/// `sse.*`: server-sent events.
#[derive(Clone, Debug)]
pub struct Sse {
    /// Base of the `retry:` field, before jitter.
    pub retry: Duration,
}

/// `drain.*`: how the node drains.
#[derive(Clone, Debug)]
pub struct Drain {
    /// How long the node is not ready but still serves, before it closes sessions.
    pub pause: Duration,
    /// Time over which the closing of sessions is spread evenly.
    pub window: Duration,
    /// Time limit for the whole drain; after it the node exits with status 1.
    pub deadline: Duration,
}

/// `log.*`: what is logged, and how.
#[derive(Clone, Debug)]
pub struct Log {
    /// The format of log lines.
    pub format: LogFormat,
    /// Which events are logged.
    pub filter: LogFilter,
}

impl Config {
    /// Reads and validates a configuration.
    ///
    /// A layer's value replaces that of the layers below it; lists and the room policies are replaced as a
    /// whole. Only the effective value is validated. Unknown keys are errors in every layer.
    pub fn load(sources: &Sources) -> Result<Self, ConfigErrors> {
        let mut from = Reader::new(sources);
        let auth = Auth::read(&mut from);
        let broker_url = from.text_or_file(&key::BROKER_URL, &key::BROKER_URL_FILE);
        let (cert, key) = (from.read_optional(&key::TLS_CERT), from.read_optional(&key::TLS_KEY));
        for (has, lacks, has_key, lacks_key) in
            [(&cert, &key, &key::TLS_CERT, &key::TLS_KEY), (&key, &cert, &key::TLS_KEY, &key::TLS_CERT)]
        {
            from.require(has.is_none() || lacks.is_some(), has_key, &[lacks_key], || {
                format!("expected {} as well", lacks_key.name)
            });
        }
        let shards = from.read(&key::SHARDS).unwrap_or_else(available_shards);
        let mut config = Self {
            tls: cert.zip(key).map(|(cert, key)| Tls { cert, key }),
            shards,
            origins: from.read(&key::ORIGINS),
            demo: from.read(&key::DEMO).unwrap_or(!auth.has_key()),
            public: Public {
                listen: from.read(&key::PUBLIC_LISTEN),
                header_timeout: from.read(&key::PUBLIC_HEADER_TIMEOUT),
                body_timeout: from.read(&key::PUBLIC_BODY_TIMEOUT),
                keep_alive: from.read(&key::PUBLIC_KEEP_ALIVE),
                max_session_age: from.read_optional(&key::PUBLIC_MAX_SESSION_AGE),
                trusted_proxies: from.read(&key::PUBLIC_TRUSTED_PROXIES),
                forwarded_header: from.read(&key::PUBLIC_FORWARDED_HEADER),
                proxy_protocol: from.read(&key::PUBLIC_PROXY_PROTOCOL),
            },
            ops: Ops { listen: from.read(&key::OPS_LISTEN) },
            broker: Broker {
                url: broker_url.unwrap_or(BrokerUrl::Memory),
                prefix: from.read(&key::BROKER_PREFIX),
                subscribers: broker_connections(from.read(&key::BROKER_SUBSCRIBERS), shards),
                publishers: broker_connections(from.read(&key::BROKER_PUBLISHERS), shards),
                publish_queue: from.read(&key::BROKER_PUBLISH_QUEUE),
                max_publication: from.read(&key::BROKER_MAX_PUBLICATION),
                connect_timeout: from.read(&key::BROKER_CONNECT_TIMEOUT),
                subscribe_timeout: from.read(&key::BROKER_SUBSCRIBE_TIMEOUT),
                publish_timeout: from.read(&key::BROKER_PUBLISH_TIMEOUT),
                canary_interval: from.read(&key::BROKER_CANARY_INTERVAL),
                canary_timeout: from.read(&key::BROKER_CANARY_TIMEOUT),
                ca_file: from.read_optional(&key::BROKER_CA_FILE),
            },
            auth,
            limits: Limits {
                connections: from.read(&key::LIMITS_CONNECTIONS),
                message_size: from.read(&key::LIMITS_MESSAGE_SIZE),
                outbound: from.read(&key::LIMITS_OUTBOUND),
                memory: from.read(&key::LIMITS_MEMORY).unwrap_or_else(|| machine::share().bytes),
                rooms_per_session: from.read(&key::LIMITS_ROOMS_PER_SESSION),
                accepts: from.read(&key::LIMITS_ACCEPTS),
                attempts_per_address: from.read(&key::LIMITS_ATTEMPTS_PER_ADDRESS),
                connections_per_address: from.read(&key::LIMITS_CONNECTIONS_PER_ADDRESS),
                commands: from.read(&key::LIMITS_COMMANDS),
                bytes: from.read(&key::LIMITS_BYTES),
                user_commands: from.read(&key::LIMITS_USER_COMMANDS),
                user_bytes: from.read(&key::LIMITS_USER_BYTES),
            },
            compression: Compression {
                enabled: from.read(&key::COMPRESSION_ENABLED),
                threshold: from.read(&key::COMPRESSION_THRESHOLD),
            },
            heartbeat: Heartbeat {
                interval: from.read(&key::HEARTBEAT_INTERVAL),
                timeout: from.read(&key::HEARTBEAT_TIMEOUT),
            },
            sse: Sse { retry: from.read(&key::SSE_RETRY) },
            drain: Drain {
                pause: from.read(&key::DRAIN_PAUSE),
                window: from.read(&key::DRAIN_WINDOW),
                deadline: from.read(&key::DRAIN_DEADLINE),
            },
            log: Log { format: from.read(&key::LOG_FORMAT), filter: from.read(&key::LOG_FILTER) },
            rooms: Vec::new(),
            delivery: Vec::new(),
            history: Vec::new(),
            snapshot: Snapshot::default(),
        };
        (config.rooms, config.delivery, config.history) = from.read_rooms();
        config.check_together(&mut from);
        config.snapshot = from.finish()?;
        Ok(config)
    }

    /// The ops listener's address and where it was configured. Validates nothing else: a running node keeps
    /// working when its configuration becomes invalid, and its health must still be checkable.
    pub fn ops_listen(sources: &Sources) -> Result<(SocketAddr, Source), ConfigErrors> {
        let mut from = Reader::new(sources);
        let listen = from.read(&key::OPS_LISTEN);
        let source = from.source(&key::OPS_LISTEN);
        from.finish_with(&key::OPS_LISTEN)?;
        Ok((listen, source))
    }

    /// Checks the relations between keys.
    fn check_together(&self, from: &mut Reader) {
        let Self { public, ops, broker, limits, heartbeat, drain, .. } = self;
        from.require(!collide(public.listen, ops.listen), &key::OPS_LISTEN, &[&key::PUBLIC_LISTEN], || {
            format!("expected a port other than that of public.listen, {}", public.listen)
        });
        from.require(
            broker.canary_timeout > broker.canary_interval,
            &key::BROKER_CANARY_TIMEOUT,
            &[&key::BROKER_CANARY_INTERVAL],
            || format!("expected more than broker.canary_interval, {}", format_time(broker.canary_interval)),
        );
        from.require(
            heartbeat.timeout > heartbeat.interval,
            &key::HEARTBEAT_TIMEOUT,
            &[&key::HEARTBEAT_INTERVAL],
            || format!("expected more than heartbeat.interval, {}", format_time(heartbeat.interval)),
        );
        let closing = drain.pause + drain.window;
        from.require(
            drain.deadline >= closing,
            &key::DRAIN_DEADLINE,
            &[&key::DRAIN_PAUSE, &key::DRAIN_WINDOW],
            || {
                let closing = format_time(closing);
                format!("expected at least drain.pause and drain.window together, {closing}")
            },
        );
        let room_for_a_message = || format!("expected at least limits.message_size, {}", limits.message_size);
        for (size, key) in [
            (limits.outbound, &key::LIMITS_OUTBOUND),
            (broker.publish_queue, &key::BROKER_PUBLISH_QUEUE),
            (broker.max_publication, &key::BROKER_MAX_PUBLICATION),
        ] {
            from.require(size >= limits.message_size, key, &[&key::LIMITS_MESSAGE_SIZE], room_for_a_message);
        }
        for (rate, key) in [
            (limits.bytes, &key::LIMITS_BYTES as &dyn table::Row),
            (limits.user_bytes, &key::LIMITS_USER_BYTES),
        ] {
            let enough = limits.message_size.get();
            from.require(
                rate.is_none_or(|ByteRate(rate)| rate.burst().get() as usize >= enough),
                key,
                &[&key::LIMITS_MESSAGE_SIZE],
                || format!("expected a burst of at least limits.message_size, {}", limits.message_size),
            );
        }
        from.require(
            !public.proxy_protocol || !public.trusted_proxies.is_empty(),
            &key::PUBLIC_PROXY_PROTOCOL,
            &[&key::PUBLIC_TRUSTED_PROXIES],
            || "expected public.trusted_proxies to list the proxies that send it".to_owned(),
        );
        from.require(
            broker.ca_file.is_none() || is_tls(&broker.url),
            &key::BROKER_CA_FILE,
            &[&key::BROKER_URL, &key::BROKER_URL_FILE],
            || "expected a broker with TLS (rediss://)".to_owned(),
        );
    }
}

impl Auth {
    /// Whether tokens can be verified at all.
    pub fn has_key(&self) -> bool {
        !self.keys.is_empty() || self.jwks_url.is_some()
    }

    fn read(from: &mut Reader) -> Self {
        let keys = LocalKeys {
            secret: from.text_or_file(&key::AUTH_HS256_SECRET, &key::AUTH_HS256_SECRET_FILE),
            files: from.read_optional(&key::AUTH_KEYS).unwrap_or_default(),
            jwks: from.read_optional(&key::AUTH_JWKS_FILE),
        };
        let key_files = keys.read().unwrap_or_else(|errors| {
            for error in errors {
                let key: &dyn table::Row =
                    if error.key() == key::AUTH_KEYS.name { &key::AUTH_KEYS } else { &key::AUTH_JWKS_FILE };
                from.complain(key, error.to_string());
            }
            Contents::default()
        });
        let auth = Self {
            keys,
            key_files,
            jwks_url: from.read_optional(&key::AUTH_JWKS_URL),
            jwks_interval: from.read(&key::AUTH_JWKS_INTERVAL),
            jwks_ca_file: from.read_optional(&key::AUTH_JWKS_CA_FILE),
            issuer: from.read_optional(&key::AUTH_ISSUER),
            audience: from.read(&key::AUTH_AUDIENCE),
            cookie: from.read_optional(&key::AUTH_COOKIE),
            leeway: from.read(&key::AUTH_LEEWAY),
        };
        from.require(
            auth.jwks_ca_file.is_none() || auth.jwks_url.is_some(),
            &key::AUTH_JWKS_CA_FILE,
            &[&key::AUTH_JWKS_URL],
            || "expected auth.jwks_url as well".to_owned(),
        );
        auth
    }
}

/// The most connections to the broker of each kind, unless configured.
const MOST_BROKER_CONNECTIONS: usize = 8;

fn available_shards() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get).min(256)
}

/// How many connections of a kind the shards use. Each shard uses one; by default not more than a few, because a large
/// fleet of large nodes would exhaust Redis.
fn broker_connections(configured: Option<usize>, shards: usize) -> usize {
    configured.unwrap_or(MOST_BROKER_CONNECTIONS).min(shards)
}

/// Whether the addresses exclude each other.
fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    let same_ip = a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified();
    a.port() == b.port() && a.port() != 0 && same_ip
}

fn is_tls(url: &BrokerUrl) -> bool {
    matches!(url, BrokerUrl::Redis(RedisUrl { endpoint: Endpoint::Tls { .. }, .. }))
}
