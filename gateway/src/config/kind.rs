//! The kinds of values: how each is described, parsed and refused.
//!
//! Each kind holds its bounds, so the description and the check cannot disagree.

use std::{fmt, marker::PhantomData, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use super::{
    ByteSize, ForwardedHeader, LogFormat, Networks, Origins,
    raw::Raw,
    value::{format_time, parse_time},
};
use crate::{
    auth::{
        Algorithm, Key,
        files::KeyFile,
        grant::{Operation, Operations},
        key::holds_pem,
    },
    vocabulary::Secret,
};

/// A kind of value.
pub(super) trait Kind: Sync {
    /// The parsed value. Its `Debug` output tells values apart, unless they are secret.
    type Value: fmt::Debug;

    /// Completes the sentence "expected …".
    fn describe(&self) -> String;

    /// Parses a value. `Err` is a sentence that says what was expected.
    fn read(&self, raw: &Raw) -> Result<Self::Value, String>;

    /// Whether a value must never be shown.
    fn is_secret(&self) -> bool {
        false
    }

    /// An error that repeats the description.
    fn refuse<T>(&self) -> Result<T, String> {
        Err(format!("expected {}", self.describe()))
    }
}

/// Where to listen.
pub(super) struct Address;

impl Kind for Address {
    type Value = SocketAddr;

    fn describe(&self) -> String {
        "an IP address and a port, such as 127.0.0.1:8080 or [::]:8080".to_owned()
    }

    fn read(&self, raw: &Raw) -> Result<SocketAddr, String> {
        raw.text().and_then(|text| text.parse().ok()).map_or_else(|| self.refuse(), Ok)
    }
}

/// A duration; both bounds are inclusive.
pub(super) struct Time {
    pub min: Duration,
    pub max: Duration,
}

impl Kind for Time {
    type Value = Duration;

    fn describe(&self) -> String {
        let (min, max) = (format_time(self.min), format_time(self.max));
        format!("a time from {min} to {max}, written 250ms, 30s, 5m or 1h")
    }

    fn read(&self, raw: &Raw) -> Result<Duration, String> {
        let time = raw.text().and_then(|text| parse_time(text).ok());
        time.filter(|time| (self.min..=self.max).contains(time)).map_or_else(|| self.refuse(), Ok)
    }
}

/// A number of bytes; both bounds are inclusive.
pub(super) struct Size {
    pub min: ByteSize,
    pub max: ByteSize,
}

impl Kind for Size {
    type Value = ByteSize;

    fn describe(&self) -> String {
        format!("a size from {} to {}, written 512B, 64KiB, 1MiB or as bytes", self.min, self.max)
    }

    fn read(&self, raw: &Raw) -> Result<ByteSize, String> {
        let size = raw.scalar().and_then(|text| text.parse().ok());
        size.filter(|size| (self.min..=self.max).contains(size)).map_or_else(|| self.refuse(), Ok)
    }
}

/// A whole number; both bounds are inclusive.
pub(super) struct Count {
    pub min: usize,
    pub max: usize,
}

impl Kind for Count {
    type Value = usize;

    fn describe(&self) -> String {
        format!("a whole number from {} to {}", self.min, self.max)
    }

    fn read(&self, raw: &Raw) -> Result<usize, String> {
        let digits = raw.scalar().filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
        let count = digits.and_then(|digits| digits.parse().ok());
        count.filter(|count| (self.min..=self.max).contains(count)).map_or_else(|| self.refuse(), Ok)
    }
}

/// `true` or `false`.
pub(super) struct Switch;

impl Kind for Switch {
    type Value = bool;

    fn describe(&self) -> String {
        "true or false".to_owned()
    }

    fn read(&self, raw: &Raw) -> Result<bool, String> {
        raw.scalar().and_then(|text| text.parse().ok()).map_or_else(|| self.refuse(), Ok)
    }
}

/// `auto`, which becomes `None`, or a value of another kind.
pub(super) struct Auto<K>(pub K);

impl<K: Kind> Kind for Auto<K> {
    type Value = Option<K::Value>;

    fn describe(&self) -> String {
        format!("auto, or {}", self.0.describe())
    }

    fn read(&self, raw: &Raw) -> Result<Self::Value, String> {
        if raw.text() == Some("auto") {
            return Ok(None);
        }
        self.0.read(raw).map(Some).or_else(|_| self.refuse())
    }
}

/// `off`, 0 or false, which become `None`, or a limit. YAML reads a bare `off` as false, so configuration
/// files generated from YAML contain false.
pub(super) struct OrOff<K>(pub K);

impl<K: Kind> Kind for OrOff<K> {
    type Value = Option<K::Value>;

    fn describe(&self) -> String {
        format!("off, or {}", self.0.describe())
    }

    fn read(&self, raw: &Raw) -> Result<Self::Value, String> {
        if matches!(raw.scalar(), Some("off" | "0" | "false")) {
            return Ok(None);
        }
        self.0.read(raw).map(Some).map_err(|why| format!("{why}, or off"))
    }
}

/// `none`, which becomes `None`, or a value of another kind.
pub(super) struct OrNone<K>(pub K);

impl<K: Kind> Kind for OrNone<K> {
    type Value = Option<K::Value>;

    fn describe(&self) -> String {
        format!("none, or {}", self.0.describe())
    }

    fn read(&self, raw: &Raw) -> Result<Self::Value, String> {
        if raw.text() == Some("none") {
            return Ok(None);
        }
        self.0.read(raw).map(Some).or_else(|_| self.refuse())
    }
}

/// Text that `FromStr` parses.
pub(super) struct Parsed<T> {
    describe: &'static str,
    secret: bool,
    value: PhantomData<fn() -> T>,
}

impl<T> Parsed<T> {
    pub(super) const fn new(describe: &'static str) -> Self {
        Self { describe, secret: false, value: PhantomData }
    }

    /// For text that may contain a password.
    pub(super) const fn secret(describe: &'static str) -> Self {
        Self { describe, secret: true, value: PhantomData }
    }
}

impl<T: FromStr<Err: fmt::Display> + fmt::Debug> Kind for Parsed<T> {
    type Value = T;

    fn describe(&self) -> String {
        self.describe.to_owned()
    }

    fn read(&self, raw: &Raw) -> Result<T, String> {
        match raw.text() {
            Some(text) => text.parse().map_err(|error: T::Err| error.to_string()),
            None => self.refuse(),
        }
    }

    fn is_secret(&self) -> bool {
        self.secret
    }
}

/// A file.
pub(super) struct File {
    /// Whether the file contains a secret. Then the path is hidden as well, because users may give the secret
    /// itself by mistake.
    pub holds_secret: bool,
}

impl Kind for File {
    type Value = PathBuf;

    fn describe(&self) -> String {
        "the path of a file".to_owned()
    }

    fn read(&self, raw: &Raw) -> Result<PathBuf, String> {
        match raw.text() {
            Some(text) if !text.is_empty() && !text.contains('\0') => Ok(text.into()),
            _ => self.refuse(),
        }
    }

    fn is_secret(&self) -> bool {
        self.holds_secret
    }
}

/// A shared key. RFC 7518 §3.2 requires at least as many bits as the hash has.
pub(super) struct SharedKey;

impl Kind for SharedKey {
    type Value = Secret;

    fn describe(&self) -> String {
        "text of at least 32 bytes, for example the output of `openssl rand -base64 48`".to_owned()
    }

    fn read(&self, raw: &Raw) -> Result<Secret, String> {
        match raw.text() {
            Some(text) if holds_pem(text.as_bytes()) => {
                Err("expected a secret, this is PEM: public keys belong in auth.keys".to_owned())
            }
            Some(text) if text.len() >= 32 => Ok(Secret::new(text.as_bytes())),
            _ => self.refuse(),
        }
    }

    fn is_secret(&self) -> bool {
        true
    }
}

/// Key files by key id. Never shown, because users may give a secret instead of its file by mistake.
pub(super) struct KeyTable;

impl KeyTable {
    /// The maximum number of keys: every token may have to be looked up among them.
    const MAX: usize = 100;

    fn read_entry(id: &str, raw: &Raw) -> Result<KeyFile, String> {
        let Raw::Table(entries) = raw else {
            return Err(format!("{id:?}: expected a table, such as {}", Self::EXAMPLE));
        };
        if !(1..=Key::MAX_ID_BYTES).contains(&id.len()) {
            return Err(format!("expected names of 1 to {} bytes", Key::MAX_ID_BYTES));
        }
        let (mut algorithm, mut secret, mut public) = (None, None, None);
        for entry in entries {
            let text = entry.raw.text().filter(|text| !text.is_empty() && !text.contains('\0'));
            let text = text.ok_or_else(|| format!("{id:?}: expected text in {:?}", entry.key))?;
            match &*entry.key {
                "algorithm" => {
                    let named = text.parse::<Algorithm>();
                    algorithm = Some(named.map_err(|error| format!("{id:?}: {error}"))?);
                }
                "secret_file" => secret = Some(PathBuf::from(text)),
                "public_key_file" => public = Some(PathBuf::from(text)),
                other => {
                    return Err(format!(
                        "{id:?}: there is no key {other:?}; expected algorithm, and secret_file or public_key_file"
                    ));
                }
            }
        }
        let algorithm = algorithm.ok_or_else(|| format!("{id:?}: expected an algorithm"))?;
        let path = match (algorithm.is_shared(), secret, public) {
            (true, Some(path), None) | (false, None, Some(path)) => path,
            (shared, ..) => {
                let (file, name) =
                    (if shared { "secret_file" } else { "public_key_file" }, algorithm.as_str());
                return Err(format!("{id:?}: expected {file}, and nothing else, for {name}"));
            }
        };
        Ok(KeyFile { id: id.to_owned(), algorithm, path })
    }

    const EXAMPLE: &str = r#"{ algorithm = "ES256", public_key_file = "/etc/tidegate/key.pem" }"#;
}

impl Kind for KeyTable {
    type Value = Vec<KeyFile>;

    fn describe(&self) -> String {
        "a table of keys by name (`kid`), each with `algorithm` and a file: `secret_file` for HS256, HS384 and \
         HS512, `public_key_file` otherwise"
            .to_owned()
    }

    fn read(&self, raw: &Raw) -> Result<Self::Value, String> {
        let inline = raw.text().and_then(|text| Raw::value(text.trim()));
        let Raw::Table(entries) = inline.as_ref().unwrap_or(raw) else { return self.refuse() };
        if entries.len() > Self::MAX {
            return Err(format!("expected at most {} keys", Self::MAX));
        }
        let (keys, wrong): (Vec<_>, Vec<_>) =
            entries.iter().map(|entry| Self::read_entry(&entry.key, &entry.raw)).partition(Result::is_ok);
        if wrong.is_empty() {
            return Ok(keys.into_iter().flatten().collect());
        }
        Err(wrong.into_iter().filter_map(Result::err).collect::<Vec<_>>().join("; "))
    }

    fn is_secret(&self) -> bool {
        true
    }
}

/// Text that is not empty.
pub(super) struct Words;

impl Kind for Words {
    type Value = String;

    fn describe(&self) -> String {
        "text of 1 to 1024 bytes".to_owned()
    }

    fn read(&self, raw: &Raw) -> Result<String, String> {
        let sound = |text: &&str| (1..=1024).contains(&text.len()) && !text.contains(char::is_control);
        raw.text().filter(sound).map(str::to_owned).map_or_else(|| self.refuse(), Ok)
    }
}

/// A list of non-empty texts.
pub(super) struct WordList;

impl Kind for WordList {
    type Value = Vec<String>;

    fn describe(&self) -> String {
        r#"a list of at most 16 texts, such as ["https://chat.example"]"#.to_owned()
    }

    fn read(&self, raw: &Raw) -> Result<Vec<String>, String> {
        let texts = raw.texts().filter(|texts| texts.len() <= 16);
        let Some(texts) = texts else { return self.refuse() };
        texts
            .into_iter()
            .map(|text| Words.read(&Raw::Text(text)))
            .collect::<Result<_, _>>()
            .or_else(|_| self.refuse())
    }
}

/// Which web pages may connect.
pub(super) struct OriginList;

impl Kind for OriginList {
    type Value = Origins;

    fn describe(&self) -> String {
        r#"a list of origins, such as ["https://app.example", "https://*.example"] or ["*"]"#.to_owned()
    }

    fn read(&self, raw: &Raw) -> Result<Origins, String> {
        let Some(texts) = raw.texts() else { return self.refuse() };
        let patterns = texts.iter().map(|text| text.parse()).collect::<Result<_, _>>();
        patterns.map(Origins::new).or_else(|_| self.refuse())
    }
}

/// Addresses and networks.
pub(super) struct NetworkList;

impl Kind for NetworkList {
    type Value = Networks;

    fn describe(&self) -> String {
        r#"a list of IP addresses and networks, such as ["10.0.0.0/8", "::1"]"#.to_owned()
    }

    fn read(&self, raw: &Raw) -> Result<Networks, String> {
        let Some(texts) = raw.texts() else { return self.refuse() };
        Networks::parse(texts.iter().map(AsRef::as_ref)).or_else(|_| self.refuse())
    }
}

/// The header in which trusted proxies report a client's address.
pub(super) struct Header;

impl Kind for Header {
    type Value = ForwardedHeader;

    fn describe(&self) -> String {
        "x-forwarded-for or forwarded".to_owned()
    }

    fn read(&self, raw: &Raw) -> Result<ForwardedHeader, String> {
        match raw.text() {
            Some("x-forwarded-for") => Ok(ForwardedHeader::XForwardedFor),
            Some("forwarded") => Ok(ForwardedHeader::Forwarded),
            _ => self.refuse(),
        }
    }
}

/// The operations that are allowed in a room.
pub(super) struct OperationList;

impl Kind for OperationList {
    type Value = Operations;

    fn describe(&self) -> String {
        let names: Vec<&str> = Operation::ALL.into_iter().map(Operation::as_str).collect();
        format!("a list of operations: {}", names.join(", "))
    }

    fn read(&self, raw: &Raw) -> Result<Operations, String> {
        let Some(texts) = raw.texts() else { return self.refuse() };
        let operations = texts.iter().map(|text| text.parse::<Operation>()).collect::<Result<_, _>>();
        operations.or_else(|_| self.refuse())
    }
}

/// The format of log lines.
pub(super) struct Format;

impl Kind for Format {
    type Value = LogFormat;

    fn describe(&self) -> String {
        "text or json".to_owned()
    }

    fn read(&self, raw: &Raw) -> Result<LogFormat, String> {
        match raw.text() {
            Some("text") => Ok(LogFormat::Text),
            Some("json") => Ok(LogFormat::Json),
            _ => self.refuse(),
        }
    }
}
