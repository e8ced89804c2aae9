//! Acknowledgements: which pages are cached here, for a source that frees them.
//!
//! One object a lane: neighbouring ranges are merged, and many leave in one send, on the lane that the pages arrived
//! on. A source that does not read them must not make this side's memory grow: surplus ranges are dropped, and the
//! source frees them at the end.

use umem_wire::{HEADER_BYTES, PageRange, transmit};

/// The most ranges that wait to be sent; 32 KiB of headers.
const RANGES_MAX: usize = 1024;

/// Acknowledgements are due when they free this many bytes at the source …
const DUE_BYTES: u64 = 4 << 20;

/// … or when there are this many ranges.
const DUE_RANGES: usize = 64;

/// The ranges to acknowledge on one lane.
pub(crate) struct Acks {
    is_wanted: bool,
    ranges: Vec<PageRange>,
    bytes: u64,
}

impl Acks {
    /// Disabled if the source does not request acknowledgements.
    pub(crate) fn new(is_wanted: bool) -> Acks {
        Acks { is_wanted, ranges: Vec::new(), bytes: 0 }
    }

    /// A range of this many bytes is cached.
    pub(in crate::destination) fn cached(&mut self, range: PageRange, bytes: u64) {
        if !self.is_wanted {
            return;
        }
        let is_full = self.ranges.len() == RANGES_MAX;
        match self.ranges.last_mut() {
            Some(last) if last.region == range.region && last.first + last.pages == range.first => {
                last.pages += range.pages;
            }
            _ if is_full => return,
            _ => self.ranges.push(range),
        }
        self.bytes += bytes;
    }

    /// Drops all ranges: the lane is lost, and the have frames of the recovery cover them.
    pub(in crate::destination) fn clear(&mut self) {
        self.ranges.clear();
        self.bytes = 0;
    }

    pub(in crate::destination) fn is_due(&self) -> bool {
        self.bytes >= DUE_BYTES || self.ranges.len() >= DUE_RANGES
    }

    pub(in crate::destination) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Appends all ranges to `out`, and clears them.
    pub(in crate::destination) fn encode(&mut self, out: &mut Vec<u8>) {
        out.reserve(self.ranges.len() * HEADER_BYTES);
        for range in self.ranges.drain(..) {
            out.extend_from_slice(&transmit::ack_header(range));
        }
        self.bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umem_wire::RegionId;

    fn range(first: u64, pages: u64) -> PageRange {
        PageRange { region: RegionId(0), first, pages }
    }

    #[test]
    fn adjacent_pages_merge_into_one_range_and_many_ranges_are_due() {
        let mut acks = Acks::new(true);
        acks.cached(range(0, 16), 16 << 12);
        acks.cached(range(16, 16), 16 << 12);
        acks.cached(range(40, 8), 8 << 12);
        assert!(!acks.is_due());
        let mut out = Vec::new();
        acks.encode(&mut out);
        let headers = [transmit::ack_header(range(0, 32)), transmit::ack_header(range(40, 8))];
        assert_eq!(out, headers.concat());
        assert!(acks.is_empty());
        acks.cached(range(0, 1024), 4 << 20);
        assert!(acks.is_due());
    }

    #[test]
    fn acknowledgements_are_bounded_and_recorded_only_when_enabled() {
        let mut acks = Acks::new(true);
        (0..5000).for_each(|page| acks.cached(range(2 * page, 1), 4096));
        let mut out = Vec::new();
        acks.encode(&mut out);
        assert_eq!(out.len(), RANGES_MAX * HEADER_BYTES);
        let mut acks = Acks::new(false);
        acks.cached(range(0, 1024), 4 << 20);
        assert!(!acks.is_due() && acks.is_empty());
    }
}
