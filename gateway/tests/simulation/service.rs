//! No ready socket waits for long: each is served before its shard has taken a bounded number of turns.
//!
//! A socket is ready if it has input and the core wants it, or if it has space and output is waiting. It is
//! served when a byte has moved. Ready is what the sockets and the core say, not what a task has been woken
//! for: so a wake-up that is lost, and a connection that is forgotten in a list, are found.

use tidegate::shard::Interest;

use crate::transport::Pipe;

/// The simulated driver runs each task that can run before its shard has taken this many turns. The order is
/// left to chance. (Tokio runs each woken task between two turns, unless there are many.)
pub const PATIENCE: u32 = 4;
/// How many connections a turn writes at most.
pub const SLICE: usize = 256;

/// How many turns a ready socket may wait, on a shard of so many connections: until its task has run, if it
/// was full, and until all connections that wait to be written before it have been, a slice in each turn.
/// Two more turns, because the first one ends in what was there before, and the last one does the work.
fn most_turns(connections: usize) -> u32 {
    PATIENCE + connections.div_ceil(SLICE) as u32 + 2
}

/// How long one connection has waited.
#[derive(Debug, Default)]
pub struct Service {
    /// Turns that its task has been passed over since it could run.
    passed_over: u32,
    input: Wait,
    output: Wait,
}

/// One direction.
#[derive(Debug, Default)]
struct Wait {
    /// Turns since it was ready and has not been served.
    turns: u32,
    /// The bytes that have moved before.
    moved: u64,
}

impl Service {
    /// Before a turn: whether the task, if it can run, has to run first.
    pub fn must_run(&mut self, is_runnable: bool) -> bool {
        self.passed_over = if is_runnable { self.passed_over + 1 } else { 0 };
        if self.passed_over < PATIENCE {
            return false;
        }
        self.passed_over = 0;
        true
    }

    /// After a turn: checks that the socket has not been ready for too long. `interest` is what the core
    /// wants from it, `queued` what waits for it.
    pub fn check(&mut self, pipe: &Pipe, interest: Interest, queued: usize, connections: usize) {
        let is_over = pipe.client_ended || pipe.is_reset;
        let readable = interest.read && (is_over || !pipe.to_node.is_empty());
        let writable = queued > 0 && (pipe.space() > 0 || pipe.is_reset) && !pipe.is_closed;
        let most = most_turns(connections);
        for (wait, is_ready, moved, what) in [
            (&mut self.input, readable, pipe.received, "input is not read"),
            (&mut self.output, writable, pipe.sent, "output is not written"),
        ] {
            wait.turns = if is_ready && wait.moved == moved { wait.turns + 1 } else { 0 };
            wait.moved = moved;
            assert!(wait.turns <= most, "a socket is ready, and {what} for {} turns", wait.turns);
        }
    }
}
