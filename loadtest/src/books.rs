//! The counts of one process: the part of [`worker`](crate::worker) that events change.
//!
//! Owns the accounts of this process's clients and the update that reports them. Recording an arrival
//! allocates nothing unless a message is missing.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};

use crate::{
    dialect::Dialect,
    latency::{Latencies, Sparse},
    ledger::{Account, Arrival},
    plan::{Place, Plan, Publishers, Role, Tally, Update},
    stamp::{Finder, Stamp},
    swarm::{Event, Lost},
    websocket::WireError,
};

/// With more accounts than this, at 32 bytes each, the plan does not fit.
const MAX_ACCOUNTS: usize = 50_000_000;

/// How many different reasons for a refusal are counted separately.
const MAX_REASONS: usize = 32;

/// The counts of this process.
pub struct Books {
    pub chairs: Vec<Chair>,
    pages: Vec<Page>,
    accounts: Vec<Account>,
    connects: Latencies,
    /// The next update.
    pub news: Update,
    standing: u32,
    tolerant: bool,
    /// Why the run failed.
    pub failure: Option<String>,
}

/// One client of this process.
#[derive(Clone, Copy, Debug)]
pub struct Chair {
    pub group: usize,
    pub place: Place,
    /// Its number among all clients of the run.
    pub number: u32,
    /// Its first account.
    account: usize,
}

/// The counts of one group.
struct Page {
    first_room: u32,
    /// How many rooms a listener is in.
    rooms_per_client: u32,
    voices: u32,
    /// Whether a listener must not receive its own messages (the server does not echo).
    deaf: bool,
    dialect: Dialect,
    finder: Finder,
    tally: Tally,
    latency: Latencies,
}

impl Books {
    /// Empty counts for the clients of this part of `plan`, whose groups use `dialects`.
    pub fn new(plan: &Plan, dialects: &[Dialect]) -> anyhow::Result<Self> {
        let mut accounts = 0_usize;
        let mut chairs = Vec::new();
        for (group, place, number) in plan.own() {
            let own = plan.groups.get(group).context("a group of the plan")?;
            let voices = own.voices() * own.rooms_of(place.role);
            chairs.push(Chair { group, place, number, account: accounts });
            if matches!(place.role, Role::Listener | Role::Visitor) {
                accounts += voices as usize;
            }
        }
        ensure!(
            accounts <= MAX_ACCOUNTS,
            "{accounts} pairs of publisher and listener are too many for one process; use --processes"
        );
        let page = |(group, &dialect): (&crate::plan::Group, &Dialect)| {
            Ok(Page {
                first_room: group.first_room,
                rooms_per_client: group.rooms_per_client,
                voices: group.voices(),
                deaf: group.publishers == Publishers::Members && !group.echo,
                dialect,
                finder: Finder::new(plan.run, group.shape()),
                tally: Tally::default(),
                latency: Latencies::new()?,
            })
        };
        Ok(Self {
            chairs,
            pages: plan.groups.iter().zip(dialects).map(page).collect::<anyhow::Result<_>>()?,
            accounts: std::iter::repeat_with(Account::default).take(accounts).collect(),
            connects: Latencies::new()?,
            news: Update::default(),
            standing: 0,
            tolerant: plan.tolerant,
            failure: None,
        })
    }

    /// The counts of group `group`.
    pub fn tally(&mut self, group: usize) -> Option<&mut Tally> {
        self.pages.get_mut(group).map(|page| &mut page.tally)
    }

    /// Everything that has happened since the previous update.
    pub fn take_news(&mut self) -> Update {
        let connects: Sparse = self.connects.take();
        let groups = self.pages.iter_mut().map(|page| {
            let latency = page.latency.take();
            Tally { latency, ..page.tally.take() }
        });
        let failure = self.failure.clone();
        let groups = groups.collect();
        Update { connects, groups, failure, standing: self.standing, ..std::mem::take(&mut self.news) }
    }

    /// Records an event of the swarm.
    pub fn note(&mut self, event: Event<'_>) {
        match event {
            Event::Message { member, payload, at } => self.message(member, payload, at),
            Event::Standing { member, took } => {
                self.standing += 1;
                self.connects.record(took);
                if self.role(member) == Some(Role::Visitor) {
                    self.arrive(member);
                }
            }
            Event::Accepted
            | Event::Joined { .. }
            | Event::Left { .. }
            | Event::Position { .. }
            | Event::Gap { .. } => {}
            Event::Refused { why } => {
                self.news.refused_publications += 1;
                self.news.first_refusal.get_or_insert(why);
            }
            Event::Lost { why, stood: false, member } => self.refuse(member, &why),
            Event::Lost { member, why, .. } => {
                self.standing -= 1;
                let Some(chair) = self.chairs.get(member).copied() else { return };
                if chair.place.role == Role::Listener
                    && let Some(tally) = self.tally(chair.group)
                {
                    tally.lost += 1;
                }
                // The server is expected to drop a client that has stopped reading.
                if chair.place.role != Role::Stalled {
                    let words = format!("client {}: {why}", chair.number + 1);
                    self.news.first_loss.get_or_insert(words);
                }
            }
        }
    }

    /// Records a connection that failed before it was ready.
    pub fn refuse(&mut self, member: usize, why: &Lost) {
        let words = match why {
            Lost::Wire(WireError::Refused(status)) => format!("status {status}"),
            other => other.to_string(),
        };
        self.refuse_for(member, words);
    }

    /// The same, with the reason as text.
    pub fn refuse_for(&mut self, member: usize, why: String) {
        if !self.tolerant && self.role(member) != Some(Role::Visitor) {
            let number = self.chairs.get(member).map_or(0, |chair| chair.number + 1);
            self.failure.get_or_insert_with(|| format!("client {number} did not become ready: {why}"));
        }
        count(&mut self.news.refused, why);
    }

    /// Records that the tester itself has closed the connection of `member`.
    pub fn leave(&mut self, member: usize) {
        self.standing = self.standing.saturating_sub(1);
        self.settle_visit(member);
    }

    /// Records that all clients have been dropped.
    pub fn all_left(&mut self) {
        self.standing = 0;
    }

    /// Closes the accounts of visitors.
    pub fn conclude(&mut self) {
        for member in 0..self.chairs.len() {
            self.settle_visit(member);
        }
    }

    fn role(&self, member: usize) -> Option<Role> {
        self.chairs.get(member).map(|chair| chair.place.role)
    }

    fn arrive(&mut self, member: usize) {
        self.settle_visit(member);
        if let Some(group) = self.chairs.get(member).map(|chair| chair.group)
            && let Some(tally) = self.tally(group)
        {
            tally.visits += 1;
        }
    }

    /// Ends a visit: messages missing between the visitor's first and last are counted, and its account is
    /// reset.
    fn settle_visit(&mut self, member: usize) {
        let Some(chair) = self.chairs.get(member).filter(|chair| chair.place.role == Role::Visitor) else {
            return;
        };
        let Some(page) = self.pages.get_mut(chair.group) else { return };
        let own = chair.account..chair.account + page.voices as usize;
        for account in self.accounts.get_mut(own).unwrap_or_default() {
            page.tally.visitors_missing += account.missing();
            *account = Account::visitor();
        }
    }

    fn message(&mut self, member: usize, payload: &[u8], at: u64) {
        let Some(chair) = self.chairs.get(member) else { return };
        let Place { room, index, role } = chair.place;
        if matches!(role, Role::Publisher | Role::Stalled) {
            return;
        }
        let Some(page) = self.pages.get_mut(chair.group) else { return };
        let stamp = page.finder.find(page.dialect, payload);
        let rooms = if role == Role::Listener { page.rooms_per_client } else { 1 };
        let which = |stamp: &Stamp| stamp.room.checked_sub(page.first_room + room).filter(|&at| at < rooms);
        let stamp = stamp.filter(|stamp| {
            which(stamp).is_some()
                && stamp.publisher < page.voices
                && !(page.deaf && role == Role::Listener && stamp.publisher == index)
        });
        let Some(stamp) = stamp else {
            page.tally.foreign += 1;
            return;
        };
        let voice = which(&stamp).unwrap_or(0) * page.voices + stamp.publisher;
        let Some(account) = self.accounts.get_mut(chair.account + voice as usize) else { return };
        match account.record(stamp.sequence) {
            Arrival::Duplicate | Arrival::Foreign => {
                page.tally.duplicated += 1;
                return;
            }
            Arrival::Late => page.tally.out_of_order += 1,
            Arrival::InOrder => {}
        }
        if role == Role::Listener {
            page.tally.delivered += 1;
        } else {
            page.tally.visitors_delivered += 1;
        }
        page.latency.record(at.saturating_sub(stamp.sent));
    }
}

fn count(reasons: &mut BTreeMap<String, u64>, why: String) {
    let why = if reasons.len() < MAX_REASONS || reasons.contains_key(&why) { why } else { "other".into() };
    *reasons.entry(why).or_default() += 1;
}
