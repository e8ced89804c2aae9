//! Look-ups of host names in a thread of their own: a resolver may take any time, and the control
//! thread has other events to handle.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{TryRecvError, channel};

use nix::poll::PollFlags;

use crate::error::{Context, Result};
use crate::runtime::inbox::Wait;
use crate::runtime::panics;

/// The thread's name, visible in /proc while a resolver does not answer.
const THREAD: &str = "umem-lookup";

/// Most look-ups at a time; abandoned ones count until their resolver ends, which may take any
/// time.
const AT_ONCE_MAX: usize = 8;

static AT_ONCE: AtomicUsize = AtomicUsize::new(0);

/// A look-up in progress.
struct OneOfFew;

impl OneOfFew {
    fn begin() -> Option<OneOfFew> {
        let more = |count| (count < AT_ONCE_MAX).then_some(count + 1);
        AT_ONCE.fetch_update(SeqCst, SeqCst, more).ok().map(|_| OneOfFew)
    }
}

impl Drop for OneOfFew {
    fn drop(&mut self) {
        AT_ONCE.fetch_sub(1, SeqCst);
    }
}

/// The addresses of a host, in the resolver's order, with this port.
///
/// # Errors
/// The error that ended the wait. The thread ends when its resolver has given up.
pub(crate) fn addresses(
    host: &str,
    port: u16,
    wait: Wait<'_>,
) -> Result<io::Result<Vec<SocketAddr>>> {
    let (sender, receiver) = channel();
    // The pipe's end signals that there is an answer, or that there will be none.
    let (end, open) = io::pipe().context(|| "pipe")?;
    begin(host, port, move |found| {
        let _ = sender.send(found);
        drop(open);
    })?;
    loop {
        match receiver.try_recv() {
            Ok(found) => return Ok(found),
            Err(TryRecvError::Empty) => {
                wait(&[(end.as_fd(), PollFlags::POLLIN)], None)?;
            }
            Err(TryRecvError::Disconnected) => {
                return Ok(Err(io::Error::other("the look-up ended without an answer")));
            }
        }
    }
}

/// Looks addresses up for a caller that does not wait: `tell` gets them, in another thread unless
/// `host` is an address itself.
///
/// # Errors
/// The thread could not be started.
pub(crate) fn begin(
    host: &str,
    port: u16,
    tell: impl FnOnce(io::Result<Vec<SocketAddr>>) + Send + 'static,
) -> Result<()> {
    if let Ok(address) = host.parse::<IpAddr>() {
        tell(Ok(vec![(address, port).into()]));
        return Ok(());
    }
    let Some(one) = OneOfFew::begin() else {
        let what = format!("{AT_ONCE_MAX} names are being looked up already");
        tell(Err(io::Error::other(what)));
        return Ok(());
    };
    let name = host.to_owned();
    std::thread::Builder::new()
        .name(THREAD.into())
        .spawn(move || {
            let found = panics::caught(|| {
                panics::point(format_args!("lookup"));
                Ok((name.as_str(), port).to_socket_addrs().map(Iterator::collect))
            });
            drop(one);
            tell(found.unwrap_or_else(|panic| Err(io::Error::other(panic))));
        })
        .context(|| format!("starting thread {THREAD}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    use crate::error::Error;

    #[test]
    fn address_needs_no_resolver_and_name_is_awaited() {
        let waits = Cell::new(0);
        let wait: Wait<'_> = &|fds, _| {
            waits.set(waits.get() + 1);
            let mut fds: Vec<_> =
                fds.iter().map(|&(fd, flags)| nix::poll::PollFd::new(fd, flags)).collect();
            crate::runtime::polling::poll(&mut fds, nix::poll::PollTimeout::NONE).unwrap();
            Ok(true)
        };
        let found = addresses("::1", 7, wait).unwrap().unwrap();
        assert_eq!((found, waits.get()), (vec!["[::1]:7".parse().unwrap()], 0));
        let found = addresses("localhost", 7, wait).unwrap().unwrap();
        assert!(
            !found.is_empty() && found.iter().all(|at| at.ip().is_loopback() && at.port() == 7)
        );
        assert!(addresses("no such host", 7, wait).unwrap().is_err());
    }

    #[test]
    fn interrupted_wait_returns_before_the_resolver_ends() {
        // The answer may arrive before the wait begins.
        let wait: Wait<'_> = &|_, _| Err(Error::Interrupted("the guest goes on here".into()));
        match addresses("localhost", 7, wait) {
            Ok(found) => assert!(!found.unwrap().is_empty()),
            Err(error) => assert!(matches!(error, Error::Interrupted(_)), "{error}"),
        }
    }
}
