//! The frames of one end, as a fuzzer generates them: valid frames over one table of regions.

use arbitrary::Arbitrary;
use umem_wire::limits::{REMAINING_RUNS_MAX, REQUEST_ENTRIES_MAX, STATE_CHUNK_BYTES_MAX};
use umem_wire::{
    Event, Fault, FaultCode, Frame, PageRange, PageSize, Region, RegionId, RegionTable, Standing,
    Totals,
};

/// One or several pages: brought into [`table`] by [`Pages::range`].
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct Pages {
    region: u8,
    first: u16,
    pages: u16,
}

/// A frame in short form. A new kind of frame is a variant here.
#[derive(Arbitrary, Clone, Debug)]
pub(crate) enum Word {
    Data(Pages),
    Zero(Pages),
    Hole(Pages),
    Request(Vec<Pages>),
    Ack(Pages),
    Regions,
    Ready,
    Stopped { postcopy: bool, background: bool },
    DeviceState { bytes: u16 },
    Load { state_bytes: u64 },
    Loaded,
    Switchover { stopped_us: u64 },
    Running { us_since_switchover: u64 },
    LaneEnd,
    Complete([u64; 5]),
    Ping(u64),
    Pong(u64),
    Error { code: u16, text: String },
    Resume { switched: bool, running: Option<u64>, totals: [u64; 5] },
    Have([u64; 5]),
    Digests([u64; 3]),
    Rounds,
    RoundsEnd,
    Remaining { runs: Vec<Pages>, last: bool },
    Settled,
}

/// 300 pages of 4 KiB, 3 of 2 MiB, 2 of 1 GiB.
pub(crate) fn table() -> RegionTable {
    let region = |name: &str, pages, page_size: PageSize| Region {
        name: name.into(),
        bytes: pages * page_size.bytes(),
        page_size,
    };
    RegionTable::new(vec![
        region("small", 300, PageSize::SIZE_4K),
        region("large", 3, PageSize::SIZE_2M),
        region("huge", 2, PageSize::SIZE_1G),
    ])
    .expect("a table")
}

impl Pages {
    /// In the table; `is_run` bounds it to one data run.
    fn range(self, is_run: bool) -> PageRange {
        let table = table();
        let region = RegionId(u16::from(self.region) % table.len() as u16);
        let known = table.get(region).expect("within the table");
        let first = u64::from(self.first) % known.pages();
        let left = known.pages() - first;
        let most = if is_run { left.min(known.page_size.run_pages_max()) } else { left };
        PageRange { region, first, pages: 1 + u64::from(self.pages) % most }
    }
}

impl Word {
    /// The encoded frame. Pages or device state behind it are as long as the frame announces.
    pub(crate) fn frame(&self) -> Frame {
        match self.clone() {
            Word::Data(pages) => Frame::Data(pages.range(true)),
            Word::Zero(pages) => Frame::Zero(pages.range(false)),
            Word::Hole(pages) => Frame::Hole(pages.range(false)),
            Word::Request(pages) => {
                let pages = pages.iter().take(REQUEST_ENTRIES_MAX).map(|pages| {
                    let range = pages.range(false);
                    (range.region, range.first)
                });
                let pages: Vec<_> = pages.collect();
                // A request has at least one page.
                Frame::Request(if pages.is_empty() { vec![(RegionId(0), 0)] } else { pages })
            }
            Word::Ack(pages) => Frame::Ack(pages.range(false)),
            Word::Regions => Frame::Regions(table()),
            Word::Ready => Frame::Ready(table().units()),
            Word::Stopped { postcopy, background } => Frame::Stopped { postcopy, background },
            Word::DeviceState { .. } => Frame::DeviceState { bytes: self.state_bytes() },
            Word::Load { state_bytes } => Frame::Load { state_bytes },
            Word::Loaded => Frame::Loaded,
            Word::Switchover { stopped_us } => Frame::Switchover { stopped_us },
            Word::Running { us_since_switchover } => Frame::Running { us_since_switchover },
            Word::LaneEnd => Frame::LaneEnd,
            Word::Complete(totals) => Frame::Complete(totals_of(totals)),
            Word::Ping(number) => Frame::Ping(number),
            Word::Pong(number) => Frame::Pong(number),
            Word::Error { code, text } => Frame::Error(fault(code, &text)),
            Word::Resume { switched, running, totals } => {
                let running = running.filter(|_| switched);
                Frame::Resume(Standing { switched, running, totals: totals_of(totals) })
            }
            Word::Digests(digests) => Frame::Digests(digests.into()),
            Word::Rounds => Frame::Rounds,
            Word::RoundsEnd => Frame::RoundsEnd,
            Word::Remaining { runs, last } => {
                let runs = runs.iter().take(REMAINING_RUNS_MAX).map(|pages| pages.range(false));
                Frame::Remaining { runs: runs.collect(), last }
            }
            Word::Settled => Frame::Settled,
            Word::Have(mut words) => {
                // 300 pages are four words and 44 bits.
                words[4] &= (1 << 44) - 1;
                let range = PageRange { region: RegionId(0), first: 0, pages: 300 };
                Frame::Have { range, words: words.into() }
            }
        }
    }

    /// The event of its receiver.
    pub(crate) fn event(&self) -> Event {
        match self.frame() {
            Frame::Data(range) => Event::Data(range),
            Frame::Zero(range) => Event::Zero(range),
            Frame::Hole(range) => Event::Hole(range),
            Frame::Request(pages) => Event::Request(pages),
            Frame::Ack(range) => Event::Ack(range),
            Frame::Regions(table) => Event::Regions(table),
            Frame::Ready(_) => Event::Ready(table()),
            Frame::Stopped { postcopy, background } => Event::Stopped { postcopy, background },
            Frame::DeviceState { bytes } => Event::DeviceState(vec![0xa5; bytes as usize]),
            Frame::Load { state_bytes } => Event::Load { state_bytes },
            Frame::Loaded => Event::Loaded,
            Frame::Switchover { stopped_us } => Event::Switchover { stopped_us },
            Frame::Running { us_since_switchover } => Event::Running { us_since_switchover },
            Frame::LaneEnd => Event::LaneEnd,
            Frame::Complete(totals) => Event::Complete(totals),
            Frame::Ping(number) => Event::Ping(number),
            Frame::Pong(number) => Event::Pong(number),
            Frame::Error(fault) => Event::Error(fault),
            Frame::Resume(standing) => Event::Resume(standing),
            Frame::Have { range, words } => Event::Have { range, words },
            Frame::Digests(digests) => Event::Digests(digests),
            Frame::Rounds => Event::Rounds,
            Frame::RoundsEnd => Event::RoundsEnd,
            Frame::Remaining { runs, last } => Event::Remaining { runs, last },
            Frame::Settled => Event::Settled,
        }
    }

    /// Bytes of device state that follow the frame.
    pub(crate) fn state_bytes(&self) -> u32 {
        match self {
            Word::DeviceState { bytes } => 1 + u32::from(*bytes) % STATE_CHUNK_BYTES_MAX as u32,
            _ => 0,
        }
    }
}

fn totals_of(totals: [u64; 5]) -> Totals {
    let [data_bytes, zero_bytes, hole_bytes, pages_demand, pages_background] = totals;
    Totals { data_bytes, zero_bytes, hole_bytes, pages_demand, pages_background }
}

fn fault(code: u16, text: &str) -> Fault {
    Fault::new(FaultCode::from_number(code).unwrap_or(FaultCode::Other), text)
}
