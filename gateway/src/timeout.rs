//! Time limits by the clock of the shard that runs on a thread.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use crate::clock::Clock;

thread_local! {
    /// The clock of the shard that runs on this thread.
    static OWN: RefCell<Option<Clock>> = const { RefCell::new(None) };
}

/// The time allowed for an operation is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed;

impl From<Elapsed> for io::Error {
    fn from(Elapsed: Elapsed) -> Self {
        io::ErrorKind::TimedOut.into()
    }
}

/// Makes this the clock of the current thread.
pub fn use_clock(clock: &Clock) {
    OWN.set(Some(clock.clone()));
}

/// Waits for this much of the clock's time.
pub fn sleep(clock: &Clock, duration: Duration) -> Sleep {
    let until = clock.time().saturating_add(duration);
    Sleep { clock: clock.clone(), until, timer: Box::pin(tokio::time::sleep(duration)) }
}

/// Runs `future` with a time limit, by the clock of the shard that runs on the current thread; on other
/// threads, by tokio's clock. The future is polled first, so a result that is there in time counts.
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Result<F::Output, Elapsed> {
    let Some(clock) = OWN.with_borrow(Clone::clone) else {
        return tokio::time::timeout(duration, future).await.map_err(|_| Elapsed);
    };
    tokio::select! {
        biased;
        output = future => Ok(output),
        () = sleep(&clock, duration) => Err(Elapsed),
    }
}

/// See [`sleep`]. Relies on the shard's ticks: a clock that is never read stands still.
#[derive(Debug)]
pub struct Sleep {
    clock: Clock,
    until: Duration,
    timer: Pin<Box<tokio::time::Sleep>>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let left = self.until.saturating_sub(self.clock.time());
            if left.is_zero() {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(tokio::time::Instant::now() + left);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn a_sleep_outlasts_a_pause() {
        let clock = Clock::new();
        let sleep = sleep(&clock, Duration::from_millis(300));
        // As if the process had been suspended for an hour.
        clock.suspend(Duration::from_secs(3600));
        let readings = async {
            loop {
                clock.now();
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let start = Instant::now();
        tokio::select! {
            () = sleep => {}
            () = readings => {}
        }
        assert!(start.elapsed() >= Duration::from_millis(290), "{:?}", start.elapsed());
        assert_eq!(clock.pauses(), 1);
    }

    #[tokio::test]
    async fn a_result_in_time_counts() {
        use_clock(&Clock::new());
        assert_eq!(timeout(Duration::ZERO, async { 1 }).await, Ok(1));
        assert_eq!(timeout(Duration::ZERO, std::future::pending::<()>()).await, Err(Elapsed));
        OWN.set(None);
        assert_eq!(timeout(Duration::ZERO, std::future::pending::<()>()).await, Err(Elapsed));
    }
}
