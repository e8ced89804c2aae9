//! The passes over a running guest's memory, as others see them and what others may do with them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::runtime::bandwidth::Bandwidth;

/// What others may do with the passes of a source.
pub(super) struct PassControl {
    /// The guest runs at the destination before its last pages come.
    pub(super) postcopy: bool,
    /// The limit of the passes.
    pub(super) limit: Arc<Bandwidth>,
    /// Has the passes end.
    pub(super) end: Box<dyn Fn() + Send + Sync>,
    /// That has been asked for.
    pub(super) has_ended: AtomicBool,
}

impl PassControl {
    /// Has the passes end, however often this is called.
    pub(super) fn end(&self) {
        if !self.has_ended.swap(true, SeqCst) {
            (self.end)();
        }
    }
}

/// How far the passes are.
#[derive(Default)]
pub(super) struct PassProgress {
    /// The last pass that has begun, from 1; 0 before the first one.
    pass: u32,
    going: Option<Going>,
    dirty_bytes_per_s: Option<u64>,
    expected_downtime: Option<Duration>,
}

/// The passes are not over.
struct Going {
    /// The pass, unless it has ended and no other one has begun.
    began: Option<Instant>,
    /// Bytes of pages of any kind that the pass has to send, or that the last one has left.
    bytes: u64,
    /// Bytes that had gone in passes when it began.
    gone_before: u64,
}

/// The passes at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct PassView {
    pub(super) pass: Option<u32>,
    pub(super) pass_bytes: Option<u64>,
    pub(super) remaining_bytes: Option<u64>,
    /// Until the end of the pass, at the rate of all of it so far.
    pub(super) seconds_left: Option<f64>,
    pub(super) dirty_bytes_per_s: Option<u64>,
    pub(super) expected_downtime_ms: Option<f64>,
}

impl PassProgress {
    /// A pass begins that has so many bytes to send, when so many have gone in passes.
    pub(super) fn begin(&mut self, bytes: u64, gone_bytes: u64, now: Instant) {
        self.pass += 1;
        self.going = Some(Going { began: Some(now), bytes, gone_before: gone_bytes });
    }

    /// The pass has ended, and has left so many bytes.
    pub(super) fn end(
        &mut self,
        left_bytes: u64,
        dirty_bytes_per_s: Option<u64>,
        expected_downtime: Option<Duration>,
    ) {
        self.going = Some(Going { began: None, bytes: left_bytes, gone_before: 0 });
        (self.dirty_bytes_per_s, self.expected_downtime) = (dirty_bytes_per_s, expected_downtime);
    }

    /// The guest stands still.
    pub(super) fn over(&mut self) {
        self.going = None;
    }

    /// How it stands when so many bytes have gone in passes.
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
        if let Some(began) = began.filter(|_| gone > 0) {
            let seconds = now.saturating_duration_since(began).as_secs_f64();
            view.seconds_left = Some(remaining as f64 * seconds / gone as f64);
        }
        view
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// The rate of a moment says nothing: a pass that has stalled is later by the time that it has stalled.
    #[test]
    fn the_time_that_is_left_is_that_of_the_pass_at_its_own_rate() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut passes = PassProgress::default();
        assert_eq!(passes.view(0, begun), PassView::default());
        passes.begin(1000 * MIB, 0, begun);
        assert_eq!(passes.view(0, at(100)).seconds_left, None, "nothing is known yet");
        let view = passes.view(250 * MIB, at(1000));
        assert_eq!((view.pass, view.pass_bytes), (Some(1), Some(1000 * MIB)));
        assert_eq!((view.remaining_bytes, view.seconds_left), (Some(750 * MIB), Some(3.0)));
        assert_eq!(passes.view(250 * MIB, at(2000)).seconds_left, Some(6.0));
        // What the guest writes meanwhile is the next pass's.
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
