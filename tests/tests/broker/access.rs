//! TLS, users and permissions, and that secrets are never logged.

use anyhow::{Result, ensure};
use broker_bridge::{Broker, BrokerError, BrokerStatus, conformance::affinity_of, redis::RedisConfig};
use tidegate_tests::{eventually::eventually, redis_server::RedisServer};

use crate::stage::{Node, brief, config, has, room, rooms};

/// The permissions from the documentation of `broker_bridge::redis`.
const DOCUMENTED: &str = "user tidegate on >s3cret! resetchannels &room:* &tidegate:canary:* \
                          -@all +subscribe +unsubscribe +publish";

#[tokio::test]
async fn tls_and_the_documented_permissions_are_enough() -> Result<()> {
    let redis = RedisServer::builder().tls().setting(DOCUMENTED).start().await?;
    let url = redis.tls_url()?.replace("rediss://", "rediss://tidegate:s3cret%21@");
    let node = Node::up_with(RedisConfig { ca_pem: Some(redis.ca_pem()?), ..config(&url)? }).await?;
    let rooms = rooms(700);
    node.subscribe_all(&rooms).await?;
    for room in &rooms {
        node.publish(room, "over TLS").await;
    }
    for room in &rooms {
        node.heard.wait(room, "its publication", has("over TLS")).await;
        node.broker.unsubscribe(room, affinity_of(room));
    }
    eventually("canaries come back", async || match node.sample("tidegate_broker_canary_seconds_count") {
        Ok(count) if count >= 3 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await?;
    eventually("the server was told", async || {
        let channels =
            redis.cli(&["PUBSUB", "CHANNELS", "room:*"], b"").await.map_err(|error| error.to_string())?;
        if channels.trim_ascii().is_empty() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&channels).into_owned())
        }
    })
    .await?;
    ensure!(node.broker.status().borrow().is_up());
    // The server counts what it denied as well.
    let denied = String::from_utf8(redis.cli(&["ACL", "LOG"], b"").await?)?;
    ensure!(denied.trim().is_empty(), "{denied}");
    Ok(())
}

#[tokio::test]
async fn an_untrusted_certificate_is_refused() -> Result<()> {
    let redis = RedisServer::builder().tls().start().await?;
    let other = RedisServer::builder().tls().absent()?;
    let node = Node::start(RedisConfig { ca_pem: Some(other.ca_pem()?), ..config(&redis.tls_url()?)? })?;
    let refused = |status: &BrokerStatus| matches!(status, BrokerStatus::Connecting(why) if why.contains("certificate"));
    node.until("refused", refused).await?;
    Ok(())
}

#[tokio::test]
async fn a_self_signed_certificate_in_the_ca_file_is_trusted_on_every_connection() -> Result<()> {
    let names = ["-subj", "/CN=redis", "-addext", "subjectAltName=DNS:localhost"];
    let redis = RedisServer::builder().tls_by_openssl(&names).start().await?;
    let url = redis.tls_url()?;
    let node = Node::up_with(RedisConfig { ca_pem: Some(redis.ca_pem()?), ..config(&url)? }).await?;
    let room = room("self-made");
    node.subscribe(&room).await?;
    node.publish(&room, "over TLS").await;
    node.heard.wait(&room, "its publication", has("over TLS")).await;
    // Publishers, subscribers and the pool each authenticate.
    eventually("canaries come back", async || match node.sample("tidegate_broker_canary_seconds_count") {
        Ok(count) if count >= 3 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await?;
    // The same bytes under another name are not trusted.
    let by_address = url.replace("localhost", "127.0.0.1");
    let node = Node::start(RedisConfig { ca_pem: Some(redis.ca_pem()?), ..config(&by_address)? })?;
    let refused = |status: &BrokerStatus| {
        let words = "the server's certificate is for localhost, not for 127.0.0.1";
        matches!(status, BrokerStatus::Connecting(why) if why.contains(words))
    };
    node.until("refused for its name", refused).await?;
    Ok(())
}

#[tokio::test]
async fn a_common_name_alone_is_refused_with_that_reason() -> Result<()> {
    let redis = RedisServer::builder().tls_by_openssl(&["-subj", "/CN=localhost"]).start().await?;
    let node = Node::start(RedisConfig { ca_pem: Some(redis.ca_pem()?), ..config(&redis.tls_url()?)? })?;
    let refused = |status: &BrokerStatus| {
        matches!(status, BrokerStatus::Connecting(why)
            if why.contains("a common name alone does not count (RFC 9525)"))
    };
    node.until("refused for its common name", refused).await?;
    Ok(())
}

#[tokio::test]
async fn a_ca_file_without_certificates_is_an_error_at_the_start() -> Result<()> {
    let redis = RedisServer::builder().tls().absent()?;
    for pem in ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        let config = RedisConfig { ca_pem: Some(pem.into()), ..config(&redis.tls_url()?)? };
        ensure!(Node::start(config).is_err(), "{pem}");
    }
    Ok(())
}

#[tokio::test]
async fn a_wrong_password_is_reported_but_not_shown() -> Result<()> {
    let redis = RedisServer::builder().setting(DOCUMENTED).start().await?;
    let url = redis.url().replace("redis://", "redis://tidegate:hunter2secret@");
    let node = Node::start(config(&url)?)?;
    let status = node.until(
        "refused",
        |status| matches!(status, BrokerStatus::Connecting(why) if why.contains("WRONGPASS")),
    );
    let status = format!("{:?}", status.await?);
    ensure!(status.contains("tidegate:***@127.0.0.1") && !status.contains("hunter2"), "{status}");
    Ok(())
}

#[tokio::test]
async fn a_room_without_permission_is_refused_and_disturbs_no_other() -> Result<()> {
    let limited = DOCUMENTED.replace("&room:*", "&room:room:*");
    let redis = RedisServer::builder().setting(&limited).start().await?;
    let url = redis.url().replace("redis://", "redis://tidegate:s3cret%21@");
    let node = Node::up_with(RedisConfig { subscribers: 1, publishers: 1, ..config(&url)? }).await?;
    let (allowed, forbidden) = (rooms(40), room("forbidden"));
    // All at once, so that they are in one batch.
    let mut waiting = allowed.iter().map(|room| node.ask(room)).collect::<Vec<_>>();
    waiting.insert(20, node.ask(&forbidden));
    let outcomes = futures_util::future::join_all(waiting).await;
    for (index, outcome) in outcomes.iter().enumerate() {
        match outcome {
            Err(BrokerError::Forbidden(why)) if index == 20 => ensure!(why.contains("NOPERM"), "{why}"),
            Ok(()) if index != 20 => {}
            other => anyhow::bail!("{index}: {other:?}"),
        }
    }
    ensure!(node.sample("tidegate_broker_topics")? == 40);
    ensure!(node.sample("tidegate_broker_subscriptions_refused_total")? == 1);

    for room in &allowed {
        node.publish(room, "fine").await;
    }
    node.publish(&forbidden, "not so").await;
    let settled = node.receipts.wait(41).await;
    let refused =
        settled.values().filter(|outcomes| matches!(&outcomes[..], [Err(BrokerError::Forbidden(_))])).count();
    let fine = settled.values().filter(|outcomes| matches!(&outcomes[..], [Ok(_)])).count();
    ensure!((fine, refused) == (40, 1), "{settled:?}");
    for room in &allowed {
        let heard = node.heard.wait(room, "its publication", has("fine")).await;
        ensure!(brief(&heard) == ["fine"], "no connection was lost: {heard:?}");
    }
    ensure!(node.broker.status().borrow().is_up());
    Ok(())
}

#[tokio::test]
async fn a_room_has_a_gap_when_its_lost_permission_returns() -> Result<()> {
    let redis = RedisServer::builder().setting(DOCUMENTED).start().await?;
    let url = redis.url().replace("redis://", "redis://tidegate:s3cret%21@");
    let node = Node::up(&url).await?;
    let room = room("revoked");
    node.subscribe(&room).await?;
    // The server closes connections of a user that loses access to a channel it is subscribed to (ACL SETUSER).
    redis.cli(&["ACL", "SETUSER", "tidegate", "resetchannels", "&tidegate:canary:*"], b"").await?;
    let refused =
        |status: &BrokerStatus| matches!(status, BrokerStatus::Interrupted(why) if why.contains("NOPERM"));
    node.until("told of the refusal", refused).await?;
    ensure!(node.sample("tidegate_broker_topics_refused")? == 1);
    // A new request is refused at once, and finally.
    let asked = node.ask(&room).await;
    ensure!(matches!(&asked, Err(BrokerError::Forbidden(why)) if why.contains("NOPERM")), "{asked:?}");
    redis.cli(&["ACL", "SETUSER", "tidegate", "&room:*"], b"").await?;
    node.until_up().await?;
    node.publish(&room, "again").await;
    let heard = node.heard.wait(&room, "a publication", has("again")).await;
    ensure!(brief(&heard) == ["[interrupted]", "again"], "{heard:?}");
    ensure!(node.sample("tidegate_broker_topics_refused")? == 0);
    Ok(())
}
