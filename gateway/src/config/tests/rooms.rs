//! Room policies: how each layer spells them, and what is refused.

use super::{super::kind::Kind as _, *};
use crate::{
    delivery::{DeliveryPolicy, Overflow},
    history::{HistoryPolicy, Ttl},
};

#[test]
fn room_policies_keep_their_order_and_come_from_one_layer() {
    let patterns = |config: &Config| -> Vec<String> {
        config.rooms.iter().map(|policy| format!("{}={}", policy.pattern, policy.operations)).collect()
    };
    let mut sources = file(
        "[rooms.'z:*']\ngrant = ['subscribe']\n[rooms.'user:{sub}']\ngrant = ['publish', 'subscribe']\n[rooms.a]\n",
    );
    assert_eq!(patterns(&load(&sources)), ["z:*=subscribe", "user:{sub}=subscribe,publish", "a="]);
    sources.env = env(&[("TIDEGATE_ROOMS", r#"{ "b" = { grant = ["history"] } }"#)]).env;
    assert_eq!(patterns(&load(&sources)), ["b=history"], "layers are not merged");
    sources.flags = flags(&[
        (r#"rooms."c:*".grant"#, "subscribe"),
        ("rooms.d.grant", "subscribe,publish"),
        ("rooms.d.grant", "presence"),
    ])
    .flags;
    assert_eq!(patterns(&load(&sources)), ["c:*=subscribe", "d=presence"]);
}

#[test]
fn keys_of_a_room_pattern_can_be_set_one_by_one() {
    let policy = |pattern: &str, overflow, priority| DeliveryPolicy {
        pattern: pattern.parse().unwrap(),
        overflow,
        priority,
    };
    let text =
        "[rooms.'price:*']\noverflow = 'latest'\ngrant = ['subscribe']\n[rooms.alarm]\npriority = true\n";
    let config = load(&file(text));
    let expected = [policy("price:*", Some(Overflow::Latest), None), policy("alarm", None, Some(true))];
    assert_eq!(config.delivery, expected);
    assert_eq!(config.rooms.len(), 2);
    let given = [
        ("rooms.a.overflow", "latest"),
        ("rooms.a.grant", "subscribe"),
        ("rooms.a.priority", "true"),
        ("rooms.a.overflow", "drop_oldest"),
    ];
    let config = load(&flags(&given));
    assert_eq!(config.delivery, [policy("a", Some(Overflow::DropOldest), Some(true))]);
    assert!(!config.rooms[0].operations.is_empty());
    assert_eq!(
        complaints(&file("[rooms.a]\noverflow = 'newest'\npriority = 'high'\ndepth = 1\n")),
        [
            "rooms.\"a\".overflow = \"newest\" (tidegate.toml:2): expected close, drop_oldest or latest",
            "rooms.\"a\".priority = \"high\" (tidegate.toml:3): expected true or false",
            "rooms.\"a\".depth (tidegate.toml:4): there is no such key; there are grant, overflow, priority, \
             history.size, history.ttl, history.join",
        ]
    );
}

#[test]
fn the_history_of_rooms_is_read_from_every_layer() {
    let policy = |pattern: &str, size: Option<u32>, ttl| HistoryPolicy {
        pattern: pattern.parse().unwrap(),
        size: size.map(|size| size.try_into().unwrap()),
        ttl,
        join: None,
    };
    let for_hours = |hours: u64| Some(Ttl::Expires(Duration::from_secs(hours * 3600)));
    let whole = [policy("chat:*", Some(100), for_hours(1))];
    for text in [
        "[rooms.'chat:*'.history]\nsize = 100\nttl = '1h'\n",
        "[rooms.'chat:*']\nhistory = { size = '100', ttl = '60m' }\n",
        "[rooms.'chat:*']\nhistory.ttl = '60m'\nhistory.size = 100\n",
    ] {
        assert_eq!(load(&file(text)).history, whole, "{text}");
    }
    let inline = r#"{ "chat:*" = { history = { size = 100, ttl = "1h" } } }"#;
    assert_eq!(load(&env(&[("TIDEGATE_ROOMS", inline)])).history, whole);
    for given in [
        [(r#"rooms."chat:*".history.size"#, "100"), (r#"rooms."chat:*".history.ttl"#, "1h")],
        [("rooms.chat:*.history", "{ size = 5, ttl = '1h' }"), ("rooms.chat:*.history.size", "100")],
        [("rooms.chat:*.history.size", "5"), ("rooms.chat:*.history", "{ size = 100, ttl = '1h' }")],
    ] {
        assert_eq!(load(&flags(&given)).history, whole, "{given:?}");
    }
    // A pattern may contain dots, and the name of a section.
    let given = [
        ("rooms.a.history.b.history.ttl", "none"),
        ("rooms.a.history.grant", "publish"),
        ("rooms.a.grant", ""),
    ];
    let expected = [
        policy("a.history.b", None, Some(Ttl::Never)),
        policy("a.history", None, None),
        policy("a", None, None),
    ];
    assert_eq!(load(&flags(&given)).history, expected);

    // The default that the reference shows is the one that applies.
    let default = table::ROOMS_HISTORY_TTL.kind.read(&raw::Raw::Text("10m".to_owned()));
    assert_eq!(default, Ok(broker_bridge::Retention::default().ttl));
    assert!(matches!(table::ROOMS_HISTORY_TTL.default, Fallback::Is(r#""10m""#)));

    let bounds = "[rooms.a.history]\nsize = 1\nttl = '1s'\n[rooms.b.history]\nsize = 10000\nttl = '720h'\n";
    let second = Some(Ttl::Expires(Duration::from_secs(1)));
    assert_eq!(
        load(&file(bounds)).history,
        [policy("a", Some(1), second), policy("b", Some(10_000), for_hours(720))]
    );
}

#[test]
fn wrong_histories_are_refused_with_what_was_expected() {
    let text = concat!(
        "[rooms.a]\nhistory = 5\n",
        "[rooms.b.history]\nsise = 5\nttl = 'forever'\n",
        "[rooms.c.history]\nsize = 0\nttl = '721h'\n",
        "[rooms.d.history]\nsize = 10001\nttl = { size = 1 }\ndepth = 1\n",
        "[rooms.e]\n'history.size' = 5\nhistorry = { size = 5 }\n",
    );
    let ttl = "expected none, or a time from 1s to 720h, written 250ms, 30s, 5m or 1h";
    let size = "expected a whole number from 1 to 10000";
    let all = "there are grant, overflow, priority, history.size, history.ttl, history.join";
    assert_eq!(
        complaints(&file(text)),
        [
            "rooms.\"a\".history = 5 (tidegate.toml:2): expected a table of size, ttl, join".to_owned(),
            "rooms.\"b\".history.sise (tidegate.toml:4): there is no such key; did you mean history.size?".to_owned(),
            format!("rooms.\"b\".history.ttl = \"forever\" (tidegate.toml:5): {ttl}"),
            format!("rooms.\"c\".history.size = 0 (tidegate.toml:7): {size}"),
            format!("rooms.\"c\".history.ttl = \"721h\" (tidegate.toml:8): {ttl}"),
            format!("rooms.\"d\".history.size = 10001 (tidegate.toml:10): {size}"),
            format!("rooms.\"d\".history.ttl = {{…}} (tidegate.toml:11): {ttl}"),
            format!("rooms.\"d\".history.depth (tidegate.toml:12): there is no such key; {all}"),
            "rooms.\"e\".\"history.size\" (tidegate.toml:14): there is no such key; did you mean history.size?"
                .to_owned(),
            "rooms.\"e\".historry.size (tidegate.toml:15): there is no such key; did you mean history.size?".to_owned(),
        ]
    );
    let given = [
        ("rooms.a.history", "5"),
        ("rooms.b.history.sise", "5"),
        (r#"rooms."c".history.size"#, "many"),
        (r#"rooms."d.history".sise"#, "1"),
    ];
    assert_eq!(
        complaints(&flags(&given)),
        [
            "rooms.\"a\".history = \"5\" (command line): expected a table of size, ttl, join".to_owned(),
            "rooms.\"b\".history.sise (command line): there is no such key; did you mean history.size?"
                .to_owned(),
            format!("rooms.\"c\".history.size = \"many\" (command line): {size}"),
            format!("rooms.\"d.history\".sise (command line): there is no such key; {all}"),
        ]
    );
}
