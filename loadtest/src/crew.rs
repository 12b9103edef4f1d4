//! The processes of a run, and the sum of their updates.
//!
//! Owns the workers: their start, their orders, their end. Their updates become one set of totals and one
//! timeline; nothing here depends on the number of workers. If a worker dies, the run ends.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};

use crate::{
    latency::Latencies,
    plan::{Order, Plan, Tally, Update},
    process::{self, Cpu, Memory, Server},
    stop::Stop,
    timeline::Timeline,
};

/// How many updates may wait to be read.
const NEWS: usize = 64;

/// The longest wait of one turn.
const GLANCE: Duration = Duration::from_millis(50);

/// How long a worker may take to send its last update.
const FAREWELL: Duration = Duration::from_secs(10);

/// The workers of a run.
pub struct Crew {
    workers: Vec<Worker>,
    news: Receiver<(usize, Option<Update>)>,
    server: Server,
    pub plan: Plan,
    pub totals: Totals,
    pub timeline: Timeline,
}

struct Worker {
    child: Child,
    reader: Option<JoinHandle<()>>,
    ordered: u32,
    last: Update,
    ended: bool,
    busy: Busy,
}

/// A process's CPU time since the previous measurement.
struct Busy {
    before: (Cpu, f64, Instant),
    share: Option<Share>,
}

/// Fractions of the time.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// Running on a CPU.
    pub running: f64,
    /// Ready to run, but waiting for a CPU.
    pub waiting: f64,
}

/// Everything counted so far.
pub struct Totals {
    pub groups: Vec<GroupTotals>,
    /// Since the last [`Crew::phase`].
    pub connects: Latencies,
    pub refused: BTreeMap<String, u64>,
    pub standing: u32,
    /// When the last message was sent.
    pub last_sent: u64,
    pub first_loss: Option<String>,
    pub refused_publications: u64,
    pub first_refusal: Option<String>,
}

/// The totals of a group.
pub struct GroupTotals {
    pub counts: Tally,
    /// Latencies, by phase.
    pub phases: Vec<Latencies>,
}

impl Crew {
    /// Starts the workers.
    pub fn start(plan: Plan, server: Server) -> anyhow::Result<Self> {
        let (tell, news) = sync_channel(NEWS);
        let mut crew = Self {
            workers: Vec::new(),
            news,
            timeline: Timeline::new(server.clone())?,
            server,
            totals: Totals::new(plan.groups.len())?,
            plan,
        };
        for part in 0..crew.plan.parts {
            let worker = Worker::start(crew.workers.len(), tell.clone())?;
            crew.workers.push(worker);
            let plan = Plan { part, ..crew.plan.clone() };
            crew.tell(part as usize, &Order::Begin(Box::new(plan)))?;
        }
        Ok(crew)
    }

    /// Sends an order to all workers.
    pub fn order(&mut self, order: &Order) -> anyhow::Result<()> {
        (0..self.workers.len()).try_for_each(|worker| self.tell(worker, order))
    }

    /// Waits briefly for updates.
    pub fn listen(&mut self) -> anyhow::Result<()> {
        let until = Instant::now() + GLANCE;
        loop {
            match self.news.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok((worker, update)) => self.hear(worker, update)?,
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => bail!("all processes of the tester have ended"),
            }
        }
        let Self { timeline, workers, totals, .. } = self;
        let tester = workers.iter().map(|worker| Cpu::of(worker.child.id())).sum::<anyhow::Result<Cpu>>();
        timeline.tick(tester.unwrap_or_default(), totals.standing);
        Ok(())
    }

    /// Waits until `done` or until asked to stop; returns whether it is done. Calls `watch` after every
    /// update.
    pub fn until(
        &mut self,
        stop: &Stop,
        mut done: impl FnMut(&Self) -> bool,
        mut watch: impl FnMut(&Self),
    ) -> anyhow::Result<bool> {
        loop {
            if done(self) {
                return Ok(true);
            }
            if stop.is_set() {
                return Ok(false);
            }
            self.listen()?;
            watch(self);
        }
    }

    /// Whether all workers have carried out every order and no connection is in progress.
    pub fn is_settled(&self) -> bool {
        self.workers.iter().all(|worker| worker.last.orders == worker.ordered && worker.last.settled)
    }

    /// Whether everything due has been published.
    pub fn is_done(&self) -> bool {
        self.workers.iter().all(|worker| worker.last.orders == worker.ordered && worker.last.done)
    }

    /// Starts another phase: latencies are recorded separately, and connect times start again.
    pub fn phase(&mut self) -> anyhow::Result<()> {
        for group in &mut self.totals.groups {
            group.phases.push(Latencies::new()?);
        }
        self.totals.connects.clear();
        Ok(())
    }

    /// The deliveries expected by now, and those received.
    pub fn balance(&self) -> (u64, u64) {
        let groups = self.plan.groups.iter().zip(&self.totals.groups);
        let sums =
            groups.map(|(group, total)| (group.expected(total.counts.published), total.counts.delivered));
        sums.fold((0, 0), |sum, pair| (sum.0 + pair.0, sum.1 + pair.1))
    }

    /// The CPU time of all workers.
    pub fn cpu(&self) -> anyhow::Result<Cpu> {
        self.workers.iter().map(|worker| Cpu::of(worker.child.id())).sum()
    }

    /// The server's CPU time, if it is measured and still running.
    pub fn server_cpu(&self) -> Option<Cpu> {
        self.server.cpu().ok().flatten()
    }

    /// The server's resident bytes, if it is measured and still running.
    pub fn server_rss(&self) -> Option<u64> {
        self.server.rss().ok().flatten()
    }

    /// The server's memory in detail.
    pub fn server_memory(&self) -> anyhow::Result<Memory> {
        self.server.memory()
    }

    /// The share of the worker that was busiest since [`measure`](Self::measure), running and waiting
    /// together. `None` if too little time has passed.
    pub fn busiest(&mut self) -> Option<Share> {
        let shares = self.workers.iter_mut().filter_map(|worker| worker.busy.since(worker.child.id()));
        shares.max_by(|one, other| one.total().total_cmp(&other.total()))
    }

    /// Starts to measure how busy the workers are.
    pub fn measure(&mut self) -> anyhow::Result<()> {
        for worker in &mut self.workers {
            let pid = worker.child.id();
            let before = (Cpu::of(pid)?, process::waited(pid), Instant::now());
            worker.busy = Busy { before, share: None };
        }
        Ok(())
    }

    /// Lets all workers send their last update and exit.
    pub fn end(&mut self) -> anyhow::Result<()> {
        self.order(&Order::End)?;
        let until = Instant::now() + FAREWELL;
        while self.workers.iter().any(|worker| !worker.ended) {
            match self.news.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok((worker, update)) => self.hear(worker, update)?,
                Err(_) => bail!("a process of the tester does not exit"),
            }
        }
        Ok(())
    }

    fn tell(&mut self, number: usize, order: &Order) -> anyhow::Result<()> {
        let Some(worker) = self.workers.get_mut(number) else { return Ok(()) };
        worker.ordered += 1;
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        let orders = worker.child.stdin.as_mut().context("standard input is piped")?;
        orders.write_all(&line).context("a process of the tester has ended")
    }

    fn hear(&mut self, number: usize, update: Option<Update>) -> anyhow::Result<()> {
        let Some(worker) = self.workers.get_mut(number) else { return Ok(()) };
        let Some(mut update) = update else {
            worker.ended = true;
            // It has printed the reason on standard error, unless it was asked to exit.
            if worker.last.orders < worker.ordered {
                bail!("a process of the tester has ended");
            }
            return Ok(());
        };
        if let Some(failure) = update.failure.take() {
            bail!(failure);
        }
        self.timeline.add(&update);
        self.totals.add(&update);
        worker.last = Update { connects: Vec::new(), groups: Vec::new(), ..update };
        self.totals.standing = self.workers.iter().map(|worker| worker.last.standing).sum();
        Ok(())
    }
}

impl Worker {
    fn start(number: usize, tell: SyncSender<(usize, Option<Update>)>) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("worker").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start a process of the tester")?;
        let stdout = child.stdout.take().context("standard output is piped")?;
        let reader = thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let Some(update) = line.ok().and_then(|line| serde_json::from_str(&line).ok()) else { break };
                if tell.send((number, Some(update))).is_err() {
                    return;
                }
            }
            // The receiver is gone once the run is over.
            let _: Result<(), _> = tell.send((number, None));
        });
        let busy = Busy { before: (Cpu::default(), 0.0, Instant::now()), share: None };
        Ok(Self { child, reader: Some(reader), ordered: 0, last: Update::default(), ended: false, busy })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have exited already.
        let _: std::io::Result<()> = self.child.kill();
        let _: std::io::Result<_> = self.child.wait();
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        let readers: Vec<_> = self.workers.iter_mut().filter_map(|worker| worker.reader.take()).collect();
        self.workers.clear();
        // Replace the receiver, so a reader thread blocked on a full channel fails and ends.
        self.news = sync_channel(1).1;
        for reader in readers {
            // If the reader panicked there is nothing to do.
            let _: Result<(), _> = reader.join();
        }
    }
}

impl Busy {
    fn since(&mut self, pid: u32) -> Option<Share> {
        if let Ok(now) = Cpu::of(pid) {
            let (cpu, waited, since) = self.before;
            let seconds = since.elapsed().as_secs_f64();
            // CPU time counts in ticks of 10 ms, so less than a fifth of a second is too imprecise.
            if seconds > 0.2 {
                self.share = Some(Share {
                    running: now.since(cpu).total() / seconds,
                    waiting: (process::waited(pid) - waited) / seconds,
                });
            }
        }
        self.share
    }
}

impl Share {
    fn total(self) -> f64 {
        self.running + self.waiting
    }
}

impl Totals {
    fn new(groups: usize) -> anyhow::Result<Self> {
        let group = || Ok(GroupTotals { counts: Tally::default(), phases: vec![Latencies::new()?] });
        Ok(Self {
            groups: (0..groups).map(|_| group()).collect::<anyhow::Result<_>>()?,
            connects: Latencies::new()?,
            refused: BTreeMap::new(),
            standing: 0,
            last_sent: 0,
            first_loss: None,
            refused_publications: 0,
            first_refusal: None,
        })
    }

    fn add(&mut self, update: &Update) {
        for (group, tally) in self.groups.iter_mut().zip(&update.groups) {
            group.counts.add(tally);
            if let Some(phase) = group.phases.last_mut() {
                phase.add(&tally.latency);
            }
        }
        self.connects.add(&update.connects);
        for (why, count) in &update.refused {
            *self.refused.entry(why.clone()).or_default() += count;
        }
        self.last_sent = self.last_sent.max(update.last_sent);
        self.refused_publications += update.refused_publications;
        if self.first_loss.is_none() {
            self.first_loss.clone_from(&update.first_loss);
        }
        if self.first_refusal.is_none() {
            self.first_refusal.clone_from(&update.first_refusal);
        }
    }

    /// Failed connections.
    pub fn refusals(&self) -> u64 {
        self.refused.values().sum()
    }

    /// Latencies of `phase` over all groups.
    pub fn latencies(&self, phase: Option<usize>) -> anyhow::Result<Latencies> {
        let mut all = Latencies::new()?;
        for group in &self.groups {
            let phases = group.phases.iter().enumerate();
            for (_, own) in phases.filter(|(number, _)| phase.is_none_or(|phase| phase == *number)) {
                all.merge(own);
            }
        }
        Ok(all)
    }
}
