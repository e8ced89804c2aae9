//! A source whose pages are larger than the destination's: a landing unit is many pages there, of which the guest may
//! discard some before they arrive.

mod support;

use serde_json::json;
use support::{Authority, HugeFile, Qmp, Scratch, Umem};

const MIB: &str = "24";
const PAGES: u64 = 24 * 256;

/// Moves a guest whose RAM has 2 MiB pages into one with 4 KiB pages of this kind, which discards pages while it is
/// filled, and has it check all of them.
fn arrives(kind: &str, incoming: &[&str]) {
    arrives_with(kind, incoming, false);
}

fn arrives_with(kind: &str, incoming: &[&str], tls: bool) {
    let scratch = Scratch::new();
    let creds = Authority::new("ours").credentials(&scratch, "tls", "127.0.0.1");
    let creds = ["--tls-creds".to_owned(), creds.display().to_string()];
    let creds = creds.each_ref().map(String::as_str);
    let security = if tls { &creds[..] } else { &[] };
    let huge = HugeFile::with_room(12);
    let path = |name: &str| scratch.path(name).display().to_string();
    let source_ram = format!("ram0={}", huge.path().display());
    let shape = ["--size", MIB, "--threads", "3", "--zero-percent", "5"];
    let guest = ["guest", "--qmp", &path("source.qmp"), "--ram", &source_ram];
    let mut source = Umem::start([&guest[..], &shape].concat());
    source.event("ready");

    let file = format!("ram0={}", scratch.ram("destination").display());
    let ram = if kind == "anonymous" { "ram0" } else { &file };
    let options = ["--json", "--qmp", &path("destination.qmp")];
    let memory = match kind {
        "anonymous" => ["--handoff".to_owned(), path("handoff")],
        _ => ["--ram".to_owned(), file.clone()],
    };
    let memory = memory.each_ref().map(String::as_str);
    let command = ["tcp:127.0.0.1:0", "--", env!("CARGO_BIN_EXE_umem"), "guest", "--incoming"];
    let kinds = ["--kind", kind];
    let guest = ["--discard", "--qmp", &path("destination.qmp"), "--ram", ram];
    let handoff = if kind == "anonymous" { &memory[..] } else { &[] };
    let umem: [&[&str]; 6] = [&["incoming"], &options, &kinds, &memory, incoming, security];
    let guest: [&[&str]; 4] = [&command, &kinds, handoff, &guest];
    let parts = [umem.concat(), guest.concat()];
    let mut incoming = Umem::start([&parts.concat()[..], &shape].concat());
    let uri = incoming.event("listening")["uri"].as_str().expect("a URI").to_owned();

    let words = ["migrate", "-p", "--json", "--qmp", &path("source.qmp"), &uri];
    let mut migrate = Umem::start(words.iter().chain(security));
    let report = incoming.event("completed");
    migrate.event("completed");
    assert_eq!(report["page_size"], 2 << 20, "the landing unit: {report}");
    assert_eq!(report["kind"], kind);
    let mut qmp = Qmp::connect(&scratch.path("destination.qmp"));
    let verdict = qmp.execute("umem-verify", json!({}));
    assert_eq!(verdict["verified_pages"], PAGES, "{verdict}");
    assert_eq!((&verdict["bad_pages"], &verdict["guest_writes_lost"]), (&json!(0), &json!(0)));
    qmp.quit();
    migrate.succeeds();
    incoming.succeeds();
    Qmp::connect(&scratch.path("source.qmp")).quit();
    assert!(source.wait().success());
}

#[test]
fn random_sizes_move_into_shared_memory() {
    arrives("shared", &[]);
}

#[test]
fn random_sizes_move_into_anonymous_memory() {
    arrives("anonymous", &[]);
}

#[test]
fn random_sizes_move_into_private_memory() {
    arrives("private", &[]);
    arrives("private", &["--postcopy-flags", "1"]);
}

/// A page of 2 MiB arrives in many records, and lands in pieces or whole.
#[test]
fn behind_tls() {
    for kind in ["shared", "anonymous", "private"] {
        arrives_with(kind, &[], true);
    }
}
