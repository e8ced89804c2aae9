//! The limits of this process.

use nix::sys::resource::Resource;
use umem_wire::limits::LANES_MAX;

use super::Check;
use crate::runtime::priority::{EARLY_LIMIT, Priority, go_early, go_first};
use crate::runtime::process::{read, sudo};
use crate::transport::limits::{LOCKED_BYTES, descriptors, limit};

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

/// The kernel's default is 65,530. A region takes at most 2,048 (`src/memory/blocks.rs`), and a QEMU some hundred of
/// its own.
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

/// Requests a demand thread's priority, on a thread that ends with the check.
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

/// Requests a bulk thread's priority, in the same way.
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

fn has_capability(number: u32) -> bool {
    let status = read("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = line.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    effective.is_some_and(|set| set & 1 << number != 0)
}
