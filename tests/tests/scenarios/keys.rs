//! Many keys: of every algorithm, from files and from a server, replaced while clients stay connected.

use std::{path::Path, time::Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::future::join_all;
use serde_json::{Value, json};
use tempfile::TempDir;
use tidegate_tests::{
    client::Client,
    eventually::eventually,
    http::{Request, Response},
    issuer::{Issuer, SigningKey, foreign_keys, key_set, ok},
    journal::Payload,
    node::{Builder, Node},
    raw::{Frame, RawSocket},
    samples::Samples,
    token::{SECRET, Token},
};

fn claims(subject: &str) -> Token {
    Token::new(subject).room("lobby", &["subscribe", "publish"])
}

/// A node whose only keys come from a server.
fn trusting(issuer: &Issuer) -> Builder {
    Builder::unconfigured()
        .set("auth.jwks_url", &issuer.url())
        .set("auth.leeway", "0s")
        .set("drain.window", "0s")
}

async fn open(node: &Node, token: &str) -> Result<Response> {
    Request::upgrade("/rooms/lobby").bearer(token).send(node.public).await
}

/// Waits until a token grants access to the room. Keys take some time to arrive, by design.
async fn until_open(node: &Node, token: &str) -> Result<()> {
    eventually("the token is good", async || match open(node, token).await {
        Ok(response) if response.status == 101 => Ok(()),
        Ok(response) => Err(response.status.to_string()),
        Err(error) => Err(format!("{error:#}")),
    })
    .await
}

fn failures(samples: &Samples, reason: &str) -> u64 {
    samples.sum("tidegate_auth_failures_total", &[&format!("reason=\"{reason}\"")])
}

fn refreshes(samples: &Samples, result: &str) -> u64 {
    samples.sum("tidegate_jwks_refreshes_total", &[&format!("result=\"{result}\"")])
}

/// Replaces a file atomically.
fn put(directory: &Path, name: &str, text: &str) -> Result<String> {
    let (temporary, path) = (directory.join("temporary"), directory.join(name));
    std::fs::write(&temporary, text)?;
    std::fs::rename(&temporary, &path)?;
    Ok(path.to_str().context("a path of text")?.to_owned())
}

#[tokio::test]
async fn tokens_of_every_algorithm_by_another_implementation_are_accepted() -> Result<()> {
    let keys = foreign_keys(claims("alice")).await?;
    ensure!(keys.len() == 12, "{}", keys.len());
    let directory = TempDir::new()?;
    let mut table = Vec::new();
    for (index, key) in keys.iter().enumerate() {
        let (kind, text) = match (&key.secret, &key.pem) {
            (Some(secret), _) => ("secret_file", format!("{secret}\n")),
            (None, Some(pem)) => ("public_key_file", pem.clone()),
            (None, None) => bail!("neither a secret nor a public key"),
        };
        let path = put(directory.path(), &format!("key-{index}"), &text)?;
        table.push(format!("{:?} = {{ algorithm = {:?}, {kind} = {path:?} }}", key.kid, key.algorithm));
    }
    let set = json!({ "keys": keys.iter().filter_map(|key| key.jwk.clone()).collect::<Vec<_>>() });
    let file = put(directory.path(), "jwks.json", &set.to_string())?;
    let issuer = Issuer::start(&[]).await?;
    issuer.answer(&ok(&set.to_string()));
    let (by_files, by_set, by_url) = (
        Builder::unconfigured().set("auth.keys", &format!("{{ {} }}", table.join(", "))),
        Builder::unconfigured().set("auth.jwks_file", &file),
        trusting(&issuer),
    );
    let (by_files, by_set, by_url) = tokio::try_join!(by_files.start(), by_set.start(), by_url.start())?;
    for key in &keys {
        for (node, trusts) in [(&by_files, true), (&by_set, key.jwk.is_some()), (&by_url, key.jwk.is_some())]
        {
            let response = open(node, &key.token).await?;
            ensure!(response.status == if trusts { 101 } else { 401 }, "{}: {response:?}", key.algorithm);
            // All bits of the first character are significant in every algorithm.
            let (text, signature) = key.token.rsplit_once('.').context("a signature")?;
            let mut signature = signature.to_owned();
            let first = if signature.starts_with('A') { "B" } else { "A" };
            signature.replace_range(..1, first);
            ensure!(open(node, &format!("{text}.{signature}")).await?.status == 401, "{}", key.algorithm);
        }
        let client = Client::websocket(&by_files.ws("lobby", &key.token, ""), &[]).await?;
        client.send(Payload::text(key.algorithm.clone())).await?;
        client.hears(&Payload::text(key.algorithm.clone())).await?;
    }
    let page = keys.iter().find(|key| key.algorithm == "ES256").context("ES256")?;
    let client = Client::node_websocket(&by_url.ws("lobby", &page.token, "")).await?;
    client.send(Payload::text("from a library")).await?;
    client.hears(&Payload::text("from a library")).await?;
    Ok(())
}

#[tokio::test]
async fn keys_are_rotated_while_a_client_stays() -> Result<()> {
    let (old, new) = (SigningKey::new("old")?, SigningKey::new("new")?);
    let issuer = Issuer::start(&[&old]).await?;
    let node = trusting(&issuer).start().await?;
    let client = Client::websocket(&node.ws("lobby", &old.sign(claims("alice")), ""), &[]).await?;
    // A token of the new key makes the node fetch the set: the interval is ten minutes.
    issuer.publish(&[&old, &new]);
    until_open(&node, &new.sign(claims("bob"))).await?;
    ensure!(open(&node, &old.sign(claims("carol"))).await?.status == 101, "both are good");
    ensure!(issuer.requests() == 2, "one at the start, one for the new key, not {}", issuer.requests());
    // Once removed from the set, it is removed from the node, at the latest with the next unknown key.
    issuer.publish(&[&new]);
    let stranger = SigningKey::new("stranger")?;
    let gone = old.sign(claims("dora"));
    eventually("the old key is removed", async || {
        drop(open(&node, &stranger.sign(claims("eve"))).await);
        match open(&node, &gone).await {
            Ok(response) if response.status == 401 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await?;
    node.post("lobby", &new.sign(claims("bob")), "text/plain", b"still here").await?;
    client.hears(&Payload::text("still here")).await?;
    ensure!(node.samples().await?.sum("tidegate_jwks_keys", &[]) == 1);
    Ok(())
}

#[tokio::test]
async fn a_hundred_tokens_of_a_new_key_wait_for_one_fetch() -> Result<()> {
    let (old, new) = (SigningKey::new("old")?, SigningKey::new("new")?);
    let issuer = Issuer::start(&[&old]).await?;
    let node = trusting(&issuer).set("auth.jwks_interval", "1s").start().await?;
    issuer.hold();
    issuer.publish(&[&new]);
    let before = issuer.requests();
    issuer.until_requests(before + 1).await?;
    let tokens: Vec<_> = (0..100).map(|n| new.sign(claims(&format!("user {n}")))).collect();
    let answers = join_all(tokens.iter().map(|token| open(&node, token)));
    let release = async {
        let held =
            node.until_samples("100 sockets", |samples| samples.sum("tidegate_sockets", &[]) >= 100).await;
        let fetches = issuer.requests();
        issuer.release();
        held.map(|_| fetches)
    };
    let (answers, fetches) = tokio::join!(answers, release);
    ensure!(fetches? == before + 1, "one fetch for all of them");
    for answer in answers {
        ensure!(answer?.status == 101);
    }
    ensure!(failures(&node.samples().await?, "unknown_key") == 0);
    Ok(())
}

#[tokio::test]
async fn random_key_names_do_not_cause_many_fetches() -> Result<()> {
    let key = SigningKey::new("known")?;
    let issuer = Issuer::start(&[&key]).await?;
    let node = trusting(&issuer).start().await?;
    let began = Instant::now();
    for n in 0..300 {
        let token = key.sign_as(claims("eve"), |header| header.kid = Some(format!("random {n}")));
        ensure!(open(&node, &token).await?.status == 401);
    }
    // One fetch at the start, and one for each pause between two fetches that has passed.
    let most = 2 + began.elapsed().as_secs() / 5;
    ensure!(issuer.requests() as u64 <= most, "{} fetches, {most} at most", issuer.requests());
    ensure!(failures(&node.samples().await?, "unknown_key") == 300);
    ensure!(open(&node, &key.sign(claims("alice"))).await?.status == 101);
    Ok(())
}

#[tokio::test]
async fn a_server_that_fails_in_any_way_changes_no_key() -> Result<()> {
    let (old, new) = (SigningKey::new("old")?, SigningKey::new("new")?);
    let issuer = Issuer::start(&[&old]).await?;
    let node = trusting(&issuer).set("auth.jwks_interval", "1s").start().await?;
    let token = old.sign(claims("alice"));
    let set = key_set(&[&new]);
    let elsewhere = Issuer::start(&[&new]).await?;
    let redirect =
        format!("HTTP/1.1 302 Found\r\nLocation: {}\r\nContent-Length: 0\r\n\r\n", elsewhere.url());
    let endless = format!("HTTP/1.1 200 OK\r\n\r\n{}{}", set, " ".repeat(300 * 1024));
    let secret =
        ok(&json!({ "keys": [{ "kty": "oct", "kid": "new", "alg": "HS256", "k": "A".repeat(43) }] })
            .to_string());
    let failing: Vec<(&str, Option<Vec<u8>>)> = vec![
        ("away", None),
        ("500", Some(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n".to_vec())),
        ("redirect", Some(redirect.into_bytes())),
        ("no HTTP", Some(b"\x16\x03\x01 hello".to_vec())),
        ("no JSON", Some(ok("<html>"))),
        ("empty", Some(ok(r#"{"keys":[]}"#))),
        ("too long", Some(endless.into_bytes())),
        ("cut off", Some(format!("HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{set}").into_bytes())),
        ("secrets", Some(secret)),
    ];
    for (what, answer) in failing {
        let before = node.samples().await?;
        match answer {
            Some(answer) => issuer.answer(&answer),
            None => issuer.be_away(),
        }
        // Two: the first may have been in progress with the previous response.
        node.until_samples(what, |samples| refreshes(samples, "failed") >= refreshes(&before, "failed") + 2)
            .await?;
        ensure!(open(&node, &token).await?.status == 101, "{what}");
        let samples = node.samples().await?;
        ensure!(samples.sum("tidegate_jwks_keys", &[]) == 1, "{what}");
        ensure!(samples.sum("tidegate_jwks_last_success_timestamp_seconds", &[]) > 1_700_000_000, "{what}");
        node.until_probe("/readyz", 200).await?;
    }
    ensure!(elsewhere.requests() == 0, "redirects are not followed");
    issuer.publish(&[&new]);
    until_open(&node, &new.sign(claims("bob"))).await?;
    Ok(())
}

#[tokio::test]
async fn a_node_is_not_ready_before_its_keys_have_come() -> Result<()> {
    let key = SigningKey::new("key")?;
    let issuer = Issuer::start(&[&key]).await?;
    issuer.be_away();
    let node = trusting(&issuer).launch().await?;
    issuer.until_requests(2).await?;
    let probe = node.until_probe("/readyz", 503).await?;
    ensure!(probe.text().contains("auth.jwks_url"), "{}", probe.text());
    ensure!(node.ask_ops("/livez").await?.status == 200);
    issuer.publish(&[&key]);
    node.until_ready().await?;
    ensure!(open(&node, &key.sign(claims("alice"))).await?.status == 101);
    Ok(())
}

#[tokio::test]
async fn a_centrifuge_client_gets_a_temporary_error_while_its_key_is_fetched() -> Result<()> {
    let (old, new) = (SigningKey::new("old")?, SigningKey::new("new")?);
    let issuer = Issuer::start(&[&old]).await?;
    let node = trusting(&issuer).set("auth.jwks_interval", "1s").start().await?;
    let token = new.sign(claims("alice"));
    issuer.hold();
    issuer.publish(&[&new]);
    let before = issuer.requests();
    issuer.until_requests(before + 1).await?;
    let mut raw = RawSocket::connect(node.public, "/connection/websocket").await?;
    raw.send(&Frame::text(json!({ "id": 1, "connect": { "token": token } }).to_string())).await?;
    let reply: Value = serde_json::from_slice(&raw.receive().await?.context("a reply")?.payload)?;
    ensure!(
        reply["error"] == json!({ "code": 100, "message": "try again in a moment", "temporary": true }),
        "{reply}"
    );
    issuer.release();
    let url = format!("ws://{}/connection/websocket", node.public);
    let client = Client::node_centrifuge(&url, "lobby", &[&token]).await?;
    client.send(Payload::text("\"in\"")).await?;
    client.hears(&Payload::text("\"in\"")).await?;
    // An unknown key causes no further fetch once the set has been checked.
    let stranger = SigningKey::new("stranger")?.sign(claims("eve"));
    eventually("an invalid token", async || {
        let code = async {
            let mut raw = RawSocket::connect(node.public, "/connection/websocket").await?;
            raw.send(&Frame::text(json!({ "id": 1, "connect": { "token": stranger } }).to_string())).await?;
            anyhow::Ok(raw.receive().await?.and_then(|frame| frame.close_code()))
        };
        match code.await {
            Ok(Some(3500)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

#[tokio::test]
async fn keys_in_files_are_replaced_on_disk_and_invalid_ones_are_refused() -> Result<()> {
    let (one, two, three) = (SigningKey::new("one")?, SigningKey::new("two")?, SigningKey::new("three")?);
    let directory = TempDir::new()?;
    let set = put(directory.path(), "jwks.json", &key_set(&[&one]))?;
    let pem = put(directory.path(), "three.pem", &one.public_pem())?;
    let table = format!("{{ three = {{ algorithm = \"ES256\", public_key_file = {pem:?} }} }}");
    let node = Builder::unconfigured().set("auth.jwks_file", &set).set("auth.keys", &table).start().await?;
    let client = Client::websocket(&node.ws("lobby", &one.sign(claims("alice")), ""), &[]).await?;
    ensure!(open(&node, &two.sign(claims("bob"))).await?.status == 401);
    ensure!(open(&node, &three.sign(claims("carol"))).await?.status == 401, "its file holds another key");

    let reloads = |samples: &Samples, result: &str| {
        samples.sum("tidegate_key_reloads_total", &[&format!("result=\"{result}\"")])
    };
    ensure!(reloads(&node.samples().await?, "ok") == 0, "nothing has changed");
    put(directory.path(), "jwks.json", "{\"keys\": [")?;
    node.until_samples("a refusal", |samples| reloads(samples, "failed") == 1).await?;
    node.until_written("cannot replace the keys from files; the old ones stay in use").await?;
    ensure!(open(&node, &one.sign(claims("alice"))).await?.status == 101, "the old one stays in use");

    put(directory.path(), "jwks.json", &key_set(&[&two]))?;
    put(directory.path(), "three.pem", &three.public_pem())?;
    until_open(&node, &three.sign(claims("carol"))).await?;
    until_open(&node, &two.sign(claims("bob"))).await?;
    ensure!(open(&node, &one.sign(claims("dora"))).await?.status == 401);
    node.post("lobby", &two.sign(claims("bob")), "text/plain", b"still here").await?;
    client.hears(&Payload::text("still here")).await?;
    Ok(())
}

/// Byte for byte, except for the date.
fn without_date(response: &Response) -> String {
    let whole = format!("{response:?}");
    match response.header("date") {
        Some(date) => whole.replace(date, "the date"),
        None => whole,
    }
}

#[tokio::test]
async fn only_the_operator_sees_why_a_token_is_invalid() -> Result<()> {
    let key = SigningKey::new("key")?;
    let issuer = Issuer::start(&[&key]).await?;
    let node = trusting(&issuer)
        .set("auth.issuer", "https://login.example")
        .set("auth.audience", "chat, https://chat.example")
        .start()
        .await?;
    let good =
        || claims("alice").claim("iss", json!("https://login.example")).claim("aud", json!(["x", "chat"]));
    ensure!(open(&node, &key.sign(good())).await?.status == 101);
    let header = |change: fn(&mut jsonwebtoken::Header)| key.sign_as(good(), change);
    let rows: Vec<(&str, String)> = vec![
        ("malformed", "a.b.c".to_owned()),
        ("malformed", format!("{}.x.y", key.sign(good()))),
        ("wrong_algorithm", good().unsigned()),
        ("wrong_algorithm", good().sign()),
        ("wrong_type", header(|header| header.typ = Some("logout+jwt".to_owned()))),
        ("unknown_key", header(|header| header.kid = Some("../../etc/passwd".to_owned()))),
        ("bad_signature", SigningKey::new("key")?.sign(good())),
        ("wrong_issuer", key.sign(good().claim("iss", json!("https://login.example/")))),
        ("wrong_issuer", key.sign(good().without("iss"))),
        ("foreign_audience", key.sign(good().claim("aud", json!(["y"])))),
        ("foreign_audience", key.sign(good().without("aud"))),
        ("invalid_subject", key.sign(good().without("sub"))),
        ("invalid_time", key.sign(good().claim("exp", json!("1900000000")))),
        ("expired", key.sign(good().expires_in(-1))),
        ("not_yet_valid", key.sign(good().begins_in(600))),
    ];
    let mut answers = Vec::new();
    for (reason, token) in rows {
        let before = node.samples().await?;
        let response = open(&node, &token).await?;
        ensure!(response.status == 401, "{reason}: {response:?}");
        let grown = node.samples().await?.growth(&before, &["tidegate_auth_failures_total"]);
        let expected = [(format!("tidegate_auth_failures_total{{reason=\"{reason}\"}}"), 1)];
        ensure!(grown == expected.into(), "{reason}: {grown:?}");
        answers.push(without_date(&response));
    }
    answers.dedup();
    ensure!(answers.len() == 1, "{answers:#?}");
    Ok(())
}

/// Like `access`, for the secrets that keys add: secret files, a server, its URL, its responses.
#[tokio::test]
async fn no_secret_of_keys_is_ever_written() -> Result<()> {
    let (known, stranger) = (SigningKey::new("known")?, SigningKey::new("stranger")?);
    let issuer = Issuer::start(&[&known]).await?;
    let directory = TempDir::new()?;
    let secret = put(directory.path(), "secret", &format!("{SECRET}\n"))?;
    let private = put(directory.path(), "private.pem", &known.private_pem())?;
    let table = |kind: &str, path: &str| {
        let algorithm = if kind == "secret_file" { "HS256" } else { "ES256" };
        format!("{{ own = {{ algorithm = {algorithm:?}, {kind} = {path:?} }} }}")
    };
    let mut node = trusting(&issuer)
        .set("auth.jwks_url", &format!("{}?access=qu3ry-s3cr3t", issuer.url()))
        .set("auth.keys", &table("secret_file", &secret))
        .set("auth.jwks_interval", "1s")
        .set("log.filter", "trace")
        .start()
        .await?;
    let shared = claims("carol").sign();
    let good = [known.sign(claims("alice")), shared];
    let bad = [
        stranger.sign(claims("eve")),
        known.sign(claims("eve").expires_in(-60)),
        known.sign(claims("eve").claim("aud", json!("elsewhere"))),
        known.sign_as(claims("eve"), |header| header.typ = Some("logout+jwt".to_owned())),
        stranger.sign_as(claims("eve"), |header| header.kid = Some("known".to_owned())),
    ];
    let mut written = Vec::new();
    for token in &good {
        let client = Client::websocket(&node.ws("lobby", token, ""), &[]).await?;
        client.send(Payload::text("x")).await?;
        client.heard(1).await?;
    }
    for token in &bad {
        let response = open(&node, token).await?;
        ensure!(response.status == 401, "{response:?}");
        written.push(format!("{response:?} {}", response.text()));
        let mut raw = RawSocket::connect(node.public, "/connection/websocket").await?;
        raw.send(&Frame::text(json!({ "id": 1, "connect": { "token": token } }).to_string())).await?;
        written.push(format!(
            "{:?}",
            raw.receive().await?.map(|frame| String::from_utf8_lossy(&frame.payload).into_owned())
        ));
    }
    // A set that publishes what it should not, a response that repeats it, an invalid file.
    let private_jwk = json!({ "keys": [{ "kty": "EC", "crv": "P-256", "x": "x", "y": "y", "d": "pr1v4t3-p4rt-0f-4-k3y" }] });
    for answer in [
        ok(&private_jwk.to_string()),
        ok("4nsw3r-w1th-s3cr3t"),
        b"HTTP/1.1 4nsw3r-w1th-s3cr3t\r\n\r\n".to_vec(),
    ] {
        let before = node.samples().await?;
        issuer.answer(&answer);
        node.until_samples("a failed fetch", |samples| {
            refreshes(samples, "failed") >= refreshes(&before, "failed") + 2
        })
        .await?;
    }
    std::fs::write(&secret, "t00-sh0rt-s3cr3t")?;
    node.until_written("cannot replace the keys from files").await?;
    written.push(node.ask_ops("/metrics").await?.text());
    node.terminate()?;
    ensure!(node.exited().await?.success());
    let output = node.output();
    ensure!(output.contains("DEBUG") && output.contains("a token was refused"), "the log is at its loudest");
    written.push(output);
    // The output of a node that does not start.
    for (key, value) in [
        ("auth.keys", table("public_key_file", &private)),
        ("auth.keys", table("public_key_file", &secret)),
        ("auth.keys", table("secret_file", &private)),
        ("auth.keys", format!("{{ own = {{ algorithm = \"HS256\", secret = {SECRET:?} }} }}")),
        ("auth.keys", format!("{{ own = {SECRET:?} }}")),
        ("auth.keys", SECRET.to_owned()),
        ("auth.jwks_file", private.clone()),
        ("auth.jwks_url", "https://user:qu3ry-s3cr3t@login.example/".to_owned()),
        ("auth.hs256_secret_file", private.clone()),
    ] {
        let (status, output) = Builder::unconfigured().set(key, &value).run_to_the_end().await?;
        ensure!(status.code() == Some(2) && output.contains(key), "{key}: {status} {output}");
        written.push(output);
    }
    let mut secrets: Vec<String> =
        [SECRET, "qu3ry-s3cr3t", "pr1v4t3-p4rt-0f-4-k3y", "4nsw3r-w1th-s3cr3t", "t00-sh0rt-s3cr3t"]
            .map(str::to_owned)
            .into();
    secrets.extend(known.private_pem().lines().filter(|line| !line.starts_with('-')).map(str::to_owned));
    for token in good.iter().chain(&bad) {
        secrets.extend(token.split('.').skip(1).map(str::to_owned));
    }
    for text in &written {
        for secret in &secrets {
            if let Some(at) = text.find(secret.as_str()) {
                let line = text.get(..at).unwrap_or_default().lines().count();
                let line = text.lines().nth(line.saturating_sub(1)).unwrap_or_default();
                bail!("a secret ({}…) was written: {line}", secret.chars().take(8).collect::<String>());
            }
        }
    }
    Ok(())
}
