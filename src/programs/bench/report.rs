//! The results of a test: a table on the terminal while it runs, or one JSON object at its end with iperf3's names, and
//! umem's own under `umem`.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::socket::{SockaddrStorage, getpeername};
use serde_json::{Value, json};

use super::options::Client;
use super::protocol::{Counts, Direction, Measured, Test};
use super::sides::SoFar;
use super::verdict::Verdict;
use crate::error::Error;
use crate::observe::bench as page;
use crate::runtime::print;
use crate::statistics::Latency;
use crate::transport::uri::Uri;

/// The end of an interval.
pub(super) struct Tick {
    /// In each direction, since counting began.
    pub(super) so_far: Vec<SoFar>,
    pub(super) omitted: bool,
    /// Fault latencies here in the interval.
    pub(super) ours: Option<Latency>,
}

/// The growing report of a test.
pub(super) struct Report {
    json: bool,
    /// A file for an HTML page.
    page: Option<PathBuf>,
    start: Value,
    intervals: Vec<Value>,
    /// Intervals that wait for the server's fault latencies.
    waiting: VecDeque<Tick>,
    /// The end of the last reported interval.
    last: Vec<SoFar>,
    /// Counting has restarted behind this many of the waiting intervals.
    anew: Option<usize>,
}

impl Report {
    pub(super) fn new(options: &Client) -> Report {
        let (host, port) = match &options.uri {
            Uri::Tcp { host, port } => (host.clone(), *port),
            other => (other.to_string(), 0),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let system = nix::sys::utsname::uname().ok().map(|names| {
            [names.sysname(), names.nodename(), names.release(), names.machine()]
                .map(|name| name.to_string_lossy().into_owned())
                .join(" ")
        });
        let start = json!({
            "version": concat!("umem ", env!("CARGO_PKG_VERSION")),
            "system_info": system,
            "timestamp": { "timesecs": now },
            "connecting_to": { "host": host, "port": port },
            "test_start": {
                "protocol": if port == 0 { "UNIX" } else { "TCP" },
                "num_streams": options.test.lanes,
                "omit": options.omit.as_secs_f64(),
                "duration": options.duration.map_or(0.0, |duration| duration.as_secs_f64()),
                "bytes": options.test.bytes.unwrap_or(0),
                "reverse": u8::from(options.test.reverse),
                "bidir": u8::from(options.test.bidir),
            },
        });
        Report {
            json: options.json,
            page: options.report.clone(),
            start,
            intervals: Vec::new(),
            waiting: VecDeque::new(),
            last: Vec::new(),
            anew: None,
        }
    }

    /// The lanes are open.
    pub(super) fn started(&mut self, test: &Test, cookie: &str) {
        self.start["cookie"] = json!(cookie);
        self.start["test_start"]["umem"] = json!({
            "kind": kind(test),
            "page_size": test.pages.bytes(),
            "fault_rate": test.fault_rate,
            "zero_percent": test.zero_percent,
            "discard": test.discard,
            "region_bytes": test.region_bytes,
        });
        if !self.json {
            let what = if test.discard {
                "pages are discarded".into()
            } else {
                format!("pages of {} into fresh {} memory", test.pages, test.kind)
            };
            let lanes = if test.lanes == 1 { "lane" } else { "lanes" };
            let both = if test.bidir { " each way" } else { "" };
            print::out_line(&format!("{} {lanes}{both}, {what}", test.lanes));
            print::out_line("Interval           Transfer       Bitrate          Retr     Pages/s");
        }
    }

    /// An interval has ended; with `asked` it is reported when the server's fault latencies have arrived.
    pub(super) fn tick(&mut self, test: &Test, tick: Tick, asked: bool) {
        if asked {
            self.waiting.push_back(tick);
        } else {
            self.interval(test, tick, None);
        }
    }

    /// The server's fault latencies for the oldest waiting interval.
    pub(super) fn faults(&mut self, test: &Test, theirs: Latency) {
        let Some(tick) = self.waiting.pop_front() else { return };
        self.interval(test, tick, Some(theirs));
        if let Some(left) = &mut self.anew {
            *left = left.saturating_sub(1);
            if *left == 0 {
                self.measure();
            }
        }
    }

    /// Counting restarts behind the intervals that have ended.
    pub(super) fn measure(&mut self) {
        if self.waiting.is_empty() {
            self.last.clear();
            self.anew = None;
        } else {
            self.anew = Some(self.waiting.len());
        }
    }

    fn interval(&mut self, test: &Test, tick: Tick, theirs: Option<Latency>) {
        let mut interval = json!({});
        for (index, &direction) in test.directions().iter().enumerate() {
            let (end, counts, retransmits) = tick.so_far[index];
            let nothing = (Duration::ZERO, Counts::default(), None);
            let before = self.last.get(index).copied().unwrap_or(nothing);
            let moved = counts - before.1;
            let again = retransmits.map(|now| now.saturating_sub(before.2.unwrap_or(0)));
            let times = (before.0.as_secs_f64(), end.as_secs_f64());
            let faults = match direction {
                Direction::Forward => theirs.as_ref(),
                Direction::Reverse => tick.ours.as_ref(),
            };
            if !self.json {
                let mut note = way(test, direction).to_owned();
                if tick.omitted {
                    note += " (omitted)";
                }
                if let Some(faults) = faults {
                    note += &format!(" {}", in_words(faults));
                }
                print::out_line(&row(times, &moved, again, note.trim()));
            }
            let seconds = times.1 - times.0;
            let mut sum = json!({
                "start": times.0,
                "end": times.1,
                "seconds": seconds,
                "bytes": moved.bytes,
                "bits_per_second": rate(moved.bytes, seconds) * 8.0,
                "retransmits": again,
                "omitted": tick.omitted,
                "sender": direction == Direction::Forward,
                "pages_per_second": rate(moved.pages(), seconds),
            });
            if let Some(faults) = faults {
                sum["faults_per_second"] = json!(rate(faults.count, seconds));
                sum["fault_latency_us"] = json!(faults);
            }
            interval[named("sum", test, direction)] = sum;
        }
        if self.json || self.page.is_some() {
            self.intervals.push(interval);
        }
        self.last = tick.so_far;
    }

    /// The end. The measurements of both programs are in the order of the directions.
    pub(super) fn completed(
        &self,
        test: &Test,
        ours: &[Measured],
        theirs: &[Measured],
        interrupted: bool,
    ) {
        let error = "interrupted: the test was cut short";
        let results: Vec<Outcome> = test
            .directions()
            .iter()
            .zip(ours.iter().zip(theirs))
            .map(|(&direction, (ours, theirs))| Outcome::of(test, direction, ours, theirs))
            .collect();
        let mut document = json!({
            "start": self.start,
            "intervals": self.intervals,
            "end": self.end(test, &results, &ours[0], &theirs[0]),
        });
        if interrupted {
            document["error"] = json!(error);
        }
        if self.json {
            print::out_line(&document.to_string());
        } else {
            results.iter().for_each(|result| result.print(test));
        }
        if let Some(Err(error)) = self.page.as_ref().map(|path| page::write(path, &document)) {
            print::err_line(&format!("umem: no report: {error}"));
        }
        if interrupted {
            print::err_line(&format!("umem: {error}"));
        }
    }

    fn end(&self, test: &Test, results: &[Outcome], ours: &Measured, theirs: &Measured) -> Value {
        let mut end = json!({
            "cpu_utilization_percent": {
                "host_total": percent(ours.user_s + ours.system_s, ours.seconds),
                "host_user": percent(ours.user_s, ours.seconds),
                "host_system": percent(ours.system_s, ours.seconds),
                "remote_total": percent(theirs.user_s + theirs.system_s, theirs.seconds),
                "remote_user": percent(theirs.user_s, theirs.seconds),
                "remote_system": percent(theirs.system_s, theirs.seconds),
            },
            "sender_tcp_congestion": results[0].sent.congestion,
            "receiver_tcp_congestion": results[0].received.congestion,
        });
        let bytes = results.iter().map(|result| result.received.counts.bytes);
        let all_bytes = bytes.fold(0, u64::saturating_add);
        for result in results {
            for (name, side) in [("sum_sent", result.sent), ("sum_received", result.received)] {
                end[named(name, test, result.direction)] = result.sum(side, name == "sum_sent");
            }
            let mut umem = result.umem(test);
            // A thread's share cannot be separated from the other direction's.
            umem["cpu_s_per_gb"] = json!(cpu_s_per_gb(ours, theirs, all_bytes));
            end[named("umem", test, result.direction)] = umem;
        }
        end
    }

    /// With `--json`: the test failed.
    pub(super) fn failed(&self, error: &Error) {
        print::out_line(
            &json!({
                "start": self.start,
                "intervals": self.intervals,
                "end": {},
                "error": error.to_string(),
            })
            .to_string(),
        );
    }
}

/// The result of one direction.
struct Outcome<'a> {
    direction: Direction,
    sent: &'a Measured,
    received: &'a Measured,
    /// Of both programs, for each GB of this direction.
    cpu_s_per_gb: f64,
    verdict: Verdict,
}

impl<'a> Outcome<'a> {
    fn of(
        test: &Test,
        direction: Direction,
        ours: &'a Measured,
        theirs: &'a Measured,
    ) -> Outcome<'a> {
        let (sent, received) = match direction {
            Direction::Forward => (ours, theirs),
            Direction::Reverse => (theirs, ours),
        };
        let cpu_s_per_gb = cpu_s_per_gb(sent, received, received.counts.bytes);
        Outcome {
            direction,
            sent,
            received,
            cpu_s_per_gb,
            verdict: Verdict::of(test, sent, received),
        }
    }

    /// For the terminal.
    fn print(&self, test: &Test) {
        let Outcome { sent, received, .. } = self;
        for (name, side) in [("sent", sent), ("received", received)] {
            let again = side.retransmits.filter(|_| name == "sent");
            let note = format!("{} {name}", way(test, self.direction));
            print::out_line(&row((0.0, side.seconds), &side.counts, again, note.trim()));
        }
        print::out_line(&format!(
            "CPU: sender {:.0} %, receiver {:.0} %; {:.2} s for each GB; zero-copy: {}; congestion \
             control: {}",
            percent(sent.user_s + sent.system_s, sent.seconds),
            percent(received.user_s + received.system_s, received.seconds),
            self.cpu_s_per_gb,
            zero_copy_share(&sent.counts)
                .map_or("not measured".into(), |share| format!("{:.0} %", share * 100.0)),
            sent.congestion,
        ));
        if let Some(faults) = &received.faults {
            print::out_line(&format!(
                "{} from access to return, {:.0} a second",
                in_words(faults),
                rate(faults.count, received.seconds)
            ));
        }
        if let Some(verified) = verified(test, received) {
            print::out_line(&format!("{verified} pages were checked and right"));
        }
        print::out_line(&self.verdict.text);
    }

    /// With iperf3's names.
    fn sum(&self, side: &Measured, is_sent: bool) -> Value {
        let mut sum = json!({
            "start": 0,
            "end": side.seconds,
            "seconds": side.seconds,
            "bytes": side.counts.bytes,
            "bits_per_second": rate(side.counts.bytes, side.seconds) * 8.0,
            "sender": self.direction == Direction::Forward,
        });
        if is_sent {
            sum["retransmits"] = json!(side.retransmits);
        }
        sum
    }

    /// umem's own figures.
    fn umem(&self, test: &Test) -> Value {
        let Outcome { sent, received, verdict, .. } = self;
        let mut umem = json!({
            "kind": kind(test),
            "pages": received.counts.pages(),
            "pages_per_second": rate(received.counts.pages(), received.seconds),
            "zero_bytes": received.counts.zero_bytes,
            "verified_pages": verified(test, received),
            "zero_copy_share": zero_copy_share(&sent.counts),
            "sender_busy": sent.busy,
            "receiver_busy": received.busy,
            "sender_pressed": sent.pressed,
            "receiver_pressed": received.pressed,
            "placing_s_per_gib": received.placing_s_per_gib,
            "limit": verdict.limit,
            "verdict": verdict.text,
        });
        if let Some(faults) = &received.faults {
            umem["faults_per_second"] = json!(rate(faults.count, received.seconds));
            umem["fault_latency_us"] = json!(faults);
        }
        umem
    }
}

/// The server's sentence about a finished test.
pub(super) fn served(test: &Test, measured: &[Measured]) -> String {
    let sentence = |(direction, measured): (&Direction, &Measured)| {
        format!(
            "{} {:.2} GB in {:.2} s, {:.2} Gbit/s",
            if *direction == Direction::Reverse { "sent" } else { "received" },
            measured.counts.bytes as f64 / 1e9,
            measured.seconds,
            rate(measured.counts.bytes, measured.seconds) * 8.0 / 1e9,
        )
    };
    test.directions().iter().zip(measured).map(sentence).collect::<Vec<_>>().join("; ")
}

/// A key of the report: iperf3's for one direction, and its name for the second one.
pub(super) fn named(key: &str, test: &Test, direction: Direction) -> String {
    let is_second = test.bidir && direction == Direction::Reverse;
    format!("{key}{}", if is_second { "_bidir_reverse" } else { "" })
}

/// The direction, if there are two: iperf3's labels.
fn way(test: &Test, direction: Direction) -> &'static str {
    match direction {
        _ if !test.bidir => "",
        Direction::Forward => "TX-C",
        Direction::Reverse => "RX-C",
    }
}

fn kind(test: &Test) -> String {
    if test.discard { "discard".into() } else { test.kind.to_string() }
}

fn in_words(faults: &Latency) -> String {
    let Latency { count, p50, p99, max, .. } = faults;
    format!("{count} faults: median {p50} µs, p99 {p99} µs, maximum {max} µs")
}

fn row(times: (f64, f64), moved: &Counts, again: Option<u64>, note: &str) -> String {
    let seconds = times.1 - times.0;
    let row = format!(
        "{:6.2}-{:<6.2} s  {:8.2} GB  {:8.2} Gbit/s  {:>8}  {:>10.0}  {note}",
        times.0,
        times.1,
        moved.bytes as f64 / 1e9,
        rate(moved.bytes, seconds) * 8.0 / 1e9,
        again.map_or_else(|| "-".into(), |again| again.to_string()),
        rate(moved.pages(), seconds),
    );
    row.trim_end().to_owned()
}

fn rate(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

fn percent(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { 100.0 * part / whole } else { 0.0 }
}

/// Processor seconds of both programs for each 10^9 bytes.
fn cpu_s_per_gb(one: &Measured, other: &Measured, bytes: u64) -> f64 {
    let cpu = |side: &Measured| side.user_s + side.system_s;
    let gb = bytes as f64 / 1e9;
    if gb > 0.0 { (cpu(one) + cpu(other)) / gb } else { 0.0 }
}

/// The share of sent bytes that were not copied; None if the path does not report it.
fn zero_copy_share(sent: &Counts) -> Option<f64> {
    let all = sent.zero_copied_bytes.saturating_add(sent.copied_bytes);
    (all > 0).then(|| sent.zero_copied_bytes as f64 / all as f64)
}

fn verified(test: &Test, received: &Measured) -> Option<u64> {
    test.verify.then_some(received.verified_pages)
}

/// Whether the other end is on this machine, where zero-copy sends are copied anyway.
pub(super) fn is_local(socket: BorrowedFd<'_>) -> bool {
    let Ok(peer) = getpeername::<SockaddrStorage>(socket.as_raw_fd()) else {
        return false;
    };
    match (peer.as_sockaddr_in(), peer.as_sockaddr_in6()) {
        (Some(address), _) => address.ip().is_loopback(),
        (_, Some(address)) => address.ip().to_canonical().is_loopback(),
        (None, None) => true,
    }
}
