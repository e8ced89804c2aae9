//! A guest that hands anonymous memory over to umem: one that umem starts, and one started by another program, which
//! outlives umem.

mod support;

use std::io::{IoSlice, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::json;
use support::{Qmp, Scratch, Umem, wait_for};

const MIB: &str = "32";
const PAGES: u64 = 32 * 256;

/// The running guest at the source.
fn source_guest(scratch: &Scratch) -> Umem {
    let ram = format!("ram0={}", scratch.ram("source").display());
    let qmp = scratch.path("source.qmp").display().to_string();
    let mut guest = Umem::start(["guest", "--qmp", &qmp, "--ram", &ram, "--size", MIB]);
    guest.event("ready");
    guest
}

/// The arguments of the guest at the destination.
fn waiting_guest(scratch: &Scratch) -> Vec<String> {
    let (handoff, qmp) = (scratch.path("handoff"), scratch.path("destination.qmp"));
    let options = ["guest", "--incoming", "--kind", "anonymous", "--ram", "ram0", "--size", MIB];
    let mut words: Vec<String> = options.map(str::to_owned).to_vec();
    words.extend(["--handoff".into(), handoff.display().to_string()]);
    words.extend(["--qmp".into(), qmp.display().to_string()]);
    words
}

/// `umem incoming` up to its URI; its guest has a monitor.
fn incoming(scratch: &Scratch) -> Vec<String> {
    let (handoff, qmp) = (scratch.path("handoff"), scratch.path("destination.qmp"));
    let mut words = vec!["incoming".to_owned(), "--json".into()];
    words.extend(["--handoff".into(), handoff.display().to_string()]);
    words.extend(["--qmp".into(), qmp.display().to_string(), "tcp:127.0.0.1:0".into()]);
    words
}

fn uri(incoming: &mut Umem) -> String {
    incoming.event("listening")["uri"].as_str().expect("a URI").to_owned()
}

fn migrate(scratch: &Scratch, uri: &str, more: &[&str]) -> Umem {
    let qmp = scratch.path("source.qmp").display().to_string();
    let words = ["migrate", "-p", "--json", "--qmp", &qmp, uri];
    Umem::start([&words, more].concat())
}

/// The guest's verdict.
fn check(qmp: &mut Qmp) {
    let verdict = qmp.execute("umem-verify", json!({}));
    assert_eq!(verdict["verified_pages"], PAGES, "{verdict}");
    assert_eq!((&verdict["bad_pages"], &verdict["registered"]), (&json!(0), &json!(false)));
}

#[test]
fn guest_not_started_by_umem_outlives_umem() {
    let scratch = Scratch::new();
    let mut source = source_guest(&scratch);
    let mut incoming = Umem::start(incoming(&scratch));
    let uri = uri(&mut incoming);
    let in_shards = ["--shards".to_owned(), "3".to_owned()];
    let mut guest = Umem::start([&waiting_guest(&scratch)[..], &in_shards].concat());
    guest.event("ready");
    let mut migrate = migrate(&scratch, &uri, &[]);
    migrate.event("completed");
    assert_eq!(incoming.event("completed")["kind"], "anonymous");
    migrate.succeeds();
    let mut qmp = Qmp::connect(&scratch.path("destination.qmp"));
    assert_eq!(qmp.status(), "running");
    check(&mut qmp);
    qmp.quit();
    guest.succeeds();
    incoming.succeeds();
    Qmp::connect(&scratch.path("source.qmp")).quit();
    assert!(source.wait().success());
}

/// umem has given up before a guest connected: no process will bring its pages.
#[test]
fn waiting_guest_ends_when_its_umem_exits() {
    let scratch = Scratch::new();
    let mut umem = Umem::start(incoming(&scratch));
    uri(&mut umem);
    let mut guest = Umem::start(waiting_guest(&scratch));
    guest.event("ready");
    umem.signal(Signal::SIGINT);
    assert!(umem.fails().contains("interrupted"));
    assert!(!guest.wait().success());

    // A guest that umem has started, and a killed umem.
    let mut words = incoming(&scratch);
    words.extend(["--".into(), env!("CARGO_BIN_EXE_umem").into()]);
    words.extend(waiting_guest(&scratch));
    let mut umem = Umem::start(words);
    uri(&mut umem);
    umem.kill();
    scratch.wait_until_gone("guest --incoming");
}

/// The guest may have run here, so it stays; its missing pages block and do not read as zeroes.
#[test]
fn guest_waits_when_its_umem_dies_after_the_switchover() {
    let scratch = Scratch::new();
    let _source = source_guest(&scratch);
    let mut incoming = Umem::start(incoming(&scratch));
    let uri = uri(&mut incoming);
    let mut guest = Umem::start(waiting_guest(&scratch));
    let mut migrate = migrate(&scratch, &uri, &["-n"]);
    migrate.event("running");
    incoming.event("running");
    incoming.kill();
    migrate.event("recovering");
    migrate.signal(Signal::SIGINT);
    wait_for("the warning about a second interrupt", || {
        migrate.stderr().contains("interrupt again").then_some(())
    });
    migrate.signal(Signal::SIGINT);
    assert_eq!(migrate.wait().code(), Some(1));
    assert!(migrate.stderr().contains("do not start the guest here again"));
    // Both of its vCPUs touch a missing page.
    wait_for("every vCPU to wait", || (waiting_threads(guest.pid()) == 2).then_some(()));
    assert!(guest.is_running());
    assert_eq!(guest.stderr(), "");
}

/// Threads that wait in a page fault of a userfaultfd.
fn waiting_threads(pid: u32) -> usize {
    let tasks = std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task"));
    let waits = |task: &std::fs::DirEntry| {
        let place = std::fs::read_to_string(task.path().join("wchan"));
        place.is_ok_and(|place| place.contains("userfault"))
    };
    tasks.map_or(0, |tasks| tasks.flatten().filter(waits).count())
}

#[test]
fn guest_death_before_the_handover_leaves_the_source_running() {
    let scratch = Scratch::new();
    let _source = source_guest(&scratch);
    let mut incoming = Umem::start(incoming(&scratch));
    let uri = uri(&mut incoming);
    let mut guest = Umem::start(waiting_guest(&scratch));
    guest.event("ready");
    guest.kill();
    let error = incoming.fails();
    assert!(error.contains("guest"), "{error}");
    assert!(migrate(&scratch, &uri, &[]).fails().contains("umem incoming"));
    assert_eq!(Qmp::connect(&scratch.path("source.qmp")).status(), "running");
}

/// A client that sends nothing, half a message, an endless message, or descriptors without a message does not block the
/// hand-over socket for the guest's process, and does not end umem.
#[test]
fn foreign_clients_do_not_block_the_handover_socket() {
    let scratch = Scratch::new();
    let mut source = source_guest(&scratch);
    let mut incoming = Umem::start(incoming(&scratch));
    let uri = uri(&mut incoming);
    let socket = scratch.path("handoff");
    let silent: Vec<_> = (0..20).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let mut half = UnixStream::connect(&socket).unwrap();
    half.write_all(b"[{\"size\":4096,").unwrap();
    let mut endless = UnixStream::connect(&socket).unwrap();
    // Until umem stops reading it, as with the next two.
    while endless.write_all(&[b' '; 4096]).is_ok() {}
    let file = std::fs::File::open("/dev/null").unwrap();
    let blank = [IoSlice::new(b" ")];
    let flags = MsgFlags::MSG_NOSIGNAL;
    // As many descriptors as a guest's process sends, and as many as possible.
    for count in [16, 253] {
        let giver = UnixStream::connect(&socket).unwrap();
        let fds = vec![file.as_raw_fd(); count];
        let rights = [ControlMessage::ScmRights(&fds)];
        for _ in 0..1000 {
            if sendmsg::<()>(giver.as_raw_fd(), &blank, &rights, flags, None).is_err() {
                break;
            }
        }
    }
    let mut talker = UnixStream::connect(&socket).unwrap();
    while talker.write_all(b"{\"preload\":1}\n").is_ok() {}
    let mut guest = Umem::start(waiting_guest(&scratch));
    guest.event("ready");
    let mut migrate = migrate(&scratch, &uri, &[]);
    migrate.event("completed");
    incoming.event("completed");
    migrate.succeeds();
    assert!(incoming.stderr().contains("ignored a connection to the hand-over socket"));
    drop((silent, half));
    let mut qmp = Qmp::connect(&scratch.path("destination.qmp"));
    check(&mut qmp);
    qmp.quit();
    guest.succeeds();
    incoming.succeeds();
    Qmp::connect(&scratch.path("source.qmp")).quit();
    assert!(source.wait().success());
}
