//! Which of a connection's bytes go to its socket, and when.

use std::io::{self, IoSlice};

use bytes::Bytes;

use super::{Attachment, Connection, Phase};
use crate::{
    framing::{Frame, Packets},
    shard::{
        outbound::{Lane, Outbound},
        stream::Stream,
        tally::Tally,
        worker::Worker,
    },
    vocabulary::CloseReason,
};

/// Bytes that can be written as they are, or queued.
pub(super) trait Pieces {
    /// The bytes; the second piece is often empty.
    fn pieces(&self) -> [&[u8]; 2];

    /// A copy that can be queued.
    fn to_frame(&self) -> Frame;
}

impl Pieces for Frame {
    fn pieces(&self) -> [&[u8]; 2] {
        self.pieces()
    }

    fn to_frame(&self) -> Frame {
        self.clone()
    }
}

impl Pieces for Bytes {
    fn pieces(&self) -> [&[u8]; 2] {
        [self, &[]]
    }

    fn to_frame(&self) -> Frame {
        self.clone().into()
    }
}

impl Pieces for Packets {
    fn pieces(&self) -> [&[u8]; 2] {
        [self.bytes(), &[]]
    }

    fn to_frame(&self) -> Frame {
        self.to_bytes().into()
    }
}

impl Connection {
    /// Writes the queued output, with one system call if the socket takes it, and closes a connection that
    /// was too slow. If the socket does not take everything, the connection's task writes the rest.
    pub fn flush(&self, worker: &Worker) {
        if let Some(reason) = self.close_after_turn.take() {
            if reason == CloseReason::SlowConsumer {
                Tally::add(&worker.tally.slow_consumers, 1);
            }
            self.begin_close(worker, reason);
        }
        if self.ping_due.take() {
            self.ping(worker);
        }
        let outcome = match &*self.attachment.borrow() {
            Attachment::Pending | Attachment::Detached => Ok(()),
            Attachment::Response(_) => {
                if !self.outbound.borrow().is_empty() && self.offered.replace(true) {
                    self.wants_write.set(true);
                }
                self.wake();
                Ok(())
            }
            Attachment::Socket { stream, .. } => {
                let outcome = self.write(worker, stream);
                self.count_outbound(worker);
                outcome
            }
        };
        match outcome {
            Ok(()) => {
                if self.has_output() {
                    self.note_holding(worker);
                }
                self.shut_if_done();
            }
            Err(error) => self.lost(worker, Some(&error)),
        }
    }

    /// Writes bytes directly if nothing is queued before them, and queues what the socket does not take.
    /// Returns false if the caller has to queue all of it: there is no socket, or it is full.
    pub(super) fn send_past_queue(&self, worker: &Worker, bytes: &impl Pieces, lane: Lane) -> bool {
        match self.write_past_queue(bytes.pieces()) {
            Ok(0) => return false,
            Ok(written) => {
                let length: usize = bytes.pieces().iter().map(|piece| piece.len()).sum();
                let is_whole = written == length;
                if is_whole && lane == Lane::Heartbeat {
                    self.has_sent_ping(worker);
                }
                if !is_whole {
                    self.outbound.borrow_mut().push_started(bytes.to_frame(), written, lane);
                    self.count_outbound(worker);
                }
                if self.has_output() {
                    self.flush(worker);
                }
            }
            Err(error) => self.lost(worker, Some(&error)),
        }
        true
    }

    /// Whether any output waits for the socket.
    pub(super) fn has_output(&self) -> bool {
        !self.outbound.borrow().is_empty()
            || matches!(&*self.attachment.borrow(), Attachment::Socket { stream, .. } if stream.has_unsent())
    }

    /// Writes bytes directly if nothing is queued, and there is a socket that is not known to be full.
    /// Returns how many bytes were taken.
    fn write_past_queue(&self, [first, second]: [&[u8]; 2]) -> io::Result<usize> {
        if self.wants_write.get() || !self.outbound.borrow().is_empty() {
            return Ok(0);
        }
        let outcome = match &*self.attachment.borrow() {
            // With TLS, this write also sends the records that still wait.
            Attachment::Socket { stream, .. } if second.is_empty() => {
                stream.try_write(&[IoSlice::new(first)])
            }
            Attachment::Socket { stream, .. } => {
                stream.try_write(&[IoSlice::new(first), IoSlice::new(second)])
            }
            Attachment::Pending | Attachment::Response(_) | Attachment::Detached => Ok(0),
        };
        match outcome {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.wants_write.set(true);
                self.wake();
                Ok(0)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            outcome => outcome,
        }
    }

    fn write(&self, worker: &Worker, stream: &Stream) -> io::Result<()> {
        let mut outbound = self.outbound.borrow_mut();
        // With TLS, records of what has left the queue may still wait for the socket.
        while (!outbound.is_empty() || stream.has_unsent()) && !self.wants_write.get() {
            let outcome = if outbound.is_empty() {
                stream.try_flush().map(|()| 0)
            } else if let Some(frame) = outbound.only() {
                stream.try_write(&[IoSlice::new(frame)])
            } else {
                let mut slices = [IoSlice::new(&[]); Outbound::BATCH];
                let used = outbound.gather(&mut slices);
                stream.try_write(slices.get(..used).unwrap_or_default())
            };
            match outcome {
                Ok(written) => {
                    // TLS takes nothing while it holds unsent records, so the kernel has everything that was
                    // taken before.
                    if self.ping_in_tls.take() {
                        self.note_pinged(worker);
                    }
                    if outbound.advance(written) {
                        self.ping_in_tls.set(stream.has_unsent());
                        if !stream.has_unsent() {
                            self.note_pinged(worker);
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wants_write.set(true);
                    self.wake();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A ping has bypassed the queue, into TLS or the kernel.
    fn has_sent_ping(&self, worker: &Worker) {
        self.ping_in_tls.set(self.has_output());
        if !self.ping_in_tls.get() {
            self.note_pinged(worker);
        }
    }

    /// Once the final message is out, shuts the socket for writing. The connection then ends when the peer
    /// closes its side or at the deadline. Closing at once could destroy the final message, since a close
    /// with unread input resets the connection (RFC 9293 §3.10.4).
    fn shut_if_done(&self) {
        if !matches!(self.phase.get(), Phase::Closing(_)) || self.has_output() {
            return;
        }
        if let Attachment::Socket { stream, shut } = &mut *self.attachment.borrow_mut()
            && !*shut
        {
            *shut = true;
            stream.shutdown_write();
            if stream.has_unsent() {
                self.wants_write.set(true);
                self.wake();
            }
        }
    }
}
