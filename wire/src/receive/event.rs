//! The events of a receiver.

use crate::fault::Fault;
use crate::frame::Standing;
use crate::frame::{Kind, Totals};
use crate::region::{PageRange, RegionId, RegionTable};
#[cfg(doc)]
use {super::Receiver, crate::frame::Frame, crate::limits::*};

/// An event on a lane. Region numbers are the source's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A data run's header came: its pages may be claimed before their first byte lands.
    RunBegins(PageRange),
    /// Every byte of the last begun run has landed.
    Data(PageRange),
    /// These pages are zeroes.
    Zero(PageRange),
    /// These pages are holes of the source's file.
    Hole(PageRange),
    /// A vCPU at the destination waits for these pages, 1 to [`REQUEST_ENTRIES_MAX`]; all exist.
    Request(Vec<(RegionId, u64)>),
    /// The destination has cached these pages.
    Ack(PageRange),
    /// The source's table of regions. Frames may name pages after the caller has answered it and
    /// given this receiver the landing table ([`Receiver::set_regions`]).
    Regions(RegionTable),
    /// See [`Frame::Ready`]. The landing table, in whose units this receiver counts pages from here
    /// on.
    Ready(RegionTable),
    /// See [`Frame::Stopped`].
    Stopped {
        /// Whether pages are sent after the switchover.
        postcopy: bool,
        /// Whether pages are sent without a request.
        background: bool,
    },
    /// The next piece of device state, 1 to [`STATE_CHUNK_BYTES_MAX`] bytes.
    DeviceState(Vec<u8>),
    /// See [`Frame::Load`].
    Load {
        /// Bytes in all pieces of the device state.
        state_bytes: u64,
    },
    /// See [`Frame::Loaded`].
    Loaded,
    /// See [`Frame::Switchover`].
    Switchover {
        /// µs since the source's guest stopped.
        stopped_us: u64,
    },
    /// See [`Frame::Running`].
    Running {
        /// µs since the switchover frame arrived at the destination.
        us_since_switchover: u64,
    },
    /// The lane's last frame.
    LaneEnd,
    /// See [`Frame::Complete`].
    Complete(Totals),
    /// See [`Frame::Resume`].
    Resume(Standing),
    /// See [`Frame::Have`]; each page comes once, in order.
    Have {
        /// The pages.
        range: PageRange,
        /// One bit a page, words of 64.
        words: Vec<u64>,
    },
    /// See [`Frame::Digests`]: one for each region.
    Digests(Vec<u64>),
    /// See [`Frame::Rounds`].
    Rounds,
    /// See [`Frame::RoundsEnd`].
    RoundsEnd,
    /// See [`Frame::Remaining`]; all pages exist.
    Remaining {
        /// Runs of pages that are still to come.
        runs: Vec<PageRange>,
        /// Whether these are the last runs.
        last: bool,
    },
    /// See [`Frame::Settled`].
    Settled,
    /// The last have frame has come: the account covers every page.
    Accounted,
    /// Asks for a pong of this number.
    Ping(u64),
    /// The answer to the ping of this number.
    Pong(u64),
    /// The peer gives up.
    Error(Fault),
}

impl Event {
    /// The event's name, for messages.
    pub fn name(&self) -> &'static str {
        let kind = match self {
            Event::RunBegins(_) => return "the start of a data run",
            Event::Accounted => return "the end of an account",
            Event::Data(_) => Kind::Data,
            Event::Zero(_) => Kind::Zero,
            Event::Hole(_) => Kind::Hole,
            Event::Request(_) => Kind::Request,
            Event::Ack(_) => Kind::Ack,
            Event::Regions(_) => Kind::Regions,
            Event::Ready(_) => Kind::Ready,
            Event::Stopped { .. } => Kind::Stopped,
            Event::DeviceState(_) => Kind::DeviceState,
            Event::Load { .. } => Kind::Load,
            Event::Loaded => Kind::Loaded,
            Event::Switchover { .. } => Kind::Switchover,
            Event::Running { .. } => Kind::Running,
            Event::LaneEnd => Kind::LaneEnd,
            Event::Complete(_) => Kind::Complete,
            Event::Resume(_) => Kind::Resume,
            Event::Have { .. } => Kind::Have,
            Event::Digests(_) => Kind::Digests,
            Event::Rounds => Kind::Rounds,
            Event::RoundsEnd => Kind::RoundsEnd,
            Event::Remaining { .. } => Kind::Remaining,
            Event::Settled => Kind::Settled,
            Event::Ping(_) => Kind::Ping,
            Event::Pong(_) => Kind::Pong,
            Event::Error(_) => Kind::Error,
        };
        kind.name()
    }
}

/// Every event once, for the tests of the phases.
#[cfg(test)]
pub(crate) fn one_of_each() -> Vec<Event> {
    use crate::fault::FaultCode;
    use crate::region::{PageSize, Region};
    let (region, page_size) = (RegionId(0), PageSize::SIZE_4K);
    let range = PageRange { region, first: 0, pages: 1 };
    let ram = Region { name: "ram".into(), bytes: page_size.bytes(), page_size };
    let table = RegionTable::new(vec![ram]).expect("a table");
    vec![
        Event::RunBegins(range),
        Event::Data(range),
        Event::Zero(range),
        Event::Hole(range),
        Event::Request(vec![(region, 0)]),
        Event::Ack(range),
        Event::Regions(table.clone()),
        Event::Ready(table),
        Event::Stopped { postcopy: true, background: true },
        Event::DeviceState(vec![0xa5]),
        Event::Load { state_bytes: 1 },
        Event::Loaded,
        Event::Switchover { stopped_us: 1 },
        Event::Running { us_since_switchover: 1 },
        Event::LaneEnd,
        Event::Complete(Totals::default()),
        Event::Resume(Standing { switched: true, running: Some(1), totals: Totals::default() }),
        Event::Have { range, words: vec![1] },
        Event::Accounted,
        Event::Digests(vec![5]),
        Event::Rounds,
        Event::RoundsEnd,
        Event::Remaining { runs: vec![range], last: true },
        Event::Settled,
        Event::Ping(1),
        Event::Pong(1),
        Event::Error(Fault::new(FaultCode::Other, "why")),
    ]
}
