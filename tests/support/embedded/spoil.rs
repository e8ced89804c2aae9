//! Damage of a bad path: bytes are changed, duplicated, lost or reordered.
//!
//! Only for migrations with checksums. Without them umem takes the bytes of TCP as correct, because damage is
//! undetectable, and the guest would too.

use std::collections::VecDeque;

use umem_wire::HEADER_BYTES;

/// A kind of damage. A stretch that could be whole headers begins at a possible header, so that whole frames are
/// duplicated, lost or reordered: most of the stream is headers and pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spoil {
    /// This bit of a byte, 0 to 7, is flipped.
    Flip(u8),
    /// This many bytes are duplicated.
    Repeat(usize),
    /// This many bytes are lost.
    Drop(usize),
    /// This many bytes change places with as many behind them, or fewer if fewer are there.
    Swap(usize),
}

/// The scheduled damage of one direction of one connection.
#[derive(Default)]
pub(crate) struct Spoiler {
    /// Each after this many bytes since the previous one.
    due: VecDeque<(u64, Spoil)>,
    passed: u64,
    /// The damage done so far.
    pub(crate) done: u64,
    /// Bytes are lost, and no later byte has revealed that, as far as this side knows.
    pub(crate) has_lost: bool,
}

impl Spoiler {
    pub(crate) fn then(&mut self, after: u64, what: Spoil) {
        self.due.push_back((after, what));
    }

    /// The damaged form of `piece`, appended to `bytes`.
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

/// The bytes before the damage, and the rest.
fn split(piece: &[u8], after: u64) -> Option<(&[u8], &[u8])> {
    let parts = piece.split_at_checked(usize::try_from(after).ok()?)?;
    (!parts.1.is_empty()).then_some(parts)
}

impl Spoil {
    /// The distance to the next possible start.
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

    /// Appends the damaged form of the first bytes of `piece`, which is not empty, to `bytes`. Returns how many it
    /// consumed, and whether the damage is complete.
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
                // A single byte has no partner to change places with: it passes, and the next ones may change.
                let taken = (2 * count).max(1);
                bytes.extend_from_slice(&piece[2 * count..taken]);
                (taken, count > 0)
            }
        }
    }
}
