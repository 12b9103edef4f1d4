//! Keys from a URL: a key set that is fetched again and again.
//!
//! Owns the fetches: when, how they are bounded, what a failed one means. A fetch that fails changes no
//! key: the old ones go on for as long as it takes, since an issuer that is away for an hour must not close
//! this node's doors. Who waits for a fetch is [`keyring`](super::keyring)'s matter.
//!
//! No redirect is followed and no proxy is asked: the set comes from the host that is configured, which
//! proves itself by its certificate, or it does not come.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use prometheus::{IntCounterVec, IntGauge, Opts, Registry};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, pem::PemObject as _},
};

use super::{
    UnixSeconds, files,
    jwks::{Document, DocumentError, Origin},
    keyring::{Fetching, Keyring},
};

/// How long a fetch may take, from the look-up of the name to the last byte.
const FETCH: Duration = Duration::from_secs(5);

/// Waiting after failures grows from this to [`LONGEST_WAIT`], and never beyond the regular interval.
const FIRST_WAIT: Duration = Duration::from_secs(1);

/// See [`FIRST_WAIT`].
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Where a key set is: `https`, or `http` on this machine. Whoever can change the answer can make any token,
/// so an unprotected one must not cross a network.
#[derive(Clone, PartialEq, Eq)]
pub struct JwksUrl(Uri);

/// Why a text is not a [`JwksUrl`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected an https URL, or an http URL whose host is this machine (127.0.0.1, [::1], localhost), without user and password"
)]
pub struct InvalidJwksUrl;

impl FromStr for JwksUrl {
    type Err = InvalidJwksUrl;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // `Uri` drops a fragment without a word.
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
    host == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Without the query, which may hold a key of another kind.
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
        /// What the operating system said.
        error: io::Error,
    },
    /// There is no certificate in it.
    #[error("auth.jwks_ca_file ({path}): expected at least one certificate in PEM (BEGIN CERTIFICATE)")]
    Ca {
        /// The file.
        path: PathBuf,
    },
    /// This machine has no list of authorities.
    #[error(
        "auth.jwks_url: this machine trusts no certificate authority; install ca-certificates or set auth.jwks_ca_file"
    )]
    NoRoots,
    /// TLS cannot be set up.
    #[error("auth.jwks_url: {0}")]
    Tls(#[from] rustls::Error),
    /// Two metrics have one name.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// Why one fetch failed. What it prints holds nothing of the answer.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("no answer within {FETCH:?}")]
    Timeout,
    #[error("{0}")]
    Connect(String),
    #[error("answered {0}; expected 200 (redirects are not followed)")]
    Status(StatusCode),
    #[error("the answer broke off: {0}")]
    Body(String),
    #[error(transparent)]
    Document(#[from] DocumentError),
}

/// Keeps a keyring as a key set at a URL is.
pub struct RemoteKeys {
    url: JwksUrl,
    interval: Duration,
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    keyring: Arc<Keyring>,
    refreshes: IntCounterVec,
    last_success: IntGauge,
    keys: IntGauge,
}

impl RemoteKeys {
    /// Will keep `keyring`, which knows of the URL, as the set at `url` is. Fetches nothing yet.
    pub fn new(
        url: JwksUrl,
        interval: Duration,
        ca_file: Option<&Path>,
        keyring: Arc<Keyring>,
        registry: &Registry,
    ) -> Result<Self, RemoteError> {
        let https = HttpsConnectorBuilder::new()
            .with_tls_config(tls(&url, ca_file)?)
            .https_or_http()
            .enable_http1()
            .build();
        // One request every few minutes: an idle connection would mostly be one that has died.
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(https);
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
        Ok(Self { url, interval, client, keyring, refreshes, last_success, keys })
    }

    /// Fetches now, then at every interval, and when a token names a key that nobody knows, until dropped.
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

    /// Fetches and takes the set; returns whether that succeeded.
    async fn refresh(&self, last: &mut Bytes) -> bool {
        let fetched = tokio::time::timeout(FETCH, self.fetch()).await.unwrap_or(Err(FetchError::Timeout));
        let document = fetched.and_then(|json| Ok((Document::read(&json, Origin::Url)?, json)));
        let result = match document {
            Ok((document, json)) => {
                self.keys.set(i64::try_from(document.keys.len()).unwrap_or(i64::MAX));
                let now = UnixSeconds::from(SystemTime::now());
                self.last_success.set(i64::try_from(now.0).unwrap_or(i64::MAX));
                if json != *last {
                    files::say_ignored(&document.ignored, "auth.jwks_url");
                    tracing::info!(url = %self.url, keys = document.keys.len(), "the key set was fetched");
                    self.keyring.set_url(document.keys);
                    *last = json;
                }
                "ok"
            }
            Err(error) => {
                let old =
                    if self.keyring.is_complete() { "the old keys go on" } else { "there are none yet" };
                tracing::error!(url = %self.url, %error, "the key set could not be fetched; {old}");
                "failed"
            }
        };
        self.refreshes.with_label_values(&[result]).inc();
        result == "ok"
    }

    async fn fetch(&self) -> Result<Bytes, FetchError> {
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = self.url.0.clone();
        let headers = request.headers_mut();
        headers
            .insert(header::ACCEPT, HeaderValue::from_static("application/jwk-set+json, application/json"));
        headers.insert(
            header::USER_AGENT,
            HeaderValue::from_static(concat!("tidegate/", env!("CARGO_PKG_VERSION"))),
        );
        let response =
            self.client.request(request).await.map_err(|error| FetchError::Connect(chain(&error)))?;
        if response.status() != StatusCode::OK {
            return Err(FetchError::Status(response.status()));
        }
        match Limited::new(response.into_body(), Document::MAX_BYTES).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(DocumentError::TooLong.into()),
            Err(error) => Err(FetchError::Body(chain(&*error))),
        }
    }

    /// Waits until the next fetch is due, or wanted.
    async fn pause(&self, fetching: &Fetching, failures: u32) {
        let regular = if failures == 0 {
            self.interval
        } else {
            let grown = FIRST_WAIT.saturating_mul(1 << (failures - 1).min(10));
            grown.min(LONGEST_WAIT).min(self.interval)
        };
        // Up to a tenth less, so that nodes which were started together drift apart.
        let spread = f64::from(getrandom::u32().unwrap_or_default()) / f64::from(u32::MAX);
        let wait = regular.mul_f64(1.0 - 0.1 * spread);
        // Due or wanted is the same from here on.
        drop(tokio::time::timeout(wait, fetching.wanted()).await);
    }
}

fn tls(url: &JwksUrl, ca_file: Option<&Path>) -> Result<ClientConfig, RemoteError> {
    let mut roots = RootCertStore::empty();
    if let Some(path) = ca_file {
        let pem =
            std::fs::read(path).map_err(|error| RemoteError::ReadCa { path: path.to_owned(), error })?;
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        let (added, _) = roots.add_parsable_certificates(certificates.unwrap_or_default());
        if added == 0 {
            return Err(RemoteError::Ca { path: path.to_owned() });
        }
    } else if url.0.scheme_str() == Some("https") {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err(RemoteError::NoRoots);
        }
    }
    Ok(ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

/// An error with its causes: the library's outermost says no more than "client error".
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
