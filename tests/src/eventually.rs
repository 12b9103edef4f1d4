//! A bounded poll.
//!
//! For states that have no event to wait for. Where there is an event, wait for the event instead.

use std::{fmt::Debug, time::Duration};

use anyhow::{Result, anyhow};
use tokio::time::{Instant, sleep};

use crate::PATIENCE;

/// The time between two polls; tests never rely on it.
const PAUSE: Duration = Duration::from_millis(10);

/// Polls until `look` returns an answer instead of a state, and fails after [`PATIENCE`] with the last state.
///
/// ```
/// # async fn example(server: std::net::SocketAddr) -> anyhow::Result<()> {
/// use tidegate_tests::eventually::eventually;
/// eventually("the server listens", async || tokio::net::TcpStream::connect(server).await).await?;
/// # Ok(())
/// # }
/// ```
pub async fn eventually<T, S: Debug>(what: &str, mut look: impl AsyncFnMut() -> Result<T, S>) -> Result<T> {
    let until = Instant::now() + PATIENCE;
    loop {
        match look().await {
            Ok(answer) => return Ok(answer),
            Err(state) if Instant::now() >= until => {
                return Err(anyhow!("{what}: not within {PATIENCE:?}; last seen: {state:?}"));
            }
            Err(_) => sleep(PAUSE).await,
        }
    }
}
