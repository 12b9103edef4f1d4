//! Texts that arrive as one at a client that catches up: pieces of one longer text, such as the tokens of an answer.

use std::sync::Arc;

use broker_bridge::{Cursor, Data, DataKind, Publication, Publisher};

use crate::{
    budget::{Budget, Consumer},
    framing::Broadcast,
    hub::log::Item,
};

/// The most bytes that are joined.
const MOST: usize = 16 * 1024;

type Numbered = (u64, Item<Arc<Broadcast>>);

/// Consecutive texts that follow each other in the log.
struct Run {
    /// The number of the first.
    number: u64,
    broadcasts: Vec<Arc<Broadcast>>,
    /// The position of the last.
    position: Cursor,
    bytes: usize,
}

/// Joins consecutive texts with a position, the same event and the same publisher. Each result has the number of its
/// first publication and the position of its last. Nothing is joined across a gap, or across a publication without a
/// position.
///
/// Some protocols pass text that is JSON as a JSON value and other text as a string. What is joined arrives as its parts
/// do live. So text that is JSON by itself, such as `1`, is not joined, and joined text is always a string.
pub fn join(items: Vec<Numbered>, budget: &Arc<Budget>) -> Vec<Numbered> {
    let mut joined = Vec::new();
    let mut run: Option<Run> = None;
    for (number, item) in items {
        match item {
            Item::Publication(broadcast, Some(position)) if may_join(&broadcast) => {
                if let Some(run) = &mut run
                    && run.takes(&broadcast)
                {
                    run.bytes += broadcast.payload_len();
                    run.broadcasts.push(broadcast);
                    run.position = position;
                    continue;
                }
                joined.extend(run.take().map(|run| run.finish(budget)));
                let bytes = broadcast.payload_len();
                run = Some(Run { number, broadcasts: vec![broadcast], position, bytes });
            }
            other => {
                joined.extend(run.take().map(|run| run.finish(budget)));
                joined.push((number, other));
            }
        }
    }
    joined.extend(run.map(|run| run.finish(budget)));
    joined
}

fn may_join(broadcast: &Broadcast) -> bool {
    let data = &broadcast.publication().data;
    data.kind() == DataKind::Text && broadcast.exclude().is_none() && !data.is_json()
}

/// Whether both are the same user. Each request over HTTP has a session of its own, so the session counts only where
/// there is no user.
fn is_same(one: Option<&Publisher>, other: Option<&Publisher>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) if one.user.is_some() => one.user == other.user,
        (one, other) => one == other,
    }
}

impl Run {
    fn takes(&self, next: &Broadcast) -> bool {
        let next = next.publication();
        self.bytes + next.data.bytes().len() <= MOST
            && self.broadcasts.first().is_some_and(|first| {
                let first = first.publication();
                first.event == next.event && is_same(first.publisher.as_ref(), next.publisher.as_ref())
            })
    }

    fn finish(self, budget: &Arc<Budget>) -> Numbered {
        let Self { number, broadcasts, position, .. } = self;
        let [first, _, ..] = broadcasts.as_slice() else {
            let only = broadcasts.into_iter().next().expect("a run has at least one publication");
            return (number, Item::Publication(only, Some(position)));
        };
        let texts = broadcasts.iter().filter_map(|broadcast| broadcast.publication().data.as_text());
        let Publication { event, publisher, .. } = first.publication().clone();
        let publication =
            Publication { event, publisher, ..Publication::new(Data::string(texts.collect::<String>())) };
        let whole = Broadcast::new(first.room().clone(), publication, 0)
            .recorded_at(Some(position))
            .counted(budget, Consumer::History);
        (number, Item::Publication(Arc::new(whole), Some(position)))
    }
}

#[cfg(test)]
mod tests {
    use broker_bridge::{EventName, GapCause, RoomName, SessionId};
    use prometheus::Registry;

    use super::*;

    fn at(offset: u64) -> Cursor {
        Cursor { epoch: 1, offset }
    }

    fn item(number: u64, publication: Publication) -> Numbered {
        let room = RoomName::new("answer").unwrap();
        let broadcast = Broadcast::new(room, publication, 0).recorded_at(Some(at(number)));
        (number, Item::Publication(Arc::new(broadcast), Some(at(number))))
    }

    fn text(text: &str) -> Publication {
        Publication::new(Data::text(text))
    }

    /// Number, payload and position of what arrives.
    fn arrives(items: Vec<Numbered>) -> Vec<(u64, String, Option<u64>)> {
        let budget = Budget::register(&Registry::new(), 1).unwrap();
        let shown = |(number, item)| match item {
            Item::Publication(broadcast, position) => {
                let broadcast: Arc<Broadcast> = broadcast;
                assert_eq!(broadcast.cursor(), position);
                let bytes = broadcast.publication().data.bytes();
                (number, String::from_utf8_lossy(bytes).into_owned(), position.map(|at| at.offset))
            }
            Item::Gap(cause) => (number, format!("gap {}", cause.as_str()), None),
        };
        join(items, &budget).into_iter().map(shown).collect()
    }

    #[test]
    fn consecutive_texts_of_one_event_and_publisher_arrive_as_one() {
        let event = |name| Some(EventName::new(name).unwrap());
        let by = |session| Some(Publisher { user: None, session: SessionId(session) });
        let items = vec![
            item(1, text("a")),
            item(2, text("b")),
            item(3, Publication { event: event("done"), ..text("c") }),
            item(4, Publication { event: event("done"), ..text("d") }),
            item(5, Publication { publisher: by(1), ..text("e") }),
            item(6, Publication { publisher: by(2), ..text("f") }),
            item(7, Publication::new(Data::json("1").unwrap())),
            item(8, text("g")),
            (9, Item::Gap(GapCause::Failover)),
            item(10, text("h")),
            item(11, Publication { exclude: Some(SessionId(3)), ..text("i") }),
            item(12, text("j")),
            item(13, Publication::new(Data::binary("k"))),
            item(14, text("é")),
            item(15, text("l")),
        ];
        let one = |number, text: &str| (number, text.to_owned(), Some(number));
        let expected = vec![
            (1, "ab".to_owned(), Some(2)),
            (3, "cd".to_owned(), Some(4)),
            one(5, "e"),
            one(6, "f"),
            one(7, "1"),
            one(8, "g"),
            (9, "gap failover".to_owned(), None),
            one(10, "h"),
            one(11, "i"),
            one(12, "j"),
            one(13, "k"),
            (14, "él".to_owned(), Some(15)),
        ];
        assert_eq!(arrives(items), expected);
    }

    /// What arrives as JSON live does so by itself, and what arrives as a string is part of one.
    #[test]
    fn joined_texts_are_strings_as_their_parts_are() {
        let texts = [r#"{"a":"#, "1}", "1", "2", "[", "]", "true", " ", "null", r#"""#, r#"x""#];
        let items = (0..).zip(texts).map(|(number, part)| item(number, text(part))).collect();
        let budget = Budget::register(&Registry::new(), 1).unwrap();
        let arrived: Vec<_> = join(items, &budget)
            .into_iter()
            .map(|(_, item)| match item {
                Item::Publication(broadcast, _) => {
                    let data = &broadcast.publication().data;
                    (data.as_text().unwrap().to_owned(), data.is_json())
                }
                Item::Gap(cause) => panic!("{cause:?}"),
            })
            .collect();
        let expected = [
            (r#"{"a":1}"#, false),
            ("1", true),
            ("2", true),
            ("[]", false),
            ("true", true),
            (" ", false),
            ("null", true),
            (r#""x""#, false),
        ];
        assert_eq!(arrived, expected.map(|(text, is_json)| (text.to_owned(), is_json)));
    }

    #[test]
    fn a_publisher_is_its_user_or_else_its_session() {
        let by = |user: Option<&str>, session| {
            let publisher = Publisher { user: user.map(Into::into), session: SessionId(session) };
            Publication { publisher: Some(publisher), ..text("x") }
        };
        for (one, other, joined) in [
            (by(Some("a"), 1), by(Some("a"), 2), true),
            (by(Some("a"), 1), by(Some("b"), 1), false),
            (by(None, 1), by(None, 1), true),
            (by(None, 1), by(None, 2), false),
            (by(Some("a"), 1), by(None, 1), false),
            (by(Some("a"), 1), text("x"), false),
        ] {
            assert_eq!(arrives(vec![item(1, one), item(2, other)]).len() == 1, joined);
        }
    }

    #[test]
    fn at_most_16_kib_are_joined() {
        let items = (0..40).map(|number| item(number, text(&"x".repeat(1000)))).collect();
        let lengths: Vec<_> = arrives(items).into_iter().map(|(_, text, last)| (text.len(), last)).collect();
        assert_eq!(lengths, [(16_000, Some(15)), (16_000, Some(31)), (8_000, Some(39))]);
        let large = vec![item(0, text(&"x".repeat(MOST + 1))), item(1, text("y"))];
        assert_eq!(arrives(large).len(), 2, "one that is larger arrives by itself");
    }

    #[test]
    fn what_has_no_position_is_not_joined() {
        let mut items = vec![item(1, text("a")), item(2, text("b")), item(3, text("c"))];
        if let Some((_, Item::Publication(broadcast, position))) = items.get_mut(1) {
            *broadcast = Arc::new(Broadcast::new(broadcast.room().clone(), text("b"), 0));
            *position = None;
        }
        assert_eq!(arrives(items).len(), 3);
    }
}
