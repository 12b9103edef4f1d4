//! The queue between the threads that log and the thread that writes.
//!
//! A thread that logs never waits for the log's reader: its line is queued, or dropped if the queue is full.
//! Only the writer waits. Once it can write again, it reports how many lines were dropped. Knows nothing of
//! events or formats.
//!
//! `tracing-appender` has such a writer, bounded in lines. A line may be as long as the head of a request, so
//! this one is bounded in bytes.

use std::{
    io,
    sync::{Arc, LazyLock},
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use prometheus::IntCounter;
use rustix::event::{PollFd, PollFlags, poll};
use tracing_subscriber::fmt::MakeWriter;

/// Maximum size of the queued lines, in bytes. The writer may hold as many bytes again.
pub(super) const BOUND: usize = 1024 * 1024;
/// How much of the memory that a burst needed the queue keeps, in bytes.
const KEPT: usize = 64 * 1024;

/// Counts the lines that were dropped because the log was not read fast enough or could not be written.
pub fn dropped_lines() -> &'static IntCounter {
    static DROPPED: LazyLock<IntCounter> = LazyLock::new(|| {
        IntCounter::new(
            "tidegate_log_lines_dropped_total",
            "Log lines that were dropped because the log was not read fast enough or could not be written.",
        )
        .expect("the name is a valid one")
    });
    &DROPPED
}

/// Accepts lines and never blocks.
#[derive(Clone, Debug)]
pub struct Queue(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Signalled when there is something to write.
    filled: Condvar,
    /// Signalled when everything has been written.
    emptied: Condvar,
    dropped: IntCounter,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// Lines dropped since the writer last took the queued lines.
    dropped: u64,
    /// Whether the writer has lines that it has not yet written.
    writing: bool,
}

impl Queue {
    /// Starts the thread that writes to `out`. It calls `tell` with the number of dropped lines before it
    /// writes the lines that preceded them, so what `tell` logs takes their place.
    ///
    /// The thread runs until the process ends, because it may wait for the log's reader forever.
    pub(super) fn start(
        out: impl io::Write + Send + 'static,
        dropped: IntCounter,
        tell: impl Fn(u64) + Send + 'static,
    ) -> io::Result<Self> {
        let queue = Self(Arc::new(Shared {
            state: Mutex::default(),
            filled: Condvar::new(),
            emptied: Condvar::new(),
            dropped,
        }));
        let writer = queue.clone();
        thread::Builder::new().name("log".to_owned()).spawn(move || writer.0.write_to(out, tell))?;
        Ok(queue)
    }

    /// Queues a line, or drops it.
    pub(super) fn push(&self, line: &[u8]) {
        let Shared { state, filled, dropped, .. } = &*self.0;
        let mut state = state.lock();
        // Queue nothing after a dropped line until the gap is reported, so that there is one gap in one
        // place.
        if state.dropped == 0 && state.waiting.len() + line.len() <= BOUND {
            state.waiting.extend_from_slice(line);
        } else {
            state.dropped += 1;
            dropped.inc();
        }
        drop(state);
        filled.notify_one();
    }

    /// Waits until everything has been written, at most for `within`. Returns whether it was.
    pub(super) fn flush(&self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        let mut state = self.0.state.lock();
        while state.writing || !state.waiting.is_empty() {
            if self.0.emptied.wait_until(&mut state, deadline).timed_out() {
                return false;
            }
        }
        true
    }
}

impl Shared {
    fn write_to(&self, mut out: impl io::Write, tell: impl Fn(u64)) {
        let mut lines = Vec::new();
        loop {
            let dropped = self.take(&mut lines);
            if dropped > 0 {
                tell(dropped);
            }
            let mut rest = &*lines;
            while !rest.is_empty() {
                match out.write(rest) {
                    Ok(written) if written > 0 => rest = rest.get(written..).unwrap_or_default(),
                    // Only the metric can report this.
                    Ok(_) | Err(_) => {
                        self.dropped.inc_by(rest.split_inclusive(|byte| *byte == b'\n').count() as u64);
                        break;
                    }
                }
            }
            lines.clear();
            lines.shrink_to(KEPT);
        }
    }

    /// Waits for lines and takes all of them. Returns how many lines after them were dropped.
    fn take(&self, lines: &mut Vec<u8>) -> u64 {
        let mut state = self.state.lock();
        state.writing = false;
        if state.waiting.is_empty() {
            self.emptied.notify_all();
        }
        while state.waiting.is_empty() && state.dropped == 0 {
            self.filled.wait(&mut state);
        }
        state.writing = true;
        std::mem::swap(&mut state.waiting, lines);
        std::mem::take(&mut state.dropped)
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

/// The destination of one event: each write is a line.
pub struct Line<'a>(&'a Queue);

impl io::Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard error without the lock of [`io::stderr`]: while this blocks, others must not.
pub(super) struct Stderr;

impl io::Write for Stderr {
    /// Waits for space if another process has made the pipe or terminal non-blocking.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stderr = rustix::stdio::stderr();
        loop {
            match rustix::io::write(stderr, bytes).map_err(io::Error::from) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], None).ok();
                }
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, sync::mpsc::sync_channel};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn counter() -> IntCounter {
        IntCounter::new("dropped", "Dropped.").unwrap()
    }

    /// Writes only when allowed, and passes on what it wrote.
    struct Held {
        allowed: std::sync::mpsc::Receiver<()>,
        written: std::sync::mpsc::SyncSender<Vec<u8>>,
    }

    impl io::Write for Held {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.allowed.recv().map_err(io::Error::other)?;
            self.written.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_unread_log_blocks_no_writer_and_reports_the_gap_in_place() {
        let ((allow, allowed), (written, wrote)) = (sync_channel(10), sync_channel(10));
        let (told, tell) = sync_channel(10);
        let (dropped, line) = (counter(), [&[b'x'; 999][..], b"\n"].concat());
        let queue = Queue::start(Held { allowed, written }, dropped.clone(), move |lines| {
            told.send(lines).unwrap();
        });
        let queue = queue.unwrap();
        queue.push(b"first\n");
        // Wait until the writer has taken it and is blocked.
        let until = Instant::now() + PATIENCE;
        while !queue.0.state.lock().waiting.is_empty() {
            assert!(Instant::now() < until, "the writer takes the queued line");
            thread::yield_now();
        }
        let most = BOUND / line.len();
        for _ in 0..most + 5 {
            queue.push(&line);
        }
        queue.push(b"short enough\n");
        assert_eq!(dropped.get(), 6);
        assert!(!queue.flush(Duration::from_millis(1)), "nobody reads it");

        allow.send(()).unwrap();
        assert_eq!(wrote.recv_timeout(PATIENCE).unwrap(), b"first\n");
        assert_eq!(tell.recv_timeout(PATIENCE).unwrap(), 6);
        queue.push(b"after the gap\n");
        allow.send(()).unwrap();
        assert_eq!(wrote.recv_timeout(PATIENCE).unwrap(), line.repeat(most));
        allow.send(()).unwrap();
        assert_eq!(wrote.recv_timeout(PATIENCE).unwrap(), b"after the gap\n");
        assert!(queue.flush(PATIENCE));
        assert_eq!(dropped.get(), 6);
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted() {
        let (reader, writer) = io::pipe().unwrap();
        let dropped = counter();
        let queue = Queue::start(writer, dropped.clone(), |_| ()).unwrap();
        let mut line = queue.make_writer();
        line.write_all(b"one\n").unwrap();
        assert!(queue.flush(PATIENCE));
        assert_eq!(dropped.get(), 0);
        drop(reader);
        line.write_all(b"two\n").unwrap();
        assert!(queue.flush(PATIENCE), "the flush does not wait for lines that cannot be written");
        assert_eq!(dropped.get(), 1);
    }
}
