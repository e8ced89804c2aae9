//! Two demo guests, the source's and the destination's: the processes of `umem demo`, piece by piece.

use std::net::TcpStream;
use std::path::Path;

use super::{Scratch, Umem};

/// Guests of this size move within a test's time.
const MIB: u32 = 16;

/// A running guest, and a `umem incoming` with a guest that waits for its memory.
pub(crate) struct Guests {
    guest: Umem,
    pub(crate) incoming: Umem,
    /// The metrics address of `umem incoming`.
    pub(crate) metrics: Option<String>,
    qmp: String,
    uri: String,
}

impl Guests {
    /// With further arguments for `umem incoming`, `--json` among them. Neither guest touches its memory by itself, so
    /// every page is background.
    pub(crate) fn quiet(scratch: &Scratch, more: &[&str]) -> Guests {
        let of_guest = |side: &str| -> Vec<String> {
            let (qmp, ram) = (scratch.path(side), scratch.ram(side));
            let ram = format!("ram0={}", ram.display());
            let (qmp, size) = (qmp.display().to_string(), MIB.to_string());
            ["guest", "--qmp", &qmp, "--ram", &ram, "--size", &size, "--threads", "0"]
                .into_iter()
                .chain(["--zero-percent", "0", "--hole-percent", "0"])
                .map(str::to_owned)
                .collect()
        };
        let mut guest = Umem::start(of_guest("source"));
        guest.event("ready");
        let qmp = scratch.path("destination").display().to_string();
        let ram = format!("ram0={}", scratch.ram("destination").display());
        let mut arguments: Vec<String> =
            ["incoming", "--qmp", &qmp, "--ram", &ram].map(str::to_owned).to_vec();
        arguments.extend(more.iter().map(|&word| word.to_owned()));
        arguments.extend(["tcp:127.0.0.1:0", "--", env!("CARGO_BIN_EXE_umem")].map(str::to_owned));
        arguments.extend(of_guest("destination"));
        arguments.push("--incoming".to_owned());
        let mut incoming = Umem::start(arguments);
        let metrics = more.contains(&"--metrics").then(|| {
            let event = incoming.event("metrics");
            let url = event["url"].as_str().expect("an address");
            url.trim_start_matches("http://").trim_end_matches("/metrics").to_owned()
        });
        let listening = incoming.event("listening");
        let uri = listening["uri"].as_str().expect("an address").to_owned();
        let qmp = scratch.path("source").display().to_string();
        Guests { guest, incoming, metrics, qmp, uri }
    }

    /// The same, with metrics of the waiting side.
    pub(crate) fn with_metrics(scratch: &Scratch) -> Guests {
        Guests::quiet(scratch, &["--json", "--metrics", "0"])
    }

    /// A `umem migrate` between the two, with further arguments.
    pub(crate) fn migrate(&self, more: &[&str]) -> Umem {
        self.migrate_to(&self.uri, more)
    }

    /// A `umem migrate` to another address.
    pub(crate) fn migrate_to(&self, uri: &str, more: &[&str]) -> Umem {
        Umem::start([&["migrate", "--qmp", &self.qmp], more, &[uri]].concat())
    }

    /// A `umem migrate` over one connection for everything.
    pub(crate) fn migrate_over_one(&self, more: &[&str]) -> Umem {
        let address = self.uri.strip_prefix("tcp:").expect("a TCP address");
        let socket = TcpStream::connect(address).expect("umem listens");
        let arguments = [&["migrate", "--qmp", &self.qmp], more, &["fd:40"]].concat();
        Umem::start_inheriting(&socket, 40, arguments)
    }

    /// The address of `umem incoming`.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// The monitor's socket of the guest at the source.
    pub(crate) fn qmp(&self) -> &Path {
        Path::new(&self.qmp)
    }

    /// Bytes of the guest's memory.
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(MIB) << 20
    }

    /// The guest at the source still runs.
    pub(crate) fn source_runs(&mut self) -> bool {
        self.guest.is_running()
    }
}
