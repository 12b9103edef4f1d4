//! How much memory HTTP uses to read one connection.
//!
//! hyper owns the read buffer, and its size cannot be queried. It grows with the bytes that have been read
//! and not answered, and never shrinks, so the peak of those bytes is what it costs. While a request is
//! served, the reader of its body counts the buffer as well.

use std::{io, sync::Arc};

use crate::{
    budget::{Budget, Consumer, Held, READ_BUFFER},
    http1::Progress,
};

/// What every HTTP connection may use uncounted: hyper's buffer has this size from the first read on, and
/// nearly all heads fit into it.
const FREE: usize = 8 * 1024;
/// The most that the buffer holds. More of a body may have been read; it is counted where it is stored.
const MOST: usize = FREE + READ_BUFFER;

/// The account of one connection.
#[derive(Debug)]
pub struct Intake {
    held: Held,
    /// Whether a request is being served, and input therefore belongs to its body.
    progress: Arc<Progress>,
    /// Bytes read since the last answer.
    unanswered: usize,
    /// The estimated size of the buffer: its peak so far.
    most: usize,
    /// How much of that is counted.
    counted: usize,
}

impl Intake {
    /// An account with nothing counted.
    pub fn new(budget: &Arc<Budget>, progress: Arc<Progress>) -> Self {
        Self { held: budget.hold(Consumer::Heads, 0), progress, unanswered: 0, most: FREE, counted: FREE }
    }

    /// Records that `bytes` have been read. Fails if they belong to a large head and the node is short of
    /// memory.
    pub fn read(&mut self, bytes: usize) -> io::Result<()> {
        self.read_while(self.progress.is_serving(), bytes)
    }

    fn read_while(&mut self, serving: bool, bytes: usize) -> io::Result<()> {
        self.unanswered += bytes;
        if self.unanswered > FREE {
            // hyper makes room for as much again when its buffer is full, so the buffer is twice as large
            // after the read.
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

    /// Records that a response is being written. The buffer keeps its size.
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
