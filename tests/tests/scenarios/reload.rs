//! A new configuration for a running node, which open sessions do not notice.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use jsonwebtoken::Algorithm;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::TempDir;
use tidegate_tests::{
    client::Client,
    eventually::eventually,
    http::Request,
    journal::Payload,
    node::{Builder, Node},
    raw::{Frame, RawSocket},
    token::{SECRET, Token, anywhere},
};

use crate::stage::payloads;

const NEXT_SECRET: &str = "another secret of the scenarios, just as secret";
const RELOADS: &str = "tidegate_config_reloads_total";
const SUCCESSFUL: &str = "tidegate_config_last_reload_successful";

/// A configuration file, and the secret in a separate file.
struct Files {
    directory: TempDir,
}

impl Files {
    fn new(config: &str) -> Result<Self> {
        let files = Self { directory: tempfile::tempdir()? };
        files.write_secret(SECRET)?;
        files.write(config)?;
        Ok(files)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Replaces the configuration by a rename. The secret is always in its file.
    fn write(&self, config: &str) -> Result<()> {
        let secret = self.path("secret");
        let text = format!("{config}\n[auth]\nhs256_secret_file = '{}'\n", secret.display());
        replace(&self.path("tidegate.toml"), &text)
    }

    fn write_secret(&self, secret: &str) -> Result<()> {
        replace(&self.path("secret"), secret)
    }

    fn node(&self) -> Builder {
        Builder::unconfigured().config_file(&self.path("tidegate.toml")).set("drain.window", "100ms")
    }
}

fn replace(path: &Path, text: &str) -> Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, text)?;
    Ok(fs::rename(new, path)?)
}

/// A token that only the holder of the next secret could sign.
fn next_token() -> String {
    Token::new("alice").room("*", &["subscribe", "publish"]).sign_with(Algorithm::HS256, NEXT_SECRET)
}

async fn until_reloads(node: &Node, result: &str, count: u64) -> Result<()> {
    let label = format!("result=\"{result}\"");
    node.until_samples(&format!("{count} reloads {result}"), |samples| {
        samples.sum(RELOADS, &[&label]) == count
    })
    .await?;
    Ok(())
}

/// Waits for a log line that contains all of this.
async fn until_line(node: &Node, parts: &[&str]) -> Result<()> {
    eventually(&format!("a line with {parts:?}"), async || {
        let output = node.output();
        let found = output.lines().any(|line| parts.iter().all(|part| line.contains(part)));
        found.then_some(()).ok_or(output)
    })
    .await
}

async fn until_posted(node: &Node, token: &str, status: u16) -> Result<()> {
    eventually("the answer to a publication", async || {
        let request = Request::post("/rooms/lobby", "text/plain", *b"x").bearer(token);
        match request.send(node.public).await {
            Ok(response) if response.status == status => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

#[tokio::test]
async fn a_signal_applies_live_settings_and_open_sessions_stay() -> Result<()> {
    let files = Files::new("")?;
    let node = files.node().start().await?;
    let (old, new) = (anywhere("alice"), next_token());
    let listener = Client::websocket(&node.ws("lobby", &old, ""), &[]).await?;
    let stream = Client::events(&node.url("lobby", &old, "")).await?;
    let guest = Token::new("guest").sign_with(Algorithm::HS256, NEXT_SECRET);

    files.write_secret(NEXT_SECRET)?;
    files.write(
        "origins = ['https://app.example']\nlimits.message_size = '1KiB'\nsse.retry = '7s'\n\
         heartbeat.interval = '30s'\nheartbeat.timeout = '70s'\n[rooms.'open:*']\ngrant = ['publish']\n",
    )?;
    node.hang_up()?;
    until_reloads(&node, "applied", 1).await?;

    // Keys: new requests need the new one.
    ensure!(Request::get("/rooms/lobby").bearer(&old).send(node.public).await?.status == 401);
    node.post("lobby", &new, "text/plain", b"by the new key").await?;
    // Policies.
    node.post("open:house", &guest, "text/plain", b"by the new policy").await?;
    // Origins.
    for (origin, status) in [("https://app.example", 202), ("https://other.example", 403)] {
        let request = Request::post("/rooms/lobby", "text/plain", *b"from a page").bearer(&new);
        ensure!(request.header("Origin", origin).send(node.public).await?.status == status, "{origin}");
    }
    // Limits.
    let large = Request::post("/rooms/lobby", "text/plain", [b'x'; 2000]).bearer(&new);
    ensure!(large.send(node.public).await?.status == 413);
    // Times.
    let later = Client::events(&node.url("lobby", &new, "")).await?;
    ensure!(later.until("retry", |journal| !journal.retries.is_empty()).await?.retries[0] >= 7_000);

    // Existing sessions notice nothing, and may continue with the token that was valid when they connected.
    listener.send(Payload::text("still here")).await?;
    let said = ["by the new key", "from a page", "still here"].map(Payload::text);
    ensure!(payloads(&listener.heard(3).await?) == said && payloads(&stream.heard(3).await?) == said);
    ensure!(node.samples().await?.sum("tidegate_connections_closed_total", &[]) == 0);
    Ok(())
}

#[tokio::test]
async fn a_history_applies_from_the_next_publication() -> Result<()> {
    let files = Files::new("")?;
    let node = files.node().start().await?;
    let token = anywhere("alice");
    let listener = Client::websocket(&node.ws("lobby", &token, "echo=false"), &[]).await?;
    let post = Request::post("/rooms/lobby", "text/plain", *b"x").bearer(&token);
    ensure!(post.send(node.public).await?.body.is_empty());

    for (reloads, config, positions) in [
        (1, "rooms.lobby.history.size = 5", [Some("-1"), Some("-2")]),
        (2, "rooms.lobby.history = { size = 1, ttl = 'none' }", [Some("-3"), Some("-4")]),
        (3, "", [None, None]),
    ] {
        files.write(config)?;
        node.hang_up()?;
        until_reloads(&node, "applied", reloads).await?;
        for end in positions {
            let answer = post.send(node.public).await?;
            ensure!(answer.status == 202, "{config}: {answer:?}");
            let id = answer.json().ok().and_then(|body| Some(body.get("id")?.as_str()?.to_owned()));
            ensure!(id.is_some() == end.is_some(), "{config}: {answer:?}");
            ensure!(id.is_none_or(|id| end.is_some_and(|end| id.ends_with(end))), "{config}: {answer:?}");
        }
    }
    ensure!(payloads(&listener.heard(7).await?) == vec![Payload::text("x"); 7]);
    Ok(())
}

#[tokio::test]
async fn a_changed_file_is_loaded_without_a_signal() -> Result<()> {
    let files = Files::new("")?;
    let node = files.node().start().await?;
    until_posted(&node, &anywhere("alice"), 202).await?;
    // A file that a key names.
    files.write_secret(NEXT_SECRET)?;
    until_posted(&node, &next_token(), 202).await?;
    until_posted(&node, &anywhere("alice"), 401).await?;
    // The configuration file itself.
    files.write("limits.message_size = '1B'\nlimits.outbound = '1B'\n")?;
    until_reloads(&node, "applied", 2).await?;
    node.post("lobby", &next_token(), "text/plain", b"x").await?;
    let larger = Request::post("/rooms/lobby", "text/plain", *b"xy").bearer(&next_token());
    ensure!(larger.send(node.public).await?.status == 413);
    Ok(())
}

/// Like the kubelet: the file is a link into `..data`, which is a link to a directory, and only the
/// latter is replaced.
#[tokio::test]
async fn a_mounted_secret_is_loaded_when_its_link_is_swapped() -> Result<()> {
    let volume = tempfile::tempdir()?;
    let at = |name: &str| volume.path().join(name);
    for (directory, secret) in [("..1", SECRET), ("..2", NEXT_SECRET)] {
        fs::create_dir(at(directory))?;
        fs::write(at(directory).join("secret"), secret)?;
    }
    symlink("..1", at("..data"))?;
    symlink("..data/secret", at("secret"))?;
    let path = at("secret");
    let path = path.to_str().context("a path of UTF-8")?;
    let node = Builder::unconfigured().set("auth.hs256_secret_file", path).start().await?;
    until_posted(&node, &anywhere("alice"), 202).await?;

    symlink("..2", at("..data_tmp"))?;
    fs::rename(at("..data_tmp"), at("..data"))?;
    until_posted(&node, &next_token(), 202).await?;
    until_posted(&node, &anywhere("alice"), 401).await?;
    until_reloads(&node, "applied", 1).await
}

#[tokio::test]
async fn a_broken_configuration_is_refused_as_a_whole() -> Result<()> {
    const LEAKED: &str = "hunter2-hunter2";
    let files = Files::new("")?;
    let node = files.node().start().await?;
    let token = anywhere("alice");
    ensure!(node.samples().await?.sum(SUCCESSFUL, &[]) == 1);

    // One valid change, three invalid ones, and a secret that is too short.
    files
        .write("sse.retry = '9s'\nlimits.connections = 0\ndrain.windw = '1s'\nheartbeat.timeout = '1s'\n")?;
    files.write_secret(LEAKED)?;
    node.hang_up()?;
    until_reloads(&node, "refused", 1).await?;
    for key in ["limits.connections", "drain.windw", "heartbeat.timeout", "auth.hs256_secret_file"] {
        until_line(&node, &["is refused", key]).await?;
    }
    ensure!(node.samples().await?.sum(SUCCESSFUL, &[]) == 0);
    let stream = Client::events(&node.url("lobby", &token, "")).await?;
    ensure!(stream.until("retry", |journal| !journal.retries.is_empty()).await?.retries[0] < 7_000);

    // A missing file is refused, too, and neither is reported again at every check.
    fs::remove_file(files.path("tidegate.toml"))?;
    node.until_written("a file of text that can be read").await?;
    until_reloads(&node, "refused", 2).await?;
    files.write_secret(SECRET)?;
    files.write("sse.retry = '9s'")?;
    until_reloads(&node, "applied", 1).await?;
    let samples = node.samples().await?;
    ensure!(samples.sum(SUCCESSFUL, &[]) == 1 && samples.sum(RELOADS, &["result=\"refused\""]) == 2);
    ensure!(!node.output().contains(LEAKED), "a secret is never in the log");
    Ok(())
}

/// Reading a FIFO without a writer never ends: neither a signal nor the periodic check waits for it.
#[tokio::test]
async fn an_endless_file_is_refused_and_the_next_one_is_applied() -> Result<()> {
    let files = Files::new("")?;
    let node = files.node().start().await?;
    for (round, name) in [(1, "tidegate.toml"), (2, "secret")] {
        fs::remove_file(files.path(name))?;
        mknodat(CWD, files.path(name), FileType::Fifo, Mode::RWXU, 0)?;
        node.hang_up()?;
        until_line(&node, &["is refused", "it is a FIFO, not a regular file"]).await?;
        until_reloads(&node, "refused", round).await?;
        ensure!(node.samples().await?.sum(SUCCESSFUL, &[]) == 0, "{name}");
        // Without a signal.
        files.write_secret(SECRET)?;
        files.write(&format!("sse.retry = '{}s'\n", 6 + round))?;
        until_reloads(&node, "applied", round).await?;
        ensure!(node.samples().await?.sum(SUCCESSFUL, &[]) == 1, "{name}");
    }
    node.post("lobby", &anywhere("alice"), "text/plain", b"x").await
}

/// Some editors add a byte-order mark, Windows ends lines with CRLF, and blank lines are invisible.
#[tokio::test]
async fn bytes_that_an_editor_adds_to_a_file_change_nothing() -> Result<()> {
    let files = Files::new("")?;
    files.write_secret(&format!("\u{feff}{SECRET}\r\n\r\n"))?;
    let secret = files.path("secret");
    let config = format!("\u{feff}[auth]\r\nhs256_secret_file = '{}'\r\n", secret.display());
    replace(&files.path("tidegate.toml"), &config)?;
    let node = files.node().start().await?;
    node.post("lobby", &anywhere("alice"), "text/plain", b"x").await
}

#[tokio::test]
async fn keys_that_need_a_restart_are_named_and_the_rest_applies() -> Result<()> {
    let files = Files::new("shards = 1\n")?;
    let node = files.node().start().await?;
    files.write("shards = 3\nbroker.prefix = 'x:'\nsse.retry = '9s'\nlog.filter = 'debug'\n")?;
    node.hang_up()?;
    until_reloads(&node, "applied", 1).await?;
    until_line(&node, &["WARN", "takes effect after a restart", "\"shards, broker.prefix\""]).await?;
    until_line(&node, &["the new configuration is in effect", "\"sse.retry, log.filter\""]).await?;
    // The log's filter takes effect as well.
    ensure!(Request::get("/nowhere").send(node.public).await?.status == 404);
    node.until_written("request refused").await?;
    // As long as it waits for a restart, every reload repeats the warning.
    node.hang_up()?;
    until_reloads(&node, "unchanged", 1).await
}

#[tokio::test]
async fn a_signal_without_anything_to_read_ends_no_session() -> Result<()> {
    let node = Builder::new().start().await?;
    node.hang_up()?;
    until_reloads(&node, "unchanged", 1).await?;
    node.post("lobby", &anywhere("alice"), "text/plain", b"x").await
}

/// A node without a configured key keeps the secret it generated, and a configured one is not replaced by a
/// generated one.
#[tokio::test]
async fn the_first_runs_secret_survives_and_a_lost_key_is_refused() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("tidegate.toml");
    fs::write(&path, "")?;
    let own = Builder::unconfigured().config_file(&path).start().await?;
    own.until_written("#token=").await?;
    let output = own.output();
    let token = output.split("#token=").nth(1).and_then(|rest| rest.split_whitespace().next());
    let token = token.context("the node prints a token")?.to_owned();
    replace(&path, "sse.retry = '9s'")?;
    own.hang_up()?;
    until_reloads(&own, "applied", 1).await?;
    own.post("demo:x", &token, "text/plain", b"x").await?;

    replace(&path, &format!("auth.hs256_secret = '{SECRET}'"))?;
    let given = Builder::unconfigured().config_file(&path).start().await?;
    replace(&path, "")?;
    given.hang_up()?;
    until_reloads(&given, "refused", 1).await?;
    given.post("lobby", &anywhere("alice"), "text/plain", b"x").await
}

/// A shorter heartbeat must not apply retroactively: no client was pinged in the time that is now too long.
#[tokio::test]
async fn a_shorter_heartbeat_closes_no_client_that_answers() -> Result<()> {
    let files = Files::new("heartbeat.interval = '30m'\nheartbeat.timeout = '1h'\n")?;
    let node = files.node().start().await?;
    let token = anywhere("alice");
    let mut clients = Vec::new();
    for _ in 0..50 {
        clients.push(Client::websocket(&node.ws("lobby", &token, ""), &[]).await?);
    }
    let before = node.samples().await?.sum("tidegate_network_bytes_total", &["direction=\"in\""]);
    files.write("heartbeat.interval = '100ms'\nheartbeat.timeout = '10s'\n")?;
    node.hang_up()?;
    until_reloads(&node, "applied", 1).await?;
    // A pong has six bytes: these are ten rounds for all sessions.
    node.until_samples("ten rounds of heartbeats", |samples| {
        samples.sum("tidegate_network_bytes_total", &["direction=\"in\""]) >= before + 10 * 6 * 50
    })
    .await?;
    ensure!(node.samples().await?.sum("tidegate_connections", &["protocol=\"plain\""]) == 50);
    Ok(())
}

#[tokio::test]
async fn a_maximum_age_set_later_applies_to_open_sessions() -> Result<()> {
    let files = Files::new("")?;
    let node = files.node().start().await?;
    let client = Client::websocket(&node.ws("lobby", &anywhere("alice"), ""), &[]).await?;
    files.write("public.max_session_age = '500ms'\n")?;
    node.hang_up()?;
    ensure!(client.ended().await?.code() == Some(1012));
    node.until_samples("a session that was sent on", |samples| {
        samples.sum("tidegate_connections_closed_total", &["reason=\"max_age\""]) == 1
    })
    .await?;
    Ok(())
}

/// A Centrifuge client knows how often it is pinged, and gives up on a node that pings less often.
#[tokio::test]
async fn a_longer_heartbeat_keeps_the_interval_announced_to_sessions() -> Result<()> {
    let files = Files::new("heartbeat.interval = '1s'\n")?;
    let node = files.node().start().await?;
    let mut socket = RawSocket::connect(node.public, "/connection/websocket").await?;
    let connect = format!(r#"{{"id":1,"connect":{{"token":"{}"}}}}"#, anywhere("alice"));
    socket.send(&Frame::text(connect)).await?;
    let reply = socket.receive().await?.context("a reply")?;
    ensure!(String::from_utf8_lossy(&reply.payload).contains(r#""ping":1"#), "{reply:?}");
    files.write("heartbeat.interval = '30m'\nheartbeat.timeout = '1h'\n")?;
    node.hang_up()?;
    until_reloads(&node, "applied", 1).await?;
    // The first may have been on its way already.
    for _ in 0..3 {
        let ping = socket.receive().await?.context("a ping")?;
        ensure!(ping.payload == b"{}", "{ping:?}");
    }
    Ok(())
}

/// Grants of a policy at the time when the token was verified last until the next token; new sessions do not get them.
#[tokio::test]
async fn a_removed_policy_applies_from_the_next_token_on() -> Result<()> {
    let files = Files::new("[rooms.open]\ngrant = ['subscribe', 'publish']\n")?;
    let node = files.node().start().await?;
    let token = Token::new("guest").sign();
    let plain = Client::websocket(&node.ws("open", &token, ""), &[]).await?;
    let mut sdk = RawSocket::connect(node.public, "/connection/websocket").await?;
    ask(&mut sdk, &format!(r#"{{"id":1,"connect":{{"token":"{token}"}}}}"#), r#""connect":"#).await?;
    ask(&mut sdk, r#"{"id":2,"subscribe":{"channel":"open"}}"#, r#""subscribe":{}"#).await?;

    files.write("")?;
    node.hang_up()?;
    until_reloads(&node, "applied", 1).await?;
    let post = Request::post("/rooms/open", "text/plain", *b"x").bearer(&token);
    ensure!(post.send(node.public).await?.status == 403);
    plain.send(Payload::text("still")).await?;
    plain.hears(&Payload::text("still")).await?;
    ask(&mut sdk, r#"{"id":3,"publish":{"channel":"open","data":1}}"#, r#""publish":{}"#).await?;
    // The refreshed identity gets the current policies.
    let refresh = format!(r#"{{"id":4,"refresh":{{"token":"{token}"}}}}"#);
    ask(&mut sdk, &refresh, r#""unsubscribe":{"code":2000"#).await?;
    ask(&mut sdk, r#"{"id":5,"publish":{"channel":"open","data":2}}"#, r#""code":103"#).await?;
    Ok(())
}

/// Sends a command and reads until the node has sent this.
async fn ask(socket: &mut RawSocket, command: &str, expected: &str) -> Result<()> {
    socket.send(&Frame::text(command)).await?;
    loop {
        let frame = socket.receive().await?.with_context(|| format!("{expected} before the end"))?;
        if String::from_utf8_lossy(&frame.payload).contains(expected) {
            return Ok(());
        }
    }
}

#[tokio::test]
async fn a_drain_uses_the_newest_times() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("tidegate.toml");
    fs::write(&path, "drain.pause = '1h'\ndrain.deadline = '2h'\n")?;
    let mut node =
        Builder::unconfigured().config_file(&path).set("auth.hs256_secret", SECRET).start().await?;
    replace(&path, "drain.window = '100ms'\n")?;
    node.hang_up()?;
    until_reloads(&node, "applied", 1).await?;
    let client = Client::websocket(&node.ws("lobby", &anywhere("alice"), ""), &[]).await?;
    node.terminate()?;
    ensure!(client.ended().await?.code() == Some(1012));
    ensure!(node.exited().await?.code() == Some(0));
    Ok(())
}
