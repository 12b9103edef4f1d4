//! Servers that this program starts by itself, and runs of itself against them.
//!
//! Owns the processes: how a node and a Redis are started, waited for and ended, on which CPU, and where their
//! logs are. A measurement is a run of this very program with flags that a person could type. It decides
//! nothing about what is measured.

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

use crate::{exit::Exit, process};

/// How long a server may take to listen, and how long to end.
const PATIENCE: Duration = Duration::from_secs(20);
const FAREWELL: Duration = Duration::from_secs(5);

const REDIS: &str = "redis-server";

/// Signs the tokens of a node's clients; it guards nothing but a server that ends with this process.
pub const SECRET: &str = "a secret of the comparison, good on this machine and while it runs";

/// What a node would hold against a tester: one session publishes for a whole backend, and a few addresses stand
/// for a whole town.
const LIMITS: [&str; 6] =
    ["commands", "bytes", "user_commands", "user_bytes", "accepts", "attempts_per_address"];

/// Where things are that servers are made of, and where they run.
#[derive(Clone, Debug)]
pub struct Workshop {
    pub tidegate: Option<PathBuf>,
    /// A directory of this run, for configurations and logs.
    pub scratch: PathBuf,
    pub server_cpu: Option<usize>,
    pub client_cpu: Option<usize>,
}

/// Processes that end with this, the last one first.
#[derive(Debug, Default)]
pub struct Processes(Vec<Child>);

/// What a node is asked to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// On a Redis of its own, and not on the broker in its own process.
    pub redis: bool,
    /// With a certificate of ECDSA P-256.
    pub tls: bool,
    /// What else is configured: keys and values.
    pub set: &'static [(&'static str, &'static str)],
}

/// A node that listens.
#[derive(Debug)]
pub struct Node {
    pub pid: u32,
    pub public: SocketAddr,
    pub ops: SocketAddr,
    /// The URL of the Redis it is on.
    pub redis: Option<String>,
    /// What its certificate is trusted by.
    pub ca: Option<PathBuf>,
    /// Its Redis, if it has one, is the first of them.
    processes: Processes,
}

/// Lends `work` a directory of its own. If that fails the directory stays, since logs are in it.
pub fn with_scratch<T>(name: &str, work: impl FnOnce(&Path) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let scratch = std::env::temp_dir().join(format!("tidegate-{name}-{}", process::run_id()));
    fs::create_dir(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
    let outcome = work(&scratch);
    if outcome.is_ok() {
        fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))?;
    }
    outcome.with_context(|| format!("logs are in {}", scratch.display()))
}

impl Workshop {
    /// The gateway's program.
    pub fn tidegate(&self) -> anyhow::Result<PathBuf> {
        let beside = || std::env::current_exe().ok().map(|path| path.with_file_name("tidegate"));
        let path = self.tidegate.clone().or_else(beside).filter(|path| path.exists());
        path.context("no tidegate: build it beside this program, or say where it is with --tidegate")
    }

    /// A command that will run on the server's CPU.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let Some(cpu) = self.server_cpu else { return Command::new(program) };
        let mut command = Command::new("taskset");
        command.arg("-c").arg(cpu.to_string()).arg(program);
        command
    }

    /// Starts `command` and waits until `port` of this machine is listened on: its process. Its output goes to
    /// a log called `name`.
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

    /// Starts a Redis that keeps nothing: its URL.
    pub fn redis(&self, processes: &mut Processes) -> anyhow::Result<String> {
        let port = free_port()?;
        self.start(REDIS, self.redis_at(port), port, processes)?;
        Ok(format!("redis://{}", local(port)))
    }

    fn redis_at(&self, port: u16) -> Command {
        let mut command = Command::new(REDIS);
        command.args(["--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--port"]);
        command.arg(port.to_string()).arg("--dir").arg(&self.scratch);
        command
    }

    /// Starts a node, and waits until it listens.
    pub fn node(&self, wanted: &Wanted) -> anyhow::Result<Node> {
        self.node_with(wanted, &[])
    }

    /// The same with further flags.
    pub fn node_with(&self, wanted: &Wanted, flags: &[String]) -> anyhow::Result<Node> {
        let mut processes = Processes::default();
        let redis = if wanted.redis { Some(self.redis(&mut processes)?) } else { None };
        let certificate = if wanted.tls { Some(certificate(&self.scratch)?) } else { None };
        let (public, ops) = (local(free_port()?), local(free_port()?));
        let mut command = self.command(self.tidegate()?);
        // What a person has exported for nodes of their own is not meant for this one.
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
        let pid = self.start("tidegate", command, public.port(), &mut processes)?;
        let ca = certificate.map(|(certificate, _)| certificate);
        Ok(Node { pid, public, ops, redis, ca, processes })
    }

    /// Runs this program with `flags`, of which the first is the scenario: its report.
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
        // Whatever it has found by then is not what was to be measured.
        if output.status.code() == Some(Exit::Interrupted.code().into()) {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        match missing(&report) {
            0 => Ok(report),
            missing => bail!("{missing} deliveries were missing"),
        }
    }
}

/// A new certificate of ECDSA P-256 for this machine and its key, as PEM files in `directory`.
pub fn certificate(directory: &Path) -> anyhow::Result<(PathBuf, PathBuf)> {
    let names = ["localhost".to_owned(), Ipv4Addr::LOCALHOST.to_string()];
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(names)?;
    let (certificate, key) = (directory.join("node.pem"), directory.join("node.key"));
    fs::write(&certificate, cert.pem())?;
    fs::write(&key, signing_key.serialize_pem())?;
    Ok((certificate, key))
}

/// What of a report's deliveries did not arrive, whatever scenario it is of.
fn missing(report: &Value) -> u64 {
    let places = ["/counts/missing", "/limit/counts/missing", "/server/counts/missing"];
    places.iter().filter_map(|place| report.pointer(place)?.as_u64()).sum()
}

impl Wanted {
    /// The flags that the gateway's program is given.
    pub fn flags(&self) -> Vec<String> {
        let off = LIMITS.iter().map(|limit| format!("--set=limits.{limit}=off"));
        off.chain(self.set.iter().map(|(key, value)| format!("--set={key}={value}"))).collect()
    }
}

impl Node {
    /// One that somebody else has started, for tests of what is said to it.
    #[cfg(test)]
    pub fn elsewhere(public: SocketAddr, ops: SocketAddr) -> Self {
        Self { pid: 1, public, ops, redis: None, ca: None, processes: Processes::default() }
    }

    /// Ends its Redis at once, as a crash does.
    pub fn kill_redis(&mut self) -> anyhow::Result<()> {
        let redis = self.redis_process()?;
        redis.kill()?;
        redis.wait()?;
        Ok(())
    }

    /// Starts its Redis anew, at the same address. Whoever wants to know asks when it is there.
    pub fn restart_redis(&mut self, workshop: &Workshop) -> anyhow::Result<()> {
        let url = self.redis.as_deref().context("it is on no Redis")?;
        let port =
            url.rsplit(':').next().unwrap_or_default().parse().context("the port of a URL made here")?;
        *self.redis_process()? = workshop.spawn(REDIS, &mut workshop.redis_at(port))?;
        Ok(())
    }

    fn redis_process(&mut self) -> anyhow::Result<&mut Child> {
        self.processes.0.first_mut().filter(|_| self.redis.is_some()).context("it is on no Redis")
    }

    /// The flags that make the tester speak with it, at a path of its public listener.
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
    /// Takes `child` over, and lends it.
    pub fn add(&mut self, child: Child) -> anyhow::Result<&mut Child> {
        self.0.push(child);
        self.0.last_mut().context("the process that was added")
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        // The server before what it stands on. One that is asked to end takes its own children with it.
        for child in self.0.iter_mut().rev() {
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            if let Some(pid) = pid {
                // It may have ended by itself.
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

/// The first line that a program says.
pub fn said(command: &mut Command) -> anyhow::Result<String> {
    let output =
        command.output().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// A port of this machine that nobody listens on yet.
pub fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// This machine at `port`.
pub fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// A moment between two looks at something that cannot be waited for.
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
    fn a_directory_stays_if_its_logs_are_wanted() {
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
    fn what_is_missing_is_found_in_every_report() {
        assert_eq!(missing(&json!({ "counts": { "missing": 2 } })), 2);
        assert_eq!(
            missing(
                &json!({ "limit": { "counts": { "missing": 1 } }, "server": { "counts": { "missing": 3 } } })
            ),
            4
        );
        assert_eq!(missing(&json!({ "levels": [] })), 0);
    }
}
