//! One of umem's own guests that is to arrive: its `umem incoming`, the relay before that, and what must
//! be true of the guest when everything has come.

use std::path::Path;

use serde_json::{Value, json};

use super::{Cutter, Qmp, Umem};

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

/// A handshake of TLS, or a nonce, and a hello.
const GREETING_BYTES_MAX: u64 = 4 << 10;

/// What `umem incoming` and the guest that it starts are told.
pub(super) struct Arrival<'a> {
    /// The guest's socket.
    pub(super) qmp: &'a str,
    /// `NAME=PATH`, unless its memory is anonymous.
    pub(super) ram: &'a str,
    /// The socket for memory that is.
    pub(super) handoff: &'a str,
    /// Of memory; shared if nothing is said.
    pub(super) kind: Option<&'a str>,
    /// What the guest at the source is told as well.
    pub(super) common: &'a [&'a str],
    /// For `umem incoming`.
    pub(super) incoming: &'a [&'a str],
    /// For the guest.
    pub(super) arriving: &'a [&'a str],
    /// For `umem incoming`, and `umem migrate` too: a directory of certificates, or a secret.
    pub(super) security: Option<[&'a str; 2]>,
    /// Becomes `umem incoming` by exec.
    pub(super) wrapper: &'a [&'a str],
}

impl Arrival<'_> {
    /// A `umem incoming` that listens, and the relay that leads to it.
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

/// Every word is what it was at the source or what has been written since, each page has been counted
/// once, and the guest has left its userfaultfd. `report` is the destination's.
pub(super) fn check(guest_qmp: &Path, mib: u64, report: &Value) {
    let verdict = Qmp::connect(guest_qmp).execute("umem-verify", json!({}));
    assert_eq!(verdict["verified_pages"], mib * 256, "{verdict}");
    assert_eq!(verdict["bad_pages"], 0, "{verdict}");
    assert_eq!(verdict["guest_writes_lost"], 0, "{verdict}");
    assert_eq!(verdict["registered"], false, "{verdict}");
    let bytes = ["data_bytes", "zero_bytes", "hole_bytes"];
    let bytes: u64 = bytes.iter().map(|field| report[field].as_u64().unwrap()).sum();
    assert_eq!(bytes, mib << 20, "every page has come once: {report}");
}
