//! The functions of a destination.

use std::ffi::{CString, c_char, c_int, c_void};
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use super::endpoint::{Endpoint, address, descriptor, give_sockets, timeout};
use super::types::{
    c_text, given, guard, list, make, room, text, umem_event, umem_stats, umem_status, unmake,
};
use crate::embed::{Destination, DestinationSetup, Memory};
use crate::error::Error;
use crate::transport::uri::Uri;

/// The destination: the side that the guest moves to. A handle serves one migration.
pub struct umem_destination {
    endpoint: Endpoint<DestinationSetup, Destination>,
    /// The addresses of the listeners; the last one is current. Earlier texts stay, because callers hold pointers.
    uris: Mutex<Vec<CString>>,
}

impl umem_destination {
    fn listens(&self, uri: &Uri) {
        self.uris.lock().unwrap_or_else(PoisonError::into_inner).push(c_text(&uri.to_string()));
    }
}

/// Makes a destination. The caller destroys the destination with umem_destination_destroy. Returns
/// NULL on failure.
#[unsafe(no_mangle)]
pub extern "C" fn umem_destination_new() -> *mut umem_destination {
    make(|| umem_destination {
        endpoint: Endpoint::new(DestinationSetup::new()),
        uris: Mutex::default(),
    })
}

/// Adds a region: `bytes` bytes of this process's memory at `address`, both multiples of the
/// memory's page size. The region has the same `name` at the source. There are two kinds of memory:
///
/// - MAP_SHARED, of a memfd or a file on tmpfs or hugetlbfs. `fd` is the file. The file is mapped
///   as a whole and is empty: it has no contents yet. umem duplicates the descriptor and maps the
///   file itself.
/// - MAP_PRIVATE | MAP_ANONYMOUS, which no thread has touched. `fd` is -1.
///
/// The memory stays mapped at its address until the handle is destroyed. From
/// umem_destination_start on, a thread that touches a missing page waits until the page has
/// arrived. A forked child does not have the memory before the end of the migration.
///
/// Until the end of the migration, discard pages (a balloon, free page reporting) with
/// madvise(MADV_REMOVE) of MAP_SHARED memory and with madvise(MADV_DONTNEED) of anonymous memory.
/// The kernel reports both to umem, and madvise() returns once umem has read the report. Do not use
/// two other ways:
///
/// - fallocate() that punches a hole in the file. The kernel does not report it, and a page that
///   arrives later fills the hole with the source's contents.
/// - MADV_DONTNEED of MAP_SHARED memory. The kernel reports it as a discard, and pages that have
///   not arrived would read as zeroes.
///
/// UMEM_ERR_USAGE: the size is 0. UMEM_ERR_UNSUPPORTED: the file has contents.
/// umem_destination_start reports other defects of the memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_region(
    destination: *const umem_destination,
    name: *const c_char,
    address: *mut c_void,
    bytes: u64,
    fd: c_int,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, `name` is NULL or ends in a zero byte, `fd`
    // stays open, and the memory mapped, during the call.
    guard(|| unsafe {
        let name = text(name, "name")?;
        let start = NonNull::new(address).ok_or_else(|| Error::Usage("address is NULL".into()))?;
        let file = (fd != -1).then(|| descriptor(fd, "fd")).transpose()?;
        let memory = Memory { start, bytes, file };
        given(destination, "destination")?.endpoint.set_up(|setup| setup.region(name, &memory))
    })
}

/// Uses the program's userfaultfd; without this call umem makes one. Every region must be
/// registered with the userfaultfd before the start: for missing faults and, if the region is
/// MAP_SHARED, for minor faults. umem duplicates the descriptor and makes it non-blocking. Only
/// umem reads it until the handle is destroyed. umem unregisters the regions at the end.
///
/// The userfaultfd must be made without UFFD_USER_MODE_ONLY. Without UFFD_FEATURE_EVENT_REMOVE the
/// program must not discard pages of the regions before the end.
///
/// UMEM_ERR_SYSTEM: the descriptor cannot be duplicated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_userfaultfd(
    destination: *const umem_destination,
    userfaultfd: c_int,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, and `userfaultfd` stays open during the call.
    guard(|| unsafe {
        let userfaultfd = descriptor(userfaultfd, "userfaultfd")?;
        given(destination, "destination")?.endpoint.set_up(|setup| setup.userfaultfd(userfaultfd))
    })
}

/// Sets the address to listen on from the start on: `uri` is tcp:HOST:PORT or unix:PATH. With port
/// 0 the kernel chooses the port. umem accepts one source, with one connection for demanded pages
/// and up to `lanes_max` more, 1 to 64.
///
/// UMEM_ERR_USAGE: `uri` is not an address, or `lanes_max` is out of range.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_listen(
    destination: *const umem_destination,
    uri: *const c_char,
    lanes_max: u16,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, and `uri` is NULL or ends in a zero byte.
    guard(|| unsafe {
        let uri = address(text(uri, "uri")?)?;
        given(destination, "destination")?.endpoint.set_up(|setup| setup.listen(uri, lanes_max))
    })
}

/// Uses `count` connected stream sockets, 1 to 65: the first for demanded pages, the others for the
/// rest. A single socket carries both. The source gets the other ends in the same order. With
/// UMEM_OK umem owns the sockets and closes them. Otherwise they stay the caller's.
///
/// UMEM_ERR_USAGE: too few or too many sockets, a socket named twice, or a descriptor other than a
/// connected stream socket.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_connections(
    destination: *const umem_destination,
    sockets: *const c_int,
    count: usize,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `count` numbers lie at `sockets`, and the
    // caller owns those descriptors.
    guard(|| unsafe {
        let numbers = list(sockets, count, "sockets")?;
        given(destination, "destination")?
            .endpoint
            .set_up(|setup| give_sockets(numbers, |sockets| setup.connections(sockets)))
    })
}

/// Chooses whether the migration continues when connections are lost after the switchover. It
/// continues only if both sides choose so; otherwise a loss ends the migration. The default is true
/// for a destination that listens, and false for one with given connections: its program must give
/// other connections on UMEM_EVENT_PAUSED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_recover(
    destination: *const umem_destination,
    recovers: bool,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(destination, "destination")?.endpoint.set_up(|setup| {
            setup.recover(recovers);
            Ok(())
        })
    })
}

/// Starts the migration: listens, and registers the regions with userfaultfd. From here on a thread
/// that touches the regions waits. umem reports everything else with events. A handle is started
/// once: after an error it can only be destroyed, and the regions are as before.
///
/// UMEM_ERR_USAGE: there is no region, or neither an address nor connections. UMEM_ERR_LISTEN: umem
/// cannot listen on the address. UMEM_ERR_UNSUPPORTED: the memory differs from its description,
/// userfaultfd is not permitted, or the kernel lacks a feature. UMEM_ERR_SYSTEM: the kernel refused
/// a thread or a descriptor.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_start(
    destination: *const umem_destination,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        let handle = given(destination, "destination")?;
        handle.endpoint.start(DestinationSetup::start)?;
        handle.endpoint.running()?.uri().into_iter().for_each(|uri| handle.listens(uri));
        Ok(())
    })
}

/// Returns the current address of the listener, with the port that the kernel chose. Returns NULL
/// before the start, and with given connections. umem owns the text; it is valid until the handle
/// is destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_uri(
    destination: *const umem_destination,
) -> *const c_char {
    let mut uri = std::ptr::null();
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        let handle = given(destination, "destination")?;
        let uris = handle.uris.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(text) = uris.last() {
            uri = text.as_ptr();
        }
        Ok(())
    });
    uri
}

/// Returns a descriptor that is readable while there are events, for poll(); -1 before the start.
/// The descriptor belongs to umem: poll it, do not read or close it. Take events with
/// umem_destination_next_event.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_event_fd(destination: *const umem_destination) -> c_int {
    let mut number = -1;
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        number = given(destination, "destination")?.endpoint.running()?.event_fd().as_raw_fd();
        Ok(())
    });
    number
}

/// Takes the next event without waiting. The kind is UMEM_EVENT_NONE if there is none.
///
/// UMEM_ERR_USAGE: the destination has not been started.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_next_event(
    destination: *const umem_destination,
    event: *mut umem_event,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `event` is NULL or has room for an
    // event, and is only written.
    guard(|| unsafe {
        let endpoint = &given(destination, "destination")?.endpoint;
        let event = room(event, "event")?;
        endpoint.take(endpoint.running()?.next_event(), event);
        Ok(())
    })
}

/// Takes the next event, and waits up to `timeout_ms` milliseconds for it; a negative timeout waits
/// forever. The kind is UMEM_EVENT_NONE after the timeout. UMEM_EVENT_COMPLETED or
/// UMEM_EVENT_FAILED is the last event.
///
/// UMEM_ERR_USAGE: the destination has not been started.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_wait(
    destination: *const umem_destination,
    timeout_ms: c_int,
    event: *mut umem_event,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `event` is NULL or has room for an
    // event, and is only written.
    guard(|| unsafe {
        let endpoint = &given(destination, "destination")?.endpoint;
        let event = room(event, "event")?;
        endpoint.take(endpoint.running()?.wait(timeout(timeout_ms))?, event);
        Ok(())
    })
}

/// Answers UMEM_EVENT_LOAD: the device state is loaded.
///
/// UMEM_ERR_USAGE: the request is not open, or has been answered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_loaded(
    destination: *const umem_destination,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(destination, "destination")?.endpoint.running()?.loaded() })
}

/// Answers UMEM_EVENT_RUN: the vCPUs run.
///
/// UMEM_ERR_USAGE: the request is not open, or has been answered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_running(
    destination: *const umem_destination,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(destination, "destination")?.endpoint.running()?.running() })
}

/// Refuses the open request, with a reason. UMEM_EVENT_FAILED follows on both sides: here with
/// UMEM_ERR_HOST and this reason; the other side's text has the reason too.
///
/// UMEM_ERR_USAGE: no request is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_refuse(
    destination: *const umem_destination,
    why: *const c_char,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, and `why` is NULL or ends in a zero byte.
    guard(|| unsafe {
        given(destination, "destination")?.endpoint.running()?.refuse(text(why, "why")?)
    })
}

/// Reports the progress. May be called at any time after the start.
///
/// UMEM_ERR_USAGE: the destination has not been started.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_stats(
    destination: *const umem_destination,
    stats: *mut umem_stats,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `stats` is NULL or has room for its
    // type, and is only written.
    guard(|| unsafe {
        let now = given(destination, "destination")?.endpoint.running()?.stats();
        room(stats, "stats")?.write(now.into());
        Ok(())
    })
}

/// Cancels the migration before the switchover: UMEM_EVENT_FAILED follows, with UMEM_ERR_CANCELLED.
/// After the switchover this has no effect: the guest needs both sides until its last page has
/// arrived.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_cancel(
    destination: *const umem_destination,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(destination, "destination")?.endpoint.running()?.cancel();
        Ok(())
    })
}

/// Gives up the connections, and opens or accepts none until the program calls
/// umem_destination_resume or umem_destination_reconnect. UMEM_EVENT_PAUSED follows. The guest runs
/// on with the pages that it has.
///
/// UMEM_ERR_USAGE: the call comes before the switchover or after the last event, or the migration does not
/// recover.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_pause(
    destination: *const umem_destination,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(destination, "destination")?.endpoint.running()?.pause() })
}

/// Ends a pause. umem listens on `uri` alone from now on until the end. If `uri` is NULL, umem
/// listens as before the pause. umem_destination_uri returns the address with the port that the
/// kernel chose.
///
/// UMEM_ERR_USAGE: `uri` is not an address; the call comes before the switchover or after the last event, or
/// the migration does not recover. UMEM_ERR_LISTEN: umem cannot listen on the address.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_resume(
    destination: *const umem_destination,
    uri: *const c_char,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, and `uri` is NULL or ends in a zero byte.
    guard(|| unsafe {
        let handle = given(destination, "destination")?;
        let running = handle.endpoint.running()?;
        if uri.is_null() {
            return running.resume();
        }
        let bound = running.resume_at(&address(text(uri, "uri")?)?)?;
        handle.listens(&bound);
        Ok(())
    })
}

/// Continues over `count` connected stream sockets, as many as at the start, the first for demanded
/// pages. umem gives up its old connections and no longer listens. The other side's program gives
/// the other ends in the same order, possibly later. With UMEM_OK umem owns the sockets and closes
/// them. Otherwise they stay the caller's. Works during a pause and without one.
///
/// UMEM_ERR_USAGE: too few or too many sockets, a socket named twice, or a descriptor other than a
/// connected stream socket; the call comes before the switchover or after the last event, or the migration
/// does not recover.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_reconnect(
    destination: *const umem_destination,
    sockets: *const c_int,
    count: usize,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `count` numbers lie at `sockets`, and the
    // caller owns those descriptors.
    guard(|| unsafe {
        let numbers = list(sockets, count, "sockets")?;
        let running = given(destination, "destination")?.endpoint.running()?;
        give_sockets(numbers, |sockets| running.reconnect(sockets))
    })
}

/// After UMEM_EVENT_FAILED with UMEM_GUEST_AT_DESTINATION: states that no vCPU runs any more and
/// that the contents of guest memory are no longer used. Missing pages become zeroes, and waiting
/// threads continue. Has no effect if no page is missing.
///
/// Without this call missing pages stay blocked, even after the handle is destroyed: umem leaves
/// its userfaultfd open. madvise() that discards pages of the regions waits as well.
///
/// UMEM_ERR_USAGE: the last event has not come.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_guest_has_stopped(
    destination: *const umem_destination,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(destination, "destination")?.endpoint.running()?.guest_has_stopped() })
}

/// Ends the destination in any phase, and frees the handle. NULL is allowed. Before the switchover
/// the guest stays at the source, and the regions no longer block a thread. Between the switchover
/// and UMEM_EVENT_COMPLETED a thread that touches a missing page waits forever. The call may take
/// about a second to notify the other side. No thread of umem remains.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_destroy(destination: *mut umem_destination) {
    // SAFETY: the handle is NULL or came from _new, and the caller no longer uses it.
    unsafe { unmake(destination) };
}
