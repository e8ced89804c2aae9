//! What whoever waits is shown: bars on a terminal, lines elsewhere, events in JSON, a trace when asked.

mod support;

use std::fs::File;
use std::io::Read;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use support::{Guests, Qmp, Scratch};

fn demo(arguments: &[&str], rust_log: Option<&str>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_umem"));
    command.args(["demo", "--size", "16"]).args(arguments).env_remove("RUST_LOG");
    if let Some(directives) = rust_log {
        command.env("RUST_LOG", directives);
    }
    let output = command.output().expect("umem starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

/// A guest that does nothing moves at 2 MiB a second: that takes eight seconds, and a line comes every
/// three.
const SLOWLY: [&str; 3] = ["-p", "--max-postcopy-bandwidth", "2M"];

#[test]
fn without_a_terminal_there_is_a_line_now_and_then() {
    let scratch = Scratch::new();
    let mut guests = Guests::quiet(&scratch, &["--json"]);
    let mut migrate = guests.migrate(&SLOWLY);
    assert!(migrate.wait().success());
    let stderr = migrate.stderr();
    let line = stderr.lines().find(|line| line.starts_with("umem: sending: "));
    let line = line.unwrap_or_else(|| panic!("{stderr}"));
    assert!(line.contains(" of 16.00 MiB, ") && line.contains("/s, "), "{line}");
    // The other side's figures are in JSON.
    let progress = guests.incoming.event("progress");
    assert_eq!(progress["role"], "destination");
    assert_eq!(progress["total_bytes"], 16 << 20);
    let done = progress["done_bytes"].as_u64().unwrap();
    assert!((1 << 20..=16 << 20).contains(&done), "{progress}");
    assert!(progress["text"].as_str().unwrap().starts_with("filling: "), "{progress}");
    guests.incoming.event("completed");
    Qmp::connect(&scratch.path("destination")).quit();
    guests.incoming.succeeds();
}

#[test]
fn quiet_is_quiet() {
    let scratch = Scratch::new();
    let mut guests = Guests::quiet(&scratch, &["--json", "--quiet"]);
    let mut migrate = guests.migrate(&[&SLOWLY[..], &["-q"]].concat());
    assert!(migrate.wait().success());
    assert!(!migrate.stderr().contains("sending"), "{}", migrate.stderr());
    guests.incoming.event("completed");
    Qmp::connect(&scratch.path("destination")).quit();
    guests.incoming.succeeds();
}

/// On a terminal each phase has a bar, and leaves a line with what it came to.
#[test]
fn a_terminal_has_bars() {
    let size = nix::pty::Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    let terminal = nix::pty::openpty(Some(&size), None).expect("a terminal");
    let mut command = Command::new(env!("CARGO_BIN_EXE_umem"));
    command
        .args(["demo", "--size", "64"])
        .env_remove("RUST_LOG")
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(terminal.slave);
    let mut child = command.spawn().expect("umem starts");
    // With it goes this process's copy of the terminal's other end.
    drop(command);
    let mut shown = Vec::new();
    // A terminal whose last user has gone ends with an error.
    let _ = File::from(terminal.master).read_to_end(&mut shown);
    assert!(child.wait().expect("our child").success());
    let shown = String::from_utf8_lossy(&shown);
    for (phase, has) in [("switching", " ms"), ("filling", "/s"), ("filling", " MiB, ")] {
        let line = |line: &str| line.contains(&format!("{phase}  ")) && line.contains(has);
        assert!(shown.lines().any(line), "{phase}: {shown:?}");
    }
    assert!(shown.contains("] ") && shown.contains("left"), "a bar: {shown:?}");
    assert!(!shown.contains("umem: filling"), "a bar, and no lines: {shown:?}");
}

#[test]
fn a_trace_has_the_beginning_and_the_end_of_each_phase() {
    for (arguments, rust_log) in
        [(&["--verbose"][..], None), (&[][..], Some("umem=info")), (&["-v", "--json"][..], None)]
    {
        let output = demo(arguments, rust_log);
        let stderr = String::from_utf8_lossy(&output.stderr);
        for (side, phase) in [("source", "serving pages"), ("destination", "receiving pages")] {
            for what in ["phase begins", "phase ends"] {
                let about = |line: &str| [side, phase, what].iter().all(|word| line.contains(word));
                assert!(stderr.lines().any(about), "{side}, {phase}, {what}:\n{stderr}");
            }
        }
        let report = String::from_utf8_lossy(&output.stdout);
        if arguments.contains(&"--json") {
            let last = report.lines().last().expect("a report");
            assert!(
                serde_json::from_str::<Value>(last).is_ok(),
                "nothing of it on stdout: {report}"
            );
        }
    }
    let stderr = demo(&[], Some("umem=error")).stderr;
    assert!(!String::from_utf8_lossy(&stderr).contains("phase"), "RUST_LOG says what");
}
