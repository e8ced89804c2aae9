//! Repeated losses of lanes to wrong checksums, and when to stop opening lanes.
//!
//! A path that changes a bit now and then costs a recovery each time, but the migration ends. With a path that changes
//! all data, both sides would open lanes indefinitely, as fast as they can. So after [`IN_A_ROW_MAX`] losses without
//! one valid page in between they pause until an order resumes them.

use crate::events::{Event, Remark};

/// Consecutive losses to wrong checksums, without one valid page in between, after which lanes are no longer opened. A
/// path that spoils 9 of 10 attempts still delivers a page before that, more often than not.
pub(crate) const IN_A_ROW_MAX: u32 = 8;

/// The losses that one side has seen.
#[derive(Debug, Default)]
pub(crate) struct ChecksumBreaker {
    errors: u64,
    progress: u64,
    in_a_row: u32,
}

/// The judgement of a loss of all lanes.
#[derive(Debug, PartialEq)]
pub(crate) enum Verdict {
    /// The loss had another cause than wrong checksums.
    Trusted,
    /// Wrong checksums were the cause. Another attempt is worthwhile.
    Doubted { event: Event },
    /// Further attempts are futile: for this reason no lanes are opened before an order.
    InVain { events: [Event; 2], reason: String },
}

impl ChecksumBreaker {
    /// Records the loss of all lanes, with its reason `why`, the pages that had arrived (`progress`) and the wrong
    /// checksums so far (`errors`).
    pub(crate) fn lost(&mut self, why: &str, progress: u64, errors: u64) -> Verdict {
        if errors == self.errors {
            return Verdict::Trusted;
        }
        let event = Event::ChecksumError { reason: why.to_owned(), errors };
        let is_in_vain = progress == self.progress && self.errors > 0;
        self.in_a_row = if is_in_vain { self.in_a_row + 1 } else { 1 };
        (self.errors, self.progress) = (errors, progress);
        if self.in_a_row < IN_A_ROW_MAX {
            return Verdict::Doubted { event };
        }
        self.in_a_row = 0;
        let remark = Event::Remark(Remark::Distrusted { losses: IN_A_ROW_MAX });
        let reason = format!(
            "{IN_A_ROW_MAX} consecutive connections failed checksum verification without one valid page, the \
             last because {why}"
        );
        Verdict::InVain { events: [event, remark], reason }
    }
}

impl Verdict {
    /// The events to report, and the reason if no more lanes are opened.
    pub(crate) fn into_parts(self) -> (Vec<Event>, Option<String>) {
        match self {
            Verdict::Trusted => (Vec::new(), None),
            Verdict::Doubted { event } => (vec![event], None),
            Verdict::InVain { events, reason } => (events.into(), Some(reason)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consecutive_checksum_losses_without_progress_stop_reconnects() {
        let (mut errors, mut suspicion) = (0, ChecksumBreaker::default());
        let mut lost = |wrong, progress| {
            errors += wrong;
            let (events, in_vain) = suspicion.lost("why", progress, errors).into_parts();
            assert!(in_vain.iter().all(|told| told.contains("8 consecutive connections")));
            assert_eq!(events.is_empty(), wrong == 0);
            in_vain.is_some()
        };
        for _ in 0..3 {
            for _ in 1..IN_A_ROW_MAX {
                assert!(!lost(1, 5));
            }
            // Losses with other causes are unlimited.
            assert!(!lost(0, 5));
            assert!(lost(2, 5));
        }
        for progress in 6..100 {
            assert!(!lost(1, progress));
        }
    }
}
