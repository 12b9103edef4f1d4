//! The public listener's certificate: loaded, checked, and replaced while the node runs.
//!
//! Owns what a new TLS connection is made with ([`Tls::current`]). A replacement that is not sound is
//! refused and the old one goes on; open connections keep what they began with. Touches no socket: that
//! is [`crate::shard`]'s. When the files are looked at is [`crate::watch`]'s.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use prometheus::{IntCounterVec, IntGauge, Opts, Registry};
use rustls::{
    CertificateError, RootCertStore, ServerConfig,
    client::verify_server_cert_signed_by_trust_anchor,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _},
    server::{NoServerSessionStorage, ParsedCertificate, ProducesTickets},
};

use crate::{
    config,
    file::{FileError, MAX, read_text},
    watch::Watched,
};

/// What new TLS connections are made with.
pub struct Tls {
    files: config::Tls,
    current: RwLock<Arc<ServerConfig>>,
    /// What the files held when they were last tried, whether that was sound or not.
    tried: Mutex<Pair>,
    /// Kept over reloads: who comes back with a ticket is not asked for the expensive handshake.
    tickets: Arc<dyn ProducesTickets>,
    reloaded: IntCounterVec,
    expiry: IntGauge,
}

/// Why a certificate and its key cannot be used. What was given as the path of the key is not shown: the likeliest
/// mistake is to give the key itself in its place.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{place}: expected a file that can be read: {error}")]
    Read {
        /// Which one.
        place: Place,
        /// Why not.
        error: FileError,
    },
    /// There is no certificate in the file, or something that only looks like one.
    #[error("{place}: expected at least one certificate in PEM (BEGIN CERTIFICATE)")]
    Certificate {
        /// The file.
        place: Place,
    },
    /// There is no private key in the file.
    #[error("{}: expected one unencrypted private key in PEM (BEGIN PRIVATE KEY)", Place::Key)]
    Key,
    /// They are not a pair.
    #[error("{}: expected the private key of the first certificate in {cert}: {error}", Place::Key)]
    Pair {
        /// The certificate's file.
        cert: Place,
        /// What is wrong with them.
        error: rustls::Error,
    },
    /// No tickets can be made.
    #[error("cannot set up TLS: {0}")]
    Setup(#[from] rustls::Error),
    /// Two metrics have one name.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// One of the two files, as an error names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// `tls.cert`, and where it is; `None` if what was given looks like no path.
    Cert(Option<PathBuf>),
    /// `tls.key`
    Key,
}

impl Place {
    fn cert(path: &Path) -> Self {
        let text = path.to_string_lossy();
        let is_pasted = text.contains("-----") || text.contains(char::is_control);
        Self::Cert((!is_pasted).then(|| path.to_owned()))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cert(Some(path)) => write!(f, "tls.cert ({})", path.display()),
            Self::Cert(None) => f.write_str("tls.cert"),
            Self::Key => f.write_str("tls.key"),
        }
    }
}

/// What the two files hold.
#[derive(Clone, PartialEq, Eq)]
pub struct Pair {
    cert: String,
    key: String,
}

/// Reads and checks the files, and does no more.
pub fn check(files: &config::Tls) -> Result<(), TlsError> {
    Pair::read(files)?.config(files, &aws_lc_rs::Ticketer::new()?).map(drop)
}

impl Tls {
    /// Reads and checks the files.
    pub fn load(files: config::Tls, registry: &Registry) -> Result<Self, TlsError> {
        let tickets = aws_lc_rs::Ticketer::new()?;
        let pair = Pair::read(&files)?;
        let (config, expires) = pair.config(&files, &tickets)?;
        let reloaded = IntCounterVec::new(
            Opts::new("tidegate_tls_reloads_total", "Attempts to replace the certificate, by result."),
            &["result"],
        )?;
        for result in ["ok", "failed"] {
            reloaded.with_label_values(&[result]);
        }
        let expiry = IntGauge::new(
            "tidegate_tls_certificate_expiry_timestamp_seconds",
            "When the certificate in use ends, in Unix time; 0 if it does not say so in a way that is understood.",
        )?;
        expiry.set(expires);
        registry.register(Box::new(reloaded.clone()))?;
        registry.register(Box::new(expiry.clone()))?;
        let current = RwLock::new(Arc::new(config));
        Ok(Self { files, current, tried: Mutex::new(pair), tickets, reloaded, expiry })
    }

    /// What the next connection is to be made with.
    pub fn current(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.read())
    }

    /// What the files hold. Blocks on the file system.
    pub fn read(&self) -> Result<Pair, TlsError> {
        Pair::read(&self.files)
    }

    /// Takes what was read if it is sound, also if it is nothing new.
    pub fn replace(&self, read: Result<Pair, TlsError>) {
        match read {
            Ok(pair) => {
                let mut tried = self.tried.lock();
                self.take(&pair);
                *tried = pair;
            }
            Err(error) => self.refuse(&error),
        }
    }

    fn take(&self, pair: &Pair) {
        match pair.config(&self.files, &self.tickets) {
            Ok((config, expires)) => {
                *self.current.write() = Arc::new(config);
                self.expiry.set(expires);
                self.reloaded.with_label_values(&["ok"]).inc();
                tracing::info!(expires, "new connections get the certificate that was read now");
            }
            Err(error) => self.refuse(&error),
        }
    }

    fn refuse(&self, error: &TlsError) {
        self.reloaded.with_label_values(&["failed"]).inc();
        tracing::error!(%error, "the certificate was not replaced; the old one goes on");
    }
}

impl Watched for Tls {
    type Contents = Pair;

    fn has_files(&self) -> bool {
        true
    }

    // One of them may be written before the other: then the next look finds something else.
    fn read(&self) -> Option<Pair> {
        self.read().ok()
    }

    fn found(&self, pair: &Pair) {
        let mut tried = self.tried.lock();
        if *tried != *pair {
            self.take(pair);
            tried.clone_from(pair);
        }
    }
}

impl Pair {
    fn read(files: &config::Tls) -> Result<Self, TlsError> {
        let read = |place, path: &Path| read_text(path, MAX).map_err(|error| TlsError::Read { place, error });
        let cert = read(Place::cert(&files.cert), &files.cert)?;
        Ok(Self { cert, key: read(Place::Key, &files.key)? })
    }

    /// What connections are made with, and when the certificate ends.
    fn config(
        &self,
        files: &config::Tls,
        tickets: &Arc<dyn ProducesTickets>,
    ) -> Result<(ServerConfig, i64), TlsError> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(self.cert.as_bytes()).collect();
        let chain = chain.unwrap_or_default();
        let Some(own) = chain.first() else {
            return Err(TlsError::Certificate { place: Place::cert(&files.cert) });
        };
        let expires = expires(own);
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).map_err(|_| TlsError::Key)?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|error| TlsError::Pair { cert: Place::cert(&files.cert), error })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        config.ticketer = Arc::clone(tickets);
        // Tickets carry the whole state; a cache would be one lock for all shards.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok((config, expires))
    }
}

/// When a certificate ends, in Unix time, or 0. Found by asking whether it is valid at the end of time:
/// the refusal says since when it is not, and no other parser of certificates is needed.
fn expires(certificate: &CertificateDer<'_>) -> i64 {
    let end_of_time = UnixTime::since_unix_epoch(Duration::from_secs(u64::MAX));
    let verdict = ParsedCertificate::try_from(certificate).and_then(|certificate| {
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &RootCertStore::empty(),
            &[],
            end_of_time,
            aws_lc_rs::default_provider().signature_verification_algorithms.all,
        )
    });
    match verdict {
        Err(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. })) => {
            i64::try_from(not_after.as_secs()).unwrap_or_default()
        }
        _ => 0,
    }
}
