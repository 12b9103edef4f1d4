//! A single fetch of a key set: one connection, one request, one response of bounded size.
//!
//! Every fetch opens its own connection. A kept-alive one would idle for minutes, and a proxy or the server
//! would have closed it before the next fetch.
//!
//! Follows no redirects and uses no proxy: the set comes from the configured host, which its certificate
//! authenticates, or not at all.

use std::{
    future::pending,
    io::{self, Read as _},
    net::SocketAddr,
    path::Path,
    time::Duration,
};

use broker_bridge::{
    dial::{self, DialError},
    tls::{self, HandshakeError},
};
use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{Instant, timeout_at},
};

use super::{JwksUrl, RemoteError};
use crate::{
    auth::jwks::{Document, DocumentError},
    file::{MAX, read_text},
};

/// Why a fetch failed. No message contains any part of the response.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("{0}")]
    Connect(#[from] DialError<ConnectError>),
    #[error("no answer: {0}")]
    Exchange(String),
    #[error("the server answered {0}; expected 200 (redirects are not followed)")]
    Status(StatusCode),
    #[error("the response ended early: {0}")]
    Body(String),
    #[error("the response is compressed; expected gzip (Content-Encoding), or none")]
    Encoding,
    #[error("the response claims to be gzip but is not valid: {0}")]
    Gzip(io::Error),
    #[error(transparent)]
    Document(#[from] DocumentError),
}

/// Why an address could not be reached.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Tls(#[from] HandshakeError),
}

/// Fetches the key set at one URL.
pub(super) struct Fetcher {
    url: JwksUrl,
    /// IPv6 without brackets.
    host: String,
    port: u16,
    tls: Option<(tls::Client, ServerName<'static>)>,
}

trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

impl Fetcher {
    /// Reads the CA file. Does not connect yet.
    pub(super) fn new(url: &JwksUrl, ca_file: Option<&Path>) -> Result<Self, RemoteError> {
        let is_https = url.0.scheme_str() == Some("https");
        let host = url.0.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let client = match ca_file {
            Some(path) => {
                let pem = read_text(path, MAX)
                    .map_err(|error| RemoteError::ReadCa { path: path.to_owned(), error })?;
                let client = tls::Client::new(Some(pem.as_bytes()));
                Some(client.map_err(|error| RemoteError::Ca { path: path.to_owned(), error })?)
            }
            None if is_https => Some(tls::Client::new(None)?),
            None => None,
        };
        let tls = match client {
            Some(client) if is_https => {
                let name = ServerName::try_from(host.clone()).map_err(|_| RemoteError::Host(host.clone()))?;
                Some((client, name))
            }
            _ => None,
        };
        let port = url.0.port_u16().unwrap_or(if is_https { 443 } else { 80 });
        Ok(Self { url: url.clone(), host, port, tls })
    }

    /// Fetches the document. `limit` covers everything from the DNS lookup to the last byte.
    pub(super) async fn fetch(&self, limit: Duration) -> Result<Bytes, FetchError> {
        let deadline = Instant::now() + limit;
        let connection = dial::dial(&self.host, self.port, limit, |address| self.connect(address)).await?;
        timeout_at(deadline, self.ask(connection)).await.unwrap_or(Err(FetchError::Timeout(limit)))
    }

    async fn connect(&self, address: SocketAddr) -> Result<Box<dyn Duplex>, ConnectError> {
        let stream = TcpStream::connect(address).await?;
        Ok(match &self.tls {
            None => Box::new(stream),
            Some((tls, name)) => Box::new(tls.connect(name, stream).await?),
        })
    }

    async fn ask(&self, connection: Box<dyn Duplex>) -> Result<Bytes, FetchError> {
        let failed = |error: hyper::Error| FetchError::Exchange(chain(&error));
        let (mut sender, connection) = http1::handshake(TokioIo::new(connection)).await.map_err(failed)?;
        let exchange = async {
            let response = sender.send_request(self.request()).await.map_err(failed)?;
            if response.status() != StatusCode::OK {
                return Err(FetchError::Status(response.status()));
            }
            let is_gzip = is_gzip(response.headers())?;
            match Limited::new(response.into_body(), Document::MAX_BYTES).collect().await {
                Ok(body) if is_gzip => inflate(&body.to_bytes()),
                Ok(body) => Ok(body.to_bytes()),
                Err(error) if error.is::<LengthLimitError>() => Err(DocumentError::TooLong.into()),
                Err(error) => Err(FetchError::Body(chain(&*error))),
            }
        };
        // When the connection ends, for whatever reason, the exchange ends with an error.
        let driver = async {
            drop(connection.await);
            pending().await
        };
        tokio::select! {
            result = exchange => result,
            result = driver => result,
        }
    }

    /// In origin form (RFC 9112 §3.2.1).
    fn request(&self) -> Request<Empty<Bytes>> {
        let mut request = Request::new(Empty::new());
        let path = self.url.0.path_and_query().map_or("/", |path| path.as_str());
        *request.uri_mut() = path.parse().unwrap_or_default();
        let authority = self.url.0.authority().map_or("", |authority| authority.as_str());
        let headers = request.headers_mut();
        headers
            .insert(header::HOST, HeaderValue::from_str(authority).unwrap_or(HeaderValue::from_static("")));
        for (name, value) in [
            (header::ACCEPT, "application/jwk-set+json, application/json"),
            (header::ACCEPT_ENCODING, "gzip"),
            (header::CONNECTION, "close"),
            (header::USER_AGENT, concat!("tidegate/", env!("CARGO_PKG_VERSION"))),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        request
    }
}

/// Whether the document is compressed with gzip. Some servers and caches compress without being asked.
fn is_gzip(headers: &HeaderMap) -> Result<bool, FetchError> {
    let mut encodings = headers
        .get_all(header::CONTENT_ENCODING)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|name| !name.is_empty() && !name.eq_ignore_ascii_case(b"identity"));
    match (encodings.next(), encodings.next()) {
        (None, _) => Ok(false),
        // RFC 9110 §8.4.1.3: "x-gzip" is equivalent to "gzip".
        (Some(name), None) if name.eq_ignore_ascii_case(b"gzip") || name.eq_ignore_ascii_case(b"x-gzip") => {
            Ok(true)
        }
        _ => Err(FetchError::Encoding),
    }
}

/// Inflates to at most [`Document::MAX_BYTES`]. A few bytes can inflate to a thousand times as many.
fn inflate(gzip: &[u8]) -> Result<Bytes, FetchError> {
    let most = Document::MAX_BYTES;
    let mut json = Vec::new();
    let limit = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
    MultiGzDecoder::new(gzip).take(limit).read_to_end(&mut json).map_err(FetchError::Gzip)?;
    if json.len() > most { Err(DocumentError::TooLong.into()) } else { Ok(json.into()) }
}

/// An error with its causes: the outermost error of the library says only "client error".
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::{Compression, write::GzEncoder};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn answer(headers: &str, body: &[u8]) -> Vec<u8> {
        let length = body.len();
        let head = format!("HTTP/1.1 200 OK\r\n{headers}Content-Length: {length}\r\n\r\n");
        [head.as_bytes(), body].concat()
    }

    /// Serves `answer` to one fetch. Returns its result and the head of its request. The server keeps the
    /// connection open.
    async fn fetch(answer: Vec<u8>) -> (Result<Bytes, FetchError>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/keys?set=1", listener.local_addr().unwrap());
        let fetcher = Fetcher::new(&url.parse().unwrap(), None).unwrap();
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(&answer).await.unwrap();
            (stream, String::from_utf8(head).unwrap().to_ascii_lowercase())
        };
        let (outcome, (_open, head)) = tokio::join!(fetcher.fetch(LIMIT), serve);
        (outcome, head)
    }

    #[tokio::test]
    async fn a_request_accepts_gzip_and_closes_the_connection() {
        let (fetched, head) = fetch(answer("", b"{}")).await;
        assert_eq!(fetched.unwrap(), "{}");
        assert!(head.starts_with("get /keys?set=1 http/1.1\r\n"), "{head}");
        for line in ["\r\nhost: 127.0.0.1:", "\r\naccept-encoding: gzip\r\n", "\r\nconnection: close\r\n"] {
            assert!(head.contains(line), "{line:?} in {head}");
        }
    }

    #[tokio::test]
    async fn gzip_is_decoded_even_if_not_requested() {
        let text = br#"{"keys":[]}"#;
        for name in ["gzip", "x-gzip", "GZIP", "identity, gzip"] {
            let headers = format!("Content-Encoding: {name}\r\n");
            let (fetched, _) = fetch(answer(&headers, &gzip(text))).await;
            assert_eq!(fetched.unwrap(), &text[..], "{name}");
        }
        let members = [gzip(br#"{"keys""#), gzip(b":[]}")].concat();
        let (fetched, _) = fetch(answer("Content-Encoding: gzip\r\n", &members)).await;
        assert_eq!(fetched.unwrap(), &text[..], "a gzip file may have several members (RFC 1952 §2.2)");
        let (fetched, _) = fetch(answer("Content-Encoding: identity\r\n", text)).await;
        assert_eq!(fetched.unwrap(), &text[..]);
    }

    #[tokio::test]
    async fn invalid_gzip_is_an_error_and_a_bomb_stops_at_the_bound() {
        let text = [b' '; 1000];
        let whole = gzip(&text);
        let cut = whole.get(..whole.len() - 4).unwrap();
        for (headers, body, expected) in [
            ("Content-Encoding: br\r\n", &text[..], "expected gzip (Content-Encoding), or none"),
            ("Content-Encoding: gzip, gzip\r\n", &whole, "expected gzip (Content-Encoding), or none"),
            ("Content-Encoding: gzip\r\n", &text, "claims to be gzip but is not valid"),
            ("Content-Encoding: gzip\r\n", cut, "claims to be gzip but is not valid"),
        ] {
            let (fetched, _) = fetch(answer(headers, body)).await;
            let error = fetched.unwrap_err().to_string();
            assert!(error.contains(expected), "{headers}: {error}");
        }
        let bomb = gzip(&vec![b' '; 200 * Document::MAX_BYTES]);
        assert!(bomb.len() < Document::MAX_BYTES, "{}", bomb.len());
        let (fetched, _) = fetch(answer("Content-Encoding: gzip\r\n", &bomb)).await;
        assert!(matches!(fetched, Err(FetchError::Document(DocumentError::TooLong))), "{fetched:?}");
        let largest = vec![b' '; Document::MAX_BYTES];
        let (fetched, _) = fetch(answer("Content-Encoding: gzip\r\n", &gzip(&largest))).await;
        assert_eq!(fetched.unwrap().len(), Document::MAX_BYTES);
    }
}
