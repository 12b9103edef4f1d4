//! A token in a cookie: which pages may use it, and which may not.

use anyhow::{Context as _, Result, bail, ensure};
use tidegate_tests::{
    client::Client,
    http::{Request, Response},
    journal::Payload,
    node::{Builder, Node},
    pages::Pages,
    samples::Samples,
    token::{Token, anywhere},
};

/// Origins of one host, and so of one site: for pages of any of them, a browser sends the host's cookies to all of
/// its ports, whether `SameSite=Strict` or not. Only the node can tell the pages apart.
const APP: &str = "http://127.0.0.1:3000";
const EVIL: &str = "http://127.0.0.1:4000";

const COOKIE: &str = "session";

fn with_cookie() -> Builder {
    Builder::new().set("auth.cookie", COOKIE)
}

/// What a page can do with its browser's cookie: open a WebSocket, open an event stream, publish.
async fn tries(pages: &mut Pages, page: &str, node: &Node) -> Result<(bool, bool, Option<u16>)> {
    let room = format!("{}/rooms/lobby", node.public);
    let socket = pages.opens_websocket(page, &format!("ws://{room}")).await?;
    let events = pages.opens_events(page, &format!("http://{room}")).await?;
    let posted = pages.post(page, &format!("http://{room}"), &format!("from {page}")).await?;
    Ok((socket, events, posted))
}

const EVERYTHING: (bool, bool, Option<u16>) = (true, true, Some(202));
const NOTHING: (bool, bool, Option<u16>) = (false, false, None);

/// A browser with pages called `names` at their origins, each with a valid cookie for every node.
async fn browser(names: &[(&str, &str)]) -> Result<Pages> {
    let mut pages = Pages::launch()?;
    for (name, origin) in names {
        pages.keep_cookie(name, "http://127.0.0.1/", COOKIE, &anywhere("alice")).await?;
        pages.stand(name, origin).await?;
    }
    Ok(pages)
}

/// By how much a counter has grown for a reason.
async fn grown(node: &Node, before: &Samples, name: &str, reason: &str) -> Result<u64> {
    let label = format!("reason=\"{reason}\"");
    Ok(node.samples().await?.sum(name, &[&label]) - before.sum(name, &[&label]))
}

#[tokio::test]
async fn only_pages_of_allowed_origins_may_use_the_cookie() -> Result<()> {
    let (a, b) = tokio::try_join!(async { with_cookie().set("origins", APP).start().await }, async {
        with_cookie().set("origins", EVIL).start().await
    },)?;
    let mut pages = browser(&[("app", APP), ("evil", EVIL)]).await?;
    ensure!(tries(&mut pages, "app", &a).await? == EVERYTHING);
    for kind in ["websocket", "eventsource"] {
        pages.see("app", "p", &format!("{kind}: from app")).await?;
    }
    let before = a.samples().await?;
    ensure!(tries(&mut pages, "evil", &a).await? == NOTHING);
    ensure!(grown(&a, &before, "tidegate_refusals_total", "origin").await? == 3);
    ensure!(a.samples().await?.growth(&before, &["tidegate_messages_in_total"]).is_empty());
    // The page has the cookie: if its origin is allowed, it gets in with nothing else.
    ensure!(tries(&mut pages, "evil", &b).await? == EVERYTHING);
    Ok(())
}

/// `*` allows every page to connect, but only the gateway's own pages may use the browser's cookies. The
/// `EventSource` of a same-origin page sends no `Origin`.
#[tokio::test]
async fn a_star_and_no_list_mean_the_own_host_only() -> Result<()> {
    let (open, closed) =
        tokio::try_join!(async { with_cookie().set("origins", "*").start().await }, async {
            with_cookie().start().await
        },)?;
    for (node, metric, reason) in
        [(&open, "tidegate_auth_failures_total", "missing"), (&closed, "tidegate_refusals_total", "origin")]
    {
        let own = format!("http://{}", node.public);
        let mut pages = browser(&[("own", &own), ("evil", EVIL)]).await?;
        ensure!(tries(&mut pages, "own", node).await? == EVERYTHING, "{reason}");
        for kind in ["websocket", "eventsource"] {
            pages.see("own", "p", &format!("{kind}: from own")).await?;
        }
        let before = node.samples().await?;
        ensure!(tries(&mut pages, "evil", node).await? == NOTHING, "{reason}");
        ensure!(grown(node, &before, metric, reason).await? == 3, "{reason}");
    }
    Ok(())
}

#[tokio::test]
async fn a_node_without_a_cookie_name_reads_no_cookie() -> Result<()> {
    let node = Builder::new().set("origins", APP).start().await?;
    let mut pages = browser(&[("app", APP)]).await?;
    let before = node.samples().await?;
    // Its origin is allowed: the page may read the refusal.
    ensure!(tries(&mut pages, "app", &node).await? == (false, false, Some(401)));
    ensure!(grown(&node, &before, "tidegate_auth_failures_total", "missing").await? == 3);
    Ok(())
}

/// Headers, and the reason for the refusal, if they are refused.
type Row<'a> = (Vec<(&'a str, &'a str)>, Option<&'static str>);

#[tokio::test]
async fn each_request_with_a_cookie_has_its_answer() -> Result<()> {
    let node = with_cookie().set("origins", &format!("{APP},*")).start().await?;
    let own = format!("http://{}", node.public);
    let good = anywhere("alice");
    let expired = Token::new("alice").room("*", &["subscribe", "publish"]).expires_in(-60).sign();
    let cookie = format!("{COOKIE}={good}");
    let among = format!("theme=\u{e9}; {cookie}; x");
    let (twice, old) = (format!("{cookie}; {cookie}"), format!("{COOKIE}={expired}"));
    let long = format!("{COOKIE}={}", "a".repeat(4096));
    let (bearer, stale) = (format!("Bearer {good}"), format!("Bearer {expired}"));
    let origin = ("Origin", APP);
    let rows: Vec<Row<'_>> = vec![
        (vec![("Cookie", &cookie), origin], None),
        (vec![("Cookie", &among), origin], None),
        (vec![("Cookie", "x=1"), ("Cookie", &cookie), origin], None),
        (vec![("Cookie", &cookie), ("Origin", &own)], None),
        (vec![("Cookie", &cookie), ("Sec-Fetch-Site", "same-origin")], None),
        // No page is named, or the wrong one.
        (vec![("Cookie", &cookie)], Some("missing")),
        (vec![("Cookie", &cookie), ("Sec-Fetch-Site", "none")], Some("missing")),
        (vec![("Cookie", &cookie), ("Sec-Fetch-Site", "same-site")], Some("missing")),
        (vec![("Cookie", &cookie), ("Sec-Fetch-Site", "cross-site")], Some("missing")),
        (vec![("Cookie", &cookie), ("Sec-Fetch-Site", "Same-Origin")], Some("missing")),
        (vec![("Cookie", &cookie), ("Origin", EVIL)], Some("missing")),
        (vec![("Cookie", &cookie), ("Origin", "null")], Some("missing")),
        (vec![("Cookie", &cookie), ("Origin", EVIL), ("Sec-Fetch-Site", "same-origin")], Some("missing")),
        // Malformed or invalid cookies.
        (vec![("Cookie", "Session=a.b.c; =x; session"), origin], Some("missing")),
        (vec![("Cookie", &twice), origin], Some("ambiguous")),
        (vec![("Cookie", &cookie), ("Cookie", &old), origin], Some("ambiguous")),
        (vec![("Cookie", "session="), origin], Some("malformed")),
        (vec![("Cookie", "session=a b"), origin], Some("malformed")),
        (vec![("Cookie", &long), origin], Some("too_long")),
        (vec![("Cookie", &old), origin], Some("expired")),
        // With another token, valid or not, the cookie is ignored.
        (vec![("Cookie", &old), origin, ("Authorization", &bearer)], None),
        (vec![("Cookie", &twice), origin, ("Authorization", &bearer)], None),
        (vec![("Cookie", &cookie), ("Authorization", &bearer)], None),
        (vec![("Cookie", &cookie), origin, ("Authorization", &stale)], Some("expired")),
        (vec![("Cookie", &cookie), origin, ("Authorization", "Bearer")], Some("malformed")),
    ];
    let path = "/rooms/lobby";
    for (headers, reason) in &rows {
        for (request, granted) in [
            (Request::upgrade(path), 101),
            (Request::new("HEAD", path).header("Accept", "text/event-stream"), 200),
            (Request::post(path, "text/plain", *b"x"), 202),
        ] {
            let request = headers.iter().fold(request, |request, (name, value)| request.header(name, value));
            let before = node.samples().await?;
            let response = request.send(node.public).await?;
            let shown = || format!("{headers:?}, {reason:?}: {response:?}");
            ensure!(response.status == if reason.is_some() { 401 } else { granted }, shown());
            let counted = node.samples().await?.growth(&before, &["tidegate_auth_failures_total"]);
            let expected =
                reason.map(|reason| (format!("tidegate_auth_failures_total{{reason=\"{reason}\"}}"), 1));
            ensure!(counted == expected.into_iter().collect(), "{}: {counted:?}", shown());
            let page = headers.iter().find(|(name, _)| *name == "Origin").map(|(_, origin)| *origin);
            ensure!(credentials(&response)? == (page == Some(APP) || page == Some(&own)), shown());
        }
    }
    // A page's preflight request.
    for (origin, may) in [(APP, true), (own.as_str(), true), (EVIL, false), ("null", false)] {
        let response = Request::new("OPTIONS", path)
            .header("Origin", origin)
            .header("Access-Control-Request-Method", "POST")
            .send(node.public)
            .await?;
        ensure!(response.status == 204 && credentials(&response)? == may, "{origin}: {response:?}");
    }
    Ok(())
}

/// A list without the gateway's own host excludes its cookies as well.
#[tokio::test]
async fn the_own_host_counts_only_where_it_is_allowed() -> Result<()> {
    let node = with_cookie().set("origins", APP).start().await?;
    let cookie = format!("{COOKIE}={}", anywhere("alice"));
    let request = Request::new("HEAD", "/rooms/lobby").header("Cookie", &cookie);
    let request = request.header("Sec-Fetch-Site", "same-origin");
    ensure!(request.send(node.public).await?.status == 401);
    Ok(())
}

/// In the Centrifuge protocol the token usually comes after the handshake, which may carry an old cookie.
#[tokio::test]
async fn a_cookie_admits_a_centrifuge_client_and_never_blocks_one() -> Result<()> {
    let node = with_cookie().set("origins", APP).start().await?;
    let (alice, bob) = (anywhere("alice"), anywhere("bob"));
    let expired = Token::new("alice").room("*", &["subscribe"]).expires_in(-60).sign();
    let with_token = format!(r#"{{"id":1,"connect":{{"token":"{bob}"}}}}"#);
    let without = r#"{"id":1,"connect":{}}"#;
    for (cookie, origin, connect, connects) in [
        (&alice, APP, without, true),
        (&alice, APP, with_token.as_str(), true),
        (&expired, APP, &with_token, true),
        (&expired, APP, without, false),
    ] {
        let cookie = format!("{COOKIE}={cookie}");
        let url = format!("ws://{}/connection/websocket", node.public);
        let client = Client::websocket(&url, &[("Cookie", &cookie), ("Origin", origin)]).await?;
        client.send(Payload::text(connect)).await?;
        let heard = client.heard(1).await?;
        let Some(Payload::Text(reply)) = heard.first().map(|message| &message.payload) else {
            bail!("a reply, not {heard:?}");
        };
        ensure!(reply.contains(if connects { "\"connect\"" } else { "101" }), "{connect}: {reply}");
    }
    Ok(())
}

/// Whether a page may read the response to a request with cookies.
fn credentials(response: &Response) -> Result<bool> {
    let Some(value) = response.header("Access-Control-Allow-Credentials") else { return Ok(false) };
    let origin = response.header("Access-Control-Allow-Origin").context("an origin")?;
    ensure!(value == "true" && origin != "*" && origin != "null", "{response:?}");
    Ok(true)
}
