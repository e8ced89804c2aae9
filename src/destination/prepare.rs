//! Before any lane: start the monitor, take over its memory, check that it can receive a guest.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use umem_wire::{Agreement, PageSize, Region, RegionId, RegionTable};

use super::guest::GuestRegion;
use super::{Note, Options};
use crate::error::{Error, Result};
use crate::fault::handoff::{Handed, HandoffSocket, Message};
use crate::host::command::{self, Monitor, RamPath, Sockets, Start};
use crate::host::qemu::{HOW_TO_START, Qemu};
use crate::host::qmp::Qmp;
use crate::host::{DestinationHost, command::is_qemu};
use crate::inbox::{Inbox, Wake};
use crate::memory::region::RamFile;

/// A monitor maps its RAM within a second of its start; a machine under load gets this long.
const HANDOFF_TIMEOUT: Duration = Duration::from_secs(60);

/// How long after its sockets have closed a process may take to end.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a QMP socket that is not there yet is tried.
const QMP_INTERVAL: Duration = Duration::from_millis(20);

/// A guest that waits for its memory.
pub(crate) struct Prepared {
    pub(crate) monitor: Monitor,
    pub(crate) handoff: HandoffSocket,
    pub(crate) host: Option<Box<dyn DestinationHost>>,
    /// In our order until [`Prepared::adopt`], in the source's then.
    pub(crate) regions: Vec<GuestRegion>,
}

pub(crate) fn guest(options: &Options, inbox: &Inbox<Note>) -> Result<Prepared> {
    let [program, arguments @ ..] = options.command.as_slice() else {
        return Err(Error::Usage(
            "no COMMAND: write the guest's monitor after --, such as `umem incoming tcp::4444 -- \
             qemu-system-x86_64 …`"
                .into(),
        ));
    };
    let qemu = is_qemu(program);
    let ram = ram_files(options, program, arguments)?;
    let start = Start {
        command: &options.command,
        ram: &ram,
        preload: options.preload.as_deref(),
        add_qmp: qemu && options.qmp.is_none(),
    };
    let (monitor, sockets) = command::start(&start)?;
    let Sockets { handoff, qmp } = sockets;
    let mut handoff = HandoffSocket::new(handoff);
    let handed = take_over(&ram, &monitor, &mut handoff, inbox)?;
    let host = host(options, qmp, &monitor, inbox)?;
    let regions = handed.into_iter().map(open_region).collect::<Result<_>>()?;
    Ok(Prepared { monitor, handoff, host, regions })
}

/// The guest's RAM files: as named, or as a QEMU's own options say. A QEMU's options are checked.
fn ram_files(options: &Options, program: &str, arguments: &[String]) -> Result<Vec<RamPath>> {
    let found = if is_qemu(program) { command::ram_of_qemu(arguments)? } else { Vec::new() };
    match (options.ram.as_slice(), is_qemu(program)) {
        ([], true) if found.is_empty() => Err(Error::Unsupported(format!(
            "COMMAND has no RAM that can be filled from outside: {HOW_TO_START}, or name the files \
             with --ram NAME=PATH"
        ))),
        ([], true) => Ok(found),
        ([], false) => Err(Error::Usage(format!(
            "{program} is no QEMU whose options could be read: name its RAM files with --ram \
             NAME=PATH"
        ))),
        (named, _) => Ok(named.to_vec()),
    }
}

/// Waits until each of the RAM files has been handed over.
fn take_over(
    ram: &[RamPath],
    monitor: &Monitor,
    handoff: &mut HandoffSocket,
    inbox: &Inbox<Note>,
) -> Result<Vec<Handed>> {
    let mut missing: HashMap<&str, ()> = ram.iter().map(|ram| (ram.name.as_str(), ())).collect();
    let mut handed = Vec::new();
    let mut loaded = false;
    let deadline = Instant::now() + HANDOFF_TIMEOUT;
    while !missing.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        let extra = [handoff.stream().as_fd(), monitor.exited()];
        let messages = match inbox.wait(&extra, Some(left))? {
            Wake::Signal => return Err(Error::Interrupted("no guest had arrived".into())),
            Wake::Timeout => return Err(never_handed_over(loaded, &missing)),
            Wake::Ready(0) => handoff.read()?,
            Wake::Ready(_) => return Err(exited(loaded, &missing)),
            Wake::Message(_) => continue,
        };
        let Some(messages) = messages else {
            return Err(closed(monitor, inbox, loaded, &missing)?);
        };
        for message in messages {
            match message {
                Message::Loaded => loaded = true,
                Message::Region(region) => {
                    if missing.remove(region.name.as_str()).is_some() {
                        handed.push(region);
                    }
                }
                Message::Released => {}
            }
        }
    }
    Ok(handed)
}

/// Why the hand-over socket was closed: mostly because the process is ending, which shows a moment
/// later.
fn closed(
    monitor: &Monitor,
    inbox: &Inbox<Note>,
    loaded: bool,
    missing: &HashMap<&str, ()>,
) -> Result<Error> {
    let deadline = Instant::now() + EXIT_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        return Ok(match inbox.wait(&[monitor.exited()], Some(left))? {
            Wake::Signal => Error::Interrupted("no guest had arrived".into()),
            Wake::Ready(_) => exited(loaded, missing),
            Wake::Timeout => never_handed_over(loaded, missing),
            Wake::Message(_) => continue,
        });
    }
}

fn exited(loaded: bool, missing: &HashMap<&str, ()>) -> Error {
    if !loaded {
        return never_handed_over(loaded, missing);
    }
    let names = names(missing);
    Error::Host(format!("it exited before it mapped RAM {names} (its own messages say why)"))
}

fn names(missing: &HashMap<&str, ()>) -> String {
    missing.keys().copied().collect::<Vec<_>>().join(", ")
}

fn never_handed_over(loaded: bool, missing: &HashMap<&str, ()>) -> Error {
    let names = names(missing);
    Error::Preload(if loaded {
        format!(
            "COMMAND never mapped RAM {names}: check that its mem-path is the file named here and \
             that share=on"
        )
    } else {
        "the preload object was not loaded into COMMAND: it must be a dynamically linked program \
         that is neither setuid nor started through a program that clears LD_PRELOAD"
            .into()
    })
}

/// Connects to the monitor where it speaks QMP, and checks that it waits for a guest we can bring.
fn host(
    options: &Options,
    inherited: Option<UnixStream>,
    monitor: &Monitor,
    inbox: &Inbox<Note>,
) -> Result<Option<Box<dyn DestinationHost>>> {
    let qmp = match (inherited, &options.qmp) {
        (Some(stream), _) => Qmp::open(stream, "QEMU's monitor")?,
        (None, Some(path)) => connect(path, monitor, inbox)?,
        (None, None) => return Ok(None),
    };
    let mut qemu = Qemu::new(qmp);
    qemu.check()?;
    Ok(Some(Box::new(qemu)))
}

/// Waits until the monitor has made its socket: it may not be there yet, or be there and not listen
/// yet.
fn connect(path: &Path, monitor: &Monitor, inbox: &Inbox<Note>) -> Result<Qmp> {
    let deadline = Instant::now() + HANDOFF_TIMEOUT;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Qmp::open(stream, &path.display().to_string()),
            Err(_) if Instant::now() < deadline => {}
            Err(_) => return Qmp::connect(path),
        }
        match inbox.wait(&[monitor.exited()], Some(QMP_INTERVAL))? {
            Wake::Signal => return Err(Error::Interrupted("no guest had arrived".into())),
            Wake::Ready(_) => {
                return Err(Error::Host("it exited at once (its own messages say why)".into()));
            }
            Wake::Message(_) | Wake::Timeout => {}
        }
    }
}

fn open_region(handed: Handed) -> Result<GuestRegion> {
    let Handed { name, address, bytes, uffd, file } = handed;
    let ram = RamFile::from_handoff(&name, file)?;
    if ram.bytes != bytes {
        return Err(Error::Unsupported(format!(
            "RAM {name}: the guest maps {bytes} bytes of a file of {} bytes; give the backend the \
             size of its file",
            ram.bytes
        )));
    }
    Ok(GuestRegion::new(ram, uffd, address))
}

impl Prepared {
    /// Compares the source's regions with ours, checks that they fit, and takes their order. The
    /// answer is the landing table.
    pub(crate) fn adopt(&mut self, theirs: &RegionTable) -> Result<RegionTable> {
        let ours = self
            .regions
            .iter()
            .map(|region| Region {
                name: region.ram.name.clone(),
                bytes: region.ram.bytes,
                page_size: PageSize::from_shift(region.ram.page_shift).expect("a page size"),
            })
            .collect();
        let ours = RegionTable::new(ours).map_err(|error| Error::Unsupported(error.to_string()))?;
        let Agreement { ids, landing } =
            ours.compare(theirs).map_err(|mismatch| Error::Unsupported(mismatch.to_string()))?;
        check_units(&ours, &ids, &landing)?;
        check_space(&self.regions)?;
        let mut regions: Vec<_> = self.regions.drain(..).map(Some).collect();
        let take = |id: &RegionId| regions[usize::from(id.0)].take();
        self.regions = ids.iter().map(take).map(|r| r.expect("ids are distinct")).collect();
        Ok(landing)
    }
}

/// Pages land as they are here: the source's may be smaller, not larger.
fn check_units(ours: &RegionTable, ids: &[RegionId], landing: &RegionTable) -> Result<()> {
    for (id, (_, landed)) in ids.iter().zip(landing.iter()) {
        let Some(region) = ours.get(*id).filter(|region| region.page_size < landed.page_size)
        else {
            continue;
        };
        return Err(Error::Unsupported(format!(
            "RAM {} has {} pages at the source and {} pages at the destination: give the guest a \
             hugetlbfs file with pages of {} there",
            region.name, landed.page_size, region.page_size, landed.page_size
        )));
    }
    Ok(())
}

/// The RAM files' file systems, and the machine, must have room for every page: the guest could
/// not be brought back once it runs here.
fn check_space(regions: &[GuestRegion]) -> Result<()> {
    for region in regions {
        let ram = &region.ram;
        let free = ram.free_bytes()?;
        let needed = ram.bytes - ram.allocated_bytes()?.min(ram.bytes);
        if let Some(free) = free.filter(|&free| free < needed) {
            return Err(Error::OutOfMemory(format!(
                "RAM {} needs {} MiB and its file system at the destination has {} MiB free: make \
                 room there (for /dev/shm: `mount -o remount,size=…`)",
                ram.name,
                needed >> 20,
                free >> 20
            )));
        }
    }
    let needed: u64 = regions.iter().filter(|r| !r.ram.on_hugetlb).map(|r| r.ram.bytes).sum();
    let available = available_bytes();
    if let Some(available) = available.filter(|&available| available < needed) {
        return Err(Error::OutOfMemory(format!(
            "the guest has {} MiB of RAM and the destination {} MiB of memory available: free some \
             there",
            needed >> 20,
            available >> 20
        )));
    }
    Ok(())
}

/// What the kernel thinks can be allocated without swapping (`MemAvailable`, proc(5)).
fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}
