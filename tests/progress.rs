//! Progress output: bars on a terminal, lines elsewhere, events in JSON, a trace on request.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Output, Stdio};

use nix::fcntl::{FcntlArg, fcntl};
use serde_json::{Value, json};
use support::{Guests, Qmp, Scratch, Umem, wait_for};

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

/// An idle guest moves at 2 MiB/s: that takes eight seconds, with a line every three.
const SLOWLY: [&str; 3] = ["-p", "--max-postcopy-bandwidth", "2M"];

#[test]
fn progress_lines_are_printed_without_a_terminal() {
    let scratch = Scratch::new();
    let mut guests = Guests::quiet(&scratch, &["--json"]);
    let mut migrate = guests.migrate(&SLOWLY);
    assert!(migrate.wait().success());
    let stderr = migrate.stderr();
    let line = stderr.lines().find(|line| line.starts_with("umem: sending: "));
    let line = line.unwrap_or_else(|| panic!("{stderr}"));
    assert!(line.contains(" of 16.00 MiB, ") && line.contains("/s, "), "{line}");
    // The other side prints JSON.
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

/// A pass that would take half a minute, and whose time is over before.
#[test]
fn line_shows_the_progress_of_a_pass() {
    let scratch = Scratch::new();
    let mut guests = Guests::quiet(&scratch, &["--json"]);
    let mut migrate = guests.migrate(&["--max-bandwidth", "512K", "--timeout", "5"]);
    assert!(migrate.wait().success());
    let stderr = migrate.stderr();
    let line = stderr.lines().find(|line| line.starts_with("umem: pass 1: "));
    let line = line.unwrap_or_else(|| panic!("{stderr}"));
    assert!(line.contains(" of 16.00 MiB left, ") && line.contains(" seconds left"), "{line}");
    let ended = stderr.lines().find(|line| line.contains("pass 1 ends early: "));
    assert!(ended.is_some_and(|line| line.ends_with(" MiB left")), "{stderr}");
    guests.incoming.event("completed");
    Qmp::connect(&scratch.path("destination")).quit();
    guests.incoming.succeeds();
}

#[test]
fn quiet_prints_no_progress() {
    let scratch = Scratch::new();
    let mut guests = Guests::quiet(&scratch, &["--json", "--quiet"]);
    let mut migrate = guests.migrate(&[&SLOWLY[..], &["-q"]].concat());
    assert!(migrate.wait().success());
    assert!(!migrate.stderr().contains("sending"), "{}", migrate.stderr());
    guests.incoming.event("completed");
    Qmp::connect(&scratch.path("destination")).quit();
    guests.incoming.succeeds();
}

/// On a terminal each phase has a bar, and leaves a line with its result.
#[test]
fn terminal_shows_progress_bars() {
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
    // This process's copy of the terminal's other end closes with it.
    drop(command);
    let mut shown = Vec::new();
    // A terminal without users ends with an error.
    let _ = File::from(terminal.master).read_to_end(&mut shown);
    assert!(child.wait().expect("our child").success());
    let shown = String::from_utf8_lossy(&shown);
    for (phase, has) in [("switching", " ms"), ("filling", "/s"), ("filling", " MiB, ")] {
        let line = |line: &str| line.contains(&format!("{phase}  ")) && line.contains(has);
        assert!(shown.lines().any(line), "{phase}: {shown:?}");
    }
    // A move so short has no estimate of its end.
    assert!(shown.contains("] ") && shown.contains("iB/s"), "a bar: {shown:?}");
    assert!(!shown.contains("umem: filling"), "a bar, and no lines: {shown:?}");
}

#[test]
fn trace_has_start_and_end_of_each_phase() {
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
    assert!(!String::from_utf8_lossy(&stderr).contains("phase"), "RUST_LOG selects the lines");
}

/// A place where writes fail.
#[derive(Clone, Copy, Debug)]
enum Sink {
    Closed,
    Full,
    /// A pipe without a reader.
    Unread,
}

const SINKS: [Sink; 3] = [Sink::Closed, Sink::Full, Sink::Unread];

/// `umem ARGUMENTS` with a standard output and error that take no data.
fn start_mute(sink: Sink, arguments: &[&str]) -> Child {
    let umem = env!("CARGO_BIN_EXE_umem");
    let mut command = match sink {
        Sink::Closed => {
            let mut command = Command::new("sh");
            command.args(["-c", "exec \"$0\" \"$@\" >&- 2>&-", umem]);
            command
        }
        Sink::Full | Sink::Unread => Command::new(umem),
    };
    command.args(arguments).env_remove("RUST_LOG").stdin(Stdio::null());
    match sink {
        Sink::Closed => {}
        Sink::Full => {
            let full = || File::options().write(true).open("/dev/full").expect("/dev/full exists");
            command.stdout(full()).stderr(full());
        }
        Sink::Unread => {
            let (_, unread) = std::io::pipe().expect("a pipe");
            command.stdout(unread.try_clone().expect("a descriptor")).stderr(unread);
        }
    }
    command.spawn().expect("the program starts")
}

fn ends_with(mut child: Child, code: i32, what: &str) {
    let status = wait_for(what, || child.try_wait().expect("our child"));
    assert_eq!(status.code(), Some(code), "{what}: {status}");
}

/// Failing output neither ends nor fails a move; but a report requested on stdout fails umem. With a trace, so that
/// every thread prints something.
#[test]
fn guest_moves_when_output_fails() {
    for sink in SINKS {
        for (json, code) in [(&["--json", "-v"][..], 1), (&["-v"], 0), (&[], 0)] {
            let scratch = Scratch::new();
            let guests = Guests::quiet(&scratch, &["--json"]);
            drop(guests.incoming);
            let path = |name: &str| scratch.path(name).display().to_string();
            let (uri, qmp, there) =
                (format!("unix:{}", path("lanes")), path("source"), path("there"));
            let ram = format!("ram0={}", scratch.ram("there").display());
            let umem = env!("CARGO_BIN_EXE_umem");
            let guest = ["guest", "--incoming", "--qmp", &there, "--ram", &ram, "--size", "16"];
            let words = ["incoming", "--qmp", &there, "--ram", &ram];
            let tail = [&uri, "--", umem];
            let none = ["--threads", "0"];
            let words = [&words[..], json, &tail, &guest, &none].concat();
            let incoming = start_mute(sink, &words);
            wait_for("umem to listen", || scratch.path("lanes").exists().then_some(()));
            let words = [&["migrate", "-p", "--qmp", &qmp][..], json, &[&uri]].concat();
            ends_with(start_mute(sink, &words), code, &format!("migrate {json:?} {sink:?}"));
            let mut guest = Qmp::connect(&scratch.path("there"));
            let verdict = guest.execute("umem-verify", json!({}));
            assert_eq!(
                (&verdict["bad_pages"], &verdict["verified_pages"]),
                (&0.into(), &4096.into())
            );
            guest.quit();
            ends_with(incoming, code, &format!("incoming {json:?} {sink:?}"));
        }
    }
}

#[test]
fn demo_and_bench_exit_cleanly_when_output_fails() {
    let mut server = Umem::start(["bench", "server", "--json", "tcp:127.0.0.1:0"]);
    let uri = server.event("listening")["uri"].as_str().expect("an address").to_owned();
    let bench = ["bench", "client", "-n", "1M", &uri];
    let bench_json = ["bench", "client", "-J", "-n", "1M", &uri];
    for sink in SINKS {
        for (words, code) in [
            (&["demo", "--size", "16", "--json"][..], 1),
            (&["demo", "--size", "16"], 0),
            // Their output is their purpose.
            (&bench_json, 1),
            (&bench, 1),
            (&["man", "migrate"], 1),
            (&["completions", "bash"], 1),
            (&["version"], 1),
            (&["--help"], 1),
            (&["nonsense"], 2),
        ] {
            ends_with(start_mute(sink, words), code, &format!("{words:?} {sink:?}"));
        }
    }
}

/// A slow reader, or one that pauses, delays no side and loses no output.
#[test]
fn guest_moves_while_output_is_not_read() {
    let scratch = Scratch::new();
    let mut guests = Guests::quiet(&scratch, &["--json"]);
    let (mut reader, mut writer) = std::io::pipe().expect("a pipe");
    let room = fcntl(writer.as_fd(), FcntlArg::F_SETPIPE_SZ(4096)).expect("a pipe's size");
    let filling = vec![b'\n'; usize::try_from(room).expect("a size")];
    writer.write_all(&filling).expect("the pipe has room");
    let qmp = scratch.path("source").display().to_string();
    let mut migrate = Command::new(env!("CARGO_BIN_EXE_umem"))
        .args(["migrate", "--json", "-p", "--qmp", &qmp, guests.uri()])
        .stdin(Stdio::null())
        .stderr(writer.try_clone().expect("a descriptor"))
        .stdout(writer)
        .spawn()
        .expect("umem starts");
    guests.incoming.event("completed");
    assert_eq!(migrate.try_wait().expect("our child"), None, "the report is not written yet");
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("the output is UTF-8");
    let status = wait_for("its end", || migrate.try_wait().expect("our child"));
    assert!(status.success(), "{status}: {text}");
    assert!(text.contains("\"event\":\"completed\""), "{text}");
    Qmp::connect(&scratch.path("destination")).quit();
    guests.incoming.succeeds();
}

/// The terminal closes while bars are drawn on it.
#[test]
fn guest_moves_after_its_terminal_closed() {
    let terminal = nix::pty::openpty(None, None).expect("a terminal");
    let keep = FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC);
    fcntl(&terminal.master, keep).expect("the terminal is open");
    let mut command = Command::new(env!("CARGO_BIN_EXE_umem"));
    command
        .args(["demo", "--size", "64"])
        .env_remove("RUST_LOG")
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .stdout(terminal.slave.try_clone().expect("a descriptor"))
        .stderr(terminal.slave);
    let child = command.spawn().expect("umem starts");
    drop(command);
    let mut master = File::from(terminal.master);
    assert!(master.read(&mut [0; 64]).expect("something is shown") > 0);
    drop(master);
    ends_with(child, 0, "the demo");
}
