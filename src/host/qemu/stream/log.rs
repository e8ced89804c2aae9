//! A QEMU that writes its migration stream to umem: from before the first round to its device state.
//!
//! ```text
//! umem: start: settings, migrate    next: reads a look     stop: the word, reads on        SHUT
//! QEMU: | all pages … waits ------> | … what was written … | stops the guest, rest, state | completes
//! ```
//!
//! QEMU does not stop the guest before umem's command: with the capability `switchover-ack` (8.1 and later) it waits
//! for the destination's acknowledgement on the return path, which umem sends in the destination's place. A QEMU
//! without it stops a quiet guest when little is left. When umem ends, the socket closes, QEMU's migration fails, and
//! QEMU resumes the guest.

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use umem_wire::RegionId;
use umem_wire::limits::STATE_BYTES_MAX;

use super::reading::{Pulse, Reading, SWITCHOVER_ACK};
use super::sorting::Moved;
use super::{Event, Parser};
use crate::error::{Context, Error, Result, WITHOUT_PASSES};
use crate::host::guest;
use crate::host::monitor::{BeforeStop, Handle, Monitor};
use crate::host::qemu::saving::Saving;
use crate::host::qemu::settings::{self, Role};
use crate::host::qemu::{Qemu, STATE_SOCKET, run_state};
use crate::memory::dirty::{DirtyLog, DirtyMap};
use crate::memory::staging::Staging;

/// The first QEMU whose log has all writes of TCG to its first RAM block, at offset 0. Earlier ones do not inform the
/// vCPUs that a page is logged again (36 to 93 of 32768 pages were lost with 7.2.22). This and later ones do so for the
/// first block only, even if the page is in another one (`cpu_physical_memory_sync_dirty_bitmap` in its
/// include/exec/ram_addr.h passes an offset in the block as one in all RAM): of a second NUMA node 10.0 lost 3 of 32768
/// pages.
const LOGS_TCG: (u64, u64) = (9, 0);

/// Time limit for QEMU to stop its guest once it may. It evaluates its rate every 100 ms (`BUFFER_DELAY` in its
/// migration/options.h), and decides then whether little enough is left.
const STOPS_ITSELF_WITHIN: Duration = Duration::from_millis(150);

/// Intervals of the query whether QEMU has synced: the first one and the longest.
const SYNC_INTERVAL_MIN: Duration = Duration::from_micros(200);
const SYNC_INTERVAL: Duration = Duration::from_millis(5);

/// QEMU's sync count after its first collection of the guest's writes, which is all memory.
const FIRST_SYNC: u64 = 1;

/// Interval of the query whether the guest still runs.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);

/// A QEMU that its log shares with the source's monitor.
#[derive(Clone)]
pub(crate) struct SharedQemu {
    qemu: Arc<Mutex<Qemu>>,
    /// The ids of the RAM backends that are moved, in the order of the regions.
    backends: Arc<[String]>,
    /// The files for the contents of backends without a file.
    staging: Option<Arc<Staging>>,
    /// RAM that cannot be sent in a pass may be sent after the switchover.
    follows: bool,
}

/// QEMU's stream as a log of the pages that its guest writes.
struct QemuStream {
    host: SharedQemu,
    reading: Option<Arc<Reading>>,
    marks: Option<Arc<DirtyMap>>,
    /// During a look with contents: QEMU's sync count before it.
    before: Option<u64>,
}

impl SharedQemu {
    /// The regions are these RAM backends, in this order.
    pub(crate) fn new(qemu: Qemu, backends: Vec<String>) -> SharedQemu {
        let (qemu, backends) = (Arc::new(Mutex::new(qemu)), backends.into());
        SharedQemu { qemu, backends, staging: None, follows: false }
    }

    /// Sets the files for the contents of regions that come with the stream.
    pub(crate) fn staged(self, staging: Option<Arc<Staging>>) -> SharedQemu {
        SharedQemu { staging, ..self }
    }

    /// Sets whether RAM may be sent after the switchover.
    pub(crate) fn followed(self, follows: bool) -> SharedQemu {
        SharedQemu { follows, ..self }
    }

    fn lock(&self) -> MutexGuard<'_, Qemu> {
        self.qemu.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtyLog for QemuStream {
    /// QEMU's first pass has every page. Lanes follow behind it: a page that it marks after a lane had sent the page
    /// would be sent twice. Contents are sent as they come.
    fn start(&mut self, marks: Arc<DirtyMap>) -> Result<()> {
        let staging = self.host.staging.clone();
        let has_contents = staging.is_some();
        self.marks = Some(marks.clone());
        if !has_contents {
            marks.hold_back();
        }
        let SharedQemu { backends, follows, .. } = &self.host;
        let reading = self.host.lock().start_stream(backends, (marks, staging), *follows)?;
        let reading = self.reading.insert(reading);
        watch(&self.host.qemu, reading.pulse())?;
        if !has_contents {
            reading.begin_first_pass();
        }
        Ok(())
    }

    /// Afterwards QEMU waits for the next look, or, if contents come, for room.
    fn next(&mut self) -> Result<()> {
        if self.host.staging.is_some() {
            return self.look_at_contents();
        }
        let Some(reading) = &self.reading else { return Err(is_not_started()) };
        // Reading stops at the end of the first pass, which may still be under way.
        reading.looked()?;
        // A QEMU that stops its guest by itself then holds its main loop's lock, and answers only while its stream is
        // read.
        reading.read_on();
        // A sync that is under way now may have passed pages that were written before this call.
        let pulse = reading.pulse();
        let syncs = || pulse.asking(|| self.host.lock().syncs());
        let before = syncs()?.0;
        let mut interval = SYNC_INTERVAL_MIN;
        while !reading.is_over()? && syncs()?.0 <= before {
            std::thread::sleep(interval);
            interval = (interval * 2).min(SYNC_INTERVAL);
        }
        reading.look()
    }

    fn finish(&mut self) -> Result<()> {
        let Some(reading) = &self.reading else { return Err(is_not_started()) };
        let over = reading.wait_ram_over(None).map(drop);
        self.marks.iter().for_each(|marks| marks.set_elsewhere(0));
        over
    }

    fn is_in_part(&self) -> bool {
        self.before.is_some()
    }
}

impl QemuStream {
    /// With contents a look is one pass of QEMU's: from one sync to the next, at which QEMU knows how much the guest
    /// has written meanwhile. Reading continues afterwards, as far as there is room.
    fn look_at_contents(&mut self) -> Result<()> {
        let (Some(reading), Some(staging)) = (&self.reading, &self.host.staging) else {
            return Err(is_not_started());
        };
        let pulse = reading.pulse();
        let syncs = || pulse.asking(|| self.host.lock().syncs());
        let before = match self.before {
            Some(before) => before,
            None => syncs()?.0.max(FIRST_SYNC),
        };
        self.before = Some(before);
        while !reading.is_over()? && syncs()?.0 <= before {
            if staging.wait_for_enough(SYNC_INTERVAL) {
                return Ok(());
            }
        }
        self.before = None;
        // QEMU counts a sync when it begins.
        staging.wait_for_enough(SYNC_INTERVAL);
        let left = if reading.is_over()? { 0 } else { syncs()?.1 };
        self.marks.iter().for_each(|marks| marks.set_elsewhere(left));
        Ok(())
    }
}

/// Has the rest of a stream read if the guest stands still or QEMU does not answer: another client may have stopped the
/// guest, and QEMU then writes the rest with its main loop's lock held.
fn watch(qemu: &Arc<Mutex<Qemu>>, pulse: Pulse) -> Result<()> {
    let qemu: Weak<Mutex<Qemu>> = Arc::downgrade(qemu);
    let watch = move || {
        while pulse.goes_on(WATCH_INTERVAL) {
            let Some(qemu) = qemu.upgrade() else { return };
            // The thread that has the lock queries QEMU itself.
            let Ok(mut qemu) = qemu.try_lock() else { continue };
            let status = pulse.asking(|| run_state::status(&mut qemu.qmp));
            if !status.is_ok_and(|status| run_state::is_live(&status)) {
                pulse.finish();
            }
        }
    };
    let thread = std::thread::Builder::new().name("umem-pulse".into()).spawn(watch);
    thread.map(drop).context(|| "starting a thread")
}

fn is_not_started() -> Error {
    Error::Internal("QEMU's stream has not been started".into())
}

impl Monitor for SharedQemu {
    fn name(&self) -> &'static str {
        "QEMU"
    }

    fn handle(&self) -> Result<Option<Handle>> {
        self.lock().handle()
    }

    fn before_stop(&mut self, note: BeforeStop) {
        self.lock().before_stop(note);
    }

    /// The demo's guest has a log of its own.
    fn dirty_log(&mut self) -> Option<Box<dyn DirtyLog>> {
        let own = guest::log::of(&mut self.lock().qmp);
        own.or_else(|| {
            let host = self.clone();
            Some(Box::new(QemuStream { host, reading: None, marks: None, before: None }))
        })
    }

    fn stop(&mut self) -> Result<Option<Instant>> {
        self.lock().stop()
    }

    fn save_state(&mut self) -> Result<Vec<u8>> {
        self.lock().save_state()
    }

    fn stands_still(&mut self) -> Result<()> {
        self.lock().stands_still()
    }

    fn resume(&mut self) -> Result<()> {
        self.lock().resume()
    }

    fn put_back(&mut self) -> Result<()> {
        self.lock().put_back()
    }
}

impl Qemu {
    /// Checks that the stream reports every write to these RAM backends, if the monitor is a QEMU; None if it is not.
    /// For backends whose writes the stream does not report (returned as numbers in `backends`) two conditions hold:
    /// they must not be in `contents`, whose contents come with the stream, and `follows` must be true, as they may be
    /// sent after the switchover. Changes nothing.
    pub(super) fn check_log(
        &mut self,
        backends: &[String],
        contents: &[String],
        follows: bool,
    ) -> Result<Option<Vec<usize>>> {
        let instead = format!("use {WITHOUT_PASSES}");
        let mut unlogged = Vec::new();
        let Ok(kvm) = self.qmp.try_execute("query-kvm", json!({}))? else { return Ok(None) };
        if kvm["enabled"] != json!(true) {
            let (major, minor) = run_state::version(&mut self.qmp)?;
            if (major, minor) < LOGS_TCG {
                let (since, _) = LOGS_TCG;
                return Err(Error::Unsupported(format!(
                    "QEMU {major}.{minor} without KVM loses writes in its log of dirty pages, unlike QEMU {since}.0: \
                     {instead}, or a later QEMU"
                )));
            }
            for block in self.blocks()?.iter().filter(|block| block.offset != 0) {
                let Some(number) = backends.iter().position(|id| block.is_of(id)) else { continue };
                let remedy = match contents.contains(&backends[number]) {
                    true => {
                        "whose contents come from that log's stream: give it a file with share=on"
                            .into()
                    }
                    false if !follows => {
                        format!(
                            "which has to follow the guest: use --precopy -p (hybrid), {WITHOUT_PASSES}"
                        )
                    }
                    false => {
                        unlogged.push(number);
                        continue;
                    }
                };
                return Err(Error::Unsupported(format!(
                    "QEMU without KVM loses writes in its log of dirty pages, except to its first RAM block, and {} \
                     is another block, {remedy}, or give the guest one RAM backend",
                    block.name
                )));
            }
        }
        let confidential = self.qmp.property("/machine", "confidential-guest-support")?;
        if confidential.as_ref().and_then(Value::as_str).is_some_and(|object| !object.is_empty()) {
            return Err(Error::Unsupported(
                "the guest is confidential (its machine has confidential-guest-support), and its memory cannot be \
                 read from outside"
                    .into(),
            ));
        }
        Ok(Some(unlogged))
    }

    /// The same, with a check of the stream's settings. Returns the numbers of the backends whose writes the stream
    /// does not report. Changes nothing.
    pub(crate) fn check_stream(
        &mut self,
        backends: &[String],
        contents: &[String],
        follows: bool,
    ) -> Result<Vec<usize>> {
        let Some(unlogged) = self.check_log(backends, contents, follows)? else {
            return Ok(Vec::new());
        };
        let instead = format!("use {WITHOUT_PASSES}");
        if !self.can_hold()? {
            return Err(Error::Unsupported(format!(
                "QEMU cannot be kept from completing its migration (it has no capability return-path, or its machine \
                 has suppress-vmdesc): {instead}"
            )));
        }
        if !contents.is_empty() && !self.waits_for_a_word()? {
            return Err(Error::Unsupported(
                "QEMU has no capability switchover-ack (QEMU 8.1 and later have it): it would stop its guest by \
                 itself, and write the rest of its private memory while it answers no other request; use a later \
                 QEMU, or a guest whose RAM is a file with share=on"
                    .into(),
            ));
        }
        run_state::check(&mut self.qmp)?;
        settings::Changes::needed(&mut self.qmp, Role::Stream)?;
        Ok(unlogged)
    }

    fn start_stream(
        &mut self,
        backends: &[String],
        (marks, staging): (Arc<DirtyMap>, Option<Arc<Staging>>),
        follows: bool,
    ) -> Result<Arc<Reading>> {
        let has_contents = |number| staging.as_ref().is_some_and(|staging| staging.has(number));
        let contents = (0..).zip(backends).filter(|&(number, _)| has_contents(RegionId(number)));
        let contents: Vec<_> = contents.map(|(_, backend)| backend.clone()).collect();
        let unlogged = self.check_stream(backends, &contents, follows)?;
        (0..)
            .zip(0..backends.len())
            .filter(|(_, number)| unlogged.contains(number))
            .for_each(|(region, _)| marks.set_unlogged(RegionId(region)));
        let moved = self.moved(backends)?;
        self.change_settings(Role::Stream)?;
        let started = self.migrate_into_reader(moved, (marks, staging));
        if started.is_err() {
            self.stream = None;
            // QEMU does not know a descriptor any more that it has closed.
            let _ = self.qmp.try_execute("closefd", json!({ "fdname": STATE_SOCKET }))?;
            self.end_migration()?;
            self.undo_changes()?;
        }
        started
    }

    fn migrate_into_reader(
        &mut self,
        moved: Vec<Moved>,
        to: (Arc<DirtyMap>, Option<Arc<Staging>>),
    ) -> Result<Arc<Reading>> {
        self.give_state_socket()?;
        let socket = self.state_socket.take().expect("just given");
        let ours = socket.try_clone().context(|| "a socket")?;
        // The byte in front of the stream is umem's.
        let state_bytes_max = STATE_BYTES_MAX as usize - 1;
        // QEMU writes before it answers.
        let reading = Reading::start(socket, moved, to, state_bytes_max)?;
        if !self.is_live || !self.waits_for_a_word()? {
            reading.finish();
        }
        let reading = Arc::new(reading);
        self.stream = Some(reading.clone());
        self.qmp.execute("migrate", json!({ "uri": format!("fd:{STATE_SOCKET}") }))?;
        self.saving = Saving::Held(ours);
        Ok(reading)
    }

    /// The RAM blocks of these backends.
    fn moved(&mut self, backends: &[String]) -> Result<Vec<Moved>> {
        let blocks = self.blocks()?;
        let moved = |(index, id): (u16, &String)| {
            let Some(block) = blocks.iter().find(|block| block.is_of(id)) else {
                return Err(Error::Host(format!(
                    "it no longer has a RAM block of its backend {id}"
                )));
            };
            Ok(Moved { block: block.name.clone(), bytes: block.bytes, region: RegionId(index) })
        };
        (0..).zip(backends).map(moved).collect()
    }

    /// Whether QEMU continues until it may stop its guest. A QEMU without `switchover-ack`, or whose guest stands still
    /// already, must not be made to wait: it holds its main loop's lock when it writes the rest.
    pub(in crate::host::qemu) fn waits_for_a_word(&mut self) -> Result<bool> {
        Ok(settings::capabilities(&mut self.qmp)?.contains_key(settings::SWITCHOVER_ACK))
    }

    /// QEMU's sync count, and the bytes of collected writes that QEMU has not sent yet.
    fn syncs(&mut self) -> Result<(u64, u64)> {
        let migration = self.qmp.execute("query-migrate", json!({}))?;
        match migration["status"].as_str().unwrap_or("none") {
            "failed" | "cancelled" | "cancelling" | "none" => Err(ended(&migration)),
            _ => {
                let count = |name: &str| migration["ram"][name].as_u64().unwrap_or(0);
                Ok((count("dirty-sync-count"), count("remaining")))
            }
        }
    }

    /// Has QEMU stop the guest whose stream is being read, and reads the rest of the stream.
    pub(in crate::host::qemu) fn stop_stream(&mut self, reading: &Reading) -> Result<Vec<u8>> {
        reading.finish();
        if self.waits_for_a_word()? {
            // If QEMU does not take it, the stream's error has the reason.
            let _ = reading.socket().write_all(&SWITCHOVER_ACK);
        }
        let is_over = reading.wait_ram_over(Some(STOPS_ITSELF_WITHIN));
        if !is_over.map_err(|error| self.why_stream_ended(error))? {
            if let Some(claim) = &mut self.claim {
                claim.note_stop(&mut self.qmp)?;
            }
            self.qmp.execute("stop", json!({}))?;
        }
        reading.stream().map_err(|error| self.why_stream_ended(error))
    }

    /// QEMU's own reason, if it has one.
    fn why_stream_ended(&mut self, error: Error) -> Error {
        match self.qmp.execute("query-migrate", json!({})) {
            Ok(migration) if migration["error-desc"].is_string() => ended(&migration),
            _ => error,
        }
    }
}

fn ended(migration: &Value) -> Error {
    let status = migration["status"].as_str().unwrap_or("none");
    let reason = migration["error-desc"].as_str().unwrap_or("no reason given");
    Error::Host(format!("its migration has ended (query-migrate reports {status}): {reason}"))
}

/// Whether the stream's QEMU has left out shared RAM; None if this is not a stream of QEMU's.
pub(in crate::host::qemu) fn ignores_shared(stream: &[u8]) -> Option<bool> {
    let mut parser = Parser::new();
    let mut has_ram = false;
    let read = parser.read(stream, |_, event| {
        has_ram |= matches!(event, Event::Began { .. });
        Ok(())
    });
    // The destination's QEMU itself reports the parts that it does not understand.
    (read.is_ok() || has_ram).then(|| parser.ignores_shared())
}
