//! Clients that are scripts under `tests/clients/`.
//!
//! One JSON object a line: events on the script's standard output, commands on its standard input. The
//! end of its input tells a script to exit.

use std::{path::Path, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::mpsc,
};

use super::{Client, Writer};
use crate::{
    file,
    journal::{End, Message, Payload},
};

/// A client script under Node.js.
pub(super) fn node(arguments: &[&str]) -> Result<Client> {
    client(Script::node(arguments)?, arguments)
}

/// A client script under Python.
pub(super) fn python(arguments: &[&str]) -> Result<Client> {
    client(Script::start(&file(".venv/bin/python"), arguments)?, arguments)
}

fn client(script: Script, arguments: &[&str]) -> Result<Client> {
    let name = arguments.first().context("a script's name")?;
    Ok(Client::start(name, |journal, commands| async move {
        // Whatever the script was doing when it failed, it is gone now.
        let end = converse(script, &journal, commands).await.unwrap_or(End::Lost);
        journal.ended(end);
    }))
}

async fn converse(
    mut script: Script,
    journal: &Writer,
    mut commands: mpsc::Receiver<Payload>,
) -> Result<End> {
    let Script { stdin, stdout, _child: _alive } = &mut script;
    // Do both at once: a script that is busy writing does not read, and one that is not read does not write.
    let saying = async {
        while let (Some(payload), Some(stdin)) = (commands.recv().await, stdin.as_mut()) {
            stdin.write_all(format!("{}\n", command_line(&payload)).as_bytes()).await?;
        }
        *stdin = None;
        anyhow::Ok(())
    };
    let hearing = async {
        while let Some(line) = stdout.next_line().await? {
            if let Some(end) = note(serde_json::from_str(&line)?, journal)? {
                journal.ended(end);
            }
        }
        Ok(End::Lost)
    };
    // Keep reading the output of a script that accepts no more commands.
    let (_, end) = tokio::join!(saying, hearing);
    end
}

/// What a client script reports.
#[derive(Deserialize)]
#[serde(tag = "on", rename_all = "lowercase")]
enum Happening {
    Open,
    Interrupted,
    Message {
        event: String,
        #[serde(default)]
        id: String,
        kind: String,
        data: String,
    },
    Refused {
        status: u16,
    },
    Close {
        #[serde(default)]
        code: Option<u16>,
        #[serde(default)]
        reason: String,
    },
}

fn note(happening: Happening, journal: &Writer) -> Result<Option<End>> {
    match happening {
        Happening::Open => journal.opened(),
        Happening::Interrupted => journal.interrupted(),
        Happening::Message { event, id, kind, data } => {
            let bytes = BASE64.decode(data)?;
            let payload = if kind == "text" {
                Payload::Text(String::from_utf8(bytes)?)
            } else {
                Payload::Binary(bytes)
            };
            journal.message(Message { event, id, payload });
        }
        Happening::Refused { status } => return Ok(Some(End::Refused(status))),
        // 1006 is never sent on the wire: the library reports that there was no close frame.
        Happening::Close { code: Some(1006), .. } => return Ok(Some(End::Lost)),
        Happening::Close { code, reason } => {
            return Ok(Some(End::Closed { code: code.unwrap_or(1000), reason }));
        }
    }
    Ok(None)
}

fn command_line(payload: &Payload) -> Value {
    let kind = match payload {
        Payload::Text(_) => "text",
        Payload::Binary(_) => "binary",
    };
    json!({ "kind": kind, "data": BASE64.encode(payload.bytes()) })
}

/// A running script and the line protocol with it. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Script {
    stdin: Option<ChildStdin>,
    stdout: Lines<BufReader<ChildStdout>>,
    _child: Child,
}

impl Script {
    /// A script under Node.js.
    pub(crate) fn node(arguments: &[&str]) -> Result<Self> {
        ensure!(file("clients/node_modules").exists(), "npm packages are missing: run tests/run once");
        Self::start(Path::new("node"), arguments)
    }

    fn start(interpreter: &Path, arguments: &[&str]) -> Result<Self> {
        let mut child = Command::new(interpreter)
            .args(arguments)
            .current_dir(file("clients"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {} (run tests/run once)", interpreter.display()))?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        Ok(Self { stdin: child.stdin.take(), stdout: BufReader::new(stdout).lines(), _child: child })
    }

    /// Writes one line.
    pub(crate) async fn say(&mut self, line: &Value) -> Result<()> {
        let stdin = self.stdin.as_mut().context("the script was told to exit")?;
        stdin.write_all(format!("{line}\n").as_bytes()).await.context("the script is gone")
    }

    /// Waits for one line.
    pub(crate) async fn hear(&mut self) -> Result<Value> {
        let line = self.stdout.next_line().await?.context("the script is gone")?;
        Ok(serde_json::from_str(&line)?)
    }
}
