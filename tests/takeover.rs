//! The leftovers of killed umems: sources without the completion, guests that do not answer, unneeded files. And the
//! same with secured lanes.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a test may say what it does")]

#[path = "takeover/claims.rs"]
mod claims;
mod support;

use std::net::TcpListener;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use support::killed::{How, Move, Side, text};
use support::{Authority, Ends, Qmp, Scratch, Umem, limit_descriptors, wait_for, write_private};
use umem_wire::{HEADER_BYTES, HELLO_BYTES};

const SMALL: How = How {
    mib: 16,
    threads: 1,
    kind: None,
    incoming: &[],
    arriving: &[],
    migrate: &[],
    security: None,
    panics: ["", ""],
};

/// No process ever listens there: the kernel does not assign port 1.
const NOBODY: &str = "tcp:127.0.0.1:1";

impl Move {
    /// The process whose memory arrives.
    fn arriving(&self) -> Pid {
        let guests = self.scratch.processes("--incoming");
        let guests: Vec<_> = guests.iter().filter(|(pid, _)| *pid != self.incoming.pid()).collect();
        let [(pid, _)] = guests[..] else { panic!("{guests:?}") };
        Pid::from_raw(i32::try_from(*pid).unwrap())
    }

    /// Up to a complete destination, and a source that died before it received the completion.
    fn completed_unknown_to_the_source() -> Move {
        let mut moving = Move::switched(How { mib: 8, threads: 0, ..SMALL });
        moving.cutter.limit_answers(Some(0));
        moving.cutter.let_pages_go();
        // As long as the frames of the guest's start and one completion together, and longer than one request and the
        // completion.
        let running = HELLO_BYTES + (HEADER_BYTES + 1) + 2 * HEADER_BYTES;
        moving.cutter.wait_for_answers((running + HEADER_BYTES + 40) as u64);
        moving.migrate.kill();
        moving.cutter.cut(Ends::Both, false);
        moving.cutter.limit_answers(None);
        moving.incoming.event("recovering");
        // The test does not wait for the full time.
        moving.incoming.signal(Signal::SIGINT);
        let report = moving.incoming.event("completed");
        moving.check(&report);
        let files = moving.session_files();
        for side in ["source", "destination"] {
            assert!(files.contains(&format!("{}.{side}", moving.session)), "{files:?}");
        }
        moving
    }

    /// Both sides are gone, and nothing of the session is left.
    fn ends(self) {
        let Move { scratch, guest, incoming, migrate, .. } = self;
        Qmp::connect(&scratch.path("source.qmp")).quit();
        guest.succeeds();
        migrate.succeeds();
        Qmp::connect(&scratch.path("destination.qmp")).quit();
        incoming.succeeds();
        let left: Vec<_> = std::fs::read_dir(scratch.path("sessions")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        scratch.wait_until_gone("destination.qmp");
    }
}

fn says(umem: &Umem, text: &str) {
    wait_for(format!("{text:?} on stderr"), || umem.stderr().contains(text).then_some(()));
}

/// Whether a process has one of its own userfaultfds open.
fn has_userfaultfd(pid: Pid) -> bool {
    let numbers = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let mut links = numbers.filter_map(|number| std::fs::read_link(number.path()).ok());
    links.any(|link| link.to_string_lossy().contains("[userfaultfd]"))
}

/// Every page is here, but the guest's process is stopped: the source does not wait for it, and umem prints what it
/// waits for.
#[test]
fn stopped_guest_is_reported_while_umem_waits_for_it() {
    for kind in [None, Some("anonymous")] {
        let mut moving = Move::switched(How { kind, ..SMALL });
        let guest = moving.arriving();
        kill(guest, Signal::SIGSTOP).unwrap();
        moving.cutter.let_pages_go();
        moving.migrate.event("completed");
        let waiting = moving.incoming.event("releasing");
        assert_eq!(waiting["guest_pid"], guest.as_raw(), "{waiting}");
        assert_eq!(waiting["stopped"], true, "{waiting}");
        assert!(has_userfaultfd(guest));
        kill(guest, Signal::SIGCONT).unwrap();
        let report = moving.incoming.event("completed");
        moving.check(&report);
        assert!(!has_userfaultfd(guest));
        moving.ends();
    }
}

/// The wait can be interrupted.
#[test]
fn wait_for_a_stopped_guest_can_be_interrupted() {
    let mut moving = Move::switched(SMALL);
    let guest = moving.arriving();
    kill(guest, Signal::SIGSTOP).unwrap();
    moving.cutter.let_pages_go();
    moving.migrate.event("completed");
    moving.incoming.event("releasing");
    moving.incoming.signal(Signal::SIGINT);
    let report = moving.incoming.event("completed");
    assert!(moving.incoming.wait().success(), "{}", moving.incoming.stderr());
    assert!(has_userfaultfd(guest));
    kill(guest, Signal::SIGCONT).unwrap();
    moving.check(&report);
    wait_for("the guest to close its userfaultfd", || (!has_userfaultfd(guest)).then_some(()));
    moving.ends();
}

/// Its destination stays with its guest anyway.
#[test]
fn late_source_learns_the_completion() {
    let mut moving = Move::completed_unknown_to_the_source();
    moving.migrate = moving.resume("migrate");
    moving.migrate.event("completed");
    says(&moving.incoming, "the source connected and has the completion");
    moving.ends();
}

/// Its destination has gone, too, and has left its session file.
#[test]
fn later_source_learns_the_completion_from_a_resumed_destination() {
    let mut moving = Move::completed_unknown_to_the_source();
    moving.incoming.signal(Signal::SIGTERM);
    assert!(moving.incoming.wait().success(), "{}", moving.incoming.stderr());
    moving.incoming = moving.resume("incoming");
    moving.incoming.event("listening");
    moving.migrate = moving.resume("migrate");
    moving.migrate.event("completed");
    assert_eq!(moving.incoming.event("undone")["source_knows"], true);
    moving.ends();
}

/// No process listens at the destination's address: umem prints what it knows, and what can be done.
#[test]
fn source_of_a_lost_destination_can_be_abandoned() {
    let mut moving = Move::switched(SMALL);
    moving.kill_only(Side::Both);
    moving.migrate = moving.resume_with("migrate", &[NOBODY]);
    let unanswered = moving.migrate.event("unanswered");
    assert_eq!(unanswered["session"], *moving.session, "{unanswered}");
    assert_eq!(unanswered["running"], true, "{unanswered}");
    moving.migrate.kill();
    // The URI is the last one named.
    let mut abandoning = moving.resume_with("migrate", &["--abandon"]);
    let ram = moving.scratch.ram("source");
    assert_eq!(abandoning.event("abandoned")["ram"], json!([ram]));
    abandoning.succeeds();
    assert!(ram.exists(), "memory is never removed");
    assert_eq!(moving.status(), "paused", "the guest never runs here again");
    let of_source = |name: &&String| name.contains(".source");
    assert_eq!(moving.session_files().iter().filter(of_source).count(), 0);
    let error = moving.resume("migrate").fails_as_misused();
    assert!(error.contains("no session"), "{error}");
}

/// The destination may be a process that is stopped, whose connections the kernel takes: that nobody answers is not known.
#[test]
fn session_is_not_abandoned_where_a_program_takes_connections() {
    let mut moving = Move::switched(SMALL);
    moving.kill_only(Side::Both);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let closing = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let error = moving.resume_with("migrate", &[&uri, "--abandon"]).fails();
    closing.join().unwrap();
    assert!(error.contains("the session is not abandoned: a program at"), "{error}");
    let of_source = |name: &&String| name.contains(".source");
    assert_ne!(moving.session_files().iter().filter(of_source).count(), 0);
    let mut abandoning = moving.resume_with("migrate", &[NOBODY, "--abandon"]);
    abandoning.event("abandoned");
    abandoning.succeeds();
    assert_eq!(moving.session_files().iter().filter(of_source).count(), 0);
}

/// A guest that needs the source's pages does not lose them by mistake.
#[test]
fn session_in_use_is_not_abandoned() {
    let mut moving = Move::switched(SMALL);
    moving.kill_only(Side::Source);
    let error = moving.resume_with("migrate", &["--abandon"]).fails();
    assert!(error.contains("the session is not abandoned: the destination at"), "{error}");
    // Nor while another process listens there.
    let port = moving.cutter.uri().to_owned();
    assert!(error.contains(&port), "{error}");
    moving.migrate = moving.resume("migrate");
    moving.complete();
}

/// Killed before the session was resumable: the next umem removes its leftovers.
#[test]
fn early_leftovers_of_a_killed_destination_are_removed() {
    let mut moving = Move::start(SMALL);
    // The destination's answer to the source's regions is held back, so that the move stands still.
    moving.cutter.limit_answers(Some(HELLO_BYTES as u64));
    let own = |moving: &Move| -> Vec<String> {
        let files = moving.session_files().into_iter();
        files.filter(|name| !name.contains(".source")).collect()
    };
    let files = wait_for("the files of the guest for a takeover", || {
        let files = own(&moving);
        files.iter().any(|name| name.ends_with(".guest")).then_some(files)
    });
    moving.incoming.kill();
    moving.scratch.wait_until_gone("destination.qmp");
    moving.migrate.kill();
    assert_eq!(own(&moving), files, "the files are still there");
    moving.session = "0123".into();
    let error = moving.resume("migrate").fails_as_misused();
    assert!(error.contains("no session 0123"), "{error}");
    assert_eq!(moving.session_files(), Vec::<String>::new(), "were {files:?}");
    assert_eq!(moving.status(), "running");
}

impl Move {
    /// Kills, and starts no process.
    fn kill_only(&mut self, side: Side) {
        if side != Side::Source {
            self.incoming.kill();
        }
        if side != Side::Destination {
            self.migrate.kill();
        }
    }

    /// The same certificates or the same secret are required as at first, of either side.
    fn goes_to_its_own_alone(mut self, wrong: &[&str; 2], reasons: [&str; 2]) {
        self.kill_often(1, 1 << 20, &[Side::Source]);
        self.kill_often(1, 1 << 20, &[Side::Destination]);
        for (side, why) in [Side::Source, Side::Destination].into_iter().zip(reasons) {
            self.kill_only(side);
            let command = if side == Side::Source { "migrate" } else { "incoming" };
            let mut stranger = self.resume_with(command, wrong);
            // The source gets the error in either case.
            let source = if side == Side::Source { &mut stranger } else { &mut self.migrate };
            let refused = loop {
                let reason = text(&source.event("retrying"), "reason");
                if reason.contains(why) {
                    break reason;
                }
            };
            println!("{refused}");
            stranger.kill();
            match side {
                Side::Source => self.migrate = self.resume("migrate"),
                _ => self.incoming = self.resume("incoming"),
            }
        }
        self.complete();
    }
}

/// Its thread that waits for another umem gets no descriptor for the connection, and retries.
#[test]
fn guest_out_of_descriptors_is_taken_over_when_one_is_free() {
    let mut moving = Move::switched(SMALL);
    let guest = u32::try_from(moving.arriving().as_raw()).unwrap();
    let before = limit_descriptors(guest, 3);
    // The thread has a number for the next connection already: accept(2) takes one before it waits.
    moving.incoming.kill();
    moving.incoming = moving.resume("incoming");
    moving.incoming.event("listening");
    moving.incoming.kill();
    moving.incoming = moving.resume("incoming");
    // It has connected: the guest's process accepts it next.
    wait_for("a connection", || {
        let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
        let waits = |line: &&str| line.contains(&moving.session) && line.contains(" 0001 02 ");
        sockets.lines().any(|line| waits(&line)).then_some(())
    });
    limit_descriptors(guest, before);
    moving.incoming.event("listening");
    moving.complete();
}

#[test]
fn takeover_of_tls_lanes_needs_the_same_certificates() {
    let scratch = Scratch::new();
    let credentials = |authority: &Authority, name: &str| -> &'static str {
        let directory = authority.credentials(&scratch, name, "127.0.0.1");
        directory.display().to_string().leak()
    };
    let (ours, others) = (Authority::new("ours"), Authority::new("others"));
    let own = credentials(&ours, "own");
    let moving = Move::switched(How { mib: 32, security: Some(["--tls-creds", own]), ..SMALL });
    let wrong = ["--tls-creds", credentials(&others, "others")];
    moving.goes_to_its_own_alone(&wrong, ["certificate", "certificate"]);
    // The same authority has signed this one, and its owner did not begin the migration.
    let mut moving = Move::switched(How { security: Some(["--tls-creds", own]), ..SMALL });
    moving.kill_only(Side::Source);
    let mut stranger = moving.resume_with("migrate", &["--tls-creds", credentials(&ours, "same")]);
    let reason = text(&stranger.event("retrying"), "reason");
    assert!(reason.contains("began with another certificate"), "{reason}");
    stranger.kill();
    moving.migrate = moving.resume("migrate");
    moving.complete();
}

#[test]
fn takeover_of_secret_lanes_needs_the_same_secret() {
    let scratch = Scratch::new();
    let secret = |name: &str, secret: &str| -> &'static str {
        write_private(&scratch.path(name), secret);
        scratch.path(name).display().to_string().leak()
    };
    let own = secret("own", "a secret of ours, and long enough");
    let other = secret("other", "another secret, and long enough");
    let moving = Move::switched(How { mib: 32, security: Some(["--secret-file", own]), ..SMALL });
    let reasons = ["it does not know the secret", "the secret"];
    moving.goes_to_its_own_alone(&["--secret-file", other], reasons);
}

/// Bytes of the destination's answers up to its guest running, and of a completion.
const RUNNING_BYTES: u64 = (HELLO_BYTES + (HEADER_BYTES + 1) + 2 * HEADER_BYTES) as u64;
const COMPLETE_BYTES: u64 = (HEADER_BYTES + 40) as u64;

impl Move {
    /// Up to a moment around the goodbye, which depends on the number: before the source has received the completion,
    /// after that, or after its goodbye, and a little later each time.
    fn around_goodbye(number: u32) -> Move {
        let mut moving = Move::start(How { mib: 8, threads: 0, ..SMALL });
        moving.session = text(&moving.migrate.event("resumable"), "session");
        moving.migrate.event("running");
        moving.incoming.event("running");
        let complete = RUNNING_BYTES + COMPLETE_BYTES;
        match number % 3 {
            0 => {
                moving.cutter.limit_answers(Some(0));
                moving.cutter.let_pages_go();
                moving.cutter.wait_for_answers(complete);
            }
            1 => {
                moving.cutter.let_pages_go();
                moving.cutter.wait_for_answers(complete);
            }
            _ => {
                let said = moving.cutter.demand();
                moving.cutter.let_pages_go();
                moving.cutter.wait_for_demand(said + COMPLETE_BYTES);
            }
        }
        for _ in 0..number * number {
            std::thread::yield_now();
        }
        moving
    }

    /// Both sides end by themselves, whichever is resumed; nothing is left, and the guest is complete.
    fn has_parted(mut self, killed: Side) {
        self.cutter.cut(Ends::Both, false);
        self.cutter.limit_answers(None);
        let command = if killed == Side::Source { "migrate" } else { "incoming" };
        let mut resumed = self.resume(command);
        // If it was killed too late there is no session any more.
        let status = resumed.wait().code();
        let stderr = resumed.stderr();
        let is_over = status == Some(2) && stderr.contains("no session");
        assert!(status == Some(0) || is_over, "{status:?}: {stderr}");
        if killed == Side::Destination {
            assert_eq!(self.migrate.wait().code(), Some(0), "{}", self.migrate.stderr());
        } else {
            self.incoming.event("completed");
        }
        let verdict =
            Qmp::connect(&self.scratch.path("destination.qmp")).execute("umem-verify", json!({}));
        assert_eq!(verdict["bad_pages"], 0, "{verdict}");
        assert_eq!(verdict["registered"], false, "{verdict}");
        Qmp::connect(&self.scratch.path("destination.qmp")).quit();
        if killed == Side::Source {
            assert_eq!(self.incoming.wait().code(), Some(0), "{}", self.incoming.stderr());
        }
        assert_eq!(self.session_files(), Vec::<String>::new(), "{stderr}");
        Qmp::connect(&self.scratch.path("source.qmp")).quit();
        self.guest.succeeds();
    }
}

#[test]
fn source_killed_around_its_goodbye_is_resumed_to_its_end() {
    for number in 0..30 {
        let mut moving = Move::around_goodbye(number);
        moving.migrate.kill();
        moving.has_parted(Side::Source);
    }
}

#[test]
fn destination_killed_around_the_goodbye_is_resumed_to_its_end() {
    for number in 0..30 {
        let mut moving = Move::around_goodbye(number);
        moving.incoming.kill();
        moving.has_parted(Side::Destination);
    }
}

/// Whenever the guest's process dies, both sides report the same: complete or lost.
#[test]
fn guest_killed_before_its_last_page_fails_both_sides() {
    let mut lost = 0;
    for number in 0..16 {
        let kind = if number % 2 == 0 { Some("anonymous") } else { None };
        let mut moving = Move::switched(How { mib: 8, threads: 0, kind, ..SMALL });
        let guest = moving.arriving();
        moving.cutter.let_pages_go();
        let until = moving.cutter.passed() + number * (1 << 19);
        wait_for("pages", || {
            let has_ended = !moving.migrate.is_running();
            (has_ended || moving.cutter.passed() >= until).then_some(())
        });
        kill(guest, Signal::SIGKILL).unwrap();
        let here = moving.incoming.wait().code();
        let there = moving.migrate.wait().code();
        assert_eq!(here, Some(1), "the status reports that the guest was killed");
        let (here, error) = (moving.incoming.stderr(), moving.migrate.stderr());
        let is_lost = here.contains("the guest's process ended");
        assert_eq!(there, Some(i32::from(is_lost)), "{here}{error}");
        assert_eq!(error.contains("the guest's process ended"), is_lost, "{here}{error}");
        assert_eq!(moving.session_files(), Vec::<String>::new(), "{here}{error}");
        lost += u32::from(is_lost);
    }
    assert!(lost > 0);
}
