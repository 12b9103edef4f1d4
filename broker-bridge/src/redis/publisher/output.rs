//! Commands that a connection for publications has yet to send.
//!
//! Owns the bound on their bytes and the encoding of a publication. A publication is written once, from where the
//! session has left it into the buffer that goes to the socket; a large payload is not copied at all.

use std::{
    fmt::Write as _,
    io::{self, IoSlice},
    num::NonZeroU64,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BufMut, Bytes, BytesMut, buf::Chain};
use tokio::io::AsyncWrite;

use crate::{
    PublishRequest, Retention,
    redis::{
        connection::{LINE_END, write_command, write_header, write_length, write_part, write_pieces},
        envelope::{self, Encoded},
        keys::{Topics, id_name},
        log,
    },
};

/// The buffer is full when it holds this many bytes: enough for a system call to cost little for each publication.
const FULL: usize = 64 * 1024;
/// A payload of this many bytes goes to the socket from where it is. A smaller one is cheaper to copy.
const LARGE: usize = 16 * 1024;

/// What the options of a call take, in bytes.
const OPTIONS: usize = 160;

/// The buffer. Holds at most [`FULL`] bytes, one command of at most a few hundred more, and one large payload.
#[derive(Debug, Default)]
pub(super) struct Output {
    buffer: BytesMut,
    /// A payload that is not copied, and the end of its command. It follows the buffer, so nothing is appended until it
    /// is sent.
    large: Option<Chain<Bytes, Bytes>>,
}

impl Output {
    pub(super) fn is_empty(&self) -> bool {
        self.buffer.is_empty() && self.large.is_none()
    }

    /// Whether commands have to wait until some of this is sent.
    pub(super) fn is_full(&self) -> bool {
        self.buffer.len() >= FULL || self.large.is_some()
    }

    /// Appends a `PUBLISH`, or a call of the function that also records the publication, as the one of this number of a
    /// writer. The buffer must not be full.
    pub(super) fn publish(
        &mut self,
        topics: &Topics,
        request: &PublishRequest,
        number: Option<(&str, NonZeroU64)>,
    ) {
        debug_assert!(!self.is_full());
        let encoded = envelope::encode(&request.publication);
        match request.history {
            None => {
                self.buffer.put_slice(b"*3\r\n$7\r\nPUBLISH\r\n");
                write_pieces(&mut self.buffer, &topics.pieces(&request.room));
                self.put_message(&encoded, Bytes::from_static(LINE_END));
            }
            Some(retention) => self.record(topics, request, retention, number, &encoded),
        }
    }

    /// See `functions.lua` for the arguments.
    fn record(
        &mut self,
        topics: &Topics,
        request: &PublishRequest,
        retention: Retention,
        number: Option<(&str, NonZeroU64)>,
        encoded: &Encoded<'_>,
    ) {
        let name = request.id.as_ref().map(id_name);
        // Without the option, the function would wrap an envelope into another.
        let is_envelope = encoded.header_bytes() > 0;
        // Command, function, number of keys, key, message, two options with their values.
        let options = usize::from(is_envelope) + usize::from(number.is_some());
        let parts = 9 + usize::from(name.is_some()) + 2 * options;
        write_header(&mut self.buffer, parts);
        self.buffer.put_slice(b"$5\r\nFCALL\r\n$16\r\ntidegate_publish\r\n");
        write_part(&mut self.buffer, if name.is_some() { b"2" } else { b"1" });
        write_pieces(&mut self.buffer, &topics.log(&request.room));
        if let Some(name) = &name {
            write_pieces(&mut self.buffer, &topics.id(&request.room, name));
        }
        let mut end = BytesMut::with_capacity(OPTIONS);
        end.put_slice(LINE_END);
        for part in log::policy(retention) {
            write_part(&mut end, part.as_bytes());
        }
        if is_envelope {
            end.put_slice(b"$8\r\nenvelope\r\n$1\r\n1\r\n");
        }
        if let Some((writer, number)) = number {
            let digits = number.ilog10() as usize + 1;
            end.put_slice(b"$1\r\nw\r\n");
            write_length(&mut end, '$', writer.len() + 1 + digits);
            write!(end, "{writer}-{number}\r\n").expect("a buffer in memory takes everything");
        }
        self.put_message(encoded, end.freeze());
    }

    /// Appends a message as a part of a command, and what follows the part.
    fn put_message(&mut self, encoded: &Encoded<'_>, end: Bytes) {
        let data = encoded.data();
        write_length(&mut self.buffer, '$', encoded.header_bytes() + data.len());
        encoded.put_header(&mut self.buffer);
        if data.len() < LARGE {
            self.buffer.put_slice(data);
            self.buffer.put_slice(&end);
        } else {
            self.large = Some(data.clone().chain(end));
        }
    }

    /// Appends any other command, a small one. The buffer must not be full.
    pub(super) fn command(&mut self, parts: &[&[u8]]) {
        debug_assert!(!self.is_full());
        write_command(&mut self.buffer, parts);
    }

    /// Writes once, and removes what was written. Must not be called if there is nothing to write.
    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        stream: Pin<&mut impl AsyncWrite>,
    ) -> Poll<io::Result<()>> {
        let written = if let Some(large) = &self.large {
            let slices = [&self.buffer, large.first_ref().chunk(), large.last_ref()].map(IoSlice::new);
            ready!(stream.poll_write_vectored(cx, &slices))?
        } else {
            ready!(stream.poll_write(cx, &self.buffer))?
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        let buffered = written.min(self.buffer.len());
        self.buffer.advance(buffered);
        if let Some(large) = &mut self.large {
            large.advance(written - buffered);
            if !large.has_remaining() {
                self.large = None;
            }
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::{num::NonZeroU32, task::Waker, time::Duration};

    use super::*;
    use crate::{
        Affinity, Data, Publication, PublicationId, Receipt, RoomName, SessionId, publication::Owner,
    };

    /// Takes at most `most` bytes of each write, the first slice only or all of them.
    struct Socket {
        most: usize,
        vectored: bool,
        got: Vec<u8>,
    }

    impl AsyncWrite for Socket {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let taken = bytes.len().min(self.most);
            self.got.extend(bytes.iter().take(taken));
            Poll::Ready(Ok(taken))
        }

        fn poll_write_vectored(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            slices: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let first = slices.iter().position(|slice| !slice.is_empty()).unwrap();
            let end = if self.vectored { slices.len() } else { first + 1 };
            let some = slices[first..end].iter().flat_map(|slice| slice.iter().copied()).take(self.most);
            self.poll_write(cx, &some.collect::<Vec<_>>())
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn request(publication: Publication) -> PublishRequest {
        PublishRequest {
            room: RoomName::new("été").unwrap(),
            publication,
            history: None,
            id: None,
            affinity: Affinity::default(),
            receipt: Receipt::ignored(),
        }
    }

    fn topics() -> Topics {
        Topics::new(&"p:".parse().unwrap())
    }

    /// What a socket gets that takes `most` bytes at once.
    fn sent(requests: &[PublishRequest], most: usize, vectored: bool) -> Vec<u8> {
        let mut output = Output::default();
        let mut socket = Socket { most, vectored, got: Vec::new() };
        let mut cx = Context::from_waker(Waker::noop());
        let mut write = |output: &mut Output| {
            assert!(matches!(output.poll_write(&mut cx, Pin::new(&mut socket)), Poll::Ready(Ok(()))));
        };
        for request in requests {
            while output.is_full() {
                write(&mut output);
            }
            output.publish(&topics(), request, None);
        }
        while !output.is_empty() {
            write(&mut output);
        }
        socket.got
    }

    fn command(parts: &[&[u8]]) -> Vec<u8> {
        let mut command = BytesMut::new();
        write_command(&mut command, parts);
        command.into()
    }

    #[test]
    fn commands_arrive_whole_however_little_the_socket_takes() {
        let excluding = Publication { exclude: Some(SessionId(7)), ..Publication::new(Data::text("hi")) };
        let sizes = [0, 1, LARGE - 1, LARGE, LARGE + 1, 3 * FULL, 5];
        let requests = sizes
            .map(|size| request(Publication::new(Data::text("x".repeat(size)))))
            .into_iter()
            .chain([request(excluding.clone())])
            .collect::<Vec<_>>();
        let mut enveloped = Vec::new();
        envelope::encode(&excluding).put_header(&mut enveloped);
        enveloped.extend(b"hi");
        let expected = sizes
            .map(|size| "x".repeat(size).into_bytes())
            .into_iter()
            .chain([enveloped])
            .flat_map(|message| command(&[b"PUBLISH", "p:room:été".as_bytes(), &message]))
            .collect::<Vec<_>>();
        for most in [1, 7, 1000, FULL, usize::MAX] {
            for vectored in [false, true] {
                assert!(
                    sent(&requests, most, vectored) == expected,
                    "{most} bytes at once, vectored: {vectored}"
                );
            }
        }
    }

    #[test]
    fn recorded_publications_are_calls_of_the_function() {
        let keep = |ttl| Retention { size: NonZeroU32::new(50).unwrap(), ttl };
        let id = PublicationId::new(Owner::Backend, "7").unwrap();
        let binary = Publication::new(Data::binary(b"hi".as_slice()));
        let large = "x".repeat(LARGE);
        let requests = [
            PublishRequest {
                history: Some(keep(Some(Duration::from_secs(60)))),
                ..request(Publication::new(Data::text("hi")))
            },
            PublishRequest { history: Some(keep(None)), id: Some(id), ..request(binary.clone()) },
            PublishRequest {
                history: Some(keep(None)),
                ..request(Publication::new(Data::text(large.clone())))
            },
        ];
        let mut enveloped = Vec::new();
        envelope::encode(&binary).put_header(&mut enveloped);
        enveloped.extend(b"hi");
        let (call, log) = ([&b"FCALL"[..], b"tidegate_publish"], "p:{room:été}:log".as_bytes());
        let expected = [
            command(&[&call[..], &[b"1", log, b"hi", b"size", b"50", b"ttl", b"60000"]].concat()),
            command(
                &[
                    &call[..],
                    &[b"2", log, "p:{room:été}:id:b:7".as_bytes(), &enveloped],
                    &[b"size", b"50", b"ttl", b"none", b"envelope", b"1"],
                ]
                .concat(),
            ),
            command(&[&call[..], &[b"1", log, large.as_bytes(), b"size", b"50", b"ttl", b"none"]].concat()),
        ]
        .concat();
        for most in [1, 7, 1000, FULL, usize::MAX] {
            for vectored in [false, true] {
                let sent = sent(&requests, most, vectored);
                assert_eq!(sent.escape_ascii().to_string(), expected.escape_ascii().to_string(), "{most}");
            }
        }
    }

    #[test]
    fn only_small_payloads_are_copied_and_the_buffer_is_bounded() {
        let mut output = Output::default();
        let mut count = 0;
        while !output.is_full() {
            output.publish(&topics(), &request(Publication::new(Data::text("x".repeat(LARGE - 1)))), None);
            count += 1;
        }
        assert_eq!(count, 4);
        assert!(output.buffer.len() < FULL + LARGE);

        let mut output = Output::default();
        let large = request(Publication::new(Data::text("x".repeat(LARGE))));
        output.publish(&topics(), &large, None);
        assert!(output.is_full(), "nothing fits behind it");
        let kept = output.large.as_ref().unwrap().first_ref();
        assert_eq!(kept.as_ptr(), large.publication.data.bytes().as_ptr());
        assert!(output.buffer.len() < 100);
    }
}
