//! Outgoing connections of a node: to names with several addresses, and to servers with hand-made certificates.

use std::{net::SocketAddr, path::Path};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;
use tidegate_tests::{
    eventually::eventually,
    issuer::{SigningKey, key_set},
    node::{Builder, Node},
    proxy::Nginx,
    redis_server::RedisServer,
    tls::self_made,
    token::Token,
};
use tokio::net::{TcpListener, TcpStream};

/// A node that resolves names from this file, in its order (<https://cwrap.org/nss_wrapper.html>).
fn resolving(node: Builder, hosts: &Path) -> Builder {
    node.variable("LD_PRELOAD", "libnss_wrapper.so")
        .variable("NSS_WRAPPER_HOSTS", &hosts.display().to_string())
}

/// Two addresses for each name; no server is at the first.
fn two_addresses(directory: &TempDir, names: &[&str]) -> Result<std::path::PathBuf> {
    let hosts = directory.path().join("hosts");
    let lines = names.iter().map(|name| format!("127.0.0.2 {name}\n127.0.0.1 {name}\n"));
    std::fs::write(&hosts, lines.collect::<String>())?;
    Ok(hosts)
}

/// A host that hangs: its kernel accepts connections, but no process serves them.
async fn hung(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(("127.0.0.2", address.port())).await.context("a port that is free at 127.0.0.2, too")
}

async fn opens(node: &Node, key: &SigningKey) -> Result<()> {
    let token = key.sign(Token::new("alice").room("lobby", &["publish"]));
    node.post("lobby", &token, "text/plain", b"hello").await
}

#[tokio::test]
async fn a_dead_first_address_of_redis_or_the_issuer_is_skipped() -> Result<()> {
    let files = TempDir::new()?;
    let (certificate, private) = (files.path().join("issuer.crt"), files.path().join("issuer.key"));
    let names = ["-subj", "/CN=issuer", "-addext", "subjectAltName=DNS:issuer.test"].map(str::to_owned);
    self_made(&names, &certificate, &private)?;
    let key = SigningKey::new("key")?;
    let issuer = Nginx::publishing(&key_set(&[&key]), &certificate, &private).await?;
    let redis = RedisServer::start().await?;
    let redis_at = SocketAddr::from(([127, 0, 0, 1], redis.port()));
    let _hung = (hung(redis_at).await?, hung(issuer.address()).await?);
    let node = Builder::unconfigured()
        .set("broker.url", &format!("redis://redis.test:{}", redis.port()))
        .set("auth.jwks_url", &format!("https://issuer.test:{}/jwks.json", issuer.address().port()))
        .set("auth.jwks_ca_file", certificate.to_str().context("a path of text")?);
    let hosts = two_addresses(&files, &["redis.test", "issuer.test"])?;
    let node = resolving(node, &hosts).start().await?;
    opens(&node, &key).await?;
    let samples = node.samples().await?;
    ensure!(samples.sum("tidegate_jwks_refreshes_total", &["result=\"failed\""]) == 0);
    ensure!(!node.output().contains("still connecting to the broker"), "{}", node.output());
    Ok(())
}

#[tokio::test]
async fn a_replica_among_the_addresses_of_a_name_is_skipped() -> Result<()> {
    let primary = RedisServer::start().await?;
    let port = primary.port();
    let replica = RedisServer::builder()
        .setting("bind 127.0.0.2")
        .setting(&format!("port {port}"))
        .setting(&format!("replicaof 127.0.0.1 {port}"))
        .start()
        .await?;
    eventually("the replica is one", async || {
        match replica.cli(&["ROLE"], b"").await.map(|role| role.starts_with(b"slave")) {
            Ok(true) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await?;
    let files = TempDir::new()?;
    let hosts = two_addresses(&files, &["redis.test"])?;
    let node = Builder::new().set("broker.url", &format!("redis://redis.test:{port}"));
    let node = resolving(node, &hosts).start().await?;
    ensure!(!node.output().contains("still connecting to the broker"), "{}", node.output());
    Ok(())
}

#[tokio::test]
async fn a_key_set_arrives_compressed_over_https_and_no_connection_is_kept() -> Result<()> {
    let files = TempDir::new()?;
    let (certificate, private) = (files.path().join("issuer.crt"), files.path().join("issuer.key"));
    let names = ["-subj", "/CN=issuer", "-addext", "subjectAltName=IP:127.0.0.1"].map(str::to_owned);
    self_made(&names, &certificate, &private)?;
    let key = SigningKey::new("key")?;
    let issuer = Nginx::publishing(&key_set(&[&key]), &certificate, &private).await?;
    let node = Builder::unconfigured()
        .set("auth.jwks_url", &format!("https://{}/jwks.json", issuer.address()))
        .set("auth.jwks_ca_file", certificate.to_str().context("a path of text")?)
        .set("auth.jwks_interval", "1s")
        .start()
        .await?;
    opens(&node, &key).await?;
    let ok = |result: &str| format!("result=\"{result}\"");
    node.until_samples("three fetches", |samples| {
        samples.sum("tidegate_jwks_refreshes_total", &[&ok("ok")]) >= 3
    })
    .await?;
    ensure!(node.samples().await?.sum("tidegate_jwks_refreshes_total", &[&ok("failed")]) == 0);
    let exchanges = issuer.exchanges()?;
    ensure!(exchanges.len() >= 3, "{exchanges:?}");
    for exchange in &exchanges {
        ensure!(exchange == "1 200 gzip", "the first request of its connection, compressed: {exchanges:?}");
    }
    Ok(())
}

#[tokio::test]
async fn an_issuer_with_only_a_common_name_is_refused_with_that_reason() -> Result<()> {
    let files = TempDir::new()?;
    let (certificate, private) = (files.path().join("issuer.crt"), files.path().join("issuer.key"));
    self_made(&["-subj", "/CN=localhost"].map(str::to_owned), &certificate, &private)?;
    let issuer = Nginx::publishing(&key_set(&[&SigningKey::new("key")?]), &certificate, &private).await?;
    let node = Builder::unconfigured()
        .set("auth.jwks_url", &format!("https://localhost:{}/jwks.json", issuer.address().port()))
        .set("auth.jwks_ca_file", certificate.to_str().context("a path of text")?)
        .launch()
        .await?;
    node.until_written("a common name alone does not count (RFC 9525)").await?;
    // The name was refused, not the server.
    TcpStream::connect(issuer.address()).await?;
    node.until_probe("/readyz", 503).await?;
    Ok(())
}
