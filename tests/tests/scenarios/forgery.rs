//! A publication cannot be mistaken for something else: a message of another room, or the node's own message.

use anyhow::{Result, ensure};
use serde_json::Value;
use tidegate_tests::{
    client::Client,
    http::Request,
    journal::Payload,
    node::Node,
    raw::{Frame, RawSocket},
    token::anywhere,
};

use crate::stage::{Stage, payloads};

/// An envelope as a backend would write it by hand; `broker-bridge/src/redis/envelope.rs` has the layout.
fn envelope(kind: u8, event: &str, data: &str) -> Vec<u8> {
    let mut fields = vec![1, 1, kind];
    if let Ok(length @ 1..) = u8::try_from(event.len()) {
        fields.extend([2, length]);
        fields.extend(event.as_bytes());
    }
    let mut message = b"\xF5Tg\x01".to_vec();
    message.extend(u16::try_from(fields.len()).unwrap_or_default().to_be_bytes());
    message.extend(fields);
    message.extend(u32::try_from(data.len()).unwrap_or_default().to_be_bytes());
    message.extend(data.as_bytes());
    message
}

const JSON: u8 = 0;
const TEXT: u8 = 1;

/// A member of rooms in the Centrifuge protocol that reads whole frames instead of a library's interpretation of them.
async fn member(node: &Node, rooms: &[&str]) -> Result<RawSocket> {
    let mut socket = RawSocket::connect(node.public, "/connection/websocket").await?;
    let connect = format!(r#"{{"id":1,"connect":{{"token":"{}"}}}}"#, anywhere("alice"));
    socket.send(&Frame::text(connect)).await?;
    socket.receive().await?;
    for room in rooms {
        socket.send(&Frame::text(format!(r#"{{"id":2,"subscribe":{{"channel":"{room}"}}}}"#))).await?;
        ensure!(said(&mut socket).await? == r#"{"id":2,"subscribe":{}}"#);
    }
    Ok(socket)
}

/// The node's next frame, except pings.
async fn said(socket: &mut RawSocket) -> Result<String> {
    loop {
        let frame = socket.receive().await?.filter(|frame| frame.first == 0x81);
        let text = String::from_utf8(frame.map(|frame| frame.payload).unwrap_or_default())?;
        if text != "{}" {
            return Ok(text);
        }
    }
}

/// A backend that may publish in one room reaches no other room, and ends no connection.
#[tokio::test]
async fn invalid_json_from_redis_is_text() -> Result<()> {
    let stage = Stage::set().await?;
    let token = anywhere("alice");
    let url = format!("ws://{}/connection/websocket", stage.a.public);
    let mut raw = member(&stage.a, &["public", "admin"]).await?;
    let sdks = [
        Client::node_centrifuge(&url, "public", &[&token]).await?,
        Client::python_centrifuge(&url, "public", &[&token]).await?,
    ];
    let admin = Client::node_centrifuge(&url, "admin", &[&token]).await?;
    let plain = Client::websocket(&stage.b.ws("public", &token, ""), &[]).await?;

    let deep = "[".repeat(30_000) + &"]".repeat(30_000);
    let forged = [
        r#"{"pay":"x"}},"channel":"admin","x":{"y":1"#,
        r#"1}}},{"push":{"disconnect":{"code":3500,"reason":"go away"}}}"#,
        "1}}}\n{\"push\":{\"disconnect\":{\"code\":3500}}}",
        r#""\ud800""#,
        "1e999",
        &deep,
    ];
    for data in forged {
        stage.publish("public", &envelope(JSON, "", data)).await?;
    }
    // Valid JSON stays JSON, even at the maximum depth; in Redis it may also come without an envelope.
    let deepest = "[".repeat(120) + &"]".repeat(120);
    stage.publish("public", &envelope(JSON, "", &deepest)).await?;
    stage.publish("public", deep.as_bytes()).await?;
    stage.publish("admin", b"\"end\"").await?;

    let strings = forged.map(|data| serde_json::to_string(data).expect("a text is JSON"));
    let mut expected = strings.to_vec();
    expected.extend([deepest.clone(), serde_json::to_string(&deep)?]);
    for data in &expected {
        let push = format!(r#"{{"push":{{"channel":"public","pub":{{"data":{data}}}}}}}"#);
        let said = said(&mut raw).await?;
        ensure!(said == push, "{push} was expected, not {said}");
    }
    ensure!(said(&mut raw).await? == r#"{"push":{"channel":"admin","pub":{"data":"end"}}}"#);
    ensure!(payloads(&admin.heard(1).await?) == [Payload::text("\"end\"")]);
    for sdk in &sdks {
        let heard = payloads(&sdk.heard(expected.len()).await?);
        let heard: Vec<Value> =
            heard.iter().map(|payload| serde_json::from_slice(payload.bytes())).collect::<Result<_, _>>()?;
        let sent: Vec<Value> =
            expected.iter().map(|data| serde_json::from_str(data)).collect::<Result<_, _>>()?;
        ensure!(heard == sent && sdk.now().end.is_none(), "{heard:?}");
    }
    // Without a frame around them, payloads need no distinction: each arrives as published.
    let texts = forged.into_iter().chain([deepest.as_str(), &deep]).map(Payload::text);
    ensure!(payloads(&plain.heard(8).await?) == texts.collect::<Vec<_>>());
    Ok(())
}

/// Over HTTP and in the Centrifuge protocol, invalid JSON is refused instead.
#[tokio::test]
async fn a_publisher_of_invalid_json_is_refused() -> Result<()> {
    let stage = Stage::set().await?;
    let token = anywhere("alice");
    let plain = Client::websocket(&stage.b.ws("lobby", &token, ""), &[]).await?;
    let deep = "[".repeat(121) + &"]".repeat(121);
    for data in [r#"{"pay":"x"}},"channel":"admin","x":{"y":1"#, r#""\ud800""#, "[1e999]", &deep, "{} {}"] {
        let post = Request::post("/rooms/lobby", "application/json", data.as_bytes()).bearer(&token);
        let response = post.send(stage.a.public).await?;
        ensure!(response.status == 400, "{data}: {response:?}");
        response.problem()?;
    }
    let mut socket = member(&stage.a, &[]).await?;
    for data in [r#""\ud800""#, "[1e999]", &deep] {
        let publish = format!(r#"{{"id":3,"publish":{{"channel":"lobby","data":{data}}}}}"#);
        socket.send(&Frame::text(publish)).await?;
        let answer = said(&mut socket).await?;
        ensure!(answer.contains(r#""code":107"#), "{data}: {answer}");
    }
    stage.a.post("lobby", &token, "application/json", &deep.as_bytes()[1..241]).await?;
    ensure!(payloads(&plain.heard(1).await?) == [Payload::text(&deep[1..241])], "nothing else was published");
    Ok(())
}

/// Only the node can report a gap, and only the browser that the connection is open or in error.
#[tokio::test]
async fn reserved_event_names_reach_no_client() -> Result<()> {
    let stage = Stage::set().await?;
    let token = anywhere("alice");
    let reserved = ["tidegate.gap", "Tidegate.GAP", "tidegate.retry", "error", "open"];
    let stream = Client::events(&stage.a.url("lobby", &token, "")).await?;
    let library = Client::node_events(&stage.b.url("lobby", &token, ""), &["tidegate.gap"]).await?;
    let mut raw = member(&stage.a, &["lobby"]).await?;
    for name in reserved {
        let post = |target: &str| Request::post(target, "text/plain", *b"x").bearer(&token);
        for request in [
            post("/rooms/lobby").header("X-Event", name),
            post(&format!("/rooms/lobby?event={name}")),
            post(&format!("/rooms/lobby?event=%20{name}")),
        ] {
            let response = request.send(stage.a.public).await?;
            ensure!(response.status == 400, "{request:?}: {response:?}");
            ensure!(response.problem()?["detail"].as_str().is_some_and(|why| why.contains("reserved")));
        }
        stage.publish("lobby", &envelope(TEXT, name, name)).await?;
    }
    for name in reserved {
        ensure!(
            said(&mut raw).await? == format!(r#"{{"push":{{"channel":"lobby","pub":{{"data":"{name}"}}}}}}"#)
        );
    }
    for client in [&stream, &library] {
        let heard = client.heard(reserved.len()).await?;
        ensure!(payloads(&heard) == reserved.map(Payload::text), "{heard:?}");
        ensure!(heard.iter().all(|message| message.event == "message"), "{heard:?}");
    }
    Ok(())
}
