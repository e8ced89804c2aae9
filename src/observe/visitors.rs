//! Clients from outside: one thread serves all connections.
//!
//! No visitor delays another: each is polled, has a deadline while it blocks its own progress, and their number is
//! limited. A visitor whose request causes a panic loses its connection; the others keep theirs.

use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Context, Result};
use crate::runtime::accepting::{Accepted, Room};
use crate::runtime::panics;
use crate::runtime::polling::poll;

/// A connection, with its received and unsent bytes.
pub(super) trait Visitor: AsFd {
    /// The poll events that it waits for.
    fn flags(&self) -> PollFlags;

    /// The time at which it is disconnected without further progress.
    fn deadline(&self) -> Option<Instant>;

    /// Its age for replacement: of too many visitors the one with the earliest time is dropped.
    fn rank(&self) -> Instant;

    /// Reads or writes without waiting. False at the end of the connection.
    fn go_on(&mut self) -> bool;
}

/// The listener for visitors.
pub(super) trait Entrance: AsFd + Send + 'static {
    type Visitor: Visitor;

    /// The most visitors at a time.
    const VISITORS_MAX: usize;

    /// Accepts the next visitor without waiting; None if it has disconnected.
    fn accept(&self) -> io::Result<Option<Self::Visitor>>;
}

/// Serves visitors until it is dropped.
pub(super) struct Server {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `entrance` on a thread of this name.
    pub(super) fn start(name: &str, entrance: impl Entrance) -> Result<Server> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let stop = Arc::new(EventFd::from_flags(flags).context(|| "eventfd")?);
        let told = stop.clone();
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || listen(&entrance, &told))
            .context(|| format!("starting thread {name}"))?;
        Ok(Server { stop, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen<E: Entrance>(entrance: &E, stop: &EventFd) {
    let mut visitors: Vec<E::Visitor> = Vec::new();
    let mut room = Room::default();
    loop {
        let waits = room.deadline(Instant::now());
        // A pausing listener is not polled: it would be ready all the time.
        let at_entrance = if waits.is_some() { PollFlags::empty() } else { PollFlags::POLLIN };
        let mut fds = vec![
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
            PollFd::new(entrance.as_fd(), at_entrance),
        ];
        fds.extend(visitors.iter().map(|visitor| PollFd::new(visitor.as_fd(), visitor.flags())));
        let next = visitors.iter().filter_map(Visitor::deadline).chain(waits).min();
        let left = next.map(|at| at.saturating_duration_since(Instant::now()).as_millis() + 1);
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        // After an interrupt the loop polls again.
        let _ = poll(&mut fds, timeout);
        let mut ready = fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
        let (is_over, has_guest) = (ready.next() == Some(true), ready.next() == Some(true));
        let ready: Vec<bool> = ready.collect();
        if is_over {
            return;
        }
        let (now, mut ready) = (Instant::now(), ready.into_iter());
        visitors.retain_mut(|visitor| {
            let is_ready = ready.next() == Some(true);
            let is_late = visitor.deadline().is_some_and(|deadline| deadline <= now);
            !is_late && (!is_ready || guarded(|| served(visitor)).unwrap_or(false))
        });
        if !has_guest || waits.is_some() {
            continue;
        }
        match guarded(|| Accepted::of(entrance.accept())) {
            Some(Ok(Accepted::One(Some(visitor)))) => {
                if visitors.len() == E::VISITORS_MAX {
                    remove_first(&mut visitors);
                }
                visitors.push(visitor);
            }
            Some(Ok(Accepted::One(None) | Accepted::Gone)) => {}
            // Dropping the oldest visitor makes room; without visitors the listener pauses.
            Some(Ok(Accepted::NoRoom(_))) if remove_first(&mut visitors) => {}
            Some(Ok(Accepted::NoRoom(_)) | Err(_)) | None => room.lacked(Instant::now()),
        }
    }
}

fn served(visitor: &mut impl Visitor) -> bool {
    panics::point(format_args!("visitor"));
    visitor.go_on()
}

/// Drops the oldest visitor; false if there is none.
fn remove_first<V: Visitor>(visitors: &mut Vec<V>) -> bool {
    let first = (0..).zip(visitors.iter()).min_by_key(|(_, visitor)| visitor.rank());
    let Some((index, _)) = first else { return false };
    visitors.remove(index);
    true
}

/// The result of the call; None if it panics.
fn guarded<T>(call: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(call)).ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::BorrowedFd;
    use std::os::unix::net::UnixStream;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    /// Echoes each byte; panics on one value.
    struct Echo(UnixStream);

    impl AsFd for Echo {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }

    impl Visitor for Echo {
        fn flags(&self) -> PollFlags {
            PollFlags::POLLIN
        }

        fn deadline(&self) -> Option<Instant> {
            None
        }

        fn rank(&self) -> Instant {
            Instant::now()
        }

        fn go_on(&mut self) -> bool {
            let mut byte = [0];
            assert!(self.0.read(&mut byte).is_ok_and(|count| count == 1 && byte != [b'!']));
            self.0.write_all(&byte).is_ok()
        }
    }

    /// A listener that is always ready, has no room `lacks` times, and then panics once.
    struct Crowded {
        ready: EventFd,
        lacks: AtomicI32,
        tried: Sender<Instant>,
        waiting: Mutex<Vec<UnixStream>>,
    }

    impl AsFd for Crowded {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.ready.as_fd()
        }
    }

    impl Entrance for Crowded {
        type Visitor = Echo;
        const VISITORS_MAX: usize = 2;

        fn accept(&self) -> io::Result<Option<Echo>> {
            self.tried.send(Instant::now()).unwrap();
            match self.lacks.fetch_sub(1, SeqCst) {
                1.. => return Err(io::Error::from_raw_os_error(libc::EMFILE)),
                0 => panic!("the listener panics once"),
                _ => {}
            }
            let next = self.waiting.lock().unwrap().pop();
            if next.is_none() {
                let _ = self.ready.read();
            }
            Ok(next.map(Echo))
        }
    }

    #[test]
    fn lack_of_room_or_a_panic_neither_ends_nor_spins_the_listener() {
        let (tried, tries) = channel();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (mut panics, other) = UnixStream::pair().unwrap();
        let ready = EventFd::from_value_and_flags(1, EfdFlags::EFD_NONBLOCK).unwrap();
        let waiting = Mutex::new(vec![theirs, other]);
        let crowded = Crowded { ready, lacks: AtomicI32::new(3), tried, waiting };
        let server = Server::start("umem-test", crowded).unwrap();
        let tries: Vec<Instant> = (0..6).map(|_| tries.recv().unwrap()).collect();
        // Three accepts without room and one panic, each followed by a pause.
        for pair in tries.windows(2).take(4) {
            assert!(pair[1] - pair[0] >= crate::runtime::accepting::ROOM_INTERVAL, "{tries:?}");
        }
        panics.write_all(b"!").unwrap();
        assert_eq!(panics.read(&mut [0]).unwrap(), 0, "the connection is closed");
        ours.write_all(b"a").unwrap();
        let mut byte = [0];
        ours.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"a");
        drop(server);
    }
}
