//! The example of an answer that is written token by token, run as it is: its worker, and its reader under Node.js.

use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use tidegate_tests::{
    client::Client,
    file,
    journal::{Journal, Payload},
    node::{Builder, Node},
    redis_server::RedisServer,
    token::Token,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

/// The tokens of an answer, unless it is stopped.
const TOKENS: usize = 400;

/// Two nodes with the rooms of the example, and its worker.
struct Stage {
    redis: RedisServer,
    a: Node,
    b: Node,
    token: String,
    _worker: Child,
}

impl Stage {
    async fn set() -> Result<Self> {
        let redis = RedisServer::start().await?;
        // As in the example's tidegate.toml.
        let builder = Builder::new()
            .set("broker.url", &redis.url())
            .set(r#"rooms."ask".grant"#, "publish")
            .set(r#"rooms."stop".grant"#, "publish")
            .set(r#"rooms."answer:*".grant"#, "subscribe")
            .set(r#"rooms."answer:*".history.size"#, "10000")
            .set(r#"rooms."answer:*".history.ttl"#, "1h")
            .set(r#"rooms."answer:*".history.join"#, "text");
        let (a, b) = tokio::try_join!(builder.start(), builder.start())?;
        let mut worker = Command::new(file(".venv/bin/python"))
            .arg(file("../gateway/examples/token-stream/worker.py"))
            .env("REDIS_URL", redis.url())
            .env("TOKENS", TOKENS.to_string())
            .env("PAUSE", "0.005")
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("start the worker (run tests/run once)")?;
        let output = worker.stdout.take().context("stdout is piped")?;
        let first = BufReader::new(output).lines().next_line().await?;
        ensure!(first.as_deref() == Some("ready"), "{first:?}");
        let token = Token::new("alice").sign();
        Ok(Self { redis, a, b, token, _worker: worker })
    }

    async fn reader(&self, node: &Node, arguments: &[&str]) -> Result<Client> {
        let base = format!("http://{}", node.public);
        Client::token_stream(&[&[&*base, &self.token], arguments].concat()).await
    }
}

/// The text that a reader has.
fn text(journal: &Journal) -> String {
    let pieces = journal.messages.iter().filter(|message| message.event == "text");
    pieces.map(|message| String::from_utf8_lossy(message.payload.bytes()).into_owned()).collect()
}

fn answer(tokens: usize) -> String {
    let numbers = (1..tokens).map(|number| format!("{number}, "));
    std::iter::once("Count: ".to_owned()).chain(numbers).collect()
}

/// The room and the position where its answer begins.
fn place(journal: &Journal) -> Result<[String; 2]> {
    let told = journal.messages.iter().find(|message| message.event == "room").context("the room")?;
    let told = String::from_utf8_lossy(told.payload.bytes()).into_owned();
    let (room, since) = told.split_once(' ').context("a room and a position")?;
    Ok([room.to_owned(), since.to_owned()])
}

async fn done(reader: &Client) -> Result<Journal> {
    reader.until("the end of the answer", |journal| journal.events("done") > 0).await
}

#[tokio::test]
async fn a_reload_at_another_node_and_a_second_device_miss_and_double_nothing() -> Result<()> {
    let stage = Stage::set().await?;
    let first = stage.reader(&stage.a, &["ask", "Count"]).await?;
    let begun = first.until("some tokens", |journal| journal.events("text") > 50).await?;
    let [room, since] = place(&begun)?;
    // The page is reloaded in the middle, and arrives at the other node.
    first.leave().await?;
    let reloaded = stage.reader(&stage.b, &["read", &room, &since]).await?;
    reloaded.until("more tokens", |journal| text(journal).len() > answer(100).len()).await?;
    let second = stage.reader(&stage.a, &["read", &room, &since]).await?;
    let again = stage.reader(&stage.b, &["read", &room, &since]).await?;
    for reader in [&reloaded, &second, &again] {
        let journal = done(reader).await?;
        ensure!(text(&journal) == answer(TOKENS), "{reader:?}");
        ensure!(journal.events("gap") == 0 && journal.events("done") == 1, "{reader:?}");
        ensure!(journal.messages.last().map(|last| &last.payload) == Some(&Payload::text("complete")));
        // What was there already came in large pieces.
        ensure!(journal.events("text") < TOKENS - 20, "{} pieces", journal.events("text"));
    }
    // Long after its end, it is still there.
    let late = stage.reader(&stage.a, &["read", &room, &since]).await?;
    let journal = done(&late).await?;
    ensure!(text(&journal) == answer(TOKENS) && journal.events("text") <= 4, "{late:?}");
    stage.a.ensure_sound()?;
    stage.b.ensure_sound()
}

#[tokio::test]
async fn only_a_message_stops_an_answer_and_leaving_does_not() -> Result<()> {
    let stage = Stage::set().await?;
    let first = stage.reader(&stage.a, &["ask", "Count"]).await?;
    let begun = first.until("some tokens", |journal| journal.events("text") > 20).await?;
    let [room, since] = place(&begun)?;
    first.leave().await?;
    // Nobody reads, and it goes on.
    let key = format!("{{room:{room}}}:log");
    let length = async || {
        let length = stage.redis.cli(&["XLEN", &key], b"").await?;
        Ok::<usize, anyhow::Error>(String::from_utf8(length)?.trim().parse()?)
    };
    let left = length().await?;
    while length().await? < left + 30 {}
    let back = stage.reader(&stage.b, &["read", &room, &since]).await?;
    back.until("the tokens meanwhile", |journal| text(journal).len() >= answer(left + 30).len()).await?;
    stage.reader(&stage.a, &["stop", &room]).await?;
    let journal = done(&back).await?;
    ensure!(journal.messages.last().map(|last| &last.payload) == Some(&Payload::text("stopped")), "{back:?}");
    let tokens = length().await? - 1;
    ensure!(tokens < TOKENS, "stopped before its end");
    ensure!(text(&journal) == answer(tokens) && journal.events("gap") == 0, "{tokens} tokens: {back:?}");
    Ok(())
}
