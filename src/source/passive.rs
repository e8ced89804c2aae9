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

use super::{GOES_ON, Note, Options, wait};
use crate::error::{Context, Error, Result};
use crate::events::Event;
use crate::host::kind::LeavingGuest;
use crate::host::qemu::stream::passive::{Opening, Pacing, ask, leaving, several_channels};
use crate::host::switchover::Switchover;
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
) -> Result<LeavingGuest> {
    let asked = match &options.monitor {
        Some(socket) => {
            let socket = socket.path.clone();
            Some(inbox.wait_for_work(NOT_BEGUN, None, move || ask(&socket))?)
        }
        None => None,
    };
    let listener = Socket::listen(path)?;
    try_destination(options, pass, inbox)?;
    output.tell(&Event::AwaitsQemu { path: path.to_owned() });
    let stream = listener.accept(inbox)?;
    let opening = read_head(&stream, &listener, inbox)?;
    drop(listener);
    let precopy =
        options.precopy.ok_or_else(|| Error::Internal("a stream without passes".into()))?;
    let pacing = Pacing {
        postcopy: options.postcopy,
        passes_max: precopy.passes_max,
        timeout: precopy.timeout,
    };
    let checksum = options.checksum;
    let leave = move || leaving(stream, opening, asked, checksum, pacing);
    inbox.wait_for_work(GOES_ON, None, leave)
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
            Wake::Signal => return Err(Error::Interrupted(GOES_ON.into())),
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
