//! The bytes that a server holds for clients that have stopped reading: in its queues, and in the kernel's.
//!
//! Both are upper bounds. The metric is a sum over all clients, and the largest of the kernel's queues may
//! belong to a client that reads, sampled between two messages.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::Context;
use serde::Serialize;

use crate::probe::Url;

/// The interval between two samples.
const GLANCE: Duration = Duration::from_millis(500);

/// The samples so far.
pub struct Scales {
    metrics: Url,
    metric: String,
    /// The port of the server's sockets, to find them in `/proc/net/tcp`.
    port: u16,
    clients: u32,
    looked: Option<Instant>,
    queued: f64,
    kernel: u64,
    failure: Option<String>,
}

/// The maximum of all samples, in bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Held {
    pub clients: u32,
    /// In the server's queues, per client.
    pub queued: f64,
    /// In the fullest of the kernel's queues: written by the server and not yet acknowledged by the client's
    /// side.
    pub kernel: u64,
    pub each: f64,
}

impl Scales {
    /// For `clients` clients of a server that listens on `port`, whose `metrics` page has a `metric` for the
    /// bytes in its queues.
    pub fn new(metrics: Url, metric: String, port: u16, clients: u32) -> anyhow::Result<Self> {
        // Report a wrong name before thousands of connections are opened.
        metrics.metric(&metric).context("--metrics")?;
        Ok(Self { metrics, metric, port, clients, looked: None, queued: 0.0, kernel: 0, failure: None })
    }

    /// Takes a sample, if one is due.
    pub fn look(&mut self) {
        if self.looked.is_some_and(|looked| looked.elapsed() < GLANCE) || self.failure.is_some() {
            return;
        }
        self.looked = Some(Instant::now());
        match self.metrics.metric(&self.metric).and_then(|queued| Ok((queued, fullest(self.port)?))) {
            Ok((queued, kernel)) => {
                self.queued = self.queued.max(queued);
                self.kernel = self.kernel.max(kernel);
            }
            Err(why) => self.failure = Some(format!("{why:#}")),
        }
    }

    /// The maximum, or why it is not known.
    pub fn held(&self) -> Result<Held, &str> {
        if let Some(why) = &self.failure {
            return Err(why);
        }
        if self.looked.is_none() {
            return Err("no client stalled");
        }
        let queued = self.queued / f64::from(self.clients.max(1));
        #[expect(clippy::cast_precision_loss, reason = "bytes of one queue")]
        let each = queued + self.kernel as f64;
        Ok(Held { clients: self.clients, queued, kernel: self.kernel, each })
    }
}

/// The fullest send queue of this machine's sockets that are bound to `port`.
fn fullest(port: u16) -> anyhow::Result<u64> {
    let four = fs::read_to_string("/proc/net/tcp").context("cannot read /proc/net/tcp")?;
    // A kernel without IPv6 does not have this file.
    let six = fs::read_to_string("/proc/net/tcp6").unwrap_or_default();
    let queues = four.lines().chain(six.lines()).filter_map(|line| send_queue(line, port));
    Ok(queues.max().unwrap_or(0))
}

/// The send queue of the socket on this line, if it is bound to `port` and connected.
fn send_queue(line: &str, port: u16) -> Option<u64> {
    const ESTABLISHED: &str = "01";
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, _remote, state, queues) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let own = u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()?;
    if own != port || state != ESTABLISHED {
        return None;
    }
    u64::from_str_radix(queues.split_once(':')?.0, 16).ok()
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        net::{Ipv4Addr, TcpListener, TcpStream},
    };

    use super::*;

    #[test]
    fn unread_bytes_are_found_in_the_send_queue() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let _deaf = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        assert_eq!(fullest(port).unwrap(), 0);
        server.set_nonblocking(true).unwrap();
        while server.write(&[0; 4096]).is_ok() {}
        assert!(fullest(port).unwrap() > 0);
    }

    #[test]
    fn only_connected_sockets_of_the_port_count() {
        let line = |port, state| {
            format!("  12: 0100007F:{port} 0200007F:C350 {state} 0001F400:00000000 01:0014 0 0")
        };
        assert_eq!(send_queue(&line("1F90", "01"), 8080), Some(0x1F400));
        assert_eq!(send_queue(&line("1F91", "01"), 8080), None);
        assert_eq!(send_queue(&line("1F90", "0A"), 8080), None);
        assert_eq!(send_queue("  sl  local_address rem_address   st tx_queue rx_queue", 8080), None);
    }
}
