//! Proxies between the nodes and Redis that cut idle connections.

use anyhow::{Result, ensure};
use tidegate_tests::{
    client::Client, journal::Payload, node::Builder, redis_server::RedisServer, token::anywhere,
};

use crate::haproxy::Haproxy;

const CANARIES: &str = "tidegate_broker_canary_seconds_count";
/// Two publishing connections send one to two receiving ones every two seconds: more than four idle time-outs.
const SEVERAL_TIME_OUTS: u64 = 24;

/// The default `broker.canary_interval` is below the idle time-out, so haproxy never sees an idle connection.
#[tokio::test]
async fn connections_to_redis_outlive_the_idle_time_out_of_haproxy() -> Result<()> {
    let redis = RedisServer::start().await?;
    let defaults = "mode tcp\n  timeout connect 10s\n  timeout client 2500ms\n  timeout server 2500ms";
    let Some(proxy) = Haproxy::start(defaults, &format!("127.0.0.1:{}", redis.port()))? else {
        return Ok(()); // not installed
    };
    let node = Builder::new().set("broker.url", &format!("redis://{}", proxy.address)).start().await?;
    let token = anywhere("alice");
    let listener = Client::events(&node.url("lobby", &token, "")).await?;
    let before = node.samples().await?.sum(CANARIES, &[]);
    node.until_samples("canaries", |samples| samples.sum(CANARIES, &[]) >= before + SEVERAL_TIME_OUTS)
        .await?;

    node.post("lobby", &token, "text/plain", b"after").await?;
    let heard = listener.hears(&Payload::text("after")).await?;
    ensure!(heard.messages.len() == 1, "the message alone, and no gap: {heard:?}");
    let samples = node.samples().await?;
    for series in ["tidegate_broker_interruptions_total", "tidegate_broker_connections_ended_total"] {
        ensure!(samples.sum(series, &[]) == 0, "{series}: {}", samples.sum(series, &[]));
    }
    ensure!(samples.sum("tidegate_broker_up", &[]) == 1);
    ensure!(!node.output().contains("the broker is interrupted"), "{}", node.output());
    Ok(())
}
