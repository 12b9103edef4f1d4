//! Rooms with a history: what clients that come back receive.

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use serde_json::Value;
use tidegate_tests::{
    client::Client,
    http::Request,
    journal::{Journal, Message, Payload},
    node::{Builder, Node},
    raw::RawSocket,
    redis_server::RedisServer,
    token::anywhere,
};

use crate::{ndjson::Lines, stage::payloads};

pub fn recording() -> Builder {
    Builder::new().set(r#"rooms."kept:*".history.size"#, "1000")
}

pub async fn publish(node: &Node, token: &str, numbers: std::ops::Range<u32>) -> Result<()> {
    for number in numbers {
        node.post("kept:a", token, "text/plain", number.to_string().as_bytes()).await?;
    }
    Ok(())
}

pub fn numbers(range: std::ops::Range<u32>) -> Vec<Payload> {
    range.map(|number| Payload::text(number.to_string())).collect()
}

/// The position after which a client that has received this comes back.
fn position(journal: &Journal) -> String {
    journal.messages.last().map(|message| message.id.clone()).unwrap_or_default()
}

/// From every seventh position of a log, and with live publications behind it.
#[tokio::test]
async fn a_client_that_comes_back_gets_exactly_what_it_has_missed() -> Result<()> {
    const ALL: u32 = 300;
    let node = recording().start().await?;
    let token = anywhere("alice");
    let witness = Client::events(&node.url("kept:a", &token, "")).await?;
    publish(&node, &token, 0..ALL).await?;
    let heard = witness.heard(ALL as usize).await?;
    ensure!(payloads(&heard) == numbers(0..ALL));
    for (seen, message) in heard.iter().enumerate().step_by(7) {
        let since = format!("&since={}", message.id);
        let missed = numbers(u32::try_from(seen)? + 1..ALL);
        let client = Client::events(&node.url("kept:a", &token, &since)).await?;
        ensure!(payloads(&client.heard(missed.len()).await?) == missed, "after {seen}: {client:?}");
        client.leave().await?;
    }
    // Live publications follow without a seam.
    let middle = format!("&since={}", heard.get(149).map(|message| &*message.id).unwrap_or_default());
    let clients =
        try_join_all(std::iter::repeat_n(&*node.url("kept:a", &token, &middle), 20).map(Client::events))
            .await?;
    publish(&node, &token, ALL..ALL + 50).await?;
    for client in &clients {
        let heard = client.heard(usize::try_from(ALL)? - 150 + 50).await?;
        ensure!(payloads(&heard) == numbers(150..ALL + 50), "{client:?}");
    }
    node.ensure_sound()
}

/// `EventSource` sends the id of the last event that it has received by itself.
#[tokio::test]
async fn an_event_source_misses_nothing_while_it_reconnects() -> Result<()> {
    let node = recording().set("public.max_session_age", "1s").set("sse.retry", "50ms").start().await?;
    let token = anywhere("alice");
    // It has never received a message when it is disconnected for the first time.
    let early = Client::node_events(&node.url("kept:a", &token, ""), &["tidegate.gap"]).await?;
    early.until("it has reconnected", |journal| journal.opened > 1).await?;
    let mut sent = 0;
    while early.now().opened < 5 {
        publish(&node, &token, sent..sent + 10).await?;
        sent += 10;
    }
    let heard = early.heard(sent as usize).await?;
    ensure!(payloads(&heard) == numbers(0..sent), "{early:?}");
    Ok(())
}

/// A history of sixteen times what a queue may hold, to a client that reads slowly. Nothing of it is dropped, whatever the
/// room does for slow clients.
#[tokio::test]
async fn a_slow_client_catches_up_without_being_taken_for_slow() -> Result<()> {
    try_join_all(["close", "drop_oldest", "latest"].map(catches_up_slowly)).await.map(drop)
}

async fn catches_up_slowly(overflow: &str) -> Result<()> {
    const ALL: u32 = 256;
    let node = recording()
        .set(r#"rooms."kept:*".overflow"#, overflow)
        .set("limits.outbound", "64KiB")
        .set("limits.message_size", "8KiB")
        .start()
        .await?;
    let token = anywhere("alice");
    let text = |number: u32| format!("{number:04}{}", "x".repeat(4092));
    let witness = Client::events(&node.url("kept:a", &token, "")).await?;
    node.post("kept:a", &token, "text/plain", text(0).as_bytes()).await?;
    let since = witness.heard(1).await?.remove(0).id;
    witness.leave().await?;
    for number in 1..ALL {
        node.post("kept:a", &token, "text/plain", text(number).as_bytes()).await?;
    }
    let target = format!("/rooms/kept:a?token={token}&since={since}");
    let mut slow = RawSocket::connect_narrow(node.public, &target).await?;
    for number in 1..ALL {
        let received = slow.receive().await?.context("a message")?;
        ensure!(received.payload == text(number).as_bytes(), "{overflow}, {number}: {received:.20?}");
    }
    node.ensure_sound()
}

/// Many small messages, to a client that reads at once. They come in several pieces, and its response takes each before
/// the next one. So nothing is dropped in a room that keeps only the latest for slow clients.
#[tokio::test]
async fn what_was_missed_is_not_dropped_for_the_latest() -> Result<()> {
    const ALL: u32 = 1000;
    let node = recording().set(r#"rooms."kept:*".overflow"#, "latest").start().await?;
    let token = anywhere("alice");
    let witness = Client::events(&node.url("kept:a", &token, "")).await?;
    publish(&node, &token, 0..1).await?;
    let since = witness.heard(1).await?.remove(0).id;
    publish(&node, &token, 1..ALL).await?;
    let mut lines = Lines::open_as(&node, &format!("/rooms/kept:a?since={since}"), &token).await?;
    let mut heard = Vec::new();
    while heard.len() + 1 < ALL as usize {
        let object = lines.next().await?.context("another line")?;
        ensure!(object.get("gap").is_none(), "{object} after {}", heard.len());
        heard.extend(object.get("data").and_then(Value::as_u64));
    }
    ensure!(heard.iter().copied().eq(1..ALL.into()), "{heard:?}");
    node.ensure_sound()
}

/// Each client that joins tries to open a history that cannot be opened. The log tells it once.
#[tokio::test]
async fn a_history_that_cannot_be_opened_is_logged_once_however_many_join() -> Result<()> {
    const JOINS: u64 = 20;
    let redis = RedisServer::start().await?;
    redis.cli(&["SET", "{room:kept:a}:log", "no log"], b"").await?;
    let node = on(&redis).await?;
    for _ in 0..JOINS {
        Lines::open_as(&node, "/rooms/kept:a", &anywhere("alice")).await?;
    }
    let failed = &["result=\"failed\""];
    let failures = node.samples().await?.sum("tidegate_broker_log_opens_total", failed);
    ensure!(failures == JOINS, "{failures} attempts");
    // Another warning comes after a minute, which no test takes.
    let warnings = node.output().matches("cannot open the history of a room").count();
    ensure!(warnings == 1, "{warnings} warnings");
    node.ensure_sound()
}

/// Positions that nobody knows are a gap, never an error, and the client hears what comes.
#[tokio::test]
async fn an_unknown_position_is_a_gap_and_then_life_goes_on() -> Result<()> {
    let node = recording().start().await?;
    let token = anywhere("alice");
    publish(&node, &token, 0..5).await?;
    for since in ["1-1", "0-0", "18446744073709551615-18446744073709551615"] {
        let client = Client::events(&node.url("kept:a", &token, &format!("&since={since}"))).await?;
        let gap = client.until("the gap", |journal| !journal.messages.is_empty()).await?;
        let first = gap.messages.first().map(|message| (&*message.event, message.payload.clone()));
        let told = Payload::text(r#"{"cause":"expired","room":"kept:a"}"#);
        ensure!(first == Some(("tidegate.gap", told)), "{since}: {client:?}");
        publish(&node, &token, 5..6).await?;
        client.hears(&Payload::text("5")).await?;
        client.leave().await?;
    }
    let refused = Request::get(&format!("/rooms/kept:a?token={token}&since=yesterday"));
    let refused = refused.header("Accept", "text/event-stream").send(node.public).await?;
    ensure!(refused.status == 400 && refused.text().contains("expected a position"), "{refused:?}");
    Ok(())
}

/// A node on this Redis that keeps histories.
/// It keeps more than a fast machine publishes while a node reconnects.
pub async fn on(redis: &RedisServer) -> Result<Node> {
    let node = Builder::new().set(r#"rooms."kept:*".history.size"#, "10000");
    node.set("broker.url", &redis.url()).start().await
}

/// Publishes numbers from one on, until `over` is done. Returns how many were accepted. Whoever is refused tries again.
pub async fn publishing<T>(
    node: &Node,
    token: &str,
    over: impl Future<Output = Result<T>>,
) -> Result<(u32, T)> {
    let (done, mut is_done) = tokio::sync::watch::channel(false);
    let publish = async {
        let mut next = 0;
        while !*is_done.borrow_and_update() {
            let key = format!("{next}");
            let request = Request::post("/rooms/kept:a", "text/plain", key.as_bytes());
            let request = request.bearer(token).header("Idempotency-Key", &key);
            if request.send(node.public).await?.status == 202 {
                next += 1;
            }
        }
        anyhow::Ok(next)
    };
    let over = async {
        let result = over.await;
        done.send_replace(true);
        result
    };
    tokio::try_join!(publish, over)
}

pub fn data(message: &Message) -> Option<u32> {
    match &message.payload {
        Payload::Text(text) => text.parse().ok(),
        Payload::Binary(_) => None,
    }
}

fn gaps(messages: &[Message]) -> Vec<Payload> {
    payloads(&messages.iter().filter(|message| message.event == "tidegate.gap").cloned().collect::<Vec<_>>())
}

/// The connections that receive are cut again and again. What was missed is read from the log.
#[tokio::test]
async fn a_lost_connection_to_redis_costs_nothing() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = on(&redis).await?;
    let token = anywhere("alice");
    let url = node.url("kept:a", &token, "");
    let clients = [Client::events(&url).await?, Client::events(&url).await?];
    let cut = async {
        for round in 0..5 {
            let heard = clients[0].now().messages.len();
            clients[0].until("more", |journal| journal.messages.len() > heard + 20).await?;
            redis.cli(&["CLIENT", "KILL", "TYPE", "pubsub"], b"").await?;
            node.until_samples("the interruption", |samples| {
                samples.sum("tidegate_broker_interruptions_total", &[]) > round
            })
            .await?;
        }
        Ok(())
    };
    let (sent, ()) = publishing(&node, &token, cut).await?;
    for client in &clients {
        client
            .until("the last", |journal| journal.messages.iter().filter_map(data).any(|n| n + 1 == sent))
            .await?;
        let heard = client.now().messages;
        ensure!(gaps(&heard).is_empty(), "{:?}", gaps(&heard));
        ensure!(heard.iter().filter_map(data).eq(0..sent), "{client:?}");
    }
    node.ensure_sound()
}

/// Whoever is connected has received what is cleared or deleted.
#[tokio::test]
async fn a_history_that_is_cleared_or_deleted_costs_connected_clients_nothing() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = on(&redis).await?;
    let token = anywhere("alice");
    let client = Client::events(&node.url("kept:a", &token, "")).await?;
    let log = "{room:kept:a}:log";
    let removed = async {
        for command in [&["FCALL", "tidegate_clear", "1", log][..], &["DEL", log], &["UNLINK", log]] {
            let heard = client.now().messages.len();
            client.until("more", |journal| journal.messages.len() > heard + 30).await?;
            redis.cli(command, b"").await?;
        }
        let heard = client.now().messages.len();
        client.until("more", |journal| journal.messages.len() > heard + 30).await?;
        Ok(())
    };
    let (sent, ()) = publishing(&node, &token, removed).await?;
    let journal = client
        .until("the last", |journal| journal.messages.iter().filter_map(data).any(|n| n + 1 == sent))
        .await?;
    ensure!(gaps(&journal.messages).is_empty(), "{:?}", gaps(&journal.messages));
    ensure!(journal.messages.iter().filter_map(data).eq(0..sent), "{client:?}");
    let epochs = journal.messages.chunk_by(|a, b| a.id.split('-').next() == b.id.split('-').next()).count();
    ensure!(epochs == 3, "{epochs} epochs: clearing counts on, deleting begins anew");
    node.ensure_sound()
}

/// Redis dies and comes back with everything that it had acknowledged: nothing is missing, and the failover is told.
#[tokio::test]
async fn a_restart_of_redis_with_its_data_is_one_gap_and_no_loss() -> Result<()> {
    let builder = RedisServer::builder().setting("appendonly yes").setting("appendfsync always");
    let mut redis = builder.start().await?;
    let node = on(&redis).await?;
    let token = anywhere("alice");
    let client = Client::events(&node.url("kept:a", &token, "")).await?;
    let restart = async {
        client.until("some", |journal| journal.messages.len() > 100).await?;
        redis.restart().await?;
        let heard = client.now().messages.len();
        client.until("more", |journal| journal.messages.len() > heard + 100).await?;
        Ok(())
    };
    let (sent, ()) = publishing(&node, &token, restart).await?;
    client
        .until("the last", |journal| journal.messages.iter().filter_map(data).any(|n| n + 1 == sent))
        .await?;
    let heard = client.now().messages;
    ensure!(gaps(&heard) == [Payload::text(r#"{"cause":"failover","room":"kept:a"}"#)], "{:?}", gaps(&heard));
    ensure!(heard.iter().filter_map(data).eq(0..sent), "{client:?}");
    node.ensure_sound()
}

/// A node dies. Its clients find what they have missed at another one.
#[tokio::test]
async fn clients_of_a_node_that_dies_go_on_at_another_one() -> Result<()> {
    let redis = RedisServer::start().await?;
    let (mut first, second) = (on(&redis).await?, on(&redis).await?);
    let token = anywhere("alice");
    let url = first.url("kept:a", &token, "");
    let clients = try_join_all(std::iter::repeat_n(&*url, 20).map(Client::events)).await?;
    let moving = async {
        for (number, client) in clients.iter().enumerate() {
            client.until("some", |journal| journal.messages.len() > 50 + number).await?;
        }
        first.kill().await?;
        for client in &clients {
            client.until("its end", |journal| journal.end.is_some()).await?;
        }
        Ok(())
    };
    let (sent, ()) = publishing(&second, &token, moving).await?;
    for client in &clients {
        let before = client.now();
        let since = format!("&since={}", position(&before));
        let after = Client::events(&second.url("kept:a", &token, &since)).await?;
        let all = sent as usize - before.messages.len();
        let heard = after.heard(all).await?;
        ensure!(before.messages.iter().chain(&heard).filter_map(data).eq(0..sent), "{before:?} {heard:?}");
        after.leave().await?;
    }
    let samples = second.samples().await?;
    let reads = samples.sum("tidegate_history_resumptions_total", &[r#"from="log""#]);
    ensure!(reads <= 2, "{reads} readings of the log for 20 clients");
    second.ensure_sound()
}
