//! umem's QMP commands to a QEMU, and its requirements on QEMU's configuration.
//!
//! The device state travels by QEMU's own migration with the capability `x-ignore-shared`. That leaves out RAM that is
//! both shared and backed by a named file; umem moves this RAM. So every RAM backend must be a `memory-backend-file`
//! with `share=on`: a memfd would be sent whole inside the device state, and private memory cannot be read from outside
//! of QEMU. With rounds before the stop QEMU's whole stream is read, and the contents of such RAM come with it
//! ([`stream`]).

mod backends;
mod blocks;
mod claim;
mod connecting;
mod devices;
mod finding;
mod giving;
mod left;
mod record;
mod run_state;
mod saving;
mod settings;
mod stopping;
pub(crate) mod stream;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::monitor::{BeforeStop, Handle, Loaded, Monitor};
use super::qmp::{Process, Qmp, socket_pair};
use crate::error::{Context, Error, Result};
use crate::memory::kind::Kind;
use backends::{Backend, Contents, RamOfQemu, advice};
use claim::Claim;
use record::{Record, Undo};
use saving::Saving;
use settings::{Changes, Role};
use stream::reading::Reading;

pub(crate) use finding::QEMU;

/// The options that give a guest RAM which umem can move; quoted in errors.
pub(crate) const HOW_TO_START: &str = "start QEMU with `-object memory-backend-file,id=ram0,\
    size=SIZE,share=on,mem-path=/dev/shm/FILE -machine memory-backend=ram0`";

/// The name given with `getfd` to the socket that carries the device state.
const STATE_SOCKET: &str = "umem-state";

/// Intervals of `query-migrate` while a migration ends: the first one and the longest.
const STATUS_INTERVAL_MIN: Duration = Duration::from_micros(50);
const STATUS_INTERVAL: Duration = Duration::from_millis(1);

/// Time limit for the end of a migration that fails.
const FAILS_WITHIN: Duration = Duration::from_secs(10);

/// Time limit for QEMU's answers while a connection is dropped.
const DROP_PATIENCE: Duration = Duration::from_secs(1);

/// First byte of the device state in transit, before QEMU's own stream: 1 if the guest was running when it was stopped.
/// A guest that its user had paused arrives paused.
const GUEST_RUNS: u8 = 1;
const GUEST_IS_PAUSED: u8 = 0;

/// A QEMU with an open QMP connection.
pub(crate) struct Qemu {
    qmp: Qmp,
    /// The path of its socket; None for a connection that another process could not open.
    socket: Option<PathBuf>,
    process: Option<Process>,
    /// At the source: the guest was live before it was stopped. At the destination: it is live there.
    is_live: bool,
    /// umem may have stopped the guest.
    may_be_stopped: bool,
    /// The changes of its settings.
    changes: Option<Changes>,
    claim: Option<Claim>,
    /// The claim of an earlier umem process, whose changes this one undoes.
    left_claim: Option<String>,
    before_stop: Option<BeforeStop>,
    /// umem's end of the socket for the device state; QEMU has the other end.
    state_socket: Option<UnixStream>,
    saving: Saving,
    /// The reader of its stream, if the stream is read from before the guest's stop on.
    stream: Option<Arc<Reading>>,
    /// The device state, if the stop has saved it.
    state: Option<Vec<u8>>,
    /// Its RAM blocks, from the query for the guest's memory.
    block_names: Option<BTreeSet<String>>,
    /// An event has reported that the guest has run since its stop.
    has_run: bool,
    /// The states after the completed migration: of the guest, and of the migration.
    given_away: Option<(String, Value)>,
}

impl Qemu {
    pub(crate) fn new(qmp: Qmp) -> Qemu {
        Qemu {
            process: qmp.process(),
            qmp,
            socket: None,
            is_live: true,
            may_be_stopped: false,
            changes: None,
            claim: None,
            left_claim: None,
            before_stop: None,
            state_socket: None,
            saving: Saving::Over,
            stream: None,
            state: None,
            block_names: None,
            has_run: false,
            given_away: None,
        }
    }

    /// A QEMU that an earlier umem process has changed, and may have stopped: [`Monitor::resume`] undoes both,
    /// [`Monitor::put_back`] the changes alone.
    pub(crate) fn left(qmp: Qmp, undo: &Undo) -> Qemu {
        let mut qemu = Qemu::new(qmp);
        qemu.is_live = undo.was_live;
        qemu.may_be_stopped = true;
        qemu.changes = Some(undo.changes.clone());
        qemu.left_claim.clone_from(&undo.claim);
        qemu
    }

    /// A QEMU into which an earlier umem process has loaded a device state: [`Monitor::run`] starts the guest, if it
    /// ran at the source.
    pub(crate) fn loaded(qmp: Qmp, runs: bool) -> Qemu {
        let mut qemu = Qemu::new(qmp);
        qemu.is_live = runs;
        qemu
    }

    /// Checks that this guest can be moved, with its RAM mapped as `kind` states, and returns its RAM backends. Changes
    /// nothing.
    pub(crate) fn check(&mut self, kind: Kind) -> Result<Vec<Backend>> {
        self.check_with(kind, Contents::Files)
    }

    /// The same at a source, where the contents of RAM may also come with the stream.
    pub(crate) fn check_source(&mut self, has_rounds: bool) -> Result<Vec<Backend>> {
        let contents = if has_rounds { Contents::Streamed } else { Contents::FilesUnstreamed };
        self.check_with(Kind::Shared, contents)
    }

    fn check_with(&mut self, kind: Kind, contents: Contents) -> Result<Vec<Backend>> {
        let backends = self.backends(kind, contents)?;
        self.check_devices()?;
        Ok(backends)
    }

    /// Makes this process the only one that moves the guest away, if the guest can be moved now. After a failed or
    /// completed move the claim is put back with the other changes, or dropped. The state that a killed umem has left
    /// here is undone first: its settings are not the user's.
    pub(crate) fn claim(&mut self) -> Result<()> {
        let left = claim::look(&mut self.qmp)?;
        if left.is_some() {
            // Without its umem, that migration fails.
            self.wait_migration_ended()?;
        }
        run_state::check(&mut self.qmp)?;
        self.claim = Claim::take(&mut self.qmp)?;
        if let Some(left) = left {
            // The changes stay recorded in QEMU until they are undone.
            self.changes = Some(left.changes);
            self.undo_changes()?;
            if left.stops && run_state::status(&mut self.qmp)? == "paused" {
                self.qmp.execute("cont", json!({}))?;
            }
            claim::remove_notes(&mut self.qmp)?;
        }
        Changes::needed(&mut self.qmp, Role::Source { holds: true }).map(drop)
    }

    /// Waits until the migration has been completed, and returns QEMU's report of it. An error contains QEMU's own
    /// reason.
    fn wait_migrated(&mut self) -> Result<Value> {
        let mut interval = STATUS_INTERVAL_MIN;
        loop {
            let migration = self.qmp.execute("query-migrate", json!({}))?;
            match migration["status"].as_str().unwrap_or("none") {
                "completed" => return Ok(migration),
                "failed" | "cancelled" => {
                    let reason = migration["error-desc"].as_str().unwrap_or("no reason given");
                    return Err(Error::Host(format!("its device state: {reason}")));
                }
                _ => std::thread::sleep(interval),
            }
            interval = (interval * 2).min(STATUS_INTERVAL);
        }
    }

    /// Changes the settings on which a stream depends. Their earlier values are recorded first.
    fn change_settings(&mut self, role: Role) -> Result<()> {
        let status = run_state::check(&mut self.qmp)?;
        self.is_live = run_state::is_live(&status);
        let changes = Changes::needed(&mut self.qmp, role)?;
        self.changes = Some(changes.clone());
        self.note_undo()?;
        if let Some(claim) = &mut self.claim {
            claim.note_settings(&mut self.qmp, &changes)?;
        }
        changes.make(&mut self.qmp)
    }

    /// Records what a later process would have to undo.
    fn note_undo(&mut self) -> Result<()> {
        let Some(note) = &self.before_stop else { return Ok(()) };
        let claim = self.claim.as_ref().map(|claim| claim.name.clone());
        let changes = self.changes.clone().unwrap_or_default();
        let undo = Undo { was_live: self.is_live, claim, changes, process: self.process };
        note(&Record { socket: self.socket.clone(), undo: Some(undo) }.write())
    }

    /// Gives QEMU one end of a new socket for its device state.
    fn give_state_socket(&mut self) -> Result<()> {
        let (ours, theirs) = socket_pair()?;
        self.qmp.give_descriptor(STATE_SOCKET, theirs.as_fd())?;
        self.state_socket = Some(ours);
        Ok(())
    }

    /// Takes back a descriptor that was not used. QEMU does not know one any more that it has closed.
    fn take_back_state_socket(&mut self) -> Result<()> {
        if self.state_socket.take().is_some() {
            let _ = self.qmp.try_execute("closefd", json!({ "fdname": STATE_SOCKET }))?;
        }
        Ok(())
    }

    /// Whether this umem still has to undo the changes: the umem that made them may be gone, and another one may have
    /// undone them.
    pub(crate) fn is_ours(&mut self) -> Result<bool> {
        match &self.left_claim {
            Some(name) => claim::was_left(&mut self.qmp, name),
            None => Ok(true),
        }
    }

    /// Makes the migration fail that was begun here, and waits for its end. Other migrations are not touched.
    fn end_migration(&mut self) -> Result<()> {
        let was_begun = match std::mem::take(&mut self.saving) {
            Saving::Over => self.left_claim.is_some(),
            Saving::Begun => true,
            Saving::Held(socket) => {
                saving::abandon(&socket);
                true
            }
        };
        if was_begun { self.wait_migration_ended() } else { Ok(()) }
    }

    fn undo_changes(&mut self) -> Result<()> {
        if let Some(made) = &self.changes {
            made.put_back(&mut self.qmp)?;
        }
        self.changes = None;
        Ok(())
    }

    fn wait_migration_ended(&mut self) -> Result<()> {
        let started = Instant::now();
        loop {
            let migration = self.qmp.execute("query-migrate", json!({}))?;
            let migration = migration["status"].as_str().unwrap_or("none");
            // QEMU resumes the guest, or restores its earlier run state, after it has reported the failure.
            let is_over = !run_state::is_under_way(migration)
                && run_state::status(&mut self.qmp)? != "finish-migrate";
            if is_over {
                return Ok(());
            }
            if started.elapsed() > FAILS_WITHIN {
                return Err(Error::Host(format!(
                    "its migration ({migration}) does not end, and umem does not know which program began it: if no \
                     program uses it, end it with the monitor command migrate_cancel"
                )));
            }
            std::thread::sleep(STATUS_INTERVAL);
        }
    }

    /// Resumes the guest that umem has stopped. QEMU itself or another client has often done so by now.
    fn go_on(&mut self) -> Result<()> {
        if !self.is_live || !std::mem::take(&mut self.may_be_stopped) {
            return Ok(());
        }
        match run_state::status(&mut self.qmp)?.as_str() {
            "paused" | "postmigrate" => self.qmp.execute("cont", json!({})).map(drop),
            // The guest runs, or is in a state that `cont` would not undo.
            _ => Ok(()),
        }
    }
}

impl Drop for Qemu {
    /// A claim that was not put back ends with its socket. QEMU would keep its device, though.
    fn drop(&mut self) {
        if let Some(claim) = self.claim.take()
            // The changes stay recorded in QEMU, for the next umem.
            && self.changes.is_none()
        {
            self.qmp.answer_within(DROP_PATIENCE);
            let _ = claim.release(&mut self.qmp);
        }
    }
}

impl Monitor for Qemu {
    fn name(&self) -> &'static str {
        "QEMU"
    }

    fn handle(&self) -> Result<Option<Handle>> {
        let connection = match self.socket {
            None => Some(self.qmp.connection()?),
            Some(_) => None,
        };
        let record = Record { socket: self.socket.clone(), undo: None }.write();
        Ok(Some(Handle { record, connection }))
    }

    fn before_stop(&mut self, note: BeforeStop) {
        self.before_stop = Some(note);
    }

    /// QEMU's migration stops the guest after all slow work is done. Before that it collects the guest's writes, for
    /// which TCG walks every vCPU's address cache (2 ms each, longer than the rest of the saving), and sends what does
    /// not belong to the guest's own memory.
    fn stop(&mut self) -> Result<Option<Instant>> {
        let stream = self.stream.take();
        let holds = stream.is_some() || self.can_hold()?;
        if stream.is_none() {
            self.change_settings(Role::Source { holds })?;
            // Each answer takes time, so the questions are asked while the guest runs.
            self.give_state_socket()?;
        } else {
            self.look_for_a_pause()?;
            self.note_undo()?;
        }
        self.may_be_stopped = true;
        let asked = Instant::now();
        self.qmp.stopped_at();
        self.qmp.has_run();
        self.has_run = false;
        let state = match stream {
            Some(reading) => self.save_rest(&reading)?,
            None => self.save(holds)?,
        };
        self.state = Some(state);
        // The last answer came after the STOP event.
        let stopped = self.qmp.stopped_at().and_then(|at| at.elapsed().ok());
        let stopped = stopped.and_then(|ago| Instant::now().checked_sub(ago));
        Ok(Some(stopped.map_or(asked, |at| at.max(asked))))
    }

    fn save_state(&mut self) -> Result<Vec<u8>> {
        self.state.take().ok_or_else(|| Error::Internal("the device state was taken before".into()))
    }

    /// A QEMU that has ended runs no guest. While it ends its migration fails, which may start the guest once more; the
    /// event of that comes before the end of QEMU's socket.
    fn stands_still(&mut self) -> Result<()> {
        let answer = self.is_given_away();
        self.has_run |= self.qmp.has_run();
        match answer {
            Err(_) if !self.has_run && self.process.is_some_and(Process::has_ended) => Ok(()),
            answer => answer,
        }
    }

    fn resume(&mut self) -> Result<()> {
        self.state = None;
        self.stream = None;
        if !self.is_ours()? {
            self.left_claim = None;
            self.changes = None;
            return Err(Error::Host(
                "it holds no state of that session: QEMU was restarted, another umem moves its guest now, or the \
                 session was undone"
                    .into(),
            ));
        }
        // All steps are carried out, even if one of them fails.
        let ended = self.end_migration();
        let taken_back = self.take_back_state_socket();
        let gone_on = self.go_on();
        let put_back = self.put_back();
        ended.and(taken_back).and(gone_on).and(put_back)
    }

    fn put_back(&mut self) -> Result<()> {
        if !self.is_ours()? {
            return Ok(());
        }
        self.undo_changes()?;
        match (self.claim.take(), self.left_claim.take()) {
            (Some(claim), _) => claim.release(&mut self.qmp),
            (None, Some(_)) => claim::remove(&mut self.qmp),
            (None, None) => Ok(()),
        }
    }

    /// QEMU waits at the socket for its device state, so that the state does not wait for QEMU later. QEMU would start
    /// a guest that ran at the source as soon as the state is loaded, before the source has given the guest up; with a
    /// `stop` during the wait QEMU leaves the start to a `cont` (`qmp_stop` in its monitor/qmp-cmds.c).
    fn prepare(&mut self) -> Result<()> {
        self.qmp.execute("stop", json!({}))?;
        let changes = Changes::needed(&mut self.qmp, Role::Destination)?;
        self.changes.insert(changes).make(&mut self.qmp)?;
        self.give_state_socket()?;
        let uri = json!({ "uri": format!("fd:{STATE_SOCKET}") });
        self.qmp.execute("migrate-incoming", uri).map(drop)
    }

    fn load_state(&mut self, state: Vec<u8>) -> Result<Loaded> {
        let Some((&was_live, state)) = state.split_first() else {
            return Err(Error::Host(
                "the source sends no device state: a guest moved by its RAM file alone cannot \
                 become a QEMU; give `umem migrate` the source's QMP socket with --qmp"
                    .into(),
            ));
        };
        self.is_live = was_live == GUEST_RUNS;
        if self.state_socket.is_none() {
            self.prepare()?;
        }
        if let (Some(ignores), Some(changes)) = (stream::ignores_shared(state), &mut self.changes) {
            changes.ignore_shared(&mut self.qmp, ignores)?;
        }
        let mut ours = self.state_socket.take().expect("it has been prepared");
        self.qmp.has_run();
        // QEMU reads in its main loop and may refuse half-way: then the status has its own reason, and a broken pipe
        // here is not the final error.
        let written = ours.write_all(state);
        // QEMU may write to its return path, so the other direction stays open.
        let _ = ours.shutdown(Shutdown::Write);
        self.wait_migrated()?;
        written.context(|| "giving QEMU its device state")?;
        // The event comes before the answer that the state is loaded.
        if self.qmp.has_run() {
            return Err(Error::Host(
                "another client resumed the guest here (cont) before its source had given the guest up: the guest \
                 continues at the source; let umem resume the guest here"
                    .into(),
            ));
        }
        // The settings are put back before the source gives the guest up: a process that takes over from here on has
        // nothing to put back.
        self.changes.take().map_or(Ok(()), |made| made.put_back(&mut self.qmp))?;
        Ok(Loaded { runs: self.is_live })
    }

    fn run(&mut self) -> Result<()> {
        if !self.is_live {
            return Ok(());
        }
        self.qmp.execute("cont", json!({})).map(drop)
    }
}
