//! A destination played by the test: sends the frames that the test requests, and keeps no page.

use std::io::{Read, Write};

use umem_wire::{
    Capabilities, Event, Frame, HELLO_BYTES, Hello, LaneRole, PROTOCOL, PageRange, Receiver,
    RegionTable, Target, Welcome, transmit,
};

/// One lane of a `umem migrate`, the destination's end.
pub(crate) struct LaneFromSource<S> {
    pub(crate) stream: S,
    pub(crate) hello: Hello,
    receiver: Receiver,
    /// Bytes of pages received.
    pub(crate) page_bytes: u64,
}

impl<S: Read + Write> LaneFromSource<S> {
    /// Reads the source's hello and welcomes it, with these capabilities if it has them.
    pub(crate) fn welcome(mut stream: S, capabilities: Capabilities) -> LaneFromSource<S> {
        let mut bytes = [0; HELLO_BYTES];
        stream.read_exact(&mut bytes).expect("a hello");
        let hello = Hello::decode(&bytes).expect("a hello");
        let welcome = Welcome::answer(&hello, PROTOCOL, capabilities, [0; 32]);
        stream.write_all(&welcome.expect("a version").encode()).expect("the source reads");
        let receiver = Receiver::for_destination(hello.role);
        LaneFromSource { stream, hello, receiver, page_bytes: 0 }
    }

    pub(crate) fn is_demand(&self) -> bool {
        self.hello.role == LaneRole::Demand
    }

    pub(crate) fn set_regions(&mut self, landing: &RegionTable) {
        self.receiver.set_regions(landing);
    }

    pub(crate) fn send(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        transmit::encode(frame, &mut bytes);
        // A source that has given up has closed the lane.
        let _ = self.stream.write_all(&bytes);
    }

    /// The next event; None if the source has closed the lane.
    pub(crate) fn event(&mut self) -> Option<Event> {
        let mut buffer = Vec::new();
        loop {
            if let Some(event) = self.receiver.poll_event() {
                return Some(event);
            }
            let (bytes, is_run) = match self.receiver.next_target() {
                Target::Control { exact } => (exact as u64, false),
                Target::Run(run) => (run.bytes, true),
            };
            buffer.resize(bytes as usize, 0);
            let count = self.stream.read(&mut buffer).unwrap_or(0);
            if count == 0 {
                return None;
            }
            if is_run {
                self.page_bytes += count as u64;
                self.receiver.landed(count as u64).expect("no more than was asked for");
            } else {
                self.receiver.control(&buffer[..count]).expect("the source speaks umem");
            }
        }
    }

    /// The next event other than a page's.
    pub(crate) fn control_event(&mut self) -> Option<Event> {
        loop {
            match self.event()? {
                Event::RunBegins(_) | Event::Data(_) | Event::Zero(_) | Event::Hole(_) => {}
                event => return Some(event),
            }
        }
    }

    /// On the demand lane: accepts the source's regions unchanged, up to the stop of its guest. Returns the landing
    /// table.
    pub(crate) fn until_stopped(&mut self) -> RegionTable {
        let Some(Event::Regions(table)) = self.event() else { panic!("no regions") };
        self.set_regions(&table);
        self.send(&Frame::Ready(table.units()));
        assert!(matches!(self.event(), Some(Event::Stopped { .. })));
        table
    }

    /// The next pages that arrive, data or not; None if the source has closed or ended the lane.
    pub(crate) fn pages(&mut self) -> Option<PageRange> {
        loop {
            match self.event()? {
                Event::Data(range) | Event::Zero(range) | Event::Hole(range) => return Some(range),
                Event::RunBegins(_) => {}
                Event::LaneEnd => return None,
                other => panic!("{} among pages", other.name()),
            }
        }
    }

    /// On the demand lane, after that: up to the guest running here. Pages may come in between.
    pub(crate) fn until_running(&mut self) {
        while !matches!(self.control_event(), Some(Event::Load { .. })) {}
        self.send(&Frame::Loaded);
        assert!(matches!(self.control_event(), Some(Event::Switchover { .. })));
        self.send(&Frame::Running { us_since_switchover: 1 });
    }
}
