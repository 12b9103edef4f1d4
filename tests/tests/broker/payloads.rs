//! Raw messages from any source, sizes, and metrics.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use broker_bridge::{
    Accepted, Broker, BrokerError, Data, DataKind, Publication, RoomName, conformance::Heard,
    redis::RedisConfig,
};
use tidegate_tests::redis_server::RedisServer;
use tokio::io::AsyncWriteExt;

use crate::stage::{Node, brief, config, has, program, room};

#[tokio::test]
async fn a_bare_publish_arrives_byte_for_byte() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = Node::up(&redis.url()).await?;
    let room = room("lobby");
    node.subscribe(&room).await?;
    let payloads: [&[u8]; 6] = [
        br#"{"text":"hi"}"#,
        "é日本\r\n$5\r\n".as_bytes(),
        b"\xff\x00binary",
        b"\xF5Tg\x01 looks like an envelope",
        b"\xF5",
        b"last",
    ];
    let mut connection = redis::Client::open(redis.url())?.get_multiplexed_async_connection().await?;
    for (index, payload) in payloads.iter().enumerate() {
        // Alternately from the command line and from a library.
        if index % 2 == 0 {
            redis.cli(&["PUBLISH", "room:lobby"], payload).await?;
        } else {
            let receivers: i64 =
                redis::cmd("PUBLISH").arg("room:lobby").arg(*payload).query_async(&mut connection).await?;
            ensure!(receivers == 1);
        }
    }
    let () = redis::cmd("PUBLISH").arg("room:lobby").arg("").query_async(&mut connection).await?;
    let heard = node.heard.wait(&room, "all of them", |heard| heard.len() > payloads.len()).await;
    for (heard, payload) in heard.iter().zip(payloads.into_iter().chain([&b""[..]])) {
        let kind = if std::str::from_utf8(payload).is_ok() { DataKind::Text } else { DataKind::Binary };
        let data = Data::declare(kind, payload.to_vec().into()).context("the kind fits")?;
        ensure!(*heard == Heard::Publication(Publication::new(data)), "{heard:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_publication_over_the_limit_is_a_gap_between_intact_neighbours() -> Result<()> {
    const LIMIT: usize = 100_000;
    let redis = RedisServer::start().await?;
    let node = Node::up_with(RedisConfig { max_publication: LIMIT, subscribers: 1, ..config(&redis.url())? })
        .await?;
    let (room, other) = (room("large"), RoomName::new("other")?);
    node.subscribe(&room).await?;
    node.subscribe(&other).await?;
    let mut connection = redis::Client::open(redis.url())?.get_multiplexed_async_connection().await?;
    let sizes = [5, LIMIT, LIMIT + 1, 6, LIMIT + 10_000, 40 * LIMIT, 7];
    let mut pipeline = redis::pipe();
    for size in sizes {
        pipeline.cmd("PUBLISH").arg("room:large").arg("x".repeat(size)).ignore();
        pipeline.cmd("PUBLISH").arg("room:other").arg(size).ignore();
    }
    let () = pipeline.query_async(&mut connection).await?;
    let heard = node.heard.wait(&room, "all of them", |heard| heard.len() >= sizes.len()).await;
    let lengths = heard.iter().map(|heard| match heard {
        Heard::Publication(publication) => publication.data.bytes().len(),
        Heard::Gap(_) => 0,
    });
    ensure!(lengths.eq([5, LIMIT, 0, 6, 0, 0, 7]));
    ensure!(brief(&heard).iter().filter(|text| *text == "[oversized]").count() == 3);
    let heard = node.heard.wait(&other, "the last", has("7")).await;
    ensure!(brief(&heard) == sizes.map(|size| size.to_string()), "no connection was lost: {heard:?}");
    ensure!(node.sample("tidegate_broker_oversized_total")? == 3);

    // Outgoing, it is refused and causes no gap for anyone.
    let large = |size| node.receipts.request(&room, Publication::new(Data::text("y".repeat(size))));
    node.broker.publish(large(LIMIT + 1)).await;
    node.broker.publish(large(LIMIT)).await;
    let settled = node.receipts.wait(2).await;
    ensure!(
        matches!(&settled[&1][..], [Err(BrokerError::Refused(_))])
            && settled[&2] == [Ok(Accepted::default())],
        "{settled:?}"
    );
    Ok(())
}

#[tokio::test]
async fn topics_that_are_not_rooms_are_ignored() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = Node::up_with(RedisConfig { prefix: "p:".parse()?, ..config(&redis.url())? }).await?;
    let room = room("a");
    node.subscribe(&room).await?;
    for topic in ["room:a", "p:room:b", "p:room:", "p:a", "p:room:a"] {
        redis.cli(&["PUBLISH", topic], topic.as_bytes()).await?;
    }
    let heard = node.heard.wait(&room, "its own", has("p:room:a")).await;
    ensure!(brief(&heard) == ["p:room:a"], "{heard:?}");
    Ok(())
}

#[tokio::test]
async fn metrics_are_named_as_prometheus_expects() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = Node::up(&redis.url()).await?;
    node.subscribe(&room("measured")).await?;
    node.publish(&room("measured"), "x").await;
    node.heard.wait(&room("measured"), "its publication", has("x")).await;
    ensure!(node.sample("tidegate_broker_received_total")? == 1, "a canary is not a publication");

    let mut promtool = tokio::process::Command::new(program("promtool")?)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut stdin = promtool.stdin.take().context("stdin is piped")?;
    stdin.write_all(node.exposed()?.as_bytes()).await?;
    drop(stdin);
    let output = promtool.wait_with_output().await?;
    ensure!(output.status.success() && output.stderr.is_empty() && output.stdout.is_empty(), "{output:?}");
    Ok(())
}
