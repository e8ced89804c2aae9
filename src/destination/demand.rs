//! The demand lane at the destination: faults in, requests out, answers into the guest's pages.
//!
//! One thread, one ring. It reads the userfaultfds, asks for each missing page once, lands the
//! answers, and is the only one that marks single pages cached; bulk lanes tell it by message which
//! of their pages somebody waits for. Control frames share the lane and go to the control thread.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::Receiver as Commands;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use umem_ring::{
    Bytes, Completion, Config, Fd, Mailbox, Memory, Op, Outcome, Ring, TOKEN_MESSAGE, TOKEN_WAKE,
    Wait, Waker,
};
use umem_wire::limits::REQUEST_ENTRIES_MAX;
use umem_wire::{Event, Receiver, RegionId, transmit};

use super::Note;
use super::guest::{GuestMemory, PageId};
use super::reader::{Arrived, LaneReader, TOKEN_CONTROL, TOKEN_FREE, TOKEN_RUN};
use crate::error::{Error, Result};
use crate::fault::uffd::{self, MESSAGE_BYTES};
use crate::inbox::Post;
use crate::lane::Lane;
use crate::memory::pages::PageState;
use crate::priority;
use crate::report::{Counters, latency_histogram, record};
use crate::worker::Started;

const TOKEN_SENT: u64 = TOKEN_FREE;
const TOKEN_RETRY: u64 = TOKEN_FREE + 1;
/// The read of region i's userfaultfd has this token plus i.
const TOKEN_FAULTS: u64 = TOKEN_FREE + 2;

/// Events taken with one read of a userfaultfd.
const EVENTS_MAX: usize = 64;

/// A page that could not be marked because events were pending is tried again after the next
/// events, or after this long.
const RETRY_INTERVAL: Duration = Duration::from_micros(200);

/// What the control thread tells the demand thread, followed by a wake.
pub(crate) enum Command {
    /// Send these bytes, whole frames.
    Send(Vec<u8>),
    /// The guest is complete or lost: end, once what was to be sent has been.
    End,
}

/// What the demand thread needs.
pub(crate) struct DemandLane {
    pub(crate) lane: Lane,
    /// Has read the regions already.
    pub(crate) receiver: Receiver,
    pub(crate) guest: Arc<GuestMemory>,
    pub(crate) core: Option<usize>,
    pub(crate) commands: Commands<Command>,
    pub(crate) post: Post<Note>,
}

/// How the others reach the demand thread.
pub(crate) struct Reach {
    pub(crate) waker: Waker,
    pub(crate) mailbox: Mailbox,
}

struct DemandThread {
    guest: Arc<GuestMemory>,
    socket: Fd,
    commands: Commands<Command>,
    post: Post<Note>,
    /// The source's guest has stopped: before that its pages may still change.
    may_ask: bool,
    /// Pages to ask for with the next send.
    ask: Vec<(RegionId, u64)>,
    /// Whole frames to send.
    outbox: Vec<u8>,
    /// The buffer that is not in flight.
    spare: Option<Vec<u8>>,
    /// When each page that somebody waits for was first missed.
    waiting: HashMap<PageId, Instant>,
    /// Pages to mark again once pending events have been read.
    again: Vec<PageId>,
    retry_armed: bool,
    latency: Histogram<u64>,
    ending: bool,
}

impl DemandLane {
    /// Serves until told to end. Returns the fault latencies, µs.
    pub(crate) fn run(self, started: Started<Reach>) -> Result<Histogram<u64>> {
        let mut thread = DemandThread {
            guest: self.guest.clone(),
            socket: Fd::from(self.lane.socket()),
            commands: self.commands,
            post: self.post,
            may_ask: false,
            ask: Vec::with_capacity(REQUEST_ENTRIES_MAX),
            outbox: Vec::with_capacity(4096),
            spare: Some(Vec::with_capacity(4096)),
            waiting: HashMap::with_capacity(1024),
            again: Vec::new(),
            retry_armed: false,
            latency: latency_histogram(),
            ending: false,
        };
        let reader = LaneReader::demand(&self.lane, self.receiver, self.guest);
        thread.serve(&self.lane.name, self.core, reader, started)?;
        Ok(thread.latency)
    }
}

impl DemandThread {
    fn serve(
        &mut self,
        name: &str,
        core: Option<usize>,
        mut reader: LaneReader,
        started: Started<Reach>,
    ) -> Result<()> {
        let mut ring = Ring::new(&Config {
            name: name.to_owned(),
            core,
            ops_max: 64 + self.guest.regions.len() as u32,
            ..Config::default()
        })?;
        priority::go_first();
        started.with(Reach { waker: ring.waker()?, mailbox: ring.mailbox() });
        reader.arm(&mut ring)?;
        for region in 0..self.guest.regions.len() {
            let buffer = Bytes::with_capacity(EVENTS_MAX * MESSAGE_BYTES);
            self.read_faults(&mut ring, region, buffer)?;
        }
        loop {
            ring.enter(Wait::One)?;
            while let Some(completion) = ring.next() {
                self.completed(&mut ring, &mut reader, completion)?;
            }
            self.send(&mut ring)?;
            if self.ending && self.spare.is_some() {
                return Ok(());
            }
        }
    }

    fn completed(
        &mut self,
        ring: &mut Ring,
        reader: &mut LaneReader,
        completion: Completion,
    ) -> Result<()> {
        match completion.token {
            // After its goodbye the source closes the lane.
            TOKEN_CONTROL | TOKEN_RUN if self.ending => Ok(()),
            TOKEN_CONTROL | TOKEN_RUN => {
                let mut wanted = Vec::new();
                let guest = self.guest.clone();
                reader.complete(
                    ring,
                    completion,
                    |page| wanted.push(page),
                    |arrived| self.arrived(&guest, arrived),
                )?;
                wanted.into_iter().try_for_each(|page| self.cached(ring, page))
            }
            TOKEN_MESSAGE => match completion.outcome {
                Outcome::Message { value, .. } => self.cached(ring, PageId::unpack(value)),
                other => unreachable!("{other:?} as a message"),
            },
            TOKEN_WAKE => {
                self.take_commands();
                Ok(())
            }
            TOKEN_SENT => self.sent(completion),
            TOKEN_RETRY => {
                self.retry_armed = false;
                self.mark_again(ring)
            }
            token => {
                let region = usize::try_from(token - TOKEN_FAULTS).expect("our own token");
                self.faults(ring, region, completion)
            }
        }
    }

    fn arrived(&mut self, guest: &GuestMemory, arrived: Arrived) -> Result<()> {
        match arrived {
            Arrived::Run { range, last } => {
                Counters::add(&guest.counters.pages_demand, range.pages);
                if last {
                    self.post.send(Note::AllCached);
                }
            }
            Arrived::Other(event) => {
                match event {
                    Event::Stopped { .. } => self.may_ask = true,
                    Event::Complete(_) => self.ending = true,
                    _ => {}
                }
                self.post.send(Note::Received(event));
            }
        }
        Ok(())
    }

    fn take_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Send(bytes) => self.outbox.extend_from_slice(&bytes),
                Command::End => self.ending = true,
            }
        }
    }

    fn read_faults(&mut self, ring: &mut Ring, region: usize, buffer: Bytes) -> Result<()> {
        let descriptor = self.guest.regions[region].uffd.descriptor();
        ring.submit(Op::read(descriptor, buffer), TOKEN_FAULTS + region as u64)
            .map_err(|rejected| Error::Ring(rejected.error))?;
        Ok(())
    }

    fn faults(&mut self, ring: &mut Ring, region: usize, completion: Completion) -> Result<()> {
        let buffer = match completion.memory {
            Some(Memory::Bytes(buffer)) => buffer,
            other => unreachable!("a read gives its buffer back, not {other:?}"),
        };
        let bytes = match completion.outcome {
            Outcome::Done(bytes) => bytes as usize,
            Outcome::Failed(errno) if errno.raw() == libc::EAGAIN => 0,
            // The guest's process has ended; the control thread hears of it from the process.
            _ => return Ok(()),
        };
        let now = Instant::now();
        let (events, _) = buffer.as_slice()[..bytes].as_chunks::<MESSAGE_BYTES>();
        for event in events {
            match uffd::Event::decode(event) {
                uffd::Event::PageFault { address } => self.fault(ring, address, now)?,
                uffd::Event::Remove { start, end } => self.guest.discard(start, end),
                uffd::Event::Other { .. } => {}
            }
        }
        self.read_faults(ring, region, buffer)?;
        self.mark_again(ring)
    }

    fn fault(&mut self, ring: &mut Ring, address: u64, now: Instant) -> Result<()> {
        let Some(page) = self.guest.find(address) else {
            return Ok(());
        };
        let guest = self.guest.clone();
        let pages = &guest.region(page.region).pages;
        let first = pages.want(page.page);
        match pages.get(page.page) {
            PageState::Cached => return self.cached(ring, page),
            PageState::Missing | PageState::Discarded if first => {
                self.ask.push((page.region, page.page));
            }
            // On its way already, or asked for already: whoever lands it sees that it is wanted.
            PageState::Missing | PageState::Discarded | PageState::Landing => {}
        }
        self.waiting.entry(page).or_insert(now);
        Ok(())
    }

    /// A page that somebody waits for is there.
    fn cached(&mut self, ring: &mut Ring, page: PageId) -> Result<()> {
        self.guest.region(page.region).pages.unwant(page.page);
        if !self.guest.mark(page)? {
            self.again.push(page);
            return self.arm_retry(ring);
        }
        if let Some(since) = self.waiting.remove(&page) {
            record(&mut self.latency, since.elapsed());
        }
        Ok(())
    }

    fn mark_again(&mut self, ring: &mut Ring) -> Result<()> {
        std::mem::take(&mut self.again).into_iter().try_for_each(|page| self.cached(ring, page))
    }

    fn arm_retry(&mut self, ring: &mut Ring) -> Result<()> {
        if !self.retry_armed {
            self.retry_armed = true;
            ring.submit(Op::timeout(RETRY_INTERVAL), TOKEN_RETRY)
                .map_err(|rejected| Error::Ring(rejected.error))?;
        }
        Ok(())
    }

    /// Sends what there is, requests first, all in one.
    fn send(&mut self, ring: &mut Ring) -> Result<()> {
        let Some(mut buffer) = self.spare.take() else {
            return Ok(());
        };
        buffer.clear();
        if self.may_ask {
            for batch in self.ask.chunks(REQUEST_ENTRIES_MAX) {
                transmit::request(&mut buffer, batch);
            }
            self.ask.clear();
        }
        buffer.append(&mut self.outbox);
        if buffer.is_empty() {
            self.spare = Some(buffer);
            return Ok(());
        }
        ring.submit(Op::send(self.socket.clone(), buffer).wait_all(), TOKEN_SENT)
            .map_err(|rejected| Error::Ring(rejected.error))?;
        ring.enter(Wait::No)?;
        Ok(())
    }

    fn sent(&mut self, completion: Completion) -> Result<()> {
        let Outcome::Done(_) = completion.outcome else {
            return Err(Error::Lost {
                side: "source",
                lane: "demand lane".into(),
                what: format!("sending: {:?}", completion.outcome),
            });
        };
        self.spare = completion.memory.and_then(Memory::into_bytes).map(Bytes::into_vec);
        Ok(())
    }
}
