//! The processes of a migration, as `land`, `fault`, `size` and `link10` start them: on this machine,
//! over the loopback address or from one network namespace to another.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Context, Result, failure};
use crate::machine::memory_available_mib;
use crate::memory::{PAGE_BYTES, Pages};
use crate::process::{Cpu, OwnMemory, Process};
use crate::qmp::Qmp;
use crate::scratch::Scratch;

/// A child without output for this long is stuck.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A child that fills, moves or checks memory may take this much longer for each GiB of it.
const PATIENCE_A_GIB: Duration = Duration::from_secs(10);

/// MiB that are left free beside both sides' memory.
pub(crate) const SPARE_MIB: usize = 1024;

/// The region's name on both sides.
const RAM: &str = "ram0";

/// The places of the two umems, and the umem to run.
#[derive(Clone, Copy)]
pub(crate) struct Route<'a> {
    pub(crate) umem: &'a Path,
    /// None: both on this host, over the loopback address.
    pub(crate) namespaces: Option<Namespaces<'a>>,
    /// TLS between them, with these certificates.
    pub(crate) tls_creds: Option<&'a Path>,
}

/// Names of network namespaces, and the destination's address.
#[derive(Clone, Copy)]
pub(crate) struct Namespaces<'a> {
    pub(crate) source: &'a str,
    pub(crate) destination: &'a str,
    pub(crate) address: &'a str,
}

impl Route<'_> {
    fn start(
        &self,
        name: &'static str,
        namespace: Option<&str>,
        arguments: &[OsString],
        log: PathBuf,
    ) -> Result<Process> {
        Process::start_in(namespace, name, self.umem, arguments, log)
    }

    /// `umem incoming` with `options`, which starts `command`; returns it and its address.
    pub(crate) fn incoming(
        &self,
        scratch: &Scratch,
        options: Vec<OsString>,
        command: Vec<OsString>,
    ) -> Result<(Process, String)> {
        let address = self.namespaces.map_or("127.0.0.1", |namespaces| namespaces.address);
        let mut arguments = words(&["incoming", "--json"]);
        arguments.extend(options);
        arguments.extend(self.tls());
        if self.namespaces.is_some() && self.tls_creds.is_none() {
            // No other host is on that link.
            arguments.push("--insecure".into());
        }
        arguments.extend([format!("tcp:{address}:0").into(), "--".into()]);
        arguments.extend(command);
        let namespace = self.namespaces.map(|namespaces| namespaces.destination);
        let log = scratch.file("incoming.log");
        let mut incoming = self.start("umem incoming", namespace, &arguments, log)?;
        let (_, listening) = incoming.event("listening", PATIENCE)?;
        Ok((incoming, listening["uri"].as_str().unwrap_or_default().to_owned()))
    }

    /// `umem migrate -p` with `options`, to `uri`.
    pub(crate) fn migrate(
        &self,
        scratch: &Scratch,
        lanes: u16,
        options: Vec<OsString>,
        uri: &str,
    ) -> Result<Process> {
        let mut arguments = words(&["migrate", "-p", "--json", "--lanes", &lanes.to_string()]);
        arguments.extend(options);
        arguments.extend(self.tls());
        arguments.push(uri.into());
        let namespace = self.namespaces.map(|namespaces| namespaces.source);
        self.start("umem migrate", namespace, &arguments, scratch.file("migrate.log"))
    }

    fn tls(&self) -> Vec<OsString> {
        let directory = self.tls_creds.into_iter();
        directory.flat_map(|path| ["--tls-creds".into(), path.into()]).collect()
    }
}

/// A guest of umem and the way it is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Subject {
    /// The guest's memory at the destination.
    pub(crate) pages: Pages,
    pub(crate) size_mib: usize,
    /// Pages of zeroes, percent.
    pub(crate) zero_percent: u32,
    /// Threads of the guest that read random pages during the move, as fast as they can.
    pub(crate) readers: u32,
    /// Bulk lanes.
    pub(crate) lanes: u16,
    /// The source frees pages that have arrived, so that both sides' memory is hardly more than the
    /// guest's.
    pub(crate) release_ram: bool,
    /// With --checksum.
    pub(crate) checksum: bool,
}

/// The result of one move.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Landing {
    /// umem's own figure: page contents over the time from the first page to the last.
    pub(crate) gbps: f64,
    /// That time; None if nothing was sent.
    pub(crate) moving_s: Option<f64>,
    /// From the stop of the source's guest to the last cached page.
    pub(crate) total_s: f64,
    pub(crate) downtime_ms: f64,
    pub(crate) pages_demand: u64,
    /// Processor time of both umem processes.
    pub(crate) cpu_s: f64,
    /// The largest anonymous memory of either umem.
    pub(crate) source_own_mib: f64,
    pub(crate) destination_own_mib: f64,
}

impl Subject {
    /// Moves the guest once, and makes it check every word. Ends all processes that it started.
    pub(crate) fn land(self, route: &Route<'_>) -> Result<Landing> {
        self.land_from(&self.pages.source().file(self.size_mib << 20)?, route)
    }

    /// The same for a guest whose memory is this file, which the guest fills.
    pub(crate) fn land_from(self, from: &File, route: &Route<'_>) -> Result<Landing> {
        let bytes = self.size_mib << 20;
        let scratch = Scratch::new()?;
        let (here, there) = (scratch.file("source.qmp"), scratch.file("destination.qmp"));
        let mut arguments = self.guest(&here);
        arguments.extend(["--ram".into(), ram(from).into()]);
        let log = scratch.file("guest.log");
        let mut guest = Process::start("the guest", route.umem, &arguments, log)?;
        guest.event("ready", self.patience())?;
        self.pages.warm(self.warm_bytes())?;

        let mut options = words(&["--qmp"]);
        options.push(there.clone().into());
        let mut command = vec![route.umem.into()];
        command.extend(self.guest(&there));
        command.push("--incoming".into());
        let to = (!self.pages.is_anonymous()).then(|| self.pages.file(bytes)).transpose()?;
        if let Some(to) = &to {
            options.extend(["--ram".into(), ram(to).into()]);
            command.extend(["--ram".into(), ram(to).into()]);
            if self.pages == Pages::Private {
                options.extend(words(&["--kind", "private", "--postcopy-flags", "1"]));
                command.extend(words(&["--kind", "private"]));
            }
        } else {
            let handoff = scratch.file("handoff");
            options.extend(["--handoff".into(), handoff.clone().into()]);
            command.extend(words(&["--kind", "anonymous", "--ram", RAM, "--handoff"]));
            command.push(handoff.into());
            if self.pages == Pages::AnonymousHuge {
                command.push("--huge".into());
            }
        }
        options.extend(self.release_ram.then(|| "--overcommit".into()));
        let (mut incoming, uri) = route.incoming(&scratch, options, command)?;
        let mut options = vec!["--qmp".into(), here.into()];
        options.extend(self.release_ram.then(|| "--release-ram".into()));
        options.extend(self.checksum.then(|| "--checksum".into()));
        let mut migrate = route.migrate(&scratch, self.lanes, options, &uri)?;
        let own = OwnMemory::watch([migrate.pid(), incoming.pid()]);
        let (_, source) = migrate.event("completed", self.patience())?;
        let (_, destination) = incoming.event("completed", PATIENCE)?;
        let cpu = Cpu::of_all(&[migrate.pid(), incoming.pid()]);
        let own = own.most_mib();

        let mut qmp = Qmp::connect(&there)?;
        let verdict = qmp.execute_within("umem-verify", &json!({}), self.patience())?;
        let expected = (bytes / PAGE_BYTES) as u64;
        let count = |name: &str| verdict[name].as_u64();
        if count("verified_pages") != Some(expected) || count("bad_pages") != Some(0) {
            return failure(format!("the guest's memory did not arrive complete: {verdict}"));
        }
        landing(&source, &destination, cpu, own).context(|| "umem's report")
    }

    /// A machine whose host backs memory anew takes seconds for each GiB, for filling as for
    /// moving.
    fn patience(self) -> Duration {
        PATIENCE + PATIENCE_A_GIB * (self.size_mib / 1024) as u32
    }

    /// Memory that is written and freed beforehand: all that the destination will take, or as much
    /// of it as fits beside the source's.
    fn warm_bytes(self) -> usize {
        let room = memory_available_mib().saturating_sub(SPARE_MIB);
        if self.release_ram { self.size_mib.min(room) << 20 } else { self.size_mib << 20 }
    }

    /// The common options of both guests, without those of their memory.
    fn guest(&self, qmp: &Path) -> Vec<OsString> {
        let mut arguments = words(&["guest", "--write-percent", "0", "--hole-percent", "0"]);
        arguments.extend(words(&["--zero-percent", &self.zero_percent.to_string()]));
        arguments.extend(words(&["--threads", &self.readers.to_string()]));
        arguments.extend(words(&["--size", &self.size_mib.to_string(), "--qmp"]));
        arguments.push(qmp.into());
        arguments
    }
}

fn landing(
    source: &Value,
    destination: &Value,
    cpu: Cpu,
    own_mib: [f64; 2],
) -> std::result::Result<Landing, String> {
    let number =
        |report: &Value, name: &str| report[name].as_f64().ok_or_else(|| format!("no {name}"));
    let (gbps, bytes) = (number(destination, "gbps")?, number(destination, "data_bytes")?);
    Ok(Landing {
        gbps,
        moving_s: (gbps > 0.0).then(|| bytes * 8e-9 / gbps),
        total_s: number(source, "total_s")?,
        downtime_ms: number(source, "downtime_ms")?,
        pages_demand: destination["pages_demand"].as_u64().unwrap_or(0),
        cpu_s: cpu.all_s,
        source_own_mib: own_mib[0],
        destination_own_mib: own_mib[1],
    })
}

/// NAME=PATH of a file without a name of its own.
pub(crate) fn ram(file: &File) -> String {
    format!("{RAM}=/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

pub(crate) fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(Into::into).collect()
}
