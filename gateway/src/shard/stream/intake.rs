//! What HTTP keeps of what it reads from one connection.
//!
//! The buffer that requests are read into is hyper's and cannot be looked at. It grows with what has been read and
//! not been answered, and does not shrink, so the most there ever was is what it costs. While a request is served,
//! whoever reads its body counts the buffer too.

use std::{io, sync::Arc};

use crate::{
    budget::{Budget, Consumer, Held, READ_BUFFER},
    http1::Progress,
};

/// What every HTTP connection may keep, uncounted: hyper's buffer has this size from the first read on, and nearly all
/// heads fit into it.
const FREE: usize = 8 * 1024;
/// What the buffer holds at most; of a body more may have been read, which is counted where it is kept.
const MOST: usize = FREE + READ_BUFFER;

/// The account of one connection.
#[derive(Debug)]
pub struct Intake {
    held: Held,
    /// Whether a request is being served: then what is read belongs to its body.
    progress: Arc<Progress>,
    /// Bytes read since the last answer.
    unanswered: usize,
    /// The most that there has been of them.
    most: usize,
    /// What of that is counted.
    counted: usize,
}

impl Intake {
    /// An account of nothing.
    pub fn new(budget: &Arc<Budget>, progress: Arc<Progress>) -> Self {
        Self { held: budget.hold(Consumer::Heads, 0), progress, unanswered: 0, most: FREE, counted: FREE }
    }

    /// So many bytes have been read. An error, if they belong to a head that is large and the node is short of memory.
    pub fn read(&mut self, bytes: usize) -> io::Result<()> {
        self.read_while(self.progress.is_serving(), bytes)
    }

    fn read_while(&mut self, serving: bool, bytes: usize) -> io::Result<()> {
        self.unanswered += bytes;
        if self.unanswered > FREE {
            // A full buffer gets room for as much again, and is twice as large after the read.
            self.most = self.most.max((2 * self.unanswered.min(MOST).next_power_of_two()).min(MOST));
        }
        if serving || self.most == self.counted {
            return Ok(());
        }
        if !self.held.budget().admits(self.most - self.counted) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.count();
        Ok(())
    }

    /// An answer is being written: the buffer stays.
    pub fn answered(&mut self) {
        self.unanswered = 0;
        self.count();
    }

    fn count(&mut self) {
        if self.most > self.counted {
            self.held.grow(self.most - self.counted);
            self.counted = self.most;
        }
    }
}

#[cfg(test)]
mod tests {
    use prometheus::Registry;

    use super::*;

    #[test]
    fn the_most_that_was_unanswered_counts_until_the_connection_is_gone() {
        let budget = Budget::register(&Registry::new(), 1).unwrap();
        let mut intake = Intake::new(&budget, Arc::default());
        let mut held = |bytes| {
            intake.read(bytes).unwrap();
            budget.held_by(Consumer::Heads)
        };
        assert_eq!(held(FREE), 0, "a usual head");
        assert_eq!(held(1000), 3 * FREE, "room for as much again, doubled");
        assert_eq!(held(FREE - 1000), 3 * FREE);
        assert_eq!(held(1 << 30), MOST - FREE, "no more than the buffer can hold");
        intake.answered();
        intake.read(100).unwrap();
        assert_eq!(budget.held(), MOST - FREE, "the buffer is as large as it was");
        drop(intake);
        assert_eq!(budget.held(), 0);
    }

    #[test]
    fn a_large_head_is_not_read_on_while_memory_is_short_and_a_body_is() {
        let budget = Budget::register(&Registry::new(), 1).unwrap();
        budget.set_limit(10 * FREE);
        let mut intake = Intake::new(&budget, Arc::default());
        intake.read(FREE).unwrap();
        intake.read(FREE).unwrap();
        assert_eq!(budget.held(), 3 * FREE);
        assert_eq!(intake.read(FREE + 1).unwrap_err().kind(), io::ErrorKind::OutOfMemory);
        intake.read_while(true, FREE).unwrap();
        assert_eq!(budget.held(), 3 * FREE, "who reads the body counts it");
        intake.answered();
        assert_eq!(budget.held(), MOST - FREE, "the buffer is as large as it was");
    }
}
