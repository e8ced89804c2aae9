//! The functions of a source.

use std::ffi::{c_char, c_int, c_void};
use std::os::fd::AsRawFd;
use std::time::Duration;

use super::side::{Side, address, descriptor, give_sockets, timeout};
use super::types::{
    given, guard, list, make, room, text, umem_event, umem_range, umem_stats, umem_status, unmake,
};
use crate::embed::{Source, SourceSetup};

/// The side that a guest leaves. One handle is for one migration.
pub struct umem_source {
    side: Side<SourceSetup, Source>,
}

/// Makes a source, which the caller destroys with umem_source_destroy. NULL if that fails.
#[unsafe(no_mangle)]
pub extern "C" fn umem_source_new() -> *mut umem_source {
    make(|| umem_source { side: Side::new(SourceSetup::new()) })
}

/// Adds a region: all of the file behind `fd`, which the guest maps MAP_SHARED, or a file that does
/// not change. `name` is the same at the destination. umem duplicates the descriptor and maps the file.
///
/// UMEM_ERR_UNSUPPORTED: it is no regular file open for reading, or its size is not whole pages.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_region(
    source: *const umem_source,
    name: *const c_char,
    fd: c_int,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, `name` is NULL or ends in a zero byte, and
    // nobody closes `fd` meanwhile.
    guard(|| unsafe {
        let (name, file) = (text(name, "name")?, descriptor(fd, "fd")?);
        given(source, "source")?.side.set_up(|setup| setup.region(name, file))
    })
}

/// Connects, once started, to a destination that listens at `uri` (tcp:HOST:PORT or unix:PATH), with
/// one connection for demanded pages and `lanes` more, 1 to 64, for the rest.
///
/// UMEM_ERR_USAGE: `uri` is no address, or `lanes` is out of range.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_dial(
    source: *const umem_source,
    uri: *const c_char,
    lanes: u16,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, and `uri` is NULL or ends in a zero byte.
    guard(|| unsafe {
        let uri = address(text(uri, "uri")?)?;
        given(source, "source")?.side.set_up(|setup| setup.dial(uri, lanes))
    })
}

/// Uses `count` connected stream sockets, 1 to 65: the first for demanded pages, the others for the
/// rest; a single one is for all. At the destination are their other ends, in the same order. With UMEM_OK they are umem's,
/// which closes them; otherwise they stay the caller's.
///
/// UMEM_ERR_USAGE: too few, too many, one twice, or one that is no connected stream socket.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_connections(
    source: *const umem_source,
    sockets: *const c_int,
    count: usize,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `count` numbers lie at `sockets`, and are
    // the caller's to give away.
    guard(|| unsafe {
        let numbers = list(sockets, count, "sockets")?;
        given(source, "source")?
            .side
            .set_up(|setup| give_sockets(numbers, |sockets| setup.connections(sockets)))
    })
}

/// With true, as if nothing is said, pages are sent after the switchover; with false all of them before
/// it, while the guest stands still.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_postcopy(
    source: *const umem_source,
    postcopy: bool,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(source, "source")?.side.set_up(|setup| {
            setup.postcopy(postcopy);
            Ok(())
        })
    })
}

/// Has pages sent before the guest stops, too, and again those that it writes meanwhile: in `passes_max` passes
/// at most, until what is left takes no longer than `downtime_limit_ms` milliseconds to send. The rest goes as
/// umem_source_postcopy says. So most of the memory is there when the guest arrives.
///
/// The program says what is written, from umem_source_start on, with umem_source_written or
/// umem_source_written_bitmap: a page that is not named arrives as it was sent before. A log that it reads,
/// such as KVM's, is on before umem_source_start. The final state of the log is wanted at UMEM_EVENT_STOP:
/// stop the guest, tell what is left, then call umem_source_stopped.
///
/// There has to be a connection beside the one for demanded pages, which umem_source_start checks. The memory
/// at the destination is of a file (umem_destination_region with a descriptor); otherwise the migration fails
/// before the guest is stopped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_precopy(
    source: *const umem_source,
    passes_max: u32,
    downtime_limit_ms: u32,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(source, "source")?.side.set_up(|setup| {
            setup.precopy(passes_max, Duration::from_millis(downtime_limit_ms.into()));
            Ok(())
        })
    })
}

/// With true the program has a log of its guest's writes, and is asked for what is in it with
/// UMEM_EVENT_READ_LOG after each pass. With false, as if nothing is said, passes are judged by what has been
/// told by then. Has no effect without umem_source_precopy.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_log(source: *const umem_source, has_log: bool) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(source, "source")?.side.set_up(|setup| {
            setup.log(has_log);
            Ok(())
        })
    })
}

/// With true the migration goes on when connections are lost after the switchover, if the other side
/// says the same; with false that ends it. If nothing is said it goes on where it dials, and not
/// where it was given connections: then the program has to give others, on UMEM_EVENT_PAUSED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_recover(
    source: *const umem_source,
    recovers: bool,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(source, "source")?.side.set_up(|setup| {
            setup.recover(recovers);
            Ok(())
        })
    })
}

/// With true both sides check every frame and every page for bits that change on their way, in spite of
/// TCP's own sum; not so if nothing is said. What is wrong reaches no guest: its connections count as lost,
/// which before the switchover ends the migration, and afterwards, where both sides recover, has it sent
/// again. After eight such losses without a page between them UMEM_EVENT_PAUSED comes. At the end both sides
/// compare what they have; where that differs UMEM_EVENT_FAILED comes with UMEM_ERR_DAMAGED. The destination
/// follows without being told.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_checksum(
    source: *const umem_source,
    checksum: bool,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(source, "source")?.side.set_up(|setup| {
            setup.checksum(checksum);
            Ok(())
        })
    })
}

/// Begins. Everything else is told by events; connecting, too, happens on umem's threads.
///
/// UMEM_ERR_USAGE: no region, or no way to the destination. UMEM_ERR_SYSTEM: the kernel gave no thread
/// or no descriptor. After an error the handle can only be destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_start(source: *const umem_source) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(source, "source")?.side.start(SourceSetup::start) })
}

/// A descriptor that is readable while there are events, for poll() and its like; -1 before the start.
/// It is umem's, and only polled: take events with umem_source_next_event.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_event_fd(source: *const umem_source) -> c_int {
    let mut number = -1;
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        number = given(source, "source")?.side.running()?.event_fd().as_raw_fd();
        Ok(())
    });
    number
}

/// Takes the next event without waiting; UMEM_EVENT_NONE if there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_next_event(
    source: *const umem_source,
    event: *mut umem_event,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `event` is NULL or has room for one, and is
    // only written.
    guard(|| unsafe {
        let side = &given(source, "source")?.side;
        let event = room(event, "event")?;
        side.take(side.running()?.next_event(), event);
        Ok(())
    })
}

/// Takes the next event, for which it waits up to `timeout_ms` milliseconds, or for ever if that is
/// negative; UMEM_EVENT_NONE if none has come. Nothing comes after UMEM_EVENT_COMPLETED or
/// UMEM_EVENT_FAILED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_wait(
    source: *const umem_source,
    timeout_ms: c_int,
    event: *mut umem_event,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `event` is NULL or has room for one, and is
    // only written.
    guard(|| unsafe {
        let side = &given(source, "source")?.side;
        let event = room(event, "event")?;
        side.take(side.running()?.wait(timeout(timeout_ms))?, event);
        Ok(())
    })
}

/// With umem_source_precopy: the guest has written to these `count` ranges of a region, or a device or the
/// program has for it. `region` is the number of the region, from 0 in the order of umem_source_region. To be
/// told after the write, by any thread, and at the latest before umem_source_stopped. Where one of the ranges is
/// not there none counts. Has no effect without umem_source_precopy.
///
/// UMEM_ERR_USAGE: the region has no such bytes; or the guest was said to stand still (umem_source_stopped), and
/// writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_written(
    source: *const umem_source,
    region: u16,
    ranges: *const umem_range,
    count: usize,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `count` ranges lie at `ranges`, which nobody
    // writes meanwhile.
    guard(|| unsafe {
        let ranges = list(ranges, count, "ranges")?;
        let ranges: Vec<_> = ranges.iter().map(|range| (range.offset, range.bytes)).collect();
        given(source, "source")?.side.running()?.written_ranges(region, &ranges)
    })
}

/// The same as a bitmap of `count` words, as KVM_GET_DIRTY_LOG fills it for a slot that begins where the region
/// does: a bit a page of 4 KiB, in little-endian words of 64 bits, the region's first page at bit 0 of the first
/// word. Pages behind the last word have not been written.
///
/// UMEM_ERR_USAGE: as umem_source_written; a bit of a page that the region does not have.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_written_bitmap(
    source: *const umem_source,
    region: u16,
    words: *const u64,
    count: usize,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `count` words lie at `words`, which nobody writes
    // meanwhile.
    guard(|| unsafe {
        let words = list(words, count, "words")?;
        given(source, "source")?.side.running()?.written_bitmap(region, words)
    })
}

/// Answers UMEM_EVENT_READ_LOG: everything that the log had has been told.
///
/// UMEM_ERR_USAGE: that is not asked, or has been answered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_log_read(source: *const umem_source) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(source, "source")?.side.running()?.log_read() })
}

/// Answers UMEM_EVENT_STOP: nobody writes the guest's memory any more.
///
/// UMEM_ERR_USAGE: that is not asked, or has been answered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_stopped(source: *const umem_source) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(source, "source")?.side.running()?.stopped() })
}

/// Answers UMEM_EVENT_SAVE with the device state, `bytes` bytes that are copied; 0 if there is none.
/// The destination's program gets it as it is.
///
/// UMEM_ERR_USAGE: that is not asked, or has been answered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_saved(
    source: *const umem_source,
    state: *const c_void,
    bytes: usize,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `bytes` bytes lie at `state`, which nobody
    // writes meanwhile.
    guard(|| unsafe {
        let state = list(state.cast::<u8>(), bytes, "state")?.to_vec();
        given(source, "source")?.side.running()?.saved(state)
    })
}

/// Says instead of an answer why what was asked for cannot be done. UMEM_EVENT_FAILED follows, with
/// UMEM_ERR_HOST and this reason, which the other side hears of as well.
///
/// UMEM_ERR_USAGE: nothing is asked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_refuse(
    source: *const umem_source,
    why: *const c_char,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, and `why` is NULL or ends in a zero byte.
    guard(|| unsafe { given(source, "source")?.side.running()?.refuse(text(why, "why")?) })
}

/// How far it has come.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_stats(
    source: *const umem_source,
    stats: *mut umem_stats,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `stats` is NULL or has room for one, and is
    // only written.
    guard(|| unsafe {
        let now = given(source, "source")?.side.running()?.stats();
        room(stats, "stats")?.write(now.into());
        Ok(())
    })
}

/// Gives up before the switchover: UMEM_EVENT_FAILED follows, with UMEM_ERR_CANCELLED. Has no effect
/// after it, as the destination's guest needs its pages.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_cancel(source: *const umem_source) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe {
        given(source, "source")?.side.running()?.cancel();
        Ok(())
    })
}

/// Gives up the connections, and opens or takes none until the program says how: UMEM_EVENT_PAUSED
/// follows. The guest runs on with what it has.
///
/// UMEM_ERR_USAGE: the switchover has not been, the migration has ended, or it does not recover.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_pause(source: *const umem_source) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed.
    guard(|| unsafe { given(source, "source")?.side.running()?.pause() })
}

/// Ends a pause: dials `uri` from now on until the end, or, if that is NULL, as before.
///
/// UMEM_ERR_USAGE: `uri` is no address; the switchover has not been, the migration has ended, or it does
/// not recover.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_resume(
    source: *const umem_source,
    uri: *const c_char,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed, and `uri` is NULL or ends in a zero byte.
    guard(|| unsafe {
        let source = given(source, "source")?.side.running()?;
        match uri.is_null() {
            true => source.resume(),
            false => source.resume_at(address(text(uri, "uri")?)?),
        }
    })
}

/// Goes on over `count` connected stream sockets, as many as there were at first, the first for demanded
/// pages; those that there are it gives up, and it dials no more. The other
/// side's program gives their other ends in the same order, now or later. With UMEM_OK they are umem's,
/// which closes them; otherwise they stay the caller's. Works during a pause and without one.
///
/// UMEM_ERR_USAGE: too few, too many, one twice, or one that is no connected stream socket; the
/// switchover has not been, the migration has ended, or it does not recover.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_reconnect(
    source: *const umem_source,
    sockets: *const c_int,
    count: usize,
) -> umem_status {
    // SAFETY: the handle is NULL or has not been destroyed; `count` numbers lie at `sockets`, and are
    // the caller's to give away.
    guard(|| unsafe {
        let numbers = list(sockets, count, "sockets")?;
        let running = given(source, "source")?.side.running()?;
        give_sockets(numbers, |sockets| running.reconnect(sockets))
    })
}

/// Ends the source, whatever it does at the moment, and frees the handle; NULL is allowed. Before the
/// switchover the guest stays at this side. After it, and before UMEM_EVENT_COMPLETED, the
/// destination's guest loses the pages that it still misses. May wait for about a second, while the
/// other side is told; none of umem's threads is left then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umem_source_destroy(source: *mut umem_source) {
    // SAFETY: the handle is NULL or came from _new, and the caller uses it no more.
    unsafe { unmake(source) };
}
