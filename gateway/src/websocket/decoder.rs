//! Decodes a client's bytes into events.

use bytes::Bytes;

use super::{
    CloseFrame, ProtocolError, deflate,
    frame::{ClientHeader, ControlKind, FrameKind, MAX_CONTROL_PAYLOAD, MessageKind, OpenMessage},
    utf8,
};

/// Decodes what one client sends, however the stream is split into reads.
///
/// Between messages it takes 16 bytes and no heap. It keeps an incomplete frame or message in a box, which
/// grows with the received bytes and never by an announced length.
///
/// After a close frame or an error, it ignores all further input (§5.5.1, §7.1.7).
#[derive(Debug, Default)]
pub struct Decoder {
    partial: Option<Box<Partial>>,
    /// Whether the client may compress messages.
    deflate: bool,
    ended: bool,
}

impl Decoder {
    /// A decoder at the start of a connection.
    pub const fn new() -> Self {
        Self { partial: None, deflate: false, ended: false }
    }

    /// Accepts compressed messages from now on, as negotiated in the handshake (RFC 7692).
    pub fn allow_deflate(&mut self) {
        self.deflate = true;
    }

    /// Decodes `input`, which is unmasked in place.
    ///
    /// `max_message` is the largest accepted message, in bytes. It applies to the *announced* length when a
    /// frame begins, including the fragments before it, and to a compressed message while it is inflated.
    pub fn feed<'a>(&'a mut self, input: &'a mut [u8], max_message: usize) -> Feed<'a> {
        Feed { decoder: self, input, max_message, read: 0 }
    }

    /// Bytes on the heap: 0 between messages.
    pub fn heap_bytes(&self) -> usize {
        self.partial.as_ref().map_or(0, |partial| {
            size_of::<Partial>() + partial.message.as_ref().map_or(0, |message| message.bytes.capacity())
        })
    }
}

/// One input while a [`Decoder`] processes it.
///
/// Call [`next`](Self::next) until it returns `Ok(None)` or an error. If a `Feed` is dropped before that, the
/// decoder loses the rest of the input.
#[must_use = "the input is decoded by `next`; dropping it unread loses a part of the stream"]
#[derive(Debug)]
pub struct Feed<'a> {
    decoder: &'a mut Decoder,
    /// The input not processed yet.
    input: &'a mut [u8],
    max_message: usize,
    /// Bytes processed since the last event.
    read: usize,
}

/// What a client sent. A fragmented message is a single event.
#[derive(Debug)]
pub enum Event<'a> {
    /// A text message; its bytes are verified UTF-8.
    Text(Payload<'a>),
    /// A binary message.
    Binary(Payload<'a>),
    /// A ping. Answer it with a [`pong`](super::pong) with the same payload.
    Ping(&'a [u8]),
    /// A pong, solicited or not.
    Pong(&'a [u8]),
    /// The client closes; `None` if it gave no code. No event follows.
    Close(Option<CloseFrame<'a>>),
}

/// A message's bytes.
#[derive(Debug)]
pub enum Payload<'a> {
    /// The message was contiguous in the input.
    Borrowed(&'a [u8]),
    /// The message was assembled from pieces, or inflated.
    Owned(Vec<u8>),
}

impl Payload<'_> {
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes,
            Self::Owned(bytes) => bytes,
        }
    }

    /// The bytes as an owned value. Copies only borrowed bytes.
    pub fn into_bytes(self) -> Bytes {
        match self {
            Self::Borrowed(bytes) => Bytes::copy_from_slice(bytes),
            Self::Owned(bytes) => Bytes::from(bytes),
        }
    }
}

impl Feed<'_> {
    /// The next event; `None` when the input is used up. The decoder keeps what is incomplete.
    #[expect(
        clippy::should_implement_trait,
        reason = "an event borrows from the feed; an iterator's item cannot"
    )]
    pub fn next(&mut self) -> Result<Option<Event<'_>>, ProtocolError> {
        self.next_paid(&mut |_| true).map(|event| event.map(|(event, _)| event))
    }

    /// Like [`next`](Self::next), together with the number of bytes of this input that were processed for the
    /// event: those of its frames, as far as they came in this input.
    ///
    /// `pay` receives the inflated size of a compressed message, a part at a time while the message is
    /// inflated. If it returns false, the message must end there; if it goes on, the result is
    /// [`ProtocolError::NotPaidFor`].
    pub fn next_paid(
        &mut self,
        pay: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Option<(Event<'_>, usize)>, ProtocolError> {
        loop {
            let before = self.input.len();
            let step = self.step(pay);
            self.read += before - self.input.len();
            let event = match step {
                Ok(Step::Continue) => continue,
                Ok(Step::Drained) => return Ok(None),
                Ok(Step::Message(MessageKind::Text, payload)) => Event::Text(payload),
                Ok(Step::Message(MessageKind::Binary, payload)) => Event::Binary(payload),
                Ok(Step::Control(kind, payload)) => {
                    self.decoder.ended = kind == ControlKind::Close;
                    control_event(kind, payload)?
                }
                Ok(Step::KeptControl(kind)) => {
                    self.decoder.ended = kind == ControlKind::Close;
                    let partial = self.decoder.partial.as_ref().expect("it holds the completed payload");
                    control_event(kind, partial.control.as_slice())?
                }
                Err(error) => {
                    *self.decoder = Decoder { ended: true, ..Decoder::new() };
                    return Err(error);
                }
            };
            return Ok(Some((event, std::mem::take(&mut self.read))));
        }
    }

    /// Bytes of this input that were processed but belong to no event yet.
    pub fn unfinished(&self) -> usize {
        self.read
    }
}

fn control_event(kind: ControlKind, payload: &[u8]) -> Result<Event<'_>, ProtocolError> {
    Ok(match kind {
        ControlKind::Ping => Event::Ping(payload),
        ControlKind::Pong => Event::Pong(payload),
        ControlKind::Close => Event::Close(CloseFrame::parse(payload)?),
    })
}

/// The result of one step through the input.
enum Step<'a> {
    /// Some input was processed; there may be more.
    Continue,
    /// The input is used up.
    Drained,
    Message(MessageKind, Payload<'a>),
    /// A control frame that was contiguous in the input.
    Control(ControlKind, &'a [u8]),
    /// A control frame that arrived in pieces. Its payload is in [`Partial::control`].
    KeptControl(ControlKind),
}

impl<'a> Feed<'a> {
    /// Processes one frame, or the part of one that has arrived.
    fn step(&mut self, pay: &mut dyn FnMut(usize) -> bool) -> Result<Step<'a>, ProtocolError> {
        // The event of the step before is no longer borrowed, so its data can be freed.
        if self.decoder.ended || self.decoder.partial.as_ref().is_some_and(|partial| partial.is_done()) {
            self.decoder.partial = None;
        }
        if self.decoder.ended {
            self.input = &mut [];
        }
        if self.input.is_empty() {
            return Ok(Step::Drained);
        }
        if let Some(partial) = &mut self.decoder.partial
            && let Some(frame) = partial.frame.take()
        {
            let piece = take(&mut self.input, frame.length);
            return partial.take_piece(frame, piece, self.max_message, pay);
        }

        let Some(mut header) = self.header()? else { return Ok(Step::Drained) };
        let payload = take(&mut self.input, header.length);
        let whole = payload.len() == header.length;
        match header {
            ClientHeader { kind: FrameKind::Control(kind), .. } if whole => {
                header.mask.apply(payload);
                Ok(Step::Control(kind, payload))
            }
            ClientHeader { kind: FrameKind::First(kind), fin: true, .. } if whole => {
                header.mask.apply(payload);
                let payload = if header.compressed {
                    Payload::Owned(deflate::inflated(payload, self.max_message, pay)?)
                } else {
                    Payload::Borrowed(payload)
                };
                if kind == MessageKind::Text {
                    utf8::verify(payload.as_slice())?;
                }
                Ok(Step::Message(kind, payload))
            }
            _ => {
                let partial = self.decoder.partial.get_or_insert_default();
                partial.begin(&header);
                partial.take_piece(header, payload, self.max_message, pay)
            }
        }
    }

    /// Parses the header at the start of the input, continuing an incomplete one. `None` if it is still
    /// incomplete; its bytes are then kept.
    fn header(&mut self) -> Result<Option<ClientHeader>, ProtocolError> {
        let (most, deflate) = (self.max_message, self.decoder.deflate);
        let Some(partial) = &mut self.decoder.partial else {
            // The common case: nothing is kept, and the whole header is in the input.
            if let Some((header, size)) = ClientHeader::parse(self.input, None, most, deflate)? {
                take(&mut self.input, size);
                return Ok(Some(header));
            }
            let partial = self.decoder.partial.insert(Box::default());
            partial.header.extend(take(&mut self.input, ClientHeader::MAX_BYTES));
            return Ok(None);
        };
        let kept = partial.header.length;
        partial.header.extend(self.input);
        let open = partial
            .message
            .as_ref()
            .map(|message| OpenMessage { bytes: message.bytes.len(), compressed: message.compressed });
        if let Some((header, size)) = ClientHeader::parse(partial.header.as_slice(), open, most, deflate)? {
            partial.header.length = 0;
            take(&mut self.input, size - kept);
            Ok(Some(header))
        } else {
            // An incomplete header is shorter than the buffer, so the buffer holds all of the input.
            self.input = &mut [];
            Ok(None)
        }
    }
}

/// Splits off the first `count` bytes of `input`, or all if there are fewer.
#[expect(clippy::mut_mut, reason = "the slice itself is moved forward")]
fn take<'a>(input: &mut &'a mut [u8], count: usize) -> &'a mut [u8] {
    let count = count.min(input.len());
    input.split_off_mut(..count).unwrap_or_default()
}

/// The state of incomplete frames and messages.
#[derive(Debug, Default)]
struct Partial {
    /// The start of a header.
    header: Buffer<{ ClientHeader::MAX_BYTES }>,
    /// The frame whose payload is arriving.
    frame: Option<ClientHeader>,
    /// The message whose frames are arriving. Control frames may be interleaved with them.
    message: Option<Message>,
    /// The payload of a control frame that is arriving in pieces.
    control: Buffer<MAX_CONTROL_PAYLOAD>,
}

impl Partial {
    /// Whether nothing is incomplete.
    fn is_done(&self) -> bool {
        self.header.length == 0 && self.frame.is_none() && self.message.is_none()
    }

    /// Prepares for a frame's payload.
    fn begin(&mut self, header: &ClientHeader) {
        match header.kind {
            FrameKind::First(kind) => {
                let compressed = header.compressed;
                self.message = Some(Message { kind, compressed, bytes: Vec::new(), verified: 0 });
            }
            FrameKind::Continuation => {}
            FrameKind::Control(_) => self.control.length = 0,
        }
    }

    /// Processes the next `piece` of the payload of `frame`, which is still masked.
    fn take_piece<'a>(
        &mut self,
        mut frame: ClientHeader,
        piece: &mut [u8],
        max_message: usize,
        pay: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Step<'a>, ProtocolError> {
        frame.mask.apply(piece);
        let missing = frame.length - piece.len();
        match frame.kind {
            FrameKind::Control(kind) => {
                self.control.extend(piece);
                if missing == 0 {
                    return Ok(Step::KeptControl(kind));
                }
            }
            FrameKind::First(_) | FrameKind::Continuation => {
                let message = self.message.as_mut().expect("begun by its first frame");
                let final_size = frame.fin.then_some(message.bytes.len() + frame.length);
                message.extend(piece, final_size.unwrap_or(deflate::longest(max_message)))?;
                if missing == 0 && frame.fin {
                    let message = self.message.take().expect("it was just used");
                    return message.finish(max_message, pay);
                }
            }
        }
        if missing != 0 {
            self.frame = Some(ClientHeader { length: missing, ..frame });
        }
        Ok(Step::Continue)
    }
}

/// An incomplete message.
#[derive(Debug)]
struct Message {
    kind: MessageKind,
    compressed: bool,
    bytes: Vec<u8>,
    /// How many of `bytes` are verified UTF-8. Stays 0 in a binary or compressed message.
    verified: usize,
}

impl Message {
    /// The minimum size of the first allocation, unless the message is smaller. Avoids the smallest steps for
    /// clients that send byte by byte.
    const FIRST_CAPACITY: usize = 64;

    /// Appends `piece`. The complete message has at most `ceiling` bytes.
    fn extend(&mut self, piece: &[u8], ceiling: usize) -> Result<(), ProtocolError> {
        let needed = self.bytes.len() + piece.len();
        if needed > self.bytes.capacity() {
            // Doubling keeps byte-wise input linear; the ceiling keeps the capacity within the limit.
            let doubled = self.bytes.capacity().saturating_mul(2).max(Self::FIRST_CAPACITY);
            let capacity = doubled.min(ceiling).max(needed);
            self.bytes.reserve_exact(capacity - self.bytes.len());
        }
        self.bytes.extend_from_slice(piece);
        if self.kind == MessageKind::Text && !self.compressed {
            self.verified = utf8::verify_more(&self.bytes, self.verified)?;
        }
        Ok(())
    }

    fn finish<'a>(
        self,
        max_message: usize,
        pay: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Step<'a>, ProtocolError> {
        if self.compressed {
            let bytes = deflate::inflated(&self.bytes, max_message, pay)?;
            if self.kind == MessageKind::Text {
                utf8::verify(&bytes)?;
            }
            return Ok(Step::Message(self.kind, Payload::Owned(bytes)));
        }
        if self.kind == MessageKind::Text && self.verified != self.bytes.len() {
            return Err(ProtocolError::InvalidUtf8);
        }
        Ok(Step::Message(self.kind, Payload::Owned(self.bytes)))
    }
}

/// An inline buffer of up to `N` bytes.
#[derive(Debug)]
struct Buffer<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Default for Buffer<N> {
    fn default() -> Self {
        Self { bytes: [0; N], length: 0 }
    }
}

impl<const N: usize> Buffer<N> {
    fn as_slice(&self) -> &[u8] {
        self.bytes.split_at(self.length).0
    }

    /// Appends as much of `more` as fits.
    fn extend(&mut self, more: &[u8]) {
        for (place, &byte) in self.bytes.iter_mut().skip(self.length).zip(more) {
            *place = byte;
            self.length += 1;
        }
    }
}
