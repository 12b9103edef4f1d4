use std::sync::mpsc;

use super::*;

struct Named(&'static str, mpsc::SyncSender<&'static str>);

impl Job for Named {
    fn is_wanted(&self) -> bool {
        true
    }

    fn run(self: Box<Self>) {
        self.1.send(self.0).unwrap();
    }
}

/// Threads whose only thread is busy until the sender is dropped or used.
async fn busy() -> (CryptoThreads, mpsc::SyncSender<()>, impl Future<Output = Result<(), JobLost>>) {
    let threads = CryptoThreads::start(1, &Registry::new()).unwrap();
    let (release, released) = mpsc::sync_channel::<()>(1);
    let (begun, has_begun) = oneshot::channel();
    let shared = Arc::clone(&threads.shared);
    let (result, received) = oneshot::channel();
    let work = move || {
        begun.send(()).unwrap();
        released.recv().ok();
    };
    let job = Box::new(WithResult { work, result });
    shared.measured(Work::Handshake).waiting.inc();
    let waiting = Waiting { job, work: Work::Handshake, since: Instant::now() };
    shared.queue.lock().push(Stage::First, waiting);
    shared.changed.notify_one();
    has_begun.await.unwrap();
    (threads, release, async { received.await.map_err(|_| JobLost) })
}

#[test]
fn what_has_begun_goes_first_and_new_clients_do_not_starve() {
    let (sender, done) = mpsc::sync_channel(100);
    let mut queue = Queue::default();
    let mut push = |stage, name| {
        let job = Box::new(Named(name, sender.clone()));
        queue.push(stage, Waiting { job, work: Work::Handshake, since: Instant::now() });
    };
    for _ in 0..3 {
        push(Stage::First, "first");
    }
    for _ in 0..=2 * LATER_IN_A_ROW {
        push(Stage::Later, "later");
    }
    while let Some(waiting) = queue.pop() {
        waiting.job.run();
    }
    let eight = vec!["later"; LATER_IN_A_ROW as usize];
    let order = [eight.clone(), vec!["first"], eight, vec!["first"], vec!["later", "first"]].concat();
    assert_eq!(done.try_iter().collect::<Vec<_>>(), order);
}

#[tokio::test]
async fn jobs_beyond_the_threads_wait_and_are_counted() {
    let (threads, release, held) = busy().await;
    let waiting = || threads.shared.handshakes.waiting.get();
    assert_eq!(waiting(), 0, "the one that runs does not wait");
    let mut jobs: Vec<_> =
        (0..3).map(|number| Box::pin(threads.run(Work::Handshake, Stage::First, move || number))).collect();
    for job in &mut jobs {
        assert!(futures_util::poll!(job).is_pending());
    }
    assert_eq!(waiting(), 3);
    release.send(()).unwrap();
    held.await.unwrap();
    for (number, job) in jobs.into_iter().enumerate() {
        assert_eq!(job.await, Ok(number));
    }
    assert_eq!(waiting(), 0);
    assert_eq!(threads.shared.handshakes.wait.get_sample_count(), 4);
    assert_eq!(threads.shared.tokens.wait.get_sample_count(), 0);
}

#[tokio::test]
async fn what_nobody_waits_for_any_more_is_not_done() {
    let (threads, release, held) = busy().await;
    let (sender, done) = mpsc::sync_channel(100);
    {
        let sender = sender.clone();
        let mut abandoned =
            Box::pin(threads.run(Work::Token, Stage::Later, move || sender.send("abandoned").unwrap()));
        assert!(futures_util::poll!(&mut abandoned).is_pending());
    }
    release.send(()).unwrap();
    held.await.unwrap();
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
