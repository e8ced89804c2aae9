//! What a bad path does to bytes that pass: changes them, has them come again, loses them, mixes them up.
//!
//! Only for migrations with checksums. Without them umem takes what TCP brings for what was sent, as there is
//! nothing by which it could know better, and so would its guest.

use std::collections::VecDeque;

use umem_wire::HEADER_BYTES;

/// What becomes of bytes. A stretch that could be whole headers begins where one could, so that whole frames
/// come again, or not, or in another order: most of what is sent is headers and pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spoil {
    /// This bit of a byte, 0 to 7, is another one.
    Flip(u8),
    /// So many come twice.
    Repeat(usize),
    /// So many do not come.
    Drop(usize),
    /// So many change places with as many behind them, or fewer if those are not there yet.
    Swap(usize),
}

/// What is to happen on one way of one connection.
#[derive(Default)]
pub(crate) struct Spoiler {
    /// Each after so many bytes since the one before it.
    due: VecDeque<(u64, Spoil)>,
    passed: u64,
    /// What there has been.
    pub(crate) done: u64,
    /// Bytes are lost, and nothing that came afterwards has shown it, as far as is known here.
    pub(crate) has_lost: bool,
}

impl Spoiler {
    pub(crate) fn then(&mut self, after: u64, what: Spoil) {
        self.due.push_back((after, what));
    }

    /// What `piece` becomes, at the end of `bytes`.
    pub(crate) fn pass(&mut self, mut piece: &[u8], bytes: &mut Vec<u8>) {
        while let Some((after, what)) = self.due.front_mut() {
            *after += what.up_to_header(self.passed + *after);
            let Some((before, rest)) = split(piece, *after) else { break };
            bytes.extend_from_slice(before);
            *after = 0;
            let (taken, is_done) = what.apply(rest, bytes);
            self.has_lost |= matches!(what, Spoil::Drop(_));
            self.passed += (before.len() + taken) as u64;
            piece = &rest[taken..];
            if is_done {
                self.due.pop_front();
                self.done += 1;
            }
        }
        if let Some((after, _)) = self.due.front_mut() {
            *after -= piece.len() as u64;
        }
        self.passed += piece.len() as u64;
        bytes.extend_from_slice(piece);
    }
}

/// What comes before, and the rest if there is some.
fn split(piece: &[u8], after: u64) -> Option<(&[u8], &[u8])> {
    let parts = piece.split_at_checked(usize::try_from(after).ok()?)?;
    (!parts.1.is_empty()).then_some(parts)
}

impl Spoil {
    /// How many bytes there are from here to where it may begin.
    fn up_to_header(self, at: u64) -> u64 {
        let header = HEADER_BYTES as u64;
        match self {
            Spoil::Repeat(count) | Spoil::Drop(count) | Spoil::Swap(count)
                if count % HEADER_BYTES == 0 =>
            {
                at.next_multiple_of(header) - at
            }
            _ => 0,
        }
    }

    /// Puts what becomes of the first bytes of `piece`, which has some, behind `bytes`. How many it took, and
    /// whether that was all.
    fn apply(&mut self, piece: &[u8], bytes: &mut Vec<u8>) -> (usize, bool) {
        match self {
            Spoil::Flip(bit) => {
                bytes.push(piece[0] ^ 1 << *bit);
                (1, true)
            }
            Spoil::Repeat(count) => {
                let again = &piece[..piece.len().min(*count)];
                bytes.extend_from_slice(again);
                bytes.extend_from_slice(again);
                (again.len(), true)
            }
            Spoil::Drop(count) => {
                let lost = piece.len().min(*count);
                *count -= lost;
                (lost, *count == 0)
            }
            Spoil::Swap(count) => {
                let count = (piece.len() / 2).min(*count);
                bytes.extend_from_slice(&piece[count..2 * count]);
                bytes.extend_from_slice(&piece[..count]);
                // With a single byte there is nothing to change places with: it passes, and the next ones may.
                let taken = (2 * count).max(1);
                bytes.extend_from_slice(&piece[2 * count..taken]);
                (taken, count > 0)
            }
        }
    }
}
