use std::sync::mpsc;

use super::*;

/// Threads whose only thread is busy until the sender is dropped or used.
async fn busy() -> (CryptoThreads, mpsc::SyncSender<()>) {
    let threads = CryptoThreads::start(1, &Registry::new()).unwrap();
    let (release, released) = mpsc::sync_channel::<()>(1);
    let (begun, has_begun) = oneshot::channel();
    let job = move || {
        begun.send(()).unwrap();
        released.recv().ok();
    };
    let queued = threads.shared.enqueue(Work::Handshake, Stage::First, Box::new(job));
    has_begun.await.unwrap();
    drop(queued);
    (threads, release)
}

/// A queue, and what its jobs have done.
#[derive(Default)]
struct Order {
    queue: Queue,
    done: Arc<Mutex<Vec<&'static str>>>,
}

impl Order {
    fn push(&mut self, stage: Stage, name: &'static str, since: Instant) {
        let done = Arc::clone(&self.done);
        let job = Box::new(move || done.lock().push(name));
        self.queue.push(stage, Waiting { job, work: Work::Handshake, since });
    }

    fn run(&mut self, now: Instant) -> Vec<&'static str> {
        while let Some(waiting) = self.queue.pop(now) {
            (waiting.job)();
        }
        std::mem::take(&mut *self.done.lock())
    }
}

#[test]
fn what_has_begun_goes_first_and_new_clients_do_not_starve() {
    let (mut order, now) = (Order::default(), Instant::now());
    for _ in 0..3 {
        order.push(Stage::First, "first", now);
    }
    for _ in 0..=2 * LATER_IN_A_ROW {
        order.push(Stage::Later, "later", now);
    }
    let eight = vec!["later"; LATER_IN_A_ROW as usize];
    let expected = [eight.clone(), vec!["first"], eight, vec!["first"], vec!["later", "first"]].concat();
    assert_eq!(order.run(now), expected);
}

/// In time, in the order of arrival. When the node is behind, those that have waited for long are about to give
/// up, and are served only if nobody else is left.
#[test]
fn the_newest_hello_goes_first_once_the_oldest_is_late() {
    let (mut order, start) = (Order::default(), Instant::now());
    let push_all = |order: &mut Order| {
        for (name, after) in [("a", 0), ("b", 1), ("c", 2)] {
            order.push(Stage::First, name, start + Duration::from_millis(after));
        }
    };
    push_all(&mut order);
    assert_eq!(order.run(start + LATE / 2), ["a", "b", "c"]);
    push_all(&mut order);
    assert_eq!(order.run(start + LATE), ["c", "b", "a"]);
    // What has begun is done in order: only as much begins as the node can serve.
    order.push(Stage::Later, "first token", start);
    order.push(Stage::Later, "second token", start);
    assert_eq!(order.run(start + LATE), ["first token", "second token"]);
}

/// What nobody waits for is not among the jobs that go before a new client's.
#[tokio::test]
async fn abandoned_jobs_use_no_turn() {
    let (threads, release) = busy().await;
    let done = Arc::new(Mutex::new(Vec::new()));
    let job = |stage, name| {
        let done = Arc::clone(&done);
        Box::pin(threads.run(Work::Handshake, stage, move || done.lock().push(name)))
    };
    let mut abandoned: Vec<_> = (0..LATER_IN_A_ROW).map(|_| job(Stage::Later, "abandoned")).collect();
    for job in &mut abandoned {
        assert!(futures_util::poll!(job).is_pending());
    }
    let (mut first, mut later) = (job(Stage::First, "first"), job(Stage::Later, "later"));
    assert!(futures_util::poll!(&mut first).is_pending());
    assert!(futures_util::poll!(&mut later).is_pending());
    assert_eq!(threads.shared.handshakes.waiting.get(), i64::from(LATER_IN_A_ROW) + 2);
    drop(abandoned);
    assert_eq!(threads.shared.handshakes.waiting.get(), 2, "and leaves the queue at once");
    let measured = threads.shared.handshakes.wait.get_sample_count();
    assert_eq!(measured, 1 + u64::from(LATER_IN_A_ROW), "their wait is told as well");
    release.send(()).unwrap();
    first.await.unwrap();
    later.await.unwrap();
    assert_eq!(*done.lock(), ["later", "first"]);
}

#[tokio::test]
async fn jobs_beyond_the_threads_wait_and_are_counted() {
    let (threads, release) = busy().await;
    let waiting = || threads.shared.handshakes.waiting.get();
    assert_eq!(waiting(), 0, "the one that runs does not wait");
    let mut jobs: Vec<_> =
        (0..3).map(|number| Box::pin(threads.run(Work::Handshake, Stage::First, move || number))).collect();
    for job in &mut jobs {
        assert!(futures_util::poll!(job).is_pending());
    }
    assert_eq!(waiting(), 3);
    release.send(()).unwrap();
    for (number, job) in jobs.into_iter().enumerate() {
        assert_eq!(job.await, Ok(number));
    }
    assert_eq!(waiting(), 0);
    assert_eq!(threads.shared.handshakes.wait.get_sample_count(), 4);
    assert_eq!(threads.shared.tokens.wait.get_sample_count(), 0);
}

#[tokio::test]
async fn what_nobody_waits_for_any_more_is_not_done() {
    let (threads, release) = busy().await;
    let (sender, done) = mpsc::sync_channel(100);
    {
        let sender = sender.clone();
        let mut abandoned =
            Box::pin(threads.run(Work::Token, Stage::Later, move || sender.send("abandoned").unwrap()));
        assert!(futures_util::poll!(&mut abandoned).is_pending());
    }
    release.send(()).unwrap();
    threads.run(Work::Token, Stage::Later, move || sender.send("wanted").unwrap()).await.unwrap();
    assert_eq!(done.try_iter().collect::<Vec<_>>(), ["wanted"]);
    assert_eq!(threads.shared.tokens.waiting.get(), 0);
}

#[tokio::test]
async fn a_job_that_panics_takes_no_thread_with_it() {
    let threads = CryptoThreads::start(1, &Registry::new()).unwrap();
    let failed: Result<(), _> =
        threads.run(Work::Handshake, Stage::First, || std::panic::resume_unwind(Box::new(()))).await;
    assert_eq!(failed, Err(JobLost));
    assert_eq!(threads.run(Work::Handshake, Stage::First, || 1).await, Ok(1));
}

#[tokio::test]
async fn only_the_threads_for_cryptography_are_nicer() {
    let threads = CryptoThreads::start(1, &Registry::new()).unwrap();
    let nice = || rustix::process::getpriority_process(None).unwrap();
    let own = nice();
    let other = threads.run(Work::Handshake, Stage::First, nice).await.unwrap();
    assert_eq!(other, (own + NICER).min(19));
    assert_eq!(nice(), own);
}
