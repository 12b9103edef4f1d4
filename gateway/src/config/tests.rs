mod keys;
mod rooms;

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf, time::Duration};

use proptest::prelude::*;

use super::{
    layers::variable_of,
    table::{Fallback, Row, TABLE, is_of_rooms},
    *,
};

const SECRET: &str = "correct horse battery staple, and more";

fn file(text: &str) -> Sources {
    Sources { file: Some((PathBuf::from("tidegate.toml"), text.to_owned())), ..Sources::default() }
}

fn env(variables: &[(&str, &str)]) -> Sources {
    let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    Sources { env: variables.iter().map(own).collect(), ..Sources::default() }
}

fn flags(flags: &[(&str, &str)]) -> Sources {
    let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    Sources { flags: flags.iter().map(own).collect(), ..Sources::default() }
}

fn load(sources: &Sources) -> Config {
    Config::load(sources).unwrap_or_else(|errors| panic!("{errors}"))
}

/// The errors, one line each.
fn complaints(sources: &Sources) -> Vec<String> {
    let errors = Config::load(sources).expect_err("this configuration is wrong");
    errors.iter().map(ToString::to_string).collect()
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// All values of a configuration, for comparisons. (Neither contains a secret.)
fn said(config: &Config) -> String {
    format!("{config:#?}")
}

#[test]
fn the_defaults_match_the_reference() {
    let config = load(&Sources::default());
    assert_eq!(config.public.listen, address("127.0.0.1:8080"));
    assert_eq!(config.ops.listen, address("127.0.0.1:9090"));
    assert!((1..=256).contains(&config.shards));
    assert_eq!(config.broker.url, BrokerUrl::Memory);
    assert_eq!(config.limits.message_size, ByteSize::kib(64));
    assert_eq!(config.limits.connections, 100_000);
    assert_eq!(config.heartbeat.timeout, Duration::from_secs(60));
    assert_eq!(config.drain.pause, Duration::ZERO);
    assert_eq!(config.log.format, LogFormat::Text);
    assert_eq!(config.auth.keys.secret, None);
    assert!(config.demo, "on while no key is configured");
    assert!(config.rooms.is_empty());
}

#[test]
fn rates_are_read_from_every_layer_and_invalid_ones_refused() {
    let mut sources = file(
        "[limits]\ncommands = '100/s burst 200'\nbytes = '1MiB/s burst 4MiB'\nuser_commands = 0\naccepts = false",
    );
    sources.env = env(&[("TIDEGATE_LIMITS__ATTEMPTS_PER_ADDRESS", "off")]).env;
    sources.flags = flags(&[("limits.user_bytes", "600KiB/m")]).flags;
    let limits = load(&sources).limits;
    assert_eq!(limits.commands, Some("100/s burst 200".parse().unwrap()));
    assert_eq!(limits.bytes, Some("1MiB/s burst 4MiB".parse().unwrap()));
    assert_eq!((limits.user_commands, limits.attempts_per_address, limits.accepts), (None, None, None));
    assert_eq!(limits.user_bytes, Some("600KiB/m".parse().unwrap()));

    let wrong = flags(&[
        ("limits.commands", "100"),
        ("limits.accepts", "0/s"),
        ("limits.user_commands", "1/h burst 100"),
        ("limits.bytes", "4KiB/s"),
        ("limits.connections_per_address", "-1"),
        ("public.trusted_proxies", "10.0.0.1/8"),
        ("public.proxy_protocol", "true"),
        ("public.forwarded_header", "x-real-ip"),
    ]);
    let complaints = complaints(&wrong);
    for expected in [
        "limits.commands = \"100\" (command line): expected a rate such as 100/s or 600/m burst 50, \
         or off",
        "limits.accepts = \"0/s\" (command line): expected an amount and a burst from 1 to 1073741824, or off",
        "limits.user_commands = \"1/h burst 100\" (command line): expected a burst that refills within a day, or off",
        "limits.bytes = \"4KiB/s\" (command line): expected a burst of at least limits.message_size, 64KiB",
        "limits.connections_per_address = \"-1\" (command line): expected a whole number from 1 to 10000000, or off",
        "public.trusted_proxies = \"10.0.0.1/8\" (command line): expected a list of IP addresses and networks, such as \
         [\"10.0.0.0/8\", \"::1\"]",
        "public.forwarded_header = \"x-real-ip\" (command line): expected x-forwarded-for or forwarded",
    ] {
        assert!(complaints.iter().any(|line| line == expected), "{expected}\nis not among\n{complaints:#?}");
    }
    assert_eq!(
        complaints.len(),
        7,
        "public.proxy_protocol depends on a list that was not read: {complaints:#?}"
    );
    assert_eq!(
        self::complaints(&flags(&[("public.proxy_protocol", "true")])),
        [
            "public.proxy_protocol = \"true\" (command line): expected public.trusted_proxies to list the proxies that send it"
        ],
    );
}

/// The table of limits is written by hand. Check at least that no limit is missing and every default is
/// right.
#[test]
fn the_table_of_limits_has_every_limit_and_its_default() {
    let text = include_str!("../../docs/security.md");
    for row in TABLE.iter().filter(|row| row.name().starts_with("limits.")) {
        let Fallback::Is(default) = row.default() else { panic!("{} has no default", row.name()) };
        let line = format!("| `{}` | `{}` |", row.name(), default.trim_matches('"'));
        assert!(text.contains(&line), "docs/security.md lacks {line}");
    }
}

#[test]
fn the_default_file_contains_the_defaults() {
    let text = document::default_config();
    assert_eq!(said(&load(&file(&text))), said(&load(&Sources::default())));
    assert_eq!(load(&file(&text)).snapshot, load(&Sources::default()).snapshot);
    // A key that is commented out becomes valid when the comment sign is removed.
    let uncommented: Vec<&str> = text
        .lines()
        .map(|line| line.strip_prefix("# ").filter(|rest| is_setting(rest)).unwrap_or(line))
        .filter(|line| !line.starts_with("url_file") && !line.contains("_file = "))
        .collect();
    let config = load(&file(&uncommented.join("\n")));
    assert_eq!(config.rooms.len(), 1);
    assert!(config.auth.keys.secret.is_some());
    for row in TABLE {
        let key = row.name().rsplit('.').next().unwrap();
        assert!(text.contains(&format!("{key} = ")), "{key} is missing:\n{text}");
    }
}

fn is_setting(line: &str) -> bool {
    line.starts_with("[rooms.") || line.split_once(" = ").is_some_and(|(key, _)| !key.contains([' ', '.']))
}

#[test]
fn each_layer_overrides_the_one_below() {
    let mut sources = file("[public]\nlisten = '127.0.0.1:1'\n[sse]\nretry = '1s'\n[log]\nformat = 'json'");
    assert_eq!(load(&sources).public.listen, address("127.0.0.1:1"));
    sources.env = env(&[("TIDEGATE_PUBLIC__LISTEN", "127.0.0.1:2"), ("Tidegate_SSE__retry", "2s")]).env;
    let config = load(&sources);
    assert_eq!(config.public.listen, address("127.0.0.1:2"));
    assert_eq!(config.sse.retry, Duration::from_secs(2), "environment names are case-insensitive");
    sources.flags = flags(&[("public.listen", "127.0.0.1:3"), ("public.listen", "127.0.0.1:4")]).flags;
    let config = load(&sources);
    assert_eq!(config.public.listen, address("127.0.0.1:4"), "the last flag wins");
    assert_eq!(config.sse.retry, Duration::from_secs(2));
    assert_eq!(config.log.format, LogFormat::Json, "a value that no higher layer sets stays");
}

#[test]
fn an_overridden_value_is_not_validated() {
    let mut sources = file("[public]\nlisten = 'nonsense'");
    sources.flags = flags(&[("public.listen", "[::1]:0")]).flags;
    assert_eq!(load(&sources).public.listen, address("[::1]:0"));
}

#[test]
fn lists_are_written_in_several_ways() {
    let expected = load(&file("origins = ['https://a.example', 'https://*.b.example']")).origins;
    for text in [
        "https://a.example,https://*.b.example",
        " https://a.example , https://*.b.example ",
        r#"["https://a.example", "https://*.b.example"]"#,
        "['https://a.example', 'https://*.b.example']",
    ] {
        assert_eq!(load(&env(&[("TIDEGATE_ORIGINS", text)])).origins, expected, "{text}");
    }
    assert_eq!(load(&env(&[("TIDEGATE_ORIGINS", "")])).origins, Origins::default());
}

#[test]
fn numbers_and_switches_may_be_quoted_or_not() {
    for text in ["shards = 3\ndemo = false", "shards = '3'\ndemo = 'false'"] {
        let config = load(&file(text));
        assert_eq!((config.shards, config.demo), (3, false));
    }
    assert_eq!(load(&file("[limits]\nmessage_size = 1_000")).limits.message_size, ByteSize::bytes(1000));
}

#[test]
fn all_errors_are_reported_at_once() {
    let mut sources = file(concat!(
        "shards = 0\n",
        "sards = 4\n",
        "[public]\n",
        "listen = 'localhost'\n",
        "header_timeout = 10\n",
        "[quic]\n",
        "cert = 'x'\n",
        "[rooms.'a b']\n",
        "grant = ['subscribe', 'fly']\n",
        "[rooms.lobby]\n",
        "grnt = []\n",
    ));
    sources.env =
        env(&[("TIDEGATE_LIMITS__MESSAGE_SIZE", "64KB"), ("TIDEGATE_OPS_LISTEN", "0.0.0.0:9090")]).env;
    sources.flags =
        flags(&[("drain.deadline", "5s"), ("heartbeat.timeout", "20s"), ("origins", "https://x/")]).flags;
    assert_eq!(
        complaints(&sources),
        [
            "sards (tidegate.toml:2): there is no such key; did you mean shards?",
            "quic (tidegate.toml:6): there is no such key; `tidegate default-config` lists them all",
            "ops_listen (environment TIDEGATE_OPS_LISTEN): there is no such key; did you mean \
             TIDEGATE_OPS__LISTEN?",
            "shards = 0 (tidegate.toml:1): expected auto, or a whole number from 1 to 256",
            "origins = \"https://x/\" (command line): expected a list of origins, such as \
             [\"https://app.example\", \"https://*.example\"] or [\"*\"]",
            "public.listen = \"localhost\" (tidegate.toml:4): expected an IP address and a port, such as \
             127.0.0.1:8080 or [::]:8080",
            "public.header_timeout = 10 (tidegate.toml:5): expected a time from 10ms to 1h, written 250ms, 30s, \
             5m or 1h",
            "limits.message_size = \"64KB\" (environment TIDEGATE_LIMITS__MESSAGE_SIZE): expected a size from 1B \
             to 16MiB, written 512B, 64KiB, 1MiB or as bytes",
            "rooms.\"a b\" (tidegate.toml:8): expected a room pattern: in a room pattern, a room name must \
             not contain ' ': no control characters, white space, '{' or '}'",
            "rooms.\"a b\".grant = [\"subscribe\", \"fly\"] (tidegate.toml:9): expected a list of operations: \
             subscribe, publish, presence, history",
            "rooms.\"lobby\".grnt (tidegate.toml:11): there is no such key; did you mean grant?",
            "heartbeat.timeout = \"20s\" (command line): expected more than heartbeat.interval, 25s",
            "drain.deadline = \"5s\" (command line): expected at least drain.pause and drain.window together, \
             10s",
        ]
    );
}

#[test]
fn keys_must_agree_with_each_other() {
    for (given, complaint) in [
        (
            ("ops.listen", "0.0.0.0:8080"),
            "ops.listen = \"0.0.0.0:8080\" (command line): expected a port other than that of public.listen, 127.0.0.1:8080",
        ),
        (
            ("broker.prefix", "{prod}"),
            "broker.prefix = \"{prod}\" (command line): expected text of at most 64 bytes without white space, \
             control characters, { and }",
        ),
        (
            ("broker.canary_interval", "6s"),
            "broker.canary_timeout = \"6s\" (default): expected more than broker.canary_interval, 6s",
        ),
        (
            ("heartbeat.interval", "1m"),
            "heartbeat.timeout = \"60s\" (default): expected more than heartbeat.interval, 1m",
        ),
        (
            ("drain.pause", "21s"),
            "drain.deadline = \"30s\" (default): expected at least drain.pause and drain.window together, 31s",
        ),
        (
            ("limits.outbound", "1KiB"),
            "limits.outbound = \"1KiB\" (command line): expected at least limits.message_size, 64KiB",
        ),
        (
            ("broker.publish_queue", "1KiB"),
            "broker.publish_queue = \"1KiB\" (command line): expected at least limits.message_size, 64KiB",
        ),
        (
            ("broker.max_publication", "1KiB"),
            "broker.max_publication = \"1KiB\" (command line): expected at least limits.message_size, 64KiB",
        ),
        (
            ("broker.ca_file", "/ca.pem"),
            "broker.ca_file = \"/ca.pem\" (command line): expected a broker with TLS \
             (rediss://)",
        ),
    ] {
        assert_eq!(complaints(&flags(&[given])), [complaint]);
    }
    // Equal values are allowed where they can work.
    load(&flags(&[("drain.window", "30s"), ("limits.outbound", "64KiB")]));
    load(&flags(&[("broker.url", "rediss://redis.example"), ("broker.ca_file", "/ca.pem")]));
    load(&flags(&[("public.listen", "127.0.0.1:0"), ("ops.listen", "127.0.0.1:0")]));
    load(&flags(&[("public.listen", "127.0.0.1:80"), ("ops.listen", "127.0.0.2:80")]));
}

#[test]
fn a_toml_error_has_its_position() {
    let lines = complaints(&file("[public]\nlisten = \n[auth]\nhs256_secret = \"hunter2\nx"));
    assert!(lines.len() >= 2, "{lines:?}");
    assert!(lines.iter().all(|line| line.starts_with("tidegate.toml:")), "{lines:?}");
    assert!(
        lines.first().is_some_and(|line| line.starts_with("tidegate.toml:2: expected TOML: ")),
        "{lines:?}"
    );
    assert!(!lines.concat().contains("hunter2"), "{lines:?}");
}

#[test]
fn sections_and_keys_are_distinguished() {
    assert_eq!(
        complaints(&file("public = 'x'\nrooms = 3\n'public.listen' = '[::1]:80'\n[log]\nformat = { a = 1 }")),
        [
            "public (tidegate.toml:1): expected a table of keys, [public]",
            "rooms (tidegate.toml:2): expected a table of keys, [rooms]",
            "\"public.listen\" (tidegate.toml:3): there is no such key; did you mean public.listen?",
            "log.format = {…} (tidegate.toml:5): expected text or json",
        ]
    );
    assert_eq!(
        complaints(&env(&[("TIDEGATE_ROOMS", "lobby"), ("TIDEGATE_PUBLIC", "x")])),
        [
            "public (environment TIDEGATE_PUBLIC): there is no such key; `tidegate default-config` lists them all",
            "rooms = \"lobby\" (environment TIDEGATE_ROOMS): expected an inline TOML table, such as { \"chat:*\" = \
             { grant = [\"subscribe\"] } }",
        ]
    );
    assert_eq!(
        complaints(&flags(&[("rooms.\"a\".grnt", "x"), ("rooms.a b.grant", "subscribe")])),
        [
            "rooms.\"a\".grnt (command line): there is no such key; did you mean grant?",
            "rooms.\"a b\" (command line): expected a room pattern: in a room pattern, a room name must not \
             contain ' ': no control characters, white space, '{' or '}'",
        ]
    );
}

#[test]
fn service_variables_of_a_pod_are_ignored() {
    load(&env(&[
        ("PATH", "/bin"),
        ("TIDEGATE", "not ours"),
        ("TIDEGATE_SERVICE_HOST", "10.0.0.1"),
        ("TIDEGATE_SERVICE_PORT", "8080"),
        ("TIDEGATE_SERVICE_PORT_HTTP", "8080"),
        ("TIDEGATE_PORT", "tcp://10.0.0.1:8080"),
        ("TIDEGATE_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
        ("TIDEGATE_PORT_8080_TCP_ADDR", "10.0.0.1"),
        ("TIDEGATE_PORT_8080_TCP_PORT", "8080"),
        ("TIDEGATE_PORT_8080_TCP_PROTO", "tcp"),
        ("TIDEGATE_OPS_SERVICE_HOST", "10.0.0.1"),
        ("TIDEGATE_OPS_PORT_9090_TCP", "tcp://10.0.0.1:9090"),
    ]));
    for (name, value) in [("TIDEGATE_PORT", "8080"), ("TIDEGATE_OPS_PORT", "9090"), ("TIDEGATE_SERVICE", "x")]
    {
        assert_eq!(complaints(&env(&[(name, value)])).len(), 1, "{name}={value}");
    }
}

#[test]
fn environment_variables_are_unique_and_utf8() {
    assert_eq!(
        complaints(&env(&[("TIDEGATE_SHARDS", "2"), ("tidegate_shards", "2")])),
        ["shards (environment tidegate_shards): expected only one spelling; TIDEGATE_SHARDS is set as well"]
    );
    assert_eq!(
        complaints(&env(&[("TIDEGATE_BROKER__PREFIX", "\u{fffd}")])),
        ["broker.prefix (environment TIDEGATE_BROKER__PREFIX): expected UTF-8"]
    );
}

#[test]
fn secrets_come_from_a_key_or_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str, text: &[u8]| {
        std::fs::write(dir.path().join(name), text).unwrap();
        dir.path().join(name).to_str().unwrap().to_owned()
    };
    let secret = |config: Config| config.auth.keys.secret.map(|secret| secret.expose().to_vec());
    let expected = Some(SECRET.as_bytes().to_vec());
    let mut sources = flags(&[("auth.hs256_secret", SECRET)]);
    assert!(!load(&sources).demo, "off as soon as a key is configured");
    assert_eq!(secret(load(&sources)), expected);
    for ending in ["", "\n", "\r\n"] {
        let file = path("secret", format!("{SECRET}{ending}").as_bytes());
        assert_eq!(secret(load(&flags(&[("auth.hs256_secret_file", &file)]))), expected);
    }
    let url = path("url", b"redis://:hunter2@redis.example\n");
    assert!(matches!(load(&flags(&[("broker.url_file", &url)])).broker.url, BrokerUrl::Redis(_)));

    // The stronger layer wins; one layer may give only one of the keys.
    let other = path("other", &[b'x'; 32]);
    sources.env = env(&[("TIDEGATE_AUTH__HS256_SECRET_FILE", &other)]).env;
    assert_eq!(secret(load(&sources)), expected);
    sources.flags = flags(&[("auth.hs256_secret_file", &other)]).flags;
    sources.env = env(&[("TIDEGATE_AUTH__HS256_SECRET", SECRET)]).env;
    assert_eq!(secret(load(&sources)), Some(vec![b'x'; 32]));
    sources.flags.push(("auth.hs256_secret".to_owned(), SECRET.to_owned()));
    assert_eq!(
        complaints(&sources),
        ["auth.hs256_secret_file (command line): expected either auth.hs256_secret or \
             auth.hs256_secret_file, not both"]
    );

    for (text, complaint) in [
        (&b"short"[..], "in that file, expected text of at least 32 bytes"),
        (&[0xff; 40][..], "expected a file of text that can be read: "),
        (&vec![b'x'; 70_000], "expected a file of text that can be read: it is larger than 64 KiB"),
    ] {
        let lines = complaints(&flags(&[("auth.hs256_secret_file", &path("wrong", text))]));
        let [line] = lines.as_slice() else { panic!("{lines:?}") };
        assert!(line.contains(complaint), "{line}");
    }
    let lines = complaints(&flags(&[("auth.hs256_secret_file", "/nonexistent/secret")]));
    assert!(lines.concat().contains("can be read: No such file"), "{lines:?}");
}

#[test]
fn no_secret_is_ever_shown() {
    let secret = "hunter2-hunter2-hunter2-hunter2-hunter2";
    let config =
        load(&flags(&[("auth.hs256_secret", secret), ("broker.url", "redis://u:hunter2@redis.example")]));
    assert!(!format!("{config:?}{config:#?}").contains("hunter2"));
    for (key, value) in [
        ("auth.hs256_secret", "hunter2"),
        ("auth.hs256_secret_file", secret),
        ("auth.hs256_secrt", secret),
        ("auth.hs256.secret", secret),
        ("auth.keys", "hunter2"),
        ("auth.keys", "{ a = { algorithm = 'HS256', secret = 'hunter2' } }"),
        ("auth.jwks_url", "https://u:hunter2@login.example/"),
        ("broker.url", "redis//:hunter2@redis.example"),
        ("broker.url", "redis://:hunter2@redis.example:port"),
        ("broker.url", "redis://redis.example/0?password=hunter2"),
        ("broker.url_file", "redis://:hunter2@redis.example"),
        ("broker.uri", "redis://:hunter2@redis.example"),
    ] {
        let variable = variable_of(key);
        let dotted = format!("{key} = {value:?}");
        for sources in [flags(&[(key, value)]), env(&[(&variable, value)]), file(&dotted)] {
            let errors = Config::load(&sources).expect_err(key);
            assert!(!format!("{errors}{errors:?}").contains("hunter2"), "{key}: {errors}");
        }
    }
    let errors = Config::load(&file("[auth]\nhs256_secret = 'hunter2\n")).unwrap_err();
    assert!(!format!("{errors}{errors:?}").contains("hunter2"), "{errors}");
}

#[test]
fn a_certificate_needs_its_key() {
    let config = load(&flags(&[("tls.cert", "a.crt"), ("tls.key", "a.key")]));
    let tls = config.tls.expect("both are given");
    assert_eq!((tls.cert, tls.key), ("a.crt".into(), "a.key".into()));
    assert_eq!(
        complaints(&flags(&[("tls.cert", "a.crt")])),
        [r#"tls.cert = "a.crt" (command line): expected tls.key as well"#]
    );
    assert_eq!(
        complaints(&flags(&[("tls.key", "a.key")])),
        ["tls.key (command line): expected tls.cert as well"]
    );
}

/// Compares the document with the table. With `UPDATE_DOCS` set, updates it instead.
#[test]
fn configuration_reference() {
    const BEGIN: &str = "<!-- The table is made from gateway/src/config/table.rs; see below it. -->\n";
    const END: &str = "<!-- End of the table. -->\n";
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
    let document = std::fs::read_to_string(path).unwrap();
    let (before, rest) = document.split_once(BEGIN).expect("the table's beginning is marked");
    let (table, after) = rest.split_once(END).expect("the table's end is marked");
    let expected = document::reference();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, format!("{before}{BEGIN}{expected}{END}{after}")).unwrap();
    } else {
        assert!(
            table == expected,
            "docs/configuration.md is out of date; UPDATE_DOCS=1 cargo test -p tidegate configuration_reference \
             rewrites it"
        );
    }
    // TOML blocks in the prose must be valid configuration files.
    for block in document.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()) {
        load(&file(block));
    }
}

#[test]
fn rows_are_complete() {
    let mut names = BTreeSet::new();
    for row in TABLE {
        assert!(names.insert(row.name()), "{} is listed twice", row.name());
        assert!(row.doc().ends_with('.') && !row.doc().contains('|'), "{}", row.name());
        assert!(row.more().is_empty() || row.more().ends_with('.'), "{}", row.name());
        let value = match row.default() {
            Fallback::Is(value) => value,
            Fallback::Unset { example } => example,
        };
        assert!(raw::Raw::value(value).is_some(), "{}: {value}", row.name());
    }
}

/// Keys that accept nearly any text.
fn takes_any_text(row: &dyn Row) -> bool {
    matches!(row.name(), "log.filter" | "broker.prefix" | "broker.ca_file" | "auth.hs256_secret")
        || matches!(row.name(), "auth.issuer" | "auth.audience")
        || is_of_rooms(row.name())
}

proptest! {
    /// `!` is part of no valid value.
    #[test]
    fn invalid_input_is_refused_by_name(row in 0..TABLE.len(), junk in "\\PC{0,40}!\\PC{0,40}") {
        let row = TABLE[row];
        prop_assume!(!takes_any_text(row));
        let quoted = toml::Value::String(junk.clone());
        let variable = variable_of(row.name());
        for sources in [
            flags(&[(row.name(), &junk)]),
            env(&[(&variable, &junk)]),
            file(&format!("{} = {quoted}", row.name())),
        ] {
            let errors = Config::load(&sources).expect_err("junk");
            prop_assert!(errors.iter().all(|error| error.key == row.name()), "{}", errors);
            prop_assert!(errors.to_string().lines().count() == errors.iter().count());
        }
    }

    /// Any value for any key gives a configuration or one line per error.
    #[test]
    fn arbitrary_input_never_panics(
        text in any::<String>(), row in 0..TABLE.len(), name in "[a-z_.\"<>]{0,20}", value in any::<String>()
    ) {
        let row = TABLE[row].name();
        let variable = variable_of(row);
        for sources in [
            file(&text),
            file(&format!("{row} = {value}")),
            file(&format!("[rooms.{name}]\ngrant = {value}")),
            flags(&[(row, &value)]),
            flags(&[(&name, &value)]),
            flags(&[("rooms", &value)]),
            env(&[(&variable, &value)]),
            env(&[(&format!("TIDEGATE_{name}"), &value)]),
        ] {
            if let Err(errors) = Config::load(&sources) {
                prop_assert_eq!(errors.to_string().lines().count(), errors.iter().count());
            }
        }
    }
}
