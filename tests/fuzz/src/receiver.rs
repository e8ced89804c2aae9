//! Any bytes on any end of any lane, in any pieces: no panic, no memory of the peer's choosing, and the same events
//! whatever the pieces.

use umem_wire::limits::BODY_BYTES_MAX;
use umem_wire::{Event, LaneRole, ReceiveError, Receiver, Target};

use crate::heap::peak_bytes;
use crate::words::table;

/// A receiver holds its largest body twice, as it grows and is decoded, and small buffers; the events, which a slow
/// consumer holds too, are no larger than four times the input.
const RECEIVER_BYTES_MAX: usize = 4 * BODY_BYTES_MAX;

/// The most pieces in which a run lands, so that one of 1 GiB does not take all day.
const RUN_PIECES_MAX: usize = 16;

/// Byte 0 selects the end, byte 1 is the number of pieces' lengths that follow; the rest arrives on the lane.
pub(crate) fn run(input: &[u8]) {
    let &[which, pieces, ref rest @ ..] = input else { return };
    let (pieces, bytes) = rest.split_at(rest.len().min(pieces.into()));
    let mut all = Outcome::default();
    let peak = peak_bytes(|| all = receive(which, &[], bytes));
    assert!(peak <= RECEIVER_BYTES_MAX + 8 * bytes.len(), "{peak} bytes for {}", bytes.len());
    assert_eq!(receive(which, pieces, bytes), all);
}

/// The result of some bytes.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    events: Vec<Event>,
    error: Option<ReceiveError>,
    is_ended: bool,
}

/// The end of a lane, by the lower bits of a number: its role, its side, whether it knows the regions, and whether it
/// has checksums.
fn receiver(which: u8) -> Receiver {
    let mut receiver = match which % 4 {
        0 => Receiver::for_destination(LaneRole::Demand),
        1 => Receiver::for_destination(LaneRole::Bulk),
        2 => Receiver::for_source(&table()),
        _ => Receiver::for_source_bulk(),
    };
    if which & 4 != 0 {
        receiver.set_regions(&table());
    }
    receiver.checked(which & 8 != 0)
}

/// Feeds bytes in pieces of these lengths, repeated; without any, as many at once as allowed.
fn receive(which: u8, pieces: &[u8], mut bytes: &[u8]) -> Outcome {
    let mut receiver = receiver(which);
    let at_source = which & 2 != 0;
    let mut outcome = Outcome::default();
    let mut pieces = Pieces::of(pieces);
    let mut run_pieces = 0;
    let result = loop {
        let fed = match receiver.next_target() {
            Target::Run(run) if run_pieces < RUN_PIECES_MAX => {
                run_pieces += 1;
                receiver.landed(pieces.next(run.bytes))
            }
            Target::Run(run) => receiver.landed(run.bytes),
            Target::Control { .. } if bytes.is_empty() => break receiver.closed(),
            Target::Control { exact } => {
                run_pieces = 0;
                let most = if at_source { bytes.len() } else { exact.min(bytes.len()) };
                let (now, later) = bytes.split_at(pieces.next(most as u64) as usize);
                bytes = later;
                receiver.control(now)
            }
        };
        receiver.assert_invariants();
        while let Some(event) = receiver.poll_event() {
            if let Event::Regions(table) = &event {
                receiver.set_regions(table);
            }
            outcome.events.push(event);
        }
        if fed.is_err() {
            break fed;
        }
    };
    outcome.is_ended = receiver.is_ended();
    outcome.error = result.err();
    if let Some(error) = &outcome.error {
        assert_eq!(receiver.control(&[1]), Err(error.clone()), "a failed lane stays failed");
        assert!(!error.to_string().is_empty());
    }
    outcome
}

/// Lengths of pieces, repeated.
struct Pieces<'a> {
    lengths: &'a [u8],
    next: usize,
}

impl Pieces<'_> {
    fn of(lengths: &[u8]) -> Pieces<'_> {
        Pieces { lengths, next: 0 }
    }

    /// 1 to `most`.
    fn next(&mut self, most: u64) -> u64 {
        let Some(length) = self.lengths.get(self.next % self.lengths.len().max(1)) else {
            return most;
        };
        self.next += 1;
        (u64::from(*length) + 1).min(most)
    }
}
