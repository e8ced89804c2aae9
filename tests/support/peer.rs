//! A source that a test plays on all of its lanes: sends the frames that the test requests.

use std::io::{Read, Write};
use std::net::TcpStream;

use umem_wire::{
    Capabilities, Event, Frame, HELLO_BYTES, Hello, LaneRole, PROTOCOL, PageRange, PageSize,
    Receiver, Region, RegionId, RegionTable, SessionId, Target, Totals, Welcome, transmit,
};

/// Such a source.
pub(crate) struct Peer {
    /// The demand lane, and the bulk lanes behind it.
    pub(crate) lanes: Vec<TcpStream>,
    receiver: Receiver,
}

impl Peer {
    /// Opens all of its lanes to a destination.
    pub(crate) fn dial(uri: &str, bulk_lanes: u16) -> Peer {
        let address = uri.strip_prefix("tcp:").unwrap();
        let lanes = (0..=bulk_lanes)
            .map(|index| {
                let mut lane = TcpStream::connect(address).unwrap();
                lane.write_all(&hello(index, bulk_lanes).encode()).unwrap();
                let mut welcome = [0; HELLO_BYTES];
                lane.read_exact(&mut welcome).unwrap();
                Welcome::decode(&welcome).unwrap().check(&hello(index, bulk_lanes)).unwrap();
                lane
            })
            .collect();
        Peer { lanes, receiver: Receiver::for_source(&table(1)) }
    }

    /// Sends a frame on a lane, by its number: 0 is the demand lane.
    pub(crate) fn send(&mut self, lane: usize, frame: &Frame, body: &[u8]) {
        let mut bytes = Vec::new();
        transmit::encode(frame, &mut bytes);
        bytes.extend_from_slice(body);
        // A peer that has given up has closed the lane.
        let _ = self.lanes[lane].write_all(&bytes);
    }

    /// The next event on the demand lane; None if it was closed.
    pub(crate) fn event(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.receiver.poll_event() {
                return Some(event);
            }
            let Target::Control { exact } = self.receiver.next_target() else { unreachable!() };
            let mut bytes = vec![0; exact];
            let count = self.lanes[0].read(&mut bytes).unwrap_or(0);
            if count == 0 {
                return None;
            }
            self.receiver.control(&bytes[..count]).unwrap();
        }
    }

    /// Regions are compared, the guest is stopped: pages may come.
    pub(crate) fn until_stopped(&mut self, mib: u64, postcopy: bool) {
        let table = table(mib);
        self.receiver = Receiver::for_source(&table);
        self.send(0, &Frame::Regions(table.clone()), &[]);
        assert_eq!(self.event(), Some(Event::Ready(table)));
        self.send(0, &Frame::Stopped { postcopy, background: true }, &[]);
    }

    /// The device state of a running demo guest, with its seed and its shares of zeroes and holes: all of it is holes.
    pub(crate) fn load(&mut self) {
        let mut state = vec![1, 7, 0, 0, 0, 0, 0, 0, 0];
        state.extend([0, 0, 0, 0, 100, 0, 0, 0]);
        let bytes = u32::try_from(state.len()).unwrap();
        self.send(0, &Frame::DeviceState { bytes }, &state);
        self.send(0, &Frame::Load { state_bytes: u64::from(bytes) }, &[]);
    }

    /// Hands the guest over, until it runs at the destination.
    pub(crate) fn switch_over(&mut self) {
        self.send(0, &Frame::Switchover { stopped_us: 1 }, &[]);
        assert!(matches!(self.event(), Some(Event::Running { .. })));
    }

    /// The end, after the last page on this lane.
    pub(crate) fn complete(&mut self, lane: usize) {
        self.send(lane, &Frame::LaneEnd, &[]);
        assert!(matches!(self.event(), Some(Event::Complete(_))));
        self.send(0, &Frame::Complete(Totals::default()), &[]);
    }

    /// The reason of the destination's fault frame.
    pub(crate) fn fault(&mut self) -> String {
        loop {
            match self.event() {
                Some(Event::Error(fault)) => return fault.text,
                Some(_) => {}
                None => panic!("the destination closed the lane without a reason"),
            }
        }
    }
}

/// The hello of a lane.
pub(crate) fn hello(index: u16, bulk_lanes: u16) -> Hello {
    Hello {
        versions: PROTOCOL,
        capabilities: Capabilities::NONE,
        session: SessionId([7; 16]),
        role: if index == 0 { LaneRole::Demand } else { LaneRole::Bulk },
        index,
        bulk_lanes,
        epoch: 0,
        proof: [0; 32],
    }
}

/// One region, `ram0`, of 4 KiB pages.
pub(crate) fn table(mib: u64) -> RegionTable {
    let page_size = PageSize::SIZE_4K;
    RegionTable::new(vec![Region { name: "ram0".into(), bytes: mib << 20, page_size }]).unwrap()
}

/// Pages of that region.
pub(crate) fn range(first: u64, pages: u64) -> PageRange {
    PageRange { region: RegionId(0), first, pages }
}
