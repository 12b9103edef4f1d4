//! How the library of functions gets into Redis: its versions, nodes that load it at the same time, other people's libraries.

use anyhow::{Result, bail, ensure};
use broker_bridge::redis::functions::{self, Loaded};
use redis::Value;
use tidegate_tests::redis_server::RedisServer;

use crate::functions::{Library, connect, connect_to, parts};

/// An older text of the library, or a newer one.
fn version(number: i64) -> String {
    functions::TEXT.replacen(
        &format!("local VERSION = {}", functions::VERSION),
        &format!("local VERSION = {number}"),
        1,
    )
}

#[tokio::test]
async fn the_newest_version_wins() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library(connect(&redis).await?);
    ensure!(functions::load(&mut library.0).await? == Loaded::Now { replaced: None });
    ensure!(functions::load(&mut library.0).await? == Loaded::Already);
    let position = library.publish("lobby", "x", &[]).await?;
    let (older, newer) = (version(functions::VERSION - 1), version(functions::VERSION + 1));
    let _: Value = library.run(&["FUNCTION", "LOAD", "REPLACE", &older]).await?;
    let replaced = Some(functions::VERSION - 1);
    ensure!(functions::load(&mut library.0).await? == Loaded::Now { replaced });
    let _: Value = library.run(&["FUNCTION", "LOAD", "REPLACE", &newer]).await?;
    ensure!(functions::load(&mut library.0).await? == Loaded::Newer(functions::VERSION + 1));
    ensure!(library.run::<i64>(&["FCALL", "tidegate_version", "0"]).await? == functions::VERSION + 1);
    // All of this in one reign, so the position counts on.
    let (epoch, offset) = parts(&position);
    ensure!(parts(&library.publish("lobby", "x", &[]).await?) == (epoch, offset + 1));
    Ok(())
}

#[tokio::test]
async fn nodes_that_load_at_the_same_time_agree() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library(connect(&redis).await?);
    for older in [false, true] {
        let _: Value = library.run(&["FUNCTION", "FLUSH"]).await?;
        if older {
            let _: Value = library.run(&["FUNCTION", "LOAD", &version(functions::VERSION - 1)]).await?;
        }
        let mut connections = Vec::new();
        for _ in 0..20 {
            connections.push(connect(&redis).await?);
        }
        let loads = connections.iter_mut().map(functions::load);
        let loaded: Vec<Loaded> = futures_util::future::try_join_all(loads).await?;
        ensure!(loaded.iter().any(|loaded| matches!(loaded, Loaded::Now { .. })), "{loaded:?}");
        ensure!(library.run::<i64>(&["FCALL", "tidegate_version", "0"]).await? == functions::VERSION);
        ensure!(functions::load(&mut library.0).await? == Loaded::Already);
    }
    Ok(())
}

#[tokio::test]
async fn a_strangers_library_is_not_replaced() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library(connect(&redis).await?);
    for stranger in [
        "#!lua name=tidegate\nredis.register_function('other', function() return 1 end)",
        "#!lua name=other\nredis.register_function('tidegate_publish', function() return 1 end)",
        "#!lua name=tidegate\nredis.register_function('tidegate_version', function() return 'one' end)",
    ] {
        let _: Value = library.run(&["FUNCTION", "FLUSH"]).await?;
        let _: Value = library.run(&["FUNCTION", "LOAD", stranger]).await?;
        let before: Vec<u8> = library.run(&["FUNCTION", "DUMP"]).await?;
        let refusal = functions::load(&mut library.0).await.map_err(|error| error.to_string());
        ensure!(refusal.as_ref().is_err_and(|text| text.contains("rename or delete it")), "{refusal:?}");
        ensure!(library.run::<Vec<u8>>(&["FUNCTION", "DUMP"]).await? == before);
    }
    Ok(())
}

#[tokio::test]
async fn a_user_who_may_not_load_is_told_what_to_do() -> Result<()> {
    let redis = RedisServer::builder().setting("user node on nopass ~* &* +@all -function").start().await?;
    let mut node = Library(connect_to(&redis.url().replace("redis://", "redis://node:x@")).await?);
    let refusal = functions::load(&mut node.0).await.map_err(|error| error.to_string());
    let words = "tidegate print-functions | redis-cli -x FUNCTION LOAD REPLACE";
    ensure!(refusal.as_ref().is_err_and(|text| text.contains(words)), "{refusal:?}");
    let mut admin = Library::on(&redis).await?;
    ensure!(functions::load(&mut node.0).await? == Loaded::Already);
    let _: Value = admin.run(&["FUNCTION", "LOAD", "REPLACE", &version(functions::VERSION - 1)]).await?;
    match functions::load(&mut node.0).await {
        Err(functions::LoadError::Forbidden { present, .. }) => {
            ensure!(present == Some(functions::VERSION - 1));
        }
        other => bail!("{other:?}"),
    }
    Ok(())
}
