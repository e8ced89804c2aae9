//! A snapshot moves into the anonymous memory of a process that umem has not started and that does not know umem:
//! `tests/snapshot-client` hands its memory over as Firecracker does, and checks every byte of it.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::Value;
use support::{Fifo, HugePages, Scratch, Umem};

const PAGE: u64 = 4096;

/// Both umem processes and the client, which reads its first pages.
struct Restore {
    scratch: Scratch,
    incoming: Umem,
    migrate: Umem,
    client: Umem,
    pause: Fifo,
    until: Fifo,
}

impl Restore {
    /// Starts everything. `options` are the client's; with `-p -n` in `mode` there is no background.
    fn start(mib: u64, mode: &[&str], options: &[&str]) -> Restore {
        let scratch = Scratch::new();
        let snapshot = scratch.ram("snapshot");
        write_snapshot(&snapshot, mib);
        let (mut incoming, uri) = incoming(&scratch);
        let (pause, until) = (Fifo::new(scratch.path("pause")), Fifo::new(scratch.path("until")));
        let fifos = ["--pause", pause.path(), "--until", until.path()];
        let options = [options, &fifos].concat();
        let mut client = client(&scratch, &snapshot, mib, &options);
        client.event("handed_over");
        let migrate = migrate(&snapshot, &uri, mode);
        incoming.event("connected");
        Restore { scratch, incoming, migrate, client, pause, until }
    }

    /// The client's verdict, after both umem processes have reported completion.
    fn end(mut self) -> Restored {
        // Before it gets there, so that it continues while pages arrive.
        self.pause.release();
        self.client.event("seen");
        self.completed()
    }

    fn completed(mut self) -> Restored {
        let source = self.migrate.event("completed");
        let destination = self.incoming.event("completed");
        self.until.release();
        let client = self.client.event("checked");
        self.client.succeeds();
        self.migrate.succeeds();
        self.incoming.succeeds();
        assert!(!self.scratch.path("handoff").exists(), "the hand-over socket is gone");
        Restored { source, destination, client }
    }

    /// Lets the client read half of its memory, without background; the rest is missing then.
    fn halfway(mib: u64, options: &[&str]) -> Restore {
        let mut restore = Restore::start(mib, &["-n"], options);
        restore.client.event("middle");
        restore
    }
}

/// The results of all processes.
struct Restored {
    source: Value,
    destination: Value,
    client: Value,
}

impl Restored {
    fn check(&self, mib: u64, page_bytes: u64) {
        assert_eq!(number(&self.client, "wrong_pages"), 0);
        assert_eq!(number(&self.client, "pages"), (mib << 20) / page_bytes);
        assert_eq!(self.destination["kind"], "anonymous");
        for report in [&self.source, &self.destination] {
            assert_eq!(number(report, "total_bytes"), mib << 20);
            let bytes = ["data_bytes", "zero_bytes", "hole_bytes"].map(|f| number(report, f));
            assert_eq!(bytes.iter().sum::<u64>(), mib << 20, "every page arrived once: {report}");
        }
        assert!(number(&self.destination, "pages_demand") > 0);
    }
}

/// `umem incoming` that waits for a process, and its address.
fn incoming(scratch: &Scratch) -> (Umem, String) {
    let handoff = handoff(scratch).display().to_string();
    let mut incoming =
        Umem::start(["incoming", "--json", "--handoff", &handoff, "tcp:127.0.0.1:0"]);
    let listening = incoming.event("listening");
    assert_eq!(listening["handoff"], handoff.as_str());
    (incoming, listening["uri"].as_str().expect("a URI").to_owned())
}

fn client(scratch: &Scratch, snapshot: &Path, mib: u64, options: &[&str]) -> Umem {
    let (handoff, mib) = (handoff(scratch), mib.to_string());
    let mut arguments = vec!["--handoff".into(), handoff, "--mib".into(), mib.into()];
    arguments.extend(["--expect".into(), snapshot.to_owned()]);
    arguments.extend(options.iter().map(PathBuf::from));
    Umem::start_program(&support::program("umem-test-snapshot-client"), arguments)
}

fn handoff(scratch: &Scratch) -> PathBuf {
    scratch.path("handoff")
}

fn migrate(snapshot: &Path, uri: &str, mode: &[&str]) -> Umem {
    let ram = format!("mem={}", snapshot.display());
    let mut arguments = vec!["migrate", "-p", "--json", "--ram", &ram, uri];
    arguments.extend(mode);
    Umem::start(arguments)
}

/// Of 16 pages four are holes, one is written zeroes, and the others differ from all pages of the file; and 2 MiB of
/// every 16 are a hole.
fn write_snapshot(path: &Path, mib: u64) {
    let file = File::create(path).expect("a file in shared memory");
    file.set_len(mib << 20).expect("the file system has room");
    let mut page = Vec::with_capacity(PAGE as usize);
    for number in 0..mib * 256 {
        let (block, in_group) = (number / 512, number % 16);
        if block % 8 == 5 || in_group / 4 == 2 {
            continue;
        }
        page.clear();
        if in_group == 1 {
            page.resize(PAGE as usize, 0);
        } else {
            page.extend((0..512).flat_map(|word| (number << 9 | word | 1 << 63).to_le_bytes()));
        }
        file.write_all_at(&page, number * PAGE).expect("the file system has room");
    }
}

fn number(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap_or_else(|| panic!("{field} in {report}"))
}

#[test]
fn large_snapshot_arrives_whole() {
    let restore = Restore::start(512, &["--lanes", "2"], &["--regions", "2"]);
    restore.end().check(512, PAGE);
}

#[test]
fn pages_discarded_by_the_client_read_as_zeroes() {
    for (mode, options) in [
        (&[][..], &["--balloon"][..]),
        (&["--lanes", "3"], &["--balloon", "--regions", "2"]),
        // Early: most of it is still missing.
        (&[], &["--balloon", "--regions", "2", "--first", "256"]),
        (&["--lanes", "2"], &["--balloon", "--first", "1024"]),
    ] {
        let restored = Restore::start(128, mode, options).end();
        restored.check(128, PAGE);
        for field in ["discarded_seen", "discarded_unseen"] {
            assert!(number(&restored.client, field) > 0, "{}", restored.client);
        }
    }
}

/// No discarded page is in flight then: only the client's demands arrive.
#[test]
fn snapshot_arrives_without_background() {
    let mut restore = Restore::halfway(32, &["--balloon", "--regions", "2"]);
    restore.pause.release();
    restore.client.event("seen");
    restore.migrate.signal(Signal::SIGINT);
    let restored = restore.completed();
    restored.check(32, PAGE);
    let asked = number(&restored.client, "pages") - number(&restored.client, "discarded_unseen");
    assert!(number(&restored.destination, "pages_demand") >= asked);
}

#[test]
fn snapshot_of_huge_pages_arrives_whole() {
    let _pool = HugePages::reserve(64);
    for (mode, options) in [
        (&[][..], &["--huge"][..]),
        (&["--lanes", "2"], &["--huge", "--balloon", "--regions", "2"]),
    ] {
        let restored = Restore::start(128, mode, options).end();
        restored.check(128, 2 << 20);
    }
}

#[test]
fn killed_client_ends_both_sides() {
    let mut restore = Restore::halfway(32, &[]);
    restore.client.kill();
    let error = restore.incoming.fails();
    assert!(error.contains("ended before all of its memory had arrived"), "{error}");
    let error = restore.migrate.fails();
    assert!(error.contains("destination"), "{error}");
    assert!(!restore.scratch.path("handoff").exists());
}

/// Its missing pages will never arrive after its umem is ordered to give up. The client must not continue then, and
/// read zeroes.
#[test]
fn client_waits_after_its_source_is_killed_and_ends_with_its_umem() {
    let mut restore = Restore::halfway(32, &[]);
    restore.migrate.kill();
    restore.incoming.event("recovering");
    assert!(restore.client.is_running());
    restore.incoming.signal(Signal::SIGINT);
    let incoming = &restore.incoming;
    support::wait_for("the warning about a second interrupt", || {
        incoming.stderr().contains("interrupt again").then_some(())
    });
    restore.incoming.signal(Signal::SIGINT);
    assert_eq!(restore.incoming.wait().code(), Some(1));
    let stderr = restore.incoming.stderr();
    assert!(stderr.contains("the source is not connected, and the guest here waits"), "{stderr}");
    assert_eq!(restore.client.wait().signal(), Some(Signal::SIGKILL as i32));
    assert!(!restore.scratch.path("handoff").exists());
}

/// The client waits, because its own userfaultfd is open; its parent ends it.
#[test]
fn client_of_a_killed_umem_reads_no_wrong_page() {
    let mut restore = Restore::halfway(32, &[]);
    restore.incoming.kill();
    restore.migrate.event("recovering");
    restore.pause.release();
    let client = &mut restore.client;
    support::wait_for("both threads to wait for pages", || {
        let tasks =
            std::fs::read_dir(format!("/proc/{}/task", client.pid())).expect("the process exists");
        let is_waiting = |task: &std::fs::DirEntry| {
            let place = std::fs::read_to_string(task.path().join("wchan")).unwrap_or_default();
            place.contains("userfault")
        };
        (tasks.flatten().filter(is_waiting).count() == 2).then_some(())
    });
    assert!(client.is_running());
    assert_eq!(client.stderr(), "");
}

#[test]
fn client_of_another_size_is_refused_and_ended() {
    let scratch = Scratch::new();
    let snapshot = scratch.ram("snapshot");
    write_snapshot(&snapshot, 16);
    let (incoming, uri) = incoming(&scratch);
    let mut client = client(&scratch, &snapshot, 8, &[]);
    client.event("handed_over");
    let error = migrate(&snapshot, &uri, &[]).fails();
    assert!(error.contains("16 MiB at the source, 8 MiB at the destination"), "{error}");
    assert!(incoming.fails().contains("16 MiB at the source, 8 MiB at the destination"));
    assert_eq!(client.wait().signal(), Some(Signal::SIGKILL as i32));
}

#[test]
fn interrupted_migration_leaves_no_socket() {
    let scratch = Scratch::new();
    let (mut incoming, _) = incoming(&scratch);
    assert!(scratch.path("handoff").exists());
    incoming.signal(Signal::SIGINT);
    assert!(incoming.fails().contains("interrupted"));
    assert!(!scratch.path("handoff").exists());
}

/// A client that connects and leaves, or sends something else, is neither waited for nor killed.
#[test]
fn foreign_clients_of_the_handover_socket_are_not_killed() {
    let scratch = Scratch::new();
    let (incoming, _) = incoming(&scratch);
    // This process is the foreign client.
    drop(UnixStream::connect(handoff(&scratch)).expect("umem listens"));
    let mut talkative = UnixStream::connect(handoff(&scratch)).expect("umem still listens");
    talkative.write_all(b"[{\"size\":1}]").expect("umem reads");
    assert_eq!(talkative.read(&mut [0]).expect("umem closes the connection"), 0);
    assert!(incoming.fails().contains("is not understood"));
}

/// The process that umem starts may be a wrapper of the memory's owner.
#[test]
fn client_behind_a_wrapper_is_ended() {
    let scratch = Scratch::new();
    let snapshot = scratch.ram("snapshot");
    write_snapshot(&snapshot, 8);
    let handoff = handoff(&scratch).display().to_string();
    let client = support::program("umem-test-snapshot-client").display().to_string();
    let snapshot = snapshot.display();
    let pid = scratch.path("pid");
    let script = format!(
        "{client} --handoff {handoff} --mib 8 --expect {snapshot} & echo $! > {}; wait",
        pid.display()
    );
    let words = ["incoming", "--json", "--handoff", &handoff, "tcp:127.0.0.1:0", "--", "sh", "-c"];
    let mut incoming = Umem::start([&words[..], &[&script]].concat());
    incoming.event("listening");
    incoming.signal(Signal::SIGINT);
    incoming.fails();
    let pid = std::fs::read_to_string(pid).expect("the wrapper wrote its pid");
    support::wait_for("the client to be gone", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        // A zombie waits for its inheriting parent.
        stat.map_or(Some(()), |stat| stat.contains(") Z ").then_some(()))
    });
}

/// At any point of the completion.
#[test]
fn client_may_exit_right_after_its_last_page() {
    for _ in 0..20 {
        let scratch = Scratch::new();
        let snapshot = scratch.ram("snapshot");
        write_snapshot(&snapshot, 1);
        let (incoming, uri) = incoming(&scratch);
        let client = client(&scratch, &snapshot, 1, &["--regions", "2"]);
        migrate(&snapshot, &uri, &["-n"]).succeeds();
        client.succeeds();
        incoming.succeeds();
    }
}
