//! `umem bench`: pages between two processes on this machine, counted on both sides.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::{Scratch, Umem};

const MIB: u64 = 1 << 20;

/// A server on a port of its own.
struct Server {
    umem: Umem,
    uri: String,
}

impl Server {
    fn start(arguments: &[&str]) -> Server {
        let common = ["bench", "server", "--json", "tcp:127.0.0.1:0"];
        let mut umem = Umem::start(common.iter().chain(arguments));
        let uri = umem.event("listening")["uri"].as_str().expect("an address").to_owned();
        Server { umem, uri }
    }

    fn connect(&self) -> TcpStream {
        TcpStream::connect(self.uri.strip_prefix("tcp:").unwrap()).expect("umem listens")
    }

    /// The line with which it answers these bytes before it closes the connection.
    fn answers(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // The server may close before all has been written.
        let _ = stream.write_all(bytes);
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).expect("an answer");
        answer
    }
}

fn client(uri: &str, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_umem"))
        .args(["bench", "client", uri])
        .args(arguments)
        .output()
        .expect("umem starts")
}

/// Runs a test that succeeds, and returns its report.
fn report(uri: &str, arguments: &[&str]) -> Value {
    let output = client(uri, &[&["--json"], arguments].concat());
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    serde_json::from_str(&stdout).expect("one JSON object")
}

/// The error line of a client that fails.
fn failure(uri: &str, arguments: &[&str], status: i32) -> String {
    let output = client(uri, arguments);
    let (stdout, stderr) = texts(&output);
    assert_eq!(output.status.code(), Some(status), "{stdout}\n{stderr}");
    let line = stderr.trim_end().strip_prefix("umem: ").expect("a line of umem's");
    assert!(!line.contains('\n'), "{stderr}");
    line.to_owned()
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

/// The keys that scripts for iperf3 read, and the relations that hold for any test that moved all of its bytes.
fn check(report: &Value, bytes: u64) {
    let end = &report["end"];
    for sum in [&end["sum_sent"], &end["sum_received"]] {
        assert_eq!(number(&sum["start"]), 0.0);
        assert!(number(&sum["seconds"]) > 0.0);
        assert!(number(&sum["bits_per_second"]) > 0.0);
    }
    assert_eq!(end["sum_sent"]["bytes"], end["sum_received"]["bytes"]);
    let zero_bytes = end["umem"]["zero_bytes"].as_u64().unwrap();
    assert_eq!(end["sum_received"]["bytes"].as_u64().unwrap() + zero_bytes, bytes);
    assert!(end["sum_sent"]["retransmits"].is_u64(), "{end}");
    for side in ["host", "remote"] {
        let part = |what| number(&end["cpu_utilization_percent"][format!("{side}_{what}")]);
        assert!(part("total") > 0.0);
        assert!((part("total") - part("user") - part("system")).abs() < 0.01);
    }
    let umem = &end["umem"];
    assert!(number(&umem["pages_per_second"]) > 0.0 && number(&umem["cpu_s_per_gb"]) > 0.0);
    assert!(umem["verdict"].as_str().unwrap().starts_with("limited by "), "{umem}");
    let intervals = report["intervals"].as_array().unwrap();
    let sum: u64 = intervals.iter().map(|one| one["sum"]["bytes"].as_u64().unwrap()).sum();
    assert!(sum > 0 && sum <= bytes);
    assert!(report["start"]["version"].as_str().unwrap().starts_with("umem "));
}

/// The report has the output of `-J`, as an HTML page and verbatim, whatever is printed.
#[test]
fn report_shows_each_interval() {
    let server = Server::start(&[]);
    let scratch = Scratch::new();
    let (page, figures) = (scratch.path("report.html"), scratch.path("report.json"));
    for (path, more) in [(&page, &["--bidir"][..]), (&figures, &[])] {
        let path = path.display().to_string();
        let output =
            client(&server.uri, &[&["-n", "64M", "-i", "0.1", "--report", &path], more].concat());
        let (stdout, stderr) = texts(&output);
        assert!(output.status.success(), "{stdout}\n{stderr}");
        assert!(stdout.contains("Gbit/s"), "{stdout}");
    }
    let html = std::fs::read_to_string(page).unwrap();
    for id in ["sum", "sum_bidir_reverse"] {
        assert!(html.contains(&format!("<figure id=\"{id}\"")), "{html}");
    }
    let figures: Value = serde_json::from_slice(&std::fs::read(figures).unwrap()).unwrap();
    check(&figures, 64 * MIB);
    let error = failure(&server.uri, &["--report", "/nonexistent/x.html"], 1);
    assert!(error.contains("/nonexistent/x.html"), "{error}");
}

/// Several lanes, several passes, and a last pass that is not a whole block.
#[test]
fn every_page_lands_with_right_contents_in_either_direction() {
    let server = Server::start(&[]);
    let bytes = 41 * MIB + 4096 * 3;
    let size = bytes.to_string();
    for direction in [&[][..], &["-R"]] {
        let common = ["-n", &size, "-P", "3", "--pass-size", "8M", "--zero-percent", "20"];
        let report = report(&server.uri, &[&common[..], &["--verify"], direction].concat());
        check(&report, bytes);
        let umem = &report["end"]["umem"];
        assert_eq!(umem["pages"], bytes / 4096);
        assert_eq!(umem["verified_pages"], bytes / 4096);
        let zeroes = umem["zero_bytes"].as_u64().unwrap() * 100 / bytes;
        assert!((10..30).contains(&zeroes), "{zeroes} % of zeroes");
        assert_eq!(report["start"]["test_start"]["reverse"], u8::from(!direction.is_empty()));
    }
}

#[test]
fn huge_pages_land() {
    let server = Server::start(&["-1"]);
    let common = ["-n", "48M", "--page-size", "2M", "--pass-size", "16M", "--verify"];
    let report = report(&server.uri, &common);
    check(&report, 48 * MIB);
    assert_eq!(report["end"]["umem"]["verified_pages"], 48 * 256);
    server.umem.succeeds();
}

#[test]
fn anonymous_memory_is_filled_by_copy() {
    let server = Server::start(&[]);
    let bytes = 41 * MIB + 4096 * 3;
    let size = bytes.to_string();
    for direction in [&[][..], &["-R"]] {
        let common = ["-n", &size, "-P", "2", "--pass-size", "8M", "--zero-percent", "20"];
        let kind = ["--kind", "anonymous", "--verify"];
        let report = report(&server.uri, &[&common[..], &kind, direction].concat());
        check(&report, bytes);
        let umem = &report["end"]["umem"];
        assert_eq!(umem["kind"], "anonymous");
        assert_eq!(umem["verified_pages"], bytes / 4096);
        assert!(number(&umem["placing_s_per_gib"]) > 0.0);
    }
}

/// Without a pool of huge pages the error has the remedy; with a pool the pages land.
#[test]
fn anonymous_huge_pages_are_taken_from_the_pool() {
    let server = Server::start(&[]);
    let options = ["-n", "7M", "--kind", "anonymous", "--page-size", "2M", "--pass-size", "4M"];
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    // Enough for two passes at a time, and the others that may exist.
    if free.is_ok_and(|free| free.trim().parse::<u64>().unwrap() >= 12) {
        let report = report(&server.uri, &[&options[..], &["--verify"]].concat());
        // Whole pages of 2 MiB.
        assert_eq!(report["end"]["umem"]["verified_pages"], 4 * 512);
    } else {
        let error = failure(&server.uri, &options, 1);
        assert!(error.contains("sysctl vm.nr_hugepages="), "{error}");
    }
}

/// iperf3's names for the reverse direction.
#[test]
fn bidirectional_bench_sends_from_both_sides() {
    let server = Server::start(&[]);
    let bytes = 24 * MIB + 4096;
    let size = bytes.to_string();
    let common = ["--bidir", "-n", &size, "-P", "2", "--pass-size", "8M"];
    for what in [&["--verify", "--zero-percent", "10"][..], &["--discard"]] {
        let report = report(&server.uri, &[&common[..], what].concat());
        let end = &report["end"];
        for (suffix, sender) in [("", true), ("_bidir_reverse", false)] {
            let part = |name: &str| &end[format!("{name}{suffix}")];
            let (sent, received) = (part("sum_sent"), part("sum_received"));
            assert_eq!((&sent["sender"], &received["sender"]), (&json!(sender), &json!(sender)));
            assert_eq!(sent["bytes"], received["bytes"]);
            let umem = part("umem");
            let zeroes = umem["zero_bytes"].as_u64().unwrap();
            assert_eq!(received["bytes"].as_u64().unwrap() + zeroes, bytes);
            assert!(sent["retransmits"].is_u64() && received["retransmits"].is_null());
            if what[0] == "--verify" {
                assert_eq!(umem["verified_pages"], bytes / 4096);
            }
            assert!(umem["verdict"].as_str().unwrap().starts_with("limited by "));
        }
        let first = &report["intervals"][0];
        assert!(first["sum"]["bytes"].is_u64() && first["sum_bidir_reverse"]["bytes"].is_u64());
        assert_eq!(report["start"]["test_start"]["bidir"], 1);
    }
}

/// Every fault is answered with its page and timed, for every kind of memory, and each interval reports their number.
#[test]
fn faults_are_served_and_timed_during_the_stream() {
    let server = Server::start(&[]);
    let common = ["-t", "0.6", "-i", "0.2", "--pass-size", "32M", "--fault-rate", "2000"];
    for options in [
        &[][..],
        &["-R"],
        &["--bidir"],
        &["--kind", "anonymous", "--verify"],
        &["--page-size", "2M", "-O", "0.2"],
    ] {
        let report = report(&server.uri, &[&common[..], options].concat());
        let bidir = options.contains(&"--bidir");
        for suffix in ["", "_bidir_reverse"].iter().take(1 + usize::from(bidir)) {
            let umem = &report["end"][format!("umem{suffix}")];
            let latency = &umem["fault_latency_us"];
            let [count, p50, p99, max] =
                ["count", "p50", "p99", "max"].map(|key| latency[key].as_u64().expect("a number"));
            assert!(count > 0 && 0 < p50 && p50 <= p99 && p99 <= max, "{options:?}: {latency}");
            assert!(number(&umem["faults_per_second"]) > 0.0);
            let intervals = report["intervals"].as_array().unwrap();
            let sums = intervals.iter().map(|one| &one[format!("sum{suffix}")]);
            let counted = sums.filter(|sum| sum["omitted"] == false).map(|sum| {
                sum["fault_latency_us"]["count"].as_u64().expect("every interval has its faults")
            });
            let counted: u64 = counted.sum();
            // Faults between the last interval's end and the test's end count only in the test.
            assert!(counted > 0 && counted <= count + 20, "{counted} of {count}");
            assert!(report["end"][format!("sum_received{suffix}")]["bytes"].as_u64().unwrap() > 0);
        }
    }
}

#[test]
fn table_lists_directions_and_faults_separately() {
    let server = Server::start(&["-1"]);
    let output = client(&server.uri, &["-t", "0.3", "--bidir", "--fault-rate", "500"]);
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{stdout}\n{stderr}");
    for part in ["1 lane each way", "TX-C received", "RX-C sent", "from access to return", ", p99 "]
    {
        assert!(stdout.contains(part), "{part} in {stdout}");
    }
}

#[test]
fn discarded_bytes_are_counted_exactly() {
    let server = Server::start(&[]);
    for direction in [&[][..], &["-R"]] {
        let common = ["-n", "50000001", "-P", "3", "--discard"];
        let report = report(&server.uri, &[&common[..], direction].concat());
        check(&report, 50_000_001);
        assert_eq!(report["end"]["umem"]["kind"], "discard");
    }
}

#[test]
fn bench_runs_over_a_unix_socket_and_prints_a_table() {
    let directory = tempfile::tempdir().unwrap();
    let uri = format!("unix:{}", directory.path().join("bench").display());
    let mut server = Umem::start(["bench", "server", "--json", "-1", &uri]);
    server.event("listening");
    let output = client(&uri, &["-n", "16M", "--verify"]);
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{stdout}\n{stderr}");
    for part in ["Gbit/s", "received", "4096 pages were checked and right", "limited by"] {
        assert!(stdout.contains(part), "{part} in {stdout}");
    }
    server.succeeds();
}

#[test]
fn one_off_server_exits_after_its_test_with_a_report() {
    let mut server = Server::start(&["-1"]);
    let report = report(&server.uri, &["-n", "8M", "-C", "reno", "-i", "0"]);
    assert_eq!(report["end"]["sender_tcp_congestion"], "reno");
    assert_eq!(report["intervals"], json!([]));
    let tested = server.umem.event("tested");
    assert_eq!(tested["result"]["counts"]["bytes"], 8 * MIB);
    server.umem.succeeds();
}

/// The omitted start is reported as such and not counted at the end.
#[test]
fn omitted_start_is_left_out_of_the_totals() {
    let server = Server::start(&["-1"]);
    let options = ["-t", "0.3", "-O", "0.2", "-i", "0.1", "--discard"];
    let report = report(&server.uri, &options);
    let intervals = report["intervals"].as_array().unwrap();
    let omitted = |one: &&Value| one["sum"]["omitted"] == true;
    assert!(intervals.iter().any(|one| omitted(&one)), "{report}");
    let counted = intervals.iter().filter(|one| !omitted(one));
    let counted: u64 = counted.map(|one| one["sum"]["bytes"].as_u64().unwrap()).sum();
    assert!(counted <= report["end"]["sum_sent"]["bytes"].as_u64().unwrap());
    assert!(counted > 0);
}

#[test]
fn second_client_is_refused_as_busy_and_ctrl_c_reports_partial_results() {
    let mut server = Server::start(&[]);
    let mut first = Umem::start(["bench", "client", "--json", "-t", "80000", &server.uri]);
    server.umem.event("testing");
    let busy = failure(&server.uri, &["-n", "8M"], 1);
    assert!(busy.contains("busy with another test"), "{busy}");

    first.signal(Signal::SIGINT);
    assert_eq!(first.wait().code(), Some(1));
    assert!(first.stderr().starts_with("umem: interrupted"), "{}", first.stderr());
    let tested = server.umem.event("tested");
    assert!(tested["result"]["counts"]["bytes"].is_u64());
    check(&report(&server.uri, &["-n", "8M"]), 8 * MIB);
}

/// A client that stalls, before or during its test, does not block the next one.
#[test]
fn stalled_client_is_replaced_by_the_next_client() {
    let mut server = Server::start(&["--idle-timeout", "1"]);
    let mut still = Umem::start(["bench", "client", "--json", "-t", "80000", &server.uri]);
    server.umem.event("testing");
    still.signal(Signal::SIGSTOP);
    let failed = server.umem.event("test_failed")["error"].to_string();
    assert!(failed.contains("nothing has moved for 1 s"), "{failed}");
    check(&report(&server.uri, &["-n", "8M"]), 8 * MIB);
    still.signal(Signal::SIGCONT);
    assert_eq!(still.wait().code(), Some(1));

    // A client whose lanes never connect, and many connections with nothing, half a line, or a line without a newline.
    let test = json!({
        "lanes": 1, "bytes": 8 * MIB, "reverse": false, "bidir": false, "discard": false, "kind": "shared",
        "pages": "4K", "fault_rate": 0, "faults": 0, "zero_percent": 0, "verify": false,
        "congestion": null, "region_bytes": 64 * MIB,
    });
    let hello = json!({ "magic": "umem-bench", "version": 2, "request": { "test": test } });
    let mut alone = server.connect();
    writeln!(alone, "{hello}").unwrap();
    let mut accepted = String::new();
    BufReader::new(alone.try_clone().unwrap()).read_line(&mut accepted).unwrap();
    assert!(accepted.contains("accepted"), "{accepted}");
    let crowd: Vec<TcpStream> = (0..200)
        .map(|index| {
            let mut stream = server.connect();
            let words: &[u8] = [&b""[..], b"{\"magic\":", &[b'x'; 8192]][index % 3];
            let _ = stream.write_all(words);
            stream
        })
        .collect();
    let failed = server.umem.event("test_failed")["error"].to_string();
    assert!(failed.contains("has not opened its 1 lanes in 1 s"), "{failed}");
    check(&report(&server.uri, &["-n", "8M"]), 8 * MIB);
    drop(crowd);
}

#[test]
fn server_out_of_descriptors_serves_when_one_is_free() {
    let server = Server::start(&[]);
    let before = server.umem.limit_descriptors(3);
    let stranger = server.connect();
    server.umem.rests("umem");
    server.umem.limit_descriptors(before);
    drop(stranger);
    check(&report(&server.uri, &["-n", "16M"]), 16 * MIB);
}

#[test]
fn stopped_server_notifies_its_client() {
    let mut server = Server::start(&[]);
    let client = Umem::start(["bench", "client", "-t", "80000", &server.uri]);
    server.umem.event("testing");
    server.umem.signal(Signal::SIGTERM);
    let error = client.fails();
    assert!(error.contains("the server gave up: interrupted"), "{error}");
    assert!(server.umem.fails().contains("during a test"));
}

/// A client that ends without a message leaves the server free for the next one.
#[test]
fn server_does_not_wait_for_a_killed_client() {
    let mut server = Server::start(&[]);
    let mut lost = Umem::start(["bench", "client", "-t", "80000", "-P", "2", &server.uri]);
    server.umem.event("testing");
    lost.kill();
    server.umem.event("test_failed");
    check(&report(&server.uri, &["-n", "8M"]), 8 * MIB);
}

#[test]
fn interrupted_idle_server_exits_cleanly() {
    let mut server = Server::start(&[]);
    server.umem.signal(Signal::SIGINT);
    server.umem.succeeds();
}

#[test]
fn foreign_clients_are_refused_and_the_server_continues() {
    let server = Server::start(&["-1"]);
    let silent = server.connect();
    for bytes in [b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![b'x'; 5000], vec![0; 4096]] {
        let answer = server.answers(&bytes);
        assert!(answer.contains("only `umem bench client` is served here"), "{answer}");
    }
    let hello = |request: Value| {
        json!({ "magic": "umem-bench", "version": 2, "request": request }).to_string() + "\n"
    };
    let answer = server.answers(hello(json!({ "join": { "cookie": "", "lane": 0 } })).as_bytes());
    assert!(answer.contains("refused"), "{answer}");
    let answer = server.answers(b"{\"magic\":\"umem-bench\",\"version\":7}\n");
    assert!(answer.contains("version 2"), "{answer}");
    drop(server.connect());
    check(&report(&server.uri, &["-n", "8M"]), 8 * MIB);
    drop(silent);
    server.umem.succeeds();
}

/// The server also refuses requests that the client never makes.
#[test]
fn test_beyond_a_limit_is_refused() {
    let mut server = Server::start(&[]);
    for (field, value) in [
        ("lanes", json!(60_000)),
        ("region_bytes", json!(1u64 << 60)),
        ("bytes", json!(u64::MAX)),
        ("congestion", json!("../../etc")),
        ("faults", json!(u64::MAX)),
        ("fault_rate", json!(u32::MAX)),
    ] {
        let mut test = json!({
            "lanes": 1, "bytes": null, "reverse": false, "bidir": false, "discard": false,
            "kind": "shared", "pages": "4K", "fault_rate": 0, "faults": 0, "zero_percent": 0, "verify": false, "congestion": null, "region_bytes": 2 * MIB,
        });
        test[field] = value;
        let request = json!({ "test": test });
        let hello = json!({ "magic": "umem-bench", "version": 2, "request": request });
        let answer = server.answers(format!("{hello}\n").as_bytes());
        assert!(answer.contains("failed"), "{field}: {answer}");
        server.umem.event("test_failed");
    }
}

#[test]
fn client_reports_a_peer_that_is_no_bench_server() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let other = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"SSH-2.0-something\r\n").unwrap();
        let _ = stream.read(&mut [0; 4096]);
    });
    let error = failure(&uri, &["-n", "8M"], 1);
    assert!(error.contains("lost the server"), "{error}");
    other.join().unwrap();
    // A port that the kernel does not assign automatically.
    let error = failure("tcp:127.0.0.1:1", &["-n", "8M"], 1);
    assert!(error.contains("start `umem bench server` there first"), "{error}");
}

#[test]
fn wrong_command_line_is_refused_with_the_reason() {
    for (arguments, hint) in [
        (&["-t", "5", "-n", "5"][..], "leave one of them out"),
        (&["-t", "0"], "-t is"),
        (&["-t", "1e9"], "-t is"),
        (&["-P", "0"], "-P is 1 to 64"),
        (&["-n", "0"], "-n is 1 byte"),
        (&["-n", "lots"], "512M"),
        (&["-O", "-1"], "-O"),
        (&["-i", "0.001"], "-i is"),
        (&["--page-size", "1G"], "4K or 2M"),
        (&["--discard", "--verify"], "leave out --verify"),
        (&["--pass-size", "1M"], "--pass-size is whole blocks"),
        (&["-C", "a b"], "cubic"),
        (&["-R", "--bidir"], "leave out -R"),
        (&["--kind", "private"], "umem demo --kind private"),
        (&["--kind", "swap"], "shared, private and anonymous"),
        (&["--fault-rate", "100", "-n", "8M"], "needs -t"),
        (&["--fault-rate", "100", "--discard"], "no memory to fault in"),
        (&["--fault-rate", "100000", "-t", "60"], "shorter -t"),
        (&["--fault-rate", "1000000"], "beyond one userfaultfd"),
        (&["--fault-rate", "9", "--kind", "anonymous", "--page-size", "2M"], "pages of 4 KiB"),
    ] {
        let error = failure("tcp:127.0.0.1:1", arguments, 2);
        assert!(error.contains(hint), "{arguments:?}: {error}");
    }
    assert!(failure("fd:3", &[], 2).contains("use tcp: or unix:"));
}
