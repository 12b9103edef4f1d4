//! Every key there is: the one source from which the parser, `tidegate default-config` and the reference
//! in `docs/configuration.md` are made.
//!
//! A key stands here from the day it steers something.

use std::time::Duration;

use broker_bridge::{BrokerUrl, redis::Prefix};

use super::{
    ByteRate, ByteSize, LogFilter, Rate,
    kind::{
        Address, Auto, Count, File, Format, Header, KeyTable, Kind, NetworkList, OperationList, OrOff,
        OriginList, Parsed, SharedKey, Size, Switch, Time, WordList, Words,
    },
};
use crate::{
    auth::{CookieName, remote::JwksUrl},
    delivery::Overflow,
};

/// One key.
pub(super) struct Key<K> {
    /// Its full name.
    pub name: &'static str,
    /// What it may be given.
    pub kind: K,
    /// What holds when nobody gives it anything.
    pub default: Fallback,
    /// When a changed value counts.
    pub reload: Reload,
    /// What it does, in a line.
    pub doc: &'static str,
    /// What else there is to know; may be empty.
    pub more: &'static str,
}

/// What holds for a key that is not given.
#[derive(Clone, Copy)]
pub(super) enum Fallback {
    /// This value, written as in a TOML file.
    Is(&'static str),
    /// Nothing. The example shows what one could write.
    Unset { example: &'static str },
}

/// When a value counts that was changed while the node runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reload {
    /// As soon as the configuration has been read again.
    Live,
    /// When the node is started again: the value has been built into something that cannot be exchanged.
    Restart,
}

/// A key, whatever its kind.
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

/// Makes a static of each key and the table of them all.
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

/// A time that must not be nothing.
const fn some_time(max: Duration) -> Time {
    Time { min: ms(10), max }
}

const fn size(min: usize, max: ByteSize) -> Size {
    Size { min: ByteSize::bytes(min), max }
}

const COUNTED: OrOff<Parsed<Rate>> =
    OrOff(Parsed::new("a rate such as 100/s, or 600/m burst 50 for so much at once"));
const BYTES: OrOff<Parsed<ByteRate>> =
    OrOff(Parsed::new("a rate of bytes such as 64KiB/s, or 1MiB/s burst 4MiB for so much at once"));

table! {
    SHARDS: Auto<Count> = Key {
        name: "shards",
        kind: Auto(Count { min: 1, max: 256 }),
        default: Is(r#""auto""#),
        reload: Restart,
        doc: "Threads that own sockets.",
        more: "`auto` is one for each processor this process may use.",
    };
    ORIGINS: OriginList = Key {
        name: "origins",
        kind: OriginList,
        default: Is("[]"),
        reload: Live,
        doc: "Web pages that may connect; none listed: only pages of the gateway's own host and port.",
        more: "Scheme, host and port of the `Origin` header are compared. `https://*.example` is every \
               subdomain at any depth and not `https://example` itself. `*` is every page, also one without \
               an origin of its own (`null`).",
    };
    DEMO: Auto<Switch> = Key {
        name: "demo",
        kind: Auto(Switch),
        default: Is(r#""auto""#),
        reload: Restart,
        doc: "Whether the demo page is served.",
        more: "`auto` is on as long as no key is configured under `auth`.",
    };
    PUBLIC_LISTEN: Address = Key {
        name: "public.listen",
        kind: Address,
        default: Is(r#""127.0.0.1:8080""#),
        reload: Restart,
        doc: "Where clients connect.",
        more: "Port 0 lets the system choose one.",
    };
    PUBLIC_HEADER_TIMEOUT: Time = Key {
        name: "public.header_timeout",
        kind: some_time(HOUR),
        default: Is(r#""10s""#),
        reload: Live,
        doc: "Time for the head of a request to arrive.",
        more: "",
    };
    PUBLIC_BODY_TIMEOUT: Time = Key {
        name: "public.body_timeout",
        kind: some_time(HOUR),
        default: Is(r#""10s""#),
        reload: Live,
        doc: "Time for the body of a request to arrive.",
        more: "",
    };
    PUBLIC_KEEP_ALIVE: Time = Key {
        name: "public.keep_alive",
        kind: some_time(HOUR),
        default: Is(r#""620s""#),
        reload: Live,
        doc: "Time for the next request to begin on a connection that is kept open after an answer.",
        more: "Longer than proxies and load balancers keep their connections to a node, or they send a request \
               into a connection that the node is closing: 60 s with nginx and AWS, 600 s with Google Cloud. While more than \
               nine tenths of `limits.connections` are open, it is `public.header_timeout`, also for connections \
               that are idle already.",
    };
    PUBLIC_MAX_SESSION_AGE: Time = Key {
        name: "public.max_session_age",
        kind: Time { min: ms(10), max: Duration::from_secs(7 * 24 * 3_600) },
        default: Unset { example: r#""30m""# },
        reload: Live,
        doc: "A session is told to come back when it is this old, so that nodes that were added get their share.",
        more: "Each session ends at a random time between 80 % and 100 % of it. Not set: sessions may last.",
    };
    PUBLIC_TRUSTED_PROXIES: NetworkList = Key {
        name: "public.trusted_proxies",
        kind: NetworkList,
        default: Is("[]"),
        reload: Live,
        doc: "Proxies whose word on a client's address is taken, by address or network.",
        more: "Everybody else's connections come from where they seem to come from, whatever their headers say.",
    };
    PUBLIC_FORWARDED_HEADER: Header = Key {
        name: "public.forwarded_header",
        kind: Header,
        default: Is(r#""x-forwarded-for""#),
        reload: Live,
        doc: "The header in which trusted proxies say whom a request comes from.",
        more: "The one that they append to or replace; the other is not read, since a client could have sent it.",
    };
    PUBLIC_PROXY_PROTOCOL: Switch = Key {
        name: "public.proxy_protocol",
        kind: Switch,
        default: Is("false"),
        reload: Live,
        doc: "Whether connections of trusted proxies begin with a PROXY protocol header, version 1 or 2.",
        more: "Then each of them must. Connections of others begin as usual.",
    };
    TLS_CERT: File = Key {
        name: "tls.cert",
        kind: File { holds_secret: false },
        default: Unset { example: r#""/etc/tidegate/tls.crt""# },
        reload: Restart,
        doc: "The certificate chain (PEM), the node's own first; with it `public.listen` speaks TLS only.",
        more: "Together with `tls.key`. Both are read again when they change, and on SIGHUP.",
    };
    TLS_KEY: File = Key {
        name: "tls.key",
        kind: File { holds_secret: true },
        default: Unset { example: r#""/etc/tidegate/tls.key""# },
        reload: Restart,
        doc: "The private key (PEM) of that certificate.",
        more: "Together with `tls.cert`.",
    };
    OPS_LISTEN: Address = Key {
        name: "ops.listen",
        kind: Address,
        default: Is(r#""127.0.0.1:9090""#),
        reload: Restart,
        doc: "Where metrics and probes are served. Not for clients.",
        more: "",
    };
    BROKER_URL: Parsed<BrokerUrl> = Key {
        name: "broker.url",
        kind: Parsed::secret("memory:, or an address such as redis://user:password@host:6379/0"),
        default: Is(r#""memory:""#),
        reload: Restart,
        doc: "What carries publications between nodes.",
        more: "`memory:` serves one process. `redis://` and `rediss://` (TLS) name one Redis server.",
    };
    BROKER_URL_FILE: File = Key {
        name: "broker.url_file",
        kind: File { holds_secret: true },
        default: Unset { example: r#""/run/secrets/broker-url""# },
        reload: Restart,
        doc: "A file that holds what would be `broker.url`.",
        more: "For mounted secrets. It has one line; line breaks around it are not part of the value.",
    };
    BROKER_PREFIX: Parsed<Prefix> = Key {
        name: "broker.prefix",
        kind: Parsed::new(Prefix::EXPECTED),
        default: Is(r#""""#),
        reload: Restart,
        doc: "Comes before `room:` in the name of every topic.",
        more: "Lets several gateways share one Redis.",
    };
    BROKER_SUBSCRIBERS: Count = Key {
        name: "broker.subscribers",
        kind: Count { min: 1, max: 64 },
        default: Is("2"),
        reload: Restart,
        doc: "Connections that receive publications. Rooms are spread over them.",
        more: "",
    };
    BROKER_PUBLISHERS: Count = Key {
        name: "broker.publishers",
        kind: Count { min: 1, max: 64 },
        default: Is("2"),
        reload: Restart,
        doc: "Connections that send publications. Rooms are spread over them.",
        more: "",
    };
    BROKER_PUBLISH_QUEUE: Size = Key {
        name: "broker.publish_queue",
        kind: size(1, ByteSize::mib(1024)),
        default: Is(r#""16MiB""#),
        reload: Restart,
        doc: "Bytes of publications that may wait to be sent.",
        more: "At least `limits.message_size`.",
    };
    BROKER_MAX_PUBLICATION: Size = Key {
        name: "broker.max_publication",
        kind: size(1, ByteSize::mib(512)),
        default: Is(r#""16MiB""#),
        reload: Restart,
        doc: "The largest publication that is taken from the broker.",
        more: "A larger one is a gap to the room's sessions. At least `limits.message_size`.",
    };
    BROKER_CONNECT_TIMEOUT: Time = Key {
        name: "broker.connect_timeout",
        kind: some_time(HOUR),
        default: Is(r#""5s""#),
        reload: Restart,
        doc: "Time for a connection to the broker to be made.",
        more: "",
    };
    BROKER_SUBSCRIBE_TIMEOUT: Time = Key {
        name: "broker.subscribe_timeout",
        kind: some_time(HOUR),
        default: Is(r#""5s""#),
        reload: Live,
        doc: "Time for the broker to acknowledge a subscription.",
        more: "",
    };
    BROKER_PUBLISH_TIMEOUT: Time = Key {
        name: "broker.publish_timeout",
        kind: some_time(HOUR),
        default: Is(r#""5s""#),
        reload: Restart,
        doc: "Time for the broker to acknowledge a publication.",
        more: "",
    };
    BROKER_CANARY_INTERVAL: Time = Key {
        name: "broker.canary_interval",
        kind: some_time(HOUR),
        default: Is(r#""2s""#),
        reload: Restart,
        doc: "How often each connection to the broker proves that it is of use.",
        more: "By a message from each publishing connection to each receiving one of this node, and by the server's \
               role. Keep it below the idle time-outs of what lies between.",
    };
    BROKER_CANARY_TIMEOUT: Time = Key {
        name: "broker.canary_timeout",
        kind: some_time(HOUR),
        default: Is(r#""6s""#),
        reload: Restart,
        doc: "A connection whose proof is missing for this long is made anew.",
        more: "Longer than `broker.canary_interval`.",
    };
    BROKER_CA_FILE: File = Key {
        name: "broker.ca_file",
        kind: File { holds_secret: false },
        default: Unset { example: r#""/etc/tidegate/redis-ca.pem""# },
        reload: Restart,
        doc: "Certificates (PEM) to trust when the broker is reached by TLS, in place of the system's.",
        more: "Authorities, or the broker's own certificate.",
    };
    AUTH_HS256_SECRET: SharedKey = Key {
        name: "auth.hs256_secret",
        kind: SharedKey,
        default: Unset { example: r#""at least 32 bytes, better from a file""# },
        reload: Live,
        doc: "The simple way: one secret that signs and verifies tokens (JWT, HS256).",
        more: "Taken as it is written, not decoded. RFC 7518 §3.2 asks for 32 bytes or more. With no key of \
               any kind, the node makes one for its own lifetime.",
    };
    AUTH_HS256_SECRET_FILE: File = Key {
        name: "auth.hs256_secret_file",
        kind: File { holds_secret: true },
        default: Unset { example: r#""/run/secrets/hs256""# },
        reload: Live,
        doc: "A file that holds what would be `auth.hs256_secret`.",
        more: "It has one line; line breaks around it are not part of the key.",
    };
    AUTH_KEYS: KeyTable = Key {
        name: "auth.keys",
        kind: KeyTable,
        default: Unset {
            example: r#"{ "2026-08" = { algorithm = "ES256", public_key_file = "/etc/tidegate/2026-08.pem" } }"#,
        },
        reload: Live,
        doc: "Keys that tokens choose by their `kid`, each for one algorithm alone.",
        more: "The files hold a public key in PEM (BEGIN PUBLIC KEY), or a secret of at least 32, 48 or 64 \
               bytes for HS256, HS384 or HS512. They are read again when they change.",
    };
    AUTH_JWKS_FILE: File = Key {
        name: "auth.jwks_file",
        kind: File { holds_secret: false },
        default: Unset { example: r#""/etc/tidegate/jwks.json""# },
        reload: Live,
        doc: "A key set (JWKS, RFC 7517) in a file.",
        more: "Read again when it changes.",
    };
    AUTH_JWKS_URL: Parsed<JwksUrl> = Key {
        name: "auth.jwks_url",
        kind: Parsed::secret("an https URL, or an http URL of this machine"),
        default: Unset { example: r#""https://login.example/.well-known/jwks.json""# },
        reload: Restart,
        doc: "Where a key set (JWKS) is fetched. The node is not ready before it has come once.",
        more: "Fetched again at each interval, and when a token names a key that nobody knows. Redirects are \
               not followed. If a fetch fails, the keys that were there go on.",
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
        doc: "Certificates (PEM) to trust for `auth.jwks_url`, in place of the system's.",
        more: "Authorities, or the server's own certificate.",
    };
    AUTH_ISSUER: Words = Key {
        name: "auth.issuer",
        kind: Words,
        default: Unset { example: r#""https://login.example""# },
        reload: Live,
        doc: "What a token's `iss` must be, character by character.",
        more: "Not set: `iss` is ignored.",
    };
    AUTH_AUDIENCE: WordList = Key {
        name: "auth.audience",
        kind: WordList,
        default: Is("[]"),
        reload: Live,
        doc: "Names of this gateway; a token's `aud` must have one of them.",
        more: "None listed: a token must not have an `aud`, for it would be meant for somebody else.",
    };
    AUTH_COOKIE: Parsed<CookieName> = Key {
        name: "auth.cookie",
        kind: Parsed::new("a cookie's name, an HTTP token of 1 to 256 characters such as tidegate_token"),
        default: Unset { example: r#""__Host-tidegate""# },
        reload: Live,
        doc: "The cookie in which pages of allowed origins may carry a token. Not set: no cookie is read.",
        more: "It counts if the request has no other token and comes from a page of an origin that `origins` \
               allows; `*` allows cookies of the gateway's own host only.",
    };
    AUTH_LEEWAY: Time = Key {
        name: "auth.leeway",
        kind: Time { min: Duration::ZERO, max: Duration::from_secs(300) },
        default: Is(r#""5s""#),
        reload: Live,
        doc: "How far the clocks of whoever makes tokens and of this node may be apart.",
        more: "Whole seconds count.",
    };
    LIMITS_CONNECTIONS: Count = Key {
        name: "limits.connections",
        kind: Count { min: 1, max: 10_000_000 },
        default: Is("100000"),
        reload: Live,
        doc: "Open connections on this node. At the limit, new ones are answered 503.",
        more: "",
    };
    LIMITS_MESSAGE_SIZE: Size = Key {
        name: "limits.message_size",
        kind: size(1, ByteSize::mib(16)),
        default: Is(r#""64KiB""#),
        reload: Live,
        doc: "The largest message that is taken from a client.",
        more: "",
    };
    LIMITS_OUTBOUND: Size = Key {
        name: "limits.outbound",
        kind: size(1, ByteSize::mib(1024)),
        default: Is(r#""1MiB""#),
        reload: Live,
        doc: "Bytes that may wait for one session. A session that needs more is closed as slow, unless the room's `overflow` is another.",
        more: "A frame counts 64 bytes beside its own. At least `limits.message_size`.",
    };
    LIMITS_MEMORY: Auto<Size> = Key {
        name: "limits.memory",
        kind: Auto(size(1 << 20, ByteSize::mib(1 << 20))),
        default: Is(r#""auto""#),
        reload: Live,
        doc: "Memory that may be held for clients, of all kinds together. Past it the fullest sessions are closed, to come back.",
        more: "Outbound queues, publications inside the node, request heads and bodies, incomplete messages. \
               Requests are refused with 503 when they hold half of it, or when seven eighths are held. What idle \
               connections cost is not part of it. `auto` is 70 % of the memory limit of the control group (cgroup, version 1 or \
               2), the smallest of those that the process is in; without a limit, 50 % of the machine's memory.",
    };
    LIMITS_ROOMS_PER_SESSION: Count = Key {
        name: "limits.rooms_per_session",
        kind: Count { min: 1, max: 65_536 },
        default: Is("128"),
        reload: Live,
        doc: "Rooms that one session may be in.",
        more: "",
    };
    LIMITS_ACCEPTS: OrOff<Parsed<Rate>> = Key {
        name: "limits.accepts",
        kind: COUNTED,
        default: Is(r#""10000/s""#),
        reload: Live,
        doc: "New connections that this node takes. More wait in the kernel's queue; nobody is refused.",
        more: "",
    };
    LIMITS_ATTEMPTS_PER_ADDRESS: OrOff<Parsed<Rate>> = Key {
        name: "limits.attempts_per_address",
        kind: COUNTED,
        default: Is(r#""100/s burst 1000""#),
        reload: Live,
        doc: "New connections of one address, and requests that a trusted proxy passes on for it. More are answered 429.",
        more: "IPv6 by /64. Behind a proxy, list it in `public.trusted_proxies`: all clients would count as one.",
    };
    LIMITS_CONNECTIONS_PER_ADDRESS: OrOff<Count> = Key {
        name: "limits.connections_per_address",
        kind: OrOff(Count { min: 1, max: 10_000_000 }),
        default: Is("10000"),
        reload: Live,
        doc: "Open connections of one address. More are answered 429.",
        more: "Likewise.",
    };
    LIMITS_COMMANDS: OrOff<Parsed<Rate>> = Key {
        name: "limits.commands",
        kind: COUNTED,
        default: Is(r#""200/s burst 1000""#),
        reload: Live,
        doc: "Messages, commands and control frames of one session. More are refused, in the way of its protocol.",
        more: "",
    };
    LIMITS_BYTES: OrOff<Parsed<ByteRate>> = Key {
        name: "limits.bytes",
        kind: BYTES,
        default: Is(r#""4MiB/s burst 16MiB""#),
        reload: Live,
        doc: "Bytes of one session, frame heads included, compressed messages as what they become. More are refused likewise.",
        more: "The burst is at least `limits.message_size`.",
    };
    LIMITS_USER_COMMANDS: OrOff<Parsed<Rate>> = Key {
        name: "limits.user_commands",
        kind: COUNTED,
        default: Is(r#""1000/s burst 5000""#),
        reload: Live,
        doc: "What all sessions of one user on this node may say, and what it may `POST` (429).",
        more: "A user is a token's subject.",
    };
    LIMITS_USER_BYTES: OrOff<Parsed<ByteRate>> = Key {
        name: "limits.user_bytes",
        kind: BYTES,
        default: Is(r#""16MiB/s burst 64MiB""#),
        reload: Live,
        doc: "Their bytes.",
        more: "The burst is at least `limits.message_size`.",
    };
    COMPRESSION_ENABLED: Switch = Key {
        name: "compression.enabled",
        kind: Switch,
        default: Is("false"),
        reload: Live,
        doc: "Whether WebSocket clients that offer permessage-deflate (RFC 7692) get it.",
        more: "A message is compressed once for all members of its room, without context takeover. It saves \
               bandwidth for processor time; a compressed session costs no more memory than another.",
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
        doc: "Time between two signs of life that the node sends on a quiet connection.",
        more: "Shorter than the idle time-out of every proxy on the way.",
    };
    HEARTBEAT_TIMEOUT: Time = Key {
        name: "heartbeat.timeout",
        kind: some_time(HOUR),
        default: Is(r#""60s""#),
        reload: Live,
        doc: "A client from which no byte came for this long is closed.",
        more: "Longer than `heartbeat.interval`.",
    };
    SSE_RETRY: Time = Key {
        name: "sse.retry",
        kind: some_time(HOUR),
        default: Is(r#""3s""#),
        reload: Live,
        doc: "How long an event stream's client is told to wait before it comes back, before jitter.",
        more: "",
    };
    DRAIN_PAUSE: Time = Key {
        name: "drain.pause",
        kind: Time { min: Duration::ZERO, max: HOUR },
        default: Is(r#""0s""#),
        reload: Live,
        doc: "Time to be not ready and to serve everybody, new sessions too, before the node closes any.",
        more: "As long as load balancers take to notice.",
    };
    DRAIN_WINDOW: Time = Key {
        name: "drain.window",
        kind: Time { min: Duration::ZERO, max: HOUR },
        default: Is(r#""10s""#),
        reload: Live,
        doc: "Time over which the closing of sessions is spread evenly.",
        more: "Never faster; a node that is too busy takes longer.",
    };
    DRAIN_DEADLINE: Time = Key {
        name: "drain.deadline",
        kind: some_time(Duration::from_secs(3 * 3_600)),
        default: Is(r#""30s""#),
        reload: Live,
        doc: "Time for the whole drain. Beyond it the node exits with status 1.",
        more: "At least `drain.pause` and `drain.window` together. A few seconds more let the last ones end in \
               order: a client has five to answer its close.",
    };
    LOG_FORMAT: Format = Key {
        name: "log.format",
        kind: Format,
        default: Is(r#""text""#),
        reload: Restart,
        doc: "How log lines are written: for people, or one JSON object each.",
        more: "",
    };
    LOG_FILTER: Parsed<LogFilter> = Key {
        name: "log.filter",
        kind: Parsed::new("a level, or directives such as info,tidegate::auth=debug"),
        default: Is(r#""info""#),
        reload: Live,
        doc: "Which events are logged.",
        more: "Levels and targets that do not exist are refused.",
    };
    ROOMS_GRANT: OperationList = Key {
        name: r#"rooms."<pattern>".grant"#,
        kind: OperationList,
        default: Is("[]"),
        reload: Live,
        doc: "What everybody with a valid token may do in the rooms of this pattern.",
        more: "A pattern is a room's name, with `*` at its end for anything that begins so, and `{sub}` for \
               the subject of the token.",
    };
    ROOMS_OVERFLOW: Parsed<Overflow> = Key {
        name: r#"rooms."<pattern>".overflow"#,
        kind: Parsed::new("close, drop_oldest or latest"),
        default: Is(r#""close""#),
        reload: Live,
        doc: "What happens when `limits.outbound` has no room for a publication of such a room.",
        more: "`close`: the session is closed as slow. `drop_oldest`: the oldest of the room that wait make way. \
               `latest`: all of the room that wait make way, as soon as the socket does not keep up. The \
               session is told that it has a gap.",
    };
    ROOMS_PRIORITY: Switch = Key {
        name: r#"rooms."<pattern>".priority"#,
        kind: Switch,
        default: Is("false"),
        reload: Live,
        doc: "Whether publications of such a room overtake those of other rooms that wait for the same session.",
        more: "",
    };
}

/// The table that is keyed by patterns, and so cannot be looked up by name.
pub(super) const ROOMS: &str = "rooms";

/// Whether a key belongs to that table.
pub(super) fn is_of_rooms(name: &str) -> bool {
    name.strip_prefix(ROOMS).is_some_and(|rest| rest.starts_with('.'))
}

/// The last parts of its keys.
pub(super) fn room_keys() -> impl Iterator<Item = &'static str> + Clone {
    TABLE
        .iter()
        .filter_map(|row| row.name().rsplit_once('.').filter(|_| is_of_rooms(row.name())))
        .map(|(_, key)| key)
}
