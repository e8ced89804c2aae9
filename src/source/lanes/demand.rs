//! The demand lane at the source: requests in, pages out, on a ring of its own.
//!
//! The thread that reads a request answers it, without a queue or another thread in between.
//! Control frames share the lane, behind the answers.
//!
//! In a session without bulk lanes the background shares it too: a small batch at a time, and only
//! when there is nothing else to send, so that an answer waits for one batch at most.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;
use std::sync::mpsc::Receiver as Commands;
use std::time::Duration;

use umem_ring::{
    Bytes, Completion, Config, Fd, Memory, Op, Outcome, Ring, TOKEN_WAKE, Wait, Waker,
};
use umem_wire::{Event, Frame, PageRange, Receiver, RegionId, transmit};

use crate::error::{Error, Result};
use crate::memory::claims::Run;
use crate::memory::sequences::Detector;
use crate::runtime::follow::{self, AffinityFollower};
use crate::runtime::idle::{CpuLatencyHold, IdleCores};
use crate::runtime::inbox::Post;
use crate::runtime::worker::Started;
use crate::runtime::{panics, priority};
use crate::source::InboxMessage;
use crate::source::memory::{Holes, SourceMemory, Walk};
use crate::source::sending::seal::Sealer;
use crate::statistics::Counters;
use crate::transport::lane::{Hearing, Lane, SHARED_QUEUE_BYTES};

const TOKEN_SENT: u64 = 0;
const TOKEN_RECEIVED: u64 = 1;
/// Continue with background pages.
const TOKEN_GO_ON: u64 = 2;
const TOKEN_CALM: u64 = 3;

/// Requests are small; one receive takes a few of them.
const RECEIVE_BYTES: usize = 16 << 10;

/// Answers in one send: at most two pieces each, of the 1024 that a send takes.
const ANSWERS_MAX: usize = 64;

/// Queued pages at which no more requests are read: more than any guest has threads, and few enough
/// that a destination which requests everything and reads nothing costs less than a mebibyte.
const ANSWERS_QUEUED_MAX: usize = 16 << 10;

/// Bytes of the answers in a typical send.
const SPARE_BYTES: usize = 16 << 10;

/// Bytes of pages in a background batch, of which at most one is in flight: an answer waits for it,
/// 50 µs at 10 Gbit/s. A single larger page is a batch.
const BACKGROUND_BYTES: u64 = SHARED_QUEUE_BYTES as u64;

/// Runs in a background batch: two pieces each, of the 1024 that a send takes.
const BACKGROUND_RUNS: usize = 256;

/// Claims for one batch, each of [`BACKGROUND_BYTES`]: the most that is searched for pages that are
/// not zero while an answer may be waiting, 1 MiB, or 0.1 ms.
const BACKGROUND_CLAIMS: usize = 16;

/// A command of the control thread to the demand thread, followed by a wake.
pub(crate) enum Command {
    /// Send these bytes, whole frames.
    Send(Vec<u8>),
    /// Send the device state with its end, and report when it has been sent.
    State(Vec<u8>),
    /// Send a ping of this number, whose pong is expected.
    Ping(u64),
    /// Send these bytes, whole frames, and right behind them a ping of this number.
    SendAndPing(Vec<u8>, u64),
    /// There are no bulk lanes: send the background on this lane.
    Background,
    /// End after everything queued has been sent.
    End,
}

/// The parts of the demand thread.
pub(crate) struct DemandLane {
    pub(crate) lane: Lane,
    /// May have read frames already.
    pub(crate) receiver: Receiver,
    pub(crate) memory: Arc<SourceMemory>,
    pub(crate) core: Option<usize>,
    /// The user has named no core: follow the core on which requests arrive.
    pub(crate) follows: bool,
    /// Whether the background continues from the last demand.
    pub(crate) adapts: bool,
    pub(crate) idle_cores: IdleCores,
    pub(crate) commands: Commands<Command>,
    pub(crate) post: Post<InboxMessage>,
}

struct DemandThread {
    name: String,
    socket: Fd,
    receiver: Receiver,
    sealer: Sealer,
    memory: Arc<SourceMemory>,
    commands: Commands<Command>,
    post: Post<InboxMessage>,
    /// None if the background does not adapt to the demands.
    detector: Option<Detector>,
    follower: AffinityFollower,
    vigil: CpuLatencyHold,
    /// A request has come since the last look at its origin.
    has_answered: bool,
    /// Claimed pages to send.
    answers: Vec<PageRange>,
    /// The buffer for requests, while no receive is in flight: until the answers are being sent, or
    /// longer while too many answers are queued.
    held: Option<Bytes>,
    /// A buffer for the holes around an answer's page.
    holes: Holes,
    outbox: Vec<u8>,
    /// The last unanswered ping: only one of a flood is kept.
    ping: Option<u64>,
    /// Limits the events for the control thread.
    hearing: Hearing,
    /// The buffer for answers while none is in flight.
    spare: Vec<u8>,
    background: Option<Background>,
    /// The background has used up its bandwidth, until then.
    pausing: Option<Duration>,
    going_on: bool,
    sending: bool,
    /// The device state.
    leaving: Leaving,
    ending: bool,
}

/// The progress of the device state.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leaving {
    /// There is none, or it has been sent.
    No,
    Waits,
    Sending,
}

/// The background's walk through the memory.
struct Background {
    walk: Walk,
    /// Claimed and not sent yet.
    runs: Vec<Run>,
}

impl DemandLane {
    /// Serves until told to end, or until the lane breaks.
    pub(crate) fn run(self, started: Started<Waker>) -> Result<()> {
        let mut thread = DemandThread {
            name: self.lane.name.clone(),
            socket: Fd::from(self.lane.socket()),
            receiver: self.receiver,
            sealer: Sealer::new(self.lane.is_checked()),
            memory: self.memory,
            commands: self.commands,
            post: self.post,
            detector: self.adapts.then(Detector::default),
            follower: AffinityFollower::new(self.follows, self.core),
            vigil: CpuLatencyHold::new(self.idle_cores, TOKEN_CALM),
            has_answered: false,
            answers: Vec::with_capacity(ANSWERS_MAX),
            held: None,
            holes: Holes::default(),
            outbox: Vec::with_capacity(4096),
            ping: None,
            hearing: Hearing::new(),
            spare: Vec::with_capacity(SPARE_BYTES),
            background: None,
            pausing: None,
            going_on: false,
            sending: false,
            leaving: Leaving::No,
            ending: false,
        };
        thread.serve(self.core, &self.lane.socket(), started)
    }
}

impl DemandThread {
    fn serve(
        &mut self,
        core: Option<usize>,
        socket: &OwnedFd,
        started: Started<Waker>,
    ) -> Result<()> {
        let mut ring = Ring::new(&Config { name: self.name.clone(), core, ..Config::default() })?;
        priority::go_first();
        started.with(ring.waker()?);
        self.receive(&mut ring, Bytes::with_capacity(RECEIVE_BYTES))?;
        loop {
            ring.enter(Wait::One)?;
            panics::point(format_args!("demand"));
            while let Some(completion) = ring.next() {
                match completion.token {
                    TOKEN_WAKE => self.take_commands(),
                    TOKEN_SENT => self.sent(completion)?,
                    TOKEN_GO_ON => self.going_on = false,
                    TOKEN_CALM => self.vigil.calm(&mut ring)?,
                    _ => self.received(completion)?,
                }
            }
            // In this order: the kernel processes them in turn, and vCPUs wait for the answers.
            self.send(&mut ring)?;
            self.receive_more(&mut ring)?;
            self.follow(&mut ring, socket)?;
            if self.ending && !self.sending {
                return Ok(());
            }
        }
    }

    fn take_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Send(bytes) => self.outbox.extend_from_slice(&bytes),
                Command::State(bytes) => {
                    self.outbox.extend_from_slice(&bytes);
                    self.leaving = Leaving::Waits;
                }
                Command::Ping(number) => {
                    self.hearing.asks(number);
                    transmit::encode(&Frame::Ping(number), &mut self.outbox);
                }
                Command::SendAndPing(bytes, number) => {
                    self.outbox.extend_from_slice(&bytes);
                    self.hearing.asks(number);
                    transmit::encode(&Frame::Ping(number), &mut self.outbox);
                }
                Command::Background => {
                    let walk = Walk::new(&self.memory, 0, 1);
                    let runs = Vec::with_capacity(BACKGROUND_RUNS + 64);
                    self.background = Some(Background { walk, runs });
                }
                Command::End => self.ending = true,
            }
        }
    }

    /// The next request is seldom there already: the requester waits for the answer.
    fn receive(&self, ring: &mut Ring, buffer: Bytes) -> Result<()> {
        ring.submit(Op::recv(self.socket.clone(), buffer).poll_first(), TOKEN_RECEIVED)
            .map_err(|rejected| Error::Ring(rejected.error))?;
        Ok(())
    }

    /// Processes a receive; [`DemandThread::receive_more`] follows, behind the answers.
    fn received(&mut self, completion: Completion) -> Result<()> {
        let lost =
            |what: String| Error::Lost { side: "destination", lane: self.name.clone(), what };
        let (Outcome::Done(count), Some(Memory::Bytes(buffer))) =
            (completion.outcome, completion.memory)
        else {
            return Err(lost(crate::source::outcome_text(completion.outcome)));
        };
        if count == 0 {
            return Err(lost("the destination closed it".into()));
        }
        let result = self.receiver.control(&buffer.as_slice()[..count as usize]);
        while let Some(event) = self.receiver.poll_event() {
            match event {
                Event::Request(pages) => {
                    self.answer(&pages)?;
                    self.receiver.give_back(pages);
                }
                Event::Ack(range) => self.memory.acknowledged(range, &self.name)?,
                Event::Ping(number) => self.ping = Some(number),
                other => {
                    let taken = self.hearing.take(&other);
                    taken.map_err(|why| Error::protocol(&self.name, why))?;
                    self.post.send(InboxMessage::Received(other));
                }
            }
        }
        result.map_err(|error| self.memory.received(&self.name, &error))?;
        self.held = Some(buffer);
        Ok(())
    }

    /// Receives more, unless the peer does not read the answers.
    fn receive_more(&mut self, ring: &mut Ring) -> Result<()> {
        let may_read = self.answers.len() < ANSWERS_QUEUED_MAX;
        match self.held.take_if(|_| may_read) {
            Some(buffer) => self.receive(ring, buffer),
            None => Ok(()),
        }
    }

    fn answer(&mut self, pages: &[(RegionId, u64)]) -> Result<()> {
        if !self.memory.stopped.load(Acquire) {
            return Err(Error::protocol(&self.name, "a request before the guest had stopped"));
        }
        self.has_answered = true;
        for &(region, page) in pages {
            if self.memory.claim_demanded(region, page) {
                self.answers.push(PageRange { region, first: page, pages: 1 });
            }
        }
        let (Some(detector), Some(&(region, page))) = (&mut self.detector, pages.last()) else {
            return Ok(());
        };
        self.memory.pivot.set(region, page);
        let unit = |region| self.memory.region(region).unit().bytes();
        for &(region, page) in pages {
            detector.demand(region, page, unit(region));
        }
        detector.show(&self.memory.sequences, unit);
        Ok(())
    }

    /// Sends all that is queued in one send, answers first; with nothing queued, the next
    /// background batch.
    fn send(&mut self, ring: &mut Ring) -> Result<()> {
        if self.sending {
            return Ok(());
        }
        let op = match self.urgent()? {
            Some(op) => op,
            None => {
                let pieces = if self.ending { Vec::new() } else { self.batch()? };
                if pieces.is_empty() {
                    return self.go_on(ring);
                }
                Op::send_vectored(self.socket.clone(), pieces)
            }
        };
        ring.submit(op, TOKEN_SENT).map_err(|rejected| Error::Ring(rejected.error))?;
        self.sending = true;
        Ok(())
    }

    /// Moves to the core on which requests arrive, after they have been answered.
    fn follow(&mut self, ring: &mut Ring, socket: &OwnedFd) -> Result<()> {
        if !std::mem::take(&mut self.has_answered) {
            return Ok(());
        }
        if self.follower.is_due()
            && let Some(core) = follow::core_of_socket(socket.as_fd())
        {
            self.follower.saw(core);
        }
        self.vigil.fault(ring)
    }

    /// More of the background may follow pages that have been sent already, or it has to wait:
    /// makes the thread come back after all other work.
    fn go_on(&mut self, ring: &mut Ring) -> Result<()> {
        if self.background.is_some() && !self.going_on && !self.ending {
            let op = self.pausing.take().map_or(Op::Nop, Op::timeout);
            ring.submit(op, TOKEN_GO_ON).map_err(|rejected| Error::Ring(rejected.error))?;
            self.going_on = true;
        }
        Ok(())
    }

    /// Queued answers, and control frames behind them.
    fn urgent(&mut self) -> Result<Option<Op>> {
        let count = self.answers.len().min(ANSWERS_MAX);
        let mut bytes = std::mem::take(&mut self.spare);
        bytes.clear();
        let mut pieces = Vec::new();
        for page in self.answers.drain(..count) {
            let (run, contents) =
                self.memory.answer(page, &mut bytes, &mut self.holes, &mut self.sealer)?;
            if let Some(contents) = contents {
                pieces.push(Memory::from(std::mem::take(&mut bytes)));
                pieces.push(contents);
            }
            self.memory.count(&run, true);
            Counters::add(&self.memory.counters.pages_demand, run.range.pages);
        }
        if let Some(number) = self.ping.take() {
            transmit::encode(&Frame::Pong(number), &mut self.outbox);
        }
        self.sealer.frames(&mut self.outbox);
        bytes.append(&mut self.outbox);
        if self.leaving == Leaving::Waits {
            self.leaving = Leaving::Sending;
        }
        if pieces.is_empty() && bytes.is_empty() {
            self.spare = bytes;
            return Ok(None);
        }
        if pieces.is_empty() {
            return Ok(Some(Op::send(self.socket.clone(), bytes).wait_all()));
        }
        if !bytes.is_empty() {
            pieces.push(Memory::from(bytes));
        }
        Ok(Some(Op::send_vectored(self.socket.clone(), pieces)))
    }

    /// The next background batch, if this lane sends it; reports the end to the control thread.
    fn batch(&mut self) -> Result<Vec<Memory>> {
        let mut pieces = Vec::new();
        let Some(Background { walk, runs }) = &mut self.background else {
            return Ok(pieces);
        };
        self.pausing = self.memory.bandwidth.wait();
        if self.pausing.is_some() {
            return Ok(pieces);
        }
        let (memory, mut bytes, mut left) = (&self.memory, 0, true);
        for _ in 0..BACKGROUND_CLAIMS {
            if !left || bytes >= BACKGROUND_BYTES || runs.len() >= BACKGROUND_RUNS {
                break;
            }
            left = walk.next_runs(memory, BACKGROUND_BYTES, runs)?;
            bytes = runs.iter().map(|run| memory.data_bytes(run)).sum();
        }
        let counters = &memory.counters;
        for run in &*runs {
            let (header, pages) = memory.pieces(run, &mut self.sealer)?;
            pieces.push(Memory::from(header.to_vec()));
            pieces.extend(pages);
        }
        memory.check_runs(runs)?;
        for run in runs.drain(..) {
            memory.count(&run, false);
            Counters::add(&counters.pages_background, run.range.pages);
        }
        Counters::add(&counters.copied_bytes, bytes);
        memory.bandwidth.sent(bytes);
        if pieces.is_empty() && !left {
            self.background = None;
            self.post.send(InboxMessage::BulkEnded);
        }
        Ok(pieces)
    }

    fn sent(&mut self, completion: Completion) -> Result<()> {
        let Outcome::Done(_) = completion.outcome else {
            self.memory.check_files(false)?;
            return Err(Error::Lost {
                side: "destination",
                lane: self.name.clone(),
                what: format!("sending: {}", crate::source::outcome_text(completion.outcome)),
            });
        };
        self.sending = false;
        if self.leaving == Leaving::Sending {
            self.leaving = Leaving::No;
            self.post.send(InboxMessage::StateLeft);
        }
        if let Some(bytes) = completion.memory.and_then(Memory::into_bytes) {
            self.spare = bytes.into_vec();
        }
        Ok(())
    }
}
