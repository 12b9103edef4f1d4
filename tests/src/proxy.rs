//! Real proxies in front of a node: nginx, with a few kept connections that all its clients share, which can also serve
//! a document; and one of Node.js that compresses.

use std::{net::SocketAddr, path::Path, process::Stdio};

use anyhow::{Context as _, Result};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    time::timeout,
};

use crate::{PATIENCE, client::Script, eventually::eventually};

/// A running nginx. Killed when dropped.
#[derive(Debug)]
pub struct Nginx {
    address: SocketAddr,
    _child: Child,
    directory: TempDir,
}

impl Nginx {
    /// One process, two kept connections to the node.
    pub async fn before(node: SocketAddr) -> Result<Self> {
        Self::naming(node, "$http_host").await
    }

    /// The same, but the node gets a `Host` that browsers do not know.
    pub async fn renaming(node: SocketAddr) -> Result<Self> {
        Self::naming(node, "gateway.internal").await
    }

    async fn naming(node: SocketAddr, host: &str) -> Result<Self> {
        let address = free_address().await?;
        Self::start(
            address,
            tempfile::tempdir()?,
            &format!(
                "access_log off;
                map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
                upstream node {{ server {node}; keepalive 2; }}
                server {{
                    listen {address};
                    location / {{
                        proxy_pass http://node;
                        proxy_http_version 1.1;
                        proxy_request_buffering off;
                        proxy_set_header Host {host};
                        proxy_set_header Upgrade $http_upgrade;
                        proxy_set_header Connection $connection_upgrade;
                    }}
                }}"
            ),
        )
        .await
    }

    /// Serves `document` as `/jwks.json` over HTTPS with this certificate, compressed for clients that accept it, and
    /// keeps connections open.
    pub async fn publishing(document: &str, certificate: &Path, key: &Path) -> Result<Self> {
        let (address, directory) = (free_address().await?, tempfile::tempdir()?);
        let (certificate, key) = (certificate.display(), key.display());
        tokio::fs::write(directory.path().join("jwks.json"), document).await?;
        let configuration = format!(
            "log_format exchanges '$connection_requests $status $sent_http_content_encoding';
            access_log exchanges.log exchanges;
            default_type application/json;
            gzip on; gzip_types application/json; gzip_min_length 1;
            keepalive_timeout 1h;
            server {{
                listen {address} ssl;
                ssl_certificate {certificate};
                ssl_certificate_key {key};
                root {};
            }}",
            directory.path().display()
        );
        Self::start(address, directory, &configuration).await
    }

    async fn start(address: SocketAddr, directory: TempDir, configuration: &str) -> Result<Self> {
        let configuration = format!(
            "daemon off; master_process off; error_log stderr warn; pid nginx.pid;
            events {{ worker_connections 512; }}
            http {{
                client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
                uwsgi_temp_path uwsgi; scgi_temp_path scgi;
                {configuration}
            }}\n"
        );
        let file = directory.path().join("nginx.conf");
        tokio::fs::write(&file, configuration).await?;
        let child = Command::new("nginx")
            .arg("-p")
            .arg(directory.path())
            .arg("-e")
            .arg("stderr")
            .arg("-c")
            .arg(&file)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("nginx cannot be started; is it installed?")?;
        eventually("nginx listens", async || TcpStream::connect(address).await).await?;
        Ok(Self { address, _child: child, directory })
    }

    /// The address for clients.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The exchanges with a proxy that is [publishing](Self::publishing), one per line: how many requests have arrived
    /// on the connection so far, the status, and the encoding of the response (`-` for none).
    pub fn exchanges(&self) -> Result<Vec<String>> {
        let log = std::fs::read_to_string(self.directory.path().join("exchanges.log"))?;
        Ok(log.lines().map(str::to_owned).collect())
    }
}

/// A port chosen by the system, and free again a moment later.
async fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0").await?.local_addr()?)
}

/// A proxy that compresses with the `compression` middleware of Express. Killed when dropped.
#[derive(Debug)]
pub struct Compressing {
    address: SocketAddr,
    _script: Script,
}

impl Compressing {
    /// Starts it.
    pub async fn before(node: SocketAddr) -> Result<Self> {
        let mut script = Script::node(&["compressing_proxy.mjs", &node.to_string()])?;
        let line = timeout(PATIENCE, script.hear()).await.context("the proxy listens")??;
        let port = line.get("port").and_then(Value::as_u64).context("a port")?;
        Ok(Self { address: ([127, 0, 0, 1], u16::try_from(port)?).into(), _script: script })
    }

    /// The address for clients.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}
