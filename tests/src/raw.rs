//! A connection by hand: bytes and frames that no client library would send, and reads that stop.
//!
//! Writes exactly what it is given and reads responses and frames as they arrive. It answers no ping, joins no
//! fragments and checks nothing.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use crate::{
    PATIENCE,
    http::{Incoming, Request},
};

/// A frame to be written: the test controls every bit.
#[derive(Clone, Debug)]
pub struct Frame {
    /// FIN, RSV1–3 and the opcode.
    pub first: u8,
    /// Whether the payload is masked, as RFC 6455 §5.1 requires of clients.
    pub masked: bool,
    /// The length in the header, if it differs from the payload's.
    pub claimed: Option<u64>,
    /// The payload, unmasked.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A complete, correct text message.
    pub fn text(payload: impl Into<Vec<u8>>) -> Self {
        Self { first: 0x81, masked: true, claimed: None, payload: payload.into() }
    }

    /// The bytes to write.
    pub fn bytes(&self) -> Vec<u8> {
        const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];
        // RFC 6455 §5.2: a length of 126 or 127 means that the real one follows in two or eight bytes.
        let length = self.claimed.unwrap_or(self.payload.len() as u64);
        let (short, extended) = match (u8::try_from(length), u16::try_from(length)) {
            (Ok(short @ ..=125), _) => (short, Vec::new()),
            (_, Ok(medium)) => (126, medium.to_be_bytes().to_vec()),
            _ => (127, length.to_be_bytes().to_vec()),
        };
        let mut out = vec![self.first, short | if self.masked { 0x80 } else { 0 }];
        out.extend(extended);
        if self.masked {
            out.extend(MASK);
            out.extend(self.payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        } else {
            out.extend(&self.payload);
        }
        out
    }
}

/// A frame that was read: the first byte and the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// FIN, RSV1–3 and the opcode.
    pub first: u8,
    /// The payload.
    pub payload: Vec<u8>,
}

impl Received {
    /// The code of a close frame.
    pub fn close_code(&self) -> Option<u16> {
        match (self.first, self.payload.as_slice()) {
            (0x88, [high, low, ..]) => Some(u16::from_be_bytes([*high, *low])),
            _ => None,
        }
    }
}

/// An upgraded connection.
#[derive(Debug)]
pub struct RawSocket {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// Bytes written, starting with the handshake.
    pub sent: usize,
    /// Bytes read, starting with the response to the handshake.
    pub received: usize,
}

impl RawSocket {
    /// Connects and upgrades.
    pub async fn connect(address: SocketAddr, target: &str) -> Result<Self> {
        Self::connect_with(address, target, &[]).await
    }

    /// Connects and upgrades with additional headers.
    pub async fn connect_with(address: SocketAddr, target: &str, headers: &[(&str, &str)]) -> Result<Self> {
        let upgrade = Request::upgrade(target);
        let request = headers.iter().fold(upgrade, |request, (name, value)| request.header(name, value));
        Self::by(&request, address).await
    }

    /// Upgrades an existing connection.
    pub async fn over(stream: TcpStream, target: &str) -> Result<Self> {
        let address = stream.peer_addr()?;
        Self::upgrade(stream, address, &Request::upgrade(target)).await
    }

    /// Connects and upgrades with the smallest receive buffer that the system allows.
    pub async fn connect_narrow(address: SocketAddr, target: &str) -> Result<Self> {
        let socket = TcpSocket::new_v4()?;
        socket.set_recv_buffer_size(1024)?;
        Self::upgrade(socket.connect(address).await?, address, &Request::upgrade(target)).await
    }

    /// Connects and upgrades with the test's own request.
    pub async fn by(request: &Request, address: SocketAddr) -> Result<Self> {
        let incoming = timeout(PATIENCE, request.open(address)).await.context("the handshake")??;
        Self::upgraded(incoming, request.bytes(address).len())
    }

    async fn upgrade(mut stream: TcpStream, address: SocketAddr, request: &Request) -> Result<Self> {
        let request = request.bytes(address);
        stream.write_all(&request).await?;
        let incoming = timeout(PATIENCE, Incoming::read(stream)).await.context("the handshake")??;
        Self::upgraded(incoming, request.len())
    }

    fn upgraded(incoming: Incoming, sent: usize) -> Result<Self> {
        ensure!(incoming.status == 101, "upgraded, not {}", incoming.status);
        let head = incoming.head_length;
        let (stream, buffer) = incoming.into_stream();
        Ok(Self { stream, sent, received: head + buffer.len(), buffer })
    }

    /// A second handle to the socket, for writing while this one reads.
    pub fn writer(&self) -> Result<TcpStream> {
        let socket = socket2::SockRef::from(&self.stream).try_clone()?;
        Ok(TcpStream::from_std(socket.into())?)
    }

    /// Writes one frame.
    pub async fn send(&mut self, frame: &Frame) -> Result<()> {
        self.send_bytes(&frame.bytes()).await
    }

    /// Writes any bytes.
    pub async fn send_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await?;
        self.sent += bytes.len();
        Ok(())
    }

    /// The next frame, `None` at the end of the connection.
    pub async fn receive(&mut self) -> Result<Option<Received>> {
        timeout(PATIENCE, self.frame()).await.context("the next frame")?
    }

    /// Reads until a close frame and returns its code, or `None` if the connection ends without one.
    pub async fn close_code(&mut self) -> Result<Option<u16>> {
        while let Some(frame) = self.receive().await? {
            if frame.first & 0x0f == 0x8 {
                return Ok(frame.close_code());
            }
        }
        Ok(None)
    }

    async fn frame(&mut self) -> Result<Option<Received>> {
        loop {
            if let Some((frame, length)) = parse(&self.buffer) {
                self.buffer.drain(..length);
                return Ok(Some(frame));
            }
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) => return Ok(None),
                Ok(count) => self.received += count,
                // The server may close while our bytes are still on their way: the kernel then resets the connection.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The first frame of `bytes` and its length, if it is complete. A server's frame has no mask.
fn parse(bytes: &[u8]) -> Option<(Received, usize)> {
    let (&first, rest) = bytes.split_first()?;
    let (&length, rest) = rest.split_first()?;
    let (length, rest) = match length {
        126 => {
            rest.split_first_chunk::<2>().map(|(raw, rest)| (u64::from(u16::from_be_bytes(*raw)), rest))?
        }
        127 => rest.split_first_chunk::<8>().map(|(raw, rest)| (u64::from_be_bytes(*raw), rest))?,
        short => (u64::from(short), rest),
    };
    let payload = rest.get(..usize::try_from(length).ok()?)?;
    let taken = bytes.len() - rest.len() + payload.len();
    Some((Received { first, payload: payload.to_vec() }, taken))
}

/// Sends bytes, reads until the other side closes, and returns the data. A reset counts as closed.
pub async fn talk(address: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    talk_over(TcpStream::connect(address).await?, bytes).await
}

/// The same over an existing connection.
pub async fn talk_over(mut stream: impl AsyncRead + AsyncWrite + Unpin, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut answer = Vec::new();
    let exchange = async {
        // It may close before it has read everything: then a write, or the read, fails.
        if stream.write_all(bytes).await.is_ok() && stream.flush().await.is_ok() {
            drop(stream.read_to_end(&mut answer).await);
        }
    };
    timeout(PATIENCE, exchange).await.context("the connection is closed")?;
    Ok(answer)
}

/// The statuses of the consecutive responses in `said`, up to an upgrade. Fails if there is anything
/// else.
pub fn statuses(mut said: &[u8]) -> Result<Vec<u16>> {
    let mut statuses = Vec::new();
    while !said.is_empty() {
        let mut space = [httparse::EMPTY_HEADER; 64];
        let mut head = httparse::Response::new(&mut space);
        let parsed = head.parse(said).with_context(|| format!("an answer: {}", lossy(said)))?;
        let httparse::Status::Complete(length) = parsed else {
            bail!("half an answer: {}", lossy(said));
        };
        let status = head.code.context("a complete head has a status")?;
        statuses.push(status);
        if status == 101 {
            break;
        }
        let body = head.headers.iter().find(|line| line.name.eq_ignore_ascii_case("content-length"));
        let body: usize = body.map_or(Ok(0), |line| lossy(line.value).parse())?;
        // An interim response has no body.
        said = said.get(length + body..).context("a whole body")?;
    }
    Ok(statuses)
}

/// The first bytes of `bytes`, or all of them if there are fewer.
pub fn start(bytes: &[u8], length: usize) -> &[u8] {
    bytes.get(..length).unwrap_or(bytes)
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
