//! The Linux guest in a QEMU: its command line, and its supervision.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Context, Result, failure};
use crate::link::Link;
use crate::migration::Namespaces;
use crate::process::{Lines, Process};
use crate::qmp::Qmp;
use crate::scratch::Scratch;

use super::beats::{Checked, beats_in, checked_in};

/// A guest that has not booted by then never will.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);

/// The guest counts as running evenly after this many beats of 100 ms.
const SETTLED_BEATS: usize = 30;

/// A guest that has arrived goes on, and has checked all of its memory, within this time.
const CHECK_PATIENCE: Duration = Duration::from_secs(120);

/// Pages of the guest's in a MiB.
const PAGES_A_MIB: u64 = 256;

/// The guest's RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ram {
    /// A memory-backend-file in /dev/shm with share=on.
    File,
    /// The same in a tmpfs with `huge=always`.
    HugeFile,
    /// A memory-backend-ram, which is QEMU's default.
    Private,
}

/// What the guest does with the memory that it has filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    /// Touches none of it.
    Idle,
    /// Reads random pages.
    Read,
    /// Writes random pages of a hot set of so many MiB.
    Hot(u64),
    /// Writes all pages in order, again and again.
    Sequential,
    /// Writes random pages.
    Random,
}

impl Load {
    /// Parameters of tests/guest.
    fn parameters(self) -> String {
        let (mode, write) = match self {
            Load::Idle => ("idle", 0),
            Load::Read => ("random", 0),
            Load::Hot(mib) => return format!("umem.mode=hot umem.hot={mib} umem.write=100"),
            Load::Sequential => ("sequential", 100),
            Load::Random => ("random", 100),
        };
        format!("umem.mode={mode} umem.write={write}")
    }
}

/// What the moves of a guest have in common.
#[derive(Clone, Copy)]
pub(super) struct Setup<'a> {
    pub(super) artefacts: &'a Artefacts,
    pub(super) umem: &'a Path,
    pub(super) size_mib: u64,
    pub(super) fill_mib: u64,
    pub(super) load: Load,
    /// None: both ends on this host, over the loopback address.
    pub(super) link: Option<&'a Link>,
    /// The guest is watched until its move has ended and it has printed so many beats at its destination.
    pub(super) beats_min: usize,
    /// QEMU's passes that have not ended by then are cancelled.
    pub(super) limit: Option<Duration>,
}

/// The two ends of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Source,
    Destination,
}

/// Files of the tests.
pub(super) struct Artefacts {
    qemu: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Artefacts {
    pub(super) fn find(qemu: Option<&Path>) -> Result<Artefacts> {
        let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cache");
        let find = |variable: &str, name: &str| {
            std::env::var_os(variable).map_or_else(|| cache.join(name), PathBuf::from)
        };
        let directory = match qemu {
            Some(directory) => directory.to_owned(),
            None => find("UMEM_TEST_QEMU_100", "qemu-10.0"),
        };
        let artefacts = Artefacts {
            qemu: directory.join("qemu-system-x86_64"),
            kernel: find("UMEM_TEST_KERNEL", "vmlinuz"),
            initrd: find("UMEM_TEST_INITRD", "initramfs"),
        };
        for file in [&artefacts.qemu, &artefacts.kernel, &artefacts.initrd] {
            if !file.is_file() {
                return failure(format!(
                    "{} is missing: run tests/lib/fetch and `tests/lib/initramfs \
                     tests/cache/initramfs`",
                    file.display()
                ));
            }
        }
        Ok(artefacts)
    }
}

impl Setup<'_> {
    pub(super) fn qemu(&self) -> &Path {
        &self.artefacts.qemu
    }

    /// The address at which a destination listens.
    pub(super) fn address(&self) -> &str {
        self.namespaces().map_or("127.0.0.1", |namespaces| namespaces.address)
    }

    fn namespaces(&self) -> Option<Namespaces<'_>> {
        self.link.map(Link::namespaces)
    }

    /// Starts a program at this end.
    pub(super) fn start(
        &self,
        end: End,
        name: &'static str,
        program: &Path,
        arguments: &[OsString],
        errors: PathBuf,
    ) -> Result<Process> {
        let namespace = self.namespaces().map(|namespaces| match end {
            End::Source => namespaces.source,
            End::Destination => namespaces.destination,
        });
        Process::start_in(namespace, name, program, arguments, errors)
    }

    /// The options of a QEMU whose RAM is `ram`, with a monitor on each of `monitors`.
    pub(super) fn arguments(
        &self,
        ram: Ram,
        ram_path: &Path,
        console: &Console,
        monitors: &[&Path],
    ) -> Vec<OsString> {
        let size = self.size_mib;
        let backend = match ram {
            Ram::File | Ram::HugeFile => {
                // Otherwise QEMU maps a tmpfs file at any address, where huge pages are impossible.
                let align = if ram == Ram::HugeFile { ",align=2M" } else { "" };
                let path = ram_path.display();
                format!("memory-backend-file,id=ram0,size={size}M,share=on,mem-path={path}{align}")
            }
            Ram::Private => format!("memory-backend-ram,id=ram0,size={size}M"),
        };
        let append = format!(
            "console=ttyS0 quiet panic=-1 umem.mib={} umem.sweep=0 {}",
            self.fill_mib,
            self.load.parameters()
        );
        let serial = format!(
            "socket,id=console,server=on,wait=off,path={},logfile={}",
            console.input.display(),
            console.output.display()
        );
        let mut arguments: Vec<OsString> = [
            // Names its threads, which distinguishes the vCPUs' processor time.
            ("-name", "umem-perf,debug-threads=on"),
            ("-accel", "tcg"),
            ("-cpu", "max"),
            ("-smp", "2"),
            ("-m", &format!("{size}M")),
            ("-machine", "q35,memory-backend=ram0"),
            ("-object", &backend),
            ("-append", &append),
            ("-display", "none"),
            ("-chardev", &serial),
            ("-serial", "chardev:console"),
        ]
        .into_iter()
        .flat_map(|(option, value)| [option.into(), value.into()])
        .collect();
        arguments.extend(["-nodefaults", "-no-reboot", "-kernel"].map(OsString::from));
        arguments.push(self.artefacts.kernel.clone().into());
        arguments.extend(["-initrd".into(), self.artefacts.initrd.clone().into()]);
        for monitor in monitors {
            let monitor = format!("unix:{},server=on,wait=off", monitor.display());
            arguments.extend(["-qmp".into(), monitor.into()]);
        }
        arguments
    }
}

/// A guest's console.
pub(super) struct Console {
    /// A file of what the guest has printed.
    pub(super) output: PathBuf,
    /// A socket for what it reads.
    input: PathBuf,
}

impl Console {
    pub(super) fn of(end: End, scratch: &Scratch) -> Console {
        let [output, input] = match end {
            End::Source => ["source.console", "source.keys"],
            End::Destination => ["destination.console", "destination.keys"],
        };
        Console { output: scratch.file(output), input: scratch.file(input) }
    }

    /// Waits until the guest has printed so many beats.
    pub(super) fn wait_for_beats(&self, count: usize) -> Result<()> {
        wait_until(
            || beats_in(&self.output).len() >= count,
            || "the guest does not go on after its move".into(),
        )
    }

    /// Has the guest that has arrived check all of its memory. A wrong word is an error.
    pub(super) fn check_memory(&self, setup: &Setup<'_>) -> Result<()> {
        let path = &self.input;
        let mut keys = UnixStream::connect(path).context(|| path.display())?;
        // Its QEMU waits for what it prints to be read.
        let _printed = Lines::of(keys.try_clone().context(|| path.display())?);
        keys.write_all(b"check\n").context(|| path.display())?;
        wait_until(
            || checked_in(&self.output).is_some(),
            || "the guest does not check its memory after its move".into(),
        )?;
        let expected = Checked { pages: setup.fill_mib * PAGES_A_MIB, bad: 0 };
        match checked_in(&self.output) {
            Some(checked) if checked == expected => Ok(()),
            Some(Checked { pages, bad }) => failure(format!(
                "the guest found {bad} wrong words in {pages} pages after its move"
            )),
            None => failure("the guest's console has been cut off"),
        }
    }
}

fn wait_until(is_so: impl Fn() -> bool, otherwise: impl Fn() -> String) -> Result<()> {
    let deadline = Instant::now() + CHECK_PATIENCE;
    while !is_so() {
        crate::interrupt::check()?;
        if Instant::now() > deadline {
            return failure(otherwise());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A QEMU that this program has started.
pub(super) struct Vm {
    process: Process,
    pub(super) qmp: Qmp,
    pub(super) console: Console,
}

impl Vm {
    /// Starts a source's guest, with a second monitor that `other` connects to.
    pub(super) fn source(
        setup: &Setup<'_>,
        scratch: &Scratch,
        ram: Ram,
        ram_path: &Path,
        other: &Path,
    ) -> Result<Vm> {
        let monitor = scratch.file("source.qmp");
        let console = Console::of(End::Source, scratch);
        let arguments = setup.arguments(ram, ram_path, &console, &[&monitor, other]);
        let log = scratch.file("source.log");
        let name = "the source's QEMU";
        let process = setup.start(End::Source, name, setup.qemu(), &arguments, log)?;
        Vm::started(process, &monitor, console)
    }

    /// Starts a QEMU that waits for a guest from another QEMU.
    pub(super) fn destination(
        setup: &Setup<'_>,
        scratch: &Scratch,
        ram: Ram,
        ram_path: &Path,
    ) -> Result<Vm> {
        let monitor = scratch.file("destination.qmp");
        let console = Console::of(End::Destination, scratch);
        let mut arguments = setup.arguments(ram, ram_path, &console, &[&monitor]);
        arguments.extend(["-incoming", "defer"].map(OsString::from));
        let log = scratch.file("destination.log");
        let name = "the destination's QEMU";
        let process = setup.start(End::Destination, name, setup.qemu(), &arguments, log)?;
        Vm::started(process, &monitor, console)
    }

    fn started(mut process: Process, monitor: &Path, console: Console) -> Result<Vm> {
        process.wait_until(BOOT_PATIENCE, "make its monitor", || monitor.exists())?;
        Ok(Vm { process, qmp: Qmp::connect(monitor)?, console })
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits until the guest has filled its memory and runs evenly.
    pub(super) fn settle(&mut self) -> Result<()> {
        let console = &self.console.output;
        self.process.wait_until(BOOT_PATIENCE, "boot its guest", || {
            beats_in(console).len() >= SETTLED_BEATS
        })
    }
}
