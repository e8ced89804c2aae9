//! `--metrics ADDRESS`: the state of a migration in Prometheus' text format, over HTTP.
//!
//! One thread answers all clients ([`visitors`]). A slow client is disconnected, and delays neither other clients nor
//! the threads that move pages.

use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use serde_json::json;

use super::output::Output;
use super::visitors::{self, Entrance, Visitor};
use super::watch::{Status, Watch};
use crate::error::{Error, Result};
use crate::statistics::CpuTime;

/// The most bytes that are read of a request: its line and its headers.
const REQUEST_BYTES_MAX: usize = 8 << 10;

/// Clients at a time. A further client replaces the oldest one, which has had the most time.
const CLIENTS_MAX: usize = 32;

/// How long a client may take for its request and the answer before it is disconnected.
const PATIENCE: Duration = Duration::from_secs(10);

/// The address of the metrics: `PORT`, on the loopback address, or `HOST:PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(SocketAddr);

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Address, String> {
        if let Ok(port) = text.parse::<u16>() {
            return Ok(Address((IpAddr::V4(Ipv4Addr::LOCALHOST), port).into()));
        }
        let mut found = text
            .to_socket_addrs()
            .map_err(|error| format!("write PORT or HOST:PORT, not {text:?} ({error})"))?;
        found.next().map(Address).ok_or_else(|| format!("{text:?} is not an address"))
    }
}

/// Serves metrics until it is dropped.
pub(crate) struct Server {
    _visitors: visitors::Server,
}

impl Server {
    /// Listens, and reports the address.
    pub(crate) fn start(address: &Address, watch: Arc<Watch>, output: &Output) -> Result<Server> {
        let failed = |source| Error::Listen {
            uri: format!("--metrics {}", address.0),
            source,
            hint: "; choose another port, or 0 for any",
        };
        let listener = TcpListener::bind(address.0).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let url = format!("http://{}/metrics", listener.local_addr().map_err(failed)?);
        output.event("metrics", json!({ "url": url }), &format!("metrics at {url}"));
        let page = Page { listener, watch };
        Ok(Server { _visitors: visitors::Server::start("umem-metrics", page)? })
    }
}

struct Page {
    listener: TcpListener,
    watch: Arc<Watch>,
}

impl AsFd for Page {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Entrance for Page {
    type Visitor = Client;
    const VISITORS_MAX: usize = CLIENTS_MAX;

    fn accept(&self) -> io::Result<Option<Client>> {
        let (stream, _) = self.listener.accept()?;
        if stream.set_nonblocking(true).is_err() {
            return Ok(None);
        }
        let (watch, deadline) = (self.watch.clone(), Instant::now() + PATIENCE);
        Ok(Some(Client { stream, watch, request: Vec::new(), answer: None, deadline }))
    }
}

/// A client, before or during its request.
struct Client {
    stream: TcpStream,
    watch: Arc<Watch>,
    /// The received part of the request.
    request: Vec<u8>,
    /// The unsent part of the answer, once there is one.
    answer: Option<Vec<u8>>,
    /// The time at which it is disconnected.
    deadline: Instant,
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Visitor for Client {
    fn flags(&self) -> PollFlags {
        if self.answer.is_some() { PollFlags::POLLOUT } else { PollFlags::POLLIN }
    }

    fn deadline(&self) -> Option<Instant> {
        Some(self.deadline)
    }

    /// The oldest client is dropped first.
    fn rank(&self) -> Instant {
        self.deadline
    }

    fn go_on(&mut self) -> bool {
        // A client that has closed its connection needs no answer.
        self.read_or_write().unwrap_or(false)
    }
}

impl Client {
    /// Reads or writes without waiting. False at the end of the connection.
    fn read_or_write(&mut self) -> io::Result<bool> {
        if self.answer.is_none() {
            let mut buffer = [0; 1024];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(count) => self.request.extend_from_slice(&buffer[..count]),
                Err(error) => return may_go_on(error),
            }
            if !self.request.windows(4).any(|end| end == b"\r\n\r\n") {
                return Ok(self.request.len() <= REQUEST_BYTES_MAX);
            }
            self.answer = Some(answer(&self.request, &self.watch));
        }
        let answer = self.answer.get_or_insert_default();
        while !answer.is_empty() {
            match self.stream.write(answer) {
                Ok(count) => drop(answer.drain(..count)),
                Err(error) => return may_go_on(error),
            }
        }
        Ok(false)
    }
}

/// Accepts errors that only mean that the call would have waited.
fn may_go_on(error: io::Error) -> io::Result<bool> {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(true),
        _ => Err(error),
    }
}

/// The answer to a complete request.
pub(crate) fn answer(request: &[u8], watch: &Watch) -> Vec<u8> {
    let line = request.split(|&byte| byte == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.split(' ');
    let (status, kind, body) = match (words.next(), words.next()) {
        (Some("GET"), Some("/metrics")) => ("200 OK", CONTENT_TYPE, text(watch)),
        (Some("GET"), Some("/")) => ("200 OK", PLAIN, "umem: see /metrics\n".into()),
        (Some("GET"), Some(_)) => ("404 Not Found", PLAIN, "the only page is /metrics\n".into()),
        _ => ("405 Method Not Allowed", PLAIN, "the only method is GET\n".into()),
    };
    let head = format!(
        "HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    [head, body].concat().into_bytes()
}

const PLAIN: &str = "text/plain; charset=utf-8";

/// The content type of Prometheus' text format.
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics. docs/observing.md lists them.
fn text(watch: &Watch) -> String {
    let status = watch.status();
    let mut page = Metrics(String::new());
    page.metric("umem_info", "gauge", "The version and the role of this process.");
    page.value("umem_info", &[("version", env!("CARGO_PKG_VERSION")), ("role", status.role)], 1.0);
    page.metric("umem_phase", "gauge", "The phase of the migration, in the label.");
    page.value("umem_phase", &[("phase", status.phase)], 1.0);
    page.metric("umem_guest_bytes", "gauge", "The guest's RAM; 0 until its size is known.");
    page.value("umem_guest_bytes", &[], status.total_bytes as f64);
    page.counters(&status);
    page.faults(watch, &status);
    if let Some(downtime_ms) = status.downtime_ms {
        page.metric("umem_downtime_seconds", "gauge", "How long the guest stood still.");
        page.value("umem_downtime_seconds", &[], downtime_ms / 1e3);
    }
    let help = "Losses of all connections after the switchover.";
    page.metric("umem_connection_losses_total", "counter", help);
    page.value("umem_connection_losses_total", &[], f64::from(status.connection_losses));
    let help = "Time without a connection after the switchover.";
    page.metric("umem_disconnected_seconds_total", "counter", help);
    page.value("umem_disconnected_seconds_total", &[], status.disconnected_s);
    if let Some(limit) = watch.pass_bandwidth() {
        page.passes(&status, limit.limit());
    }
    if watch.bandwidth().is_some() {
        let help = "The limit of the background, 0 for no limit.";
        page.metric("umem_background_limit_bytes_per_second", "gauge", help);
        let limit = status.max_postcopy_bandwidth.unwrap_or(0);
        page.value("umem_background_limit_bytes_per_second", &[], limit as f64);
    }
    if let Some(counters) = watch.counters() {
        let help = "Frames and pages with a wrong checksum, which were sent again.";
        page.metric("umem_checksum_errors_total", "counter", help);
        let errors = counters.checksum_errors.load(Relaxed);
        page.value("umem_checksum_errors_total", &[], errors as f64);
    }
    let cpu = CpuTime::of_this_process();
    page.metric("umem_cpu_seconds_total", "counter", "Processor time of umem's process.");
    page.value("umem_cpu_seconds_total", &[("mode", "user")], cpu.user);
    page.value("umem_cpu_seconds_total", &[("mode", "system")], cpu.system);
    page.0
}

struct Metrics(String);

impl Metrics {
    fn metric(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// The values of labels are words of umem that need no escaping.
    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> =
            labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        let _ = match labels.as_slice() {
            [] => writeln!(self.0, "{name} {value}"),
            labels => writeln!(self.0, "{name}{{{}}} {value}", labels.join(",")),
        };
    }

    fn counters(&mut self, status: &Status) {
        let help = "Guest memory that has been moved, by contents.";
        self.metric("umem_moved_bytes_total", "counter", help);
        for (content, bytes) in
            [("data", status.data_bytes), ("zero", status.zero_bytes), ("hole", status.hole_bytes)]
        {
            self.value("umem_moved_bytes_total", &[("content", content)], bytes as f64);
        }
        let help = "Pages that have been moved, by lane: on demand or in the background.";
        self.metric("umem_pages_total", "counter", help);
        for (cause, pages) in
            [("demand", status.pages_demand), ("background", status.pages_background)]
        {
            self.value("umem_pages_total", &[("cause", cause)], pages as f64);
        }
    }

    /// The passes of a source while the guest runs.
    fn passes(&mut self, status: &Status, limit: Option<u64>) {
        let help = "The pass over the running guest's memory, 0 before the first one.";
        self.metric("umem_pass", "gauge", help);
        self.value("umem_pass", &[], f64::from(status.pass.unwrap_or(0)));
        let help = "Bytes that the pass has yet to send, or that the last pass left.";
        self.metric("umem_pass_remaining_bytes", "gauge", help);
        self.value("umem_pass_remaining_bytes", &[], status.remaining_bytes.unwrap_or(0) as f64);
        let help = "Page contents sent while the guest ran, each transfer counted.";
        self.metric("umem_precopy_bytes_total", "counter", help);
        self.value("umem_precopy_bytes_total", &[], status.precopy_bytes as f64);
        if let Some(rate) = status.dirty_bytes_per_s {
            let help = "The rate of guest writes in the last whole pass, each page once.";
            self.metric("umem_dirty_bytes_per_second", "gauge", help);
            self.value("umem_dirty_bytes_per_second", &[], rate as f64);
        }
        if let Some(downtime_ms) = status.expected_downtime_ms {
            let help = "How long the rest would take if the guest stopped now.";
            self.metric("umem_expected_downtime_seconds", "gauge", help);
            self.value("umem_expected_downtime_seconds", &[], downtime_ms / 1e3);
        }
        let help = "The limit of the passes, 0 for no limit.";
        self.metric("umem_pass_limit_bytes_per_second", "gauge", help);
        self.value("umem_pass_limit_bytes_per_second", &[], limit.unwrap_or(0) as f64);
    }

    fn faults(&mut self, watch: &Watch, status: &Status) {
        self.metric(
            "umem_faults_waiting",
            "gauge",
            "Faults of the guest that wait for a page at present.",
        );
        self.value("umem_faults_waiting", &[], status.faults_waiting as f64);
        let Some(counters) = watch.counters() else { return };
        let view = counters.faults.look();
        let (name, help) =
            ("umem_fault_latency_seconds", "Time from reading a fault to waking the guest.");
        self.metric(name, "histogram", help);
        for (below_us, count) in view.octaves() {
            let le = format!("{}", below_us as f64 / 1e6);
            self.value("umem_fault_latency_seconds_bucket", &[("le", &le)], count as f64);
        }
        let count = view.count() as f64;
        self.value("umem_fault_latency_seconds_bucket", &[("le", "+Inf")], count);
        self.value("umem_fault_latency_seconds_sum", &[], view.sum_us as f64 / 1e6);
        self.value("umem_fault_latency_seconds_count", &[], count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_alone_means_the_loopback_address() {
        let address = |text: &str| text.parse::<Address>().map(|address| address.0.to_string());
        assert_eq!(address("9100").unwrap(), "127.0.0.1:9100");
        assert_eq!(address("0.0.0.0:9100").unwrap(), "0.0.0.0:9100");
        assert_eq!(address("[::1]:0").unwrap(), "[::1]:0");
        assert!(address("99999").unwrap_err().contains("HOST:PORT"));
    }
}
