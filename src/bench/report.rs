//! What a test gave: a table on the terminal as it runs, or one JSON object at its end with the names
//! that iperf3 has, and ours under `umem`.

use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::socket::{SockaddrStorage, getpeername};
use serde_json::{Value, json};

use super::client::{Client, sender_and_receiver};
use super::protocol::{Counts, Measured, Test};
use crate::error::Error;
use crate::uri::Uri;

/// From this share of its time on a thread is what everything else waits for.
const BUSY: f64 = 0.9;

/// From this share of the receiver's time on placing pages in memory is what it is busy with.
const PLACING: f64 = 0.5;

/// What had been moved when an interval ended, since counting began.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Interval {
    pub(super) end: Duration,
    counts: Counts,
    retransmits: u64,
}

/// The report of a test, as it grows.
pub(super) struct Report {
    json: bool,
    start: Value,
    intervals: Vec<Value>,
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
            },
        });
        Report { json: options.json, start, intervals: Vec::new() }
    }

    /// The lanes are open.
    pub(super) fn started(&mut self, test: &Test, cookie: &str) {
        self.start["cookie"] = json!(cookie);
        self.start["test_start"]["umem"] = json!({
            "page_size": test.pages.bytes(),
            "zero_percent": test.zero_percent,
            "discard": test.discard,
            "region_bytes": test.region_bytes,
        });
        if !self.json {
            let what = if test.discard {
                "nothing is kept".into()
            } else {
                format!("pages of {} into fresh memory", test.pages)
            };
            let lanes = if test.lanes == 1 { "lane" } else { "lanes" };
            print_line(&format!("{} {lanes}, {what}", test.lanes));
            print_line("Interval           Transfer       Bitrate          Retr     Pages/s");
        }
    }

    /// What has come since `last`; returns the interval's end.
    pub(super) fn interval(
        &mut self,
        last: Interval,
        so_far: (Duration, Counts, Option<u64>),
        omitted: bool,
    ) -> Interval {
        let (end, counts, retransmits) = so_far;
        let now = Interval { end, counts, retransmits: retransmits.unwrap_or(0) };
        let seconds = now.end.saturating_sub(last.end).as_secs_f64();
        let moved = now.counts - last.counts;
        let again = retransmits.map(|_| now.retransmits.saturating_sub(last.retransmits));
        if self.json {
            self.intervals.push(json!({
                "sum": {
                    "start": last.end.as_secs_f64(),
                    "end": now.end.as_secs_f64(),
                    "seconds": seconds,
                    "bytes": moved.bytes,
                    "bits_per_second": rate(moved.bytes * 8, seconds),
                    "retransmits": again,
                    "omitted": omitted,
                    "pages_per_second": rate(moved.pages(), seconds),
                },
            }));
        } else {
            let note = if omitted { "(omitted)" } else { "" };
            let times = (last.end.as_secs_f64(), now.end.as_secs_f64());
            print_line(&row(times, &moved, again, note));
        }
        now
    }

    /// The end.
    pub(super) fn completed(
        &self,
        test: &Test,
        ours: &Measured,
        theirs: &Measured,
        interrupted: bool,
    ) {
        let (sent, received) = sender_and_receiver(test, ours, theirs);
        let verdict = Verdict::of(test, sent, received);
        let error = "interrupted: the test was cut short";
        if !self.json {
            for (name, side) in [("sent", sent), ("received", received)] {
                let times = (0.0, side.seconds);
                let again = side.retransmits.filter(|_| name == "sent");
                print_line(&row(times, &side.counts, again, name));
            }
            print_line(&format!(
                "CPU: sender {:.0} %, receiver {:.0} %; {:.2} s for each GB; zero-copy: {}; \
                 congestion control: {}",
                percent(sent.user_s + sent.system_s, sent.seconds),
                percent(received.user_s + received.system_s, received.seconds),
                cpu_s_per_gb(sent, received),
                zero_copy_share(&sent.counts)
                    .map_or("not measured".into(), |share| format!("{:.0} %", share * 100.0)),
                sent.congestion,
            ));
            if let Some(verified) = verified(test, received) {
                print_line(&format!("{verified} pages were checked and right"));
            }
            print_line(&verdict.text);
            if interrupted {
                eprintln!("umem: {error}");
            }
            return;
        }
        let sum = |side: &Measured| {
            json!({
                "start": 0,
                "end": side.seconds,
                "seconds": side.seconds,
                "bytes": side.counts.bytes,
                "bits_per_second": rate(side.counts.bytes * 8, side.seconds),
                "sender": !test.reverse,
            })
        };
        let mut sum_sent = sum(sent);
        sum_sent["retransmits"] = json!(sent.retransmits);
        let mut document = json!({
            "start": self.start,
            "intervals": self.intervals,
            "end": {
                "sum_sent": sum_sent,
                "sum_received": sum(received),
                "cpu_utilization_percent": {
                    "host_total": percent(ours.user_s + ours.system_s, ours.seconds),
                    "host_user": percent(ours.user_s, ours.seconds),
                    "host_system": percent(ours.system_s, ours.seconds),
                    "remote_total": percent(theirs.user_s + theirs.system_s, theirs.seconds),
                    "remote_user": percent(theirs.user_s, theirs.seconds),
                    "remote_system": percent(theirs.system_s, theirs.seconds),
                },
                "sender_tcp_congestion": sent.congestion,
                "receiver_tcp_congestion": received.congestion,
                "umem": {
                    "kind": if test.discard { "discard" } else { "shared" },
                    "pages": received.counts.pages(),
                    "pages_per_second": rate(received.counts.pages(), received.seconds),
                    "zero_bytes": received.counts.zero_bytes,
                    "verified_pages": verified(test, received),
                    "zero_copy_share": zero_copy_share(&sent.counts),
                    "cpu_s_per_gb": cpu_s_per_gb(sent, received),
                    "sender_busy": sent.busy,
                    "receiver_busy": received.busy,
                    "placing_s_per_gib": received.placing_s_per_gib,
                    "limit": verdict.limit,
                    "verdict": verdict.text,
                },
            },
        });
        if interrupted {
            document["error"] = json!(error);
            eprintln!("umem: {error}");
        }
        print_line(&document.to_string());
    }

    /// With `--json`: the test failed.
    pub(super) fn failed(&self, error: &Error) {
        print_line(
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

/// What a server says of a test that it has served.
pub(super) fn served(test: &Test, measured: &Measured) -> String {
    format!(
        "{} {:.2} GB in {:.2} s, {:.2} Gbit/s",
        if test.reverse { "sent" } else { "received" },
        measured.counts.bytes as f64 / 1e9,
        measured.seconds,
        rate(measured.counts.bytes * 8, measured.seconds) / 1e9,
    )
}

/// What the test's rate rests on.
#[derive(Debug)]
struct Verdict {
    limit: &'static str,
    text: String,
}

impl Verdict {
    fn of(test: &Test, sent: &Measured, received: &Measured) -> Verdict {
        let gib = received.counts.bytes as f64 / f64::from(1 << 30);
        let placing = received.placing_s_per_gib.unwrap_or(0.0) * gib;
        // All lanes' threads place pages; the busiest one is measured.
        let working = received.busy * received.seconds * f64::from(test.lanes);
        let share = if working > 0.0 { (placing / working).min(1.0) } else { 0.0 };
        let (sender, receiver) = (sent.busy * 100.0, received.busy * 100.0);
        let busy =
            format!("the sender's busiest thread {sender:.0} %, the receiver's {receiver:.0} %");
        let (limit, text) = if received.busy >= BUSY && received.busy >= sent.busy {
            if share >= PLACING {
                let share = share * 100.0;
                (
                    "page_allocation",
                    format!(
                        "limited by page allocation at the receiver, about {share:.0} % of its time \
                     ({busy}): huge pages or more lanes help"
                    ),
                )
            } else {
                ("receiver_cpu", format!("limited by the receiver's CPU ({busy})"))
            }
        } else if sent.busy >= BUSY {
            ("sender_cpu", format!("limited by the sender's CPU ({busy})"))
        } else {
            ("link", format!("limited by the link, or by who else computes here ({busy})"))
        };
        Verdict { limit, text }
    }
}

fn row(times: (f64, f64), moved: &Counts, again: Option<u64>, note: &str) -> String {
    let seconds = times.1 - times.0;
    let row = format!(
        "{:6.2}-{:<6.2} s  {:8.2} GB  {:8.2} Gbit/s  {:>8}  {:>10.0}  {note}",
        times.0,
        times.1,
        moved.bytes as f64 / 1e9,
        rate(moved.bytes * 8, seconds) / 1e9,
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

fn cpu_s_per_gb(sent: &Measured, received: &Measured) -> f64 {
    let cpu = |side: &Measured| side.user_s + side.system_s;
    let gb = received.counts.bytes as f64 / 1e9;
    if gb > 0.0 { (cpu(sent) + cpu(received)) / gb } else { 0.0 }
}

/// Of the bytes that were sent, those not copied; none where the way does not tell.
fn zero_copy_share(sent: &Counts) -> Option<f64> {
    let all = sent.zero_copied_bytes + sent.copied_bytes;
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

/// One line on stdout, at once; a reader that has gone is not our failure.
fn print_line(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{text}");
    let _ = stdout.flush();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::PageKind;

    #[test]
    fn the_verdict_names_what_everything_waits_for() {
        let test = Test {
            lanes: 1,
            bytes: None,
            reverse: false,
            discard: false,
            pages: PageKind::Small,
            zero_percent: 0,
            verify: false,
            congestion: None,
            region_bytes: 2 << 20,
        };
        let side = |busy, placing_s_per_gib| Measured {
            seconds: 1.0,
            counts: Counts { bytes: 1 << 30, ..Counts::default() },
            busy,
            placing_s_per_gib,
            ..Measured::default()
        };
        for (sent, received, placing, limit) in [
            (0.5, 0.99, Some(0.6), "page_allocation"),
            (0.5, 0.99, Some(0.3), "receiver_cpu"),
            (0.5, 0.99, None, "receiver_cpu"),
            (0.97, 0.95, Some(0.6), "sender_cpu"),
            (0.97, 0.2, None, "sender_cpu"),
            (0.3, 0.4, Some(0.6), "link"),
            (0.0, 0.0, Some(0.6), "link"),
        ] {
            let verdict = Verdict::of(&test, &side(sent, None), &side(received, placing));
            assert_eq!(verdict.limit, limit, "{verdict:?}");
        }
    }
}
