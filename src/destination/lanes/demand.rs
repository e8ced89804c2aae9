//! The demand lane at the destination: faults in, requests out, answers into the guest's pages.
//!
//! One thread, one ring. The thread reads the userfaultfds ([`Faults`]), requests each missing page once, and lands the
//! answers. Only this thread marks single pages cached; bulk lanes report their awaited pages to it by message. The
//! faults of a guest in shards are served by other threads, and this thread only requests and lands. Control frames
//! share the lane and go to the control thread.
//!
//! In a session that recovers the thread outlives its lane. It reports the loss of the lane, waits until no operation
//! of the lane is left, and reports that too. Meanwhile it continues to show arrived pages and to take the guest's
//! discards. On a new lane it first sends the account of arrived pages to the source, then requests the awaited pages
//! again.

use crate::error;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver as Commands;

use umem_ring::{
    Bytes, Completion, Config, Fd, Memory, Op, Outcome, Ring, TOKEN_MESSAGE, TOKEN_WAKE, Wait,
};
use umem_wire::limits::{REQUEST_ENTRIES_MAX, STATE_BYTES_MAX};
use umem_wire::{
    Event, Frame, LaneRole, PageRange, Receiver, RegionId, RegionTable, Seal, transmit,
};

use super::acks::Acks;
use crate::destination::InboxMessage;
use crate::destination::faults::latency::Latencies;
use crate::destination::faults::messages::RingMessages;
use crate::destination::faults::serving::{Faults, MESSAGE_ASK, Servers};
use crate::destination::landing::{
    Arrived, Given, LaneReader, TOKEN_AHEAD, TOKEN_CONTROL, TOKEN_FREE, TOKEN_RETRY, TOKEN_RUN,
};
use crate::destination::memory::{GuestMemory, PageId};
use crate::error::{Error, Result};
use crate::runtime::follow::{self, AffinityFollower};
use crate::runtime::idle::{CpuLatencyHold, IdleCores};
use crate::runtime::inbox::Post;
use crate::runtime::worker::{Started, ThreadHandle};
use crate::runtime::{panics, priority};
use crate::statistics::Counters;
use crate::transport::lane::{self, Hearing, Lane};

const TOKEN_SENT: u64 = TOKEN_FREE;
const TOKEN_FAULT_RETRY: u64 = TOKEN_FREE + 1;
const TOKEN_CALM: u64 = TOKEN_FREE + 2;
/// The guest's userfaultfds have this token and those after it.
const TOKEN_FAULTS: u64 = TOKEN_FREE + 3;

/// Commands of the control thread. A wake follows each.
pub(crate) enum Command {
    /// Send these bytes, whole frames. Without a lane they are dropped.
    Send(Vec<u8>),
    /// Send a ping of this number, whose pong is expected.
    Ping(u64),
    /// Request pages from here on, where [`RequestsFrom::Command`] was chosen.
    RequestPages,
    /// Vcpus wait for these pages, which are cached.
    Show(Vec<PageId>),
    /// Continue over this lane. Sent only after the thread has released the previous lane.
    Resume(Box<Resume>),
    /// Other threads serve the faults: report arrived pages to them.
    Servers(Servers),
    /// The guest is complete or lost: end after the last send.
    End,
}

/// The moment at which requests begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestsFrom {
    /// At the start: the guest has already stopped at the source.
    Start,
    /// Once the guest has stopped at the source: before that its pages may still change.
    Stop,
    /// On [`Command::RequestPages`]: the guest runs as soon as it has pages, and belongs to the source until then.
    Command,
}

/// A lane that replaces a lost one.
pub(crate) struct Resume {
    pub(crate) lane: Lane,
    pub(crate) landing: RegionTable,
    /// Whole frames, to be sent first.
    pub(crate) first: Vec<u8>,
    /// Whole frames, to be sent after the account of arrived pages.
    pub(crate) last: Vec<u8>,
}

/// The configuration of a demand thread.
pub(crate) struct DemandLane {
    /// The lane, with a receiver that has read the regions. None in a takeover: the first lane then arrives with
    /// [`Command::Resume`].
    pub(crate) lane: Option<(Lane, Receiver)>,
    pub(crate) guest: Arc<GuestMemory>,
    /// Whether this thread serves the guest's faults; otherwise [`Command::Servers`] names the threads that do.
    pub(crate) serves_faults: bool,
    pub(crate) core: Option<usize>,
    /// Whether the thread follows the guest's vCPUs: the user has not named a core.
    pub(crate) follows: bool,
    pub(crate) idle_cores: IdleCores,
    pub(crate) requests_from: RequestsFrom,
    /// Whether pages without a demand arrive here: there are no bulk lanes.
    pub(crate) has_background: bool,
    /// Whether the session continues after the loss of the lane.
    pub(crate) recovers: bool,
    pub(crate) acks: Acks,
    pub(crate) commands: Commands<Command>,
    pub(crate) post: Post<InboxMessage>,
}

/// The current lane.
struct Link {
    socket: Arc<OwnedFd>,
    reader: LaneReader,
    /// Seals frames that are sent on it.
    seal: Seal,
    /// Whether it is lost, and its operations are ending.
    is_lost: bool,
    /// The account to send before any other frame.
    account: Option<HaveFrames>,
}

/// The account of arrived pages, which a replacement lane sends to the source.
struct HaveFrames {
    first: Vec<u8>,
    ranges: Box<dyn Iterator<Item = PageRange> + Send>,
}

struct DemandThread {
    guest: Arc<GuestMemory>,
    /// None between the release of a lost lane and the next lane.
    link: Option<Link>,
    recovers: bool,
    has_background: bool,
    /// Arrived pages that are not counted yet, on a lane with a background.
    pages_arrived: u64,
    acks: Acks,
    commands: Commands<Command>,
    post: Post<InboxMessage>,
    requests_from: RequestsFrom,
    /// Whether the source's guest has stopped.
    has_stopped: bool,
    /// Whether requests have begun.
    may_ask: bool,
    /// None when the guest's faults are served by other threads.
    faults: Option<Faults>,
    servers: Option<Servers>,
    messages: RingMessages,
    follower: AffinityFollower,
    vigil: CpuLatencyHold,
    /// Whether pages were requested since the last look-up of the vCPUs' core.
    has_asked: bool,
    /// Awaited pages, reported by other threads.
    ask: Vec<(RegionId, u64)>,
    /// Arrived pages that a vCPU waits for.
    wanted: Vec<PageId>,
    /// Whole frames to send.
    outbox: Vec<u8>,
    /// The last unanswered ping; of a flood only one is kept.
    ping: Option<u64>,
    /// Limits the frames that go to the control thread.
    hearing: Hearing,
    /// The received part of the device state; None once it is whole.
    state: Option<Vec<u8>>,
    /// The send buffer, while it is not in flight.
    spare: Option<Vec<u8>>,
    /// Whether the source has said goodbye, and may close the lane. A ping after the goodbye is answered at the end,
    /// once the completion has been recorded.
    has_parted: bool,
    ending: bool,
}

impl DemandLane {
    /// Serves until [`Command::End`]. Returns the latencies of the faults.
    pub(crate) fn run(self, started: Started<ThreadHandle>) -> Result<Latencies> {
        let faults = self.serves_faults.then(|| {
            let sources = (0..self.guest.sources.len()).collect();
            Faults::new(self.guest.clone(), sources, TOKEN_FAULTS, TOKEN_FAULT_RETRY)
        });
        // Without a lane this is a takeover: the guest has stopped at the source.
        let has_stopped = self.lane.is_none();
        let link = self.lane.map(|(lane, receiver)| Link {
            socket: lane.socket(),
            reader: LaneReader::demand(&lane, receiver, self.guest.clone()),
            seal: Seal::new(lane.is_checked()),
            is_lost: false,
            account: None,
        });
        let mut thread = DemandThread {
            guest: self.guest.clone(),
            link,
            recovers: self.recovers,
            has_background: self.has_background,
            pages_arrived: 0,
            acks: self.acks,
            commands: self.commands,
            post: self.post,
            requests_from: self.requests_from,
            has_stopped,
            may_ask: self.requests_from == RequestsFrom::Start,
            faults,
            servers: None,
            messages: RingMessages::new(),
            follower: AffinityFollower::new(self.follows, self.core),
            vigil: CpuLatencyHold::new(self.idle_cores, TOKEN_CALM),
            has_asked: false,
            ask: Vec::with_capacity(REQUEST_ENTRIES_MAX),
            wanted: Vec::with_capacity(REQUEST_ENTRIES_MAX),
            outbox: Vec::with_capacity(4096),
            ping: None,
            hearing: Hearing::new(),
            state: (!has_stopped).then(Vec::new),
            spare: Some(Vec::with_capacity(4096)),
            has_parted: false,
            ending: false,
        };
        let name = error::lane_name(LaneRole::Demand, 0);
        thread.serve(&name, self.core, started)?;
        Ok(thread.faults.map_or_else(Latencies::new, Faults::into_latencies))
    }
}

impl DemandThread {
    fn serve(
        &mut self,
        name: &str,
        core: Option<usize>,
        started: Started<ThreadHandle>,
    ) -> Result<()> {
        let mut ring = Ring::new(&Config {
            name: name.to_owned(),
            core,
            ops_max: 64 + self.guest.sources.len() as u32,
            ..Config::default()
        })?;
        priority::go_first();
        started.with(ThreadHandle { waker: ring.waker()?, mailbox: ring.mailbox() });
        self.link.iter_mut().try_for_each(|link| link.reader.arm(&mut ring))?;
        if let Some(faults) = &self.faults {
            faults.arm(&mut ring)?;
        }
        loop {
            ring.enter(Wait::One)?;
            panics::point(format_args!("demand"));
            while let Some(completion) = ring.next() {
                self.completed(&mut ring, completion)?;
            }
            self.take_commands(&mut ring)?;
            self.let_go(&mut ring)?;
            self.send(&mut ring)?;
            self.listen_again(&mut ring)?;
            self.follow(&mut ring)?;
            if self.ending && self.spare.is_some() {
                return Ok(());
            }
        }
    }

    fn completed(&mut self, ring: &mut Ring, completion: Completion) -> Result<()> {
        match completion.token {
            // The source closes the lane after its goodbye.
            TOKEN_CONTROL | TOKEN_RUN | TOKEN_AHEAD if self.ending => Ok(()),
            TOKEN_CONTROL | TOKEN_RUN | TOKEN_AHEAD | TOKEN_RETRY => {
                self.received(ring, completion)
            }
            TOKEN_MESSAGE => match completion.outcome {
                Outcome::Message { value, extra: MESSAGE_ASK } => {
                    let page = PageId::unpack(value);
                    self.ask.push((page.region, page.page));
                    Ok(())
                }
                Outcome::Message { value, .. } => self.cached(ring, PageId::unpack(value)),
                other => unreachable!("{other:?} as a message"),
            },
            // The loop takes commands after every completion.
            TOKEN_WAKE => Ok(()),
            TOKEN_SENT => self.sent(completion),
            token if RingMessages::owns(token) => self.messages.complete(ring, &completion),
            TOKEN_CALM => self.vigil.calm(ring),
            _ => {
                self.faults.as_mut().expect("only these tokens are left").complete(ring, completion)
            }
        }
    }

    /// Handles a completed receive of the lane.
    fn received(&mut self, ring: &mut Ring, completion: Completion) -> Result<()> {
        let mut link =
            self.link.take().expect("a lane is released once none of its operations is in flight");
        let mut wanted = std::mem::take(&mut self.wanted);
        let guest = self.guest.clone();
        let received = link.reader.complete(
            ring,
            completion,
            |page| wanted.push(page),
            |arrived| self.arrived(&guest, arrived),
        );
        // Arrived pages are shown even if the receive failed.
        let given = link.reader.take_given(|Given { page, arrived }| {
            self.faults.iter_mut().for_each(|faults| faults.given(page, arrived));
        });
        let count = given + wanted.len();
        self.link = Some(link);
        self.count_arrived(count as u64);
        wanted.drain(..).try_for_each(|page| self.cached(ring, page))?;
        self.wanted = wanted;
        if self.has_parted && received.as_ref().is_err_and(Error::ends_lanes) {
            return Ok(());
        }
        received.or_else(|error| self.lost(error))
    }

    /// Counts arrived pages. On a lane with a background, awaited pages count as demanded.
    fn count_arrived(&mut self, wanted: u64) {
        let arrived = std::mem::take(&mut self.pages_arrived);
        let demand = arrived.min(wanted);
        self.guest.count_demand(demand);
        Counters::add(&self.guest.counters.pages_background, arrived - demand);
    }

    /// Handles a failure of the lane. In a session that recovers the thread continues without the lane.
    fn lost(&mut self, error: Error) -> Result<()> {
        let (true, true, Some(link)) = (error.ends_lanes(), self.recovers, &mut self.link) else {
            return Err(error);
        };
        if !std::mem::replace(&mut link.is_lost, true) {
            // The source gets the reason now if no send is in flight; otherwise when it reconnects.
            if matches!(error, Error::OutOfMemory(_)) && self.spare.is_some() {
                lane::tell(&link.socket, link.reader.is_checked(), &error);
            }
            lane::sever(&link.socket);
            self.post.send(InboxMessage::Failed(error));
        }
        Ok(())
    }

    /// Releases a lost lane once none of its operations is in flight, so that it writes to no page any more, and
    /// reports that.
    fn let_go(&mut self, ring: &mut Ring) -> Result<()> {
        let is_quiet = |link: &mut Link| link.is_lost && link.reader.is_quiet();
        // A send is in flight.
        if self.spare.is_none() {
            return Ok(());
        }
        let Some(mut link) = self.link.take_if(is_quiet) else { return Ok(()) };
        let (mut wanted, guest) = (Vec::new(), self.guest.clone());
        link.reader.settle(|page| wanted.push(page), |arrived| self.arrived(&guest, arrived))?;
        self.count_arrived(wanted.len() as u64);
        wanted.into_iter().try_for_each(|page| self.cached(ring, page))?;
        self.post.send(InboxMessage::Quiet);
        Ok(())
    }

    fn resume(&mut self, ring: &mut Ring, resume: Resume) -> Result<()> {
        assert!(self.link.is_none(), "the previous lane has been released");
        let Resume { lane, landing, first, last } = resume;
        let receiver = Receiver::for_resumed_destination(&landing).checked(lane.is_checked());
        let mut reader = LaneReader::demand(&lane, receiver, self.guest.clone());
        reader.arm(ring)?;
        self.outbox.extend_from_slice(&last);
        let ranges = Box::new(umem_wire::resume::have_ranges(&landing));
        let account = Some(HaveFrames { first, ranges });
        let seal = Seal::new(lane.is_checked());
        self.hearing = Hearing::new();
        self.link = Some(Link { socket: lane.socket(), reader, seal, is_lost: false, account });
        Ok(())
    }

    /// Requests all awaited missing pages, also those requested before the lane was lost.
    fn ask_again(&mut self) {
        self.faults.as_mut().into_iter().for_each(Faults::forget_unasked);
        self.ask.clear();
        self.guest.each_unanswered(|region, page| self.ask.push((region, page)));
    }

    /// Reports an awaited page that is cached.
    fn cached(&mut self, ring: &mut Ring, page: PageId) -> Result<()> {
        match (&mut self.faults, &self.servers) {
            (Some(faults), _) => faults.cached(ring, page),
            (None, Some(servers)) => servers.tell(ring, &mut self.messages, &self.guest, page),
            (None, None) => unreachable!("no fault is read before a server exists"),
        }
    }

    fn arrived(&mut self, guest: &GuestMemory, arrived: Arrived) -> Result<()> {
        match arrived {
            Arrived::Run { range, last } => {
                self.acks.cached(range, guest.bytes(range));
                if self.has_background {
                    self.pages_arrived += range.pages;
                } else {
                    guest.count_demand(range.pages);
                }
                if last {
                    self.post.send(InboxMessage::AllCached);
                }
            }
            Arrived::Other(Event::Ping(number)) => self.ping = Some(number),
            Arrived::Other(Event::Remaining { runs, last }) => {
                guest.remains(&runs)?;
                if last {
                    self.hearing.take(&Event::Settled).map_err(violated)?;
                    let runs = Vec::new();
                    self.post.send(InboxMessage::Received(Event::Remaining { runs, last }));
                }
            }
            Arrived::Other(Event::Stopped { .. }) if guest.is_in_rounds() => {
                return Err(violated("the stop before what remains of its rounds is settled"));
            }
            Arrived::Other(Event::DeviceState(chunk)) => self.gather_state(&chunk)?,
            Arrived::Other(event) => {
                self.hearing.take(&event).map_err(violated)?;
                match event {
                    Event::Stopped { .. } => {
                        self.has_stopped = true;
                        self.may_ask |= self.requests_from == RequestsFrom::Stop;
                    }
                    Event::Complete(_) => self.has_parted = true,
                    Event::Load { .. } => {
                        let state = self.state.take().filter(|state| !state.is_empty());
                        let whole =
                            state.map(|state| InboxMessage::Received(Event::DeviceState(state)));
                        whole.into_iter().for_each(|note| self.post.send(note));
                    }
                    _ => {}
                }
                self.post.send(InboxMessage::Received(event));
            }
        }
        Ok(())
    }

    /// Gathers the chunks of the device state, which a source may cut as small as it likes.
    fn gather_state(&mut self, chunk: &[u8]) -> Result<()> {
        let state = self.state.as_mut().filter(|_| self.has_stopped);
        let state = state.ok_or_else(|| violated("device state where none belongs"))?;
        if (state.len() + chunk.len()) as u64 > STATE_BYTES_MAX {
            let what = format!("more than {STATE_BYTES_MAX} bytes of device state");
            return Err(violated(&what));
        }
        state.extend_from_slice(chunk);
        Counters::add(&self.guest.counters.state_bytes, chunk.len() as u64);
        Ok(())
    }

    fn take_commands(&mut self, ring: &mut Ring) -> Result<()> {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Send(bytes) if self.link.is_some() => {
                    self.outbox.extend_from_slice(&bytes);
                }
                Command::Ping(number) if self.link.is_some() => {
                    self.hearing.asks(number);
                    transmit::encode(&Frame::Ping(number), &mut self.outbox);
                }
                Command::Send(_) | Command::Ping(_) => {}
                Command::Resume(resume) => self.resume(ring, *resume)?,
                Command::Show(pages) => {
                    pages.into_iter().try_for_each(|page| self.cached(ring, page))?;
                }
                Command::RequestPages => self.may_ask = true,
                Command::Servers(servers) => self.servers = Some(servers),
                Command::End => self.ending = true,
            }
        }
        Ok(())
    }

    /// Moves to the core where vCPUs wait. Called after a request, so that the move delays no fault.
    fn follow(&mut self, ring: &mut Ring) -> Result<()> {
        if !std::mem::take(&mut self.has_asked) {
            return Ok(());
        }
        if let Some(thread) = self.faults.as_mut().and_then(Faults::take_thread)
            && self.follower.is_due()
            && let Some(core) = follow::core_of_thread(thread)
        {
            self.follower.saw(core);
        }
        self.vigil.fault(ring)
    }

    /// Sends all waiting frames in one send, requests first.
    fn send(&mut self, ring: &mut Ring) -> Result<()> {
        let Some(link) = self.link.as_mut().filter(|link| !link.is_lost) else {
            // The page states have the pages to request again.
            self.faults.as_mut().into_iter().for_each(Faults::forget_unasked);
            self.ask.clear();
            self.outbox.clear();
            self.ping = None;
            self.acks.clear();
            return Ok(());
        };
        let Some(mut buffer) = self.spare.take() else {
            return Ok(());
        };
        buffer.clear();
        let socket = Fd::from(link.socket.clone());
        if let Some(account) = &mut link.account {
            buffer.append(&mut account.first);
            match account.ranges.next() {
                Some(range) => transmit::have(&mut buffer, range, self.guest.have(range)),
                None => {
                    link.account = None;
                    self.ask_again();
                }
            }
        }
        let is_telling = self.link.as_ref().is_some_and(|link| link.account.is_some());
        if !is_telling {
            self.gather(&mut buffer);
        }
        if buffer.is_empty() {
            self.spare = Some(buffer);
            return Ok(());
        }
        self.link.iter_mut().for_each(|link| link.seal.frames(&mut buffer));
        ring.submit(Op::send(socket, buffer).wait_all(), TOKEN_SENT)
            .map_err(|rejected| Error::Ring(rejected.error))?;
        self.listen_again(ring)?;
        ring.enter(Wait::No)?;
        self.faults.as_mut().into_iter().for_each(Faults::asked);
        Ok(())
    }

    /// Reads faults again. Called after the requests are sent.
    fn listen_again(&mut self, ring: &mut Ring) -> Result<()> {
        self.faults.iter_mut().try_for_each(|faults| faults.listen_again(ring))
    }

    /// Gathers the waiting frames.
    fn gather(&mut self, buffer: &mut Vec<u8>) {
        if self.may_ask {
            let own = self.faults.as_mut().map_or(&[][..], Faults::take_unasked);
            for asked in [own, &self.ask] {
                self.has_asked |= !asked.is_empty();
                for batch in asked.chunks(REQUEST_ENTRIES_MAX) {
                    transmit::request(buffer, batch);
                }
            }
            self.ask.clear();
        }
        buffer.append(&mut self.outbox);
        if (!self.has_parted || self.ending)
            && let Some(number) = self.ping.take()
        {
            transmit::encode(&Frame::Pong(number), buffer);
        }
        if self.acks.is_due() {
            self.acks.encode(buffer);
        }
    }

    fn sent(&mut self, completion: Completion) -> Result<()> {
        let outcome = completion.outcome;
        self.spare = completion.memory.and_then(Memory::into_bytes).map(Bytes::into_vec);
        match outcome {
            Outcome::Done(_) => Ok(()),
            _ => self.lost(Error::Lost {
                side: "source",
                lane: "demand lane".into(),
                what: format!("sending: {outcome:?}"),
            }),
        }
    }
}

/// The error of a source that violates the protocol.
fn violated(what: &str) -> Error {
    Error::protocol(&error::lane_name(LaneRole::Demand, 0), what)
}
