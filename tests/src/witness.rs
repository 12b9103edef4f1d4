//! A healthy client beside those that misbehave.
//!
//! Publishes numbers over its own WebSocket and must receive each of them once, in order, whatever others do to the
//! node. Knows nothing of them.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::watch,
    task::JoinSet,
    time::timeout,
};
use tokio_tungstenite::{WebSocketStream, client_async, tungstenite::Message};
use tokio_util::sync::CancellationToken;

use crate::{PATIENCE, node::Node, token::anywhere};

/// The time between two numbers: short enough to notice a fault, long enough to leave the machine to the others.
const PACE: Duration = Duration::from_millis(2);

/// A client that counts. [`Witness::finish`] returns what it received.
#[derive(Debug)]
pub struct Witness {
    counted: watch::Receiver<usize>,
    stop: CancellationToken,
    counting: JoinSet<Result<usize>>,
}

impl Witness {
    /// One that connects to the node over TCP.
    pub async fn of(node: &Node) -> Result<Self> {
        let stream = TcpStream::connect(node.public).await?;
        stream.set_nodelay(true)?;
        Self::over(stream, &node.ws("witness", &anywhere("the witness"), "")).await
    }

    /// One on an existing connection. `url` names the room and contains the token.
    pub async fn over(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        url: &str,
    ) -> Result<Self> {
        let (mut socket, _) = client_async(url, stream).await.context("the witness connects")?;
        let (count, counted) = watch::channel(0);
        let stop = CancellationToken::new();
        let mut counting = JoinSet::new();
        let told = stop.clone();
        counting.spawn(async move {
            let mut numbers = 0;
            while !told.is_cancelled() {
                say(&mut socket, numbers).await.with_context(|| format!("after {numbers} numbers"))?;
                numbers += 1;
                count.send_replace(numbers);
                tokio::time::sleep(PACE).await;
            }
            socket.close(None).await?;
            while let Some(Ok(_)) = socket.next().await {}
            Ok(numbers)
        });
        Ok(Self { counted, stop, counting })
    }

    /// How many numbers it has received so far.
    pub fn heard(&self) -> usize {
        *self.counted.borrow()
    }

    /// Waits until it has received this many.
    pub async fn until(&mut self, numbers: usize) -> Result<()> {
        let heard = timeout(PATIENCE, self.counted.wait_for(|counted| *counted >= numbers));
        let in_time = heard.await.is_ok_and(|heard| heard.is_ok());
        ensure!(in_time, "the witness has received {} numbers, not {numbers}", self.heard());
        Ok(())
    }

    /// Ends it, and fails unless it received every number once and in order. Returns how many there were.
    pub async fn finish(mut self) -> Result<usize> {
        self.stop.cancel();
        let numbers = self.counting.join_next().await.context("it was started")???;
        ensure!(numbers > 0, "the witness has received nothing");
        Ok(numbers)
    }
}

/// Publishes a number, receives it, and does nothing else.
async fn say<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut WebSocketStream<S>,
    number: usize,
) -> Result<()> {
    socket.send(Message::text(number.to_string())).await?;
    loop {
        let heard = timeout(PATIENCE, socket.next()).await.context("the echo")?;
        match heard.context("it was cut off")?? {
            Message::Text(text) => {
                ensure!(text.as_str() == number.to_string(), "{number} was expected, not {text:?}");
                return Ok(());
            }
            Message::Ping(_) => {}
            other => bail!("{number} was expected, not {other:?}"),
        }
    }
}
