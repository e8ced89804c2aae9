//! A link: two network namespaces with a shaped veth pair between them. Dropping it removes both.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use crate::error::{Context, Result, failure};
use crate::migration::{Namespaces, words};
use crate::process::Process;
use crate::scratch::Scratch;

/// iperf3's congestion control, the same as that of umem's lanes.
pub(crate) const CONGESTION: &str = "cubic";

/// The two ends' addresses, in a network that only the namespaces have.
const SOURCE_ADDRESS: &str = "10.213.0.1";
const DESTINATION_ADDRESS: &str = "10.213.0.2";

/// iperf3's server starts to listen within this time.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Link {
    source: String,
    destination: String,
    rate_gbps: u32,
}

impl Link {
    pub(crate) fn new(rate_gbps: u32) -> Result<Link> {
        let name = |end: &str| format!("umem-perf-{}-{end}", std::process::id());
        // From here on a failure removes all that has been made.
        let link = Link { source: name("source"), destination: name("destination"), rate_gbps };
        let (source, destination) = (link.source.as_str(), link.destination.as_str());
        for namespace in [source, destination] {
            call("ip", &["netns", "add", namespace])?;
        }
        // Interface names are local to their namespaces, but are assigned in this one first.
        let (here, there) = (device("s"), device("d"));
        let (here, there) = (here.as_str(), there.as_str());
        let pair = ["netns", source, "type", "veth", "peer", "name", there, "netns", destination];
        call("ip", &[&["link", "add", here], &pair[..]].concat())?;
        for (namespace, device, address) in
            [(source, here, SOURCE_ADDRESS), (destination, there, DESTINATION_ADDRESS)]
        {
            let (address, rate) = (format!("{address}/30"), format!("{rate_gbps}gbit"));
            call("ip", &["-n", namespace, "address", "add", &address, "dev", device])?;
            call("ip", &["-n", namespace, "link", "set", "lo", "up"])?;
            call("ip", &["-n", namespace, "link", "set", device, "up"])?;
            let shaped = ["tbf", "rate", &rate, "burst", "4mb", "latency", "1ms"];
            let root = ["-n", namespace, "qdisc", "add", "dev", device, "root"];
            call("tc", &[&root, &shaped[..]].concat())?;
        }
        Ok(link)
    }

    pub(crate) fn namespaces(&self) -> Namespaces<'_> {
        Namespaces {
            source: &self.source,
            destination: &self.destination,
            address: DESTINATION_ADDRESS,
        }
    }

    /// Watches what leaves a process's end.
    pub(crate) fn watch(&self, pid: u32) -> Carried {
        Carried::watch(pid, self.rate_gbps)
    }

    /// The rate of one iperf3 connection from the source to the destination.
    pub(crate) fn iperf3_gbps(&self, seconds: u32) -> Result<f64> {
        let scratch = Scratch::new()?;
        let server = ["netns", "exec", &self.destination, "iperf3", "-s", "-1", "--forceflush"];
        let log = scratch.file("iperf3.log");
        let mut server = Process::start("iperf3's server", Path::new("ip"), &words(&server), log)?;
        server.says("listening", PATIENCE)?;
        let seconds = seconds.to_string();
        let to = ["iperf3", "-c", DESTINATION_ADDRESS, "-J", "-t", &seconds, "-O", "1"];
        let tuned = ["-C", CONGESTION, "-Z", "-l", "1M"];
        let client = call("ip", &[&["netns", "exec", &self.source], &to[..], &tuned].concat())?;
        let report: Value = serde_json::from_str(&client).context(|| "iperf3's report")?;
        let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
        Ok(rate.ok_or("iperf3's report has no rate")? / 1e9)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The pair is removed with either of its ends.
        for namespace in [&self.source, &self.destination] {
            let _ = call("ip", &["netns", "delete", namespace]);
        }
    }
}

/// The bytes that leave over the link from a process's namespace, sampled every [`LOOK`].
pub(crate) struct Carried {
    rate_gbps: u32,
    stop: Sender<()>,
    watcher: JoinHandle<Vec<Sample>>,
}

/// Time between two samples.
const LOOK: Duration = Duration::from_millis(10);

/// Seconds since the beginning, and bytes until then.
type Sample = (f64, u64);

/// What a link has carried in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Traffic {
    /// Bytes of packets with their headers.
    pub(crate) bytes: u64,
    /// The rate of the bytes but for the first and the last hundredth of them. NaN if all of them came at once.
    pub(crate) gbps: f64,
    /// Of the link's rate.
    pub(crate) share: f64,
}

impl Carried {
    fn watch(pid: u32, rate_gbps: u32) -> Carried {
        let (stop, stopped) = channel();
        let watcher = std::thread::spawn(move || {
            let began = Instant::now();
            let mut samples = Vec::new();
            let before = sent_bytes(pid);
            loop {
                let bytes = sent_bytes(pid).saturating_sub(before);
                samples.push((began.elapsed().as_secs_f64(), bytes));
                if stopped.recv_timeout(LOOK) != Err(RecvTimeoutError::Timeout) {
                    return samples;
                }
            }
        });
        Carried { rate_gbps, stop, watcher }
    }

    pub(crate) fn end(self) -> Traffic {
        drop(self.stop);
        Traffic::of(&self.watcher.join().unwrap_or_default(), self.rate_gbps)
    }
}

impl Traffic {
    fn of(samples: &[Sample], rate_gbps: u32) -> Traffic {
        let bytes = samples.last().map_or(0, |&(_, bytes)| bytes);
        let first = samples.iter().find(|(_, so_far)| so_far * 100 >= bytes);
        let last = samples.iter().find(|(_, so_far)| so_far * 100 >= bytes * 99);
        let gbps = match (first, last) {
            (Some((from_s, from)), Some((to_s, to))) if to_s > from_s => {
                (to - from) as f64 * 8e-9 / (to_s - from_s)
            }
            _ => f64::NAN,
        };
        Traffic { bytes, gbps, share: gbps / f64::from(rate_gbps) }
    }
}

/// What all interfaces of a process's namespace have sent, but for the loopback's.
fn sent_bytes(pid: u32) -> u64 {
    transmitted(&std::fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default())
}

/// Of a file `/proc/net/dev`: the ninth figure behind an interface's name.
fn transmitted(interfaces: &str) -> u64 {
    let others = interfaces.lines().filter_map(|line| line.split_once(':'));
    let others = others.filter(|(name, _)| name.trim() != "lo");
    let bytes =
        others.filter_map(|(_, figures)| figures.split_whitespace().nth(8)?.parse::<u64>().ok());
    bytes.sum()
}

/// A name for an interface, of at most 15 letters.
fn device(end: &str) -> String {
    format!("umem{}{end}", std::process::id())
}

/// Runs a program to its end, and returns what it printed.
fn call(program: &str, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    // Only umem-perf gets Ctrl-C, as it has to clean up.
    command.args(arguments).stdin(Stdio::null()).process_group(0);
    let output = command
        .output()
        .context(|| format!("cannot start {program} (needs iproute2 and iperf3)"))?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(printed);
    }
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let said = errors.lines().chain(printed.lines()).find(|line| !line.trim().is_empty());
    failure(format!(
        "`{program} {}` failed: {} (network namespaces need root)",
        arguments.join(" "),
        said.unwrap_or("no message").trim()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_are_distinct_and_short_enough() {
        assert!(device("s").len() < 16 && device("s") != device("d"));
    }

    #[test]
    fn traffic_has_the_rate_of_its_middle() {
        // A second of silence, a second with 1 % of the bytes, a second with 98 %, and a minute with the rest.
        let samples = [(1.0, 0), (2.0, 10_000_000), (3.0, 990_000_000), (63.0, 1_000_000_000)];
        let traffic = Traffic::of(&samples, 10);
        assert_eq!(traffic.bytes, 1_000_000_000);
        assert!(
            (traffic.gbps - 7.84).abs() < 1e-9 && (traffic.share - 0.784).abs() < 1e-9,
            "{traffic:?}"
        );
        assert!(Traffic::of(&[(1.0, 0), (2.0, 5)], 10).gbps.is_nan());
        assert!(Traffic::of(&[], 10).gbps.is_nan());
    }

    #[test]
    fn sent_bytes_are_those_of_all_interfaces_but_the_loopback() {
        let interfaces = "Inter-|   Receive  |  Transmit\n face |bytes packets|bytes\n\
                          \x20   lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n\
                          umem1s: 1 2 3 4 5 6 7 8 900 10 11 12 13 14 15 16\n\
                          umem2s: 1 2 3 4 5 6 7 8 77 10 11 12 13 14 15 16\n";
        assert_eq!(transmitted(interfaces), 977);
        assert_eq!(transmitted(""), 0);
    }

    #[test]
    fn error_of_a_failed_command_is_one_line() {
        let error = call("sh", &["-c", "echo; echo first >&2; echo second >&2; exit 3"]);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("first") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn dropped_link_leaves_no_namespace() {
        let Ok(link) = Link::new(10) else {
            eprintln!("skipped: network namespaces cannot be made here");
            return;
        };
        let exists = |name: &str| call("ip", &["netns", "list"]).unwrap().contains(name);
        let (source, destination) = (link.source.clone(), link.destination.clone());
        assert!(exists(&source) && exists(&destination));
        drop(link);
        assert!(!exists(&source) && !exists(&destination));
    }
}
