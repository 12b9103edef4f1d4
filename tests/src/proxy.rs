//! A real reverse proxy before a node: nginx, with a few kept connections that all its clients share.

use std::{net::SocketAddr, process::Stdio};

use anyhow::{Context as _, Result};
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, TcpStream},
    process::{Child, Command},
};

use crate::eventually::eventually;

/// A running nginx. Killed when dropped.
#[derive(Debug)]
pub struct Nginx {
    address: SocketAddr,
    _child: Child,
    _directory: TempDir,
}

impl Nginx {
    /// One process, two kept connections to the node.
    pub async fn before(node: SocketAddr) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        // The system's choice, free again a moment later.
        let address = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
        let configuration = format!(
            "daemon off; master_process off; error_log stderr warn; pid nginx.pid;
            events {{ worker_connections 512; }}
            http {{
                access_log off;
                client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
                uwsgi_temp_path uwsgi; scgi_temp_path scgi;
                map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
                upstream node {{ server {node}; keepalive 2; }}
                server {{
                    listen {address};
                    location / {{
                        proxy_pass http://node;
                        proxy_http_version 1.1;
                        proxy_request_buffering off;
                        proxy_set_header Host $http_host;
                        proxy_set_header Upgrade $http_upgrade;
                        proxy_set_header Connection $connection_upgrade;
                    }}
                }}
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
        Ok(Self { address, _child: child, _directory: directory })
    }

    /// Where clients reach it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}
