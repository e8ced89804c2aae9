/*
 * umem.h: umem as a part of another program, for postcopy live migration of a virtual machine.
 *
 * Made by cbindgen from src/capi; do not edit. Link with libumem.so, or with libumem.a and
 * -lpthread -ldl -lm. Linux 6.3 or later.
 *
 * A source or a destination is made, told which memory to move over which connections, and started.
 * From then on everything happens on threads of umem's own, and the program is asked and told by
 * events, in this order:
 *
 *     source                                  destination
 *     UMEM_EVENT_CONNECTED                    UMEM_EVENT_CONNECTED
 *     UMEM_EVENT_READ_LOG -> _log_read()
 *     UMEM_EVENT_STOP     -> _stopped()
 *     UMEM_EVENT_SAVE     -> _saved()         UMEM_EVENT_LOAD    -> _loaded()
 *                                             UMEM_EVENT_RUN     -> _running()
 *     UMEM_EVENT_RUNNING
 *     UMEM_EVENT_COMPLETED                    UMEM_EVENT_COMPLETED
 *
 * UMEM_EVENT_READ_LOG comes only where umem_source_precopy and umem_source_log have asked for it, once
 * a pass.
 *
 * In a migration that recovers UMEM_EVENT_RECOVERING or UMEM_EVENT_PAUSED may come after the
 * switchover, and UMEM_EVENT_RESUMED after them, as often as connections are lost.
 *
 * UMEM_EVENT_FAILED may come at any time in place of the rest. After it, and after
 * UMEM_EVENT_COMPLETED, nothing comes any more, and the handle is destroyed.
 *
 * Functions answer with a umem_status; umem_last_error() has the text to one that is not UMEM_OK.
 * Texts are UTF-8 and end with a zero byte. Pointers must not be NULL where nothing else is said;
 * one that is gives UMEM_ERR_USAGE. Descriptors stay the caller's where nothing else is said.
 *
 * Any thread may call any function, also at the same time as others for the same handle, except
 * that nobody may be in another call for a handle that is being destroyed. Guest memory may be
 * touched by any thread too, but one that touches a missing page waits for the migration: the
 * thread that takes events must not, and a device state that touches guest memory is best loaded
 * on a thread of its own.
 *
 * No function prints, exits, or sets a signal handler. umem's threads take no signals. What the
 * program forks while a migration runs must not use the handle.
 */


#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// What became of a call, or of a migration.
typedef enum umem_status {
    // It worked.
    UMEM_OK = 0,
    // The call is not one that can be made like this, or now.
    UMEM_ERR_USAGE = 1,
    // The kernel refused something; the text has its reason.
    UMEM_ERR_SYSTEM = 2,
    // The memory, its file or this kernel cannot be used.
    UMEM_ERR_UNSUPPORTED = 3,
    // The guest's memory does not fit into the destination.
    UMEM_ERR_NO_MEMORY = 4,
    // The address cannot be listened at.
    UMEM_ERR_LISTEN = 5,
    // Nobody answers at the address.
    UMEM_ERR_CONNECT = 6,
    // A connection ended before the migration did.
    UMEM_ERR_LOST = 7,
    // The other side gave up; the text has its reason.
    UMEM_ERR_PEER = 8,
    // The other side sent what the protocol does not allow.
    UMEM_ERR_PROTOCOL = 9,
    // This side's program has refused what it was asked to do.
    UMEM_ERR_HOST = 10,
    // It was cancelled, or its handle destroyed.
    UMEM_ERR_CANCELLED = 11,
    // umem has a bug.
    UMEM_ERR_INTERNAL = 12,
    // With checksums: the guest has moved, and its memory is not what the source has. Stop it, and start it
    // again from something older.
    UMEM_ERR_DAMAGED = 13,
} umem_status;

// What an event is.
typedef enum umem_event_kind {
    // There is none, or none in time.
    UMEM_EVENT_NONE = 0,
    // Both sides: every connection is open.
    UMEM_EVENT_CONNECTED = 1,
    // Source: stop every vCPU and all else that writes guest memory, then call umem_source_stopped. With
    // umem_source_precopy the last of what has been written is told in between.
    UMEM_EVENT_STOP = 2,
    // Source: save the device state, if there is any, and give it to umem_source_saved.
    UMEM_EVENT_SAVE = 3,
    // Destination: load the device state, which is in `data`, then call umem_destination_loaded.
    // Loading may touch guest memory, whose pages are fetched meanwhile.
    UMEM_EVENT_LOAD = 4,
    // Destination: the guest belongs to this side. Start its vCPUs, then call
    // umem_destination_running.
    UMEM_EVENT_RUN = 5,
    // Source: the guest runs at the destination; it stood still for `downtime_us`.
    UMEM_EVENT_RUNNING = 6,
    // Both sides: every page has come. The last event; `text` is a report, one JSON object.
    UMEM_EVENT_COMPLETED = 7,
    // Both sides: it did not work. The last event; `status` and `text` say why, `guest` whose the
    // guest is.
    UMEM_EVENT_FAILED = 8,
    // Both sides: the connections are lost, or given up; `text` says what became of them. umem opens
    // others, or waits for the source to; the guest runs on with what it has.
    UMEM_EVENT_RECOVERING = 9,
    // Both sides: the same, and umem opens none until the program says how: umem_source_reconnect or
    // umem_source_resume, umem_destination_reconnect or umem_destination_resume.
    UMEM_EVENT_PAUSED = 10,
    // Both sides: there are connections again; there were none for `disconnected_us`. Of this event and
    // the two before it the last is kept where nobody has taken the others.
    UMEM_EVENT_RESUMED = 11,
    // Source, where umem_source_log says that there is one: tell umem_source_written or
    // umem_source_written_bitmap what the guest has written since its log was read last, then call
    // umem_source_log_read. The guest runs on.
    UMEM_EVENT_READ_LOG = 12,
} umem_event_kind;

// Whose the guest is.
typedef enum umem_guest {
    // The source's. After a failure a source that was asked to stop its guest lets it go on; a
    // destination throws away what it has, which no longer waits for anything and is worth nothing.
    UMEM_GUEST_AT_SOURCE = 0,
    // The destination's, or it may be: the source must never run it again. After a failure the guest
    // at the destination waits where pages are missing; see umem_destination_guest_has_stopped.
    UMEM_GUEST_AT_DESTINATION = 1,
} umem_guest;

// The side that a guest comes to. One handle is for one migration.
typedef struct umem_destination umem_destination;

// The side that a guest leaves. One handle is for one migration.
typedef struct umem_source umem_source;

// What a program is asked or told.
typedef struct umem_event {
    // What it is; the fields after this are 0 or NULL where it does not say otherwise.
    enum umem_event_kind kind;
    // UMEM_EVENT_FAILED: why.
    enum umem_status status;
    // Whose the guest is from here on.
    enum umem_guest guest;
    // UMEM_EVENT_FAILED, UMEM_EVENT_RECOVERING, UMEM_EVENT_PAUSED: why, in one line;
    // UMEM_EVENT_COMPLETED: the report. Valid until the next event is taken from this handle, as is
    // `data`.
    const char *text;
    // UMEM_EVENT_LOAD: the device state …
    const void *data;
    // … and its size in bytes, which may be 0.
    size_t data_bytes;
    // UMEM_EVENT_RUNNING: how long the guest stood still, microseconds.
    uint64_t downtime_us;
    // UMEM_EVENT_RESUMED: how long there were no connections, microseconds.
    uint64_t disconnected_us;
} umem_event;

// Bytes of a region.
typedef struct umem_range {
    // Where they begin in the region.
    uint64_t offset;
    // How many there are, which may be 0.
    uint64_t bytes;
} umem_range;

// How far a migration has come. All 0 before the connections are open.
typedef struct umem_stats {
    // The guest's memory, bytes.
    uint64_t total_bytes;
    // What of it has not come yet, or at the source not gone, bytes.
    uint64_t missing_bytes;
    // What came as data, bytes.
    uint64_t data_bytes;
    // What came as a header that says zeroes, bytes.
    uint64_t zero_bytes;
    // What came as a header that says that the source has nothing there, bytes.
    uint64_t hole_bytes;
    // Pages that somebody waited for.
    uint64_t pages_demand;
    // Pages that came unasked.
    uint64_t pages_background;
    // With checksums: what came to this side otherwise than it was sent, and was sent again.
    uint64_t checksum_errors;
} umem_stats;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// umem's version, such as "0.1.0". The text stays for ever.
const char *umem_version(void);

// What was wrong with the last call of this thread that failed, and what to do about it, in one line.
// Empty if none has. The text is valid until the next call of this thread that fails.
const char *umem_last_error(void);

// Makes a source, which the caller destroys with umem_source_destroy. NULL if that fails.
struct umem_source *umem_source_new(void);

// Adds a region: all of the file behind `fd`, which the guest maps MAP_SHARED, or a file that does
// not change. `name` is the same at the destination. umem duplicates the descriptor and maps the file.
//
// UMEM_ERR_UNSUPPORTED: it is no regular file open for reading, or its size is not whole pages.
enum umem_status umem_source_region(const struct umem_source *source,
                                    const char *name,
                                    int fd);

// Connects, once started, to a destination that listens at `uri` (tcp:HOST:PORT or unix:PATH), with
// one connection for demanded pages and `lanes` more, 1 to 64, for the rest.
//
// UMEM_ERR_USAGE: `uri` is no address, or `lanes` is out of range.
enum umem_status umem_source_dial(const struct umem_source *source,
                                  const char *uri,
                                  uint16_t lanes);

// Uses `count` connected stream sockets, 1 to 65: the first for demanded pages, the others for the
// rest; a single one is for all. At the destination are their other ends, in the same order. With UMEM_OK they are umem's,
// which closes them; otherwise they stay the caller's.
//
// UMEM_ERR_USAGE: too few, too many, one twice, or one that is no connected stream socket.
enum umem_status umem_source_connections(const struct umem_source *source,
                                         const int *sockets,
                                         size_t count);

// With true, as if nothing is said, pages are sent after the switchover; with false all of them before
// it, while the guest stands still.
enum umem_status umem_source_postcopy(const struct umem_source *source,
                                      bool postcopy);

// Has pages sent before the guest stops, too, and again those that it writes meanwhile: in `passes_max` passes
// at most, until what is left takes no longer than `downtime_limit_ms` milliseconds to send. The rest goes as
// umem_source_postcopy says. So most of the memory is there when the guest arrives.
//
// The program says what is written, from umem_source_start on, with umem_source_written or
// umem_source_written_bitmap: a page that is not named arrives as it was sent before. A log that it reads,
// such as KVM's, is on before umem_source_start. The final state of the log is wanted at UMEM_EVENT_STOP:
// stop the guest, tell what is left, then call umem_source_stopped.
//
// There has to be a connection beside the one for demanded pages, which umem_source_start checks. The memory
// at the destination is of a file (umem_destination_region with a descriptor); otherwise the migration fails
// before the guest is stopped.
enum umem_status umem_source_precopy(const struct umem_source *source,
                                     uint32_t passes_max,
                                     uint32_t downtime_limit_ms);

// With true the program has a log of its guest's writes, and is asked for what is in it with
// UMEM_EVENT_READ_LOG after each pass. With false, as if nothing is said, passes are judged by what has been
// told by then. Has no effect without umem_source_precopy.
enum umem_status umem_source_log(const struct umem_source *source,
                                 bool has_log);

// With true the migration goes on when connections are lost after the switchover, if the other side
// says the same; with false that ends it. If nothing is said it goes on where it dials, and not
// where it was given connections: then the program has to give others, on UMEM_EVENT_PAUSED.
enum umem_status umem_source_recover(const struct umem_source *source, bool recovers);

// With true both sides check every frame and every page for bits that change on their way, in spite of
// TCP's own sum; not so if nothing is said. What is wrong reaches no guest: its connections count as lost,
// which before the switchover ends the migration, and afterwards, where both sides recover, has it sent
// again. After eight such losses without a page between them UMEM_EVENT_PAUSED comes. At the end both sides
// compare what they have; where that differs UMEM_EVENT_FAILED comes with UMEM_ERR_DAMAGED. The destination
// follows without being told.
enum umem_status umem_source_checksum(const struct umem_source *source,
                                      bool checksum);

// Begins. Everything else is told by events; connecting, too, happens on umem's threads.
//
// UMEM_ERR_USAGE: no region, or no way to the destination. UMEM_ERR_SYSTEM: the kernel gave no thread
// or no descriptor. After an error the handle can only be destroyed.
enum umem_status umem_source_start(const struct umem_source *source);

// A descriptor that is readable while there are events, for poll() and its like; -1 before the start.
// It is umem's, and only polled: take events with umem_source_next_event.
int umem_source_event_fd(const struct umem_source *source);

// Takes the next event without waiting; UMEM_EVENT_NONE if there is none.
enum umem_status umem_source_next_event(const struct umem_source *source, struct umem_event *event);

// Takes the next event, for which it waits up to `timeout_ms` milliseconds, or for ever if that is
// negative; UMEM_EVENT_NONE if none has come. Nothing comes after UMEM_EVENT_COMPLETED or
// UMEM_EVENT_FAILED.
enum umem_status umem_source_wait(const struct umem_source *source,
                                  int timeout_ms,
                                  struct umem_event *event);

// With umem_source_precopy: the guest has written to these `count` ranges of a region, or a device or the
// program has for it. `region` is the number of the region, from 0 in the order of umem_source_region. To be
// told after the write, by any thread, and at the latest before umem_source_stopped. Where one of the ranges is
// not there none counts. Has no effect without umem_source_precopy.
//
// UMEM_ERR_USAGE: the region has no such bytes; or the guest was said to stand still (umem_source_stopped), and
// writes.
enum umem_status umem_source_written(const struct umem_source *source,
                                     uint16_t region,
                                     const struct umem_range *ranges,
                                     size_t count);

// The same as a bitmap of `count` words, as KVM_GET_DIRTY_LOG fills it for a slot that begins where the region
// does: a bit a page of 4 KiB, in little-endian words of 64 bits, the region's first page at bit 0 of the first
// word. Pages behind the last word have not been written.
//
// UMEM_ERR_USAGE: as umem_source_written; a bit of a page that the region does not have.
enum umem_status umem_source_written_bitmap(const struct umem_source *source,
                                            uint16_t region,
                                            const uint64_t *words,
                                            size_t count);

// Answers UMEM_EVENT_READ_LOG: everything that the log had has been told.
//
// UMEM_ERR_USAGE: that is not asked, or has been answered.
enum umem_status umem_source_log_read(const struct umem_source *source);

// Answers UMEM_EVENT_STOP: nobody writes the guest's memory any more.
//
// UMEM_ERR_USAGE: that is not asked, or has been answered.
enum umem_status umem_source_stopped(const struct umem_source *source);

// Answers UMEM_EVENT_SAVE with the device state, `bytes` bytes that are copied; 0 if there is none.
// The destination's program gets it as it is.
//
// UMEM_ERR_USAGE: that is not asked, or has been answered.
enum umem_status umem_source_saved(const struct umem_source *source,
                                   const void *state,
                                   size_t bytes);

// Says instead of an answer why what was asked for cannot be done. UMEM_EVENT_FAILED follows, with
// UMEM_ERR_HOST and this reason, which the other side hears of as well.
//
// UMEM_ERR_USAGE: nothing is asked.
enum umem_status umem_source_refuse(const struct umem_source *source, const char *why);

// How far it has come.
enum umem_status umem_source_stats(const struct umem_source *source, struct umem_stats *stats);

// Gives up before the switchover: UMEM_EVENT_FAILED follows, with UMEM_ERR_CANCELLED. Has no effect
// after it, as the destination's guest needs its pages.
enum umem_status umem_source_cancel(const struct umem_source *source);

// Gives up the connections, and opens or takes none until the program says how: UMEM_EVENT_PAUSED
// follows. The guest runs on with what it has.
//
// UMEM_ERR_USAGE: the switchover has not been, the migration has ended, or it does not recover.
enum umem_status umem_source_pause(const struct umem_source *source);

// Ends a pause: dials `uri` from now on until the end, or, if that is NULL, as before.
//
// UMEM_ERR_USAGE: `uri` is no address; the switchover has not been, the migration has ended, or it does
// not recover.
enum umem_status umem_source_resume(const struct umem_source *source,
                                    const char *uri);

// Goes on over `count` connected stream sockets, as many as there were at first, the first for demanded
// pages; those that there are it gives up, and it dials no more. The other
// side's program gives their other ends in the same order, now or later. With UMEM_OK they are umem's,
// which closes them; otherwise they stay the caller's. Works during a pause and without one.
//
// UMEM_ERR_USAGE: too few, too many, one twice, or one that is no connected stream socket; the
// switchover has not been, the migration has ended, or it does not recover.
enum umem_status umem_source_reconnect(const struct umem_source *source,
                                       const int *sockets,
                                       size_t count);

// Ends the source, whatever it does at the moment, and frees the handle; NULL is allowed. Before the
// switchover the guest stays at this side. After it, and before UMEM_EVENT_COMPLETED, the
// destination's guest loses the pages that it still misses. May wait for about a second, while the
// other side is told; none of umem's threads is left then.
void umem_source_destroy(struct umem_source *source);

// Makes a destination, which the caller destroys with umem_destination_destroy. NULL if that fails.
struct umem_destination *umem_destination_new(void);

// Adds a region: `bytes` bytes of this process's memory at `address`, both multiples of its page size.
// `name` is the same at the source.
//
// If it is MAP_SHARED, of a memfd or a file on tmpfs or hugetlbfs, `fd` is that file, of which all is
// mapped there, and which holds nothing yet; umem duplicates the descriptor and maps the file itself.
// If it is MAP_PRIVATE | MAP_ANONYMOUS, and nobody has touched it, `fd` is -1.
//
// The memory stays mapped where it is until the handle is destroyed. From umem_destination_start on
// whoever touches a missing page of it waits until that has come; no child that is forked has it
// before the end.
//
// Until then whoever discards pages of it (a balloon, reports of free pages) does so with
// madvise(MADV_REMOVE) of its address where it is MAP_SHARED, and with madvise(MADV_DONTNEED) where it is
// anonymous: the kernel tells umem of that, which waits in madvise() until umem has heard of it. Of a hole that
// fallocate() punches in the file umem hears nothing: a page that comes later fills it with what the source had.
// MADV_DONTNEED of MAP_SHARED memory is reported like a discard, and pages that are still to come would read as
// zeroes: leave it out.
//
// UMEM_ERR_USAGE: a size of 0. UMEM_ERR_UNSUPPORTED: the file holds something. What else is wrong
// with the memory is found out at the start.
enum umem_status umem_destination_region(const struct umem_destination *destination,
                                         const char *name,
                                         void *address,
                                         uint64_t bytes,
                                         int fd);

// Uses a userfaultfd of the program's own in place of one that umem makes. Every region must be
// registered with it before the start: for missing faults and, where it is MAP_SHARED, for minor
// faults. umem duplicates the descriptor and makes it non-blocking, until the handle is destroyed; nobody else
// reads it meanwhile. The regions leave it at the end.
//
// Make it without UFFD_USER_MODE_ONLY. Without UFFD_FEATURE_EVENT_REMOVE nobody may discard pages of
// the regions before the end.
//
// UMEM_ERR_SYSTEM: it cannot be duplicated.
enum umem_status umem_destination_userfaultfd(const struct umem_destination *destination,
                                              int userfaultfd);

// Listens, from the start on, at `uri` (tcp:HOST:PORT, with port 0 for any, or unix:PATH), and takes
// one source with up to `lanes_max` connections, 1 to 64, beside the one for demanded pages.
//
// UMEM_ERR_USAGE: `uri` is no address, or `lanes_max` is out of range.
enum umem_status umem_destination_listen(const struct umem_destination *destination,
                                         const char *uri,
                                         uint16_t lanes_max);

// Uses `count` connected stream sockets, 1 to 65: the first for demanded pages, the others for the
// rest; a single one is for all. At the source are their other ends, in the same order. With UMEM_OK they are umem's,
// which closes them; otherwise they stay the caller's.
//
// UMEM_ERR_USAGE: too few, too many, one twice, or one that is no connected stream socket.
enum umem_status umem_destination_connections(const struct umem_destination *destination,
                                              const int *sockets,
                                              size_t count);

// With true the migration goes on when connections are lost after the switchover, if the other side
// says the same; with false that ends it. If nothing is said it goes on where it listens, and not
// where it was given connections: then the program has to give others, on UMEM_EVENT_PAUSED.
enum umem_status umem_destination_recover(const struct umem_destination *destination,
                                          bool recovers);

// Begins: listens, and registers the regions with userfaultfd. From here on whoever touches them
// waits. Everything else is told by events.
//
// UMEM_ERR_USAGE: no region, or no way for the source. UMEM_ERR_LISTEN: the address cannot be
// listened at. UMEM_ERR_UNSUPPORTED: memory that is not as it was said to be, no permission for
// userfaultfd, or a kernel that lacks some of it. UMEM_ERR_SYSTEM: the kernel gave no thread or no
// descriptor. After an error the regions are as before, and the handle can only be destroyed.
enum umem_status umem_destination_start(const struct umem_destination *destination);

// Where it listens, with the port that the kernel chose; NULL before the start and where it was given
// connections. The text stays until the handle is destroyed.
const char *umem_destination_uri(const struct umem_destination *destination);

// A descriptor that is readable while there are events, for poll() and its like; -1 before the start.
// It is umem's, and only polled: take events with umem_destination_next_event.
int umem_destination_event_fd(const struct umem_destination *destination);

// Takes the next event without waiting; UMEM_EVENT_NONE if there is none.
enum umem_status umem_destination_next_event(const struct umem_destination *destination,
                                             struct umem_event *event);

// Takes the next event, for which it waits up to `timeout_ms` milliseconds, or for ever if that is
// negative; UMEM_EVENT_NONE if none has come. Nothing comes after UMEM_EVENT_COMPLETED or
// UMEM_EVENT_FAILED.
enum umem_status umem_destination_wait(const struct umem_destination *destination,
                                       int timeout_ms,
                                       struct umem_event *event);

// Answers UMEM_EVENT_LOAD: the device state is loaded.
//
// UMEM_ERR_USAGE: that is not asked, or has been answered.
enum umem_status umem_destination_loaded(const struct umem_destination *destination);

// Answers UMEM_EVENT_RUN: the vCPUs run.
//
// UMEM_ERR_USAGE: that is not asked, or has been answered.
enum umem_status umem_destination_running(const struct umem_destination *destination);

// Says instead of an answer why what was asked for cannot be done. UMEM_EVENT_FAILED follows, with
// UMEM_ERR_HOST and this reason, which the other side hears of as well.
//
// UMEM_ERR_USAGE: nothing is asked.
enum umem_status umem_destination_refuse(const struct umem_destination *destination,
                                         const char *why);

// How far it has come.
enum umem_status umem_destination_stats(const struct umem_destination *destination,
                                        struct umem_stats *stats);

// Gives up before the switchover: UMEM_EVENT_FAILED follows, with UMEM_ERR_CANCELLED. Has no effect
// after it, as the guest needs its pages.
enum umem_status umem_destination_cancel(const struct umem_destination *destination);

// Gives up the connections, and opens or takes none until the program says how: UMEM_EVENT_PAUSED
// follows. The guest runs on with what it has.
//
// UMEM_ERR_USAGE: the switchover has not been, the migration has ended, or it does not recover.
enum umem_status umem_destination_pause(const struct umem_destination *destination);

// Ends a pause: listens at `uri` from now on until the end, and nowhere else, or, if that is NULL, goes on
// listening where it did. umem_destination_uri has the port that the kernel chose.
//
// UMEM_ERR_USAGE: `uri` is no address; the switchover has not been, the migration has ended, or it does
// not recover. UMEM_ERR_LISTEN: the address cannot be listened at.
enum umem_status umem_destination_resume(const struct umem_destination *destination,
                                         const char *uri);

// Goes on over `count` connected stream sockets, as many as there were at first, the first for demanded
// pages; those that there are it gives up, and it listens no more. The other
// side's program gives their other ends in the same order, now or later. With UMEM_OK they are umem's,
// which closes them; otherwise they stay the caller's. Works during a pause and without one.
//
// UMEM_ERR_USAGE: too few, too many, one twice, or one that is no connected stream socket; the
// switchover has not been, the migration has ended, or it does not recover.
enum umem_status umem_destination_reconnect(const struct umem_destination *destination,
                                            const int *sockets,
                                            size_t count);

// After UMEM_EVENT_FAILED with UMEM_GUEST_AT_DESTINATION: no vCPU runs any more, and nobody believes
// what the guest's memory holds. Missing pages become zeroes, and whoever waits for one goes on. Has
// no effect where nothing is waited for.
//
// Without this the pages stay waited for, also when the handle has been destroyed: umem leaves its
// userfaultfd open then, and madvise() that discards pages of the regions waits as well.
//
// UMEM_ERR_USAGE: the last event has not come.
enum umem_status umem_destination_guest_has_stopped(const struct umem_destination *destination);

// Ends the destination, whatever it does at the moment, and frees the handle; NULL is allowed. Before
// the switchover the guest stays at the source, and the regions wait no longer. After it, and before
// UMEM_EVENT_COMPLETED, whoever touches a page that has not come waits for ever. May wait for about a
// second, while the other side is told; none of umem's threads is left then.
void umem_destination_destroy(struct umem_destination *destination);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus
