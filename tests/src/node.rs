//! A node as a process.
//!
//! Owns starting `tidegate`, reading its addresses from its log, keeping its output, its signals and its
//! exit. Does not know what a node answers.

use std::{
    ffi::OsString,
    io::{self, PipeReader, PipeWriter, Write as _, pipe},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::{Child, Command},
    sync::watch,
    task::JoinSet,
    time::timeout,
};

use crate::{
    PATIENCE,
    eventually::eventually,
    http::{Request, Response},
    samples::Samples,
    token::SECRET,
};

/// How many lines of a node's output a failed test shows.
const TAIL: usize = 40;

/// A node that has not been started.
#[derive(Clone, Debug)]
pub struct Builder {
    settings: Vec<(String, String)>,
    environment: Vec<(String, String)>,
    config_file: Option<PathBuf>,
    pid_one: bool,
    unread_stdout: bool,
    open_files: Option<usize>,
}

impl Builder {
    /// A node with a key, on ports that the system chooses, that drains at once when it gets a signal. No rate is
    /// limited: all clients of a scenario share an address, and mostly a user, and send all their messages at once.
    pub fn new() -> Self {
        let rates = [
            "attempts_per_address",
            "connections_per_address",
            "commands",
            "bytes",
            "user_commands",
            "user_bytes",
        ];
        let unlimited = |node: Self, rate| node.set(&format!("limits.{rate}"), "off");
        rates
            .into_iter()
            .fold(Self::unconfigured(), unlimited)
            .set("auth.hs256_secret", SECRET)
            .set("drain.pause", "0s")
            .set("drain.window", "100ms")
            .set("drain.deadline", "10s")
    }

    /// A node on ports that the system chooses, with defaults otherwise.
    pub fn unconfigured() -> Self {
        Self {
            settings: Vec::new(),
            environment: Vec::new(),
            config_file: None,
            pid_one: false,
            unread_stdout: false,
            open_files: None,
        }
        .set("public.listen", "127.0.0.1:0")
        .set("ops.listen", "127.0.0.1:0")
        .set("log.format", "json")
    }

    /// Sets a configuration key. The last value wins.
    #[must_use]
    pub fn set(mut self, key: &str, value: &str) -> Self {
        self.settings.retain(|(own, _)| own != key);
        self.settings.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Sets an environment variable. A node inherits only `PATH`.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Uses this configuration file. [`Builder::set`] overrides it.
    #[must_use]
    pub fn config_file(mut self, path: &Path) -> Self {
        self.config_file = Some(path.to_owned());
        self
    }

    /// Runs the node as the first process of a PID namespace, as in a container without an init.
    #[must_use]
    pub fn as_pid_one(mut self) -> Self {
        self.pid_one = true;
        self
    }

    /// Gives the node a standard output that is already full and is never read.
    #[must_use]
    pub fn with_unread_stdout(mut self) -> Self {
        self.unread_stdout = true;
        self
    }

    /// Limits its file descriptors (`ulimit -n`), which it cannot raise.
    #[must_use]
    pub fn open_files(mut self, most: usize) -> Self {
        self.open_files = Some(most);
        self
    }

    /// Starts the node and waits until it is ready.
    pub async fn start(&self) -> Result<Node> {
        let node = self.launch().await?;
        node.until_ready().await?;
        Ok(node)
    }

    /// Starts the node and waits until both listeners are open, ready or not.
    pub async fn launch(&self) -> Result<Node> {
        let mut node = self.spawn()?;
        let mut output = node.output.clone();
        let listening =
            output.wait_for(|output| output.address("public").is_some() && output.address("ops").is_some());
        let found = match timeout(PATIENCE, listening).await {
            Ok(Ok(output)) => output.address("public").zip(output.address("ops")),
            Ok(Err(_)) | Err(_) => None,
        };
        let Some(addresses) = found else {
            bail!("the node did not open its listeners; it wrote:\n{}", node.output());
        };
        (node.public, node.ops) = addresses;
        node.pid = node.find_pid().await?;
        Ok(node)
    }

    /// Starts a node that is expected to exit by itself, and returns its exit status and its whole output.
    pub async fn run_to_the_end(&self) -> Result<(ExitStatus, String)> {
        let mut node = self.spawn()?;
        let status = node.exited().await?;
        Ok((status, node.output()))
    }

    fn spawn(&self) -> Result<Node> {
        let directory = tempfile::tempdir()?;
        let mut command = self.command(binary()?);
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if let Some(path) = &self.config_file {
            command.arg("--config").arg(path);
        }
        for (key, value) in &self.settings {
            command.arg("--set").arg(format!("{key}={value}"));
        }
        let unread_stdout = self.unread_stdout.then(full_pipe).transpose()?;
        if let Some((_, full)) = &unread_stdout {
            command.stdout(full.try_clone()?);
        }
        let mut child = command.spawn().with_context(|| format!("start {command:?}"))?;
        let (writer, output) = watch::channel(Output::default());
        let (reading, read) = watch::channel(true);
        let mut readers = JoinSet::new();
        if let Some(stdout) = child.stdout.take() {
            readers.spawn(keep(stdout, writer.clone(), read.clone()));
        }
        readers.spawn(keep(child.stderr.take().context("stderr is piped")?, writer, read));
        let unknown = SocketAddr::from(([127, 0, 0, 1], 0));
        Ok(Node {
            child,
            pid: None,
            wrapped: self.pid_one,
            public: unknown,
            ops: unknown,
            output,
            reading,
            readers,
            _unread_stdout: unread_stdout.map(|(unread, _)| unread),
            _directory: directory,
        })
    }

    fn command(&self, binary: PathBuf) -> Command {
        if let Some(most) = self.open_files {
            // `prlimit` replaces itself with the program: the process is the node itself.
            let mut command = Command::new("prlimit");
            command.arg(format!("--nofile={most}:{most}")).arg(binary);
            return command;
        }
        if !self.pid_one {
            return Command::new(binary);
        }
        let mut command = Command::new("unshare");
        if !geteuid().is_root() {
            command.arg("--map-root-user");
        }
        command.args(["--fork", "--pid", "--mount-proc", "--kill-child"]).arg(binary);
        command
    }
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

/// The resources that a node holds for its clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Levels {
    /// Open file descriptors, including those that have nothing to do with clients.
    pub descriptors: usize,
    /// Clients' sockets.
    pub sockets: u64,
    /// Sessions.
    pub connections: u64,
    /// Sessions in rooms.
    pub subscriptions: u64,
    /// Rooms that the node has interest in.
    pub rooms: u64,
    /// Bytes queued for clients.
    pub outbound_bytes: u64,
}

/// A running node. Killed when dropped.
#[derive(Debug)]
pub struct Node {
    child: Child,
    /// The node's own process, not a wrapper's.
    pid: Option<Pid>,
    wrapped: bool,
    /// The address for clients.
    pub public: SocketAddr,
    /// The address for probes and metrics.
    pub ops: SocketAddr,
    output: watch::Receiver<Output>,
    /// Whether its output is read.
    reading: watch::Sender<bool>,
    readers: JoinSet<()>,
    _unread_stdout: Option<PipeReader>,
    _directory: TempDir,
}

impl Node {
    /// The URL of a room's WebSocket. `query` may be empty.
    pub fn ws(&self, room: &str, token: &str, query: &str) -> String {
        format!("ws://{}{}", self.public, target(room, token, query))
    }

    /// The URL of a room's event stream, or of its `POST`.
    pub fn url(&self, room: &str, token: &str, query: &str) -> String {
        format!("http://{}{}", self.public, target(room, token, query))
    }

    /// Its process id.
    pub fn pid(&self) -> Option<Pid> {
        self.pid
    }

    /// Publishes a body by `POST` and expects it to be accepted.
    pub async fn post(&self, room: &str, token: &str, content_type: &str, body: &[u8]) -> Result<()> {
        let request = Request::post(&format!("/rooms/{room}"), content_type, body).bearer(token);
        let response = request.send(self.public).await?;
        ensure!(response.status == 202, "accepted, not {} {}", response.status, response.text());
        Ok(())
    }

    /// Sends a `GET` to the ops listener.
    pub async fn ask_ops(&self, path: &str) -> Result<Response> {
        Request::get(path).send(self.ops).await
    }

    /// The current samples of `/metrics`.
    pub async fn samples(&self) -> Result<Samples> {
        let response = self.ask_ops("/metrics").await?;
        ensure!(response.status == 200, "metrics, not {}", response.status);
        Ok(Samples::parse(&response.text()))
    }

    /// Waits until the metrics satisfy the condition.
    pub async fn until_samples(&self, what: &str, state: impl Fn(&Samples) -> bool) -> Result<Samples> {
        let poll = async {
            loop {
                let samples = self.samples().await?;
                if state(&samples) {
                    return Ok(samples);
                }
                pause().await;
            }
        };
        match timeout(PATIENCE, poll).await {
            Ok(samples) => samples,
            Err(_) => bail!("no {what} within {PATIENCE:?}: {:?}", self.samples().await?),
        }
    }

    /// Waits until the node is ready.
    pub async fn until_ready(&self) -> Result<()> {
        self.until_probe("/readyz", 200).await.map(drop)
    }

    /// Waits until a probe answers with this status.
    pub async fn until_probe(&self, path: &str, status: u16) -> Result<Response> {
        let mut last = String::from("no answer");
        let poll = async {
            loop {
                match self.ask_ops(path).await {
                    Ok(response) if response.status == status => return response,
                    Ok(response) => last = format!("{} {}", response.status, response.text()),
                    Err(error) => last = format!("{error:#}"),
                }
                pause().await;
            }
        };
        match timeout(PATIENCE, poll).await {
            Ok(response) => Ok(response),
            Err(_) => bail!("{path} is not {status} within {PATIENCE:?}, it is: {last}"),
        }
    }

    /// The node's output so far, standard output and standard error together.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.output.borrow().bytes).into_owned()
    }

    /// Stops reading the node's output, so that its pipes fill.
    pub fn stop_reading(&self) {
        self.reading.send_replace(false);
    }

    /// Resumes reading the node's output.
    pub fn read_on(&self) {
        self.reading.send_replace(true);
    }

    /// Waits until the node has written this.
    pub async fn until_written(&self, text: &str) -> Result<()> {
        let mut output = self.output.clone();
        let written = output.wait_for(|output| String::from_utf8_lossy(&output.bytes).contains(text));
        match timeout(PATIENCE, written).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => bail!("the node has not written {text:?}"),
        }
    }

    /// Sends SIGTERM to the node itself.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// Sends SIGHUP, which makes the node reload its configuration.
    pub fn hang_up(&self) -> Result<()> {
        self.signal(Signal::HUP)
    }

    /// Sends a signal to the node itself.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.pid.context("the node has been launched")?;
        kill_process(pid, signal).with_context(|| format!("{signal:?}"))
    }

    /// Kills the node without warning.
    pub async fn kill(&mut self) -> Result<()> {
        self.child.kill().await.context("SIGKILL")
    }

    /// Waits for the node's exit. All its output has been read by then.
    pub async fn exited(&mut self) -> Result<ExitStatus> {
        let Ok(status) = timeout(PATIENCE, self.child.wait()).await else {
            bail!("the node has not ended within {PATIENCE:?}");
        };
        self.read_on();
        while self.readers.join_next().await.is_some() {}
        Ok(status?)
    }

    /// Resident memory, in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(self.proc("status")?)?;
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        Ok(kib.context("VmRSS")?.trim().parse::<u64>()? * 1024)
    }

    /// Open file descriptors.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(std::fs::read_dir(self.proc("fd")?)?.count())
    }

    /// Waits until no more than `count` file descriptors are open.
    pub async fn until_descriptors(&self, count: usize) -> Result<()> {
        let poll = async {
            while self.descriptors()? > count {
                pause().await;
            }
            Ok(())
        };
        match timeout(PATIENCE, poll).await {
            Ok(done) => done,
            Err(_) => bail!("{} descriptors are open, {count} were expected", self.descriptors()?),
        }
    }

    /// What it currently holds for its clients.
    pub async fn levels(&self) -> Result<Levels> {
        let samples = self.samples().await?;
        let level = |name| samples.sum(name, &[]);
        Ok(Levels {
            descriptors: self.descriptors()?,
            sockets: level("tidegate_sockets"),
            connections: level("tidegate_connections"),
            subscriptions: level("tidegate_subscriptions"),
            rooms: level("tidegate_rooms"),
            outbound_bytes: level("tidegate_outbound_bytes"),
        })
    }

    /// What it holds once there are exactly this many sessions, each in its own room.
    pub async fn levels_of(&self, sessions: u64) -> Result<Levels> {
        self.until_samples(&format!("{sessions} sessions and nothing else"), |samples| {
            ["tidegate_sockets", "tidegate_connections", "tidegate_subscriptions"]
                .iter()
                .all(|name| samples.sum(name, &[]) == sessions)
        })
        .await?;
        self.levels().await
    }

    /// Waits until it holds no more than at that time.
    pub async fn until_levels(&self, before: &Levels) -> Result<()> {
        eventually("nothing stays behind", async || {
            let levels = self.levels().await.map_err(|error| format!("{error:#}"))?;
            // The scrape itself has a descriptor, which may outlive it by a moment.
            let same = Levels { descriptors: before.descriptors, ..levels.clone() };
            if same == *before && levels.descriptors <= before.descriptors {
                Ok(())
            } else {
                Err(format!("{levels:?}, it was {before:?}"))
            }
        })
        .await
    }

    /// Fails if anything in the node has panicked.
    pub fn ensure_sound(&self) -> Result<()> {
        let output = self.output();
        ensure!(!output.contains("panicked"), "the node panicked:\n{output}");
        Ok(())
    }

    fn proc(&self, file: &str) -> Result<PathBuf> {
        let pid = self.pid.context("the node has been launched")?;
        Ok(Path::new("/proc").join(pid.as_raw_nonzero().to_string()).join(file))
    }

    /// The node's process: the child, or the wrapper's child.
    async fn find_pid(&self) -> Result<Option<Pid>> {
        let own = self.child.id().context("the node is running")?;
        let number = if self.wrapped {
            let children = tokio::fs::read_to_string(format!("/proc/{own}/task/{own}/children")).await?;
            children.split_whitespace().next().context("the wrapper has a child")?.parse()?
        } else {
            i32::try_from(own)?
        };
        Ok(Pid::from_raw(number))
    }
}

/// The test runner shows this only if the test fails.
impl Drop for Node {
    #[expect(clippy::print_stderr, reason = "the test runner captures it and shows it for failed tests")]
    fn drop(&mut self) {
        let output = self.output();
        let lines: Vec<_> = output.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(TAIL)..).unwrap_or_default();
        eprintln!("--- the last lines of the node on {}:\n{}", self.public, tail.join("\n"));
    }
}

/// The node's output.
#[derive(Debug, Default)]
struct Output {
    bytes: Vec<u8>,
    listening: Vec<(String, SocketAddr)>,
}

impl Output {
    fn address(&self, listener: &str) -> Option<SocketAddr> {
        self.listening.iter().find(|(name, _)| name == listener).map(|(_, address)| *address)
    }

    fn line(&mut self, line: &[u8]) {
        if let Some(found) = listening(line) {
            self.listening.push(found);
        }
        self.bytes.extend_from_slice(line);
    }
}

/// The listener and its address, if this is the line that contains them.
fn listening(line: &[u8]) -> Option<(String, SocketAddr)> {
    let line: Value = serde_json::from_slice(line).ok()?;
    let field = |name: &str| line.get(name).or_else(|| line.get("fields")?.get(name))?.as_str();
    (field("message")? == "listening").then_some(())?;
    Some((field("listener")?.to_owned(), field("address")?.parse().ok()?))
}

async fn keep(
    mut stream: impl AsyncRead + Unpin,
    output: watch::Sender<Output>,
    mut reading: watch::Receiver<bool>,
) {
    let mut pending = Vec::new();
    // An error means that the node was dropped: keep reading the rest.
    while {
        let _ = reading.wait_for(|reading| *reading).await;
        matches!(stream.read_buf(&mut pending).await, Ok(count) if count > 0)
    } {
        if let Some(end) = pending.iter().rposition(|&byte| byte == b'\n') {
            let rest = pending.split_off(end + 1);
            let lines = std::mem::replace(&mut pending, rest);
            output.send_modify(|output| {
                for line in lines.split_inclusive(|&byte| byte == b'\n') {
                    output.line(line);
                }
            });
        }
    }
    output.send_modify(|output| output.line(&pending));
}

/// Both ends of a full pipe.
fn full_pipe() -> Result<(PipeReader, PipeWriter)> {
    let (reader, writer) = pipe()?;
    rustix::io::ioctl_fionbio(&writer, true)?;
    loop {
        match (&writer).write(&[b'.'; 4096]) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error.into()),
        }
    }
    rustix::io::ioctl_fionbio(&writer, false)?;
    Ok((reader, writer))
}

/// The program: `TIDEGATE_BIN`, or the one beside the running test.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("TIDEGATE_BIN").filter(|path| path != &OsString::new()) {
        return Ok(path.into());
    }
    let test = std::env::current_exe()?;
    let profile = test.parent().and_then(Path::parent).context("a test lies in target/<profile>/deps")?;
    let path = profile.join("tidegate");
    ensure!(path.exists(), "{} is missing: run tests/run, or build it with `cargo build`", path.display());
    Ok(path)
}

fn target(room: &str, token: &str, query: &str) -> String {
    let query = if query.is_empty() { String::new() } else { format!("&{query}") };
    format!("/rooms/{room}?token={token}{query}")
}

/// The time between two polls of something that has no event.
async fn pause() {
    tokio::time::sleep(Duration::from_millis(20)).await;
}
