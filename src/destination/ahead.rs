//! What one receive has brought of a lane that is read ahead.

use umem_wire::HEADER_BYTES;

use super::guest::GuestMemory;
use super::reader::STAGING_BYTES;
use crate::secure::Channel;

/// Pages up to this size, 64 KiB, are read ahead.
pub(super) const AHEAD_SHIFT_MAX: u8 = 16;

/// What one receive takes of the demand lane: 16 answers of 4 KiB pages, or one of the largest.
pub(super) const AHEAD_DEMAND_BYTES: usize = 68 << 10;

/// What one receive takes of a bulk lane: enough for the cost of a system call not to show, and little
/// enough to stay in the cache of a core until it has been written.
pub(super) const AHEAD_BULK_BYTES: usize = 256 << 10;

const _: () = assert!(AHEAD_DEMAND_BYTES > (1 << AHEAD_SHIFT_MAX) + HEADER_BYTES);

/// What has come of a lane and is not in place yet.
pub(crate) struct Ahead {
    pub(super) channel: Channel,
    /// Bytes of the current run at its start that are in place, if the rest had to wait.
    pub(super) placed: usize,
}

impl Ahead {
    /// None if the guest's pages are too large to wait whole in a buffer of `bytes`.
    pub(super) fn new(guest: &GuestMemory, bytes: usize) -> Option<Ahead> {
        let is_small = guest.regions.iter().all(|region| region.unit_shift() <= AHEAD_SHIFT_MAX);
        is_small.then(|| Ahead { channel: Channel::clear(bytes), placed: 0 })
    }

    /// A bulk lane of TLS. Large pages do not wait whole, but where they are copied in.
    pub(super) fn secured(guest: &GuestMemory, mut channel: Channel) -> Ahead {
        let copied = guest.regions.iter().filter(|region| region.memory.is_copied_in());
        let largest = copied.map(|region| 1 << region.unit_shift()).max().unwrap_or(0);
        channel.widen(AHEAD_BULK_BYTES.max(largest.min(STAGING_BYTES) + HEADER_BYTES));
        Ahead { channel, placed: 0 }
    }
}
