//! The choice of a path, and each path over a socket of the test.

use std::io::Write;
use std::os::unix::net::UnixStream;

use umem_ring::{Config, Wait};
use umem_wire::{Frame, PageSize, Region, RegionId, transmit};

use super::*;
use crate::destination::memory::fixture::Guest;
use crate::memory::kind::{Backing, Kind};
use crate::memory::pages::PageState;

fn memory(kind: Kind, backing: Backing, shift: u8) -> RegionMemory {
    let memory = RegionMemory { kind, backing, page_shift: shift, unit_shift: shift };
    memory.assert_possible();
    memory
}

/// The paths of a demand lane, of a bulk lane, and of a bulk lane with checksums.
fn ways(regions: &[RegionMemory]) -> [Choice; 3] {
    [(LaneRole::Demand, false), (LaneRole::Bulk, false), (LaneRole::Bulk, true)].map(
        |(role, is_checked)| {
            let facts = Facts { role, is_secured: false, is_checked };
            Choice::of(facts, regions.iter().copied())
        },
    )
}

#[test]
fn landing_method_follows_from_lane_role_and_memory_kind() {
    let small = memory(Kind::Shared, Backing::Small, 12);
    let private = memory(Kind::Private, Backing::Small, 12);
    let huge = memory(Kind::Shared, Backing::Huge, 12);
    let hugetlb = memory(Kind::Shared, Backing::Hugetlb, 21);
    let anonymous = memory(Kind::Anonymous, Backing::Small, 12);
    let anonymous_huge = memory(Kind::Anonymous, Backing::Hugetlb, 21);
    let in_units = RegionMemory { unit_shift: 21, ..small };
    use Choice::{Ahead, Exact, Spliced};
    for (regions, expected) in [
        (&[small][..], [Ahead, Spliced, Ahead]),
        (&[private], [Ahead, Spliced, Ahead]),
        (&[small, private], [Ahead, Spliced, Ahead]),
        (&[anonymous], [Ahead, Ahead, Ahead]),
        (&[small, anonymous], [Ahead, Ahead, Ahead]),
        (&[huge], [Ahead, Exact, Exact]),
        (&[huge, small], [Ahead, Exact, Exact]),
        (&[hugetlb], [Exact, Exact, Exact]),
        (&[anonymous_huge], [Exact, Exact, Exact]),
        (&[in_units], [Exact, Exact, Exact]),
        (&[in_units, small], [Exact, Exact, Exact]),
    ] {
        assert_eq!(ways(regions), expected, "{regions:?}");
    }
}

#[test]
fn checksummed_lane_lands_by_records_in_every_memory_kind() {
    let facts = Facts { role: LaneRole::Bulk, is_secured: true, is_checked: false };
    for backing in [Backing::Small, Backing::Huge, Backing::Hugetlb] {
        let shift = if backing == Backing::Hugetlb { 21 } else { 12 };
        let regions = [memory(Kind::Shared, backing, shift)];
        assert_eq!(Choice::of(facts, regions.into_iter()), Choice::Records);
    }
}

/// Numbers that depend on a seed alone (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)) % end
    }
}

/// Pages of the guest in these tests.
const PAGES: u64 = 1024;

/// A whole lane that brings every page once, and the guest's memory afterwards. Half of its runs are short, and some
/// are long enough for a pipe.
fn lane_and_memory(numbers: &mut Numbers) -> (Vec<u8>, Vec<u8>) {
    let (mut lane, mut memory) = (Vec::new(), Vec::new());
    let mut first = 0;
    while first < PAGES {
        let longest = if numbers.below(2) == 0 { 3 } else { 100 };
        let pages = (1 + numbers.below(longest)).min(PAGES - first);
        let range = PageRange { region: RegionId(0), first, pages };
        let bytes = (pages << 12) as usize;
        match numbers.below(4) {
            0 => lane.extend(transmit::zero_header(range)),
            1 => lane.extend(transmit::hole_header(range)),
            _ => {
                lane.extend(transmit::data_header(range));
                let contents =
                    (memory.len()..memory.len() + bytes).map(|at| ((at * 31) >> 5) as u8 | 1);
                memory.extend(contents);
                lane.extend(&memory[memory.len() - bytes..]);
            }
        }
        first += pages;
        memory.resize((first << 12) as usize, 0);
    }
    transmit::encode(&Frame::LaneEnd, &mut lane);
    (lane, memory)
}

/// Makes a reader of small pages with this path.
fn reader(lane: &Lane, guest: Arc<GuestMemory>, choice: Choice) -> LaneReader {
    let page_size = PageSize::SIZE_4K;
    let region = Region { name: "ram".into(), bytes: PAGES << 12, page_size };
    let table = RegionTable::new(vec![region]).unwrap();
    let mut reader = LaneReader::bulk(lane, &table, guest, None);
    assert!(matches!(reader.way, Way::Spliced(_)), "the way of small pages of a file");
    let channel = || Channel::clear(AHEAD_BULK_BYTES);
    match choice {
        Choice::Exact => reader.way = Way::Exact(Exact::new()),
        Choice::Ahead => reader.way = Way::Ahead(ReadAhead::new(channel())),
        Choice::Spliced => {}
        Choice::Records => unreachable!("records need a handshake"),
    }
    reader
}

fn bulk_lane() -> (UnixStream, Lane) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (ours, Lane::new(theirs.into(), "bulk lane 1".into()).unwrap())
}

fn nobody_waits(page: PageId) {
    panic!("no vCPU waits for {page:?}");
}

/// A lane that arrives in any pieces, on every path, leaves the sent bytes in the guest's memory. The path's
/// invariant is asserted after each completion.
#[test]
fn every_landing_method_lands_a_lane_received_in_pieces() {
    for (seed, choice) in (0..4)
        .flat_map(|seed| [Choice::Exact, Choice::Ahead, Choice::Spliced].map(|way| (seed, way)))
    {
        let guest = Guest::of(PAGES, 12);
        let memory = Arc::new(guest.memory);
        let mut numbers = Numbers(seed);
        let (bytes, expected) = lane_and_memory(&mut numbers);
        let (mut ours, lane) = bulk_lane();
        let writer = std::thread::spawn(move || {
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                // Some pieces end in a header.
                let largest = if numbers.below(3) == 0 { 100 } else { 300_000 };
                let count = 1 + numbers.below(largest.min(rest.len() as u64)) as usize;
                ours.write_all(&rest[..count]).unwrap();
                rest = &rest[count..];
            }
        });
        let mut reader = reader(&lane, memory.clone(), choice);
        let mut ring = Ring::new(&Config::default()).unwrap();
        let (mut has_ended, mut pages, mut is_last) = (false, 0, false);
        let mut arrived = |arrived: Arrived| -> Result<()> {
            match arrived {
                Arrived::Run { range, last } => {
                    pages += range.pages;
                    is_last |= last;
                }
                Arrived::Other(Event::LaneEnd) => has_ended = true,
                Arrived::Other(other) => panic!("{other:?}"),
            }
            Ok(())
        };
        reader.begin(&mut ring, nobody_waits, &mut arrived).unwrap();
        while !reader.is_quiet() {
            ring.enter(Wait::One).unwrap();
            while let Some(completion) = ring.next() {
                reader.complete(&mut ring, completion, nobody_waits, &mut arrived).unwrap();
            }
        }
        writer.join().unwrap();
        assert!(has_ended && is_last && pages == PAGES, "{choice:?} of seed {seed}: {pages} pages");
        let states = &memory.region(RegionId(0)).pages;
        assert!((0..PAGES).all(|page| states.get(page) == PageState::Cached));
        let landed = guest.mapping.read(0, PAGES << 12).unwrap();
        assert!(landed == expected, "{choice:?} of seed {seed}: other bytes");
    }
}

#[test]
#[should_panic(expected = "something is always in flight")]
fn lane_without_a_pending_receive_violates_its_invariant() {
    let (_ours, lane) = bulk_lane();
    let guest = Arc::new(Guest::of(PAGES, 12).memory);
    reader(&lane, guest, Choice::Ahead).assert_invariants();
}

/// With checksums the CPU must read a page, and it does not read spliced pages.
#[test]
#[should_panic(expected = "spliced pages cannot be checked")]
fn spliced_lane_with_checksums_violates_its_invariant() {
    let (_ours, lane) = bulk_lane();
    let guest = Arc::new(Guest::of(PAGES, 12).memory);
    let mut reader = reader(&lane, guest, Choice::Spliced);
    reader.core.receiver = Receiver::for_destination(LaneRole::Bulk).checked(true);
    let mut ring = Ring::new(&Config::default()).unwrap();
    reader.arm(&mut ring).unwrap();
    reader.assert_invariants();
}
