//! Pre-paging: recognises sequences of accesses in a guest's requests, so that the background sends
//! ahead of them.
//!
//! A guest that reads through its memory, upwards, downwards or with a stride, requests a page,
//! then the first one beyond the pages sent ahead, and so on. Each time its sequence continues,
//! twice as much is sent ahead of it, as a kernel's readahead does; these pages have to be sent
//! anyway. The demand thread recognises sequences ([`Detector`]), bulk lanes follow them
//! ([`Followed`]), several in turns.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Mutex, PoisonError, TryLockError};

use umem_wire::RegionId;

/// Sequences, and demands that may become sequences, that are remembered at a time.
const SLOTS: usize = 8;

/// A demand within this distance of the last one continues it page by page.
const NEAR_BYTES: u64 = 256 << 10;

/// Demands further apart than this do not make a stride.
const STRIDE_BYTES_MAX: u64 = 16 << 20;

/// Bytes sent ahead of a new sequence, before the first doubling.
const AHEAD_BYTES: u64 = 256 << 10;

/// Pages sent ahead of a new sequence with a stride, before the first doubling.
const AHEAD_STRIDES: u64 = 16;

/// How often the amount sent ahead doubles: up to 64 MiB, or 4096 pages of a stride.
const DOUBLINGS_MAX: u32 = 8;

/// A sequence that has not continued for this many demands makes room for another one.
const STALE_DEMANDS: u64 = 64;

/// Pages that a vCPU will want soon: `last + step`, `last + 2 * step` and so on, `ahead` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    id: u64,
    region: RegionId,
    last: u64,
    /// In pages; 1 or -1 for consecutive pages.
    step: i64,
    ahead: u64,
}

/// The sequences that the demand thread shows to the bulk lanes.
#[derive(Default)]
pub(crate) struct Sequences {
    version: AtomicU64,
    current: Mutex<[Option<Sequence>; SLOTS]>,
}

/// Recognises sequences. Owned by the demand thread, which never waits for a bulk lane here.
#[derive(Default)]
pub(crate) struct Detector {
    slots: [Option<Slot>; SLOTS],
    demands: u64,
    /// The slots have changed since they were shown.
    is_news: bool,
}

/// A demand, and the sequence that followed it.
#[derive(Clone, Copy)]
struct Slot {
    id: u64,
    region: RegionId,
    last: u64,
    /// Distance to the demand before it; 0 without one.
    step: i64,
    /// How often the sequence has continued; 0 if it is none yet.
    hits: u32,
    /// When it last continued, in demands.
    at: u64,
}

impl Detector {
    /// Processes a demand for a page of a region whose landing units are `unit` bytes.
    pub(crate) fn demand(&mut self, region: RegionId, page: u64, unit: u64) {
        self.demands += 1;
        let at = self.demands;
        let near = (NEAR_BYTES / unit).max(2);
        let mut slots = self.slots.iter_mut().flatten().filter(|slot| slot.region == region);
        if let Some(slot) = slots.find(|slot| slot.is_continued_by(page, unit)) {
            let forward = page.wrapping_sub(slot.last).cast_signed().signum() == slot.step.signum();
            slot.at = at;
            if forward {
                (slot.last, slot.hits) = (page, slot.hits + 1);
                self.is_news = true;
            }
            return;
        }
        let single = |slot: &Slot| slot.hits == 0 && slot.region == region;
        for slot in self.slots.iter_mut().flatten().filter(|slot| single(slot)) {
            let delta = page.wrapping_sub(slot.last).cast_signed();
            if delta == slot.step || delta.unsigned_abs() <= near {
                let step = if delta.unsigned_abs() <= near { delta.signum() } else { delta };
                *slot = Slot { last: page, step, hits: 1, at, ..*slot };
                self.is_news |= step != 0;
                return;
            }
        }
        let far = STRIDE_BYTES_MAX / unit;
        for slot in self.slots.iter_mut().flatten().filter(|slot| single(slot)) {
            let delta = page.wrapping_sub(slot.last).cast_signed();
            if slot.step == 0 && delta.unsigned_abs() <= far {
                *slot = Slot { last: page, step: delta, at, ..*slot };
                return;
            }
        }
        let oldest = self.slots.iter_mut().min_by_key(|slot| match slot {
            None => (0, 0),
            Some(slot) if slot.hits == 0 => (1, slot.at),
            Some(slot) if at - slot.at > STALE_DEMANDS => (1, 0),
            Some(slot) => (2, slot.at),
        });
        let oldest = oldest.expect("at least one slot");
        let is_busy = oldest.is_some_and(|slot| slot.hits > 0 && at - slot.at <= STALE_DEMANDS);
        if !is_busy {
            *oldest = Some(Slot { id: at, region, last: page, step: 0, hits: 0, at });
        }
    }

    /// Shows changes to the bulk lanes; later, if one of them is reading.
    pub(crate) fn show(&mut self, shared: &Sequences, unit: impl Fn(RegionId) -> u64) {
        if !self.is_news {
            return;
        }
        let mut current = match shared.current.try_lock() {
            Ok(current) => current,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        self.is_news = false;
        *current = self.slots.map(|slot| {
            slot.filter(|slot| slot.hits > 0 && slot.step != 0).map(|slot| Sequence {
                id: slot.id,
                region: slot.region,
                last: slot.last,
                step: slot.step,
                ahead: slot.ahead(unit(slot.region)),
            })
        });
        drop(current);
        shared.version.fetch_add(1, Release);
    }
}

impl Slot {
    /// Pages to send ahead of it.
    fn ahead(&self, unit: u64) -> u64 {
        let first = if self.step.unsigned_abs() == 1 { AHEAD_BYTES / unit } else { AHEAD_STRIDES };
        first.max(1) << self.hits.min(DOUBLINGS_MAX)
    }

    /// Whether a demand belongs to this sequence: within the pages sent ahead, or just behind them.
    fn is_continued_by(&self, page: u64, unit: u64) -> bool {
        if self.hits == 0 || self.step == 0 {
            return false;
        }
        let delta = page.wrapping_sub(self.last).cast_signed();
        let steps = delta / self.step;
        let near = (NEAR_BYTES / unit).max(2).cast_signed();
        let most = self.ahead(unit).cast_signed() + near;
        delta % self.step == 0 && (-near..=most).contains(&steps)
    }
}

/// The next pages to process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) region: RegionId,
    pub(crate) first: u64,
    /// 1 to 64, in one word of 64.
    pub(crate) pages: u64,
}

/// The sequences that one bulk lane follows, and its progress.
#[derive(Default)]
pub(crate) struct Followed {
    version: u64,
    cursors: [Option<Cursor>; SLOTS],
    turn: usize,
}

#[derive(Clone, Copy)]
struct Cursor {
    sequence: Sequence,
    /// Processed pages of it, counted from its `last`.
    done: u64,
}

impl Followed {
    /// The next pages to process; none if the lanes are ahead of every sequence. `limits` gives the
    /// number of a region's pages, and the most pages to process at once.
    pub(crate) fn next(
        &mut self,
        shared: &Sequences,
        limits: impl Fn(RegionId) -> (u64, u64),
    ) -> Option<Piece> {
        self.look(shared);
        for _ in 0..SLOTS {
            self.turn = (self.turn + 1) % SLOTS;
            let Some(cursor) = &mut self.cursors[self.turn] else { continue };
            let (pages, most) = limits(cursor.sequence.region);
            let piece = cursor.advance(most, pages);
            if piece.is_some() {
                return piece;
            }
        }
        None
    }

    fn look(&mut self, shared: &Sequences) {
        let version = shared.version.load(Acquire);
        if version == self.version {
            return;
        }
        self.version = version;
        let current = *shared.current.lock().unwrap_or_else(PoisonError::into_inner);
        for (cursor, sequence) in self.cursors.iter_mut().zip(current) {
            let same = |cursor: &Cursor| sequence.is_some_and(|s| s.id == cursor.sequence.id);
            let before = cursor.filter(same);
            *cursor = sequence.map(|sequence| Cursor {
                done: before.map_or(0, |before| before.done_of(&sequence)),
                sequence,
            });
        }
    }
}

impl Cursor {
    /// How many pages of a later state of the same sequence have been processed.
    fn done_of(&self, later: &Sequence) -> u64 {
        let moved = later.last.wrapping_sub(self.sequence.last).cast_signed() / later.step;
        self.done.saturating_sub(moved.max(0).cast_unsigned())
    }

    fn advance(&mut self, most: u64, region_pages: u64) -> Option<Piece> {
        let Sequence { region, last, step, ahead, .. } = self.sequence;
        if self.done >= ahead {
            return None;
        }
        let next = i64::try_from(self.done + 1)
            .ok()
            .and_then(|steps| steps.checked_mul(step))
            .and_then(|delta| last.checked_add_signed(delta))
            .filter(|&page| page < region_pages);
        let Some(next) = next else {
            self.done = ahead;
            return None;
        };
        let left = ahead - self.done;
        let (first, pages) = match step {
            1 => (next, (64 - next % 64).min(region_pages - next).min(left).min(most)),
            -1 => {
                let pages = (next % 64 + 1).min(left).min(most);
                (next + 1 - pages, pages)
            }
            _ => (next, 1),
        };
        self.done += pages;
        Some(Piece { region, first, pages })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 1 << 18;
    const REGION: RegionId = RegionId(0);

    /// Simulates a guest that waits for missing pages, and a lane that is always ahead of it:
    /// returns how many accesses had to wait.
    fn waits(accesses: impl Iterator<Item = u64>) -> usize {
        let (shared, mut detector, mut lane) =
            (Sequences::default(), Detector::default(), Followed::default());
        let mut sent = vec![false; PAGES as usize];
        let mut waits = 0;
        for page in accesses {
            if !std::mem::replace(&mut sent[page as usize], true) {
                waits += 1;
                detector.demand(REGION, page, 4096);
                detector.show(&shared, |_| 4096);
            }
            while let Some(piece) = lane.next(&shared, |_| (PAGES, 64)) {
                assert!(piece.pages >= 1 && piece.first % 64 + piece.pages <= 64);
                let first = piece.first as usize;
                sent[first..first + piece.pages as usize].fill(true);
            }
        }
        waits
    }

    #[test]
    fn sequential_reader_rarely_waits() {
        let forward = waits(0..PAGES);
        assert!(forward < 40, "{forward} waits");
        let backward = waits((0..PAGES).rev());
        assert!(backward < 40, "{backward} waits");
    }

    #[test]
    fn strides_are_followed_page_by_page() {
        for stride in [3, 16, 100, 512, 4000] {
            let accesses = PAGES / stride;
            let waits = waits((0..PAGES).step_by(stride as usize));
            assert!(waits < 30 && waits as u64 * 3 < accesses, "stride {stride}: {waits} waits");
        }
        let down = waits((0..PAGES).rev().step_by(700));
        assert!(down < 20, "{down} waits");
    }

    #[test]
    fn several_readers_are_followed_at_a_time() {
        let starts = [0, 70_000, 140_000, 200_000];
        let accesses = (0..50_000).flat_map(|i| starts.map(|start| start + i));
        let waits = waits(accesses);
        assert!(waits < 160, "{waits} waits");
    }

    #[test]
    fn random_access_is_not_followed() {
        let (shared, mut detector) = (Sequences::default(), Detector::default());
        let (mut draw, mut lane) = (1_u64, Followed::default());
        let mut looked_at = 0;
        for _ in 0..2000 {
            draw = draw
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            detector.demand(REGION, draw >> 46, 4096);
            detector.show(&shared, |_| 4096);
            while let Some(piece) = lane.next(&shared, |_| (PAGES, 64)) {
                looked_at += piece.pages;
            }
        }
        assert!(looked_at < PAGES / 8, "{looked_at} pages");
    }

    #[test]
    fn sequences_stop_at_both_ends_of_memory() {
        assert!(waits((0..100).chain((PAGES - 100..PAGES).rev())) < 20);
        assert!(waits([PAGES - 3, PAGES - 2, PAGES - 1].into_iter()) < 3);
    }

    #[test]
    fn demand_thread_skips_an_update_while_a_lane_reads() {
        let (shared, mut detector) = (Sequences::default(), Detector::default());
        [5, 6, 7].into_iter().for_each(|page| detector.demand(REGION, page, 4096));
        let looking = shared.current.lock().unwrap();
        detector.show(&shared, |_| 4096);
        drop(looking);
        let mut lane = Followed::default();
        assert_eq!(lane.next(&shared, |_| (PAGES, 64)), None);
        detector.show(&shared, |_| 4096);
        assert_eq!(
            lane.next(&shared, |_| (PAGES, 64)),
            Some(Piece { region: REGION, first: 8, pages: 56 })
        );
    }

    #[test]
    fn large_pages_are_followed_too() {
        let (shared, mut detector) = (Sequences::default(), Detector::default());
        [5, 6].into_iter().for_each(|page| detector.demand(REGION, page, 2 << 20));
        detector.show(&shared, |_| 2 << 20);
        let mut lane = Followed::default();
        let pieces: Vec<_> = std::iter::from_fn(|| lane.next(&shared, |_| (8, 64))).collect();
        assert_eq!(pieces, [Piece { region: REGION, first: 7, pages: 1 }]);
    }
}
