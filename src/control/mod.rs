//! What decides whose the guest is, without input or output.
//!
//! Each side of a migration has a core: a value that is told what has happened and says what is to be done. It
//! owns no descriptor, starts no thread, reads no clock and prints nothing, so that a test can run it in a
//! time of its own, and end it between any two things that it does. A driver does what a core says, for the
//! source in `src/source`, for the destination in `src/destination/driving.rs`:
//!
//! ```text
//! loop {
//!     while let Some(effect) = core.next_effect() {
//!         // Its answer, if it has one, is the next input.
//!         if let Err(error) = carry_out(effect) {
//!             core.handle(Input::NotDone(error), &now);
//!         }
//!     }
//!     if core.has_ended() { return core.take_outcome() }
//!     core.handle(answer_or_wait_until(core.deadline()), &now);
//! }
//! ```
//!
//! - *Inputs* are what the other side, the monitor, threads, people and the clock bring. Time and counters are an
//!   argument ([`Moment`]).
//! - *Effects* are carried out one at a time, in order. One that fails comes back at once as `NotDone`, and
//!   nothing that was queued behind it is carried out.
//! - An effect that has an answer is the last of its batch: what depends on the answer is queued when it has come.
//! - *States* are enums, and a variant owns what exists in that state alone.

pub(crate) mod backoff;
pub(crate) mod calling;
pub(crate) mod destination;
pub(crate) mod doubt;
pub(crate) mod liveness;
#[cfg(test)]
mod simulate;
pub(crate) mod source;
pub(crate) mod suspicion;

use std::collections::VecDeque;
use std::time::Instant;

/// When something is handled, and what had been counted by then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) at: Instant,
    /// Bytes of the guest's memory that have moved, of any kind.
    pub(crate) moved_bytes: u64,
    /// What has come and was not what had been sent, where there are checksums.
    pub(crate) checksum_errors: u64,
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

    pub(crate) fn pop(&mut self) -> Option<E> {
        self.0.pop_front()
    }

    /// After one that has failed.
    pub(crate) fn drop_rest(&mut self) {
        self.0.clear();
    }

    /// Something else follows than the answer that the last one has: that one is not carried out.
    pub(crate) fn drop_question(&mut self) {
        if self.0.back().is_some_and(Effect::has_answer) {
            self.0.pop_back();
        }
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
