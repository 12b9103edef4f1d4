//! The public listener's certificate: loading, validation, and replacement at runtime.
//!
//! Provides the configuration of new TLS connections ([`Tls::current`]). An invalid replacement is refused
//! and the old certificate stays in use. Open connections keep the certificate they began with. Does not
//! touch sockets ([`crate::shard`] does) and does not decide when to read the files ([`crate::watch`] does).

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

/// The TLS configuration of new connections, and its files.
pub struct Tls {
    files: config::Tls,
    current: RwLock<Arc<ServerConfig>>,
    /// What the files held at the last attempt, valid or not.
    tried: Mutex<Pair>,
    /// Kept across reloads, so that clients with a ticket can still skip the full handshake.
    tickets: Arc<dyn ProducesTickets>,
    reloaded: IntCounterVec,
    expiry: IntGauge,
}

/// Why a certificate and its key cannot be used. Never shows the configured path of the key, because users
/// may give the key itself by mistake.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{place}: expected a file that can be read: {error}")]
    Read {
        /// The file.
        place: Place,
        /// Why it cannot be read.
        error: FileError,
    },
    /// The file has no certificate, or an invalid one.
    #[error("{place}: expected at least one certificate in PEM (BEGIN CERTIFICATE)")]
    Certificate {
        /// The file.
        place: Place,
    },
    /// There is no private key in the file.
    #[error("{}: expected one unencrypted private key in PEM (BEGIN PRIVATE KEY)", Place::Key)]
    Key,
    /// The key does not belong to the certificate.
    #[error("{}: expected the private key of the first certificate in {cert}: {error}", Place::Key)]
    Pair {
        /// The certificate's file.
        cert: Place,
        /// What is wrong with them.
        error: rustls::Error,
    },
    /// TLS tickets cannot be set up.
    #[error("cannot set up TLS: {0}")]
    Setup(#[from] rustls::Error),
    /// A metric could not be registered.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// One of the two files, as an error names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// `tls.cert` and its path; `None` if the value does not look like a path.
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

/// The contents of the two files.
#[derive(Clone, PartialEq, Eq)]
pub struct Pair {
    cert: String,
    key: String,
}

/// Reads and validates the files without using them.
pub fn check(files: &config::Tls) -> Result<(), TlsError> {
    Pair::read(files)?.config(files, &aws_lc_rs::Ticketer::new()?).map(drop)
}

impl Tls {
    /// Reads and validates the files.
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
            "When the certificate in use expires, in Unix time; 0 if that cannot be determined.",
        )?;
        expiry.set(expires);
        registry.register(Box::new(reloaded.clone()))?;
        registry.register(Box::new(expiry.clone()))?;
        let current = RwLock::new(Arc::new(config));
        Ok(Self { files, current, tried: Mutex::new(pair), tickets, reloaded, expiry })
    }

    /// The configuration for the next connection.
    pub fn current(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.read())
    }

    /// Reads the files. Blocks on the file system.
    pub fn read(&self) -> Result<Pair, TlsError> {
        Pair::read(&self.files)
    }

    /// Installs what was read if it is valid, even if nothing has changed.
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
                tracing::info!(expires, "new connections use the reloaded certificate");
            }
            Err(error) => self.refuse(&error),
        }
    }

    fn refuse(&self, error: &TlsError) {
        self.reloaded.with_label_values(&["failed"]).inc();
        tracing::error!(%error, "cannot replace the certificate; the old one stays in use");
    }
}

impl Watched for Tls {
    type Contents = Pair;

    fn has_files(&self) -> bool {
        true
    }

    // One file may be written before the other. The next read then finds different contents.
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

    /// The configuration for connections, and when the certificate expires.
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
        // Tickets contain the whole state. A cache would be one lock for all shards.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok((config, expires))
    }
}

/// When a certificate expires, in Unix time, or 0. Verifies it at the end of time: the error tells when it
/// expired, so no other certificate parser is needed.
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
