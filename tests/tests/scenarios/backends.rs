//! What `gateway/docs/backends.md` tells backends to run, exactly as it stands there.

use std::{path::Path, process::Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use tidegate_tests::{
    client::Client,
    file,
    journal::Payload,
    node::{self, Builder},
    redis_server::RedisServer,
    token::anywhere,
};
use tokio::process::Command;

use crate::stage::payloads;

/// The room and the history to which each example publishes.
const ROOM: &str = "orders";

#[tokio::test]
async fn every_example_for_backends_works_as_documented() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = Builder::new().set("broker.url", &redis.url()).start().await?;
    let client = Client::websocket(&node.ws(ROOM, &anywhere("alice"), ""), &[]).await?;
    let mut expected = Vec::new();
    let mut languages = Vec::new();
    for (language, text) in blocks()? {
        // The user is tested with the library.
        if language == "acl" {
            continue;
        }
        let Some(printed) = run(&language, &text, &redis).await? else { continue };
        // In the order of the document: load, publish in each language, publish once, clear.
        if text.contains("tidegate_publish") {
            let from = text.rfind(r#"{""#).context("a payload")?;
            let to = text[from..].find('}').context("its end")?;
            expected.push(Payload::text(&text[from..=from + to]));
            let offset = expected.len();
            let position = printed.lines().next().unwrap_or_default();
            ensure!(position.ends_with(&format!("-{offset}")), "{text}\n{printed}");
        }
        languages.push(language);
    }
    ensure!(payloads(&client.heard(expected.len()).await?) == expected, "{client:?}");
    for language in ["sh", "python", "js"] {
        ensure!(languages.iter().any(|ran| ran == language), "no {language} in {languages:?}");
    }
    let left = redis.cli(&["XLEN", "{room:orders}:log"], b"").await?;
    ensure!(left.trim_ascii() == b"0", "the last example clears the history: {left:?}");
    Ok(())
}

#[tokio::test]
async fn the_program_prints_the_library_and_nothing_else() -> Result<()> {
    let printed = Command::new(node::binary()?).arg("print-functions").output().await?;
    ensure!(printed.status.success() && printed.stderr.is_empty(), "{printed:?}");
    ensure!(printed.stdout == broker_bridge::redis::functions::TEXT.as_bytes());
    Ok(())
}

/// Each block of code in the document: its language and its text.
fn blocks() -> Result<Vec<(String, String)>> {
    let document = std::fs::read_to_string(file("../gateway/docs/backends.md"))?;
    let mut blocks = Vec::new();
    for block in document.split("\n```").skip(1).step_by(2) {
        let (language, text) = block.split_once('\n').context("a language, then the code")?;
        blocks.push((language.to_owned(), text.to_owned()));
    }
    Ok(blocks)
}

/// Runs a block; returns what it prints. `None` if it is in Go, and the machine has no Go.
#[allow(clippy::print_stderr, reason = "a skipped test says so")]
async fn run(language: &str, text: &str, redis: &RedisServer) -> Result<Option<String>> {
    let scratch = tempfile::tempdir()?;
    let mut command = match language {
        "sh" => shell(text)?,
        "python" => {
            let mut python = Command::new(file(".venv/bin/python"));
            python.args(["-c", text]);
            python
        }
        "js" => {
            let mut node = Command::new("node");
            node.args(["--input-type=module", "--eval", text]).current_dir(file("clients"));
            node
        }
        "go" if Command::new("go").arg("version").stdout(Stdio::null()).status().await.is_err() => {
            eprintln!("skipped: the example in Go, because Go is not installed");
            return Ok(None);
        }
        "go" => {
            let main = scratch.path().join("main.go");
            std::fs::write(&main, text)?;
            let mut go = Command::new("go");
            go.arg("run").arg(main).current_dir(file("clients/go"));
            go
        }
        other => bail!("nothing runs {other}"),
    };
    let command = command.env("REDIS_URL", redis.url()).stdin(Stdio::null()).kill_on_drop(true);
    let output =
        command.output().await.with_context(|| format!("{language} cannot run (run tests/run once)"))?;
    let printed = String::from_utf8(output.stdout)?;
    // redis-cli prints the error of a command, and succeeds.
    let failed =
        !output.status.success() || ["ERR", "BAD", "NOPERM"].iter().any(|code| printed.starts_with(code));
    ensure!(!failed, "{text}\n{printed}\n{}", String::from_utf8_lossy(&output.stderr));
    Ok(Some(printed))
}

/// A shell that finds the program.
fn shell(text: &str) -> Result<Command> {
    let program = node::binary()?;
    let directory = program.parent().map(Path::to_owned).context("a program in a directory")?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths([directory].into_iter().chain(std::env::split_paths(&path)))?;
    let mut shell = Command::new("bash");
    shell.args(["-o", "pipefail", "-ec", text]).env("PATH", path);
    Ok(shell)
}
