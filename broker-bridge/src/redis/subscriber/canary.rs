//! Whether a pub/sub connection still delivers.
//!
//! A connection can be open, can even answer `PING`, and deliver nothing: a path that swallows packets, or a
//! server that has been failed over and forgotten. So every connection subscribes to a topic of its own, and
//! every interval two things happen at once: a `PING` on the connection, and a small publication to that topic
//! over another one, from the pool of request connections.
//!
//! - No answer to the `PING`, and not a byte: the path is dead.
//! - The publication was accepted and has not come back, nor did any other: the connection is wedged.
//! - The publication could not be sent: not this connection's fault. Twice in a row is worth a word in the
//!   status, since a publisher would fare no better.
//!
//! Bytes, or publications, that arrive in the meantime are as good as an answer: behind a backlog the
//! answer is late on a connection that works, and dropping it would make the backlog a loss.

use std::{pin::Pin, sync::Arc, time::Duration};

use tokio::{
    sync::oneshot,
    time::{Instant, Sleep, sleep, timeout},
};
use tokio_util::task::TaskTracker;

/// How much has arrived on the connection's owner so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    pub(super) bytes: u64,
    pub(super) publications: u64,
}

/// The connection delivers nothing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Wedged {
    #[error("no answer within {0:?}")]
    Silent(Duration),
    #[error("a message to itself did not come back within {0:?}")]
    Missed(Duration),
}

/// What [`Canary::event`] waits for.
#[derive(Debug)]
pub(super) enum Event {
    /// The interval or the time limit is over.
    Timer,
    /// The publication has been accepted, or not.
    Published(Result<(), String>),
}

/// What the owner is to do about an event.
#[derive(Debug)]
pub(super) enum Verdict {
    Fine,
    /// Send a `PING` and call [`Canary::start`].
    Start,
    /// Twice in a row, the publication could not be sent.
    CannotPublish(String),
    /// It can again.
    CanPublish,
}

/// The canary of one connection.
pub(super) struct Canary {
    pool: deadpool_redis::Pool,
    topic: Arc<[u8]>,
    interval: Duration,
    time_limit: Duration,
    tracker: TaskTracker,
    timer: Pin<Box<Sleep>>,
    publishing: Option<oneshot::Receiver<Result<(), String>>>,
    /// The topic is subscribed: a publication can come back.
    subscribed: bool,
    round: u64,
    flight: Option<Flight>,
    failures: u32,
}

struct Flight {
    since: Instant,
    before: Progress,
    ponged: bool,
    echo: Echo,
}

/// What is known about the round's publication.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Echo {
    /// Nothing was published: the topic was not subscribed yet.
    Deaf,
    /// It is being published.
    Published,
    /// The server has accepted it.
    Accepted,
    /// It has come back, or could not be sent.
    Over,
}

impl Canary {
    /// A canary whose first round is due at once.
    pub(super) fn new(
        pool: deadpool_redis::Pool,
        topic: Arc<[u8]>,
        interval: Duration,
        time_limit: Duration,
        tracker: TaskTracker,
    ) -> Self {
        Self {
            pool,
            topic,
            interval,
            time_limit,
            tracker,
            timer: Box::pin(sleep(Duration::ZERO)),
            publishing: None,
            subscribed: false,
            round: 0,
            flight: None,
            failures: 0,
        }
    }

    /// The next event. Cancel safe.
    pub(super) async fn event(&mut self) -> Event {
        let Some(publishing) = &mut self.publishing else {
            self.timer.as_mut().await;
            return Event::Timer;
        };
        tokio::select! {
            result = publishing => {
                self.publishing = None;
                Event::Published(result.unwrap_or_else(|_| Err("given up".to_owned())))
            }
            () = self.timer.as_mut() => Event::Timer,
        }
    }

    /// Judges an event, given how much has arrived so far.
    pub(super) fn mind(&mut self, event: Event, progress: Progress) -> Result<Verdict, Wedged> {
        match event {
            Event::Published(Ok(())) => {
                if let Some(flight) = &mut self.flight
                    && flight.echo == Echo::Published
                {
                    // The time for coming back begins here, however long the other connection took.
                    flight.echo = Echo::Accepted;
                    self.timer.as_mut().reset(Instant::now() + self.time_limit);
                }
                self.land();
                let failed_before = std::mem::take(&mut self.failures) >= FAILURES;
                Ok(if failed_before { Verdict::CanPublish } else { Verdict::Fine })
            }
            Event::Published(Err(why)) => {
                if let Some(flight) = &mut self.flight {
                    flight.echo = Echo::Over;
                }
                self.land();
                self.failures = self.failures.saturating_add(1);
                Ok(if self.failures >= FAILURES { Verdict::CannotPublish(why) } else { Verdict::Fine })
            }
            Event::Timer => self.timer_over(progress),
        }
    }

    /// Starts a round; the owner has just sent a `PING`.
    pub(super) fn start(&mut self, before: Progress) {
        self.round += 1;
        let echo = if self.subscribed { Echo::Published } else { Echo::Deaf };
        self.flight = Some(Flight { since: Instant::now(), before, ponged: false, echo });
        self.timer.as_mut().reset(Instant::now() + self.time_limit);
        if self.subscribed {
            let (done, publishing) = oneshot::channel();
            self.publishing = Some(publishing);
            let (pool, topic) = (self.pool.clone(), Arc::clone(&self.topic));
            let (round, time_limit) = (self.round, self.time_limit);
            self.tracker.spawn(async move {
                let result = timeout(time_limit, publish(&pool, &topic, round)).await;
                // The connection may be gone by now, and then nobody asks.
                let _ = done.send(result.unwrap_or_else(|_| Err(format!("no answer within {time_limit:?}"))));
            });
        }
    }

    /// The canary's topic has been acknowledged: the next round can publish, and is due at once.
    pub(super) fn subscribed(&mut self) {
        self.subscribed = true;
        if self.flight.is_none() {
            self.timer.as_mut().reset(Instant::now());
        }
    }

    /// The server has ended the topic's subscription: what is published now cannot come back.
    pub(super) fn unsubscribed(&mut self) {
        self.subscribed = false;
        if let Some(flight) = &mut self.flight {
            flight.echo = Echo::Over;
        }
        self.land();
    }

    /// The `PING` has been answered.
    pub(super) fn ponged(&mut self) {
        if let Some(flight) = &mut self.flight {
            flight.ponged = true;
        }
        self.land();
    }

    /// A message to the canary's topic; how long it took if it is this round's.
    pub(super) fn heard(&mut self, payload: &[u8]) -> Option<Duration> {
        let flight = self.flight.as_mut()?;
        let awaited = matches!(flight.echo, Echo::Published | Echo::Accepted);
        if !awaited || payload != self.round.to_string().as_bytes() {
            return None;
        }
        flight.echo = Echo::Over;
        let after = flight.since.elapsed();
        self.land();
        Some(after)
    }

    /// Ends the round if everything has come back.
    fn land(&mut self) {
        let Some(flight) = &self.flight else { return };
        let back = matches!(flight.echo, Echo::Deaf | Echo::Over) && self.publishing.is_none();
        if !flight.ponged || !back {
            return;
        }
        let rest = if flight.echo == Echo::Deaf && self.subscribed { Duration::ZERO } else { self.interval };
        self.flight = None;
        self.timer.as_mut().reset(Instant::now() + rest);
    }

    fn timer_over(&mut self, progress: Progress) -> Result<Verdict, Wedged> {
        let Some(flight) = &mut self.flight else { return Ok(Verdict::Start) };
        let arrived = progress.bytes > flight.before.bytes;
        let delivered = progress.publications > flight.before.publications;
        if !flight.ponged && !arrived {
            return Err(Wedged::Silent(self.time_limit));
        }
        if flight.ponged && flight.echo == Echo::Accepted && !delivered {
            return Err(Wedged::Missed(self.time_limit));
        }
        flight.before = progress;
        self.timer.as_mut().reset(Instant::now() + self.time_limit);
        Ok(Verdict::Fine)
    }
}

/// How many failures to publish in a row are worth a word.
const FAILURES: u32 = 2;

async fn publish(pool: &deadpool_redis::Pool, topic: &[u8], round: u64) -> Result<(), String> {
    let mut connection = pool.get().await.map_err(|error| match error {
        deadpool_redis::PoolError::Backend(error) => describe(&error),
        other => other.to_string(),
    })?;
    let mut command = redis::cmd("PUBLISH");
    command.arg(topic).arg(round);
    command.query_async::<i64>(&mut connection).await.map(drop).map_err(|error| describe(&error))
}

/// What the server said is cut to its code: an answer to a greeting may repeat the password.
fn describe(error: &redis::RedisError) -> String {
    match (error.kind(), error.code()) {
        (redis::ErrorKind::AuthenticationFailed, _) => "the greeting was refused".to_owned(),
        (_, Some(code)) => format!("the server said {code}"),
        (_, None) => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(3);
    const INTERVAL: Duration = Duration::from_secs(10);

    /// A canary whose pool leads nowhere: what became of a publication is what the test says.
    fn canary() -> Canary {
        let manager = deadpool_redis::Manager::new("redis+unix:///nowhere").unwrap();
        let pool = deadpool_redis::Pool::builder(manager).build().unwrap();
        Canary::new(pool, b"topic"[..].into(), INTERVAL, LIMIT, TaskTracker::new())
    }

    fn progress(bytes: u64, publications: u64) -> Progress {
        Progress { bytes, publications }
    }

    /// A round that is under way, with the pool's own answer out of the way.
    fn under_way() -> Canary {
        let mut canary = canary();
        canary.subscribed();
        canary.start(Progress::default());
        canary.publishing = None;
        canary
    }

    #[tokio::test(start_paused = true)]
    async fn a_round_that_comes_back_rests_for_the_interval() {
        let mut canary = under_way();
        assert!(matches!(canary.mind(Event::Published(Ok(())), progress(1, 0)), Ok(Verdict::Fine)));
        canary.ponged();
        tokio::time::advance(Duration::from_millis(40)).await;
        assert_eq!(canary.heard(b"9"), None, "of another round");
        assert_eq!(canary.heard(b"1"), Some(Duration::from_millis(40)));
        assert_eq!(canary.heard(b"1"), None, "once");
        let start = Instant::now();
        assert!(matches!(canary.event().await, Event::Timer));
        assert_eq!(start.elapsed(), INTERVAL);
        assert!(matches!(canary.mind(Event::Timer, progress(1, 0)), Ok(Verdict::Start)));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_a_dead_path() {
        let mut canary = under_way();
        assert_eq!(canary.mind(Event::Timer, progress(0, 0)).unwrap_err(), Wedged::Silent(LIMIT));
        let mut canary = under_way();
        assert!(canary.mind(Event::Timer, progress(1, 0)).is_ok(), "behind a backlog the answer is late");
        assert_eq!(canary.mind(Event::Timer, progress(1, 0)).unwrap_err(), Wedged::Silent(LIMIT));
    }

    #[tokio::test(start_paused = true)]
    async fn an_accepted_publication_that_does_not_come_back_is_a_wedge() {
        let mut canary = under_way();
        canary.ponged();
        assert!(canary.mind(Event::Timer, progress(9, 0)).is_ok(), "nobody has accepted it yet");
        assert!(canary.mind(Event::Published(Ok(())), progress(9, 0)).is_ok());
        assert!(canary.mind(Event::Timer, progress(99, 5)).is_ok(), "others are delivered");
        assert_eq!(canary.mind(Event::Timer, progress(999, 5)).unwrap_err(), Wedged::Missed(LIMIT));
    }

    #[tokio::test(start_paused = true)]
    async fn failing_to_publish_is_not_the_connections_fault() {
        let mut canary = under_way();
        canary.ponged();
        let failed = || Event::Published(Err("no".to_owned()));
        assert!(matches!(canary.mind(failed(), progress(1, 0)), Ok(Verdict::Fine)));
        assert!(matches!(canary.mind(Event::Timer, progress(1, 0)), Ok(Verdict::Start)));
        canary.start(progress(1, 0));
        canary.publishing = None;
        canary.ponged();
        assert!(
            matches!(canary.mind(failed(), progress(2, 0)), Ok(Verdict::CannotPublish(_))),
            "twice in a row"
        );
        canary.start(progress(2, 0));
        assert!(matches!(canary.mind(Event::Published(Ok(())), progress(2, 0)), Ok(Verdict::CanPublish)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_round_that_can_publish_comes_at_once() {
        let mut canary = canary();
        canary.start(Progress::default());
        canary.subscribed();
        canary.ponged();
        let start = Instant::now();
        assert!(matches!(canary.event().await, Event::Timer));
        assert_eq!(start.elapsed(), Duration::ZERO);
        assert!(matches!(canary.mind(Event::Timer, progress(1, 0)), Ok(Verdict::Start)));
    }
}
