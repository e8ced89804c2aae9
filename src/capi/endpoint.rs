//! The common part of both roles' handles: first a setup, then a migration.

use std::ffi::{CString, c_int};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use super::types::{c_text, umem_event, umem_event_kind, umem_guest, umem_status};
use crate::embed::handle::check_connections;
use crate::embed::{Event, Failure};
use crate::error::{Context, Error, Result};
use crate::transport::uri::Uri;

/// A setup `S` that becomes a migration `R`.
pub(super) struct Endpoint<S, R> {
    setup: Mutex<Option<S>>,
    running: OnceLock<R>,
    held: Mutex<Held>,
}

/// The text and data of the event that was taken last.
#[derive(Default)]
struct Held {
    text: CString,
    data: Vec<u8>,
}

impl<S, R> Endpoint<S, R> {
    pub(super) fn new(setup: S) -> Endpoint<S, R> {
        Endpoint {
            setup: Mutex::new(Some(setup)),
            running: OnceLock::new(),
            held: Mutex::default(),
        }
    }

    /// Changes the setup; an error after the start.
    pub(super) fn set_up(&self, change: impl FnOnce(&mut S) -> Result<()>) -> Result<()> {
        change(lock(&self.setup).as_mut().ok_or_else(has_started)?)
    }

    /// Starts the migration. The setup is consumed, also on failure.
    pub(super) fn start(&self, start: impl FnOnce(S) -> Result<R>) -> Result<()> {
        let running = start(lock(&self.setup).take().ok_or_else(has_started)?)?;
        // Never set before: there was only one setup.
        let _ = self.running.set(running);
        Ok(())
    }

    /// The migration; an error before the start.
    pub(super) fn running(&self) -> Result<&R> {
        self.running.get().ok_or_else(|| {
            Error::Usage(
                "the migration has not been started, or its start failed: call start first".into(),
            )
        })
    }

    /// Writes the event to `to`, which may be uninitialized. The event's text and data stay until the next event is
    /// taken.
    ///
    /// # Safety
    /// `to` has room for an event and no other user during the call.
    pub(super) unsafe fn take(&self, event: Option<Event>, to: NonNull<umem_event>) {
        let event = event.map_or(umem_event::NONE, |event| self.describe(event));
        // SAFETY: as the caller says; the old contents are overwritten unread.
        unsafe { to.write(event) };
    }

    fn describe(&self, event: Event) -> umem_event {
        use umem_event_kind as kind;
        let at_destination = umem_guest::UMEM_GUEST_AT_DESTINATION;
        let mut held = lock(&self.held);
        *held = Held::default();
        let mut described = umem_event::NONE;
        match event {
            Event::Connected => described.kind = kind::UMEM_EVENT_CONNECTED,
            Event::ReadLog => described.kind = kind::UMEM_EVENT_READ_LOG,
            Event::Stop => described.kind = kind::UMEM_EVENT_STOP,
            Event::SaveState => described.kind = kind::UMEM_EVENT_SAVE,
            Event::LoadState(state) => {
                described.kind = kind::UMEM_EVENT_LOAD;
                held.data = state;
                described.data = held.data.as_ptr().cast();
                described.data_bytes = held.data.len();
            }
            Event::Run => {
                described.kind = kind::UMEM_EVENT_RUN;
                described.guest = at_destination;
            }
            Event::Running { downtime } => {
                described.kind = kind::UMEM_EVENT_RUNNING;
                described.guest = at_destination;
                described.downtime_us = micros(downtime);
            }
            Event::Recovering { ref reason } | Event::Paused { ref reason } => {
                described.kind = match event {
                    Event::Paused { .. } => kind::UMEM_EVENT_PAUSED,
                    _ => kind::UMEM_EVENT_RECOVERING,
                };
                described.guest = at_destination;
                held.text = c_text(reason);
                described.text = held.text.as_ptr();
            }
            Event::Resumed { disconnected } => {
                described.kind = kind::UMEM_EVENT_RESUMED;
                described.guest = at_destination;
                described.disconnected_us = micros(disconnected);
            }
            Event::Completed(report) => {
                described.kind = kind::UMEM_EVENT_COMPLETED;
                described.guest = at_destination;
                let report = serde_json::to_string(&report).expect("plain numbers and strings");
                held.text = c_text(&report);
                described.text = held.text.as_ptr();
            }
            Event::Failed(Failure { error, guest }) => {
                described.kind = kind::UMEM_EVENT_FAILED;
                described.status = umem_status::from(&error);
                described.guest = guest.into();
                held.text = c_text(&error.to_string());
                described.text = held.text.as_ptr();
            }
        }
        described
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn has_started() -> Error {
    Error::Usage(
        "the migration has started already: make another handle for another migration".into(),
    )
}

/// A timeout of so many milliseconds; None, which waits forever, for a negative number.
pub(super) fn timeout(timeout_ms: c_int) -> Option<Duration> {
    u64::try_from(timeout_ms).ok().map(Duration::from_millis)
}

pub(super) fn address(text: &str) -> Result<Uri> {
    text.parse().map_err(Error::Usage)
}

/// A descriptor of the caller.
///
/// # Safety
/// The descriptor stays open while the result is used.
pub(super) unsafe fn descriptor<'a>(number: c_int, what: &str) -> Result<BorrowedFd<'a>> {
    if number < 0 {
        return Err(Error::Usage(format!("{what} is {number}, which is not a descriptor")));
    }
    // SAFETY: the number is not -1; the first system call refuses a descriptor that is not open.
    Ok(unsafe { BorrowedFd::borrow_raw(number) })
}

/// Transfers the caller's sockets to umem: `use_them` gets duplicates, and once it has succeeded the originals are
/// closed. If a step fails, the sockets stay the caller's, open and with their flags: a peer may reset a connection
/// between any two checks.
///
/// # Safety
/// The caller owns the sockets.
pub(super) unsafe fn give_sockets(
    numbers: &[c_int],
    use_them: impl FnOnce(Vec<OwnedFd>) -> Result<()>,
) -> Result<()> {
    let sockets: Vec<BorrowedFd<'_>> = numbers
        .iter()
        // SAFETY: the caller closes none of them before this call returns.
        .map(|&number| unsafe { descriptor(number, "a socket") })
        .collect::<Result<_>>()?;
    check_connections(&sockets)?;
    let duplicates = sockets
        .iter()
        .map(|socket| socket.try_clone_to_owned().context(|| "duplicating a socket"))
        .collect::<Result<_>>()?;
    use_them(duplicates)?;
    for &number in numbers {
        // SAFETY: open, named once (checked above), and now owned by umem: `use_them` has taken the duplicates.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    }
    Ok(())
}
