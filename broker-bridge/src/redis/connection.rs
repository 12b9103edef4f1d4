//! Opens connections to Redis over TCP, TLS or a unix socket, and greets the server.
//!
//! Owns everything up to the server's answer to the greeting. The caller decides what a connection is used for and
//! when to retry. No error contains the password, even if the server repeats it.

use std::{fmt::Write as _, io, net::SocketAddr, time::Duration};

use bytes::{BufMut, BytesMut};
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::timeout,
};

use super::{
    Endpoint, RedisStartError, RedisUrl,
    resp::{Frame, Reader, Value},
};
use crate::{
    dial::{self, DialError, Failure, Failures},
    tls::{self, HandshakeError},
};

/// What a connection is for. Redis shows it in `CLIENT LIST` as `tidegate-<role>`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Role {
    Subscriber,
    Publisher,
    Request,
}

/// Why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Tls(#[from] HandshakeError),
    /// The name cannot be resolved, or all of its addresses failed.
    #[error("{0}")]
    Dial(Box<DialError<Self>>),
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    #[error("the server said: {0}")]
    Refused(String),
    #[error("the server is a replica, which would keep publications to itself")]
    Replica,
    #[error("the server closed the connection during the greeting")]
    Closed,
    #[error("the server does not speak RESP3: Redis 6 or later is needed")]
    NoResp3,
}

/// The failure of a single address is reported without the address.
impl From<DialError<Self>> for ConnectError {
    fn from(error: DialError<Self>) -> Self {
        match error {
            DialError::Attempts(Failures(mut failures)) if failures.len() == 1 => match failures.pop() {
                Some((_, Failure::Error(error))) => error,
                Some((_, Failure::Timeout(limit))) => Self::TimedOut(limit),
                None => Self::Closed,
            },
            several => Self::Dial(Box::new(several)),
        }
    }
}

/// A connection after the greeting.
pub(super) type Connection = Box<dyn Duplex>;

/// A byte stream in both directions.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Opens connections to one server.
pub(super) struct Connector {
    url: RedisUrl,
    tls: Option<(tls::Client, ServerName<'static>)>,
    time_limit: Duration,
}

impl Connector {
    /// Loads the certificates. Opens no connection.
    pub(super) fn new(
        url: RedisUrl,
        ca_pem: Option<&[u8]>,
        time_limit: Duration,
    ) -> Result<Self, RedisStartError> {
        let tls = match &url.endpoint {
            Endpoint::Tls { host, .. } => {
                let name = ServerName::try_from(host.clone())
                    .map_err(|_| RedisStartError::ServerName(host.clone()))?;
                Some((tls::Client::new(ca_pem)?, name))
            }
            Endpoint::Tcp { .. } | Endpoint::Unix(_) => None,
        };
        Ok(Self { url, tls, time_limit })
    }

    /// The server's address, for messages.
    pub(super) fn url(&self) -> &RedisUrl {
        &self.url
    }

    /// Connects and greets, within the time limit.
    ///
    /// For a host with several addresses, the first one to complete the greeting wins: a server that is down, hung
    /// or a replica does not prevent a connection to another one.
    pub(super) async fn open(&self, role: Role) -> Result<Connection, ConnectError> {
        let (host, port) = match &self.url.endpoint {
            Endpoint::Unix(path) => {
                let attempt = async { self.greet(Box::new(UnixStream::connect(path).await?), role).await };
                let timed_out = Err(ConnectError::TimedOut(self.time_limit));
                return timeout(self.time_limit, attempt).await.unwrap_or(timed_out);
            }
            Endpoint::Tcp { host, port } | Endpoint::Tls { host, port } => (host, *port),
        };
        let connection =
            dial::dial(host, port, self.time_limit, |address| self.attempt(address, role)).await?;
        Ok(connection)
    }

    async fn attempt(&self, address: SocketAddr, role: Role) -> Result<Connection, ConnectError> {
        let stream = TcpStream::connect(address).await?;
        tune(&stream)?;
        let connection: Connection = match &self.tls {
            None => Box::new(stream),
            Some((tls, name)) => Box::new(tls.connect(name, stream).await?),
        };
        self.greet(connection, role).await
    }

    /// `HELLO 3` with user and name, then `SELECT` (<https://redis.io/docs/latest/commands/hello/>).
    async fn greet(&self, mut connection: Connection, role: Role) -> Result<Connection, ConnectError> {
        let name: &[u8] = match role {
            Role::Subscriber => b"tidegate-subscriber",
            Role::Publisher => b"tidegate-publisher",
            Role::Request => b"tidegate-request",
        };
        let mut hello: Vec<&[u8]> = vec![b"HELLO", b"3"];
        if self.url.user.is_some() || self.url.password.is_some() {
            let user = self.url.user.as_deref().unwrap_or("default");
            hello.extend([&b"AUTH"[..], user.as_bytes(), self.password().as_bytes()]);
        }
        hello.extend([&b"SETNAME"[..], name]);

        // The server sends nothing unasked before the first command, so this reader can be dropped afterwards.
        let mut reader = Reader::new(0);
        let mut out = BytesMut::new();
        write_command(&mut out, &hello);
        let greeting = self.exchange(&mut connection, &mut reader, &mut out).await?;
        if role_of(&greeting).is_some_and(|role| role != b"master") {
            return Err(ConnectError::Replica);
        }
        if self.url.database != 0 {
            write_command(&mut out, &[b"SELECT", self.url.database.to_string().as_bytes()]);
            self.exchange(&mut connection, &mut reader, &mut out).await?;
        }
        if reader.is_empty() { Ok(connection) } else { Err(ConnectError::NoResp3) }
    }

    async fn exchange(
        &self,
        connection: &mut Connection,
        reader: &mut Reader,
        out: &mut BytesMut,
    ) -> Result<Value, ConnectError> {
        connection.write_all_buf(out).await?;
        connection.flush().await?;
        loop {
            match reader.next().map_err(|_| ConnectError::NoResp3)? {
                Some(Frame::Reply(value)) => return Ok(value),
                Some(Frame::Error(text)) => return Err(self.refused(text)),
                Some(Frame::Push(_)) => continue,
                Some(_) => return Err(ConnectError::NoResp3),
                None => {}
            }
            if reader.fill(connection).await? == 0 {
                return Err(ConnectError::Closed);
            }
        }
    }

    /// A server that does not know `HELLO` repeats its arguments, including the password.
    fn refused(&self, text: String) -> ConnectError {
        if text.contains("unknown command") || text.starts_with("NOPROTO") {
            return ConnectError::NoResp3;
        }
        let password = self.password();
        if !password.is_empty() && text.contains(password) {
            let code = text.split_whitespace().next().filter(|code| !code.contains(password));
            return ConnectError::Refused(code.unwrap_or("no").to_owned());
        }
        ConnectError::Refused(text)
    }

    fn password(&self) -> &str {
        self.url.password.as_ref().map_or("", super::Secret::reveal)
    }
}

/// Appends one command.
pub(super) fn write_command(out: &mut BytesMut, parts: &[&[u8]]) {
    write_header(out, parts.len());
    for part in parts {
        write_part(out, part);
    }
}

/// Appends the header of a command with `parts` parts, including its name.
pub(super) fn write_header(out: &mut BytesMut, parts: usize) {
    write_length(out, '*', parts);
}

/// Appends one part of a command.
pub(super) fn write_part(out: &mut BytesMut, part: &[u8]) {
    write_pieces(out, &[part]);
}

/// Appends one part of a command, given in pieces.
pub(super) fn write_pieces(out: &mut BytesMut, pieces: &[&[u8]]) {
    write_length(out, '$', pieces.iter().map(|piece| piece.len()).sum());
    for piece in pieces {
        out.put_slice(piece);
    }
    out.put_slice(LINE_END);
}

/// Appends the line that announces a command of `length` parts (`*`) or a part of `length` bytes (`$`). After the
/// bytes of a part the caller appends [`LINE_END`].
pub(super) fn write_length(out: &mut BytesMut, kind: char, length: usize) {
    write!(out, "{kind}{length}\r\n").expect("a buffer in memory takes everything");
}

/// What follows each part of a command.
pub(super) const LINE_END: &[u8] = b"\r\n";

fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(15))
        .with_interval(Duration::from_secs(5))
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    // No TCP_USER_TIMEOUT: it would end connections to a Redis that is merely slow to read. Canaries check liveness.
    Ok(())
}

/// The `role` in the answer to `HELLO`. Proxies may leave it out.
pub(super) fn role_of(greeting: &Value) -> Option<&[u8]> {
    let Value::List(pairs) = greeting else { return None };
    pairs.chunks_exact(2).find_map(|pair| match pair {
        [Value::Text(key), Value::Text(role)] if key == b"role" => Some(&role[..]),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connector(url: &str) -> Connector {
        Connector::new(url.parse().unwrap(), None, Duration::from_secs(1)).unwrap()
    }

    #[test]
    fn a_password_repeated_by_the_server_is_not_shown() {
        let connector = connector("redis://u:hunter2@localhost");
        for text in [
            "ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `u`, `hunter2`, ",
            "ERR bad option hunter2",
            "hunter2",
        ] {
            let shown = connector.refused(text.to_owned()).to_string();
            assert!(!shown.contains("hunter2"), "{shown}");
        }
        let shown = connector.refused("WRONGPASS invalid username-password pair".to_owned()).to_string();
        assert!(shown.contains("WRONGPASS invalid"), "{shown}");
    }

    #[test]
    fn the_role_is_found_in_a_greeting() {
        let text = |text: &str| Value::Text(text.as_bytes().to_vec());
        let greeting = Value::List(vec![
            text("proto"),
            text("3"),
            text("role"),
            text("replica"),
            text("modules"),
            Value::List(vec![]),
        ]);
        assert_eq!(role_of(&greeting), Some(&b"replica"[..]));
        assert_eq!(role_of(&Value::List(vec![text("role")])), None);
        assert_eq!(role_of(&Value::Null), None);
    }

    #[test]
    fn commands_are_arrays_of_bulk_strings() {
        let mut out = BytesMut::new();
        write_command(&mut out, &[b"PING", b"a\r\nb"]);
        assert_eq!(&out[..], b"*2\r\n$4\r\nPING\r\n$4\r\na\r\nb\r\n");
        out.clear();
        write_pieces(&mut out, &[b"one", b"", b"two"]);
        assert_eq!(&out[..], b"$6\r\nonetwo\r\n");
    }
}
