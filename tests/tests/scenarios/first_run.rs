//! The first five minutes with a freshly built program.

use anyhow::{Context as _, Result, ensure};
use tidegate_tests::{
    client::Client,
    http::Request,
    journal::Payload,
    node::{Builder, Node},
    pages::Pages,
    proxy::Nginx,
    token::{Token, anywhere},
};

use crate::stage::{alone, payloads};

/// The URL that a node prints for the user to open.
fn printed_url(node: &Node) -> Result<String> {
    let output = node.output();
    let start = output.find("http://127.0.0.1:").with_context(|| format!("a URL in:\n{output}"))?;
    let url = output[start..].split_whitespace().next().context("a URL ends")?;
    Ok(url.to_owned())
}

#[tokio::test]
async fn a_node_without_a_key_prints_a_token_that_works() -> Result<()> {
    let node = Builder::unconfigured().start().await?;
    node.until_written("#token=").await?;
    let url = printed_url(&node)?;
    let (page, token) = url.split_once("#token=").context("a token in the URL's fragment")?;
    ensure!(page == format!("http://{}/", node.public), "{page}");

    let client = Client::websocket(&node.ws("demo:lobby", token, ""), &[]).await?;
    client.send(Payload::text("hello")).await?;
    ensure!(payloads(&client.heard(1).await?) == [Payload::text("hello")]);
    // The token is for the demo's rooms, and the key is not shared with another node.
    let elsewhere = Request::upgrade("/rooms/lobby").bearer(token).send(node.public).await?;
    ensure!(elsewhere.status == 403, "{elsewhere:?}");
    let other = Builder::unconfigured().start().await?;
    let foreign = Request::upgrade("/rooms/demo:lobby").bearer(token).send(other.public).await?;
    ensure!(foreign.status == 401, "{foreign:?}");
    Ok(())
}

#[tokio::test]
async fn the_demo_page_is_strict_and_only_there_without_a_key() -> Result<()> {
    let open = Builder::unconfigured().start().await?;
    for (path, kind) in [("/", "text/html"), ("/demo.js", "text/javascript"), ("/demo.css", "text/css")] {
        let response = Request::get(path).send(open.public).await?;
        ensure!(response.status == 200, "{path}: {response:?}");
        ensure!(response.header("Content-Type").is_some_and(|value| value.starts_with(kind)), "{path}");
        ensure!(!response.body.is_empty(), "{path}");
        let policy = response.header("Content-Security-Policy").context("a policy")?;
        ensure!(policy.contains("default-src 'none'"), "{policy}");
        ensure!(!policy.contains("unsafe") && !policy.contains('*'), "{policy}");
        ensure!(response.header("X-Content-Type-Options") == Some("nosniff"), "{path}");
    }
    let html = Request::get("/").send(open.public).await?.text();
    for attribute in ["src=\"http", "href=\"http", "src=\"//", "href=\"//"] {
        ensure!(!html.contains(attribute), "nothing comes from elsewhere");
    }

    let closed = alone().await?;
    let asked_for = Builder::new().set("demo", "true").start().await?;
    ensure!(Request::get("/").send(closed.public).await?.status == 404);
    ensure!(Request::get("/").send(asked_for.public).await?.status == 200);
    Ok(())
}

const OPEN: &str = "#state[data-state=open]";
const NOT_OPEN: &str = "#state:not([data-state=open])";

#[tokio::test]
async fn two_users_exchange_messages_on_the_demo_page() -> Result<()> {
    let node = Builder::unconfigured().start().await?;
    node.until_written("#token=").await?;
    let url = printed_url(&node)?;
    let mut pages = Pages::launch()?;
    for page in ["alice", "bob"] {
        ensure!(pages.open(page, &url).await? == 200);
        pages.see(page, OPEN, "connected").await?;
        pages.fill(page, "#nickname", page).await?;
    }
    say(&mut pages, "alice", "hello <b>bob</b> 🦀").await?;
    for page in ["alice", "bob"] {
        pages.see(page, &said_by("alice"), "hello <b>bob</b> 🦀").await?;
    }
    say(&mut pages, "bob", "hello alice").await?;
    for page in ["alice", "bob"] {
        pages.see(page, &said_by("bob"), "hello alice").await?;
        ensure!(pages.count(page, "#messages li[data-kind=chat]", "").await? == 2, "each message once");
    }

    // Another room: its messages are not shown here, but the page notices them.
    pages.click("alice", "#room-list button[data-room=\"demo:tide\"]").await?;
    pages.see("alice", OPEN, "connected").await?;
    say(&mut pages, "alice", "high tide").await?;
    pages.see("bob", "#room-list button[data-room=\"demo:tide\"] .unread", "1").await?;
    ensure!(pages.count("bob", "#messages li", "high tide").await? == 0);
    pages.click("bob", "#room-list button[data-room=\"demo:tide\"]").await?;
    pages.see("bob", &said_by("alice"), "high tide").await?;

    // Messages from a backend that knows nothing of the page are shown unchanged.
    let (_, token) = url.split_once("#token=").context("a token")?;
    node.post("demo:tide", token, "text/plain", b"from a terminal").await?;
    pages.see("bob", "#messages li[data-kind=raw] .text", "from a terminal").await?;
    for page in ["alice", "bob"] {
        let complaints = pages.complaints(page).await?;
        ensure!(complaints.is_empty(), "{page}: {complaints:?}");
    }
    Ok(())
}

#[tokio::test]
async fn pages_reconnect_when_the_node_is_back() -> Result<()> {
    let mut node = Builder::new().set("demo", "true").start().await?;
    let address = node.public.to_string();
    let mut pages = Pages::launch()?;
    for page in ["alice", "bob"] {
        pages.open(page, &format!("http://{address}/#token={}", anywhere(page))).await?;
        pages.see(page, OPEN, "connected").await?;
        pages.fill(page, "#nickname", page).await?;
    }
    node.kill().await?;
    for page in ["alice", "bob"] {
        pages.see(page, NOT_OPEN, "").await?;
    }
    let _again = Builder::new().set("demo", "true").set("public.listen", &address).start().await?;
    for page in ["alice", "bob"] {
        pages.see(page, OPEN, "connected").await?;
    }
    say(&mut pages, "bob", "still there?").await?;
    pages.see("alice", &said_by("bob"), "still there?").await?;
    Ok(())
}

/// `origins` lists an application's pages; the page that the node serves itself need not be listed.
#[tokio::test]
async fn the_demo_page_works_when_origins_are_listed() -> Result<()> {
    let node = Builder::new().set("demo", "true").set("origins", "https://app.example").start().await?;
    let mut pages = Pages::launch()?;
    pages.open("alice", &format!("http://{}/#token={}", node.public, anywhere("alice"))).await?;
    pages.see("alice", OPEN, "connected").await?;
    // Other pages are refused as before, and so is this one if there is no demo.
    let own = format!("http://{}", node.public);
    let without = Builder::new().set("origins", "https://app.example").start().await?;
    for (node, origin, status) in [
        (&node, "https://elsewhere.example", 403),
        (&node, "https://app.example", 101),
        (&node, own.as_str(), 101),
        (&without, &format!("http://{}", without.public), 403),
    ] {
        let request = Request::upgrade("/rooms/lobby").bearer(&anywhere("alice")).header("Origin", origin);
        ensure!(request.send(node.public).await?.status == status, "{origin}");
    }
    Ok(())
}

/// Behind a proxy that changes `Host`, the page has a foreign origin. It shows an error and stops retrying.
#[tokio::test]
async fn the_demo_page_shows_why_it_is_refused() -> Result<()> {
    let node = Builder::new().set("demo", "true").start().await?;
    let mut pages = Pages::launch()?;
    let proxy = Nginx::renaming(node.public).await?;
    pages.open("alice", &format!("http://{}/#token={}", proxy.address(), anywhere("alice"))).await?;
    let reason = format!("The node refuses pages of http://{}", proxy.address());
    pages.see("alice", NOT_OPEN, &reason).await?;
    ensure!(pages.count("alice", "#retry:not([hidden])", "").await? == 1, "a button in place of a countdown");
    ensure!(pages.count("alice", "#countdown:not(:empty)", "").await? == 0, "no countdown");

    // A token without a grant for the room.
    let guest = Token::new("guest").room("elsewhere", &["subscribe"]).sign();
    pages.open("guest", &format!("http://{}/#token={guest}", node.public)).await?;
    pages.see("guest", NOT_OPEN, "The token does not grant this room").await?;
    // An invalid token.
    let old = Token::new("late").expires_in(-3600).sign();
    pages.open("late", &format!("http://{}/#token={old}", node.public)).await?;
    pages.see("late", "#welcome-reason", "does not accept this token").await?;
    Ok(())
}

async fn say(pages: &mut Pages, page: &str, text: &str) -> Result<()> {
    pages.fill(page, "#composer input", text).await?;
    pages.press(page, "#composer input", "Enter").await
}

fn said_by(name: &str) -> String {
    format!("#messages li[data-kind=chat][data-from=\"{name}\"] .text")
}
