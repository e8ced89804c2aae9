//! What the functions give and take.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;

use crate::embed::{Guest, Stats};
use crate::error::{Error, Result};
use crate::runtime::panics;

/// What became of a call, or of a migration.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum umem_status {
    /// It worked.
    UMEM_OK = 0,
    /// The call is not one that can be made like this, or now.
    UMEM_ERR_USAGE = 1,
    /// The kernel refused something; the text has its reason.
    UMEM_ERR_SYSTEM = 2,
    /// The memory, its file or this kernel cannot be used.
    UMEM_ERR_UNSUPPORTED = 3,
    /// The guest's memory does not fit into the destination.
    UMEM_ERR_NO_MEMORY = 4,
    /// The address cannot be listened at.
    UMEM_ERR_LISTEN = 5,
    /// Nobody answers at the address.
    UMEM_ERR_CONNECT = 6,
    /// A connection ended before the migration did.
    UMEM_ERR_LOST = 7,
    /// The other side gave up; the text has its reason.
    UMEM_ERR_PEER = 8,
    /// The other side sent what the protocol does not allow.
    UMEM_ERR_PROTOCOL = 9,
    /// This side's program has refused what it was asked to do.
    UMEM_ERR_HOST = 10,
    /// It was cancelled, or its handle destroyed.
    UMEM_ERR_CANCELLED = 11,
    /// umem has a bug.
    UMEM_ERR_INTERNAL = 12,
    /// With checksums: the guest has moved, and its memory is not what the source has. Stop it, and start it
    /// again from something older.
    UMEM_ERR_DAMAGED = 13,
}

/// What an event is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum umem_event_kind {
    /// There is none, or none in time.
    UMEM_EVENT_NONE = 0,
    /// Both sides: every connection is open.
    UMEM_EVENT_CONNECTED = 1,
    /// Source: stop every vCPU and all else that writes guest memory, then call umem_source_stopped. With
    /// umem_source_precopy the last of what has been written is told in between.
    UMEM_EVENT_STOP = 2,
    /// Source: save the device state, if there is any, and give it to umem_source_saved.
    UMEM_EVENT_SAVE = 3,
    /// Destination: load the device state, which is in `data`, then call umem_destination_loaded.
    /// Loading may touch guest memory, whose pages are fetched meanwhile.
    UMEM_EVENT_LOAD = 4,
    /// Destination: the guest belongs to this side. Start its vCPUs, then call
    /// umem_destination_running.
    UMEM_EVENT_RUN = 5,
    /// Source: the guest runs at the destination; it stood still for `downtime_us`.
    UMEM_EVENT_RUNNING = 6,
    /// Both sides: every page has come. The last event; `text` is a report, one JSON object.
    UMEM_EVENT_COMPLETED = 7,
    /// Both sides: it did not work. The last event; `status` and `text` say why, `guest` whose the
    /// guest is.
    UMEM_EVENT_FAILED = 8,
    /// Both sides: the connections are lost, or given up; `text` says what became of them. umem opens
    /// others, or waits for the source to; the guest runs on with what it has.
    UMEM_EVENT_RECOVERING = 9,
    /// Both sides: the same, and umem opens none until the program says how: umem_source_reconnect or
    /// umem_source_resume, umem_destination_reconnect or umem_destination_resume.
    UMEM_EVENT_PAUSED = 10,
    /// Both sides: there are connections again; there were none for `disconnected_us`. Of this event and
    /// the two before it the last is kept where nobody has taken the others.
    UMEM_EVENT_RESUMED = 11,
    /// Source, where umem_source_log says that there is one: tell umem_source_written or
    /// umem_source_written_bitmap what the guest has written since its log was read last, then call
    /// umem_source_log_read. The guest runs on.
    UMEM_EVENT_READ_LOG = 12,
}

/// Whose the guest is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum umem_guest {
    /// The source's. After a failure a source that was asked to stop its guest lets it go on; a
    /// destination throws away what it has, which no longer waits for anything and is worth nothing.
    UMEM_GUEST_AT_SOURCE = 0,
    /// The destination's, or it may be: the source must never run it again. After a failure the guest
    /// at the destination waits where pages are missing; see umem_destination_guest_has_stopped.
    UMEM_GUEST_AT_DESTINATION = 1,
}

/// What a program is asked or told.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct umem_event {
    /// What it is; the fields after this are 0 or NULL where it does not say otherwise.
    pub kind: umem_event_kind,
    /// UMEM_EVENT_FAILED: why.
    pub status: umem_status,
    /// Whose the guest is from here on.
    pub guest: umem_guest,
    /// UMEM_EVENT_FAILED, UMEM_EVENT_RECOVERING, UMEM_EVENT_PAUSED: why, in one line;
    /// UMEM_EVENT_COMPLETED: the report. Valid until the next event is taken from this handle, as is
    /// `data`.
    pub text: *const c_char,
    /// UMEM_EVENT_LOAD: the device state …
    pub data: *const c_void,
    /// … and its size in bytes, which may be 0.
    pub data_bytes: usize,
    /// UMEM_EVENT_RUNNING: how long the guest stood still, microseconds.
    pub downtime_us: u64,
    /// UMEM_EVENT_RESUMED: how long there were no connections, microseconds.
    pub disconnected_us: u64,
}

/// Bytes of a region.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct umem_range {
    /// Where they begin in the region.
    pub offset: u64,
    /// How many there are, which may be 0.
    pub bytes: u64,
}

/// How far a migration has come. All 0 before the connections are open.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct umem_stats {
    /// The guest's memory, bytes.
    pub total_bytes: u64,
    /// What of it has not come yet, or at the source not gone, bytes.
    pub missing_bytes: u64,
    /// What came as data, bytes.
    pub data_bytes: u64,
    /// What came as a header that says zeroes, bytes.
    pub zero_bytes: u64,
    /// What came as a header that says that the source has nothing there, bytes.
    pub hole_bytes: u64,
    /// Pages that somebody waited for.
    pub pages_demand: u64,
    /// Pages that came unasked.
    pub pages_background: u64,
    /// With checksums: what came to this side otherwise than it was sent, and was sent again.
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
            // Nothing behind this interface measures, or sends commands to another umem.
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

/// umem's version, such as "0.1.0". The text stays for ever.
#[unsafe(no_mangle)]
pub extern "C" fn umem_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// What was wrong with the last call of this thread that failed, and what to do about it, in one line.
/// Empty if none has. The text is valid until the next call of this thread that fails.
#[unsafe(no_mangle)]
pub extern "C" fn umem_last_error() -> *const c_char {
    LAST_ERROR.try_with(|text| text.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Makes a call whose errors become codes, and whose panics do.
pub(super) fn guard(call: impl FnOnce() -> Result<()>) -> umem_status {
    let error = panics::inside(|| match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error),
        Err(payload) => Some(panics::error(&*payload)),
    });
    let Some(error) = error else { return umem_status::UMEM_OK };
    let text = c_text(&error.to_string());
    // Fails in a thread that is ending, where nobody asks.
    let _ = LAST_ERROR.try_with(|last| last.replace(text));
    (&error).into()
}

/// Makes a handle; NULL where that fails.
pub(super) fn make<T>(new: impl FnOnce() -> T) -> *mut T {
    panics::keep_quiet();
    let mut handle = std::ptr::null_mut();
    guard(|| {
        handle = Box::into_raw(Box::new(new()));
        Ok(())
    });
    handle
}

/// Ends a handle; NULL has none.
///
/// # Safety
/// It came from [`make`], and nobody uses it any more.
pub(super) unsafe fn unmake<T>(handle: *mut T) {
    if !handle.is_null() {
        guard(|| {
            // SAFETY: as the caller says.
            drop(unsafe { Box::from_raw(handle) });
            Ok(())
        });
    }
}

/// What a pointer of the caller's points to.
///
/// # Safety
/// Where it is not NULL it points to a `T`, for as long as the answer is used.
pub(super) unsafe fn given<'a, T>(pointer: *const T, what: &str) -> Result<&'a T> {
    // SAFETY: as the caller says.
    unsafe { pointer.as_ref() }.ok_or_else(|| Error::Usage(format!("{what} is NULL")))
}

/// Where the caller wants a `T`. Nothing has to be there, so it is only written.
pub(super) fn room<T>(pointer: *mut T, what: &str) -> Result<NonNull<T>> {
    NonNull::new(pointer).ok_or_else(|| Error::Usage(format!("{what} is NULL")))
}

/// A text of the caller's.
///
/// # Safety
/// Where it is not NULL it ends in a zero byte.
pub(super) unsafe fn text<'a>(pointer: *const c_char, what: &str) -> Result<&'a str> {
    if pointer.is_null() {
        return Err(Error::Usage(format!("{what} is NULL")));
    }
    // SAFETY: as the caller says.
    let text = unsafe { CStr::from_ptr(pointer) }.to_str();
    text.map_err(|_| Error::Usage(format!("{what} is not UTF-8")))
}

/// As many `T` as the caller says there are.
///
/// # Safety
/// Where `count` is not 0 and the pointer not NULL there are that many.
pub(super) unsafe fn list<'a, T>(pointer: *const T, count: usize, what: &str) -> Result<&'a [T]> {
    match (pointer.is_null(), count) {
        (_, 0) => Ok(&[]),
        (true, _) => Err(Error::Usage(format!("{what} is NULL"))),
        // SAFETY: as the caller says.
        (false, _) => Ok(unsafe { std::slice::from_raw_parts(pointer, count) }),
    }
}

/// For C; what comes after a zero byte, which no text of ours has, is left out.
pub(super) fn c_text(text: &str) -> CString {
    let end = text.find('\0').unwrap_or(text.len());
    CString::new(&text[..end]).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last_error() -> String {
        // SAFETY: it always points to a text.
        unsafe { CStr::from_ptr(umem_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_a_code_with_its_message() {
        panics::keep_quiet();
        let status = guard(|| panic!("two\nlines, {}", 1 + 1));
        assert_eq!(status, umem_status::UMEM_ERR_INTERNAL);
        let text = last_error();
        assert!(text.contains("two lines, 2 at src/capi/types.rs"), "{text}");
        assert!(!text.contains('\n'), "{text}");
        assert_eq!(guard(|| Ok(())), umem_status::UMEM_OK);
        assert_eq!(last_error(), text, "a call that works leaves it");
    }

    #[test]
    fn the_last_error_is_the_threads_own() {
        guard(|| Err(Error::Usage("ours".into())));
        std::thread::spawn(|| assert_eq!(last_error(), "")).join().unwrap();
        assert_eq!(last_error(), "ours");
    }
}
