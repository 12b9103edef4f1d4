//! The features of a room's URL: echo, events, several rooms, every payload.

use anyhow::{Result, ensure};
use tidegate_tests::{
    client::Client,
    http::Request,
    journal::{Message, Payload},
    token::anywhere,
};

use crate::stage::{Stage, alone, as_event_data, payloads};

#[tokio::test]
async fn a_sender_without_echo_receives_all_other_messages() -> Result<()> {
    let stage = Stage::set().await?;
    let token = anywhere("alice");
    let quiet = Client::websocket(&stage.a.ws("lobby", &token, "echo=false"), &[]).await?;
    let near = Client::websocket(&stage.a.ws("lobby", &token, "echo=true"), &[]).await?;
    let far = Client::websocket(&stage.b.ws("lobby", &token, ""), &[]).await?;
    let stream = Client::events(&stage.a.url("lobby", &token, "")).await?;

    let [own, theirs] = [Payload::text("mine"), Payload::binary([1, 2, 3])];
    quiet.send(own.clone()).await?;
    near.hears(&own).await?;
    far.send(theirs.clone()).await?;

    let both = [own, theirs.clone()];
    ensure!(payloads(&near.heard(2).await?) == both);
    ensure!(payloads(&far.heard(2).await?) == both);
    ensure!(payloads(&stream.heard(2).await?) == as_event_data(&both));
    ensure!(payloads(&quiet.heard(1).await?) == [theirs]);
    Ok(())
}

#[tokio::test]
async fn a_post_names_its_event() -> Result<()> {
    let stage = Stage::set().await?;
    let token = anywhere("backend");
    let stream = Client::events(&stage.a.url("lobby", &token, "")).await?;
    let library = Client::node_events(&stage.b.url("lobby", &token, ""), &["price", "été 日本"]).await?;
    let socket = Client::websocket(&stage.b.ws("lobby", &token, ""), &[]).await?;

    let post = |target: &str| Request::post(target, "application/json", *b"{\"eur\":1}").bearer(&token);
    for request in [
        post("/rooms/lobby?event=price"),
        post("/rooms/lobby").header("X-Event", "price"),
        post("/rooms/lobby?event=%C3%A9t%C3%A9%20%E6%97%A5%E6%9C%AC"),
        post("/rooms/lobby"),
    ] {
        let response = request.send(stage.a.public).await?;
        ensure!(response.status == 202 && response.body.is_empty(), "{response:?}");
    }
    let data = Payload::text("{\"eur\":1}");
    let named = |event: &str| Message { event: event.to_owned(), ..Message::plain(data.clone()) };
    let expected = [named("price"), named("price"), named("été 日本"), named("message")];
    ensure!(stream.heard(4).await? == expected);
    ensure!(library.heard(4).await? == expected);
    ensure!(payloads(&socket.heard(4).await?) == vec![data; 4]);

    for (request, status) in [
        (post("/rooms/lobby?event="), 400),
        (post("/rooms/lobby?event=a%0Ab"), 400),
        (post(&format!("/rooms/lobby?event={}", "e".repeat(65))), 400),
        (post("/rooms/lobby?event=a").header("X-Event", "b"), 400),
    ] {
        let response = request.send(stage.a.public).await?;
        ensure!(response.status == status, "{request:?}: {response:?}");
        response.problem()?;
    }
    Ok(())
}

#[tokio::test]
async fn one_stream_follows_several_rooms() -> Result<()> {
    let stage = Stage::set().await?;
    let token = anywhere("alice");
    let url = format!("http://{}/rooms?room=a&room=b%2Fc&room=a&token={token}", stage.a.public);
    let stream = Client::events(&url).await?;
    let rooms = ["a", "b%2Fc", "b%2Fc", "a"];
    for (n, room) in rooms.iter().enumerate() {
        stage.b.post(room, &token, "text/plain", n.to_string().as_bytes()).await?;
    }
    stage.b.post("elsewhere", &token, "text/plain", b"not for this stream").await?;
    stage.b.post("a", &token, "text/plain", b"end").await?;

    // Order holds within a room, not between rooms.
    let heard = stream.heard(5).await?;
    let of = |room: &str| -> Vec<_> {
        heard.iter().filter(|message| message.id == room).map(|message| message.payload.clone()).collect()
    };
    ensure!(of("a") == [Payload::text("0"), Payload::text("3"), Payload::text("end")], "{heard:?}");
    ensure!(of("b%2Fc") == [Payload::text("1"), Payload::text("2")], "{heard:?}");
    Ok(())
}

#[tokio::test]
async fn every_payload_arrives_byte_for_byte() -> Result<()> {
    let stage = Stage::set().await?;
    let token = anywhere("alice");
    let sender = Client::websocket(&stage.a.ws("bytes", &token, ""), &[]).await?;
    let library = Client::python_websocket(&stage.b.ws("bytes", &token, "")).await?;
    let stream = Client::events(&stage.b.url("bytes", &token, "")).await?;
    let every_byte: Vec<u8> = (0..=255).collect();
    let sent = [
        Payload::text("\0"),
        Payload::text("\u{feff}a byte order mark is a character"),
        Payload::text("\u{7f}\u{80}\u{7ff}\u{800}\u{fffd}\u{ffff}\u{10000}\u{10ffff}"),
        Payload::text("e\u{301} is not \u{e9}"),
        Payload::text(" leading and trailing "),
        Payload::text(": not a comment\nevent: not an event\n\ndata: nor data"),
        Payload::text("\n"),
        Payload::text("\r\n\r"),
        Payload::binary(every_byte),
        Payload::binary([0xc0, 0x80, 0xed, 0xa0, 0x80, 0xf5]),
        Payload::binary(*b"text in a binary frame stays binary"),
        Payload::binary([]),
        Payload::text(""),
        Payload::text("x".repeat(125)),
        Payload::text("x".repeat(126)),
        Payload::text("x".repeat(65_535)),
        Payload::binary(vec![7; 65_536]),
    ];
    for payload in &sent {
        sender.send(payload.clone()).await?;
    }
    ensure!(payloads(&sender.heard(sent.len()).await?) == sent);
    ensure!(payloads(&library.heard(sent.len()).await?) == sent);
    ensure!(payloads(&stream.heard(sent.len()).await?) == as_event_data(&sent));
    Ok(())
}

/// The content type decides the kind of a POST; without one, the body does.
#[tokio::test]
async fn the_content_type_decides_the_kind_of_a_post() -> Result<()> {
    let node = alone().await?;
    let token = anywhere("backend");
    let socket = Client::websocket(&node.ws("kinds", &token, ""), &[]).await?;
    let typed =
        |content_type: &str, body: &[u8]| Request::post("/rooms/kinds", content_type, body).bearer(&token);
    let untyped = |body: &[u8]| Request::new("POST", "/rooms/kinds").body(body).bearer(&token);
    let accepted = [
        (typed("application/json", b" [1, 2]\n"), Payload::text(" [1, 2]\n")),
        (typed("application/vnd.x+json; charset=utf-8", b"null"), Payload::text("null")),
        (typed("text/plain", b"{not json"), Payload::text("{not json")),
        (typed("text/html; charset=\"UTF-8\"", "é".as_bytes()), Payload::text("é")),
        (typed("application/octet-stream", b"bytes"), Payload::binary(*b"bytes")),
        (typed("image/png", b"\x89PNG"), Payload::binary(*b"\x89PNG")),
        (untyped(b"looks like text"), Payload::text("looks like text")),
        (untyped(b"\xff"), Payload::binary([0xff])),
        (typed("application/x-www-form-urlencoded", b"curl -d"), Payload::text("curl -d")),
    ];
    for (request, _) in &accepted {
        let response = request.send(node.public).await?;
        ensure!(response.status == 202, "{request:?}: {response:?}");
    }
    let refused = [
        (typed("application/json", b"{"), 400),
        (typed("application/json", b""), 400),
        (typed("application/json", b"\"\xff\""), 400),
        (typed("text/plain", b"\xff"), 400),
        (typed("text/plain; charset=latin1", b"x"), 415),
        (typed("text/plain", b"x").header("Content-Encoding", "gzip"), 415),
        (typed("text/plain", &vec![b'x'; 65_537]), 413),
    ];
    for (request, status) in &refused {
        let response = request.send(node.public).await?;
        ensure!(response.status == *status, "{status} was expected: {response:?}");
        response.problem()?;
    }
    node.post("kinds", &token, "text/plain", b"the end").await?;
    let expected = accepted.into_iter().map(|(_, payload)| payload).chain([Payload::text("the end")]);
    ensure!(
        payloads(&socket.hears(&Payload::text("the end")).await?.messages) == expected.collect::<Vec<_>>()
    );
    Ok(())
}
