//! Detection of changed files.
//!
//! Decides how often files are read and what counts as a change: contents that two reads in a row have found,
//! so that a file that is still being written is not mistaken for a broken one. Knows neither what is read
//! nor how it is used.
//!
//! Files are polled: a mounted Kubernetes secret changes when a link two directories up is swapped, which is
//! easy to miss with inotify and impossible to miss by reading.

use std::{sync::Arc, time::Duration};

use tokio::time::{Interval, MissedTickBehavior};

use crate::file::Reads;

/// How often files are read.
const LOOK: Duration = Duration::from_secs(2);

/// Files that are checked for changes.
pub trait Watched: Send + Sync + 'static {
    /// Their contents.
    type Contents: PartialEq + Send + 'static;

    /// Whether there are any files at the moment. If not, nothing is read. Does not block.
    fn has_files(&self) -> bool;

    /// Reads the files; `None` if they cannot be read. May block on the file system, and must not hold a lock that others need while it does.
    fn read(&self) -> Option<Self::Contents>;

    /// Called when two reads in a row have found these contents. Does not block.
    fn found(&self, contents: &Self::Contents);
}

/// Checks the files until dropped.
pub async fn watch<W: Watched>(watched: Arc<W>) {
    let mut ticks = ticks();
    let (mut looks, mut reads) = (Looks::default(), Reads::default());
    loop {
        ticks.tick().await;
        if !watched.has_files() {
            looks.take();
            continue;
        }
        if reads.hang() {
            continue;
        }
        let reader = Arc::clone(&watched);
        match reads.run(move || reader.read()).await {
            Ok(read) => {
                if let Some(contents) = looks.agree(read) {
                    watched.found(contents);
                }
            }
            Err(error) => {
                looks.take();
                tracing::error!(%error, "cannot check files for changes; their old contents stay in use");
            }
        }
    }
}

/// The schedule of reads.
pub fn ticks() -> Interval {
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// What the previous read found.
pub struct Looks<T>(Option<T>);

impl<T> Default for Looks<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: PartialEq> Looks<T> {
    /// Returns what was found if the previous read found the same. `None` means that a file is missing,
    /// because it is being replaced.
    pub fn agree(&mut self, found: Option<T>) -> Option<&T> {
        let same = found.is_some() && self.0 == found;
        self.0 = found;
        self.0.as_ref().filter(|_| same)
    }

    /// Forgets what was found, so that the next read counts as the first one.
    pub fn take(&mut self) -> Option<T> {
        self.0.take()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_change_needs_two_equal_looks_in_a_row() {
        let mut looks = Looks::default();
        let found = [Some("a"), Some("b"), Some("b"), Some("b"), None, Some("b"), Some("b"), Some("c")];
        let agreed = found.map(|found| looks.agree(found).copied());
        assert_eq!(agreed, [None, None, Some("b"), Some("b"), None, None, Some("b"), None]);
        assert_eq!(looks.take(), Some("c"));
        assert_eq!(looks.agree(Some("c")), None);
    }

    #[derive(Default)]
    struct Count {
        there: AtomicBool,
        asked: AtomicUsize,
        looks: AtomicUsize,
        agreed: AtomicUsize,
    }

    impl Watched for Count {
        type Contents = ();

        fn has_files(&self) -> bool {
            self.asked.fetch_add(1, Ordering::Relaxed);
            self.there.load(Ordering::Relaxed)
        }

        fn read(&self) -> Option<()> {
            self.looks.fetch_add(1, Ordering::Relaxed);
            Some(())
        }

        fn found(&self, (): &()) {
            self.agreed.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_missing_file_is_not_read() {
        let count = Arc::new(Count::default());
        let until = async |enough: fn(&Count) -> bool| {
            let watching = watch(Arc::clone(&count));
            let reached = async {
                while !enough(&count) {
                    tokio::time::sleep(LOOK).await;
                }
            };
            tokio::select! { () = watching => unreachable!("it has no end"), () = reached => {} }
        };
        until(|count| count.asked.load(Ordering::Relaxed) > 3).await;
        assert_eq!(count.looks.load(Ordering::Relaxed), 0);
        count.there.store(true, Ordering::Relaxed);
        until(|count| count.agreed.load(Ordering::Relaxed) > 1).await;
        assert!(count.looks.load(Ordering::Relaxed) > 2);
    }
}
