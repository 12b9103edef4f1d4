use std::cell::Cell;

use http_body_util::Full;
use tokio::io::{AsyncReadExt as _, DuplexStream, duplex};

use super::*;

const HEAD: Duration = Duration::from_secs(10);
const KEEP_ALIVE: Duration = Duration::from_secs(620);
const TIMES: Times = Times { head: HEAD, keep_alive: KEEP_ALIVE, draining: Duration::from_secs(5) };
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";

/// Serves the other end of the client's stream. Each request is answered within the poll that reads it.
async fn serve_one(times: impl Fn() -> Times, answer: &'static [u8], server: DuplexStream) -> End {
    let service = |_| std::future::ready(Response::new(Full::new(Bytes::from_static(answer))));
    let draining = CancellationToken::new();
    serve(server, Arc::default(), times, &draining, service, |_| ()).await.end
}

async fn ask(client: &mut DuplexStream) {
    client.write_all(REQUEST).await.unwrap();
    let mut answer = [0; 512];
    let length = client.read(&mut answer).await.unwrap();
    assert!(answer[..length].starts_with(b"HTTP/1.1 200 OK\r\n"));
}

fn about(elapsed: Duration, expected: Duration) -> bool {
    // Timers have a resolution of one millisecond.
    (expected..=expected + Duration::from_millis(2)).contains(&elapsed)
}

#[tokio::test(start_paused = true)]
async fn each_answer_restarts_the_idle_timeout() {
    let times = Times { keep_alive: Duration::from_secs(25), ..TIMES };
    let (mut client, server) = duplex(4096);
    let client = async {
        for _ in 0..10 {
            ask(&mut client).await;
            tokio::time::sleep(Duration::from_secs(24)).await;
        }
        ask(&mut client).await;
        let idle = Instant::now();
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        assert!(about(idle.elapsed(), times.keep_alive), "{:?}", idle.elapsed());
    };
    let (end, ()) = tokio::join!(serve_one(|| times, b"", server), client);
    assert!(matches!(end, End::Idle), "{end:?}");
}

#[tokio::test(start_paused = true)]
async fn an_unused_connection_has_the_timeout_of_a_head() {
    let (_client, server) = duplex(4096);
    let start = Instant::now();
    let end = serve_one(|| TIMES, b"", server).await;
    assert!(matches!(end, End::Idle) && about(start.elapsed(), HEAD), "{end:?} {:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn idle_connections_make_way_once_the_node_is_crowded() {
    let crowded = Cell::new(false);
    let times = || Times { keep_alive: if crowded.get() { HEAD } else { KEEP_ALIVE }, ..TIMES };
    let (mut client, server) = duplex(4096);
    let client = async {
        ask(&mut client).await;
        tokio::time::sleep(Duration::from_secs(105)).await;
        crowded.set(true);
        // At the next check.
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        Instant::now()
    };
    let start = Instant::now();
    let (end, ended) = tokio::join!(serve_one(times, b"", server), client);
    let elapsed = ended - start;
    assert!(matches!(end, End::Idle), "{end:?}");
    assert!((Duration::from_secs(105)..Duration::from_secs(115)).contains(&elapsed), "{elapsed:?}");
}

/// As after the process was suspended.
#[tokio::test(start_paused = true)]
async fn a_pause_of_the_process_does_not_time_out_a_reader() {
    static ANSWER: [u8; 64 * 1024] = [b'x'; 64 * 1024];
    let (mut client, server) = duplex(1024);
    let client = async {
        client.write_all(REQUEST).await.unwrap();
        let mut first = [0; 1024];
        client.read_exact(&mut first).await.unwrap();
        tokio::task::yield_now().await;
        tokio::time::advance(ANSWER_TIMEOUT + Duration::from_secs(25)).await;
        tokio::task::yield_now().await;
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).await.unwrap();
        let body = [&first[..], &rest].concat();
        assert!(body.ends_with(&ANSWER), "{} bytes", body.len());
    };
    let (end, ()) = tokio::join!(serve_one(|| TIMES, &ANSWER, server), client);
    assert!(matches!(end, End::Idle), "{end:?}");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stops_reading_is_disconnected() {
    static FLOOD: [u8; 64 * 1024] = [b'x'; 64 * 1024];
    let (mut client, server) = duplex(1024);
    client.write_all(REQUEST).await.unwrap();
    let start = Instant::now();
    let end = serve_one(|| TIMES, &FLOOD, server).await;
    assert!(matches!(end, End::AnswerTimeout), "{end:?}");
    assert!(about(start.elapsed(), ANSWER_TIMEOUT), "{:?}", start.elapsed());
}

/// A client that sends endlessly.
#[derive(Default)]
struct Flood {
    reads: usize,
    largest: usize,
}

impl AsyncRead for Flood {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.reads += 1;
        self.largest = self.largest.max(buffer.remaining());
        let length = buffer.remaining();
        buffer.initialize_unfilled();
        buffer.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Flood {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn input_of_a_flooding_client_is_discarded_in_slices() {
    let mut flood = Flood::default();
    let mut polls = 0;
    {
        let bounds = Linger { silence: HEAD, total: HEAD };
        let mut lingering = std::pin::pin!(linger(&mut flood, bounds));
        poll_fn(|cx| {
            polls += 1;
            lingering.as_mut().poll(cx)
        })
        .await;
    }
    assert_eq!((flood.reads, flood.largest), (1024, 16 * 1024));
    assert_eq!(polls, 257, "another turn at every fourth read");
}
