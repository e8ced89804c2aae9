//! Arguments and results of the functions, and the last error of a thread.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;

use crate::embed::{Guest, Stats};
use crate::error::{Error, Result};
use crate::runtime::panics;

/// The result of a call, or of a migration.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum umem_status {
    /// Success.
    UMEM_OK = 0,
    /// The call is not allowed, now or with these arguments.
    UMEM_ERR_USAGE = 1,
    /// A system call failed. The text has the kernel's reason.
    UMEM_ERR_SYSTEM = 2,
    /// The memory, its file or this kernel is unsuitable.
    UMEM_ERR_UNSUPPORTED = 3,
    /// The guest's memory does not fit into the destination.
    UMEM_ERR_NO_MEMORY = 4,
    /// umem cannot listen on the address.
    UMEM_ERR_LISTEN = 5,
    /// No process answers at the address.
    UMEM_ERR_CONNECT = 6,
    /// A connection ended before the migration did.
    UMEM_ERR_LOST = 7,
    /// The other side ended the migration. The text has its reason.
    UMEM_ERR_PEER = 8,
    /// The other side violated the protocol.
    UMEM_ERR_PROTOCOL = 9,
    /// This side's program refused a request.
    UMEM_ERR_HOST = 10,
    /// The migration was cancelled, or its handle destroyed.
    UMEM_ERR_CANCELLED = 11,
    /// umem has a bug. The text describes it.
    UMEM_ERR_INTERNAL = 12,
    /// With checksums: the guest has moved, and its memory differs from the source's. Stop the
    /// guest, and start it again from an older state.
    UMEM_ERR_DAMAGED = 13,
}

/// The kind of an event.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum umem_event_kind {
    /// No event, or no event within the timeout.
    UMEM_EVENT_NONE = 0,
    /// Both sides: every connection is open.
    UMEM_EVENT_CONNECTED = 1,
    /// Source: stop every vCPU and every other writer of guest memory. With umem_source_precopy,
    /// report the last writes. Then call umem_source_stopped.
    UMEM_EVENT_STOP = 2,
    /// Source: save the device state, if there is any, and pass it to umem_source_saved.
    UMEM_EVENT_SAVE = 3,
    /// Destination: load the device state in `data`, then call umem_destination_loaded. Loading may
    /// touch guest memory: umem fetches the missing pages meanwhile.
    UMEM_EVENT_LOAD = 4,
    /// Destination: the guest belongs to this side. Start its vCPUs, then call
    /// umem_destination_running.
    UMEM_EVENT_RUN = 5,
    /// Source: the guest runs at the destination. `downtime_us` has the time that the guest stood
    /// still.
    UMEM_EVENT_RUNNING = 6,
    /// Both sides: every page has arrived. This is the last event. `text` is a report, one JSON
    /// object.
    UMEM_EVENT_COMPLETED = 7,
    /// Both sides: the migration failed. This is the last event. `status` and `text` have the
    /// reason, `guest` has the guest's owner.
    UMEM_EVENT_FAILED = 8,
    /// Both sides: the connections are lost or given up. `text` has the reason. umem opens new
    /// connections, or waits for the source to do so. The guest runs on with the pages that it has.
    UMEM_EVENT_RECOVERING = 9,
    /// Both sides: as UMEM_EVENT_RECOVERING, but umem opens no connection until the program calls
    /// umem_source_reconnect or umem_source_resume (source), umem_destination_reconnect or
    /// umem_destination_resume (destination).
    UMEM_EVENT_PAUSED = 10,
    /// Both sides: the connections are open again. There were none for `disconnected_us`. Of
    /// consecutive untaken events of this kind and the previous two, umem keeps only the last.
    UMEM_EVENT_RESUMED = 11,
    /// Source, with umem_source_log: report what the guest has written since its log was read last,
    /// with umem_source_written or umem_source_written_bitmap. Then call umem_source_log_read. The
    /// guest runs on.
    UMEM_EVENT_READ_LOG = 12,
}

/// The guest's owner.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum umem_guest {
    /// The source. After a failure, a source that was asked to stop its guest lets the guest
    /// continue. A destination discards its copy of the guest: the memory no longer blocks a
    /// thread, and its contents are invalid.
    UMEM_GUEST_AT_SOURCE = 0,
    /// The destination, or possibly the destination: the source must never run the guest again.
    /// After a failure, the guest at the destination waits where pages are missing; see
    /// umem_destination_guest_has_stopped.
    UMEM_GUEST_AT_DESTINATION = 1,
}

/// A request to the program, or a report.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct umem_event {
    /// The kind. The fields below are 0 or NULL for every kind that they do not name.
    pub kind: umem_event_kind,
    /// UMEM_EVENT_FAILED: the reason.
    pub status: umem_status,
    /// Every kind: the guest's owner from here on.
    pub guest: umem_guest,
    /// UMEM_EVENT_FAILED, UMEM_EVENT_RECOVERING, UMEM_EVENT_PAUSED: the reason, in one line.
    /// UMEM_EVENT_COMPLETED: the report. umem owns the text. `text` and `data` are valid until the
    /// next event is taken from this handle, or the handle is destroyed.
    pub text: *const c_char,
    /// UMEM_EVENT_LOAD: the device state, which umem owns.
    pub data: *const c_void,
    /// UMEM_EVENT_LOAD: the size of the device state, bytes; may be 0.
    pub data_bytes: usize,
    /// UMEM_EVENT_RUNNING: how long the guest stood still, microseconds.
    pub downtime_us: u64,
    /// UMEM_EVENT_RESUMED: how long there were no connections, microseconds.
    pub disconnected_us: u64,
}

/// A range of a region.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct umem_range {
    /// Its start in the region, bytes.
    pub offset: u64,
    /// Its length, bytes; may be 0.
    pub bytes: u64,
}

/// The progress of a migration. All fields are 0 until the connections are open.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct umem_stats {
    /// The guest's memory, bytes.
    pub total_bytes: u64,
    /// Bytes that have not arrived (destination) or have not been sent (source).
    pub missing_bytes: u64,
    /// Bytes that moved as data.
    pub data_bytes: u64,
    /// Bytes that moved as a zero header.
    pub zero_bytes: u64,
    /// Bytes that moved as a hole header: the source's file has nothing there.
    pub hole_bytes: u64,
    /// Pages that moved because the guest waited for them.
    pub pages_demand: u64,
    /// Pages that moved without a demand.
    pub pages_background: u64,
    /// With checksums: frames and pages that changed in transit to this side and were sent again.
    pub checksum_errors: u64,
}

impl umem_event {
    pub(super) const NONE: umem_event = umem_event {
        kind: umem_event_kind::UMEM_EVENT_NONE,
        status: umem_status::UMEM_OK,
        guest: umem_guest::UMEM_GUEST_AT_SOURCE,
        text: std::ptr::null(),
        data: std::ptr::null(),
        data_bytes: 0,
        downtime_us: 0,
        disconnected_us: 0,
    };
}

impl From<&Error> for umem_status {
    fn from(error: &Error) -> umem_status {
        match error {
            Error::Usage(_) => umem_status::UMEM_ERR_USAGE,
            Error::System { .. }
            | Error::RamFailed { .. }
            | Error::Ring(_)
            | Error::Environment(_) => umem_status::UMEM_ERR_SYSTEM,
            Error::Protocol { .. } => umem_status::UMEM_ERR_PROTOCOL,
            Error::Peer { .. } | Error::Insecure { .. } => umem_status::UMEM_ERR_PEER,
            Error::Lost { .. } => umem_status::UMEM_ERR_LOST,
            Error::Connect { .. } => umem_status::UMEM_ERR_CONNECT,
            Error::Listen { .. } => umem_status::UMEM_ERR_LISTEN,
            Error::Ram { .. } | Error::Unsupported(_) => umem_status::UMEM_ERR_UNSUPPORTED,
            Error::Host(_) | Error::Ended(_) | Error::Preload(_) => umem_status::UMEM_ERR_HOST,
            Error::OutOfMemory(_) => umem_status::UMEM_ERR_NO_MEMORY,
            Error::Damaged { .. } => umem_status::UMEM_ERR_DAMAGED,
            // No function of this interface measures, or sends commands to another umem.
            Error::Internal(_) | Error::Bench(_) | Error::Control(_) => {
                umem_status::UMEM_ERR_INTERNAL
            }
            Error::Interrupted(_) => umem_status::UMEM_ERR_CANCELLED,
        }
    }
}

impl From<Guest> for umem_guest {
    fn from(guest: Guest) -> umem_guest {
        match guest {
            Guest::AtSource => umem_guest::UMEM_GUEST_AT_SOURCE,
            Guest::AtDestination => umem_guest::UMEM_GUEST_AT_DESTINATION,
        }
    }
}

impl From<Stats> for umem_stats {
    fn from(stats: Stats) -> umem_stats {
        let Stats {
            total_bytes,
            missing_bytes,
            data_bytes,
            zero_bytes,
            hole_bytes,
            pages_demand,
            pages_background,
            checksum_errors,
        } = stats;
        umem_stats {
            total_bytes,
            missing_bytes,
            data_bytes,
            zero_bytes,
            hole_bytes,
            pages_demand,
            pages_background,
            checksum_errors,
        }
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Returns umem's version, such as "0.1.0". The text is static: the caller does not free it.
#[unsafe(no_mangle)]
pub extern "C" fn umem_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// Returns the reason of this thread's last failed call, and the remedy, in one line. The text is
/// empty if no call of this thread has failed. umem owns the text; it is valid until this thread's
/// next failed call.
#[unsafe(no_mangle)]
pub extern "C" fn umem_last_error() -> *const c_char {
    LAST_ERROR.try_with(|text| text.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Makes a call; turns its error or panic into a status and this thread's last error.
pub(super) fn guard(call: impl FnOnce() -> Result<()>) -> umem_status {
    let error = panics::inside(|| match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error),
        Err(payload) => Some(panics::error(&*payload)),
    });
    let Some(error) = error else { return umem_status::UMEM_OK };
    let text = c_text(&error.to_string());
    // Fails only in a thread that is ending, and such a thread reads no error.
    let _ = LAST_ERROR.try_with(|last| last.replace(text));
    (&error).into()
}

/// Makes a handle; NULL on failure.
pub(super) fn make<T>(new: impl FnOnce() -> T) -> *mut T {
    panics::keep_quiet();
    let mut handle = std::ptr::null_mut();
    guard(|| {
        handle = Box::into_raw(Box::new(new()));
        Ok(())
    });
    handle
}

/// Destroys a handle; NULL has no effect.
///
/// # Safety
/// The handle came from [`make`] and has no other user.
pub(super) unsafe fn unmake<T>(handle: *mut T) {
    if !handle.is_null() {
        guard(|| {
            // SAFETY: as the caller says.
            drop(unsafe { Box::from_raw(handle) });
            Ok(())
        });
    }
}

/// The value that the caller's pointer points to.
///
/// # Safety
/// The pointer is NULL, or points to a `T` for as long as the result is used.
pub(super) unsafe fn given<'a, T>(pointer: *const T, what: &str) -> Result<&'a T> {
    // SAFETY: as the caller says.
    unsafe { pointer.as_ref() }.ok_or_else(|| Error::Usage(format!("{what} is NULL")))
}

/// The caller's room for a `T`. It may be uninitialized, so it is only written.
pub(super) fn room<T>(pointer: *mut T, what: &str) -> Result<NonNull<T>> {
    NonNull::new(pointer).ok_or_else(|| Error::Usage(format!("{what} is NULL")))
}

/// A text of the caller.
///
/// # Safety
/// The pointer is NULL, or its text ends in a zero byte.
pub(super) unsafe fn text<'a>(pointer: *const c_char, what: &str) -> Result<&'a str> {
    if pointer.is_null() {
        return Err(Error::Usage(format!("{what} is NULL")));
    }
    // SAFETY: as the caller says.
    let text = unsafe { CStr::from_ptr(pointer) }.to_str();
    text.map_err(|_| Error::Usage(format!("{what} is not UTF-8")))
}

/// An array of `count` `T` of the caller.
///
/// # Safety
/// The pointer is NULL, or points to `count` `T`.
pub(super) unsafe fn list<'a, T>(pointer: *const T, count: usize, what: &str) -> Result<&'a [T]> {
    match (pointer.is_null(), count) {
        (_, 0) => Ok(&[]),
        (true, _) => Err(Error::Usage(format!("{what} is NULL"))),
        // SAFETY: as the caller says.
        (false, _) => Ok(unsafe { std::slice::from_raw_parts(pointer, count) }),
    }
}

/// The text for C, cut at its first zero byte. No text of umem has one.
pub(super) fn c_text(text: &str) -> CString {
    let end = text.find('\0').unwrap_or(text.len());
    CString::new(&text[..end]).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last_error() -> String {
        // SAFETY: the pointer always points to a text.
        unsafe { CStr::from_ptr(umem_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn panic_becomes_an_internal_error_with_its_message() {
        panics::keep_quiet();
        let status = guard(|| panic!("two\nlines, {}", 1 + 1));
        assert_eq!(status, umem_status::UMEM_ERR_INTERNAL);
        let text = last_error();
        assert!(text.contains("two lines, 2 at src/capi/types.rs"), "{text}");
        assert!(!text.contains('\n'), "{text}");
        assert_eq!(guard(|| Ok(())), umem_status::UMEM_OK);
        assert_eq!(last_error(), text, "a successful call keeps the last error");
    }

    #[test]
    fn last_error_belongs_to_the_calling_thread() {
        guard(|| Err(Error::Usage("ours".into())));
        std::thread::spawn(|| assert_eq!(last_error(), "")).join().unwrap();
        assert_eq!(last_error(), "ours");
    }
}
