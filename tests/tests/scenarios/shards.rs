//! Order and completeness, whatever the number of shards and of connections to Redis.

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;
use tidegate_tests::{client::Client, http::Request, journal::Payload, token::anywhere};

use crate::stage::{Stage, ensure_merge, payloads, publish};

/// The number of shards, and of connections that receive and that publish.
const NODES: [[&str; 3]; 3] = [["1", "auto", "auto"], ["2", "auto", "auto"], ["4", "3", "2"]];
const MEMBERS: usize = 8;
const SPEAKERS: usize = 4;
const EACH: usize = 150;

async fn stage([shards, subscribers, publishers]: [&str; 3]) -> Result<Stage> {
    Stage::set_with(|node| {
        node.set("shards", shards).set("broker.subscribers", subscribers).set("broker.publishers", publishers)
    })
    .await
}

#[tokio::test]
async fn all_members_hear_one_order_that_keeps_each_publishers() -> Result<()> {
    for shards in NODES {
        let stage = stage(shards).await?;
        let token = anywhere("alice");
        let urls = [&stage.a, &stage.b].map(|node| node.ws("lobby", &token, ""));
        let (mut members, mut speakers) = (Vec::new(), Vec::new());
        for url in &urls {
            for _ in 0..MEMBERS {
                members.push(Client::websocket(url, &[]).await?);
            }
            for _ in 0..SPEAKERS {
                speakers.push(Client::websocket(url, &[]).await?);
            }
        }
        let mut sent: Vec<Vec<_>> = (0..speakers.len())
            .map(|speaker| (0..EACH).map(|n| Payload::text(format!("{speaker}:{n}"))).collect())
            .collect();
        let speaking = speakers.iter().zip(&sent).map(async |(speaker, own)| {
            for payload in own {
                speaker.send(payload.clone()).await?;
            }
            anyhow::Ok(())
        });
        // Each request on a connection of its own, so on any shard, after the answer to the one before.
        let posted: Vec<_> = (0..40).map(|n| Payload::text(format!("post:{n}"))).collect();
        let posting = async {
            for payload in &posted {
                let request = Request::post("/rooms/lobby", "text/plain", payload.bytes().to_vec());
                let response = request.bearer(&token).send(stage.a.public).await?;
                ensure!(response.status == 202, "{response:?}");
            }
            Ok(())
        };
        tokio::try_join!(try_join_all(speaking), posting)?;
        sent.push(posted.clone());

        let total = sent.iter().map(Vec::len).sum();
        let order = payloads(&members[0].heard(total).await?);
        ensure_merge(&order, &sent)?;
        for member in members.iter().chain(&speakers) {
            ensure!(
                payloads(&member.heard(total).await?) == order,
                "the members hear different orders: {shards:?}"
            );
        }
    }
    Ok(())
}

/// A room that was forgotten is subscribed by the thread of its next member, which is another one.
#[tokio::test]
async fn a_room_that_moves_between_shards_is_heard_once() -> Result<()> {
    for shards in NODES {
        let stage = stage(shards).await?;
        let token = anywhere("alice");
        let url = stage.a.ws("lobby", &token, "");
        for round in 0..5 {
            // Sockets are assigned to the shards in turn.
            let elsewhere = Client::websocket(&stage.a.ws("other", &token, ""), &[]).await?;
            let member = Client::websocket(&url, &[]).await?;
            let sent: Vec<_> = (0..20).map(|n| Payload::text(format!("{round}:{n}"))).collect();
            for payload in &sent {
                publish(&stage.redis, "lobby", payload.bytes()).await?;
            }
            ensure!(payloads(&member.heard(sent.len()).await?) == sent);
            let journal = member.leave().await?;
            ensure!(journal.payloads() == sent, "{shards:?}: {journal:?}");
            elsewhere.leave().await?;
            let topics =
                |samples: &tidegate_tests::samples::Samples| samples.sum("tidegate_broker_topics", &[]) == 0;
            stage.a.until_samples("no topic", topics).await?;
        }
    }
    Ok(())
}
