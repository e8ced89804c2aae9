//! The memory of a started QEMU. QEMU's monitor names the guest's RAM; the preload object has handed over all mappings
//! that can be RAM.
//!
//! A mapping must be caught at the moment when it is made, and QEMU cannot be asked about its purpose then. So the
//! preload object hands over every mapping that QEMU makes in the way in which it maps RAM. Once QEMU answers, the
//! addresses of its RAM blocks identify the mappings that a migration fills, and their names. The other mappings are
//! released. Memory without a file is mapped like QEMU's other private memory: the preload object registers it after
//! QEMU has reported its address. All of this happens before the source is asked for anything. A mapping that does not
//! fit ends the destination.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, recv};

use super::handing::{HANDOFF_TIMEOUT, Memory, closed, exited, never_handed_over};
use super::{NO_GUEST, Wanted, connect};
use crate::error::{Error, Result};
use crate::fault::handoff::{Handed, HandoffSocket, Message};
use crate::host::command::MonitorProcess;
use crate::host::kind::{Arriving, ArrivingGuest, GuestRam, check_ram_name};
use crate::memory::claim::{self, User};
use crate::runtime::inbox::{Inbox, Wake};

/// Waits until COMMAND has mapped the guest's memory. A QEMU, or a process with a QMP socket, is then asked for its
/// RAM.
pub(super) fn find<N>(
    wanted: &Wanted<'_>,
    monitor: &mut MonitorProcess,
    handoff: &mut HandoffSocket,
    inbox: &Inbox<N>,
) -> Result<(Memory, Option<ArrivingGuest>)> {
    let mut coming = Coming::new(wanted);
    let waited = coming.wait(monitor, handoff, inbox);
    let asked = waited.and_then(|()| coming.ask(monitor, inbox));
    let asked = asked.and_then(|asked| {
        let backends = asked.as_ref().map_or(&[][..], |asked| &asked.ram);
        coming.register(backends, monitor, handoff, inbox)?;
        Ok(asked)
    });
    // QEMU may not answer because it has failed to start: then this has the reason.
    let drained = coming.drain(handoff, inbox);
    // These files are removed if the guest does not arrive.
    handoff.created().iter().for_each(|file| monitor.note_created(file.clone()));
    drained?;
    let asked = asked?;
    let mut handed = coming.handed;
    if let Some(asked) = &asked {
        handed = assign(wanted, handoff, handed, &asked.ram)?;
    }
    // Memory that is plugged in from now on would not be filled.
    handoff.settled()?;
    let memory = Memory { handed, knows_umem: true, keeps_sessions: coming.keeps_sessions };
    Ok((memory, asked))
}

/// The state of a process that was started and is handing over its memory.
struct Coming<'a> {
    wanted: &'a Wanted<'a>,
    /// The names given by the user whose memory has not been handed over.
    missing: HashMap<&'a str, ()>,
    handed: Vec<Handed>,
    keeps_sessions: bool,
    loaded: bool,
    is_qemu: bool,
    /// umem's end of the monitor socket that QEMU was given.
    qmp: Option<UnixStream>,
}

impl<'a> Coming<'a> {
    fn new(wanted: &'a Wanted<'a>) -> Coming<'a> {
        Coming {
            wanted,
            missing: wanted.ram.iter().map(|ram| (ram.name.as_str(), ())).collect(),
            handed: Vec::new(),
            keeps_sessions: true,
            loaded: false,
            is_qemu: false,
            qmp: None,
        }
    }

    /// Only QEMU's answers are left to wait for.
    fn is_there(&mut self) -> bool {
        if self.is_qemu && self.wanted.monitor.is_none() {
            return self.missing.is_empty() && self.greets();
        }
        match (&self.wanted.monitor, self.wanted.ram.is_empty()) {
            (_, false) => self.missing.is_empty(),
            (Some(socket), true) => {
                self.is_qemu && (!self.handed.is_empty() || socket.path.exists())
            }
            (None, true) => false,
        }
    }

    /// Whether the monitor has sent its greeting. The socket of a process that has ended is dropped: such a process was
    /// only asked for its version.
    fn greets(&mut self) -> bool {
        let Some(qmp) = &self.qmp else { return false };
        match recv(qmp.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
            Ok(0) => {
                self.qmp = None;
                false
            }
            Ok(_) => true,
            Err(_) => false,
        }
    }

    fn wait<N>(
        &mut self,
        monitor: &MonitorProcess,
        handoff: &mut HandoffSocket,
        inbox: &Inbox<N>,
    ) -> Result<()> {
        let deadline = Instant::now() + HANDOFF_TIMEOUT;
        while !self.is_there() {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut extra = vec![handoff.stream().as_fd(), monitor.exited()];
            extra.extend(self.qmp.as_ref().map(AsFd::as_fd));
            match inbox.wait(&extra, Some(left))? {
                Wake::Signal => return Err(Error::Interrupted(NO_GUEST.into())),
                Wake::Timeout => return Err(self.never_came()),
                Wake::Ready(0) => match handoff.read()? {
                    Some(messages) => self.take(messages)?,
                    None if closed(monitor, inbox)? => return Err(self.ended()),
                    None => return Err(self.never_came()),
                },
                Wake::Ready(1) => {
                    // Messages that the process sent before its end.
                    self.drain(handoff, inbox)?;
                    return Err(self.ended());
                }
                // The monitor has greeted, or the process has ended.
                Wake::Ready(_) | Wake::Message(_) => {}
            }
        }
        Ok(())
    }

    fn take(&mut self, messages: Vec<Message>) -> Result<()> {
        for message in messages {
            match message {
                Message::Loaded => self.loaded = true,
                Message::Monitor(qmp) => {
                    self.is_qemu = true;
                    self.qmp = qmp.or(self.qmp.take());
                }
                Message::Memory { pieces, keeps_sessions, .. } => {
                    self.keeps_sessions &= keeps_sessions;
                    for piece in pieces {
                        self.check(&piece)?;
                        let name = piece.name.as_deref().unwrap_or_default();
                        if self.wanted.ram.is_empty() || self.missing.remove(name).is_some() {
                            self.handed.push(piece);
                        }
                    }
                }
                Message::Released | Message::Session(_) => {}
            }
        }
        Ok(())
    }

    /// Checks the file itself: another process may have created it, or may replace it at its path.
    fn check(&self, piece: &Handed) -> Result<()> {
        let (Some(name), Some(file)) = (&piece.name, &piece.file) else { return Ok(()) };
        match self.wanted.ram.iter().find(|ram| ram.name == *name) {
            Some(ram) => claim::check_file(name, &ram.path, file, User::Destination),
            // A memory file has no path.
            None if file.metadata().is_ok_and(|metadata| metadata.nlink() == 0) => Ok(()),
            // The region's name is the file's path, as the process knows it.
            None => {
                claim::check_path(name, Path::new(name), User::Destination)?;
                claim::check_file(name, Path::new(name), file, User::Destination)
            }
        }
    }

    /// Receives what is pending: a process that has answered has handed over everything that it had mapped before.
    fn drain<N>(&mut self, handoff: &mut HandoffSocket, inbox: &Inbox<N>) -> Result<()> {
        loop {
            match inbox.wait(&[handoff.stream().as_fd()], Some(Duration::ZERO))? {
                Wake::Signal => return Err(Error::Interrupted(NO_GUEST.into())),
                Wake::Timeout => return Ok(()),
                Wake::Message(_) => {}
                Wake::Ready(_) => match handoff.read()? {
                    Some(messages) => self.take(messages)?,
                    None => return Ok(()),
                },
            }
        }
    }

    fn ask<N>(
        &mut self,
        monitor: &mut MonitorProcess,
        inbox: &Inbox<N>,
    ) -> Result<Option<ArrivingGuest>> {
        let inherited = self.qmp.take();
        let is_ours = inherited.is_some();
        let found = connect(self.wanted, inherited, monitor, inbox)?;
        let Some((kind, connection)) = found else { return Ok(None) };
        let arriving = Arriving {
            kind: self.wanted.kind,
            listening: self.wanted.listening.clone(),
            hands_over: false,
        };
        // A monitor need not answer.
        let asked =
            inbox.wait_for_work(NO_GUEST, None, move || kind.arriving(connection, arriving))?;
        // QEMU has made the socket. QEMU may be a child of the process that umem has started.
        if let Some(pid) = asked.pid.filter(|&pid| is_ours && pid != monitor.pid()) {
            monitor.hold(pid)?;
        }
        Ok(Some(asked))
    }

    /// Has memory without a file handed over: it was not handed over when it was mapped.
    fn register<N>(
        &mut self,
        backends: &[GuestRam],
        monitor: &MonitorProcess,
        handoff: &mut HandoffSocket,
        inbox: &Inbox<N>,
    ) -> Result<()> {
        for backend in backends.iter().filter(|backend| backend.is_anonymous()) {
            // If the user gives names, the guest has no RAM besides those.
            let Some(address) = backend.address.filter(|_| self.wanted.ram.is_empty()) else {
                continue;
            };
            if !handoff.registers() {
                return Err(Error::Preload(format!(
                    "RAM {}: the preload object that --preload names cannot register memory without a file: leave out \
                     --preload to use the one built into umem",
                    backend.name
                )));
            }
            check_ram_name(&backend.name)?;
            handoff.register(address, backend.bytes, &backend.name)?;
            let deadline = Instant::now() + HANDOFF_TIMEOUT;
            while !self.handed.iter().any(|piece| piece.address == address) {
                let left = deadline.saturating_duration_since(Instant::now());
                let fds = [handoff.stream().as_fd(), monitor.exited()];
                match inbox.wait(&fds, Some(left))? {
                    Wake::Signal => return Err(Error::Interrupted(NO_GUEST.into())),
                    Wake::Message(_) => {}
                    Wake::Ready(0) => match handoff.read()? {
                        Some(messages) => self.take(messages)?,
                        None => return Err(self.ended()),
                    },
                    Wake::Ready(_) => return Err(self.ended()),
                    Wake::Timeout => {
                        return Err(Error::Preload(format!(
                            "RAM {}: QEMU's process does not register its memory: check whether the process is \
                             stopped",
                            backend.name
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    fn ended(&self) -> Error {
        if !self.loaded || !self.wanted.ram.is_empty() {
            return exited(self.loaded, &self.missing);
        }
        if !self.is_qemu {
            return no_qemu("has ended");
        }
        Error::Host(
            "it exited before it could be asked for its RAM (its own messages say why)".into(),
        )
    }

    fn never_came(&self) -> Error {
        if !self.loaded || !self.wanted.ram.is_empty() && !self.missing.is_empty() {
            return never_handed_over(self.loaded, &self.missing);
        }
        if !self.is_qemu {
            return no_qemu("starts none");
        }
        Error::Host(
            "it was started and does not answer at its monitor: check what it waits for (its own messages may say \
             so)"
                .into(),
        )
    }
}

fn no_qemu(what: &str) -> Error {
    Error::Usage(format!(
        "COMMAND started no QEMU with umem's preload object, and {what}: umem recognizes a QEMU by its name \
         (qemu-system-…, qemu-kvm, kvm), and LD_PRELOAD has to reach it; for another monitor name its RAM files with \
         --ram NAME=PATH"
    ))
}

/// Names the mappings that were handed over, by the addresses that QEMU reports, and releases those that are not RAM.
/// The mappings that the user has named have their names: they must be all of the guest's RAM and nothing else.
fn assign(
    wanted: &Wanted<'_>,
    handoff: &mut HandoffSocket,
    mut handed: Vec<Handed>,
    backends: &[GuestRam],
) -> Result<Vec<Handed>> {
    let is_named = !wanted.ram.is_empty();
    let mut memory = Vec::new();
    for backend in backends {
        let is_it = |piece: &Handed| Some(piece.address) == backend.address;
        let Some(index) = handed.iter().position(is_it) else {
            return Err(not_handed_over(wanted, backend));
        };
        let mut piece = handed.swap_remove(index);
        check_length(&piece, backend)?;
        if !is_named {
            check_ram_name(&backend.name)?;
            handoff.name(piece.address, &backend.name)?;
            piece.name = Some(backend.name.clone());
        }
        memory.push(piece);
    }
    for piece in handed {
        if is_named {
            return Err(Error::Usage(format!(
                "--ram {} names a file that is not RAM of the guest: leave it out",
                piece.name.unwrap_or_default()
            )));
        }
        // umem's userfaultfd of the piece is closed with it.
        handoff.forget(piece.address)?;
    }
    Ok(memory)
}

/// An early QEMU with offset= maps pages beyond a file's end: touching those raises SIGBUS.
fn check_length(piece: &Handed, backend: &GuestRam) -> Result<()> {
    let Some(length) = piece.file.as_ref().and_then(|file| file.metadata().ok()) else {
        return Ok(());
    };
    let (length, end) = (length.len(), piece.file_offset.saturating_add(piece.bytes));
    if length >= end && piece.bytes >= backend.bytes {
        return Ok(());
    }
    let (name, path) = (&backend.name, backend.path.display());
    Err(Error::Unsupported(format!(
        "RAM backend {name} reaches to byte {end} of its file {path}, which has {length} bytes: QEMU does not extend \
         an existing file; extend the file first, with `truncate -s {end} {path}`, or begin with the backend whose \
         offset= is the largest"
    )))
}

fn not_handed_over(wanted: &Wanted<'_>, backend: &GuestRam) -> Error {
    let (name, path) = (&backend.name, backend.path.display());
    if backend.is_anonymous() {
        return Error::Unsupported(format!(
            "the guest's RAM {name} is QEMU's own memory, which no --ram can name: leave out --ram, and umem asks QEMU"
        ));
    }
    if wanted.kind.needs_touch() && backend.is_shared {
        return Error::Unsupported(format!(
            "RAM backend {name} has share=on, and --kind private is for memory that the guest maps privately: give \
             it share=off, or leave out --kind"
        ));
    }
    if !wanted.ram.is_empty() {
        return Error::Unsupported(format!(
            "the guest's RAM backend {name} ({path}) is not named by --ram: leave out --ram, and umem asks QEMU"
        ));
    }
    if backend.path.as_os_str().is_empty() {
        return Error::Unsupported(format!(
            "RAM backend {name} has its memory in a memory file whose mapping umem did not see: use a \
             memory-backend-file with share=on on tmpfs or hugetlbfs"
        ));
    }
    Error::Unsupported(format!(
        "RAM backend {name} has its memory in {path}, which cannot be filled on demand: userfaultfd supports named \
         files on tmpfs and hugetlbfs; let mem-path name one in /dev/shm"
    ))
}
