//! Addresses that are one connection: `fd:N`, a socket that umem has inherited, and `exec:COMMAND`,
//! a command whose standard input and output lead to the other side.
//!
//! A command's connection to umem is a socket. The command ends when that closes, as `socat`, `nc`
//! and `ssh` do, or is ended a moment later. Ctrl-C reaches only umem, which may have to continue.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{SockType, SockaddrStorage, getpeername, getsockopt, sockopt};

use super::uri::Uri;
use crate::error::{Context, Error, Result};
use crate::runtime::inbox::{dispose, unblock_signals};
use crate::runtime::polling::poll;
use crate::runtime::process::ProcessHandle;

/// How long a command may take to exit after its connection has closed, and again after SIGTERM;
/// then it is killed.
const EXIT_PATIENCE: Duration = Duration::from_secs(1);

/// The connection of a [`Uri::is_one_connection`], and its command if there is one.
pub(crate) struct SharedConnection {
    pub(crate) socket: OwnedFd,
    pub(crate) command: Option<Running>,
}

impl SharedConnection {
    /// Takes over the connection that `uri` names; none for an address to dial. To be called before
    /// this process opens descriptors of its own, which `fd:N` could name by mistake.
    pub(crate) fn open(uri: &Uri) -> Result<Option<SharedConnection>> {
        match uri {
            Uri::Tcp { .. } | Uri::Unix { .. } => Ok(None),
            Uri::Fd { number } => {
                Ok(Some(SharedConnection { socket: inherited(*number)?, command: None }))
            }
            Uri::Exec { command } => {
                let (socket, command) = start(command)?;
                Ok(Some(SharedConnection { socket, command: Some(command) }))
            }
        }
    }
}

/// Whether `fd:N` is a listening socket, as systemd hands them to a service.
pub(crate) fn is_listening(uri: &Uri) -> bool {
    let Uri::Fd { number } = uri else { return false };
    // SAFETY: only borrowed for the check; nothing here closes it.
    let socket = unsafe { BorrowedFd::borrow_raw(*number) };
    getsockopt(&socket, sockopt::AcceptConn).unwrap_or(false)
}

/// A connected stream socket that was open when this process started; closed in all child
/// processes.
fn inherited(number: i32) -> Result<OwnedFd> {
    let wrong = |what: &str| {
        Error::Usage(format!("fd:{number} {what}: give the number of a connected stream socket"))
    };
    // SAFETY: only borrowed until it is known to be open; nothing here closes it.
    let socket = unsafe { BorrowedFd::borrow_raw(number) };
    match getsockopt(&socket, sockopt::SockType) {
        Ok(SockType::Stream) => {}
        Ok(_) => return Err(wrong("is a socket, but not a stream")),
        Err(Errno::EBADF) => return Err(wrong("is not open")),
        Err(Errno::ENOTSOCK) => return Err(wrong("is not a socket")),
        Err(errno) => return Err(errno).context(|| format!("fd:{number}")),
    }
    match getpeername::<SockaddrStorage>(number) {
        Ok(_) => {}
        Err(Errno::ENOTCONN) if is_listening(&Uri::Fd { number }) => {
            return Err(wrong("is a listening socket, which only `umem incoming` takes"));
        }
        Err(Errno::ENOTCONN) => return Err(wrong("is not connected (any more)")),
        Err(errno) => return Err(errno).context(|| format!("fd:{number}")),
    }
    let what = || format!("fd:{number}");
    fcntl(socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context(what)?;
    if number > libc::STDERR_FILENO {
        // SAFETY: open, and inherited: nothing else in this process owns it.
        return Ok(unsafe { OwnedFd::from_raw_fd(number) });
    }
    // A standard stream is replaced by /dev/null, as child processes need one.
    let moved = fcntl(socket, FcntlArg::F_DUPFD_CLOEXEC(libc::STDERR_FILENO + 1)).context(what)?;
    let nothing = File::options().read(true).write(true).open("/dev/null").context(what)?;
    // SAFETY: both are open; what is closed here is the inherited socket, which has been moved.
    Errno::result(unsafe { libc::dup2(nothing.as_raw_fd(), number) }).context(what)?;
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(moved) })
}

fn start(text: &str) -> Result<(OwnedFd, Running)> {
    let (ours, theirs) = UnixStream::pair().context(|| "socketpair")?;
    let theirs = OwnedFd::from(theirs);
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", text])
        .stdin(Stdio::from(theirs.try_clone().context(|| "socketpair")?))
        .stdout(Stdio::from(theirs));
    // SAFETY: between fork and exec only sigaction and sigprocmask run, both async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            // umem handles the terminal's signals. The command stays in the terminal's session,
            // where it may ask for a password.
            for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP] {
                dispose(signal, libc::SIG_IGN)?;
            }
            Ok(unblock_signals()?)
        });
    }
    let mut child = command.spawn().context(|| format!("starting /bin/sh for exec:{text}"))?;
    // Closes this process's copy of the command's end, so that the connection closes with the
    // command.
    drop(command);
    let handle = ProcessHandle::of_child(&mut child)?;
    Ok((ours.into(), Running { text: text.into(), child, handle }))
}

/// A running command; ended and waited for on drop.
pub(crate) struct Running {
    text: String,
    child: Child,
    handle: ProcessHandle,
}

impl Running {
    /// Adds to the error of a lost connection that the command has exited, and its status.
    pub(crate) fn explain(&mut self, error: Error) -> Error {
        let Error::Lost { side, lane, what } = error else {
            return error;
        };
        let Some(status) = self.ended_within(EXIT_PATIENCE) else {
            return Error::Lost { side, lane, what };
        };
        let what = format!("{what}; exec:{} ended with {status}", self.text);
        Error::Lost { side, lane, what }
    }

    fn ended_within(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let mut fds = [PollFd::new(self.handle.exited(), PollFlags::POLLIN)];
            let millis = left.as_micros().div_ceil(1000);
            // Interrupted or not, the loop checks again.
            let _ = poll(&mut fds, PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended_within(EXIT_PATIENCE).is_some() {
            return;
        }
        self.handle.signal(libc::SIGTERM);
        if self.ended_within(EXIT_PATIENCE).is_none() {
            self.handle.kill();
            let _ = self.child.wait();
        }
    }
}
