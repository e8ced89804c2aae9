//! Lanes that are lost because of wrong checksums, again and again: when to stop trying.
//!
//! A path that changes a bit now and then costs a recovery each time, and the migration comes to its end. One
//! that changes all that passes would have both sides open lanes for ever, as fast as they can: after
//! [`IN_A_ROW_MAX`] losses without a page in between that was right, they pause until a resume by hand.

use crate::events::{Event, Remark};

/// Losses because of wrong checksums, with no page in between that came whole, after which lanes are no more
/// opened. Even a path that spoils 9 of 10 attempts gets a page through before that, more often than not.
pub(crate) const IN_A_ROW_MAX: u32 = 8;

/// What one side has seen of it.
#[derive(Debug, Default)]
pub(crate) struct ChecksumBreaker {
    errors: u64,
    progress: u64,
    in_a_row: u32,
}

/// What the loss of all lanes means.
#[derive(Debug, PartialEq)]
pub(crate) enum Verdict {
    /// There was another cause than wrong checksums.
    Trusted,
    /// Wrong checksums were the cause, and it is worth another attempt.
    Doubted { event: Event },
    /// Nothing comes of it: lanes are opened no more before an order, for this reason.
    InVain { events: [Event; 2], reason: String },
}

impl ChecksumBreaker {
    /// Lanes are lost, as `why` says, when so much of the guest had come to the destination and so many wrong
    /// checksums had been noticed.
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
    /// What is told, and why lanes are opened no more, if they are not.
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
    fn it_is_enough_when_nothing_comes_of_it() {
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
            // Of other causes there may be any number.
            assert!(!lost(0, 5));
            assert!(lost(2, 5));
        }
        for progress in 6..100 {
            assert!(!lost(1, progress));
        }
    }
}
