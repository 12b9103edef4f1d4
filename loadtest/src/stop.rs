//! Reasons to end a run early: Ctrl-C, SIGTERM, SIGHUP or the time limit.

use std::{
    fs, io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag, low_level,
};

/// Checked between messages; once set it stays set.
#[derive(Clone, Debug)]
pub struct Stop {
    asked: Arc<AtomicBool>,
    /// The signal that was received.
    signal: Arc<AtomicUsize>,
    limit: Duration,
    /// `None` means never.
    deadline: Option<Instant>,
}

impl Stop {
    /// Listens for signals from now on. The first asks the run to end with a report of its results so far;
    /// the second ends the process at once. A signal that is ignored, as SIGHUP is under `nohup`, stays
    /// ignored.
    pub fn install(time_limit: Duration) -> io::Result<Self> {
        let (asked, number) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            if is_ignored(signal) {
                continue;
            }
            // The order matters: the first signal finds the flag unset and then sets it.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&asked))?;
            flag::register_usize(signal, Arc::clone(&number), usize::try_from(signal).unwrap_or(0))?;
            flag::register(signal, Arc::clone(&asked))?;
        }
        let deadline = Instant::now().checked_add(time_limit);
        Ok(Self { asked, signal: number, limit: time_limit, deadline })
    }

    /// Whether the run should end.
    pub fn is_set(&self) -> bool {
        self.cause().is_some()
    }

    /// The reason to end the run.
    pub fn cause(&self) -> Option<String> {
        if self.asked.load(Ordering::Relaxed) {
            let signal = i32::try_from(self.signal.load(Ordering::Relaxed)).unwrap_or(0);
            return Some(low_level::signal_name(signal).unwrap_or("a signal").to_owned());
        }
        let is_over = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        is_over.then(|| format!("--time-limit {:?}", self.limit))
    }

    /// The outcome of a part of a run, given whether all of it was done: why the run ended early, or nothing
    /// if it did not. An error after the run was asked to end counts as part of that end.
    pub fn early_end(&self, outcome: anyhow::Result<bool>) -> anyhow::Result<Option<String>> {
        match (outcome, self.cause()) {
            (Ok(true), _) | (Ok(false), None) => Ok(None),
            (Ok(false), Some(cause)) => Ok(Some(cause)),
            (Err(error), Some(cause)) => Ok(Some(format!("{cause}: {error:#}"))),
            (Err(error), None) => Err(error),
        }
    }
}

/// Whether `signal` is ignored, by inheritance or by now.
fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}
