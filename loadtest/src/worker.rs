//! A process that holds a part of a run's clients.
//!
//! Owns its connections and its part of the schedule. It receives orders on standard input and sends updates
//! on standard output, one line of JSON each ([`plan`](crate::plan)); it decides nothing about the run. One
//! thread: between two turns of the loop it publishes what is due, opens connections, and sends an update a
//! few times a second.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::fd::AsFd,
    time::Duration,
};

use anyhow::{Context, ensure};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Signal, set_parent_process_death_signal},
};

use crate::{
    books::Books,
    clock,
    dialect::Dialect,
    plan::{Group, Order, Plan, Publishers, Role},
    process,
    publisher::Publisher,
    stamp::Stamp,
    stop::Stop,
    swarm::{OPENING_PATIENCE, Swarm, Unsaid},
    target::{Entrance, Target, Via},
};

/// The interval of updates.
const TELLING: u64 = clock::SECOND / 5;

/// The longest wait of a turn.
const LONGEST_TURN: u64 = clock::SECOND / 20;

/// How many messages may be sent before the loop reads arrivals.
const BATCH: usize = 256;

/// Stands for a publisher in another process.
const ELSEWHERE: u32 = u32::MAX;

/// Executes orders until their end.
pub fn run() -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // Ctrl-C reaches the whole process group; the parent decides what it means.
    let _ignored = Stop::install(Duration::MAX)?;
    let mut orders = BufReader::new(io::stdin());
    let mut line = String::new();
    orders.read_line(&mut line)?;
    let Ok(Order::Begin(plan)) = serde_json::from_str(&line) else {
        anyhow::bail!("a worker is started by a scenario, not by hand");
    };
    if let Some(cpu) = plan.client_cpu {
        process::pin_to(cpu)?;
    }
    let mut worker = Worker::new(*plan)?;
    worker.swarm.watch(io::stdin())?;
    worker.obey(&mut orders)
}

struct Worker {
    plan: Plan,
    swarm: Swarm,
    books: Books,
    groups: Vec<Live>,
    orders: u32,
    /// How many of this process's clients have been started.
    begun: usize,
    /// How many of them may be started.
    wanted: usize,
    opening_since: u64,
    /// How many clients were ready when one last became ready, and when that was.
    progress: (usize, u64),
    schedule: Option<Schedule>,
    visitors: Vec<usize>,
    told: u64,
    told_state: (bool, bool),
    ended: bool,
    frames: Vec<u8>,
}

/// A group, as this process serves it.
struct Live {
    group: Group,
    entrance: Entrance,
    sending: Sending,
    /// The next sequence of each publisher of each room.
    sequences: Vec<u64>,
    /// The next message of the whole group, regardless of its sender.
    next: u64,
    total: u64,
    /// The next visitor to leave, and how many have left.
    leaving: (usize, u64),
}

enum Sending {
    Clients {
        entrance: Box<Entrance>,
        /// Which client of this process publishes for each publisher of each room.
        voices: Vec<u32>,
    },
    Line(Publisher),
}

#[derive(Clone, Copy)]
struct Schedule {
    start: u64,
    end: u64,
}

impl Worker {
    fn new(plan: Plan) -> anyhow::Result<Self> {
        let mut targets = Vec::new();
        for group in &plan.groups {
            targets.push(group.target.resolve(1)?);
        }
        let dialects: Vec<Dialect> = targets.iter().map(|target| target.entrance.dialect).collect();
        let books = Books::new(&plan, &dialects)?;
        process::allow_descriptors(books.chairs.len())?;
        let mut groups = Vec::new();
        for (number, (group, target)) in plan.groups.iter().zip(targets).enumerate() {
            groups.push(Live::new(number, group.clone(), target, &books)?);
        }
        let role = |member: &usize| books.chairs.get(*member).map(|chair| chair.place.role);
        let visitors = (0..books.chairs.len()).filter(|member| role(member) == Some(Role::Visitor)).collect();
        Ok(Self {
            plan,
            swarm: Swarm::new()?,
            books,
            groups,
            orders: 1,
            begun: 0,
            wanted: 0,
            opening_since: 0,
            progress: (0, 0),
            schedule: None,
            visitors,
            told: 0,
            told_state: (false, false),
            ended: false,
            frames: Vec::new(),
        })
    }

    fn obey(&mut self, orders: &mut BufReader<io::Stdin>) -> anyhow::Result<()> {
        self.tell()?;
        while !self.ended {
            let timeout = Duration::from_nanos(self.until_due());
            let Self { swarm, books, .. } = &mut *self;
            let ordered = swarm.drain(timeout, |event| books.note(event))?;
            // A line that arrived together with an earlier order is already buffered, and epoll will not
            // report it.
            let ordered = ordered || orders.buffer().contains(&b'\n');
            if ordered && !self.take_orders(orders)? {
                return Ok(());
            }
            self.open();
            self.publish()?;
            self.churn();
            // A change of state is reported at once, because times are measured by it.
            if clock::now() >= self.told + TELLING || self.state() != self.told_state {
                self.tell()?;
            }
        }
        Ok(())
    }

    /// Executes the received orders; `false` at the end of the input.
    fn take_orders(&mut self, orders: &mut BufReader<io::Stdin>) -> anyhow::Result<bool> {
        loop {
            let mut line = String::new();
            if orders.read_line(&mut line)? == 0 {
                return Ok(false);
            }
            self.carry_out(&serde_json::from_str(&line).context("an order")?)?;
            let waiting = orders.buffer().contains(&b'\n') || is_readable(orders.get_ref())?;
            if self.ended || !waiting {
                return Ok(true);
            }
        }
    }

    fn carry_out(&mut self, order: &Order) -> anyhow::Result<()> {
        self.orders += 1;
        match *order {
            Order::Begin(_) => anyhow::bail!("the plan was sent twice"),
            Order::Open(upto) => {
                self.wanted = self.books.chairs.iter().take_while(|chair| chair.number < upto).count();
                self.opening_since = clock::now();
                self.progress = (0, self.opening_since);
            }
            Order::Publish { start, duration } => {
                for live in &mut self.groups {
                    live.total = live.next + live.group.due_within(duration);
                }
                self.schedule = Some(Schedule { start, end: start + duration });
            }
            Order::Halt => {
                for live in &mut self.groups {
                    live.total = live.next;
                }
                self.schedule = None;
            }
            Order::Stall => {
                for (member, chair) in self.books.chairs.iter().enumerate() {
                    if chair.place.role == Role::Stalled {
                        self.swarm.stall(member)?;
                    }
                }
            }
            Order::Drop => {
                (0..self.swarm.len()).for_each(|member| self.swarm.hang_up(member));
                self.books.all_left();
                (self.begun, self.wanted) = (0, 0);
            }
            Order::End => {
                self.books.conclude();
                self.ended = true;
            }
        }
        self.tell()
    }

    /// Starts as many connections as may be in progress now.
    fn open(&mut self) {
        let now = clock::now();
        let at_once = self.plan.at_once as usize;
        while self.begun < self.allowed(now) && self.swarm.opening() < at_once && self.books.failure.is_none()
        {
            let (member, chair) = (self.begun, self.books.chairs.get(self.begun).copied());
            let Some((chair, live)) = chair.and_then(|chair| Some((chair, self.groups.get(chair.group)?)))
            else {
                break;
            };
            self.begun += 1;
            let entrance = live.entrance_of(chair.place.role);
            let seat = live.group.seat(chair.place, chair.number);
            let opened = if member < self.swarm.len() {
                self.swarm.reopen(member, entrance, seat)
            } else {
                self.swarm.open(entrance, seat)
            };
            if let Err(error) = opened {
                self.books.refuse_for(member, format!("{error:#}"));
            }
        }
        let standing = self.begun - self.swarm.opening();
        if standing != self.progress.0 || self.swarm.opening() == 0 {
            self.progress = (standing, now);
        } else if now - self.progress.1 > clock::nanos(OPENING_PATIENCE) {
            for member in 0..self.swarm.len() {
                if self.swarm.is_opening(member) {
                    self.swarm.hang_up(member);
                    self.books.refuse_for(member, format!("nothing for {OPENING_PATIENCE:?}"));
                }
            }
        }
    }

    /// How many connections may have been started by now, according to the ramp.
    fn allowed(&self, now: u64) -> usize {
        ramped(now.saturating_sub(self.opening_since), self.plan.ramp, self.wanted)
    }

    /// How long until something is due.
    fn until_due(&self) -> u64 {
        let Some(schedule) = self.schedule else { return LONGEST_TURN };
        let next = self.groups.iter().filter(|live| live.next < live.total);
        let next = next.map(|live| schedule.start + live.group.due(live.next)).min();
        next.map_or(LONGEST_TURN, |next| next.saturating_sub(clock::now()).min(LONGEST_TURN))
    }

    /// Sends what is due.
    fn publish(&mut self) -> anyhow::Result<()> {
        let Some(schedule) = self.schedule else { return Ok(()) };
        let now = clock::now();
        if now < schedule.start {
            return Ok(());
        }
        let Self { plan, swarm, books, groups, frames, .. } = self;
        for (number, live) in groups.iter_mut().enumerate() {
            let (published, unsent) = live.publish(plan, schedule.start, now, swarm, frames)?;
            if let Some(tally) = books.tally(number) {
                tally.published += published;
                tally.unsent += unsent;
            }
            if published > 0 {
                books.news.last_sent = clock::now();
            }
        }
        Ok(())
    }

    /// Lets visitors leave and come back.
    fn churn(&mut self) {
        let Some(schedule) = self.schedule else { return };
        let now = clock::now();
        if now < schedule.start || now > schedule.end {
            return;
        }
        let Self { plan, swarm, books, groups, visitors, .. } = self;
        for (number, live) in groups.iter_mut().enumerate().filter(|(_, live)| live.group.churn > 0.0) {
            let own: Vec<usize> = visitors
                .iter()
                .copied()
                .filter(|&member| books.chairs.get(member).is_some_and(|chair| chair.group == number))
                .collect();
            let rate = live.group.churn / f64::from(plan.parts);
            while now >= schedule.start + clock::due(live.leaving.1, rate) {
                live.leaving.1 += 1;
                let Some(&member) = own.get(live.leaving.0 % own.len().max(1)) else { break };
                live.leaving.0 += 1;
                // A visitor that is still connecting is left alone.
                let Some(chair) = books.chairs.get(member).copied().filter(|_| !swarm.is_opening(member))
                else {
                    continue;
                };
                if swarm.is_connected(member) {
                    books.leave(member);
                }
                let seat = live.group.seat(chair.place, chair.number);
                if let Err(error) = swarm.reopen(member, &live.entrance, seat) {
                    books.refuse_for(member, format!("{error:#}"));
                }
            }
        }
    }

    /// Whether no connection is in progress, and whether everything due has been published.
    fn state(&self) -> (bool, bool) {
        let settled = self.begun == self.wanted && self.swarm.opening() == 0;
        (settled, self.groups.iter().all(|live| live.next >= live.total))
    }

    /// Sends an update.
    fn tell(&mut self) -> anyhow::Result<()> {
        self.told = clock::now();
        let mut news = self.books.take_news();
        news.orders = self.orders;
        self.told_state = self.state();
        (news.settled, news.done) = self.told_state;
        let mut line = serde_json::to_vec(&news)?;
        line.push(b'\n');
        let mut out = io::stdout().lock();
        out.write_all(&line)?;
        Ok(out.flush()?)
    }
}

impl Live {
    fn new(number: usize, group: Group, target: Target, books: &Books) -> anyhow::Result<Self> {
        let publishers = group.rooms as usize * group.voices() as usize;
        let Target { entrance, via } = target;
        let by_clients = |entrance: Entrance| {
            let mut voices = vec![ELSEWHERE; publishers];
            for (member, chair) in (0..).zip(&books.chairs).filter(|(_, chair)| chair.group == number) {
                let speaks = match group.publishers {
                    Publishers::Nobody => false,
                    Publishers::One => chair.place.role == Role::Publisher,
                    Publishers::Members => chair.place.role == Role::Listener,
                };
                let at = chair.place.index as usize * group.rooms as usize + chair.place.room as usize;
                if let Some(voice) = voices.get_mut(at).filter(|_| speaks) {
                    *voice = member;
                }
            }
            Sending::Clients { entrance: Box::new(entrance), voices }
        };
        let sending = match (group.publishers, via) {
            (Publishers::Members | Publishers::Nobody, _) => by_clients(entrance.clone()),
            (_, Via::Client(entrance)) => by_clients(entrance),
            (_, Via::Http(address, credentials)) => {
                Sending::Line(Publisher::http(&address, &credentials).context("cannot publish by HTTP POST")?)
            }
            (_, Via::Redis(redis)) => {
                Sending::Line(Publisher::redis(&redis).context("cannot publish by Redis PUBLISH")?)
            }
        };
        ensure!(
            group.publishers != Publishers::Members || entrance.dialect != Dialect::Sse,
            "clients of server-sent events cannot publish on their connection"
        );
        Ok(Self {
            group,
            entrance,
            sending,
            sequences: vec![0; publishers],
            next: 0,
            total: 0,
            leaving: (0, 0),
        })
    }

    fn entrance_of(&self, role: Role) -> &Entrance {
        match &self.sending {
            Sending::Clients { entrance, .. } if role == Role::Publisher => entrance,
            _ => &self.entrance,
        }
    }

    /// Sends the messages due by `now` that belong to this process; returns how many were sent, and how many
    /// could not be.
    fn publish(
        &mut self,
        plan: &Plan,
        start: u64,
        now: u64,
        swarm: &mut Swarm,
        frames: &mut Vec<u8>,
    ) -> anyhow::Result<(u64, u64)> {
        let Self { group, sending, sequences, next, total, .. } = self;
        let (mut published, mut unsent, mut looked) = (0, 0, 0);
        let mut batch = Batch::default();
        frames.clear();
        while *next < *total && looked < BATCH {
            let due = start + group.due(*next);
            if due > now {
                break;
            }
            let (room, who) = group.voice(*next);
            *next += 1;
            looked += 1;
            let at = who as usize * group.rooms as usize + room as usize;
            let Some(sequence) = sequences.get_mut(at) else { continue };
            let stamp = Stamp {
                run: plan.run,
                room: group.first_room + room,
                publisher: who,
                sequence: *sequence,
                sent: due,
            };
            match sending {
                Sending::Line(_) if room % plan.parts != plan.part => {}
                Sending::Line(_) => {
                    stamp.write(frames, group.shape());
                    batch.rooms.push(stamp.room);
                    *sequence += 1;
                    published += 1;
                }
                Sending::Clients { entrance, voices } => {
                    let Some(&voice) = voices.get(at).filter(|&&voice| voice != ELSEWHERE) else { continue };
                    // A publisher's burst is one write.
                    if batch.voice != Some(voice) {
                        batch.flush(swarm, frames);
                        batch.voice = Some(voice);
                    }
                    batch.payload.clear();
                    stamp.write(&mut batch.payload, group.shape());
                    let began = frames.len();
                    let number = *next;
                    entrance.dialect.publish(entrance, stamp.room, &batch.payload, number, frames);
                    if swarm.can_say(voice as usize, frames.len()) {
                        *sequence += 1;
                        published += 1;
                    } else {
                        frames.truncate(began);
                        unsent += 1;
                    }
                }
            }
        }
        match sending {
            Sending::Clients { .. } => batch.flush(swarm, frames),
            Sending::Line(line) if batch.rooms.is_empty() => line.listen().context("publishing failed")?,
            Sending::Line(line) => {
                line.publish(frames, group.shape().size(), &batch.rooms).context("publishing failed")?;
            }
        }
        Ok((published, unsent))
    }
}

/// The messages about to be sent.
#[derive(Default)]
struct Batch {
    voice: Option<u32>,
    payload: Vec<u8>,
    rooms: Vec<u32>,
}

impl Batch {
    /// Writes one client's messages. It was able to send a moment ago, so messages that fail now were
    /// published on a connection that broke: they count as lost.
    fn flush(&mut self, swarm: &mut Swarm, frames: &mut Vec<u8>) {
        if let Some(voice) = self.voice
            && !frames.is_empty()
        {
            let _: Result<(), Unsaid> = swarm.say(voice as usize, frames);
        }
        frames.clear();
    }
}

fn is_readable(input: &(impl AsFd + Read)) -> anyhow::Result<bool> {
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(poll(&mut [PollFd::new(input, PollFlags::IN)], Some(&now))? > 0)
}

/// How many of `all` should have been started after `passed` of `ramp` nanoseconds.
fn ramped(passed: u64, ramp: u64, all: usize) -> usize {
    if passed >= ramp {
        return all;
    }
    let part = u128::from(passed) * all as u128 / u128::from(ramp);
    usize::try_from(part).unwrap_or(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ramp_is_even_and_ends_with_all_clients() {
        let second = clock::SECOND;
        assert_eq!(
            [0, second / 4, second - 1, second].map(|passed| ramped(passed, second, 1000)),
            [0, 250, 999, 1000]
        );
        assert_eq!(ramped(0, 0, 1000), 1000, "without a ramp, at once");
        assert_eq!(ramped(u64::MAX - 1, u64::MAX, usize::MAX), usize::MAX - 1);
    }
}
