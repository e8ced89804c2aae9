//! Takeover of a session whose source process was killed: the state that the process leaves, and the continuation.
//!
//! The session file gets the monitor settings to undo before the guest is stopped, and the commitment before the
//! switchover is sent. So there are two kinds of sessions to take over:
//!
//! - *Stopped.* No switchover was sent, and none will be. The guest continues here. The destination is notified: it may
//!   have loaded the guest and wait for a switchover.
//! - *Committed.* The guest may run at the destination. The RAM files have every page that it could need. The
//!   destination reports the pages that it has, as after the loss of all lanes ([`cut`](crate::control::source)). The
//!   new process treats every page as sent.
//!
//! The file is written before each step. If a process is killed between the two, the step counts as done. For the
//! switchover that is the safe choice, because the destination reports whether the switchover arrived.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use nix::poll::PollFlags;
use umem_wire::{Capabilities, PageSize, Region, RegionId, RegionTable};

use super::parting::Caller;
use crate::control::calling::{Called, Word};
use crate::control::liveness::STEP_TIMEOUT;
use crate::control::source::leftover::{self, Knocked, Leftover};
use crate::control::source::{Heard, Input, Left, Record, Source};
use crate::error::{Error, Result};
use crate::events::{Event, Remark, Undone};
use crate::host::command::RamPath;
use crate::host::leaving;
use crate::host::monitor::{BeforeStop, MonitorRecord};
use crate::host::thread::HostThread;
use crate::memory::region::RamFile;
use crate::memory::words::AtomicWords;
use crate::observe::Observer;
use crate::observe::output::Output;
use crate::runtime::bandwidth::Bandwidth;
use crate::runtime::inbox::{Inbox, Wake};
use crate::runtime::os_text::absolute;
use crate::runtime::role::Role;
use crate::session::{
    self, Directory, RamRecord, ResumeOptions, SecurityRecord, SessionFile, SourceRecord,
    SourceState, VERSION, since_boot, when,
};
use crate::source::link::Link;
use crate::source::memory::SourceMemory;
use crate::source::{Migration, Order, Plan, wait};
use crate::transport::lane::{Lane, Session};
use crate::transport::secure::{self, ClientAuth, Security};
use crate::transport::uri::Uri;

/// The options of `umem migrate --resume`.
#[derive(Clone, Debug)]
pub struct Options {
    /// The options that both sides have.
    pub resume: ResumeOptions,
    /// The order of background pages.
    pub order: Order,
    /// End the session instead: the user knows that the destination needs none of its pages any more.
    pub abandon: bool,
}

/// The consequence of an interrupt while the monitor has not yet confirmed that its guest runs again.
const STANDS_STILL: &str = "the guest's monitor has not answered, and the guest may stand still here: query the \
    monitor with `query-status`, then repeat the same --resume";

/// The consequence of an interrupt while umem finds out whether a destination answers.
const STAYS: &str = "the session is unchanged";

/// Continues a session whose process is gone, or ends the session.
///
/// # Errors
/// No such session; a session that a running process serves; RAM files that were replaced; every error that ends a
/// migration after its switchover. With `abandon`: a destination that answers.
pub fn run(options: &Options) -> Result<()> {
    let output = Output::new(options.resume.json);
    let (keeper, record) = options.resume.take_over::<SourceRecord>()?;
    let uri = match &options.resume.uri {
        Some(uri) => uri.clone(),
        None => record.uri.parse().map_err(Error::Environment)?,
    };
    let security = options.resume.security(&record);
    let taken = Taken { keeper, record, uri, security, output };
    let now = Instant::now();
    let (session, uri, epoch) = (taken.keeper.session(), taken.uri.clone(), taken.record.epoch);
    let core = match leftover::plan(taken.record.state, options.abandon)? {
        leftover::Plan::Serve => return taken.go_on(options),
        leftover::Plan::Undo => Leftover::stopped(session, uri, epoch),
        leftover::Plan::Part => Leftover::completed(session, uri, epoch, now),
        leftover::Plan::Abandon => Leftover::abandoned(session, uri, epoch, taken.ram_files()),
    };
    taken.carry_out(core)
}

/// A session that this process has taken over.
struct Taken {
    keeper: SessionFile<SourceRecord>,
    record: SourceRecord,
    uri: Uri,
    security: Security,
    output: Output,
}

impl Taken {
    fn session(&self) -> Result<Session> {
        let id = session::parse(&self.keeper.session());
        let id = id.ok_or_else(|| {
            Error::Environment("the session's number in its file is invalid".into())
        })?;
        let capabilities = Capabilities(self.record.capabilities);
        Ok(Session { id, bulk_lanes: self.record.bulk_lanes, capabilities })
    }

    /// The guest's RAM files that stay when the session ends.
    fn ram_files(&self) -> Vec<String> {
        let files = self.record.ram.iter().filter(|ram| !ram.is_own);
        files.map(|ram| ram.path.display().to_string()).collect()
    }

    /// Carries out the remaining steps of a session that has no pages to serve.
    fn carry_out(self, mut core: Leftover) -> Result<()> {
        let inbox = Inbox::new()?;
        let mut next = Some(leftover::Input::Begin);
        while !core.has_ended() {
            let input = next.take().unwrap_or_else(|| {
                let left = core.deadline().map(|at| at.saturating_duration_since(Instant::now()));
                match inbox.wait(&[], left) {
                    Ok(Wake::Signal) => {
                        let error =
                            Error::Interrupted("the destination has not been notified".into());
                        leftover::Input::NotDone(error)
                    }
                    Ok(_) => leftover::Input::Time,
                    Err(error) => leftover::Input::NotDone(error),
                }
            });
            for effect in core.handle(input, Instant::now()) {
                match self.effect(effect, &inbox) {
                    Ok(answer) => next = answer,
                    Err(error) => {
                        next = Some(leftover::Input::NotDone(error));
                        break;
                    }
                }
            }
        }
        let none = || Err(Error::Internal("the session has no outcome".into()));
        core.into_outcome().unwrap_or_else(none)
    }

    fn effect(
        &self,
        effect: leftover::Effect,
        inbox: &Inbox<crate::source::InboxMessage>,
    ) -> Result<Option<leftover::Input>> {
        match effect {
            leftover::Effect::Undo => {
                return Ok(Some(leftover::Input::Undone(self.have_it_go_on(inbox))));
            }
            leftover::Effect::Epoch(epoch) => self.keeper.edit(|record| record.epoch = epoch)?,
            leftover::Effect::Call { epoch, until, word } => {
                let called = self.call(epoch, &word, until, inbox);
                let called = called.unwrap_or_else(Called::NotHeard);
                return Ok(Some(leftover::Input::Called(called)));
            }
            leftover::Effect::Knock { epoch } => {
                let knocked = match self.uri.is_one_connection() {
                    true => Knocked::NoAddress,
                    false => match self.open_lanes(epoch, inbox) {
                        Ok(_) => Knocked::Opened,
                        Err(error) => Knocked::NotOpened(error),
                    },
                };
                return Ok(Some(leftover::Input::Knocked(knocked)));
            }
            leftover::Effect::Free => self.free(),
            leftover::Effect::Forget => {
                self.record.remove_own_files();
                self.keeper.remove();
            }
            leftover::Effect::Tell(event) => self.output.tell(&event),
        }
        Ok(None)
    }

    /// Has the guest run here again, if it still belongs to this session.
    fn have_it_go_on(&self, inbox: &Inbox<crate::source::InboxMessage>) -> Result<Undone> {
        let record = self.record.monitor.clone();
        let first = || self.output.tell(&Event::Remark(Remark::StandsStill));
        inbox.wait_for_work(STANDS_STILL, Some(&first), move || leaving::undo(record.as_ref()))
    }

    fn call(
        &self,
        epoch: u32,
        word: &Word,
        until: Instant,
        inbox: &Inbox<crate::source::InboxMessage>,
    ) -> Result<Called> {
        let pass = ClientAuth::load(&self.security, &self.uri)?;
        let caller = Caller { uri: &self.uri, session: self.session()?, pass: &pass, inbox };
        Ok(match word {
            // The record has the landing units from the commit on.
            Word::Goodbye => caller.goodbye(epoch, until, &landing(&self.record)?),
            Word::GaveUp(why) => caller.gave_up(epoch, until, why),
        })
    }

    fn free(&self) {
        if self.record.capabilities & Capabilities::ACKS.0 == 0 {
            return;
        }
        let freed = open_again(&self.record.ram, true);
        let freed = freed.and_then(|files| files.iter().try_for_each(RamFile::free));
        if let Err(error) = freed {
            let remark = Remark::NotFreed { reason: error.to_string() };
            self.output.tell(&Event::Remark(remark));
        }
    }

    /// All lanes of this attempt, the demand lane first.
    fn open_lanes(
        &self,
        epoch: u32,
        inbox: &Inbox<crate::source::InboxMessage>,
    ) -> Result<Vec<Lane>> {
        let session = self.session()?;
        let (security, uri) = (self.security.clone(), self.uri.clone());
        let load = move || ClientAuth::load(&security, &uri);
        let pass = inbox.wait_for_work(STAYS, None, load)?;
        let wait = |fds: &[(BorrowedFd<'_>, PollFlags)], limit| inbox.wait_ready(fds, limit, STAYS);
        let open = |index| secure::dial(&self.uri, &session.hello(index, epoch), &pass, &wait);
        (0..=session.bulk_lanes).map(open).collect()
    }

    /// Serves the guest's memory.
    fn go_on(self, options: &Options) -> Result<()> {
        let session = self.session()?;
        let Taken { keeper, record, uri, security, output } = self;
        let inbox = Inbox::new()?;
        let releases = session.capabilities.contains(Capabilities::ACKS);
        let (named, to) = (security.clone(), uri.clone());
        let load = move || ClientAuth::load(&named, &to);
        let pass = inbox.wait_for_work("the guest waits for another --resume", None, load)?;
        let pass = Arc::new(pass);
        let bandwidth = Arc::new(Bandwidth::new(record.max_postcopy_bandwidth));
        let limit = record.postcopy.then(|| bandwidth.clone());
        let Options { resume, order, .. } = options;
        let observer = Observer::start(&resume.observe, Role::Source, limit, &output)?;
        let files = open_again(&record.ram, releases)?;
        check_stamps(&keeper, &record, &files)?;
        let memory = SourceMemory::new(files, releases).limited(bandwidth);
        memory.claim(true)?;
        memory.fix(record.monitor.is_none())?;
        keeper.edit(|record| {
            record.file_failed = false;
            for (ram, region) in record.ram.iter_mut().zip(&memory.regions) {
                // Every freed hole changes the file's stamp, so a stamp is useless with --release-ram.
                ram.stamp = region.ram.stamp().filter(|_| !releases);
            }
        })?;
        let memory = memory.checked(session.capabilities.contains(Capabilities::CHECKSUM));
        // The killed process had the digests of pages that were freed, or given back in a file of umem.
        let has_own = record.ram.iter().any(|ram| ram.is_own);
        memory.digest_is_lost.store(releases || has_own, Relaxed);
        memory.land_keeping(landing(&record)?, |id, words| keep_freed(&keeper, id, words))?;
        memory.has_left();
        let look = |fds: &[(BorrowedFd<'_>, PollFlags)], limit| wait(&inbox, fds, limit);
        let plan = Plan {
            postcopy: record.postcopy,
            background: record.background,
            precopy: None,
            has_monitor: record.monitor.is_some(),
            stays_local: pass.has_tls() || secure::stays_local(&uri, &look)?,
            cores: &resume.cores,
            idle_cores: resume.idle_cores,
            order: *order,
            step_timeout: STEP_TIMEOUT,
            watch: &observer.watch,
            quiet: resume.observe.quiet,
        };
        let host = HostThread::start(leaving::departed(record.monitor.as_ref())?, inbox.post())?;
        let way = (!uri.is_one_connection()).then_some(uri);
        let link = Link::taken_over(session, pass.clone(), way, keeper);
        let memory = Arc::new(memory);
        let left = Left {
            epoch: record.epoch,
            heard: Heard { is_running: record.running, bytes: record.heard_bytes },
            stopped: when(record.stopped_at),
            switched: when(record.switched_at),
        };
        let core =
            |plan, uri, background| Source::taken_over(plan, uri, background, left, Instant::now());
        let mut migration = Migration::new(&plan, output.clone(), inbox, link, memory, host, core);
        migration.allocated_bytes = record.allocated_bytes;
        let driven = migration.drive(Input::TakeOver).map_err(|error| pass.explain(error));
        observer.ended(driven.as_ref());
        let report = driven?;
        output.completed(&report);
        report.check_digests()
    }
}

/// The landing table of a record.
fn landing(record: &SourceRecord) -> Result<RegionTable> {
    let strange = |what: String| Error::Environment(format!("the session file: {what}"));
    let region = |ram: &RamRecord| {
        let page_size = PageSize::from_shift(ram.unit_shift);
        let page_size = page_size.ok_or_else(|| strange("a page size in it is invalid".into()))?;
        Ok(Region { name: ram.name.clone(), bytes: ram.bytes, page_size })
    };
    let regions = record.ram.iter().map(region).collect::<Result<Vec<_>>>()?;
    RegionTable::new(regions).map_err(|error| strange(error.to_string()))
}

/// Opens the files that the guest left, and rejects other files. Each file is opened once, because its lock belongs to
/// the open file.
fn open_again(ram: &[RamRecord], releases: bool) -> Result<Vec<RamFile>> {
    let mut files: Vec<RamFile> = Vec::new();
    for region in ram {
        let is_same =
            |other: &RamRecord| (other.device, other.inode) == (region.device, region.inode);
        let before = ram.iter().take(files.len()).position(is_same);
        files.push(open_region(region, before.map(|index| &files[index]), releases)?);
    }
    Ok(files)
}

/// Opens one region; `opened` is an earlier region of the same file.
fn open_region(ram: &RamRecord, opened: Option<&RamFile>, releases: bool) -> Result<RamFile> {
    let part = ram.offset..ram.offset.saturating_add(ram.bytes);
    let file = match opened {
        Some(opened) => opened.another_part(&ram.name, part)?,
        None => RamFile::open_part(&ram.name, &ram.path, Some(part), releases)?,
    };
    if (file.identity()?, file.bytes) == ((ram.device, ram.inode), ram.bytes) {
        return Ok(file);
    }
    Err(Error::Ram {
        name: ram.name.clone(),
        path: ram.path.clone(),
        what:
            "is not the file that the guest left: the file was replaced, and its contents are lost"
                .into(),
    })
}

/// Refuses files that have changed since the guest left. The refusal comes once: the next --resume means that the user
/// has restored the files.
fn check_stamps(
    keeper: &SessionFile<SourceRecord>,
    record: &SourceRecord,
    files: &[RamFile],
) -> Result<()> {
    if record.file_failed {
        return Ok(());
    }
    for (ram, file) in record.ram.iter().zip(files) {
        let now = file.stamp_now()?;
        let Some(what) = ram.stamp.and_then(|before| before.difference(&now)) else { continue };
        keeper.edit(|record| record.file_failed = true)?;
        return Err(Error::Ram {
            name: ram.name.clone(),
            path: ram.path.clone(),
            what: format!(
                "has changed since its guest left: {what}; if contents are missing, write them back into the \
                 same file, then repeat --resume"
            ),
        });
    }
    Ok(())
}

/// Page states of freed memory in a file, so that a takeover knows the pages that may be gone here.
fn keep_freed(
    keeper: &SessionFile<SourceRecord>,
    id: RegionId,
    words: u64,
) -> Result<Option<AtomicWords>> {
    AtomicWords::in_file(&keeper.file(&format!("freed.{}", id.0)), words).map(Some)
}

/// Makes the session file of a new session, for a takeover. None if the destination does not recover, or if there is no
/// directory for the file.
pub(in crate::source) fn keep(
    options: &crate::source::Options,
    link: &Link,
    (ram, monitor): (&[RamPath], Option<MonitorRecord>),
    memory: &SourceMemory,
    output: &Output,
) -> Result<Option<SessionFile<SourceRecord>>> {
    if !link.recovers() {
        return Ok(None);
    }
    let named = options.session_dir.as_deref();
    let found = Directory::find_or_remark(named, |why| output.remark(why))?;
    let Some(directory) = found else { return Ok(None) };
    let ram = ram.iter().zip(&memory.regions).zip(0..).map(|((path, region), id)| {
        let (device, inode) = region.ram.identity()?;
        Ok(RamRecord {
            name: path.name.clone(),
            path: absolute(&path.path)?,
            offset: region.ram.part().start,
            bytes: region.ram.bytes,
            device,
            inode,
            unit_shift: 0,
            stamp: None,
            is_own: memory.is_own(RegionId(id)),
        })
    });
    let record = SourceRecord {
        version: VERSION,
        state: SourceState::Stopped,
        uri: options.uri.to_string(),
        bulk_lanes: link.session.bulk_lanes,
        capabilities: link.session.capabilities.0,
        epoch: 0,
        ram: ram.collect::<Result<_>>()?,
        monitor,
        postcopy: options.postcopy,
        background: options.background,
        max_postcopy_bandwidth: options.max_postcopy_bandwidth,
        security: SecurityRecord::of(&options.security)?,
        running: false,
        heard_bytes: 0,
        stopped_at: 0,
        switched_at: 0,
        allocated_bytes: 0,
        file_failed: false,
    };
    SessionFile::new(&directory, link.session.id, Role::Source, record).map(Some)
}

/// Writes the monitor settings to undo into the session file, before the guest is stopped.
pub(in crate::source) fn note_stop(keeper: SessionFile<SourceRecord>) -> BeforeStop {
    Box::new(move |changed| keeper.edit(|record| record.monitor = Some(changed.clone())))
}

impl Migration {
    /// Takes the destination's landing units.
    pub(in crate::source) fn land(&self, landing: RegionTable) -> Result<()> {
        self.memory.land_keeping(landing, |id, words| match &self.link.keeper {
            Some(keeper) => keep_freed(keeper, id, words),
            None => Ok(None),
        })
    }

    /// Writes the core's record to the session file, if there is one.
    pub(in crate::source) fn keep(&mut self, record: &Record) -> Result<()> {
        if self.memory.releases && matches!(record, Record::Committed { .. }) {
            self.allocated_bytes = self.memory.allocated_bytes()?;
        }
        let Some(keeper) = &self.link.keeper else { return Ok(()) };
        if matches!(record, Record::Committed { .. }) {
            self.memory.name_files()?;
        }
        keeper.edit(|kept| match record {
            Record::Committed { background, times } => {
                let at = |at: Option<Instant>| at.map_or(0, since_boot);
                kept.state = SourceState::Committed;
                kept.background = *background;
                kept.stopped_at = at(times.stopped);
                kept.switched_at = at(times.switched);
                kept.allocated_bytes = self.allocated_bytes;
                kept.max_postcopy_bandwidth = self.memory.bandwidth.limit();
                for (ram, region) in kept.ram.iter_mut().zip(&self.memory.regions) {
                    ram.unit_shift = region.unit().shift();
                    ram.stamp = region.ram.stamp().filter(|_| !self.memory.releases);
                }
            }
            Record::Stopped => kept.state = SourceState::Stopped,
            Record::Completed => kept.state = SourceState::Completed,
            Record::Epoch { epoch, uri } => {
                kept.epoch = *epoch;
                if let Some(uri) = uri {
                    kept.uri = uri.to_string();
                }
            }
            Record::Heard(heard) => {
                (kept.running, kept.heard_bytes) = (heard.is_running, heard.bytes);
            }
            Record::FileFailed => kept.file_failed = true,
        })
    }

    /// The command that continues the session, if another process can.
    pub(in crate::source) fn how_to_resume(&self) -> Option<String> {
        let keeper = self.link.keeper.as_ref()?;
        Some(format!("umem migrate --resume {}{}", keeper.session(), keeper.directory_option()))
    }

    /// Removes the session's files: no takeover is needed any more.
    pub(in crate::source) fn forget_session(&self) {
        if let Some(keeper) = &self.link.keeper {
            keeper.record().remove_own_files();
            keeper.remove();
        }
    }
}
