//! A source played by the test: opens its lane and hands a guest over, and keeps no page.

use std::io::{Read, Write};

use umem_wire::{
    Event, Frame, HELLO_BYTES, Hello, HelloError, PageSize, Receiver, Region, RegionTable, Target,
    Welcome, transmit,
};

/// The demand lane of a `umem incoming`, the source's end.
pub(crate) struct LaneToDestination<S> {
    stream: S,
}

impl<S: Read + Write> LaneToDestination<S> {
    /// Sends a hello.
    ///
    /// # Errors
    /// The destination's refusal.
    pub(crate) fn open(mut stream: S, hello: &Hello) -> Result<LaneToDestination<S>, String> {
        stream.write_all(&hello.encode()).expect("the destination reads");
        let mut answer = [0; HELLO_BYTES];
        stream.read_exact(&mut answer).expect("a welcome");
        match Welcome::decode(&answer) {
            Ok(welcome) => welcome.check(hello).expect("a welcome for this hello"),
            Err(HelloError::Refused { text, .. }) => return Err(text),
            Err(other) => panic!("{other}"),
        }
        Ok(LaneToDestination { stream })
    }

    /// Moves a guest of one region of this size, `ram0`, without its pages: up to *running*.
    pub(crate) fn switch_over(&mut self, bytes: u64) {
        let region = Region { name: "ram0".into(), bytes, page_size: PageSize::SIZE_4K };
        let table = RegionTable::new(vec![region]).expect("a table");
        let mut receiver = Receiver::for_source(&table);
        self.send(&Frame::Regions(table));
        self.read_until(&mut receiver, "ready");
        self.send(&Frame::Stopped { postcopy: true, background: true });
        self.send(&Frame::Load { state_bytes: 0 });
        self.read_until(&mut receiver, "loaded");
        self.send(&Frame::Switchover { stopped_us: 1 });
        self.read_until(&mut receiver, "running");
    }

    /// Reads until the destination has closed the lane.
    pub(crate) fn until_closed(mut self) {
        while self.stream.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
    }

    fn send(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        transmit::encode(frame, &mut bytes);
        self.stream.write_all(&bytes).expect("the destination reads");
    }

    /// Reads up to an event of this name.
    fn read_until(&mut self, receiver: &mut Receiver, name: &str) -> Event {
        let mut buffer = Vec::new();
        loop {
            if let Some(event) = receiver.poll_event() {
                if event.name() == name {
                    return event;
                }
                continue;
            }
            let Target::Control { exact } = receiver.next_target() else {
                unreachable!("a source receives no pages");
            };
            buffer.resize(exact, 0);
            let count = self.stream.read(&mut buffer).expect("the destination sends");
            assert_ne!(count, 0, "closed before {name}");
            receiver.control(&buffer[..count]).expect("the destination speaks umem");
        }
    }
}
