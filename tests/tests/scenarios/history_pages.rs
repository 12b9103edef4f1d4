//! Histories read in pages, in the Centrifuge protocol.

#![allow(clippy::indexing_slicing, reason = "a panic is a failed test")]

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tidegate_tests::{
    fault_proxy::{Direction, FaultProxy, Flow, Target, Which},
    redis_server::RedisServer,
    token::anywhere,
};

use crate::{
    history::{on, publish, recording},
    recovery::Session,
};

impl Session {
    /// Reads the whole history in pages of `limit`, as the documents tell clients to. Returns the numbers and the epochs
    /// of the pages.
    async fn pages(&mut self, limit: u64, is_reversed: bool) -> Result<(Vec<u64>, Vec<String>)> {
        let (mut numbers, mut epochs) = (Vec::new(), Vec::<String>::new());
        let mut since = Value::Null;
        loop {
            let asked =
                json!({ "channel": "kept:a", "limit": limit, "reverse": is_reversed, "since": since });
            let reply = self.ask("history", asked.clone()).await?;
            let page = reply["publications"].as_array().with_context(|| format!("{reply} for {asked}"))?;
            let Some(last) = page.last() else { return Ok((numbers, epochs)) };
            let epoch = reply["epoch"].as_str().context("an epoch")?;
            numbers.extend(page.iter().filter_map(|publication| publication["data"].as_u64()));
            epochs.extend((!epochs.iter().any(|known| known == epoch)).then(|| epoch.to_owned()));
            since = json!({ "epoch": epoch, "offset": last["offset"] });
        }
    }
}

/// Redis restarts twice, so the log has three epochs. Read in pages of any size, it is complete, without repetitions, in
/// both directions. Offsets of one epoch with the name of another are no positions.
#[tokio::test]
async fn a_history_of_three_epochs_is_read_exactly_in_pages() -> Result<()> {
    const ENDS: [u64; 3] = [20, 27, 35];
    let builder = RedisServer::builder().setting("appendonly yes").setting("appendfsync always");
    let mut redis = builder.start().await?;
    let node = on(&redis).await?;
    publish(&node, &anywhere("alice"), 0..20).await?;
    for numbers in [ENDS[0]..ENDS[1], ENDS[1]..ENDS[2]] {
        redis.restart().await?;
        for number in numbers {
            let number = number.to_string();
            let publication = ["FCALL", "tidegate_publish", "1", "{room:kept:a}:log", &number];
            redis.cli(&publication, b"").await?;
        }
    }
    let mut session = Session::open(&node).await?;
    let all: Vec<u64> = (0..ENDS[2]).collect();
    let reversed: Vec<u64> = all.iter().copied().rev().collect();
    let mut epochs = Vec::new();
    for limit in [1, 2, 6, 7, 8, 15, 20, 21, 1000] {
        let forwards = session.pages(limit, false).await?;
        ensure!(forwards.0 == all, "in pages of {limit}: {forwards:?}");
        let backwards = session.pages(limit, true).await?;
        ensure!(backwards.0 == reversed, "in pages of {limit}: {backwards:?}");
        epochs = forwards.1;
        ensure!(epochs.len() == ENDS.len() && backwards.1.iter().rev().eq(&epochs), "{epochs:?}");
    }
    for (index, epoch) in epochs.iter().enumerate() {
        let begin = index.checked_sub(1).map_or(1, |before| ENDS[before] + 1);
        for offset in 1..=ENDS[2] + 1 {
            let is_known = (begin..=ENDS[index]).contains(&offset);
            for is_reversed in [false, true] {
                let since = json!({ "epoch": epoch, "offset": offset });
                let asked = json!({ "limit": 1, "since": since, "reverse": is_reversed });
                let read = session.history(asked.clone()).await?;
                // Publications are numbered from 0, and offsets from 1.
                let next = if is_reversed { offset.checked_sub(2) } else { Some(offset) };
                let next: Vec<_> = next.into_iter().filter(|next| *next < ENDS[2]).collect();
                let expected = if is_known { Ok(next) } else { Err(json!(112)) };
                ensure!(read == expected, "{asked}: {read:?}");
            }
        }
    }
    node.ensure_sound()
}

/// Sessions ask for parts of a history while Redis does not answer, and go. Nothing is read for them, so they hold up
/// nobody who comes after them.
#[tokio::test]
async fn nothing_is_read_for_sessions_that_have_gone() -> Result<()> {
    const GONE: u64 = 40;
    let requests = Which::NotSaying("tidegate-");
    let redis = RedisServer::start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let node = recording().set("broker.url", &proxy.redis_url()).start().await?;
    publish(&node, &anywhere("alice"), 0..20).await?;
    let mut witness = Session::open(&node).await?;
    let position = witness.ask("history", json!({ "channel": "kept:a" })).await?;
    let reads = async || anyhow::Ok(node.samples().await?.sum("tidegate_broker_log_reads_total", &[]));
    let before = reads().await?;
    proxy.set(requests, Direction::ToClient, Flow::Stall);
    for number in 0..GONE {
        let mut session = Session::open(&node).await?;
        // Each asks for something else, so no two share a reading.
        let since = json!({ "epoch": position["epoch"], "offset": 1 + number % 20 });
        let query = json!({ "channel": "kept:a", "limit": 1 + number, "since": since });
        session.send(&json!({ "id": 7, "history": query })).await?;
    }
    node.until_samples("all of them gone", |samples| {
        samples.sum("tidegate_connections_closed_total", &["protocol=\"centrifuge\""]) >= GONE
    })
    .await?;
    proxy.resume();
    let read =
        witness.history(json!({ "limit": 2, "since": { "epoch": position["epoch"], "offset": 18 } })).await?;
    ensure!(read == Ok(vec![18, 19]), "{read:?}");
    let after = reads().await?;
    ensure!(after == before + 1, "{} readings for one session", after - before);
    node.ensure_sound()
}
