//! The ops listener's sockets: few, short-lived, and isolated from each other.
//!
//! Probes decide whether an orchestrator keeps the node alive, so no client may block them. Every connection
//! has timeouts, the number of open connections is bounded, and at the bound the oldest connection without a
//! request in progress is closed for a new one.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::Router;
use http::Request;
use tokio::{
    net::{TcpListener, TcpStream},
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::acceptor::{Failures, RETRY_DELAY, is_about_one_socket};

use crate::http1::{self, Linger, Progress, RequestBody, Times};

/// The most open connections: probes, a few scrapers and a person with a browser.
const MOST: usize = 128;
/// A scraper that comes once a minute can keep its connection.
const TIMES: Times =
    Times { head: Duration::from_secs(10), keep_alive: Duration::from_secs(120), draining: GRACE };
const CLOSE_LINGER: Linger = Linger { silence: Duration::from_secs(2), total: Duration::from_secs(5) };
/// How long a draining node waits for requests in progress.
const GRACE: Duration = Duration::from_secs(1);

/// An open connection.
struct Open {
    task: AbortHandle,
    progress: Arc<Progress>,
}

/// Serves until cancelled, then ends the connections.
pub async fn run(listener: TcpListener, routes: Router, stop: CancellationToken) {
    let mut failures = Failures::of("ops");
    let mut tasks = JoinSet::new();
    let mut open = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = tasks.join_next() => continue,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok((socket, _)) => {
                if make_room(&mut open) {
                    let progress = Arc::<Progress>::default();
                    let serving = serve(socket, routes.clone(), Arc::clone(&progress), stop.clone());
                    open.push_back(Open { task: tasks.spawn(serving), progress });
                }
            }
            Err(error) if is_about_one_socket(&error) => {}
            Err(error) => {
                failures.report(&error);
                sleep(RETRY_DELAY).await;
            }
        }
    }
    drop(listener);
    // Requests still in progress then are cut off when the set is dropped.
    let ended = timeout(GRACE, async { while tasks.join_next().await.is_some() {} });
    if ended.await.is_err() {
        tracing::debug!("cutting off requests on the ops listener");
    }
}

/// Whether there is room for one more connection, if necessary by closing the oldest without a request in
/// progress.
fn make_room(open: &mut VecDeque<Open>) -> bool {
    open.retain(|connection| !connection.task.is_finished());
    if open.len() < MOST {
        return true;
    }
    let oldest = open.iter().position(|connection| !connection.progress.is_serving());
    let Some(connection) = oldest.and_then(|oldest| open.remove(oldest)) else { return false };
    connection.task.abort();
    true
}

async fn serve(socket: TcpStream, routes: Router, progress: Arc<Progress>, stop: CancellationToken) {
    let answer = |request: Request<RequestBody>| {
        let routes = routes.clone();
        async move {
            let answer = routes.oneshot(request.map(RequestBody::for_router)).await;
            answer.unwrap_or_else(|never: Infallible| match never {})
        }
    };
    let mut served = http1::serve(socket, Arc::clone(&progress), || TIMES, &stop, answer, |_| ()).await;
    if served.has_answered(&progress) {
        http1::linger(&mut served.stream, CLOSE_LINGER).await;
    }
}
