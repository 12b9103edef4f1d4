//! Who may connect, for how long, and what no client gets to see.

use anyhow::{Context as _, Result, ensure};
use jsonwebtoken::Algorithm;
use serde_json::json;
use tidegate_tests::{
    client::Client,
    http::{Request, Response},
    journal::{End, Payload},
    node::{Builder, Node},
    raw::{Frame, RawSocket},
    token::{SECRET, Token, anywhere},
};

use crate::stage::{Stage, alone, payloads};

const EVERYTHING: &[&str] = &["subscribe", "publish"];

/// A page that may connect, with cookies.
const ORIGIN: &str = "https://app.example";

/// A valid token except for what a row changes.
fn good() -> Token {
    Token::new("alice").room("lobby", EVERYTHING)
}

#[tokio::test]
async fn each_invalid_token_is_refused_alike_and_counted_by_its_reason() -> Result<()> {
    let node = alone().await?;
    let valid = good().sign();
    let cut = valid.rsplit_once('.').context("a token has three parts")?.0.to_owned();
    let elsewhere = Token::new("mallory").room("lobby", EVERYTHING).sign();
    let grafted = format!("{cut}.{}", elsewhere.rsplit('.').next().context("a token has a signature")?);
    let rows: Vec<(&str, String)> = vec![
        ("malformed", "garbage".into()),
        ("malformed", cut),
        ("malformed", "a.b.c".into()),
        ("malformed", "two%20words".into()),
        ("too_long", "a".repeat(8 * 1024 + 1)),
        (
            "bad_signature",
            good().sign_with(Algorithm::HS256, "another secret, as long as it has to be at least"),
        ),
        ("bad_signature", grafted),
        ("wrong_algorithm", good().sign_with(Algorithm::HS384, SECRET)),
        ("wrong_algorithm", good().sign_with(Algorithm::HS512, SECRET)),
        ("expired", good().expires_in(-60).sign()),
        ("not_yet_valid", good().begins_in(600).sign()),
        ("invalid_time", good().without("exp").sign()),
        ("invalid_time", good().claim("exp", json!("tomorrow")).sign()),
        ("invalid_subject", good().without("sub").sign()),
        ("invalid_subject", good().claim("sub", json!("")).sign()),
        ("invalid_rooms", Token::new("alice").claim("rooms", json!(["lobby"])).sign()),
        ("unknown_operation", Token::new("alice").room("lobby", &["administer"]).sign()),
    ];
    let mut bodies = Vec::new();
    for (reason, token) in rows.iter().cloned().chain([("missing", String::new())]) {
        let query = if token.is_empty() { String::new() } else { format!("?token={token}") };
        let target = format!("/rooms/lobby{query}");
        for request in [
            Request::upgrade(&target),
            Request::get(&target).header("Accept", "text/event-stream"),
            Request::post(&target, "text/plain", *b"x"),
        ] {
            let before = node.samples().await?;
            let response = request.send(node.public).await?;
            ensure!(response.status == 401, "{reason}: {response:?}");
            ensure!(response.header("WWW-Authenticate").is_some_and(|value| value.starts_with("Bearer")));
            let grown = node.samples().await?.growth(
                &before,
                &[
                    "tidegate_auth_failures_total",
                    "tidegate_refusals_total",
                    "tidegate_connections_opened_total",
                ],
            );
            let expected = [
                (format!("tidegate_auth_failures_total{{reason=\"{reason}\"}}"), 1),
                ("tidegate_refusals_total{reason=\"unauthorized\"}".to_owned(), 1),
            ];
            ensure!(grown == expected.into(), "{reason}: {grown:?}");
            bodies.push(response.problem()?);
        }
    }
    bodies.dedup();
    ensure!(bodies.len() == 1, "every refusal reads the same: {bodies:?}");
    // An unsigned token may be reported as malformed or as using a wrong algorithm; it only has to be refused.
    let unsigned = Request::upgrade("/rooms/lobby").bearer(&good().unsigned()).send(node.public).await?;
    ensure!(unsigned.status == 401 && unsigned.problem()? == bodies[0], "{unsigned:?}");
    Ok(())
}

#[tokio::test]
async fn a_token_may_be_sent_in_each_way_but_only_in_one() -> Result<()> {
    let node = alone().await?;
    let token = good().sign();
    let bare = Request::upgrade("/rooms/lobby");
    let list = format!("tidegate, tidegate.bearer.{token}");
    for request in [
        bare.clone().bearer(&token),
        Request::upgrade(&format!("/rooms/lobby?token={token}")),
        bare.clone().header("Sec-WebSocket-Protocol", &list),
    ] {
        ensure!(request.send(node.public).await?.status == 101, "{request:?}");
    }
    let both = Request::upgrade(&format!("/rooms/lobby?token={token}")).bearer(&token);
    ensure!(both.send(node.public).await?.status == 401);
    Ok(())
}

#[tokio::test]
async fn grants_and_policies_decide_room_by_room() -> Result<()> {
    let node = Builder::new()
        .set(r#"rooms."news:*".grant"#, "subscribe")
        .set(r#"rooms."inbox:{sub}".grant"#, "subscribe,publish")
        .start()
        .await?;
    let alice = Token::new("alice")
        .room("chat:*", EVERYTHING)
        .room("listen", &["subscribe"])
        .room("speak", &["publish"])
        .room("neither", &["presence"])
        .sign();
    let nobody = Token::new("nobody").sign();
    let star = Token::new("*").sign();
    // Room, token, may subscribe, may publish.
    for (room, token, subscribe, publish) in [
        ("chat:1", &alice, true, true),
        ("chat:", &alice, true, true),
        ("chat", &alice, false, false),
        ("chatter:1", &alice, false, false),
        ("listen", &alice, true, false),
        ("listen2", &alice, false, false),
        ("speak", &alice, false, true),
        ("neither", &alice, false, false),
        ("elsewhere", &alice, false, false),
        ("news:world", &alice, true, false),
        ("news:world", &nobody, true, false),
        ("inbox:alice", &alice, true, true),
        ("inbox:alice", &nobody, false, false),
        ("inbox:nobody", &nobody, true, true),
        ("inbox:alice", &star, false, false),
        ("inbox:*", &star, false, false),
        ("inbox:", &nobody, false, false),
    ] {
        let path = format!("/rooms/{room}");
        let expected = |allowed: bool, status: u16| if allowed { status } else { 403 };
        let socket = Request::upgrade(&path).bearer(token).send(node.public).await?;
        ensure!(socket.status == expected(subscribe, 101), "{room}: {socket:?}");
        let head = Request::new("HEAD", &path).header("Accept", "text/event-stream").bearer(token);
        ensure!(head.send(node.public).await?.status == expected(subscribe, 200), "{room}");
        let post = Request::post(&path, "text/plain", *b"x").bearer(token).send(node.public).await?;
        ensure!(post.status == expected(publish, 202), "{room}: {post:?}");
        if !publish {
            post.problem()?;
        }
    }
    // All rooms of a stream must be granted.
    let rooms =
        |query: &str| Request::new("HEAD", &format!("/rooms?{query}")).header("Accept", "text/event-stream");
    ensure!(rooms("room=chat:1&room=listen").bearer(&alice).send(node.public).await?.status == 200);
    ensure!(rooms("room=chat:1&room=elsewhere").bearer(&alice).send(node.public).await?.status == 403);
    Ok(())
}

#[tokio::test]
async fn a_socket_without_a_grant_to_publish_is_closed_when_it_publishes() -> Result<()> {
    let node = alone().await?;
    let listener = Token::new("bob").room("lobby", &["subscribe"]).sign();
    let bystander = Client::websocket(&node.ws("lobby", &anywhere("alice"), ""), &[]).await?;
    let speaker = Client::websocket(&node.ws("lobby", &listener, ""), &[]).await?;
    speaker.send(Payload::text("not granted")).await?;
    ensure!(speaker.ended().await?.code() == Some(1008));
    node.post("lobby", &anywhere("alice"), "text/plain", b"granted").await?;
    ensure!(payloads(&bystander.heard(1).await?) == [Payload::text("granted")]);
    Ok(())
}

#[tokio::test]
async fn a_session_ends_when_its_token_expires() -> Result<()> {
    let node = Builder::new().set("auth.leeway", "0s").start().await?;
    let brief = || Token::new("alice").room("lobby", EVERYTHING).expires_in(2).sign();
    let lasting = Client::websocket(&node.ws("lobby", &anywhere("alice"), ""), &[]).await?;
    let socket = Client::websocket(&node.ws("lobby", &brief(), ""), &[]).await?;
    let stream = Client::events(&node.url("lobby", &brief(), "")).await?;
    let told = retries(&stream);
    let End::Closed { code, reason } = socket.ended().await? else { anyhow::bail!("a close frame") };
    ensure!(code == 1008 && reason.contains("expired"), "{code} {reason}");
    ensure!(matches!(stream.ended().await?, End::Closed { .. }), "the stream ends in order");
    ensure!(retries(&stream) == told, "a client with an expired token is not told to reconnect");
    node.post("lobby", &anywhere("alice"), "text/plain", b"after").await?;
    ensure!(payloads(&lasting.heard(1).await?) == [Payload::text("after")]);
    let closed = ["reason=\"token_expired\""];
    node.until_samples("two sessions closed as expired", |samples| {
        samples.sum("tidegate_connections_closed_total", &closed) == 2
    })
    .await?;
    Ok(())
}

/// Searches everything that nodes write during all of this for secrets.
#[tokio::test]
async fn no_secret_is_ever_written() -> Result<()> {
    const CANARY: &str = "c4n4ry-p4yl04d";
    let stage = Stage::set_with(|node| {
        node.set("log.filter", "trace").set("auth.cookie", "session").set("origins", ORIGIN)
    })
    .await?;
    let mut secrets = vec![SECRET.to_owned(), CANARY.to_owned()];
    let mut answers = Vec::new();
    for node in [&stage.a, &stage.b] {
        let valid = Token::new("alice").room("*", EVERYTHING).sign();
        let bad = [
            good().expires_in(-60).sign(),
            good().sign_with(Algorithm::HS256, "another secret, as long as it has to be at least"),
            good().unsigned(),
            "s3cr3tgarbage".to_owned(),
            "x".repeat(8 * 1024 + 1),
        ];
        let narrow = Token::new("bob").room("private", &["subscribe"]).sign();
        let brief = Token::new("carol").room("*", EVERYTHING).expires_in(1).sign();
        use_every_door(node, &valid, CANARY, &mut answers).await?;
        for token in bad.iter().chain([&narrow]) {
            answers.extend(refused_everywhere(node, token).await?);
        }
        let soon_gone = Client::websocket(&node.ws("lobby", &brief, ""), &[]).await?;
        soon_gone.ended().await?;
        secrets.extend(bad.into_iter().chain([valid, narrow, brief]));
    }
    for secret in secrets.clone() {
        // A JWT's claims and signature are as secret as the whole token.
        secrets.extend(secret.split('.').skip(1).filter(|part| part.len() > 12).map(str::to_owned));
    }
    let Stage { mut a, mut b, redis: _redis } = stage;
    let mut written = answers;
    for node in [&mut a, &mut b] {
        written.push(node.ask_ops("/metrics").await?.text());
        written.push(node.ask_ops("/readyz").await?.text());
        node.terminate()?;
        ensure!(node.exited().await?.success());
        let output = node.output();
        ensure!(output.contains("DEBUG") && output.contains("request refused"), "the log is at its loudest");
        written.push(output);
    }
    for text in &written {
        for secret in &secrets {
            if let Some(at) = text.find(secret.as_str()) {
                let line = text[..at].lines().count();
                anyhow::bail!("a secret of {} bytes is in line {line} of what was written", secret.len());
            }
        }
    }
    Ok(())
}

async fn use_every_door(node: &Node, token: &str, payload: &str, answers: &mut Vec<String>) -> Result<()> {
    let list = format!("tidegate, tidegate.bearer.{token}");
    let url = format!("ws://{}/rooms/lobby", node.public);
    let by_list = Client::websocket(&url, &[("Sec-WebSocket-Protocol", &list)]).await?;
    let by_header = Client::websocket(&url, &[("Authorization", &format!("Bearer {token}"))]).await?;
    let by_query = Client::events(&node.url("lobby", token, "")).await?;
    let cookie = format!("session={token}");
    let by_cookie = Client::websocket(&url, &[("Cookie", &cookie), ("Origin", ORIGIN)]).await?;
    by_list.send(Payload::text(payload)).await?;
    by_header.send(Payload::binary(payload)).await?;
    node.post("lobby", token, "application/json", format!("\"{payload}\"").as_bytes()).await?;
    by_query.heard(3).await?;
    by_cookie.heard(3).await?;
    // Payloads in requests that fail.
    for request in [
        Request::post("/rooms/lobby", "application/json", format!("{{{payload}")),
        Request::post("/rooms/lobby", "text/plain", [payload.as_bytes(), &[0xff]].concat()),
        Request::post("/rooms/lobby", "text/plain", payload.repeat(8 * 1024)),
    ] {
        let response = request.bearer(token).send(node.public).await?;
        ensure!(response.status >= 400);
        answers.push(whole(&response));
    }
    // A frame that violates the protocol, with the payload in it.
    let mut raw = RawSocket::connect(node.public, &format!("/rooms/lobby?token={token}")).await?;
    raw.send(&Frame { masked: false, ..Frame::text(payload) }).await?;
    ensure!(raw.close_code().await? == Some(1002));
    Ok(())
}

/// Tries a token that grants nothing, in every way, at every endpoint.
async fn refused_everywhere(node: &Node, token: &str) -> Result<Vec<String>> {
    let mut answers = Vec::new();
    let list = format!("tidegate, tidegate.bearer.{token}");
    let query = format!("/rooms/lobby?token={token}");
    let (cookie, twice) = (format!("session={token}"), format!("session={token}; session={token}"));
    let page = Request::upgrade("/rooms/lobby").header("Origin", ORIGIN);
    for request in [
        page.clone().header("Cookie", &cookie),
        page.clone().header("Cookie", &twice),
        page.header("Cookie", &twice).header("Cookie", &cookie),
        Request::upgrade("/rooms/lobby").header("Cookie", &cookie),
        Request::upgrade(&query),
        Request::upgrade("/rooms/lobby").bearer(token),
        Request::upgrade("/rooms/lobby").header("Sec-WebSocket-Protocol", &list),
        Request::get(&query).header("Accept", "text/event-stream"),
        Request::post(&query, "text/plain", *b"x"),
        Request::upgrade(&query).bearer(token),
        Request::get(&format!("/nowhere?token={token}")),
        Request::new("DELETE", &query),
        Request::get(&format!("/rooms/bad%20room?token={token}")),
    ] {
        let response = request.send(node.public).await?;
        ensure!(response.status >= 400, "{response:?}");
        answers.push(whole(&response));
    }
    Ok(answers)
}

/// The whole response, as text to search.
fn whole(response: &Response) -> String {
    format!("{response:?}\n{}", response.text())
}

fn retries(stream: &Client) -> usize {
    stream.now().retries.len()
}
