//! The faults: their names, the expected results of publishers and sessions, and how each is caused and undone.

use std::{ops::RangeInclusive, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use tidegate_tests::{
    eventually::eventually,
    fault_proxy::{Direction, Flow, Target, Which},
};
use tokio::time::sleep;

use super::{Row, Transport};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Killed,
    ShutDown,
    PubSubKilled,
    PublishersKilled,
    ShortPause,
    LongPause,
    ShortSleep,
    LongSleep,
    MaxClients,
    Failover,
    Demoted,
    PasswordChanged,
    PasswordChangedAndKilled,
    RoomForbidden,
    Loading,
    Busy,
    OutputBuffer,
    NodeStopped,
    Blackholed,
    OtherServer,
}

impl Fault {
    pub(super) const ALL: [Self; 20] = [
        Self::Killed,
        Self::ShutDown,
        Self::PubSubKilled,
        Self::PublishersKilled,
        Self::ShortPause,
        Self::LongPause,
        Self::ShortSleep,
        Self::LongSleep,
        Self::MaxClients,
        Self::Failover,
        Self::Demoted,
        Self::PasswordChanged,
        Self::PasswordChangedAndKilled,
        Self::RoomForbidden,
        Self::Loading,
        Self::Busy,
        Self::OutputBuffer,
        Self::NodeStopped,
        Self::Blackholed,
        Self::OtherServer,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Killed => "kill -9, restart",
            Self::ShutDown => "SHUTDOWN NOSAVE, restart",
            Self::PubSubKilled => "CLIENT KILL TYPE pubsub",
            Self::PublishersKilled => "CLIENT KILL TYPE normal",
            Self::ShortPause => "CLIENT PAUSE 400",
            Self::LongPause => "CLIENT PAUSE 3000",
            Self::ShortSleep => "DEBUG SLEEP 0.4",
            Self::LongSleep => "DEBUG SLEEP 3",
            Self::MaxClients => "maxclients 1, CLIENT KILL TYPE pubsub",
            Self::Failover => "FAILOVER, and back",
            Self::Demoted => "REPLICAOF, and back",
            Self::PasswordChanged => "password changed",
            Self::PasswordChangedAndKilled => "password changed, CLIENT KILL",
            Self::RoomForbidden => "ACL forbids the room",
            Self::Loading => "restart with data to load",
            Self::Busy => "BUSY: a script in a loop",
            Self::OutputBuffer => "output buffer limit",
            Self::NodeStopped => "node SIGSTOP for 3 s",
            Self::Blackholed => "packets vanish",
            Self::OtherServer => "subscribers at another server",
        }
    }

    /// Gap notifications per session, if the room has a history or not.
    pub(super) fn gaps(self, has_history: bool) -> RangeInclusive<usize> {
        if has_history {
            return match self {
                // The server has lost the log, or may have lost the newest.
                Self::Killed | Self::ShutDown | Self::Loading | Self::OtherServer => 1..=1,
                // As above, for sessions whose node has noticed it: a refused publication may end the fault before the
                // receiving connections are asked for their server's role, and they have missed nothing.
                Self::Demoted => 0..=1,
                Self::Failover => 0..=2,
                _ => 0..=0,
            };
        }
        match self {
            Self::PublishersKilled
            | Self::ShortPause
            | Self::ShortSleep
            | Self::PasswordChanged
            | Self::Busy
            | Self::NodeStopped => 0..=0,
            _ => 1..=1,
        }
    }

    /// The statuses besides 202 that publishers must get, and those that they may get.
    pub(super) fn statuses(self, has_history: bool) -> (&'static [u16], &'static [u16]) {
        match self {
            // What became of it is found out.
            Self::PublishersKilled if has_history => (&[], &[]),
            Self::LongPause | Self::LongSleep | Self::Blackholed if has_history => (&[], &[503, 504]),
            Self::PubSubKilled
            | Self::ShortPause
            | Self::ShortSleep
            | Self::PasswordChanged
            | Self::NodeStopped
            | Self::MaxClients
            | Self::OutputBuffer => (&[], &[]),
            // Publications wait until the node knows where they go.
            Self::OtherServer => (&[], &[503]),
            Self::PublishersKilled => (&[], &[504]),
            Self::Killed | Self::ShutDown | Self::Demoted | Self::Failover | Self::Loading => {
                (&[], &[503, 504])
            }
            Self::LongPause | Self::LongSleep | Self::Blackholed => (&[504], &[503]),
            Self::PasswordChangedAndKilled => (&[503], &[504]),
            Self::RoomForbidden => (&[403], &[503, 504]),
            Self::Busy => (&[503], &[]),
        }
    }

    /// Whether the fault is possible with this connection.
    pub(super) fn happens_over(self, transport: Transport) -> bool {
        match self {
            Self::Blackholed => transport != Transport::Unix,
            Self::OtherServer => transport == Transport::Tcp,
            _ => true,
        }
    }
}

impl Row {
    /// Causes the fault, waits for its effect, and undoes it.
    #[allow(clippy::too_many_lines, reason = "one arm for each fault")]
    pub(super) async fn happen(&mut self) -> Result<()> {
        match self.fault {
            Fault::Killed => {
                self.redis.kill().await?;
                self.until_down().await?;
                self.redis.restart().await
            }
            Fault::ShutDown => {
                drop(self.admin("SHUTDOWN NOSAVE").await);
                self.until_down().await?;
                self.redis.restart().await
            }
            Fault::PubSubKilled => {
                self.admin("CLIENT KILL TYPE pubsub").await?;
                self.until_interrupted().await
            }
            Fault::PublishersKilled => {
                self.admin("CLIENT KILL TYPE normal SKIPME yes").await?;
                self.until_ended("closed", 2).await
            }
            Fault::ShortPause => {
                self.admin("CLIENT PAUSE 400").await?;
                self.until_answers().await
            }
            Fault::LongPause => {
                self.admin("CLIENT PAUSE 3000").await?;
                self.until_down().await?;
                self.until_answers().await
            }
            Fault::ShortSleep => self.redis.cli(&["DEBUG", "SLEEP", "0.4"], b"").await.map(drop),
            Fault::LongSleep => {
                self.redis.cli(&["DEBUG", "SLEEP", "3"], b"").await?;
                self.until_interrupted().await
            }
            Fault::MaxClients => {
                self.admin("CONFIG SET maxclients 1").await?;
                self.admin("CLIENT KILL TYPE pubsub").await?;
                self.until_down().await?;
                self.admin("CONFIG SET maxclients 1000").await.map(drop)
            }
            Fault::Failover => {
                self.admin("FAILOVER").await?;
                self.until_down().await?;
                let second = self.second.as_ref().context("the replica")?;
                eventually("back again", async || {
                    second.cli(&["FAILOVER"], b"").await.map(drop).map_err(|error| format!("{error:#}"))
                })
                .await
            }
            Fault::Demoted => {
                let port = self.second.as_ref().context("another server")?.port();
                self.admin(&format!("REPLICAOF 127.0.0.1 {port}")).await?;
                self.until_down().await?;
                self.admin("REPLICAOF NO ONE").await.map(drop)
            }
            Fault::PasswordChanged => {
                self.admin("ACL SETUSER tidegate resetpass >another").await?;
                self.until_proven(10).await
            }
            Fault::PasswordChangedAndKilled => {
                self.admin("ACL SETUSER tidegate resetpass >another").await?;
                self.admin("CLIENT KILL USER tidegate").await?;
                self.until_down().await?;
                self.until_status(503).await?;
                self.admin("ACL SETUSER tidegate resetpass >secret").await.map(drop)
            }
            Fault::RoomForbidden => {
                self.admin("ACL SETUSER tidegate resetchannels &tidegate:canary:*").await?;
                self.until_down().await?;
                self.until_status(403).await?;
                self.admin("ACL SETUSER tidegate &room:*").await.map(drop)
            }
            Fault::Loading => {
                // By redis-cli, which waits for as long as a busy disk takes.
                self.redis.cli(&["DEBUG", "POPULATE", "20000", "key", "100"], b"").await?;
                self.redis.cli(&["SAVE"], b"").await?;
                self.redis.set("key-load-delay 300");
                self.redis.restart_loading().await?;
                self.until_interrupted().await?;
                self.until_up().await?;
                self.until_proven(20).await?;
                ensure!(self.redis.is_loading().await?, "all this while it loads");
                self.redis.cli(&["CONFIG", "SET", "key-load-delay", "0"], b"").await.map(drop)
            }
            Fault::Busy => {
                let script = self.redis.cli(&["EVAL", "while true do end", "0"], b"");
                let busy = async {
                    self.until_status(503).await?;
                    // Longer than all deadlines, on purpose.
                    sleep(Duration::from_millis(1500)).await;
                    self.redis.cli(&["SCRIPT", "KILL"], b"").await
                };
                let (_, busy) = tokio::join!(script, busy);
                busy.map(drop)
            }
            Fault::OutputBuffer => {
                for node in &self.nodes {
                    node.signal(Signal::STOP)?;
                }
                let payload = "x".repeat(64 * 1024);
                let channel = format!("room:{}", self.room);
                let mut publish = redis::cmd(if self.has_history() { "FCALL" } else { "PUBLISH" });
                if self.has_history() {
                    publish.arg("tidegate_publish").arg(1).arg(format!("{{{channel}}}:log")).arg(&payload);
                    publish.arg("size").arg(10_000);
                } else {
                    publish.arg(&channel).arg(&payload);
                }
                loop {
                    let _: redis::Value = publish.query_async(&mut self.admin).await?;
                    let mut heard = redis::cmd("PUBSUB");
                    heard.arg("NUMSUB").arg(&channel);
                    let (_, heard): (String, i64) = heard.query_async(&mut self.admin).await?;
                    if heard == 0 {
                        break;
                    }
                }
                for node in &self.nodes {
                    node.signal(Signal::CONT)?;
                }
                self.until_interrupted().await
            }
            Fault::NodeStopped => {
                for node in &self.nodes {
                    node.signal(Signal::STOP)?;
                }
                // Longer than all deadlines, on purpose.
                sleep(Duration::from_secs(3)).await;
                for node in &self.nodes {
                    node.signal(Signal::CONT)?;
                }
                self.until_proven(10).await
            }
            Fault::Blackholed => {
                let proxy = self.proxy.as_ref().context("a proxy")?;
                proxy.set(Which::All, Direction::ToClient, Flow::Blackhole);
                // All connections of both nodes: what a network loses, it does not deliver later.
                self.until_ended("silent", 4).await?;
                self.proxy.as_ref().context("a proxy")?.resume();
                Ok(())
            }
            Fault::OtherServer => {
                let second = self.second.as_ref().context("another server")?.port();
                let proxy = self.proxy.as_ref().context("a proxy")?;
                proxy.retarget(Target::Tcp(([127, 0, 0, 1], second).into()));
                self.admin("CLIENT KILL TYPE pubsub").await?;
                self.until_interrupted().await
            }
        }
    }
}
