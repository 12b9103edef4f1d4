//! The notation of golden transcripts ([`transcripts`](super::transcripts) describes it), without what plays
//! them: `tests/simulation` includes this file too, and plays the same transcripts against whole nodes.

use bytes::Bytes;

/// A transcript.
pub struct Transcript {
    pub session: Opened,
    pub steps: Vec<Step>,
}

/// How the session of a transcript is opened.
pub struct Opened {
    /// The name of the endpoint.
    pub protocol: &'static str,
    /// On a WebSocket, if the protocol has other transports too.
    pub on_web_socket: bool,
    /// For the rooms `lobby` and `harbour`, not only `lobby`.
    pub several_rooms: bool,
    /// With a grant to publish in `lobby`.
    pub may_publish: bool,
    /// Parameters of the query.
    pub query: Vec<String>,
    /// Rate limits, by their names without `limits.`.
    pub limits: Vec<(String, String)>,
}

/// An input to the session, and all resulting effects.
pub struct Step {
    pub input: String,
    pub effects: Vec<String>,
}

/// What an input is.
pub enum Input {
    /// A message of the client.
    Client { is_text: bool, payload: Bytes },
    /// A publication.
    Room { room: String, is_text: bool, event: Option<String>, payload: Bytes },
    /// A gap, with its cause.
    Gap { room: String, cause: String },
    /// The broker has accepted or refused a publication.
    Settled { request: u64, outcome: String },
    /// The broker has acknowledged or refused a subscription.
    Joined { request: u64, room: String, outcome: Result<(), Refused> },
    /// It is time for a heartbeat.
    Heartbeat,
    /// The session ends for a reason.
    Farewell(String),
}

/// Why the broker refuses a subscription.
#[derive(Clone, Copy)]
pub enum Refused {
    Unavailable,
    Forbidden,
}

impl Transcript {
    /// Reads a transcript. Lines that begin with `#` are comments.
    pub fn new(text: &str) -> Self {
        let mut lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
        let session = Opened::new(lines.next().expect("a transcript begins with its session"));
        let mut steps: Vec<Step> = Vec::new();
        for line in lines {
            match (line.strip_prefix("> "), steps.last_mut()) {
                (Some(input), _) => steps.push(Step { input: input.to_owned(), effects: Vec::new() }),
                (None, Some(step)) => step.effects.push(line.to_owned()),
                (None, None) => panic!("an effect of nothing: {line}"),
            }
        }
        Self { session, steps }
    }
}

impl Opened {
    /// Reads the first line of a transcript.
    pub fn new(line: &str) -> Self {
        let mut words = line.split(' ');
        assert_eq!(words.next(), Some("session"));
        let protocol = match words.next().expect("a protocol") {
            "event_stream" => "sse",
            "centrifuge" => "centrifuge",
            "ndjson" => "ndjson",
            "long_poll" => "long_poll",
            "plain" => "plain",
            other => panic!("no protocol {other}"),
        };
        let mut opened = Self {
            protocol,
            on_web_socket: false,
            several_rooms: false,
            may_publish: false,
            query: Vec::new(),
            limits: Vec::new(),
        };
        for word in words {
            match (word, word.split_once('=')) {
                ("websocket", _) => opened.on_web_socket = true,
                ("several_rooms", _) => opened.several_rooms = true,
                ("publish", _) => opened.may_publish = true,
                (_, Some((name, rate))) if rate.contains('/') => {
                    opened.limits.push((name.to_owned(), rate.to_owned()));
                }
                (_, Some(_)) => opened.query.push(word.to_owned()),
                (other, None) => panic!("no option {other}"),
            }
        }
        if opened.several_rooms {
            opened.query.extend(["room=lobby", "room=harbour"].map(ToOwned::to_owned));
        }
        opened
    }
}

impl Input {
    /// Reads an input, in which tokens have been replaced.
    pub fn new(step: &str) -> Self {
        let (what, rest) = step.split_once(' ').unwrap_or((step, ""));
        let two = |text: &str| {
            let (first, second) = text.split_once(' ').unwrap_or((text, ""));
            (first.to_owned(), second.to_owned())
        };
        match what {
            "client" => {
                let (kind, payload) = two(rest);
                Self::Client { is_text: kind == "text", payload: unescape(&payload) }
            }
            "room" => {
                let (room, rest) = two(rest);
                let (kind, payload) = two(&rest);
                let (kind, event) = match kind.split_once('/') {
                    Some((kind, event)) => (kind, Some(event.to_owned())),
                    None => (kind.as_str(), None),
                };
                Self::Room { room, is_text: kind == "text", event, payload: unescape(&payload) }
            }
            "gap" => {
                let (room, cause) = two(rest);
                Self::Gap { room, cause }
            }
            "settled" => {
                let (request, outcome) = rest.split_once(' ').unwrap_or(("0", rest));
                Self::Settled { request: request.parse().expect("a request"), outcome: outcome.to_owned() }
            }
            "joined" | "refused" => {
                let (request, rest) = two(rest);
                let (room, refusal) = two(&rest);
                let outcome = match (what, refusal.as_str()) {
                    ("joined", "") => Ok(()),
                    ("refused", "") => Err(Refused::Unavailable),
                    ("refused", "forbidden") => Err(Refused::Forbidden),
                    (_, other) => panic!("no refusal {other}"),
                };
                Self::Joined { request: request.parse().expect("a request"), room, outcome }
            }
            "heartbeat" => Self::Heartbeat,
            "farewell" => Self::Farewell(rest.to_owned()),
            other => panic!("no step {other}"),
        }
    }
}

/// Replaces `<token SUBJECT GRANTS SECONDS>` with tokens.
pub fn with_tokens(step: &str, token: impl Fn(&str, &str, u64) -> String) -> String {
    let mut parts = step.split("<token ");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (words, rest) = part.split_once('>').expect("a token's end");
        let words: Vec<&str> = words.split(' ').collect();
        let [subject, grants, seconds] = words[..] else { panic!("three words, not {words:?}") };
        text.push_str(&token(subject, grants, seconds.parse().expect("seconds")));
        text.push_str(rest);
    }
    text
}

/// Undoes `escape_ascii`, as far as transcripts need it.
pub fn unescape(text: &str) -> Bytes {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = match (first, tail) {
            (b'\\', [b'n', tail @ ..]) => {
                bytes.push(b'\n');
                tail
            }
            (b'\\', [b'r', tail @ ..]) => {
                bytes.push(b'\r');
                tail
            }
            (b'\\', [b'x', high, low, tail @ ..]) => {
                let digits = [*high, *low];
                let digits = std::str::from_utf8(&digits).expect("two digits");
                bytes.push(u8::from_str_radix(digits, 16).expect("two hexadecimal digits"));
                tail
            }
            _ => {
                bytes.push(*first);
                tail
            }
        };
    }
    bytes.into()
}
