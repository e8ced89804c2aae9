//! Shared by the tests of this folder: random numbers from a seed, and frames to send.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a test may say what it does")]
#![allow(dead_code, reason = "each test uses its part")]

use umem_wire::*;

/// Random numbers (SplitMix64), the same for the same seed everywhere.
#[derive(Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `end - 1`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// True `percent` times of 100.
    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// The byte count of a read of at most `most`: often one, often all, otherwise anything
    /// between.
    pub(crate) fn partial(&mut self, most: u64) -> u64 {
        match self.below(4) {
            0 => 1,
            1 => most,
            _ => 1 + self.below(most),
        }
    }
}

/// The seeds to run: the one in UMEM_SEED, or `0..count`, or UMEM_SIM_SEEDS many. Each seed is
/// printed before it runs, so that a failure shows it last.
pub(crate) fn seeds(count: u64) -> impl Iterator<Item = u64> {
    let many = std::env::var("UMEM_SIM_SEEDS").ok();
    let count = many.map_or(count, |many| many.parse().expect("UMEM_SIM_SEEDS is a number"));
    let only = std::env::var("UMEM_SEED").ok();
    let only = only.map(|seed| seed.parse().expect("UMEM_SEED is a number"));
    let seeds = only.map_or(0..count, |seed: u64| seed..seed + 1);
    seeds.inspect(|seed| println!("UMEM_SEED={seed}"))
}

pub(crate) fn region(name: &str, pages: u64, page_size: PageSize) -> Region {
    Region { name: name.into(), bytes: pages * page_size.bytes(), page_size }
}

/// 300 pages of 4 KiB, 3 of 2 MiB, 2 of 1 GiB.
pub(crate) fn table() -> RegionTable {
    RegionTable::new(vec![
        region("small", 300, PageSize::SIZE_4K),
        region("large", 3, PageSize::SIZE_2M),
        region("huge", 2, PageSize::SIZE_1G),
    ])
    .expect("a table")
}

/// One valid frame of every kind for [`table`], as bytes; device state with its state.
pub(crate) fn valid_frames() -> Vec<Vec<u8>> {
    let range = PageRange { region: RegionId(0), first: 17, pages: 5 };
    let totals = Totals { data_bytes: 1, zero_bytes: 2, pages_demand: 3, ..Totals::default() };
    let frames = [
        Frame::Data(range),
        Frame::Zero(range),
        Frame::Hole(range),
        Frame::Request(vec![(RegionId(0), 299), (RegionId(2), 1)]),
        Frame::Ack(range),
        Frame::Regions(table()),
        Frame::Ready(table().units()),
        Frame::Stopped { postcopy: true, background: false },
        Frame::DeviceState { bytes: 9 },
        Frame::Load { state_bytes: 9 },
        Frame::Loaded,
        Frame::Switchover { stopped_us: 1000 },
        Frame::Running { us_since_switchover: 2000 },
        Frame::LaneEnd,
        Frame::Complete(totals),
        Frame::Resume(Standing { switched: true, running: Some(77), totals }),
        Frame::Have {
            range: PageRange { region: RegionId(0), first: 0, pages: 300 },
            words: vec![u64::MAX, 0, 0x5a5a, 1, 0xfff],
        },
        Frame::Digests(vec![1, 2, 3]),
        Frame::Rounds,
        Frame::RoundsEnd,
        Frame::Remaining { runs: vec![range, range], last: true },
        Frame::Settled,
        Frame::Ping(4),
        Frame::Pong(5),
        Frame::Error(Fault::new(FaultCode::HostFailed, "the guest is gone")),
    ];
    let encode = |frame: Frame| {
        let mut bytes = Vec::new();
        transmit::encode(&frame, &mut bytes);
        if let Frame::DeviceState { bytes: state } = frame {
            bytes.extend(std::iter::repeat_n(0xa5, state as usize));
        }
        bytes
    };
    frames.map(encode).into()
}

/// A receiver for each end of each kind of lane. All know [`table`] as the landing table; on the
/// demand lanes it may still come, or be answered. The last two are of demand lanes that replace
/// lost ones, before and after the destination's standing.
pub(crate) fn receivers() -> [Receiver; 6] {
    let standing = Standing { switched: true, running: None, totals: Totals::default() };
    let mut resume = Vec::new();
    transmit::encode(&Frame::Resume(standing), &mut resume);
    let mut resumed = Receiver::for_resumed_source(&table());
    resumed.control(&resume).expect("a resume frame");
    assert_eq!(resumed.poll_event(), Some(Event::Resume(standing)));
    let mut receivers = [
        Receiver::for_destination(LaneRole::Demand),
        Receiver::for_destination(LaneRole::Bulk),
        Receiver::for_source(&table()),
        Receiver::for_source_bulk(),
        Receiver::for_resumed_source(&table()),
        resumed,
    ];
    for receiver in &mut receivers {
        receiver.set_regions(&table());
    }
    receivers
}

/// The frame of an event; none for the start of a run.
pub(crate) fn frame(event: &Event) -> Option<Frame> {
    Some(match event.clone() {
        Event::RunBegins(_) | Event::Accounted => return None,
        Event::Data(range) => Frame::Data(range),
        Event::Zero(range) => Frame::Zero(range),
        Event::Hole(range) => Frame::Hole(range),
        Event::Request(pages) => Frame::Request(pages),
        Event::Ack(range) => Frame::Ack(range),
        Event::Regions(table) => Frame::Regions(table),
        Event::Ready(landing) => Frame::Ready(landing.units()),
        Event::Stopped { postcopy, background } => Frame::Stopped { postcopy, background },
        Event::DeviceState(state) => Frame::DeviceState { bytes: state.len() as u32 },
        Event::Load { state_bytes } => Frame::Load { state_bytes },
        Event::Loaded => Frame::Loaded,
        Event::Switchover { stopped_us } => Frame::Switchover { stopped_us },
        Event::Running { us_since_switchover } => Frame::Running { us_since_switchover },
        Event::LaneEnd => Frame::LaneEnd,
        Event::Complete(totals) => Frame::Complete(totals),
        Event::Resume(standing) => Frame::Resume(standing),
        Event::Have { range, words } => Frame::Have { range, words },
        Event::Digests(digests) => Frame::Digests(digests),
        Event::Rounds => Frame::Rounds,
        Event::RoundsEnd => Frame::RoundsEnd,
        Event::Remaining { runs, last } => Frame::Remaining { runs, last },
        Event::Settled => Frame::Settled,
        Event::Ping(number) => Frame::Ping(number),
        Event::Pong(number) => Frame::Pong(number),
        Event::Error(fault) => Frame::Error(fault),
    })
}
