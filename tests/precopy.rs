//! Pages that are sent while the guest runs, and sent again after it has written to them: live precopy, and hybrid
//! (`--precopy -p`).
//!
//! The guest is the demo's: it writes all the time, in every pass. It checks every word that it reads, and all of its
//! memory at the end. A page whose last copy is older than the guest's last write would have a wrong word.

#[path = "precopy/hot.rs"]
mod hot;
mod support;

use std::net::TcpListener;

use serde_json::{Value, json};
use support::{
    Authority, Cutter, Ends, Guests, How, LaneFromSource, Move, Qmp, Scratch, Umem, wait_for,
};
use umem_wire::Capabilities;

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

/// The remainder is never small enough, so there are several passes.
const RESTLESS: [&str; 3] = ["--precopy", "--downtime-limit", "0"];

/// Moves a guest with these options for `umem migrate`, and returns the passes and both reports.
fn moves(how: How) -> (Vec<Value>, Value, Value) {
    let mut moving = Move::start_through(how, Cutter::let_pages_go);
    let mut passes = vec![moving.migrate.event("pass")];
    // The guest is stopped after the last pass.
    loop {
        let event = moving.migrate.next_event();
        match event["event"].as_str() {
            Some("pass") => passes.push(event),
            Some("stopped") => break,
            _ => {}
        }
    }
    let (source, destination) = moving.complete();
    for report in [&source, &destination] {
        check_rates(report);
        for digest in report["digests"].as_array().unwrap() {
            assert_eq!(digest["digest"], digest["peer"], "{report}");
        }
    }
    assert_eq!(source["passes"], passes.len());
    let last = passes.last().unwrap();
    for name in ["dirty_bytes_per_s", "expected_downtime_ms"] {
        assert_eq!(source[name], last[name], "{name}: {source}");
    }
    // With postcopy the guest does not wait for the remaining pages.
    assert_eq!(last["expected_downtime_ms"].is_number(), how.without_postcopy, "{last}");
    assert_eq!(destination["passes"], 0);
    (passes, source, destination)
}

/// A report's times and bytes are consistent: no more bytes have crossed than there were.
fn check_rates(report: &Value) {
    let number = |name: &str| report[name].as_f64().unwrap();
    assert!(number("precopy_s") > 0.0 && number("precopy_bytes") > 0.0, "{report}");
    let crossed = number("gbps") * 1e9 / 8.0 * (number("precopy_s") + number("total_s"));
    let most = number("precopy_bytes") + number("data_bytes");
    assert!((number("precopy_bytes")..=most).contains(&crossed.round()), "{crossed}: {report}");
}

/// The first pass sends all pages, and the last one leaves those that are sent after the switchover.
fn check_passes(passes: &[Value], how: How) {
    assert_eq!(passes[0]["pass"], 1);
    let sent = passes[0]["sent_bytes"].as_u64().unwrap();
    assert!((how.mib << 19..=how.mib << 20).contains(&sent), "{passes:?}");
    assert!(passes.len() <= 4, "{passes:?}");
}

fn hybrid(how: How) {
    let (passes, source, _) = moves(how);
    check_passes(&passes, how);
    let demanded = source["pages_demand"].as_u64().unwrap() << 12;
    assert!(demanded <= how.mib << 18, "few pages are asked for after the switchover: {source}");
}

#[test]
fn hybrid_moves_a_guest_over_one_lane() {
    hybrid(How { mib: 96, threads: 2, migrate: &RESTLESS, ..How::default() });
}

#[test]
fn hybrid_moves_a_guest_over_four_lanes_with_checksums() {
    let migrate = &["--precopy", "--downtime-limit", "0", "--checksum", "--lanes", "4"];
    hybrid(How { mib: 96, threads: 3, migrate, ..How::default() });
}

#[test]
fn hybrid_moves_a_guest_over_tls() {
    let scratch = Scratch::new();
    let creds = Authority::new("ours").credentials(&scratch, "tls", "127.0.0.1");
    let creds: &'static str = creds.display().to_string().leak();
    let security = Some(["--tls-creds", creds]);
    for migrate in [&RESTLESS[..], &["--precopy", "--downtime-limit", "0", "--checksum"]] {
        hybrid(How { mib: 80, threads: 2, migrate, security, ..How::default() });
    }
}

#[test]
fn hybrid_moves_a_guest_into_huge_pages() {
    for migrate in [&RESTLESS[..], &["--precopy", "--downtime-limit", "0", "--checksum"]] {
        let how = How { mib: 64, threads: 2, migrate, huge: true, ..How::default() };
        let (passes, _, destination) = moves(how);
        check_passes(&passes, how);
        assert_eq!(destination["page_size"], 2 << 20);
    }
}

#[test]
fn hybrid_moves_a_guest_into_private_memory() {
    for incoming in [&[][..], &["--postcopy-flags", "1"]] {
        let (migrate, kind) = (&["--precopy", "--checksum"][..], Some("private"));
        let how = How { mib: 48, threads: 2, migrate, kind, incoming, ..How::default() };
        let (passes, ..) = moves(how);
        check_passes(&passes, how);
    }
}

#[test]
fn all_pages_are_sent_before_the_switchover_without_postcopy() {
    for migrate in [&RESTLESS[..], &["--checksum", "--lanes", "4"]] {
        let how = How { mib: 64, threads: 2, migrate, without_postcopy: true, ..How::default() };
        let (passes, source, destination) = moves(how);
        check_passes(&passes, how);
        assert_eq!(source["pages_demand"], 0);
        assert_eq!(destination["drain_s"], 0.0);
    }
}

/// Bytes a second, `2M`.
const SLOW_BYTES_PER_S: f64 = (2 << 20) as f64;

/// At this limit the first pass alone would take half a minute. It ends when its time is over, and the rest is sent
/// without the limit.
#[test]
fn pass_keeps_its_bandwidth_limit_and_ends_at_its_timeout() {
    for (without_postcopy, lanes) in [(false, 1.0), (true, 1.0), (true, 3.0)] {
        let migrate: &[&str] = match (without_postcopy, lanes > 1.0) {
            (false, _) => &["--precopy", "--timeout", "2", "--max-bandwidth", "2M", "--checksum"],
            (true, false) => &["--timeout", "2", "--max-bandwidth", "2M", "--checksum"],
            (true, true) => &["--timeout", "2", "--max-bandwidth", "2M", "--lanes", "3"],
        };
        let how = How { mib: 64, threads: 1, migrate, without_postcopy, ..How::default() };
        let mut moving = Move::start_through(how, Cutter::let_pages_go);
        let pass = moving.migrate.event("pass");
        assert_eq!((&pass["pass"], &pass["cut"]), (&json!(1), &json!(true)));
        assert!(pass["remaining_bytes"].as_u64() > Some(32 << 20), "{pass}");
        assert_eq!(pass["dirty_bytes_per_s"], Value::Null, "no pass was a whole one");
        // The bytes that each lane may begin with, and catch up on, and the block with which it ends.
        let sent = pass["sent_bytes"].as_f64().unwrap();
        let begun = lanes * f64::from((256 << 10) + (2 << 20));
        let most = SLOW_BYTES_PER_S * (pass["seconds"].as_f64().unwrap() + 0.005) + begun;
        assert!(sent > 0.0 && sent <= most, "{sent} > {most}: {pass}");
        let (source, destination) = moving.complete();
        assert_eq!(source["passes"], 1);
        assert_eq!(source["digests"], destination["digests"]);
        let rest = source["data_bytes"].as_f64().unwrap() - sent;
        let seconds = source["total_s"].as_f64().unwrap();
        assert!(rest > SLOW_BYTES_PER_S * seconds, "{rest} bytes in {seconds} s: {source}");
        assert_eq!(destination["drain_s"] == 0.0, without_postcopy, "{destination}");
    }
}

/// The source's memory is freed once the destination has it, in rounds or later.
#[test]
fn memory_sent_in_rounds_is_freed() {
    let migrate = &["--precopy", "--downtime-limit", "0", "--release-ram", "--checksum"];
    let (_, source, _) = moves(How { mib: 48, threads: 2, migrate, ..How::default() });
    assert!(source["release_bytes"].as_u64() > Some(24 << 20), "{source}");
}

/// After the switchover lanes may be lost as without rounds: pages that were sent in rounds have arrived.
#[test]
fn lanes_lost_after_the_switchover_are_opened_again() {
    let migrate = &["--precopy", "--downtime-limit", "0", "--precopy-passes", "1", "--checksum"];
    let how = How { mib: 64, threads: 2, migrate, ..How::default() };
    let mut moving = Move::start_through(how, Cutter::let_pages_go);
    moving.migrate.event("running");
    moving.cutter.cut(Ends::Both, false);
    moving.complete();
}

/// The guest has not been given away yet.
#[test]
fn guest_continues_at_the_source_when_a_lane_is_lost_in_a_round() {
    for (bytes, ends) in [(5 << 20, Ends::Both), (30 << 20, Ends::Source)] {
        let how = How { mib: 64, threads: 2, migrate: &RESTLESS, ..How::default() };
        let moving = Move::start_through(how, |cutter| {
            cutter.cut_after([(bytes, ends)]);
            cutter.let_pages_go();
        });
        let Move { scratch, guest: _guest, mut incoming, migrate, cutter: _cutter, .. } = moving;
        let error = migrate.fails();
        assert!(error.contains("lane"), "{error}");
        assert_eq!(incoming.wait().code(), Some(1));
        runs_here(&scratch);
    }
}

/// The guest at the source runs, and every word of its memory is right.
fn runs_here(scratch: &Scratch) {
    let mut qmp = Qmp::connect(&scratch.path("source.qmp"));
    assert_eq!(qmp.execute("query-status", json!({}))["status"], "running");
    let writes = |qmp: &mut Qmp| qmp.execute("umem-dirty", json!({}))["runs"].clone();
    wait_for("the guest to write", || (writes(&mut qmp) != json!([])).then_some(()));
    assert_eq!(qmp.execute("umem-verify", json!({}))["bad_pages"], 0);
}

#[test]
fn guest_continues_at_the_source_when_a_umem_is_killed_in_a_round() {
    for side in ["source", "destination"] {
        let how = How { mib: 64, threads: 2, migrate: &RESTLESS, ..How::default() };
        // The relay holds the bulk lane's data back, so that the first pass does not end.
        let Move { scratch, guest: _guest, mut incoming, mut migrate, cutter, .. } =
            Move::start(how);
        migrate.event("connected");
        cutter.wait_for_demand(1);
        match side {
            "source" => {
                migrate.kill();
                migrate.wait();
                assert_eq!(incoming.wait().code(), Some(1));
            }
            _ => {
                incoming.kill();
                incoming.wait();
                migrate.fails();
            }
        }
        runs_here(&scratch);
    }
}

/// A guest that has arrived discards pages, too: data become a hole in the next pass, and data again.
#[test]
fn holes_become_data_and_data_holes() {
    const SHAPE: [&str; 6] = ["--size", "32", "--threads", "3", "--write-percent", "60"];
    let scratch = Scratch::new();
    let path = |name: &str| scratch.path(name).display().to_string();
    let ram = |name: &str| format!("ram0={}", scratch.ram(name).display());
    let arrives = |name: &str| {
        let (qmp, ram) = (path(&format!("{name}.qmp")), ram(name));
        let words = ["incoming", "--json", "--qmp", &qmp, "--ram", &ram, "tcp:127.0.0.1:0", "--"];
        let guest = [UMEM, "guest", "--incoming", "--discard", "--qmp", &qmp, "--ram", &ram];
        let mut incoming = Umem::start([&words[..], &guest, &SHAPE].concat());
        let uri = incoming.event("listening")["uri"].as_str().expect("a URI").to_owned();
        (incoming, uri)
    };
    let leaves = |name: &str, uri: &str| {
        let qmp = path(&format!("{name}.qmp"));
        let words = ["migrate", "-p", "--json", "--checksum", "--qmp", &qmp, uri];
        Umem::start(words.iter().chain(&RESTLESS))
    };
    let (qmp, file) = (path("first.qmp"), ram("first"));
    let guest = ["guest", "--qmp", &qmp, "--ram", &file];
    let mut first = Umem::start([&guest[..], &SHAPE].concat());
    first.event("ready");
    let mut guests = vec![first];
    for (from, to) in [("first", "second"), ("second", "third"), ("third", "fourth")] {
        let (mut incoming, uri) = arrives(to);
        let mut migrate = leaves(from, &uri);
        migrate.event("pass");
        let (source, destination) = (migrate.event("completed"), incoming.event("completed"));
        assert_eq!(source["digests"], destination["digests"]);
        migrate.succeeds();
        Qmp::connect(&scratch.path(&format!("{from}.qmp"))).quit();
        guests.push(incoming);
    }
    let mut qmp = Qmp::connect(&scratch.path("fourth.qmp"));
    let verdict = qmp.execute("umem-verify", json!({}));
    assert_eq!((&verdict["bad_pages"], &verdict["guest_writes_lost"]), (&json!(0), &json!(0)));
    qmp.quit();
    guests.into_iter().for_each(Umem::succeeds);
}

#[test]
fn memory_unable_to_take_a_page_twice_is_refused() {
    let (migrate, kind) = (&RESTLESS, Some("anonymous"));
    let moving = Move::start(How { mib: 16, threads: 1, kind, migrate, ..How::default() });
    let Move { scratch, guest: _guest, incoming, migrate, cutter: _cutter, .. } = moving;
    let error = migrate.fails();
    assert!(error.contains("-p without --precopy (postcopy), or --stop-first"), "{error}");
    let error = incoming.fails();
    assert!(error.contains("RAM ram0 is anonymous memory here"), "{error}");
    runs_here(&scratch);
}

/// A destination of an earlier version is detected before the guest or its memory is touched.
#[test]
fn older_destination_is_refused_by_its_protocol() {
    let scratch = Scratch::new();
    let guests = Guests::quiet(&scratch, &["--json"]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let migrate = guests.migrate_to(&uri, &["-p", "--precopy"]);
    let lane = LaneFromSource::welcome(listener.accept().unwrap().0, Capabilities::RECOVERY);
    assert!(lane.hello.capabilities.contains(Capabilities::ROUNDS));
    let error = migrate.fails();
    let versions = "the destination supports protocol 1 without rounds";
    assert!(error.contains(versions) && error.contains("1 with rounds"), "{error}");
    assert!(error.contains("-p without --precopy (postcopy), or --stop-first"), "{error}");
}

#[test]
fn conflicting_precopy_options_are_refused() {
    let ram = ["--ram", "ram0=/dev/shm/none"];
    let qmp = ["--qmp", "/nowhere"];
    let tcp = "tcp:127.0.0.1:1";
    let refused = |words: &[&str], text: &str| {
        let error = Umem::start([&["migrate"], words].concat()).fails_as_misused();
        assert!(error.contains(text), "{error}");
    };
    refused(&[&qmp[..], &["-p", "--downtime-limit", "5", tcp]].concat(), "add --precopy");
    refused(&[&qmp[..], &["-p", "--precopy-passes", "5", tcp]].concat(), "add --precopy");
    let stopped = [&qmp[..], &["--stop-first", "--precopy-passes", "5", tcp]].concat();
    refused(&stopped, "--stop-first has no passes: leave it out");
    refused(&[&ram[..], &["--downtime-limit", "5", tcp]].concat(), "no running guest");
    for other in ["-p", "--precopy"] {
        let both = [&qmp[..], &["--stop-first", other, tcp]].concat();
        refused(&both, "leave out -p and --precopy, or --stop-first");
    }
    refused(&[&qmp[..], &["--precopy-passes", "0", tcp]].concat(), "--stop-first");
    for (option, value) in [("--timeout", "5"), ("--max-bandwidth", "1M")] {
        let text = format!("{option} is about passes while the guest runs");
        refused(&[&qmp[..], &["-p", option, value, tcp]].concat(), &text);
        refused(&[&qmp[..], &["--stop-first", option, value, tcp]].concat(), &text);
        refused(&[&ram[..], &[option, value, tcp]].concat(), &text);
        refused(&["--resume", "5", option, value], &format!("leave out {option}"));
    }
    refused(&[&qmp[..], &["--max-bandwidth", "0", tcp]].concat(), "would send no pages");
    refused(&[&qmp[..], &["--timeout", "0", tcp]].concat(), "whole seconds");
    refused(&[&qmp[..], &["--precopy", "--precopy-passes", "0", tcp]].concat(), "send no pages");
    refused(&[&ram[..], &["--precopy", tcp]].concat(), "files alone have none");
    for (uri, more) in [("fd:0", &[][..]), ("fd:0", &["--precopy", "-p"]), ("exec:cat", &[])] {
        let text = format!("{uri} is one connection without them: use -p without --precopy");
        refused(&[&qmp[..], more, &[uri]].concat(), &text);
    }
}
