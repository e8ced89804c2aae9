//! Unix sockets that are private to one user.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket};

/// Makes a listening unix socket that is private to its owner.
///
/// The file that bind makes has the socket's own mode. So the process's umask need not change,
/// which would affect files that other threads make at the same time.
pub(crate) fn bind_private(path: &Path) -> io::Result<UnixListener> {
    use nix::sys::socket::{Backlog, bind, listen};
    use nix::sys::stat::{Mode, fchmod};
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(socket.into())
}

/// The same in the place of a socket at which nobody listens any more, as after a kill.
pub(crate) fn bind_private_anew(path: &Path) -> io::Result<UnixListener> {
    match bind_private(path) {
        Err(error)
            if error.kind() == io::ErrorKind::AddrInUse && is_socket(path) && is_deserted(path) =>
        {
            std::fs::remove_file(path)?;
            bind_private(path)
        }
        bound => bound,
    }
}

/// Connects to a unix socket without waiting: [`io::ErrorKind::WouldBlock`] if its queue of
/// connections is full.
pub(crate) fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    nix::sys::socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Whether the file is a socket.
pub(crate) fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

/// Whether no process listens at this socket any more, as after a kill.
pub(crate) fn is_deserted(path: &Path) -> bool {
    connect_at_once(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}
