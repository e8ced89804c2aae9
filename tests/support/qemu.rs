//! QEMU: its options, and a running one.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use super::process::Process;
use super::qmp::Qmp;
use super::scratch::Scratch;
use super::serial::Serial;
use super::wait_for;

/// The QEMUs that `tests/lib/fetch` fetches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QemuVersion {
    V7_2,
    V10_0,
}

impl QemuVersion {
    pub(crate) fn program(self) -> PathBuf {
        let directory = match self {
            QemuVersion::V7_2 => provided("UMEM_TEST_QEMU_72", "qemu-7.2"),
            QemuVersion::V10_0 => provided("UMEM_TEST_QEMU_100", "qemu-10.0"),
        };
        directory.join("qemu-system-x86_64")
    }
}

/// A file that `tests/run` provides, from its variable or else from its cache.
pub(crate) fn provided(variable: &str, name: &str) -> PathBuf {
    let path = std::env::var_os(variable).map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cache").join(name),
        PathBuf::from,
    );
    assert!(path.exists(), "{} is missing: `tests/run` fetches and builds it", path.display());
    path
}

/// A memory backend with a shared file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ram {
    pub(crate) id: &'static str,
    pub(crate) mib: u64,
}

/// The main memory of a source. Its destination has a file for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SourceRam {
    /// A file that QEMU maps shared.
    File,
    /// QEMU's default, without a backend.
    Default,
    /// A file that QEMU maps privately.
    PrivateFile,
    /// A memory file.
    Memfd,
}

/// One of the two QEMUs of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Destination => "destination",
        }
    }
}

/// A machine as its QEMU's options describe it, the same on both sides by default. `name` separates the files of
/// several machines in one [`Scratch`].
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) name: &'static str,
    pub(crate) version: QemuVersion,
    pub(crate) cpus: u32,
    /// In the order of the command line; `ram0` is the main memory, the others are DIMMs. Without `ram0` each is the
    /// memory of a NUMA node.
    pub(crate) ram: Vec<Ram>,
    /// The kind of `ram0`.
    pub(crate) source_ram: SourceRam,
    /// Words of the kernel's command line; the Linux guest boots if there are any.
    pub(crate) guest: String,
    /// Further options.
    pub(crate) extra: Vec<String>,
    /// The destination maps its RAM files privately.
    pub(crate) becomes_private: bool,
}

impl Machine {
    /// 256 MiB of memory, 128 MiB of which the Linux guest reads, writes and checks.
    pub(crate) fn linux(version: QemuVersion) -> Machine {
        let guest = "umem.mib=128".into();
        Machine { guest, ..Machine::bare(version) }
    }

    /// 256 MiB of memory without a system to boot: firmware that looks for a disk.
    pub(crate) fn bare(version: QemuVersion) -> Machine {
        Machine {
            name: "vm",
            version,
            cpus: 2,
            ram: vec![Ram { id: "ram0", mib: 256 }],
            source_ram: SourceRam::File,
            guest: String::new(),
            extra: Vec::new(),
            becomes_private: false,
        }
    }

    /// The program and its options.
    pub(crate) fn command_line(&self, scratch: &Scratch, side: Side) -> Vec<String> {
        let mut words = vec![self.version.program().display().to_string()];
        let mut add = |text: &str| words.extend(text.split(' ').map(str::to_owned));
        add("-accel tcg -cpu max -nodefaults -display none -no-reboot");
        let main = self.ram.iter().find(|ram| ram.id == "ram0");
        // Both sides have the same RAM blocks, and a default one has this name.
        let is_default = self.source_ram == SourceRam::Default;
        let main_id = if is_default { "pc.ram" } else { "ram0" };
        let has_backend = main.is_some() && !(is_default && side == Side::Source);
        let backend =
            if has_backend { format!(",memory-backend={main_id}") } else { String::new() };
        add(&format!("-machine q35{backend} -smp {}", self.cpus));
        match (main, self.ram.len()) {
            (Some(main), 1) => add(&format!("-m {}M", main.mib)),
            (Some(main), slots) => add(&format!("-m {}M,slots={slots},maxmem=4G", main.mib)),
            (None, _) => add(&format!("-m {}M", self.ram.iter().map(|ram| ram.mib).sum::<u64>())),
        }
        let is_private = self.becomes_private && matches!(side, Side::Destination);
        let share = if is_private { "off" } else { "on" };
        for Ram { id, mib } in &self.ram {
            let path = self.ram_file(scratch, side, id);
            let file = |id: &str, share: &str| {
                let path = path.display();
                format!(
                    "-object memory-backend-file,id={id},size={mib}M,share={share},mem-path={path}"
                )
            };
            // Of a file the block's name has a path in front, unless this is said.
            let plain = ",x-use-canonical-path-for-ramblock-id=off";
            match (self.source_ram, side) {
                _ if *id != "ram0" => add(&file(id, share)),
                (SourceRam::Default, Side::Source) => {}
                (SourceRam::PrivateFile, Side::Source) => add(&file(id, "off")),
                (SourceRam::Memfd, Side::Source) => {
                    add(&format!("-object memory-backend-memfd,id={id},size={mib}M"));
                }
                (SourceRam::Default | SourceRam::Memfd, Side::Destination) => {
                    add(&(file(main_id, share) + plain));
                }
                (SourceRam::File | SourceRam::PrivateFile, _) => add(&file(id, share)),
            }
            if main.is_none() {
                add(&format!("-numa node,memdev={id}"));
            } else if *id != "ram0" {
                add(&format!("-device pc-dimm,id=dimm-{id},memdev={id}"));
            }
        }
        let serial = self.serial_file(scratch, side);
        add(&format!("-serial file:{}", serial.display()));
        for monitor in ["umem", "test"] {
            let socket = self.socket(scratch, side, monitor);
            add(&format!("-qmp unix:{},server=on,wait=off", socket.display()));
        }
        if !self.guest.is_empty() {
            let kernel = provided("UMEM_TEST_KERNEL", "vmlinuz");
            let initrd = provided("UMEM_TEST_INITRD", "initramfs");
            add(&format!("-kernel {} -initrd {}", kernel.display(), initrd.display()));
            words.push("-append".into());
            // On a busy host an emulated timer ticks too late for the kernel's check of it.
            let kernel = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check";
            words.push(format!("{kernel} {}", self.guest));
        }
        words.extend(self.extra.iter().cloned());
        words
    }

    pub(crate) fn ram_file(&self, scratch: &Scratch, side: Side, id: &str) -> PathBuf {
        scratch.ram(&format!("{}-{}-{id}", self.name, side.name()))
    }

    pub(crate) fn serial(&self, scratch: &Scratch, side: Side) -> Serial {
        Serial::follow(&self.serial_file(scratch, side))
    }

    /// A QMP socket: one is for umem, another for the test.
    pub(crate) fn socket(&self, scratch: &Scratch, side: Side, monitor: &str) -> PathBuf {
        scratch.path(&format!("{}-{}-{monitor}.qmp", self.name, side.name()))
    }

    fn serial_file(&self, scratch: &Scratch, side: Side) -> PathBuf {
        scratch.path(&format!("{}-{}.log", self.name, side.name()))
    }

    /// Starts it as a source.
    pub(crate) fn start(&self, scratch: &Scratch) -> Qemu {
        let words = self.command_line(scratch, Side::Source);
        let test = self.socket(scratch, Side::Source, "test");
        let umem = self.socket(scratch, Side::Source, "umem");
        Qemu::start(&words, &test, umem, self.serial(scratch, Side::Source))
    }
}

/// A running QEMU, ended when it is dropped.
pub(crate) struct Qemu {
    process: Process,
    pub(crate) qmp: Qmp,
    /// The monitor for umem.
    pub(crate) socket: PathBuf,
    pub(crate) serial: Serial,
}

impl Qemu {
    /// Starts a program with its options, which make a QMP socket at `qmp` for the test.
    pub(crate) fn start(words: &[String], qmp: &Path, socket: PathBuf, serial: Serial) -> Qemu {
        let (program, options) = words.split_first().expect("a program");
        let mut command = Command::new(program);
        command.args(options).stdin(Stdio::null()).stdout(Stdio::null());
        let mut process = Process::start(&mut command);
        let what = format!("{program} to make {}", qmp.display());
        wait_for(what, || {
            let status = process.status();
            assert!(status.is_none(), "{} ended: {status:?}", words.join(" "));
            qmp.exists().then_some(())
        });
        let qmp = Qmp::connect(qmp);
        Qemu { process, qmp, socket, serial }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.process.wait()
    }
}
