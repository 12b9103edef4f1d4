//! A single key that verifies tokens.
//!
//! Owns the algorithms, each pinned to the kind of key that fits it, and the parsing of a single key from a
//! secret or from PEM. Does not choose among keys ([`keyring`](super::keyring)) and reads no files.
//!
//! A [`Key`] is parsed and checked once, when it is loaded, and keeps one [`Algorithm`] for good (RFC 8725
//! §3.1). A token's header can choose among keys, but cannot use a key with another algorithm. Public keys
//! and shared secrets are distinct variants of [`Material`], so no token can use one as the other.

use std::{fmt, str::FromStr};

use aws_lc_rs::{
    hmac,
    rsa::{PublicEncryptingKey, PublicKeyComponents},
    signature::{self, EcdsaVerificationAlgorithm, ParsedPublicKey, RsaParameters},
};
use rustls::pki_types::pem::{PemObject as _, SectionKind};

/// A signature algorithm (RFC 7518 §3, RFC 8037 §3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// HMAC with SHA-256.
    Hs256,
    /// HMAC with SHA-384.
    Hs384,
    /// HMAC with SHA-512.
    Hs512,
    /// RSA, PKCS #1 v1.5, SHA-256.
    Rs256,
    /// RSA, PKCS #1 v1.5, SHA-384.
    Rs384,
    /// RSA, PKCS #1 v1.5, SHA-512.
    Rs512,
    /// RSA-PSS, SHA-256.
    Ps256,
    /// RSA-PSS, SHA-384.
    Ps384,
    /// RSA-PSS, SHA-512.
    Ps512,
    /// ECDSA on P-256, SHA-256.
    Es256,
    /// ECDSA on P-384, SHA-384.
    Es384,
    /// Ed25519. RFC 9864 names it `Ed25519`, which is accepted as well.
    EdDsa,
}

/// The text is not the name of an [`Algorithm`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "an algorithm is one of HS256, HS384, HS512, RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA"
)]
pub struct UnknownAlgorithm;

/// The kind of key that an algorithm needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// A secret that signer and verifier share.
    Shared,
    /// RSA.
    Rsa,
    /// A NIST elliptic curve. The name is that of a JWK's `kty`.
    Ec,
    /// Ed25519.
    Ed,
}

impl Algorithm {
    /// Every algorithm. `none` is not supported.
    pub const ALL: [Self; 12] = [
        Self::Hs256,
        Self::Hs384,
        Self::Hs512,
        Self::Rs256,
        Self::Rs384,
        Self::Rs512,
        Self::Ps256,
        Self::Ps384,
        Self::Ps512,
        Self::Es256,
        Self::Es384,
        Self::EdDsa,
    ];

    /// The name in a token's header.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hs256 => "HS256",
            Self::Hs384 => "HS384",
            Self::Hs512 => "HS512",
            Self::Rs256 => "RS256",
            Self::Rs384 => "RS384",
            Self::Rs512 => "RS512",
            Self::Ps256 => "PS256",
            Self::Ps384 => "PS384",
            Self::Ps512 => "PS512",
            Self::Es256 => "ES256",
            Self::Es384 => "ES384",
            Self::EdDsa => "EdDSA",
        }
    }

    /// The kind of key that the algorithm needs.
    pub fn family(self) -> Family {
        match self {
            Self::Hs256 | Self::Hs384 | Self::Hs512 => Family::Shared,
            Self::Rs256 | Self::Rs384 | Self::Rs512 | Self::Ps256 | Self::Ps384 | Self::Ps512 => Family::Rsa,
            Self::Es256 | Self::Es384 => Family::Ec,
            Self::EdDsa => Family::Ed,
        }
    }

    /// Whether the verifying key can also sign.
    pub fn is_shared(self) -> bool {
        self.family() == Family::Shared
    }

    /// The length of the shortest secret, in bytes: that of the hash (RFC 7518 §3.2). 0 for public keys.
    pub fn min_secret_bytes(self) -> usize {
        match self {
            Self::Hs256 => 32,
            Self::Hs384 => 48,
            Self::Hs512 => 64,
            _ => 0,
        }
    }

    fn hmac(self) -> Option<hmac::Algorithm> {
        match self {
            Self::Hs256 => Some(hmac::HMAC_SHA256),
            Self::Hs384 => Some(hmac::HMAC_SHA384),
            Self::Hs512 => Some(hmac::HMAC_SHA512),
            _ => None,
        }
    }

    fn rsa(self) -> Option<&'static RsaParameters> {
        match self {
            Self::Rs256 => Some(&signature::RSA_PKCS1_2048_8192_SHA256),
            Self::Rs384 => Some(&signature::RSA_PKCS1_2048_8192_SHA384),
            Self::Rs512 => Some(&signature::RSA_PKCS1_2048_8192_SHA512),
            Self::Ps256 => Some(&signature::RSA_PSS_2048_8192_SHA256),
            Self::Ps384 => Some(&signature::RSA_PSS_2048_8192_SHA384),
            Self::Ps512 => Some(&signature::RSA_PSS_2048_8192_SHA512),
            _ => None,
        }
    }

    /// `FIXED` is the signature format of RFC 7518 §3.4. Accepting ASN.1 as well would give each signature a
    /// second spelling.
    fn ecdsa(self) -> Option<&'static EcdsaVerificationAlgorithm> {
        match self {
            Self::Es256 => Some(&signature::ECDSA_P256_SHA256_FIXED),
            Self::Es384 => Some(&signature::ECDSA_P384_SHA384_FIXED),
            _ => None,
        }
    }
}

/// Case-sensitive: `hs256` is not an algorithm.
impl FromStr for Algorithm {
    type Err = UnknownAlgorithm;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "Ed25519" {
            return Ok(Self::EdDsa);
        }
        Self::ALL.into_iter().find(|algorithm| algorithm.as_str() == text).ok_or(UnknownAlgorithm)
    }
}

/// A key that verifies tokens.
pub struct Key {
    id: Option<Box<str>>,
    algorithm: Algorithm,
    material: Material,
}

enum Material {
    /// Boxed: it holds the state of its hash, which is much larger than a parsed public key's handle.
    Shared(Box<hmac::Key>),
    Public(ParsedPublicKey),
}

/// Why something cannot be used as a key. Contains no part of the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The key id is empty or longer than [`Key::MAX_ID_BYTES`].
    #[error("a key's name (`kid`) has 1 to {max} bytes", max = Key::MAX_ID_BYTES)]
    Id,
    /// The secret is shorter than the algorithm's hash.
    #[error("expected a secret of at least {0} bytes")]
    WeakSecret(usize),
    /// The secret is in PEM. It may be a public key, which everybody knows (RFC 8725 §2.1).
    #[error("expected a secret, this is PEM: a key or certificate that others may know")]
    PemAsSecret,
    /// A private key instead of a public one.
    #[error(
        "expected a public key, this is a private key: keep it where tokens are signed, and give the node the output of `openssl pkey -pubout`"
    )]
    Private,
    /// A certificate instead of a public key.
    #[error(
        "expected a public key, this is a certificate: give the node the output of `openssl x509 -pubkey -noout`"
    )]
    Certificate,
    /// The text contains no public key.
    #[error("expected one public key in PEM (BEGIN PUBLIC KEY)")]
    NotPem,
    /// There are two or more keys.
    #[error("expected one public key, this file has several: use one file and one name (`kid`) for each")]
    Several,
    /// Not a public key, or one of another kind or curve.
    #[error(
        "expected a key for {0}: an RSA key for RS and PS, P-256 for ES256, P-384 for ES384, Ed25519 for EdDSA"
    )]
    Unfit(&'static str),
    /// An RSA key that is too weak.
    #[error("expected an RSA key of 2048 to 8192 bits with an odd exponent above 1")]
    WeakRsa,
}

impl Key {
    /// The longest key id (`kid`), in bytes.
    pub const MAX_ID_BYTES: usize = 256;

    /// A shared secret.
    pub fn shared(id: Option<&str>, algorithm: Algorithm, secret: &[u8]) -> Result<Self, KeyError> {
        let Some(hash) = algorithm.hmac() else { return Err(KeyError::Unfit(algorithm.as_str())) };
        if holds_pem(secret) {
            return Err(KeyError::PemAsSecret);
        }
        if secret.len() < algorithm.min_secret_bytes() {
            return Err(KeyError::WeakSecret(algorithm.min_secret_bytes()));
        }
        Self::new(id, algorithm, Material::Shared(Box::new(hmac::Key::new(hash, secret))))
    }

    /// A public key in PEM (RFC 7468 §13).
    pub fn public(id: Option<&str>, algorithm: Algorithm, pem: &[u8]) -> Result<Self, KeyError> {
        let sections: Result<Vec<(SectionKind, Vec<u8>)>, _> =
            <(SectionKind, Vec<u8>)>::pem_slice_iter(pem).collect();
        let sections = sections.map_err(|_| KeyError::NotPem)?;
        let is_private = |kind| {
            matches!(kind, SectionKind::PrivateKey | SectionKind::RsaPrivateKey | SectionKind::EcPrivateKey)
        };
        // Also search the text: the parser ignores encrypted private keys.
        if sections.iter().any(|(kind, _)| is_private(*kind)) || contains(pem, b"PRIVATE KEY-----") {
            return Err(KeyError::Private);
        }
        let mut keys = sections.iter().filter(|(kind, _)| *kind == SectionKind::PublicKey);
        match (keys.next(), keys.next()) {
            (Some((_, spki)), None) => Self::of_spki(id, algorithm, spki),
            (Some(_), Some(_)) => Err(KeyError::Several),
            (None, _) if sections.iter().any(|(kind, _)| *kind == SectionKind::Certificate) => {
                Err(KeyError::Certificate)
            }
            (None, _) => Err(KeyError::NotPem),
        }
    }

    /// An RSA key from its modulus and exponent, big-endian (RFC 7518 §6.3.1).
    pub(super) fn rsa(id: Option<&str>, algorithm: Algorithm, n: &[u8], e: &[u8]) -> Result<Self, KeyError> {
        let unfit = KeyError::Unfit(algorithm.as_str());
        let parameters = algorithm.rsa().ok_or(unfit)?;
        let odd_and_not_one = e.last().is_some_and(|last| last % 2 == 1) && *e != [1];
        if !odd_and_not_one || e.first() == Some(&0) {
            return Err(KeyError::WeakRsa);
        }
        let components = PublicKeyComponents { n, e };
        let key = components.to_parsed_public_key(parameters).map_err(|_| KeyError::WeakRsa)?;
        check_rsa(key.as_ref())?;
        Self::new(id, algorithm, Material::Public(key))
    }

    /// A key from a point on the algorithm's curve, uncompressed (SEC 1 §2.3.3), or an Ed25519 key (RFC 8032
    /// §5.1.5).
    pub(super) fn curve(id: Option<&str>, algorithm: Algorithm, bytes: &[u8]) -> Result<Self, KeyError> {
        if algorithm.family() == Family::Rsa {
            return Err(KeyError::Unfit(algorithm.as_str()));
        }
        Self::of_bytes(id, algorithm, bytes)
    }

    /// The key id (`kid`).
    pub fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// The only algorithm that the key is used with.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Whether `signature` is a valid signature of `signed` by this key. HMACs are compared in constant time.
    pub fn verifies(&self, signed: &[u8], signature: &[u8]) -> bool {
        match &self.material {
            Material::Shared(key) => hmac::verify(key, signed, signature).is_ok(),
            Material::Public(key) => key.verify_sig(signed, signature).is_ok(),
        }
    }

    fn of_spki(id: Option<&str>, algorithm: Algorithm, spki: &[u8]) -> Result<Self, KeyError> {
        let key = Self::of_bytes(id, algorithm, spki)?;
        if algorithm.family() == Family::Rsa {
            check_rsa(spki)?;
        }
        let is_v1_5 = matches!(algorithm, Algorithm::Rs256 | Algorithm::Rs384 | Algorithm::Rs512);
        // The library accepts such keys for PKCS #1 v1.5.
        if is_v1_5 && contains(spki.get(..40).unwrap_or(spki), RSASSA_PSS) {
            return Err(KeyError::Unfit(algorithm.as_str()));
        }
        Ok(key)
    }

    fn of_bytes(id: Option<&str>, algorithm: Algorithm, bytes: &[u8]) -> Result<Self, KeyError> {
        let unfit = KeyError::Unfit(algorithm.as_str());
        let key = if let Some(parameters) = algorithm.rsa() {
            ParsedPublicKey::new(parameters, bytes)
        } else if let Some(curve) = algorithm.ecdsa() {
            ParsedPublicKey::new(curve, bytes)
        } else if algorithm == Algorithm::EdDsa {
            ParsedPublicKey::new(&signature::ED25519, bytes)
        } else {
            return Err(unfit);
        };
        Self::new(id, algorithm, Material::Public(key.map_err(|_| unfit)?))
    }

    fn new(id: Option<&str>, algorithm: Algorithm, material: Material) -> Result<Self, KeyError> {
        if id.is_some_and(|id| !(1..=Self::MAX_ID_BYTES).contains(&id.len())) {
            return Err(KeyError::Id);
        }
        Ok(Self { id: id.map(Box::from), algorithm, material })
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key")
            .field("id", &self.id)
            .field("algorithm", &self.algorithm)
            .finish_non_exhaustive()
    }
}

/// The object identifier of a key restricted to PSS, as encoded near the start of a `SubjectPublicKeyInfo`
/// (RFC 4055 §1.2).
const RSASSA_PSS: &[u8] = &[6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 13, 1, 1, 10];

/// The library checks the size only when it verifies a signature. This refuses a weak key when it is loaded.
fn check_rsa(spki: &[u8]) -> Result<(), KeyError> {
    let key = PublicEncryptingKey::from_der(spki).map_err(|_| KeyError::WeakRsa)?;
    if (2048..=8192).contains(&key.key_size_bits()) { Ok(()) } else { Err(KeyError::WeakRsa) }
}

/// Whether the text contains the start of a PEM section.
pub(crate) fn holds_pem(text: &[u8]) -> bool {
    contains(text, b"-----BEGIN ")
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}
