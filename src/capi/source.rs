//! The functions of a source.

use std::ffi::{c_char, c_int, c_void};
use std::os::fd::AsRawFd;
use std::time::Duration;

use super::endpoint::{Endpoint, address, descriptor, give_sockets, timeout};
use super::types::{
    given, guard, list, make, room, text, umem_event, umem_range, umem_stats, umem_status, unmake,
};
use crate::embed::{Source, SourceSetup};

/// The source: the side that the guest leaves. A handle serves one migration.
pub struct umem_source {
    endpoint: Endpoint<SourceSetup, Source>,
}

/// Makes a source. The caller destroys the source with umem_source_destroy. Returns NULL on
/// failure.
#[unsafe(no_mangle)]
pub extern "C" fn umem_source_new() -> *mut umem_source {
    make(|| umem_source { endpoint: Endpoint::new(SourceSetup::new()) })
}

/// Adds a region: the whole file behind `fd`, which the guest maps MAP_SHARED, or a file that does
/// not change. The region has the same `name` at the destination. umem duplicates the descriptor
/// and maps the file.
///
/// UMEM_ERR_UNSUPPORTED: the descriptor is not a regular file open for reading, or the file's size
/// is not whole pages.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_region(
    source: *const umem_source,
    name: *const c_char,
    fd: c_int,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, `name` is NULL or ends in a zero byte, and
    // `fd` stays open during the call.
    guard(|| unsafe {
        let (name, file) = (text(name, "name")?, descriptor(fd, "fd")?);
        given(source, "source")?.endpoint.set_up(|setup| setup.region(name, file))
    })
}

/// Sets the destination's address: `uri` is tcp:HOST:PORT or unix:PATH. After the start umem
/// connects to it, with one connection for demanded pages and `lanes` more, 1 to 64, for the rest.
///
/// UMEM_ERR_USAGE: `uri` is not an address, or `lanes` is out of range.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_dial(
    source: *const umem_source,
    uri: *const c_char,
    lanes: u16,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, and `uri` is NULL or ends in a zero byte.
    guard(|| unsafe {
        let uri = address(text(uri, "uri")?)?;
        given(source, "source")?.endpoint.set_up(|setup| setup.dial(uri, lanes))
    })
}

/// Uses `count` connected stream sockets, 1 to 65: the first for demanded pages, the others for the
/// rest. A single socket carries both. The destination gets the other ends in the same order. With
/// UMEM_OK umem owns the sockets and closes them. Otherwise they stay the caller's.
///
/// UMEM_ERR_USAGE: too few or too many sockets, a socket named twice, or a descriptor other than a
/// connected stream socket.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_connections(
    source: *const umem_source,
    sockets: *const c_int,
    count: usize,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `count` numbers lie at `sockets`, and the
    // caller owns those descriptors.
    guard(|| unsafe {
        let numbers = list(sockets, count, "sockets")?;
        given(source, "source")?
            .endpoint
            .set_up(|setup| give_sockets(numbers, |sockets| setup.connections(sockets)))
    })
}

/// Chooses when pages are sent. With true, the default, they are sent after the switchover. With
/// false all of them are sent before the switchover, while the guest stands still.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_postcopy(
    source: *const umem_source,
    postcopy: bool,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(source, "source")?.endpoint.set_up(|setup| {
            setup.postcopy(postcopy);
            Ok(())
        })
    })
}

/// Sends pages also before the guest stops, and sends again what the guest writes meanwhile. umem
/// makes at most `passes_max` passes, and stops the guest once the rest takes no longer than
/// `downtime_limit_ms` milliseconds to send. The rest is sent as umem_source_postcopy says.
///
/// The program reports every write from umem_source_start on, with umem_source_written or
/// umem_source_written_bitmap. A page without a report arrives as it was sent before. A log of
/// writes, such as KVM's, must be on before umem_source_start. UMEM_EVENT_STOP asks for the final
/// state of the log: stop the guest, report the last writes, then call umem_source_stopped.
///
/// At least one connection beside the one for demanded pages is needed; umem_source_start checks
/// this. The memory at the destination must be of a file (umem_destination_region with a
/// descriptor). Otherwise the migration fails before the guest is stopped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_precopy(
    source: *const umem_source,
    passes_max: u32,
    downtime_limit_ms: u32,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(source, "source")?.endpoint.set_up(|setup| {
            setup.precopy(passes_max, Duration::from_millis(downtime_limit_ms.into()));
            Ok(())
        })
    })
}

/// Says whether the program has a log of its guest's writes. With true UMEM_EVENT_READ_LOG asks for
/// the contents of the log after each pass. With false, the default, umem judges a pass by the
/// writes reported by its end. Has no effect without umem_source_precopy.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_log(source: *const umem_source, has_log: bool) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(source, "source")?.endpoint.set_up(|setup| {
            setup.log(has_log);
            Ok(())
        })
    })
}

/// Chooses whether the migration continues when connections are lost after the switchover. It
/// continues only if both sides choose so; otherwise a loss ends the migration. The default is true
/// for a source that dials, and false for one with given connections: its program must give other
/// connections on UMEM_EVENT_PAUSED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_recover(
    source: *const umem_source,
    recovers: bool,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(source, "source")?.endpoint.set_up(|setup| {
            setup.recover(recovers);
            Ok(())
        })
    })
}

/// Chooses whether both sides check every frame and every page for bits that change in transit,
/// beside TCP's own checksum. The default is false. The destination follows the source's choice.
///
/// A damaged page reaches no guest: its connections count as lost. Before the switchover that ends
/// the migration. After it, if both sides recover, the page is sent again. After eight consecutive
/// losses without a valid page UMEM_EVENT_PAUSED follows. At the end both sides compare digests of
/// their memory. If the digests differ, UMEM_EVENT_FAILED follows with UMEM_ERR_DAMAGED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_checksum(
    source: *const umem_source,
    checksum: bool,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(source, "source")?.endpoint.set_up(|setup| {
            setup.checksum(checksum);
            Ok(())
        })
    })
}

/// Starts the migration. umem connects on its own threads, and reports everything else with events.
/// A handle is started once: after an error it can only be destroyed.
///
/// UMEM_ERR_USAGE: there is no region, or neither an address nor connections. UMEM_ERR_SYSTEM: the
/// kernel refused a thread or a descriptor.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_start(source: *const umem_source) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(source, "source")?.endpoint.start(SourceSetup::start) })
}

/// Returns a descriptor that is readable while there are events, for poll(); -1 before the start.
/// The descriptor belongs to umem: poll it, do not read or close it. Take events with
/// umem_source_next_event.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_event_fd(source: *const umem_source) -> c_int {
    let mut number = -1;
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        number = given(source, "source")?.endpoint.running()?.event_fd().as_raw_fd();
        Ok(())
    });
    number
}

/// Takes the next event without waiting. The kind is UMEM_EVENT_NONE if there is none.
///
/// UMEM_ERR_USAGE: the source has not been started.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_next_event(
    source: *const umem_source,
    event: *mut umem_event,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `event` is NULL or has room for an
    // event, and is only written.
    guard(|| unsafe {
        let endpoint = &given(source, "source")?.endpoint;
        let event = room(event, "event")?;
        endpoint.take(endpoint.running()?.next_event(), event);
        Ok(())
    })
}

/// Takes the next event, and waits up to `timeout_ms` milliseconds for it; a negative timeout waits
/// forever. The kind is UMEM_EVENT_NONE after the timeout. UMEM_EVENT_COMPLETED or
/// UMEM_EVENT_FAILED is the last event.
///
/// UMEM_ERR_USAGE: the source has not been started.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_wait(
    source: *const umem_source,
    timeout_ms: c_int,
    event: *mut umem_event,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `event` is NULL or has room for an
    // event, and is only written.
    guard(|| unsafe {
        let endpoint = &given(source, "source")?.endpoint;
        let event = room(event, "event")?;
        endpoint.take(endpoint.running()?.wait(timeout(timeout_ms))?, event);
        Ok(())
    })
}

/// With umem_source_precopy: reports that the guest, a device or the program has written these
/// `count` ranges of a region. `region` is the region's number, from 0 in the order of the calls of
/// umem_source_region. Call it after the write, from any thread, and for the last writes before
/// umem_source_stopped. Has no effect without umem_source_precopy.
///
/// UMEM_ERR_USAGE: the region does not have all of the ranges; then no range is reported. Or
/// umem_source_stopped has been called: the guest must not write after it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_written(
    source: *const umem_source,
    region: u16,
    ranges: *const umem_range,
    count: usize,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `count` ranges lie at `ranges` and do not
    // change during the call.
    guard(|| unsafe {
        let ranges = list(ranges, count, "ranges")?;
        let ranges: Vec<_> = ranges.iter().map(|range| (range.offset, range.bytes)).collect();
        given(source, "source")?.endpoint.running()?.written_ranges(region, &ranges)
    })
}

/// As umem_source_written, with a bitmap of `count` words, as KVM_GET_DIRTY_LOG fills it for a slot
/// that begins where the region does: one bit for each page of 4 KiB, in little-endian words of 64
/// bits, the region's first page at bit 0 of the first word. Pages beyond the last word count as
/// not written.
///
/// UMEM_ERR_USAGE: as umem_source_written, or the bitmap has a bit of a page that the region does
/// not have.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_written_bitmap(
    source: *const umem_source,
    region: u16,
    words: *const u64,
    count: usize,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `count` words lie at `words` and do not
    // change during the call.
    guard(|| unsafe {
        let words = list(words, count, "words")?;
        given(source, "source")?.endpoint.running()?.written_bitmap(region, words)
    })
}

/// Answers UMEM_EVENT_READ_LOG: all contents of the log have been reported.
///
/// UMEM_ERR_USAGE: the request is not open, or has been answered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_log_read(source: *const umem_source) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(source, "source")?.endpoint.running()?.log_read() })
}

/// Answers UMEM_EVENT_STOP: the guest's memory has no writer any more.
///
/// UMEM_ERR_USAGE: the request is not open, or has been answered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_stopped(source: *const umem_source) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(source, "source")?.endpoint.running()?.stopped() })
}

/// Answers UMEM_EVENT_SAVE with the device state: `bytes` bytes at `state`, which umem copies. 0
/// bytes mean that there is none. The destination's program receives the state unchanged.
///
/// UMEM_ERR_USAGE: the request is not open, or has been answered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_saved(
    source: *const umem_source,
    state: *const c_void,
    bytes: usize,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `bytes` bytes lie at `state` and do not
    // change during the call.
    guard(|| unsafe {
        let state = list(state.cast::<u8>(), bytes, "state")?.to_vec();
        given(source, "source")?.endpoint.running()?.saved(state)
    })
}

/// Refuses the open request, with a reason. UMEM_EVENT_FAILED follows on both sides: here with
/// UMEM_ERR_HOST and this reason; the other side's text has the reason too.
///
/// UMEM_ERR_USAGE: no request is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_refuse(
    source: *const umem_source,
    why: *const c_char,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, and `why` is NULL or ends in a zero byte.
    guard(|| unsafe { given(source, "source")?.endpoint.running()?.refuse(text(why, "why")?) })
}

/// Reports the progress. May be called at any time after the start.
///
/// UMEM_ERR_USAGE: the source has not been started.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_stats(
    source: *const umem_source,
    stats: *mut umem_stats,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `stats` is NULL or has room for its
    // type, and is only written.
    guard(|| unsafe {
        let now = given(source, "source")?.endpoint.running()?.stats();
        room(stats, "stats")?.write(now.into());
        Ok(())
    })
}

/// Cancels the migration before the switchover: UMEM_EVENT_FAILED follows, with UMEM_ERR_CANCELLED.
/// After the switchover this has no effect: the guest needs both sides until its last page has
/// arrived.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_cancel(source: *const umem_source) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(source, "source")?.endpoint.running()?.cancel();
        Ok(())
    })
}

/// Gives up the connections, and opens or accepts none until the program calls umem_source_resume
/// or umem_source_reconnect. UMEM_EVENT_PAUSED follows. The guest runs on with the pages that it
/// has.
///
/// UMEM_ERR_USAGE: the call comes before the switchover or after the last event, or the migration does not
/// recover.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_pause(source: *const umem_source) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(source, "source")?.endpoint.running()?.pause() })
}

/// Ends a pause. umem dials `uri` from now on until the end. If `uri` is NULL, umem connects as
/// before the pause.
///
/// UMEM_ERR_USAGE: `uri` is not an address; the call comes before the switchover or after the last event, or
/// the migration does not recover.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_resume(
    source: *const umem_source,
    uri: *const c_char,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, and `uri` is NULL or ends in a zero byte.
    guard(|| unsafe {
        let source = given(source, "source")?.endpoint.running()?;
        match uri.is_null() {
            true => source.resume(),
            false => source.resume_at(address(text(uri, "uri")?)?),
        }
    })
}

/// Continues over `count` connected stream sockets, as many as at the start, the first for demanded
/// pages. umem gives up its old connections and no longer dials. The other side's program gives the
/// other ends in the same order, possibly later. With UMEM_OK umem owns the sockets and closes
/// them. Otherwise they stay the caller's. Works during a pause and without one.
///
/// UMEM_ERR_USAGE: too few or too many sockets, a socket named twice, or a descriptor other than a
/// connected stream socket; the call comes before the switchover or after the last event, or the migration
/// does not recover.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_reconnect(
    source: *const umem_source,
    sockets: *const c_int,
    count: usize,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `count` numbers lie at `sockets`, and the
    // caller owns those descriptors.
    guard(|| unsafe {
        let numbers = list(sockets, count, "sockets")?;
        let running = given(source, "source")?.endpoint.running()?;
        give_sockets(numbers, |sockets| running.reconnect(sockets))
    })
}

/// Ends the source in any phase, and frees the handle. NULL is allowed. Before the switchover the
/// guest stays at this side. Between the switchover and UMEM_EVENT_COMPLETED the destination's
/// guest loses its missing pages. The call may take about a second to notify the other side. No
/// thread of umem remains.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_destroy(source: *mut umem_source) {
    // SAFETY: the handle is NULL or came from _new, and the caller no longer uses it.
    unsafe { unmake(source) };
}
