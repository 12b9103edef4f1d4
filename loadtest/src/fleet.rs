//! Nodes on one Redis, with rooms that keep a history.
//!
//! Owns the servers of the scenarios in which clients come back: how they are configured, and where their
//! clients connect. A scenario may kill any of them.

use std::net::SocketAddr;

use anyhow::{Context, bail};
use broker_bridge::redis::functions;

use crate::{
    probe::Url,
    process::Cpu,
    redis::Link,
    target::{Entrance, NUMBER, Protocol, PublishArg, Redis, TargetArgs, Via},
    workshop::{Node, SECRET, Wanted, Workshop, local},
};

/// The servers of a run.
#[derive(Debug)]
pub struct Fleet<'a> {
    workshop: &'a Workshop,
    /// The first of them owns the Redis.
    nodes: Vec<Node>,
    /// Where messages are published; the topic contains the number of the room.
    pub redis: Redis,
    url: String,
    flags: Vec<String>,
}

impl<'a> Fleet<'a> {
    /// Starts a Redis and a node whose rooms keep `history` messages; 0 for none. `settings` are more keys and
    /// values for every node.
    pub fn start(workshop: &'a Workshop, history: u32, settings: &[String]) -> anyhow::Result<Self> {
        let mut settings = settings.to_vec();
        if history > 0 {
            settings.push(format!("rooms.\"load:*\".history.size={history}"));
        }
        let flags: Vec<String> =
            settings.into_iter().flat_map(|setting| ["--set".to_owned(), setting]).collect();
        let first = workshop.node_with(&Wanted { redis: true, ..Wanted::default() }, &flags)?;
        let url = first.redis.clone().context("the node is on a Redis")?;
        Ok(Self { workshop, nodes: vec![first], redis: redis_at(&url)?, url, flags })
    }

    /// Starts another node and returns its number.
    pub fn add_node(&mut self) -> anyhow::Result<usize> {
        self.add_node_as(&self.url.clone())
    }

    /// The same, with another URL of the same Redis.
    pub fn add_node_as(&mut self, url: &str) -> anyhow::Result<usize> {
        let mut flags = self.flags.clone();
        flags.extend(["--broker-url".to_owned(), url.to_owned()]);
        self.nodes.push(self.workshop.node_with(&Wanted::default(), &flags)?);
        Ok(self.nodes.len() - 1)
    }

    /// Loads the functions into Redis, as an administrator does for backends. A node loads them too, but only
    /// when it first needs them.
    pub fn load_functions(&self) -> anyhow::Result<()> {
        load_functions(&self.redis)
    }

    /// The URL of the Redis.
    pub fn redis_url(&self) -> &str {
        &self.url
    }

    /// Where clients of this protocol connect to node `number`.
    pub fn entrance(&self, number: usize, protocol: Protocol) -> anyhow::Result<Entrance> {
        Ok(target(self.node(number)?.public, protocol, &self.url).resolve(2)?.entrance)
    }

    /// Kills node `number`.
    pub fn kill_node(&mut self, number: usize) -> anyhow::Result<()> {
        self.nodes.get_mut(number).context("a node has a number")?.kill()
    }

    /// Kills the Redis.
    pub fn kill_redis(&mut self) -> anyhow::Result<()> {
        self.nodes.first_mut().context("a node owns the Redis")?.kill_redis()
    }

    /// Starts the Redis again, without its data. The caller has to wait until it is up.
    pub fn restart_redis(&mut self) -> anyhow::Result<()> {
        self.nodes.first_mut().context("a node owns the Redis")?.restart_redis(self.workshop)
    }

    /// The CPU time of node `number`.
    pub fn cpu(&self, number: usize) -> anyhow::Result<Cpu> {
        Cpu::of(self.node(number)?.pid)
    }

    /// A metric of node `number`.
    pub fn metric(&self, number: usize, name: &str) -> anyhow::Result<f64> {
        let url: Url =
            format!("http://{}/metrics", self.node(number)?.ops).parse().map_err(anyhow::Error::msg)?;
        url.metric(name)
    }

    fn node(&self, number: usize) -> anyhow::Result<&Node> {
        self.nodes.get(number).context("a node has a number")
    }
}

/// Loads the functions of rooms with a history.
pub fn load_functions(redis: &Redis) -> anyhow::Result<()> {
    Link::open(redis)?.ask(&["FUNCTION", "LOAD", "REPLACE", functions::TEXT]).map(drop)
}

/// The Redis at `url`, and the topic of rooms that are numbered.
pub fn redis_at(url: &str) -> anyhow::Result<Redis> {
    // Clients connect elsewhere; only the names of rooms matter here.
    match target(local(0), Protocol::Json, url).resolve(2)?.via {
        Via::Redis(redis) => Ok(redis),
        _ => bail!("{url} is not a Redis"),
    }
}

fn target(public: SocketAddr, protocol: Protocol, redis: &str) -> TargetArgs {
    let url = match protocol {
        Protocol::Centrifuge => format!("ws://{public}/connection/websocket"),
        Protocol::Sse => format!("http://{public}/rooms/load:{NUMBER}"),
        _ => format!("ws://{public}/rooms/load:{NUMBER}"),
    };
    TargetArgs {
        url,
        protocol,
        channel: None,
        publish: PublishArg::Elsewhere(redis.to_owned()),
        topic: None,
        token: None,
        hs256_secret: Some(SECRET.to_owned()),
        ca: None,
        insecure: false,
        addresses: 16,
        deflate: false,
    }
}
