//! A migration stream that another program begins: it has told QEMU to migrate into umem's socket.
//!
//! ```text
//! manager: migrate unix:PATH                                      (continues with both sides)
//! QEMU:    | head | all pages … what was written … | stops the guest, rest, state | completes
//! umem:    | head | reads as far as there is room   | reads on                    | SHUT
//! ```
//!
//! umem takes all information from the stream: its head ([`Opening`]) names the RAM blocks and shows whether there is a
//! return path, without which QEMU would call the migration complete as it writes the last byte. QEMU decides when its
//! guest stops, from the speed of umem's reading: with a bound on waiting pages that is the speed of the lanes, and
//! without a bound it is the speed of this machine.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use umem_wire::RegionId;
use umem_wire::limits::STATE_BYTES_MAX;

use super::reading::Reading;
use super::sorting::Moved;
use super::{Block, Event, Parser};
use crate::error::{Context, Error, Result};
use crate::host::command::RamPath;
use crate::host::kind::{LeavingGuest, check_ram_name};
use crate::host::monitor::{BeforeStop, Handle, Monitor};
use crate::host::qemu::saving::{self, Saving};
use crate::host::qemu::{GUEST_IS_PAUSED, GUEST_RUNS, Qemu, run_state};
use crate::host::qmp::Qmp;
use crate::memory::dirty::{DirtyLog, DirtyMap};
use crate::memory::staging::{StagedFile, Staging};
use crate::runtime::os_text::absolute;

/// Bytes of a stream before its first page at most: names and sizes of blocks, and the surplus of one read.
const HEAD_BYTES_MAX: usize = 1 << 20;

/// How long lanes wait for more pages while QEMU writes slowly.
const LOOKS_EVERY: Duration = Duration::from_millis(100);

/// Interval of the check for the end of RAM meanwhile.
const INTERVAL: Duration = Duration::from_millis(5);

/// Time limit for QEMU to close its stream after the acknowledgement.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// The head of a stream: from its first byte to its first page.
pub(crate) struct Opening {
    parser: Parser,
    bytes: Vec<u8>,
    has_pages: bool,
}

impl Opening {
    pub(crate) fn new() -> Opening {
        Opening { parser: Parser::new(), bytes: Vec::new(), has_pages: false }
    }

    /// Takes the next bytes. True once the head is whole.
    ///
    /// # Errors
    /// umem cannot carry the stream: the message names the capability of QEMU's that prevents it.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<bool> {
        let has_pages = &mut self.has_pages;
        self.parser.read(bytes, |_, event| {
            *has_pages |= matches!(event, Event::Began { .. });
            Ok(())
        })?;
        self.bytes.extend_from_slice(bytes);
        if self.parser.ignores_shared() {
            return Err(refused(
                "x-ignore-shared",
                "off",
                "its stream lacks the guest's shared RAM",
            ));
        }
        if !self.has_pages && self.bytes.len() > HEAD_BYTES_MAX {
            return Err(Error::Host(format!(
                "its migration stream has no page in its first {} KiB",
                HEAD_BYTES_MAX >> 10
            )));
        }
        if self.has_pages && !self.parser.opens_return_path() {
            return Err(refused(
                "return-path",
                "on",
                "its migration would be complete when its last byte is written, whatever happens to the guest then",
            ));
        }
        Ok(self.has_pages)
    }

    /// The RAM blocks of the stream that are the guest's memory, each with the id of its backend.
    ///
    /// Blocks that belong to a machine, a device or the firmware (video memory, ROMs, flash) come with the device
    /// state. The destination knows which of its blocks wait for pages, and refuses a guest with others.
    fn guest_ram(&self) -> Vec<(String, u64)> {
        let is_ram = |block: &&Block| block.bytes > 0 && is_guest_ram(&block.name);
        let blocks = self.parser.blocks().iter().filter(is_ram);
        blocks.map(|block| (id_of(&block.name).to_owned(), block.bytes)).collect()
    }
}

/// The id of a block's backend. In some configurations of QEMU the block's name has a path in front.
fn id_of(name: &str) -> &str {
    name.rsplit_once('/').map_or(name, |(_, last)| last)
}

/// Whether a block is the memory of a backend: one with a path in QEMU's object tree, one with an id of the user's
/// choice, or the machine's own (`pc.ram`, `mach-virt.ram`). A device's block has the device's path in front, or a name
/// such as `vga.vram`.
fn is_guest_ram(name: &str) -> bool {
    if name.starts_with("/objects/") {
        return true;
    }
    if name.contains(['/', '@']) {
        return false;
    }
    match name.rsplit_once('.') {
        None => !name.starts_with("system.flash"),
        Some((_, kind)) => kind == "ram",
    }
}

fn refused(capability: &str, to_be: &str, why: &str) -> Error {
    Error::Unsupported(format!(
        "QEMU's migration has its capability {capability} {}, so that {why}: set {capability} {to_be} with \
         migrate-set-capabilities, and migrate again",
        if to_be == "on" { "off" } else { "on" },
    ))
}

/// The error for a second connection to the socket, from a QEMU that divides a stream between several.
pub(crate) fn several_channels() -> Error {
    refused(
        "multifd (or postcopy-preempt)",
        "off",
        "it opens more than one connection for its stream",
    )
}

/// The end of passes in a stream that QEMU paces.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pacing {
    /// Pages may be sent after the switchover: the bound on waiting pages is lifted in the end.
    pub(crate) postcopy: bool,
    /// The bound is lifted after this number of QEMU's passes.
    pub(crate) passes_max: u32,
    /// The bound is lifted after this time, too.
    pub(crate) timeout: Option<Duration>,
}

/// The source of a stream that has begun.
struct PassiveHost {
    shared: Arc<Shared>,
    /// The monitor that reports whether the guest stands still; None if the switchover is external.
    qemu: Option<Qemu>,
    /// The end of the stream's socket on which QEMU waits for an acknowledgement.
    held: Option<UnixStream>,
    state: Option<Vec<u8>>,
    pacing: Pacing,
}

struct Shared {
    /// The stream to be read; None once reading has begun.
    source: Mutex<Option<Begun>>,
    reading: Mutex<Option<Arc<Reading>>>,
    staging: Arc<Staging>,
    socket: UnixStream,
}

/// A stream whose head has been read.
struct Begun {
    socket: UnixStream,
    head: Vec<u8>,
    moved: Vec<Moved>,
}

impl Shared {
    fn reading(&self) -> Result<Arc<Reading>> {
        let reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        reading.clone().ok_or_else(|| Error::Internal("QEMU's stream has not been read".into()))
    }
}

impl PassiveHost {
    /// A host for the stream with this head. The regions are the blocks that are the guest's RAM, in their order, or
    /// with a monitor the blocks of the backends that it has named. Their contents go to `staging`.
    fn new(
        socket: UnixStream,
        opening: Opening,
        regions: &[String],
        staging: Arc<Staging>,
        qemu: Option<Qemu>,
        pacing: Pacing,
    ) -> Result<PassiveHost> {
        let blocks = opening.parser.blocks();
        let moved = |(index, id): (u16, &String)| {
            let mut named = blocks.iter().filter(|block| id_of(&block.name) == id);
            let (Some(block), None) = (named.next(), named.next()) else {
                return Err(Error::Host(format!(
                    "its migration stream has no one RAM block of {id}"
                )));
            };
            Ok(Moved { block: block.name.clone(), bytes: block.bytes, region: RegionId(index) })
        };
        let moved = (0..).zip(regions).map(moved).collect::<Result<Vec<_>>>()?;
        let what = || "the socket of QEMU's migration";
        let ours = socket.try_clone().context(what)?;
        let begun = Begun { socket, head: opening.bytes, moved };
        let shared = Shared {
            source: Mutex::new(Some(begun)),
            reading: Mutex::new(None),
            staging,
            socket: ours,
        };
        Ok(PassiveHost { shared: Arc::new(shared), qemu, held: None, state: None, pacing })
    }
}

impl Monitor for PassiveHost {
    fn name(&self) -> &'static str {
        "a QEMU that another program has migrate"
    }

    /// None without a monitor: only QEMU's manager could undo anything.
    fn handle(&self) -> Result<Option<Handle>> {
        self.qemu.as_ref().map_or(Ok(None), Qemu::handle)
    }

    fn before_stop(&mut self, note: BeforeStop) {
        if let Some(qemu) = &mut self.qemu {
            qemu.before_stop(note);
        }
    }

    fn dirty_log(&mut self) -> Option<Box<dyn DirtyLog>> {
        let log = PassiveLog {
            shared: self.shared.clone(),
            pacing: self.pacing,
            marks: None,
            deadline: None,
            is_bounded: true,
            is_in_part: false,
            has_stopped: false,
        };
        Some(Box::new(log))
    }

    /// QEMU has stopped its guest. The rest of the stream is its device state.
    fn stop(&mut self) -> Result<Option<Instant>> {
        let reading = self.shared.reading()?;
        if let Some(qemu) = &mut self.qemu {
            qemu.note_undo()?;
            qemu.may_be_stopped = true;
            qemu.qmp.has_run();
        }
        reading.finish();
        let is_live = self.qemu.as_ref().is_none_or(|qemu| qemu.is_live);
        let mut state = vec![if is_live { GUEST_RUNS } else { GUEST_IS_PAUSED }];
        state.extend(reading.stream()?);
        self.state = Some(state);
        let socket = self.shared.socket.try_clone().context(|| "the socket of QEMU's migration")?;
        match &mut self.qemu {
            Some(qemu) => qemu.saving = Saving::Held(socket),
            None => self.held = Some(socket),
        }
        Ok(reading.stopped_at())
    }

    fn save_state(&mut self) -> Result<Vec<u8>> {
        self.state.take().ok_or_else(|| Error::Internal("the device state was taken before".into()))
    }

    /// With a monitor this is as for every QEMU. Without one umem sends QEMU the acknowledgement, and QEMU completes
    /// its migration: from then on its manager knows that the guest may run at the destination. A QEMU that has given
    /// up meanwhile has closed its socket, or closes it with the acknowledgement unread.
    fn stands_still(&mut self) -> Result<()> {
        if let Some(qemu) = &mut self.qemu {
            return qemu.stands_still();
        }
        // The migration is complete, and the manager decides which guest runs.
        let Some(socket) = self.held.take() else { return Ok(()) };
        complete(&socket)
    }

    /// QEMU's migration fails, and QEMU itself resumes its guest.
    fn resume(&mut self) -> Result<()> {
        saving::abandon(&self.shared.socket);
        (self.state, self.held) = (None, None);
        *self.shared.reading.lock().unwrap_or_else(PoisonError::into_inner) = None;
        match &mut self.qemu {
            Some(qemu) => {
                if let Saving::Over = qemu.saving {
                    qemu.saving = Saving::Begun;
                }
                qemu.resume()
            }
            None => Ok(()),
        }
    }

    fn put_back(&mut self) -> Result<()> {
        self.qemu.as_mut().map_or(Ok(()), Qemu::put_back)
    }
}

/// Sends the acknowledgement to a QEMU that waits for it, and waits until QEMU has closed its stream.
fn complete(mut socket: &UnixStream) -> Result<()> {
    let what = || "ending QEMU's migration";
    let given_up = || {
        Error::Host(
            "its migration ended before the destination had the guest: the migration was cancelled or failed; ask \
             the program that began it"
            .into(),
        )
    };
    match recv(socket.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(0) | Err(Errno::ECONNRESET) => return Err(given_up()),
        _ => {}
    }
    socket.set_read_timeout(Some(END_PATIENCE)).context(what)?;
    match socket.write_all(&saving::SHUT) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => return Err(given_up()),
        written => written.context(what)?,
    }
    loop {
        return match socket.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => {
                Err(Error::Host("its stream has bytes after the end of the device state".into()))
            }
            // QEMU has closed the socket with unread data in it.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Err(given_up()),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => Err(error).context(what),
        };
    }
}

/// The stream as a log of its guest's writes. QEMU decides the end: a look is over when QEMU has stopped the guest, and
/// comes in parts until then.
struct PassiveLog {
    shared: Arc<Shared>,
    pacing: Pacing,
    marks: Option<Arc<DirtyMap>>,
    deadline: Option<Instant>,
    is_bounded: bool,
    is_in_part: bool,
    has_stopped: bool,
}

impl DirtyLog for PassiveLog {
    fn start(&mut self, marks: Arc<DirtyMap>) -> Result<()> {
        let begun = self.shared.source.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Begun { socket, head, moved }) = begun else {
            return Err(Error::Internal("QEMU's stream is being read".into()));
        };
        self.marks = Some(marks.clone());
        self.deadline = self.pacing.timeout.and_then(|after| Instant::now().checked_add(after));
        let to = (marks, Some(self.shared.staging.clone()));
        // The byte in front of the stream is umem's.
        let state_bytes_max = STATE_BYTES_MAX as usize - 1;
        let reading = Reading::go_on(socket, head, moved, to, state_bytes_max)?;
        *self.shared.reading.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Arc::new(reading));
        Ok(())
    }

    fn next(&mut self) -> Result<()> {
        let reading = self.shared.reading()?;
        let until = Instant::now() + LOOKS_EVERY;
        loop {
            self.has_stopped = reading.is_over()?;
            if self.has_stopped {
                self.is_in_part = false;
                return Ok(());
            }
            self.lift_bound(&reading);
            self.is_in_part = true;
            if self.shared.staging.wait_for_enough(INTERVAL) || Instant::now() >= until {
                return Ok(());
            }
        }
    }

    fn finish(&mut self) -> Result<()> {
        self.marks.iter().for_each(|marks| marks.set_elsewhere(0));
        Ok(())
    }

    fn is_in_part(&self) -> bool {
        self.is_in_part
    }

    fn has_stopped(&self) -> bool {
        self.has_stopped
    }
}

impl PassiveLog {
    /// If pages may follow, enough passes are followed by reading as fast as QEMU writes: the stream then comes to its
    /// end by itself, and the pages that the lanes have not sent by then wait.
    fn lift_bound(&mut self, reading: &Reading) {
        let is_late = self.deadline.is_some_and(|deadline| deadline <= Instant::now());
        let is_enough = is_late || reading.passes() >= self.pacing.passes_max;
        if self.is_bounded && self.pacing.postcopy && is_enough {
            self.is_bounded = false;
            self.shared.staging.keep_all();
        }
    }
}

/// The monitor of a QEMU that will be told to migrate, and the ids of its guest's RAM backends.
pub(crate) struct Asked {
    qemu: Qemu,
    names: Vec<String>,
}

/// Claims the guest of this monitor, if the guest can be moved. May block.
pub(crate) fn ask(socket: &Path) -> Result<Asked> {
    let mut qemu = Qemu::new(Qmp::connect(socket)?).at(absolute(socket)?);
    qemu.claim()?;
    let names: Vec<String> =
        qemu.check_source(true)?.into_iter().map(|backend| backend.name).collect();
    // All contents come with the stream.
    qemu.check_log(&names, &names, false).map(drop)?;
    Ok(Asked { qemu, names })
}

/// A guest whose stream has begun on this socket. Its monitor has named its RAM; without a monitor the stream's head
/// does.
///
/// # Errors
/// The stream is of another guest than the monitor's, or has no memory.
pub(crate) fn leaving(
    socket: UnixStream,
    opening: Opening,
    asked: Option<Asked>,
    is_checked: bool,
    pacing: Pacing,
) -> Result<LeavingGuest> {
    let found = opening.guest_ram();
    let (qemu, regions) = match asked {
        Some(Asked { mut qemu, names }) => {
            let bytes = |id: &String| found.iter().find(|(name, _)| name == id).map(|it| it.1);
            let region = |id: String| match bytes(&id) {
                Some(bytes) => Ok((id, bytes)),
                None => Err(Error::Host(format!(
                    "the QEMU of --qmp has RAM backend {id}, and the migration that arrived at --listen has no RAM \
                     block of this backend: give --qmp the monitor of the QEMU that migrates"
                ))),
            };
            let regions = names.into_iter().map(region).collect::<Result<Vec<_>>>()?;
            let status = run_state::status(&mut qemu.qmp)?;
            qemu.is_live = run_state::is_live(&status);
            (Some(qemu), regions)
        }
        None => (None, found),
    };
    if regions.is_empty() {
        return Err(Error::Unsupported(
            "no RAM block in QEMU's migration stream has the name of guest memory: give umem its monitor with --qmp"
                .into(),
        ));
    }
    let (mut ram, mut files, mut staged) = (Vec::new(), Vec::new(), Vec::new());
    for (name, bytes) in &regions {
        check_ram_name(name)?;
        let file = StagedFile::create(name, *bytes)?;
        files.push(file.ram_file()?);
        ram.push(RamPath { name: name.clone(), path: file.path().to_owned() });
        staged.push(Some(file));
    }
    let staging = Arc::new(Staging::new(staged, is_checked).paced());
    let names: Vec<String> = regions.into_iter().map(|(name, _)| name).collect();
    let monitor = PassiveHost::new(socket, opening, &names, staging.clone(), qemu, pacing)?;
    let (monitor, staging) = (Box::new(monitor), Some(staging));
    Ok(LeavingGuest { monitor, ram, files, staging, remarks: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::qemu::stream::tests::{head, head_without_shared};

    /// Takes a stream in pieces, up to its first page or an error.
    fn open(stream: &[u8], piece: usize) -> Result<Opening> {
        let mut opening = Opening::new();
        for piece in stream.chunks(piece) {
            if opening.take(piece)? {
                return Ok(opening);
            }
        }
        panic!("the head has no end");
    }

    #[test]
    fn head_of_a_stream_names_the_guests_ram_and_is_kept_unchanged() {
        let stream = head(true);
        for piece in [1, 7, 100, stream.len()] {
            let opening = open(&stream, piece).unwrap();
            assert_eq!(opening.guest_ram()[0], ("ram0".to_owned(), 0x2000));
            assert!(stream.starts_with(&opening.bytes), "{piece}");
        }
    }

    #[test]
    fn stream_that_umem_cannot_carry_is_refused_by_its_capability() {
        let why = |stream: &[u8]| {
            let error = open(stream, stream.len()).err().expect("it is refused");
            error.to_string()
        };
        let text = why(&head(false));
        assert!(text.contains("its capability return-path off"), "{text}");
        assert!(text.contains("set return-path on"), "{text}");
        let text = why(&head_without_shared());
        assert!(text.contains("set x-ignore-shared off"), "{text}");
        for (beginning, name) in [
            (&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1][..], "capability multifd"),
            (&[0x16, 0x03, 0x01, 0, 0, 0, 0, 0], "parameter tls-creds"),
        ] {
            let text = why(beginning);
            assert!(text.contains(name), "{text}");
        }
    }

    #[test]
    fn blocks_of_devices_and_firmware_are_not_the_guests_ram() {
        for name in
            ["pc.ram", "mach-virt.ram", "ram0", "/objects/ram0", "/objects/a.b", "ram-node1"]
        {
            assert!(is_guest_ram(name), "{name}");
        }
        for name in [
            "vga.vram",
            "0000:00:02.0/vga.vram",
            "/rom@etc/acpi/tables",
            "pc.bios",
            "pc.rom",
            "system.flash0",
            "0000:00:03.0/virtio-net-pci.rom",
        ] {
            assert!(!is_guest_ram(name), "{name}");
        }
    }

    /// The result of the acknowledgement, and whether it was read, for this behaviour of the other end.
    fn completed(other: impl FnOnce(UnixStream) + Send) -> Result<()> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || other(theirs));
            complete(&ours)
        })
    }

    #[test]
    fn migration_is_complete_only_after_qemu_has_read_the_acknowledgement() {
        completed(|mut qemu| {
            let mut word = [0; 8];
            qemu.read_exact(&mut word).unwrap();
            assert_eq!(word, saving::SHUT);
        })
        .unwrap();
        // The other end closes with the acknowledgement unread.
        let unread = completed(|qemu| {
            let mut ready = [nix::poll::PollFd::new(
                std::os::fd::AsFd::as_fd(&qemu),
                nix::poll::PollFlags::POLLIN,
            )];
            crate::runtime::polling::poll(&mut ready, nix::poll::PollTimeout::NONE).unwrap();
        });
        assert!(unread.unwrap_err().to_string().contains("migration ended before"));
        // The other end has closed before.
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(complete(&ours).unwrap_err().to_string().contains("migration ended before"));
    }
}
