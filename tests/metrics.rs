//! `--metrics`: the metrics for Prometheus.

mod support;

use std::collections::{HashMap, HashSet};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};
use support::{Guests, Qmp, Scratch, Umem, wait_for};

/// The response to one request: its head and its body.
fn request(address: &str, request: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).expect("umem listens");
    stream.write_all(request.as_bytes()).expect("umem reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("umem answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    (head.to_owned(), body.to_owned())
}

fn scrape(address: &str) -> Metrics {
    let (head, body) = request(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(head.starts_with("HTTP/1.0 200 "), "{head}");
    assert!(head.contains("Content-Type: text/plain; version=0.0.4"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    Metrics::parse(&body)
}

/// Values by name and labels as written.
struct Metrics(HashMap<String, f64>);

impl Metrics {
    /// Parses the text format strictly: each metric's HELP and TYPE, then its samples, each once.
    fn parse(text: &str) -> Metrics {
        assert!(text.ends_with('\n'), "the last line ends");
        let (mut values, mut families) = (HashMap::new(), HashSet::new());
        let (mut helped, mut family, mut kind) = ("", "", "");
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect("a name and a text");
                assert!(help.ends_with('.'), "{line}");
                assert!(families.insert(name), "{name} is listed twice");
                helped = name;
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                (family, kind) = rest.split_once(' ').expect("a name and a type");
                assert_eq!(family, helped);
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert!(family.starts_with("umem_"), "{line}");
                assert_eq!(kind == "counter", family.ends_with("_total"), "{line}");
            } else {
                let (sample, value) = line.rsplit_once(' ').expect("a sample and a value");
                let name = sample.split('{').next().unwrap();
                let suffix =
                    name.strip_prefix(family).unwrap_or_else(|| panic!("{line} in {family}"));
                let is_part = ["_bucket", "_sum", "_count"].contains(&suffix);
                assert!(if kind == "histogram" { is_part } else { suffix.is_empty() }, "{line}");
                if let Some(labels) = sample.strip_prefix(name).filter(|labels| !labels.is_empty())
                {
                    let labels = labels.strip_prefix('{').and_then(|l| l.strip_suffix('}'));
                    for label in labels.expect("braces around labels").split(',') {
                        let (label, value) = label.split_once('=').expect("name and value");
                        assert!(label.chars().all(|c| c.is_ascii_lowercase()), "{line}");
                        assert!(value.len() >= 2 && value.starts_with('"') && value.ends_with('"'));
                    }
                }
                let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
                assert!(value >= 0.0, "{line}");
                assert!(
                    values.insert(sample.to_owned(), value).is_none(),
                    "{line} is listed twice"
                );
            }
        }
        Metrics(values)
    }

    fn get(&self, sample: &str) -> f64 {
        *self.0.get(sample).unwrap_or_else(|| panic!("{sample} in {:?}", self.0.keys()))
    }
}

/// Its address, from its event.
fn address(umem: &mut Umem) -> String {
    let event = umem.event("metrics");
    let url = event["url"].as_str().expect("an address");
    let address = url.strip_prefix("http://").and_then(|url| url.strip_suffix("/metrics"));
    address.expect("http").to_owned()
}

#[test]
fn metrics_of_both_sides_match_their_reports() {
    let scratch = Scratch::new();
    let mut guests = Guests::with_metrics(&scratch);
    let destination = guests.metrics.clone().expect("the guests have metrics");
    assert!(destination.starts_with("127.0.0.1:"), "a port alone means the loopback address");
    let before = scrape(&destination);
    assert_eq!(before.get("umem_phase{phase=\"waiting for a source\"}"), 1.0);
    assert_eq!(before.get("umem_guest_bytes"), 0.0);
    // Very few pages come before the guest demands them.
    let limit = ["--max-postcopy-bandwidth", "1000"];
    let mut migrate =
        guests.migrate(&[&["-p", "--json", "--metrics", "127.0.0.1:0"][..], &limit].concat());
    let source = address(&mut migrate);
    migrate.event("running");
    let during = scrape(&source);
    assert_eq!(during.get("umem_background_limit_bytes_per_second"), 1000.0);
    assert_eq!(during.get("umem_phase{phase=\"serving pages\"}"), 1.0);
    assert_eq!(during.get("umem_guest_bytes"), f64::from(16 << 20));
    assert!(during.get("umem_downtime_seconds") > 0.0);
    let mut guest = Qmp::connect(&scratch.path("destination"));
    assert_eq!(guest.execute("umem-verify", json!({}))["bad_pages"], 0);
    drop(guest);
    migrate.event("completed");
    let report = guests.incoming.event("completed");
    let after = scrape(&destination);
    check(&after, &report);
    migrate.succeeds();
    Qmp::connect(&scratch.path("destination")).quit();
    guests.incoming.succeeds();
}

#[test]
fn passes_have_metrics_during_and_after_them() {
    let scratch = Scratch::new();
    let mut guests = Guests::quiet(&scratch, &["--json"]);
    // The first pass would take minutes; its time is over before.
    let slowly = ["--max-bandwidth", "64K", "--timeout", "2", "--json", "--metrics", "0"];
    let mut migrate = guests.migrate(&slowly);
    let source = address(&mut migrate);
    wait_for("the first pass", || {
        let metrics = scrape(&source);
        (metrics.0.get("umem_pass") == Some(&1.0)).then_some(metrics)
    });
    let during = scrape(&source);
    assert_eq!(during.get("umem_pass_limit_bytes_per_second"), f64::from(64 << 10));
    let remaining = during.get("umem_pass_remaining_bytes");
    assert!(remaining > 0.0 && remaining <= guests.bytes() as f64, "{remaining}");
    assert!(!during.0.contains_key("umem_dirty_bytes_per_second"), "no pass has ended");
    let pass = migrate.event("pass");
    assert_eq!(pass["cut"], true);
    let report = migrate.event("completed");
    assert_eq!(report["precopy_bytes"], pass["sent_bytes"]);
    guests.incoming.event("completed");
    migrate.succeeds();
    Qmp::connect(&scratch.path("destination")).quit();
    guests.incoming.succeeds();
}

fn check(metrics: &Metrics, report: &Value) {
    for (sample, field) in [
        ("umem_moved_bytes_total{content=\"data\"}", "data_bytes"),
        ("umem_moved_bytes_total{content=\"zero\"}", "zero_bytes"),
        ("umem_moved_bytes_total{content=\"hole\"}", "hole_bytes"),
        ("umem_pages_total{cause=\"demand\"}", "pages_demand"),
        ("umem_pages_total{cause=\"background\"}", "pages_background"),
        ("umem_guest_bytes", "total_bytes"),
        ("umem_connection_losses_total", "recoveries"),
        ("umem_disconnected_seconds_total", "disconnected_s"),
    ] {
        assert_eq!(metrics.get(sample), report[field].as_f64().unwrap(), "{sample}");
    }
    let downtime = metrics.get("umem_downtime_seconds") * 1e3;
    assert!((downtime - report["downtime_ms"].as_f64().unwrap()).abs() < 1e-3, "{downtime}");
    let count = metrics.get("umem_fault_latency_seconds_count");
    assert_eq!(count, report["fault_latency_us"]["count"].as_f64().unwrap());
    assert!(count > 0.0);
    assert!(metrics.get("umem_fault_latency_seconds_sum") > 0.0);
    let mut buckets: Vec<(f64, f64)> = metrics
        .0
        .iter()
        .filter_map(|(name, &value)| {
            let name = name.strip_prefix("umem_fault_latency_seconds_bucket{le=\"")?;
            let edge = name.strip_suffix("\"}")?;
            Some((edge.replace("+Inf", "inf").parse().expect("a number"), value))
        })
        .collect();
    buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
    assert!(buckets.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{buckets:?}");
    assert_eq!(buckets.last(), Some(&(f64::INFINITY, count)));
    assert_eq!(metrics.get("umem_faults_waiting"), 0.0, "no fault waits");
    assert!(metrics.get("umem_cpu_seconds_total{mode=\"user\"}") >= 0.0);
}

#[test]
fn bad_metrics_request_gets_an_error_and_silent_client_is_dropped() {
    let scratch = Scratch::new();
    let guests = Guests::with_metrics(&scratch);
    let address = guests.metrics.clone().expect("the guests have metrics");
    let status = |text: &str| request(&address, text).0.lines().next().unwrap().to_owned();
    assert!(status("GET /other HTTP/1.0\r\n\r\n").contains(" 404 "));
    assert!(status("POST /metrics HTTP/1.0\r\n\r\n").contains(" 405 "));
    assert!(status("GET / HTTP/1.0\r\n\r\n").contains(" 200 "));
    assert!(status("nonsense\r\n\r\n").contains(" 405 "));
    let mut silent = TcpStream::connect(&address).unwrap();
    let mut endless = TcpStream::connect(&address).unwrap();
    // More than umem reads; at the end the connection may be reset.
    let _ = endless.write_all(&[b'x'; 64 << 10]);
    scrape(&address);
    let mut nothing = Vec::new();
    assert_eq!(silent.read_to_end(&mut nothing).unwrap_or(0), 0);
    drop(guests);
}

#[test]
fn metrics_address_in_use_is_refused_at_start() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let error =
        Umem::start(["migrate", "-p", "--metrics", &address, "--ram", "a=/b", "tcp:h:1"]).fails();
    assert!(error.contains("--metrics") && error.contains("another port"), "{error}");
    Umem::start(["migrate", "-p", "--metrics", "nowhere", "--ram", "a=/b", "tcp:h:1"])
        .fails_as_misused();
}

/// There is no connection to drop: new clients wait, and the thread that cannot accept does not spin.
#[test]
fn metrics_client_is_answered_when_descriptors_become_free() {
    let scratch = Scratch::new();
    let guests = Guests::with_metrics(&scratch);
    let address = guests.metrics.clone().unwrap();
    let before = guests.incoming.limit_descriptors(3);
    let mut stream = TcpStream::connect(&address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    guests.incoming.rests("umem-metrics");
    guests.incoming.limit_descriptors(before);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.0 200 "), "{answer}");
}

/// Clients that send nothing or half a request, or do not read: others are answered meanwhile, and their number is
/// bounded.
#[test]
fn silent_clients_do_not_block_metrics() {
    let scratch = Scratch::new();
    let guests = Guests::with_metrics(&scratch);
    let address = guests.metrics.clone().unwrap();
    let connect = |words: &[u8]| {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.write_all(words).unwrap();
        stream
    };
    let mut silent: Vec<_> = [&b""[..], b"GET /met", b"GET /metrics HTTP/1.1\r\n"]
        .into_iter()
        .cycle()
        .take(12)
        .map(connect)
        .collect();
    scrape(&address);
    for stream in &mut silent {
        stream.set_nonblocking(true).unwrap();
        let still = stream.read(&mut [0; 1]).map_err(|error| error.kind());
        assert_eq!(
            still,
            Err(ErrorKind::WouldBlock),
            "it was answered after others had their time"
        );
    }
    // Of many clients the oldest are dropped; the last one is answered.
    let mut crowd: Vec<_> = (0..100).map(|_| connect(b"")).collect();
    scrape(&address);
    assert_eq!(silent[0].read(&mut [0; 1]).unwrap_or(0), 0, "the oldest client is dropped");
    assert_eq!(crowd[0].read(&mut [0; 1]).unwrap_or(0), 0, "the oldest client is dropped");
    let sockets = std::fs::read_dir(format!("/proc/{}/fd", guests.incoming.pid())).unwrap();
    let sockets = sockets.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
    let sockets = sockets.filter(|link| link.to_string_lossy().starts_with("socket:")).count();
    assert!(sockets < 50, "{sockets} sockets");
    // A request without an end is not collected.
    let mut endless = connect(b"GET /");
    while endless.write_all(&[b'x'; 4096]).is_ok() {}
    scrape(&address);
}
