//! Connects by host name: races all addresses of a host (RFC 8305, "Happy Eyeballs").
//!
//! Owns the order and the pace of the attempts. The caller defines an attempt. One that includes TLS and a
//! greeting also skips servers that accept connections but do not serve them.
//!
//! The system resolver looks up both address families in one call and decides their order (RFC 6724).

use std::{
    collections::VecDeque,
    fmt::{self, Display},
    io,
    net::SocketAddr,
    time::Duration,
};

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::{
    net::lookup_host,
    time::{Instant, sleep, timeout_at},
};

/// How long an attempt runs before the next one starts beside it (RFC 8305 §5, "Connection Attempt Delay").
pub const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Why no address of a host could be used.
#[derive(Debug, thiserror::Error)]
pub enum DialError<E> {
    /// The name cannot be resolved, or has no addresses.
    #[error("cannot resolve the host name: {0}")]
    Resolve(io::Error),
    /// The name was not resolved in time.
    #[error("the host name was not resolved within {0:?}")]
    ResolveTimeout(Duration),
    /// Each address failed.
    #[error(transparent)]
    Attempts(#[from] Failures<E>),
}

/// How each address failed, in the order of the failures. Never empty.
#[derive(Debug)]
pub struct Failures<E>(pub Vec<(SocketAddr, Failure<E>)>);

/// How one address failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure<E> {
    /// The attempt failed.
    #[error("{0}")]
    Error(E),
    /// The attempt took too long.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

/// Names the addresses only if there are several.
impl<E: Display> Display for Failures<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [(_, failure)] = &self.0[..] {
            return failure.fmt(f);
        }
        for (index, (address, failure)) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{address}: {failure}")?;
        }
        Ok(())
    }
}

impl<E: fmt::Debug + Display> std::error::Error for Failures<E> {}

/// Resolves `host` (IPv6 without brackets) and makes attempts until one succeeds, for at most `limit` in all.
///
/// Dropping the future drops all attempts.
pub async fn dial<T, E, F>(
    host: &str,
    port: u16,
    limit: Duration,
    attempt: impl FnMut(SocketAddr) -> F,
) -> Result<T, DialError<E>>
where
    F: Future<Output = Result<T, E>>,
{
    let deadline = Instant::now() + limit;
    let addresses = timeout_at(deadline, lookup_host((host, port)))
        .await
        .map_err(|_| DialError::ResolveTimeout(limit))?
        .map_err(DialError::Resolve)?;
    let addresses = interleave(addresses);
    if addresses.is_empty() {
        return Err(DialError::Resolve(io::Error::new(io::ErrorKind::NotFound, "it has no address")));
    }
    Ok(race_until(deadline, addresses, limit, attempt).await?)
}

/// Makes attempts until one succeeds, for at most `limit`: the first address at once, each next one when the
/// attempt before it has failed or [`ATTEMPT_DELAY`] has passed. No attempt is given up for a later one.
///
/// Dropping the future drops all attempts.
pub async fn race<T, E, F>(
    addresses: impl IntoIterator<Item = SocketAddr>,
    limit: Duration,
    attempt: impl FnMut(SocketAddr) -> F,
) -> Result<T, Failures<E>>
where
    F: Future<Output = Result<T, E>>,
{
    race_until(Instant::now() + limit, addresses, limit, attempt).await
}

/// `limit` is the time limit that a timed-out attempt reports.
async fn race_until<T, E, F>(
    deadline: Instant,
    addresses: impl IntoIterator<Item = SocketAddr>,
    limit: Duration,
    mut attempt: impl FnMut(SocketAddr) -> F,
) -> Result<T, Failures<E>>
where
    F: Future<Output = Result<T, E>>,
{
    let mut waiting = addresses.into_iter().peekable();
    let mut failures = Vec::new();
    let mut running = FuturesUnordered::new();
    loop {
        // Always make the first attempt, so that there is a failure to report.
        let in_time = failures.is_empty() && running.is_empty() || Instant::now() < deadline;
        if in_time && let Some(address) = waiting.next() {
            let attempt = timeout_at(deadline, attempt(address));
            running.push(async move { (address, attempt.await) });
        }
        let next = sleep(ATTEMPT_DELAY);
        tokio::select! {
            // A success counts even if it is polled after the deadline.
            biased;
            ended = running.next() => match ended {
                Some((_, Ok(Ok(connection)))) => return Ok(connection),
                Some((address, Ok(Err(error)))) => failures.push((address, Failure::Error(error))),
                Some((address, Err(_))) => failures.push((address, Failure::Timeout(limit))),
                // No attempt is running, and no address is left.
                None => return Err(Failures(failures)),
            },
            () = next, if waiting.peek().is_some() => {}
        }
    }
}

/// Removes duplicates and alternates between the address families, beginning with that of the first (RFC 8305 §4).
fn interleave(addresses: impl IntoIterator<Item = SocketAddr>) -> Vec<SocketAddr> {
    let (mut first, mut second) = (VecDeque::<SocketAddr>::new(), VecDeque::new());
    for address in addresses {
        let of_first = first.front().is_none_or(|front| front.is_ipv4() == address.is_ipv4());
        let family = if of_first { &mut first } else { &mut second };
        if !family.contains(&address) {
            family.push_back(address);
        }
    }
    let mut ordered = Vec::with_capacity(first.len() + second.len());
    while !first.is_empty() || !second.is_empty() {
        ordered.extend(first.pop_front());
        ordered.extend(second.pop_front());
    }
    ordered
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, future::pending};

    use tokio::net::{TcpListener, TcpSocket, TcpStream};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn address_families_alternate_without_duplicates() {
        let found = addresses(&["[::1]:1", "[::2]:1", "[::1]:1", "[::3]:1", "10.0.0.1:1", "10.0.0.2:1"]);
        let expected = ["[::1]:1", "10.0.0.1:1", "[::2]:1", "10.0.0.2:1", "[::3]:1"];
        assert_eq!(interleave(found), addresses(&expected));
        assert_eq!(interleave(addresses(&["10.0.0.1:1", "[::1]:1"])), addresses(&["10.0.0.1:1", "[::1]:1"]));
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_attempt_starts_after_250_ms() {
        let start = Instant::now();
        let started = RefCell::new(Vec::new());
        let all = addresses(&["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"]);
        let won = race(all.clone(), LIMIT, |address| {
            started.borrow_mut().push((address, start.elapsed()));
            let delay = if address == all[2] { 100 } else { 4_000 };
            async move {
                sleep(Duration::from_millis(delay)).await;
                Ok::<_, io::Error>(address)
            }
        });
        assert_eq!(won.await.unwrap(), all[2]);
        let at = |index: usize, millis| (all[index], Duration::from_millis(millis));
        assert_eq!(*started.borrow(), [at(0, 0), at(1, 250), at(2, 500)]);
        assert_eq!(start.elapsed(), Duration::from_millis(600));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_attempt_starts_the_next_and_a_slow_one_continues() {
        let start = Instant::now();
        let all = addresses(&["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"]);
        let slow = all[0];
        let won = race(all, LIMIT, |address| async move {
            if address == slow {
                sleep(Duration::from_millis(700)).await;
                return Ok(address);
            }
            Err("refused")
        });
        assert_eq!(won.await.unwrap(), slow);
        assert_eq!(start.elapsed(), Duration::from_millis(700));
    }

    #[tokio::test(start_paused = true)]
    async fn all_failures_are_reported_within_the_limit() {
        let start = Instant::now();
        let all = addresses(&["10.0.0.1:1", "10.0.0.2:1"]);
        let silent = all[0];
        let failed = race(all, LIMIT, |address| async move {
            if address == silent {
                pending::<()>().await;
            }
            Err::<(), _>("refused")
        });
        let text = failed.await.unwrap_err().to_string();
        assert_eq!(text, "10.0.0.2:1: refused; 10.0.0.1:1: no answer within 5s");
        assert_eq!(start.elapsed(), LIMIT);
        let failed = race([silent], LIMIT, |_| async { Err::<(), _>("refused") }).await;
        assert_eq!(failed.unwrap_err().to_string(), "refused", "a lone address needs no name");
    }

    /// A listener with a full backlog: the kernel drops new connections, like a host that is down.
    async fn blackhole() -> (TcpListener, Vec<TcpStream>) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let listener = socket.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        let mut held = Vec::new();
        while let Ok(stream) = tokio::time::timeout(ATTEMPT_DELAY, TcpStream::connect(address)).await {
            held.push(stream.unwrap());
        }
        (listener, held)
    }

    #[tokio::test]
    async fn a_dead_first_address_costs_250_ms() {
        let (dead, _held) = blackhole().await;
        let alive = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let all = [dead.local_addr().unwrap(), alive.local_addr().unwrap()];
        let start = Instant::now();
        let stream = race(all, LIMIT, TcpStream::connect).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), all[1]);
        assert!(start.elapsed() >= ATTEMPT_DELAY && start.elapsed() < LIMIT / 2, "{:?}", start.elapsed());
    }

    #[tokio::test]
    async fn an_unknown_name_is_a_resolution_error() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let stream = dial("localhost", port, LIMIT, TcpStream::connect).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap().port(), port);
        let error = dial("no.such.name.invalid", port, LIMIT, TcpStream::connect).await.unwrap_err();
        assert!(error.to_string().starts_with("cannot resolve the host name: "), "{error}");
    }
}
