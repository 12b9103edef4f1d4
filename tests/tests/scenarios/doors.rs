//! Every door of the public listener: which answer each request gets.

use anyhow::{Context as _, Result, ensure};
use tidegate_tests::{
    http::{Request, Response},
    node::Builder,
    token::anywhere,
};

use crate::stage::alone;

/// A request, the status it must get, and headers that must be there with these values.
type Row<'a> = (Request, u16, &'a [(&'a str, &'a str)]);

const ONE: &str = "GET, HEAD, POST, OPTIONS";
const SEVERAL: &str = "GET, HEAD, OPTIONS";

#[tokio::test]
async fn each_request_gets_its_answer() -> Result<()> {
    let node = alone().await?;
    let token = anywhere("alice");
    let get = |target: &str| Request::get(target).bearer(&token);
    let sse = |target: &str| get(target).header("Accept", "text/event-stream");
    let method = |method: &str, target: &str| Request::new(method, target).bearer(&token);
    let upgrade = |target: &str| Request::upgrade(target).bearer(&token);
    let rows: Vec<Row<'_>> = vec![
        // Paths.
        (get("/"), 404, &[]),
        (get("/index.html"), 404, &[]),
        (get("/room/lobby"), 404, &[]),
        (get("/rooms/a/b"), 404, &[]),
        (get("/metrics"), 404, &[]),
        (get("/readyz"), 404, &[]),
        (get("/v1/publish"), 404, &[]),
        (method("POST", "/nowhere"), 404, &[]),
        // Methods.
        (method("PUT", "/rooms/lobby"), 405, &[("Allow", ONE)]),
        (method("DELETE", "/rooms/lobby"), 405, &[("Allow", ONE)]),
        (method("PATCH", "/rooms/lobby"), 405, &[("Allow", ONE)]),
        (method("BREW", "/rooms/lobby"), 405, &[("Allow", ONE)]),
        (method("POST", "/rooms?room=a"), 405, &[("Allow", SEVERAL)]),
        (method("OPTIONS", "/rooms/lobby"), 204, &[("Allow", ONE)]),
        (method("OPTIONS", "/rooms?room=a"), 204, &[("Allow", SEVERAL)]),
        (
            method("HEAD", "/rooms/lobby").header("Accept", "text/event-stream"),
            200,
            &[("Content-Type", "text/event-stream"), ("Cache-Control", "no-store")],
        ),
        (Request::new("HEAD", "/rooms/lobby"), 401, &[]),
        // What is accepted.
        (get("/rooms/lobby").header("Accept", "text/html"), 406, &[]),
        (get("/rooms/lobby").header("Accept", "application/json"), 406, &[]),
        // Rooms.
        (sse("/rooms"), 400, &[]),
        (sse("/rooms?room="), 400, &[]),
        (sse("/rooms?room=a%20b"), 400, &[]),
        // Queries.
        (upgrade("/rooms/lobby?echo=perhaps"), 400, &[]),
        (upgrade("/rooms/lobby?echo=false&echo=true"), 400, &[]),
        (upgrade("/rooms/lobby?gap=always"), 400, &[]),
        // Handshakes (RFC 6455 §4.2.1).
        (
            upgrade("/rooms/lobby").without("Sec-WebSocket-Version").header("Sec-WebSocket-Version", "8"),
            426,
            &[("Sec-WebSocket-Version", "13"), ("Upgrade", "websocket")],
        ),
        (upgrade("/rooms/lobby").without("Sec-WebSocket-Version"), 426, &[("Sec-WebSocket-Version", "13")]),
        (upgrade("/rooms/lobby").without("Sec-WebSocket-Key"), 400, &[]),
        (upgrade("/rooms/lobby").without("Sec-WebSocket-Key").header("Sec-WebSocket-Key", "short"), 400, &[]),
        (upgrade("/rooms/lobby").header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="), 400, &[]),
        (upgrade("/rooms/lobby").without("Connection").header("Connection", "close"), 400, &[]),
        (upgrade("/rooms/lobby").without("Upgrade"), 400, &[]),
    ];
    for (request, status, headers) in rows {
        let response = request.send(node.public).await?;
        let said = || format!("{request:?}: {response:?}");
        ensure!(response.status == status, "{status} was expected: {}", said());
        for (name, value) in headers {
            ensure!(response.header(name) == Some(value), "{name}: {value} was expected: {}", said());
        }
        // RFC 9110 §9.3.2: an answer to HEAD has the headers and no body.
        if status >= 400 && !said().contains("HEAD\"") {
            response.problem().with_context(said)?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_handshake_is_answered_as_the_rfc_says() -> Result<()> {
    let node = alone().await?;
    let token = anywhere("alice");
    let accepted = |response: &Response| {
        response.status == 101
            && response.header("Sec-WebSocket-Accept") == Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
            && response.header("Upgrade").is_some_and(|value| value.eq_ignore_ascii_case("websocket"))
            && response.header("Connection").is_some_and(|value| value.eq_ignore_ascii_case("upgrade"))
            && response.header("Sec-WebSocket-Extensions").is_none()
    };
    let plain = Request::upgrade("/rooms/lobby").bearer(&token);
    let response = plain.send(node.public).await?;
    ensure!(accepted(&response) && response.header("Sec-WebSocket-Protocol").is_none(), "{response:?}");

    let list = format!("tidegate, tidegate.bearer.{token}");
    let carried = Request::upgrade("/rooms/lobby").header("Sec-WebSocket-Protocol", &list);
    let response = carried.send(node.public).await?;
    ensure!(
        accepted(&response) && response.header("Sec-WebSocket-Protocol") == Some("tidegate"),
        "{response:?}"
    );

    let offered = plain.header("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits");
    ensure!(accepted(&offered.send(node.public).await?));
    Ok(())
}

/// A browser drops a connection whose server picks none of the subprotocols it offered, without a reason.
#[tokio::test]
async fn a_handshake_that_offers_only_what_is_not_spoken_is_refused() -> Result<()> {
    let node = alone().await?;
    let token = anywhere("alice");
    let bearer = format!("tidegate.bearer.{token}");
    let list = |names: &str| names.replace("TOKEN", &bearer);
    let ask = async |path: &str, offers: &[&str]| {
        // The token comes by one way only.
        let in_list = offers.iter().any(|names| names.contains("TOKEN"));
        let request = Request::upgrade(path);
        let request = if in_list { request } else { request.bearer(&token) };
        let offer = |request: Request, names: &&str| request.header("Sec-WebSocket-Protocol", &list(names));
        offers.iter().fold(request, offer).send(node.public).await
    };
    let (rooms, centrifuge) = ("/rooms/lobby", "/connection/websocket");
    for (path, offers, picked) in [
        (rooms, &[][..], None),
        (rooms, &[""], None),
        (rooms, &["chat, tidegate"], Some("tidegate")),
        (rooms, &["chat", "superchat", "tidegate"], Some("tidegate")),
        (rooms, &["TOKEN, tidegate"], Some("tidegate")),
        (centrifuge, &[], None),
        (centrifuge, &["centrifuge-protobuf, centrifuge-json"], Some("centrifuge-json")),
        (centrifuge, &["centrifuge-json, TOKEN"], Some("centrifuge-json")),
    ] {
        let response = ask(path, offers).await?;
        ensure!(response.status == 101, "{path} {offers:?}: {response:?}");
        ensure!(response.header("Sec-WebSocket-Protocol") == picked, "{path} {offers:?}: {response:?}");
    }
    for (path, offers, expected) in [
        (rooms, &["chat, superchat"][..], "`tidegate`"),
        (rooms, &["centrifuge-json"], "`tidegate`"),
        (rooms, &["Tidegate"], "`tidegate`"),
        (rooms, &["TOKEN"], "beside the token"),
        (centrifuge, &["centrifuge-protobuf"], "not in Protobuf"),
        (centrifuge, &["tidegate"], "`centrifuge-json`"),
        (centrifuge, &["TOKEN"], "beside the token"),
    ] {
        let response = ask(path, offers).await?;
        ensure!(response.status == 400, "{path} {offers:?}: {response:?}");
        let problem = response.problem()?;
        let detail = problem["detail"].as_str().unwrap_or_default();
        ensure!(detail.contains(expected) && !detail.contains(&token), "{path} {offers:?}: {detail}");
    }
    Ok(())
}

#[tokio::test]
async fn only_pages_of_allowed_origins_may_connect() -> Result<()> {
    let listed = Builder::new().set("origins", "https://app.example,https://*.team.example").start().await?;
    let own = alone().await?;
    let token = anywhere("alice");
    let same_host = format!("http://{}", own.public);
    for (node, origin, allowed) in [
        (&listed, "https://app.example", true),
        (&listed, "https://APP.example:443", true),
        (&listed, "https://a.team.example", true),
        (&listed, "https://team.example", false),
        (&listed, "http://app.example", false),
        (&listed, "https://app.example.evil.example", false),
        (&listed, "https://evil.example", false),
        (&listed, "null", false),
        (&own, same_host.as_str(), true),
        (&own, "http://127.0.0.1:1", false),
        (&own, "https://app.example", false),
        (&own, "null", false),
    ] {
        let requests = [
            (Request::upgrade("/rooms/lobby").bearer(&token), 101),
            (Request::new("HEAD", "/rooms/lobby").header("Accept", "text/event-stream").bearer(&token), 200),
            (Request::post("/rooms/lobby", "text/plain", *b"x").bearer(&token), 202),
        ];
        for (request, granted) in requests {
            let response = request.header("Origin", origin).send(node.public).await?;
            let expected = if allowed { granted } else { 403 };
            ensure!(response.status == expected, "{origin}: {expected} was expected: {response:?}");
            let readable = response.header("Access-Control-Allow-Origin");
            ensure!(readable == allowed.then_some(origin), "{origin}: {response:?}");
            ensure!(response.header("Vary").is_some_and(|vary| vary.contains("Origin")), "{response:?}");
            ensure!(response.header("Access-Control-Allow-Credentials").is_none());
        }

        let preflight = Request::new("OPTIONS", "/rooms/lobby")
            .header("Origin", origin)
            .header("Access-Control-Request-Method", "POST")
            .header("Access-Control-Request-Headers", "authorization, x-event");
        let response = preflight.send(node.public).await?;
        ensure!(response.status == 204, "{response:?}");
        let methods = response.header("Access-Control-Allow-Methods");
        ensure!(methods.is_some_and(|methods| methods.contains("POST")) == allowed, "{origin}: {response:?}");
        let headers = response.header("Access-Control-Allow-Headers").unwrap_or_default().to_lowercase();
        ensure!((headers.contains("authorization") && headers.contains("x-event")) == allowed);
    }
    Ok(())
}

#[tokio::test]
async fn the_operators_side_serves_probes_and_metrics() -> Result<()> {
    let node = alone().await?;
    for (path, status, start) in [
        ("/livez", 200, "alive"),
        ("/readyz", 200, "ready"),
        ("/metrics", 200, "# HELP"),
        ("/rooms/lobby", 404, "{"),
        ("/", 404, "{"),
    ] {
        let response = node.ask_ops(path).await?;
        ensure!(response.status == status && response.text().starts_with(start), "{path}: {response:?}");
    }
    Ok(())
}
