//! What became of publications whose connection was lost before the answer.
//!
//! A connection that records publications is a *writer*: it has a name, and counts what it sends. Name and number are
//! kept in each entry of a log. After the connection is lost, the next one asks what became of the rest:
//!
//! 1. It must have reached the same run of the same server (`run_id`). Another one may lack what the old one had
//!    accepted.
//! 2. It lets the server close the old connection, which may still have commands to execute. Client IDs are never used
//!    twice in one run, so no other connection is meant.
//! 3. It asks for each room what the log has of the old writer (`tidegate_verify` in `functions.lua`).
//!
//! What is in the log was recorded at its position. What was not recorded is sent again, in the order in which it was
//! sent. The rest stays unknown, such as when the newest part of a log has been removed meanwhile.

use std::collections::HashMap;

use crate::{Cursor, RoomName, redis::resp::Value};

/// A connection that records publications.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    /// Random letters and digits.
    pub(super) name: Box<str>,
    /// The server's ID of the connection.
    client: i64,
    /// Names the run of the server.
    run: Box<[u8]>,
}

impl Writer {
    /// A name for a new connection.
    pub(super) fn new_name() -> Option<Box<str>> {
        Some(format!("{:016x}", getrandom::u64().ok()?).into())
    }

    /// `greeting`: the answer to `HELLO`; `info`: that to `INFO server`. `None` if the server hides something that is
    /// needed to verify.
    pub(super) fn new(name: &str, greeting: Option<i64>, info: &Value) -> Option<Self> {
        let Value::Text(info) = info else { return None };
        let line = info.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"run_id:"))?;
        let run = line.trim_ascii();
        (!run.is_empty()).then_some(())?;
        Some(Self { name: name.into(), client: greeting?, run: run.into() })
    }

    /// Whether both connections lead to the same run of the same server.
    pub(super) fn shares_run_with(&self, other: &Self) -> bool {
        self.run == other.run
    }

    /// The command that closes the connection, if the server still has it.
    pub(super) fn kill(&self) -> Vec<Vec<u8>> {
        let id = self.client.to_string().into_bytes();
        vec![b"CLIENT".to_vec(), b"KILL".to_vec(), b"ID".to_vec(), id]
    }
}

/// The server's ID of a connection, in the answer to `HELLO`.
pub(super) fn client_id(greeting: &Value) -> Option<i64> {
    let Value::List(pairs) = greeting else { return None };
    pairs.chunks_exact(2).find_map(|pair| match pair {
        [Value::Text(key), Value::Integer(id)] if key == b"id" => Some(*id),
        _ => None,
    })
}

/// What became of one publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It was recorded at this position.
    Recorded(Cursor),
    /// Nothing was done.
    Missing,
    /// Nobody can tell.
    Unknown,
}

/// What a log has of a writer.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// The highest number that the writer has published in any room, if that is known.
    last: Option<u64>,
    /// The log has everything that was recorded after an earlier publication of the writer.
    reaches_back: bool,
    /// The log has all of its messages.
    is_whole: bool,
    found: HashMap<u64, Cursor>,
}

impl Verdict {
    /// From the answer to `tidegate_verify`.
    pub(super) fn parse(answer: &Value) -> Option<Self> {
        let Value::List(parts) = answer else { return None };
        let (head, found) = parts.split_at_checked(2)?;
        let [Value::Integer(last), Value::Integer(reach)] = head else { return None };
        let entry = |pair: &[Value]| match pair {
            [Value::Integer(number), Value::Text(cursor)] => {
                Some((u64::try_from(*number).ok()?, std::str::from_utf8(cursor).ok()?.parse().ok()?))
            }
            _ => None,
        };
        Some(Self {
            last: u64::try_from(*last).ok(),
            reaches_back: *reach == 1,
            is_whole: *reach == 2,
            found: found.chunks(2).map(entry).collect::<Option<_>>()?,
        })
    }

    /// What became of the publication with this number.
    pub(super) fn of(&self, number: u64) -> Fate {
        match (self.found.get(&number), self.last) {
            (Some(cursor), _) => Fate::Recorded(*cursor),
            (None, Some(last)) if number > last => Fate::Missing,
            // It was executed. A whole log proves nothing: it may have been deleted since, and have begun anew.
            (None, Some(_)) if self.reaches_back => Fate::Missing,
            (None, None) if self.reaches_back || self.is_whole => Fate::Missing,
            (None, _) => Fate::Unknown,
        }
    }
}

/// What the logs have of a writer.
#[derive(Debug, Default)]
pub(super) struct Verdicts(HashMap<RoomName, Verdict>);

impl Verdicts {
    pub(super) fn insert(&mut self, room: RoomName, verdict: Verdict) {
        self.0.insert(room, verdict);
    }

    pub(super) fn of(&self, room: &RoomName, number: u64) -> Fate {
        self.0.get(room).map_or(Fate::Unknown, |verdict| verdict.of(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Value {
        Value::Text(text.as_bytes().to_vec())
    }

    fn verdict(last: i64, reach: i64, found: &[(i64, &str)]) -> Verdict {
        let mut parts = vec![Value::Integer(last), Value::Integer(reach)];
        parts.extend(found.iter().flat_map(|(number, cursor)| [Value::Integer(*number), text(cursor)]));
        Verdict::parse(&Value::List(parts)).unwrap()
    }

    #[test]
    fn only_what_is_proven_to_be_missing_is_missing() {
        let at = |offset| Fate::Recorded(Cursor { epoch: 5, offset });
        for (verdict, number, fate) in [
            (verdict(7, 0, &[(7, "5-3"), (6, "5-2")]), 6, at(2)),
            (verdict(7, 0, &[(7, "5-3")]), 8, Fate::Missing),
            (verdict(0, 0, &[]), 1, Fate::Missing),
            // It was executed, and the log does not have it: refused, or removed.
            (verdict(7, 0, &[(7, "5-3")]), 6, Fate::Unknown),
            (verdict(7, 2, &[(7, "5-3")]), 6, Fate::Unknown),
            (verdict(7, 1, &[(7, "5-3")]), 6, Fate::Missing),
            // The library was loaded in between.
            (verdict(-1, 0, &[(7, "5-3")]), 8, Fate::Unknown),
            (verdict(-1, 1, &[(7, "5-3")]), 8, Fate::Missing),
            (verdict(-1, 2, &[]), 8, Fate::Missing),
        ] {
            assert_eq!(verdict.of(number), fate, "{number} by {verdict:?}");
        }
        assert_eq!(Verdicts::default().of(&RoomName::new("r").unwrap(), 1), Fate::Unknown);
        for answer in [text("x"), Value::List(vec![]), Value::List(vec![Value::Integer(1), text("1")])] {
            assert!(Verdict::parse(&answer).is_none(), "{answer:?}");
        }
    }

    #[test]
    fn a_writer_needs_a_client_id_and_a_run_id() {
        let info = text("# Server\r\nredis_version:7.0.15\r\nrun_id:0a1b\r\ntcp_port:1\r\n");
        let writer = Writer::new("w", Some(7), &info).unwrap();
        assert_eq!(writer.kill().concat(), b"CLIENTKILLID7");
        assert!(writer.shares_run_with(&Writer::new("x", Some(9), &info).unwrap()));
        assert!(!writer.shares_run_with(&Writer::new("x", Some(9), &text("run_id:0a1c\r\n")).unwrap()));
        assert!(Writer::new("w", None, &info).is_none());
        for hidden in ["", "run_id:\r\n", "tcp_port:1\r\n"] {
            assert!(Writer::new("w", Some(7), &text(hidden)).is_none());
        }
        let greeting = Value::List(vec![text("proto"), Value::Integer(3), text("id"), Value::Integer(7)]);
        assert_eq!(client_id(&greeting), Some(7));
        assert_eq!(client_id(&Value::Null), None);
    }
}
