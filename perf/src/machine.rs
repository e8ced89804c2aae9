//! The machine of a result.

use std::fs::read_to_string;

use serde::{Deserialize, Serialize};

use crate::error::{Context, Result};

/// The properties of a machine that matter for a figure.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    cpu: String,
    /// Cores that this process may use.
    cores: usize,
    memory_mib: u64,
    kernel: String,
    /// The system's default congestion control.
    congestion: String,
    /// `/sys/kernel/mm/transparent_hugepage/shmem_enabled`.
    shmem_huge: String,
    /// `/sys/kernel/mm/transparent_hugepage/shmem_enabled`.
    pub(crate) load: f64,
    /// The share of the processor time wanted from then until the end of the measurement that the
    /// host of a virtual machine gave to other guests, percent. None before the end, and if the
    /// kernel does not report it.
    #[serde(default)]
    stolen_percent: Option<f64>,
    #[serde(skip)]
    began: Option<Ticks>,
}

/// Ticks of all cores since the machine started (proc_stat(5)).
#[derive(Clone, Copy, Debug)]
struct Ticks {
    /// Neither idle nor waiting for a disk.
    wanted: u64,
    /// Given to other guests by the host.
    stolen: u64,
}

impl Ticks {
    fn now() -> Option<Ticks> {
        Ticks::of(&read_to_string("/proc/stat").ok()?)
    }

    fn of(stat: &str) -> Option<Ticks> {
        let line = stat.lines().next()?.strip_prefix("cpu ")?;
        let fields: Vec<u64> =
            line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        // user nice system idle iowait irq softirq steal; the fields after that are part of user
        // and nice.
        let [user, nice, system, _idle, _iowait, irq, softirq, stolen, ..] = *fields.as_slice()
        else {
            return None;
        };
        Some(Ticks { wanted: user + nice + system + irq + softirq + stolen, stolen })
    }

    fn stolen_percent_since(self, began: Ticks) -> Option<f64> {
        let wanted = self.wanted.saturating_sub(began.wanted);
        let stolen = self.stolen.saturating_sub(began.stolen);
        (wanted > 0).then(|| stolen as f64 * 100.0 / wanted as f64)
    }
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
            stolen_percent: None,
            began: Ticks::now(),
        }
    }

    /// Ends the measurement.
    pub(crate) fn ended(&mut self) {
        let now = self.began.zip(Ticks::now());
        self.stolen_percent = now.and_then(|(began, now)| now.stolen_percent_since(began));
    }

    /// Other activity: the load at the start, and the time that the host took.
    pub(crate) fn else_line(&self) -> String {
        let stolen = self.stolen_percent.map_or_else(String::new, |percent| {
            format!("; the host gave {percent:.1} % of the processor time wanted to other guests")
        });
        format!("The load average was {:.2} when it began{stolen}.", self.load)
    }

    /// The machine without its other activity.
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

/// The first two cores that this process may use: one for each end. With one core both ends share
/// it.
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

/// Memory that processes can have without swapping.
pub(crate) fn memory_available_mib() -> usize {
    memory_mib("MemAvailable")
}

/// Unused memory, page cache excluded.
pub(crate) fn memory_free_mib() -> usize {
    memory_mib("MemFree")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stolen_percent_is_the_share_of_wanted_time() {
        let began = Ticks::of("cpu  100 0 50 900 10 0 0 5 3 0\ncpu0 1").unwrap();
        let ended = Ticks::of("cpu  130 10 80 5000 90 5 5 25 9 0\n").unwrap();
        // 30 user, 10 nice, 30 system, 5 and 5 of interrupts, and 20 stolen.
        assert_eq!(ended.stolen_percent_since(began), Some(20.0));
        assert_eq!(began.stolen_percent_since(began), None);
        assert!(Ticks::of("cpu  1 2 3").is_none());
        assert!(Ticks::now().is_some());
    }
}
