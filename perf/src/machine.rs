//! The machine a result comes from.

use std::fs::read_to_string;

use serde::{Deserialize, Serialize};

use crate::error::{Context, Result};

/// What has to be known of a machine to read a figure.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    cpu: String,
    /// Cores that this process may use.
    cores: usize,
    memory_mib: u64,
    kernel: String,
    /// The system's congestion control, which sockets get unless they choose their own.
    congestion: String,
    /// `/sys/kernel/mm/transparent_hugepage/shmem_enabled`.
    shmem_huge: String,
    /// Load average of the last minute when the measurement began.
    pub(crate) load: f64,
}

impl Machine {
    pub(crate) fn describe() -> Machine {
        let load = word("/proc/loadavg", 0).parse().unwrap_or(f64::NAN);
        let uname = nix::sys::utsname::uname();
        Machine {
            cpu: field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".into()),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_mib: memory_total_mib(),
            kernel: uname.map_or_else(
                |_| "unknown".into(),
                |name| name.release().to_string_lossy().into_owned(),
            ),
            congestion: word("/proc/sys/net/ipv4/tcp_congestion_control", 0),
            shmem_huge: selected("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
            load,
        }
    }

    /// The machine, but for what else it does.
    pub(crate) fn line(&self) -> String {
        format!(
            "{}, {} cores, {:.1} GiB, Linux {}, congestion control {}, shmem huge pages {}",
            self.cpu,
            self.cores,
            self.memory_mib as f64 / 1024.0,
            self.kernel,
            self.congestion,
            self.shmem_huge
        )
    }
}

/// The first two cores that this process may use: one for each end. With one core both are it.
pub(crate) fn two_cores() -> Result<[usize; 2]> {
    let set = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0))
        .context(|| "asking for this process's cores")?;
    let mut cores =
        (0..nix::sched::CpuSet::count()).filter(|&core| set.is_set(core).unwrap_or(false));
    let first = cores.next().unwrap_or(0);
    Ok([first, cores.next().unwrap_or(first)])
}

/// Pins the calling thread.
pub(crate) fn pin(core: usize) -> Result<()> {
    pin_to(&[core])
}

/// Lets the calling thread run on these cores only.
pub(crate) fn pin_to(cores: &[usize]) -> Result<()> {
    let mut set = nix::sched::CpuSet::new();
    cores
        .iter()
        .try_for_each(|&core| set.set(core))
        .and_then(|()| nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set))
        .context(|| format!("pinning to cores {cores:?}"))
}

fn memory_total_mib() -> u64 {
    memory_mib("MemTotal") as u64
}

/// What processes can have without anything being swapped out.
pub(crate) fn memory_available_mib() -> usize {
    memory_mib("MemAvailable")
}

fn memory_mib(name: &str) -> usize {
    let text = field("/proc/meminfo", name).unwrap_or_default();
    text.split(' ').next().and_then(|kib| kib.parse::<usize>().ok()).unwrap_or(0) / 1024
}

/// The value of the first `name : value` line.
fn field(path: &str, name: &str) -> Option<String> {
    let text = read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_once(':').map(|(_, value)| value.trim().to_owned())
}

fn word(path: &str, index: usize) -> String {
    let text = read_to_string(path).unwrap_or_default();
    text.split_whitespace().nth(index).unwrap_or("unknown").to_owned()
}

/// Of `always [never]`: `never`.
fn selected(path: &str) -> String {
    let text = read_to_string(path).unwrap_or_default();
    let inside = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    inside.map_or_else(|| "unknown".into(), |(inside, _)| inside.to_owned())
}
