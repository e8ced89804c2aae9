//! The resources of this process, to compare with an earlier state.

use std::time::{Duration, Instant};

/// Time after which everything has ended, and the interval of polling, because there is no notification.
const PATIENCE: Duration = Duration::from_secs(20);
const INTERVAL: Duration = Duration::from_millis(5);

/// Exact counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    descriptors: usize,
    threads: usize,
    /// Mappings of memory files, rings and other named objects other than programs.
    mapped: usize,
    /// Mappings registered with a userfaultfd.
    registered: usize,
    /// Descriptors and mappings of files in /dev/shm.
    in_shm: usize,
}

impl Left {
    pub(crate) fn now() -> Left {
        let descriptors: Vec<_> =
            std::fs::read_dir("/proc/self/fd").expect("in /proc").flatten().collect();
        let threads = std::fs::read_dir("/proc/self/task").expect("in /proc").count();
        let smaps = std::fs::read_to_string("/proc/self/smaps").expect("in /proc");
        let has_flag = |line: &&str| line.split(' ').any(|flag| flag == "um" || flag == "ui");
        let count = |name: &str| smaps.lines().filter(|line| line.contains(name)).count();
        let links = descriptors.iter().filter_map(|entry| std::fs::read_link(entry.path()).ok());
        Left {
            descriptors: descriptors.len(),
            threads,
            mapped: count("/memfd:") + count("anon_inode:"),
            registered: smaps
                .lines()
                .filter(|l| l.starts_with("VmFlags:"))
                .filter(has_flag)
                .count(),
            in_shm: count("/dev/shm/") + links.filter(|link| link.starts_with("/dev/shm")).count(),
        }
    }

    /// Waits until the state equals `before`: the kernel frees a thread a little after the join returns, and a ring
    /// after its descriptor.
    ///
    /// # Errors
    /// The state, if it does not return to `before`.
    pub(crate) fn returned_to(before: &Left) -> Result<(), Left> {
        let began = Instant::now();
        loop {
            match Left::now() {
                now if now == *before => return Ok(()),
                now if began.elapsed() > PATIENCE => return Err(now),
                _ => std::thread::sleep(INTERVAL),
            }
        }
    }
}

/// All mappings of this process: those of its allocator and of cached stacks change by themselves.
pub(crate) fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").expect("in /proc").lines().count()
}
