//! Key sets as documents (RFC 7517 §5).
//!
//! Owns which keys of a document are taken, and for which algorithm. Does not know where a document came
//! from, except that one from elsewhere ([`Origin::Url`]) may hold no shared secrets.
//!
//! A key is taken for exactly one algorithm: the one it names (`alg`), or else the one of its type: RS256
//! for RSA, ES256 for P-256, ES384 for P-384, `EdDSA` for Ed25519. A key for anything but verifying (`use`,
//! `key_ops`), of an unknown type, weak, broken, or with a private part is passed over; the others of the
//! document stay usable (RFC 7517 §5), and [`Document::ignored`] says why.

use std::{borrow::Cow, fmt};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;

use super::key::{Algorithm, Family, Key, KeyError};

/// Where a document came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A file of this machine.
    File,
    /// Another machine, which has no business to know secrets.
    Url,
}

/// The keys of a document.
#[derive(Debug, Default)]
pub struct Document {
    /// What can be used, in the document's order. Never empty when it was read.
    pub keys: Vec<Key>,
    /// What cannot.
    pub ignored: Vec<Ignored>,
}

/// A key that was passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ignored {
    /// Its place in the document, counted from 0.
    pub index: usize,
    /// Why.
    pub why: Why,
}

/// Why a key was passed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// Not a JWK, or one with a member twice.
    #[error("it is no JWK, or has a member twice")]
    Broken,
    /// `kty`, `crv` or `alg` names nothing that is known here.
    #[error("its type, curve or algorithm is not supported")]
    Unsupported,
    /// `alg` does not fit `kty` and `crv`.
    #[error("its algorithm does not fit its type")]
    Mismatch,
    /// `use` or `key_ops` says something else.
    #[error("it is not for verifying")]
    OtherUse,
    /// It holds the private part.
    #[error("it holds a private key, which others can read now: replace it")]
    Private,
    /// A shared secret from elsewhere.
    #[error("it is a shared secret, which does not belong into a published key set")]
    Shared,
    /// Its bytes are no such key.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// Why a document cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    /// More bytes than [`Document::MAX_BYTES`].
    #[error("expected at most {max} bytes", max = Document::MAX_BYTES)]
    TooLong,
    /// Not a key set.
    #[error("expected a JSON object with a list of keys, {{\"keys\": […]}} (RFC 7517 §5)")]
    Malformed,
    /// More keys than [`Document::MAX_KEYS`].
    #[error("expected at most {max} keys", max = Document::MAX_KEYS)]
    TooMany,
    /// None of its keys can be used.
    #[error("expected at least one key that verifies tokens; the first was passed over because {0}")]
    NoneUsable(Why),
    /// It has none.
    #[error("expected at least one key, the list is empty")]
    Empty,
}

impl Document {
    /// The largest document, in bytes.
    pub const MAX_BYTES: usize = 256 * 1024;

    /// The most keys of a document.
    pub const MAX_KEYS: usize = 100;

    /// Reads a document that has at least one usable key.
    pub fn read(json: &[u8], origin: Origin) -> Result<Self, DocumentError> {
        #[derive(Deserialize)]
        struct Raw<'a> {
            #[serde(borrow)]
            keys: Vec<&'a RawValue>,
        }

        if json.len() > Self::MAX_BYTES {
            return Err(DocumentError::TooLong);
        }
        // Some editors write a byte-order mark, and some servers hand it on (RFC 8259 §8.1 allows to ignore it).
        let json = json.strip_prefix("\u{feff}".as_bytes()).unwrap_or(json);
        if json.trim_ascii_start().first() != Some(&b'{') {
            return Err(DocumentError::Malformed);
        }
        let raw: Raw<'_> = serde_json::from_slice(json).map_err(|_| DocumentError::Malformed)?;
        if raw.keys.len() > Self::MAX_KEYS {
            return Err(DocumentError::TooMany);
        }
        let mut document = Self::default();
        for (index, raw) in raw.keys.into_iter().enumerate() {
            match read_key(raw.get(), origin) {
                Ok(key) => document.keys.push(key),
                Err(why) => document.ignored.push(Ignored { index, why }),
            }
        }
        match document.ignored.first() {
            _ if !document.keys.is_empty() => Ok(document),
            Some(ignored) => Err(DocumentError::NoneUsable(ignored.why)),
            None => Err(DocumentError::Empty),
        }
    }
}

impl fmt::Display for Ignored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key {} of the set is not used: {}", self.index, self.why)
    }
}

/// The members that are read, each at most once.
#[derive(Deserialize)]
struct Jwk<'a> {
    #[serde(borrow)]
    kty: Cow<'a, str>,
    #[serde(borrow)]
    kid: Option<Cow<'a, str>>,
    #[serde(borrow)]
    alg: Option<Cow<'a, str>>,
    #[serde(borrow, rename = "use")]
    used_for: Option<Cow<'a, str>>,
    #[serde(borrow)]
    key_ops: Option<Vec<Cow<'a, str>>>,
    #[serde(borrow)]
    crv: Option<Cow<'a, str>>,
    #[serde(borrow)]
    x: Option<Cow<'a, str>>,
    #[serde(borrow)]
    y: Option<Cow<'a, str>>,
    #[serde(borrow)]
    n: Option<Cow<'a, str>>,
    #[serde(borrow)]
    e: Option<Cow<'a, str>>,
    #[serde(borrow)]
    k: Option<Cow<'a, str>>,
    d: Option<IgnoredAny>,
}

fn read_key(json: &str, origin: Origin) -> Result<Key, Why> {
    if !json.starts_with('{') {
        return Err(Why::Broken);
    }
    let jwk: Jwk<'_> = serde_json::from_str(json).map_err(|_| Why::Broken)?;
    if jwk.d.is_some() {
        return Err(Why::Private);
    }
    let for_signatures = jwk.used_for.as_deref().is_none_or(|used_for| used_for == "sig");
    let for_verifying = jwk.key_ops.as_ref().is_none_or(|ops| ops.iter().any(|op| op == "verify"));
    if !for_signatures || !for_verifying {
        return Err(Why::OtherUse);
    }
    let named = jwk.alg.as_deref().map(str::parse::<Algorithm>).transpose();
    let named = named.map_err(|_| Why::Unsupported)?;
    let id = jwk.kid.as_deref();
    match (&*jwk.kty, jwk.crv.as_deref()) {
        ("RSA", _) => {
            let algorithm = pin(named, Algorithm::Rs256, |own| own.family() == Family::Rsa)?;
            Ok(Key::rsa(id, algorithm, &bytes(jwk.n.as_deref())?, &bytes(jwk.e.as_deref())?)?)
        }
        ("EC", Some(curve @ ("P-256" | "P-384"))) => {
            let (own, coordinate) =
                if curve == "P-256" { (Algorithm::Es256, 32) } else { (Algorithm::Es384, 48) };
            let algorithm = pin(named, own, |named| named == own)?;
            let (x, y) = (bytes(jwk.x.as_deref())?, bytes(jwk.y.as_deref())?);
            if x.len() != coordinate || y.len() != coordinate {
                return Err(Why::Broken);
            }
            Ok(Key::curve(id, algorithm, &[&[4], &x[..], &y[..]].concat())?)
        }
        ("OKP", Some("Ed25519")) => {
            let algorithm = pin(named, Algorithm::EdDsa, |named| named == Algorithm::EdDsa)?;
            let x = bytes(jwk.x.as_deref())?;
            if x.len() != 32 {
                return Err(Why::Broken);
            }
            Ok(Key::curve(id, algorithm, &x)?)
        }
        ("oct", _) if origin == Origin::Url => Err(Why::Shared),
        ("oct", _) => {
            // The hash cannot be told from the secret's length alone, so it must be named.
            let algorithm = named.ok_or(Why::Unsupported)?;
            let algorithm = pin(Some(algorithm), algorithm, Algorithm::is_shared)?;
            Ok(Key::shared(id, algorithm, &bytes(jwk.k.as_deref())?)?)
        }
        _ => Err(Why::Unsupported),
    }
}

fn pin(named: Option<Algorithm>, own: Algorithm, fits: impl Fn(Algorithm) -> bool) -> Result<Algorithm, Why> {
    let algorithm = named.unwrap_or(own);
    if fits(algorithm) { Ok(algorithm) } else { Err(Why::Mismatch) }
}

fn bytes(member: Option<&str>) -> Result<Vec<u8>, Why> {
    let text = member.ok_or(Why::Broken)?;
    URL_SAFE_NO_PAD.decode(text).map_err(|_| Why::Broken)
}
