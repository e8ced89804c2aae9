//! Whether lanes that are lost are replaced. Each side decides that for itself, by the same rules:
//!
//! - A person pauses a side, and resumes it. A way that is named by hand resumes it, too.
//! - A side pauses itself after too many losses to wrong checksums in a row ([`suspicion`](super::suspicion)).
//! - Only a person ends a pause. Neither time nor the other side does.

use super::suspicion::ChecksumBreaker;
use crate::events::Event;

/// One side's pause, and what leads to one.
#[derive(Debug, Default)]
pub(crate) struct Pausing {
    is_paused: bool,
    breaker: ChecksumBreaker,
}

impl Pausing {
    pub(crate) fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// By hand: no lanes until a resume.
    pub(crate) fn pause(&mut self) {
        self.is_paused = true;
    }

    /// By hand: lanes again.
    pub(crate) fn resume(&mut self) {
        self.is_paused = false;
    }

    /// All lanes are lost, as `why` says, when so much of the guest had come to the destination and so many wrong
    /// checksums had been noticed. The answer is what is told, and why no lanes replace them, if that pauses this side.
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
    fn losses_in_vain_pause_a_side_until_a_resume_by_hand() {
        let mut pausing = Pausing::default();
        for errors in 1..=u64::from(IN_A_ROW_MAX) {
            assert!(!pausing.is_paused(), "{errors}");
            pausing.lost("a wrong checksum", 5, errors);
        }
        assert!(pausing.is_paused());
        // A loss of another cause ends no pause.
        let (events, in_vain) = pausing.lost("closed", 6, u64::from(IN_A_ROW_MAX));
        assert!(pausing.is_paused() && events.is_empty() && in_vain.is_none());
        pausing.resume();
        assert!(!pausing.is_paused());
    }
}
