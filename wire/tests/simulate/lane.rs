//! A lane: the data in flight, and the state of each end.

use std::collections::VecDeque;

use umem_wire::checksum::SUMMED_BYTES;
use umem_wire::*;

use crate::support::Random;

pub(super) struct LanePipes {
    pub(super) to_destination: Pipe,
    pub(super) to_source: Pipe,
}

impl LanePipes {
    pub(super) fn new(is_checked: bool) -> LanePipes {
        let pipe = || Pipe {
            pieces: VecDeque::new(),
            closed: false,
            seal: Seal::new(is_checked),
            is_spoilt: false,
        };
        LanePipes { to_destination: pipe(), to_source: pipe() }
    }

    pub(super) fn cut(&mut self, random: &mut Random) {
        self.to_destination.cut(random);
        self.to_source.cut(random);
    }

    pub(super) fn close(&mut self) {
        self.to_destination.closed = true;
        self.to_source.closed = true;
    }
}

/// One direction of a lane: sent data that is not read yet.
pub(super) struct Pipe {
    pieces: VecDeque<Piece>,
    pub(super) closed: bool,
    pub(super) seal: Seal,
    /// The data in flight was changed.
    is_spoilt: bool,
}

#[derive(Clone)]
enum Piece {
    /// Headers and bodies.
    Control(VecDeque<u8>),
    /// Bytes of pages, in the source's numbers; true if some of them have changed.
    Pages(RunTarget, bool),
}

impl Pipe {
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Whole frames, and device state behind its header.
    pub(super) fn send(&mut self, frames: &[u8]) {
        let mut sealed = frames.to_vec();
        self.seal.frames(&mut sealed);
        self.send_bytes(&sealed);
    }

    /// A data run's header.
    pub(super) fn send_data(&mut self, range: PageRange, sums: &[u32]) {
        let mut header = transmit::data_header(range);
        self.seal.data(&mut header, sums);
        self.send_bytes(&header);
    }

    /// Sends bytes. A closed pipe swallows them, as a socket does for a while.
    pub(super) fn send_bytes(&mut self, bytes: &[u8]) {
        if self.closed {
            return;
        }
        if let Some(Piece::Control(waiting)) = self.pieces.back_mut() {
            return waiting.extend(bytes);
        }
        self.pieces.push_back(Piece::Control(bytes.iter().copied().collect()));
    }

    pub(super) fn send_pages(&mut self, run: RunTarget) {
        if !self.closed {
            self.pieces.push_back(Piece::Pages(run, false));
        }
    }

    /// Reads control bytes, some of `most`. Pages instead of control bytes are a mistake, unless
    /// the data was changed.
    pub(super) fn read_control(&mut self, most: usize, random: &mut Random) -> Vec<u8> {
        if let (true, Some(Piece::Pages(run, _))) = (self.is_spoilt, self.pieces.front_mut()) {
            let count = random.partial(run.bytes.min(most as u64));
            run.bytes -= count;
            run.byte_offset += count;
            if run.bytes == 0 {
                self.pieces.pop_front();
            }
            return vec![0xa5; count as usize];
        }
        let Some(Piece::Control(waiting)) = self.pieces.front_mut() else {
            panic!("control bytes were expected, pages arrived");
        };
        let count = random.partial(most.min(waiting.len()) as u64) as usize;
        let bytes = waiting.drain(..count).collect();
        if waiting.is_empty() {
            self.pieces.pop_front();
        }
        bytes
    }

    /// Reads bytes of pages, and checks that they belong to the target, unless the data was
    /// changed. Returns how many bytes, and whether they are those of the target.
    pub(super) fn read_pages(&mut self, target: RunTarget, random: &mut Random) -> (u64, bool) {
        if let (true, Some(Piece::Control(_))) = (self.is_spoilt, self.pieces.front()) {
            let most = usize::try_from(target.bytes).unwrap();
            return (self.read_control(most, random).len() as u64, false);
        }
        let Some(Piece::Pages(run, is_spoilt)) = self.pieces.front_mut() else {
            panic!("pages were expected, control bytes arrived");
        };
        let is_intact = *run == target && !*is_spoilt;
        assert!(is_intact || self.is_spoilt, "bytes land at a wrong place");
        let count = random.partial(run.bytes.min(target.bytes));
        run.byte_offset += count;
        run.bytes -= count;
        if run.bytes == 0 {
            self.pieces.pop_front();
        }
        (count, is_intact)
    }

    /// Changes a bit, or repeats some data.
    pub(super) fn spoil(&mut self, random: &mut Random) {
        if self.pieces.is_empty() {
            return;
        }
        self.is_spoilt = true;
        let index = random.index(self.pieces.len());
        let again = random.chance(30);
        match &mut self.pieces[index] {
            Piece::Control(bytes) if again => {
                let start = random.index(bytes.len());
                let end = start + 1 + random.index(bytes.len() - start);
                let slice: Vec<u8> = bytes.range(start..end).copied().collect();
                let behind = bytes.split_off(end);
                bytes.extend(slice);
                bytes.extend(behind);
            }
            Piece::Control(bytes) => {
                let at = random.index(bytes.len());
                bytes[at] ^= 1 << random.below(8);
            }
            Piece::Pages(run, _) if again => {
                let run = *run;
                self.pieces.insert(index, Piece::Pages(run, true));
            }
            Piece::Pages(_, is_spoilt) => *is_spoilt = true,
        }
    }

    /// Ends the pipe here: some unread data is lost.
    pub(super) fn cut(&mut self, random: &mut Random) {
        self.closed = true;
        self.pieces.truncate(random.index(self.pieces.len() + 1));
        if let Some(Piece::Control(waiting)) = self.pieces.back_mut() {
            waiting.truncate(1 + random.index(waiting.len()));
        }
    }
}

/// One end of a lane.
#[derive(Debug)]
pub(super) enum LaneEnd {
    /// The peer's hello or welcome is arriving.
    Opening(Vec<u8>),
    Open(Box<Receiver>),
    /// The peer closed it in order.
    Closed,
}

impl LaneEnd {
    /// Reads the next bytes of an opening; all of it, if it is whole.
    pub(super) fn open(
        &mut self,
        pipe: &mut Pipe,
        random: &mut Random,
    ) -> Option<[u8; HELLO_BYTES]> {
        let LaneEnd::Opening(bytes) = self else {
            return None;
        };
        let read = pipe.read_control(HELLO_BYTES - bytes.len(), random);
        bytes.extend(read);
        (**bytes).try_into().ok()
    }
}

/// The events of the last step.
pub(super) fn events(receiver: &mut Receiver) -> Vec<Event> {
    receiver.assert_invariants();
    std::iter::from_fn(|| receiver.poll_event()).collect()
}

pub(super) fn send(pipe: &mut Pipe, frame: &Frame) {
    let mut bytes = Vec::new();
    transmit::encode(frame, &mut bytes);
    pipe.send(&bytes);
}

/// The sums of a run's pages, and the index of the first in pieces of 4 KiB.
pub(super) fn sums(table: &RegionTable, range: PageRange) -> (u64, Vec<u32>) {
    let summed = table.get(range.region).unwrap().page_size.bytes() / SUMMED_BYTES as u64;
    let first = range.first * summed;
    let end = first + range.pages * summed;
    (first, (first..end).map(|page| sum(range.region, page)).collect())
}

/// The made-up sum of 4 KiB of a page.
fn sum(region: RegionId, page: u64) -> u32 {
    Random(u64::from(region.0) << 48 | page).next() as u32
}
