//! The servers to compare: how each is started, reached and stopped.
//!
//! Owns what is specific to each; the [`workshop`](crate::workshop) owns the processes. A server that is not
//! installed is skipped with the reason.

use std::{fmt::Write as _, fs, path::Path, process::Command};

use anyhow::{Context, ensure};
use clap::ValueEnum;

use crate::workshop::{Node, Processes, Wanted, Workshop, free_port, local, said};

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

/// A running server.
pub struct Peer {
    kind: Kind,
    port: u16,
    /// The processes whose CPU time and memory count. Redis is not among them: it is the same for all servers
    /// that use it.
    pids: Vec<u32>,
    node: Option<Node>,
    _processes: Processes,
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

    /// The Tidegate configuration that it is compared with: the one with the same capabilities.
    pub fn ours(self) -> Self {
        if self == Self::SocketIo { Self::TidegateRedis } else { Self::Tidegate }
    }

    /// Its name and version, or why it is not available on this machine.
    pub fn version(self, workshop: &Workshop, scripts: &Path) -> anyhow::Result<String> {
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
                    let path = scripts.join("node_modules").join(package).join("package.json");
                    let text = fs::read_to_string(&path)
                        .with_context(|| format!("no {package}: run `npm ci` in {}", scripts.display()))?;
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

impl Peer {
    /// Starts the server and waits until it listens.
    pub fn start(kind: Kind, workshop: &Workshop, scripts: &Path) -> anyhow::Result<Self> {
        let port = free_port()?;
        let mut processes = Processes::default();
        let command = match kind {
            Kind::Tidegate | Kind::TidegateRedis => {
                let wanted = Wanted { redis: kind == Kind::TidegateRedis, ..Wanted::default() };
                let node = workshop.node(&wanted)?;
                return Ok(Self {
                    kind,
                    port,
                    pids: Vec::new(),
                    node: Some(node),
                    _processes: Processes::default(),
                });
            }
            Kind::Ws | Kind::SocketIo => {
                let mut command = workshop.command("node");
                command.arg(scripts.join(format!("{}.mjs", kind.name()))).env("PORT", port.to_string());
                if kind == Kind::SocketIo {
                    command.env("REDIS_URL", workshop.redis(&mut processes)?);
                }
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
        let own = workshop.start(kind.name(), command, port, &mut processes)?;
        let mut pids = vec![own];
        if kind == Kind::Nchan {
            let path = format!("/proc/{own}/task/{own}/children");
            let children = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
            pids.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        Ok(Self { kind, port, pids, node: None, _processes: processes })
    }

    /// The flags with which the tester uses this server.
    pub fn flags(&self) -> Vec<String> {
        if let Some(node) = &self.node {
            return node.flags("/rooms/load:{room}");
        }
        let pids = self.pids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let mut flags = vec![format!("--server-pid={pids}")];
        let at = local(self.port);
        match self.kind {
            Kind::Tidegate | Kind::TidegateRedis => {}
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

/// One worker, one room per path, no history, like the other servers.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_server_is_an_error_with_instructions() {
        let workshop = Workshop {
            tidegate: Some("/nowhere/tidegate".into()),
            scratch: "/nowhere".into(),
            server_cpu: None,
            client_cpu: None,
        };
        let scripts = Path::new("/nowhere");
        for (kind, words) in [(Kind::Tidegate, "--tidegate"), (Kind::TidegateRedis, "--tidegate")] {
            let error = format!("{:#}", kind.version(&workshop, scripts).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
        assert!(Peer::start(Kind::Tidegate, &workshop, scripts).is_err());
    }
}
