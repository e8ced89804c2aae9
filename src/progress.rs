//! Progress on a terminal: a bar on stderr while pages move.

use std::io::IsTerminal;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::report::Counters;

/// How often the bar moves.
pub(crate) const INTERVAL: Duration = Duration::from_millis(100);

/// A bar over bytes of guest memory; nothing where stderr is no terminal, or when asked to be quiet.
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    pub(crate) fn new(total_bytes: u64, quiet: bool) -> Progress {
        let target = if std::io::stderr().is_terminal() && !quiet {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(total_bytes), target);
        let style = "{msg:>9} [{wide_bar}] {binary_bytes}/{binary_total_bytes} \
                     {binary_bytes_per_sec} {eta}";
        bar.set_style(ProgressStyle::with_template(style).expect("a constant template is valid"));
        Progress { bar }
    }

    /// Names what is going on: `saving`, `filling`…
    pub(crate) fn phase(&self, name: &'static str) {
        self.bar.set_message(name);
    }

    pub(crate) fn update(&self, counters: &Counters) {
        let bytes = counters.data_bytes.load(Relaxed)
            + counters.zero_bytes.load(Relaxed)
            + counters.hole_bytes.load(Relaxed);
        self.bar.set_position(bytes);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
