//! Serves userfaultfds: reads the guest's faults, requests missing pages, and makes arrived pages visible to waiting
//! vCPUs.
//!
//! One userfaultfd takes a few hundred thousand faults a second with any reader, so a guest with many vCPUs is
//! handed over in shards with a userfaultfd each. The demand thread serves the faults of a guest without shards, which
//! saves a hop between threads. Shards are served by threads of their own, each with a ring on its own core; these send
//! the demand thread the pages to request.

use std::sync::Arc;
use std::time::{Duration, Instant};

use umem_ring::{Completion, Config, Mailbox, Op, Outcome, Ring, TOKEN_MESSAGE, TOKEN_WAKE, Wait};
use umem_wire::RegionId;

use super::latency::{Latencies, Waiting};
use super::messages::RingMessages;
use crate::destination::memory::{GuestMemory, PageId, RETRY_INTERVAL, SHORTAGE_INTERVAL};
use crate::error::{Error, Result};
use crate::fault::uffd::{self, MESSAGE_BYTES};
use crate::memory::pages::Fault;
use crate::memory::words::EVENTS_BYTES;
use crate::runtime::worker::{Started, ThreadHandle};
use crate::runtime::{panics, priority};
use crate::statistics::faults::FaultCounts;

/// Events taken with one read of a userfaultfd.
const EVENTS_MAX: usize = 64;

/// Meaning of a message from another ring about its page.
pub(crate) const MESSAGE_CACHED: u32 = 0;
/// To the demand thread: a vCPU waits for this page.
pub(crate) const MESSAGE_ASK: u32 = 1;

/// A page to make visible once pending events have been read.
enum Again {
    /// The page has arrived, and a vCPU waited for it.
    Came(PageId),
    /// A vCPU waits at this address although the page has arrived.
    At(u64),
}

/// Some of the guest's userfaultfds, served by the owning thread.
pub(crate) struct Faults {
    guest: Arc<GuestMemory>,
    /// Indices of the guest's fault sources.
    sources: Vec<usize>,
    /// The read or poll of source `i` of these has this token plus `i`.
    token: u64,
    /// The token of the retry timer.
    retry_token: u64,
    retry_armed: bool,
    /// Pages to request from the source.
    ask: Vec<(RegionId, u64)>,
    /// Pages whose request is being sent.
    asking: Vec<(RegionId, u64)>,
    /// Of `sources`: those whose events have been read, to be armed again.
    idle: Vec<usize>,
    waiting: Waiting,
    again: Vec<Again>,
    /// The thread of the last fault; 0 if unknown or already taken.
    last_thread: u32,
    /// The same for observers.
    counts: Arc<FaultCounts>,
    /// The read buffer.
    buffer: Vec<u8>,
}

impl Faults {
    /// Takes `token`, `retry_token` and one more token for each further source.
    pub(crate) fn new(
        guest: Arc<GuestMemory>,
        sources: Vec<usize>,
        token: u64,
        retry_token: u64,
    ) -> Faults {
        let counts = guest.counters.faults.join();
        let idle = Vec::with_capacity(sources.len());
        Faults {
            guest,
            sources,
            token,
            retry_token,
            retry_armed: false,
            ask: Vec::with_capacity(1024),
            asking: Vec::with_capacity(1024),
            idle,
            waiting: Waiting::new(),
            again: Vec::new(),
            last_thread: 0,
            counts,
            buffer: vec![0; EVENTS_BYTES.max(EVENTS_MAX * MESSAGE_BYTES)],
        }
    }

    /// Arms every source.
    pub(crate) fn arm(&self, ring: &mut Ring) -> Result<()> {
        (0..self.sources.len()).try_for_each(|index| self.listen(ring, index))
    }

    /// Polls for events. A ring could read them too, but not with the gate closed, as required.
    fn listen(&self, ring: &mut Ring, index: usize) -> Result<()> {
        let descriptor = self.guest.sources[self.sources[index]].uffd.descriptor();
        ring.submit(Op::poll(descriptor, libc::POLLIN as u32), self.token + index as u64)
            .map_err(|rejected| Error::Ring(rejected.error))?;
        Ok(())
    }

    /// Arms sources whose events have been read. Called after each turn of completions, when the requests are in the
    /// queue: a vCPU waits for those, and the kernel processes submissions in order.
    pub(crate) fn listen_again(&mut self, ring: &mut Ring) -> Result<()> {
        while let Some(index) = self.idle.pop() {
            self.listen(ring, index)?;
        }
        Ok(())
    }

    /// Handles a completion with one of the tokens given at the start. [`Faults::listen_again`] follows.
    pub(crate) fn complete(&mut self, ring: &mut Ring, completion: Completion) -> Result<()> {
        if completion.token == self.retry_token {
            self.retry_armed = false;
            return self.retry(ring);
        }
        let index = usize::try_from(completion.token - self.token).expect("our own token");
        match completion.outcome {
            Outcome::Done(_) => {}
            Outcome::Failed(errno) if matches!(errno.raw(), libc::ENOMEM | libc::EAGAIN) => {
                self.idle.push(index);
                return Ok(());
            }
            // The guest's process has ended; the control thread learns that from the process.
            _ => return Ok(()),
        }
        self.read(ring, self.sources[index])?;
        self.idle.push(index);
        self.retry(ring)
    }

    /// Reads pending events with the gate closed, and applies them before the gate opens.
    fn read(&mut self, ring: &mut Ring, source: usize) -> Result<()> {
        let guest = self.guest.clone();
        let _gate = guest.sources[source].close_gate();
        if let Some(events) = &guest.sources[source].events {
            return match guest.sources[source].uffd.read_into(&events.span()) {
                Ok(count) => self.shared_events(ring, source, count),
                // As above.
                Err(_) => Ok(()),
            };
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = match guest.sources[source].uffd.read(&mut buffer) {
            Ok(count) => self.events(ring, &buffer[..count]),
            // As above.
            Err(_) => Ok(()),
        };
        self.buffer = buffer;
        result
    }

    /// Applies events from the shared buffer, where a takeover would find them until they are applied.
    fn shared_events(&mut self, ring: &mut Ring, source: usize, count: usize) -> Result<()> {
        let guest = self.guest.clone();
        let Some(events) = &guest.sources[source].events else { return Ok(()) };
        let mut buffer = std::mem::take(&mut self.buffer);
        let count = count.min(buffer.len());
        events.copy(&mut buffer[..count]);
        let result = self.events(ring, &buffer[..count]);
        if result.is_ok() {
            events.clear(count);
        }
        self.buffer = buffer;
        result
    }

    fn events(&mut self, ring: &mut Ring, bytes: &[u8]) -> Result<()> {
        let now = Instant::now();
        let (events, _) = bytes.as_chunks::<MESSAGE_BYTES>();
        for event in events {
            match uffd::Event::decode(event) {
                uffd::Event::PageFault { address, thread } => {
                    self.last_thread = thread;
                    self.fault(ring, address, now)?;
                }
                uffd::Event::Remove { start, end } => self.guest.discard(start, end)?,
                uffd::Event::Unmap { start, end } => self.guest.unmapped(start, end)?,
                uffd::Event::Fork => return Err(changed("has forked")),
                uffd::Event::Remap => return Err(changed("has moved its memory")),
                uffd::Event::Other { .. } => {}
            }
        }
        Ok(())
    }

    fn fault(&mut self, ring: &mut Ring, address: u64, now: Instant) -> Result<()> {
        let Some(page) = self.guest.find(address) else {
            return Ok(());
        };
        let guest = self.guest.clone();
        let pages = &guest.region(page.region).pages;
        match pages.fault(page.page) {
            Fault::Show => return self.show(ring, Again::At(address)),
            Fault::WakeAll => return self.cached(ring, page),
            Fault::Ask => self.ask.push((page.region, page.page)),
            Fault::Wait => {}
        }
        self.waiting.read(page, now);
        self.counts.waiting(self.waiting.len());
        Ok(())
    }

    /// A page that a vCPU waits for is here.
    pub(crate) fn cached(&mut self, ring: &mut Ring, page: PageId) -> Result<()> {
        self.waiting.arrived(page, Instant::now());
        self.guest.region(page.region).pages.unwant(page.page);
        self.show(ring, Again::Came(page))
    }

    /// As above for a page that is already visible, and arrived at `at`.
    pub(crate) fn given(&mut self, page: PageId, arrived: Instant) {
        self.waiting.arrived(page, arrived);
        self.guest.region(page.region).pages.unwant(page.page);
        self.mark_continued(page);
    }

    fn show(&mut self, ring: &mut Ring, what: Again) -> Result<()> {
        let (shown, page) = match what {
            Again::Came(page) => (self.guest.mark(page), Some(page)),
            Again::At(address) => (self.guest.show_at(address), self.guest.find(address)),
        };
        let interval = match shown {
            Ok(true) => None,
            Ok(false) => Some(RETRY_INTERVAL),
            Err(Error::OutOfMemory(why)) => {
                self.guest.cannot_show(&why);
                Some(SHORTAGE_INTERVAL)
            }
            Err(error) => return Err(error),
        };
        if let Some(interval) = interval {
            self.again.push(what);
            return self.arm_retry(ring, interval);
        }
        page.into_iter().for_each(|page| self.mark_continued(page));
        Ok(())
    }

    /// The page has no waiting vCPU any more.
    fn mark_continued(&mut self, page: PageId) {
        if let Some(latency) = self.waiting.continued(page) {
            self.counts.served(latency);
            self.counts.waiting(self.waiting.len());
        }
    }

    fn retry(&mut self, ring: &mut Ring) -> Result<()> {
        std::mem::take(&mut self.again).into_iter().try_for_each(|what| self.show(ring, what))
    }

    fn arm_retry(&mut self, ring: &mut Ring, interval: Duration) -> Result<()> {
        if !self.retry_armed {
            self.retry_armed = true;
            ring.submit(Op::timeout(interval), self.retry_token)
                .map_err(|rejected| Error::Ring(rejected.error))?;
        }
        Ok(())
    }

    /// The thread of the last fault since the last call, if its userfaultfd reports threads.
    pub(crate) fn take_thread(&mut self) -> Option<u32> {
        let thread = std::mem::take(&mut self.last_thread);
        (thread != 0).then_some(thread)
    }

    /// Requests cannot be sent; page states remember the wanted pages.
    pub(crate) fn forget_unasked(&mut self) {
        self.ask.clear();
    }

    /// The pages to request since the last call, whose request is sent now. [`Faults::asked`] follows.
    pub(crate) fn take_unasked(&mut self) -> &[(RegionId, u64)] {
        self.asking.append(&mut self.ask);
        &self.asking
    }

    /// The requests have been sent.
    pub(crate) fn asked(&mut self) {
        self.waiting.asked(&self.asking);
        self.asking.clear();
    }

    /// Latencies of the faults, from the read of a fault to its end.
    pub(crate) fn into_latencies(self) -> Latencies {
        self.waiting.into_latencies()
    }
}

fn changed(what: &str) -> Error {
    Error::Unsupported(format!(
        "the guest's process {what} while its pages were coming, which umem cannot follow: pages \
         would be lost"
    ))
}

const TOKEN_RETRY: u64 = 0;
const TOKEN_FAULTS: u64 = 1;

/// A thread that serves shards.
pub(crate) struct FaultThread {
    pub(crate) guest: Arc<GuestMemory>,
    pub(crate) sources: Vec<usize>,
    pub(crate) core: Option<usize>,
    /// The demand thread's ring, which sends the requests.
    pub(crate) demand: Mailbox,
}

impl FaultThread {
    /// Serves until it is woken to stop. Returns the latencies.
    pub(crate) fn run(self, started: Started<ThreadHandle>) -> Result<Latencies> {
        let mut ring = Ring::new(&Config {
            name: "faults".into(),
            core: self.core,
            ops_max: 64 + self.sources.len() as u32,
            ..Config::default()
        })?;
        priority::go_first();
        started.with(ThreadHandle { waker: ring.waker()?, mailbox: ring.mailbox() });
        let mut faults = Faults::new(self.guest, self.sources, TOKEN_FAULTS, TOKEN_RETRY);
        let mut messages = RingMessages::new();
        faults.arm(&mut ring)?;
        loop {
            ring.enter(Wait::One)?;
            panics::point(format_args!("faults"));
            while let Some(completion) = ring.next() {
                match completion.token {
                    TOKEN_WAKE => return Ok(faults.into_latencies()),
                    token if RingMessages::owns(token) => {
                        messages.complete(&mut ring, &completion)?;
                    }
                    TOKEN_MESSAGE => match completion.outcome {
                        Outcome::Message { value, .. } => {
                            faults.cached(&mut ring, PageId::unpack(value))?;
                        }
                        other => unreachable!("{other:?} as a message"),
                    },
                    _ => faults.complete(&mut ring, completion)?,
                }
            }
            for &(region, page) in faults.take_unasked() {
                let value = PageId { region, page }.pack();
                messages.send(&mut ring, &self.demand, value, MESSAGE_ASK)?;
            }
            faults.asked();
            faults.listen_again(&mut ring)?;
        }
    }
}

/// For each fault source, the ring that must learn of an arrived page.
#[derive(Clone)]
pub(crate) struct Servers(Arc<[Mailbox]>);

impl Servers {
    /// One mailbox for each of the guest's fault sources.
    pub(crate) fn new(mailboxes: Vec<Mailbox>) -> Servers {
        Servers(mailboxes.into())
    }

    /// Reports an arrived page that a vCPU waits for.
    pub(crate) fn tell(
        &self,
        ring: &mut Ring,
        messages: &mut RingMessages,
        guest: &GuestMemory,
        page: PageId,
    ) -> Result<()> {
        let region = guest.region(page.region);
        let part = region.part_at(region.byte_offset(page.page));
        messages.send(ring, &self.0[part.source], page.pack(), MESSAGE_CACHED)
    }
}
