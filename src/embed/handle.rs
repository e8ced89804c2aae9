//! A running migration of either side.

use std::any::Any;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow};
use nix::sys::socket::{SockType, SockaddrStorage, getpeername, getsockopt, sockopt};
use umem_wire::limits::LANES_MAX;

use super::desk::HostChannel;
use crate::error::{Context, Error, Result};
use crate::host::embedder::Embedder as _;
use crate::runtime::panics;
use crate::statistics::Completed;
use crate::transport::uri::Uri;

/// How long a dropped handle may take to notify the other side before its connections are cut.
const PARTING_PATIENCE: Duration = Duration::from_secs(1);

/// The control thread; `T` is its result.
pub(super) struct Handle<T> {
    pub(super) desk: Arc<HostChannel>,
    thread: Mutex<Option<JoinHandle<T>>>,
}

impl<T: Send + 'static> Handle<T> {
    /// Runs `migrate` on a thread that blocks every signal. `end` runs after it, whatever its outcome, and before the
    /// last event.
    pub(super) fn start(
        desk: Arc<HostChannel>,
        migrate: impl FnOnce(&Arc<HostChannel>) -> Result<Completed> + Send + 'static,
        end: impl FnOnce(&HostChannel, bool) -> T + Send + 'static,
    ) -> Result<Handle<T>> {
        let ours = desk.clone();
        let body = move || {
            let result = catch_unwind(AssertUnwindSafe(|| migrate(&ours)))
                .unwrap_or_else(|payload: Box<dyn Any + Send>| Err(panics::error(&*payload)));
            let left = end(&ours, result.is_ok());
            ours.end(result);
            left
        };
        // The thread inherits the mask, and passes it on to the threads that it starts.
        let before = SigSet::all()
            .thread_swap_mask(SigmaskHow::SIG_SETMASK)
            .context(|| "blocking signals")?;
        let thread = std::thread::Builder::new()
            .name(format!("{}control", panics::THREAD_PREFIX))
            .spawn(body);
        before.thread_set_mask().context(|| "unblocking signals")?;
        let thread = thread.context(|| "starting a thread")?;
        Ok(Handle { desk, thread: Mutex::new(Some(thread)) })
    }

    /// Ends the migration in any phase. Returns its result on the first call.
    pub(super) fn end(&self) -> Option<T> {
        self.desk.canceller().abandon();
        self.join()
    }

    /// Cancels the migration, if that is still possible.
    pub(super) fn cancel(&self) {
        self.desk.canceller().cancel();
    }

    /// Joins the thread, whose end is near.
    pub(super) fn join(&self) -> Option<T> {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        if !self.desk.wait_for_end(PARTING_PATIENCE) {
            self.desk.cut_lanes();
        }
        // The thread catches its panics.
        thread.join().ok()
    }
}

/// Checks sockets that become lanes, the demand lane's first. The check changes nothing.
pub(crate) fn check_connections(sockets: &[impl AsFd]) -> Result<()> {
    let most = usize::from(LANES_MAX) + 1;
    if !(1..=most).contains(&sockets.len()) {
        return Err(Error::Usage(format!(
            "{} connections: give 1 to {most}, one for demanded pages and more for the rest",
            sockets.len()
        )));
    }
    let number = |socket: &dyn AsFd| socket.as_fd().as_raw_fd();
    for (index, socket) in sockets.iter().enumerate() {
        if sockets[..index].iter().any(|other| number(other) == number(socket)) {
            return Err(Error::Usage(format!("connection {index} is given twice")));
        }
        check_connection(socket.as_fd())
            .map_err(|what| Error::Usage(format!("connection {index} {what}")))?;
    }
    Ok(())
}

fn check_connection(socket: BorrowedFd<'_>) -> std::result::Result<(), String> {
    match getsockopt(&socket, sockopt::SockType) {
        Ok(SockType::Stream) => {}
        Ok(_) => return Err("is no stream socket".into()),
        Err(errno) => return Err(format!("is no socket: {errno}")),
    }
    getpeername::<SockaddrStorage>(socket.as_raw_fd())
        .map_err(|errno| format!("is not connected: {errno}"))?;
    Ok(())
}

/// Refuses an address of a single connection: the program gives the socket instead.
pub(super) fn check_address(uri: &Uri) -> Result<()> {
    if !uri.is_one_connection() {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "{uri} is one connection: give its socket, or an address, tcp:HOST:PORT or unix:PATH"
    )))
}

/// Checks a number of bulk lanes.
pub(super) fn check_lanes(lanes: u16) -> Result<u16> {
    if (1..=LANES_MAX).contains(&lanes) {
        return Ok(lanes);
    }
    Err(Error::Usage(format!("the number of bulk lanes is 1 to {LANES_MAX}, not {lanes}")))
}

/// The methods of both kinds of handles, besides answers.
macro_rules! handle {
    ($name:ident) => {
        impl $name {
            /// Readable while there are events: for `poll` in the program's main loop. The program takes events with
            /// [`next_event`](Self::next_event) and never reads the descriptor.
            pub fn event_fd(&self) -> std::os::fd::BorrowedFd<'_> {
                self.handle.desk.event_fd()
            }

            /// The next event, or None.
            pub fn next_event(&self) -> Option<Event> {
                self.handle.desk.next_event()
            }

            /// Waits for the next event; None after the timeout. Without a timeout it waits forever.
            /// [`Event::Completed`] or [`Event::Failed`] is the last event.
            ///
            /// # Errors
            /// The kernel's error of `poll`.
            pub fn wait(&self, timeout: Option<std::time::Duration>) -> Result<Option<Event>> {
                self.handle.desk.wait(timeout)
            }

            /// The progress. May be called from any thread.
            pub fn stats(&self) -> Stats {
                self.handle.desk.stats()
            }

            /// Rejects the open question with a reason, which ends the migration.
            ///
            /// # Errors
            /// [`Error::Usage`](crate::Error::Usage) if no question is open.
            pub fn refuse(&self, why: &str) -> Result<()> {
                self.handle.desk.refuse(why)
            }

            /// Cancels the migration, unless the guest has been handed over: [`Event::Failed`] follows. After the
            /// switchover this has no effect, because the guest needs both sides until its last page has arrived. May
            /// be called from any thread.
            pub fn cancel(&self) {
                self.handle.cancel();
            }
        }

        /// Orders about connections, from the switchover on, in a migration that recovers. Events report the result.
        ///
        /// # Errors
        /// All of these: [`Error::Usage`](crate::Error::Usage) before the switchover, after the last event, and if the
        /// migration does not recover.
        impl $name {
            /// Gives up the connections, and opens or accepts none until the program calls for it: [`Event::Paused`].
            /// The guest runs on with the pages that it has.
            pub fn pause(&self) -> Result<()> {
                self.handle.desk.order(LinkOrder::Pause)
            }

            /// Ends a pause: opens or accepts connections as before.
            pub fn resume(&self) -> Result<()> {
                self.handle.desk.order(LinkOrder::Resume)
            }

            /// Continues over these connected stream sockets, as many as at the start, the first for demanded pages.
            /// umem owns them from here on, gives up its old connections and no longer dials or listens. The other
            /// side's program gives their other ends in the same order, possibly later.
            ///
            /// # Errors
            /// Also for too few or too many, and for a descriptor other than a connected stream socket.
            pub fn reconnect(&self, sockets: Vec<std::os::fd::OwnedFd>) -> Result<()> {
                check_connections(&sockets)?;
                self.handle.desk.order(LinkOrder::Reconnect(sockets))
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($name)).field("stats", &self.stats()).finish()
            }
        }
    };
}

pub(super) use handle;
