//! The clients: many connections, one epoll loop, one thread.
//!
//! Owns the sockets, from the connect to the last byte, and passes every complete message to the caller. It
//! does not interpret messages and does not decide when to publish.
//!
//! Readiness is level-triggered and each ready socket is read once per turn into one shared scratch buffer,
//! so a delivery costs one `recv` and its share of an `epoll_wait`, and allocates nothing.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use rustix::{
    buffer::spare_capacity,
    event::{
        Timespec,
        epoll::{self, CreateFlags, EventData, EventFlags},
    },
};

use crate::{
    dialect::Seat,
    inflate::Inflater,
    member::{Desk, Member},
    stop::Stop,
    target::Entrance,
    websocket::{MAX_FRAME, WireError},
};

pub use crate::member::Unsaid;

/// How many connections may be in progress at once: below any sane listen backlog.
pub const OPENING_AT_ONCE: usize = 256;

/// Give up opening members when no connection has made progress for this long.
pub const OPENING_PATIENCE: Duration = Duration::from_secs(15);

/// The size of one read. Large enough for a burst of eight 4 KiB messages.
const READ_SIZE: usize = 256 * 1024;

const EVENTS_PER_TURN: usize = 1024;

/// Marks the descriptor of [`Swarm::watch`] among those of members.
const WATCHED: u64 = u64::MAX;

/// What happened to a member.
#[derive(Debug)]
pub enum Event<'a> {
    /// It is ready in its room, this many nanoseconds after its connect was started.
    Standing { member: usize, took: u64 },
    /// It received a message; `at` is when the read that brought it returned.
    Message { member: usize, payload: &'a [u8], at: u64 },
    /// It has joined another room after it was ready.
    Joined { room: u32 },
    /// The server has removed it from a room with a code that allows it to resubscribe. Only for members that
    /// [stay](Seat::stays); the connection of any other ends.
    Left { member: usize, channel: &'a str },
    /// The position of its next message, or of the start of its subscription, in a room with a history.
    Position { member: usize, epoch: Option<u64>, offset: u64 },
    /// The server says that messages may be missing at this point.
    Gap { member: usize, cause: &'a str },
    /// One of its publications was accepted, if the protocol says so.
    Accepted,
    /// One of its publications was refused.
    Refused { why: String },
    /// Its connection has ended; `stood` tells whether it had been ready.
    Lost { member: usize, why: Lost, stood: bool },
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    #[error("closed by the server {}", .0.map_or("without a code".to_owned(), |code| format!("with code {code}")))]
    Closed(Option<u16>),
    /// As reported by the protocol above the `WebSocket`.
    #[error("{0}")]
    Ended(String),
    /// The stream ended without a close frame.
    #[error("the server closed the connection")]
    HungUp,
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The members and their loop.
pub struct Swarm {
    epoll: OwnedFd,
    members: Vec<Member>,
    /// Members that are not ready yet.
    opening: usize,
    desk: Desk,
    ready: Vec<epoll::Event>,
}

impl Swarm {
    /// A swarm without members.
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC).context("cannot create an epoll instance")?,
            members: Vec::new(),
            opening: 0,
            desk: Desk { scratch: vec![0; MAX_FRAME + READ_SIZE], inflater: Inflater::default() },
            ready: Vec::with_capacity(EVENTS_PER_TURN),
        })
    }

    /// Also watches `descriptor`: [`drain`](Self::drain) returns whether it can be read.
    pub fn watch(&mut self, descriptor: impl AsFd) -> anyhow::Result<()> {
        epoll::add(&self.epoll, descriptor, EventData::new_u64(WATCHED), EventFlags::IN)
            .context("cannot wait for orders")
    }

    /// How many members have ever been opened; their numbers are below this.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// How many bytes the first `members` have received on their current connections.
    pub fn received(&self, members: usize) -> u64 {
        self.members.iter().take(members).map(Member::received).sum()
    }

    /// How many members are connecting.
    pub fn opening(&self) -> usize {
        self.opening
    }

    /// Whether `member` has a connection, ready or not.
    pub fn is_connected(&self, member: usize) -> bool {
        self.members.get(member).is_some_and(Member::is_connected)
    }

    /// Whether `member` is connecting.
    pub fn is_opening(&self, member: usize) -> bool {
        self.members.get(member).is_some_and(|member| member.is_connected() && !member.stands())
    }

    /// Whether [`say`](Self::say) would accept this many bytes for `member`.
    pub fn can_say(&self, member: usize, bytes: usize) -> bool {
        self.members.get(member).is_some_and(|member| member.can_say(bytes).is_ok())
    }

    /// Starts to connect a new member. It gets its number even if that fails.
    pub fn open(&mut self, entrance: &Entrance, seat: Seat) -> anyhow::Result<()> {
        let index = self.members.len();
        let connected = Member::connect(&self.epoll, index, entrance, seat);
        let (member, outcome) = match connected {
            Ok(member) => (member, Ok(())),
            Err(error) => (Member::absent(entrance.dialect), Err(error)),
        };
        self.opening += usize::from(outcome.is_ok());
        self.members.push(member);
        outcome
    }

    /// Starts to connect `member` again. Its previous connection, if any, ends.
    pub fn reopen(&mut self, member: usize, entrance: &Entrance, seat: Seat) -> anyhow::Result<()> {
        self.hang_up(member);
        if let Some(slot) = self.members.get_mut(member) {
            *slot = Member::connect(&self.epoll, member, entrance, seat)?;
            self.opening += 1;
        }
        Ok(())
    }

    /// Closes the connection of `member` without a close frame, like a client that loses its network.
    pub fn hang_up(&mut self, member: usize) {
        let Some(slot) = self.members.get_mut(member) else { return };
        if slot.is_connected() && !slot.stands() {
            self.opening -= 1;
        }
        slot.drop_connection();
    }

    /// Stops reading from `member`: the kernel's buffers fill up, then the server's queue.
    pub fn stall(&mut self, member: usize) -> anyhow::Result<()> {
        self.members.get_mut(member).map_or(Ok(()), |slot| slot.stall(&self.epoll))
    }

    /// Writes `bytes`, whole frames, on the connection of `member`, with one system call unless the socket is
    /// full.
    pub fn say(&mut self, member: usize, bytes: &[u8]) -> Result<(), Unsaid> {
        let slot = self.members.get_mut(member).ok_or(Unsaid::Gone)?;
        slot.say(&self.epoll, member, bytes)
    }

    /// Opens members until there are `total`, and returns when every one of them is ready. Events of members
    /// that are ready already go to `on`.
    ///
    /// The first connection that fails is an error: a test with fewer members than requested is a different
    /// test.
    pub fn grow(
        &mut self,
        entrance: &Entrance,
        total: usize,
        seat: impl Fn(usize) -> Seat,
        stop: &Stop,
        mut on: impl FnMut(Event<'_>),
    ) -> anyhow::Result<()> {
        self.members.reserve_exact(total.saturating_sub(self.members.len()));
        let mut progress = (0, Instant::now());
        while self.members.len() < total || self.opening > 0 {
            let standing = self.members.len() - self.opening;
            ensure!(!stop.is_set(), "ended while opening members; {standing} of {total} are ready");
            while self.members.len() < total && self.opening < OPENING_AT_ONCE {
                let next = self.members.len();
                self.open(entrance, seat(next)).with_context(|| {
                    format!("member {} of {total} cannot connect to {}", next + 1, entrance.address)
                })?;
            }
            let mut failure = None;
            self.drain(Duration::from_millis(100), |event| match event {
                Event::Lost { member, why, stood: false } => failure = Some((member, why)),
                event => on(event),
            })?;
            if let Some((member, why)) = failure {
                return Err(anyhow::Error::from(why))
                    .with_context(|| format!("member {} of {total} did not become ready", member + 1));
            }
            let standing = self.members.len() - self.opening;
            if progress.0 != standing {
                progress = (standing, Instant::now());
            }
            ensure!(
                progress.1.elapsed() < OPENING_PATIENCE,
                "no connection was completed for {OPENING_PATIENCE:?}; {standing} of {total} are ready"
            );
        }
        Ok(())
    }

    /// Waits up to `timeout` for arrivals and passes them to `on`. Returns whether the watched descriptor can
    /// be read.
    pub fn drain(&mut self, timeout: Duration, mut on: impl FnMut(Event<'_>)) -> anyhow::Result<bool> {
        let timeout = Timespec::try_from(timeout).context("a time-out beyond the clock's range")?;
        self.ready.clear();
        match epoll::wait(&self.epoll, spare_capacity(&mut self.ready), Some(&timeout)) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(false),
            Err(error) => return Err(error).context("epoll_wait"),
        }
        let mut watched = false;
        for event in &self.ready {
            if event.data.u64() == WATCHED {
                watched = true;
                continue;
            }
            let index = usize::try_from(event.data.u64()).unwrap_or(usize::MAX);
            let Some(member) = self.members.get_mut(index).filter(|member| member.is_connected()) else {
                continue;
            };
            let stood = member.stands();
            let outcome = member.turn(&self.epoll, index, &mut self.desk, &mut on);
            if !stood && (outcome.is_err() || member.stands()) {
                self.opening -= 1;
            }
            if let Err(why) = outcome {
                member.drop_connection();
                on(Event::Lost { member: index, why, stood });
            }
        }
        Ok(watched)
    }

    /// Sends a close frame on every connection and removes all members.
    pub fn close(self) {
        for member in self.members {
            member.close();
        }
    }
}
