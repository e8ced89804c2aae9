//! `umem demo`: all of umem with a demo guest, which checks every page.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a test may say what it does")]

mod support;

use std::process::{Command, Output};

use serde_json::Value;
use support::HugePages;

/// Runs the demo; on failure prints its output, the seed included.
fn demo(arguments: &[&str]) -> Value {
    let output = umem(&[&["demo", "--json"], arguments].concat());
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    let last = stdout.lines().last().expect("a report");
    println!("{stdout}");
    serde_json::from_str(last).expect("the last line is JSON")
}

fn umem(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_umem")).args(arguments).output().expect("umem starts")
}

fn number(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap_or_else(|| panic!("{field} in {report}"))
}

/// The properties of any move of a guest of `mib` MiB.
fn check(report: &Value, mib: u64) {
    assert_eq!(report["event"], "completed");
    assert_eq!(number(report, "verified_pages"), mib * 256);
    assert_eq!(number(report, "bad_pages"), 0);
    assert_eq!(number(report, "guest_writes_lost"), 0);
    assert_eq!(report["registered"], false);
    assert_eq!(number(report, "total_bytes"), mib << 20);
    let bytes = ["data_bytes", "zero_bytes", "hole_bytes"].map(|field| number(report, field));
    assert_eq!(
        bytes.iter().sum::<u64>(),
        mib << 20,
        "every page arrived as data, zeroes or a hole"
    );
    let pages = ["pages_demand", "pages_background"].map(|field| number(report, field));
    assert_eq!(
        pages.iter().sum::<u64>(),
        mib * 256,
        "every page arrived on demand or in the background"
    );
    let source = &report["source"];
    for field in ["data_bytes", "zero_bytes", "hole_bytes", "pages_demand", "pages_background"] {
        assert_eq!(source[field], report[field], "both sides counted the same {field}");
    }
    for field in ["downtime_ms", "total_s", "gbps"] {
        assert!(report[field].as_f64().is_some_and(|value| value > 0.0), "{field}");
    }
    let cpu = &report["cpu_s"];
    assert!(cpu["user"].as_f64().unwrap() + cpu["system"].as_f64().unwrap() > 0.0);
}

#[test]
fn demo_moves_a_guest_and_every_page_is_right() {
    let report = demo(&["--size", "256"]);
    check(&report, 256);
    let faults = number(&report["fault_latency_us"], "count");
    assert!(faults > 0);
    let stages = report["fault_stages_us"].as_object().expect("stages");
    assert_eq!(stages.len(), 3);
    for (name, stage) in stages {
        let count = number(stage, "count");
        // Without faults of pages that were in flight already.
        assert!(count > 0 && count <= faults, "{name}: {count} of {faults}");
        assert!(stage["p50"].as_f64() > Some(0.0), "{name}: {stage}");
    }
    assert!(number(&report, "pages_demand") > 0);
    assert!(number(&report, "zero_bytes") > 0);
    assert!(number(&report, "writes") > 0);
}

/// Each call only saves copies or queries. Private memory has small pages here, so long runs would go through a pipe.
#[test]
fn guest_moves_in_a_sandbox_without_optional_system_calls() {
    let faster = [
        libc::SYS_splice,
        libc::SYS_vmsplice,
        libc::SYS_process_vm_writev,
        libc::SYS_mincore,
        libc::SYS_sched_setattr,
    ];
    let each = faster.iter().map(std::slice::from_ref);
    for (index, forbidden) in each.chain([&faster[..]]).enumerate() {
        let errno = [libc::EPERM, libc::ENOSYS][index % 2];
        for kind in ["private", "shared"] {
            // Instead of an end that would never come.
            let mut command = Command::new("timeout");
            command.args(["-k", "10", "100", env!("CARGO_BIN_EXE_umem")]);
            command.args(["demo", "--json", "--size", "64", "--kind", kind]);
            support::sandbox::forbid(&mut command, forbidden, errno);
            let output = command.output().expect("the program starts");
            let stdout = String::from_utf8_lossy(&output.stdout);
            let stderr = String::from_utf8_lossy(&output.stderr);
            let what = format!("{kind} without {forbidden:?}");
            assert!(output.status.success(), "{what}: {}\n{stdout}\n{stderr}", output.status);
            let report = serde_json::from_str(stdout.lines().last().expect("a report")).unwrap();
            check(&report, 64);
            assert!(!stdout.contains("recovering"), "{what}: {stdout}");
        }
    }
}

/// Private memory is populated by one madvise, or else touched page by page.
#[test]
fn private_memory_is_touched_in_a_sandbox_without_madv_populate() {
    let advice = (2, libc::MADV_POPULATE_WRITE.unsigned_abs());
    for errno in [libc::EPERM, libc::ENOSYS] {
        let mut command = Command::new("timeout");
        command.args(["-k", "10", "100", env!("CARGO_BIN_EXE_umem")]);
        command.args(["demo", "--json", "--size", "64", "--kind", "private"]);
        support::sandbox::forbid_with(&mut command, libc::SYS_madvise, advice, errno);
        let output = command.output().expect("the program starts");
        let stdout = String::from_utf8_lossy(&output.stdout);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
        check(&serde_json::from_str(stdout.lines().last().expect("a report")).unwrap(), 64);
    }
}

/// Complete blocks leave the userfaultfd one by one, so the kernel maps them with huge pages. Needs root for a tmpfs
/// with huge pages; the demo prints which memory it has.
#[test]
fn arrived_guest_maps_huge_pages() {
    let output = umem(&["demo", "--json", "--size", "256"]);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{stdout}");
    assert!(stdout.contains("tmpfs with huge pages"), "run the tests as root: {stdout}");
    let report: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert!(number(&report, "huge_bytes") >= 192 << 20, "{report}");
}

#[test]
fn guest_moves_over_several_lanes() {
    let report = demo(&["--size", "192", "--lanes", "4", "--threads", "4"]);
    check(&report, 192);
    assert_eq!(number(&report, "lanes"), 4);
}

#[test]
fn guest_waits_for_no_page_without_postcopy() {
    let report = demo(&["--size", "64", "--stop-first"]);
    check(&report, 64);
    assert_eq!(number(&report, "pages_demand"), 0);
    assert_eq!(number(&report["fault_latency_us"], "count"), 0);
}

#[test]
fn pages_sent_while_the_guest_ran_are_right() {
    for kind in ["shared", "private"] {
        let report = demo(&["--size", "64", "--precopy", "--kind", kind]);
        check(&report, 64);
        assert!(number(&report, "precopy_bytes") > 0, "{report}");
    }
}

#[test]
fn guest_of_odd_size_that_only_writes_moves() {
    let report = demo(&["--size", "33", "--write-percent", "100", "--threads", "3"]);
    check(&report, 33);
}

#[test]
fn zero_pages_and_holes_are_sent_without_data() {
    let report = demo(&["--size", "64", "--zero-percent", "60", "--hole-percent", "40"]);
    check(&report, 64);
    // The pages that the source's guest wrote while it ran.
    assert!(number(&report, "data_bytes") < 32 << 20, "{}", report["data_bytes"]);
}

#[test]
fn same_seed_gives_the_same_memory() {
    let report = demo(&["--size", "16", "--seed", "42", "--write-percent", "0"]);
    check(&report, 16);
    let again = demo(&["--size", "16", "--seed", "42", "--write-percent", "0"]);
    assert_eq!(number(&report, "data_bytes"), number(&again, "data_bytes"));
}

#[test]
fn private_memory_becomes_anonymous_to_the_guest() {
    for flags in ["0", "1"] {
        for more in [&["--size", "256"][..], &["--size", "65", "--lanes", "3", "--threads", "4"]] {
            let report = demo(&[&["--kind", "private", "--postcopy-flags", flags], more].concat());
            check(&report, more[1].parse().unwrap());
            assert_eq!(report["kind"], "private");
            assert_eq!(report["release_bytes"], report["data_bytes"]);
            assert_eq!(number(&report, "ram_file_bytes"), 0, "the file is empty");
        }
    }
}

#[test]
fn anonymous_memory_is_filled_on_first_touch() {
    for more in [&["--size", "256"][..], &["--size", "65", "--lanes", "3", "--threads", "4"]] {
        let report = demo(&[&["--kind", "anonymous"], more].concat());
        check(&report, more[1].parse().unwrap());
        assert_eq!(report["kind"], "anonymous");
        assert!(number(&report, "pages_demand") > 0);
        assert_eq!(number(&report, "release_bytes"), 0);
        assert!(report["ram_file_bytes"].is_null());
    }
}

/// Each shard has a userfaultfd, and they are served in parallel.
#[test]
fn anonymous_memory_is_handed_over_in_shards() {
    for (shards, lanes) in [("2", "1"), ("8", "3"), ("33", "2")] {
        let report = demo(
            &[
                &["--kind", "anonymous", "--shards", shards, "--lanes", lanes][..],
                &["--size", "67", "--threads", "4"],
            ]
            .concat(),
        );
        check(&report, 67);
    }
}

#[test]
fn anonymous_huge_pages_arrive_whole() {
    let _room = HugePages::reserve(64);
    for more in [&[][..], &["--discard"], &["--shards", "4", "--discard", "--lanes", "2"]] {
        let arguments = ["--kind", "anonymous", "--huge", "--size", "128"];
        let report = demo(&[&arguments[..], more].concat());
        assert_eq!(number(&report, "verified_pages"), 128 * 256);
        assert_eq!(number(&report, "huge_bytes"), 128 << 20);
        assert_eq!(number(&report, "page_size"), 2 << 20);
    }
}

/// Discarded pages read as zeroes from then on, whatever their state was.
#[test]
fn discarded_pages_stay_empty() {
    for kind in [
        &["--kind", "shared"][..],
        &["--kind", "shared", "--lanes", "3", "--write-percent", "70"],
        &["--kind", "private"],
        &["--kind", "private", "--postcopy-flags", "1"],
        &["--kind", "private", "--postcopy-flags", "1", "--lanes", "3", "--write-percent", "70"],
        &["--kind", "anonymous"],
        &["--kind", "anonymous", "--shards", "4", "--lanes", "3", "--write-percent", "70"],
    ] {
        let report = demo(&[kind, &["--discard", "--size", "96", "--threads", "3"]].concat());
        check(&report, 96);
        assert!(number(&report, "discards") > 0, "{report}");
    }
}

#[test]
fn every_memory_kind_arrives_without_postcopy() {
    for kind in ["private", "anonymous"] {
        let report = demo(&["--size", "64", "--stop-first", "--kind", kind]);
        check(&report, 64);
        assert_eq!(number(&report, "pages_demand"), 0);
    }
}

#[test]
fn demo_prints_a_summary() {
    let output = umem(&["demo", "--size", "16"]);
    assert!(output.status.success());
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(stdout.contains("moved 16 MiB"), "{stdout}");
    assert!(stdout.contains("all 4096 pages are right"), "{stdout}");
}

/// A waiting guest, and one in anonymous memory, without their RAM.
const GUEST: [&str; 6] = ["guest", "--incoming", "--qmp", "/q", "--size", "1"];
const ANONYMOUS: [&str; 10] =
    ["guest", "--incoming", "--qmp", "/q", "--size", "1", "--kind", "anonymous", "--handoff", "/h"];

#[test]
fn wrong_command_line_gives_one_line_with_the_remedy() {
    for (arguments, hint) in [
        (&[][..], "--help"),
        (&["demo", "--size", "0"], "at least 1"),
        (&["demo", "--size", "many"], "--help"),
        (&["demo", "--kind", "other"], "shared, private and anonymous"),
        (&["demo", "--shards", "2"], "--kind anonymous"),
        (&["demo", "--huge", "--kind", "private"], "--kind anonymous"),
        (&["demo", "--postcopy-flags", "1"], "--kind private"),
        (&["demo", "--kind", "private", "--postcopy-flags", "2"], "0 or 1"),
        (&["guest", "--qmp", "/q", "--size", "1", "--ram", "r"], "NAME=PATH"),
        (&["guest", "--qmp", "/q", "--size", "1", "--ram", "r=/r", "--discard"], "--incoming"),
        (&[&GUEST[..], &["--ram", "r=/r", "--shards", "2"]].concat(), "--kind anonymous"),
        (&[&GUEST[..], &["--ram", "r=/r", "--handoff", "/h"]].concat(), "--kind anonymous"),
        (&[&GUEST[..], &["--ram", "r", "--kind", "anonymous"]].concat(), "--handoff SOCKET"),
        (&[&ANONYMOUS[..], &["--ram", "r=/r"]].concat(), "--ram NAME"),
        (&[&ANONYMOUS[..], &["--ram", "r", "--shards", "2"]].concat(), "1 to 1 "),
        (&[&ANONYMOUS[..], &["--ram", "r", "--huge"]].concat(), "whole pages"),
        (&["demo", "--write-percent", "101"], "0 to 100 percent"),
        (&["demo", "--zero-percent", "60", "--hole-percent", "60"], "0 to 100 percent"),
        (&["demo", "--lanes", "0"], "1 to 64"),
        (&["migrate"], "tcp:HOST:4444"),
        (&["migrate", "tcp:localhost:1"], "--qmp"),
        (&["migrate", "-n", "--ram", "a=/b", "tcp:localhost:1"], "-p -n"),
        (&["migrate", "-p", "--ram", "nonsense", "tcp:localhost:1"], "NAME=PATH"),
        (&["migrate", "-p", "--ram", "a=/b", "localhost:1"], "tcp:HOST:PORT"),
        (&["migrate", "-p", "--cores", "0,x", "--ram", "a=/b", "tcp:h:1"], "core numbers"),
        (&["migrate", "-p", "--cores", "99999", "--ram", "a=/b", "tcp:h:1"], "may not use core"),
        (&["incoming", "tcp:localhost:0"], "after --"),
        (&["incoming", "tcp:localhost:0", "--", "/bin/true"], "--ram"),
        (&["unknown"], "--help"),
    ] {
        let output = umem(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(stderr.lines().count(), 1, "{arguments:?}: {stderr}");
        assert!(stderr.contains(hint), "{arguments:?}: {stderr}");
    }
}

#[test]
fn version_is_printed_by_option_and_by_command() {
    let outputs = [umem(&["version"]), umem(&["--version"])];
    assert!(outputs.iter().all(|output| output.status.code() == Some(0)), "{outputs:?}");
    assert!(String::from_utf8_lossy(&outputs[0].stdout).contains(env!("CARGO_PKG_VERSION")));
    assert_eq!(outputs[0].stdout, outputs[1].stdout);
}

#[test]
fn help_shows_examples() {
    for arguments in
        [&["--help"][..], &["demo", "--help"], &["incoming", "--help"], &["migrate", "--help"]]
    {
        let output = umem(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(output.stderr.is_empty());
        assert!(String::from_utf8_lossy(&output.stdout).contains("Usage"));
    }
}
