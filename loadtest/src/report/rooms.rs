//! The cost of many small rooms compared with a few big ones.

use serde::Serialize;

use super::{
    Machine, at_most,
    document::{Document, Expectation, Table},
    median, mib, or_nothing, ratio, unmet,
};
use crate::{
    cli::flow::CompareRooms,
    ledger::Counts,
    process::{Cpu, Memory},
};

/// `compare-rooms`.
#[derive(Debug, Serialize)]
pub struct CompareRoomsReport {
    pub what: String,
    pub machine: Machine,
    pub connections: u32,
    pub rooms_per_client: u32,
    pub big: Vec<ShapeRound>,
    pub small: Vec<ShapeRound>,
    /// CPU seconds of the server per million deliveries: medians.
    pub big_cpu: Option<f64>,
    pub small_cpu: Option<f64>,
    /// Small over big: the median of neighbouring rounds' ratios.
    pub ratio: Option<f64>,
    pub ratio_range: Option<(f64, f64)>,
    pub memory: Option<RoomMemory>,
    /// Resident bytes of a subscription to a room that others are in too, and of a room with its only member.
    pub bytes_per_subscription: Option<f64>,
    pub bytes_per_room: Option<f64>,
    /// Over the whole run, including the unmeasured rounds.
    pub counts: Counts,
    /// Why the first lost connection was lost.
    pub first_loss: Option<String>,
    /// Why the run was ended early.
    pub interrupted: Option<String>,
    pub warnings: Vec<String>,
    pub expectations: Vec<Expectation>,
}

/// One round of one shape.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ShapeRound {
    pub delivered: u64,
    pub seconds: f64,
    pub per_second: f64,
    pub complete: bool,
    /// CPU seconds per million deliveries.
    pub server_cpu: Option<Cpu>,
    pub tester_cpu: Option<Cpu>,
}

/// The server's memory with connections in no room, in the big rooms, and in their own rooms as well.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct RoomMemory {
    pub connected: Memory,
    pub in_big: Memory,
    pub in_small: Memory,
    /// Whether it was stable each time.
    pub settled: bool,
}

impl CompareRoomsReport {
    /// An empty report.
    pub fn new(args: &CompareRooms, via: &str) -> Self {
        let CompareRooms { connections, rooms_per_client, size, burst, .. } = *args;
        let small = u64::from(connections) * u64::from(rooms_per_client);
        Self {
            what: format!(
                "compare-rooms: {rooms_per_client} rooms of {connections} or {small} of one, {connections} connections, \
                 {size} B, {burst} to each client at a time, published by {via}"
            ),
            machine: Machine::this(),
            connections,
            rooms_per_client,
            big: Vec::new(),
            small: Vec::new(),
            big_cpu: None,
            small_cpu: None,
            ratio: None,
            ratio_range: None,
            memory: None,
            bytes_per_subscription: None,
            bytes_per_room: None,
            counts: Counts::default(),
            first_loss: None,
            interrupted: None,
            warnings: Vec::new(),
            expectations: Vec::new(),
        }
    }

    /// How many rounds are complete, of either shape.
    pub fn complete(&self) -> usize {
        self.big.iter().zip(&self.small).filter(|(big, small)| big.complete && small.complete).count()
    }

    /// Derives medians, warnings and expectations from the rounds and counts.
    pub fn conclude(&mut self, args: &CompareRooms) {
        let cpu = |rounds: &[ShapeRound]| {
            let complete = rounds.iter().filter(|round| round.complete);
            median(complete.filter_map(|round| Some(round.server_cpu?.total())).collect())
        };
        (self.big_cpu, self.small_cpu) = (cpu(&self.big), cpu(&self.small));
        let pairs = self.big.iter().zip(&self.small).filter(|(big, small)| big.complete && small.complete);
        let ratios: Vec<f64> = pairs
            .filter_map(|(big, small)| ratio(small.server_cpu?.total(), big.server_cpu?.total()))
            .collect();
        let complete = self.complete();
        if complete < args.rounds as usize {
            let words = format!("rounds are completed: {complete} of {} are", args.rounds);
            self.expectations.push(Expectation { words, met: false });
        }
        if let Some((first, rest)) = ratios.split_first() {
            let range = |(low, high): (f64, f64), &ratio: &f64| (low.min(ratio), high.max(ratio));
            self.ratio_range = Some(rest.iter().fold((*first, *first), range));
        }
        self.ratio = median(ratios);
        let subscriptions = f64::from(self.connections) * f64::from(self.rooms_per_client);
        #[expect(clippy::cast_precision_loss, reason = "bytes below 2^53")]
        let slope = |before: Memory, after: Memory| (after.rss as f64 - before.rss as f64) / subscriptions;
        self.bytes_per_subscription = self.memory.map(|memory| slope(memory.connected, memory.in_big));
        self.bytes_per_room = self.memory.map(|memory| slope(memory.in_big, memory.in_small));
        if self.memory.is_some_and(|memory| !memory.settled) {
            self.warnings.push("the server's memory did not become stable".into());
        }
        if let Some(why) = &self.first_loss {
            let words = format!("clients stay connected: some were lost; the first: {why}");
            self.expectations.push(Expectation { words, met: false });
        }
        if let Some(why) = &self.interrupted {
            self.warnings.push(format!("ended early by {why}: the report covers the run up to then"));
        }
        self.judge(args);
        unmet(&mut self.expectations, self.interrupted.as_deref());
    }

    fn judge(&mut self, args: &CompareRooms) {
        let unknown = || "nothing was measured".to_owned();
        let mut expect = |words: String, met| self.expectations.push(Expectation { words, met });
        if let Some(allowed) = args.expect_lost {
            let Counts { missing, duplicated, out_of_order, foreign, expected, .. } = self.counts;
            let words = format!(
                "--expect-lost {allowed}: {missing} missing of {expected}, {duplicated} duplicated, {out_of_order} out \
                 of order, {foreign} foreign"
            );
            let met = missing <= allowed && duplicated + out_of_order + foreign == 0 && expected > 0;
            expect(words, met);
        }
        if let Some(allowed) = args.expect_ratio {
            let found =
                self.ratio.map_or_else(unknown, |found| format!("{found:.3} × the CPU of a delivery"));
            expect(format!("--expect-ratio {allowed}: {found}"), at_most(self.ratio, allowed));
        }
        if let Some(allowed) = args.expect_bytes {
            let found =
                self.bytes_per_room.map_or_else(unknown, |found| format!("{found:.0} bytes for a room"));
            expect(format!("--expect-bytes {allowed}: {found}"), at_most(self.bytes_per_room, allowed));
        }
    }

    /// The report as it is printed.
    pub fn document(&self) -> Document {
        let mut table = Table::new(
            "Rounds; CPU seconds per million deliveries",
            &["", "delivered", "seconds", "per second", "server", "tester"],
        );
        for number in 0..self.big.len().max(self.small.len()) {
            for (name, rounds) in [("big", &self.big), ("small", &self.small)] {
                let Some(round) = rounds.get(number) else { continue };
                table.row([
                    format!("{name} {}{}", number + 1, if round.complete { "" } else { " (incomplete)" }),
                    round.delivered.to_string(),
                    format!("{:.2}", round.seconds),
                    format!("{:.0}", round.per_second),
                    or_nothing(round.server_cpu, |cpu| format!("{:.3}", cpu.total())),
                    or_nothing(round.tester_cpu, |cpu| format!("{:.3}", cpu.total())),
                ]);
            }
        }
        let mut facts = vec![self.machine.to_string()];
        if let (Some(big), Some(small), Some(ratio), Some((low, high))) =
            (self.big_cpu, self.small_cpu, self.ratio, self.ratio_range)
        {
            facts.push(format!(
                "CPU per delivery: {small:.3} µs in small rooms, {ratio:.3} × the {big:.3} µs in big ones (rounds {low:.3} \
                 to {high:.3})"
            ));
        }
        if let Some(RoomMemory { connected, in_big, in_small, .. }) = self.memory {
            facts.push(format!(
                "memory: {:.1} MiB RSS connected, {:.1} MiB in the big rooms, {:.1} MiB in small ones too: {} bytes for \
                 a subscription, {} for a room with its one",
                mib(connected.rss),
                mib(in_big.rss),
                mib(in_small.rss),
                or_nothing(self.bytes_per_subscription, |bytes| format!("{bytes:.0}")),
                or_nothing(self.bytes_per_room, |bytes| format!("{bytes:.0}"))
            ));
        }
        let Counts { expected, delivered, missing, duplicated, out_of_order, foreign, members_lost } =
            self.counts;
        facts.push(format!(
            "delivered {delivered} of {expected}, missing {missing}, duplicated {duplicated}, out of order \
             {out_of_order}, foreign {foreign}, members lost {members_lost}"
        ));
        Document {
            title: self.what.clone(),
            facts,
            tables: vec![table],
            charts: Vec::new(),
            warnings: self.warnings.clone(),
            expectations: self.expectations.clone(),
        }
    }
}
