//! Servers started by this program, and runs of this program against them.
//!
//! Owns the processes: how a node and a Redis are started, awaited and stopped, on which CPU, and where their
//! logs are. A measurement runs this program with flags that a person could type. It does not decide what is
//! measured.

use std::{
    ffi::OsStr,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustix::{
    event::{Timespec, poll},
    process::{Pid, Signal, kill_process},
};
use serde_json::Value;

use crate::{cli::history::Stage, exit::Exit, process};

/// How long a server may take to listen, and to exit.
const PATIENCE: Duration = Duration::from_secs(20);
const FAREWELL: Duration = Duration::from_secs(5);

const REDIS: &str = "redis-server";

/// Signs the tokens of a node's clients. It protects only a server that ends with this process.
pub const SECRET: &str = "a secret of the comparison, good on this machine and while it runs";

/// Limits that a tester would exceed: one session publishes like a whole backend, and a few addresses stand
/// for many users.
const LIMITS: [&str; 6] =
    ["commands", "bytes", "user_commands", "user_bytes", "accepts", "attempts_per_address"];

/// The programs to start, and where they run.
#[derive(Clone, Debug)]
pub struct Workshop {
    pub tidegate: Option<PathBuf>,
    /// A directory of this run, for configurations and logs.
    pub scratch: PathBuf,
    pub server_cpu: Option<usize>,
    pub client_cpu: Option<usize>,
}

/// Processes that are stopped when this is dropped, the last one first.
#[derive(Debug, Default)]
pub struct Processes(Vec<Child>);

/// The configuration of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Use a Redis of its own instead of the in-process broker.
    pub redis: bool,
    /// Use TLS with an ECDSA P-256 certificate.
    pub tls: bool,
    /// Additional settings: keys and values.
    pub set: &'static [(&'static str, &'static str)],
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    pub pid: u32,
    pub public: SocketAddr,
    pub ops: SocketAddr,
    /// The URL of its Redis.
    pub redis: Option<String>,
    /// The authority that its certificate is trusted by.
    pub ca: Option<PathBuf>,
    /// If it has a Redis, that is the first of them.
    processes: Processes,
}

/// Runs `work` with a temporary directory. If `work` fails the directory is kept, because it contains the
/// logs.
pub fn with_scratch<T>(name: &str, work: impl FnOnce(&Path) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let scratch = std::env::temp_dir().join(format!("tidegate-{name}-{}", process::run_id()));
    fs::create_dir(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
    let outcome = work(&scratch);
    if outcome.is_ok() {
        fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))?;
    }
    outcome.with_context(|| format!("logs are in {}", scratch.display()))
}

impl Workshop {
    /// For a scenario about rooms with a history. This process is pinned already.
    pub fn for_stage(stage: &Stage, scratch: &Path) -> Self {
        Self {
            tidegate: stage.tidegate.clone(),
            scratch: scratch.to_owned(),
            server_cpu: stage.server_cpu,
            client_cpu: None,
        }
    }

    /// The gateway's program.
    pub fn tidegate(&self) -> anyhow::Result<PathBuf> {
        let beside = || std::env::current_exe().ok().map(|path| path.with_file_name("tidegate"));
        let path = self.tidegate.clone().or_else(beside).filter(|path| path.exists());
        path.context("no tidegate: build it beside this program, or set its path with --tidegate")
    }

    /// A command that runs on the server's CPU.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let Some(cpu) = self.server_cpu else { return Command::new(program) };
        let mut command = Command::new("taskset");
        command.arg("-c").arg(cpu.to_string()).arg(program);
        command
    }

    /// Starts `command`, waits until `port` of this machine is open, and returns the process. Its output goes
    /// to a log named `name`.
    pub fn start(
        &self,
        name: &str,
        mut command: Command,
        port: u16,
        processes: &mut Processes,
    ) -> anyhow::Result<u32> {
        let child = processes.add(self.spawn(name, &mut command)?)?;
        let begun = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            if let Some(status) = child.try_wait()? {
                bail!("{name} ended with {status}; see its log");
            }
            ensure!(begun.elapsed() < PATIENCE, "{name} does not listen; see its log");
            pause(Duration::from_millis(20))?;
        }
        Ok(child.id())
    }

    fn spawn(&self, name: &str, command: &mut Command) -> anyhow::Result<Child> {
        let log = fs::File::create(self.scratch.join(format!("{name}.log")))?;
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        child.with_context(|| format!("cannot start {command:?}"))
    }

    /// Starts a Redis without persistence and returns its URL.
    pub fn redis(&self, processes: &mut Processes) -> anyhow::Result<String> {
        let port = free_port()?;
        self.start(REDIS, self.redis_at(Command::new(REDIS), port), port, processes)?;
        Ok(format!("redis://{}", local(port)))
    }

    /// The same on the server's CPU: Redis is what is measured.
    pub fn measured_redis(&self, processes: &mut Processes) -> anyhow::Result<String> {
        let port = free_port()?;
        self.start(REDIS, self.redis_at(self.command(REDIS), port), port, processes)?;
        Ok(format!("redis://{}", local(port)))
    }

    fn redis_at(&self, mut command: Command, port: u16) -> Command {
        command.args(["--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--port"]);
        command.arg(port.to_string()).arg("--dir").arg(&self.scratch);
        command
    }

    /// Starts a node and waits until it listens.
    pub fn node(&self, wanted: &Wanted) -> anyhow::Result<Node> {
        self.node_with(wanted, &[])
    }

    /// The same with additional flags.
    pub fn node_with(&self, wanted: &Wanted, flags: &[String]) -> anyhow::Result<Node> {
        let mut processes = Processes::default();
        let redis = if wanted.redis { Some(self.redis(&mut processes)?) } else { None };
        let certificate = if wanted.tls { Some(certificate(&self.scratch)?) } else { None };
        let (public, ops) = (local(free_port()?), local(free_port()?));
        let mut command = self.command(self.tidegate()?);
        // Variables exported for other nodes must not configure this one.
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"TIDEGATE_") {
                command.env_remove(name);
            }
        }
        command.env("TIDEGATE_AUTH__HS256_SECRET", SECRET);
        command.arg("--public-listen").arg(public.to_string()).arg("--ops-listen").arg(ops.to_string());
        command.args(wanted.flags()).args(flags);
        if let Some(redis) = &redis {
            command.arg("--broker-url").arg(redis);
        }
        if let Some((certificate, key)) = &certificate {
            for (name, path) in [("cert", certificate), ("key", key)] {
                command.arg("--set").arg(format!("tls.{name}={}", path.display()));
            }
        }
        // Several nodes of one run need a log each.
        let pid =
            self.start(&format!("tidegate-{}", public.port()), command, public.port(), &mut processes)?;
        let ca = certificate.map(|(certificate, _)| certificate);
        Ok(Node { pid, public, ops, redis, ca, processes })
    }

    /// Runs this program with `flags`, the first of which is the scenario, and returns its report.
    pub fn run(&self, flags: &[String]) -> anyhow::Result<Value> {
        let json = self.scratch.join("report.json");
        let (scenario, flags) = flags.split_first().context("a scenario")?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(scenario).arg("--json").arg(&json);
        command.args(self.client_cpu.map(|cpu| format!("--client-cpu={cpu}")));
        command.args(flags).stdin(Stdio::null()).stdout(Stdio::null());
        let output = command.stderr(Stdio::piped()).spawn()?.wait_with_output()?;
        let report: Value = match fs::read(&json) {
            Ok(bytes) => serde_json::from_slice(&bytes)?,
            Err(_) => bail!("{}", String::from_utf8_lossy(&output.stderr).trim()),
        };
        fs::remove_file(&json)?;
        // An interrupted run did not measure what was intended.
        if output.status.code() == Some(Exit::Interrupted.code().into()) {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        match (missing(&report), unmet(&report)) {
            (0, None) => Ok(report),
            (0, Some(words)) => bail!("{words}"),
            (missing, _) => bail!("{missing} deliveries were missing"),
        }
    }
}

/// Creates an ECDSA P-256 certificate for this machine and its key, as PEM files in `directory`.
pub fn certificate(directory: &Path) -> anyhow::Result<(PathBuf, PathBuf)> {
    let names = ["localhost".to_owned(), Ipv4Addr::LOCALHOST.to_string()];
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(names)?;
    let (certificate, key) = (directory.join("node.pem"), directory.join("node.key"));
    fs::write(&certificate, cert.pem())?;
    fs::write(&key, signing_key.serialize_pem())?;
    Ok((certificate, key))
}

/// The missing deliveries of a report, of any scenario.
fn missing(report: &Value) -> u64 {
    let places = ["/counts/missing", "/limit/counts/missing", "/server/counts/missing"];
    places.iter().filter_map(|place| report.pointer(place)?.as_u64()).sum()
}

/// The first expectation of a report that was not met. A number of a run that was not as expected counts for
/// nothing.
fn unmet(report: &Value) -> Option<&str> {
    let expectations = report.get("expectations")?.as_array()?;
    let unmet = expectations.iter().find(|one| one.get("met") == Some(&Value::Bool(false)))?;
    unmet.get("words")?.as_str()
}

impl Wanted {
    /// The flags for the gateway's program.
    pub fn flags(&self) -> Vec<String> {
        let off = LIMITS.iter().map(|limit| format!("--set=limits.{limit}=off"));
        off.chain(self.set.iter().map(|(key, value)| format!("--set={key}={value}"))).collect()
    }
}

impl Node {
    /// A node started elsewhere, for tests of the flags.
    #[cfg(test)]
    pub fn elsewhere(public: SocketAddr, ops: SocketAddr) -> Self {
        Self { pid: 1, public, ops, redis: None, ca: None, processes: Processes::default() }
    }

    /// Kills its Redis, as a crash does.
    pub fn kill_redis(&mut self) -> anyhow::Result<()> {
        let redis = self.redis_process()?;
        redis.kill()?;
        redis.wait()?;
        Ok(())
    }

    /// Kills the node itself, as a crash does. Its Redis keeps running.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        let node = self.processes.0.last_mut().context("the node was started elsewhere")?;
        node.kill()?;
        node.wait()?;
        Ok(())
    }

    /// Restarts its Redis at the same address. The caller has to wait until it is up.
    pub fn restart_redis(&mut self, workshop: &Workshop) -> anyhow::Result<()> {
        let url = self.redis.as_deref().context("the node has no Redis")?;
        let port =
            url.rsplit(':').next().unwrap_or_default().parse().context("a Redis URL without a port")?;
        *self.redis_process()? = workshop.spawn(REDIS, &mut workshop.redis_at(Command::new(REDIS), port))?;
        Ok(())
    }

    fn redis_process(&mut self) -> anyhow::Result<&mut Child> {
        self.processes.0.first_mut().filter(|_| self.redis.is_some()).context("the node has no Redis")
    }

    /// The flags with which the tester connects to it, at a path of its public listener.
    pub fn flags(&self, path: &str) -> Vec<String> {
        let scheme = if self.ca.is_some() { "wss" } else { "ws" };
        let ca = self.ca.iter().map(|ca| format!("--ca={}", ca.display()));
        [
            format!("--url={scheme}://{}{path}", self.public),
            format!("--hs256-secret={SECRET}"),
            format!("--server-pid={}", self.pid),
        ]
        .into_iter()
        .chain(ca)
        .collect()
    }
}

impl Processes {
    /// Takes ownership of `child` and returns a reference to it.
    pub fn add(&mut self, child: Child) -> anyhow::Result<&mut Child> {
        self.0.push(child);
        self.0.last_mut().context("the process that was added")
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        // Stop a server before those it depends on. One that is terminated stops its own children.
        for child in self.0.iter_mut().rev() {
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            if let Some(pid) = pid {
                // It may have exited already.
                let _gone: rustix::io::Result<()> = kill_process(pid, Signal::TERM);
            }
            let begun = Instant::now();
            while matches!(child.try_wait(), Ok(None)) && begun.elapsed() < FAREWELL {
                if pause(Duration::from_millis(20)).is_err() {
                    break;
                }
            }
            let _gone: std::io::Result<()> = child.kill();
            let _gone: std::io::Result<_> = child.wait();
        }
    }
}

/// The first line of a program's output.
pub fn said(command: &mut Command) -> anyhow::Result<String> {
    let output =
        command.output().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// A free port of this machine.
pub fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// The loopback address with `port`.
pub fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// Sleeps between two polls of a state that cannot be awaited.
pub fn pause(span: Duration) -> anyhow::Result<()> {
    let span = Timespec::try_from(span).context("a moment")?;
    match poll(&mut [], Some(&span)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_failed_run_keeps_its_directory() {
        let mut kept = PathBuf::new();
        let failed = with_scratch("test-failed", |path| -> anyhow::Result<()> {
            path.clone_into(&mut kept);
            bail!("no")
        });
        assert!(format!("{:#}", failed.unwrap_err()).contains(kept.to_str().unwrap()));
        assert!(kept.is_dir());
        fs::remove_dir(&kept).unwrap();
        let gone = with_scratch("test-done", |path| Ok(path.to_owned())).unwrap();
        assert!(!gone.exists());
    }

    #[test]
    fn missing_deliveries_are_found_in_every_report() {
        assert_eq!(missing(&json!({ "counts": { "missing": 2 } })), 2);
        assert_eq!(
            missing(
                &json!({ "limit": { "counts": { "missing": 1 } }, "server": { "counts": { "missing": 3 } } })
            ),
            4
        );
        assert_eq!(missing(&json!({ "levels": [] })), 0);
    }

    #[test]
    fn expectations_that_were_not_met_are_found() {
        let met = json!({ "words": "this", "met": true });
        let report = json!({ "expectations": [met, { "words": "that", "met": false }] });
        assert_eq!(unmet(&report), Some("that"));
        assert_eq!(unmet(&json!({ "expectations": [met] })), None);
        assert_eq!(unmet(&json!({})), None);
    }
}
