//! Commands that no Centrifuge SDK sends: an error, or a close code, for each.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tidegate_tests::{
    node::Builder,
    raw::{Frame, RawSocket},
    token::anywhere,
    witness::Witness,
};

const PATH: &str = "/connection/websocket";

/// The answer to a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// The session is closed with this code.
    Closed(u16),
    /// An error reply; the session continues.
    Error(u64),
    /// A reply without an error.
    Done,
}

use Answer::{Closed, Done, Error};

/// A command within a session, and its answer.
type Row = (String, Answer);

#[tokio::test]
async fn each_invalid_command_has_its_answer() -> Result<()> {
    let node = Builder::new().set("limits.message_size", "256KiB").start().await?;
    let witness = Witness::of(&node).await?;
    let before = node.levels_of(1).await?;
    let rows = [no_commands(), wrong_ids(), methods(), fields()].concat();
    for (sent, expected) in &rows {
        let shown = sent.get(..80).unwrap_or(sent);
        let mut socket = connected(&node).await?;
        socket.send(&Frame::text(sent.as_str())).await?;
        let answer = answer(&mut socket).await.context(shown.to_owned())?;
        ensure!(answer == *expected, "{shown}: {expected:?} was expected, not {answer:?}");
        if !matches!(answer, Closed(_)) {
            socket.send(&Frame::text(r#"{"id":9,"ping":{}}"#)).await?;
            ensure!(matches!(self::answer(&mut socket).await?, Done), "{shown}: the session continues");
        }
    }
    // Before the connect command, including wrong types.
    for (sent, code) in [
        (r#"{"id":1,"connect":[]}"#, 3501),
        (r#"{"id":1,"connect":5}"#, 3501),
        (r#"{"id":1,"connect":{"token":5}}"#, 3501),
        (r#"{"id":1,"connect":{"token":null}}"#, 3501),
        (r#"{"id":1,"connect":{"token":["x"]}}"#, 3501),
        (r#"{"id":0,"connect":{}}"#, 3501),
        (r#"{"id":1,"ping":{}}"#, 3501),
        (r#"{"id":1,"conquer":{}}"#, 3501),
        ("{}\n{}", 0),
    ] {
        let mut socket = RawSocket::connect(node.public, PATH).await?;
        socket.send(&Frame::text(sent)).await?;
        if code == 0 {
            // A pong before the connect command has no effect.
            socket.send(&Frame { first: 0x88, ..Frame::text(1000_u16.to_be_bytes()) }).await?;
        }
        let closed = socket.close_code().await?;
        ensure!(closed == Some(if code == 0 { 1000 } else { code }), "{sent}: {closed:?}");
    }
    // Frames that are not text.
    for (first, payload, code) in
        [(0x82, &b"{\"id\":2,\"ping\":{}}"[..], 3501), (0x81, b"{\"id\":2,\"ping\":\"\xff\"}", 1007)]
    {
        let mut socket = connected(&node).await?;
        socket.send(&Frame { first, ..Frame::text(payload) }).await?;
        ensure!(answer(&mut socket).await? == Closed(code), "{payload:?}");
    }
    node.until_levels(&before).await?;
    ensure!(witness.finish().await? > 0);
    node.ensure_sound()
}

fn no_commands() -> Vec<Row> {
    let objects = r#"{"a":"#.repeat(40_000);
    let unclosed = format!(r#"{{"id":2,"rpc":{}"#, "[".repeat(100_000));
    vec![
        ("null".into(), Closed(3501)),
        ("true".into(), Closed(3501)),
        ("5".into(), Closed(3501)),
        ("\"ping\"".into(), Closed(3501)),
        ("[]".into(), Closed(3501)),
        ("[2,null,null,null,null,null,{},null,null,null,null,null,null]".into(), Closed(3501)),
        (r#"{"id":2,"ping":{}} x"#.into(), Closed(3501)),
        (r#"{"id":2,"ping":{}}{"id":3,"ping":{}}"#.into(), Closed(3501)),
        (r#"{"id":2,"ping":{}"#.into(), Closed(3501)),
        (r"{'id':2}".into(), Closed(3501)),
        (r"{id:2}".into(), Closed(3501)),
        ("{\"id\":2,\"ping\":{}}\0".into(), Closed(3501)),
        ("\u{feff}{\"id\":2,\"ping\":{}}".into(), Closed(3501)),
        (objects, Closed(3501)),
        (unclosed, Closed(3501)),
    ]
}

fn wrong_ids() -> Vec<Row> {
    vec![
        (r#"{"id":"2","ping":{}}"#.into(), Closed(3501)),
        (r#"{"id":2.5,"ping":{}}"#.into(), Closed(3501)),
        (r#"{"id":2.0,"ping":{}}"#.into(), Closed(3501)),
        (r#"{"id":-2,"ping":{}}"#.into(), Closed(3501)),
        (r#"{"id":4294967296,"ping":{}}"#.into(), Closed(3501)),
        (r#"{"id":99999999999999999999999,"ping":{}}"#.into(), Closed(3501)),
        (r#"{"id":1e400,"ping":{}}"#.into(), Closed(3501)),
        (r#"{"id":null,"ping":{}}"#.into(), Closed(3501)),
        (r#"{"id":[2],"ping":{}}"#.into(), Closed(3501)),
        (r#"{"id":{},"ping":{}}"#.into(), Closed(3501)),
        (r#"{"id":true,"ping":{}}"#.into(), Closed(3501)),
        (r#"{"id":0,"ping":{}}"#.into(), Closed(3501)),
        (r#"{"ping":{}}"#.into(), Closed(3501)),
        (r#"{"id":2,"id":3,"ping":{}}"#.into(), Closed(3501)),
        (r#"{"id":4294967295,"ping":{}}"#.into(), Done),
    ]
}

fn methods() -> Vec<Row> {
    let rpc = format!(r#"{{"id":2,"rpc":{}}}"#, deep(50_000));
    vec![
        (r#"{"id":2}"#.into(), Error(104)),
        (r#"{"id":2,"conquer":{}}"#.into(), Error(104)),
        (r#"{"id":2,"Ping":{}}"#.into(), Error(104)),
        (r#"{"id":2,"":{}}"#.into(), Error(104)),
        (r#"{"id":2,"method":1,"params":{}}"#.into(), Error(104)),
        (r#"{"id":2,"ping":null}"#.into(), Error(104)),
        (r#"{"id":2,"subscribe":{"channel":"a"},"publish":{"channel":"a","data":1}}"#.into(), Error(107)),
        (r#"{"id":2,"ping":{},"rpc":{}}"#.into(), Error(107)),
        (r#"{"id":2,"ping":{},"ping":{}}"#.into(), Error(107)),
        (r#"{"id":2,"connect":{}}"#.into(), Closed(3501)),
        (r#"{"send":{}}"#.into(), Closed(3508)),
        (r#"{"id":2,"presence":{"channel":"a"}}"#.into(), Error(108)),
        (r#"{"id":2,"presence_stats":[]}"#.into(), Error(108)),
        (r#"{"id":2,"sub_refresh":""}"#.into(), Error(108)),
        (rpc, Error(108)),
    ]
}

fn fields() -> Vec<Row> {
    let publish = format!(r#"{{"id":2,"publish":{{"channel":"deep","data":{}}}}}"#, deep(50_000));
    let long = format!(r#"{{"id":2,"subscribe":{{"channel":"{}"}}}}"#, "a".repeat(201));
    vec![
        (r#"{"id":2,"subscribe":5}"#.into(), Error(107)),
        (r#"{"id":2,"subscribe":"a"}"#.into(), Error(107)),
        (r#"{"id":2,"subscribe":["a"]}"#.into(), Error(107)),
        (r#"{"id":2,"subscribe":true}"#.into(), Error(107)),
        (r#"{"id":2,"subscribe":{}}"#.into(), Error(107)),
        (r#"{"id":2,"subscribe":{"channel":null}}"#.into(), Error(107)),
        (r#"{"id":2,"subscribe":{"channel":5}}"#.into(), Error(107)),
        (r#"{"id":2,"subscribe":{"channel":["a"]}}"#.into(), Error(107)),
        (r#"{"id":2,"subscribe":{"channel":{"a":1}}}"#.into(), Error(107)),
        (r#"{"id":2,"subscribe":{"channel":"\ud800"}}"#.into(), Error(107)),
        (r#"{"id":2,"subscribe":{"channel":"a","channel":"b"}}"#.into(), Error(107)),
        (r#"{"id":2,"subscribe":{"channel":""}}"#.into(), Error(107)),
        (r#"{"id":2,"subscribe":{"channel":"a b"}}"#.into(), Error(107)),
        (r#"{"id":2,"subscribe":{"channel":"a\u0000"}}"#.into(), Error(107)),
        (long, Error(107)),
        (r#"{"id":2,"unsubscribe":[]}"#.into(), Error(107)),
        (r#"{"id":2,"history":1}"#.into(), Error(107)),
        (r#"{"id":2,"unsubscribe":{"channel":7}}"#.into(), Error(107)),
        (r#"{"id":2,"unsubscribe":{"channel":"{}"}}"#.into(), Error(107)),
        (r#"{"id":2,"unsubscribe":{"channel":"never"}}"#.into(), Done),
        (r#"{"id":2,"publish":["a",1]}"#.into(), Error(107)),
        (r#"{"id":2,"publish":{"channel":"a"}}"#.into(), Error(107)),
        (r#"{"id":2,"publish":{"data":1}}"#.into(), Error(107)),
        (r#"{"id":2,"publish":{"channel":9,"data":1}}"#.into(), Error(107)),
        (r#"{"id":2,"publish":{"channel":"a","data":1,"data":2}}"#.into(), Error(107)),
        (r#"{"id":2,"publish":{"channel":"a","data":nan}}"#.into(), Closed(3501)),
        (r#"{"id":2,"publish":{"channel":"a\n","data":1}}"#.into(), Error(107)),
        (r#"{"id":2,"publish":{"channel":"a","data":null}}"#.into(), Done),
        (publish, Error(107)),
        (r#"{"id":2,"refresh":{}}"#.into(), Error(107)),
        (r#"{"id":2,"refresh":{"token":5}}"#.into(), Error(107)),
        (r#"{"id":2,"refresh":["x"]}"#.into(), Error(107)),
        (r#"{"id":2,"refresh":{"token":""}}"#.into(), Closed(3500)),
        (r#"{"id":2,"refresh":{"token":"x"}}"#.into(), Closed(3500)),
    ]
}

fn deep(n: usize) -> String {
    "[".repeat(n) + &"]".repeat(n)
}

/// Thousands of commands in a frame are answered one by one, in order.
#[tokio::test]
async fn ten_thousand_commands_in_a_frame() -> Result<()> {
    const COMMANDS: u64 = 10_000;
    let node = Builder::new().set("limits.message_size", "1MiB").start().await?;
    let witness = Witness::of(&node).await?;
    let before = node.levels_of(1).await?;
    let mut socket = connected(&node).await?;
    let lines: Vec<_> = (2..COMMANDS + 2).map(|id| format!(r#"{{"id":{id},"ping":{{}}}}"#)).collect();
    socket.send(&Frame::text(lines.join("\r\n\n"))).await?;
    for id in 2..COMMANDS + 2 {
        let reply = reply(&mut socket).await?;
        ensure!(reply.get("id").and_then(Value::as_u64) == Some(id), "{id} was expected: {reply}");
    }
    drop(socket);

    // Subscribing and unsubscribing repeatedly: the last command wins.
    let mut socket = connected(&node).await?;
    let (mut id, mut lines) = (1, Vec::new());
    for n in 0..2_000 {
        for method in ["subscribe", "unsubscribe"] {
            id += 1;
            lines.push(format!(r#"{{"id":{id},"{method}":{{"channel":"room-{n}"}}}}"#));
        }
    }
    lines.push(format!(r#"{{"id":{},"subscribe":{{"channel":"room-0"}}}}"#, id + 1));
    socket.send(&Frame::text(lines.join("\n"))).await?;
    while reply(&mut socket).await?.get("id").and_then(Value::as_u64) != Some(id + 1) {}
    node.until_samples("one room", |samples| {
        (samples.sum("tidegate_rooms", &[]), samples.sum("tidegate_subscriptions", &[])) == (2, 2)
    })
    .await?;
    drop(socket);
    node.until_levels(&before).await?;
    ensure!(witness.finish().await? > 0);
    node.ensure_sound()
}

/// A session after its connect command.
async fn connected(node: &tidegate_tests::node::Node) -> Result<RawSocket> {
    let mut socket = RawSocket::connect(node.public, PATH).await?;
    let connect = format!(r#"{{"id":1,"connect":{{"token":"{}"}}}}"#, anywhere("alice"));
    socket.send(&Frame::text(connect)).await?;
    ensure!(reply(&mut socket).await?.get("connect").is_some());
    Ok(socket)
}

async fn answer(socket: &mut RawSocket) -> Result<Answer> {
    let frame = socket.receive().await?.context("it is answered")?;
    if let Some(code) = frame.close_code() {
        return Ok(Closed(code));
    }
    let reply: Value = serde_json::from_slice(&frame.payload)?;
    Ok(reply.pointer("/error/code").and_then(Value::as_u64).map_or(Done, Error))
}

async fn reply(socket: &mut RawSocket) -> Result<Value> {
    let frame = socket.receive().await?.context("it is answered")?;
    if frame.first != 0x81 {
        bail!("a reply, not {frame:?}");
    }
    Ok(serde_json::from_slice(&frame.payload)?)
}
