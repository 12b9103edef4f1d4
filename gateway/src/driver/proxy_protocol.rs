//! The PROXY protocol, versions 1 and 2: the client's address as a trusted proxy reports it. Source:
//! <https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>.
//!
//! The header precedes everything else, including TLS. What follows belongs to the next layer, so no read may
//! go beyond the header's end, which is unknown until it has been read: each read asks for no more bytes than
//! are certainly missing.

use std::{future::poll_fn, io, net::SocketAddr};

use ppp::{v1, v2};

use super::stream::Stream;

/// The origin of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The proxy itself, for a health check or because it does not know the client.
    Proxy,
    /// The client that connected to the proxy.
    Client(SocketAddr),
}

/// Not a valid header, or too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a PROXY protocol header")]
pub struct NoHeader;

/// The start of a version 1 header.
const TEXT: &[u8] = b"PROXY ";
/// The start of a version 2 header.
const BINARY: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2: the signature, version and command, family, and the length of the rest.
const BINARY_HEAD: usize = 16;
/// The longest line of version 1, in bytes.
const MAX_TEXT: usize = 107;
/// The longest accepted header of version 2, in bytes. Most have 28 or 52; some contain the name of a
/// certificate.
const MAX_BINARY: usize = 2048;

/// Reads the header from the start of a connection.
pub async fn read(stream: &Stream) -> io::Result<Source> {
    let mut header = Vec::new();
    loop {
        let missing = match parse(&header) {
            Ok(Parsed::Missing(missing)) => missing,
            Ok(Parsed::Source(source)) => return Ok(source),
            Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        };
        let from = header.len();
        header.resize(from + missing, 0);
        let read = loop {
            match stream.try_read(header.get_mut(from..).unwrap_or_default()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    poll_fn(|cx| stream.poll_read_ready(cx)).await?;
                }
                outcome => break outcome?,
            }
        };
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        header.truncate(from + read);
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Parsed {
    /// At least this many more bytes are needed.
    Missing(usize),
    /// The header is complete.
    Source(Source),
}

/// Parses what has been read so far.
fn parse(header: &[u8]) -> Result<Parsed, NoHeader> {
    let is_text = begins_alike(header, TEXT);
    if !is_text && !begins_alike(header, BINARY) {
        return Err(NoHeader);
    }
    // No header of either version is shorter than this.
    if header.len() < BINARY.len() {
        return Ok(Parsed::Missing(BINARY.len() - header.len()));
    }
    if is_text { parse_text(header) } else { parse_binary(header) }
}

fn parse_text(header: &[u8]) -> Result<Parsed, NoHeader> {
    if header.ends_with(b"\r\n") {
        let header = v1::Header::try_from(header).map_err(|_| NoHeader)?;
        return Ok(Parsed::Source(match header.addresses {
            v1::Addresses::Tcp4(pair) => Source::Client((pair.source_address, pair.source_port).into()),
            v1::Addresses::Tcp6(pair) => Source::Client((pair.source_address, pair.source_port).into()),
            v1::Addresses::Unknown => Source::Proxy,
        }));
    }
    let missing = if header.ends_with(b"\r") { 1 } else { 2 };
    if header.len() + missing > MAX_TEXT { Err(NoHeader) } else { Ok(Parsed::Missing(missing)) }
}

fn parse_binary(header: &[u8]) -> Result<Parsed, NoHeader> {
    let Some((head, rest)) = header.split_first_chunk::<BINARY_HEAD>() else {
        return Ok(Parsed::Missing(BINARY_HEAD - header.len()));
    };
    let [.., high, low] = *head;
    let length = usize::from(u16::from_be_bytes([high, low]));
    if BINARY_HEAD + length > MAX_BINARY {
        return Err(NoHeader);
    }
    if rest.len() < length {
        return Ok(Parsed::Missing(length - rest.len()));
    }
    let header = v2::Header::try_from(header).map_err(|_| NoHeader)?;
    Ok(Parsed::Source(match (header.command, header.addresses) {
        (v2::Command::Proxy, v2::Addresses::IPv4(pair)) => {
            Source::Client((pair.source_address, pair.source_port).into())
        }
        (v2::Command::Proxy, v2::Addresses::IPv6(pair)) => {
            Source::Client((pair.source_address, pair.source_port).into())
        }
        _ => Source::Proxy,
    }))
}

fn begins_alike(a: &[u8], b: &[u8]) -> bool {
    a.iter().zip(b).all(|(a, b)| a == b)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Reads as `read` does, at most `step` bytes at a time. Also returns what follows the header.
    fn take(stream: &[u8], step: usize) -> Result<(Source, &[u8]), NoHeader> {
        let mut taken = 0;
        loop {
            match parse(&stream[..taken])? {
                Parsed::Source(source) => return Ok((source, &stream[taken..])),
                Parsed::Missing(missing) => {
                    assert!(missing > 0);
                    if taken == stream.len() {
                        return Err(NoHeader);
                    }
                    taken = (taken + missing.min(step)).min(stream.len());
                    assert!(taken <= MAX_BINARY);
                }
            }
        }
    }

    fn binary(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [BINARY, &[command, family], &length, rest].concat()
    }

    fn client(address: &str) -> Source {
        Source::Client(address.parse().unwrap())
    }

    #[test]
    fn both_versions_in_any_pieces_and_not_a_byte_beyond() {
        let v4 = [192, 0, 2, 7, 10, 0, 0, 1, 0x30, 0x39, 0, 80];
        let mut v6 = [0; 36];
        v6[..4].copy_from_slice(&[0x20, 1, 0xd, 0xb8]);
        v6[15] = 1;
        v6[32..34].copy_from_slice(&[0x30, 0x39]);
        let with_tlv = [&v4[..], &[4, 0, 3, 1, 2, 3]].concat();
        for (header, source) in [
            (b"PROXY TCP4 192.0.2.7 10.0.0.1 12345 80\r\n".to_vec(), client("192.0.2.7:12345")),
            (b"PROXY TCP6 2001:db8::1 ::1 12345 80\r\n".to_vec(), client("[2001:db8::1]:12345")),
            (b"PROXY UNKNOWN\r\n".to_vec(), Source::Proxy),
            (b"PROXY UNKNOWN ::1 ::1 1 2\r\n".to_vec(), Source::Proxy),
            (binary(0x21, 0x11, &v4), client("192.0.2.7:12345")),
            (binary(0x21, 0x11, &with_tlv), client("192.0.2.7:12345")),
            (binary(0x21, 0x21, &v6), client("[2001:db8::1]:12345")),
            (binary(0x20, 0x00, &[]), Source::Proxy),
            (binary(0x20, 0x11, &v4), Source::Proxy),
            (binary(0x21, 0x00, &[]), Source::Proxy),
        ] {
            for step in 1..60 {
                let stream = [&header, &b"\r\nGET /"[..]].concat();
                assert_eq!(take(&stream, step), Ok((source, &b"\r\nGET /"[..])), "{}", header.escape_ascii());
            }
        }
    }

    #[test]
    fn anything_else_is_refused_early() {
        let endless = [TEXT, &[b'x'; 200]].concat();
        let mut huge = binary(0x21, 0x11, &[]);
        huge[14..16].copy_from_slice(&[0xff, 0xff]);
        for junk in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"PROXY TCP4 nonsense\r\n",
            b"PROXY TCP4 192.0.2.7 10.0.0.1 12345 99999\r\n",
            b"proxy UNKNOWN\r\n",
            b"\r\n\r\n\0\r\nQUIX\n",
            &binary(0x31, 0x11, &[0; 12]),
            &binary(0x21, 0x11, &[0; 4]),
            &endless,
            &huge,
        ] {
            assert_eq!(take(junk, 1), Err(NoHeader), "{}", junk.escape_ascii());
        }
    }

    proptest! {
        #[test]
        fn nothing_panics_and_nothing_is_endless(
            start in prop::sample::select(vec![&b""[..], TEXT, BINARY, b"PROXY TCP4 ", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"]),
            rest in prop::collection::vec(any::<u8>(), 0..3000),
            step in 1_usize..100,
        ) {
            let _ = take(&[start, &rest].concat(), step);
        }
    }
}
