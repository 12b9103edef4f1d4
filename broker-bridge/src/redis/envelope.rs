//! The encoding of a publication as one Redis message.
//!
//! A topic carries two kinds of messages: *raw* ones, the bare payload, which any program sends with `PUBLISH`, and
//! *envelopes*, which nodes send when there is metadata. Either may follow a [`head`], which tells the place in the room's
//! log. The log has the same messages without heads.
//!
//! # Layout of an envelope
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 3 | magic `F5 54 67`. `F5` never occurs in UTF-8, so no text is ever taken for an envelope |
//! | 3 | 1 | version, `01` |
//! | 4 | 2 | length `n` of all fields together, big endian |
//! | 6 | `n` | fields, each: tag (1 byte), length (1 byte), value. Tags ascend strictly |
//! | 6 + `n` | 4 | length of the data, big endian |
//! | 10 + `n` | rest | the data, up to the very end of the message |
//!
//! | tag | field | value |
//! |---|---|---|
//! | 1 | kind, always present | 1 byte: 0 JSON, 1 text, 2 binary |
//! | 2 | event | 1 to 64 bytes, an [`EventName`] |
//! | 3 | publisher's user | 1 to 255 bytes of UTF-8 without control characters; only together with 4 |
//! | 4 | publisher's session | 16 bytes, big endian |
//! | 5 | excluded session | 16 bytes, big endian |
//!
//! # Rolling deploys
//!
//! A field with an unknown tag is skipped, so a newer node may add optional fields. A change that an older node must
//! not ignore needs a new version and two deploys: one that reads it, then one that writes it. This reader takes
//! anything but version 1 for raw bytes.
//!
//! # Raw stays raw
//!
//! Bytes are an envelope only if every length, tag and value above is right to the last byte; anything else
//! is delivered as raw bytes, text if it is UTF-8 and binary if not. A node leaves the envelope out
//! when the raw bytes would be read back as the identical publication: no metadata, and either text, or
//! binary that is not UTF-8 and does not begin with the first byte of the magic. JSON and UTF-8 declared
//! binary need one.
//!
//! # Trust
//!
//! Whoever may publish to a topic may also write envelopes. Fields that could do harm beyond the topic's own room are
//! checked. Data declared as JSON that is not JSON ([`Data::json`]) becomes text, because protocols copy JSON into
//! their frames unchanged. A reserved event name is dropped. The publisher, the excluded session and the place are not
//! verified: permission to `PUBLISH` is trust within the room.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes};

use super::head;
use crate::{Data, DataKind, EventName, InvalidEventName, Place, Publication, Publisher, SessionId};

/// The most that a head and an envelope of this version add to the payload, in bytes.
pub(super) const MAX_WRAPPING: usize = head::MAX_BYTES + MAX_OVERHEAD;

/// The most that an envelope of this version adds to the payload, in bytes.
const MAX_OVERHEAD: usize = FIXED_BYTES
    + field_bytes(1)
    + field_bytes(EventName::MAX_BYTES)
    + field_bytes(MAX_USER_BYTES)
    + 2 * field_bytes(SESSION_BYTES);

/// A publication as it goes to Redis: a header, which is empty for a raw message, and then the data.
#[derive(Debug)]
pub(super) struct Encoded<'a> {
    publication: &'a Publication,
    user: Option<&'a str>,
    /// The length of all fields together. Zero means raw: an envelope has at least its kind.
    fields: usize,
}

/// Encodes `publication`, raw where no envelope is needed.
pub(super) fn encode(publication: &Publication) -> Encoded<'_> {
    if is_said_raw(publication) {
        Encoded { publication, user: None, fields: 0 }
    } else {
        enveloped(publication)
    }
}

fn enveloped(publication: &Publication) -> Encoded<'_> {
    let Publication { event, publisher, exclude, .. } = publication;
    // Any other user breaks the contract of `Publisher`. No user is better than a wrong one.
    let user = publisher.as_ref().and_then(|by| by.user.as_deref()).filter(|user| is_user(user));
    let fields = field_bytes(1)
        + event.as_ref().map_or(0, |event| field_bytes(event.as_str().len()))
        + user.map_or(0, |user| field_bytes(user.len()))
        + publisher.as_ref().map_or(0, |_| field_bytes(SESSION_BYTES))
        + exclude.map_or(0, |_| field_bytes(SESSION_BYTES));
    Encoded { publication, user, fields }
}

impl<'a> Encoded<'a> {
    /// The payload.
    pub(super) fn data(&self) -> &'a Bytes {
        self.publication.data.bytes()
    }

    /// How many bytes precede the payload.
    pub(super) fn header_bytes(&self) -> usize {
        if self.fields == 0 { 0 } else { FIXED_BYTES + self.fields }
    }

    /// Appends what precedes the payload: [`header_bytes`](Self::header_bytes) bytes.
    pub(super) fn put_header(&self, out: &mut impl BufMut) {
        if self.fields == 0 {
            return;
        }
        let Publication { data, event, publisher, exclude } = self.publication;
        out.put_slice(&MAGIC);
        out.put_u8(VERSION);
        out.put_u16(u16::try_from(self.fields).expect("five fields of at most 257 bytes"));
        let kind = match data.kind() {
            DataKind::Json => 0,
            DataKind::Text => 1,
            DataKind::Binary => 2,
        };
        put(out, KIND, &[kind]);
        if let Some(event) = event {
            put(out, EVENT, event.as_str().as_bytes());
        }
        if let Some(user) = self.user {
            put(out, USER, user.as_bytes());
        }
        if let Some(Publisher { session, .. }) = publisher {
            put(out, SESSION, &session.0.to_be_bytes());
        }
        if let Some(session) = exclude {
            put(out, EXCLUDE, &session.0.to_be_bytes());
        }
        // Redis limits strings to 512 MiB, so the length fits.
        out.put_u32(u32::try_from(data.bytes().len()).unwrap_or(u32::MAX));
    }
}

/// Decodes one message of a log, or one message of Redis without regard to its place.
pub(super) fn decode(message: Bytes) -> Publication {
    decode_with_place(message).0
}

/// Decodes one Redis message: the publication, and its place if it was recorded. Never fails: every sequence of bytes is a
/// publication.
pub(super) fn decode_with_place(mut message: Bytes) -> (Publication, Option<Place>) {
    let (head, place) = head::read(&message);
    message.advance(head);
    (open(&message).unwrap_or_else(|| Publication::new(Data::detect(message))), place)
}

const MAGIC: [u8; 3] = [0xF5, b'T', b'g'];
const VERSION: u8 = 1;
/// Magic, version and both lengths.
const FIXED_BYTES: usize = 3 + 1 + 2 + 4;
const MAX_USER_BYTES: usize = 255;
const SESSION_BYTES: usize = 16;

const KIND: u8 = 1;
const EVENT: u8 = 2;
const USER: u8 = 3;
const SESSION: u8 = 4;
const EXCLUDE: u8 = 5;

fn is_said_raw(publication: &Publication) -> bool {
    let Publication { data, event: None, publisher: None, exclude: None } = publication else { return false };
    match data.kind() {
        DataKind::Json => false,
        DataKind::Text => true,
        DataKind::Binary => {
            data.bytes().first() != MAGIC.first() && std::str::from_utf8(data.bytes()).is_err()
        }
    }
}

fn put(out: &mut impl BufMut, tag: u8, value: &[u8]) {
    out.put_u8(tag);
    out.put_u8(u8::try_from(value.len()).expect("no field is longer than 255 bytes"));
    out.put_slice(value);
}

/// The size of a field with a value of `length` bytes.
const fn field_bytes(length: usize) -> usize {
    2 + length
}

/// Decodes an envelope; `None` if any byte does not fit.
fn open(message: &Bytes) -> Option<Publication> {
    let rest = message.strip_prefix(&MAGIC)?.strip_prefix(&[VERSION])?;
    let (length, rest) = rest.split_first_chunk::<2>()?;
    let (mut fields, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
    let (length, data) = rest.split_first_chunk::<4>()?;
    if u32::from_be_bytes(*length) as usize != data.len() {
        return None;
    }

    let (mut kind, mut event, mut user, mut session, mut exclude) = (None, None, None, None, None);
    let mut last_tag = 0;
    while let Some((&tag, rest)) = fields.split_first() {
        let (&length, rest) = rest.split_first()?;
        let (value, rest) = rest.split_at_checked(usize::from(length))?;
        if tag <= last_tag {
            return None;
        }
        last_tag = tag;
        fields = rest;
        match tag {
            KIND => kind = Some(read_kind(value)?),
            EVENT => event = read_event(value)?,
            USER => user = Some(Arc::from(std::str::from_utf8(value).ok().filter(|user| is_user(user))?)),
            SESSION => session = Some(read_session(value)?),
            EXCLUDE => exclude = Some(read_session(value)?),
            _ => {}
        }
    }
    let publisher = match (user, session) {
        (user, Some(session)) => Some(Publisher { user, session }),
        (None, None) => None,
        (Some(_), None) => return None,
    };
    let data = read_data(kind?, message.slice_ref(data))?;
    Some(Publication { data, event, publisher, exclude })
}

fn read_kind(value: &[u8]) -> Option<DataKind> {
    match value {
        [0] => Some(DataKind::Json),
        [1] => Some(DataKind::Text),
        [2] => Some(DataKind::Binary),
        _ => None,
    }
}

fn read_data(kind: DataKind, bytes: Bytes) -> Option<Data> {
    let kind_it_is = if kind == DataKind::Json { DataKind::Text } else { kind };
    Data::declare(kind, bytes.clone()).or_else(|| Data::declare(kind_it_is, bytes))
}

/// The event name, or `None` if it is reserved.
#[expect(clippy::option_option, reason = "no event, or no envelope")]
fn read_event(value: &[u8]) -> Option<Option<EventName>> {
    match EventName::new(std::str::from_utf8(value).ok()?) {
        Ok(event) => Some(Some(event)),
        Err(InvalidEventName::Reserved) => Some(None),
        Err(InvalidEventName::Malformed) => None,
    }
}

fn is_user(user: &str) -> bool {
    (1..=MAX_USER_BYTES).contains(&user.len()) && !user.chars().any(char::is_control)
}

fn read_session(value: &[u8]) -> Option<SessionId> {
    Some(SessionId(u128::from_be_bytes(value.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, option, prelude::*};

    use super::*;

    fn written(publication: &Publication) -> Bytes {
        [&put_header(&encode(publication))[..], publication.data.bytes()].concat().into()
    }

    /// The header of an envelope, needed or not.
    fn header(publication: &Publication) -> Vec<u8> {
        put_header(&enveloped(publication))
    }

    fn put_header(encoded: &Encoded<'_>) -> Vec<u8> {
        let mut header = Vec::new();
        encoded.put_header(&mut header);
        assert_eq!(header.len(), encoded.header_bytes());
        header
    }

    fn data() -> impl Strategy<Value = Data> {
        prop_oneof![
            json().prop_map(|json| Data::json(json).unwrap()),
            ".{0,40}".prop_map(Data::text),
            ".{0,40}".prop_map(|text| Data::binary(text.into_bytes())),
            vec(any::<u8>(), 0..200).prop_map(Data::binary),
            // Payloads that look like what this module writes.
            vec(any::<u8>(), 0..40).prop_map(|tail| Data::binary([&MAGIC[..], &[VERSION], &tail].concat())),
            vec(any::<u8>(), 0..9).prop_map(|inner| {
                let inner =
                    Publication { exclude: Some(SessionId(1)), ..Publication::new(Data::binary(inner)) };
                Data::binary(written(&inner))
            }),
        ]
    }

    fn heads() -> impl Strategy<Value = Vec<u8>> {
        ("[0-9]{1,20}-[0-9]{1,20}", option::of("[um] [0-9]{1,20}-[0-9]{1,20}"), "( [ -~]{0,99})?").prop_map(
            |(id, link, other)| {
                let link = link.map_or_else(String::new, |link| format!(" {link}"));
                [b"\xF5Th", format!("{id}{link}{other}\n").as_bytes()].concat()
            },
        )
    }

    fn json() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            ".{0,20}".prop_map(|text| serde_json::to_string(&text).unwrap()),
            any::<i64>().prop_map(|number| number.to_string()),
            Just("null".to_owned()),
        ];
        leaf.prop_recursive(4, 16, 4, |inner| {
            vec(inner, 0..4).prop_map(|items| {
                let members = items.iter().enumerate().map(|(n, item)| format!("\"{n}\" : {item}"));
                format!("[[{}],\n{{{}}}]", items.join(","), members.collect::<Vec<_>>().join(","))
            })
        })
    }

    fn publication() -> impl Strategy<Value = Publication> {
        let user = option::of("\\PC{1,60}").prop_map(|user| user.map(Arc::from));
        let publisher =
            (user, any::<u128>()).prop_map(|(user, session)| Publisher { user, session: SessionId(session) });
        let event = "\\PC{1,16}".prop_map(|event| EventName::new(&event).unwrap());
        (data(), option::of(event), option::of(publisher), option::of(any::<u128>())).prop_map(
            |(data, event, publisher, exclude)| Publication {
                data,
                event,
                publisher,
                exclude: exclude.map(SessionId),
            },
        )
    }

    proptest! {
        #[test]
        fn envelopes_read_back_identical(publication in publication()) {
            let bytes = written(&publication);
            prop_assert!(bytes.len() <= publication.data.bytes().len() + MAX_OVERHEAD);
            prop_assert_eq!(decode(bytes), publication);
        }

        #[test]
        fn bytes_without_the_magic_stay_raw(bytes in vec(any::<u8>(), 0..100)) {
            prop_assume!(!bytes.starts_with(&MAGIC) && head::read(&bytes).0 == 0);
            let bytes = Bytes::from(bytes);
            prop_assert_eq!(decode(bytes.clone()), Publication::new(Data::detect(bytes)));
        }

        #[test]
        fn messages_after_a_head_are_decoded_unchanged(
            publication in publication(), junk in vec(any::<u8>(), 0..60), head in heads()
        ) {
            for inner in [written(&publication), header(&publication).into(), junk.into()] {
                let headed = Bytes::from([head.as_slice(), &inner[..]].concat());
                prop_assert_eq!(decode(headed), decode(inner));
            }
        }

        #[test]
        fn no_envelope_can_be_read_as_a_head(publication in publication(), head in heads()) {
            prop_assert_eq!(head::read(&written(&publication)), (0, None));
            for kind in [DataKind::Json, DataKind::Text, DataKind::Binary] {
                let Some(data) = Data::declare(kind, head.clone().into()) else { continue };
                let publication = Publication::new(data);
                prop_assert_eq!(decode(written(&publication)), publication);
            }
        }

        #[test]
        fn an_envelope_cut_short_or_grown_is_raw(publication in publication(), tail in vec(any::<u8>(), 1..9), cut: prop::sample::Index) {
            let whole = header(&publication);
            let whole = Bytes::from([&whole, &publication.data.bytes()[..]].concat());
            let short = whole.slice(..cut.index(whole.len()));
            prop_assert_eq!(decode(short.clone()), Publication::new(Data::detect(short)));
            let grown = Bytes::from([&whole[..], &tail].concat());
            prop_assert_eq!(decode(grown.clone()), Publication::new(Data::detect(grown)));
        }

        #[test]
        fn a_damaged_envelope_never_panics_and_loses_no_byte(publication in publication(), at: prop::sample::Index, byte: u8) {
            let mut bytes = [header(&publication), publication.data.bytes().to_vec()].concat();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let bytes = Bytes::from(bytes);
            let decoded = decode(bytes.clone());
            prop_assert!(bytes.ends_with(decoded.data.bytes()));
        }

        #[test]
        fn fields_of_a_newer_node_are_skipped(publication in publication(), tag in 6u8.., value in vec(any::<u8>(), 0..255)) {
            let mut bytes = header(&publication);
            let length = usize::from(u16::from_be_bytes([bytes[4], bytes[5]]));
            let field = [&[tag, u8::try_from(value.len()).unwrap()], &value[..]].concat();
            let fields = u16::try_from(length + field.len()).unwrap().to_be_bytes();
            bytes[4..6].copy_from_slice(&fields);
            bytes.splice(6 + length..6 + length, field);
            bytes.extend_from_slice(publication.data.bytes());
            prop_assert_eq!(decode(bytes.into()), publication);
        }
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let publication = Publication {
            data: Data::binary(&b"hi"[..]),
            event: Some(EventName::new("ping").unwrap()),
            publisher: Some(Publisher { user: Some("al".into()), session: SessionId(1) }),
            exclude: Some(SessionId(2)),
        };
        let mut expected = b"\xF5Tg\x01\x00\x31\x01\x01\x02\x02\x04ping\x03\x02al\x04\x10".to_vec();
        expected.extend(1u128.to_be_bytes());
        expected.extend(b"\x05\x10");
        expected.extend(2u128.to_be_bytes());
        expected.extend(b"\x00\x00\x00\x02hi");
        assert_eq!(written(&publication), expected);
    }

    #[test]
    fn the_envelope_is_omitted_only_without_loss() {
        let bare = |kind, bytes: &'static [u8]| {
            let data = Data::declare(kind, Bytes::from_static(bytes)).unwrap();
            put_header(&encode(&Publication::new(data))).is_empty()
        };
        assert!(bare(DataKind::Text, b""));
        assert!(bare(DataKind::Text, b"{}"));
        assert!(bare(DataKind::Binary, b"\x00\xff"));
        assert!(!bare(DataKind::Binary, b""), "would be read as text");
        assert!(!bare(DataKind::Binary, b"abc"), "would be read as text");
        assert!(!bare(DataKind::Binary, b"\xF5\xff"), "begins like an envelope");
        assert!(!bare(DataKind::Json, b"{}"), "would be read as text");
    }

    /// An envelope as anybody may write it.
    fn envelope(fields: &[&[u8]], data: &[u8]) -> Bytes {
        let fields = fields.concat();
        let length = u16::try_from(fields.len()).unwrap().to_be_bytes();
        let size = u32::try_from(data.len()).unwrap().to_be_bytes();
        [&MAGIC[..], &[VERSION], &length, &fields, &size, data].concat().into()
    }

    /// A field of an envelope.
    fn field(tag: u8, value: &[u8]) -> Vec<u8> {
        [&[tag, u8::try_from(value.len()).unwrap()], value].concat()
    }

    #[test]
    fn data_labelled_as_invalid_json_become_text() {
        let deep = "[".repeat(30_000) + &"]".repeat(30_000);
        for data in [
            r#"{"pay":"x"}},"channel":"admin","x":{"y":1"#,
            r#"1}}},{"disconnect":{"code":3500"#,
            "{}\n{}",
            "",
            r#""\ud800""#,
            "1e999",
            &deep,
        ] {
            let event = field(EVENT, b"chat");
            let decoded = decode(envelope(&[&field(KIND, &[0]), &event], data.as_bytes()));
            assert_eq!(decoded.data, Data::text(data));
            assert_eq!(decoded.event, EventName::new("chat").ok(), "the rest is believed");
        }
        let latin = envelope(&[&field(KIND, &[0])], b"\"\xe9\"");
        assert_eq!(decode(latin.clone()), Publication::new(Data::binary(latin)), "no text either");
    }

    #[test]
    fn reserved_events_are_dropped() {
        for name in ["tidegate.gap", "error", "open"] {
            let decoded = decode(envelope(&[&field(KIND, &[1]), &field(EVENT, name.as_bytes())], b"hi"));
            assert_eq!(decoded, Publication::new(Data::text("hi")), "{name}");
        }
    }

    #[test]
    fn inconsistent_fields_are_raw() {
        let envelope = |fields: &[u8]| {
            let bytes = envelope(&[fields], b"x");
            decode(bytes.clone()) == Publication::new(Data::binary(bytes))
        };
        assert!(!envelope(&[1, 1, 1]), "the smallest envelope");
        assert!(envelope(&[]), "no kind");
        assert!(envelope(&[1, 1, 9]), "unknown kind");
        assert!(envelope(&[1, 1, 1, 1, 1, 1]), "a field twice");
        assert!(envelope(&[2, 1, b'e', 1, 1, 1]), "descending tags");
        assert!(envelope(&[1, 1, 1, 2, 0]), "an empty event");
        assert!(envelope(&[1, 1, 1, 2, 1, b'\n']), "a control character in an event");
        assert!(envelope(&[1, 1, 1, 3, 1, b'u']), "a user without a session");
        let session = field(SESSION, &[0; 16]);
        assert!(!envelope(&[&[1, 1, 1, 3, 1, b'u'], &session[..]].concat()));
        assert!(envelope(&[&[1, 1, 1, 3, 0], &session[..]].concat()), "an empty user");
        assert!(envelope(&[&[1, 1, 1, 3, 1, 7], &session[..]].concat()), "a control character in a user");
        assert!(envelope(&[1, 1, 1, 4, 1, 0]), "a short session");
        assert!(envelope(&[1, 1, 1, 9]), "a field cut short");
    }

    #[test]
    fn decoding_copies_nothing() {
        let publication =
            Publication { exclude: Some(SessionId(7)), ..Publication::new(Data::binary(vec![9; 100])) };
        let bytes = written(&publication);
        let decoded = decode(bytes.clone());
        assert!(bytes.as_ptr_range().contains(&decoded.data.bytes().as_ptr()));
    }
}
