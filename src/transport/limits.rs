//! The resources of a migration against this process's limits: descriptors, rings, locked memory,
//! mappings.

use nix::sys::resource::{Resource, getrlimit};
use umem_ring::{Config, Ring};
#[cfg(test)]
use umem_wire::limits::LANES_MAX;

use crate::error::{Error, Result};
use crate::memory::blocks::ISLANDS_MAX;
use crate::memory::{BLOCK_BYTES, check_pages};
use crate::runtime::process::{read, sudo};

/// Descriptors beside those of the lanes: standard streams, eventfds, QMP, regions and their
/// userfaultfds, and room for descriptors that libraries open for a moment.
const DESCRIPTORS: u64 = 64;

/// Descriptors of a lane: its socket, one for blocking writes, and its ring's: the ring, a
/// duplicate, an eventfd, the demand ring's mailbox. With TLS the connection and the pump's end of
/// the pair too.
const DESCRIPTORS_PER_LANE: u64 = 8;

/// Descriptors that `lanes` bulk lanes and a demand lane need.
pub(crate) fn descriptors(lanes: u16) -> u64 {
    DESCRIPTORS + DESCRIPTORS_PER_LANE * (u64::from(lanes) + 1)
}

/// Checks before the guest stops that there may be descriptors and rings for all lanes, and that
/// the kernel's page size is supported.
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
    // Whether rings count as locked memory depends on the kernel and on capabilities.
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

/// Bytes of a ring's queues; some kernels count them as locked memory (Linux 6.18 does).
const RING_BYTES: u64 = 32 << 10;

/// Zero-copy sends of a lane that the receiver has not acknowledged yet: 4 MiB are 3 ms at 10
/// Gbit/s.
pub(crate) const LOCKED_BYTES: u64 = 4 << 20;

/// Refuses regions whose blocks, as they complete one by one, could split the guest's memory into
/// more mappings than its process may have.
///
/// # Errors
/// The limit, and the command that raises it.
pub(crate) fn check_mappings(region_bytes: impl Iterator<Item = u64>) -> Result<()> {
    match read("/proc/sys/vm/max_map_count").and_then(|text| text.parse().ok()) {
        Some(limit) => mappings_within(limit, region_bytes),
        // The limit cannot be read: taken as unlimited.
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

/// Most mappings that complete blocks can make of one region: each island of them splits the
/// mapping in two places (`src/memory/blocks.rs`), and at most every second block can be one.
const MAPPINGS_PER_REGION: u64 = 2 * ISLANDS_MAX as u64;

/// A monitor's mappings beside its guest's memory: a QEMU with a graphical console has some
/// hundred.
const MAPPINGS_OF_MONITOR: u64 = 1024;

/// A resource limit. `RLIM_INFINITY` is no limit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

/// This process's limit of a resource.
pub(crate) fn limit(resource: Resource) -> Limit {
    let (soft, hard) = getrlimit(resource).expect("a process may read its own limits");
    Limit { soft, hard }
}

impl Limit {
    /// The shell command that raises the limit; `unit` is that of ulimit.
    fn raise(self, name: &str, letter: char, unit: u64, to: u64) -> String {
        if self.hard >= to {
            return format!("ulimit -{letter} {}", to.div_ceil(unit));
        }
        format!("{}prlimit --pid $$ --{name}={to}:{to}", sudo())
    }

    /// The command that raises the limit to `to` open files.
    pub(crate) fn raise_files(self, to: u64) -> String {
        self.raise("nofile", 'n', 1, to)
    }

    /// The command that raises the limit to `to` locked bytes.
    pub(crate) fn raise_locked(self, to: u64) -> String {
        self.raise("memlock", 'l', 1 << 10, to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_to_raise_a_limit_uses_prlimit_above_the_hard_limit() {
        let limit = |soft, hard| Limit { soft, hard };
        assert_eq!(limit(10, 500).raise_files(500), "ulimit -n 500");
        assert_eq!(limit(0, libc::RLIM_INFINITY).raise_locked(4 << 20), "ulimit -l 4096");
        let text = limit(10, 499).raise_files(500);
        assert!(text.ends_with("prlimit --pid $$ --nofile=500:500"), "{text}");
        let text = limit(0, 1 << 20).raise_locked(4 << 20);
        assert!(text.ends_with("prlimit --pid $$ --memlock=4194304:4194304"), "{text}");
    }

    #[test]
    fn memory_that_may_exceed_the_mapping_limit_is_refused() {
        let within = |limit, regions: &[u64]| mappings_within(limit, regions.iter().copied());
        assert!(within(65_530, &[1 << 40; 16]).is_ok(), "the kernel's default");
        // 4 GiB are 2,048 blocks; more blocks split no further.
        assert!(within(1024 + 2049, &[4 << 30]).is_ok());
        assert!(within(1024 + 2049, &[8 << 30]).is_ok());
        assert!(within(1024 + 3, &[4 << 20]).is_ok());
        let text = within(1024 + 2048, &[8 << 30]).unwrap_err().to_string();
        assert!(text.contains("may take 3073 mappings") && text.contains("is 3072"), "{text}");
        assert!(text.contains("sysctl -w vm.max_map_count=65530`"), "{text}");
    }

    #[test]
    fn maximum_of_lanes_fits_the_usual_descriptor_limit() {
        assert!(descriptors(LANES_MAX) <= 1024);
    }
}
