//! The configuration of a node.
//!
//! [`Config`] is what the rest of the program sees: typed, checked and complete. A value in it cannot be
//! wrong, so nobody checks it again. [`Config::load`] makes it from [`Sources`]: defaults, then a TOML file,
//! then the environment, then flags, or says everything that is wrong with them at once.
//!
//! | module | what it holds |
//! |---|---|
//! | `table` | every key: its kind, default and documentation |
//! | `kind` | what a key may be given, with its bounds |
//! | [`value`] | sizes, times, secrets |
//! | [`origin`] | which web pages may connect |
//! | [`log_filter`] | which events are logged |
//! | [`rate`], [`networks`] | how often something may happen; sets of addresses |
//! | `machine` | how much memory there is |
//! | `layers`, `raw` | reading the layers and laying them over each other |
//! | `reader` | from what was given to typed values |
//! | [`Snapshot`] | what each key came to: what a new configuration changes |
//! | [`document`] | the commented default file and the reference, made from the table |
//!
//! This module opens no port and connects to nothing. It reads the files that `*_file` keys name.

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
    value::{ByteSize, ForwardedHeader, LogFormat, Secret},
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
};

/// The configuration of a node. Each field is a key of the reference in `docs/configuration.md`, which
/// says more about it.
#[derive(Clone, Debug)]
pub struct Config {
    /// What clients reach.
    pub public: Public,
    /// The public listener's certificate; without one it is plain.
    pub tls: Option<Tls>,
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
    /// What rooms may do in the outbound queues of their members.
    pub delivery: Vec<DeliveryPolicy>,
    /// How much anybody may use.
    pub limits: Limits,
    /// Whether messages are compressed.
    pub compression: Compression,
    /// How a dead peer is noticed.
    pub heartbeat: Heartbeat,
    /// Server-sent events.
    pub sse: Sse,
    /// How the node leaves.
    pub drain: Drain,
    /// What is logged, and how.
    pub log: Log,
    /// What each key came to.
    pub snapshot: Snapshot,
}

/// A configuration and where it came from, so that it can be read again.
#[derive(Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Where it came from.
    pub sources: Sources,
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
    /// Time for the next request to begin on an idle connection.
    pub keep_alive: Duration,
    /// The age at which a session is told to come back, before jitter.
    pub max_session_age: Option<Duration>,
    /// Whose word on a client's address is taken.
    pub trusted_proxies: Networks,
    /// The header in which they say it.
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
    /// Comes before `room:` in every topic.
    pub prefix: Prefix,
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
    /// Keys on this machine: `auth.hs256_secret` or `auth.hs256_secret_file`, `auth.keys`, `auth.jwks_file`.
    pub keys: LocalKeys,
    /// What their files held when the configuration was loaded. It is sound.
    pub key_files: Contents,
    /// Where a key set is fetched.
    pub jwks_url: Option<JwksUrl>,
    /// Time between two fetches.
    pub jwks_interval: Duration,
    /// Certificates to trust for it, in place of the system's.
    pub jwks_ca_file: Option<PathBuf>,
    /// What `iss` must be.
    pub issuer: Option<String>,
    /// What `aud` must have one of; with none, there must be no `aud`.
    pub audience: Vec<String>,
    /// The cookie that may carry a token; without it, none is read.
    pub cookie: Option<CookieName>,
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
    /// Bytes held for clients, of all kinds together. `auto` is resolved already.
    pub memory: ByteSize,
    /// Rooms per session.
    pub rooms_per_session: usize,
    /// New connections of this node; more wait in the kernel.
    pub accepts: Option<Rate>,
    /// New connections of one address.
    pub attempts_per_address: Option<Rate>,
    /// Open connections of one address.
    pub connections_per_address: Option<usize>,
    /// Commands of one session.
    pub commands: Option<Rate>,
    /// Bytes of one session.
    pub bytes: Option<ByteRate>,
    /// Commands of one user on this node.
    pub user_commands: Option<Rate>,
    /// Bytes of one user on this node.
    pub user_bytes: Option<ByteRate>,
}

/// `compression.*`: whether messages are compressed (RFC 7692).
#[derive(Clone, Debug)]
pub struct Compression {
    /// Whether it is agreed to when a client offers it.
    pub enabled: bool,
    /// Smaller payloads are sent as they are.
    pub threshold: ByteSize,
}

/// `heartbeat.*`: how a dead peer is noticed.
#[derive(Clone, Debug, PartialEq, Eq)]
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

impl Config {
    /// Reads and checks a configuration.
    ///
    /// A layer's value replaces that of the layers below it, lists and the room policies as a whole. Only
    /// the value that wins is checked; keys that do not exist are errors wherever they are.
    pub fn load(sources: &Sources) -> Result<Self, ConfigErrors> {
        let mut from = Reader::new(sources);
        let auth = Auth::read(&mut from);
        let broker_url = from.text_or_file(&key::BROKER_URL, &key::BROKER_URL_FILE);
        let (cert, key) = (from.read_optional(&key::TLS_CERT), from.read_optional(&key::TLS_KEY));
        for (has, lacks, has_key, lacks_key) in
            [(&cert, &key, &key::TLS_CERT, &key::TLS_KEY), (&key, &cert, &key::TLS_KEY, &key::TLS_CERT)]
        {
            from.require(has.is_none() || lacks.is_some(), has_key, &[lacks_key], || {
                format!("expected {} to be given, too", lacks_key.name)
            });
        }
        let mut config = Self {
            tls: cert.zip(key).map(|(cert, key)| Tls { cert, key }),
            shards: from.read(&key::SHARDS).unwrap_or_else(available_shards),
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
                subscribers: from.read(&key::BROKER_SUBSCRIBERS),
                publishers: from.read(&key::BROKER_PUBLISHERS),
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
            snapshot: Snapshot::default(),
        };
        (config.rooms, config.delivery) = from.read_rooms();
        config.check_together(&mut from);
        config.snapshot = from.finish()?;
        Ok(config)
    }

    /// Where a node of this configuration has its ops listener, and what says so. Nothing else is checked: a node goes
    /// on when its configuration becomes unsound, and somebody asks for its health.
    pub fn ops_listen(sources: &Sources) -> Result<(SocketAddr, Source), ConfigErrors> {
        let mut from = Reader::new(sources);
        let listen = from.read(&key::OPS_LISTEN);
        let source = from.source(&key::OPS_LISTEN);
        from.finish_with(&key::OPS_LISTEN)?;
        Ok((listen, source))
    }

    /// What must hold between keys.
    fn check_together(&self, from: &mut Reader) {
        let Self { public, ops, broker, limits, heartbeat, drain, .. } = self;
        from.require(!collide(public.listen, ops.listen), &key::OPS_LISTEN, &[&key::PUBLIC_LISTEN], || {
            format!("expected another port than public.listen, {}", public.listen)
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
            || "expected public.trusted_proxies to say who speaks it".to_owned(),
        );
        from.require(
            broker.ca_file.is_none() || is_tls(&broker.url),
            &key::BROKER_CA_FILE,
            &[&key::BROKER_URL, &key::BROKER_URL_FILE],
            || "expected only with a broker that is reached by TLS, rediss://".to_owned(),
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
            || "expected auth.jwks_url to be given, too".to_owned(),
        );
        auth
    }
}

fn available_shards() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get).min(256)
}

/// Whether binding one address keeps the other from being bound.
fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    let same_ip = a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified();
    a.port() == b.port() && a.port() != 0 && same_ip
}

fn is_tls(url: &BrokerUrl) -> bool {
    matches!(url, BrokerUrl::Redis(RedisUrl { endpoint: Endpoint::Tls { .. }, .. }))
}
