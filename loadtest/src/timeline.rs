//! The course of a run: a point for every second.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::{
    latency::Latencies,
    plan::Update,
    process::{Cpu, Server},
};

const STEP: Duration = Duration::from_secs(1);

/// The points so far, and the current second.
pub struct Timeline {
    pub points: Vec<Point>,
    began: Instant,
    since: Instant,
    latency: Latencies,
    sent: u64,
    delivered: u64,
    connected: u64,
    server: Server,
    server_cpu: Cpu,
    tester_cpu: Cpu,
}

/// One second. Rates are per second, shares are fractions of a core.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Point {
    /// Seconds since the start of the run.
    pub at: f64,
    pub published: f64,
    pub delivered: f64,
    pub connected: f64,
    pub standing: u32,
    /// Microseconds; `None` if nothing arrived.
    pub p50: Option<f64>,
    pub p99: Option<f64>,
    pub max: Option<f64>,
    pub server_share: Option<f64>,
    pub tester_share: f64,
    /// Resident bytes of the server.
    pub server_rss: Option<u64>,
}

impl Timeline {
    /// Starts now.
    pub fn new(server: Server) -> anyhow::Result<Self> {
        let now = Instant::now();
        Ok(Self {
            points: Vec::new(),
            began: now,
            since: now,
            latency: Latencies::new()?,
            sent: 0,
            delivered: 0,
            connected: 0,
            server_cpu: server.cpu()?.unwrap_or_default(),
            server,
            tester_cpu: Cpu::default(),
        })
    }

    /// Adds an update to the current second.
    pub fn add(&mut self, update: &Update) {
        for tally in &update.groups {
            self.latency.add(&tally.latency);
            self.sent += tally.published;
            self.delivered += tally.delivered;
        }
        self.connected += update.connects.iter().map(|&(_, count)| count).sum::<u64>();
    }

    /// Ends the second if it is over. `tester` is the CPU time of all workers, `standing` the number of ready
    /// clients.
    pub fn tick(&mut self, tester: Cpu, standing: u32) {
        let passed = self.since.elapsed();
        if passed < STEP {
            return;
        }
        let seconds = passed.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "counts of a second")]
        let rate = |count: u64| count as f64 / seconds;
        // A server that has exited has nothing more to measure; the report covers that.
        let server = self.server.cpu().ok().flatten();
        let summary = self.latency.summary();
        self.points.push(Point {
            at: self.began.elapsed().as_secs_f64(),
            published: rate(self.sent),
            delivered: rate(self.delivered),
            connected: rate(self.connected),
            standing,
            p50: summary.map(|latency| latency.p50),
            p99: summary.map(|latency| latency.p99),
            max: summary.map(|latency| latency.max),
            server_share: server.map(|cpu| cpu.since(self.server_cpu).total() / seconds),
            tester_share: tester.since(self.tester_cpu).total().max(0.0) / seconds,
            server_rss: self.server.rss().ok().flatten(),
        });
        (self.sent, self.delivered, self.connected) = (0, 0, 0);
        self.latency.clear();
        self.server_cpu = server.unwrap_or_default();
        self.tester_cpu = tester;
        self.since = Instant::now();
    }

    /// The last whole second.
    pub fn last(&self) -> Option<&Point> {
        self.points.last()
    }
}
