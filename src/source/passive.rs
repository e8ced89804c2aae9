//! A guest whose migration another program begins: QEMU is told to migrate into a socket of umem's.
//!
//! The destination is tried first, so that a wrong address or secret is found before QEMU is told anything. It is
//! called again when QEMU has come: a session whose source says nothing for long would be given up there.

use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::poll::PollFlags;

use super::{Guest, Note, Options, Switchover, wait};
use crate::error::{Context, Error, Result};
use crate::events::Event;
use crate::host::command::RamPath;
use crate::host::qemu::Qemu;
use crate::host::qemu::stream::passive::{self, Opening, Pacing, PassiveHost, several_channels};
use crate::host::qmp::Qmp;
use crate::memory::staging::{StagedFile, Staging};
use crate::observe::output::Output;
use crate::runtime::inbox::{Inbox, Wake};
use crate::runtime::private_socket::bind_private;
use crate::transport::lane::Session;
use crate::transport::secure::{self, ClientAuth};

/// Bytes that are read of a stream's head at once.
const PIECE_BYTES: usize = 64 << 10;

/// What an interrupt means meanwhile.
const NOT_BEGUN: &str = "no migration of QEMU's had come";

/// Waits at `path` until a QEMU migrates, and learns from its stream which memory the guest has.
pub(super) fn guest(
    options: &Options,
    path: &Path,
    pass: &Arc<ClientAuth>,
    inbox: &Inbox<Note>,
    output: &Output,
) -> Result<Guest> {
    let monitor = match &options.qmp {
        Some(qmp) => {
            let qmp = qmp.clone();
            Some(inbox.wait_for_work(NOT_BEGUN, None, move || claimed(&qmp))?)
        }
        None => None,
    };
    let listener = Socket::listen(path)?;
    try_destination(options, pass, inbox)?;
    output.tell(&Event::AwaitsQemu { path: path.to_owned() });
    let stream = listener.accept(inbox)?;
    let opening = read_head(&stream, &listener, inbox)?;
    drop(listener);
    let found = opening.guest_ram();
    let (qemu, regions) = match monitor {
        Some((mut qemu, names)) => {
            let bytes = |id: &String| found.iter().find(|(name, _)| name == id).map(|it| it.1);
            let region = |id: String| match bytes(&id) {
                Some(bytes) => Ok((id, bytes)),
                None => Err(Error::Host(format!(
                    "the QEMU of --qmp has RAM backend {id}, and the migration that has come to --listen has no RAM \
                     block of it: give --qmp the monitor of the QEMU that migrates"
                ))),
            };
            let regions = names.into_iter().map(region).collect::<Result<Vec<_>>>()?;
            passive::is_live(&mut qemu)?;
            (Some(qemu), regions)
        }
        None => (None, found),
    };
    if regions.is_empty() {
        return Err(Error::Unsupported(
            "QEMU's migration stream has no RAM block that is the guest's memory by its name: give umem its monitor \
             with --qmp"
                .into(),
        ));
    }
    let (mut ram, mut files, mut staged) = (Vec::new(), Vec::new(), Vec::new());
    for (name, bytes) in &regions {
        let file = StagedFile::create(name, *bytes)?;
        files.push(file.ram_file()?);
        ram.push(RamPath { name: name.clone(), path: file.path().to_owned() });
        staged.push(Some(file));
    }
    let staging = Arc::new(Staging::new(staged, options.checksum).paced());
    let precopy =
        options.precopy.ok_or_else(|| Error::Internal("a stream without passes".into()))?;
    let pacing = Pacing {
        postcopy: options.postcopy,
        passes_max: precopy.passes_max,
        timeout: precopy.timeout,
    };
    let names: Vec<String> = regions.into_iter().map(|(name, _)| name).collect();
    let host = PassiveHost::new(stream, opening, &names, staging.clone(), qemu, pacing)?;
    Ok(Guest { host: Box::new(host), ram, files, staging: Some(staging) })
}

/// The monitor that says whether the guest stands still, and the ids of the guest's RAM backends.
fn claimed(path: &Path) -> Result<(Qemu, Vec<String>)> {
    let mut qemu = Qemu::new(Qmp::connect(path)?);
    qemu.claim()?;
    let names = qemu.check_source(true)?.into_iter().map(|backend| backend.name).collect();
    Ok((qemu, names))
}

/// Opens one lane of a session that has several, and closes it: that begins nothing there.
fn try_destination(options: &Options, pass: &Arc<ClientAuth>, inbox: &Inbox<Note>) -> Result<()> {
    let session = Session::new(options.lanes.max(1), false, true)?.checked(options.checksum);
    let session = session.in_rounds(true).external(options.switchover == Switchover::External);
    let wait = |fds: &[(BorrowedFd<'_>, PollFlags)], limit| wait(inbox, fds, limit);
    secure::dial(&options.uri, &session.hello(0, 0), pass, &wait).map(drop)
}

/// The socket for QEMU's migration, removed with this.
struct Socket {
    path: PathBuf,
    listener: UnixListener,
}

impl Socket {
    fn listen(path: &Path) -> Result<Socket> {
        let listener = bind_private(path).map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => Error::Environment(format!(
                "cannot listen at {}, which --listen names: a file is there; if no other umem listens there, remove it",
                path.display()
            )),
            _ => Error::System {
                what: format!("listening at {}, which --listen names", path.display()),
                source: error,
            },
        })?;
        Ok(Socket { path: path.to_owned(), listener })
    }

    fn accept(&self, inbox: &Inbox<Note>) -> Result<UnixStream> {
        let what = || format!("a migration at {}", self.path.display());
        loop {
            match inbox.wait(&[self.listener.as_fd()], None)? {
                Wake::Signal => return Err(Error::Interrupted(NOT_BEGUN.into())),
                Wake::Ready(_) => return Ok(self.listener.accept().context(what)?.0),
                Wake::Message(_) | Wake::Timeout => {}
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Nothing depends on it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Reads a stream up to its first page. A QEMU that writes several streams connects as often before that.
fn read_head(stream: &UnixStream, listener: &Socket, inbox: &Inbox<Note>) -> Result<Opening> {
    let mut opening = Opening::new();
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match inbox.wait(&[listener.listener.as_fd(), stream.as_fd()], None)? {
            Wake::Signal => return Err(Error::Interrupted("the guest goes on here".into())),
            Wake::Ready(0) => return Err(several_channels()),
            Wake::Ready(_) => {}
            Wake::Message(_) | Wake::Timeout => continue,
        }
        let mut stream = stream;
        let count = match stream.read(&mut piece) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            read => read.context(|| "reading QEMU's migration stream")?,
        };
        if count == 0 {
            return Err(Error::Host(
                "it has ended its migration before its first page: cancelled, or failed; its manager knows why".into(),
            ));
        }
        if opening.take(&piece[..count])? {
            return Ok(opening);
        }
    }
}
