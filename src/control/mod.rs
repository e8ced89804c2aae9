//! What decides whose the guest is, without input or output.
//!
//! Each side of a migration has a core: a value that is told what has happened and says what is to be done. It
//! owns no descriptor, starts no thread, reads no clock and prints nothing, so that a test can run it in a
//! time of its own, and end it between any two things that it does. Both have one contract, and a driver does what
//! they say, in `src/source/driving.rs` and `src/destination/driving.rs`:
//!
//! ```text
//! for effect in core.handle(input, &now) {
//!     match carry_out(effect) {
//!         // The answer, if there is one, is among the next inputs.
//!         Ok(answer) => inputs.extend(answer),
//!         // What is behind it is not done.
//!         Err(error) => { the next input is NotDone(error); break }
//!     }
//! }
//! wait until core.deadline(), a note, a signal, a connection
//! ```
//!
//! - *Inputs* are what the other side, the monitor, threads, people and the clock bring. Time and counters are an
//!   argument ([`Moment`]).
//! - *Effects* are carried out one at a time, in order. One that fails comes back at once as `NotDone`, and
//!   nothing that was queued behind it is carried out.
//! - An effect that has an answer is the last of its batch: what depends on the answer is queued when it has come.
//! - *Records* that cannot be written stop what is behind them only where `is_vital` says so.
//! - *States* are enums, and a variant owns what exists in that state alone.

pub(crate) mod backoff;
pub(crate) mod calling;
pub(crate) mod destination;
pub(crate) mod doubt;
pub(crate) mod liveness;
pub(crate) mod pausing;
#[cfg(test)]
mod simulate;
pub(crate) mod source;
pub(crate) mod suspicion;

use std::collections::VecDeque;
use std::time::Instant;

use crate::transport::uri::Uri;

/// When something is handled, and what had been counted by then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment<M = ()> {
    pub(crate) at: Instant,
    /// Bytes of the guest's memory and device state that have moved, of any kind.
    pub(crate) moved_bytes: u64,
    /// What has come and was not what had been sent, where there are checksums.
    pub(crate) checksum_errors: u64,
    /// How the guest's memory stands, where that matters.
    pub(crate) memory: M,
}

/// What somebody wants done with the lanes, by hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Give them up, and open or take none before a resume.
    Pause,
    /// Open or take them again, at another address if one is named.
    Resume(Option<Uri>),
}

/// What is to be done, in order.
#[derive(Debug)]
pub(crate) struct Effects<E>(VecDeque<E>);

impl<E: Effect> Effects<E> {
    pub(crate) fn new() -> Effects<E> {
        Effects(VecDeque::new())
    }

    pub(crate) fn push(&mut self, effect: E) {
        let is_answered = self.0.back().is_some_and(Effect::has_answer);
        debug_assert!(!is_answered, "what follows an answer is queued when that has come");
        self.0.push_back(effect);
    }

    /// Something else follows than the answer that the last one has: that one is not carried out.
    pub(crate) fn drop_question(&mut self) {
        if self.0.back().is_some_and(Effect::has_answer) {
            self.0.pop_back();
        }
    }
}

impl<E: Effect> Extend<E> for Effects<E> {
    fn extend<I: IntoIterator<Item = E>>(&mut self, effects: I) {
        effects.into_iter().for_each(|effect| self.push(effect));
    }
}

impl<E> Iterator for Effects<E> {
    type Item = E;

    fn next(&mut self) -> Option<E> {
        self.0.pop_front()
    }
}

/// What a core has done.
pub(crate) trait Effect {
    /// Its result is an input.
    fn has_answer(&self) -> bool;
}
