//! Receives one lane: pages into guest memory, everything else into small buffers.
//!
//! Into huge pages a run is received straight through our mapping. A region of 4 KiB pages takes it
//! faster in two steps, a buffer that stays in the processor's cache and then a write to the file: a
//! receive into fresh small pages faults on every one of them, and has it zeroed first (`umem-perf
//! floor` compares the ways). A demand page goes straight into its place all the same: a write takes the
//! file's lock, and would wait for the writes of bulk lanes.
//!
//! While a run of pages is received, the receive of the next header is already linked behind it, so
//! that the kernel goes on without us. The wire's receiver promises that a header follows every run.

use std::sync::Arc;

use umem_ring::{Bytes, Chain, Completion, Fd, Memory, Op, Outcome, Ring};
use umem_wire::{Event, HEADER_BYTES, LaneRole, PageRange, Receiver, RegionTable, Target};

use super::guest::{GuestMemory, PageId};
use crate::error::{Error, Result};
use crate::lane::Lane;
use crate::memory::claims::RunKind;

/// Completion tokens of the reader; the threads' own tokens start above.
pub(crate) const TOKEN_CONTROL: u64 = 0;
pub(crate) const TOKEN_RUN: u64 = 1;
pub(crate) const TOKEN_FREE: u64 = 16;

/// One lane's receiving end.
pub(crate) struct LaneReader {
    name: String,
    socket: Fd,
    receiver: Receiver,
    guest: Arc<GuestMemory>,
    /// For the header in flight; given back with each completion.
    header: Option<Bytes>,
    /// For the run in flight, where it does not go straight into its pages.
    staging: Option<Bytes>,
    stages_small_pages: bool,
}

/// What a lane brought, beside the pages, which are in place already.
pub(crate) enum Arrived {
    /// A run is cached; `last` when it was the guest's last.
    Run { range: PageRange, last: bool },
    /// Anything else that the wire's receiver reported.
    Other(Event),
}

impl LaneReader {
    /// A bulk lane, from its beginning.
    pub(crate) fn bulk(lane: &Lane, regions: &RegionTable, guest: Arc<GuestMemory>) -> LaneReader {
        let mut receiver = Receiver::for_destination(LaneRole::Bulk);
        receiver.set_regions(regions);
        let reader = LaneReader::demand(lane, receiver, guest);
        LaneReader { stages_small_pages: true, ..reader }
    }

    /// The demand lane, with a receiver that has read its beginning already.
    pub(crate) fn demand(lane: &Lane, receiver: Receiver, guest: Arc<GuestMemory>) -> LaneReader {
        let header = Some(Bytes::with_capacity(HEADER_BYTES));
        LaneReader {
            name: lane.name.clone(),
            socket: Fd::from(lane.socket()),
            receiver,
            guest,
            header,
            staging: None,
            stages_small_pages: false,
        }
    }

    /// Starts the next receive. Called once at the start; [`LaneReader::complete`] calls it then.
    pub(crate) fn arm(&mut self, ring: &mut Ring) -> Result<()> {
        match self.receiver.next_target() {
            Target::Control { exact } => {
                let memory = self.buffer(exact);
                ring.submit(Op::recv(self.socket.clone(), memory).wait_all(), TOKEN_CONTROL)
                    .map_err(|rejected| Error::Ring(rejected.error))?;
            }
            Target::Run(run) => {
                let ram = &self.guest.region(run.region).ram;
                let pages = if ram.has_huge_pages || !self.stages_small_pages {
                    Memory::from(ram.span(run.byte_offset, run.bytes))
                } else {
                    let len = usize::try_from(run.bytes).expect("a run is at most 2 MiB");
                    let staging = self.staging.take();
                    let staging = staging.unwrap_or_else(|| Bytes::with_capacity(STAGING_BYTES));
                    Memory::from(staging.slice(0..len))
                };
                let header = self.buffer(HEADER_BYTES);
                let chain = Chain::new()
                    .then(Op::recv(self.socket.clone(), pages).wait_all(), TOKEN_RUN)
                    .then(Op::recv(self.socket.clone(), header).wait_all(), TOKEN_CONTROL);
                ring.submit_chain(chain).map_err(|rejected| Error::Ring(rejected.error))?;
            }
        }
        Ok(())
    }

    /// Takes a completion with one of the reader's tokens. `wake` gets each page that a vCPU waits
    /// for and that is now cached, `arrived` all that came.
    pub(crate) fn complete(
        &mut self,
        ring: &mut Ring,
        completion: Completion,
        mut wake: impl FnMut(PageId),
        mut arrived: impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        let outcome = completion.outcome;
        match (completion.token, completion.memory) {
            (TOKEN_CONTROL, Some(Memory::Bytes(bytes))) => {
                let result = match outcome {
                    Outcome::Done(_) => self.receiver.control(bytes.as_slice()),
                    // The run before it has failed and says why.
                    Outcome::NotStarted { .. } => return Ok(()),
                    other => return Err(self.failed(other)),
                };
                if bytes.capacity() == HEADER_BYTES {
                    self.header = Some(bytes);
                }
                self.events(&mut wake, &mut arrived)?;
                result.map_err(|error| Error::protocol(&self.name, error))?;
                // The source may close a lane that has ended.
                if self.receiver.is_ended() { Ok(()) } else { self.arm(ring) }
            }
            (TOKEN_RUN, memory) => {
                let Outcome::Done(bytes) = outcome else {
                    return Err(self.failed(outcome));
                };
                if let Some(Memory::Bytes(staging)) = memory {
                    self.write(&staging)?;
                    self.staging = Some(staging);
                }
                self.receiver
                    .landed(u64::from(bytes))
                    .map_err(|error| Error::protocol(&self.name, error))?;
                self.events(&mut wake, &mut arrived)
            }
            (token, memory) => unreachable!("completion {token} with {memory:?} in a lane reader"),
        }
    }

    fn events(
        &mut self,
        wake: &mut impl FnMut(PageId),
        arrived: &mut impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        while let Some(event) = self.receiver.poll_event() {
            let (range, kind) = match event {
                Event::RunBegins(range) => {
                    self.guest.begin(range, &self.name)?;
                    continue;
                }
                Event::Data(range) => (range, RunKind::Data),
                Event::Zero(range) => (range, RunKind::Zero),
                Event::Hole(range) => (range, RunKind::Hole),
                other => {
                    arrived(Arrived::Other(other))?;
                    continue;
                }
            };
            if kind != RunKind::Data {
                self.guest.begin(range, &self.name)?;
            }
            let last = self.guest.finish(range, kind, &mut *wake)?;
            arrived(Arrived::Run { range, last })?;
        }
        Ok(())
    }

    /// Puts a staged run where it belongs.
    fn write(&self, staging: &Bytes) -> Result<()> {
        let Target::Run(run) = self.receiver.next_target() else {
            unreachable!("a run that has been received is the current one")
        };
        let ram = &self.guest.region(run.region).ram;
        ram.write_at(staging.as_slice(), run.byte_offset).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::ENOSPC | libc::ENOMEM) => out_of_memory(),
                _ => Error::System { what: format!("writing RAM {}", ram.name), source: error },
            }
        })
    }

    /// The header's buffer, or a new one for a body.
    fn buffer(&mut self, len: usize) -> Bytes {
        match self.header.take() {
            Some(header) if header.capacity() == HEADER_BYTES && len <= HEADER_BYTES => {
                header.slice(0..len)
            }
            _ => Bytes::with_capacity(len),
        }
    }

    /// Why a receive did not bring what it had to.
    fn failed(&self, outcome: Outcome) -> Error {
        let lost = |what: String| Error::Lost { side: "source", lane: self.name.clone(), what };
        match outcome {
            Outcome::Short { .. } | Outcome::Done(_) => lost("the source closed it".into()),
            // The kernel could not put the bytes into the page: its file system is full.
            Outcome::Failed(errno) if errno.raw() == libc::EFAULT => out_of_memory(),
            Outcome::Failed(errno) => lost(errno.to_string()),
            other => lost(format!("{other:?}")),
        }
    }
}

fn out_of_memory() -> Error {
    Error::OutOfMemory(
        "no memory left for the guest's pages: the file system of its RAM file is full (or its \
         memory limit is reached); the guest waits"
            .into(),
    )
}

/// The longest run of small pages.
const STAGING_BYTES: usize = 2 << 20;
const _: () = assert!(STAGING_BYTES as u64 == umem_wire::limits::RUN_BYTES_MAX);
