//! A node with few file descriptors serves fewer clients, and nothing else suffers.

use anyhow::{Context as _, Result, ensure};
use tidegate_tests::{
    client::Client, eventually::eventually, http::Request, journal::Payload, node::Builder,
    redis_server::RedisServer, token::anywhere,
};
use tokio::{io::AsyncReadExt as _, net::TcpStream};

const OPEN_FILES: usize = 200;
const CLAMPED: &str = "the limit of open files (ulimit -n) is too low for limits.connections";

#[tokio::test]
async fn clients_leave_descriptors_to_probes_and_broker() -> Result<()> {
    let mut redis = RedisServer::start().await?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("tidegate.toml");
    std::fs::write(&file, "sse.retry = '3s'\n")?;
    let node = Builder::new()
        .set("broker.url", &redis.url())
        .config_file(&file)
        .set("public.header_timeout", "1h")
        .open_files(OPEN_FILES)
        .start()
        .await?;
    let samples = node.samples().await?;
    let limit = usize::try_from(samples.sum("tidegate_sockets_limit", &[]))?;
    ensure!((OPEN_FILES / 8..OPEN_FILES / 2).contains(&limit), "{limit} of {OPEN_FILES}");
    ensure!(node.output().matches(CLAMPED).count() == 1, "logged once");
    let token = anywhere("alice");
    let client = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;

    // Twice as many as there are descriptors.
    let mut idle = Vec::new();
    for _ in 0..2 * OPEN_FILES {
        idle.push(TcpStream::connect(node.public).await?);
    }
    node.until_samples("it is full", |samples| samples.sum("tidegate_sockets", &[]) >= limit as u64).await?;
    let full = node.ask_ops("/readyz").await?;
    ensure!(full.status == 503 && full.text().contains("limits.connections"), "{}", full.text());
    ensure!(node.ask_ops("/livez").await?.status == 200);
    ensure!(node.descriptors()? < OPEN_FILES, "some are left");

    // The broker reconnects, and a new configuration is read.
    redis.kill().await?;
    node.until_samples("the broker is down", |samples| samples.sum("tidegate_broker_up", &[]) == 0).await?;
    redis.restart().await?;
    node.until_samples("the broker is back", |samples| samples.sum("tidegate_broker_up", &[]) == 1).await?;
    std::fs::write(&file, "sse.retry = '4s'\n")?;
    node.hang_up()?;
    node.until_written("the new configuration is in effect").await?;
    ensure!(node.output().matches(CLAMPED).count() == 1, "logged once, and not with each reload");
    ensure!(!node.output().contains("Too many open files"), "{}", node.output());

    // Connected clients are served.
    client.send(Payload::text("hello")).await?;
    eventually("the client receives it", async || {
        let heard = client.now().messages.len();
        if heard == 1 { Ok(()) } else { Err(format!("{heard} messages")) }
    })
    .await?;

    // Clients beyond the limit were refused or closed; when others disconnect, there is room again.
    drop(idle);
    node.until_samples("they are gone", |samples| samples.sum("tidegate_sockets", &[]) == 1).await?;
    node.post("lobby", &token, "text/plain", b"again").await?;
    Ok(())
}

/// Clients beyond the limit get a status as long as there are descriptors for that.
#[tokio::test]
async fn clients_beyond_the_limit_are_refused() -> Result<()> {
    let node = Builder::new().open_files(OPEN_FILES).set("public.header_timeout", "1h").start().await?;
    let limit = usize::try_from(node.samples().await?.sum("tidegate_sockets_limit", &[]))?;
    let mut idle = Vec::new();
    for _ in 0..limit {
        idle.push(TcpStream::connect(node.public).await?);
    }
    node.until_samples("it is full", |samples| samples.sum("tidegate_sockets", &[]) == limit as u64).await?;
    let post = Request::post("/rooms/lobby", "text/plain", "x").bearer(&anywhere("alice"));
    let answer = post.send(node.public).await?;
    ensure!(answer.status == 503, "{} {}", answer.status, answer.text());
    ensure!(answer.header("retry-after").is_some());
    for _ in 0..OPEN_FILES {
        idle.push(TcpStream::connect(node.public).await?);
    }
    // There is no descriptor for the last one: it is closed instead of kept waiting.
    let last = idle.last_mut().context("many")?;
    let mut byte = [0];
    ensure!(matches!(last.read(&mut byte).await, Ok(0) | Err(_)));
    let dropped = ["reason=\"connections\""];
    node.until_samples("they are closed", |samples| {
        samples.sum("tidegate_sockets_dropped_total", &dropped) > 0
    })
    .await?;
    Ok(())
}
