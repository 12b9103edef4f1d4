//! TLS to the servers that a node connects to: which certificates it trusts, and how it explains a failure.
//!
//! Owns the verification of server certificates, for Redis and for key sets. Besides chains to an authority, it trusts
//! any certificate that is itself in the CA file, byte for byte. `openssl req -x509` makes such self-signed
//! certificates, and marks them as an authority, which RFC 5280 does not allow for a server. Their dates and names are
//! checked like those of any other certificate.
//!
//! Names are matched against the `subjectAltName` only; a common name does not count (RFC 9525 §2).

use std::{io, sync::Arc, time::Duration};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, InvalidMessage, RootCertStore,
    SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor, verify_server_name,
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
    server::ParsedCertificate,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Why the trusted certificates cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The CA file contains no certificate.
    #[error("expected at least one certificate in PEM (BEGIN CERTIFICATE)")]
    NoCertificate,
    /// The CA file contains a certificate that cannot be parsed.
    #[error("certificate {number} cannot be read: {error}")]
    BadCertificate {
        /// Its place in the file, counted from 1.
        number: usize,
        /// What is wrong with it.
        error: String,
    },
    /// The system has no certificate authorities.
    #[error("this machine trusts no certificate authority; install ca-certificates or name a CA file")]
    NoRoots,
    /// TLS cannot be set up.
    #[error("TLS cannot be set up: {0}")]
    Setup(String),
}

/// Why a handshake failed, in words for an operator.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct HandshakeError(String);

/// Opens TLS sessions with servers.
#[derive(Clone)]
pub struct Client(TlsConnector);

impl Client {
    /// Trusts the certificates in `ca_pem`, or the system's authorities if there is none.
    pub fn new(ca_pem: Option<&[u8]>) -> Result<Self, TrustError> {
        Ok(Self(TlsConnector::from(Arc::new(client_config(ca_pem)?))))
    }

    /// Performs the handshake with a server that must prove to be `name`.
    pub async fn connect<S>(
        &self,
        name: &ServerName<'static>,
        stream: S,
    ) -> Result<TlsStream<S>, HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.0.connect(name.clone(), stream).await.map_err(|error| HandshakeError(in_words(&error)))
    }
}

/// The configuration for a client that trusts the certificates in `ca_pem`, or the system's authorities if there is
/// none.
pub fn client_config(ca_pem: Option<&[u8]>) -> Result<ClientConfig, TrustError> {
    let setup = |error: &dyn std::error::Error| TrustError::Setup(error.to_string());
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Verifier::new(ca_pem, &provider)?;
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| setup(&error))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth())
}

/// Why a handshake failed. For a faulty certificate, the text says how to make a valid one.
pub fn in_words(error: &io::Error) -> String {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(Error::InvalidCertificate(error)) => format!("the server's certificate {}", fault(error)),
        Some(Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
            "the server does not speak TLS at this port".to_owned()
        }
        Some(error) => format!("TLS: {error}"),
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            "the server closed the connection during the TLS handshake".to_owned()
        }
        None => error.to_string(),
    }
}

fn fault(error: &CertificateError) -> String {
    const SIGNED_BY_NOBODY: &str =
        "is signed by no authority that is trusted here, and is itself not in the CA file";
    const NAMELESS: &str = "has no subjectAltName, and a common name alone does not count (RFC 9525): make one \
                            with subjectAltName";
    match error {
        CertificateError::UnknownIssuer => SIGNED_BY_NOBODY.to_owned(),
        CertificateError::BadSignature => {
            "is signed in the name of an authority that is trusted here, and not by its key".to_owned()
        }
        CertificateError::NotValidForNameContext { presented, .. } if presented.is_empty() => {
            NAMELESS.to_owned()
        }
        CertificateError::NotValidForNameContext { expected, presented } => {
            let presented: Vec<_> = presented.iter().map(|name| bare(name)).collect();
            format!("is for {}, not for {}", presented.join(", "), expected.to_str())
        }
        CertificateError::ExpiredContext { time, not_after } => {
            format!("expired {} ago", span(not_after.as_secs(), time.as_secs()))
        }
        CertificateError::NotValidYetContext { time, not_before } => {
            let until = span(time.as_secs(), not_before.as_secs());
            format!("is not valid yet: it will be in {until}, by this machine's clock")
        }
        // The library has no public types for these errors.
        CertificateError::Other(other) => match other.to_string().as_str() {
            "CaUsedAsEndEntity" => {
                "is an authority's (CA:TRUE), which no server may be unless the certificate \
                                    itself is in the CA file"
                    .to_owned()
            }
            "UnsupportedCertVersion" => format!("is of X.509 version 1; {NAMELESS}"),
            other => format!("cannot be used: {other}"),
        },
        other => format!("cannot be used: {other}"),
    }
}

/// The time between two times, in the largest unit that fits.
fn span(from: u64, to: u64) -> String {
    let seconds = to.saturating_sub(from);
    let (count, unit) = match seconds {
        86_400.. => (seconds / 86_400, "day"),
        3_600.. => (seconds / 3_600, "hour"),
        60.. => (seconds / 60, "minute"),
        _ => (seconds, "second"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

/// Extracts `name` from `DnsName("name")`, the library's format.
fn bare(shown: &str) -> &str {
    let inside = shown.split_once('(').and_then(|(_, inside)| inside.strip_suffix(')'));
    inside.unwrap_or(shown).trim_matches('"')
}

/// Trusts chains to the authorities, and certificates that are listed themselves.
#[derive(Debug)]
struct Verifier {
    chains: Arc<WebPkiServerVerifier>,
    listed: Vec<CertificateDer<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn new(ca_pem: Option<&[u8]>, provider: &Arc<CryptoProvider>) -> Result<Self, TrustError> {
        let mut roots = RootCertStore::empty();
        let mut listed = Vec::new();
        if let Some(pem) = ca_pem {
            for (index, certificate) in CertificateDer::pem_slice_iter(pem).enumerate() {
                let bad = |error: String| TrustError::BadCertificate { number: index + 1, error };
                let certificate = certificate.map_err(|error| bad(error.to_string()))?;
                roots.add(certificate.clone()).map_err(|error| bad(error.to_string()))?;
                listed.push(certificate);
            }
            if roots.is_empty() {
                return Err(TrustError::NoCertificate);
            }
        } else {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(TrustError::NoRoots);
            }
        }
        let chains = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
            .build()
            .map_err(|error| TrustError::Setup(error.to_string()))?;
        Ok(Self { chains, listed, algorithms: provider.signature_verification_algorithms })
    }

    /// Checks that this listed certificate is valid now and for this server.
    fn check_listed(
        &self,
        certificate: &CertificateDer<'_>,
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        let certificate = ParsedCertificate::try_from(certificate)?;
        let verdict = |time| {
            let nobody = RootCertStore::empty();
            verify_server_cert_signed_by_trust_anchor(&certificate, &nobody, &[], time, self.algorithms.all)
        };
        // The library gives no access to the dates, but checks them before anything else. A check at the end of time
        // makes sure that it still does; otherwise the certificate is refused.
        match verdict(UnixTime::since_unix_epoch(Duration::from_secs(u64::MAX))) {
            Err(Error::InvalidCertificate(CertificateError::ExpiredContext { .. })) => {}
            other => {
                return Err(other.err().unwrap_or(Error::General("the dates cannot be read".to_owned())));
            }
        }
        match verdict(now) {
            Err(
                error @ Error::InvalidCertificate(
                    CertificateError::ExpiredContext { .. } | CertificateError::NotValidYetContext { .. },
                ),
            ) => Err(error),
            _ => verify_server_name(&certificate, name),
        }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.listed.iter().any(|listed| listed == end_entity) {
            self.check_listed(end_entity, server_name, now)?;
            return Ok(ServerCertVerified::assertion());
        }
        self.chains.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair,
        date_time_ymd,
    };

    use super::*;

    /// 2030, well within the dates of a certificate that names none.
    const NOW: u64 = 1_893_456_000;

    /// What `openssl req -x509` makes: an authority that signed itself.
    fn self_made(names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> rcgen::Certificate {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        change(&mut params);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap()
    }

    fn verifier(pem: &str) -> Verifier {
        Verifier::new(Some(pem.as_bytes()), &Arc::new(aws_lc_rs::default_provider())).unwrap()
    }

    /// What the server that presents `certificate` is told; nothing if it is believed.
    fn verdict(verifier: &Verifier, certificate: &CertificateDer<'_>, name: &str) -> Result<(), String> {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let now = UnixTime::since_unix_epoch(Duration::from_secs(NOW));
        let verdict = verifier.verify_server_cert(certificate, &[], &name, &[], now);
        verdict.map(drop).map_err(|error| in_words(&io::Error::other(error)))
    }

    #[test]
    fn a_certificate_in_the_file_is_trusted_for_its_names_and_dates_only() {
        let certificate = self_made(&["redis.internal", "10.0.0.1"], |_| {});
        let trusting = verifier(&certificate.pem());
        for name in ["redis.internal", "10.0.0.1"] {
            assert_eq!(verdict(&trusting, certificate.der(), name), Ok(()));
        }
        let error = verdict(&trusting, certificate.der(), "other.internal").unwrap_err();
        assert_eq!(error, "the server's certificate is for redis.internal, 10.0.0.1, not for other.internal");

        let expired = self_made(&["h"], |params| params.not_after = date_time_ymd(2029, 12, 31));
        let error = verdict(&verifier(&expired.pem()), expired.der(), "h").unwrap_err();
        assert_eq!(error, "the server's certificate expired 1 day ago");
        let early = self_made(&["h"], |params| params.not_before = date_time_ymd(2030, 1, 3));
        let error = verdict(&verifier(&early.pem()), early.der(), "h").unwrap_err();
        assert_eq!(
            error,
            "the server's certificate is not valid yet: it will be in 2 days, by this machine's clock"
        );
    }

    #[test]
    fn a_similar_certificate_is_not_trusted() {
        let (own, other) = (self_made(&["h"], |_| {}), self_made(&["h"], |_| {}));
        let error = verdict(&verifier(&own.pem()), other.der(), "h").unwrap_err();
        assert!(error.contains("is an authority's (CA:TRUE)"), "{error}");
        let named = |params: &mut CertificateParams| {
            params.is_ca = IsCa::NoCa;
            params.distinguished_name.push(DnType::CommonName, "somebody else");
        };
        let stranger = self_made(&["h"], named);
        let error = verdict(&verifier(&own.pem()), stranger.der(), "h").unwrap_err();
        assert!(error.contains("signed by no authority that is trusted here"), "{error}");
        // An authority's name is not enough: its key has to have signed.
        let impostor = self_made(&["h"], |params| params.is_ca = IsCa::NoCa);
        let error = verdict(&verifier(&own.pem()), impostor.der(), "h").unwrap_err();
        assert!(error.contains("and not by its key"), "{error}");
    }

    #[test]
    fn a_certificate_with_only_a_common_name_is_refused_with_that_reason() {
        let named = |params: &mut CertificateParams| {
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, "h");
        };
        let own = self_made(&[], named);
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        named(&mut params);
        let signed = params.signed_by(&KeyPair::generate().unwrap(), &authority).unwrap();
        for (pem, certificate) in [(own.pem(), &own), (authority.pem(), &signed)] {
            let error = verdict(&verifier(&pem), certificate.der(), "h").unwrap_err();
            assert!(error.contains("a common name alone does not count (RFC 9525)"), "{error}");
        }
    }

    #[test]
    fn chains_to_an_authority_in_the_file_are_trusted() {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let params = CertificateParams::new(vec!["h".to_owned()]).unwrap();
        let signed = params.signed_by(&KeyPair::generate().unwrap(), &authority).unwrap();
        let trusting = verifier(&authority.pem());
        assert_eq!(verdict(&trusting, signed.der(), "h"), Ok(()));
        assert!(verdict(&trusting, signed.der(), "other").is_err());
    }

    #[test]
    fn an_unusable_ca_file_is_refused_with_its_error() {
        let client = |pem: &str| Client::new(Some(pem.as_bytes())).err().unwrap().to_string();
        assert!(client("").contains("at least one certificate"));
        let good = self_made(&["h"], |_| {}).pem();
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(client(&format!("{good}{broken}")).starts_with("certificate 2 cannot be read"));
    }
}
