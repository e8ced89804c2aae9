//! The Linux guest in a QEMU: its command line, and its supervision.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Result, failure};
use crate::process::Process;
use crate::qmp::Qmp;
use crate::scratch::Scratch;

use super::beats::beats_in;

/// A guest that has not booted by then never will.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);

/// The guest counts as running evenly after this many beats of 100 ms.
const SETTLED_BEATS: usize = 20;

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

/// The settings of every subject.
pub(super) struct Setup {
    pub(super) artefacts: Artefacts,
    pub(super) umem: PathBuf,
    pub(super) size_mib: u64,
    pub(super) fill_mib: u64,
    pub(super) idle: bool,
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

impl Setup {
    pub(super) fn qemu(&self) -> &Path {
        &self.artefacts.qemu
    }

    /// The options of a QEMU whose RAM is `ram`, with its console in `console` and a monitor on each
    /// of `monitors`.
    pub(super) fn arguments(
        &self,
        ram: Ram,
        ram_path: &Path,
        console: &Path,
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
        let mode = if self.idle { "idle" } else { "random" };
        let append = format!(
            "console=ttyS0 quiet panic=-1 umem.mib={} umem.write=0 umem.sweep=0 umem.mode={mode}",
            self.fill_mib
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
            ("-serial", &format!("file:{}", console.display())),
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

/// A QEMU that this program has started.
pub(super) struct Vm {
    process: Process,
    pub(super) qmp: Qmp,
    console: PathBuf,
}

impl Vm {
    /// Starts a source's guest, with a second monitor that `other` connects to.
    pub(super) fn source(
        setup: &Setup,
        scratch: &Scratch,
        ram: Ram,
        ram_path: &Path,
        other: &Path,
    ) -> Result<Vm> {
        let (monitor, console) = (scratch.file("source.qmp"), scratch.file("source.console"));
        let arguments = setup.arguments(ram, ram_path, &console, &[&monitor, other]);
        let errors = scratch.file("source.log");
        Vm::start(setup, "the source's QEMU", &arguments, &monitor, console, errors)
    }

    /// Starts a QEMU that waits for a guest from another QEMU.
    pub(super) fn destination(
        setup: &Setup,
        scratch: &Scratch,
        ram: Ram,
        ram_path: &Path,
    ) -> Result<Vm> {
        let monitor = scratch.file("destination.qmp");
        let console = scratch.file("destination.console");
        let mut arguments = setup.arguments(ram, ram_path, &console, &[&monitor]);
        arguments.extend(["-incoming", "defer"].map(OsString::from));
        let errors = scratch.file("destination.log");
        Vm::start(setup, "the destination's QEMU", &arguments, &monitor, console, errors)
    }

    fn start(
        setup: &Setup,
        name: &'static str,
        arguments: &[OsString],
        monitor: &Path,
        console: PathBuf,
        errors: PathBuf,
    ) -> Result<Vm> {
        let mut process = Process::start(name, setup.qemu(), arguments, errors)?;
        process.wait_until(BOOT_PATIENCE, "make its monitor", || monitor.exists())?;
        Ok(Vm { process, qmp: Qmp::connect(monitor)?, console })
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub(super) fn console(&self) -> &Path {
        &self.console
    }

    /// Waits until the guest has filled its memory and runs evenly.
    pub(super) fn settle(&mut self) -> Result<()> {
        let console = &self.console;
        self.process.wait_until(BOOT_PATIENCE, "boot its guest", || {
            beats_in(console).len() >= SETTLED_BEATS
        })
    }
}

/// Waits until the guest that has arrived beats on, without a wrong word.
pub(super) fn check_arrived(console: &Path, seen: usize) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        crate::interrupt::check()?;
        let beats = beats_in(console);
        if let Some(beat) = beats.iter().find(|beat| beat.bad > 0) {
            return failure(format!("the guest found {} wrong words after its move", beat.bad));
        }
        if beats.len() > seen + 1 {
            return Ok(());
        }
        if Instant::now() > deadline {
            return failure("the guest does not go on after its move");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
