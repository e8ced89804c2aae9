//! The decisions about the ownership of the guest, without input or output.
//!
//! Each side of a migration has a core: a value that takes inputs and returns effects. The core owns no descriptor,
//! starts no thread, reads no clock and prints nothing. So a test can run it in virtual time, and end it between any
//! two effects. Both cores have one contract. The drivers in `src/source/driving.rs` and `src/destination/driving.rs`
//! carry it out:
//!
//! ```text
//! for effect in core.handle(input, &now) {
//!     match carry_out(effect) {
//!         // An answer is among the next inputs.
//!         Ok(answer) => inputs.extend(answer),
//!         // The effects behind the failed one are dropped.
//!         Err(error) => { the next input is NotDone(error); break }
//!     }
//! }
//! wait until core.deadline(), a note, a signal, a connection
//! ```
//!
//! - *Inputs* come from the other side, the monitor, threads, the user and the clock. Time and counters are an argument
//!   ([`Moment`]).
//! - *Effects* are carried out one at a time, in order. A failed effect returns at once as `NotDone`, and the driver
//!   drops the effects queued behind it.
//! - An effect with an answer is the last of its batch. Effects that depend on the answer are queued when it has
//!   arrived.
//! - A *record* that cannot be written stops the effects behind it only if `is_vital` returns true.
//! - *States* are enums. A variant owns the data that exists in that state alone.

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

/// The time of an input, and the counters at that time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment<M = ()> {
    pub(crate) at: Instant,
    /// Bytes of the guest's memory and device state that have moved, of any kind.
    pub(crate) moved_bytes: u64,
    /// Wrong checksums seen so far, with checksums on.
    pub(crate) checksum_errors: u64,
    /// The state of the guest's memory, if the core needs it.
    pub(crate) memory: M,
}

/// An order about the lanes, from `umem control` or from the embedding program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Close the lanes, and open or accept none before a resume.
    Pause,
    /// Open or accept lanes again, at another address if one is given.
    Resume(Option<Uri>),
}

/// Effects, in order.
#[derive(Debug)]
pub(crate) struct Effects<E>(VecDeque<E>);

impl<E: Effect> Effects<E> {
    pub(crate) fn new() -> Effects<E> {
        Effects(VecDeque::new())
    }

    pub(crate) fn push(&mut self, effect: E) {
        let is_answered = self.0.back().is_some_and(Effect::has_answer);
        debug_assert!(
            !is_answered,
            "effects that follow an answer are queued after it has arrived"
        );
        self.0.push_back(effect);
    }

    /// Drops the last effect if it has an answer: another effect takes its place.
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

/// An action that a core requests from its driver.
pub(crate) trait Effect {
    /// The effect's result is an input.
    fn has_answer(&self) -> bool;
}
