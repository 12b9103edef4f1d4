//! Every endpoint of the public listener, with the response to each request.

use anyhow::{Context as _, Result, ensure};
use tidegate_tests::{
    client::Client,
    eventually::eventually,
    http::{Incoming, Request, Response},
    journal::Payload,
    node::Builder,
    pages::Pages,
    raw::talk,
    redis_server::RedisServer,
    token::{Token, anywhere},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::stage::{alone, payloads};

/// A request, the status it must get, and headers that the response must have with these values.
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
            &[("Content-Type", "text/event-stream"), ("Cache-Control", "no-store, no-transform")],
        ),
        (Request::new("HEAD", "/rooms/lobby"), 401, &[]),
        // Accept headers.
        (get("/rooms/lobby").header("Accept", "text/html"), 406, &[]),
        (get("/rooms/lobby").header("Accept", "application/json"), 409, &[]),
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
        // The length of an event stream is unknown.
        ensure!(status != 200 || response.header("Content-Length").is_none(), "{}", said());
        // RFC 9110 §9.3.2: a response to HEAD has the headers and no body.
        if status >= 400 && !said().contains("HEAD\"") {
            response.problem().with_context(said)?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_handshake_is_answered_as_rfc_6455_requires() -> Result<()> {
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

/// A browser drops a connection whose server selects none of its subprotocols, without giving a reason.
#[tokio::test]
async fn a_handshake_that_offers_only_unknown_subprotocols_is_refused() -> Result<()> {
    let node = alone().await?;
    let token = anywhere("alice");
    let bearer = format!("tidegate.bearer.{token}");
    let list = |names: &str| names.replace("TOKEN", &bearer);
    let ask = async |path: &str, offers: &[&str]| {
        // The token is sent in one way only.
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
            let credentials = response.header("Access-Control-Allow-Credentials");
            ensure!(credentials == allowed.then_some("true"), "{origin}: {response:?}");
        }

        let preflight = Request::new("OPTIONS", "/rooms/lobby")
            .header("Origin", origin)
            .header("Access-Control-Request-Method", "POST")
            .header("Access-Control-Request-Headers", "authorization, cache-control, x-requested-with");
        let response = preflight.send(node.public).await?;
        ensure!(response.status == 204, "{response:?}");
        let methods = response.header("Access-Control-Allow-Methods");
        ensure!(methods.is_some_and(|methods| methods.contains("POST")) == allowed, "{origin}: {response:?}");
        let headers = response.header("Access-Control-Allow-Headers").unwrap_or_default().to_lowercase();
        for header in [
            "authorization",
            "x-event",
            "idempotency-key",
            "last-event-id",
            "cache-control",
            "x-requested-with",
        ] {
            ensure!(headers.contains(header) == allowed, "{origin}: {response:?}");
        }
        ensure!(response.header("Access-Control-Allow-Credentials") == allowed.then_some("true"));
    }
    Ok(())
}

/// `*` names no origin: every page may connect, but none with its browser's credentials.
#[tokio::test]
async fn a_star_allows_no_credentials() -> Result<()> {
    let node = Builder::new().set("origins", "*").start().await?;
    let post = Request::post("/rooms/lobby", "text/plain", *b"x").bearer(&anywhere("alice"));
    let response = post.header("Origin", "https://app.example").send(node.public).await?;
    ensure!(response.header("Access-Control-Allow-Origin") == Some("https://app.example"), "{response:?}");
    ensure!(response.header("Access-Control-Allow-Credentials").is_none(), "{response:?}");
    Ok(())
}

/// RFC 9112 §3.2, on every route of both listeners.
#[tokio::test]
async fn each_request_names_one_host() -> Result<()> {
    let node = Builder::new().set("demo", "true").start().await?;
    let bearer = format!("Authorization: Bearer {}\r\n", anywhere("alice"));
    let handshake = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let routes = [
        (node.public, "HEAD /rooms/lobby", "Accept: text/event-stream\r\n", 200),
        (node.public, "HEAD /rooms?room=a", "Accept: text/event-stream\r\n", 200),
        (node.public, "OPTIONS /rooms/lobby", "", 204),
        (node.public, "POST /rooms/lobby", "Content-Length: 0\r\n", 202),
        (node.public, "GET /demo.css", "", 200),
        (node.public, "GET /nowhere", "", 404),
        (node.public, "GET /rooms/lobby", handshake, 101),
        (node.ops, "GET /livez", "", 200),
        (node.ops, "GET /metrics", "", 200),
        (node.ops, "GET /nowhere", "", 404),
    ];
    for (address, request, headers, granted) in routes {
        for (version, hosts, sound) in [
            ("1.1", "Host: gateway.example\r\n", true),
            ("1.1", "Host: [::1]:8080\r\n", true),
            ("1.1", "Host:\r\n", true),
            ("1.1", "", false),
            ("1.1", "Host: a\r\nHost: a\r\n", false),
            ("1.1", "Host: a b\r\n", false),
            ("1.1", "Host: user@a\r\n", false),
            ("1.0", "Host: a\r\nHost: b\r\n", false),
        ] {
            // An upgraded connection would stay open.
            let closes = if granted == 101 { "" } else { "Connection: close\r\n" };
            if granted == 101 && sound {
                continue;
            }
            let said =
                format!("{request} HTTP/{version}\r\n{hosts}{headers}{bearer}{closes}\r\n").into_bytes();
            let answer = talk(address, &said).await?;
            let status = answer.get(9..12).context("a status")?;
            let expected = if sound { granted } else { 400 };
            ensure!(status == expected.to_string().as_bytes(), "{request} {version} {hosts:?}: {answer:?}");
        }
    }
    let ancient = talk(node.ops, b"GET /livez HTTP/1.0\r\n\r\n").await?;
    ensure!(ancient.starts_with(b"HTTP/1.0 200"), "HTTP/1.0 has no Host: {ancient:?}");
    Ok(())
}

/// RFC 9112 §3.2.2: the authority of an absolute target counts, not the `Host` header beside it.
#[tokio::test]
async fn an_origin_is_compared_with_the_requested_host() -> Result<()> {
    let node = alone().await?;
    let post = |target: &str| Request::post(target, "text/plain", *b"x").bearer(&anywhere("alice"));
    for (target, origin, status) in [
        ("/rooms/lobby".to_owned(), format!("http://{}", node.public), 202),
        ("http://other.example/rooms/lobby".to_owned(), format!("http://{}", node.public), 403),
        ("http://other.example/rooms/lobby".to_owned(), "http://other.example".to_owned(), 202),
        (format!("http://{}/rooms/lobby", node.public), format!("http://{}", node.public), 202),
        (format!("http://{}@other.example/rooms/lobby", node.public), "http://other.example".to_owned(), 400),
    ] {
        let response = post(&target).header("Origin", &origin).send(node.public).await?;
        ensure!(response.status == status, "{target} {origin}: {response:?}");
    }
    for header in ["Origin", "Content-Type", "X-Event", "Idempotency-Key"] {
        let twice = Request::new("POST", "/rooms/lobby").header(header, "text/plain").header(header, "a/b");
        let response = twice.bearer(&anywhere("alice")).send(node.public).await?;
        ensure!(response.status == 400, "{header}: {response:?}");
    }
    Ok(())
}

/// A session that the shard refuses gets the same refusal as from a route.
#[tokio::test]
async fn a_late_refusal_is_like_any_other() -> Result<()> {
    let redis = RedisServer::start().await?;
    let origin = "https://app.example";
    let node = Builder::new()
        .set("broker.url", &redis.url())
        .set("broker.subscribe_timeout", "300ms")
        .set("origins", origin)
        .set("log.filter", "info,tidegate=debug")
        .start()
        .await?;
    redis.freeze()?;
    let token = anywhere("alice");
    let upgrade = Request::upgrade("/rooms/lobby").bearer(&token).header("Origin", origin);
    let response = upgrade.send(node.public).await?;
    ensure!(response.status == 503 && response.header("Retry-After").is_some(), "{response:?}");
    ensure!(response.header("Access-Control-Allow-Origin") == Some(origin), "{response:?}");
    response.problem()?;
    let stream = Request::get("/rooms/lobby").header("Accept", "text/event-stream").bearer(&token);
    let response = stream.header("Origin", origin).send(node.public).await?;
    ensure!(response.status == 200, "{response:?}");
    ensure!(response.header("Access-Control-Allow-Origin") == Some(origin), "{response:?}");
    let text = response.text();
    let (retry, rest) = text.split_once('\n').context("a line")?;
    let millis: u32 = retry.strip_prefix("retry: ").context("retry")?.parse()?;
    ensure!((2_000..=8_000).contains(&millis) && rest == ": tidegate.retry broker\n", "{text}");
    // A client that accepts anything gets the status.
    let any = Request::get("/rooms/lobby").header("Accept", "*/*").bearer(&token).send(node.public).await?;
    ensure!(any.status == 503, "{any:?}");

    let samples = node.samples().await?;
    ensure!(samples.sum("tidegate_refusals_total", &["reason=\"broker\""]) == 3, "{samples:?}");
    ensure!(samples.sum("tidegate_handshakes_total", &["result=\"unavailable\""]) == 3, "{samples:?}");
    let told = |line: &&str| line.contains("request refused") && line.contains("\"reason\":\"broker\"");
    eventually("a line for each", async || match node.output().lines().filter(told).count() {
        3 => Ok(()),
        lines => Err(format!("{lines} lines")),
    })
    .await?;
    redis.thaw()
}

/// A client that is asked to reconnect does so, and is served when possible; an `EventSource` would never reconnect
/// after a 503.
#[tokio::test]
async fn event_sources_survive_a_temporary_refusal() -> Result<()> {
    const PAGE: &str = "http://127.0.0.1:3000";
    let redis = RedisServer::start().await?;
    let node = Builder::new()
        .set("broker.url", &redis.url())
        .set("broker.subscribe_timeout", "200ms")
        .set("origins", PAGE)
        .start()
        .await?;
    redis.freeze()?;
    let token = anywhere("alice");
    let url = node.url("lobby", &token, "");
    let (browser, library) =
        tokio::try_join!(Client::browser_events(&url, PAGE), Client::node_events(&url, &[]))?;
    for client in [&browser, &library] {
        client.until("an interruption", |journal| journal.interrupted > 0).await?;
    }
    let samples = node.samples().await?;
    ensure!(samples.sum("tidegate_refusals_total", &["reason=\"broker\""]) >= 2, "{samples:?}");
    redis.thaw()?;
    node.until_samples("two sessions", |samples| samples.sum("tidegate_connections", &[]) == 2).await?;
    node.post("lobby", &token, "text/plain", b"at last").await?;
    for client in [&browser, &library] {
        client.hears(&Payload::text("at last")).await?;
        ensure!(client.now().end.is_none(), "{:?}", client.now());
    }
    // A final refusal keeps its status.
    let foreign = node.url("lobby", &Token::new("alice").sign(), "");
    let refused = Client::node_events(&foreign, &[]).await;
    ensure!(refused.is_err(), "403 ends it");
    Ok(())
}

/// A token may expire while its owner is still sending.
#[tokio::test]
async fn a_body_that_ends_after_its_token_expired_is_not_published() -> Result<()> {
    let node = Builder::new().set("auth.leeway", "0s").set("public.body_timeout", "1m").start().await?;
    let listener = Client::websocket(&node.ws("lobby", &anywhere("bob"), ""), &[]).await?;
    let token = Token::new("alice").room("*", &["publish"]).expires_in(5).sign();
    let head = format!(
        "POST /rooms/lobby HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 4\r\n\
         Expect: 100-continue\r\n\r\n"
    );
    let mut stream = TcpStream::connect(node.public).await?;
    stream.write_all(head.as_bytes()).await?;
    let mut asked = [0; 25];
    stream.read_exact(&mut asked).await?;
    eventually("the token has expired", async || {
        let post = Request::post("/rooms/elsewhere", "text/plain", "x").bearer(&token);
        match post.send(node.public).await {
            Ok(response) if response.status == 401 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await?;
    stream.write_all(b"late").await?;
    let answer = Incoming::read(stream).await?;
    ensure!(answer.status == 401, "{answer:?}");
    node.post("lobby", &anywhere("bob"), "text/plain", b"next").await?;
    ensure!(payloads(&listener.heard(1).await?) == [Payload::text("next")]);
    Ok(())
}

/// Requests that a browser sends when a page is closed, and headers that replacements of `EventSource` add.
#[tokio::test]
async fn beacons_and_polyfills_get_through() -> Result<()> {
    const PAGE: &str = "http://127.0.0.1:3000";
    let node = Builder::new().set("origins", PAGE).start().await?;
    let token = anywhere("alice");
    let url = node.url("lobby", &token, "");
    let listener = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let mut pages = Pages::launch()?;
    pages.stand("page", PAGE).await?;
    ensure!(pages.beacon("page", &url, r#"{"bye":true}"#).await?);
    ensure!(payloads(&listener.heard(1).await?) == [Payload::text(r#"{"bye":true}"#)]);
    ensure!(pages.fetches_events("page", &url).await? == Some(200));
    Ok(())
}

#[tokio::test]
async fn the_ops_listener_serves_probes_and_metrics() -> Result<()> {
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
