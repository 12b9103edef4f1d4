//! Certificates, and connections that trust them.
//!
//! A pair is in its own directory, where it can be replaced. Knows nothing of how a node loads it.

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use rcgen::{CertifiedKey, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName},
};
use tempfile::TempDir;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{PATIENCE, node::Builder};

/// A certificate and its key in two files.
#[derive(Debug)]
pub struct PairOfFiles(TempDir);

/// Makes a self-signed certificate and its key with `openssl req -x509`, like people do by hand: OpenSSL's
/// defaults make it an authority. `arguments` set its subject and any other options.
pub fn self_made(arguments: &[String], certificate: &Path, key: &Path) -> Result<()> {
    let output = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout"])
        .arg(key)
        .arg("-out")
        .arg(certificate)
        .args(arguments)
        .output()
        .context("openssl cannot be started; is it installed?")?;
    ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A self-signed certificate for `localhost`.
pub struct Pair(CertifiedKey<KeyPair>);

impl Pair {
    /// A new one.
    pub fn new() -> Result<Self> {
        Ok(Self(rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?))
    }

    /// The certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        self.0.cert.der()
    }

    /// A connection to the node, after the handshake, that trusts only this certificate.
    pub async fn connect(&self, node: SocketAddr) -> Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate().clone())?;
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = TcpStream::connect(node).await?;
        stream.set_nodelay(true)?;
        let connecting =
            TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost")?, stream);
        timeout(PATIENCE, connecting).await.context("the TLS handshake")?.context("the TLS handshake")
    }
}

impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pair").finish_non_exhaustive()
    }
}

impl PairOfFiles {
    /// Files that hold this pair.
    pub fn of(pair: &Pair) -> Result<Self> {
        let files = Self(tempfile::tempdir()?);
        files.put(pair)?;
        Ok(files)
    }

    /// Replaces the files with another pair.
    pub fn put(&self, pair: &Pair) -> Result<()> {
        std::fs::write(self.cert(), pair.0.cert.pem())?;
        Ok(std::fs::write(self.key(), pair.0.signing_key.serialize_pem())?)
    }

    /// The certificate's file.
    pub fn cert(&self) -> PathBuf {
        self.0.path().join("tls.crt")
    }

    /// The key's file.
    pub fn key(&self) -> PathBuf {
        self.0.path().join("tls.key")
    }

    /// A node whose public listener uses these files.
    pub fn node(&self) -> Builder {
        Builder::new()
            .set("tls.cert", &self.cert().display().to_string())
            .set("tls.key", &self.key().display().to_string())
    }
}
