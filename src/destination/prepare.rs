//! Before any lane: start the monitor or wait for one to come, take over its memory, check that it can
//! receive a guest.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use umem_wire::{Agreement, PageSize, Region, RegionId, RegionTable};

use super::guest::{COPIED_PAGE_BYTES_MAX, FaultSource, GuestRegion, Part, RegionSetup};
use super::side::{GuestProcess, GuestSide};
use super::{Note, Options};
use crate::error::{Error, Result};
use crate::fault::handoff::{Handed, HandoffListener, HandoffSocket, Message};
use crate::fault::uffd::Uffd;
use crate::host::command::{self, Monitor, RamPath, Sockets, Start};
use crate::host::qemu::{HOW_TO_START, Qemu};
use crate::host::qmp::Qmp;
use crate::host::{DestinationHost, command::is_qemu};
use crate::inbox::{Inbox, Wake};
use crate::memory::kind::Kind;
use crate::memory::region::RamFile;

/// A monitor maps its RAM within a second of its start; a machine under load gets this long.
const HANDOFF_TIMEOUT: Duration = Duration::from_secs(60);

/// How long after its sockets have closed a process may take to end.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a QMP socket that is not there yet is tried.
const QMP_INTERVAL: Duration = Duration::from_millis(20);

/// Pieces that all hand-over messages together may have, and userfaultfds that may come with them.
const PIECES_MAX: usize = 4096;

/// A guest that waits for its memory.
pub(crate) struct Prepared {
    pub(crate) side: GuestSide,
    pub(crate) host: Option<Box<dyn DestinationHost>>,
    handed: Vec<Handed>,
}

/// What [`Prepared::adopt`] makes of the guest's memory.
pub(crate) struct Adopted {
    /// In the source's order.
    pub(crate) regions: Vec<GuestRegion>,
    pub(crate) sources: Vec<FaultSource>,
    /// The source's table in landing units.
    pub(crate) landing: RegionTable,
}

/// A guest's process that is to come, or has been started and is to hand over its memory.
pub(crate) struct Expected<'a> {
    options: &'a Options,
    /// Where a process that is not given the preload object hands over.
    listener: Option<HandoffListener>,
}

impl Expected<'_> {
    /// Makes what the guest's process needs to be there before it.
    pub(crate) fn new(options: &Options) -> Result<Expected<'_>> {
        if options.command.is_empty() && options.handoff.is_none() {
            return Err(Error::Usage(
                "no COMMAND: write the guest's monitor after --, such as `umem incoming tcp::4444 \
                 -- qemu-system-x86_64 …`, or say with --handoff where one will hand over its memory"
                    .into(),
            ));
        }
        let listener = options.handoff.as_deref().map(HandoffListener::bind).transpose()?;
        Ok(Expected { options, listener })
    }

    /// Nobody has started the guest's process yet.
    pub(crate) fn is_to_come(&self) -> bool {
        self.options.command.is_empty()
    }

    /// Starts it, if that is ours to do, and waits for its memory.
    pub(crate) fn prepare(self, inbox: &Inbox<Note>) -> Result<Prepared> {
        let options = self.options;
        let [program, arguments @ ..] = options.command.as_slice() else {
            let listener = self.listener.expect("there is a COMMAND or a hand-over socket");
            return take_over_stranger(options, &listener, inbox);
        };
        let qemu = is_qemu(program);
        let ram = match self.listener {
            None => ram_files(options, program, arguments)?,
            Some(_) => Vec::new(),
        };
        let start = Start {
            command: &options.command,
            ram: &ram,
            kind: options.kind,
            preload: options.preload.as_deref(),
            hands_over: self.listener.is_some(),
            add_qmp: qemu && options.qmp.is_none(),
        };
        let (mut monitor, sockets) = command::start(&start)?;
        let Sockets { handoff, qmp } = sockets;
        let (handoff, memory) = match (self.listener, handoff) {
            (Some(listener), _) => accept_memory(&listener, &mut monitor, inbox)?,
            (None, handoff) => {
                let stream = handoff.expect("the preload object has a socket");
                let mut handoff = HandoffSocket::new(stream);
                let memory = take_over(&ram, &monitor, &mut handoff, inbox)?;
                (handoff, memory)
            }
        };
        let host = host(options, qmp, &monitor, inbox)?;
        let Memory { handed, knows_umem, keeps_sessions } = memory;
        let process = GuestProcess::new(monitor, handoff, knows_umem, keeps_sessions);
        Ok(Prepared { side: GuestSide::Process(Box::new(process)), host, handed })
    }
}

/// What has been handed over.
struct Memory {
    handed: Vec<Handed>,
    knows_umem: bool,
    keeps_sessions: bool,
}

/// Waits for a process of whomever, and its memory.
fn take_over_stranger(
    options: &Options,
    listener: &HandoffListener,
    inbox: &Inbox<Note>,
) -> Result<Prepared> {
    loop {
        match inbox.wait(&[listener.as_fd()], None)? {
            Wake::Signal => return Err(Error::Interrupted("no guest had come".into())),
            Wake::Ready(_) => {}
            Wake::Message(_) | Wake::Timeout => continue,
        }
        let (mut handoff, pid) = match listener.accept()? {
            Ok(accepted) => accepted,
            Err(why) => {
                eprintln!("umem: ignored a connection to the hand-over socket: {why}");
                continue;
            }
        };
        let mut monitor = Monitor::follow(pid)?;
        let memory = receive_memory(&mut handoff, &mut monitor, pid, inbox)?;
        let Some(memory) = memory else { continue };
        let host = host(options, None, &monitor, inbox)?;
        let Memory { handed, knows_umem, keeps_sessions } = memory;
        let process = GuestProcess::new(monitor, handoff, knows_umem, keeps_sessions);
        return Ok(Prepared { side: GuestSide::Process(Box::new(process)), host, handed });
    }
}

/// Waits until the process that we have started, or one that it has started, hands over its memory.
fn accept_memory(
    listener: &HandoffListener,
    monitor: &mut Monitor,
    inbox: &Inbox<Note>,
) -> Result<(HandoffSocket, Memory)> {
    let deadline = Instant::now() + HANDOFF_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match inbox.wait(&[listener.as_fd(), monitor.exited()], Some(left))? {
            Wake::Signal => return Err(Error::Interrupted("no guest had arrived".into())),
            Wake::Timeout => {
                return Err(Error::Host(
                    "COMMAND has not handed over its memory: give it the path that --handoff names"
                        .into(),
                ));
            }
            Wake::Ready(0) => {}
            Wake::Ready(_) => {
                return Err(Error::Host(
                    "it exited before it handed over its memory (its own messages say why)".into(),
                ));
            }
            Wake::Message(_) => continue,
        }
        let (mut handoff, pid) = match listener.accept()? {
            Ok(accepted) => accepted,
            Err(why) => {
                eprintln!("umem: ignored a connection to the hand-over socket: {why}");
                continue;
            }
        };
        if let Some(memory) = receive_memory(&mut handoff, monitor, pid, inbox)? {
            return Ok((handoff, memory));
        }
    }
}

/// None when the process has closed the socket without handing anything over.
fn receive_memory(
    handoff: &mut HandoffSocket,
    monitor: &mut Monitor,
    pid: u32,
    inbox: &Inbox<Note>,
) -> Result<Option<Memory>> {
    let mut memory = Memory { handed: Vec::new(), knows_umem: true, keeps_sessions: true };
    let deadline = Instant::now() + HANDOFF_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let extra = [handoff.stream().as_fd(), monitor.exited()];
        match inbox.wait(&extra, Some(left))? {
            Wake::Signal => return Err(Error::Interrupted("no guest had arrived".into())),
            Wake::Timeout => {
                return Err(Error::Preload("the hand-over message has not come".into()));
            }
            Wake::Ready(0) => {}
            Wake::Ready(_) => {
                return Err(Error::Host("it ended as it handed over its memory".into()));
            }
            Wake::Message(_) => continue,
        }
        let Some(messages) = handoff.read()? else {
            handoff.explain_end()?;
            if memory.handed.is_empty() {
                return Ok(None);
            }
            return Err(Error::Preload("the last hand-over message has not come".into()));
        };
        for message in messages {
            let Message::Memory { pieces, more, knows_umem, keeps_sessions } = message else {
                continue;
            };
            if memory.handed.is_empty() {
                monitor.hold(pid)?;
            }
            memory.handed.extend(pieces);
            memory.knows_umem &= knows_umem;
            memory.keeps_sessions &= keeps_sessions;
            if memory.handed.len() > PIECES_MAX {
                return Err(Error::Preload(format!(
                    "more than {PIECES_MAX} pieces of memory were handed over"
                )));
            }
            if !more {
                return Ok(Some(memory));
            }
        }
    }
}

/// The guest's RAM files: as named, or as a QEMU's own options say. A QEMU's options are checked.
fn ram_files(options: &Options, program: &str, arguments: &[String]) -> Result<Vec<RamPath>> {
    let found =
        if is_qemu(program) { command::ram_of_qemu(arguments, options.kind)? } else { Vec::new() };
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
) -> Result<Memory> {
    let mut missing: HashMap<&str, ()> = ram.iter().map(|ram| (ram.name.as_str(), ())).collect();
    let (mut handed, mut all_keep_sessions) = (Vec::new(), true);
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
                Message::Memory { pieces, keeps_sessions, .. } => {
                    all_keep_sessions &= keeps_sessions;
                    for piece in pieces {
                        let name = piece.name.as_deref().unwrap_or_default();
                        if missing.remove(name).is_some() {
                            handed.push(piece);
                        }
                    }
                }
                Message::Released | Message::Session(_) => {}
            }
        }
    }
    Ok(Memory { handed, knows_umem: true, keeps_sessions: all_keep_sessions })
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
    qemu.check(options.kind)?;
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

impl Prepared {
    /// Memory of this process.
    pub(crate) fn here(handed: Vec<Handed>) -> Result<Prepared> {
        Ok(Prepared { side: GuestSide::here()?, host: None, handed })
    }

    /// Memory that was handed over to a process before this.
    pub(crate) fn again(side: GuestSide, handed: Vec<Handed>) -> Prepared {
        Prepared { side, host: None, handed }
    }

    /// Compares the source's regions with ours, checks that they fit, and makes the guest's memory of
    /// them in the source's order.
    pub(crate) fn adopt(&mut self, theirs: &RegionTable) -> Result<Adopted> {
        self.adopt_if(theirs, check_space)
    }

    /// The same where a process before this has checked that there is room: some of it is taken now.
    pub(crate) fn adopt_again(&mut self, landing: &RegionTable) -> Result<Adopted> {
        self.adopt_if(landing, |_| Ok(()))
    }

    fn adopt_if(
        &mut self,
        theirs: &RegionTable,
        check_space: impl FnOnce(&[Found]) -> Result<()>,
    ) -> Result<Adopted> {
        let mut found = self.regions(theirs)?;
        let ours = found
            .iter()
            .map(|region| Region {
                name: region.name.clone(),
                bytes: region.bytes,
                page_size: PageSize::from_shift(region.page_shift).expect("a page size"),
            })
            .collect();
        let ours = RegionTable::new(ours).map_err(|error| Error::Unsupported(error.to_string()))?;
        let Agreement { ids, landing } =
            ours.compare(theirs).map_err(|mismatch| Error::Unsupported(mismatch.to_string()))?;
        for (id, (_, landed)) in ids.iter().zip(landing.iter()) {
            found[usize::from(id.0)].set_unit(landed.page_size)?;
        }
        check_space(&found)?;
        let mut sources = Vec::new();
        let mut found: Vec<_> = found.into_iter().map(Some).collect();
        let mut take = |id: &RegionId| {
            let region = found[usize::from(id.0)].take().expect("ids are distinct");
            region.adopt(&mut sources)
        };
        let regions = ids.iter().map(&mut take).collect();
        Ok(Adopted { regions, sources, landing })
    }

    /// Puts the pieces together that are of one region.
    fn regions(&mut self, theirs: &RegionTable) -> Result<Vec<Found>> {
        let mut by_name: BTreeMap<String, Vec<Handed>> = BTreeMap::new();
        for piece in self.handed.drain(..) {
            let name = match &piece.name {
                Some(name) => name.clone(),
                None if theirs.len() == 1 => {
                    let (_, only) = theirs.iter().next().expect("a table is never empty");
                    only.name.clone()
                }
                None => {
                    return Err(Error::Unsupported(format!(
                        "the guest here has handed over its memory without names, so there must be \
                         one region at the source, not {}: one --ram with the whole of it",
                        theirs.len()
                    )));
                }
            };
            by_name.entry(name).or_default().push(piece);
        }
        by_name.into_iter().map(|(name, pieces)| Found::new(name, pieces)).collect()
    }
}

/// A region of the guest, as it was handed over.
struct Found {
    name: String,
    kind: Kind,
    bytes: u64,
    page_shift: u8,
    unit_shift: u8,
    file: Option<RamFile>,
    parts: Vec<(Part, Uffd)>,
}

impl Found {
    fn new(name: String, mut pieces: Vec<Handed>) -> Result<Found> {
        pieces.sort_by_key(|piece| piece.offset);
        let (kind, page_shift) = (pieces[0].kind, pieces[0].page_shift);
        let unlike = |piece: &Handed| piece.kind != kind || piece.page_shift != page_shift;
        if pieces.iter().any(unlike) {
            return Err(Error::Unsupported(format!(
                "RAM {name} was handed over in pieces of different kinds or page sizes"
            )));
        }
        let mut bytes = 0;
        let mut file = None;
        let mut parts = Vec::new();
        for piece in pieces {
            if piece.offset != bytes {
                return Err(Error::Unsupported(format!(
                    "RAM {name} was handed over with a gap or an overlap at its byte {bytes}: the \
                     pieces' offsets and sizes must cover it once"
                )));
            }
            bytes += piece.bytes;
            if let (None, Some(opened)) = (&file, piece.file) {
                file = Some(RamFile::from_handoff(&name, opened)?);
            }
            let Handed { address, bytes, offset, uffd, .. } =
                Handed { name: None, file: None, ..piece };
            parts.push((Part { offset, bytes, address, source: 0 }, uffd));
        }
        if let Some(file) = file.as_ref().filter(|file| file.bytes != bytes) {
            return Err(Error::Unsupported(format!(
                "RAM {name}: the guest maps {bytes} bytes of a file of {} bytes; give the backend \
                 the size of its file",
                file.bytes
            )));
        }
        let page_shift = file.as_ref().map_or(page_shift, |file| file.page_shift);
        if kind == Kind::Private && page_shift != 12 {
            return Err(Error::Unsupported(format!(
                "RAM {name}: --kind private needs a file of 4 KiB pages, on tmpfs; use --kind \
                 shared, or anonymous memory, for hugetlbfs"
            )));
        }
        Ok(Found { name, kind, bytes, page_shift, unit_shift: page_shift, file, parts })
    }

    fn set_unit(&mut self, unit: PageSize) -> Result<()> {
        self.unit_shift = unit.shift();
        let is_whole = |(part, _): &(Part, Uffd)| {
            part.offset.is_multiple_of(unit.bytes()) && part.bytes.is_multiple_of(unit.bytes())
        };
        if !self.parts.iter().all(is_whole) {
            return Err(Error::Unsupported(format!(
                "RAM {} comes in pages of {unit}, and was handed over in pieces that are not \
                 multiples of that",
                self.name
            )));
        }
        if self.kind == Kind::Anonymous && unit.bytes() > COPIED_PAGE_BYTES_MAX {
            return Err(Error::Unsupported(format!(
                "RAM {} has pages of {unit}: anonymous memory can be filled with pages of 4 KiB and \
                 2 MiB",
                self.name
            )));
        }
        Ok(())
    }

    /// Makes the region; userfaultfds that are not among the sources yet come to them.
    fn adopt(self, sources: &mut Vec<FaultSource>) -> GuestRegion {
        let Found { name, kind, bytes, page_shift, unit_shift, file, parts } = self;
        let parts = parts
            .into_iter()
            .map(|(part, uffd)| {
                let is_same = |source: &FaultSource| {
                    Arc::ptr_eq(&source.uffd.descriptor(), &uffd.descriptor())
                };
                let source = sources.iter().position(is_same).unwrap_or_else(|| {
                    sources.push(FaultSource::new(uffd));
                    sources.len() - 1
                });
                Part { source, ..part }
            })
            .collect();
        let setup = RegionSetup { name, kind, bytes, unit_shift, page_shift, file, parts };
        GuestRegion::new(setup)
    }
}

/// The RAM files' file systems, and the machine, must have room for every page: the guest could
/// not be brought back once it runs here.
fn check_space(regions: &[Found]) -> Result<()> {
    for (region, file) in regions.iter().filter_map(|r| Some((r, r.file.as_ref()?))) {
        // A private file holds little of its region at a time.
        if region.kind == Kind::Private {
            continue;
        }
        let free = file.free_bytes()?;
        let needed = file.bytes - file.allocated_bytes()?.min(file.bytes);
        if let Some(free) = free.filter(|&free| free < needed) {
            return Err(Error::OutOfMemory(format!(
                "RAM {} needs {} MiB and its file system at the destination has {} MiB free: make \
                 room there (for /dev/shm: `mount -o remount,size=…`)",
                region.name,
                needed >> 20,
                free >> 20
            )));
        }
    }
    let is_hugetlb = |r: &&Found| match &r.file {
        Some(file) => file.on_hugetlb,
        None => r.page_shift != 12,
    };
    let needed: u64 = regions.iter().filter(|r| !is_hugetlb(r)).map(|r| r.bytes).sum();
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
