//! Names of hosts, looked up in a thread of its own: a resolver takes as long as it likes, and the control
//! thread has more to listen to.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{TryRecvError, channel};

use nix::poll::PollFlags;

use crate::error::{Context, Result};
use crate::runtime::inbox::Wait;
use crate::runtime::panics;

/// What the thread is called: it shows in /proc while a resolver does not answer.
const THREAD: &str = "umem-lookup";

/// Look-ups at a time: of those that were begun in vain nobody knows when they end.
const AT_ONCE_MAX: usize = 8;

static AT_ONCE: AtomicUsize = AtomicUsize::new(0);

/// A look-up that goes on.
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
/// What ended the waiting. The thread goes on then until the resolver has given up, and ends.
pub(crate) fn addresses(
    host: &str,
    port: u16,
    wait: Wait<'_>,
) -> Result<io::Result<Vec<SocketAddr>>> {
    let (sender, receiver) = channel();
    // Its end shows that there is an answer, and also that there will be none.
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

/// The same for who goes on with something else: `tell` gets them, in another thread unless `host` is an
/// address itself.
///
/// # Errors
/// No such thread could be started.
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
    fn an_address_needs_nobody_and_a_name_is_waited_for() {
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
    fn who_stops_waiting_does_not_wait_for_the_resolver() {
        // The answer may have come before anybody waits.
        let wait: Wait<'_> = &|_, _| Err(Error::Interrupted("the guest goes on here".into()));
        match addresses("localhost", 7, wait) {
            Ok(found) => assert!(!found.unwrap().is_empty()),
            Err(error) => assert!(matches!(error, Error::Interrupted(_)), "{error}"),
        }
    }
}
