//! Takeover of a session whose destination process was killed: the state that the process leaves, and the continuation.
//!
//! From *loaded* on the source may give its guest up. So before that the guest's process is told to wait for a takeover
//! (`keep`), and gets the objects that a takeover needs (`session`): the state of every page, a socket to be reached
//! at, and umem's end of the monitor's socket. The session file has the rest. It is written before each step: before
//! *loaded* is sent, before the guest is let run, before *running* is sent. If a process is killed in between, the file
//! has the earlier state, and the source supplies the rest: it sends a switchover again that did not arrive.
//!
//! The new process continues as after the loss of all lanes ([`link`](crate::destination::link)), after these steps:
//! pages that were landing become missing again; events that were read but not carried out are carried out; complete
//! blocks leave their userfaultfd; all waiting threads are woken, so that they fault again.
//! [`words`](crate::memory::words) lists the moments at which a process can be killed, and why each is safe.
//!
//! Epochs start again at the lowest number: the lanes and the listener of the dead process are gone, with every waiting
//! connection. The source's next attempt is later than all of its earlier ones.
//!
//! The new process is not the monitor's parent. It sees that the monitor ends, but not its exit status.

use crate::runtime::hex;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use umem_wire::{Capabilities, Hello, LaneRole, PROTOCOL, PageSize, Region, RegionTable};

use super::farewell::{CompletionNotifier, Word};
use super::keeping::{GUEST_SOCKET, connect, session_of};
use crate::control::destination::takeover::{Found, Plan, Recalled, plan};
use crate::control::destination::{Core, Input, SessionPolicy};
use crate::control::liveness::STEP_TIMEOUT;
use crate::destination::admission::accept::LaneAcceptor;
use crate::destination::admission::prepare::{Adopted, Prepared};
use crate::destination::lanes::demand::RequestsFrom;
use crate::destination::link::Link;
use crate::destination::memory::GuestMemory;
use crate::destination::side::{GuestProcess, GuestSide};
use crate::destination::{InboxMessage, Migration, Serving};
use crate::error::{Context, Error, Result};
use crate::events::{Event, Remark, Undone};
use crate::fault::handoff::{Entrusted, Handed, HandoffSocket, Message};
use crate::host::arriving::{self, check_pieces};
use crate::host::command::MonitorProcess;
use crate::host::monitor::{Monitor, NoMonitor};
use crate::host::thread::HostThread;
use crate::memory::created::Created;
use crate::memory::words::State;
use crate::observe::Observer;
use crate::observe::output::Output;
use crate::runtime::inbox::{Inbox, Interest, Wake};
use crate::runtime::private_socket::is_deserted;
use crate::runtime::process::began;
use crate::runtime::role::Role;
use crate::session::{
    self, DestinationRecord, DestinationState, RegionRecord, ResumeOptions, SessionFile,
};
use crate::transport::lane::Listener;
use crate::transport::secure::{ServerAuth, WayIn};
use crate::transport::uri::Uri;

/// How long the guest's process may take to hand over again; it does nothing else meanwhile.
const HANDOFF_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a process may take to end after its socket has ended.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// How long an address may stay in use, and the interval between attempts.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(10);
const ADDRESS_INTERVAL: Duration = Duration::from_millis(20);

/// How long this process waits for a source that must learn of the guest's end or completion.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(30);

/// The consequence of an early interrupt.
const WAITS: &str = "the guest waits for another --resume";

/// Continues a session whose process is gone, until the guest has all of its memory. The exit status is 0: the guest's
/// process is not a child of this one, so its exit status is unknown.
///
/// # Errors
/// No such session; a session that a running process serves; a guest that has ended; every error that ends a migration
/// after its switchover.
pub fn run(options: &ResumeOptions) -> Result<i32> {
    let output = Output::new(options.json);
    let (keeper, record) = options.take_over::<DestinationRecord>()?;
    let inbox = Inbox::new()?;
    let security = options.security(&record);
    let guard = inbox.wait_for_work(WAITS, None, move || ServerAuth::load(&security))?;
    let guard = Arc::new(guard);
    let taken = Taken { keeper, record, guard, output };
    let result = taken.run(options, &inbox).map_err(|error| taken.guard.explain(error));
    // Dropping waits until data of the lanes has been sent.
    drop(taken);
    result.map(|()| 0)
}

/// A session that this process has taken over.
struct Taken {
    keeper: SessionFile<DestinationRecord>,
    record: DestinationRecord,
    guard: Arc<ServerAuth>,
    output: Output,
}

/// A waiting guest, and the objects that its process kept.
struct Guest {
    side: GuestSide,
    handed: Vec<Handed>,
    entrusted: Entrusted,
}

impl Taken {
    fn run(&self, options: &ResumeOptions, inbox: &Inbox<InboxMessage>) -> Result<()> {
        match plan(self.record.state, self.find(inbox)?) {
            Plan::Serve(guest) => return self.go_on(options, inbox, guest),
            Plan::Release(mut guest) => guest.side.release(inbox, &self.output)?,
            Plan::Nothing => {}
            Plan::TellOfCompletion => return self.tell_of_completion(options, inbox),
            Plan::TellOfEnd => return self.tell_of_the_end(options, inbox),
        }
        self.has_undone(Undone::Complete);
        self.keeper.remove();
        Ok(())
    }

    fn has_undone(&self, how: Undone) {
        self.output.tell(&Event::Undone { session: self.keeper.session(), how });
    }

    /// Finds the guest, and has its process hand everything over again.
    fn find(&self, inbox: &Inbox<InboxMessage>) -> Result<Found<Guest>> {
        let guest = &self.record.guest;
        let path = self.keeper.file(GUEST_SOCKET);
        let is_alive = || began(guest.pid) == Some(guest.began);
        if !is_alive() {
            return Ok(Found::Ended);
        }
        let stream = match connect(&path) {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused) => {
                return Ok(if is_alive() { Found::Complete } else { Found::Ended });
            }
            Err(error) => return Err(error).context(|| format!("the guest at {}", path.display())),
        };
        let created = guest.created.clone();
        // Checked after the handle was opened: a handle never passes to another process of the same number.
        let monitor = match MonitorProcess::taken_over(guest.pid, guest.owner, created, true) {
            Ok(monitor) if is_alive() => monitor,
            Ok(_) => return Ok(Found::Ended),
            Err(error) if has_no_process(&error) || !is_alive() => return Ok(Found::Ended),
            Err(error) => return Err(error),
        };
        let handoff = HandoffSocket::new(stream);
        let mut process = Box::new(GuestProcess::new(monitor, handoff, true, true));
        let Some((handed, entrusted)) = receive(&mut process, inbox, END_PATIENCE)? else {
            return Ok(Found::Ended);
        };
        let side = GuestSide::Process(process);
        Ok(Found::Waiting(Guest { side, handed, entrusted }))
    }

    /// Serves the guest.
    fn go_on(
        &self,
        options: &ResumeOptions,
        inbox: &Inbox<InboxMessage>,
        guest: Guest,
    ) -> Result<()> {
        let Guest { side, handed, entrusted } = guest;
        let observer = Observer::start(&options.observe, Role::Destination, None, &self.output)?;
        let landing = landing(&self.record)?;
        let mut prepared = Prepared::again(side, handed);
        let Adopted { regions, sources, landing } = prepared.adopt_again(&landing)?;
        let mut memory = GuestMemory::new(regions, sources);
        if let Some(pid) = prepared.side.memory_pid() {
            memory.belongs_to(pid);
        }
        let state = State::found(entrusted.state, memory.extents(), memory.sources.len())?;
        memory.share(&state);
        let recalled = memory.noted_standing(Recalled::from(&self.record));
        memory.take_over()?;
        let host = self.monitor(recalled.state, entrusted.qmp)?;
        let host = HostThread::start(host, inbox.post())?;
        let plan = crate::destination::Plan {
            touch: self.record.touch,
            cores: &options.cores,
            idle_cores: options.idle_cores,
            watch: &observer.watch,
            quiet: options.observe.quiet,
            step_timeout: STEP_TIMEOUT,
        };
        let hello = self.hello()?;
        let door = self.door(options, &hello, inbox)?;
        let link = Link::taken_over(hello, self.guard.clone(), self.certificate(), door);
        let terms = SessionPolicy {
            recovers: true,
            has_bulk_lanes: self.record.bulk_lanes > 0,
            is_checked: link.is_checked(),
            is_private: memory.needs_touch(),
            runs_itself: self.record.guest.monitor.is_none(),
            is_embedded: inbox.is_embedded(),
            session: Some(session_of(&self.keeper)),
            step_timeout: plan.step_timeout,
        };
        let has_run = recalled.state >= DestinationState::Running;
        let requests_from = match self.record.guest.monitor.is_some() || has_run {
            true => RequestsFrom::Start,
            false => RequestsFrom::Command,
        };
        let serving = Serving {
            core: Core::recalled(terms, &recalled, Instant::now()),
            link,
            keeper: Some(self.keeper.clone()),
            lane: None,
            requests_from,
            acks: self.record.capabilities & Capabilities::ACKS.0 != 0,
            lane_count: usize::from(self.record.bulk_lanes),
            landing,
        };
        memory.set_lanes_down(true);
        let memory = Arc::new(memory);
        let output = self.output.clone();
        let (mut migration, reach) = Migration::begin(&plan, output, inbox, memory, serving, host)?;
        // The killed process had the digests of the earlier pages.
        migration.digests_are_known = false;
        let started = migration
            .start_faults(&reach)
            .and_then(|()| migration.start_toucher(plan.touch, &prepared.side));
        if let Err(error) = started {
            return Err(migration.give_up(error, &mut prepared.side));
        }
        migration.feed(Input::TakeOver, &mut prepared.side);
        let driven = migration.drive(&mut prepared.side).map(|(report, _)| report);
        let driven = driven.map_err(|error| self.guard.explain(error));
        observer.ended(driven.as_ref());
        self.output.completed(&driven?);
        // The guest's process is not a child of this one, so this process need not stay.
        prepared.side.say_where(&self.output);
        Ok(())
    }

    /// The monitor; it may not have run its guest yet.
    fn monitor(
        &self,
        state: DestinationState,
        entrusted: Option<UnixStream>,
    ) -> Result<Box<dyn Monitor>> {
        let guest = &self.record.guest;
        // With an external switchover a program beside umem tells the monitor.
        let is_external = Capabilities(self.record.capabilities).contains(Capabilities::EXTERNAL);
        if is_external || !matches!(state, DestinationState::Loaded | DestinationState::Switched) {
            return Ok(Box::new(NoMonitor));
        }
        arriving::loaded(guest.monitor.as_ref(), entrusted, guest.runs)
    }

    /// A hello like that of the session's first demand lane.
    fn hello(&self) -> Result<Hello> {
        let session = session::parse(&self.keeper.session());
        Ok(Hello {
            versions: PROTOCOL,
            capabilities: Capabilities(self.record.capabilities),
            session: session.ok_or_else(|| {
                Error::Environment("the session's number in its file is invalid".into())
            })?,
            role: LaneRole::Demand,
            index: 0,
            bulk_lanes: self.record.bulk_lanes,
            epoch: 0,
            proof: [0; 32],
        })
    }

    fn certificate(&self) -> Option<Vec<u8>> {
        self.record.certificate.as_deref().and_then(hex::unhex)
    }

    /// The listener for the source, at the named address or the recorded one.
    fn door(
        &self,
        options: &ResumeOptions,
        hello: &Hello,
        inbox: &Inbox<InboxMessage>,
    ) -> Result<LaneAcceptor> {
        let recorded = self.record.uri.as_deref().map(str::parse::<Uri>).transpose();
        let uri = match (&options.uri, recorded.map_err(Error::Environment)?) {
            (Some(uri), _) => uri.clone(),
            (None, Some(uri)) if !uri.is_one_connection() => uri,
            (None, _) => {
                return Err(Error::Usage(
                    "the session had one connection, which is gone: add an address to listen on, such as \
                     tcp::4444, and give it to the source with `umem migrate --resume SESSION URI` or \
                     through its control socket"
                        .into(),
                ));
            }
        };
        remove_stale(&uri);
        let listener = self.listen(&uri, inbox)?;
        let uri = listener.uri(&uri);
        let open = self.guard.check_open(&WayIn::Listener(&listener), &uri)?;
        if let Some(open) = open {
            self.output.remark(&open);
        }
        let uri = uri.to_string();
        self.keeper.edit(|record| record.uri = Some(uri.clone()))?;
        self.output.tell(&Event::ListeningAgain { uri });
        let (guard, certificate) = (self.guard.clone(), self.certificate());
        Ok(LaneAcceptor::of_session(listener, guard, hello, certificate, &self.output))
    }

    /// Listens on the address, and retries while it is in use: sockets of a killed process may outlive it for a moment,
    /// because the kernel closes them after io_uring has ended.
    fn listen(&self, uri: &Uri, inbox: &Inbox<InboxMessage>) -> Result<Listener> {
        let deadline = Instant::now() + ADDRESS_PATIENCE;
        let mut has_told = false;
        let look = |fds: &[Interest<'_>], limit| inbox.wait_ready(fds, limit, WAITS);
        loop {
            match Listener::bind_waiting(uri, &look) {
                Err(Error::Listen { source, .. })
                    if source.kind() == ErrorKind::AddrInUse && Instant::now() < deadline =>
                {
                    if !std::mem::replace(&mut has_told, true) {
                        let uri = uri.clone();
                        self.output.tell(&Event::Remark(Remark::AddressInUse { uri }));
                    }
                }
                other => return other,
            }
            if let Wake::Signal = inbox.wait(&[], Some(ADDRESS_INTERVAL))? {
                return Err(Error::Interrupted(WAITS.into()));
            }
        }
    }

    /// Notifies the source of the completion: the source has not said goodbye, and would retry indefinitely.
    fn tell_of_completion(
        &self,
        options: &ResumeOptions,
        inbox: &Inbox<InboxMessage>,
    ) -> Result<()> {
        let standing = Recalled::from(&self.record).standing(self.record.totals.into());
        let word = Word::Complete { standing, landing: landing(&self.record)? };
        self.output.tell(&Event::Remark(Remark::AwaitsSource));
        let told = self.farewell(options, inbox, word)?;
        self.has_undone(Undone::Heard { is_told: told });
        if !told {
            let session = session_of(&self.keeper);
            let (session, command) = (session.number.clone(), session.command());
            self.output.tell(&Event::Remark(Remark::SourceUnaware { session, command }));
        }
        Ok(())
    }

    /// Notifies the source of the guest's end, which came while no umem served the guest. The source would retry
    /// indefinitely.
    fn tell_of_the_end(&self, options: &ResumeOptions, inbox: &Inbox<InboxMessage>) -> Result<()> {
        const WHAT: &str = "the guest's process ended while no umem served it, before all of its memory had arrived";
        let told = self.farewell(options, inbox, Word::Failed(Error::Ended(WHAT.into())));
        if !matches!(told, Ok(true)) {
            let reason = told.err().map(|error| error.to_string());
            self.output.tell(&Event::Remark(Remark::SourceNotToldOfEnd { reason }));
        }
        self.record.guest.created.iter().for_each(Created::remove);
        self.keeper.remove();
        Err(Error::Ended(WHAT.into()))
    }

    /// Waits for the source, and notifies it on its new lanes; false if the source does not connect.
    fn farewell(
        &self,
        options: &ResumeOptions,
        inbox: &Inbox<InboxMessage>,
        word: Word,
    ) -> Result<bool> {
        let door = self.door(options, &self.hello()?, inbox)?;
        let until = Some(Instant::now() + FAREWELL_PATIENCE);
        CompletionNotifier::new(door, word, self.keeper.clone(), until).wait(inbox)
    }
}

/// The regions in the order of the source's table, with their landing units.
pub(crate) fn landing(record: &DestinationRecord) -> Result<RegionTable> {
    let strange = |what: String| Error::Environment(format!("the session file: {what}"));
    let region = |region: &RegionRecord| {
        let page_size = PageSize::from_shift(region.unit_shift);
        let page_size = page_size.ok_or_else(|| strange("a page size in it is invalid".into()))?;
        Ok(Region { name: region.name.clone(), bytes: region.bytes, page_size })
    };
    let regions = record.regions.iter().map(region).collect::<Result<Vec<_>>>()?;
    RegionTable::new(regions).map_err(|error| strange(error.to_string()))
}

/// Removes the socket file of a killed process.
fn remove_stale(uri: &Uri) {
    let Uri::Unix { path } = uri else { return };
    if is_deserted(path) {
        let _ = std::fs::remove_file(path);
    }
}

/// Whether that is the kernel's answer to the number of a process that is not there.
fn has_no_process(error: &Error) -> bool {
    matches!(error, Error::System { source, .. } if source.raw_os_error() == Some(libc::ESRCH))
}

/// Receives everything that the guest's process keeps; None if the process ends meanwhile. `end_patience` is the longest
/// time from the end of its socket to the end of the process.
///
/// # Errors
/// The process lives and does not hand over.
fn receive(
    process: &mut GuestProcess,
    inbox: &Inbox<InboxMessage>,
    end_patience: Duration,
) -> Result<Option<(Vec<Handed>, Entrusted)>> {
    let deadline = Instant::now() + HANDOFF_TIMEOUT;
    let mut handed = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let extra = [process.handoff.stream().as_fd(), process.monitor.exited()];
        match inbox.wait(&extra, Some(left))? {
            Wake::Signal => {
                return Err(Error::Interrupted(WAITS.into()));
            }
            Wake::Timeout => {
                return Err(process.does_not_hand_over());
            }
            Wake::Ready(0) => {}
            Wake::Ready(_) => return Ok(None),
            Wake::Message(_) => continue,
        }
        let Some(messages) = process.handoff.read()? else {
            return ended(process, inbox, end_patience).map(|()| None);
        };
        for message in messages {
            match message {
                Message::Memory { pieces, .. } => {
                    handed.extend(pieces);
                    check_pieces(handed.len())?;
                }
                Message::Session(entrusted) => return Ok(Some((handed, entrusted))),
                Message::Loaded | Message::Monitor(_) | Message::Released => {}
            }
        }
    }
}

/// Waits for the end of a process that has closed its socket: one that lives needs its pages, and its source.
fn ended(process: &GuestProcess, inbox: &Inbox<InboxMessage>, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match inbox.wait(&[process.monitor.exited()], Some(left))? {
            Wake::Signal => return Err(Error::Interrupted(WAITS.into())),
            Wake::Ready(_) => return Ok(()),
            Wake::Timeout => return Err(process.does_not_hand_over()),
            Wake::Message(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// A process whose side of the socket is closed.
    fn closed(pid: u32) -> GuestProcess {
        let (ours, _) = UnixStream::pair().unwrap();
        let monitor = MonitorProcess::taken_over(pid, None, Vec::new(), true).unwrap();
        GuestProcess::new(monitor, HandoffSocket::new(ours), true, true)
    }

    #[test]
    fn process_that_lives_and_closes_its_socket_has_not_ended() {
        let inbox = Inbox::new().unwrap();
        let received = receive(&mut closed(std::process::id()), &inbox, Duration::ZERO);
        let says = received.err().expect("it lives").to_string();
        assert!(says.contains("does not hand its memory over"), "{says}");

        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let mut process = closed(child.id());
        drop(child.stdin.take());
        assert!(receive(&mut process, &inbox, END_PATIENCE).unwrap().is_none());
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn process_that_cannot_be_opened_has_ended_only_where_there_is_none() {
        let failed = |errno| Error::System {
            what: "pidfd_open of process 7".into(),
            source: std::io::Error::from_raw_os_error(errno),
        };
        assert!(has_no_process(&failed(libc::ESRCH)));
        assert!(!has_no_process(&failed(libc::EMFILE)));
    }
}
