//! The servers that are compared: how each is started, reached and stopped.
//!
//! Owns their processes and files. A peer that cannot be had here is skipped, and says why.

use std::{
    fmt::Write as _,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use rustix::event::{Timespec, poll};

/// How long a server may take to listen.
const PATIENCE: Duration = Duration::from_secs(20);

/// Signs the tokens of Tidegate's clients; it guards nothing but a server that ends with this process.
const SECRET: &str = "a secret of the comparison, good on this machine and while it runs";

/// What Tidegate would hold against a tester.
const LIMITS: [&str; 6] =
    ["commands", "bytes", "user_commands", "user_bytes", "accepts", "attempts_per_address"];

const NCHAN: &str = "/usr/lib/nginx/modules/ngx_nchan_module.so";

/// A server to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub enum Kind {
    /// Tidegate with the broker in its own process
    Tidegate,
    /// Tidegate on Redis
    TidegateRedis,
    /// A broadcast server on `ws`, on Node.js
    Ws,
    /// Socket.IO with its Redis adapter, on Node.js
    SocketIo,
    /// nchan, in nginx
    Nchan,
}

/// Where things are that servers are made of.
#[derive(Clone, Debug)]
pub struct Workshop {
    pub tidegate: Option<PathBuf>,
    /// The directory with the scripts for Node.js, and their packages.
    pub scripts: PathBuf,
    /// A directory of this run, for configurations and logs.
    pub scratch: PathBuf,
    pub server_cpu: Option<usize>,
}

/// A server that runs.
pub struct Peer {
    pub kind: Kind,
    processes: Vec<Child>,
    port: u16,
    /// Of the Redis that it is on, which is the first of the processes.
    redis_port: Option<u16>,
    /// Whose CPU time and memory count. Redis is not among them: it is the same for all who use it.
    pub pids: Vec<u32>,
}

impl Kind {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tidegate => "tidegate",
            Self::TidegateRedis => "tidegate-redis",
            Self::Ws => "ws",
            Self::SocketIo => "socket-io",
            Self::Nchan => "nchan",
        }
    }

    /// What it is compared with: the one of ours that does as much.
    pub fn ours(self) -> Self {
        if self == Self::SocketIo { Self::TidegateRedis } else { Self::Tidegate }
    }

    /// What it is, with its version; or why it cannot be had here.
    pub fn version(self, workshop: &Workshop) -> anyhow::Result<String> {
        match self {
            Self::Tidegate => said(Command::new(workshop.tidegate()?).arg("--version")),
            Self::TidegateRedis => {
                let own = said(Command::new(workshop.tidegate()?).arg("--version"))?;
                let redis = said(Command::new("redis-server").arg("--version")).context("no redis-server")?;
                Ok(format!("{own} on {}", redis.split_whitespace().take(3).collect::<Vec<_>>().join(" ")))
            }
            Self::Ws | Self::SocketIo => {
                let node = said(Command::new("node").arg("--version")).context("no node")?;
                let packages: &[&str] = if self == Self::Ws {
                    &["ws"]
                } else {
                    &["socket.io", "@socket.io/redis-adapter", "redis"]
                };
                let mut words = format!("node {node}");
                for package in packages {
                    let path = workshop.scripts.join("node_modules").join(package).join("package.json");
                    let text = fs::read_to_string(&path).with_context(|| {
                        format!("no {package}: run `npm ci` in {}", workshop.scripts.display())
                    })?;
                    let package_json: serde_json::Value = serde_json::from_str(&text)?;
                    let version = package_json.get("version").and_then(|version| version.as_str());
                    write!(words, ", {package} {}", version.unwrap_or("?"))?;
                }
                if self == Self::SocketIo {
                    said(Command::new("redis-server").arg("--version")).context("no redis-server")?;
                }
                Ok(words)
            }
            Self::Nchan => {
                ensure!(Path::new(NCHAN).exists(), "no nchan: install nginx and libnginx-mod-nchan");
                let output = Command::new("nginx").arg("-v").output().context("no nginx")?;
                let words = String::from_utf8_lossy(&output.stderr);
                let nginx = words.rsplit('/').next().unwrap_or_default().trim().to_owned();
                Ok(format!("nginx {nginx} with {}", nchan_version().unwrap_or_else(|| "nchan".into())))
            }
        }
    }
}

impl Workshop {
    fn tidegate(&self) -> anyhow::Result<PathBuf> {
        let beside = || std::env::current_exe().ok().map(|path| path.with_file_name("tidegate"));
        let path = self.tidegate.clone().or_else(beside).filter(|path| path.exists());
        path.context("no tidegate: build it beside this program, or say where it is with --tidegate")
    }

    /// A command that will run on the server's CPU.
    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let Some(cpu) = self.server_cpu else { return Command::new(program) };
        let mut command = Command::new("taskset");
        command.arg("-c").arg(cpu.to_string()).arg(program);
        command
    }

    fn spawn(&self, name: &str, mut command: Command) -> anyhow::Result<Child> {
        let log = fs::File::create(self.scratch.join(format!("{name}.log")))?;
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        child.with_context(|| format!("cannot start {command:?}"))
    }

    fn redis(&self, port: u16) -> Command {
        let mut command = Command::new("redis-server");
        command.args(["--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--port"]);
        command.arg(port.to_string()).arg("--dir").arg(&self.scratch);
        command
    }

    fn start(&self, name: &str, command: Command, port: u16) -> anyhow::Result<Child> {
        let mut child = self.spawn(name, command)?;
        let begun = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            if let Some(status) = child.try_wait()? {
                bail!("{name} ended with {status}; see its log");
            }
            if begun.elapsed() > PATIENCE {
                let _gone: std::io::Result<()> = child.kill();
                let _gone: std::io::Result<_> = child.wait();
                bail!("{name} does not listen; see its log");
            }
            pause()?;
        }
        Ok(child)
    }
}

impl Peer {
    /// Starts the server and waits until it listens.
    pub fn start(kind: Kind, workshop: &Workshop) -> anyhow::Result<Self> {
        Self::start_with(kind, workshop, &[])
    }

    /// The same with further flags.
    pub fn start_with(kind: Kind, workshop: &Workshop, flags: &[String]) -> anyhow::Result<Self> {
        let port = free_port()?;
        // What has been started so far ends with this, should the rest fail.
        let mut peer = Self { kind, processes: Vec::new(), port, redis_port: None, pids: Vec::new() };
        let mut redis = String::new();
        if matches!(kind, Kind::TidegateRedis | Kind::SocketIo) {
            let port = free_port()?;
            peer.processes.push(workshop.start("redis-server", workshop.redis(port), port)?);
            peer.redis_port = Some(port);
            redis = format!("redis://127.0.0.1:{port}");
        }
        let command = match kind {
            Kind::Tidegate | Kind::TidegateRedis => {
                let mut command = workshop.command(workshop.tidegate()?);
                // What a person has exported for nodes of their own is not meant for this one.
                for (name, _) in std::env::vars_os() {
                    if name.as_encoded_bytes().starts_with(b"TIDEGATE_") {
                        command.env_remove(name);
                    }
                }
                command.env("TIDEGATE_AUTH__HS256_SECRET", SECRET).arg("--public-listen");
                command.arg(format!("127.0.0.1:{port}")).args(["--ops-listen", "127.0.0.1:0"]);
                // The peers have no limits either, and one tester does what no honest client would.
                for limit in LIMITS {
                    command.arg("--set").arg(format!("limits.{limit}=off"));
                }
                if !redis.is_empty() {
                    command.arg("--broker-url").arg(&redis);
                }
                command.args(flags);
                command
            }
            Kind::Ws | Kind::SocketIo => {
                let mut command = workshop.command("node");
                command.arg(workshop.scripts.join(format!("{}.mjs", kind.name())));
                command.env("PORT", port.to_string()).env("REDIS_URL", &redis);
                command
            }
            Kind::Nchan => {
                let path = workshop.scratch.join("nginx.conf");
                fs::write(&path, nginx(port, &workshop.scratch))?;
                let mut command = workshop.command("nginx");
                command.arg("-p").arg(&workshop.scratch).arg("-c").arg(path);
                command
            }
        };
        let child = workshop.start(kind.name(), command, port)?;
        let own = child.id();
        peer.processes.push(child);
        peer.pids.push(own);
        if kind == Kind::Nchan {
            let path = format!("/proc/{own}/task/{own}/children");
            let children = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
            peer.pids.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        Ok(peer)
    }

    /// The Redis that it is on, as a URL.
    pub fn redis(&self) -> Option<String> {
        self.redis_port.map(|port| format!("redis://127.0.0.1:{port}"))
    }

    /// Ends its Redis at once, as a crash does.
    pub fn kill_redis(&mut self) -> anyhow::Result<()> {
        let redis = self.processes.first_mut().filter(|_| self.redis_port.is_some());
        let redis = redis.context("it is on no Redis")?;
        redis.kill()?;
        redis.wait()?;
        Ok(())
    }

    /// Starts its Redis anew, at the same address. Whoever wants to know asks when it is there.
    pub fn restart_redis(&mut self, workshop: &Workshop) -> anyhow::Result<()> {
        let port = self.redis_port.context("it is on no Redis")?;
        let child = workshop.spawn("redis-server", workshop.redis(port))?;
        if let Some(redis) = self.processes.first_mut() {
            *redis = child;
        }
        Ok(())
    }

    /// Where the gateway listens, and the secret that its tokens are signed with.
    pub fn gateway(&self) -> (SocketAddr, &'static str) {
        (SocketAddr::from((Ipv4Addr::LOCALHOST, self.port)), SECRET)
    }

    /// The flags that make the tester speak with it.
    pub fn flags(&self) -> Vec<String> {
        let pids = self.pids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let mut flags = vec![format!("--server-pid={pids}")];
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        match self.kind {
            Kind::Tidegate | Kind::TidegateRedis => {
                flags.push(format!("--url=ws://{at}/rooms/load:{{room}}"));
                flags.push(format!("--hs256-secret={SECRET}"));
            }
            Kind::Ws => flags.push(format!("--url=ws://{at}/load:{{room}}")),
            Kind::Nchan => {
                flags.push(format!("--url=ws://{at}/load-{{room}}"));
                flags.push("--protocol=raw".into());
            }
            Kind::SocketIo => {
                flags.push(format!("--url=ws://{at}/socket.io/?EIO=4&transport=websocket"));
                flags.push("--protocol=socket-io".into());
            }
        }
        flags
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // The server first, then what it stands on. One that is asked to end takes its own children with it.
        for child in self.processes.iter_mut().rev() {
            let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
            if let Some(pid) = pid {
                // It may have ended by itself.
                let _gone: rustix::io::Result<()> =
                    rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
            let begun = Instant::now();
            while matches!(child.try_wait(), Ok(None)) && begun.elapsed() < Duration::from_secs(5) {
                if pause().is_err() {
                    break;
                }
            }
            let _gone: std::io::Result<()> = child.kill();
            let _gone: std::io::Result<_> = child.wait();
        }
    }
}

/// One worker, one room per path, no history: what the others are asked for, too.
fn nginx(port: u16, scratch: &Path) -> String {
    let scratch = scratch.display();
    format!(
        "load_module {NCHAN};\ndaemon off;\nworker_processes 1;\nworker_rlimit_nofile 20000;\n\
         pid {scratch}/nginx.pid;\nerror_log {scratch}/nginx.error.log;\n\
         events {{ worker_connections 19900; }}\n\
         http {{\n  access_log off;\n  client_body_temp_path {scratch}/body;\n  proxy_temp_path {scratch}/proxy;\n  \
         fastcgi_temp_path {scratch}/fastcgi;\n  uwsgi_temp_path {scratch}/uwsgi;\n  scgi_temp_path {scratch}/scgi;\n  \
         server {{\n    listen 127.0.0.1:{port} backlog=4096;\n    location ~ ^/(.+)$ {{\n      \
         nchan_pubsub websocket;\n      nchan_channel_id $1;\n      nchan_store_messages off;\n    }}\n  }}\n}}\n"
    )
}

fn nchan_version() -> Option<String> {
    let words = said(Command::new("dpkg-query").args(["-W", "libnginx-mod-nchan"])).ok()?;
    Some(format!("nchan {}", words.split_whitespace().nth(1)?))
}

/// The first line that a program says.
fn said(command: &mut Command) -> anyhow::Result<String> {
    let output =
        command.output().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// A moment between two looks at something that cannot be waited for.
fn pause() -> anyhow::Result<()> {
    let moment = Timespec::try_from(Duration::from_millis(50)).context("a moment")?;
    match poll(&mut [], Some(&moment)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_had_says_what_to_do() {
        let workshop = Workshop {
            tidegate: Some("/nowhere/tidegate".into()),
            scripts: "/nowhere".into(),
            scratch: "/nowhere".into(),
            server_cpu: None,
        };
        for (kind, words) in [(Kind::Tidegate, "--tidegate"), (Kind::TidegateRedis, "--tidegate")] {
            let error = format!("{:#}", kind.version(&workshop).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
        assert!(Peer::start(Kind::Tidegate, &workshop).is_err());
    }
}
