//! When a run ends before its plan does: Ctrl-C, SIGTERM or the time limit.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};

/// Asked between messages; once set it stays set.
#[derive(Clone, Debug)]
pub struct Stop {
    asked: Arc<AtomicBool>,
    /// `None`: never.
    deadline: Option<Instant>,
}

impl Stop {
    /// Listens for signals from now on. The first asks the run to end with a report of what it has; the
    /// second ends the process at once.
    pub fn install(time_limit: Duration) -> std::io::Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag unset and sets it.
            flag::register_conditional_shutdown(signal, 130, Arc::clone(&asked))?;
            flag::register(signal, Arc::clone(&asked))?;
        }
        Ok(Self { asked, deadline: Instant::now().checked_add(time_limit) })
    }

    /// Whether the run should end.
    pub fn is_set(&self) -> bool {
        self.asked.load(Ordering::Relaxed) || self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }
}
