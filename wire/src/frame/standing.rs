//! The state of an end: the bytes that it has moved, and the side that has the guest.

use crate::bytes::u64_at;

/// Bytes of a complete frame's body.
pub(super) const TOTALS_BYTES: usize = 40;

const _: () = assert!(TOTALS_BYTES == size_of::<Totals>());

/// The destination's standing when a session resumes.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Standing {
    /// The switchover has come: the guest is the destination's. If not, the source has to send it
    /// again.
    pub switched: bool,
    /// µs from the switchover frame's arrival to the guest's start; none if the guest does not run.
    /// Only after the switchover.
    pub running: Option<u64>,
    /// Totals received so far.
    pub totals: Totals,
}

/// Totals that one end has sent or received.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Bytes of pages in data runs.
    pub data_bytes: u64,
    /// Bytes of pages in zero runs.
    pub zero_bytes: u64,
    /// Bytes of pages in hole runs.
    pub hole_bytes: u64,
    /// Pages sent for a request.
    pub pages_demand: u64,
    /// Pages sent without a request.
    pub pages_background: u64,
}

impl Totals {
    /// Bytes of all pages of every form. Saturates, as a peer's counts may be anything.
    pub fn bytes(&self) -> u64 {
        self.data_bytes.saturating_add(self.zero_bytes).saturating_add(self.hole_bytes)
    }

    /// Pages of both origins. Saturates in the same way.
    pub fn pages(&self) -> u64 {
        self.pages_demand.saturating_add(self.pages_background)
    }

    pub(crate) fn encode(&self) -> [u8; TOTALS_BYTES] {
        let Totals { data_bytes, zero_bytes, hole_bytes, pages_demand, pages_background } = *self;
        let mut out = [0; TOTALS_BYTES];
        let fields = [data_bytes, zero_bytes, hole_bytes, pages_demand, pages_background];
        for (out, field) in out.as_chunks_mut::<8>().0.iter_mut().zip(fields) {
            *out = field.to_le_bytes();
        }
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Totals {
        Totals {
            data_bytes: u64_at(bytes, 0),
            zero_bytes: u64_at(bytes, 8),
            hole_bytes: u64_at(bytes, 16),
            pages_demand: u64_at(bytes, 24),
            pages_background: u64_at(bytes, 32),
        }
    }
}
