//! The health check of a pub/sub connection.
//!
//! Every interval it sends `HELLO`, which needs no permission, is answered while the server loads data or runs a
//! script, and tells the server's role. If neither an answer nor any byte arrives within the time limit, the
//! connection is dead. [`Listener`] checks the publishers' canaries.
//!
//! Any bytes count as an answer: behind a backlog the answer is late although the connection works, and closing the
//! connection would lose the backlog.

use std::{pin::Pin, sync::Arc, time::Duration};

use tokio::time::{Instant, Sleep, sleep};

use crate::redis::{
    canaries::{Canaries, Listener, Missed},
    clock::{Clock, LOOK},
};

/// Why the connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Dead {
    #[error("no answer within {0:?}")]
    Silent(Duration),
    #[error("what this node publishes does not arrive here: {0}")]
    Missed(#[from] Missed),
}

/// The health check of one connection.
pub(super) struct HealthCheck {
    clock: Arc<Clock>,
    /// Runs only while this check is polled: time in which the thread was busy is no silence.
    own_clock: Clock,
    listener: Listener,
    interval: Duration,
    time_limit: Duration,
    timer: Pin<Box<Sleep>>,
    /// When to send the next `HELLO`.
    next: Instant,
    question: Option<Question>,
    /// When the last answered `HELLO` was sent.
    answered: Option<Duration>,
}

/// A `HELLO` without an answer yet.
struct Question {
    sent_at: Duration,
    /// When bytes last arrived, by the check's own clock, and how many there had been in all.
    moved_at: Duration,
    bytes: u64,
}

impl HealthCheck {
    /// A check whose first `HELLO` is due at once.
    pub(super) fn new(
        canaries: Arc<Canaries>,
        subscriber: usize,
        clock: Arc<Clock>,
        interval: Duration,
        time_limit: Duration,
    ) -> Self {
        Self {
            clock,
            own_clock: Clock::new(),
            listener: Listener::new(canaries, subscriber, time_limit),
            interval,
            time_limit,
            timer: Box::pin(sleep(Duration::ZERO)),
            next: Instant::now(),
            question: None,
            answered: None,
        }
    }

    /// Resolves when [`HealthCheck::look`] is due. Cancel safe.
    pub(super) async fn timer(&mut self) {
        self.timer.as_mut().await;
    }

    /// Checks the deadlines, given how many bytes have arrived so far; returns whether to send `HELLO` now. The caller
    /// has read the socket.
    pub(super) fn look(&mut self, bytes: u64) -> Result<bool, Dead> {
        let (now, own) = (self.clock.now(), self.own_clock.now());
        if let Some(question) = &mut self.question {
            if bytes > question.bytes {
                question.bytes = bytes;
                question.moved_at = own;
            } else if own >= question.moved_at + self.time_limit {
                return Err(Dead::Silent(self.time_limit));
            }
        }
        let owed = self.listener.look(self.answered)?;
        let ask = self.question.is_none() && Instant::now() >= self.next;
        if ask {
            self.question = Some(Question { sent_at: now, moved_at: own, bytes });
            self.next = Instant::now() + self.interval;
        }
        let look = Instant::now() + LOOK;
        self.timer.as_mut().reset(match (&self.question, owed) {
            (Some(_), _) => look,
            (None, Some(_)) => look.min(self.next),
            (None, None) => self.next,
        });
        Ok(ask)
    }

    /// `HELLO` has been answered, if only with an error.
    pub(super) fn answered(&mut self) {
        if let Some(question) = self.question.take() {
            self.answered = Some(question.sent_at);
        }
    }

    /// The canaries' topic is subscribed.
    pub(super) fn subscribed(&mut self) {
        self.listener.subscribed();
    }

    /// The canaries' topic is not subscribed any more.
    pub(super) fn unsubscribed(&mut self) {
        self.listener.unsubscribed();
    }

    /// Whether the connection has just been proven, so that rooms may be subscribed. True once.
    pub(super) fn prove(&mut self) -> bool {
        self.listener.prove()
    }

    /// A message to the canaries' topic; how long it took, if it is the last one of its publisher.
    pub(super) fn heard(&mut self, payload: &[u8]) -> Result<Option<Duration>, Dead> {
        Ok(self.listener.heard(payload)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(3);
    const INTERVAL: Duration = Duration::from_secs(10);

    fn health_check() -> (HealthCheck, Arc<Canaries>) {
        let clock = Arc::new(Clock::new());
        let canaries = Arc::new(Canaries::new(b"topic"[..].into(), 1, 1, Arc::clone(&clock)));
        canaries.connected(0);
        (HealthCheck::new(Arc::clone(&canaries), 0, clock, INTERVAL, LIMIT), canaries)
    }

    /// Looks whenever it is time to, with the same number of bytes, until there is something to do.
    async fn until_asked(health: &mut HealthCheck, bytes: u64) -> Result<Duration, Dead> {
        let start = Instant::now();
        loop {
            health.timer().await;
            if health.look(bytes)? {
                return Ok(start.elapsed());
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn hello_is_sent_at_once_and_then_every_interval() {
        let (mut health, _) = health_check();
        assert_eq!(until_asked(&mut health, 0).await, Ok(Duration::ZERO));
        for _ in 0..3 {
            health.answered();
            assert_eq!(until_asked(&mut health, 9).await, Ok(INTERVAL));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_means_a_dead_connection_and_a_backlog_does_not() {
        let (mut health, _) = health_check();
        until_asked(&mut health, 0).await.unwrap();
        for bytes in 1..20 {
            health.timer().await;
            assert_eq!(health.look(bytes), Ok(false));
            tokio::time::sleep(LIMIT / 4).await;
        }
        let start = Instant::now();
        assert_eq!(until_asked(&mut health, 19).await, Err(Dead::Silent(LIMIT)));
        assert!(start.elapsed() <= LIMIT + LOOK, "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_of_the_process_does_not_count_as_silence() {
        let (mut health, _) = health_check();
        until_asked(&mut health, 0).await.unwrap();
        tokio::time::advance(20 * LIMIT).await;
        health.timer().await;
        assert_eq!(health.look(0), Ok(false), "the answer may wait in the socket");
        assert_eq!(until_asked(&mut health, 0).await, Err(Dead::Silent(LIMIT)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_missing_canary_is_detected_while_other_data_arrive() {
        let (mut health, canaries) = health_check();
        until_asked(&mut health, 0).await.unwrap();
        health.answered();
        health.subscribed();
        canaries.send(0);
        canaries.accepted(0);
        let mut bytes = 0;
        let missed = loop {
            health.timer().await;
            bytes += 1000;
            match health.look(bytes) {
                Ok(true) => health.answered(),
                Ok(false) => {}
                Err(dead) => break dead,
            }
        };
        assert_eq!(missed, Dead::Missed(Missed));
    }
}
