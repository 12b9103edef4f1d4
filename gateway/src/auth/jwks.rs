//! Parsing of key sets (JWKS, RFC 7517 §5).
//!
//! Decides which keys of a document to use, and with which algorithm. Does not know where a document came
//! from, except that one from another machine ([`Origin::Url`]) may not contain shared secrets.
//!
//! Each key is used with exactly one algorithm: the one it names (`alg`), or else the default of its type:
//! RS256 for RSA, ES256 for P-256, ES384 for P-384, `EdDSA` for Ed25519. Keys that are not for verifying
//! (`use`, `key_ops`), of an unknown type, weak, malformed, or private are skipped. The other keys of the
//! document stay usable (RFC 7517 §5), and [`Document::ignored`] lists the skipped ones with the reasons.

use std::{borrow::Cow, fmt};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;

use super::key::{Algorithm, Family, Key, KeyError};

/// Where a document came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A file on this machine.
    File,
    /// Another machine, which must not know shared secrets.
    Url,
}

/// The keys of a document.
#[derive(Debug, Default)]
pub struct Document {
    /// The usable keys, in the document's order. Never empty after [`Document::read`].
    pub keys: Vec<Key>,
    /// The skipped keys.
    pub ignored: Vec<Ignored>,
}

/// A skipped key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ignored {
    /// Its index in the document, from 0.
    pub index: usize,
    /// The reason.
    pub why: Why,
}

/// Why a key was skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// Not a JWK, or a JWK that repeats a member.
    #[error("it is not a valid JWK, or it repeats a member")]
    Broken,
    /// `kty`, `crv` or `alg` is not supported.
    #[error("its type, curve or algorithm is not supported")]
    Unsupported,
    /// `alg` does not fit `kty` and `crv`.
    #[error("its algorithm does not fit its type")]
    Mismatch,
    /// `use` or `key_ops` reserves the key for another use.
    #[error("it is not for verifying")]
    OtherUse,
    /// It contains a private key.
    #[error("it contains a private key, which every reader of the set can see: replace the key")]
    Private,
    /// A shared secret in a set from a URL.
    #[error("it is a shared secret, which must not be in a published key set")]
    Shared,
    /// The key itself is invalid.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// Why a document cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    /// More bytes than [`Document::MAX_BYTES`].
    #[error("expected at most {max} bytes", max = Document::MAX_BYTES)]
    TooLong,
    /// Not a JWKS.
    #[error("expected a JSON object with a list of keys, {{\"keys\": […]}} (RFC 7517 §5)")]
    Malformed,
    /// More keys than [`Document::MAX_KEYS`].
    #[error("expected at most {max} keys", max = Document::MAX_KEYS)]
    TooMany,
    /// None of the keys can be used.
    #[error("expected at least one key that verifies tokens; the first was skipped because {0}")]
    NoneUsable(Why),
    /// The list of keys is empty.
    #[error("expected at least one key; the list is empty")]
    Empty,
}

impl Document {
    /// The largest document, in bytes.
    pub const MAX_BYTES: usize = 256 * 1024;

    /// The maximum number of keys in a document.
    pub const MAX_KEYS: usize = 100;

    /// Parses a document. Fails unless it has at least one usable key.
    pub fn read(json: &[u8], origin: Origin) -> Result<Self, DocumentError> {
        #[derive(Deserialize)]
        struct Raw<'a> {
            #[serde(borrow)]
            keys: Vec<&'a RawValue>,
        }

        if json.len() > Self::MAX_BYTES {
            return Err(DocumentError::TooLong);
        }
        // Some editors write a byte-order mark, and some servers pass it on. RFC 8259 §8.1 allows parsers to
        // ignore it.
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

/// The members that matter here. A repeated member is an error.
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
            // The secret's length does not identify the hash, so `alg` is required.
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
