//! Moves the memory of a KVM guest (`tests/kvm-guest`), which checks and writes every word of it. All of its faults
//! come from the kernel.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::{Fifo, Scratch, Umem};

/// A guest and its expected memory.
#[derive(Clone, Copy)]
struct Guest {
    mib: u64,
    seed: &'static str,
    options: &'static [&'static str],
    memory: Memory,
}

/// The kind of the guest's memory at the destination.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Memory {
    SharedFile,
    Anonymous,
}

impl Memory {
    /// The arguments of umem and of the guest's program.
    fn options<'a>(
        self,
        ram: &'a str,
        file: &'a str,
        handoff: &'a str,
    ) -> ([&'a str; 2], [&'a str; 2]) {
        match self {
            Memory::SharedFile => (["--ram", ram], ["--ram", file]),
            Memory::Anonymous => (["--handoff", handoff], ["--handoff", handoff]),
        }
    }
}

const GUEST: Guest = Guest { mib: 64, seed: "1", options: &[], memory: Memory::SharedFile };

impl Guest {
    fn pages(self) -> u64 {
        self.mib * 256
    }
}

/// The results of all processes.
struct Moved {
    source: Value,
    destination: Value,
    guest: Value,
    /// The exit status of `umem incoming`.
    status: Option<i32>,
}

impl Moved {
    /// The properties of any guest that finds its expected memory.
    fn check(&self, guest: Guest) {
        assert_eq!(self.guest["wrong_first"], 0, "as the source had it: {}", self.guest);
        assert_eq!(self.guest["wrong_second"], 0, "as the guest wrote it: {}", self.guest);
        assert_eq!(self.guest["pages"], guest.pages());
        assert_eq!(self.status, Some(0), "the guest's exit status is that of umem incoming");
        for report in [&self.source, &self.destination] {
            assert_eq!(number(report, "total_bytes"), guest.mib << 20);
            assert_eq!(number(report, "data_bytes"), (guest.mib << 20) / 8 * 6);
            let empty = number(report, "zero_bytes") + number(report, "hole_bytes");
            assert_eq!(empty, (guest.mib << 20) / 8 * 2);
            assert!(number(report, "pages_demand") > 0);
            let pages = number(report, "pages_demand") + number(report, "pages_background");
            assert_eq!(pages, guest.pages(), "every page came once: {report}");
        }
        assert!(number(&self.destination["fault_latency_us"], "count") > 0);
    }
}

/// Moves a guest's memory from a file, which `filled` describes, under the running `guest`.
fn migrate(filled: Guest, guest: Guest, options: &[&str]) -> Moved {
    assert!(
        Path::new("/dev/kvm").exists(),
        "/dev/kvm is missing: these tests need a machine with KVM (or leave them out: \
         `tests/run -E 'not binary(kvm)'`)"
    );
    let scratch = Scratch::new();
    let source = scratch.ram("source");
    let mib = guest.mib.to_string();
    let program = program().display().to_string();
    let fill = ["--fill", "--mib", &mib, "--seed", filled.seed, "--ram"];
    let status = Command::new(&program).args(fill).arg(&source).status().expect("it starts");
    assert!(status.success(), "{status}");

    // The guest waits before it ends, so that the messages come in a known order.
    let until = Fifo::new(scratch.path("until"));
    let destination = scratch.ram("destination").display().to_string();
    let handoff = scratch.path("handoff").display().to_string();
    let ram = format!("ram0={destination}");
    let (theirs, ours) = guest.memory.options(&ram, &destination, &handoff);
    let mut arguments = vec!["incoming", "--json"];
    arguments.extend(theirs);
    arguments.extend(["tcp:127.0.0.1:0", "--", &program]);
    arguments.extend(ours);
    arguments.extend(["--mib", &mib, "--seed", guest.seed]);
    arguments.extend(["--until", until.path()]);
    arguments.extend(guest.options);
    let mut incoming = Umem::start(arguments);
    let uri = incoming.event("listening")["uri"].as_str().unwrap().to_owned();

    let ram = format!("ram0={}", source.display());
    let mut arguments = vec!["migrate", "-p", "--json", "--ram", &ram];
    arguments.extend(options);
    arguments.push(&uri);
    let mut migrate = Umem::start(arguments);
    let source = migrate.event("completed");
    migrate.succeeds();
    let destination = incoming.event("completed");
    until.release();
    let guest = incoming.event("done");
    Moved { source, destination, guest, status: incoming.wait().code() }
}

fn program() -> PathBuf {
    support::program("umem-test-kvm-guest")
}

fn number(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap_or_else(|| panic!("{field} in {report}"))
}

#[test]
fn kvm_guest_finds_every_word_right() {
    let guest = Guest { mib: 256, ..GUEST };
    migrate(guest, guest, &[]).check(guest);
}

#[test]
fn kvm_guest_moves_over_two_lanes_with_four_vcpus() {
    let guest = Guest { mib: 128, seed: "2", options: &["--vcpus", "4"], ..GUEST };
    let moved = migrate(guest, guest, &["--lanes", "2"]);
    moved.check(guest);
    assert_eq!(number(&moved.destination, "lanes"), 2);
}

#[test]
fn kvm_guest_demands_every_page_without_background() {
    let moved = migrate(GUEST, GUEST, &["-n"]);
    moved.check(GUEST);
    assert_eq!(number(&moved.destination, "pages_background"), 0);
    assert_eq!(number(&moved.destination, "pages_demand"), GUEST.pages());
}

#[test]
fn kvm_guest_moves_with_asynchronous_page_faults() {
    let guest = Guest { seed: "3", options: &["--async-faults"], ..GUEST };
    migrate(guest, guest, &["-n"]).check(guest);
    migrate(guest, guest, &[]).check(guest);
}

/// KVM's faults wait for UFFDIO_COPY as they do for UFFDIO_CONTINUE.
#[test]
fn anonymous_memory_is_filled_under_a_running_kvm_guest() {
    let guest = Guest { mib: 128, seed: "6", memory: Memory::Anonymous, ..GUEST };
    let moved = migrate(guest, guest, &["--lanes", "2"]);
    moved.check(guest);
    assert_eq!(moved.destination["kind"], "anonymous");
}

#[test]
fn kvm_guest_demands_every_page_of_anonymous_memory() {
    for options in [&[][..], &["--async-faults", "--vcpus", "4"]] {
        let guest = Guest { options, memory: Memory::Anonymous, ..GUEST };
        let moved = migrate(guest, guest, &["-n"]);
        moved.check(guest);
        assert_eq!(number(&moved.destination, "pages_demand"), guest.pages());
    }
}

#[test]
fn kvm_guest_reports_wrong_memory() {
    let moved = migrate(Guest { seed: "4", ..GUEST }, Guest { seed: "5", ..GUEST }, &[]);
    assert_eq!(number(&moved.guest, "wrong_first"), number(&moved.destination, "data_bytes") / 4);
    assert_eq!(moved.guest["wrong_second"], 0);
    assert_eq!(moved.status, Some(1), "the guest's exit status is that of umem incoming");
}

/// The guest ends as soon as it has its last page, at any point of the completion.
#[test]
fn kvm_guest_may_exit_right_after_its_last_page() {
    for memory in [Memory::SharedFile, Memory::Anonymous].repeat(20) {
        let scratch = Scratch::new();
        let source = scratch.ram("source");
        let program = program().display().to_string();
        let filled = ["--fill", "--mib", "1", "--seed", "7", "--ram"];
        let status = Command::new(&program).args(filled).arg(&source).status().expect("it starts");
        assert!(status.success(), "{status}");
        let destination = scratch.ram("destination").display().to_string();
        let handoff = scratch.path("handoff").display().to_string();
        let ram = format!("ram0={destination}");
        let (theirs, ours) = memory.options(&ram, &destination, &handoff);
        let mut arguments = vec!["incoming", "--json"];
        arguments.extend(theirs);
        arguments.extend(["tcp:127.0.0.1:0", "--", &program]);
        arguments.extend(ours);
        arguments.extend(["--mib", "1", "--seed", "7"]);
        let mut incoming = Umem::start(arguments);
        let uri = incoming.event("listening")["uri"].as_str().unwrap().to_owned();
        let ram = format!("ram0={}", source.display());
        Umem::start(["migrate", "-p", "-n", "--ram", &ram, &uri]).succeeds();
        incoming.succeeds();
    }
}

/// The monitor embeds umem, and reports the guest's writes from KVM's dirty log. The guest writes all the time, also
/// with faults at its destination.
#[test]
fn kvm_guest_that_writes_in_every_pass_moves_by_its_monitors_dirty_log() {
    for vcpus in ["1", "2"] {
        let scratch = Scratch::new();
        let [from, to] = ["source", "destination"].map(|name| scratch.ram(name));
        let [from, to] = [&from, &to].map(|path| path.display().to_string());
        let words = ["--ram", &from, "--moves-to", &to, "--mib", "256", "--vcpus", vcpus];
        let mut guest = Umem::start_program(&program(), words);
        let done = guest.event("done");
        assert_eq!(done["wrong_first"], 0, "as the source had it: {done}");
        assert_eq!(done["wrong_second"], 0, "as the guest wrote it: {done}");
        assert_eq!(number(&done, "pages"), 256 << 8);
        let written = done["written"].as_array().expect("passes");
        assert!(
            written.len() > 1 && written.iter().all(|pages| pages.as_u64() > Some(0)),
            "{done}"
        );
        guest.succeeds();
    }
}
