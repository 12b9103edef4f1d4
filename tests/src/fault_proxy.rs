//! A stable address in front of a server, and everything that can go wrong between the two.
//!
//! The proxy listens on one TCP address for its whole life, whatever happens behind it. Faults can be limited to
//! some connections, selected by the first bytes of their clients.

use std::{
    fmt, io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::Result;
use parking_lot::Mutex;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{Notify, watch},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// A server behind the proxy.
#[derive(Clone, Debug)]
pub enum Target {
    /// By address.
    Tcp(SocketAddr),
    /// By unix socket.
    Unix(PathBuf),
}

/// Which connections a fault applies to.
#[derive(Clone, Debug)]
pub enum Which {
    /// All of them.
    All,
    /// Those whose client's first bytes contain this.
    Saying(&'static str),
    /// Those whose client's first bytes do not contain this.
    NotSaying(&'static str),
}

/// The direction of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    ToServer,
    /// From the server to the client.
    ToClient,
}

/// What happens to bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// They are forwarded.
    Forward,
    /// They are not read: the sender's buffers fill up. Nothing is lost, and the transfer resumes when forwarded again.
    Stall,
    /// They are read and discarded.
    Blackhole,
}

/// The proxy. Dropping it closes everything.
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    end: CancellationToken,
}

impl FaultProxy {
    /// A proxy on a port that the system chooses.
    pub async fn to(target: Target) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State { target, refusing: false, rules: Vec::new(), open: Vec::new() }),
            accepted: AtomicU64::new(0),
            tracker: TaskTracker::new(),
        });
        let end = CancellationToken::new();
        let accepting = accept(listener, Arc::clone(&shared), end.clone());
        shared.tracker.spawn(end.clone().run_until_cancelled_owned(accepting));
        Ok(Self { address, shared, end })
    }

    /// The address it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address it listens on, as a Redis URL.
    pub fn redis_url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// Resets connections, as a crashing machine would.
    pub fn cut(&self, which: &Which) {
        for link in self.shared.links(which) {
            link.cut.cancel();
        }
    }

    /// Whether new connections are reset at once.
    pub fn refuse(&self, refuse: bool) {
        self.shared.state.lock().refusing = refuse;
    }

    /// Sets what happens to bytes on these connections, open and new ones, from now on.
    pub fn set(&self, which: Which, direction: Direction, flow: Flow) {
        let mut state = self.shared.state.lock();
        state.rules.push((which, direction, flow));
        let State { rules, open, .. } = &*state;
        for link in open {
            link.apply(rules);
        }
    }

    /// Removes every fault; stalled transfers resume.
    pub fn resume(&self) {
        let mut state = self.shared.state.lock();
        state.refusing = false;
        state.rules.clear();
        for link in &state.open {
            link.apply(&[]);
        }
    }

    /// New connections go to this server; open ones stay where they are.
    pub fn retarget(&self, target: Target) {
        self.shared.state.lock().target = target;
    }

    /// Sends this to the clients of these connections as if their server had sent it. It is inserted between two chunks
    /// of the server's data; if the server sends little at a time, a chunk is a whole message.
    pub fn say(&self, which: &Which, bytes: &[u8]) {
        for link in self.shared.links(which) {
            link.said.lock().extend_from_slice(bytes);
            link.say.notify_one();
        }
    }

    /// How many connections are open.
    pub fn open(&self, which: &Which) -> usize {
        self.shared.links(which).len()
    }

    /// How many connections there have been so far.
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::Relaxed)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.end.cancel();
        self.cut(&Which::All);
    }
}

impl fmt::Debug for FaultProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultProxy").field("address", &self.address).finish_non_exhaustive()
    }
}

struct Shared {
    state: Mutex<State>,
    accepted: AtomicU64,
    tracker: TaskTracker,
}

struct State {
    target: Target,
    refusing: bool,
    /// Later ones override earlier ones.
    rules: Vec<(Which, Direction, Flow)>,
    open: Vec<Arc<Link>>,
}

/// One connection, seen from outside.
struct Link {
    /// The client's first bytes.
    greeting: Mutex<Vec<u8>>,
    to_server: watch::Sender<Flow>,
    to_client: watch::Sender<Flow>,
    /// Data to send to the client in the server's name.
    said: Mutex<Vec<u8>>,
    say: Notify,
    cut: CancellationToken,
}

impl Shared {
    fn links(&self, which: &Which) -> Vec<Arc<Link>> {
        self.state.lock().open.iter().filter(|link| link.is(which)).cloned().collect()
    }
}

impl Link {
    fn is(&self, which: &Which) -> bool {
        let says =
            |what: &str| self.greeting.lock().windows(what.len()).any(|bytes| bytes == what.as_bytes());
        match which {
            Which::All => true,
            Which::Saying(what) => says(what),
            Which::NotSaying(what) => !says(what),
        }
    }

    fn apply(&self, rules: &[(Which, Direction, Flow)]) {
        let flow = |direction| {
            let mut matching = rules.iter().rev().filter(|(which, d, _)| *d == direction && self.is(which));
            matching.next().map_or(Flow::Forward, |(_, _, flow)| *flow)
        };
        self.to_server.send_replace(flow(Direction::ToServer));
        self.to_client.send_replace(flow(Direction::ToClient));
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, end: CancellationToken) {
    while let Ok((client, _)) = listener.accept().await {
        shared.accepted.fetch_add(1, Ordering::Relaxed);
        let (refusing, target) = {
            let state = shared.state.lock();
            (state.refusing, state.target.clone())
        };
        if refusing {
            reset(client);
            continue;
        }
        let link = Arc::new(Link {
            greeting: Mutex::default(),
            to_server: watch::Sender::new(Flow::Forward),
            to_client: watch::Sender::new(Flow::Forward),
            said: Mutex::default(),
            say: Notify::new(),
            cut: end.child_token(),
        });
        shared.tracker.spawn(serve(client, target, link, Arc::clone(&shared)));
    }
}

async fn serve(mut client: TcpStream, target: Target, link: Arc<Link>, shared: Arc<Shared>) {
    {
        let mut state = shared.state.lock();
        link.apply(&state.rules);
        state.open.push(Arc::clone(&link));
    }
    let passed = link.cut.run_until_cancelled(pass(&mut client, target, &link, &shared)).await;
    shared.state.lock().open.retain(|other| !Arc::ptr_eq(other, &link));
    // Forward an orderly end as such; turn anything else into a reset.
    if !matches!(passed, Some(Ok(()))) {
        reset(client);
    }
}

/// Forwards bytes until one side ends.
async fn pass(client: &mut TcpStream, target: Target, link: &Link, shared: &Shared) -> io::Result<()> {
    client.set_nodelay(true)?;
    let server: Box<dyn Duplex> = match target {
        Target::Unix(path) => Box::new(UnixStream::connect(path).await?),
        Target::Tcp(address) => {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
    };
    let (from_server, to_server) = tokio::io::split(server);
    let (from_client, to_client) = client.split();
    let greet = |bytes: &[u8]| {
        let mut greeting = link.greeting.lock();
        if greeting.is_empty() {
            greeting.extend_from_slice(bytes);
            drop(greeting);
            link.apply(&shared.state.lock().rules);
        }
    };
    tokio::select! {
        result = pump(from_client, to_server, link.to_server.subscribe(), greet, None) => result,
        result = pump(from_server, to_client, link.to_client.subscribe(), |_| {}, Some(link)) => result,
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut flow: watch::Receiver<Flow>,
    see: impl Fn(&[u8]),
    prompter: Option<&Link>,
) -> io::Result<()> {
    let said = async || match prompter {
        Some(link) => {
            link.say.notified().await;
            std::mem::take(&mut *link.said.lock())
        }
        None => std::future::pending().await,
    };
    let mut buffer = vec![0; 16 * 1024];
    loop {
        if flow.wait_for(|flow| *flow != Flow::Stall).await.is_err() {
            return Ok(());
        }
        let length = tokio::select! {
            length = from.read(&mut buffer) => length?,
            // Check the fault again: a stall must not leave a read in progress.
            _ = flow.changed() => continue,
            said = said() => {
                to.write_all(&said).await?;
                continue;
            }
        };
        let bytes = buffer.get(..length).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(());
        }
        see(bytes);
        let decided = flow.wait_for(|flow| *flow != Flow::Stall).await.map(|flow| *flow);
        match decided {
            Ok(Flow::Blackhole) => {}
            Ok(_) => to.write_all(bytes).await?,
            Err(_) => return Ok(()),
        }
    }
}

trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

fn reset(stream: TcpStream) {
    // A linger of zero makes the close a reset (tcp(7)); without it the peer sees an orderly end.
    let _ = SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO));
    drop(stream);
}
