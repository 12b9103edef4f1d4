//! What is tested and how it is published to, parsed once from the command line.

use std::{
    fmt,
    net::{SocketAddr, ToSocketAddrs},
    path::PathBuf,
    str::FromStr,
};

use anyhow::{Context, bail, ensure};
use http::Uri;
use percent_encoding::percent_decode_str;

/// An HTTP origin and a path on it, resolved. Shows itself without the query, where tokens live.
#[derive(Clone, Debug)]
pub struct Target {
    /// Where to connect.
    pub address: SocketAddr,
    /// Host and port as written, for the `Host` header.
    pub authority: String,
    /// The path and the query, as written.
    pub path_and_query: String,
    path: String,
}

/// How messages get into the room.
#[derive(Clone, Debug)]
pub enum Via {
    /// A frame on a connection of its own to this address.
    WebSocket(Target),
    /// `POST` to this address, on one connection, a burst pipelined.
    Http(Target),
    /// `PUBLISH` straight into Redis, a burst pipelined.
    Redis(Redis),
}

/// A Redis server and the topic to publish to. Shows itself without its password.
#[derive(Clone)]
pub struct Redis {
    pub at: RedisAddress,
    /// The arguments of `AUTH`; empty if there is none.
    pub auth: Vec<String>,
    pub topic: String,
}

/// Where a Redis server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedisAddress {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// What `--publish` may say; the rest comes from the URL under test.
#[derive(Clone, Debug)]
pub enum PublishArg {
    /// `ws`: the URL under test.
    WebSocket,
    /// `http`: the URL under test by `POST`.
    Http,
    /// Another address altogether.
    Elsewhere(String),
}

impl Target {
    /// Whether the target is on this machine, so that members may come from several loopback addresses.
    pub fn is_loopback(&self) -> bool {
        self.address.ip().is_loopback()
    }

    /// The Redis topic of the room this URL names: `room:` and what stands, decoded, after `/rooms/`.
    fn topic(&self) -> anyhow::Result<String> {
        let room = self.path.strip_prefix("/rooms/").filter(|room| !room.is_empty());
        let room = room.with_context(|| format!("{self} names no room; say which topic with --topic"))?;
        Ok(format!("room:{}", percent_decode_str(room).decode_utf8().context("the room is not UTF-8")?))
    }

    fn parse(text: &str, scheme: &str, default_port: u16) -> anyhow::Result<Self> {
        let uri: Uri = text.parse().context("not a URL")?;
        ensure!(
            uri.scheme_str() == Some(scheme),
            "expected {scheme}://host:port/path (TLS is not spoken yet)"
        );
        let authority = uri.authority().context("the URL names no host")?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let path_and_query = uri.path_and_query().map_or("/", |path| path.as_str());
        Ok(Self {
            address: resolve(host, authority.port_u16().unwrap_or(default_port))?,
            authority: authority.as_str().to_owned(),
            path_and_query: path_and_query.to_owned(),
            path: uri.path().to_owned(),
        })
    }
}

impl FromStr for Target {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        Self::parse(text, "ws", 80)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.authority, self.path)
    }
}

impl FromStr for PublishArg {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "ws" => Self::WebSocket,
            "http" => Self::Http,
            elsewhere => Self::Elsewhere(elsewhere.to_owned()),
        })
    }
}

impl PublishArg {
    /// Settles how to publish to `target`. `topic` overrides the Redis topic that the target's room has.
    pub fn settle(&self, target: &Target, topic: Option<&str>) -> anyhow::Result<Via> {
        let elsewhere = match self {
            Self::WebSocket => return Ok(Via::WebSocket(target.clone())),
            Self::Http => return Ok(Via::Http(target.clone())),
            Self::Elsewhere(url) => url,
        };
        let topic = || topic.map_or_else(|| target.topic(), |topic| Ok(topic.to_owned()));
        match elsewhere.split_once("://") {
            Some(("ws", _)) => Target::parse(elsewhere, "ws", 80).map(Via::WebSocket),
            Some(("http", _)) => Target::parse(elsewhere, "http", 80).map(Via::Http),
            Some(("redis", rest)) => Redis::parse(rest, topic()?).map(Via::Redis),
            Some(("redis+unix" | "unix", path)) => Ok(Via::Redis(Redis {
                at: RedisAddress::Unix(path.into()),
                auth: Vec::new(),
                topic: topic()?,
            })),
            _ => bail!("--publish is ws, http, or a ws://, http://, redis:// or redis+unix:// URL"),
        }
        .context("--publish")
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WebSocket(_) => f.write_str("a WebSocket"),
            Self::Http(_) => f.write_str("HTTP POST"),
            Self::Redis(_) => f.write_str("Redis PUBLISH"),
        }
    }
}

impl Redis {
    /// Parses what follows `redis://`: `[user][:password@]host[:port][/db]`. The database does not matter
    /// to PUBLISH.
    fn parse(rest: &str, topic: String) -> anyhow::Result<Self> {
        let rest = rest.split('/').next().unwrap_or(rest);
        let (credentials, address) = rest.rsplit_once('@').unwrap_or(("", rest));
        let (host, port) = match address.rsplit_once(':') {
            Some((host, port)) => (host, port.parse().context("the port is not a number")?),
            None => (address, 6379),
        };
        let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
        let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let auth = [user, password].into_iter().filter(|text| !text.is_empty()).map(decode).collect();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        Ok(Self { at: RedisAddress::Tcp(resolve(host, port)?), auth, topic })
    }
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redis").field("at", &self.at).field("topic", &self.topic).finish_non_exhaustive()
    }
}

fn resolve(host: &str, port: u16) -> anyhow::Result<SocketAddr> {
    let mut found = (host, port).to_socket_addrs().with_context(|| format!("cannot resolve {host}"))?;
    found.next().with_context(|| format!("{host} has no address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(text: &str) -> Target {
        text.parse().unwrap()
    }

    #[test]
    fn a_url_is_taken_apart() {
        let room = target("ws://127.0.0.1:8080/rooms/a%3Ab?token=secret");
        assert_eq!(room.address, "127.0.0.1:8080".parse().unwrap());
        assert_eq!(room.authority, "127.0.0.1:8080");
        assert_eq!(room.path_and_query, "/rooms/a%3Ab?token=secret");
        assert_eq!(room.topic().unwrap(), "room:a:b");
        assert!(room.is_loopback());
        assert_eq!(room.to_string(), "127.0.0.1:8080/rooms/a%3Ab");
        assert_eq!(target("ws://[::1]/").address, "[::1]:80".parse().unwrap());
        for bad in ["", "http://127.0.0.1/", "wss://127.0.0.1/", "127.0.0.1:80", "ws://"] {
            assert!(bad.parse::<Target>().is_err(), "{bad}");
        }
    }

    #[test]
    fn every_way_to_publish() {
        let room = target("ws://127.0.0.1:8080/rooms/x?token=t");
        let via = |text: &str| text.parse::<PublishArg>().unwrap().settle(&room, None);
        assert!(matches!(via("ws").unwrap(), Via::WebSocket(to) if to.path_and_query == "/rooms/x?token=t"));
        assert!(matches!(via("http").unwrap(), Via::Http(to) if to.address == room.address));
        assert!(matches!(via("http://127.0.0.1:1/y").unwrap(), Via::Http(to) if to.address.port() == 1));
        let Via::Redis(redis) = via("redis://me:p%40ss@127.0.0.1/0").unwrap() else { panic!() };
        assert_eq!(redis.at, RedisAddress::Tcp("127.0.0.1:6379".parse().unwrap()));
        assert_eq!((redis.auth.join(" "), redis.topic.as_str()), ("me p@ss".into(), "room:x"));
        assert!(!format!("{redis:?}").contains("p@ss"));
        let Via::Redis(redis) = via("redis+unix:///tmp/r.sock").unwrap() else { panic!() };
        assert_eq!(redis.at, RedisAddress::Unix("/tmp/r.sock".into()));
        assert!(via("carrier-pigeon").is_err());
        let other = target("ws://127.0.0.1/chat");
        let redis = PublishArg::Elsewhere("redis://127.0.0.1".into());
        assert!(redis.settle(&other, None).is_err());
        assert!(redis.settle(&other, Some("t")).is_ok());
    }
}
