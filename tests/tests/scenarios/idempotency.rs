//! Publishing into rooms with a history: positions, and publications that are repeated.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tidegate_tests::{
    client::Client,
    http::{Request, Response},
    journal::Payload,
    node::{Builder, Node},
    token::anywhere,
};

use crate::stage::{Stage, payloads};

const SIZE: &str = r#"rooms."chat:*".history.size"#;
const KEY: &str = "Idempotency-Key";

async fn recording() -> Result<Node> {
    Builder::new().set(SIZE, "2").start().await
}

fn post(room: &str, user: &str, text: &str) -> Request {
    Request::post(&format!("/rooms/{room}"), "text/plain", text).bearer(&anywhere(user))
}

/// The epoch and the offset in the answer of a recorded publication, and whether it is a duplicate.
fn place(response: &Response) -> Result<(u64, u64, bool)> {
    ensure!(response.status == 202, "{response:?}");
    ensure!(response.header("Content-Type") == Some("application/json"), "{response:?}");
    let body = response.json()?;
    let id = body.get("id").and_then(Value::as_str).context("an id")?;
    let duplicate = body.get("duplicate").is_some();
    let expected = if duplicate { json!({"id": id, "duplicate": true}) } else { json!({"id": id}) };
    ensure!(body == expected, "{body}");
    let (epoch, offset) = id.split_once('-').context("an epoch and an offset")?;
    Ok((epoch.parse()?, offset.parse()?, duplicate))
}

fn detail(problem: &Value) -> Option<&str> {
    problem.get("detail").and_then(Value::as_str)
}

/// The offsets count everything that anybody publishes in the room, whether or not it is still kept.
#[tokio::test]
async fn a_recorded_publication_is_answered_with_its_position() -> Result<()> {
    let node = recording().await?;
    let token = anywhere("alice");
    let socket = Client::websocket(&node.ws("chat:a", &token, ""), &[]).await?;
    let centrifuge = format!("ws://{}/connection/websocket", node.public);
    let centrifuge = Client::python_centrifuge(&centrifuge, "chat:a", &[&token]).await?;

    let first = place(&post("chat:a", "backend", "1").send(node.public).await?)?;
    ensure!(first.1 == 1 && !first.2, "{first:?}");
    socket.send(Payload::text("2")).await?;
    socket.hears(&Payload::text("2")).await?;
    centrifuge.send(Payload::text("\"3\"")).await?;
    socket.hears(&Payload::text("\"3\"")).await?;
    ensure!(place(&post("chat:a", "backend", "4").send(node.public).await?)? == (first.0, 4, false));
    ensure!(place(&post("chat:a", "backend", "5").send(node.public).await?)? == (first.0, 5, false));
    // Each room counts for itself.
    ensure!(place(&post("chat:b", "backend", "x").send(node.public).await?)?.1 == 1);

    let heard = payloads(&socket.heard(5).await?);
    ensure!(heard == ["1", "2", "\"3\"", "4", "5"].map(Payload::text), "{heard:?}");

    let live = post("lobby", "backend", "x").send(node.public).await?;
    ensure!(live.status == 202 && live.body.is_empty() && live.header("Content-Type").is_none(), "{live:?}");
    Ok(())
}

/// The same key is the same publication, on whichever node, but only for one user and in one room.
#[tokio::test]
async fn a_repeated_key_is_delivered_once() -> Result<()> {
    let stage = Stage::set_with(|node| node.set(SIZE, "100")).await?;
    let listener = Client::events(&stage.b.url("chat:a", &anywhere("listener"), "")).await?;
    let order = |room: &str, user: &str, text: &str| post(room, user, text).header(KEY, "\"order-1\"");

    let (epoch, offset, duplicate) = place(&order("chat:a", "alice", "first").send(stage.a.public).await?)?;
    ensure!((offset, duplicate) == (1, false));
    for node in [&stage.a, &stage.b] {
        let repeated = place(&order("chat:a", "alice", "repeated").send(node.public).await?)?;
        ensure!(repeated == (epoch, 1, true), "{repeated:?}");
    }
    let bare = post("chat:a", "alice", "without quotes").header(KEY, "order-1").send(stage.a.public).await?;
    ensure!(place(&bare)? == (epoch, 1, true));

    ensure!(place(&order("chat:a", "bob", "another user").send(stage.a.public).await?)? == (epoch, 2, false));
    let other = post("chat:a", "alice", "another key").header(KEY, "order-2").send(stage.b.public).await?;
    ensure!(place(&other)? == (epoch, 3, false));
    let elsewhere = place(&order("chat:b", "alice", "another room").send(stage.a.public).await?)?;
    ensure!((elsewhere.1, elsewhere.2) == (1, false), "{elsewhere:?}");
    ensure!(place(&post("chat:a", "alice", "end").send(stage.a.public).await?)? == (epoch, 4, false));

    let heard = payloads(&listener.heard(4).await?);
    ensure!(heard == ["first", "another user", "another key", "end"].map(Payload::text), "{heard:?}");
    Ok(())
}

#[tokio::test]
async fn a_key_that_could_not_be_recognized_is_refused() -> Result<()> {
    let node = recording().await?;
    let listener = Client::events(&node.url("chat:a", &anywhere("alice"), "")).await?;
    for key in ["", "a b", &"x".repeat(65), "\"open", "\"a\";b", "a\u{e9}"] {
        let response = post("chat:a", "alice", "wrong").header(KEY, key).send(node.public).await?;
        ensure!(response.status == 400, "{key:?}: {response:?}");
        let problem = response.problem()?;
        ensure!(detail(&problem).is_some_and(|it| it.contains("1 to 64")), "{key:?}: {problem}");
    }
    let response = post("lobby", "alice", "not kept").header(KEY, "order-1").send(node.public).await?;
    ensure!(response.status == 400, "{response:?}");
    let problem = response.problem()?;
    ensure!(detail(&problem).is_some_and(|it| it.contains("keeps no history")), "{problem}");

    // The longest key is not refused, and nothing before it was published.
    let longest = post("chat:a", "alice", "end").header(KEY, &"x".repeat(64)).send(node.public).await?;
    ensure!(place(&longest)?.1 == 1);
    ensure!(payloads(&listener.heard(1).await?) == [Payload::text("end")]);
    Ok(())
}
