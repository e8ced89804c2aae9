//! The functions of a destination.

use std::ffi::{CString, c_char, c_int, c_void};
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use super::side::{Side, address, descriptor, give_sockets, timeout};
use super::types::{
    c_text, given, guard, list, make, room, text, umem_event, umem_stats, umem_status, unmake,
};
use crate::embed::{Destination, DestinationSetup, Memory};
use crate::error::Error;
use crate::transport::uri::Uri;

/// The side that a guest comes to. One handle is for one migration.
pub struct umem_destination {
    side: Side<DestinationSetup, Destination>,
    /// Where it has listened, the last of them now. Texts that have been given away stay.
    uris: Mutex<Vec<CString>>,
}

impl umem_destination {
    fn listens(&self, uri: &Uri) {
        self.uris.lock().unwrap_or_else(PoisonError::into_inner).push(c_text(&uri.to_string()));
    }
}

/// Makes a destination, which the caller destroys with umem_destination_destroy. NULL if that fails.
#[unsafe(no_mangle)]
pub extern "C" fn umem_destination_new() -> *mut umem_destination {
    make(|| umem_destination { side: Side::new(DestinationSetup::new()), uris: Mutex::default() })
}

/// Adds a region: `bytes` bytes of this process's memory at `address`, both multiples of its page size.
/// `name` is the same at the source.
///
/// If it is MAP_SHARED, of a memfd or a file on tmpfs or hugetlbfs, `fd` is that file, of which all is
/// mapped there, and which holds nothing yet; umem duplicates the descriptor and maps the file itself.
/// If it is MAP_PRIVATE | MAP_ANONYMOUS, and nobody has touched it, `fd` is -1.
///
/// The memory stays mapped where it is until the handle is destroyed. From umem_destination_start on
/// whoever touches a missing page of it waits until that has come; no child that is forked has it
/// before the end.
///
/// Until then whoever discards pages of it (a balloon, reports of free pages) does so with
/// madvise(MADV_REMOVE) of its address where it is MAP_SHARED, and with madvise(MADV_DONTNEED) where it is
/// anonymous: the kernel tells umem of that, which waits in madvise() until umem has heard of it. Of a hole that
/// fallocate() punches in the file umem hears nothing: a page that comes later fills it with what the source had.
/// MADV_DONTNEED of MAP_SHARED memory is reported like a discard, and pages that are still to come would read as
/// zeroes: leave it out.
///
/// UMEM_ERR_USAGE: a size of 0. UMEM_ERR_UNSUPPORTED: the file holds something. What else is wrong
/// with the memory is found out at the start.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_region(
    destination: *const umem_destination,
    name: *const c_char,
    address: *mut c_void,
    bytes: u64,
    fd: c_int,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, `name` is NULL or ends in a zero byte, and
    // nobody closes `fd` or unmaps the memory meanwhile.
    guard(|| unsafe {
        let name = text(name, "name")?;
        let start = NonNull::new(address).ok_or_else(|| Error::Usage("address is NULL".into()))?;
        let file = (fd != -1).then(|| descriptor(fd, "fd")).transpose()?;
        let memory = Memory { start, bytes, file };
        given(destination, "destination")?.side.set_up(|setup| setup.region(name, &memory))
    })
}

/// Uses a userfaultfd of the program's own in place of one that umem makes. Every region must be
/// registered with it before the start: for missing faults and, where it is MAP_SHARED, for minor
/// faults. umem duplicates the descriptor and makes it non-blocking, until the handle is destroyed; nobody else
/// reads it meanwhile. The regions leave it at the end.
///
/// Make it without UFFD_USER_MODE_ONLY. Without UFFD_FEATURE_EVENT_REMOVE nobody may discard pages of
/// the regions before the end.
///
/// UMEM_ERR_SYSTEM: it cannot be duplicated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_userfaultfd(
    destination: *const umem_destination,
    userfaultfd: c_int,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, and nobody closes `userfaultfd` meanwhile.
    guard(|| unsafe {
        let userfaultfd = descriptor(userfaultfd, "userfaultfd")?;
        given(destination, "destination")?.side.set_up(|setup| setup.userfaultfd(userfaultfd))
    })
}

/// Listens, from the start on, at `uri` (tcp:HOST:PORT, with port 0 for any, or unix:PATH), and takes
/// one source with up to `lanes_max` connections, 1 to 64, beside the one for demanded pages.
///
/// UMEM_ERR_USAGE: `uri` is no address, or `lanes_max` is out of range.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_listen(
    destination: *const umem_destination,
    uri: *const c_char,
    lanes_max: u16,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, and `uri` is NULL or ends in a zero byte.
    guard(|| unsafe {
        let uri = address(text(uri, "uri")?)?;
        given(destination, "destination")?.side.set_up(|setup| setup.listen(uri, lanes_max))
    })
}

/// Uses `count` connected stream sockets, 1 to 65: the first for demanded pages, the others for the
/// rest; a single one is for all. At the source are their other ends, in the same order. With UMEM_OK they are umem's,
/// which closes them; otherwise they stay the caller's.
///
/// UMEM_ERR_USAGE: too few, too many, one twice, or one that is no connected stream socket.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_connections(
    destination: *const umem_destination,
    sockets: *const c_int,
    count: usize,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `count` numbers lie at `sockets`, and are
    // the caller's to give away.
    guard(|| unsafe {
        let numbers = list(sockets, count, "sockets")?;
        given(destination, "destination")?
            .side
            .set_up(|setup| give_sockets(numbers, |sockets| setup.connections(sockets)))
    })
}

/// With true the migration goes on when connections are lost after the switchover, if the other side
/// says the same; with false that ends it. If nothing is said it goes on where it listens, and not
/// where it was given connections: then the program has to give others, on UMEM_EVENT_PAUSED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_recover(
    destination: *const umem_destination,
    recovers: bool,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(destination, "destination")?.side.set_up(|setup| {
            setup.recover(recovers);
            Ok(())
        })
    })
}

/// Begins: listens, and registers the regions with userfaultfd. From here on whoever touches them
/// waits. Everything else is told by events.
///
/// UMEM_ERR_USAGE: no region, or no way for the source. UMEM_ERR_LISTEN: the address cannot be
/// listened at. UMEM_ERR_UNSUPPORTED: memory that is not as it was said to be, no permission for
/// userfaultfd, or a kernel that lacks some of it. UMEM_ERR_SYSTEM: the kernel gave no thread or no
/// descriptor. After an error the regions are as before, and the handle can only be destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_start(
    destination: *const umem_destination,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        let handle = given(destination, "destination")?;
        handle.side.start(DestinationSetup::start)?;
        handle.side.running()?.uri().into_iter().for_each(|uri| handle.listens(uri));
        Ok(())
    })
}

/// Where it listens, with the port that the kernel chose; NULL before the start and where it was given
/// connections. The text stays until the handle is destroyed.
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

/// A descriptor that is readable while there are events, for poll() and its like; -1 before the start.
/// It is umem's, and only polled: take events with umem_destination_next_event.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_event_fd(destination: *const umem_destination) -> c_int {
    let mut number = -1;
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        number = given(destination, "destination")?.side.running()?.event_fd().as_raw_fd();
        Ok(())
    });
    number
}

/// Takes the next event without waiting; UMEM_EVENT_NONE if there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_next_event(
    destination: *const umem_destination,
    event: *mut umem_event,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `event` is NULL or has room for one, and is
    // only written.
    guard(|| unsafe {
        let side = &given(destination, "destination")?.side;
        let event = room(event, "event")?;
        side.take(side.running()?.next_event(), event);
        Ok(())
    })
}

/// Takes the next event, for which it waits up to `timeout_ms` milliseconds, or for ever if that is
/// negative; UMEM_EVENT_NONE if none has come. Nothing comes after UMEM_EVENT_COMPLETED or
/// UMEM_EVENT_FAILED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_wait(
    destination: *const umem_destination,
    timeout_ms: c_int,
    event: *mut umem_event,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `event` is NULL or has room for one, and is
    // only written.
    guard(|| unsafe {
        let side = &given(destination, "destination")?.side;
        let event = room(event, "event")?;
        side.take(side.running()?.wait(timeout(timeout_ms))?, event);
        Ok(())
    })
}

/// Answers UMEM_EVENT_LOAD: the device state is loaded.
///
/// UMEM_ERR_USAGE: that is not asked, or has been answered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_loaded(
    destination: *const umem_destination,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(destination, "destination")?.side.running()?.loaded() })
}

/// Answers UMEM_EVENT_RUN: the vCPUs run.
///
/// UMEM_ERR_USAGE: that is not asked, or has been answered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_running(
    destination: *const umem_destination,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(destination, "destination")?.side.running()?.running() })
}

/// Says instead of an answer why what was asked for cannot be done. UMEM_EVENT_FAILED follows, with
/// UMEM_ERR_HOST and this reason, which the other side hears of as well.
///
/// UMEM_ERR_USAGE: nothing is asked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_refuse(
    destination: *const umem_destination,
    why: *const c_char,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, and `why` is NULL or ends in a zero byte.
    guard(|| unsafe {
        given(destination, "destination")?.side.running()?.refuse(text(why, "why")?)
    })
}

/// How far it has come.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_stats(
    destination: *const umem_destination,
    stats: *mut umem_stats,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `stats` is NULL or has room for one, and is
    // only written.
    guard(|| unsafe {
        let now = given(destination, "destination")?.side.running()?.stats();
        room(stats, "stats")?.write(now.into());
        Ok(())
    })
}

/// Gives up before the switchover: UMEM_EVENT_FAILED follows, with UMEM_ERR_CANCELLED. Has no effect
/// after it, as the guest needs its pages.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_cancel(
    destination: *const umem_destination,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(destination, "destination")?.side.running()?.cancel();
        Ok(())
    })
}

/// Gives up the connections, and opens or takes none until the program says how: UMEM_EVENT_PAUSED
/// follows. The guest runs on with what it has.
///
/// UMEM_ERR_USAGE: the switchover has not been, the migration has ended, or it does not recover.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_pause(
    destination: *const umem_destination,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(destination, "destination")?.side.running()?.pause() })
}

/// Ends a pause: listens at `uri` from now on until the end, and nowhere else, or, if that is NULL, goes on
/// listening where it did. umem_destination_uri has the port that the kernel chose.
///
/// UMEM_ERR_USAGE: `uri` is no address; the switchover has not been, the migration has ended, or it does
/// not recover. UMEM_ERR_LISTEN: the address cannot be listened at.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_resume(
    destination: *const umem_destination,
    uri: *const c_char,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, and `uri` is NULL or ends in a zero byte.
    guard(|| unsafe {
        let handle = given(destination, "destination")?;
        let running = handle.side.running()?;
        if uri.is_null() {
            return running.resume();
        }
        let bound = running.resume_at(&address(text(uri, "uri")?)?)?;
        handle.listens(&bound);
        Ok(())
    })
}

/// Goes on over `count` connected stream sockets, as many as there were at first, the first for demanded
/// pages; those that there are it gives up, and it listens no more. The other
/// side's program gives their other ends in the same order, now or later. With UMEM_OK they are umem's,
/// which closes them; otherwise they stay the caller's. Works during a pause and without one.
///
/// UMEM_ERR_USAGE: too few, too many, one twice, or one that is no connected stream socket; the
/// switchover has not been, the migration has ended, or it does not recover.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_reconnect(
    destination: *const umem_destination,
    sockets: *const c_int,
    count: usize,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `count` numbers lie at `sockets`, and are
    // the caller's to give away.
    guard(|| unsafe {
        let numbers = list(sockets, count, "sockets")?;
        let running = given(destination, "destination")?.side.running()?;
        give_sockets(numbers, |sockets| running.reconnect(sockets))
    })
}

/// After UMEM_EVENT_FAILED with UMEM_GUEST_AT_DESTINATION: no vCPU runs any more, and nobody believes
/// what the guest's memory holds. Missing pages become zeroes, and whoever waits for one goes on. Has
/// no effect where nothing is waited for.
///
/// Without this the pages stay waited for, also when the handle has been destroyed: umem leaves its
/// userfaultfd open then, and madvise() that discards pages of the regions waits as well.
///
/// UMEM_ERR_USAGE: the last event has not come.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_guest_has_stopped(
    destination: *const umem_destination,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(destination, "destination")?.side.running()?.guest_has_stopped() })
}

/// Ends the destination, whatever it does at the moment, and frees the handle; NULL is allowed. Before
/// the switchover the guest stays at the source, and the regions wait no longer. After it, and before
/// UMEM_EVENT_COMPLETED, whoever touches a page that has not come waits for ever. May wait for about a
/// second, while the other side is told; none of umem's threads is left then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_destination_destroy(destination: *mut umem_destination) {
    // SAFETY: the handle is NULL or came from _new, and the caller uses it no more.
    unsafe { unmake(destination) };
}
