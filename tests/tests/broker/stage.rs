//! The setup of most tests.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use broker_bridge::{
    Broker, BrokerStatus, BrokerUrl, Data, Publication, RoomName, Subscribing,
    conformance::{Heard, Receipts, Recorder, affinity_of},
    metrics::BrokerMetrics,
    redis::{Part, RedisBroker, RedisConfig},
};
use prometheus::{Encoder, Registry, TextEncoder};
use tidegate_tests::PATIENCE;
use tokio::time::timeout;

/// A node's broker and the events it has sent.
pub struct Node {
    pub broker: RedisBroker,
    pub heard: Arc<Recorder>,
    pub receipts: Arc<Receipts>,
    registry: Registry,
}

/// Defaults, but with short canary times.
pub fn config(url: &str) -> Result<RedisConfig> {
    let BrokerUrl::Redis(url) = url.parse()? else { bail!("{url} is not a Redis") };
    Ok(RedisConfig { canary_interval: Duration::from_millis(200), ..RedisConfig::new(url) })
}

impl Node {
    /// A node whose broker is up.
    pub async fn up(url: &str) -> Result<Self> {
        Self::up_with(config(url)?).await
    }

    pub async fn up_with(config: RedisConfig) -> Result<Self> {
        let node = Self::start(config)?;
        node.until_up().await?;
        Ok(node)
    }

    /// A node whose broker may or may not come up.
    pub fn start(config: RedisConfig) -> Result<Self> {
        let registry = Registry::new();
        let broker = RedisBroker::start(config, BrokerMetrics::register(&registry)?)?;
        Ok(Self { broker, heard: Arc::default(), receipts: Arc::default(), registry })
    }

    /// A node whose parts are polled by the test.
    pub fn in_parts(config: RedisConfig) -> Result<(Self, Vec<Part>)> {
        let registry = Registry::new();
        let (broker, parts) = RedisBroker::new(config, BrokerMetrics::register(&registry)?)?;
        Ok((Self { broker, heard: Arc::default(), receipts: Arc::default(), registry }, parts))
    }

    pub async fn until_up(&self) -> Result<()> {
        self.until("up", BrokerStatus::is_up).await.map(drop)
    }

    pub async fn until_interrupted(&self) -> Result<Arc<str>> {
        match self.until("interrupted", |status| matches!(status, BrokerStatus::Interrupted(_))).await? {
            BrokerStatus::Interrupted(why) => Ok(why),
            other => bail!("{other:?}"),
        }
    }

    /// Waits for a status.
    pub async fn until(&self, what: &str, is: impl Fn(&BrokerStatus) -> bool) -> Result<BrokerStatus> {
        let mut watch = self.broker.status();
        let found = timeout(PATIENCE, watch.wait_for(|status| is(status)))
            .await
            .map(|found| found.map(|found| found.clone()));
        found.with_context(|| format!("not {what}: {:?}", *self.broker.status().borrow()))?.context("closed")
    }

    /// Asks for a subscription.
    pub fn ask(&self, room: &RoomName) -> Subscribing {
        self.broker.subscribe(room, self.heard.sink(room), affinity_of(room))
    }

    pub async fn subscribe(&self, room: &RoomName) -> Result<()> {
        Ok(timeout(PATIENCE, self.ask(room)).await.context("no acknowledgement")??)
    }

    /// Subscribes to all of them at once.
    pub async fn subscribe_all(&self, rooms: &[RoomName]) -> Result<()> {
        let all = rooms.iter().map(|room| self.ask(room)).collect::<Vec<_>>();
        for acknowledged in timeout(PATIENCE, futures_util::future::join_all(all)).await? {
            acknowledged?;
        }
        Ok(())
    }

    pub async fn publish(&self, room: &RoomName, text: &str) {
        self.broker.publish(self.receipts.request(room, Publication::new(Data::text(text)))).await;
    }

    /// The value of a counter series, by its name and labels as exposed.
    pub fn sample(&self, series: &str) -> Result<i64> {
        let text = self.exposed()?;
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        Ok(value.with_context(|| format!("no {series} in {text}"))?.parse()?)
    }

    pub fn exposed(&self) -> Result<String> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8(text)?)
    }
}

pub fn room(name: &str) -> RoomName {
    RoomName::new(name).expect("a valid room name")
}

pub fn rooms(count: usize) -> Vec<RoomName> {
    (0..count).map(|number| room(&format!("room:{number}"))).collect()
}

/// A short form of the received events: the text of a publication, or the cause of a gap in brackets.
pub fn brief(heard: &[Heard]) -> Vec<String> {
    let one = |heard: &Heard| match heard {
        Heard::Publication(publication) => publication
            .data
            .as_text()
            .map_or_else(|| format!("{:?}", publication.data.bytes()), str::to_owned),
        Heard::Gap(cause) => format!("[{}]", cause.as_str()),
    };
    heard.iter().map(one).collect()
}

pub fn has(text: &str) -> impl Fn(&[Heard]) -> bool + '_ {
    move |heard| brief(heard).iter().any(|one| one == text)
}

/// Whether a program of this name is installed.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").context("there is a PATH")?;
    let found =
        std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file());
    found.with_context(|| format!("{name} is not installed"))
}
