//! Which of a connection's bytes go to its socket, and when.

use std::{
    io::{self, IoSlice},
    mem,
};

use bytes::Bytes;

use super::{Attachment, Connection, Phase};
use crate::{
    framing::{Frame, Packets},
    shard::{
        outbound::{Lane, Outbound},
        state::State,
        transport::{Response as _, Socket as _, Transport},
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

impl<T: Transport> Connection<T> {
    /// Writes the queued output, with one system call if the socket takes it, and closes a connection that
    /// was too slow. If the socket does not take everything, the rest is written once it is writable.
    pub fn flush(&mut self, shard: &mut State) {
        if let Some(reason) = self.close_after_turn.take() {
            self.begin_close(shard, reason);
        }
        if self.is_answered(shard.now) {
            self.begin_close(shard, CloseReason::Answered);
        }
        if mem::take(&mut self.ping_due) {
            self.ping(shard);
        }
        let outcome = match &mut self.attachment {
            Attachment::Pending | Attachment::Detached => Ok(()),
            Attachment::Response(response) => {
                if !self.outbound.is_empty() && mem::replace(&mut self.offered, true) {
                    self.wants_write = true;
                }
                response.wake();
                Ok(())
            }
            Attachment::Socket { .. } => {
                let outcome = self.write(shard);
                self.count_outbound(shard);
                outcome
            }
        };
        match outcome {
            Ok(()) => {
                if self.has_output() {
                    self.note_holding(shard);
                }
                self.resume_catching_up(shard);
                self.read_next(shard);
                self.shut_if_done();
            }
            Err(error) => self.lost(shard, Some(&error)),
        }
    }

    /// Writes bytes directly if nothing is queued before them, and queues what the socket does not take.
    /// Returns false if the caller has to queue all of it: there is no socket, or it is full.
    pub(super) fn send_past_queue(&mut self, shard: &mut State, bytes: &impl Pieces, lane: Lane) -> bool {
        match self.write_past_queue(bytes.pieces()) {
            Ok(0) => return false,
            Ok(written) => {
                let length: usize = bytes.pieces().iter().map(|piece| piece.len()).sum();
                let is_whole = written == length;
                if is_whole && lane == Lane::Heartbeat {
                    self.has_sent_ping(shard);
                }
                if !is_whole {
                    self.outbound.push_started(bytes.to_frame(), written, lane);
                    self.count_outbound(shard);
                }
                if self.has_output() {
                    self.flush(shard);
                }
            }
            Err(error) => self.lost(shard, Some(&error)),
        }
        true
    }

    /// Whether any output waits for the socket.
    pub(super) fn has_output(&self) -> bool {
        !self.outbound.is_empty()
            || matches!(&self.attachment, Attachment::Socket { socket, .. } if socket.has_unsent())
    }

    /// Writes bytes directly if nothing is queued, and there is a socket that is not known to be full.
    /// Returns how many bytes were taken.
    fn write_past_queue(&mut self, [first, second]: [&[u8]; 2]) -> io::Result<usize> {
        if self.wants_write || !self.outbound.is_empty() {
            return Ok(0);
        }
        let Attachment::Socket { socket, .. } = &mut self.attachment else { return Ok(0) };
        // With TLS, this write also sends the records that still wait.
        let outcome = if second.is_empty() {
            socket.write(&[IoSlice::new(first)])
        } else {
            socket.write(&[IoSlice::new(first), IoSlice::new(second)])
        };
        match outcome {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.wants_write = true;
                socket.wake();
                Ok(0)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            outcome => outcome,
        }
    }

    fn write(&mut self, shard: &mut State) -> io::Result<()> {
        while let Attachment::Socket { socket, .. } = &mut self.attachment
            // With TLS, records of what has left the queue may still wait for the socket.
            && (!self.outbound.is_empty() || socket.has_unsent())
            && !self.wants_write
        {
            let outcome = if self.outbound.is_empty() {
                socket.flush().map(|()| 0)
            } else if let Some(frame) = self.outbound.only() {
                socket.write(&[IoSlice::new(frame)])
            } else {
                let mut slices = [IoSlice::new(&[]); Outbound::BATCH];
                let used = self.outbound.gather(&mut slices);
                socket.write(slices.get(..used).unwrap_or_default())
            };
            match outcome {
                Ok(written) => {
                    let has_unsent = socket.has_unsent();
                    // TLS takes nothing while it holds unsent records, so the kernel has everything that was
                    // taken before.
                    let mut pinged = mem::take(&mut self.ping_in_tls);
                    if self.outbound.advance(written) {
                        self.ping_in_tls = has_unsent;
                        pinged |= !has_unsent;
                    }
                    if pinged {
                        self.note_pinged(shard);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wants_write = true;
                    socket.wake();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A ping has bypassed the queue, into TLS or the kernel.
    fn has_sent_ping(&mut self, shard: &mut State) {
        self.ping_in_tls = self.has_output();
        if !self.ping_in_tls {
            self.note_pinged(shard);
        }
    }

    /// Once the final message is out, shuts the socket for writing. The connection then ends when the peer
    /// closes its side or at the deadline. Closing at once could destroy the final message, since a close
    /// with unread input resets the connection (RFC 9293 §3.10.4).
    fn shut_if_done(&mut self) {
        if !matches!(self.phase, Phase::Closing(_)) || self.has_output() {
            return;
        }
        if let Attachment::Socket { socket, shut } = &mut self.attachment
            && !*shut
        {
            *shut = true;
            socket.shutdown_write();
            if socket.has_unsent() {
                self.wants_write = true;
                socket.wake();
            }
        }
    }
}
