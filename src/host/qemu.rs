//! What umem asks of a QEMU over QMP, and what its configuration must look like.
//!
//! The device state travels by QEMU's own migration with the capability `x-ignore-shared`, which
//! leaves out RAM that is both shared and backed by a named file; that RAM is what umem moves. So
//! every RAM backend must be a `memory-backend-file` with `share=on`: a memfd would be sent whole
//! inside the device state, and private memory cannot be read from outside of QEMU. With rounds before
//! the stop QEMU's whole stream is read, and the contents of such RAM come with it ([`stream`]).

mod backends;
mod blocks;
mod claim;
mod finding;
mod left;
mod record;
mod run_state;
mod saving;
mod settings;
pub(crate) mod stream;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use umem_wire::limits::STATE_BYTES_MAX;

use super::monitor::{BeforeStop, Handle, Loaded, Monitor};
use super::qmp::{Process, Qmp, socket_pair};
use crate::error::{Context, Error, Result};
use crate::memory::kind::Kind;
use crate::runtime::panics;
use claim::Claim;
use record::{Record, Undo};
use saving::Saving;
use settings::Role;
use stream::reading::Reading;

use backends::{Backend, Contents, RamOfQemu, advice};
pub(crate) use finding::QEMU;
use settings::Changes;

/// The options that give a guest RAM umem can move; quoted in errors.
pub(crate) const HOW_TO_START: &str = "start QEMU with `-object memory-backend-file,id=ram0,\
    size=SIZE,share=on,mem-path=/dev/shm/FILE -machine memory-backend=ram0`";

/// What `getfd` calls the socket that carries the device state.
const STATE_SOCKET: &str = "umem-state";

/// How long a guest's run state may be behind the end of its migration: that takes the main loop's lock once.
const SETTLES_WITHIN: Duration = Duration::from_secs(10);

/// How often a migration's status is asked for while it ends, at first and then.
const STATUS_INTERVAL_MIN: Duration = Duration::from_micros(50);
const STATUS_INTERVAL: Duration = Duration::from_millis(1);

/// How long a migration that fails may take to end.
const FAILS_WITHIN: Duration = Duration::from_secs(10);

/// How long a QEMU may take to answer one that goes.
const DROP_PATIENCE: Duration = Duration::from_secs(1);

/// How long a guest may go on while its device state is being saved: QEMU has a look at the rate every 100 ms
/// only (`BUFFER_DELAY` in its migration/options.h), and what is sent until then is loaded while the guest stands
/// still.
const STOPS_ITSELF_WITHIN: Duration = Duration::from_millis(50);

/// First byte of what we carry as device state, before QEMU's own stream: whether the guest was
/// running when it was stopped, as one that its user had paused arrives paused.
const GUEST_RUNS: u8 = 1;
const GUEST_IS_PAUSED: u8 = 0;

/// A QEMU with an open QMP connection.
pub(crate) struct Qemu {
    qmp: Qmp,
    /// The path of its socket; None for a connection that another process could not open.
    socket: Option<PathBuf>,
    process: Option<Process>,
    /// The guest went on by itself before it was stopped, or does so at its destination.
    is_live: bool,
    /// It may have been stopped by umem.
    may_be_stopped: bool,
    /// What is changed in its settings.
    changes: Option<Changes>,
    claim: Option<Claim>,
    /// The claim of a process before this, whose changes are ours to undo.
    left_claim: Option<String>,
    before_stop: Option<BeforeStop>,
    /// Our end of the socket for the device state, whose other end QEMU has.
    state_socket: Option<UnixStream>,
    saving: Saving,
    /// Its stream, where that is read from before the guest stops.
    stream: Option<Arc<Reading>>,
    /// The device state, where it was saved in the act of stopping.
    state: Option<Vec<u8>>,
    /// Its RAM blocks, when it was asked which memory the guest has.
    block_names: Option<BTreeSet<String>>,
    /// The guest has run since it was stopped, as an event has said.
    has_run: bool,
    /// What the monitor said when the migration had been completed: its status, and the migration's.
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

    /// One that a process before this has changed, and perhaps stopped: [`Monitor::resume`] undoes that,
    /// [`Monitor::put_back`] the changes alone.
    pub(crate) fn left(qmp: Qmp, undo: &Undo) -> Qemu {
        let mut qemu = Qemu::new(qmp);
        qemu.is_live = undo.was_live;
        qemu.may_be_stopped = true;
        qemu.changes = Some(undo.changes.clone());
        qemu.left_claim.clone_from(&undo.claim);
        qemu
    }

    /// One that a process before this has given its device state: [`Monitor::run`] lets it run,
    /// if it ran at the source.
    pub(crate) fn loaded(qmp: Qmp, runs: bool) -> Qemu {
        let mut qemu = Qemu::new(qmp);
        qemu.is_live = runs;
        qemu
    }

    /// Checks that this guest can be moved, its RAM mapped as `kind` says, and returns its RAM
    /// backends. Changes nothing.
    pub(crate) fn check(&mut self, kind: Kind) -> Result<Vec<Backend>> {
        self.check_with(kind, Contents::Files)
    }

    /// Likewise at a source, whose RAM's contents may be had elsewhere, too.
    pub(crate) fn check_source(&mut self, has_rounds: bool) -> Result<Vec<Backend>> {
        let contents = if has_rounds { Contents::Streamed } else { Contents::FilesUnstreamed };
        self.check_with(Kind::Shared, contents)
    }

    fn check_with(&mut self, kind: Kind, contents: Contents) -> Result<Vec<Backend>> {
        let backends = self.backends(kind, contents)?;
        self.check_devices()?;
        Ok(backends)
    }

    /// Makes this process the one that moves the guest away, if that can be moved as it is now. Who fails to
    /// move it, or has moved it, has the claim put back with the rest, or dropped. What a umem has left here that was
    /// killed is undone first: its settings are not the user's.
    pub(crate) fn claim(&mut self) -> Result<()> {
        let left = claim::look(&mut self.qmp)?;
        if left.is_some() {
            // Without its umem it fails.
            self.wait_migration_ended()?;
        }
        run_state::check(&mut self.qmp)?;
        self.claim = Claim::take(&mut self.qmp)?;
        if let Some(left) = left {
            // Until that is done it stays there.
            self.changes = Some(left.changes);
            self.undo_changes()?;
            if left.stops && run_state::status(&mut self.qmp)? == "paused" {
                self.qmp.execute("cont", json!({}))?;
            }
            claim::remove_notes(&mut self.qmp)?;
        }
        Changes::needed(&mut self.qmp, Role::Source { holds: true }).map(drop)
    }

    /// Devices and network backends are asked for by what they are: a user's names mean nothing.
    fn check_devices(&mut self) -> Result<()> {
        for place in DEVICES {
            for (name, kind) in self.qmp.children(place)? {
                if let Some(why) = unsupported_device(&kind) {
                    return Err(Error::Unsupported(format!("device {name} ({kind}) {why}")));
                }
            }
        }
        let network = json!({ "command-line": "info network" });
        let network = self.qmp.try_execute("human-monitor-command", network)?;
        let network = network.unwrap_or_default();
        let lines = network.as_str().unwrap_or_default().lines();
        for (name, kind) in lines.filter_map(network_client) {
            if let Some(why) = unsupported_device(kind) {
                return Err(Error::Unsupported(format!("{name}, a netdev of type {kind}, {why}")));
            }
        }
        Ok(())
    }

    /// Waits until the migration has been completed, and returns what QEMU says of it; an error tells QEMU's own
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

    /// Whether QEMU can be kept from completing its migration: it has to have a return path, and to describe its
    /// stream, which machines older than QEMU 2.3 do not.
    fn can_hold(&mut self) -> Result<bool> {
        let has_return_path =
            settings::capabilities(&mut self.qmp)?.contains_key(settings::RETURN_PATH);
        let undescribed = self.qmp.property("/machine", "suppress-vmdesc")?;
        Ok(has_return_path && undescribed != Some(json!(true)))
    }

    /// Has QEMU write its device state to the other end of a socket, and returns it: no more than a byte
    /// over what is allowed.
    ///
    /// A guest that runs is stopped by that, sooner or later: QEMU goes on for as long as the guest changes what
    /// belongs to the state, such as video memory. After a while it is told to.
    ///
    /// It is read by a thread of its own, from before the command on: QEMU's migration holds the lock of its
    /// main loop while it writes, so that QEMU can answer the command only after all has been read.
    fn migrate_into(&mut self, ours: UnixStream, is_held: bool) -> Result<Vec<u8>> {
        let (has_ended, ended) = channel::<Infallible>();
        let read = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let _has_ended = has_ended;
                let read = saving::read(&ours, is_held);
                if !matches!(read, Ok((_, false))) {
                    // What is left of too much makes QEMU's migration fail, and not wait.
                    let _ = ours.shutdown(Shutdown::Both);
                }
                read
            });
            let uri = json!({ "uri": format!("fd:{STATE_SOCKET}") });
            let asked = self.qmp.execute("migrate", uri).and_then(|_| {
                self.saving = Saving::Begun;
                match ended.recv_timeout(STOPS_ITSELF_WITHIN) {
                    Err(RecvTimeoutError::Timeout) => {
                        if let Some(claim) = &mut self.claim {
                            claim.note_stop(&mut self.qmp)?;
                        }
                        self.qmp.execute("stop", json!({}))
                    }
                    _ => Ok(Value::Null),
                }
            });
            if let Err(error) = asked {
                saving::abandon(&ours);
                return Err(error);
            }
            reader.join().unwrap_or_else(|payload| Err(panics::error(&*payload)))
        });
        let (state, has_ended) = read?;
        if !has_ended {
            self.saving = Saving::Held(ours);
        }
        Ok(state)
    }

    /// Has QEMU save its device state, and stop its guest if that runs.
    fn save(&mut self, is_held: bool) -> Result<Vec<u8>> {
        if self.state_socket.is_none() {
            self.give_state_socket()?;
        }
        let ours = self.state_socket.take().expect("just given");
        let mut state = vec![if self.is_live { GUEST_RUNS } else { GUEST_IS_PAUSED }];
        state.extend(self.migrate_into(ours, is_held)?);
        if state.len() as u64 > STATE_BYTES_MAX {
            return Err(Error::Unsupported(format!(
                "QEMU's device state is larger than {} MiB: RAM outside of shared files is part of \
                 it; {HOW_TO_START}",
                STATE_BYTES_MAX >> 20
            )));
        }
        if matches!(self.saving, Saving::Begun) {
            let migration = self.wait_migrated()?;
            self.saving = Saving::Over;
            let status = run_state::status(&mut self.qmp)?;
            if run_state::is_live(&status) {
                return Err(is_not_ours((&status, &migration)));
            }
            self.given_away = Some((status, migration));
        } else {
            // Its answer comes after the event that says when the guest stopped.
            run_state::status(&mut self.qmp)?;
        }
        // From when it was told to migrate QEMU has let nobody plug in memory or take it out. What it leaves out of its
        // stream has to be what umem moves.
        self.check_blocks()?;
        Ok(state)
    }

    /// Has QEMU stop its guest and write the rest of a stream that is being read.
    fn save_rest(&mut self, reading: &Reading) -> Result<Vec<u8>> {
        let mut state = vec![if self.is_live { GUEST_RUNS } else { GUEST_IS_PAUSED }];
        state.extend(self.stop_stream(reading)?);
        // Its answer comes after the event that says when the guest stopped.
        run_state::status(&mut self.qmp)?;
        self.check_blocks()?;
        Ok(state)
    }

    /// Changes what a stream depends on, and has what it was written down before.
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

    /// Has written down what would have to be undone.
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

    /// Takes back a descriptor that was not used. One that QEMU has closed already it does not know any more.
    fn take_back_state_socket(&mut self) -> Result<()> {
        if self.state_socket.take().is_some() {
            let _ = self.qmp.try_execute("closefd", json!({ "fdname": STATE_SOCKET }))?;
        }
        Ok(())
    }

    /// Whether what was changed here is this umem's to undo: one before it may be gone, and so may be what it
    /// has changed.
    pub(crate) fn is_ours(&mut self) -> Result<bool> {
        match &self.left_claim {
            Some(name) => claim::was_left(&mut self.qmp, name),
            None => Ok(true),
        }
    }

    /// Has the migration that was begun here fail, and waits for its end. No other one is touched.
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
            // QEMU has the guest run again, or be what it was, after it has said that.
            let is_over = !run_state::is_under_way(migration)
                && run_state::status(&mut self.qmp)? != "finish-migrate";
            if is_over {
                return Ok(());
            }
            if started.elapsed() > FAILS_WITHIN {
                return Err(Error::Host(format!(
                    "its migration ({migration}) does not end, and umem does not know whose it is: end it with the \
                     monitor command migrate_cancel if it is nobody's"
                )));
            }
            std::thread::sleep(STATUS_INTERVAL);
        }
    }

    /// Has QEMU complete the migration, if that has not been, and asks whether the guest stands still since then.
    fn is_given_away(&mut self) -> Result<()> {
        let is_taken = match (&self.claim, &self.left_claim) {
            (Some(claim), _) => !claim.is_held(),
            (None, Some(name)) => claim::is_anothers(&mut self.qmp, name)?,
            (None, None) => false,
        };
        if is_taken {
            return Err(Error::Host(
                "another client has taken umem's claim on the guest away (its character device umem-mover)"
                    .into(),
            ));
        }
        let before = self.given_away.take();
        let was_held = matches!(self.saving, Saving::Held(_));
        let migration = match std::mem::take(&mut self.saving) {
            Saving::Held(socket) => {
                self.saving = Saving::Begun;
                if let Err(error) = saving::finish(&socket) {
                    return Err(self.why_unfinished(error)?);
                }
                self.wait_migrated()?;
                self.saving = Saving::Over;
                self.wait_settled()?;
                self.qmp.execute("query-migrate", json!({}))?
            }
            saving => {
                self.saving = saving;
                self.qmp.execute("query-migrate", json!({}))?
            }
        };
        // The last question: a guest that was let run after the migration's end shows in its status, or in the
        // event that came before the answer.
        let status = run_state::status(&mut self.qmp)?;
        self.has_run |= self.qmp.has_run();
        let is_as_before = match &before {
            Some((before, of)) => *before == status && figures(of) == figures(&migration),
            // A monitor without claims is no QEMU, and knows no such state.
            None if !was_held && self.left_claim.is_none() => !run_state::is_live(&status),
            None => status == "postmigrate" && migration["status"] == "completed",
        };
        if self.has_run || !is_as_before {
            return Err(is_not_ours((&status, &migration)));
        }
        self.given_away = Some((status, migration));
        Ok(())
    }

    /// Why a migration cannot be completed: perhaps somebody else has ended it.
    fn why_unfinished(&mut self, error: Error) -> Result<Error> {
        let migration = self.qmp.execute("query-migrate", json!({}))?;
        let status = migration["status"].as_str().unwrap_or("none");
        Ok(match status {
            "cancelled" | "cancelling" | "failed" => Error::Host(format!(
                "its migration was ended by another client before the guest was given away (query-migrate says \
                 {status})"
            )),
            _ => error,
        })
    }

    /// QEMU says that a migration has completed before it has written down what it came to, and before the guest's
    /// run state says so, too.
    fn wait_settled(&mut self) -> Result<()> {
        let started = Instant::now();
        while run_state::status(&mut self.qmp)? == "finish-migrate" {
            if started.elapsed() > SETTLES_WITHIN {
                let within = SETTLES_WITHIN.as_secs();
                return Err(Error::Host(format!(
                    "its migration has completed, and the guest is still in finish-migrate {within} s later"
                )));
            }
            std::thread::sleep(STATUS_INTERVAL);
        }
        Ok(())
    }

    /// A guest that has stopped while it waits for umem's word was paused by another client: so it arrives, or stays.
    fn look_for_a_pause(&mut self) -> Result<()> {
        // Its answer comes after the event.
        run_state::status(&mut self.qmp)?;
        if self.qmp.stopped_at().is_some() && self.waits_for_a_word()? {
            self.is_live = false;
        }
        Ok(())
    }

    /// Has the guest go on that umem has stopped. QEMU has often done so itself by now, or somebody else has.
    fn go_on(&mut self) -> Result<()> {
        if !self.is_live || !std::mem::take(&mut self.may_be_stopped) {
            return Ok(());
        }
        match run_state::status(&mut self.qmp)?.as_str() {
            "paused" | "postmigrate" => self.qmp.execute("cont", json!({})).map(drop),
            // It goes on, or something has happened to it that `cont` would not undo.
            _ => Ok(()),
        }
    }
}

impl Drop for Qemu {
    /// A claim that was not put back comes to nothing with its socket. QEMU would keep its device, though.
    fn drop(&mut self) {
        if let Some(claim) = self.claim.take()
            // What it has changed is known there to whoever comes next.
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

    /// QEMU's migration stops the guest: what of it takes time is done by then. It first looks for what the guest
    /// writes, for which TCG goes through every vCPU's address cache (2 ms each, and more than the rest of the
    /// saving), and sends what is not the guest's own memory.
    fn stop(&mut self) -> Result<Option<Instant>> {
        let stream = self.stream.take();
        let holds = stream.is_some() || self.can_hold()?;
        if stream.is_none() {
            self.change_settings(Role::Source { holds })?;
            // Each answer takes a while, during which the guest had better run.
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
        // Its last answer came after the event.
        let stopped = self.qmp.stopped_at().and_then(|at| at.elapsed().ok());
        let stopped = stopped.and_then(|ago| Instant::now().checked_sub(ago));
        Ok(Some(stopped.map_or(asked, |at| at.max(asked))))
    }

    fn save_state(&mut self) -> Result<Vec<u8>> {
        self.state.take().ok_or_else(|| Error::Internal("the device state was taken before".into()))
    }

    /// A QEMU that has ended runs no guest. As it ends it may let it run once more, as its migration fails then; the
    /// event of that comes before its socket's end.
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
                "nothing of that session is left in it: it was started anew, another umem has its guest now, or \
                 all has been undone"
                    .into(),
            ));
        }
        // One after the other, whatever becomes of the one before.
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

    /// QEMU waits at the socket for its device state, which need not wait for QEMU then. It would let a guest
    /// run that ran at the source as soon as that is loaded, and before the source has given it up; a `stop`
    /// while it waits has it leave that to a `cont` (`qmp_stop` in its monitor/qmp-cmds.c).
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
        // QEMU reads in its main loop and may refuse half-way: its own reason comes from the
        // status then, so a broken pipe here is not yet the answer.
        let written = ours.write_all(state);
        // It may have to say something on its return path, so that the other direction stays.
        let _ = ours.shutdown(Shutdown::Write);
        self.wait_migrated()?;
        written.context(|| "giving QEMU its device state")?;
        // The event comes before the answer that the state is loaded.
        if self.qmp.has_run() {
            return Err(Error::Host(
                "another client has let the guest run here (cont) before its source had given it up: it goes on there; \
                 leave it to umem to let it run"
                    .into(),
            ));
        }
        // Before it is the source's turn to give the guest up: whoever takes over from here on has nothing to
        // put back.
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

/// What tells a migration that has completed from another one: written once, at its end. What was transferred still
/// grows as QEMU closes its stream.
fn figures(migration: &Value) -> [&Value; 4] {
    ["status", "total-time", "setup-time", "downtime"].map(|name| &migration[name])
}

/// Its state and its migration's, as the monitor says them, are not what umem has left.
fn is_not_ours((status, migration): (&str, &Value)) -> Error {
    let migration = migration["status"].as_str().unwrap_or("none");
    Error::Host(format!(
        "another client has let the guest go on, or has moved it (its state is {status}, its migration is \
         {migration}): it is not given away"
    ))
}

/// Where QEMU has its devices, and what works for them in other processes.
const DEVICES: [&str; 4] =
    ["/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached", "/objects"];

/// Why a device keeps its guest from being moved, judged by its type's name, or that of a network backend.
fn unsupported_device(kind: &str) -> Option<&'static str> {
    let begins = |with: &[&str]| with.iter().any(|with| kind.starts_with(with));
    if begins(&["vhost-user", "cryptodev-vhost-user", "x-remote", "x-pci-proxy"]) {
        Some(
            "lets another process reach the guest's RAM without userfaultfd knowing: take it out before moving \
             the guest",
        )
    } else if begins(&["vfio", "x-vfio", "vhost-vdpa"]) {
        Some(
            "reads and writes the guest's RAM past the kernel's page tables, so that pages cannot \
             be fetched on demand: unplug it before moving the guest",
        )
    } else if begins(&["ivshmem"]) {
        Some(
            "shares memory with programs outside of the guest, which go on reading and writing it where it is: \
             unplug it before moving the guest",
        )
    } else {
        None
    }
}

/// Name and type in a line of `info network`: `n0: index=0,type=user,net=10.0.2.0,…`, which are followed by what the
/// user chose.
fn network_client(line: &str) -> Option<(&str, &str)> {
    let (name, rest) = line.trim_start_matches([' ', '\\']).split_once(": index=")?;
    let (_, kind) = rest.split_once(",type=")?;
    Some((name, kind.split(',').next()?))
}
