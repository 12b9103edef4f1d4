//! Counts the system calls of a process, by `perf`.
//!
//! Needs `perf` and the right to trace (root, or `CAP_PERFMON` and a readable tracefs). The count makes every
//! system call slower, so no CPU time is measured meanwhile.

use std::{
    fs, io,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::workshop::pause;

/// Every entry into the kernel by a system call.
const EVENT: &str = "raw_syscalls:sys_enter";

/// How long `perf` may take to start.
const PATIENCE: Duration = Duration::from_secs(10);

/// A count under way; `perf` is killed when this is dropped.
#[derive(Debug)]
pub struct Syscalls(Child);

impl Syscalls {
    /// Counts the system calls of all threads of `pid` from now on.
    pub fn count(pid: u32) -> anyhow::Result<Self> {
        let mut command = Command::new("perf");
        command.args(["stat", "-x", ",", "-e", EVENT, "-p"]).arg(pid.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut this = Self(command.spawn().context("cannot run perf")?);
        let (begun, threads) = (Instant::now(), fs::read_dir(format!("/proc/{pid}/task"))?.count());
        let descriptors = format!("/proc/{}/fd", this.0.id());
        while counters(Path::new(&descriptors)) < threads {
            if let Some(status) = this.0.try_wait()? {
                ensure!(false, "perf ended with {status}: {}", this.said()?.trim());
            }
            ensure!(begun.elapsed() < PATIENCE, "perf does not start to count");
            pause(Duration::from_millis(5))?;
        }
        Ok(this)
    }

    /// Ends the count.
    pub fn finish(mut self) -> anyhow::Result<u64> {
        let pid = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw).context("a process id")?;
        kill_process(pid, Signal::INT)?;
        let words = self.said()?;
        self.0.wait()?;
        parse(&words).with_context(|| format!("perf said {words:?}"))
    }

    fn said(&mut self) -> anyhow::Result<String> {
        let output = self.0.stderr.take().context("standard error is piped")?;
        Ok(io::read_to_string(output)?)
    }
}

impl Drop for Syscalls {
    fn drop(&mut self) {
        // It may have exited already.
        let _: io::Result<()> = self.0.kill();
        let _: io::Result<_> = self.0.wait();
    }
}

/// How many events `perf` counts: one for each thread.
fn counters(descriptors: &Path) -> usize {
    let all = fs::read_dir(descriptors).into_iter().flatten().flatten();
    let links = all.filter_map(|descriptor| fs::read_link(descriptor.path()).ok());
    links.filter(|link| link.to_string_lossy().contains("perf_event")).count()
}

/// The count in the output of `perf stat -x,`: the first field of the event's line.
fn parse(output: &str) -> Option<u64> {
    output.lines().find(|line| line.contains(EVENT))?.split(',').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_the_first_field() {
        assert_eq!(parse("# started\n\n109,,raw_syscalls:sys_enter,1031845,100.00,,\n"), Some(109));
        assert_eq!(parse("<not counted>,,raw_syscalls:sys_enter,0,100.00,,\n"), None);
        assert_eq!(parse("event syntax error\n"), None);
    }
}
