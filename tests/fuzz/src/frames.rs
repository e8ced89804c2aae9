//! Valid frames in any order: each is decoded to its original, also with checksums, and never with a changed bit.

use arbitrary::{Arbitrary, Unstructured};
use umem_wire::checksum::SUMMED_BYTES;
use umem_wire::{
    Event, Frame, LaneRole, ReceiveError, Receiver, Seal, Standing, Target, Totals, transmit,
};

use crate::words::{Word, table};

pub(crate) fn run(input: &[u8]) {
    let mut input = Unstructured::new(input);
    while !input.is_empty() {
        let Ok(word) = Word::arbitrary(&mut input) else { return };
        let mut bytes = Vec::new();
        transmit::encode(&word.frame(), &mut bytes);
        bytes.extend(vec![0xa5; word.state_bytes() as usize]);
        let understood = receivers().into_iter().filter(|receiver| means(receiver, &word, &bytes));
        assert_ne!(understood.count(), 0, "no receiver accepts {word:?}");
        let bit = input.arbitrary().unwrap_or(0u32) as usize;
        for (at_destination, make) in receivers() {
            check_sealed((at_destination, make), &word, &bytes, bit);
        }
    }
}

type End = (bool, fn() -> Receiver);

/// Every end of every lane; true for the destination's ends.
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

/// With checksums a frame decodes to the same value, and with any one bit changed to none.
fn check_sealed(end: End, word: &Word, bytes: &[u8], bit: usize) {
    let is_understood = means(&end, word, bytes);
    let mut sealed = bytes.to_vec();
    let mut sums = Vec::new();
    let mut seal = Seal::new(true);
    if let Frame::Data(range) = word.frame() {
        let page_size = table().get(range.region).expect("within the table").page_size;
        if range.pages > page_size.checked_run_pages_max() {
            return;
        }
        sums = vec![7; (range.pages * page_size.bytes()) as usize / SUMMED_BYTES];
        seal.data(sealed.first_chunk_mut().expect("a header"), &sums);
    } else {
        seal.frames(&mut sealed);
    }
    if !is_understood {
        return;
    }
    let receiver = || {
        let mut receiver = (end.1)();
        if !matches!(word, Word::Regions | Word::Ready) {
            receiver.set_regions(&table());
        }
        receiver
    };
    let fed = feed(receiver().checked(true), end.0, &sealed, &sums);
    assert!(fed.is_ok(), "{word:?} with checksums: {fed:?}");
    let bit = bit % (8 * sealed.len());
    sealed[bit / 8] ^= 1 << (bit % 8);
    let error = feed(receiver().checked(true), end.0, &sealed, &sums).unwrap_err();
    assert!(error.is_corruption(), "bit {bit} of {word:?}: {error}");
}

/// Feeds all bytes of a frame to a receiver, pages with these sums.
fn feed(
    mut receiver: Receiver,
    at_destination: bool,
    mut rest: &[u8],
    sums: &[u32],
) -> Result<(), ReceiveError> {
    loop {
        match receiver.next_target() {
            Target::Run(run) => {
                receiver.verify(sums)?;
                receiver.landed(run.bytes)?;
            }
            Target::Control { .. } if rest.is_empty() => return Ok(()),
            Target::Control { exact } => {
                let most = if at_destination { exact.min(rest.len()) } else { rest.len() };
                let (now, later) = rest.split_at(most);
                rest = later;
                receiver.control(now)?;
            }
        }
    }
}

/// Whether a receiver accepts the frame. An accepted frame must decode to its original; a rejected one must give an
/// error.
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
