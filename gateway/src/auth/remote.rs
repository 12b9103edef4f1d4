//! Keys from a URL: a key set that is fetched periodically.
//!
//! Decides when to fetch the set and what a failed fetch means. A failed fetch changes no key: the node keeps
//! using the old keys for as long as fetches fail, so that an outage of the issuer does not lock clients out.
//! [`fetch`] performs a fetch; [`keyring`](super::keyring) tracks who waits for one.

mod fetch;

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use broker_bridge::tls::TrustError;
use bytes::Bytes;
use http::Uri;
use prometheus::{IntCounterVec, IntGauge, Opts, Registry};

use self::fetch::Fetcher;
use super::{
    UnixSeconds, files,
    jwks::{Document, Origin},
    keyring::{Fetching, Keyring},
};
use crate::file::FileError;

/// The time limit of a fetch, from the DNS lookup to the last byte.
const FETCH: Duration = Duration::from_secs(5);

/// The wait after failures grows from this to [`LONGEST_WAIT`], and never exceeds the regular interval.
const FIRST_WAIT: Duration = Duration::from_secs(1);

/// See [`FIRST_WAIT`].
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// The URL of a key set: `https`, or `http` on this machine. Whoever can change the response can forge
/// tokens, so it must not cross a network unprotected.
#[derive(Clone, PartialEq, Eq)]
pub struct JwksUrl(Uri);

/// Why a text is not a [`JwksUrl`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected an https URL, or an http URL with a loopback host (127.0.0.1, [::1], localhost), without user and password"
)]
pub struct InvalidJwksUrl;

impl FromStr for JwksUrl {
    type Err = InvalidJwksUrl;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // `Uri` silently drops a fragment.
        if text.contains('#') {
            return Err(InvalidJwksUrl);
        }
        let url: Uri = text.parse().map_err(|_| InvalidJwksUrl)?;
        let authority = url.authority().ok_or(InvalidJwksUrl)?;
        let host = authority.host();
        let sound = !host.is_empty() && !authority.as_str().contains('@');
        match url.scheme_str() {
            Some("https") if sound => Ok(Self(url)),
            Some("http") if sound && is_this_machine(host) => Ok(Self(url)),
            _ => Err(InvalidJwksUrl),
        }
    }
}

fn is_this_machine(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Without the query, which may contain an API key.
impl fmt::Display for JwksUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, authority) = (self.0.scheme_str().unwrap_or_default(), self.0.authority());
        write!(f, "{scheme}://{}{}", authority.map_or("", |authority| authority.as_str()), self.0.path())
    }
}

impl fmt::Debug for JwksUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JwksUrl({self})")
    }
}

/// Why key sets cannot be fetched at all.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// `auth.jwks_ca_file` cannot be read.
    #[error("auth.jwks_ca_file ({path}): expected a file that can be read: {error}")]
    ReadCa {
        /// The file.
        path: PathBuf,
        /// Why it cannot be read.
        error: FileError,
    },
    /// `auth.jwks_ca_file` holds no usable certificates.
    #[error("auth.jwks_ca_file ({path}): {error}")]
    Ca {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: TrustError,
    },
    /// There is no certificate authority to trust.
    #[error("auth.jwks_url: {0}")]
    Trust(#[from] TrustError),
    /// The host is not a name that a certificate can hold.
    #[error("auth.jwks_url: {0} is not a host name that a certificate can hold")]
    Host(String),
    /// A metric could not be registered.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// Keeps a keyring in step with the key set at a URL.
pub struct RemoteKeys {
    url: JwksUrl,
    interval: Duration,
    fetcher: Fetcher,
    keyring: Arc<Keyring>,
    refreshes: IntCounterVec,
    last_success: IntGauge,
    keys: IntGauge,
}

impl RemoteKeys {
    /// `keyring` must have been built with [`Keyring::with_url`]. Does not fetch yet.
    pub fn new(
        url: JwksUrl,
        interval: Duration,
        ca_file: Option<&Path>,
        keyring: Arc<Keyring>,
        registry: &Registry,
    ) -> Result<Self, RemoteError> {
        let fetcher = Fetcher::new(&url, ca_file)?;
        let refreshes = IntCounterVec::new(
            Opts::new("tidegate_jwks_refreshes_total", "Fetches of auth.jwks_url, by result."),
            &["result"],
        )?;
        for result in ["ok", "failed"] {
            refreshes.with_label_values(&[result]);
        }
        let last_success = IntGauge::new(
            "tidegate_jwks_last_success_timestamp_seconds",
            "When auth.jwks_url was last fetched with success, in Unix time; 0 before the first.",
        )?;
        let keys = IntGauge::new("tidegate_jwks_keys", "Keys in use from auth.jwks_url.")?;
        registry.register(Box::new(refreshes.clone()))?;
        registry.register(Box::new(last_success.clone()))?;
        registry.register(Box::new(keys.clone()))?;
        Ok(Self { url, interval, fetcher, keyring, refreshes, last_success, keys })
    }

    /// Fetches now, at every interval, and whenever a token names an unknown key. Runs until dropped.
    pub async fn run(self) {
        let Some(fetching) = self.keyring.fetching() else { return };
        let mut failures = 0;
        let mut last = Bytes::new();
        loop {
            fetching.begin();
            failures = if self.refresh(&mut last).await { 0 } else { failures + 1 };
            fetching.end();
            self.pause(fetching, failures).await;
        }
    }

    /// Fetches the set and installs its keys. Returns whether that succeeded.
    async fn refresh(&self, last: &mut Bytes) -> bool {
        let fetched = self.fetcher.fetch(FETCH).await;
        let document = fetched.and_then(|json| Ok((Document::read(&json, Origin::Url)?, json)));
        let result = match document {
            Ok((document, json)) => {
                self.keys.set(i64::try_from(document.keys.len()).unwrap_or(i64::MAX));
                let now = UnixSeconds::from(SystemTime::now());
                self.last_success.set(i64::try_from(now.0).unwrap_or(i64::MAX));
                if json != *last {
                    files::say_ignored(&document.ignored, "auth.jwks_url");
                    tracing::info!(url = %self.url, keys = document.keys.len(), "fetched a new key set");
                    self.keyring.set_url(document.keys);
                    *last = json;
                }
                "ok"
            }
            Err(error) => {
                let old = if self.keyring.is_complete() {
                    "the old keys stay in use"
                } else {
                    "there are no keys from it yet"
                };
                tracing::error!(url = %self.url, %error, "cannot fetch the key set; {old}");
                "failed"
            }
        };
        self.refreshes.with_label_values(&[result]).inc();
        result == "ok"
    }

    /// Waits until the next fetch is due or requested.
    async fn pause(&self, fetching: &Fetching, failures: u32) {
        let regular = if failures == 0 {
            self.interval
        } else {
            let grown = FIRST_WAIT.saturating_mul(1 << (failures - 1).min(10));
            grown.min(LONGEST_WAIT).min(self.interval)
        };
        // Up to 10% less, so that nodes that started together spread out.
        let spread = f64::from(getrandom::u32().unwrap_or_default()) / f64::from(u32::MAX);
        let wait = regular.mul_f64(1.0 - 0.1 * spread);
        // It does not matter which of the two ended the wait.
        drop(tokio::time::timeout(wait, fetching.wanted()).await);
    }
}
