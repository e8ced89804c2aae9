//! Limits of a test's demand faults, and their regions.

use super::pages::{PAGE_BYTES, Place};

/// Bytes of a region: small enough to be made quickly, and freed before many pages accumulate.
pub(super) const REGION_BYTES: u64 = 16 << 20;

/// Pages of a region. A power of two, so that every odd step visits all of them.
pub(super) const REGION_PAGES: u64 = REGION_BYTES / PAGE_BYTES;

/// The most faults of one test: as many regions as one lane may have.
pub(super) const FAULTS_MAX: u64 = umem_wire::limits::REGIONS_MAX as u64 * REGION_PAGES;

/// The most faults a second: beyond it one userfaultfd becomes the bottleneck.
pub(crate) const FAULT_RATE_MAX: u32 = 200_000;

/// The fault options of a test.
pub(super) struct Faults {
    /// Faults a second.
    pub(super) rate: u32,
    /// Faults in total.
    pub(super) count: u64,
    /// Pages do not land.
    pub(super) discard: bool,
}

/// Checks a test's faults; the error names the problem.
pub(super) fn check(asked: &Faults, place: Place) -> std::result::Result<(), String> {
    if asked.rate == 0 {
        return match asked.count {
            0 => Ok(()),
            _ => Err("there are no faults without --fault-rate".into()),
        };
    }
    if asked.rate > FAULT_RATE_MAX {
        return Err(format!(
            "--fault-rate is at most {FAULT_RATE_MAX} a second, not {}: more is beyond one userfaultfd",
            asked.rate
        ));
    }
    if asked.discard {
        return Err("--discard has no memory to fault in: leave out --fault-rate".into());
    }
    if place.is_hugetlb() {
        return Err("--fault-rate is for pages of 4 KiB: leave out --page-size 2M, or --kind \
                    anonymous, whose pages come whole"
            .into());
    }
    if asked.count == 0 || asked.count > FAULTS_MAX {
        return Err(format!(
            "a test has memory for {FAULTS_MAX} faults, not {}: take a lower --fault-rate, or a \
             shorter -t",
            asked.count
        ));
    }
    Ok(())
}

/// The pages that a test of this length will touch, plus a tenth for those touched before the clock starts.
pub(crate) fn faults(rate: u32, seconds: f64) -> u64 {
    (f64::from(rate) * (seconds * 1.1 + 1.0)).ceil() as u64
}
