//! Before any lane: start the monitor or wait for one to come, take over its memory, check that it can
//! receive a guest.

mod adopting;
mod finding;
mod handing;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::destination::side::{GuestProcess, GuestSide};
use crate::destination::{NO_GUEST, Note, Options};
use crate::error::{Error, Result};
use crate::fault::handoff::{Handed, HandoffListener, HandoffSocket};
use crate::host::command::{self, MonitorProcess, RamPath, Sockets, Start};
use crate::host::qemu::{self, Backend, Qemu};
use crate::host::qmp::Qmp;
use crate::host::{DestinationHost, maps};
use crate::memory::check_pages;
use crate::memory::claim::{self, User};
use crate::observe::output::Output;
use crate::runtime::inbox::{Inbox, Wake};

pub(crate) use adopting::Adopted;
use finding::find;
pub(in crate::destination) use handing::check_pieces;
use handing::{Callers, HANDOFF_TIMEOUT, Memory, accept_memory, receive_memory};

/// How often a QMP socket that is not there yet is tried.
const QMP_INTERVAL: Duration = Duration::from_millis(20);

/// A guest that waits for its memory.
pub(crate) struct Prepared {
    pub(crate) side: GuestSide,
    pub(crate) host: Option<Box<dyn DestinationHost>>,
    handed: Vec<Handed>,
    /// There must be room for all of the guest's memory from the start.
    wants_room: bool,
    /// Nobody but the guest may have its files mapped.
    wants_alone: bool,
}

impl Prepared {
    /// Memory of this process.
    pub(crate) fn here(handed: Vec<Handed>) -> Result<Prepared> {
        let side = GuestSide::here()?;
        Ok(Prepared { side, host: None, handed, wants_room: true, wants_alone: false })
    }

    /// Memory that was handed over to a process before this, which looked whether there is room: some of
    /// it is taken now.
    pub(crate) fn again(side: GuestSide, handed: Vec<Handed>) -> Prepared {
        Prepared { side, host: None, handed, wants_room: false, wants_alone: false }
    }
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
        check_pages()?;
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
        if options.command.is_empty() {
            let listener = self.listener.expect("there is a COMMAND or a hand-over socket");
            return take_over_stranger(options, &listener, inbox);
        }
        if self.listener.is_none() {
            for RamPath { name, path } in &options.ram {
                claim::check_path(name, path, User::Destination)?;
                claim::check_unused(name, path)?;
            }
        }
        let start = Start {
            command: &options.command,
            ram: if self.listener.is_none() { &options.ram } else { &[] },
            kind: options.kind,
            preload: options.preload.as_deref(),
            hands_over: self.listener.is_some(),
            add_qmp: options.qmp.is_none(),
        };
        let (mut monitor, sockets) = command::start(&start)?;
        let Sockets { handoff, qmp } = sockets;
        // What a process hands over by itself it may share with whom it likes.
        let wants_alone = self.listener.is_none();
        let (handoff, memory, host) = match (self.listener, handoff) {
            (Some(listener), _) => {
                let (handoff, memory) = accept_memory(&listener, &mut monitor, inbox)?;
                (handoff, memory, host(options, qmp, &monitor, inbox)?)
            }
            (None, handoff) => {
                let stream = handoff.expect("the preload object has a socket");
                let mut handoff = HandoffSocket::new(stream);
                let (memory, asked) = find(options, &mut monitor, &mut handoff, inbox)?;
                (handoff, memory, asked.map(|(qemu, found)| checked(options, qemu, &found)))
            }
        };
        let Memory { handed, knows_umem, keeps_sessions } = memory;
        let process = GuestProcess::new(monitor, handoff, knows_umem, keeps_sessions);
        let side = GuestSide::Process(Box::new(process));
        let wants_room = !options.overcommit;
        if wants_alone {
            let unseen = check_alone(&handed)?;
            unseen.iter().for_each(|what| Output::new(options.json).remark(what));
        }
        Ok(Prepared { side, host, handed, wants_room, wants_alone })
    }
}

/// No lock keeps a QEMU that umem has not started from a file that is still empty. The kernel says who has it mapped:
/// looked at now, and again when the source has come. Says where that could not be seen.
///
/// # Errors
/// Another process has one of the files mapped.
fn check_alone(handed: &[Handed]) -> Result<Option<String>> {
    let mut unseen = Vec::new();
    for Handed { name, file, address, .. } in handed {
        let Some(Ok(metadata)) = file.as_ref().map(File::metadata) else { continue };
        let others = maps::others_with(&metadata, *address);
        if let Some(pid) = others.mapping.first() {
            return Err(Error::Unsupported(format!(
                "RAM {}: process {pid} has mapped the same file, which it would write to as the guest has its memory \
                 there: end that process, or name another file",
                name.as_deref().unwrap_or_default()
            )));
        }
        unseen = others.unseen;
    }
    let pids: Vec<String> = unseen.iter().map(u32::to_string).collect();
    Ok((!pids.is_empty()).then(|| {
        format!(
            "whether process {} has the guest's RAM file mapped, too, may not be seen by umem (/proc/PID/maps): \
             if it is a QEMU, make sure that it uses another file",
            pids.join(", ")
        )
    }))
}

/// Waits for a process of whomever, and its memory.
fn take_over_stranger(
    options: &Options,
    listener: &HandoffListener,
    inbox: &Inbox<Note>,
) -> Result<Prepared> {
    let mut callers = Callers::new(listener);
    loop {
        // Before their descriptors are counted.
        callers.forget_late(Instant::now());
        let left = callers.deadline().map(|at| at.saturating_duration_since(Instant::now()));
        let index = match inbox.wait(&callers.fds(), left)? {
            Wake::Signal => return Err(Error::Interrupted("no guest had come".into())),
            Wake::Ready(index) => index,
            Wake::Message(_) | Wake::Timeout => continue,
        };
        let Some(first) = callers.answer(index)? else { continue };
        let mut monitor = MonitorProcess::follow(first.pid)?;
        let (handoff, memory) = receive_memory(first, &mut monitor, inbox)?;
        let host = host(options, None, &monitor, inbox)?;
        let Memory { handed, knows_umem, keeps_sessions } = memory;
        let process = GuestProcess::new(monitor, handoff, knows_umem, keeps_sessions);
        let side = GuestSide::Process(Box::new(process));
        let wants_room = !options.overcommit;
        return Ok(Prepared { side, host, handed, wants_room, wants_alone: false });
    }
}

/// Connects to the monitor where it speaks QMP, and checks that it waits for a guest we can bring.
fn host(
    options: &Options,
    inherited: Option<UnixStream>,
    monitor: &MonitorProcess,
    inbox: &Inbox<Note>,
) -> Result<Option<Box<dyn DestinationHost>>> {
    let (stream, name) = match (inherited, &options.qmp) {
        (Some(stream), _) => (stream, "QEMU's monitor".to_owned()),
        (None, Some(path)) => (connect(path, monitor, inbox)?, path.display().to_string()),
        (None, None) => return Ok(None),
    };
    let kind = options.kind;
    // A monitor need not answer.
    let (qemu, found) = inbox.wait_for_work(NO_GUEST, None, move || {
        let mut qemu = Qemu::new(Qmp::open(stream, &name)?);
        qemu.awaits_a_guest()?;
        let found = qemu.check(kind)?;
        Ok((qemu, found))
    })?;
    Ok(Some(checked(options, qemu, &found)))
}

fn checked(options: &Options, qemu: Qemu, found: &[Backend]) -> Box<dyn DestinationHost> {
    // What becomes QEMU's own memory is copied there in small pages.
    if options.kind.is_mapped_shared()
        && let Some(advice) = qemu::advice(found, "source")
    {
        Output::new(options.json).remark(&advice);
    }
    Box::new(qemu)
}

/// Waits until the monitor has made its socket: it may not be there yet, or be there and not listen
/// yet.
fn connect(path: &Path, monitor: &MonitorProcess, inbox: &Inbox<Note>) -> Result<UnixStream> {
    let deadline = Instant::now() + HANDOFF_TIMEOUT;
    loop {
        let is_late = Instant::now() >= deadline;
        let to = path.to_owned();
        // One whose queue is full keeps us waiting.
        let tried =
            inbox.wait_for_work(NO_GUEST, None, move || match UnixStream::connect(&to) {
                Err(error) if is_late => Err(Qmp::cannot_connect(&to, &error)),
                tried => Ok(tried.ok()),
            })?;
        if let Some(stream) = tried {
            return Ok(stream);
        }
        match inbox.wait(&[monitor.exited()], Some(QMP_INTERVAL))? {
            Wake::Signal => return Err(Error::Interrupted(NO_GUEST.into())),
            Wake::Ready(_) => {
                return Err(Error::Host("it exited at once (its own messages say why)".into()));
            }
            Wake::Message(_) | Wake::Timeout => {}
        }
    }
}
