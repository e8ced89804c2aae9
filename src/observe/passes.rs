//! The state of the passes over a running guest's memory, and the orders that change them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::runtime::bandwidth::Bandwidth;

/// From this time on a pass has an estimate of its end.
const PASS_KNOWN: Duration = Duration::from_millis(500);

/// The controls of a source's passes.
pub(super) struct PassControl {
    /// Whether the guest runs at the destination before its last pages arrive.
    pub(super) postcopy: bool,
    /// The limit of the passes.
    pub(super) limit: Arc<Bandwidth>,
    /// Ends the passes.
    pub(super) end: Box<dyn Fn() + Send + Sync>,
    /// Whether `end` has been called.
    pub(super) has_ended: AtomicBool,
}

impl PassControl {
    /// Ends the passes; further calls have no effect.
    pub(super) fn end(&self) {
        if !self.has_ended.swap(true, SeqCst) {
            (self.end)();
        }
    }
}

/// The progress of the passes.
#[derive(Default)]
pub(super) struct PassProgress {
    /// The last pass that has begun, from 1; 0 before the first pass.
    pass: u32,
    going: Option<Going>,
    dirty_bytes_per_s: Option<u64>,
    expected_downtime: Option<Duration>,
}

/// Whether passes may still follow.
struct Going {
    /// The current pass; None between passes.
    began: Option<Instant>,
    /// Bytes of pages of any kind that the pass has to send, or that the last pass left.
    bytes: u64,
    /// Bytes that earlier passes had sent at its start.
    gone_before: u64,
}

/// A snapshot of the passes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct PassView {
    pub(super) pass: Option<u32>,
    pub(super) pass_bytes: Option<u64>,
    pub(super) remaining_bytes: Option<u64>,
    /// Time to the end of the pass, at the average rate of the pass so far.
    pub(super) seconds_left: Option<f64>,
    pub(super) dirty_bytes_per_s: Option<u64>,
    pub(super) expected_downtime_ms: Option<f64>,
}

impl PassProgress {
    /// A pass begins: the bytes that it has to send, and the bytes that all passes have sent before.
    pub(super) fn begin(&mut self, bytes: u64, gone_bytes: u64, now: Instant) {
        self.pass += 1;
        self.going = Some(Going { began: Some(now), bytes, gone_before: gone_bytes });
    }

    /// The pass has ended and left these bytes.
    pub(super) fn end(
        &mut self,
        left_bytes: u64,
        dirty_bytes_per_s: Option<u64>,
        expected_downtime: Option<Duration>,
    ) {
        self.going = Some(Going { began: None, bytes: left_bytes, gone_before: 0 });
        (self.dirty_bytes_per_s, self.expected_downtime) = (dirty_bytes_per_s, expected_downtime);
    }

    /// The guest stands still: no pass follows.
    pub(super) fn over(&mut self) {
        self.going = None;
    }

    /// The snapshot after all passes have sent these bytes.
    pub(super) fn view(&self, gone_bytes: u64, now: Instant) -> PassView {
        let mut view = PassView {
            pass: (self.pass > 0).then_some(self.pass),
            dirty_bytes_per_s: self.dirty_bytes_per_s,
            expected_downtime_ms: self.expected_downtime.map(|time| time.as_secs_f64() * 1e3),
            ..PassView::default()
        };
        let Some(Going { began, bytes, gone_before }) = &self.going else { return view };
        let gone = began.map_or(0, |_| gone_bytes.saturating_sub(*gone_before));
        let remaining = bytes.saturating_sub(gone);
        (view.pass_bytes, view.remaining_bytes) = (Some(*bytes), Some(remaining));
        let seconds = began.map(|began| now.saturating_duration_since(began));
        // The beginning of a pass tells little about the rest.
        if let Some(seconds) = seconds.filter(|&seconds| gone > 0 && seconds >= PASS_KNOWN) {
            let seconds = seconds.as_secs_f64();
            view.seconds_left = Some(remaining as f64 * seconds / gone as f64);
        }
        view
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// The estimate uses the whole pass, not the current rate: a stall delays the end by its duration.
    #[test]
    fn time_left_follows_from_the_average_rate_of_the_pass() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut passes = PassProgress::default();
        assert_eq!(passes.view(0, begun), PassView::default());
        passes.begin(1000 * MIB, 0, begun);
        assert_eq!(passes.view(0, at(100)).seconds_left, None, "no byte has been sent yet");
        let view = passes.view(250 * MIB, at(1000));
        assert_eq!((view.pass, view.pass_bytes), (Some(1), Some(1000 * MIB)));
        assert_eq!((view.remaining_bytes, view.seconds_left), (Some(750 * MIB), Some(3.0)));
        assert_eq!(passes.view(250 * MIB, at(2000)).seconds_left, Some(6.0));
        // Pages that the guest writes meanwhile belong to the next pass.
        passes.end(100 * MIB, Some(50 * MIB), Some(Duration::from_millis(400)));
        let view = passes.view(1000 * MIB, at(4000));
        assert_eq!((view.remaining_bytes, view.seconds_left), (Some(100 * MIB), None));
        assert_eq!(view.dirty_bytes_per_s, Some(50 * MIB));
        assert_eq!(view.expected_downtime_ms, Some(400.0));
        passes.begin(100 * MIB, 1000 * MIB, at(4000));
        let view = passes.view(1050 * MIB, at(4500));
        assert_eq!((view.pass, view.remaining_bytes), (Some(2), Some(50 * MIB)));
        assert_eq!(view.seconds_left, Some(0.5));
        passes.over();
        let view = passes.view(1100 * MIB, at(5000));
        assert_eq!((view.pass, view.pass_bytes, view.seconds_left), (Some(2), None, None));
    }
}
