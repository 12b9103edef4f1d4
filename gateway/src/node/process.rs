//! The resource usage of this process, under the names common to Prometheus client libraries (`process_…`).
//!
//! Read from the kernel at each scrape. The `prometheus` crate's own collector counts processor time in whole
//! seconds, which looks like a staircase for a mostly idle node.

use std::{
    fs,
    time::{Duration, SystemTime},
};

use prometheus::{
    Counter, Gauge, IntGauge,
    core::{Collector, Desc},
    proto::MetricFamily,
};
use rustix::{
    param::{clock_ticks_per_second, page_size},
    process::{Resource, getrlimit},
    time::{ClockId, Timespec, clock_gettime},
};

/// The metrics of this process.
pub(super) struct Process {
    descriptions: Vec<Desc>,
    /// When the process was started, in Unix time; `None` if unknown.
    started: Option<f64>,
}

impl Process {
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let descriptions =
            families(&Usage::default())?.iter().flat_map(|metric| metric.desc()).cloned().collect();
        Ok(Self { descriptions, started: started() })
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let usage = Usage { started: self.started, ..Usage::now() };
        families(&usage).unwrap_or_default().iter().flat_map(|metric| metric.collect()).collect()
    }
}

/// The current usage. `None`: the kernel does not report it.
#[derive(Default)]
struct Usage {
    processor: f64,
    open_files: Option<i64>,
    max_files: Option<i64>,
    virtual_bytes: Option<i64>,
    resident_bytes: Option<i64>,
    threads: Option<i64>,
    started: Option<f64>,
}

impl Usage {
    fn now() -> Self {
        let pages = fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let mut pages = pages.split_ascii_whitespace().map(|pages| pages.parse::<i64>().ok());
        let bytes = |pages: Option<i64>| Some(pages? * i64::try_from(page_size()).ok()?);
        let (virtual_bytes, resident_bytes) = (bytes(pages.next().flatten()), bytes(pages.next().flatten()));
        Self {
            processor: seconds(clock_gettime(ClockId::ProcessCPUTime)),
            // Without the one that this call opened.
            open_files: entries("/proc/self/fd").map(|count| count - 1),
            max_files: getrlimit(Resource::Nofile).current.and_then(|most| i64::try_from(most).ok()),
            virtual_bytes,
            resident_bytes,
            threads: entries("/proc/self/task"),
            started: None,
        }
    }
}

fn families(usage: &Usage) -> Result<Vec<Box<dyn Collector>>, prometheus::Error> {
    let processor = Counter::new("process_cpu_seconds_total", "User and system processor time, in seconds.")?;
    processor.inc_by(usage.processor);
    let started = Gauge::new("process_start_time_seconds", "When the process was started, in Unix time.")?;
    started.set(usage.started.unwrap_or_default());
    let mut families: Vec<Box<dyn Collector>> = vec![Box::new(processor), Box::new(started)];
    for (name, help, value) in [
        ("process_open_fds", "Open file descriptors.", usage.open_files),
        ("process_max_fds", "File descriptors that may be open.", usage.max_files),
        ("process_virtual_memory_bytes", "Address space.", usage.virtual_bytes),
        ("process_resident_memory_bytes", "Resident memory.", usage.resident_bytes),
        ("process_threads", "Threads of the operating system.", usage.threads),
    ] {
        let gauge = IntGauge::new(name, help)?;
        gauge.set(value.unwrap_or_default());
        families.push(Box::new(gauge));
    }
    Ok(families)
}

fn entries(directory: &str) -> Option<i64> {
    i64::try_from(fs::read_dir(directory).ok()?.count()).ok()
}

/// Computed from the age of the process, which the kernel counts from the boot (proc(5), `starttime`).
fn started() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name of the program comes first and may contain anything.
    let ticks: f64 = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()?;
    let per_second = u32::try_from(clock_ticks_per_second()).ok().filter(|ticks| *ticks > 0)?;
    let age = seconds(clock_gettime(ClockId::Boottime)) - ticks / f64::from(per_second);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(now.as_secs_f64() - age)
}

fn seconds(time: Timespec) -> f64 {
    Duration::try_from(time).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, hint::black_box};

    use prometheus::{Registry, TextEncoder};

    use super::*;

    fn scrape(registry: &Registry) -> BTreeMap<String, f64> {
        let page = TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        let lines = page.lines().filter(|line| !line.starts_with('#'));
        let sample = |line: &str| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        };
        lines.map(sample).collect()
    }

    #[test]
    fn a_process_says_what_it_uses() {
        let registry = Registry::new();
        registry.register(Box::new(Process::new().unwrap())).unwrap();
        let samples = scrape(&registry);
        let names = [
            "process_cpu_seconds_total",
            "process_max_fds",
            "process_open_fds",
            "process_resident_memory_bytes",
            "process_start_time_seconds",
            "process_threads",
            "process_virtual_memory_bytes",
        ];
        assert_eq!(samples.keys().collect::<Vec<_>>(), names);
        assert!(samples.values().all(|value| *value > 0.0), "{samples:?}");
        assert!(samples["process_resident_memory_bytes"] < samples["process_virtual_memory_bytes"]);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
        let age = now - samples["process_start_time_seconds"];
        assert!((-0.1..3_600.0).contains(&age), "{age}");
        // Other tests open and close files too, but not a hundred at once.
        let held: Vec<_> = (0..200).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        assert!(scrape(&registry)["process_open_fds"] > samples["process_open_fds"] + 100.0);
        drop(held);
    }

    /// A nearly idle node uses a few hundredths of a second between two scrapes.
    #[test]
    fn processor_time_has_fractions_of_a_second() {
        let registry = Registry::new();
        registry.register(Box::new(Process::new().unwrap())).unwrap();
        let processor = || scrape(&registry)["process_cpu_seconds_total"];
        let before = processor();
        let mut sum = 0_u64;
        while processor() < before + 0.005 {
            sum = (0..10_000).fold(sum, |sum, number| black_box(sum ^ number));
        }
        assert!(processor() < before + 30.0, "{sum}");
        let in_whole_seconds = (0..100).map(|_| processor()).all(|seconds| seconds.fract() == 0.0);
        assert!(!in_whole_seconds, "seconds are not rounded");
    }
}
