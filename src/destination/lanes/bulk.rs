//! A bulk lane at the destination: pages without a demand, on a ring and a core of their own.

use std::sync::Arc;
use std::time::Duration;

use umem_ring::{Config, Fd, Op, Ring, TOKEN_WAKE, Wait, Waker};
use umem_wire::{Event, RegionTable, Seal};

use super::acks::Acks;
use super::window::Window;
use crate::destination::InboxMessage;
use crate::destination::faults::messages::RingMessages;
use crate::destination::faults::serving::Servers;
use crate::destination::landing::{Arrived, LaneReader, TOKEN_FREE};
use crate::destination::memory::{GuestMemory, PageId};
use crate::error::{Error, Result};
use crate::runtime::cores::Place;
use crate::runtime::inbox::Post;
use crate::runtime::panics;
use crate::runtime::priority::{self, YieldPolicy};
use crate::runtime::worker::Started;
use crate::statistics::Counters;
use crate::transport::lane::{self, Lane};
use crate::transport::tls::Channel;

/// How long the peer may take to close a TLS lane that has ended.
const LINGER: Duration = Duration::from_secs(10);

const TOKEN_ACKED: u64 = TOKEN_FREE;

/// The parts of a bulk thread.
pub(crate) struct BulkLane {
    pub(crate) lane: Lane,
    pub(crate) regions: RegionTable,
    pub(crate) acks: Acks,
    pub(crate) guest: Arc<GuestMemory>,
    pub(crate) core: Place,
    /// Wakes vCPUs.
    pub(crate) servers: Servers,
    /// Bytes that a previous thread of the lane has read beyond the lane's end.
    pub(crate) ahead: Option<Channel>,
    pub(crate) post: Post<InboxMessage>,
}

impl BulkLane {
    /// Receives until the lane ends, is lost, or the thread is woken to stop. After a loss no operation is left that
    /// could write to a page, and every waiting vCPU of a received page has been reported. Runs on the calling thread.
    pub(crate) fn run(self, started: Started<Waker>) -> Result<()> {
        let (post, socket) = (self.post.clone(), self.lane.socket());
        let ahead = self.pass(started)?;
        post.send(InboxMessage::BulkEnded);
        if let Some(mut channel) = ahead {
            channel.part(&socket);
            channel.linger(&socket, LINGER);
        }
        Ok(())
    }

    /// As `run`; returns the bytes that were read beyond the lane's end.
    pub(crate) fn pass(mut self, started: Started<Waker>) -> Result<Option<Channel>> {
        let mut ring = Ring::new(&Config {
            name: self.lane.name.clone(),
            core: self.core.enter(),
            ..Config::default()
        })?;
        priority::go_early();
        started.with(ring.waker()?);
        let mut window = Window::new(&self.lane);
        let ahead = self.ahead.take();
        let mut reader = LaneReader::bulk(&self.lane, &self.regions, self.guest.clone(), ahead);
        let mut wanted = Vec::new();
        let mut ended = false;
        let arrived = |arrived| self.arrived(arrived, &mut ended);
        reader.begin(&mut ring, |page| wanted.push(page), arrived)?;
        let mut lost = None;
        let mut acking = false;
        let mut seal = Seal::new(self.lane.is_checked());
        let mut courtesy = YieldPolicy::default();
        let mut messages = RingMessages::new();
        loop {
            panics::point(format_args!("bulk"));
            while let Some(completion) = ring.next() {
                let received = match completion.token {
                    TOKEN_WAKE => {
                        if !acking {
                            reader.part(&self.lane.socket());
                        }
                        return Ok(None);
                    }
                    token if RingMessages::owns(token) => messages.complete(&mut ring, &completion),
                    // A lost source is detected where its pages are received.
                    TOKEN_ACKED => {
                        acking = false;
                        Ok(())
                    }
                    _ => reader.complete(
                        &mut ring,
                        completion,
                        |page| wanted.push(page),
                        |arrived| self.arrived(arrived, &mut ended),
                    ),
                };
                match received {
                    Err(error) if error.ends_lanes() => {
                        if !acking {
                            reader.part(&self.lane.socket());
                        }
                        lane::sever(&self.lane.socket());
                        lost.get_or_insert(error);
                    }
                    other => other?,
                }
            }
            self.wake(&mut ring, &mut messages, &mut wanted)?;
            window.adapt();
            if lost.is_some() {
                if reader.is_quiet() {
                    let arrived = |arrived| self.arrived(arrived, &mut ended);
                    reader.settle(|page| wanted.push(page), arrived)?;
                    self.wake(&mut ring, &mut messages, &mut wanted)?;
                    if ring.in_flight() == 0 {
                        return lost.map_or(Ok(None), Err);
                    }
                }
                ring.enter(Wait::One)?;
                continue;
            }
            if !acking && (self.acks.is_due() || ended && !self.acks.is_empty()) {
                let mut bytes = Vec::new();
                self.acks.encode(&mut bytes);
                seal.frames(&mut bytes);
                let bytes = reader.sealed(bytes)?;
                let op = Op::send(Fd::from(self.lane.socket()), bytes).wait_all();
                ring.submit(op, TOKEN_ACKED).map_err(|rejected| Error::Ring(rejected.error))?;
                acking = true;
            }
            if ended && ring.in_flight() == 0 {
                return Ok(reader.into_ahead());
            }
            courtesy.let_others(self.guest.counters.faults.sum_us());
            ring.enter(Wait::One)?;
        }
    }

    fn arrived(&mut self, arrived: Arrived, ended: &mut bool) -> Result<()> {
        match arrived {
            Arrived::Run { range, last } => {
                self.acks.cached(range, self.guest.bytes(range));
                Counters::add(&self.guest.counters.pages_background, range.pages);
                if last {
                    self.post.send(InboxMessage::AllCached);
                }
            }
            Arrived::Other(Event::LaneEnd) => *ended = true,
            Arrived::Other(Event::RoundsEnd) => self.post.send(InboxMessage::RoundsEnded),
            Arrived::Other(Event::Error(fault)) => {
                return Err(Error::Peer { side: "source", code: fault.code, text: fault.text });
            }
            Arrived::Other(_) => {}
        }
        Ok(())
    }

    /// Reports received pages that a vCPU waits for to the fault threads.
    fn wake(
        &self,
        ring: &mut Ring,
        messages: &mut RingMessages,
        wanted: &mut Vec<PageId>,
    ) -> Result<()> {
        wanted.drain(..).try_for_each(|page| self.servers.tell(ring, messages, &self.guest, page))
    }
}
