//! A guest whose migration another program starts: QEMU is told to migrate into a socket of umem.
//!
//! umem dials the destination first, so that a wrong address or secret is found before QEMU gets a command. umem
//! dials it again when QEMU has connected, because the destination gives up a session whose source is silent for long.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::poll::PollFlags;

use super::{GOES_ON, InboxMessage, Options, wait};
use crate::error::{Context, Error, Result};
use crate::events::Event;
use crate::host::kind::LeavingGuest;
use crate::host::qemu::stream::passive::{Opening, Pacing, ask, leaving, several_channels};
use crate::host::switchover::Switchover;
use crate::observe::output::Output;
use crate::runtime::inbox::{Inbox, Wake};
use crate::runtime::private_socket::bind_private_anew;
use crate::transport::lane::Session;
use crate::transport::secure::{self, ClientAuth};

/// Bytes of a stream's head that are read at once.
const PIECE_BYTES: usize = 64 << 10;

/// Silent connections that may wait beside the stream. A further one replaces the oldest.
const OTHERS_MAX: usize = 8;

/// The consequence of an interrupt meanwhile.
const NOT_BEGUN: &str = "QEMU had not begun its migration";

/// Waits at `path` until a QEMU migrates, and reads the guest's memory layout from its stream.
pub(super) fn guest(
    options: &Options,
    path: &Path,
    pass: &Arc<ClientAuth>,
    inbox: &Inbox<InboxMessage>,
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
    let (stream, opening) = read_head(&listener, inbox)?;
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

/// Opens one lane of a session that has several, and closes it, which starts nothing at the destination.
fn try_destination(
    options: &Options,
    pass: &Arc<ClientAuth>,
    inbox: &Inbox<InboxMessage>,
) -> Result<()> {
    let session = Session::new(options.lanes.max(1), false, true)?.checked(options.checksum);
    let session = session.in_rounds(true).external(options.switchover == Switchover::External);
    let wait = |fds: &[(BorrowedFd<'_>, PollFlags)], limit| wait(inbox, fds, limit);
    secure::dial(&options.uri, &session.hello(0, 0), pass, &wait).map(drop)
}

/// The socket for QEMU's migration. Dropping it removes it.
struct Socket {
    path: PathBuf,
    listener: UnixListener,
}

impl Socket {
    fn listen(path: &Path) -> Result<Socket> {
        let failed = |source: std::io::Error| {
            let hint = match source.kind() {
                ErrorKind::AddrInUse => {
                    "; another process has it, or it is no socket: choose another path"
                }
                ErrorKind::NotFound => "; its directory does not exist",
                _ => "",
            };
            Error::Listen { uri: format!("--listen unix:{}", path.display()), source, hint }
        };
        let listener = bind_private_anew(path).map_err(failed)?;
        Ok(Socket { path: path.to_owned(), listener })
    }

    fn accept(&self, inbox: &Inbox<InboxMessage>) -> Result<UnixStream> {
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
        // An error has no consequence.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Waits for a stream, and reads it up to its first page. A QEMU that writes several streams makes further connections
/// before that. Silent connections are ignored: another umem may check whether a process listens here.
fn read_head(listener: &Socket, inbox: &Inbox<InboxMessage>) -> Result<(UnixStream, Opening)> {
    let mut opening = Opening::new();
    let mut piece = vec![0; PIECE_BYTES];
    let mut stream = listener.accept(inbox)?;
    let mut has_begun = false;
    let mut others: VecDeque<UnixStream> = VecDeque::new();
    loop {
        let mut fds = vec![stream.as_fd(), listener.listener.as_fd()];
        fds.extend(others.iter().map(|other| other.as_fd()));
        match inbox.wait(&fds, None)? {
            Wake::Signal => return Err(Error::Interrupted(GOES_ON.into())),
            Wake::Ready(0) => {}
            Wake::Ready(1) => {
                others.push_back(listener.accept(inbox)?);
                if others.len() > OTHERS_MAX {
                    others.pop_front();
                }
                continue;
            }
            Wake::Ready(index) => {
                let other = others.remove(index - 2);
                if other.is_some_and(|mut other| other.read(&mut [0]).is_ok_and(|count| count > 0))
                {
                    return Err(several_channels());
                }
                continue;
            }
            Wake::Message(_) | Wake::Timeout => continue,
        }
        match stream.read(&mut piece) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Ok(0) if !has_begun => {
                stream = match others.pop_front() {
                    Some(other) => other,
                    None => listener.accept(inbox)?,
                };
            }
            Ok(0) => {
                return Err(Error::Host(
                    "it ended its migration before its first page: the migration was cancelled or failed; ask the \
                     program that began it"
                        .into(),
                ));
            }
            read => {
                has_begun = true;
                let count = read.context(|| "reading QEMU's migration stream")?;
                if opening.take(&piece[..count])? {
                    return Ok((stream, opening));
                }
            }
        }
    }
}
