//! The server under test and how to publish to it, parsed once from the command line.
//!
//! A test of many rooms names them all at once: `{room}` in a URL, a channel or a topic is replaced by the
//! number of the room.

use std::{fmt, net::SocketAddr, path::PathBuf};

use anyhow::{Context, bail, ensure};
use broker_bridge::redis::{Endpoint, RedisUrl};
use clap::{Args, ValueEnum};
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize};

use crate::{
    dialect::Dialect,
    tls::Tls,
    token::Credentials,
    web::{Basic, Web, resolve},
};

/// The placeholder for the number of a room.
pub const NUMBER: &str = "{room}";

/// The server under test, as flags and as passed to worker processes.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
pub struct TargetArgs {
    /// Where clients connect: ws://, wss://, http:// or https:// (server-sent events); {room} is the room's
    /// number
    #[arg(long, default_value = "ws://127.0.0.1:8080/rooms/demo:{room}")]
    pub url: String,
    /// The protocol of the clients
    #[arg(long, value_enum, default_value_t = Protocol::Plain)]
    pub protocol: Protocol,
    /// The channel of a Centrifuge or Socket.IO client [default: load:{room}]
    #[arg(long)]
    pub channel: Option<String>,
    /// How to publish: client (as the protocol does it), http (POST to the URL), or a ws(s)://, http(s)://,
    /// redis:// or redis+unix:// URL
    #[arg(long, default_value = "client")]
    pub publish: PublishArg,
    /// The Redis topic to publish to [default: `room:` and the channel, or the part of the URL after /rooms/]
    #[arg(long)]
    pub topic: Option<String>,
    /// One token for all clients: sent as a Bearer header, or as the protocol defines
    #[arg(long, conflicts_with = "hs256_secret")]
    pub token: Option<String>,
    /// Sign a token for each client with this secret: its own `sub`, and a grant for the rooms of the test
    #[arg(long)]
    pub hs256_secret: Option<String>,
    /// Trust the certificates in this PEM file instead of the system's
    #[arg(long)]
    pub ca: Option<PathBuf>,
    /// Accept any certificate
    #[arg(long)]
    pub insecure: bool,
    /// Negotiate compressed messages (permessage-deflate without context takeover) and inflate them
    #[arg(long)]
    pub deflate: bool,
    /// Spread clients of a server on this machine over this many source addresses (127.0.0.2 and up)
    #[arg(long, default_value_t = 16)]
    pub addresses: u8,
}

/// The protocol at the URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// A `WebSocket` whose text frames are the messages
    Plain,
    /// Any other server: a message counts wherever it is found in a frame
    Raw,
    /// Server-sent events
    Sse,
    /// The Centrifuge protocol in JSON, over a `WebSocket`
    Centrifuge,
    /// Socket.IO 5 over a `WebSocket`: events `join` (room) and `m` (room, data)
    SocketIo,
    /// JSON objects over a `WebSocket`: Tidegate's subprotocol `tidegate.json`
    Json,
    /// The protocol of the yardsticks
    #[value(skip)]
    Bare,
}

/// A host and a path template, resolved. `Debug` and `Display` omit credentials and the query, which may hold
/// a token.
#[derive(Clone, Debug)]
pub struct Address {
    pub socket: SocketAddr,
    pub tls: Option<Tls>,
    /// Host and port as written, for the `Host` header.
    pub authority: String,
    /// The path and the query, with `{room}` as written.
    pub path_and_query: String,
    /// The credentials in the URL.
    pub basic: Option<Basic>,
}

/// Where members connect and which protocol they use.
#[derive(Clone, Debug)]
pub struct Entrance {
    pub address: Address,
    pub dialect: Dialect,
    pub channel: String,
    pub credentials: Credentials,
    /// Whether to negotiate compressed messages.
    pub deflate: bool,
    /// Spread members over this many addresses (127.0.0.2 and up); 0 leaves the choice to the kernel.
    pub source_addresses: u8,
}

/// How messages are published to a room.
#[derive(Clone, Debug)]
pub enum Via {
    /// On a connection like any other client's.
    Client(Entrance),
    /// `POST`, on one connection, a burst pipelined.
    Http(Address, Credentials),
    /// `PUBLISH` straight into Redis, a burst pipelined.
    Redis(Redis),
}

/// A Redis server and the topic to publish to. `Debug` omits its password.
#[derive(Clone, Serialize, Deserialize)]
pub struct Redis {
    pub at: RedisAddress,
    /// The arguments of `AUTH`; empty if there is none.
    pub auth: Vec<String>,
    pub topic: String,
}

/// Where a Redis server listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RedisAddress {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// The values of `--publish`; the rest comes from the URL under test.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum PublishArg {
    /// As the protocol does it, at the URL under test.
    Client,
    /// By `POST` to the URL under test.
    Http,
    /// To another address.
    Elsewhere(String),
}

/// The resolved target of one test.
#[derive(Clone, Debug)]
pub struct Target {
    pub entrance: Entrance,
    pub via: Via,
}

impl TargetArgs {
    /// Resolves names, reads certificates, and determines how to publish to `rooms` rooms.
    pub fn resolve(&self, rooms: u32) -> anyhow::Result<Target> {
        let protocol = self.protocol;
        let schemes: &[&str] = if protocol == Protocol::Sse { &["http", "https"] } else { &["ws", "wss"] };
        let address = self.address(&self.url, schemes).context("--url")?;
        ensure!(!self.deflate || protocol != Protocol::Sse, "--deflate needs a WebSocket");
        let names_rooms = matches!(protocol, Protocol::Centrifuge | Protocol::SocketIo);
        let channel = match &self.channel {
            Some(channel) => channel.clone(),
            None if names_rooms => format!("load:{NUMBER}"),
            None => address.room().unwrap_or_default(),
        };
        let template = if names_rooms { &channel } else { &address.path_and_query };
        let of = if names_rooms { "--channel" } else { "--url" };
        ensure!(rooms < 2 || template.contains(NUMBER), "{rooms} rooms need {NUMBER} in {of}");
        let entrance = Entrance {
            source_addresses: if address.socket.ip().is_loopback() { self.addresses } else { 0 },
            dialect: protocol.into(),
            deflate: self.deflate,
            credentials: Credentials::new(self.token.as_deref(), self.hs256_secret.as_deref(), &channel),
            channel,
            address,
        };
        let has_token = self.token.is_some() || self.hs256_secret.is_some();
        let by_header = matches!(protocol, Protocol::Plain | Protocol::Raw | Protocol::Sse | Protocol::Json);
        let header_twice =
            "a user in the URL and a token would both be the Authorization header; use one of them";
        ensure!(entrance.address.basic.is_none() || !has_token || !by_header, "--url: {header_twice}");
        let via = self.via(&entrance).context("--publish")?;
        if let Via::Http(address, _) = &via {
            ensure!(address.basic.is_none() || !has_token, "--publish: {header_twice}");
        }
        Ok(Target { entrance, via })
    }

    fn via(&self, entrance: &Entrance) -> anyhow::Result<Via> {
        let http = |address: Address| Via::Http(address, entrance.credentials.clone());
        let elsewhere = match &self.publish {
            PublishArg::Client if entrance.dialect == Dialect::Sse => {
                return Ok(http(entrance.address.clone()));
            }
            PublishArg::Client => return Ok(Via::Client(entrance.clone())),
            PublishArg::Http => return Ok(http(entrance.address.clone())),
            PublishArg::Elsewhere(url) => url,
        };
        let topic = || match &self.topic {
            Some(topic) => Ok(topic.clone()),
            None if entrance.channel.is_empty() => {
                bail!("{} names no room; set the topic with --topic", entrance.address)
            }
            None => Ok(format!("room:{}", entrance.channel)),
        };
        let scheme = elsewhere.split_once(':').map_or("", |(scheme, _)| scheme).to_ascii_lowercase();
        match scheme.as_str() {
            "ws" | "wss" => {
                ensure!(
                    entrance.dialect != Dialect::Sse,
                    "clients of server-sent events do not publish over a WebSocket"
                );
                let address = self.address(elsewhere, &["ws", "wss"])?;
                Ok(Via::Client(Entrance { address, ..entrance.clone() }))
            }
            "http" | "https" => self.address(elsewhere, &["http", "https"]).map(http),
            "redis" | "rediss" | "redis+unix" | "unix" => Redis::parse(elsewhere, topic()?).map(Via::Redis),
            _ => bail!("expected client, http, or a ws(s)://, http(s)://, redis:// or redis+unix:// URL"),
        }
    }

    fn address(&self, text: &str, schemes: &[&str]) -> anyhow::Result<Address> {
        let web = Web::parse(text, schemes)?;
        let secure = matches!(web.scheme.as_str(), "wss" | "https");
        Ok(Address {
            socket: web.resolve()?,
            tls: secure.then(|| Tls::new(&web.host, self.ca.as_deref(), self.insecure)).transpose()?,
            authority: web.authority,
            path_and_query: web.path_and_query,
            basic: web.basic,
        })
    }
}

impl Address {
    /// The path and query of room `number`.
    pub fn path(&self, number: u32) -> String {
        self.path_and_query.replace(NUMBER, &number.to_string())
    }

    /// The decoded part of the path after `/rooms/`.
    fn room(&self) -> Option<String> {
        let path = self.path_and_query.split('?').next()?;
        let room = path.strip_prefix("/rooms/").filter(|room| !room.is_empty())?;
        Some(percent_decode_str(room).decode_utf8().ok()?.into_owned())
    }
}

impl Entrance {
    /// The channel of room `number`.
    pub fn channel(&self, number: u32) -> String {
        self.channel.replace(NUMBER, &number.to_string())
    }

    /// The number of the room whose channel this is.
    pub fn room(&self, channel: &str) -> Option<u32> {
        let (before, after) = self.channel.split_once(NUMBER)?;
        channel.strip_prefix(before)?.strip_suffix(after)?.parse().ok()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path_and_query.split('?').next().unwrap_or_default();
        write!(f, "{}{path}", self.authority)
    }
}

/// Resolving checks whether this is a valid URL; its errors do not repeat the text, which may hold a
/// password.
impl From<String> for PublishArg {
    fn from(text: String) -> Self {
        match text.as_str() {
            "client" => Self::Client,
            "http" => Self::Http,
            _ => Self::Elsewhere(text),
        }
    }
}

impl From<PublishArg> for String {
    fn from(argument: PublishArg) -> Self {
        match argument {
            PublishArg::Client => "client".into(),
            PublishArg::Http => "http".into(),
            PublishArg::Elsewhere(url) => url,
        }
    }
}

impl From<Protocol> for Dialect {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Plain => Self::Plain,
            Protocol::Raw => Self::Raw,
            Protocol::Sse => Self::Sse,
            Protocol::Centrifuge => Self::Centrifuge,
            Protocol::SocketIo => Self::SocketIo,
            Protocol::Json => Self::Json,
            Protocol::Bare => Self::Bare,
        }
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(_) => f.write_str("a client"),
            Self::Http(..) => f.write_str("HTTP POST"),
            Self::Redis(_) => f.write_str("Redis PUBLISH"),
        }
    }
}

impl Redis {
    /// Parses `url`. The database does not matter to PUBLISH. Errors do not repeat the URL, which may hold a
    /// password.
    fn parse(url: &str, topic: String) -> anyhow::Result<Self> {
        let url: RedisUrl = url.parse()?;
        let at = match url.endpoint {
            Endpoint::Tcp { host, port } => RedisAddress::Tcp(resolve(&host, port)?),
            Endpoint::Unix(path) => RedisAddress::Unix(path),
            Endpoint::Tls { .. } => {
                bail!("expected redis:// or redis+unix://: TLS to Redis is not supported")
            }
        };
        let password = url.password.as_ref().map(|password| password.reveal().to_owned());
        let auth = match (url.user, password) {
            (Some(user), password) => vec![user, password.unwrap_or_default()],
            (None, Some(password)) => vec![password],
            (None, None) => Vec::new(),
        };
        Ok(Self { at, auth, topic })
    }
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redis").field("at", &self.at).field("topic", &self.topic).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        target: TargetArgs,
    }

    fn target(flags: &str, rooms: u32) -> anyhow::Result<Target> {
        let only = Only::try_parse_from(["test"].into_iter().chain(flags.split_whitespace()))?;
        only.target.resolve(rooms)
    }

    #[test]
    fn a_url_is_parsed() {
        let Target { entrance, .. } =
            target("--url ws://127.0.0.1:8080/rooms/a%3A{room}?token=secret", 2).unwrap();
        let address = &entrance.address;
        assert_eq!(address.socket, "127.0.0.1:8080".parse().unwrap());
        assert_eq!(address.authority, "127.0.0.1:8080");
        assert_eq!(address.path(7), "/rooms/a%3A7?token=secret");
        assert_eq!(entrance.channel(7), "a:7");
        assert_eq!(address.to_string(), "127.0.0.1:8080/rooms/a%3A{room}");
        assert_eq!(entrance.source_addresses, 16);
        let six = target("--url ws://[::1]/", 1).unwrap().entrance.address;
        assert_eq!((six.socket, six.path(0)), ("[::1]:80".parse().unwrap(), "/".to_owned()));
        let tls = target("--url wss://127.0.0.1/x --insecure", 1).unwrap().entrance.address;
        assert!(tls.tls.is_some() && tls.socket.port() == 443);
        for bad in ["", "http://127.0.0.1/", "gopher://127.0.0.1/", "127.0.0.1:80", "ws://"] {
            assert!(target(&format!("--url={bad}"), 1).is_err(), "{bad}");
        }
        assert!(target("--url WS://127.0.0.1/ ", 1).is_ok(), "schemes have no case");
        assert!(target("--url ws://127.0.0.1/x#part", 1).is_err(), "RFC 6455 §3");
        assert!(target("--url http://127.0.0.1/ --protocol sse", 1).is_ok());
        assert!(target("--url ws://127.0.0.1/ --protocol sse", 1).is_err());
    }

    #[test]
    fn a_user_in_the_url_and_a_token_header_are_exclusive() {
        let url = "--url ws://me:hunter2@127.0.0.1/rooms/x";
        let address = target(url, 1).unwrap().entrance.address;
        assert!(address.basic.is_some());
        assert_eq!(
            (address.to_string(), address.authority),
            ("127.0.0.1/rooms/x".into(), "127.0.0.1".into())
        );
        for token in ["--token t", "--hs256-secret s"] {
            assert!(target(&format!("{url} {token}"), 1).is_err(), "{token}");
            assert!(target(&format!("{url} {token} --protocol centrifuge"), 1).is_ok(), "{token}");
        }
        let error = target("--url http://me:hunter2@127.0.0.1/", 1).unwrap_err();
        assert!(!format!("{error:#} {error:?}").contains("hunter2"), "{error:#}");
    }

    #[test]
    fn many_rooms_need_the_number_placeholder() {
        let url = "--url ws://127.0.0.1/rooms/x";
        assert!(target(url, 1).is_ok());
        let error = format!("{:#}", target(url, 2).unwrap_err());
        assert!(error.contains("{room} in --url"), "{error}");
        assert!(target(&format!("{url} --protocol centrifuge"), 2).is_ok());
        let error = target(&format!("{url} --protocol centrifuge --channel x"), 2).unwrap_err();
        assert!(format!("{error:#}").contains("{room} in --channel"), "{error:#}");
    }

    #[test]
    fn every_way_to_publish_is_parsed() {
        let via = |flags: &str| Ok(target(&format!("--url ws://127.0.0.1/rooms/x?a=b {flags}"), 1)?.via);
        let via: &dyn Fn(&str) -> anyhow::Result<Via> = &via;
        assert!(matches!(via("").unwrap(), Via::Client(to) if to.address.path(0) == "/rooms/x?a=b"));
        assert!(matches!(via("--publish http").unwrap(), Via::Http(to, _) if to.socket.port() == 80));
        let other = via("--publish http://127.0.0.1:1/y").unwrap();
        assert!(matches!(other, Via::Http(to, _) if to.socket.port() == 1));
        let other = via("--publish ws://127.0.0.1:2/y").unwrap();
        assert!(matches!(other, Via::Client(to) if to.address.socket.port() == 2));
        let Via::Redis(redis) = via("--publish redis://me:p%40ss@127.0.0.1/0").unwrap() else { panic!() };
        assert_eq!(redis.at, RedisAddress::Tcp("127.0.0.1:6379".parse().unwrap()));
        assert_eq!((redis.auth.join(" "), redis.topic.as_str()), ("me p@ss".into(), "room:x"));
        assert!(!format!("{redis:?}").contains("p@ss"));
        let Via::Redis(redis) = via("--publish redis+unix:///tmp/r.sock").unwrap() else { panic!() };
        assert_eq!(redis.at, RedisAddress::Unix("/tmp/r.sock".into()));
        let Via::Redis(redis) = via("--publish REDIS://:p%40ss@[::1]:7/3").unwrap() else { panic!() };
        assert_eq!(
            (redis.at, redis.auth),
            (RedisAddress::Tcp("[::1]:7".parse().unwrap()), vec!["p@ss".into()])
        );
        assert!(via("--publish rediss://127.0.0.1").is_err());
        for bad in ["carrier-pigeon", "gopher://me:hunter2@h", "redis://me:hunter2@h:x", "me:hunter2@h"] {
            let error = format!("{:#}", via(&format!("--publish {bad}")).unwrap_err());
            assert!(!error.contains("hunter2"), "{error}");
        }
        let elsewhere = "--url ws://127.0.0.1/chat --publish redis://127.0.0.1";
        assert!(target(elsewhere, 1).is_err());
        assert!(target(&format!("{elsewhere} --topic t"), 1).is_ok());
        let sse = target("--url http://127.0.0.1/rooms/x --protocol sse", 1).unwrap();
        assert!(matches!(sse.via, Via::Http(..)), "an event stream is published to by POST");
    }
}
