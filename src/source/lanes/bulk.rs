//! A bulk lane at the source: background pages, on a ring and a core of their own.
//!
//! Runs are sent in batches, one vectored send each: headers from a small buffer, pages from the
//! mapping. While a batch is in the kernel the next one is gathered. Sends are zero-copy if the
//! kernel really does not copy; the first notification reports that. On a TCP lane that stays on
//! this machine a batch goes through a pipe (`outlet.rs`). With TLS a batch is the records made of
//! it, in one send.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver as Orders, TryRecvError};
use std::time::Duration;

use umem_ring::{Completion, Config, Fd, Memory, Op, Outcome, Ring, TOKEN_WAKE, Wait, Waker};
use umem_wire::{Event, Frame, HEADER_BYTES, Receiver, Seal, transmit};

use crate::error::{Error, Result};
use crate::memory::claims::Run;
use crate::runtime::bandwidth::Bandwidth;
use crate::runtime::cores::Place;
use crate::runtime::inbox::Post;
use crate::runtime::panics;
use crate::runtime::priority::{self, YieldPolicy};
use crate::runtime::worker::Started;
use crate::source::InboxMessage;
use crate::source::memory::{RoundsWalk, SourceMemory, Walk};
use crate::source::sending::batch::{BATCH_RUNS, Storage, Unfit};
use crate::source::sending::outlet::{Left, SpliceError, SpliceSender};
use crate::source::sending::pace::Pace;
use crate::source::sending::seal::Sealer;
use crate::statistics::Counters;
use crate::transport::lane::Lane;
use crate::transport::tls::Channel;

/// The kernel's errors for a zero-copy send where a plain send would succeed: the user's data in
/// flight has used up RLIMIT_MEMLOCK (ENOMEM, ENOBUFS), this kind of socket has no zero copy
/// (EOPNOTSUPP: AF_UNIX, and AF_VSOCK and MPTCP of many kernels), the kernel does not have the
/// operation (EINVAL), or a policy forbids it.
const NO_ZERO_COPY: [i32; 6] =
    [libc::ENOMEM, libc::ENOBUFS, libc::EOPNOTSUPP, libc::EINVAL, libc::EPERM, libc::EACCES];

const TOKEN_SENT: u64 = 0;
const TOKEN_RECEIVED: u64 = 1;
/// The bandwidth limit allows more background pages, or the dirty log may have released pages.
const TOKEN_LOOK: u64 = 2;
/// The socket has room for more of the batch in the outlet.
const TOKEN_WRITABLE: u64 = 3;

/// How often a lane asks for pages that the dirty log holds back. QEMU's walk passes 1 MiB in that time.
const HELD_BACK_INTERVAL: Duration = Duration::from_micros(500);

/// Bytes of acknowledgements, 32 each, per receive.
const RECEIVE_BYTES: usize = 4 << 10;

/// Operations of a lane's ring. A zero-copy send of a batch stays until its bytes have been
/// acknowledged.
const OPS_MAX: u32 = 1024;

/// Sends that may wait for that: at least 250 MiB in flight. The rest is for all other operations.
const IN_FLIGHT_MAX: usize = OPS_MAX as usize - 64;

/// An order to a bulk thread, followed by a wake. A wake without an order, after the sender of
/// orders has gone, is a [`Order::Stop`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Send the dirty pages of the lane's blocks, once around, and report the end.
    Pass,
    /// End the pass with the current block, without its limit, and report the end.
    CutPass,
    /// The guest has stopped: from here on each page is sent once.
    EndRounds,
    /// Send every remaining page, then the lane's end.
    Serve,
    /// End.
    Stop,
}

/// A lane's stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Waits for an order.
    Waits,
    /// A pass of the rounds.
    Pass,
    /// Sends the rounds end, and then waits.
    EndsRounds,
    /// Sends the remaining pages, each once.
    Serves,
}

/// The parts of a bulk thread.
pub(crate) struct BulkLane {
    pub(crate) lane: Lane,
    /// Its orders.
    pub(crate) orders: Orders<Order>,
    /// Whether it waits for orders, and sends nothing before the first.
    pub(crate) has_rounds: bool,
    pub(crate) memory: Arc<SourceMemory>,
    pub(crate) index: usize,
    pub(crate) lanes: usize,
    pub(crate) core: Place,
    /// Whether to try zero-copy sends: not on lanes that stay on this machine.
    pub(crate) zero_copy: bool,
    pub(crate) post: Post<InboxMessage>,
}

struct BulkThread {
    name: String,
    socket: Arc<OwnedFd>,
    /// The receiving direction, and the TLS keys of both directions.
    channel: Channel,
    sealer: Sealer,
    pace: Pace,
    memory: Arc<SourceMemory>,
    stage: Stage,
    orders: Orders<Order>,
    post: Post<InboxMessage>,
    rounds: RoundsWalk,
    walk: Walk,
    zero_copy: bool,
    /// Runs gathered and not sent yet.
    runs: Vec<Run>,
    exhausted: bool,
    /// The pass ends with the current block.
    is_cut: bool,
    /// A timer runs after which the lane checks again whether it may gather more.
    pausing: bool,
    /// The send in the kernel, before its result.
    sending: Option<Vec<Run>>,
    /// Whether that send is zero-copy.
    sending_zero_copy: bool,
    /// The frame count before it.
    sealed_before: Seal,
    spare: Vec<Run>,
    storage: Storage,
    lane_end_sent: bool,
    in_flight: usize,
    /// The pipe for batches without a copy, on this machine.
    outlet: Option<SpliceSender>,
    /// The destination has closed the lane, after its end.
    closed: bool,
}

impl BulkLane {
    /// Sends every remaining page, then the lane's end, unless it is woken to stop. Runs on the
    /// calling thread. If the destination acknowledges pages the thread reads acknowledgements
    /// until the destination has closed the lane: closing a socket with unread data would send RST
    /// and discard data in flight.
    pub(crate) fn run(self, started: Started<Waker>) -> Result<()> {
        let post = self.post.clone();
        let mut ring = Ring::new(&Config {
            name: self.lane.name.clone(),
            core: self.core.enter(),
            ops_max: OPS_MAX,
            ..Config::default()
        })?;
        priority::go_early();
        started.with(ring.waker()?);
        let is_checked = self.lane.is_checked();
        let sealer = Sealer::new(is_checked);
        let socket = self.lane.socket();
        let channel = match self.lane.take_channel() {
            None => Channel::clear(RECEIVE_BYTES),
            Some(mut channel) => {
                channel.widen(RECEIVE_BYTES);
                *channel
            }
        };
        let is_tcp = self.lane.congestion.is_some() && !channel.has_tls();
        let mut thread = BulkThread {
            name: self.lane.name.clone(),
            socket: socket.clone(),
            // A batch of records is as large as the buffer in which the records are made.
            pace: Pace::new(is_tcp.then(|| socket.clone())),
            stage: if self.has_rounds { Stage::Waits } else { Stage::Serves },
            orders: self.orders,
            post: self.post,
            rounds: RoundsWalk::new(self.index, self.lanes),
            walk: Walk::new(&self.memory, self.index, self.lanes),
            memory: self.memory,
            // Records do not lie in the guest's memory.
            zero_copy: self.zero_copy && !channel.has_tls(),
            outlet: (is_tcp && !self.zero_copy).then(SpliceSender::new).flatten(),
            channel,
            runs: Vec::with_capacity(1024),
            exhausted: false,
            is_cut: false,
            pausing: false,
            sending: None,
            sending_zero_copy: false,
            sealed_before: sealer.place(),
            sealer,
            spare: Vec::with_capacity(1024),
            storage: Storage::default(),
            lane_end_sent: false,
            in_flight: 0,
            closed: false,
        };
        let mut receiver = Receiver::for_source_bulk().checked(is_checked);
        receiver.set_regions(thread.memory.landing());
        thread.take_received(&mut ring, &mut receiver)?;
        let mut has_told = false;
        let mut courtesy = YieldPolicy::default();
        loop {
            panics::point(format_args!("bulk"));
            thread.advance(&mut ring)?;
            if thread.lane_end_sent && thread.in_flight == 0 {
                if !std::mem::replace(&mut has_told, true) {
                    post.send(InboxMessage::BulkEnded);
                }
                if !thread.memory.releases || thread.closed {
                    return Ok(());
                }
            }
            courtesy.let_others(thread.memory.counters.pages_demand.load(Relaxed));
            // A batch sent through the outlet has no completion.
            let goes_on = thread.outlet.is_some() && thread.is_ready();
            ring.enter(if goes_on { Wait::No } else { Wait::One })?;
            while let Some(completion) = ring.next() {
                match completion.token {
                    TOKEN_WAKE => {
                        if thread.is_to_stop() {
                            thread.part(&socket);
                            return Ok(());
                        }
                    }
                    TOKEN_SENT => thread.sent(completion)?,
                    TOKEN_LOOK => thread.pausing = false,
                    TOKEN_WRITABLE => thread.let_out(&mut ring)?,
                    _ => thread
                        .received(&mut ring, &mut receiver, completion)
                        .inspect_err(|_| thread.part(&socket))?,
                }
            }
        }
    }
}

impl BulkThread {
    /// Takes pending orders; true if the thread is to end.
    fn is_to_stop(&mut self) -> bool {
        loop {
            // Orders come one at a time: each follows the report of the one before, except for the end of a
            // pass.
            match self.orders.try_recv() {
                Ok(Order::Stop) | Err(TryRecvError::Disconnected) => return true,
                Ok(Order::Pass) => {
                    self.rounds.begin_pass();
                    (self.stage, self.is_cut) = (Stage::Pass, false);
                }
                // A finished pass has already reported its end.
                Ok(Order::CutPass) => {
                    self.rounds.cut_pass();
                    (self.is_cut, self.pausing) = (true, false);
                }
                Ok(Order::EndRounds) => self.stage = Stage::EndsRounds,
                Ok(Order::Serve) => self.stage = Stage::Serves,
                Err(TryRecvError::Empty) => return false,
            }
            self.exhausted = false;
        }
    }

    /// Sends a batch if none is in flight, and gathers the next one.
    fn advance(&mut self, ring: &mut Ring) -> Result<()> {
        if self.runs.is_empty() {
            self.gather(ring)?;
        }
        if self.stage != Stage::Serves && self.runs.is_empty() && self.sending.is_none() {
            return self.end_stage(ring);
        }
        let has_some = !self.runs.is_empty();
        let has_room = self.in_flight < IN_FLIGHT_MAX;
        if self.sending.is_none() && has_room && !self.lane_end_sent && (has_some || self.exhausted)
        {
            if !has_some {
                self.lane_end_sent = true;
                let op = self.lane_end()?;
                self.submit(ring, op)?;
            } else {
                match (self.batch()?, &mut self.outlet) {
                    (Op::SendVectored { pieces, .. }, Some(outlet)) => {
                        outlet.begin(pieces);
                        self.in_flight += 1;
                        self.let_out(ring)?;
                    }
                    (op, _) => self.submit(ring, op)?,
                }
            }
            ring.enter(Wait::No)?;
            self.gather(ring)?;
        }
        Ok(())
    }

    /// Ends a stage of the rounds: all of it has been handed to the kernel.
    fn end_stage(&mut self, ring: &mut Ring) -> Result<()> {
        match self.stage {
            Stage::Pass if self.exhausted => {
                self.stage = Stage::Waits;
                self.post.send(InboxMessage::PassEnded);
            }
            Stage::EndsRounds => {
                self.stage = Stage::Waits;
                let op = self.rounds_end()?;
                self.submit(ring, op)?;
            }
            Stage::Pass | Stage::Waits | Stage::Serves => {}
        }
        Ok(())
    }

    /// The rounds end, for which the destination waits before it counts pages as arrived.
    fn rounds_end(&mut self) -> Result<Op> {
        let mut frame = Vec::with_capacity(HEADER_BYTES);
        transmit::encode(&Frame::RoundsEnd, &mut frame);
        self.sealer.frames(&mut frame);
        let mut batch = self.storage.batch(self.channel.has_tls());
        match batch.add(&mut self.storage, &mut self.channel, &frame, None) {
            Ok(()) | Err(Unfit::Gone) => {}
            Err(Unfit::Secured(what)) => return Err(self.lost(what)),
        }
        let socket = Fd::from(self.socket.clone());
        let op = batch.into_op(&mut self.storage, &mut self.channel, &socket, false);
        op.map_err(|what| self.lost(what))
    }

    fn submit(&mut self, ring: &mut Ring, op: Op) -> Result<()> {
        ring.submit(op, TOKEN_SENT).map_err(|rejected| Error::Ring(rejected.error))?;
        self.in_flight += 1;
        // A lane's end carries no run.
        self.sending.get_or_insert_default();
        Ok(())
    }

    /// Whether there is a batch to send, and no send in the kernel.
    fn is_ready(&self) -> bool {
        let has_last = match self.stage {
            Stage::Serves => self.exhausted && !self.lane_end_sent,
            Stage::Pass => self.exhausted,
            Stage::EndsRounds => true,
            Stage::Waits => false,
        };
        self.sending.is_none() && (!self.runs.is_empty() || has_last)
    }

    /// Continues with the batch in the outlet.
    fn let_out(&mut self, ring: &mut Ring) -> Result<()> {
        let Some(outlet) = &mut self.outlet else { return Ok(()) };
        match outlet.advance(&self.socket) {
            Ok(Left::All) => {
                let pieces = Memory::Pieces(outlet.end());
                self.storage.take_back(pieces, false);
                self.left(true)?;
                self.in_flight -= 1;
            }
            Ok(Left::Some) => {
                let writable = Op::poll(self.socket.clone(), libc::POLLOUT as u32);
                ring.submit(writable, TOKEN_WRITABLE)
                    .map_err(|rejected| Error::Ring(rejected.error))?;
            }
            Err(SpliceError::Unable) => {
                let pieces = self.outlet.take().map(SpliceSender::into_rest).unwrap_or_default();
                let fd = Fd::from(self.socket.clone());
                self.in_flight -= 1;
                self.submit(ring, Op::SendVectored { fd, pieces, zero_copy: false, more: false })?;
            }
            Err(SpliceError::Failed(errno)) => {
                self.memory.why_unsent(self.sending.as_deref().unwrap_or_default(), None)?;
                return Err(self.lost(format!("sending: {}", errno.desc())));
            }
        }
        Ok(())
    }

    /// Claims pages until there is a batch, or no page is left; none while the bandwidth limit is
    /// used up, as requests for claimed pages wait for their batch.
    fn gather(&mut self, ring: &mut Ring) -> Result<()> {
        if self.exhausted || self.pausing {
            return Ok(());
        }
        if matches!(self.stage, Stage::Waits | Stage::EndsRounds) {
            return Ok(());
        }
        if let Some(wait) = self.limit().and_then(Bandwidth::wait) {
            return self.pause(ring, wait);
        }
        let most = self.pace.batch_bytes();
        while !self.exhausted && self.runs.len() < BATCH_RUNS && self.gathered(most) < most {
            let has_next = match self.stage {
                Stage::Pass => self.rounds.next_runs(&self.memory, most, &mut self.runs)?,
                _ => self.walk.next_runs(&self.memory, most, &mut self.runs)?,
            };
            self.exhausted = !has_next;
            if self.stage == Stage::Pass && self.rounds.is_waiting() {
                return self.pause(ring, HELD_BACK_INTERVAL);
            }
        }
        Ok(())
    }

    /// Gathers nothing for this long.
    fn pause(&mut self, ring: &mut Ring, wait: Duration) -> Result<()> {
        let submitted = ring.submit(Op::timeout(wait), TOKEN_LOOK);
        submitted.map_err(|rejected| Error::Ring(rejected.error))?;
        self.pausing = true;
        Ok(())
    }

    /// The limit that all lanes share in this stage; none for a pass that is to end.
    fn limit(&self) -> Option<&Bandwidth> {
        match self.stage {
            Stage::Pass => Some(&*self.memory.pass_bandwidth).filter(|_| !self.is_cut),
            Stage::Serves => Some(&self.memory.bandwidth),
            Stage::Waits | Stage::EndsRounds => None,
        }
    }

    /// Bytes of data in the gathered runs; capped, as only the comparison with a batch matters.
    fn gathered(&self, most: u64) -> u64 {
        let mut bytes = 0;
        for run in &self.runs {
            bytes += self.memory.data_bytes(run);
            if bytes >= most {
                break;
            }
        }
        bytes
    }

    /// The next runs as one send.
    fn batch(&mut self) -> Result<Op> {
        let mut sending = std::mem::take(&mut self.spare);
        sending.clear();
        let mut bytes = 0;
        let mut batch = self.storage.batch(self.channel.has_tls());
        self.sealed_before = self.sealer.place();
        for run in &self.runs {
            if sending.len() == BATCH_RUNS || bytes >= self.pace.batch_bytes() {
                break;
            }
            let (header, pages) = match self.stage {
                Stage::Serves => self.memory.pieces(run, &mut self.sealer)?,
                _ => {
                    let copy = || self.storage.copy();
                    self.memory.pieces_in_rounds(run, &mut self.sealer, copy)?
                }
            };
            if pages.is_some() {
                bytes += self.memory.bytes(run.range);
            }
            let added = batch.add(&mut self.storage, &mut self.channel, &header, pages);
            added.map_err(|unfit| match unfit {
                Unfit::Secured(what) => self.lost(what),
                Unfit::Gone => self.memory.region(run.range.region).ram.gone(),
            })?;
            sending.push(*run);
        }
        self.memory.check_runs(&sending)?;
        if let Some(limit) = self.limit() {
            limit.sent(bytes);
        }
        self.runs.drain(..sending.len());
        self.sending = Some(sending);
        let zero_copy =
            self.zero_copy && bytes > 0 && !self.memory.zero_copy_is_copied.load(Relaxed);
        self.sending_zero_copy = zero_copy;
        let socket = Fd::from(self.socket.clone());
        let op = batch.into_op(&mut self.storage, &mut self.channel, &socket, zero_copy);
        op.map_err(|what| self.lost(what))
    }

    /// The lane's end, for which the destination waits last. With TLS close_notify follows it.
    fn lane_end(&mut self) -> Result<Op> {
        let mut frame = Vec::with_capacity(HEADER_BYTES);
        transmit::encode(&Frame::LaneEnd, &mut frame);
        self.sealer.frames(&mut frame);
        if !self.channel.has_tls() {
            return Ok(Op::send(self.socket.clone(), frame).wait_all());
        }
        let mut last = self.storage.batch(true);
        let ended = last.end(&mut self.channel, &frame);
        ended.map_err(|what| self.lost(what))?;
        let socket = Fd::from(self.socket.clone());
        let op = last.into_op(&mut self.storage, &mut self.channel, &socket, false);
        op.map_err(|what| self.lost(what))
    }

    fn sent(&mut self, mut completion: Completion) -> Result<()> {
        let memory = completion.memory.take();
        let freed_bytes = memory.as_ref().map_or(0, |memory| memory.len() as u64);
        let has_tls = self.channel.has_tls();
        memory.into_iter().for_each(|memory| self.storage.take_back(memory, has_tls));
        match completion.outcome {
            // The notification of a zero-copy send follows, and corrects this if the kernel copied
            // after all.
            Outcome::Done(_) => self.left(!completion.last)?,
            Outcome::Released { copied } => {
                if copied {
                    self.memory.zero_copy_is_copied.store(true, Relaxed);
                    let counters = &self.memory.counters;
                    let moved = freed_bytes.min(counters.zero_copied_bytes.load(Relaxed));
                    counters.zero_copied_bytes.fetch_sub(moved, Relaxed);
                    Counters::add(&counters.copied_bytes, moved);
                }
            }
            // Nothing of this has been sent: a send that has begun reports its bytes.
            Outcome::Failed(errno)
                if self.sending_zero_copy && NO_ZERO_COPY.contains(&errno.raw()) =>
            {
                self.memory.zero_copy_is_copied.store(true, Relaxed);
                self.sealer.go_back(self.sealed_before);
                self.runs.splice(..0, self.sending.take().unwrap_or_default());
            }
            other => {
                let errno = crate::source::errno_of(&other);
                self.memory.why_unsent(self.sending.as_deref().unwrap_or_default(), errno)?;
                return Err(self.lost(format!("sending: {}", crate::source::outcome_text(other))));
            }
        }
        if completion.last {
            self.in_flight -= 1;
        }
        Ok(())
    }

    /// Counts the batch that has been handed to the kernel.
    fn left(&mut self, without_copy: bool) -> Result<()> {
        let runs = self.sending.take().unwrap_or_default();
        let counters = &self.memory.counters;
        if self.stage == Stage::Serves {
            runs.iter().for_each(|run| self.memory.count(run, false));
            let pages = runs.iter().map(|run| run.range.pages).sum();
            Counters::add(&counters.pages_background, pages);
        } else {
            runs.iter().try_for_each(|run| self.memory.count_in_round(run))?;
        }
        let bytes: u64 = runs.iter().map(|run| self.memory.data_bytes(run)).sum();
        self.pace.sent(bytes);
        let counter =
            if without_copy { &counters.zero_copied_bytes } else { &counters.copied_bytes };
        Counters::add(counter, bytes);
        self.spare = runs;
        Ok(())
    }

    /// On a bulk lane a destination sends acknowledgements, or its reason for giving up.
    fn received(
        &mut self,
        ring: &mut Ring,
        receiver: &mut Receiver,
        completion: Completion,
    ) -> Result<()> {
        let (Outcome::Done(count), Some(Memory::Bytes(bytes))) =
            (completion.outcome, completion.memory)
        else {
            return Err(self.lost(crate::source::outcome_text(completion.outcome)));
        };
        self.channel.filled(bytes, count as usize);
        if count == 0 {
            return self.ended();
        }
        self.take_received(ring, receiver)
    }

    /// Processes received bytes, then receives more.
    fn take_received(&mut self, ring: &mut Ring, receiver: &mut Receiver) -> Result<()> {
        let bytes = self.channel.plain();
        let taken = bytes.len();
        let result = receiver.control(bytes);
        self.channel.take(taken);
        while let Some(event) = receiver.poll_event() {
            match event {
                Event::Error(fault) => return Err(crate::source::peer(fault)),
                Event::Ack(range) => self.memory.acknowledged(range, &self.name)?,
                _ => {}
            }
        }
        result.map_err(|error| self.memory.received(&self.name, &error))?;
        if self.channel.has_ended() {
            return self.ended();
        }
        ring.submit(Op::recv(self.socket.clone(), self.channel.free()), TOKEN_RECEIVED)
            .map_err(|rejected| Error::Ring(rejected.error))?;
        Ok(())
    }

    /// Processes the end of the connection.
    fn ended(&mut self) -> Result<()> {
        if !self.lane_end_sent || self.channel.is_broken() {
            let cause = self.channel.cause();
            let cause = cause.map(|cause| format!(" (TLS: {cause})")).unwrap_or_default();
            return Err(self.lost(format!("the destination closed it{cause}")));
        }
        // The destination has read the lane's end; the completion of its send may come later.
        self.closed = true;
        Ok(())
    }

    /// With TLS, unless other data is in flight: sends an alert for the peer's error, or
    /// close_notify.
    fn part(&mut self, socket: &OwnedFd) {
        if self.sending.is_none() && !self.lane_end_sent {
            self.channel.part(socket);
        }
    }

    fn lost(&self, what: String) -> Error {
        Error::Lost { side: "destination", lane: self.name.clone(), what }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use umem_wire::PageSize;

    use super::*;
    use crate::memory::region::RamFile;
    use crate::runtime::inbox::Inbox;

    /// As a unix socket, which refuses zero-copy sends here.
    #[test]
    fn lane_falls_back_to_plain_sends_when_the_socket_has_no_zero_copy() {
        const BYTES: usize = 1 << 20;
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.write_all_at(&vec![0xa5; BYTES], 0).unwrap();
        let files = vec![RamFile::of_source("ram0", file).unwrap()];
        let memory = Arc::new(SourceMemory::new(files, false));
        memory.land(memory.table().unwrap().with_units(&[PageSize::SIZE_4K]).unwrap());
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            theirs.read_to_end(&mut bytes).map(|_| bytes)
        });
        let inbox = Inbox::new().unwrap();
        let (_orders, queue) = std::sync::mpsc::channel();
        let lane = BulkLane {
            orders: queue,
            has_rounds: false,
            lane: Lane::new(ours.into(), "bulk lane 1".into()).unwrap(),
            memory: memory.clone(),
            index: 0,
            lanes: 1,
            core: Place::Anywhere,
            zero_copy: true,
            post: inbox.post(),
        };
        lane.run(Started::unheard()).unwrap();
        let came = reader.join().unwrap().unwrap();
        let pages = came.iter().filter(|&&byte| byte == 0xa5).count();
        assert!(pages >= BYTES && came.len() > BYTES, "{pages} of {BYTES} bytes arrived");
        assert!(memory.zero_copy_is_copied.load(Relaxed), "zero copy has been tried");
    }
}
