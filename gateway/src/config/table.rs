//! Every configuration key. The parser, `tidegate default-config` and the reference in
//! `docs/configuration.md` all come from this table.
//!
//! Add a key only together with the code that uses it.

use std::time::Duration;

use broker_bridge::{BrokerUrl, redis::Prefix};

use super::{
    ByteRate, ByteSize, LogFilter, Rate,
    kind::{
        Address, Auto, Count, File, Format, Header, KeyTable, Kind, NetworkList, OperationList, OrNone,
        OrOff, OriginList, Parsed, SharedKey, Size, Switch, Time, WordList, Words,
    },
};
use crate::{
    auth::{CookieName, remote::JwksUrl},
    delivery::Overflow,
    history::Join,
};

/// One key.
pub(super) struct Key<K> {
    /// Its full name.
    pub name: &'static str,
    /// The kind of its value.
    pub kind: K,
    /// What applies if no value is given.
    pub default: Fallback,
    /// When a changed value takes effect.
    pub reload: Reload,
    /// What it does, in one line.
    pub doc: &'static str,
    /// More details; may be empty.
    pub more: &'static str,
}

/// What applies to a key without a value.
#[derive(Clone, Copy)]
pub(super) enum Fallback {
    /// This value, written as in a TOML file.
    Is(&'static str),
    /// No value. The example shows a possible one.
    Unset { example: &'static str },
}

/// When a value that changes at runtime takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reload {
    /// As soon as the configuration has been reloaded.
    Live,
    /// After a restart, because the value is built into something that cannot be replaced.
    Restart,
}

/// A key of any kind.
pub(super) trait Row: Sync {
    fn name(&self) -> &'static str;
    fn describe(&self) -> String;
    fn is_secret(&self) -> bool;
    fn default(&self) -> Fallback;
    fn reload(&self) -> Reload;
    fn doc(&self) -> &'static str;
    fn more(&self) -> &'static str;
}

impl<K: Kind> Row for Key<K> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn describe(&self) -> String {
        self.kind.describe()
    }

    fn is_secret(&self) -> bool {
        self.kind.is_secret()
    }

    fn default(&self) -> Fallback {
        self.default
    }

    fn reload(&self) -> Reload {
        self.reload
    }

    fn doc(&self) -> &'static str {
        self.doc
    }

    fn more(&self) -> &'static str {
        self.more
    }
}

use Fallback::{Is, Unset};
use Reload::{Live, Restart};

/// Defines a static for each key and the table of all keys.
macro_rules! table {
    ($($constant:ident: $kind:ty = $key:expr;)+) => {
        $(pub(super) static $constant: Key<$kind> = $key;)+

        /// Every key, in the order of the reference.
        pub(super) static TABLE: &[&dyn Row] = &[$(&$constant),+];
    };
}

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(24 * 3_600);

/// A duration that must not be zero.
const fn some_time(max: Duration) -> Time {
    Time { min: ms(10), max }
}

const fn size(min: usize, max: ByteSize) -> Size {
    Size { min: ByteSize::bytes(min), max }
}

const COUNTED: OrOff<Parsed<Rate>> =
    OrOff(Parsed::new("a rate such as 100/s, or 600/m burst 50 to allow 50 at once"));
const BYTES: OrOff<Parsed<ByteRate>> =
    OrOff(Parsed::new("a rate of bytes such as 64KiB/s, or 1MiB/s burst 4MiB to allow 4MiB at once"));

table! {
    SHARDS: Auto<Count> = Key {
        name: "shards",
        kind: Auto(Count { min: 1, max: 256 }),
        default: Is(r#""auto""#),
        reload: Restart,
        doc: "Number of shards, the threads that own sockets.",
        more: "`auto` is one per processor that the process may use.",
    };
    ORIGINS: OriginList = Key {
        name: "origins",
        kind: OriginList,
        default: Is("[]"),
        reload: Live,
        doc: "Origins of the web pages that may connect. If empty, only pages from the gateway's own host \
              and port may.",
        more: "Scheme, host and port must match the `Origin` header. `https://*.example` matches subdomains \
               at any depth, but not `https://example` itself. `*` matches every page, including those \
               without an origin of their own (`null`).",
    };
    DEMO: Auto<Switch> = Key {
        name: "demo",
        kind: Auto(Switch),
        default: Is(r#""auto""#),
        reload: Restart,
        doc: "Whether to serve the demo page.",
        more: "`auto` serves it unless a key is configured under `auth`.",
    };
    PUBLIC_LISTEN: Address = Key {
        name: "public.listen",
        kind: Address,
        default: Is(r#""127.0.0.1:8080""#),
        reload: Restart,
        doc: "The address on which clients connect.",
        more: "With port 0, the system chooses a port.",
    };
    PUBLIC_HEADER_TIMEOUT: Time = Key {
        name: "public.header_timeout",
        kind: some_time(HOUR),
        default: Is(r#""10s""#),
        reload: Live,
        doc: "Time limit for the head of a request to arrive.",
        more: "",
    };
    PUBLIC_BODY_TIMEOUT: Time = Key {
        name: "public.body_timeout",
        kind: some_time(HOUR),
        default: Is(r#""10s""#),
        reload: Live,
        doc: "Time limit for the body of a request to arrive.",
        more: "",
    };
    PUBLIC_KEEP_ALIVE: Time = Key {
        name: "public.keep_alive",
        kind: some_time(HOUR),
        default: Is(r#""620s""#),
        reload: Live,
        doc: "How long a connection stays open after a response to wait for the next request.",
        more: "Set it longer than proxies and load balancers keep their connections to the node; otherwise \
               they send requests on connections that the node is closing. Those times are 60 s with nginx \
               and AWS, and 600 s with Google Cloud. While more than nine tenths of `limits.connections` are \
               open, `public.header_timeout` applies instead, also to connections that are already idle.",
    };
    PUBLIC_MAX_SESSION_AGE: Time = Key {
        name: "public.max_session_age",
        kind: Time { min: ms(10), max: Duration::from_secs(7 * 24 * 3_600) },
        default: Unset { example: r#""30m""# },
        reload: Live,
        doc: "The age at which the node closes a session and asks the client to reconnect, so that added \
              nodes get their share.",
        more: "Each session ends at a random time between 80 % and 100 % of this age. Not set: sessions have \
               no maximum age.",
    };
    PUBLIC_TRUSTED_PROXIES: NetworkList = Key {
        name: "public.trusted_proxies",
        kind: NetworkList,
        default: Is("[]"),
        reload: Live,
        doc: "Proxies that the node trusts to report a client's address, by address or network.",
        more: "For all other peers, the client's address is that of the connection, whatever the headers \
               say.",
    };
    PUBLIC_FORWARDED_HEADER: Header = Key {
        name: "public.forwarded_header",
        kind: Header,
        default: Is(r#""x-forwarded-for""#),
        reload: Live,
        doc: "The header in which trusted proxies report the client's address.",
        more: "Choose the one that the proxies append to or replace. The node ignores the other, because \
               clients can forge it.",
    };
    PUBLIC_PROXY_PROTOCOL: Switch = Key {
        name: "public.proxy_protocol",
        kind: Switch,
        default: Is("false"),
        reload: Live,
        doc: "Whether connections from trusted proxies begin with a PROXY protocol header, version 1 or 2.",
        more: "If true, trusted proxies must send it on every connection. Other peers connect without it.",
    };
    TLS_CERT: File = Key {
        name: "tls.cert",
        kind: File { holds_secret: false },
        default: Unset { example: r#""/etc/tidegate/tls.crt""# },
        reload: Restart,
        doc: "The certificate chain (PEM), starting with the node's own certificate. If set, `public.listen` \
              accepts only TLS.",
        more: "Requires `tls.key`. The node reloads both files when they change, and on SIGHUP.",
    };
    TLS_KEY: File = Key {
        name: "tls.key",
        kind: File { holds_secret: true },
        default: Unset { example: r#""/etc/tidegate/tls.key""# },
        reload: Restart,
        doc: "The private key (PEM) of the certificate.",
        more: "Requires `tls.cert`.",
    };
    OPS_LISTEN: Address = Key {
        name: "ops.listen",
        kind: Address,
        default: Is(r#""127.0.0.1:9090""#),
        reload: Restart,
        doc: "The address that serves metrics and probes. Not for clients.",
        more: "",
    };
    BROKER_URL: Parsed<BrokerUrl> = Key {
        name: "broker.url",
        kind: Parsed::secret("memory:, or an address such as redis://user:password@host:6379/0"),
        default: Is(r#""memory:""#),
        reload: Restart,
        doc: "The broker that carries publications between nodes.",
        more: "`memory:` works within one process only. `redis://` and `rediss://` (TLS) name one Redis \
               server.",
    };
    BROKER_URL_FILE: File = Key {
        name: "broker.url_file",
        kind: File { holds_secret: true },
        default: Unset { example: r#""/run/secrets/broker-url""# },
        reload: Restart,
        doc: "A file that contains the value of `broker.url`.",
        more: "For mounted secrets. The file has one line; line breaks around it are not part of the value.",
    };
    BROKER_PREFIX: Parsed<Prefix> = Key {
        name: "broker.prefix",
        kind: Parsed::new(Prefix::EXPECTED),
        default: Is(r#""""#),
        reload: Restart,
        doc: "Prefix of every topic name, before `room:`.",
        more: "Lets several gateways share one Redis server.",
    };
    BROKER_SUBSCRIBERS: Auto<Count> = Key {
        name: "broker.subscribers",
        kind: Auto(Count { min: 1, max: 64 }),
        default: Is(r#""auto""#),
        reload: Restart,
        doc: "Number of connections that receive publications.",
        more: "`auto` is one per shard, and 8 at most. The shards share them; with more connections than shards, each \
               shard has one.",
    };
    BROKER_PUBLISHERS: Auto<Count> = Key {
        name: "broker.publishers",
        kind: Auto(Count { min: 1, max: 64 }),
        default: Is(r#""auto""#),
        reload: Restart,
        doc: "Number of connections that send publications.",
        more: "Like `broker.subscribers`.",
    };
    BROKER_PUBLISH_QUEUE: Size = Key {
        name: "broker.publish_queue",
        kind: size(1, ByteSize::mib(1024)),
        default: Is(r#""16MiB""#),
        reload: Restart,
        doc: "Maximum total size of the publications that wait to be sent to the broker.",
        more: "Shared out evenly among `broker.publishers`. At least `limits.message_size`.",
    };
    BROKER_MAX_PUBLICATION: Size = Key {
        name: "broker.max_publication",
        kind: size(1, ByteSize::mib(512)),
        default: Is(r#""16MiB""#),
        reload: Restart,
        doc: "The largest publication that the node accepts from the broker.",
        more: "A larger one causes a gap for the room's sessions. At least `limits.message_size`.",
    };
    BROKER_CONNECT_TIMEOUT: Time = Key {
        name: "broker.connect_timeout",
        kind: some_time(HOUR),
        default: Is(r#""5s""#),
        reload: Restart,
        doc: "Time limit for connecting to the broker.",
        more: "",
    };
    BROKER_SUBSCRIBE_TIMEOUT: Time = Key {
        name: "broker.subscribe_timeout",
        kind: some_time(HOUR),
        default: Is(r#""5s""#),
        reload: Live,
        doc: "Time limit for the broker to acknowledge a subscription.",
        more: "",
    };
    BROKER_PUBLISH_TIMEOUT: Time = Key {
        name: "broker.publish_timeout",
        kind: some_time(HOUR),
        default: Is(r#""5s""#),
        reload: Restart,
        doc: "Time limit for the broker to acknowledge a publication.",
        more: "",
    };
    BROKER_CANARY_INTERVAL: Time = Key {
        name: "broker.canary_interval",
        kind: some_time(HOUR),
        default: Is(r#""2s""#),
        reload: Restart,
        doc: "How often the node checks each connection to the broker.",
        more: "Each publishing connection sends a message to each receiving connection of the node, and the \
               node checks the server's role. Keep it shorter than the idle timeouts on the way to the \
               broker.",
    };
    BROKER_CANARY_TIMEOUT: Time = Key {
        name: "broker.canary_timeout",
        kind: some_time(HOUR),
        default: Is(r#""6s""#),
        reload: Restart,
        doc: "A connection whose check has not succeeded for this long is replaced.",
        more: "Longer than `broker.canary_interval`.",
    };
    BROKER_CA_FILE: File = Key {
        name: "broker.ca_file",
        kind: File { holds_secret: false },
        default: Unset { example: r#""/etc/tidegate/redis-ca.pem""# },
        reload: Restart,
        doc: "Certificates (PEM) to trust for a broker with TLS, instead of the system's.",
        more: "Certificate authorities, or the broker's own certificate.",
    };
    AUTH_HS256_SECRET: SharedKey = Key {
        name: "auth.hs256_secret",
        kind: SharedKey,
        default: Unset { example: r#""at least 32 bytes, better from a file""# },
        reload: Live,
        doc: "A single secret that signs and verifies tokens (JWT, HS256): the simplest setup.",
        more: "Used as written, not decoded. RFC 7518 §3.2 requires at least 32 bytes. If no key of any kind \
               is configured, the node generates a secret at startup and uses it until it exits.",
    };
    AUTH_HS256_SECRET_FILE: File = Key {
        name: "auth.hs256_secret_file",
        kind: File { holds_secret: true },
        default: Unset { example: r#""/run/secrets/hs256""# },
        reload: Live,
        doc: "A file that contains the value of `auth.hs256_secret`.",
        more: "The file has one line; line breaks around it are not part of the secret.",
    };
    AUTH_KEYS: KeyTable = Key {
        name: "auth.keys",
        kind: KeyTable,
        default: Unset {
            example: r#"{ "2026-08" = { algorithm = "ES256", public_key_file = "/etc/tidegate/2026-08.pem" } }"#,
        },
        reload: Live,
        doc: "Keys that tokens select by `kid`, each for exactly one algorithm.",
        more: "Each file contains a public key in PEM (BEGIN PUBLIC KEY), or a secret of at least 32, 48 or \
               64 bytes for HS256, HS384 or HS512. The node reloads the files when they change.",
    };
    AUTH_JWKS_FILE: File = Key {
        name: "auth.jwks_file",
        kind: File { holds_secret: false },
        default: Unset { example: r#""/etc/tidegate/jwks.json""# },
        reload: Live,
        doc: "A file that contains a key set (JWKS, RFC 7517).",
        more: "The node reloads it when it changes.",
    };
    AUTH_JWKS_URL: Parsed<JwksUrl> = Key {
        name: "auth.jwks_url",
        kind: Parsed::secret("an https URL, or an http URL with a loopback host"),
        default: Unset { example: r#""https://login.example/.well-known/jwks.json""# },
        reload: Restart,
        doc: "The URL of a key set (JWKS). The node is not ready until it has fetched the set once.",
        more: "The node fetches it at every interval, and when a token names an unknown key. It follows no \
               redirects. If a fetch fails, the old keys stay in use.",
    };
    AUTH_JWKS_INTERVAL: Time = Key {
        name: "auth.jwks_interval",
        kind: Time { min: Duration::from_secs(1), max: Duration::from_secs(24 * 3_600) },
        default: Is(r#""10m""#),
        reload: Restart,
        doc: "Time between two fetches of `auth.jwks_url`.",
        more: "",
    };
    AUTH_JWKS_CA_FILE: File = Key {
        name: "auth.jwks_ca_file",
        kind: File { holds_secret: false },
        default: Unset { example: r#""/etc/tidegate/login-ca.pem""# },
        reload: Restart,
        doc: "Certificates (PEM) to trust for `auth.jwks_url`, instead of the system's.",
        more: "Certificate authorities, or the server's own certificate.",
    };
    AUTH_ISSUER: Words = Key {
        name: "auth.issuer",
        kind: Words,
        default: Unset { example: r#""https://login.example""# },
        reload: Live,
        doc: "The required `iss` of tokens, compared character by character.",
        more: "Not set: `iss` is ignored.",
    };
    AUTH_AUDIENCE: WordList = Key {
        name: "auth.audience",
        kind: WordList,
        default: Is("[]"),
        reload: Live,
        doc: "Names of this gateway. A token's `aud` must contain one of them.",
        more: "If empty, tokens must not have an `aud`, because they would be meant for another service.",
    };
    AUTH_COOKIE: Parsed<CookieName> = Key {
        name: "auth.cookie",
        kind: Parsed::new("a cookie's name, an HTTP token of 1 to 256 characters such as tidegate_token"),
        default: Unset { example: r#""__Host-tidegate""# },
        reload: Live,
        doc: "The cookie that may carry a token for pages of allowed origins. Not set: cookies are ignored.",
        more: "The node reads it only if the request has no other token and comes from an origin that \
               `origins` allows; `*` allows cookies only for the gateway's own host.",
    };
    AUTH_LEEWAY: Time = Key {
        name: "auth.leeway",
        kind: Time { min: Duration::ZERO, max: Duration::from_secs(300) },
        default: Is(r#""5s""#),
        reload: Live,
        doc: "How far the clocks of this node and of the token's issuer may differ.",
        more: "Fractions of a second are ignored.",
    };
    LIMITS_CONNECTIONS: Count = Key {
        name: "limits.connections",
        kind: Count { min: 1, max: 10_000_000 },
        default: Is("100000"),
        reload: Live,
        doc: "Maximum number of open connections on this node. Beyond it, new ones are answered with 503.",
        more: "",
    };
    LIMITS_MESSAGE_SIZE: Size = Key {
        name: "limits.message_size",
        kind: size(1, ByteSize::mib(16)),
        default: Is(r#""64KiB""#),
        reload: Live,
        doc: "The largest message that the node accepts from a client.",
        more: "",
    };
    LIMITS_OUTBOUND: Size = Key {
        name: "limits.outbound",
        kind: size(1, ByteSize::mib(1024)),
        default: Is(r#""1MiB""#),
        reload: Live,
        doc: "Maximum number of bytes queued for one session. A session that needs more is closed as slow, \
              unless the room has another `overflow` policy.",
        more: "Each frame counts 64 bytes more than its size. At least `limits.message_size`.",
    };
    LIMITS_MEMORY: Auto<Size> = Key {
        name: "limits.memory",
        kind: Auto(size(1 << 20, ByteSize::mib(1 << 20))),
        default: Is(r#""auto""#),
        reload: Live,
        doc: "Maximum memory that the node holds for clients, all kinds together. Above it, the node closes \
              the sessions that hold the most; they may reconnect.",
        more: "Includes outbound queues, publications inside the node, request heads and bodies, and \
               incomplete messages, but not the cost of idle connections. Requests are refused with 503 when \
               requests hold half of the limit, or when seven eighths of it are in use. `auto` is 70 % of \
               the memory limit of the control group (cgroup, version 1 or 2), the smallest of those around \
               the process; without a limit, 50 % of the machine's memory.",
    };
    LIMITS_ROOMS_PER_SESSION: Count = Key {
        name: "limits.rooms_per_session",
        kind: Count { min: 1, max: 65_536 },
        default: Is("128"),
        reload: Live,
        doc: "Maximum number of rooms that one session may be in.",
        more: "",
    };
    LIMITS_ACCEPTS: OrOff<Parsed<Rate>> = Key {
        name: "limits.accepts",
        kind: COUNTED,
        default: Is(r#""10000/s""#),
        reload: Live,
        doc: "Rate at which this node accepts new connections. Further ones wait in the kernel's queue; none \
              is refused.",
        more: "",
    };
    LIMITS_ATTEMPTS_PER_ADDRESS: OrOff<Parsed<Rate>> = Key {
        name: "limits.attempts_per_address",
        kind: COUNTED,
        default: Is(r#""100/s burst 1000""#),
        reload: Live,
        doc: "Rate of new connections from one address, and of requests that a trusted proxy forwards for \
              it. Further ones are answered with 429.",
        more: "IPv6 addresses count by their /64 network. List proxies in `public.trusted_proxies`, or all \
               clients behind one count as a single address.",
    };
    LIMITS_CONNECTIONS_PER_ADDRESS: OrOff<Count> = Key {
        name: "limits.connections_per_address",
        kind: OrOff(Count { min: 1, max: 10_000_000 }),
        default: Is("10000"),
        reload: Live,
        doc: "Maximum number of open connections from one address. Further ones are answered with 429.",
        more: "Addresses count as in `limits.attempts_per_address`.",
    };
    LIMITS_COMMANDS: OrOff<Parsed<Rate>> = Key {
        name: "limits.commands",
        kind: COUNTED,
        default: Is(r#""200/s burst 1000""#),
        reload: Live,
        doc: "Rate of messages, commands and control frames of one session. Further ones are refused as the \
              session's protocol defines.",
        more: "",
    };
    LIMITS_BYTES: OrOff<Parsed<ByteRate>> = Key {
        name: "limits.bytes",
        kind: BYTES,
        default: Is(r#""4MiB/s burst 16MiB""#),
        reload: Live,
        doc: "Rate of bytes from one session, including frame headers; compressed messages count with their \
              uncompressed size. Further messages are refused likewise.",
        more: "The burst is at least `limits.message_size`.",
    };
    LIMITS_USER_COMMANDS: OrOff<Parsed<Rate>> = Key {
        name: "limits.user_commands",
        kind: COUNTED,
        default: Is(r#""1000/s burst 5000""#),
        reload: Live,
        doc: "Rate of messages, commands and control frames of all sessions of one user on this node, \
              including the user's `POST` requests (429).",
        more: "A user is a token's subject.",
    };
    LIMITS_USER_BYTES: OrOff<Parsed<ByteRate>> = Key {
        name: "limits.user_bytes",
        kind: BYTES,
        default: Is(r#""16MiB/s burst 64MiB""#),
        reload: Live,
        doc: "Rate of bytes from the same sessions and requests.",
        more: "The burst is at least `limits.message_size`.",
    };
    COMPRESSION_ENABLED: Switch = Key {
        name: "compression.enabled",
        kind: Switch,
        default: Is("false"),
        reload: Live,
        doc: "Whether the node accepts permessage-deflate (RFC 7692) when a WebSocket client offers it.",
        more: "Each message is compressed once for all members of its room, without context takeover. This \
               saves bandwidth at the cost of processor time; a compressed session needs no more memory than \
               any other.",
    };
    COMPRESSION_THRESHOLD: Size = Key {
        name: "compression.threshold",
        kind: size(0, ByteSize::mib(16)),
        default: Is(r#""256B""#),
        reload: Live,
        doc: "Publications with a smaller payload are sent uncompressed.",
        more: "",
    };
    HEARTBEAT_INTERVAL: Time = Key {
        name: "heartbeat.interval",
        kind: some_time(HOUR),
        default: Is(r#""25s""#),
        reload: Live,
        doc: "Time between two heartbeats that the node sends on a quiet connection.",
        more: "Shorter than the idle timeout of every proxy on the way.",
    };
    HEARTBEAT_TIMEOUT: Time = Key {
        name: "heartbeat.timeout",
        kind: some_time(HOUR),
        default: Is(r#""60s""#),
        reload: Live,
        doc: "The node closes a client that has sent nothing for this long.",
        more: "Longer than `heartbeat.interval`.",
    };
    SSE_RETRY: Time = Key {
        name: "sse.retry",
        kind: some_time(HOUR),
        default: Is(r#""3s""#),
        reload: Live,
        doc: "How long clients of event streams should wait before they reconnect, before jitter.",
        more: "",
    };
    DRAIN_PAUSE: Time = Key {
        name: "drain.pause",
        kind: Time { min: Duration::ZERO, max: HOUR },
        default: Is(r#""0s""#),
        reload: Live,
        doc: "How long the node reports not ready but still serves everybody, including new sessions, before \
              it closes any session.",
        more: "Set it to the time that load balancers need to notice.",
    };
    DRAIN_WINDOW: Time = Key {
        name: "drain.window",
        kind: Time { min: Duration::ZERO, max: HOUR },
        default: Is(r#""10s""#),
        reload: Live,
        doc: "Time over which the node spreads the closing of sessions evenly.",
        more: "Never faster; a busy node takes longer.",
    };
    DRAIN_DEADLINE: Time = Key {
        name: "drain.deadline",
        kind: some_time(Duration::from_secs(3 * 3_600)),
        default: Is(r#""30s""#),
        reload: Live,
        doc: "Time limit for the whole drain. After it, the node exits with status 1.",
        more: "At least `drain.pause` and `drain.window` together. Add a few seconds so that the last \
               sessions can close in order: a client has 5 s to answer its close.",
    };
    LOG_FORMAT: Format = Key {
        name: "log.format",
        kind: Format,
        default: Is(r#""text""#),
        reload: Restart,
        doc: "The format of log lines: text for people, or one JSON object per line.",
        more: "",
    };
    LOG_FILTER: Parsed<LogFilter> = Key {
        name: "log.filter",
        kind: Parsed::new("a level, or directives such as info,tidegate::auth=debug"),
        default: Is(r#""info""#),
        reload: Live,
        doc: "Which events are logged.",
        more: "Unknown levels and targets are refused.",
    };
    ROOMS_GRANT: OperationList = Key {
        name: r#"rooms."<pattern>".grant"#,
        kind: OperationList,
        default: Is("[]"),
        reload: Live,
        doc: "What every valid token may do in the rooms that match the pattern.",
        more: "A pattern is a room name, or a prefix followed by `*`. It may contain `{sub}` for the token's \
               subject.",
    };
    ROOMS_OVERFLOW: Parsed<Overflow> = Key {
        name: r#"rooms."<pattern>".overflow"#,
        kind: Parsed::new("close, drop_oldest or latest"),
        default: Is(r#""close""#),
        reload: Live,
        doc: "What happens when a publication of such a room does not fit into `limits.outbound`.",
        more: "`close`: the session is closed as slow. `drop_oldest`: the oldest queued publications of the \
               room are dropped. `latest`: all queued publications of the room are dropped as soon as the \
               socket falls behind. The session is told of the gap.",
    };
    ROOMS_PRIORITY: Switch = Key {
        name: r#"rooms."<pattern>".priority"#,
        kind: Switch,
        default: Is("false"),
        reload: Live,
        doc: "Whether publications of such a room overtake those of other rooms that wait for the same \
              session.",
        more: "",
    };
    ROOMS_HISTORY_SIZE: Count = Key {
        name: r#"rooms."<pattern>".history.size"#,
        kind: Count { min: 1, max: 10_000 },
        default: Unset { example: "100" },
        reload: Live,
        doc: "How many publications of such a room are kept. Without it, the room has no history.",
        more: "The broker may keep a few hundred more. Redis needs version 7.0 for it. A change applies to the next \
               publication. Members of a room keep what they began with until nobody is in the room on their node.",
    };
    ROOMS_HISTORY_TTL: OrNone<Time> = Key {
        name: r#"rooms."<pattern>".history.ttl"#,
        kind: OrNone(Time { min: Duration::from_secs(1), max: DAY.saturating_mul(30) }),
        default: Is(r#""10m""#),
        reload: Live,
        doc: "How long the history of such a room is kept after its last publication.",
        more: "`none`: until it is cleared.",
    };
    ROOMS_HISTORY_JOIN: Parsed<Join> = Key {
        name: r#"rooms."<pattern>".history.join"#,
        kind: Parsed::new("none or text"),
        default: Is(r#""none""#),
        reload: Live,
        doc: "Which consecutive publications arrive as one at a client that catches up.",
        more: "`text`: texts with the same event and user, up to 16 KiB together, with the position of the last: \
               pieces of one longer text, such as the tokens of an answer. JSON, declared as such or not (`1`, `true`), and \
               binary data are never joined. What is joined is a string, even if together it could be read as JSON.",
    };
}

/// The table whose keys are room patterns, so that its keys cannot be looked up by name.
pub(super) const ROOMS: &str = "rooms";

/// Whether a key belongs to [`ROOMS`].
pub(super) fn is_of_rooms(name: &str) -> bool {
    name.strip_prefix(ROOMS).is_some_and(|rest| rest.starts_with('.'))
}

/// The keys of each pattern of [`ROOMS`], such as `grant` and `history.size`.
pub(super) fn room_keys() -> impl Iterator<Item = &'static str> + Clone {
    TABLE.iter().filter_map(|row| row.name().strip_prefix(r#"rooms."<pattern>"."#))
}

/// Whether this is a table among the keys of each pattern, such as `history`.
pub(super) fn is_room_section(name: &str) -> bool {
    room_keys().any(|key| key.strip_prefix(name).is_some_and(|rest| rest.starts_with('.')))
}
