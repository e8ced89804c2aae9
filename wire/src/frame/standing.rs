//! Where an end stands: what it has moved, and whose the guest is.

use crate::bytes::u64_at;

/// Bytes of a complete frame's body.
pub(super) const TOTALS_BYTES: usize = 40;

const _: () = assert!(TOTALS_BYTES == size_of::<Totals>());

/// Where the destination stands when a session goes on.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Standing {
    /// The switchover has come: the guest is the destination's. If not, it has to be sent again.
    pub switched: bool,
    /// The guest runs there, and since how many µs after the switchover frame's arrival. Only after the
    /// switchover.
    pub running: Option<u64>,
    /// What has come in all so far.
    pub totals: Totals,
}

/// What one end has sent or received in all.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Bytes of pages in data runs.
    pub data_bytes: u64,
    /// Bytes of pages in zero runs.
    pub zero_bytes: u64,
    /// Bytes of pages in hole runs.
    pub hole_bytes: u64,
    /// Pages that somebody waited for.
    pub pages_demand: u64,
    /// Pages that nobody waited for.
    pub pages_background: u64,
}

impl Totals {
    /// Bytes of all pages, however they came. What a peer counts may be anything: the sum stays in range.
    pub fn bytes(&self) -> u64 {
        self.data_bytes.saturating_add(self.zero_bytes).saturating_add(self.hole_bytes)
    }

    /// Pages, whether somebody waited for them or not, in the same way.
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
