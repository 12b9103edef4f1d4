//! Tests the arithmetic, that the printed calculations are right, and that the guide shows the same output.

use std::collections::HashSet;

use clap::Parser;

use super::{
    Report, calculate,
    costs::{TABLE, UnitCosts},
    sizing::{Impossible, Limit},
};
use crate::cli::{Cli, Scenario};

const GUIDE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/CAPACITY.md");

/// The unit costs of the examples calculated by hand: new measurements do not change them.
const COSTS: &str = "--delivery 4.6 --publication 15 --client-publish 8 --idle 0.41 --memory 1356 --room-memory 450 \
    --stalled-memory 151000 --redis-publish 7.8 --redis-delivery 0.3";

fn asked(flags: &str) -> anyhow::Result<Report> {
    let words = ["tidegate-loadtest", "capacity"].into_iter().chain(flags.split_whitespace());
    match Cli::try_parse_from(words)?.scenario {
        Scenario::Capacity(args) => calculate(&args),
        other => panic!("expected capacity, found {other:?}"),
    }
}

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() <= expected.abs() * 1e-6, "{found}, expected {expected}");
}

/// Calculated by hand.
#[test]
fn a_small_fleet() {
    let flags = "--connections 10000 --members 50 --room-rate 2 --from-clients 0.5";
    let report = asked(&format!("{COSTS} {flags}")).unwrap();
    let it = &report.sizings[0];
    close(it.demand.rooms, 200.0);
    close(it.demand.publications, 400.0);
    close(it.demand.deliveries, 20_000.0);
    // A header of four bytes, and one packet.
    close(it.demand.frame, 260.0);
    close(it.demand.write, 312.0);
    assert_eq!((it.left, it.nodes), (1, 2));
    close(it.node.interested, 1.0);
    close(it.node.cores, (20_000.0 * 4.6 + 400.0 * 15.0 + 200.0 * 8.0 + 10_000.0 * 0.41) / 1e6);
    close(it.node.resident, 6.5e6 + 10_000.0 * 1356.0 + 200.0 * 450.0);
    close(it.node.waiting, 10.0 * (1_048_576.0 + 151_000.0));
    // Two nodes, and fifty members who are not all on one of them.
    close(it.redis.cores, 400.0 * (7.8 + 2.0 * (1.0 - 0.5_f64.powi(50)) * 0.3) / 1e6);
    close(it.storm.after_one_node, 0.5);
    close(it.host.descriptors, 10_256.0);
}

#[test]
fn costs_match_both_measured_points() {
    let costs = UnitCosts::measured();
    close(costs.alone_in(1.0), costs.delivery);
    close(costs.alone_in(8.0), costs.delivery_of_eight);
    assert!(costs.alone_in(64.0) < costs.delivery_of_eight && costs.further() > 0.0);
}

#[test]
fn each_limit_can_decide() {
    for (flags, limit, nodes) in [
        ("--connections 250000 --room-rate 0", Limit::Connections, 3),
        // 25 × 1,000,000 × 4.6 µs, 0.41 for heartbeats, and 2,500 publications on each: (115 + 0.41) ÷ (2.4 − 0.0375).
        ("--connections 1000000 --room-rate 25 --members 10000 --node-connections 1000000", Limit::Cores, 49),
        ("--connections 1000000 --room-rate 0 --node-memory 1 --node-connections 1000000", Limit::Memory, 10),
        ("--connections 100000 --room-rate 10 --size 16384 --burst 8 --node-cores 64", Limit::Bandwidth, 23),
    ] {
        let report = asked(&format!("{COSTS} {flags} --spare 0")).unwrap();
        let it = &report.sizings[0];
        assert_eq!((it.decided_by(), it.nodes), (limit, nodes), "{flags}");
        // One node fewer would have been too few.
        let needed = it.needed.iter().find(|(own, _)| *own == limit).unwrap().1;
        assert_eq!(needed, nodes);
    }
}

#[test]
fn redis_sends_a_copy_per_interested_node() {
    // Every node has a member of every room, so each publication has that many copies.
    let report =
        asked("--connections 1000000 --members 100000 --rate 10000 --node-cores 1000 --bandwidth 1000")
            .unwrap();
    let it = &report.sizings[0];
    let nodes = f64::from(it.nodes);
    close(it.usual.interested, nodes);
    close(it.redis.sent, 10_000.0 * nodes * 406.0);
    // Rooms of one member: one copy, no matter how many nodes.
    let report = asked("--connections 1000000 --members 1 --rate 10000").unwrap();
    close(report.sizings[0].usual.interested, 1.0);
    // Half a million single publications need several Redis servers.
    let report = asked("--connections 1000000 --members 1 --rate 500000 --node-cores 16").unwrap();
    assert_eq!(report.sizings[0].redis.shards, 7);
    assert!(report.to_string().contains("7 shards mean as many separate fleets"), "{report}");
    assert!(asked("--rate 0").unwrap().sizings[0].redis.patience.is_none());
}

#[test]
fn protocols_tls_and_compression_use_the_costs_of_the_table() {
    let costs = UnitCosts::measured();
    let us = |flags: &str| asked(flags).unwrap().sizings[0].demand.delivery_us;
    close(us(""), costs.delivery);
    close(us("--protocol sse"), costs.delivery * costs.sse);
    close(us("--protocol centrifuge"), costs.delivery * costs.centrifuge);
    close(us("--tls"), costs.delivery + costs.tls_record + costs.tls_kib * 260.0 / 1024.0);
    close(
        us("--tls --burst 8"),
        costs.delivery_of_eight + costs.tls_record / 8.0 + costs.tls_kib * 260.0 / 1024.0,
    );
    close(us("--size 1280"), costs.delivery + costs.delivery_kib);
    let deflated =
        asked("--deflate --size 2048 --deflate-publication 3 --deflate-kib 8 --deflate-ratio 0.25")
            .unwrap()
            .sizings[0]
            .demand;
    close(deflated.payload, 512.0);
    close(deflated.publication_us, costs.publication + 19.0);
    // Payloads below compression.threshold are not compressed.
    close(asked("--deflate --size 255").unwrap().sizings[0].demand.payload, 255.0);
    close(asked("--delivery 5.2").unwrap().sizings[0].demand.delivery_us, 5.2);
}

#[test]
fn impossible_input_is_refused_by_name() {
    for (flags, words) in [
        ("--connections 10 --members 11", "--members 11"),
        ("--connections 10 --rooms 11", "--rooms 11"),
        ("--connections 10 --rooms 5 --rooms-per-connection 50", "more than 10 members"),
        ("--protocol sse --deflate", "--deflate"),
        ("--delivery 0.5", "--delivery-of-eight"),
        ("--delivery-of-eight 0.1", "--delivery-of-eight"),
        ("--node-memory 0.005", "memory"),
        // Every node receives all publications, so more nodes do not help.
        ("--connections 1000000 --rooms 1 --rate 1000000 --bandwidth 1000", "cores"),
        ("--rooms 5 --members 2", "--rooms"),
        ("--rate 5 --room-rate 2", "--rate"),
        ("--connections 0", "--connections"),
        ("--connections many", "--connections"),
        ("--utilisation 1", "--utilisation"),
        ("--from-clients 2", "from 0 to 1"),
        ("--members 0.5", "from 1 to"),
        ("--delivery -1", "--delivery"),
        ("--delivery NaN", "from 0 to"),
        ("--node-cores 0", "--node-cores"),
    ] {
        let error = asked(flags).expect_err(flags).to_string();
        assert!(error.contains(words), "{flags}: {error}");
    }
    let error = asked("--connections 1000 --delivery 0.5").unwrap_err();
    assert!(matches!(error.downcast_ref(), Some(Impossible::Eight { .. })));
}

/// Evaluates every printed calculation from its printed text.
#[test]
fn the_printed_calculations_are_right() {
    for flags in [
        "--connections 10000,1000000,10000000",
        "--connections 12345 --members 7 --tls --burst 8 --from-clients 0.3 --rooms-per-connection 3",
        "--connections 777777 --protocol centrifuge --rooms 1000 --rate 3000 --deflate --size 9000 --spare 0",
        "--connections 5000 --protocol sse --size 60 --tls --accepts 50 --connect-tls 90000",
    ] {
        let report = asked(flags).unwrap();
        let page = report.to_string();
        let mut sums = 0;
        for line in page.lines().filter(|line| line.contains(" = ")) {
            let (left, result) = line.rsplit_once(" = ").unwrap();
            // Words and calculation are separated by at least two spaces.
            let sum =
                left.trim_start().split("  ").map(str::trim).filter(|part| !part.is_empty()).last().unwrap();
            let (expected, found) = (Sum::of(sum), Sum::of(result));
            assert!((expected - found).abs() <= 0.002 * expected.abs() + 1e-9, "{flags}: {line}: {expected}");
            sums += 1;
        }
        assert!(sums >= 25 * report.sizings.len(), "{page}");
    }
    assert!((Sum::of("⌈7 ÷ 2⌉ + 2 × (3 − 1) ^ 3 ÷ 4") - 8.0).abs() < 1e-9);
}

/// The rest of a calculation being evaluated, as tokens in reverse.
struct Sum(Vec<String>);

impl Sum {
    fn of(text: &str) -> f64 {
        let text = text.replace("the lesser of ", "⌊").replace(" and ", " ⌋ ");
        let mut tokens = Vec::new();
        for word in text.split_whitespace() {
            let mut number = String::new();
            for letter in word.chars() {
                match letter {
                    '0'..='9' | '.' => number.push(letter),
                    ',' => {}
                    _ => {
                        if !number.is_empty() {
                            tokens.push(std::mem::take(&mut number));
                        }
                        if !letter.is_alphabetic() && letter != '/' || matches!(word, "MiB" | "GiB") {
                            tokens.push(if word.ends_with("iB") {
                                word.to_owned()
                            } else {
                                letter.to_string()
                            });
                        }
                    }
                }
                if word.ends_with("iB") {
                    break;
                }
            }
            if !number.is_empty() {
                tokens.push(number);
            }
        }
        tokens.reverse();
        let mut sum = Self(tokens);
        let value = sum.terms();
        assert!(sum.0.is_empty(), "{text}: {:?} is left", sum.0);
        value
    }

    fn next_is(&mut self, token: &str) -> bool {
        let found = self.0.last().is_some_and(|next| next == token);
        if found {
            self.0.pop();
        }
        found
    }

    fn terms(&mut self) -> f64 {
        let mut value = self.factors();
        loop {
            if self.next_is("+") {
                value += self.factors();
            } else if self.next_is("−") {
                value -= self.factors();
            } else {
                return value;
            }
        }
    }

    fn factors(&mut self) -> f64 {
        let mut value = self.power();
        loop {
            if self.next_is("×") {
                value *= self.power();
            } else if self.next_is("÷") {
                value /= self.power();
            } else {
                return value;
            }
        }
    }

    fn power(&mut self) -> f64 {
        let value = self.atom();
        if self.next_is("^") { value.powf(self.atom()) } else { value }
    }

    fn atom(&mut self) -> f64 {
        let value = match self.0.pop().expect("a sum goes on").as_str() {
            "(" => {
                let value = self.terms();
                assert!(self.next_is(")"));
                value
            }
            "⌈" => {
                let value = self.terms();
                assert!(self.next_is("⌉"));
                value.ceil()
            }
            "⌊" => {
                let value = self.terms();
                assert!(self.next_is("⌋"));
                value.min(self.terms())
            }
            number => number.parse().unwrap_or_else(|_| panic!("{number} is no number")),
        };
        if self.next_is("MiB") {
            return value * 1024.0 * 1024.0;
        }
        if self.next_is("GiB") { value * 1024.0 * 1024.0 * 1024.0 } else { value }
    }
}

#[test]
fn the_table_is_complete() {
    let mut flags = HashSet::new();
    for row in TABLE {
        assert!(flags.insert(row.flag), "{} is there twice", row.flag);
        assert!(!row.what.contains('|') && !row.measured_by.contains('|'), "{}", row.flag);
        assert!(row.default > 0.0, "{}", row.flag);
    }
    let json = serde_json::to_value(asked("--connections 10,20 --members 5").unwrap()).unwrap();
    let costs = json["costs"].as_object().unwrap();
    assert_eq!(costs.len(), TABLE.len());
    assert!(TABLE.iter().all(|row| costs[&row.flag.replace('-', "_")] == row.default), "{costs:?}");
    assert_eq!(json["sizings"][1]["demand"]["connections"], 20.0);
}

/// Compares the guide with the output; the failure message tells how to update it.
#[test]
fn the_guide_matches_the_output_of_the_command() {
    const BEGIN: &str = "<!-- The table is made from loadtest/src/capacity/costs.rs. -->\n";
    const END: &str = "<!-- End of the table. -->\n";
    const PROMPT: &str = "```console\n$ tidegate-loadtest capacity";
    let guide = std::fs::read_to_string(GUIDE).unwrap();
    let (before, rest) = guide.split_once(BEGIN).expect("the table's beginning is marked");
    let (_, after) = rest.split_once(END).expect("the table's end is marked");
    let mut parts = after.split(PROMPT);
    let mut expected = format!("{before}{BEGIN}{}{END}{}", super::costs::reference(), parts.next().unwrap());
    let mut commands = 0;
    for part in parts {
        let (flags, rest) = part.split_once('\n').unwrap();
        let (_, rest) = rest.split_once("```\n").expect("the block ends");
        expected = format!("{expected}{PROMPT}{flags}\n{}```\n{rest}", asked(flags).expect(flags));
        commands += 1;
    }
    assert!(commands > 0, "the guide shows the command at work");
    take_the_file_of(&guide);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(GUIDE, expected).unwrap();
    } else {
        assert!(
            guide == expected,
            "deploy/CAPACITY.md is out of date; UPDATE_DOCS=1 cargo test -p tidegate-loadtest the_guide rewrites it"
        );
    }
}

/// What the guide shows as a configuration file must be a valid one.
fn take_the_file_of(guide: &str) {
    let (text, _) = guide.split_once("```toml\n").unwrap().1.split_once("```").unwrap();
    let path = std::env::temp_dir().join(format!("tidegate-capacity-{}.toml", std::process::id()));
    std::fs::write(&path, text).unwrap();
    let words = ["tidegate-loadtest", "capacity", "--config"].map(Into::into);
    let words = crate::cli::file::expand(words.into_iter().chain([path.clone().into()]).collect());
    std::fs::remove_file(&path).unwrap();
    let Scenario::Capacity(args) = Cli::try_parse_from(words.unwrap()).unwrap().scenario else {
        panic!("something else was asked for");
    };
    let report = calculate(&args).unwrap();
    close(report.sizings[0].demand.publications, 3000.0);
    assert!(report.load.tls && report.costs.delivery < 4.0);
}
