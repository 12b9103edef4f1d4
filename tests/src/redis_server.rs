//! A private `redis-server`.
//!
//! Every server has its own directory with a Unix socket, a TCP port and, on request, a TLS port with
//! certificates made for it. It keeps its addresses across restarts, can be killed and frozen, and ends with the
//! value that owns it. If the test panics, its log is printed.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    process::{Child, Command},
};

use crate::{eventually::eventually, tls};

/// A running server, or one that was killed and can be restarted.
#[derive(Debug)]
pub struct RedisServer {
    child: Option<Child>,
    directory: TempDir,
    port: u16,
    tls_port: Option<u16>,
    settings: Vec<String>,
}

/// A server's settings.
#[derive(Clone, Debug, Default)]
pub struct Builder {
    settings: Vec<String>,
    certificate: Option<Certificate>,
}

/// Who signs a server's certificate.
#[derive(Clone, Debug)]
enum Certificate {
    /// Its own certificate authority.
    Signed,
    /// Nobody else: `openssl req -x509` with these arguments makes a self-signed certificate.
    OpenSsl(Vec<String>),
}

impl Builder {
    /// Adds a line to the configuration file, such as `client-output-buffer-limit pubsub 1mb 0 0` or
    /// `user alice on >secret …`.
    #[must_use]
    pub fn setting(mut self, line: &str) -> Self {
        self.settings.push(line.to_owned());
        self
    }

    /// Also listens for TLS, with a certificate for `localhost` and 127.0.0.1.
    #[must_use]
    pub fn tls(mut self) -> Self {
        self.certificate = Some(Certificate::Signed);
        self
    }

    /// Also listens for TLS, with the certificate that `openssl req -x509` makes from these arguments, such as
    /// `-subj /CN=localhost`. That certificate is also its [`RedisServer::ca_file`].
    #[must_use]
    pub fn tls_by_openssl(mut self, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        self.certificate = Some(Certificate::OpenSsl(arguments));
        self
    }

    /// Starts the server and waits until it answers.
    pub async fn start(self) -> Result<RedisServer> {
        let mut server = self.absent()?;
        server.restart().await?;
        Ok(server)
    }

    /// Chooses addresses without starting anything.
    pub fn absent(self) -> Result<RedisServer> {
        let directory = tempfile::Builder::new().prefix("redis-").tempdir()?;
        match &self.certificate {
            None => {}
            Some(Certificate::Signed) => write_certificates(directory.path())?,
            Some(Certificate::OpenSsl(arguments)) => {
                let at = |name: &str| directory.path().join(name);
                tls::self_made(arguments, &at("server.pem"), &at("server.key"))?;
                std::fs::copy(at("server.pem"), at("ca.pem"))?;
            }
        }
        let tls_port = self.certificate.is_some().then(free_port).transpose()?;
        Ok(RedisServer { child: None, directory, port: free_port()?, tls_port, settings: self.settings })
    }
}

impl RedisServer {
    /// The settings of a server.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// A server with default settings.
    pub async fn start() -> Result<Self> {
        Self::builder().start().await
    }

    /// Its TCP address as a URL.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Its TLS address as a URL.
    pub fn tls_url(&self) -> Result<String> {
        Ok(format!("rediss://localhost:{}", self.tls_port()?))
    }

    /// Its Unix socket as a URL.
    pub fn unix_url(&self) -> String {
        format!("redis+unix://{}", self.socket().display())
    }

    /// Its TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its TCP port for TLS.
    pub fn tls_port(&self) -> Result<u16> {
        self.tls_port.context("this server has no TLS")
    }

    /// Its Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.file("redis.sock")
    }

    /// The certificate to trust: the authority's, or its own if it is self-signed.
    pub fn ca_file(&self) -> PathBuf {
        self.file("ca.pem")
    }

    /// The contents of [`RedisServer::ca_file`].
    pub fn ca_pem(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.ca_file())?)
    }

    /// Kills it at once, like `kill -9`.
    pub async fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().await?;
        }
        Ok(())
    }

    /// Starts it again at the same addresses, with the data it has saved, and waits until it answers.
    pub async fn restart(&mut self) -> Result<()> {
        self.restart_until(Self::is_serving).await
    }

    /// The same, but does not wait until it has loaded its data.
    pub async fn restart_loading(&mut self) -> Result<()> {
        self.restart_until(|answer| !answer.is_empty()).await
    }

    /// Adds a line to the configuration file, for the next start.
    pub fn set(&mut self, line: &str) {
        self.settings.push(line.to_owned());
    }

    /// Whether it is still loading its data.
    pub async fn is_loading(&self) -> Result<bool> {
        Ok(ping(&self.socket()).await?.starts_with("-LOADING"))
    }

    fn is_serving(answer: &str) -> bool {
        !answer.is_empty() && !answer.starts_with("-LOADING")
    }

    async fn restart_until(&mut self, ready: impl Fn(&str) -> bool) -> Result<()> {
        self.kill().await?;
        tokio::fs::write(self.file("redis.conf"), self.configuration()).await?;
        let log = std::fs::File::options().create(true).append(true).open(self.file("redis.log"))?;
        let child = Command::new("redis-server")
            .arg(self.file("redis.conf"))
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .context("redis-server cannot be started; is it installed?")?;
        self.child = Some(child);
        let socket = self.socket();
        let child = self.child.as_mut().context("just started")?;
        let answered = eventually("redis-server answers", async || {
            if let Ok(Some(status)) = child.try_wait() {
                return Ok(Err(status));
            }
            match ping(&socket).await {
                Ok(answer) if ready(&answer) => Ok(Ok(())),
                Ok(answer) => Err(format!("it said {answer:?}")),
                Err(error) => Err(format!("{error:#}")),
            }
        });
        match answered.await? {
            Ok(()) => Ok(()),
            Err(status) => bail!("redis-server ended with {status}:\n{}", self.log()),
        }
    }

    /// Freezes it: connections stay open, but nothing is answered.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Resumes it.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Runs `redis-cli` with `arguments`, and `input` as the last one if it is not empty. Returns its output.
    pub async fn cli(&self, arguments: &[&str], input: &[u8]) -> Result<Vec<u8>> {
        let mut command = Command::new("redis-cli");
        command.arg("-e").arg("-s").arg(self.socket());
        if !input.is_empty() {
            command.arg("-x");
        }
        let mut child = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("redis-cli cannot be started; is it installed?")?;
        let mut stdin = child.stdin.take().context("stdin is piped")?;
        stdin.write_all(input).await?;
        drop(stdin);
        let output = child.wait_with_output().await?;
        ensure!(output.status.success(), "redis-cli {arguments:?}: {output:?}");
        Ok(output.stdout)
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.file("redis.log")).unwrap_or_else(|error| format!("no log: {error}"))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let id = self.child.as_ref().and_then(Child::id).context("redis-server is not running")?;
        let pid = Pid::from_raw(i32::try_from(id)?).context("a process id is not zero")?;
        Ok(kill_process(pid, signal)?)
    }

    fn configuration(&self) -> String {
        let mut lines = vec![
            format!("port {}", self.port),
            "bind 127.0.0.1".to_owned(),
            format!("unixsocket {}", self.socket().display()),
            format!("dir {}", self.directory.path().display()),
            "save \"\"".to_owned(),
            "appendonly no".to_owned(),
        ];
        if let Some(port) = self.tls_port {
            lines.push(format!("tls-port {port}"));
            lines.extend(
                ["tls-auth-clients no", "tls-cert-file server.pem", "tls-key-file server.key"]
                    .map(str::to_owned),
            );
            lines.push("tls-ca-cert-file ca.pem".to_owned());
        }
        lines.extend(self.settings.iter().cloned());
        lines.join("\n") + "\n"
    }
}

impl Drop for RedisServer {
    #[allow(clippy::print_stderr, reason = "the log of a failed test belongs beside its panic")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- redis-server at port {} ---\n{}", self.port, self.log());
        }
    }
}

/// Its answer to `PING` on the socket.
async fn ping(socket: &Path) -> Result<String> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(b"PING\r\n").await?;
    let mut answer = [0; 64];
    let length = stream.read(&mut answer).await?;
    Ok(String::from_utf8_lossy(answer.get(..length).unwrap_or_default()).into_owned())
}

/// A port without a listener, below the range from which the system picks ports for outgoing
/// connections. With a port from that range, a client that keeps retrying while the server is down would
/// eventually get this very port, connect to itself, and keep the server from restarting.
fn free_port() -> Result<u16> {
    const PORTS: std::ops::Range<u16> = 10_000..32_000;
    let mut random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0);
    for _ in 0..1000 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let port = PORTS.start + u16::try_from((random >> 33) % u64::from(PORTS.end - PORTS.start))?;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free port in {PORTS:?}")
}

fn write_certificates(directory: &Path) -> Result<()> {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

    let mut ca = CertificateParams::new(Vec::new())?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let certificate = CertificateParams::new(names)?.signed_by(&key, &ca)?;
    std::fs::write(directory.join("ca.pem"), ca.pem())?;
    std::fs::write(directory.join("server.pem"), certificate.pem())?;
    std::fs::write(directory.join("server.key"), key.serialize_pem())?;
    Ok(())
}
