//! Verification of tokens.
//!
//! Verifies JWTs (RFC 7519, following RFC 8725) and returns identities. Does not look for tokens in requests
//! ([`credential`](super::credential)), and does not count or log failures.
//!
//! The order is: header, keys, signature, claims, time. No claim is read before the signature has proved who
//! signed it. From the header, `alg` and `kid` choose among the node's own keys
//! ([`keyring`](super::keyring)); a key is used only with the algorithm that it is pinned to. Keys and key
//! URLs in the header (`jwk`, `jku`, `x5u`, `x5c`) are ignored.
//!
//! | header | meaning |
//! |---|---|
//! | `alg` | required; must be the algorithm that the key is pinned to |
//! | `kid` | the key's id; 1 to 256 bytes |
//! | `typ` | absent, `JWT` or `at+jwt` (RFC 9068), in any case, optionally with `application/`; any other token was issued for another purpose (RFC 8725 §3.11) |
//! | `crit`, `b64` | must be absent |
//! | others | ignored |
//!
//! | claim | meaning |
//! |---|---|
//! | `sub` | required; see [`Subject`] |
//! | `exp` | required; the token is invalid from this second on |
//! | `nbf` | the token is invalid before this second |
//! | `iat` | must be a time; has no effect |
//! | `iss` | with `auth.issuer`: must be exactly that; otherwise ignored |
//! | `aud` | with `auth.audience`: must be, or contain, one of those; otherwise it must be absent, because the node has no name to compare it with |
//! | `rooms` | a map from [`RoomPattern`]s, each once, to lists of [`Operation`]s; `{sub}` has no meaning here, because the issuer knows the subject |
//! | others | ignored |
//!
//! A claim of the wrong type, an unknown operation or an invalid pattern makes the whole token invalid. An
//! issuer's mistake thus shows at the first attempt, and not as a permission that is silently missing.

use std::{
    borrow::Cow,
    collections::HashSet,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{
    AuthFailure, Identity, Subject, Token, UnixSeconds,
    grant::{Grant, Operation, Operations, Policy, RoomPattern},
    key::{Algorithm, Key},
    keyring::Keyring,
};

/// The settings of an [`Authenticator`].
pub struct AuthConfig {
    /// The keys that tokens are signed with.
    pub keys: Arc<Keyring>,
    /// The required `iss`, if any.
    pub issuer: Option<String>,
    /// `aud` must contain one of these names. If empty, a token must not have an `aud`.
    pub audience: Vec<String>,
    /// The tolerated difference between the issuer's clock and this node's. Fractions of a second are
    /// dropped.
    pub leeway: Duration,
    /// What every valid token may do in addition to its grants.
    pub policies: Vec<Policy>,
}

impl AuthConfig {
    /// One secret for HS256 and nothing else: no issuer, no audience, no leeway, no policies.
    ///
    /// # Panics
    ///
    /// If the secret is shorter than [`Authenticator::MIN_SECRET_BYTES`]. The configuration refuses such
    /// secrets.
    pub fn with_secret(secret: &[u8]) -> Self {
        let key =
            Key::shared(None, Algorithm::Hs256, secret).expect("the configuration refuses weak secrets");
        Self {
            keys: Arc::new(Keyring::new(vec![key], Vec::new())),
            issuer: None,
            audience: Vec::new(),
            leeway: Duration::ZERO,
            policies: Vec::new(),
        }
    }
}

/// Verifies tokens. All threads of a node share it.
pub struct Authenticator {
    keys: Arc<Keyring>,
    issuer: Option<String>,
    audience: Vec<String>,
    leeway: Duration,
    policies: Arc<[Policy]>,
    shared_grants: SharedGrants,
}

impl Authenticator {
    /// The shortest HS256 secret, in bytes. A secret shorter than the hash is easier to guess than the hash
    /// (RFC 7518 §3.2).
    pub const MIN_SECRET_BYTES: usize = 32;

    /// The maximum number of room patterns in a token.
    pub const MAX_GRANTS: usize = 256;

    /// Builds an authenticator from its settings.
    pub fn new(config: AuthConfig) -> Self {
        let AuthConfig { keys, issuer, audience, leeway, policies } = config;
        let (policies, shared_grants) = (policies.into(), SharedGrants::default());
        Self { keys, issuer, audience, leeway, policies, shared_grants }
    }

    /// The keys. On [`AuthFailure::UnknownKey`], ask them for a fetch.
    pub fn keys(&self) -> &Keyring {
        &self.keys
    }

    /// Verifies a token at the time `now` and returns the identity that it proves.
    pub fn verify(&self, token: &Token, now: UnixSeconds) -> Result<Identity, AuthFailure> {
        let claims = self.genuine(token.expose())?;
        let claims = Claims::parse(&claims, self.issuer.as_deref(), &self.audience)?;
        // The leeway works in the client's favour at both ends, also for a session that begins within it.
        let expires_at = claims.expires_at.plus(self.leeway);
        if now >= expires_at {
            return Err(AuthFailure::Expired);
        }
        if claims.not_before.is_some_and(|not_before| now.plus(self.leeway) < not_before) {
            return Err(AuthFailure::NotYetValid);
        }
        Ok(Identity {
            subject: claims.subject,
            expires_at,
            grants: self.shared_grants.share(claims.grants),
            policies: Arc::clone(&self.policies),
        })
    }

    /// The payload of a token that one of the keys has signed.
    fn genuine(&self, token: &str) -> Result<Vec<u8>, AuthFailure> {
        let (signed, signature) = token.rsplit_once('.').ok_or(AuthFailure::Malformed)?;
        let (header, payload) = signed.split_once('.').ok_or(AuthFailure::Malformed)?;
        if payload.contains('.') {
            // Encrypted tokens have five parts (RFC 7516 §3.1).
            return Err(AuthFailure::Malformed);
        }
        let header = decode(header)?;
        let (algorithm, id) = check_header(&header)?;
        let signature = decode(signature)?;
        let keys = self.keys.current();
        if keys.find(algorithm, id.as_deref())?.iter().any(|key| key.verifies(signed.as_bytes(), &signature))
        {
            decode(payload)
        } else {
            Err(AuthFailure::BadSignature)
        }
    }
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authenticator")
            .field("leeway", &self.leeway)
            .field("policies", &self.policies)
            .finish_non_exhaustive()
    }
}

/// Strict about padding and trailing bits, so that a token has only one valid encoding.
fn decode(part: &str) -> Result<Vec<u8>, AuthFailure> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_| AuthFailure::Malformed)
}

/// Parses one JSON object. serde alone would also accept an array for a struct.
fn read_object<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Option<T> {
    let is_object = json.trim_ascii_start().first() == Some(&b'{');
    is_object.then(|| serde_json::from_slice(json).ok()).flatten()
}

/// A field that is present, even if it is `null`: a plain `Option` treats `null` as absent.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// Validates the header and returns the algorithm and the key id, if any.
fn check_header(json: &[u8]) -> Result<(Algorithm, Option<Cow<'_, str>>), AuthFailure> {
    /// The fields that matter here. A repeated field is an error.
    #[derive(Deserialize)]
    struct Header<'a> {
        #[serde(borrow)]
        alg: Cow<'a, str>,
        #[serde(borrow, default, deserialize_with = "present")]
        kid: Option<Cow<'a, str>>,
        #[serde(borrow, default, deserialize_with = "present")]
        typ: Option<Cow<'a, str>>,
        #[serde(default, deserialize_with = "present")]
        crit: Option<IgnoredAny>,
        #[serde(default, deserialize_with = "present")]
        b64: Option<IgnoredAny>,
    }

    let header: Header<'_> = read_object(json).ok_or(AuthFailure::Malformed)?;
    let algorithm = header.alg.parse().map_err(|_| AuthFailure::WrongAlgorithm)?;
    // `b64` is an extension that `crit` must name. RFC 7797 §7 forbids it in a JWT.
    if header.crit.is_some() || header.b64.is_some() {
        return Err(AuthFailure::CriticalHeader);
    }
    if header.kid.as_ref().is_some_and(|id| !(1..=Key::MAX_ID_BYTES).contains(&id.len())) {
        return Err(AuthFailure::Malformed);
    }
    if header.typ.is_some_and(|typ| !is_access_token(&typ)) {
        return Err(AuthFailure::WrongType);
    }
    Ok((algorithm, header.kid))
}

/// Whether `typ` (RFC 7515 §4.1.9) is that of an access token.
fn is_access_token(typ: &str) -> bool {
    const PREFIX: &str = "application/";
    let bare = match typ.split_at_checked(PREFIX.len()) {
        Some((prefix, rest)) if prefix.eq_ignore_ascii_case(PREFIX) => rest,
        _ => typ,
    };
    bare.eq_ignore_ascii_case("jwt") || bare.eq_ignore_ascii_case("at+jwt")
}

/// The claims that matter here, validated.
struct Claims {
    subject: Subject,
    expires_at: UnixSeconds,
    not_before: Option<UnixSeconds>,
    grants: Vec<Grant>,
}

impl Claims {
    fn parse(json: &[u8], issuer: Option<&str>, audience: &[String]) -> Result<Self, AuthFailure> {
        /// The claims as raw JSON, so that each can fail with its own error. A repeated claim is an error.
        #[derive(Deserialize)]
        struct Raw<'a> {
            #[serde(borrow, default, deserialize_with = "present")]
            sub: Option<&'a RawValue>,
            #[serde(borrow, default, deserialize_with = "present")]
            exp: Option<&'a RawValue>,
            #[serde(borrow, default, deserialize_with = "present")]
            nbf: Option<&'a RawValue>,
            #[serde(borrow, default, deserialize_with = "present")]
            iat: Option<&'a RawValue>,
            #[serde(borrow, default, deserialize_with = "present")]
            iss: Option<&'a RawValue>,
            #[serde(borrow, default, deserialize_with = "present")]
            aud: Option<&'a RawValue>,
            #[serde(borrow, default, deserialize_with = "present")]
            rooms: Option<&'a RawValue>,
        }

        let raw: Raw<'_> = read_object(json).ok_or(AuthFailure::InvalidPayload)?;
        let subject = raw
            .sub
            .and_then(|sub| serde_json::from_str::<Cow<'_, str>>(sub.get()).ok())
            .and_then(|sub| Subject::new(&sub).ok())
            .ok_or(AuthFailure::InvalidSubject)?;
        let expires_at = numeric_date(raw.exp.ok_or(AuthFailure::InvalidTime)?, f64::floor)?;
        let not_before = raw.nbf.map(|nbf| numeric_date(nbf, f64::ceil)).transpose()?;
        raw.iat.map(|iat| numeric_date(iat, f64::floor)).transpose()?;
        if issuer.is_some_and(|issuer| !raw.iss.is_some_and(|claim| is_issuer(claim, issuer))) {
            return Err(AuthFailure::WrongIssuer);
        }
        if !raw.aud.map_or(audience.is_empty(), |claim| is_audience(claim, audience)) {
            return Err(AuthFailure::ForeignAudience);
        }
        let grants = raw.rooms.map(parse_rooms).transpose()?.unwrap_or_default();
        Ok(Self { subject, expires_at, not_before, grants })
    }
}

/// Compares character by character (RFC 7519 §2, StringOrURI): `https://a` is not `https://a/`.
fn is_issuer(claim: &RawValue, issuer: &str) -> bool {
    serde_json::from_str::<Cow<'_, str>>(claim.get()).is_ok_and(|claim| claim == issuer)
}

/// A string, or a list of strings (RFC 7519 §4.1.3). A list with any other value does not match.
fn is_audience(claim: &RawValue, own: &[String]) -> bool {
    let is_own = |name: &Cow<'_, str>| own.iter().any(|own| own == name);
    match serde_json::from_str::<Cow<'_, str>>(claim.get()) {
        Ok(name) => is_own(&name),
        Err(_) => {
            serde_json::from_str::<Vec<Cow<'_, str>>>(claim.get()).is_ok_and(|all| all.iter().any(is_own))
        }
    }
}

/// RFC 7519 §2 allows fractions. They are rounded towards the shorter validity.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "the value is a whole number between 0 and UnixSeconds::MAX, far below 2^53"
)]
fn numeric_date(raw: &RawValue, round: fn(f64) -> f64) -> Result<UnixSeconds, AuthFailure> {
    match serde_json::from_str::<f64>(raw.get()).map(round) {
        Ok(seconds) if (0.0..=UnixSeconds::MAX.0 as f64).contains(&seconds) => {
            Ok(UnixSeconds(seconds as u64))
        }
        _ => Err(AuthFailure::InvalidTime),
    }
}

fn parse_rooms(raw: &RawValue) -> Result<Vec<Grant>, AuthFailure> {
    let Entries(entries) = serde_json::from_str(raw.get()).map_err(|_| AuthFailure::InvalidRooms)?;
    if entries.len() > Authenticator::MAX_GRANTS {
        return Err(AuthFailure::TooManyGrants);
    }
    let mut patterns = HashSet::with_capacity(entries.len());
    let mut grants = Vec::with_capacity(entries.len());
    for (pattern, operations) in &entries {
        if !patterns.insert(pattern) {
            return Err(AuthFailure::InvalidRooms);
        }
        let pattern: RoomPattern = pattern.parse().map_err(|_| AuthFailure::InvalidPattern)?;
        let operations = operations
            .iter()
            .map(|operation| operation.parse::<Operation>())
            .collect::<Result<Operations, _>>()
            .map_err(|_| AuthFailure::UnknownOperation)?;
        grants.push(Grant { pattern, operations });
    }
    Ok(grants)
}

/// The entries of a JSON object in their order. A map would hide repeated keys. Bounded by the length of a
/// token.
struct Entries<'a>(Vec<(Cow<'a, str>, Vec<Cow<'a, str>>)>);

impl<'de: 'a, 'a> Deserialize<'de> for Entries<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;

        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from room patterns to lists of operations")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(EntriesVisitor)
    }
}

/// Grants that several sessions share. Most sessions of a node have the same few grants and differ only in
/// the subject.
#[derive(Default)]
struct SharedGrants(Mutex<HashSet<Arc<[Grant]>>>);

impl SharedGrants {
    /// The maximum number of remembered sets.
    const CAPACITY: usize = 1024;

    fn share(&self, mut grants: Vec<Grant>) -> Arc<[Grant]> {
        // Sort, so that equal sets compare equal, and drop grants without operations.
        grants.retain(|grant| !grant.operations.is_empty());
        grants.sort_unstable_by(|one, other| one.pattern.cmp(&other.pattern));
        // Ignore poisoning: a panic while the lock is held cannot leave the set inconsistent.
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = known.get(grants.as_slice()) {
            return Arc::clone(shared);
        }
        if known.len() >= Self::CAPACITY {
            known.retain(|grants| Arc::strong_count(grants) > 1);
            // Many sets in use: every token has its own grants, and there is nothing to share. Clearing the
            // whole set keeps the scan above rare. Sessions keep the grants that they hold.
            if known.len() > Self::CAPACITY / 2 {
                known.clear();
            }
        }
        let grants: Arc<[Grant]> = grants.into();
        known.insert(Arc::clone(&grants));
        grants
    }
}

#[cfg(test)]
impl Authenticator {
    /// The number of remembered sets.
    pub(super) fn remembered_grants(&self) -> usize {
        self.shared_grants.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(super) const REMEMBERED_GRANTS: usize = SharedGrants::CAPACITY;
}
