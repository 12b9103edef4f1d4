//! The log: what happens if it is not read, and its contents at the levels that the documents promise.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tidegate_tests::{
    client::Client,
    eventually::eventually,
    http::Request,
    journal::Payload,
    node::{Builder, Node},
    redis_server::RedisServer,
    token::{Token, anywhere},
};

use crate::stage::payloads;

const DROPPED: &str = "tidegate_log_lines_dropped_total";

/// Writes more to the log than its pipe and its queue hold.
async fn overflow_log(node: &Node) -> Result<()> {
    // At level debug a refusal contains the path.
    let long = format!("/{}", "x".repeat(30_000));
    for _ in 0..120 {
        ensure!(Request::get(&long).send(node.public).await?.status == 404);
    }
    node.until_samples("lines that were dropped", |samples| samples.sum(DROPPED, &[]) > 0).await?;
    Ok(())
}

/// Standard error is a full pipe: the node serves, answers its probes and drains on a signal.
#[tokio::test]
async fn a_log_that_is_not_read_loses_lines_and_nothing_else() -> Result<()> {
    let mut node = Builder::new().set("log.filter", "debug").start().await?;
    let alice = anywhere("alice");
    let member = Client::websocket(&node.ws("lobby", &alice, ""), &[]).await?;
    node.stop_reading();
    overflow_log(&node).await?;

    let said: Vec<_> = (0..200).map(|number| format!("message {number}")).collect();
    for text in &said {
        node.post("lobby", &alice, "text/plain", text.as_bytes()).await?;
    }
    let said: Vec<_> = said.into_iter().map(Payload::text).collect();
    ensure!(payloads(&member.heard(said.len()).await?) == said);
    let newcomer = Client::websocket(&node.ws("lobby", &alice, ""), &[]).await?;
    node.post("lobby", &alice, "text/plain", b"welcome").await?;
    ensure!(payloads(&newcomer.heard(1).await?) == [Payload::text("welcome")]);
    for probe in ["/livez", "/readyz"] {
        node.until_probe(probe, 200).await?;
    }

    // A late reader learns what is missing, in its place.
    node.read_on();
    node.until_written("log lines are missing here").await?;
    node.stop_reading();
    overflow_log(&node).await?;

    node.terminate()?;
    let status = node.exited().await?;
    ensure!(status.success(), "{status}");
    node.ensure_sound()
}

#[tokio::test]
async fn a_greeting_that_is_not_read_blocks_no_client() -> Result<()> {
    let mut node = Builder::unconfigured().set("drain.window", "0s").with_unread_stdout().start().await?;
    node.terminate()?;
    let status = node.exited().await?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// The log lines about refusals.
fn refusals(node: &Node) -> Vec<Value> {
    let lines = node.output();
    let lines = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["target"] == "tidegate::auth").collect()
}

async fn until_refusals(node: &Node, count: usize) -> Result<Vec<Value>> {
    eventually(&format!("{count} lines about refusals"), async || {
        let lines = refusals(node);
        if lines.len() >= count { Ok(lines) } else { Err(format!("{lines:?}")) }
    })
    .await
}

/// Refuses a token, an origin and a grant, in this order.
async fn be_refused(node: &Node) -> Result<()> {
    let old = Token::new("alice").expires_in(-3600).sign();
    let elsewhere = Token::new("alice").room("other", &["subscribe"]).sign();
    let page = Request::upgrade("/rooms/lobby").bearer(&anywhere("alice"));
    for (request, status) in [
        (Request::upgrade("/rooms/lobby").bearer(&old), 401),
        (page.header("Origin", "https://elsewhere.example"), 403),
        (Request::upgrade("/rooms/lobby").bearer(&elsewhere), 403),
    ] {
        ensure!(request.send(node.public).await?.status == status, "{status}");
    }
    Ok(())
}

/// The default and the documented filter show why a client cannot connect.
#[tokio::test]
async fn refused_tokens_origins_and_grants_are_logged_with_their_reason() -> Result<()> {
    for filter in ["info", "info,tidegate::auth=debug", "warn,tidegate::node=info,tidegate::auth=info"] {
        let node = Builder::new().set("log.filter", filter).start().await?;
        be_refused(&node).await?;
        let lines = until_refusals(&node, 3).await?;
        let said: Vec<_> =
            lines.iter().map(|line| (&line["reason"], &line["error"], &line["origin"])).collect();
        ensure!(said.len() == 3, "{filter}: {said:?}");
        ensure!(said[0].0 == "expired" && said[0].1 == "the token has expired", "{filter}: {said:?}");
        ensure!(said[1].0 == "origin" && said[1].2 == "https://elsewhere.example", "{filter}: {said:?}");
        let grant = "the token does not grant `subscribe` in room lobby";
        ensure!(said[2].0 == "forbidden" && said[2].1 == grant, "{filter}: {said:?}");
        for line in &lines {
            ensure!(line["path"] == "/rooms/lobby" && line["peer"].is_string(), "{line}");
        }
        ensure!(!node.output().contains("eyJ"), "no token is ever logged");
    }
    Ok(())
}

/// Clients can be refused as often as they like; the log stays readable.
#[tokio::test]
async fn a_flood_of_refusals_logs_a_few_lines_and_a_count() -> Result<()> {
    let node = Builder::new().start().await?;
    let began = Instant::now();
    for _ in 0..300 {
        ensure!(Request::upgrade("/rooms/lobby").send(node.public).await?.status == 401);
    }
    // The count comes with the next line that may be logged.
    let counted = eventually("the number of lines that were left out", async || {
        Request::upgrade("/rooms/lobby").send(node.public).await.map_err(|error| error.to_string())?;
        let lines = refusals(&node);
        let left_out: u64 = lines.iter().filter_map(|line| line["suppressed"].as_u64()).sum();
        if left_out > 0 { Ok((lines.len() as u64, left_out)) } else { Err(format!("{} lines", lines.len())) }
    })
    .await?;
    let seconds = began.elapsed().as_secs() + 2;
    ensure!(counted.0 <= 10 * seconds, "{counted:?} in {seconds} s");
    Ok(())
}

#[tokio::test]
async fn a_filter_that_would_silence_the_node_is_refused() -> Result<()> {
    let (status, output) = Builder::new().set("log.filter", "debgu").run_to_the_end().await?;
    ensure!(status.code() == Some(2), "{status}");
    ensure!(output.contains("log.filter = \"debgu\"") && output.contains("did you mean debug?"), "{output}");
    Ok(())
}

/// The information that a bug report needs.
#[tokio::test]
async fn the_first_log_line_describes_the_node() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("tidegate.toml");
    std::fs::write(&path, "shards = 2\n")?;
    let redis = RedisServer::start().await?;
    let url = redis.url().replace("redis://", "redis://default:not-for-logs@");
    let node = Builder::new().config_file(&path).set("broker.url", &url).launch().await?;
    node.until_written("starting").await?;
    let output = node.output();
    let first: Value = serde_json::from_str(output.lines().next().context("a line")?)?;
    ensure!(first["message"] == "starting" && first["shards"] == 2, "{first}");
    for key in ["version", "revision"] {
        ensure!(first[key].as_str().is_some_and(|text| !text.is_empty()), "{first}");
    }
    ensure!(first["config_file"].as_str() == path.to_str(), "{first}");
    ensure!(
        first["broker"].as_str().is_some_and(|url| url.starts_with("redis://default:***@127.0.0.1:")),
        "{first}"
    );
    ensure!(!output.contains("not-for-logs"), "a password is never in the log");
    Ok(())
}
