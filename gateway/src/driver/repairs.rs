//! Readings of rooms' logs after interruptions.
//!
//! After a lost connection all rooms with a history have something to read at once. A bounded number of them is read at a
//! time, so that Redis keeps serving others meanwhile.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream::FuturesUnordered};

use crate::hub::{Hub, Repair};

/// How many rooms are read at a time.
const AT_ONCE: usize = 64;
/// The pause before a reading is tried again.
const PAUSE: Duration = Duration::from_millis(200);

/// Makes the readings that the hub asks for.
pub async fn run(hub: Arc<Hub>) {
    let mut running = FuturesUnordered::new();
    loop {
        tokio::select! {
            repair = hub.next_repair(), if running.len() < AT_ONCE => running.push(read(repair)),
            Some(()) = running.next() => {}
        }
    }
}

/// Until it succeeds, or is refused.
async fn read(repair: Repair) {
    while let Err(error) = repair.attempt().await {
        tracing::debug!(%error, "cannot read a history at the moment");
        tokio::time::sleep(PAUSE).await;
    }
}
