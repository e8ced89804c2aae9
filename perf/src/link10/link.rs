//! A link: two network namespaces with a shaped veth pair between them. Dropping it removes both.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::error::{Context, Result, failure};
use crate::migration::{Namespaces, words};
use crate::process::Process;
use crate::scratch::Scratch;

/// iperf3's congestion control, the same as that of umem's lanes.
pub(super) const CONGESTION: &str = "cubic";

/// The two ends' addresses, in a network that only the namespaces have.
const SOURCE_ADDRESS: &str = "10.213.0.1";
const DESTINATION_ADDRESS: &str = "10.213.0.2";

/// iperf3's server starts to listen within this time.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) struct Link {
    source: String,
    destination: String,
}

impl Link {
    pub(super) fn new(rate_gbps: u32) -> Result<Link> {
        let name = |end: &str| format!("umem-perf-{}-{end}", std::process::id());
        // From here on a failure removes all that has been made.
        let link = Link { source: name("source"), destination: name("destination") };
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

    pub(super) fn namespaces(&self) -> Namespaces<'_> {
        Namespaces {
            source: &self.source,
            destination: &self.destination,
            address: DESTINATION_ADDRESS,
        }
    }

    /// The rate of one iperf3 connection from the source to the destination.
    pub(super) fn iperf3_gbps(&self, seconds: u32) -> Result<f64> {
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
