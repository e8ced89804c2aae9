//! Whether lost lanes are replaced. Each side decides that for itself, by the same rules:
//!
//! - An order pauses a side, and an order resumes it. An order with an address or connections resumes it, too.
//! - A side pauses itself after too many consecutive losses to wrong checksums ([`suspicion`](super::suspicion)).
//! - Only an order ends a pause. Neither time nor the other side does.

use super::suspicion::ChecksumBreaker;
use crate::events::Event;

/// The pause of one side, and the losses that lead to one.
#[derive(Debug, Default)]
pub(crate) struct Pausing {
    is_paused: bool,
    breaker: ChecksumBreaker,
}

impl Pausing {
    pub(crate) fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// On an order: no lanes until a resume.
    pub(crate) fn pause(&mut self) {
        self.is_paused = true;
    }

    /// On an order: lanes again.
    pub(crate) fn resume(&mut self) {
        self.is_paused = false;
    }

    /// Records the loss of all lanes, with its reason `why`, the pages that had arrived (`progress`) and the wrong
    /// checksums so far. Returns the events to report, and the reason for a pause if the loss pauses this side.
    pub(crate) fn lost(
        &mut self,
        why: &str,
        progress: u64,
        errors: u64,
    ) -> (Vec<Event>, Option<String>) {
        let (events, in_vain) = self.breaker.lost(why, progress, errors).into_parts();
        self.is_paused |= in_vain.is_some();
        (events, in_vain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::suspicion::IN_A_ROW_MAX;

    #[test]
    fn consecutive_checksum_losses_pause_a_side_until_resume() {
        let mut pausing = Pausing::default();
        for errors in 1..=u64::from(IN_A_ROW_MAX) {
            assert!(!pausing.is_paused(), "{errors}");
            pausing.lost("a wrong checksum", 5, errors);
        }
        assert!(pausing.is_paused());
        // A loss with another cause does not end the pause.
        let (events, in_vain) = pausing.lost("closed", 6, u64::from(IN_A_ROW_MAX));
        assert!(pausing.is_paused() && events.is_empty() && in_vain.is_none());
        pausing.resume();
        assert!(!pausing.is_paused());
    }
}
