//! Lanes that are lost because of wrong checksums, again and again: when to stop trying.
//!
//! A path that changes a bit now and then costs a recovery each time, and the migration comes to its end. One
//! that changes all that passes would have both sides open lanes for ever, as fast as they can: after
//! [`IN_A_ROW_MAX`] losses without a page in between that was right, they pause until a resume by hand.

use std::sync::atomic::Ordering::Relaxed;

use crate::control::event::{Event, Remark};
use crate::report::{Counters, Output};

/// Losses because of wrong checksums, with no page in between that came whole, after which lanes are no more
/// opened. Even a path that spoils 9 of 10 attempts gets a page through before that, more often than not.
pub(crate) const IN_A_ROW_MAX: u32 = 8;

/// What one side has seen of it.
#[derive(Default)]
pub(crate) struct Suspicion {
    errors: u64,
    progress: u64,
    in_a_row: u32,
}

impl Suspicion {
    /// Lanes are lost, as `why` says, when so much of the guest had come to the destination. If wrong checksums
    /// were the cause that is told; and when it is enough of them, why there is a pause.
    pub(crate) fn lost(
        &mut self,
        why: &str,
        progress: u64,
        counters: &Counters,
        output: &Output,
    ) -> Option<String> {
        let errors = counters.checksum_errors.load(Relaxed);
        if errors == self.errors {
            return None;
        }
        output.tell(&Event::ChecksumError { reason: why.to_owned(), errors });
        let is_in_vain = progress == self.progress && self.errors > 0;
        self.in_a_row = if is_in_vain { self.in_a_row + 1 } else { 1 };
        (self.errors, self.progress) = (errors, progress);
        if self.in_a_row < IN_A_ROW_MAX {
            return None;
        }
        self.in_a_row = 0;
        let lost = format!(
            "{IN_A_ROW_MAX} consecutive connections failed checksum verification without one valid page"
        );
        output.tell(&Event::Remark(Remark::Distrusted { losses: IN_A_ROW_MAX }));
        Some(format!("{lost}, the last because {why}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn it_is_enough_when_nothing_comes_of_it() {
        let (counters, output) = (Counters::default(), Output::Host(Arc::new(|_| {})));
        let mut suspicion = Suspicion::default();
        let mut lost = |wrong, progress| {
            Counters::add(&counters.checksum_errors, wrong);
            let told = suspicion.lost("why", progress, &counters, &output);
            assert!(told.iter().all(|told| told.contains("8 consecutive connections")));
            told.is_some()
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
