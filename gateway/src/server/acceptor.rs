//! Accepts sockets and hands them to the emptiest shard.
//!
//! The limits of an address are checked here, before a socket costs anything: a TLS handshake, a task, a
//! request. The shard answers refused clients with a status, as long as the number of refusals under way is
//! small.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    driver::{Accepted, Entry, Shard, tcp_user_timeout},
    limits::Decision,
    request::Gate,
    vocabulary::Refusal,
};

/// How many connections the kernel queues while we are busy. Reconnect storms are normal.
const BACKLOG: i32 = 4096;
/// Unsent bytes in the kernel at which a socket counts as full. This is what a stalled client costs there; it
/// does not bound the window of a fast one.
const NOT_SENT_LOW_WATER: u32 = 16 * 1024;
/// TCP keepalive for idle connections, because the client of an event stream never answers us. After this
/// long without a byte the kernel probes, and again at the interval. A peer that leaves this many probes
/// unanswered is gone.
const KEEPALIVE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_RETRIES: u32 = 4;
/// How long to wait when the process has no file descriptors left.
pub(super) const RETRY_DELAY: Duration = Duration::from_millis(50);

/// Binds a listener.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Accepts until cancelled, then closes the listener.
pub async fn run(listener: TcpListener, shards: Arc<[Shard]>, gate: Arc<Gate>, stop: CancellationToken) {
    let mut failures = Failures::of("public");
    loop {
        // Faster arrivals wait in the kernel's backlog, so no client is refused because of others.
        while let Err(wait) = gate.settings.limiters().accept() {
            gate.metrics.accept_pauses.inc();
            if stop.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
                return;
            }
        }
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((socket, peer)) => {
                let running = shards.iter().filter(|shard| !shard.is_finished());
                let Some(shard) = running.min_by_key(|shard| shard.health().load()) else { return };
                let open: usize = shards.iter().map(|shard| shard.health().load()).sum();
                if open >= gate.settings().sockets.all {
                    gate.metrics.dropped(Refusal::Connections);
                    continue; // dropping the socket closes it
                }
                let Some(entry) = entry(&gate, peer) else { continue };
                match prepare(socket, gate.settings().heartbeat.timeout) {
                    Ok(socket) => shard.accept(Accepted { socket, peer, entry }),
                    Err(error) => tracing::debug!(%error, %peer, "lost a socket while accepting it"),
                }
            }
            Err(error) if is_about_one_socket(&error) => {}
            Err(error) => {
                failures.report(&error);
                tokio::time::sleep(RETRY_DELAY).await;
            }
        }
    }
}

/// Failed accepts of a listener, logged once a second however many there are.
pub(super) struct Failures {
    listener: &'static str,
    /// Failures since the last log line.
    count: u64,
    reported_at: Option<Instant>,
}

impl Failures {
    /// A listener without failures.
    pub(super) fn of(listener: &'static str) -> Self {
        Self { listener, count: 0, reported_at: None }
    }

    /// Logs a failure, or only counts it.
    pub(super) fn report(&mut self, error: &io::Error) {
        if let Some(failures) = self.note(Instant::now()) {
            tracing::warn!(%error, failures, listener = self.listener, "cannot accept; trying again");
        }
    }

    /// Counts a failure. Returns the number to log, once a second.
    fn note(&mut self, now: Instant) -> Option<u64> {
        self.count += 1;
        if self.reported_at.is_some_and(|at| now.saturating_duration_since(at) < Duration::from_secs(1)) {
            return None;
        }
        self.reported_at = Some(now);
        Some(std::mem::take(&mut self.count))
    }
}

/// Whether a socket may connect; `None` if it is closed without an answer.
fn entry(gate: &Gate, peer: SocketAddr) -> Option<Entry> {
    let settings = gate.settings();
    if settings.trusted_proxies.contains(peer.ip()) {
        return Some(Entry::Proxy);
    }
    let decision = gate.settings.limiters().admit(peer.ip(), settings.limits.connections_per_address);
    match decision {
        Decision::Accept(permit) => Some(Entry::Client(permit)),
        Decision::Refuse(limit, permit) => Some(Entry::Refused(limit, permit)),
        Decision::Drop(limit) => {
            gate.metrics.dropped(limit.into());
            None
        }
    }
}

fn prepare(socket: tokio::net::TcpStream, heartbeat_timeout: Duration) -> io::Result<std::net::TcpStream> {
    let options = SockRef::from(&socket);
    options.set_tcp_nodelay(true)?;
    options.set_tcp_notsent_lowat(NOT_SENT_LOW_WATER)?;
    options.set_tcp_user_timeout(Some(tcp_user_timeout(heartbeat_timeout)))?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    options.set_tcp_keepalive(&keepalive)?;
    socket.into_std()
}

/// Whether the error concerns only the socket being accepted (accept(2), "Error handling").
pub(super) fn is_about_one_socket(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_reported_once_a_second_with_their_number() {
        let mut failures = Failures::of("ops");
        let start = Instant::now();
        // As often as an acceptor without file descriptors retries.
        let reported: Vec<_> = (0..50).map(|n| failures.note(start + n * RETRY_DELAY)).collect();
        let reported: Vec<_> =
            reported.into_iter().enumerate().filter_map(|(n, count)| Some((n, count?))).collect();
        assert_eq!(reported, [(0, 1), (20, 20), (40, 20)]);
    }

    #[test]
    fn a_socket_that_is_lost_is_no_failure_of_the_listener() {
        for (errno, expected) in [
            (rustix::io::Errno::CONNABORTED, true),
            (rustix::io::Errno::CONNRESET, true),
            (rustix::io::Errno::INTR, true),
            (rustix::io::Errno::MFILE, false),
            (rustix::io::Errno::NFILE, false),
            (rustix::io::Errno::NOBUFS, false),
        ] {
            assert_eq!(is_about_one_socket(&errno.into()), expected, "{errno:?}");
        }
    }
}
