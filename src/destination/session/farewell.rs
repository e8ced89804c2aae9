//! The answers to a source that connects when its guest no longer needs it.
//!
//! The guest has all of its memory, or has ended, and the source missed that: its process was killed, or the network
//! was gone for too long. A source that is resumed then would retry indefinitely, because it must not give up pages
//! that a guest may need. So a process must answer it here: the umem that received the guest, while it stays with the
//! guest's process; later a `umem incoming --resume`, because the session's record stays until the source has been
//! notified.

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, recv, send};
use umem_wire::{
    Event as Received, Frame, PageRange, Receiver, RegionTable, Seal, Standing, Target, resume,
    transmit,
};

use crate::control::destination::farewell::{Effect, Farewell as Core, Input};
use crate::destination::InboxMessage;
use crate::destination::admission::accept::{LaneAcceptor, Lanes};
use crate::destination::side::GuestSide;
use crate::error::{Error, Result};
use crate::events::{Event, Remark};
use crate::observe::output::Output;
use crate::runtime::inbox::{Inbox, Wake};
use crate::session::{DestinationRecord, SessionFile};
use crate::transport::lane::{self, Lane};

/// How long a source may take to read the answer, and then to close its lanes.
const READ_PATIENCE: Duration = Duration::from_secs(30);
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// A session that is over, unknown to its source.
pub(in crate::destination) struct CompletionNotifier {
    core: Core,
    door: LaneAcceptor,
    word: Word,
    /// The record to remove as soon as the source knows.
    keeper: SessionFile<DestinationRecord>,
    /// Lanes that have arrived, while they are needed.
    lanes: Option<Lanes>,
}

/// The answer.
pub(in crate::destination) enum Word {
    /// Every page has arrived: this side's state, and the number of pages.
    Complete { standing: Standing, landing: RegionTable },
    /// The session failed for good.
    Failed(Error),
}

impl CompletionNotifier {
    /// Waits for the source until `until`, or without limit.
    pub(in crate::destination) fn new(
        mut door: LaneAcceptor,
        word: Word,
        keeper: SessionFile<DestinationRecord>,
        until: Option<Instant>,
    ) -> CompletionNotifier {
        door.set_refusal(None);
        CompletionNotifier { core: Core::new(until), door, word, keeper, lanes: None }
    }

    /// Waits for the source to connect. False if it does not, or after an interrupt.
    pub(in crate::destination) fn wait(&mut self, inbox: &Inbox<InboxMessage>) -> Result<bool> {
        loop {
            let next = self.door.next_deadline().into_iter().chain(self.core.deadline()).min();
            let left = next.map(|at| at.saturating_duration_since(Instant::now()));
            match inbox.wait_for(&self.door.fds(), left)? {
                Wake::Signal => self.feed(Input::Interrupt, inbox)?,
                Wake::Ready(index) => self.door.answer(index)?,
                Wake::Message(_) | Wake::Timeout => {}
            }
            self.take_lanes(inbox)?;
            if let Some(is_told) = self.core.outcome() {
                return Ok(is_told);
            }
        }
    }

    /// Stays while the guest's process, a child, runs, and answers the source if it connects meanwhile. The exit status
    /// is the process's, as of [`GuestSide::outlive`].
    pub(in crate::destination) fn stay(
        mut self,
        side: &mut GuestSide,
        inbox: &Inbox<InboxMessage>,
        output: &Output,
    ) -> Result<i32> {
        loop {
            let mut fds = vec![(side.command_exited(), PollFlags::POLLIN)];
            fds.extend(self.door.fds());
            let left =
                self.door.next_deadline().map(|at| at.saturating_duration_since(Instant::now()));
            match inbox.wait_for(&fds, left)? {
                Wake::Signal => {
                    if let Some(status) = side.interrupted(inbox.was_ctrl_c(), output) {
                        return Ok(status);
                    }
                }
                Wake::Ready(0) => return side.wait(),
                Wake::Ready(index) => self.door.answer(index - 1)?,
                Wake::Message(_) | Wake::Timeout => {}
            }
            self.take_lanes(inbox)?;
            if self.core.outcome().is_some() {
                output.tell(&Event::Remark(Remark::SourceTold));
                drop(self);
                return side.outlive(inbox, output);
            }
        }
    }

    /// Handles new connections.
    fn take_lanes(&mut self, inbox: &Inbox<InboxMessage>) -> Result<()> {
        self.door.forget_late(Instant::now());
        self.lanes = self.door.whole();
        let news = if self.lanes.is_some() { Input::Came } else { Input::Tick };
        let fed = self.feed(news, inbox);
        self.lanes = None;
        fed
    }

    /// Passes an event to the core, and carries out the effects and their results.
    fn feed(&mut self, input: Input, inbox: &Inbox<InboxMessage>) -> Result<()> {
        let mut talk = self.lanes.as_ref().map(|lanes| Talk::new(&lanes.demand, &self.word, inbox));
        let mut next = Some(input);
        while let Some(input) = next.take() {
            for effect in self.core.handle(input, Instant::now()) {
                match (effect, &mut talk) {
                    (Effect::Forget, _) => self.keeper.remove(),
                    (_, None) => {}
                    (Effect::Tell, Some(talk)) => next = Some(talk.notify(&self.word)?),
                    (Effect::Hear, Some(talk)) => next = Some(talk.hear_goodbye()?),
                    (Effect::Answer, Some(talk)) => {
                        talk.answer()?;
                        next = Some(Input::Closed);
                    }
                }
            }
        }
        Ok(())
    }
}

/// The exchange on a new demand lane.
struct Talk<'a> {
    lane: &'a Lane,
    seal: Seal,
    /// None if the lane's end is the only possible answer.
    receiver: Option<Receiver>,
    inbox: &'a Inbox<InboxMessage>,
}

impl<'a> Talk<'a> {
    fn new(lane: &'a Lane, word: &Word, inbox: &'a Inbox<InboxMessage>) -> Talk<'a> {
        let receiver = match word {
            Word::Complete { landing, .. } => {
                Some(Receiver::for_resumed_destination(landing).checked(lane.is_checked()))
            }
            Word::Failed(_) => None,
        };
        Talk { lane, seal: Seal::new(lane.is_checked()), receiver, inbox }
    }

    fn notify(&mut self, word: &Word) -> Result<Input> {
        match word {
            Word::Complete { standing, landing } => {
                let is_told = self.tell_all(standing, landing)?;
                Ok(if is_told { Input::Told } else { Input::NotTold })
            }
            Word::Failed(error) => {
                lane::tell(&self.lane.socket(), self.lane.is_checked(), error);
                Ok(Input::Told)
            }
        }
    }

    /// Sends this side's state, that every page is cached, and the completion. False if the source has closed the lane
    /// or does not read.
    fn tell_all(&mut self, standing: &Standing, landing: &RegionTable) -> Result<bool> {
        let until = Instant::now() + READ_PATIENCE;
        let have =
            resume::have_ranges(landing).map(|range| Frame::Have { range, words: all(range) });
        let first = std::iter::once(Frame::Resume(*standing));
        for frame in first.chain(have).chain([Frame::Complete(standing.totals)]) {
            if !self.send(&frame, until)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Receives the source's confirmation that it recorded the completion. A source that compares digests first may
    /// take longer than the wait, and dials again then.
    fn hear_goodbye(&mut self) -> Result<Input> {
        let until = Instant::now() + CLOSE_PATIENCE;
        let has_word = self.receiver.is_some();
        while let Some(event) = self.receive(until)? {
            // A refused source does not reconnect for the answer.
            if let Received::Complete(_) | Received::Error(_) = event {
                return Ok(Input::Parted);
            }
        }
        Ok(if has_word { Input::Closed } else { Input::Parted })
    }

    /// Confirms the goodbye, and lets the source close the lane.
    fn answer(&mut self) -> Result<()> {
        let until = Instant::now() + CLOSE_PATIENCE;
        while let Some(event) = self.receive(until)? {
            if let Received::Ping(number) = event
                && !self.send(&Frame::Pong(number), until)?
            {
                return Ok(());
            }
        }
        Ok(())
    }

    fn send(&mut self, frame: &Frame, until: Instant) -> Result<bool> {
        let mut bytes = Vec::new();
        transmit::encode(frame, &mut bytes);
        self.seal.frames(&mut bytes);
        send_all(self.lane, &bytes, until, self.inbox)
    }

    /// The source's next frame; None at the lane's end, at the deadline, and after an interrupt. Frames are read in any
    /// case: closing a socket with unread data sends RST and discards data in flight.
    fn receive(&mut self, until: Instant) -> Result<Option<Received>> {
        let mut buffer = vec![0; 4096];
        loop {
            let exact = match &mut self.receiver {
                None => buffer.len(),
                Some(receiver) => {
                    if let Some(event) = receiver.poll_event() {
                        return Ok(Some(event));
                    }
                    match receiver.next_target() {
                        Target::Control { exact } => exact.min(buffer.len()),
                        // A page without a demand.
                        _ => return Ok(None),
                    }
                }
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // Bounds a source that keeps sending.
                return Ok(None);
            }
            let socket = self.lane.as_fd();
            match self.inbox.wait_for(&[(socket, PollFlags::POLLIN)], Some(left))? {
                Wake::Ready(_) | Wake::Message(_) => {}
                Wake::Timeout | Wake::Signal => return Ok(None),
            }
            let flags = MsgFlags::MSG_DONTWAIT;
            match (recv(socket.as_raw_fd(), &mut buffer[..exact], flags), &mut self.receiver) {
                (Ok(0), _) => return Ok(None),
                (Ok(count), Some(receiver)) => {
                    if receiver.control(&buffer[..count]).is_err() {
                        return Ok(None);
                    }
                }
                (Ok(_), None) | (Err(Errno::EAGAIN | Errno::EINTR), _) => {}
                (Err(_), _) => return Ok(None),
            }
        }
    }
}

/// A bit for each page, as in a have frame.
fn all(range: PageRange) -> Vec<u64> {
    let mut words =
        vec![u64::MAX; usize::try_from(range.pages.div_ceil(64)).expect("the words fit a frame")];
    if let Some(last) = words.last_mut().filter(|_| !range.pages.is_multiple_of(64)) {
        *last >>= 64 - range.pages % 64;
    }
    words
}

fn send_all(
    lane: &Lane,
    bytes: &[u8],
    until: Instant,
    inbox: &Inbox<InboxMessage>,
) -> Result<bool> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(lane.as_fd().as_raw_fd(), rest, flags) {
            Ok(count) => rest = &rest[count..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                let left = until.saturating_duration_since(Instant::now());
                match inbox.wait_for(&[(lane.as_fd(), PollFlags::POLLOUT)], Some(left))? {
                    Wake::Ready(_) | Wake::Message(_) => {}
                    Wake::Timeout | Wake::Signal => return Ok(false),
                }
            }
            Err(_) => return Ok(false),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use umem_wire::RegionId;

    #[test]
    fn range_sets_exactly_the_bits_of_its_pages() {
        for pages in [1, 63, 64, 65, 128, 200] {
            let words = all(PageRange { region: RegionId(0), first: 0, pages });
            let ones: u32 = words.iter().map(|word| word.count_ones()).sum();
            assert_eq!((words.len() as u64, u64::from(ones)), (pages.div_ceil(64), pages));
            let last = words.last().unwrap().trailing_ones();
            assert_eq!(u64::from(last), (pages - 1) % 64 + 1);
        }
    }
}
