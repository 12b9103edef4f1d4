//! The bytes of one message.

use bytes::{Buf as _, Bytes, BytesMut};

/// The bytes of one message, or of its unwritten rest.
#[derive(Clone, Debug)]
pub enum Frame {
    /// In one piece, which sessions may share.
    Whole(Bytes),
    /// The session's own head, with the frame header for both, and the tail shared with others.
    Split(Box<Split>),
}

/// See [`Frame::Split`].
#[derive(Clone, Debug)]
pub struct Split {
    head: Bytes,
    tail: Bytes,
}

impl Frame {
    /// A private head before a shared tail.
    pub fn split(head: Bytes, tail: Bytes) -> Self {
        Self::Split(Box::new(Split { head, tail }))
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Whole(bytes) => bytes.len(),
            Self::Split(split) => split.head.len() + split.tail.len(),
        }
    }

    /// Whether all of it has been written.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many of its bytes no other session can share.
    pub fn private_len(&self) -> usize {
        match self {
            Self::Whole(_) => 0,
            Self::Split(split) => split.head.len(),
        }
    }

    /// Its pieces, in order; the second is often empty.
    pub fn pieces(&self) -> [&[u8]; 2] {
        match self {
            Self::Whole(bytes) => [bytes, &[]],
            Self::Split(split) => [&split.head, &split.tail],
        }
    }

    /// The address of its end in memory: the same for all sessions that share its bytes.
    pub fn end_address(&self) -> usize {
        match self {
            Self::Whole(bytes) => bytes.as_ptr_range().end.addr(),
            Self::Split(split) => split.tail.as_ptr_range().end.addr(),
        }
    }

    /// Removes the first bytes, which have been written.
    ///
    /// # Panics
    ///
    /// If it is shorter than `written`.
    pub fn advance(&mut self, written: usize) {
        match self {
            Self::Whole(bytes) => bytes.advance(written),
            Self::Split(split) => {
                let of_head = written.min(split.head.len());
                split.head.advance(of_head);
                split.tail.advance(written - of_head);
            }
        }
    }

    /// Its bytes in one piece, copied if there are two.
    pub fn into_bytes(self) -> Bytes {
        match self {
            Self::Whole(bytes) => bytes,
            Self::Split(split) if split.head.is_empty() => split.tail,
            Self::Split(split) => {
                let mut bytes = BytesMut::with_capacity(split.head.len() + split.tail.len());
                bytes.extend_from_slice(&split.head);
                bytes.extend_from_slice(&split.tail);
                bytes.freeze()
            }
        }
    }
}

impl From<Bytes> for Frame {
    fn from(bytes: Bytes) -> Self {
        Self::Whole(bytes)
    }
}
