//! Progress of a migration: bars on a terminal, a line every few seconds elsewhere, events in JSON.
//!
//! The control thread calls [`Progress::update`] on each wake-up. Nothing here waits, not even for stderr.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use super::output::Output;
use crate::observe::trace;
use crate::observe::watch::{Status, Watch};
use crate::runtime::{print, screen};
use crate::statistics::Counters;

/// The interval of the bar.
const INTERVAL: Duration = Duration::from_millis(100);

/// The interval of lines or events, without a bar.
const LINE_INTERVAL: Duration = Duration::from_secs(3);

/// The display of progress, and the other observers.
pub(crate) struct Progress {
    watch: Arc<Watch>,
    show: Show,
    phase: Option<Phase>,
}

enum Show {
    Nothing,
    /// A bar for each phase; its last state stays when the next phase begins.
    Bars,
    /// Sentences.
    Lines {
        next: Instant,
    },
    /// JSON objects.
    Events {
        output: Output,
        next: Instant,
    },
}

struct Phase {
    name: &'static str,
    began: Instant,
    moved_bytes: u64,
    bar: ProgressBar,
}

impl Progress {
    /// The progress of a guest of this size, bytes, with these counters. `quiet` shows none.
    pub(crate) fn new(
        watch: &Arc<Watch>,
        counters: &Arc<Counters>,
        total_bytes: u64,
        output: &Output,
        quiet: bool,
    ) -> Progress {
        watch.attach(counters.clone(), total_bytes);
        let next = Instant::now() + LINE_INTERVAL;
        let show = match output {
            _ if quiet => Show::Nothing,
            Output::Host(_) => Show::Nothing,
            // Lines of a trace and a bar would overwrite each other.
            _ if std::io::stderr().is_terminal() && !trace::is_on() => Show::Bars,
            Output::Json => Show::Events { output: output.clone(), next },
            Output::Person => Show::Lines { next },
        };
        Progress { watch: watch.clone(), show, phase: None }
    }

    /// The other observers.
    pub(crate) fn watch(&self) -> &Watch {
        &self.watch
    }

    /// The longest time between two updates.
    pub(crate) fn interval(&self) -> Duration {
        self.watch.interval(INTERVAL)
    }

    /// Names the current step: `saving`, `filling`…
    pub(crate) fn phase(&mut self, name: &'static str) {
        self.end_phase();
        let bar = match self.show {
            Show::Bars => bar(name, self.watch.status().total_bytes),
            _ => ProgressBar::hidden(),
        };
        if matches!(self.show, Show::Bars) {
            screen::show(bar.clone());
        }
        let moved_bytes = self.watch.moved_bytes();
        self.phase = Some(Phase { name, began: Instant::now(), moved_bytes, bar });
    }

    /// Leaves a line with the last state of the phase.
    fn end_phase(&mut self) {
        let Some(Phase { name, began, moved_bytes, bar }) = self.phase.take() else { return };
        if !matches!(self.show, Show::Bars) {
            return;
        }
        screen::clear();
        if print::stderr_is_ready() {
            bar.finish_and_clear();
        } else {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        // Fewer than before if a lost connection discarded some.
        let bytes = self.watch.moved_bytes().saturating_sub(moved_bytes);
        print::err_line(&phase_line(name, began.elapsed(), bytes));
    }

    /// Reads the counters, for the display and for a report.
    pub(crate) fn update(&mut self) {
        self.watch.tick();
        let now = Instant::now();
        match &mut self.show {
            Show::Nothing => {}
            Show::Bars => {
                // Drawing on a stopped terminal would block.
                if let Some(Phase { name, bar, .. }) = &self.phase
                    && print::stderr_is_ready()
                {
                    let status = self.watch.status();
                    match pass(&status) {
                        Some(pass) => {
                            bar.set_length(pass.bytes);
                            bar.set_position(pass.bytes - pass.remaining_bytes);
                            bar.set_prefix(format!("pass {}", pass.number));
                            bar.set_message(pass.text(&status));
                        }
                        // The passes are over, and the next phase begins.
                        None if *name == COPYING => {}
                        None => {
                            bar.set_position(status.done_bytes);
                            bar.set_message(match bar.length() {
                                Some(_) => flow(&status) + &waiting(&status),
                                None => waiting(&status),
                            });
                        }
                    }
                }
            }
            Show::Lines { next } if now >= *next => {
                *next = now + LINE_INTERVAL;
                let name = self.phase.as_ref().map(|phase| phase.name);
                screen::say(&format!("umem: {}", sentence(name, &self.watch.status())));
            }
            Show::Events { output, next } if now >= *next => {
                *next = now + LINE_INTERVAL;
                let status = self.watch.status();
                let name = self.phase.as_ref().map(|phase| phase.name);
                output.event("progress", fields(&status, sentence(name, &status)), "");
            }
            Show::Lines { .. } | Show::Events { .. } => {}
        }
    }
}

/// A status with the field names of events, and as text.
fn fields(status: &Status, text: String) -> Value {
    let status = serde_json::to_value(status).expect("plain numbers and strings");
    let status = status.as_object().into_iter().flatten();
    let named = status.map(|(name, value)| (name.replace('-', "_"), value.clone()));
    named.chain([("text".into(), text.into())]).collect()
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end_phase();
    }
}

/// Phases that move pages have a bar, the others a spinner.
fn bar(name: &'static str, total_bytes: u64) -> ProgressBar {
    let moves_pages = ["sending", "filling", COPYING].contains(&name);
    let style = match moves_pages {
        // The bar's own rate and estimate know neither passes nor bytes that an earlier process has moved.
        true => "{prefix:>10} [{wide_bar}] {binary_bytes}/{binary_total_bytes}{msg}",
        false => "{prefix:>10} {spinner} {elapsed}{msg}",
    };
    let target = ProgressDrawTarget::stderr();
    let bar = ProgressBar::with_draw_target(moves_pages.then_some(total_bytes), target);
    bar.set_style(ProgressStyle::with_template(style).expect("a constant template is valid"));
    bar.set_prefix(name);
    bar
}

/// The phase of passes while the guest runs.
const COPYING: &str = "copying";

/// A pass over the running guest's memory.
struct Pass {
    number: u32,
    bytes: u64,
    remaining_bytes: u64,
}

/// The current pass, or the last one until the guest is stopped.
fn pass(status: &Status) -> Option<Pass> {
    Some(Pass {
        number: status.pass?,
        bytes: status.pass_bytes?,
        remaining_bytes: status.remaining_bytes?,
    })
}

impl Pass {
    /// The rate, the time left, and the rate of guest writes.
    fn text(&self, status: &Status) -> String {
        let left = match status.seconds_left {
            Some(seconds) if self.remaining_bytes > 0 => left(seconds),
            _ => String::new(),
        };
        let dirty = status.dirty_bytes_per_s;
        let dirty = dirty.map(|rate| format!(", the guest writes {}/s", HumanBytes(rate)));
        format!(", {}/s{left}{}", HumanBytes(status.bytes_per_s), dirty.unwrap_or_default())
    }
}

/// The rate and the time left outside of a pass.
fn flow(status: &Status) -> String {
    let left = match status.seconds_left {
        Some(seconds) if status.done_bytes < status.total_bytes => left(seconds),
        _ => String::new(),
    };
    format!(", {}/s{left}", HumanBytes(status.bytes_per_s))
}

fn left(seconds: f64) -> String {
    format!(", {} left", HumanDuration(Duration::from_secs_f64(seconds.clamp(1.0, 1e9))))
}

fn waiting(status: &Status) -> String {
    match status.faults_waiting {
        0 => String::new(),
        1 => ", 1 fault waits".into(),
        count => format!(", {count} faults wait"),
    }
}

/// The line that stays of a phase on the terminal.
fn phase_line(name: &str, took: Duration, bytes: u64) -> String {
    let seconds = took.as_secs_f64();
    let took = match seconds < 1.0 {
        true => format!("{:.1} ms", seconds * 1e3),
        false => format!("{seconds:.1} s"),
    };
    if bytes == 0 {
        return format!("{name:>10}  {took}");
    }
    let rate = HumanBytes((bytes as f64 / seconds.max(1e-6)) as u64);
    format!("{name:>10}  {took}, {}, {rate}/s", HumanBytes(bytes))
}

/// The text of a bar.
fn sentence(phase: Option<&str>, status: &Status) -> String {
    if let Some(pass) = pass(status) {
        return format!(
            "pass {}: {} of {} left{}",
            pass.number,
            HumanBytes(pass.remaining_bytes),
            HumanBytes(pass.bytes),
            pass.text(status),
        );
    }
    format!(
        "{}: {} of {}{}{}",
        phase.unwrap_or(status.phase),
        HumanBytes(status.done_bytes),
        HumanBytes(status.total_bytes),
        flow(status),
        waiting(status),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        Status {
            phase: "serving pages",
            total_bytes: 2 << 30,
            done_bytes: 512 << 20,
            bytes_per_s: 256 << 20,
            seconds_left: Some(6.0),
            ..Status::default()
        }
    }

    #[test]
    fn line_shows_progress_and_waiting_faults() {
        let text = sentence(Some("sending"), &status());
        assert_eq!(text, "sending: 512.00 MiB of 2.00 GiB, 256.00 MiB/s, 6 seconds left");
        let waits = Status { faults_waiting: 2, seconds_left: None, ..status() };
        let text = sentence(None, &waits);
        assert_eq!(text, "serving pages: 512.00 MiB of 2.00 GiB, 256.00 MiB/s, 2 faults wait");
        // A rate close to 0 has a text too.
        let slow = Status { seconds_left: Some(f64::MAX), ..status() };
        assert!(sentence(None, &slow).contains("left"));
    }

    #[test]
    fn line_shows_the_current_pass_and_its_remaining_bytes() {
        let pass = Status {
            pass: Some(2),
            pass_bytes: Some(512 << 20),
            remaining_bytes: Some(128 << 20),
            seconds_left: Some(3.0),
            dirty_bytes_per_s: Some(64 << 20),
            ..status()
        };
        let text = sentence(Some("copying"), &pass);
        let first = "pass 2: 128.00 MiB of 512.00 MiB left, 256.00 MiB/s, 3 seconds left";
        assert_eq!(text, format!("{first}, the guest writes 64.00 MiB/s"));
        // Before the first pass has ended, and after it.
        let ended = Status { seconds_left: None, dirty_bytes_per_s: None, ..pass };
        let text = sentence(Some("copying"), &ended);
        assert_eq!(text, "pass 2: 128.00 MiB of 512.00 MiB left, 256.00 MiB/s");
    }

    #[test]
    fn finished_phase_leaves_its_duration_and_rate() {
        assert_eq!(
            phase_line("switching", Duration::from_micros(23_400), 0),
            " switching  23.4 ms"
        );
        let moved = phase_line("filling", Duration::from_secs(2), 2 << 30);
        assert_eq!(moved, "   filling  2.0 s, 2.00 GiB, 1.00 GiB/s");
    }
}
