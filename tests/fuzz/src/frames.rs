//! Valid frames in any order: each means at the other end what was said.

use arbitrary::{Arbitrary, Unstructured};
use umem_wire::{Event, Frame, LaneRole, Receiver, Standing, Target, Totals, transmit};

use crate::words::{Word, table};

pub(crate) fn run(input: &[u8]) {
    let mut input = Unstructured::new(input);
    while !input.is_empty() {
        let Ok(word) = Word::arbitrary(&mut input) else { return };
        let mut bytes = Vec::new();
        transmit::encode(&word.frame(), &mut bytes);
        bytes.extend(vec![0xa5; word.state_bytes() as usize]);
        let understood = receivers().into_iter().filter(|receiver| means(receiver, &word, &bytes));
        assert_ne!(understood.count(), 0, "nobody understands {word:?}");
    }
}

type End = (bool, fn() -> Receiver);

/// Every end of every lane; true for those at the destination.
fn receivers() -> [End; 6] {
    [
        (true, || Receiver::for_destination(LaneRole::Demand)),
        (true, || Receiver::for_destination(LaneRole::Bulk)),
        (false, || Receiver::for_source(&table())),
        (false, Receiver::for_source_bulk),
        (false, || Receiver::for_resumed_source(&table())),
        (false, resumed),
    ]
}

/// The source's end of a demand lane that replaces a lost one, after the first frame.
fn resumed() -> Receiver {
    let standing = Standing { switched: true, running: None, totals: Totals::default() };
    let mut bytes = Vec::new();
    transmit::encode(&Frame::Resume(standing), &mut bytes);
    let mut receiver = Receiver::for_resumed_source(&table());
    receiver.control(&bytes).expect("a resume frame");
    assert_eq!(receiver.poll_event(), Some(Event::Resume(standing)));
    receiver
}

/// Whether a receiver takes the frame; then it must mean what was said. One that does not must say so.
fn means(&(at_destination, make): &End, word: &Word, bytes: &[u8]) -> bool {
    let mut receiver = make();
    if !matches!(word, Word::Regions | Word::Ready) {
        receiver.set_regions(&table());
    }
    let mut rest = bytes;
    let mut events = Vec::new();
    loop {
        let fed = match receiver.next_target() {
            Target::Run(run) => receiver.landed(run.bytes),
            Target::Control { .. } if rest.is_empty() => break,
            Target::Control { exact } => {
                let most = if at_destination { exact.min(rest.len()) } else { rest.len() };
                let (now, later) = rest.split_at(most);
                rest = later;
                receiver.control(now)
            }
        };
        events.extend(std::iter::from_fn(|| receiver.poll_event()));
        if fed.is_err() {
            assert!(events.is_empty(), "{events:?} from a frame that was refused");
            return false;
        }
    }
    if let Frame::Data(range) = word.frame() {
        assert_eq!(events.remove(0), Event::RunBegins(range));
    }
    assert_eq!(events, [word.event()]);
    assert!(receiver.is_between_frames());
    true
}
