//! Information from the kernel about a process, and settings of this process.
//!
//! Owns the reading of `/proc`, and the pinning and descriptor limit of the tester. It never changes another
//! process: the user who starts the server pins it.

use std::{fs, iter::Sum, ops::Add, time::Duration};

use anyhow::{Context, bail};
use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{CpuSet, sched_setaffinity},
};
use serde::{Deserialize, Serialize};

/// CPU time used by a process, all threads, in seconds. Exact to one clock tick (10 ms on most kernels).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    pub user: f64,
    pub system: f64,
}

impl Cpu {
    /// User and system together.
    pub fn total(self) -> f64 {
        self.user + self.system
    }

    /// The difference to `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self { user: self.user - earlier.user, system: self.system - earlier.system }
    }

    /// User and system time, multiplied by `factor`.
    pub fn scaled(self, factor: f64) -> Self {
        Self { user: self.user * factor, system: self.system * factor }
    }

    /// The CPU time of process `pid`, including threads that have ended.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        Self::read(&pid.to_string())
    }

    /// The CPU time of this process.
    pub fn of_self() -> anyhow::Result<Self> {
        Self::read("self")
    }

    /// The CPU time of this process and of the children that it has waited for.
    pub fn of_family() -> anyhow::Result<Self> {
        let path = "/proc/self/stat";
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
        let own = parse_stat(&text, OWN).zip(parse_stat(&text, ENDED_CHILDREN));
        let ((user, system), (ended_user, ended_system)) =
            own.with_context(|| format!("cannot parse {path}"))?;
        Ok(Self { user: seconds(user + ended_user), system: seconds(system + ended_system) })
    }

    fn read(pid: &str) -> anyhow::Result<Self> {
        let path = format!("/proc/{pid}/stat");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let (user, system) = parse_stat(&text, OWN).with_context(|| format!("cannot parse {path}"))?;
        Ok(Self { user: seconds(user), system: seconds(system) })
    }
}

/// Memory of a process in bytes, from `smaps_rollup`. It does not include the kernel memory of sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Resident: every mapped page that is in memory.
    pub rss: u64,
    /// Proportional: each shared page divided by the number of processes that map it.
    pub pss: u64,
    /// Unique: pages that no other process maps.
    pub uss: u64,
}

impl Memory {
    /// The memory of process `pid`. Needs the same user, or root.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        parse_smaps_rollup(&text).with_context(|| format!("cannot parse {path}"))
    }
}

impl Add for Cpu {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { user: self.user + other.user, system: self.system + other.system }
    }
}

impl Sum for Cpu {
    fn sum<I: Iterator<Item = Self>>(each: I) -> Self {
        each.fold(Self::default(), Add::add)
    }
}

impl Add for Memory {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { rss: self.rss + other.rss, pss: self.pss + other.pss, uss: self.uss + other.uss }
    }
}

impl Sum for Memory {
    fn sum<I: Iterator<Item = Self>>(each: I) -> Self {
        each.fold(Self::default(), Add::add)
    }
}

/// The processes that make up the server under test.
#[derive(Clone, Debug, Default)]
pub struct Server(Vec<u32>);

impl Server {
    /// The processes `pids`; none if the server is not measured.
    pub fn new(pids: Vec<u32>) -> Self {
        Self(pids)
    }

    /// Their total CPU time, or `None` if there are none.
    pub fn cpu(&self) -> anyhow::Result<Option<Cpu>> {
        let all = self.0.iter().map(|&pid| Cpu::of(pid)).sum::<anyhow::Result<Cpu>>()?;
        Ok((!self.0.is_empty()).then_some(all))
    }

    /// Their total resident bytes, or `None` if there are none. Cheap, unlike [`memory`](Self::memory).
    pub fn rss(&self) -> anyhow::Result<Option<u64>> {
        let mut all = 0;
        for pid in &self.0 {
            let path = format!("/proc/{pid}/statm");
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
            let pages = text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
            all += pages.with_context(|| format!("cannot parse {path}"))?;
        }
        Ok((!self.0.is_empty()).then_some(all * rustix::param::page_size() as u64))
    }

    /// Their total memory.
    pub fn memory(&self) -> anyhow::Result<Memory> {
        self.0.iter().map(|&pid| Memory::of(pid)).sum()
    }
}

/// How many seconds the first thread of `pid` has waited for a CPU while ready to run. 0 if the kernel does
/// not count it (`CONFIG_SCHED_INFO`).
pub fn waited(pid: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap_or_default();
    let nanos = text.split_whitespace().nth(1).and_then(|nanos| nanos.parse().ok());
    crate::clock::seconds(nanos.unwrap_or(0))
}

/// How often the threads of `pid` that run now have given up or lost their CPU to another thread.
pub fn context_switches(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/task");
    let mut all = 0;
    for task in fs::read_dir(&path).with_context(|| format!("cannot read {path}"))? {
        // A thread may end meanwhile.
        let status = fs::read_to_string(task?.path().join("status")).unwrap_or_default();
        all += parse_switches(&status);
    }
    Ok(all)
}

/// Pins this process, and every process that it starts from now on, to `cpu`.
pub fn pin_to(cpu: usize) -> anyhow::Result<()> {
    if cpu >= CpuSet::MAX_CPU {
        bail!("there is no CPU {cpu}");
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).with_context(|| format!("cannot run on CPU {cpu}"))
}

/// Raises this process's descriptor limit to the maximum and checks that `needed` sockets fit.
pub fn allow_descriptors(needed: usize) -> anyhow::Result<()> {
    /// Standard streams, epoll, the publisher, `/proc` files, and a reserve.
    const OTHERS: u64 = 32;
    let limit = getrlimit(Resource::Nofile);
    let wanted = needed as u64 + OTHERS;
    if limit.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    if limit.maximum.is_some_and(|maximum| maximum < wanted) {
        bail!(
            "{needed} connections do not fit: this process may open {} descriptors (`ulimit -Hn`)",
            limit.maximum.unwrap_or_default()
        );
    }
    setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum })
        .context("cannot raise the descriptor limit")
}

/// A number that differs between runs, to tell one run's messages from another's.
pub fn run_id() -> u32 {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    clock.subsec_nanos() ^ std::process::id().rotate_left(16)
}

/// CPU seconds that this machine has used since boot, over all cores.
pub fn machine_busy() -> anyhow::Result<f64> {
    let path = "/proc/stat";
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    parse_machine(&text).map(seconds).with_context(|| format!("cannot parse {path}"))
}

/// Ticks in f64: exact up to 2^53 of them.
#[expect(clippy::cast_precision_loss, reason = "nothing lives for 2^53 ticks")]
fn seconds(ticks: u64) -> f64 {
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Ticks in the first line of `/proc/stat` that were neither idle nor stolen; guest time is included in user
/// time.
fn parse_machine(text: &str) -> Option<u64> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let fields: Option<Vec<u64>> = line.split_ascii_whitespace().map(|field| field.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, interrupts, soft, ..] = fields?[..] else { return None };
    Some(user + nice + system + interrupts + soft)
}

/// The offsets after the name: fields 14 and 15 of `proc(5)`, and 16 and 17.
const OWN: usize = 11;
const ENDED_CHILDREN: usize = 13;

/// User and system ticks. The command name before them may contain anything, including spaces and
/// parentheses, so counting starts after the last `)`.
fn parse_stat(text: &str, at: usize) -> Option<(u64, u64)> {
    let (_, after_name) = text.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace().skip(at);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

fn parse_smaps_rollup(text: &str) -> Option<Memory> {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()? * 1024)
    };
    Some(Memory {
        rss: field("Rss")?,
        pss: field("Pss")?,
        uss: field("Private_Clean")? + field("Private_Dirty")?,
    })
}

/// Voluntary and involuntary switches in a thread's `status`.
fn parse_switches(status: &str) -> u64 {
    let lines = status.lines().filter_map(|line| line.split_once("voluntary_ctxt_switches:"));
    lines.filter_map(|(_, count)| count.trim().parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_a_hostile_name() {
        let text = "42 (a) R 7 (b c) S 1 42 42 0 -1 4194560 9 0 0 0 1234 567 3 4 20 0 8 0 100 1 1 1";
        assert_eq!(parse_stat(text, OWN), Some((1234, 567)));
        assert_eq!(parse_stat(text, ENDED_CHILDREN), Some((3, 4)));
        assert_eq!(parse_stat("42 (name) S 1 2", OWN), None);
        assert_eq!(parse_stat("", OWN), None);
    }

    #[test]
    fn busy_time_excludes_idle_and_stolen_time() {
        let text = "cpu  100 20 30 4000 500 6 7 8 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        assert_eq!(parse_machine(text), Some(163));
        assert_eq!(parse_machine("intr 1 2 3\n"), None);
        assert!(machine_busy().unwrap() > 0.0);
    }

    #[test]
    fn smaps_rollup_fields() {
        let text = "55a6-7ffd ---p 00000000 00:00 0 [rollup]\nRss:  2000 kB\nPss:  1500 kB\nPss_Dirty: 9 kB\n\
                    Shared_Clean: 500 kB\nPrivate_Clean:  300 kB\nPrivate_Dirty: 1200 kB\n";
        let expected = Memory { rss: 2000 * 1024, pss: 1500 * 1024, uss: 1500 * 1024 };
        assert_eq!(parse_smaps_rollup(text), Some(expected));
        assert_eq!(parse_smaps_rollup("Rss: 1 kB\n"), None);
    }

    #[test]
    fn both_kinds_of_switches_count() {
        let text = "Threads:\t3\nvoluntary_ctxt_switches:\t150\nnonvoluntary_ctxt_switches:\t7\n";
        assert_eq!((parse_switches(text), parse_switches("")), (157, 0));
        assert!(context_switches(std::process::id()).unwrap() > 0);
    }

    #[test]
    fn this_process_can_be_read() {
        let server = Server::new(vec![std::process::id()]);
        let before = server.cpu().unwrap().unwrap();
        while server.cpu().unwrap().unwrap().since(before).total() == 0.0 {}
        let memory = server.memory().unwrap();
        assert!(memory.rss >= memory.pss && memory.pss >= memory.uss && memory.uss > 0, "{memory:?}");
    }

    #[test]
    fn too_many_descriptors_is_a_clear_error() {
        let error = allow_descriptors(usize::MAX / 2).unwrap_err().to_string();
        assert!(error.contains("ulimit -Hn"), "{error}");
    }
}
