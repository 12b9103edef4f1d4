//! How much memory this process may use: the basis of `limits.memory = "auto"`.
//!
//! Reads the limits from the kernel's files: the memory controller (cgroup version 1 or 2) of the process's
//! control group and of all its parents, because the smallest limit applies; and the machine's total memory.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::ByteSize;

/// The share of a group's limit that may be held for clients, in percent. The rest is for idle connections,
/// code, and memory that the allocator has not returned.
const OF_GROUP: u64 = 70;
/// The share of the machine's memory, in percent: other processes need memory, too.
const OF_MACHINE: u64 = 50;
/// The default if the available memory is unknown.
const UNKNOWN: ByteSize = ByteSize::mib(512);

/// How much may be held for clients, and how it was determined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub bytes: ByteSize,
    pub of: &'static str,
}

/// The default share of memory.
pub(super) fn share() -> Share {
    share_below(Path::new("/"))
}

/// Like [`share`], for a system whose files are under `root`.
fn share_below(root: &Path) -> Share {
    let machine = machine_memory(root);
    let group = group_limit(root).filter(|limit| machine.is_none_or(|machine| *limit < machine));
    match (group, machine) {
        (Some(limit), _) => {
            Share { bytes: percent(limit, OF_GROUP), of: "70 % of the cgroup's memory limit" }
        }
        (None, Some(memory)) => {
            Share { bytes: percent(memory, OF_MACHINE), of: "50 % of the machine's memory" }
        }
        (None, None) => Share { bytes: UNKNOWN, of: "the system does not report its memory" },
    }
}

/// Rounds down to whole MiB, unless that leaves nothing.
fn percent(bytes: u64, percent: u64) -> ByteSize {
    let share = bytes / 100 * percent;
    let whole = share >> 20 << 20;
    ByteSize::bytes(usize::try_from(if whole == 0 { share } else { whole }).unwrap_or(usize::MAX))
}

/// The machine's memory in bytes.
fn machine_memory(root: &Path) -> Option<u64> {
    let text = read(&root.join("proc/meminfo"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The smallest limit of the process's control group and its parents.
fn group_limit(root: &Path) -> Option<u64> {
    let groups = read(&root.join("proc/self/cgroup"))?;
    let mounts = read(&root.join("proc/self/mountinfo"))?;
    let mounts: Vec<_> = mounts.lines().filter_map(Mount::parse).collect();
    // With both versions mounted, the memory controller belongs to only one. The other has no such file.
    let limits = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, group) = (fields.next()?, fields.next()?, fields.next()?);
        let unified = controllers.is_empty();
        if !unified && !controllers.split(',').any(|controller| controller == "memory") {
            return None;
        }
        let mount = mounts.iter().find(|mount| mount.holds_memory(unified))?;
        let file = if unified { "memory.max" } else { "memory.limit_in_bytes" };
        smallest_up_to_mount(root, mount, group, file)
    });
    limits.min()
}

/// The smallest limit from `group` up to the mounted group.
fn smallest_up_to_mount(root: &Path, mount: &Mount<'_>, group: &str, file: &str) -> Option<u64> {
    let top = root.join(mount.point.trim_start_matches('/'));
    // A group within the hierarchy may be mounted: in a container, the path is that on the host.
    let inside = Path::new(group).strip_prefix(mount.root).unwrap_or(Path::new(""));
    let mut directory: PathBuf = top.join(inside.strip_prefix("/").unwrap_or(inside));
    let mut smallest = None;
    loop {
        // "max" means no limit; so does the number close to 2^63 in version 1.
        let limit = read(&directory.join(file)).and_then(|text| text.trim().parse::<u64>().ok());
        smallest = [smallest, limit].into_iter().flatten().min();
        if directory == top || !directory.pop() {
            return smallest;
        }
    }
}

/// A mounted hierarchy of control groups: a line of `/proc/self/mountinfo` (proc(5)).
struct Mount<'a> {
    /// The group that is mounted.
    root: &'a str,
    point: &'a str,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let mut file_system = file_system.split(' ');
        Some(Self {
            root: mount.next()?,
            point: mount.next()?,
            kind: file_system.next()?,
            options: file_system.nth(1)?,
        })
    }

    fn holds_memory(&self, unified: bool) -> bool {
        match self.kind {
            "cgroup2" => unified,
            "cgroup" => !unified && self.options.split(',').any(|option| option == "memory"),
            _ => false,
        }
    }
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const V2: &str = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
    const V1: &str = "31 24 0:27 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu\n\
                      32 24 0:28 / /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory";
    const GIB: u64 = 1 << 30;

    /// A system with 16 GiB and these files.
    fn system(groups: &str, mounts: &str, files: &[(&str, &str)]) -> TempDir {
        let root = tempfile::tempdir().unwrap();
        let files = files.iter().copied().chain([
            ("proc/self/cgroup", groups),
            ("proc/self/mountinfo", mounts),
            ("proc/meminfo", "MemTotal:       16777216 kB\nMemFree:         1000000 kB\n"),
        ]);
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        root
    }

    #[track_caller]
    fn check(system: &TempDir, limit: Option<u64>) {
        assert_eq!(group_limit(system.path()), limit);
        let share = share_below(system.path());
        let (bytes, of) = match limit {
            Some(limit) if limit < 16 * GIB => (percent(limit, 70), "cgroup"),
            _ => (percent(16 * GIB, 50), "machine"),
        };
        assert_eq!(share.bytes, bytes);
        assert!(share.of.contains(of), "{}", share.of);
    }

    #[test]
    fn a_container_with_its_own_namespace() {
        let files = [("sys/fs/cgroup/memory.max", "536870912")];
        let system = system("0::/", V2, &files);
        check(&system, Some(GIB / 2));
        assert_eq!(share_below(system.path()).bytes.to_string(), "358MiB");
    }

    #[test]
    fn the_smallest_limit_around_the_process_counts() {
        let files = [
            ("sys/fs/cgroup/system.slice/memory.max", "1073741824"),
            ("sys/fs/cgroup/system.slice/tidegate.service/memory.max", "max"),
            ("sys/fs/cgroup/system.slice/tidegate.service/deep/memory.max", "2147483648"),
            ("sys/fs/cgroup/system.slice/other/memory.max", "1048576"),
        ];
        check(&system("0::/system.slice/tidegate.service/deep", V2, &files), Some(GIB));
    }

    #[test]
    fn cgroup_version_1_limits_count() {
        let groups = "5:cpu:/user\n4:memory:/user/shell\n0::/init.scope";
        let files = [
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712"),
            ("sys/fs/cgroup/memory/user/memory.limit_in_bytes", "2147483648"),
            ("sys/fs/cgroup/memory/user/shell/memory.limit_in_bytes", "9223372036854771712"),
        ];
        check(&system(groups, V1, &files), Some(2 * GIB));
    }

    #[test]
    fn a_container_that_sees_its_cgroup_by_the_host_path() {
        let mounts = "32 24 0:28 /docker/0a1b /sys/fs/cgroup/memory ro master:10 - cgroup cgroup rw,memory";
        let files = [("sys/fs/cgroup/memory/memory.limit_in_bytes", "536870912")];
        check(&system("4:memory:/docker/0a1b", mounts, &files), Some(GIB / 2));
    }

    #[test]
    fn cgroup_versions_1_and_2_together() {
        let mounts = format!("{V1}\n33 24 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw");
        let files = [("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "536870912")];
        check(&system("4:memory:/a\n0::/a", &mounts, &files), Some(GIB / 2));
    }

    #[test]
    fn without_a_limit_the_memory_of_the_machine_counts() {
        check(&system("0::/", V2, &[("sys/fs/cgroup/memory.max", "max")]), None);
        check(&system("0::/", V2, &[]), None);
        check(&system("", "", &[]), None);
        // A limit above the machine's memory.
        let files = [("sys/fs/cgroup/memory.max", "109951162777600")];
        check(&system("0::/", V2, &files), Some(109_951_162_777_600));
    }

    #[test]
    fn an_unknown_machine_gets_a_default_budget() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(share_below(root.path()).bytes, UNKNOWN);
    }

    #[test]
    fn the_memory_of_this_machine_is_found() {
        assert_ne!(share().bytes, UNKNOWN);
    }
}
