//! An arriving demo guest: its `umem incoming`, the relay before that, and the checks of the complete guest.

use std::path::Path;

use serde_json::{Value, json};

use super::{Cutter, Qmp, Umem};

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

/// A TLS handshake, or a nonce, and a hello.
const GREETING_BYTES_MAX: u64 = 4 << 10;

/// Options of `umem incoming` and of the guest that it starts.
pub(super) struct Arrival<'a> {
    /// The guest's socket.
    pub(super) qmp: &'a str,
    /// `NAME=PATH`; None for anonymous memory.
    pub(super) ram: &'a str,
    /// The socket for anonymous memory.
    pub(super) handoff: &'a str,
    /// The kind of memory; shared by default.
    pub(super) kind: Option<&'a str>,
    /// Further options of both guests.
    pub(super) common: &'a [&'a str],
    /// For `umem incoming`.
    pub(super) incoming: &'a [&'a str],
    /// For the guest.
    pub(super) arriving: &'a [&'a str],
    /// For `umem incoming` and `umem migrate`: a directory of certificates, or a secret.
    pub(super) security: Option<[&'a str; 2]>,
    /// A wrapper that becomes `umem incoming` by exec.
    pub(super) wrapper: &'a [&'a str],
}

impl Arrival<'_> {
    /// A listening `umem incoming`, and the relay before it.
    pub(super) fn start(&self) -> (Umem, Cutter) {
        let mut incoming = Umem::start_under(self.wrapper, self.arguments());
        let listening = incoming.event("listening");
        let cutter = Cutter::to(listening["uri"].as_str().expect("an address"));
        if self.security.is_some() {
            cutter.lengthen_greetings(GREETING_BYTES_MAX);
        }
        (incoming, cutter)
    }

    fn arguments(&self) -> Vec<&str> {
        let kind = self.kind.unwrap_or("shared");
        let is_anonymous = kind == "anonymous";
        let mut arguments = vec!["incoming", "--json", "--qmp", self.qmp];
        match is_anonymous {
            true => arguments.extend(["--handoff", self.handoff]),
            false => arguments.extend(["--kind", kind, "--ram", self.ram]),
        }
        arguments.extend(self.incoming);
        arguments.extend(self.security.iter().flatten());
        arguments.extend(["tcp:127.0.0.1:0", "--", UMEM, "guest", "--incoming"]);
        arguments.extend(["--qmp", self.qmp, "--kind", kind]);
        arguments.extend(self.common);
        match is_anonymous {
            true => arguments.extend(["--ram", "ram0", "--handoff", self.handoff]),
            false => arguments.extend(["--ram", self.ram]),
        }
        arguments.extend(self.arriving);
        arguments
    }
}

/// Every word is the source's or a later write, each page has been counted once, and the guest has left its
/// userfaultfd. `report` is the destination's.
pub(super) fn check(guest_qmp: &Path, mib: u64, report: &Value) {
    let verdict = Qmp::connect(guest_qmp).execute("umem-verify", json!({}));
    assert_eq!(verdict["verified_pages"], mib * 256, "{verdict}");
    assert_eq!(verdict["bad_pages"], 0, "{verdict}");
    assert_eq!(verdict["guest_writes_lost"], 0, "{verdict}");
    assert_eq!(verdict["registered"], false, "{verdict}");
    let bytes = ["data_bytes", "zero_bytes", "hole_bytes"];
    let bytes: u64 = bytes.iter().map(|field| report[field].as_u64().unwrap()).sum();
    assert_eq!(bytes, mib << 20, "every page has arrived once: {report}");
}
