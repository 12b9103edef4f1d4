//! Reliable metrics: well-formed and exact.

use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use tidegate_tests::{
    client::Client,
    journal::Payload,
    raw::{Frame, RawSocket},
    token::anywhere,
};
use tokio::{io::AsyncWriteExt as _, process::Command};

use crate::stage::{Stage, alone};

#[tokio::test]
async fn promtool_finds_no_fault_in_a_node_under_load() -> Result<()> {
    let stage = Stage::set().await?;
    let token = anywhere("alice");
    let stream = Client::events(&stage.b.url("lobby", &token, "")).await?;
    let sockets = [
        Client::websocket(&stage.a.ws("lobby", &token, ""), &[]).await?,
        Client::websocket(&stage.b.ws("lobby", &token, ""), &[]).await?,
    ];
    for n in 0..200 {
        for socket in &sockets {
            socket.send(Payload::text(n.to_string())).await?;
        }
        if n == 100 {
            check_form(&stage.a.ask_ops("/metrics").await?.body).await?;
        }
    }
    stream.heard(400).await?;
    for node in [&stage.a, &stage.b] {
        check_form(&node.ask_ops("/metrics").await?.body).await?;
    }
    Ok(())
}

/// `promtool check metrics`: errors and warnings alike fail the test.
async fn check_form(metrics: &[u8]) -> Result<()> {
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("start promtool")?;
    let mut stdin = promtool.stdin.take().context("stdin is piped")?;
    stdin.write_all(metrics).await?;
    drop(stdin);
    let output = promtool.wait_with_output().await?;
    let said = [output.stdout, output.stderr].concat();
    ensure!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
    Ok(())
}

#[tokio::test]
async fn counts_are_exact() -> Result<()> {
    let stage = Stage::set().await?;
    let token = anywhere("alice");
    let speaker = Client::websocket(&stage.a.ws("lobby", &token, ""), &[]).await?;
    let quiet = Client::websocket(&stage.a.ws("lobby", &token, "echo=false"), &[]).await?;
    let stream = Client::events(&stage.a.url("lobby", &token, "")).await?;
    let elsewhere = Client::websocket(&stage.a.ws("elsewhere", &token, ""), &[]).await?;
    let far = Client::websocket(&stage.b.ws("lobby", &token, ""), &[]).await?;
    for _ in 0..10 {
        speaker.send(Payload::text("0123456789")).await?;
    }
    speaker.heard(10).await?;
    for _ in 0..5 {
        quiet.send(Payload::binary([0; 20])).await?;
    }
    speaker.heard(15).await?;
    stage.publish("lobby", b"from behind").await?;
    stage.publish("nobody", b"unheard").await?;
    stage.a.post("lobby", &token, "text/plain", b"posted").await?;
    for (client, count) in [(&speaker, 17), (&quiet, 12), (&stream, 17), (&far, 17)] {
        client.heard(count).await?;
    }

    let samples = stage
        .a
        .until_samples("settled counts", |samples| samples.sum("tidegate_deliveries_total", &[]) >= 46)
        .await?;
    let sum = |name: &str, labels: &[&str]| samples.sum(name, labels);
    for (name, labels, expected) in [
        ("tidegate_connections", &["protocol=\"plain\""][..], 3),
        ("tidegate_connections", &["protocol=\"sse\""], 1),
        ("tidegate_connections_opened_total", &["protocol=\"plain\""], 3),
        ("tidegate_connections_opened_total", &["protocol=\"sse\""], 1),
        ("tidegate_connections_closed_total", &[], 0),
        ("tidegate_handshakes_total", &["protocol=\"plain\"", "result=\"ok\""], 3),
        ("tidegate_handshakes_total", &["protocol=\"sse\"", "result=\"ok\""], 1),
        ("tidegate_handshake_seconds_count", &[], 4),
        ("tidegate_rooms", &[], 2),
        ("tidegate_subscriptions", &[], 4),
        // Ten texts and five binaries from sockets, and one POST.
        ("tidegate_messages_total", &["direction=\"in\""], 16),
        ("tidegate_payload_bytes_total", &["direction=\"in\""], 10 * 10 + 5 * 20 + 6),
        ("tidegate_publications_total", &[], 17),
        // Three members in the room, one of whom does not receive its own five.
        ("tidegate_deliveries_total", &[], 3 * 17 - 5),
        ("tidegate_messages_total", &["direction=\"out\""], 3 * 17 - 5),
        ("tidegate_slow_consumers_total", &[], 0),
        ("tidegate_gaps_total", &[], 0),
        ("tidegate_refusals_total", &[], 0),
        ("tidegate_auth_failures_total", &[], 0),
        ("tidegate_draining", &[], 0),
        ("tidegate_build_info", &[], 1),
    ] {
        ensure!(sum(name, labels) == expected, "{name} {labels:?}: {} != {expected}", sum(name, labels));
    }
    ensure!(sum("tidegate_fanout_seconds_count", &[]) >= 1);
    ensure!(samples.has("process_resident_memory_bytes") && samples.has("process_open_fds"));

    elsewhere.leave().await?;
    let samples = stage
        .a
        .until_samples("one session fewer", |samples| samples.sum("tidegate_connections", &[]) == 3)
        .await?;
    ensure!(samples.sum("tidegate_connections_closed_total", &["reason=\"client\""]) == 1);
    Ok(())
}

/// Bytes on the wire are counted as TCP carries them, to the byte.
#[tokio::test]
async fn network_byte_counts_match_the_wire() -> Result<()> {
    let node = alone().await?;
    let target = format!("/rooms/lobby?token={}", anywhere("alice"));
    let before = node.samples().await?;
    let mut socket = RawSocket::connect(node.public, &target).await?;
    for size in [0, 125, 126, 65_535, 65_536] {
        socket.send(&Frame::text(vec![b'x'; size])).await?;
        let echo = socket.receive().await?.context("an echo")?;
        ensure!(echo.payload.len() == size);
    }
    socket.send(&Frame { first: 0x88, ..Frame::text(1000_u16.to_be_bytes()) }).await?;
    ensure!(socket.close_code().await? == Some(1000));
    ensure!(socket.receive().await?.is_none());
    let (sent, received) = (u64::try_from(socket.sent)?, u64::try_from(socket.received)?);
    let grown = |samples: &tidegate_tests::samples::Samples, direction: &str| {
        let labels = [direction];
        samples.sum("tidegate_network_bytes_total", &labels)
            - before.sum("tidegate_network_bytes_total", &labels)
    };
    let samples = node
        .until_samples("all bytes counted", |samples| {
            grown(samples, "direction=\"in\"") >= sent && grown(samples, "direction=\"out\"") >= received
        })
        .await?;
    let counted = (grown(&samples, "direction=\"in\""), grown(&samples, "direction=\"out\""));
    ensure!(counted == (sent, received), "{counted:?} were counted, {:?} were carried", (sent, received));
    let payload = samples.sum("tidegate_payload_bytes_total", &["direction=\"in\""]);
    ensure!(payload == 125 + 126 + 65_535 + 65_536 && payload < sent, "{payload}");
    Ok(())
}
