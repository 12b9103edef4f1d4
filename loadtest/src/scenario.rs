//! What can be run. One module per scenario: its arguments come from [`cli`](crate::cli), its report goes to
//! [`report`](crate::report).

pub mod compare_limit;
pub mod fanout;
pub mod idle;
pub mod yardstick;

use std::time::Duration;

use crate::{cli::Common, process, stop::Stop};

/// Pins this process as asked and starts to listen for the end of the run.
fn begin(common: &Common) -> anyhow::Result<Stop> {
    if let Some(cpu) = common.client_cpu {
        process::pin_to(cpu)?;
    }
    Ok(Stop::install(common.time_limit())?)
}

/// How often a scenario that waits looks whether it should end.
const GLANCE: Duration = Duration::from_millis(100);
