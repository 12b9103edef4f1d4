//! Compares the decoder with an independent one, `tungstenite`, on the same streams.
//!
//! Both must see the same messages, and either both refuse a stream or neither. These differences are
//! deliberate:
//!
//! - **When.** This decoder refuses at the first byte that breaks a rule, `tungstenite` when the frame is
//!   complete. If only this decoder has refused, the test continues the stream until the frame must be
//!   complete; `tungstenite` must then refuse it without having seen anything more.
//! - **Lengths that are not minimal** are refused here, as §5.2 requires ("the minimal number of bytes MUST
//!   be used"); `tungstenite` accepts them. In a control frame the error is
//!   [`ProtocolError::ControlTooLong`], because the extended forms mean more than 125 bytes.
//! - **Close code 1014** (bad gateway) is accepted here, because IANA has assigned it; `tungstenite` refuses
//!   it.

use std::io::{self, Cursor, Read, Write};

use proptest::prelude::*;
use tungstenite::{
    Error, Message,
    protocol::{Role, WebSocket, WebSocketConfig, frame::coding::CloseCode},
};

use super::{
    ProtocolError,
    testing::{Seen, any_stream, decode, divide, piece_sizes, valid_stream},
};

const LIMIT: usize = 2048;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4 * ProptestConfig::default().cases))]

    #[test]
    fn valid_streams_give_the_same_events((stream, _) in valid_stream(), sizes in piece_sizes()) {
        compare(&stream, &sizes);
    }

    #[test]
    fn any_streams_give_the_same_events(stream in any_stream(), sizes in piece_sizes()) {
        compare(&stream, &sizes);
    }
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Open,
    Closed,
    Refused,
}

#[track_caller]
fn compare(stream: &[u8], sizes: &[usize]) {
    let (ours, end, error) = ours(stream, sizes);
    let (theirs, their_end) = theirs(stream);

    if let Some(ProtocolError::LengthNotMinimal | ProtocolError::ControlTooLong) = error {
        assert!(theirs.starts_with(&ours), "{ours:?}\n{theirs:?}");
        return;
    }
    if let Some((Seen::Close(Some((1014, _))), before)) = ours.split_last() {
        assert_eq!((&theirs[..], their_end), (before, End::Refused));
        return;
    }
    if (end, their_end) == (End::Refused, End::Open) {
        assert_eq!(theirs, ours);
        let completed = [stream, &[0; LIMIT + 14]].concat();
        assert_eq!(self::theirs(&completed), (ours, End::Refused), "after {error:?}");
        return;
    }
    assert_eq!((theirs, their_end), (ours, end), "{error:?}");
}

fn ours(stream: &[u8], sizes: &[usize]) -> (Vec<Seen>, End, Option<ProtocolError>) {
    let mut seen = decode(divide(stream, sizes), LIMIT);
    match seen.last() {
        Some(&Seen::Error(error)) => {
            seen.pop();
            (seen, End::Refused, Some(error))
        }
        Some(Seen::Close(_)) => (seen, End::Closed, None),
        _ => (seen, End::Open, None),
    }
}

fn theirs(stream: &[u8]) -> (Vec<Seen>, End) {
    let config = WebSocketConfig::default()
        .read_buffer_size(4096)
        .max_message_size(Some(LIMIT))
        .max_frame_size(Some(LIMIT));
    let mut socket = WebSocket::from_raw_socket(Wire(Cursor::new(stream)), Role::Server, Some(config));
    let mut seen = Vec::new();
    loop {
        match socket.read() {
            Ok(Message::Text(text)) => seen.push(Seen::Text(text.as_str().to_owned())),
            Ok(Message::Binary(bytes)) => seen.push(Seen::Binary(bytes.to_vec())),
            Ok(Message::Ping(bytes)) => seen.push(Seen::Ping(bytes.to_vec())),
            Ok(Message::Pong(bytes)) => seen.push(Seen::Pong(bytes.to_vec())),
            // `tungstenite` reports forbidden close codes this way.
            Ok(Message::Close(Some(frame)))
                if frame.code == CloseCode::Protocol && frame.reason.as_str() == "Protocol violation" =>
            {
                return (seen, End::Refused);
            }
            Ok(Message::Close(frame)) => {
                seen.push(Seen::Close(
                    frame.map(|frame| (frame.code.into(), frame.reason.as_str().to_owned())),
                ));
                return (seen, End::Closed);
            }
            Ok(Message::Frame(_)) => unreachable!("only written, never read"),
            Err(Error::Protocol(tungstenite::error::ProtocolError::ResetWithoutClosingHandshake)) => {
                return (seen, End::Open);
            }
            Err(Error::Protocol(_) | Error::Utf8(_) | Error::Capacity(_)) => return (seen, End::Refused),
            Err(other) => panic!("unexpected: {other}"),
        }
    }
}

/// A readable stream that discards what is written to it.
struct Wire<'a>(Cursor<&'a [u8]>);

impl Read for Wire<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
