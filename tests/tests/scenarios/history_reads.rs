//! What a room keeps, read over HTTP: long polls, the newest messages, and texts that arrive as one.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tidegate_tests::{
    client::{Client, EventStreamParser},
    http::{Request, Response},
    journal::{Journal, Message, Payload},
    node::{Builder, Node},
    redis_server::RedisServer,
    token::{Token, anywhere},
};

use crate::{ndjson::Lines, stage::payloads};

fn recording() -> Builder {
    Builder::new().set(r#"rooms."kept:*".history.size"#, "1000")
}

/// A token that may do everything here.
fn reader() -> String {
    Token::new("alice").room("*", &["subscribe", "publish", "history"]).sign()
}

async fn publish(node: &Node, token: &str, numbers: std::ops::Range<u32>) -> Result<()> {
    for number in numbers {
        node.post("kept:a", token, "text/plain", format!("n{number}").as_bytes()).await?;
    }
    Ok(())
}

fn numbers(range: std::ops::Range<u32>) -> Vec<Payload> {
    range.map(|number| Payload::text(format!("n{number}"))).collect()
}

async fn get(node: &Node, token: &str, target: &str) -> Result<Response> {
    Request::get(target).bearer(token).header("Accept", "application/json").send(node.public).await
}

async fn poll(node: &Node, token: &str, query: &str) -> Result<Value> {
    let response = get(node, token, &format!("/rooms/kept:a?{query}")).await?;
    ensure!(response.status == 200, "{query}: {response:?}");
    response.json()
}

fn data(answer: &Value) -> Vec<String> {
    let messages = answer.get("messages").and_then(Value::as_array).into_iter().flatten();
    messages.filter_map(|message| message.get("data")?.as_str().map(str::to_owned)).collect()
}

fn texts(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|number| format!("n{number}")).collect()
}

fn cursor(answer: &Value) -> Result<String> {
    let cursor = answer.get("cursor").and_then(Value::as_str);
    Ok(cursor.with_context(|| format!("a cursor in {answer}"))?.to_owned())
}

/// From where the last answer has ended, at three nodes in turn, while messages are published.
#[tokio::test]
async fn a_client_that_polls_three_nodes_in_turn_gets_each_message_once() -> Result<()> {
    const ALL: u32 = 300;
    let redis = RedisServer::start().await?;
    let builder = recording().set("broker.url", &redis.url());
    let (a, b, c) = tokio::try_join!(builder.start(), builder.start(), builder.start())?;
    let token = anywhere("alice");
    let urls = [&a, &b, &c].map(|node| node.url("kept:a", &token, ""));
    let urls = urls.each_ref().map(String::as_str);
    let clients = [Client::python_polls(&urls).await?, Client::python_polls(&urls).await?];
    publish(&a, &token, 0..ALL).await?;
    for client in &clients {
        let heard = client.heard(ALL as usize).await?;
        ensure!(payloads(&heard) == numbers(0..ALL), "{client:?}");
    }
    for node in [a, b, c] {
        node.ensure_sound()?;
    }
    Ok(())
}

#[tokio::test]
async fn a_poll_answers_as_soon_as_there_is_something() -> Result<()> {
    let node = recording().start().await?;
    let token = reader();
    // At once, with the position, whatever it may wait.
    let first = poll(&node, &token, "wait=60").await?;
    let start = cursor(&first)?;
    ensure!(first == json!({ "messages": [], "cursor": start, "gap": null }), "{first}");
    // Nothing happens: it waits as long as it was asked to, by a clock of 100 ms.
    let began = Instant::now();
    let nothing = poll(&node, &token, &format!("since={start}&wait=1")).await?;
    ensure!(nothing == first && began.elapsed() >= Duration::from_millis(800), "{nothing}");
    ensure!(
        poll(&node, &token, &format!("since={start}")).await? == first,
        "without `wait` it does not wait"
    );
    // Something happens while it waits.
    let query = format!("since={start}&wait=60");
    let waiting = poll(&node, &token, &query);
    let publishing = async {
        node.until_samples("a waiting poll", |samples| {
            samples.sum("tidegate_connections_opened_total", &["protocol=\"long_poll\""]) >= 4
        })
        .await?;
        publish(&node, &token, 0..1).await
    };
    let (answer, ()) = tokio::try_join!(waiting, publishing)?;
    ensure!(data(&answer) == texts(0..1), "{answer}");
    // What was missed comes at once, with all members of an object of JSON lines.
    node.post("kept:a?event=tide", &token, "application/json", b"{\"high\":true}").await?;
    let answer = poll(&node, &token, &format!("since={}&wait=60", cursor(&answer)?)).await?;
    let end = cursor(&answer)?;
    let message = json!({ "room": "kept:a", "id": end, "event": "tide", "data": { "high": true } });
    ensure!(answer == json!({ "messages": [message], "cursor": end, "gap": null }), "{answer}");
    // A position that nobody knows is a gap, then comes what is kept. The next request continues.
    let lost = poll(&node, &token, "since=1-1&wait=60").await?;
    ensure!(data(&lost) == texts(0..1) && lost.get("gap") == Some(&json!("expired")), "{lost}");
    ensure!(cursor(&lost)? == end, "{lost}");
    // So does one beyond everything, where nothing is newer: the answer comes at once, and knows where to continue.
    let beyond = poll(&node, &token, &format!("since={0}-{0}&wait=60", u64::MAX)).await?;
    ensure!(beyond == json!({ "messages": [], "cursor": end, "gap": "expired" }), "{beyond}");
    node.ensure_sound()
}

#[tokio::test]
async fn a_draining_node_answers_polls_at_once() -> Result<()> {
    let node = recording()
        .set("drain.pause", "0s")
        .set("drain.window", "20s")
        .set("drain.deadline", "30s")
        .start()
        .await?;
    let token = anywhere("alice");
    let start = cursor(&poll(&node, &token, "").await?)?;
    let query = format!("since={start}&wait=60");
    let waiting = poll(&node, &token, &query);
    let draining = async {
        node.until_samples("a waiting poll", |samples| {
            samples.sum("tidegate_connections_opened_total", &["protocol=\"long_poll\""]) >= 2
        })
        .await?;
        node.terminate()
    };
    let began = Instant::now();
    let (answer, ()) = tokio::try_join!(waiting, draining)?;
    ensure!(answer == json!({ "messages": [], "cursor": start, "gap": null }), "{answer}");
    ensure!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    Ok(())
}

#[tokio::test]
async fn polls_are_refused_with_a_reason() -> Result<()> {
    let node = recording().set("limits.user_commands", "3/h").start().await?;
    let token = anywhere("alice");
    for (target, status, why) in [
        ("/rooms/live", 409, "needs history"),
        ("/rooms/kept:a?wait=61", 400, "expected seconds from 0 to 60"),
        ("/rooms/kept:a?wait=1s", 400, "expected seconds from 0 to 60"),
        ("/rooms/kept:a?since=yesterday", 400, "expected a position"),
        ("/rooms/kept:a?last=0", 400, "expected a number from 1 to 1000"),
        ("/rooms/kept:a?last=1001", 400, "expected a number from 1 to 1000"),
        ("/rooms/kept:a?last=5&since=1-1", 400, "expected only one of them"),
        ("/rooms/kept:a?last=5", 403, "does not grant `history`"),
    ] {
        let refused = get(&node, &token, target).await?;
        ensure!(refused.status == status && refused.text().contains(why), "{target}: {refused:?}");
    }
    for (target, accept) in
        [("/rooms/live?last=5", "text/event-stream"), ("/rooms?room=a&room=b&last=5", "application/x-ndjson")]
    {
        let refused =
            Request::get(target).bearer(&reader()).header("Accept", accept).send(node.public).await?;
        ensure!(refused.status == 409, "{target}: {refused:?}");
    }
    let publisher = Token::new("bob").room("*", &["publish", "history"]).sign();
    ensure!(get(&node, &publisher, "/rooms/kept:a").await?.status == 403);
    // Each counts as a command of its user.
    let mut answers = Vec::new();
    for _ in 0..4 {
        answers.push(get(&node, &token, "/rooms/kept:a").await?);
    }
    let statuses: Vec<_> = answers.iter().map(|answer| answer.status).collect();
    ensure!(statuses == [200, 200, 200, 429], "{statuses:?}");
    let first = answers.first().context("an answer")?;
    ensure!(first.header("content-type") == Some("application/json"), "{first:?}");
    ensure!(first.header("cache-control") == Some("no-store"), "{first:?}");
    ensure!(first.header("vary").is_some_and(|vary| vary.contains("Accept")), "{first:?}");
    Ok(())
}

/// A refusal that depends on which rooms have a history comes after those for lack of access.
#[tokio::test]
async fn nobody_without_access_learns_which_rooms_have_a_history() -> Result<()> {
    const JSON: &str = "application/json";
    const LINES: &str = "application/x-ndjson";
    const EVENTS: &str = "text/event-stream";
    let node = recording().start().await?;
    let stranger = Token::new("mallory").room("else", &["subscribe", "publish", "history"]).sign();
    let many =
        |room: &str| (0..17).map(|number| format!("room={room}{number}&")).collect::<Vec<_>>().concat();
    let requests = |room: &str| {
        [
            Request::get(&format!("/rooms/{room}a")).header("Accept", JSON),
            Request::get(&format!("/rooms/{room}a?since=1-1&wait=5")).header("Accept", JSON),
            Request::get(&format!("/rooms/{room}a?last=5")).header("Accept", JSON),
            Request::get(&format!("/rooms/{room}a?last=5")).header("Accept", LINES),
            Request::get(&format!("/rooms/{room}a?last=5")).header("Accept", EVENTS),
            Request::get(&format!("/rooms?{}last=5", many(room))).header("Accept", LINES),
            Request::get(&format!("/rooms?{}", many(room))).header("Accept", EVENTS),
            Request::post(&format!("/rooms/{room}a"), "text/plain", b"hi").header("Idempotency-Key", "1"),
        ]
    };
    for room in ["kept:", "live:"] {
        for (number, request) in requests(room).into_iter().enumerate() {
            let refused = request.clone().send(node.public).await?;
            ensure!(refused.status == 401, "{room} {number}: {refused:?}");
            let refused = request.bearer(&stranger).send(node.public).await?;
            ensure!(refused.status == 403, "{room} {number}: {refused:?}");
        }
    }
    // Who has access is told.
    let expected = [409, 409, 409, 409, 409, 409, 200, 400];
    for (request, status) in requests("live:").into_iter().zip(expected) {
        if status != 200 {
            let refused = request.bearer(&reader()).send(node.public).await?;
            ensure!(refused.status == status, "{refused:?}");
        }
    }
    let [.., streams, _] = requests("kept:");
    let refused = streams.bearer(&reader()).send(node.public).await?;
    ensure!(refused.status == 400 && refused.text().contains("at most 16 rooms"), "{refused:?}");
    Ok(())
}

/// On the node that has the messages in memory, and on one that reads them.
#[tokio::test]
async fn the_newest_messages_come_first_and_then_what_is_published() -> Result<()> {
    const ALL: u32 = 30;
    let redis = RedisServer::start().await?;
    let builder = recording().set("broker.url", &redis.url());
    let (a, b) = tokio::try_join!(builder.start(), builder.start())?;
    let token = reader();
    let witness = Client::events(&a.url("kept:a", &token, "")).await?;
    publish(&a, &token, 0..ALL).await?;
    witness.heard(ALL as usize).await?;
    for (last, node) in [(7, &b), (7, &a), (1, &b), (1000, &a), (1000, &b)] {
        let newest = ALL.saturating_sub(last)..ALL;
        let answer = poll(node, &token, &format!("last={last}")).await?;
        ensure!(data(&answer) == texts(newest.clone()), "{answer}");
        ensure!(answer.get("gap") == Some(&Value::Null), "{answer}");
        let stream = Client::events(&node.url("kept:a", &token, &format!("&last={last}"))).await?;
        ensure!(payloads(&stream.heard(newest.len()).await?) == numbers(newest.clone()), "{stream:?}");
        let plain = Client::websocket(&node.ws("kept:a", &token, &format!("&last={last}")), &[]).await?;
        ensure!(payloads(&plain.heard(newest.len()).await?) == numbers(newest), "{plain:?}");
    }
    // Live messages follow without a seam, wherever the client comes in.
    let joining = async {
        let mut clients = Vec::new();
        for number in 0..20 {
            let node = if number % 2 == 0 { &a } else { &b };
            clients.push(Client::events(&node.url("kept:a", &token, "&last=3")).await?);
        }
        Ok(clients)
    };
    let (clients, ()) = tokio::try_join!(joining, publish(&a, &token, ALL..ALL + 200))?;
    for client in &clients {
        client.hears(&Payload::text(format!("n{}", ALL + 199))).await?;
        let heard = payloads(&client.now().messages);
        let first = ALL + 200 - u32::try_from(heard.len())?;
        ensure!(first >= ALL - 3 && heard == numbers(first..ALL + 200), "{client:?}");
    }
    // In several rooms, of each.
    a.post("kept:b", &token, "text/plain", b"other").await?;
    let mut lines = Lines::open_as(&b, "/rooms?room=kept:a&room=kept:b&last=2", &token).await?;
    let mut heard = Vec::new();
    while heard.len() < 3 {
        let line = lines.next().await?.context("a line")?;
        heard.extend(line.get("data").and_then(Value::as_str).map(str::to_owned));
    }
    heard.sort();
    ensure!(heard == ["n228", "n229", "other"], "{heard:?}");
    a.ensure_sound()?;
    b.ensure_sound()
}

/// An `EventSource` comes back with the same query, and the id of the last event.
#[tokio::test]
async fn a_client_that_comes_back_by_itself_gets_what_it_has_missed_and_not_the_newest_again() -> Result<()> {
    let node = recording().set("public.max_session_age", "1s").set("sse.retry", "50ms").start().await?;
    let token = reader();
    publish(&node, &token, 0..10).await?;
    let client = Client::node_events(&node.url("kept:a", &token, "&last=3"), &["tidegate.gap"]).await?;
    client.heard(3).await?;
    let mut sent = 10;
    while client.now().opened < 4 {
        publish(&node, &token, sent..sent + 5).await?;
        sent += 5;
    }
    let heard = client.heard(3 + sent as usize - 10).await?;
    ensure!(payloads(&heard) == numbers(7..sent), "{client:?}");
    Ok(())
}

/// A failover leaves a gap in what a node keeps. A snapshot claims nothing, so the gap does not close the session.
#[tokio::test]
async fn a_gap_among_the_newest_messages_does_not_close_a_session() -> Result<()> {
    let builder = RedisServer::builder().setting("appendonly yes").setting("appendfsync always");
    let mut redis = builder.start().await?;
    let node = recording().set("broker.url", &redis.url()).start().await?;
    let token = reader();
    let witness = Client::events(&node.url("kept:a", &token, "")).await?;
    publish(&node, &token, 0..3).await?;
    witness.heard(3).await?;
    redis.restart().await?;
    let again = async {
        while node.post("kept:a", &token, "text/plain", b"n3").await.is_err() {}
        anyhow::Ok(())
    };
    again.await?;
    let heard = witness
        .until("the gap", |journal| journal.events("tidegate.gap") == 1 && journal.messages.len() >= 5)
        .await?;
    ensure!(heard.events("tidegate.gap") == 1, "{witness:?}");
    let plain = Client::websocket(&node.ws("kept:a", &token, "&last=100&gap=close"), &[]).await?;
    let heard = payloads(&plain.heard(4).await?);
    ensure!(heard.starts_with(&numbers(0..4)), "{plain:?}");
    Ok(())
}

/// An answer of 2,000 tokens. Live readers get each of them; one that reloads gets long texts.
#[tokio::test]
async fn texts_arrive_as_one_at_a_client_that_catches_up() -> Result<()> {
    const TOKENS: u32 = 2000;
    let text = |number: u32| format!("tok{number} ");
    let builder = || Builder::new().set(r#"rooms."answer:*".history.size"#, "5000");
    let joined = builder().set(r#"rooms."answer:*".history.join"#, "text").start().await?;
    let single = builder().start().await?;
    let token = reader();
    let mut caught_up = Vec::new();
    for node in [&joined, &single] {
        let live = Client::events(&node.url("answer:1", &token, "")).await?;
        node.post("answer:1", &token, "text/plain", b"first").await?;
        let since = live.heard(1).await?.remove(0).id;
        for number in 0..TOKENS {
            node.post("answer:1", &token, "text/plain", text(number).as_bytes()).await?;
        }
        node.post("answer:1?event=done", &token, "text/plain", b".").await?;
        let heard = live.heard(TOKENS as usize + 2).await?;
        ensure!(heard.len() == TOKENS as usize + 2, "live readers get them one by one");
        let target = format!("/rooms/answer:1?since={since}");
        let request = Request::get(&target).bearer(&token).header("Accept", "text/event-stream");
        let mut incoming = request.open(node.public).await?;
        let (mut parser, mut journal, mut bytes) = (EventStreamParser::default(), Journal::default(), 0);
        while journal.events("done") == 0 {
            let chunk = incoming.chunk().await?.context("more")?;
            bytes += chunk.len();
            parser.read(&chunk, &mut journal);
        }
        let last = |messages: &[Message]| messages.last().map(|message| message.id.clone());
        ensure!(last(&journal.messages) == last(&heard), "{journal:?}");
        let whole: String =
            journal.messages.iter().map(|message| String::from_utf8_lossy(message.payload.bytes())).collect();
        let expected: String = (0..TOKENS).map(text).chain([".".to_owned()]).collect();
        ensure!(whole == expected, "{} instead of {} bytes", whole.len(), expected.len());
        println!(
            "history.join: {} events and {bytes} bytes for {} bytes of text",
            journal.messages.len(),
            whole.len()
        );
        caught_up.push((journal.messages.len(), bytes));
        // Each position that it has on the way is one that it can come back with.
        let middle = journal.messages.first().context("a message")?;
        let rest = Client::events(&node.url("answer:1", &token, &format!("&since={}", middle.id))).await?;
        let rest = rest.until("the end", |journal| journal.events("done") == 1).await?;
        let whole: String = [middle]
            .into_iter()
            .chain(&rest.messages)
            .map(|message| String::from_utf8_lossy(message.payload.bytes()))
            .collect();
        ensure!(whole == expected, "continued after {}", middle.id);
    }
    let [(few, small), (all, large)] = caught_up[..] else { anyhow::bail!("two nodes") };
    ensure!(all == TOKENS as usize + 1 && few <= 10 && small * 3 < large, "{few} {small}, {all} {large}");
    Ok(())
}
