//! One connection, from the task's view: a server of a few lines is at the other end, and the clock is paused.

use std::{
    num::NonZeroU32,
    pin::Pin,
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll},
};

use parking_lot::Mutex;
use prometheus::Registry;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf, duplex},
    task::{JoinHandle, yield_now},
};

use super::*;
use crate::{
    Affinity, Cursor, Data, Publication, PublicationId, PublishRequest, Receipt, ReceiptSink, Retention,
    RoomName, Ticket, publication::Owner, redis::connection::write_command,
};

/// The time limit for a publication.
const LIMIT: Duration = Duration::from_secs(5);
/// The time limit for a canary.
const CANARY_LIMIT: Duration = Duration::from_secs(3);
const INTERVAL: Duration = Duration::from_secs(2);

/// How much to keep of a room with history.
const KEEP: Retention = Retention { size: NonZeroU32::new(9).unwrap(), ttl: None };

type Outcome = Result<Accepted, BrokerError>;

/// The outcome of a publication that was accepted without being recorded.
const OK: Outcome = Ok(Accepted { cursor: None, duplicate: false });

/// The outcomes, in the order in which they were settled.
#[derive(Default)]
struct Outcomes(Mutex<Vec<(u64, Outcome)>>);

impl ReceiptSink for Outcomes {
    fn settle(&self, ticket: Ticket, outcome: Outcome) {
        self.0.lock().push((ticket.request, outcome));
    }
}

/// A publisher that serves one connection, and the server at the other end.
struct Stage {
    queue: Queue,
    outcomes: Arc<Outcomes>,
    next: u64,
    closing: CancellationToken,
    server: DuplexStream,
    /// How often the functions were loaded, and what comes of it.
    loads: Arc<Mutex<(usize, Result<(), BrokerError>)>>,
    /// The name of the last connection that has introduced itself.
    writer: String,
    task: JoinHandle<(Task, Result<(), Lost>)>,
}

impl Stage {
    /// A socket of `buffer` bytes in each direction.
    fn new(buffer: usize) -> Self {
        Self::with(buffer, LIMIT, |stream| Box::new(stream))
    }

    fn with(buffer: usize, limit: Duration, stream: impl FnOnce(DuplexStream) -> Connection) -> Self {
        let (client, server) = duplex(buffer);
        let clock = Arc::new(Clock::new());
        let metrics = BrokerMetrics::register(&Registry::new()).unwrap();
        let (queue, receiver) = Queue::new(16 << 20, limit, Arc::clone(&clock), Arc::clone(&metrics));
        let canaries = Arc::new(Canaries::new(b"canary"[..].into(), 1, 0, Arc::clone(&clock)));
        let closing = CancellationToken::new();
        canaries.connected(0);
        let loads = Arc::new(Mutex::new((0, Ok(()))));
        let load = Arc::clone(&loads);
        let on = Publisher {
            index: 0,
            part: 0,
            connector: Arc::new(Connector::new("redis://127.0.0.1:1".parse().unwrap(), None, LIMIT).unwrap()),
            topics: Topics::new(&"".parse().unwrap()),
            time_limit: limit,
            canaries,
            canary_interval: INTERVAL,
            canary_timeout: CANARY_LIMIT,
            load_functions: Arc::new(move || {
                let mut load = load.lock();
                load.0 += 1;
                Box::pin(std::future::ready(load.1.clone()))
            }),
            clock,
            metrics: Arc::clone(&metrics),
            status: Arc::new(StatusTracker::new(1, "starting", metrics)),
            closing: closing.clone(),
            abort: CancellationToken::new(),
        };
        let receiver = Arc::new(tokio::sync::Mutex::new(receiver));
        let receiver = receiver.try_lock_owned().expect("nobody else has it");
        let mut task = Task::new(on, receiver);
        let connection = stream(client);
        #[allow(clippy::disallowed_methods, reason = "the test waits for it")]
        let task = tokio::spawn(async move {
            let end = task.serve(connection).await;
            (task, end)
        });
        Self { queue, outcomes: Arc::default(), next: 0, closing, server, loads, writer: String::new(), task }
    }

    /// The same after the first canary.
    async fn proven(buffer: usize) -> Self {
        let mut stage = Self::new(buffer);
        stage.hear_canary(1).await;
        stage.say("%1\r\n+role\r\n+master\r\n:0\r\n").await;
        stage
    }

    fn publish(&mut self, text: &str) {
        self.publish_to("r", text, None);
    }

    /// Publishes texts that are to be recorded, each in the room that its first letter names.
    fn record_all(&mut self, texts: &[&str]) {
        for text in texts {
            self.publish_to(text.get(..1).unwrap(), text, Some(KEEP));
        }
    }

    /// Publishes a text that is to be recorded under an id.
    fn record_with_id(&mut self, text: &str) {
        self.publish_with_id(text.get(..1).unwrap(), text, Some(KEEP), Some("1"));
    }

    fn publish_to(&mut self, room: &str, text: &str, history: Option<Retention>) {
        self.publish_with_id(room, text, history, None);
    }

    fn publish_with_id(&mut self, room: &str, text: &str, history: Option<Retention>, id: Option<&str>) {
        let sink: Arc<dyn ReceiptSink> = Arc::clone(&self.outcomes) as _;
        let request = PublishRequest {
            room: RoomName::new(room).unwrap(),
            publication: Publication::new(Data::text(text)),
            history,
            id: id.map(|id| PublicationId::new(Owner::Backend, id).unwrap()),
            affinity: Affinity::default(),
            receipt: Receipt::new(sink, Ticket { owner: 0, request: self.next }),
        };
        self.next += 1;
        assert!(self.queue.try_publish(request).is_ok());
    }

    fn publish_all(&mut self, texts: &[&str]) {
        for text in texts {
            self.publish(text);
        }
    }

    /// The server reads exactly this command.
    async fn hear(&mut self, parts: &[&[u8]]) {
        let mut expected = bytes::BytesMut::new();
        write_command(&mut expected, parts);
        let mut got = vec![0; expected.len()];
        self.server.read_exact(&mut got).await.unwrap();
        assert_eq!(got.escape_ascii().to_string(), expected.escape_ascii().to_string());
    }

    async fn hear_publications(&mut self, texts: &[&str]) {
        for text in texts {
            self.hear(&[b"PUBLISH", b"room:r", text.as_bytes()]).await;
        }
    }

    async fn hear_calls(&mut self, texts: &[&str]) {
        for text in texts {
            let log = format!("{{room:{}}}:log", text.get(..1).unwrap());
            let (call, policy) =
                ([&b"FCALL"[..], b"tidegate_publish", b"1"], [b"size", &b"9"[..], b"ttl", b"none"]);
            self.hear(&[&call[..], &[log.as_bytes(), text.as_bytes()], &policy].concat()).await;
        }
    }

    /// The connection introduces itself before it records anything.
    async fn introduce(&mut self) {
        self.hear(&[b"INFO", b"server"]).await;
        let mut expected = bytes::BytesMut::new();
        write_command(&mut expected, &[b"FCALL", b"tidegate_begin", b"0", &[b'?'; 16]]);
        let mut got = vec![0; expected.len()];
        self.server.read_exact(&mut got).await.unwrap();
        let name = got.split_off(got.len() - 18);
        assert_eq!(got, expected[..got.len()]);
        self.writer = String::from_utf8(name[..16].to_vec()).unwrap();
        self.say("$10\r\nrun_id:1f\n\r\n:0\r\n").await;
    }

    /// The same as [`hear_calls`](Self::hear_calls) of a writer, with the number of the first.
    async fn hear_numbered(&mut self, texts: &[&str], first: u64) {
        for (number, text) in (first..).zip(texts) {
            let log = format!("{{room:{}}}:log", text.get(..1).unwrap());
            let written = format!("{}-{number}", self.writer);
            let call: [&[u8]; 11] = [
                b"FCALL",
                b"tidegate_publish",
                b"1",
                log.as_bytes(),
                text.as_bytes(),
                b"size",
                b"9",
                b"ttl",
                b"none",
                b"w",
                written.as_bytes(),
            ];
            self.hear(&call).await;
        }
    }

    /// Cuts the connection, and serves another one, which begins with a canary. The server says that the connection has
    /// this ID.
    async fn reconnect(&mut self, id: u64) {
        self.lose();
        let (mut task, _) = self.end().await;
        task.take_back();
        let (client, server) = duplex(1 << 20);
        self.server = server;
        let connection: Connection = Box::new(client);
        #[allow(clippy::disallowed_methods, reason = "the test waits for it")]
        let serving = tokio::spawn(async move {
            let end = task.serve(connection).await;
            (task, end)
        });
        self.task = serving;
        self.hear_canary(2).await;
        self.greet(id).await;
    }

    fn lose(&mut self) {
        let (client, server) = duplex(1);
        drop((client, std::mem::replace(&mut self.server, server)));
    }

    /// Answers a canary.
    async fn greet(&mut self, id: u64) {
        self.say(&format!("%2\r\n+role\r\n+master\r\n+id\r\n:{id}\r\n:0\r\n")).await;
    }

    async fn hear_canary(&mut self, number: u64) {
        self.hear(&[b"HELLO", b"3"]).await;
        self.hear(&[b"PUBLISH", b"canary", format!("0:{number}").as_bytes()]).await;
    }

    async fn say(&mut self, answers: &str) {
        self.server.write_all(answers.as_bytes()).await.unwrap();
    }

    /// Nothing more has been sent, and nothing is about to be.
    async fn hear_nothing(&mut self) {
        settled().await;
        let mut byte = [0];
        assert!(self.server.read(&mut byte).now_or_never().is_none(), "{byte:?}");
    }

    /// The outcomes so far, in order.
    async fn outcomes(&self) -> Vec<Outcome> {
        settled().await;
        let outcomes = self.outcomes.0.lock();
        assert!(outcomes.iter().map(|(request, _)| *request).eq(0..outcomes.len() as u64), "the order");
        outcomes.iter().map(|(_, outcome)| outcome.clone()).collect()
    }

    async fn end(&mut self) -> (Task, Result<(), Lost>) {
        (&mut self.task).await.unwrap()
    }
}

/// Everything that can happen without time passing has happened.
async fn settled() {
    for _ in 0..20 {
        yield_now().await;
    }
}

fn unknown(count: usize) -> Vec<Outcome> {
    vec![Err(BrokerError::Unknown); count]
}

#[tokio::test(start_paused = true)]
async fn a_connection_begins_with_a_canary_and_keeps_order_through_a_narrow_socket() {
    let mut stage = Stage::new(7);
    let long = "x".repeat(100_000);
    let texts = ["a", &long, "", "b", &long, "c"];
    stage.publish_all(&texts);
    stage.hear_canary(1).await;
    stage.hear_publications(&texts).await;
    stage.say("%1\r\n+role\r\n+master\r\n:0\r\n:1\r\n:1\r\n:1\r\n:1\r\n:1\r\n").await;
    assert_eq!(stage.outcomes().await, vec![OK; 5]);
    stage.say(":1\r").await;
    assert_eq!(stage.outcomes().await.len(), 5, "half of an answer is none");
    stage.say("\n").await;
    assert_eq!(stage.outcomes().await, vec![OK; 6]);
}

#[tokio::test(start_paused = true)]
async fn each_publication_is_settled_by_its_own_answer() {
    let mut stage = Stage::proven(1 << 20).await;
    let texts = ["a", "b", "c", "d", "e"];
    for pieces in [1, 3, usize::MAX] {
        stage.outcomes.0.lock().clear();
        stage.next = 0;
        stage.publish_all(&texts);
        stage.hear_publications(&texts).await;
        let answers = ":1\r\n-ERR a\r\n>2\r\n$10\r\ninvalidate\r\n_\r\n:0\r\n-NOPERM b\r\n!6\r\nBUSY c\r\n";
        for piece in answers.as_bytes().chunks(pieces) {
            stage.server.write_all(piece).await.unwrap();
            settled().await;
        }
        let expected = vec![
            OK,
            Err(BrokerError::Refused("ERR a".into())),
            OK,
            Err(BrokerError::Forbidden("NOPERM b".into())),
            Err(BrokerError::NotNow("BUSY c".into())),
        ];
        assert_eq!(stage.outcomes().await, expected, "in pieces of {pieces} bytes");
    }
    stage.closing.cancel();
    assert!(stage.end().await.1.is_ok());
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_connection_ends_it_when_the_rest_is_answered() {
    let mut stage = Stage::proven(1 << 20).await;
    stage.publish_all(&["a", "b", "c"]);
    stage.hear_publications(&["a", "b", "c"]).await;
    stage.say(":1\r\n-READONLY no\r\n").await;
    settled().await;
    stage.publish("d");
    stage.hear_nothing().await;
    stage.say(":1\r\n").await;
    let (task, end) = stage.end().await;
    assert!(matches!(end, Err(Lost::Refused(text)) if *text == *"READONLY no"));
    let refused = Err(BrokerError::NotNow("READONLY no".into()));
    assert_eq!(stage.outcomes().await, [OK, refused, OK], "the last one waits for the next connection");
    drop(task);
    assert_eq!(stage.outcomes().await.last(), Some(&Err(BrokerError::Closed)), "it was never sent");
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_with_half_of_the_answers_leaves_the_rest_unknown() {
    for last in [":1\r\n:1\r\n", ":1\r\n:1\r\n:", ":1\r\n:1\r\n?"] {
        let mut stage = Stage::proven(1 << 20).await;
        stage.publish_all(&["a", "b", "c", "d"]);
        stage.hear_publications(&["a", "b", "c", "d"]).await;
        stage.say(last).await;
        stage.lose();
        let (_, end) = stage.end().await;
        let malformed = matches!(end, Err(Lost::Malformed(_)));
        assert!(
            malformed == last.ends_with('?') && (malformed || matches!(end, Err(Lost::Closed))),
            "{end:?}"
        );
        assert_eq!(stage.outcomes().await, [vec![OK; 2], unknown(2)].concat(), "{last:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_without_a_command_ends_the_connection() {
    let mut stage = Stage::proven(1 << 20).await;
    stage.say(":1\r\n").await;
    assert!(matches!(stage.end().await.1, Err(Lost::OutOfStep)));
    let mut stage = Stage::proven(1 << 20).await;
    stage.say("-ERR max number of clients reached\r\n").await;
    assert!(matches!(stage.end().await.1, Err(Lost::Refused(text)) if text.contains("max number")));
}

#[tokio::test(start_paused = true)]
async fn a_bounded_number_of_publications_is_in_flight() {
    let mut stage = Stage::proven(1 << 20).await;
    let texts = vec!["x"; 600];
    stage.publish_all(&texts);
    stage.hear_publications(texts.split_at(512).0).await;
    stage.hear_nothing().await;
    stage.say(&":1\r\n".repeat(50)).await;
    stage.hear_publications(texts.split_at(50).0).await;
    stage.hear_nothing().await;
    stage.say(&":1\r\n".repeat(512)).await;
    stage.hear_publications(texts.split_at(38).0).await;
    assert_eq!(stage.outcomes().await.len(), 562);
}

#[tokio::test(start_paused = true)]
async fn a_bounded_number_of_bytes_is_in_flight() {
    let mut stage = Stage::proven(4 << 20).await;
    let large = "x".repeat(600 * 1024);
    stage.publish_all(&[&large, &large, "small"]);
    stage.hear_publications(&[&large, &large]).await;
    stage.hear_nothing().await;
    stage.say(":1\r\n").await;
    stage.hear_publications(&["small"]).await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_restarts_the_time_limit_of_a_canary_and_not_of_a_publication() {
    let mut stage = Stage::proven(1 << 20).await;
    let start = Instant::now();
    stage.publish("a");
    stage.hear_publications(&["a"]).await;
    stage.hear_canary(2).await;
    assert_eq!(start.elapsed(), INTERVAL);
    sleep_until(start + Duration::from_secs(4)).await;
    stage.say(":1\r\n").await;
    let (_, end) = stage.end().await;
    assert!(matches!(end, Err(Lost::Silent(CANARY_LIMIT))), "{end:?}");
    let waited = start.elapsed();
    assert!((7000..=7500).contains(&waited.as_millis()), "{waited:?}");

    let mut stage = Stage::proven(1 << 20).await;
    let start = Instant::now();
    stage.publish_all(&["a", "b"]);
    stage.hear_publications(&["a", "b"]).await;
    sleep_until(start + Duration::from_secs(4)).await;
    stage.say(":1\r\n").await;
    let (_, end) = stage.end().await;
    assert!(matches!(end, Err(Lost::Silent(LIMIT))), "{end:?}");
    let waited = start.elapsed();
    assert!((5000..=5500).contains(&waited.as_millis()), "{waited:?}");
    assert_eq!(stage.outcomes().await, [OK, Err(BrokerError::Unknown)]);
}

/// A connection that is found readable only when it is asked twice at the same time: the thread was busy, and the
/// timer was noticed before the socket.
struct Late {
    inner: DuplexStream,
    asked: Instant,
}

impl AsyncRead for Late {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let now = Instant::now();
        if std::mem::replace(&mut self.asked, now) == now {
            Pin::new(&mut self.inner).poll_read(cx, out)
        } else {
            Poll::Pending
        }
    }
}

impl AsyncWrite for Late {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn what_has_arrived_is_read_before_a_time_limit_is_judged() {
    // So short that the first look is after it.
    let limit = LOOK * 4 / 5;
    let late = |inner| Box::new(Late { inner, asked: Instant::now() }) as Connection;
    let mut stage = Stage::with(1 << 20, limit, late);
    stage.hear_canary(1).await;
    stage.say("%1\r\n+role\r\n+master\r\n:0\r\n").await;
    settled().await;
    sleep(Duration::from_secs(1)).await;
    let start = Instant::now();
    stage.publish("a");
    stage.hear_publications(&["a"]).await;
    sleep(Duration::from_millis(100)).await;
    stage.say(":1\r\n").await;
    assert_eq!(stage.outcomes().await, [], "it is not noticed");
    while stage.outcomes().await.is_empty() {
        sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(start.elapsed(), LOOK);
    assert_eq!(stage.outcomes().await, [OK]);
}

/// A server that never stops to push, and does not take what is written any more.
struct Endless(Arc<AtomicUsize>);

impl AsyncRead for Endless {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // The end keeps a test that fails from running forever.
        if self.0.fetch_add(1, Ordering::Relaxed) < 1000 {
            out.put_slice(b">1\r\n$1\r\nx\r\n");
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Endless {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn a_busy_connection_yields_and_a_broken_one_is_read_to_its_end() {
    let reads = Arc::new(AtomicUsize::new(0));
    let mut stage = Stage::with(1, LIMIT, |_| Box::new(Endless(Arc::clone(&reads))));
    for turn in 1..=10 {
        yield_now().await;
        let reads = reads.load(Ordering::Relaxed);
        assert!(reads <= 2 * turn, "{reads} reads in {turn} turns");
    }
    let (_, end) = stage.end().await;
    assert!(matches!(&end, Err(Lost::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe), "{end:?}");
    assert_eq!(reads.load(Ordering::Relaxed), 1001);
}

/// The outcome of a publication that was recorded at this position, and the answer that says so.
fn recorded(offset: u64) -> (Outcome, String) {
    let cursor = Cursor { epoch: 5, offset };
    let text = cursor.to_string();
    (
        Ok(Accepted { cursor: Some(cursor), duplicate: false }),
        format!("*2\r\n${}\r\n{text}\r\n:0\r\n", text.len()),
    )
}

const NOT_FOUND: &str = "-ERR Function not found\r\n";

#[tokio::test(start_paused = true)]
async fn publications_are_recorded_once_the_functions_are_there() {
    let mut stage = Stage::proven(1 << 20).await;
    stage.publish("a");
    stage.record_all(&["x1", "x2"]);
    stage.publish("b");
    stage.hear_publications(&["a"]).await;
    stage.say(":1\r\n").await;
    stage.introduce().await;
    stage.hear_calls(&["x1", "x2"]).await;
    stage.hear_publications(&["b"]).await;
    assert_eq!(stage.loads.lock().0, 1);
    stage.record_all(&["x3", "y1"]);
    stage.hear_calls(&["x3", "y1"]).await;
    let (first, second) = (recorded(7), recorded(8));
    stage.say(&format!("{}{}:1\r\n", first.1, second.1)).await;
    // Known already, and delivered without being kept.
    stage.say("*2\r\n$3\r\n5-8\r\n:1\r\n*2\r\n$0\r\n\r\n:0\r\n").await;
    let known = Ok(Accepted { cursor: Some(Cursor { epoch: 5, offset: 8 }), duplicate: true });
    assert_eq!(stage.outcomes().await, [OK, first.0, second.0, OK, known, OK]);
    assert_eq!(stage.loads.lock().0, 1, "once for a connection");
}

#[tokio::test(start_paused = true)]
async fn calls_of_missing_functions_are_repeated_in_order_after_everything_is_answered() {
    let mut stage = Stage::proven(1 << 20).await;
    stage.record_all(&["x1", "y1", "x2"]);
    stage.publish("a");
    stage.record_all(&["x3"]);
    stage.introduce().await;
    stage.hear_calls(&["x1", "y1", "x2"]).await;
    stage.hear_publications(&["a"]).await;
    stage.hear_calls(&["x3"]).await;
    stage.say(&NOT_FOUND.repeat(3)).await;
    settled().await;
    stage.publish("b");
    stage.hear_nothing().await;
    assert_eq!(stage.loads.lock().0, 1);
    stage.say(&format!(":1\r\n{NOT_FOUND}")).await;
    stage.introduce().await;
    stage.hear_calls(&["x1", "y1", "x2", "x3"]).await;
    stage.hear_publications(&["b"]).await;
    assert_eq!(stage.loads.lock().0, 2);
    let answers = [1, 2, 3, 4].map(recorded);
    stage.say(&format!("{}:1\r\n", answers.each_ref().map(|answer| answer.1.as_str()).concat())).await;
    settled().await;
    let mut outcomes = stage.outcomes.0.lock().clone();
    outcomes.sort_by_key(|(request, _)| *request);
    let [x1, y1, x2, x3] = answers.map(|answer| answer.0);
    assert_eq!(
        outcomes.into_iter().map(|(_, outcome)| outcome).collect::<Vec<_>>(),
        [x1, y1, x2, OK, x3, OK]
    );
}

#[tokio::test(start_paused = true)]
async fn an_overtaken_publication_is_refused_and_not_repeated() {
    let mut stage = Stage::proven(1 << 20).await;
    stage.record_all(&["x1", "x2", "y1", "x3"]);
    stage.introduce().await;
    stage.hear_calls(&["x1", "x2", "y1", "x3"]).await;
    // Somebody loads the functions before the last call.
    let (last, again) = (recorded(1), recorded(2));
    stage.say(&format!("{}{}", NOT_FOUND.repeat(3), last.1)).await;
    stage.introduce().await;
    stage.hear_calls(&["y1"]).await;
    stage.say(&again.1).await;
    settled().await;
    let outcomes = stage.outcomes.0.lock().clone();
    let order = outcomes.iter().map(|(request, _)| *request).collect::<Vec<_>>();
    assert_eq!(order, [0, 1, 3, 2]);
    assert!(outcomes.iter().take(2).all(|(_, outcome)| matches!(outcome, Err(BrokerError::NotNow(_)))));
    assert_eq!((&outcomes[2].1, &outcomes[3].1), (&last.0, &again.0));
}

#[tokio::test(start_paused = true)]
async fn a_call_is_repeated_only_once() {
    let mut stage = Stage::proven(1 << 20).await;
    stage.record_all(&["x1"]);
    for _ in 0..2 {
        stage.introduce().await;
        stage.hear_calls(&["x1"]).await;
        stage.say(NOT_FOUND).await;
    }
    assert_eq!(stage.outcomes().await, [Err(BrokerError::NotNow("ERR Function not found".into()))]);
    stage.hear_nothing().await;
}

#[tokio::test(start_paused = true)]
async fn functions_that_cannot_be_loaded_stop_only_what_is_to_be_recorded() {
    let mut stage = Stage::proven(1 << 20).await;
    let forbidden = Err(BrokerError::Forbidden("no".into()));
    stage.loads.lock().1 = forbidden.clone();
    stage.record_all(&["x1", "x2"]);
    stage.publish("a");
    stage.hear_publications(&["a"]).await;
    stage.say(":1\r\n").await;
    let forbidden = Err(BrokerError::Forbidden("no".into()));
    assert_eq!(stage.outcomes().await, [forbidden.clone(), forbidden.clone(), OK]);
    stage.record_all(&["x3"]);
    assert_eq!(stage.outcomes().await[3..], [forbidden]);
    assert_eq!(stage.loads.lock().0, 1, "it is not tried again at once");
    stage.loads.lock().1 = Ok(());
    sleep(Duration::from_secs(1)).await;
    stage.record_all(&["x4"]);
    stage.introduce().await;
    stage.hear_calls(&["x4"]).await;
}

#[tokio::test(start_paused = true)]
async fn what_was_given_back_outlives_the_connection() {
    let mut stage = Stage::proven(1 << 20).await;
    stage.record_all(&["x1", "x2", "y1"]);
    stage.introduce().await;
    stage.hear_calls(&["x1", "x2", "y1"]).await;
    stage.say(&NOT_FOUND.repeat(2)).await;
    settled().await;
    stage.lose();
    let (mut task, end) = stage.end().await;
    assert!(matches!(end, Err(Lost::Closed)), "{end:?}");
    assert_eq!(
        stage.outcomes.0.lock().clone(),
        [(2, Err(BrokerError::Unknown))],
        "it may have been executed"
    );
    task.take_back();
    assert_eq!(task.waiting.iter().map(|outgoing| outgoing.sent).collect::<Vec<_>>(), [false; 2]);
}

#[tokio::test(start_paused = true)]
async fn what_the_server_recognizes_is_kept_when_the_connection_is_lost() {
    let mut stage = Stage::proven(1 << 20).await;
    stage.record_all(&["x1"]);
    stage.record_with_id("x2");
    stage.record_all(&["x3"]);
    stage.introduce().await;
    stage.hear_calls(&["x1"]).await;
    settled().await;
    stage.lose();
    let (mut task, _) = stage.end().await;
    let unknown = Err(BrokerError::Unknown);
    assert_eq!(stage.outcomes.0.lock().clone(), [(0, unknown.clone()), (2, unknown.clone())]);
    task.take_back();
    assert_eq!(task.waiting.len(), 1);
    // Whatever becomes of it now, the first attempt may have succeeded.
    for outgoing in task.waiting.drain(..) {
        outgoing.settle(Err(BrokerError::Unavailable));
    }
    assert_eq!(stage.outcomes.0.lock().last(), Some(&(1, unknown)));
}

/// What the log says of a writer.
fn verdict(last: i64, reach: i64, found: &[(u64, u64)]) -> String {
    let found =
        found.iter().map(|(number, offset)| format!(":{number}\r\n$3\r\n5-{offset}\r\n")).collect::<Vec<_>>();
    format!("*{}\r\n:{last}\r\n:{reach}\r\n{}", 2 + 2 * found.len(), found.concat())
}

impl Stage {
    /// A writer that has sent these, and got no answer; and the next connection, which asks about them.
    async fn in_doubt(texts: &[&str]) -> (Self, String) {
        let mut stage = Self::new(1 << 20);
        stage.hear_canary(1).await;
        stage.greet(7).await;
        stage.record_all(texts);
        stage.introduce().await;
        stage.hear_numbered(texts, 1).await;
        let old = stage.writer.clone();
        stage.reconnect(8).await;
        stage.introduce().await;
        (stage, old)
    }

    async fn hear_kill(&mut self) {
        self.hear(&[b"CLIENT", b"KILL", b"ID", b"7"]).await;
    }

    async fn hear_verify(&mut self, writer: &str, rooms: &[(&str, &str)]) {
        for (room, first) in rooms {
            let log = format!("{{room:{room}}}:log");
            let call = [
                b"FCALL",
                &b"tidegate_verify"[..],
                b"1",
                log.as_bytes(),
                writer.as_bytes(),
                first.as_bytes(),
            ];
            self.hear(&call).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_in_doubt_is_looked_for_in_the_log_and_sent_again_if_it_is_missing() {
    let (mut stage, old) = Stage::in_doubt(&["x1", "y1", "x2", "y2", "x3"]).await;
    stage.record_all(&["x4"]);
    stage.publish("a");
    stage.hear_kill().await;
    stage.hear_nothing().await;
    stage.say(":1\r\n").await;
    stage.hear_verify(&old, &[("x", "1"), ("y", "2")]).await;
    stage.hear_nothing().await;
    assert_eq!(stage.outcomes().await, []);
    // The server has executed all but the last two.
    stage.say(&format!("{}{}", verdict(3, 0, &[(3, 8), (1, 7)]), verdict(3, 0, &[(2, 4)]))).await;
    stage.hear_numbered(&["y2", "x3", "x4"], 6).await;
    stage.hear_publications(&["a"]).await;
    let answers = [5, 9, 2].map(recorded);
    stage.say(&format!("{}{}{}:1\r\n", answers[0].1, answers[1].1, answers[2].1)).await;
    let found = [7, 4, 8].map(|offset| recorded(offset).0);
    let again = answers.map(|answer| answer.0);
    assert_eq!(stage.outcomes().await, [&found[..], &again, &[OK]].concat());
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_verified_is_unknown() {
    // Not allowed to close the old connection.
    let (mut stage, _) = Stage::in_doubt(&["x1", "x2"]).await;
    stage.hear_kill().await;
    stage.say("-NOPERM this user has no permissions to run the 'client|kill' command\r\n").await;
    assert_eq!(stage.outcomes().await, unknown(2));
    stage.record_all(&["x3"]);
    stage.hear_numbered(&["x3"], 3).await;

    // The log has lost its tail in one room, and cannot be read in the other.
    let (mut stage, old) = Stage::in_doubt(&["x1", "x2", "y1"]).await;
    stage.hear_kill().await;
    stage.say(":0\r\n").await;
    stage.hear_verify(&old, &[("x", "1"), ("y", "3")]).await;
    stage.say(&format!("{}-WRONGTYPE no\r\n", verdict(3, 0, &[(2, 9)]))).await;
    let expected =
        [vec![Err(BrokerError::Unknown)], vec![recorded(9).0], vec![Err(BrokerError::Unknown)]].concat();
    assert_eq!(stage.outcomes().await, expected);

    // Refused, and a later one was accepted: to send it again would break the order.
    let (mut stage, old) = Stage::in_doubt(&["x1", "x2", "x3"]).await;
    stage.hear_kill().await;
    stage.say(":0\r\n").await;
    stage.hear_verify(&old, &[("x", "1")]).await;
    stage.say(&verdict(2, 1, &[(2, 9)])).await;
    stage.hear_numbered(&["x3"], 4).await;
    let outcomes = stage.outcomes().await;
    assert!(matches!(&outcomes[..], [Err(BrokerError::NotNow(_)), Ok(_)]), "{outcomes:?}");
}

#[tokio::test(start_paused = true)]
async fn another_run_of_the_server_cannot_say_what_became_of_anything() {
    let mut stage = Stage::new(1 << 20);
    stage.hear_canary(1).await;
    stage.greet(7).await;
    stage.record_all(&["x1"]);
    stage.introduce().await;
    stage.hear_numbered(&["x1"], 1).await;
    stage.reconnect(7).await;
    stage.hear(&[b"INFO", b"server"]).await;
    stage.say("$10\r\nrun_id:2f\n\r\n:0\r\n").await;
    assert_eq!(stage.outcomes().await, unknown(1));
}

#[tokio::test(start_paused = true)]
async fn what_is_in_doubt_waits_for_one_more_time_limit() {
    let (mut stage, _) = Stage::in_doubt(&["x1"]).await;
    stage.hear_kill().await;
    let start = Instant::now();
    let (mut task, end) = stage.end().await;
    assert!(matches!(end, Err(Lost::Silent(LIMIT))), "{end:?}");
    let waited = start.elapsed();
    assert!((4900..=5500).contains(&waited.as_millis()), "{waited:?}");
    task.expire();
    assert_eq!(stage.outcomes().await, unknown(1));
    assert!(!task.recording.has_returned());
}
