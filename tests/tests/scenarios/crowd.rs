//! A room with more members than a shard serves at once: they are served in slices while others join and leave.

use anyhow::{Context as _, Result, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tidegate_tests::{
    client::Client,
    journal::Payload,
    node::{Builder, Node},
    redis_server::RedisServer,
    token::anywhere,
};

use crate::stage::{payloads, publish};

/// Two slices and a half.
const CROWD: usize = 640;
const GUESTS: usize = 60;
const MESSAGES: usize = 60;
const GAP: &str = "tidegate.gap";

#[tokio::test]
async fn members_receive_everything_once_while_others_come_and_go() -> Result<()> {
    let node = Builder::new().set("shards", "1").start().await?;
    let token = anywhere("alice");
    let (crowd, aside) = (node.ws("crowd", &token, ""), node.ws("aside", &token, ""));
    let stay = sockets(&crowd, CROWD).await?;
    let leave = sockets(&crowd, GUESTS).await?;
    let stream = Client::events(&node.url("crowd", &token, "")).await?;
    let other = Client::websocket(&aside, &[]).await?;
    let speaker = Client::websocket(&node.ws("crowd", &token, "echo=false"), &[]).await?;
    let speaker_aside = Client::websocket(&node.ws("aside", &token, "echo=false"), &[]).await?;

    // Publications without a pause, while clients join and leave.
    let speaking = async {
        for n in 0..MESSAGES {
            speaker.send(message(n)).await?;
            speaker_aside.send(message(n)).await?;
            tokio::task::yield_now().await;
        }
        anyhow::Ok(())
    };
    let going = async {
        let mut journals = Vec::new();
        for guest in leave {
            journals.push(guest.leave().await?);
        }
        anyhow::Ok(journals)
    };
    let ((), gone, came) = tokio::try_join!(speaking, going, sockets(&crowd, GUESTS))?;

    let all: Vec<_> = (0..MESSAGES).map(message).collect();
    for member in stay.iter().chain([&stream, &other]) {
        ensure!(payloads(&member.heard(MESSAGES).await?) == all, "{member:?}");
    }
    node.post("crowd", &token, "text/plain", b"the end").await?;
    let all = [all, vec![Payload::text("the end")]].concat();
    for member in stay.iter().chain([&stream]) {
        ensure!(payloads(&member.heard(all.len()).await?) == all, "{member:?} received something twice");
    }
    for journal in gone {
        ensure!(all.starts_with(&journal.payloads()), "{:?}", journal.payloads());
    }
    for guest in &came {
        let heard = guest.hears(&Payload::text("the end")).await?.payloads();
        ensure!(all.ends_with(&heard), "{heard:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_crowd_is_notified_of_a_gap_once_and_at_its_place() -> Result<()> {
    let mut redis = RedisServer::start().await?;
    let node = Builder::new().set("shards", "1").set("broker.url", &redis.url()).start().await?;
    let token = anywhere("alice");
    let strict = sockets(&node.ws("crowd", &token, "gap=close"), CROWD / 2).await?;
    let plain = sockets(&node.ws("crowd", &token, "gap=ignore"), CROWD / 2).await?;
    let streams = [
        Client::events(&node.url("crowd", &token, "")).await?,
        Client::node_events(&node.url("crowd", &token, ""), &[GAP]).await?,
    ];
    publish(&redis, "crowd", b"before").await?;
    for member in strict.iter().chain(&plain).chain(&streams) {
        member.heard(1).await?;
    }
    redis.kill().await?;
    until_broker(&node, 0).await?;
    redis.restart().await?;
    for member in &strict {
        let end = member.ended().await?;
        ensure!(end.code() == Some(1012), "{end:?}");
        ensure!(payloads(&member.heard(1).await?) == [Payload::text("before")]);
    }
    until_broker(&node, 1).await?;
    publish(&redis, "crowd", b"after").await?;
    for member in &plain {
        ensure!(payloads(&member.heard(2).await?) == [Payload::text("before"), Payload::text("after")]);
    }
    for stream in &streams {
        let journal = stream.hears(&Payload::text("after")).await?;
        ensure!(journal.events(GAP) == 1, "{:?}", journal.payloads());
    }
    let gaps = node.samples().await?.sum("tidegate_gaps_total", &["cause=\"interrupted\""]);
    ensure!(gaps == 1, "one room was notified of a gap {gaps} times");
    Ok(())
}

/// This many members of the room at this URL.
async fn sockets(url: &str, count: usize) -> Result<Vec<Client>> {
    let open = |_| async move { Client::websocket(url, &[]).await };
    stream::iter(0..count).map(open).buffer_unordered(32).try_collect().await.context("the crowd gathers")
}

fn message(n: usize) -> Payload {
    Payload::text(format!("message {n}"))
}

async fn until_broker(node: &Node, up: u64) -> Result<()> {
    node.until_samples("broker", |samples| samples.sum("tidegate_broker_up", &[]) == up).await.map(drop)
}
