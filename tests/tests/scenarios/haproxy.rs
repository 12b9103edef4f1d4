//! A haproxy for one test.

use std::{
    io::Write as _,
    net::{SocketAddr, TcpListener},
    os::fd::AsRawFd as _,
};

use anyhow::Result;
use rustix::io::{FdFlags, fcntl_setfd};
use tempfile::NamedTempFile;
use tokio::process::{Child, Command};

/// A haproxy that forwards to one server. It ends when this is dropped.
pub struct Haproxy {
    /// Where it listens.
    pub address: SocketAddr,
    process: Child,
    /// Its configuration.
    _file: NamedTempFile,
}

impl Haproxy {
    /// Starts it with the lines of its `defaults` section, and the rest of its `server` line. `None` if haproxy is not
    /// installed.
    pub fn start(defaults: &str, server: &str) -> Result<Option<Self>> {
        // The listener is bound here and handed over, so that no port is guessed.
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let mut file = NamedTempFile::new()?;
        write!(
            file,
            "defaults\n  {defaults}\nfrontend f\n  bind fd@{}\n  default_backend b\nbackend b\n  server s {server}\n",
            listener.as_raw_fd(),
        )?;
        fcntl_setfd(&listener, FdFlags::empty())?;
        let process =
            Command::new("haproxy").arg("-db").arg("-f").arg(file.path()).kill_on_drop(true).spawn();
        fcntl_setfd(&listener, FdFlags::CLOEXEC)?;
        match process {
            Ok(process) => Ok(Some(Self { address, process, _file: file })),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends it now.
    pub async fn stop(&mut self) -> Result<()> {
        Ok(self.process.kill().await?)
    }
}
