//! Sockets, handed to the emptiest shard.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    settings::LiveSettings,
    shard::{Accepted, Shard},
};

/// Connections that the kernel holds for us while we are busy. A reconnect storm is the normal case.
const BACKLOG: i32 = 4096;
/// Unsent bytes in the kernel at which a socket counts as full: what a stalled client costs there,
/// without bounding the window of a fast one.
const NOT_SENT_LOW_WATER: u32 = 16 * 1024;
/// Unacknowledged data for this long, and the kernel gives the connection up.
const USER_TIMEOUT: Duration = Duration::from_secs(30);
/// Idle connections prove themselves to the kernel, too: an event stream's client never answers us.
const KEEPALIVE: Duration = Duration::from_secs(60);
/// How far beyond the limit sockets are still taken, to be told so with a status.
const COURTESY: usize = 256;
/// How long to wait when the process has no descriptor left.
const BREATHER: Duration = Duration::from_millis(50);

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
pub async fn run(
    listener: TcpListener,
    shards: Arc<[Shard]>,
    settings: Arc<LiveSettings>,
    stop: CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((socket, peer)) => {
                let running = shards.iter().filter(|shard| !shard.is_finished());
                let Some(shard) = running.min_by_key(|shard| shard.vitals().load()) else { return };
                let open: usize = shards.iter().map(|shard| shard.vitals().load()).sum();
                if open >= settings.load().limits.connections.saturating_add(COURTESY) {
                    continue; // dropped, and thereby closed
                }
                match prepare(socket) {
                    Ok(socket) => shard.accept(Accepted { socket, peer }),
                    Err(error) => tracing::debug!(%error, %peer, "a socket was lost while it was accepted"),
                }
            }
            Err(error) if is_about_one_socket(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept; trying again");
                tokio::time::sleep(BREATHER).await;
            }
        }
    }
}

fn prepare(socket: tokio::net::TcpStream) -> io::Result<std::net::TcpStream> {
    let options = SockRef::from(&socket);
    options.set_tcp_nodelay(true)?;
    options.set_tcp_notsent_lowat(NOT_SENT_LOW_WATER)?;
    options.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    options.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))?;
    socket.into_std()
}

/// Whether only the socket that was being accepted is lost (accept(2), "Error handling").
fn is_about_one_socket(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}
