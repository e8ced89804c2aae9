//! What this process may have.

use nix::sys::resource::{Resource, getrlimit};
use umem_ring::{Config, Ring};
use umem_wire::limits::LANES_MAX;

use super::{Check, read, sudo};
use crate::error::{Error, Result};
use crate::memory::blocks::ISLANDS_MAX;
use crate::memory::{BLOCK_BYTES, check_pages};
use crate::priority::{EARLY_LIMIT, Priority, go_early, go_first};

/// Descriptors beside those of the lanes: standard streams, bells, QMP, regions and their
/// userfaultfds, and room for what libraries open for a moment.
const DESCRIPTORS: u64 = 64;

/// Descriptors of a lane: its socket, one for blocking writes, and its ring's: the ring, a duplicate,
/// an eventfd, the demand ring's mailbox. With TLS the connection and the pump's end of the pair too.
const DESCRIPTORS_PER_LANE: u64 = 8;

/// Descriptors that `lanes` bulk lanes and a demand lane take.
fn descriptors(lanes: u16) -> u64 {
    DESCRIPTORS + DESCRIPTORS_PER_LANE * (u64::from(lanes) + 1)
}

/// Refuses what would fail later, with the guest stopped: more bulk lanes than there may be descriptors
/// or rings for, and a kernel whose pages are not ours.
///
/// # Errors
/// The limit, and the command that raises it.
pub(crate) fn check(lanes: u16) -> Result<()> {
    check_pages()?;
    let (files, needed) = (limit(Resource::RLIMIT_NOFILE), descriptors(lanes));
    if files.soft < needed {
        return Err(Error::Environment(format!(
            "{lanes} bulk lane(s) take up to {needed} open files, and the limit is {}: run `{}` \
             first, or use fewer --lanes",
            files.soft,
            files.raise_files(needed)
        )));
    }
    let (locked, rings) = (limit(Resource::RLIMIT_MEMLOCK), u64::from(lanes) + RINGS);
    if locked.soft >= rings * RING_BYTES {
        return Ok(());
    }
    // It depends on the kernel and on capabilities whether they count.
    let made: std::result::Result<Vec<Ring>, umem_ring::Error> =
        (0..rings).map(|_| Ring::new(&Config::default())).collect();
    made.map(drop).map_err(|error| {
        Error::Environment(format!(
            "{lanes} bulk lane(s) take {rings} rings, and locked memory is limited to {} KiB \
             ({error}): run `{}` first, or use fewer --lanes",
            locked.soft >> 10,
            locked.raise_locked(LOCKED_BYTES.max(rings * RING_BYTES))
        ))
    })
}

/// Rings beside those of bulk lanes: the demand lane's, and one that frees or touches memory.
const RINGS: u64 = 2;

/// What a ring's queues take; some kernels count it as locked memory (Linux 6.18 does).
const RING_BYTES: u64 = 32 << 10;

pub(super) fn open_files() -> Check {
    let limit = limit(Resource::RLIMIT_NOFILE);
    let (least, most) = (descriptors(1), descriptors(LANES_MAX));
    let check = Check::ok(
        "open files",
        "sockets and rings, some for each lane",
        format!("{} may be open", limit.soft),
    );
    match limit.soft {
        soft if soft < least => check.missing(limit.raise_files(most)),
        soft if soft < most => check.warning(limit.raise_files(most)),
        _ => check,
    }
}

/// Zero-copy sends of a lane that the receiver has not acknowledged yet: 4 MiB are 3 ms at 10 Gbit/s.
const LOCKED_BYTES: u64 = 4 << 20;

/// Pages of a zero-copy send count as locked, unless the process has CAP_IPC_LOCK.
pub(super) fn locked_memory() -> Check {
    const IPC_LOCK: u32 = 14;
    let limit = limit(Resource::RLIMIT_MEMLOCK);
    let check = |found: String| {
        Check::ok("locked memory", "at the source, for sending pages without copying them", found)
    };
    if has_capability(IPC_LOCK) {
        return check("without a limit (CAP_IPC_LOCK)".into());
    }
    match limit.soft {
        libc::RLIM_INFINITY => check("without a limit".into()),
        soft if soft >= LOCKED_BYTES => check(format!("{} KiB", soft >> 10)),
        soft => check(format!("{} KiB", soft >> 10)).warning(limit.raise_locked(LOCKED_BYTES)),
    }
}

/// The kernel's default is 65,530. A region takes 2,048 at most (`src/memory/blocks.rs`), and a QEMU
/// some hundred of its own.
const MAPPINGS: u64 = 16_384;

pub(super) fn mappings() -> Check {
    let count = read("/proc/sys/vm/max_map_count").and_then(|text| text.parse::<u64>().ok());
    let check = |found: String| {
        Check::ok(
            "mappings",
            "at the destination, a guest some of whose blocks are complete",
            found,
        )
    };
    match count {
        Some(count) if count < MAPPINGS => check(format!("vm.max_map_count is {count}"))
            .warning(format!("{}sysctl -w vm.max_map_count=65530", sudo())),
        Some(count) => check(format!("vm.max_map_count is {count}")),
        None => check("the limit cannot be read".into()),
    }
}

/// Refuses regions whose blocks, as they become complete one by one, could split the guest's memory into
/// more mappings than its process may have.
///
/// # Errors
/// The limit, and the command that raises it.
pub(crate) fn check_mappings(region_bytes: impl Iterator<Item = u64>) -> Result<()> {
    match read("/proc/sys/vm/max_map_count").and_then(|text| text.parse().ok()) {
        Some(limit) => mappings_within(limit, region_bytes),
        // Unlimited, as far as can be seen.
        None => Ok(()),
    }
}

fn mappings_within(limit: u64, region_bytes: impl Iterator<Item = u64>) -> Result<()> {
    let of_region = |bytes: u64| 1 + (bytes / BLOCK_BYTES).min(MAPPINGS_PER_REGION);
    let needed = MAPPINGS_OF_MONITOR + region_bytes.map(of_region).sum::<u64>();
    if needed <= limit {
        return Ok(());
    }
    Err(Error::Environment(format!(
        "the guest's memory may take {needed} mappings until it is complete, and vm.max_map_count is \
         {limit}: run `{}sysctl -w vm.max_map_count={}` first",
        sudo(),
        needed.max(65_530)
    )))
}

/// What islands of complete blocks make of one region, at most: each splits its mapping in two places
/// (`src/memory/blocks.rs`), and only each second block can be one.
const MAPPINGS_PER_REGION: u64 = 2 * ISLANDS_MAX as u64;

/// What a monitor has beside its guest's memory: a QEMU with a graphical console some hundred.
const MAPPINGS_OF_MONITOR: u64 = 1024;

/// Asks for what a demand thread asks for, on a thread that ends with it.
pub(super) fn priority() -> Check {
    let got = std::thread::spawn(go_first).join().unwrap_or(Priority::Unchanged);
    let check = |found: &str| {
        Check::ok("real-time priority", "demand pages go before all else on a busy core", found)
    };
    let remedy = format!("{}prlimit --pid $$ --rtprio=1:1", sudo());
    match got {
        Priority::RealTime => check("allowed"),
        Priority::Nice => check("not allowed, but a nice value of -20 is").warning(remedy),
        Priority::Unchanged => check("not allowed").warning(remedy),
    }
}

/// Asks for what a bulk thread asks for, in the same way.
pub(super) fn early() -> Check {
    let is_allowed = std::thread::spawn(go_early).join().unwrap_or(false);
    let check = |found: &str| {
        Check::ok(
            "nice value",
            "the guest has all of its memory sooner where cores are busy",
            found,
        )
    };
    if is_allowed {
        return check("threads that move pages may go before ordinary ones");
    }
    let remedy = format!("{}prlimit --pid $$ --nice={EARLY_LIMIT}:{EARLY_LIMIT}", sudo());
    check("threads that move pages take their turn").warning(remedy)
}

/// `RLIM_INFINITY` is none.
#[derive(Clone, Copy, Debug)]
struct Limit {
    soft: u64,
    hard: u64,
}

fn limit(resource: Resource) -> Limit {
    let (soft, hard) = getrlimit(resource).expect("a process may read its own limits");
    Limit { soft, hard }
}

impl Limit {
    /// The command that raises it in the shell in which it is typed; `unit` is that of ulimit.
    fn raise(self, name: &str, letter: char, unit: u64, to: u64) -> String {
        if self.hard >= to {
            return format!("ulimit -{letter} {}", to.div_ceil(unit));
        }
        format!("{}prlimit --pid $$ --{name}={to}:{to}", sudo())
    }

    fn raise_files(self, to: u64) -> String {
        self.raise("nofile", 'n', 1, to)
    }

    fn raise_locked(self, to: u64) -> String {
        self.raise("memlock", 'l', 1 << 10, to)
    }
}

fn has_capability(number: u32) -> bool {
    let status = read("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = line.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    effective.is_some_and(|set| set & 1 << number != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_raised_by_whoever_may() {
        let limit = |soft, hard| Limit { soft, hard };
        assert_eq!(limit(10, 500).raise_files(500), "ulimit -n 500");
        assert_eq!(limit(0, libc::RLIM_INFINITY).raise_locked(4 << 20), "ulimit -l 4096");
        let text = limit(10, 499).raise_files(500);
        assert!(text.ends_with("prlimit --pid $$ --nofile=500:500"), "{text}");
        let text = limit(0, 1 << 20).raise_locked(4 << 20);
        assert!(text.ends_with("prlimit --pid $$ --memlock=4194304:4194304"), "{text}");
    }

    #[test]
    fn memory_of_more_mappings_than_there_may_be_is_refused() {
        let within = |limit, regions: &[u64]| mappings_within(limit, regions.iter().copied());
        assert!(within(65_530, &[1 << 40; 16]).is_ok(), "the kernel's default");
        // 4 GiB are 2,048 blocks; more of them split no more.
        assert!(within(1024 + 2049, &[4 << 30]).is_ok());
        assert!(within(1024 + 2049, &[8 << 30]).is_ok());
        assert!(within(1024 + 3, &[4 << 20]).is_ok());
        let text = within(1024 + 2048, &[8 << 30]).unwrap_err().to_string();
        assert!(text.contains("may take 3073 mappings") && text.contains("is 3072"), "{text}");
        assert!(text.contains("sysctl -w vm.max_map_count=65530`"), "{text}");
    }

    #[test]
    fn the_most_lanes_fit_into_the_usual_limit() {
        assert!(descriptors(LANES_MAX) <= 1024);
    }
}
