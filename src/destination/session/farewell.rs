//! What a source is told that comes when its guest does not need it any more.
//!
//! The guest has all of its memory, or has ended, and the source has not heard of it: its process was killed,
//! or the network was gone for too long. One that is resumed then would look for this side for ever, as it
//! must not give up pages that a guest may need. So somebody has to be here when it comes: the umem that
//! has received the guest, as long as it stays for its guest's sake; after that who resumes the
//! session, whose record stays until the source has been told.

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, recv, send};
use umem_wire::{
    Event as Heard, Frame, PageRange, Receiver, RegionTable, Seal, Standing, Target, resume,
    transmit,
};

use crate::control::destination::farewell::{Effect, Farewell as Core, Input};
use crate::destination::Note;
use crate::destination::admission::accept::{LaneAcceptor, Lanes};
use crate::destination::side::GuestSide;
use crate::error::{Error, Result};
use crate::events::{Event, Remark};
use crate::observe::output::Output;
use crate::runtime::inbox::{Inbox, Wake};
use crate::session::{DestinationRecord, SessionFile};
use crate::transport::lane::{self, Lane};

/// How long a source may take to read what it is told, and then to close its lanes.
const READ_PATIENCE: Duration = Duration::from_secs(30);
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// A session of which only the source does not know that it is over.
pub(in crate::destination) struct CompletionNotifier {
    core: Core,
    door: LaneAcceptor,
    word: Word,
    /// Whose record goes as soon as the source knows.
    keeper: SessionFile<DestinationRecord>,
    /// Lanes that have come in, as long as they are of use.
    lanes: Option<Lanes>,
}

/// What it is told.
pub(in crate::destination) enum Word {
    /// Every page has come: where this side stands, and the pages there are.
    Complete { standing: Standing, landing: RegionTable },
    /// Nothing will go on.
    Failed(Error),
}

impl CompletionNotifier {
    /// For a source that comes until then, or at any time.
    pub(in crate::destination) fn new(
        mut door: LaneAcceptor,
        word: Word,
        keeper: SessionFile<DestinationRecord>,
        until: Option<Instant>,
    ) -> CompletionNotifier {
        door.set_refusal(None);
        CompletionNotifier { core: Core::new(until), door, word, keeper, lanes: None }
    }

    /// Waits for the source to come. False if it does not, or somebody interrupts.
    pub(in crate::destination) fn wait(&mut self, inbox: &Inbox<Note>) -> Result<bool> {
        loop {
            let next = self.door.next_deadline().into_iter().chain(self.core.deadline()).min();
            let left = next.map(|at| at.saturating_duration_since(Instant::now()));
            match inbox.wait_for(&self.door.fds(), left)? {
                Wake::Signal => self.feed(Input::Interrupt, inbox)?,
                Wake::Ready(index) => self.door.answer(index)?,
                Wake::Message(_) | Wake::Timeout => {}
            }
            self.look(inbox)?;
            if let Some(is_told) = self.core.outcome() {
                return Ok(is_told);
            }
        }
    }

    /// Stays as long as the guest's process runs, which is a child, and tells the source if it comes
    /// meanwhile. The exit status is the process's, as of [`GuestSide::outlive`].
    pub(in crate::destination) fn stay(
        mut self,
        side: &mut GuestSide,
        inbox: &Inbox<Note>,
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
            self.look(inbox)?;
            if self.core.outcome().is_some() {
                output.tell(&Event::Remark(Remark::SourceTold));
                drop(self);
                return side.outlive(inbox, output);
            }
        }
    }

    /// Looks at who has come in.
    fn look(&mut self, inbox: &Inbox<Note>) -> Result<()> {
        self.door.forget_late(Instant::now());
        self.lanes = self.door.whole();
        let news = if self.lanes.is_some() { Input::Came } else { Input::Tick };
        let fed = self.feed(news, inbox);
        self.lanes = None;
        fed
    }

    /// Has the core handle this, and whatever comes of what it has done.
    fn feed(&mut self, input: Input, inbox: &Inbox<Note>) -> Result<()> {
        let mut talk = self.lanes.as_ref().map(|lanes| Talk::new(&lanes.demand, &self.word, inbox));
        let mut next = Some(input);
        while let Some(input) = next.take() {
            for effect in self.core.handle(input, Instant::now()) {
                match (effect, &mut talk) {
                    (Effect::Forget, _) => self.keeper.remove(),
                    (_, None) => {}
                    (Effect::Tell, Some(talk)) => next = Some(talk.tell(&self.word)?),
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

/// What is said and heard on a new demand lane.
struct Talk<'a> {
    lane: &'a Lane,
    seal: Seal,
    /// None where nothing but the lane's end is an answer.
    receiver: Option<Receiver>,
    inbox: &'a Inbox<Note>,
}

impl<'a> Talk<'a> {
    fn new(lane: &'a Lane, word: &Word, inbox: &'a Inbox<Note>) -> Talk<'a> {
        let receiver = match word {
            Word::Complete { landing, .. } => {
                Some(Receiver::for_resumed_destination(landing).checked(lane.is_checked()))
            }
            Word::Failed(_) => None,
        };
        Talk { lane, seal: Seal::new(lane.is_checked()), receiver, inbox }
    }

    fn tell(&mut self, word: &Word) -> Result<Input> {
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

    /// Says where this side stands, that it has every page, and that this is all. False if the source has gone
    /// meanwhile, or does not read.
    fn tell_all(&mut self, standing: &Standing, landing: &RegionTable) -> Result<bool> {
        let until = Instant::now() + READ_PATIENCE;
        let have =
            resume::have_ranges(landing).map(|range| Frame::Have { range, words: all(range) });
        let first = std::iter::once(Frame::Resume(*standing));
        for frame in first.chain(have).chain([Frame::Complete(standing.totals)]) {
            if !self.say(&frame, until)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Hears whether the source has written down what it was told. One that compares memory before may need longer
    /// than it is waited for, and dials again then.
    fn hear_goodbye(&mut self) -> Result<Input> {
        let until = Instant::now() + CLOSE_PATIENCE;
        let has_word = self.receiver.is_some();
        while let Some(event) = self.hear(until)? {
            // What it says in the second case it will not come back for.
            if let Heard::Complete(_) | Heard::Error(_) = event {
                return Ok(Input::Parted);
            }
        }
        Ok(if has_word { Input::Closed } else { Input::Parted })
    }

    /// Says that the goodbye has come, and lets the source close the lane.
    fn answer(&mut self) -> Result<()> {
        let until = Instant::now() + CLOSE_PATIENCE;
        while let Some(event) = self.hear(until)? {
            if let Heard::Ping(number) = event
                && !self.say(&Frame::Pong(number), until)?
            {
                return Ok(());
            }
        }
        Ok(())
    }

    fn say(&mut self, frame: &Frame, until: Instant) -> Result<bool> {
        let mut bytes = Vec::new();
        transmit::encode(frame, &mut bytes);
        self.seal.frames(&mut bytes);
        send_all(self.lane, &bytes, until, self.inbox)
    }

    /// What the source says next; none at the lane's end, when the time is up, and where somebody interrupts. What it
    /// says is read in any case: a connection that is closed over what was not read is reset, and what was said on it
    /// could be lost.
    fn hear(&mut self, until: Instant) -> Result<Option<Heard>> {
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
                        // A page that nobody has asked for.
                        _ => return Ok(None),
                    }
                }
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // However much it still says.
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

/// A bit for each page, as a have frame has them.
fn all(range: PageRange) -> Vec<u64> {
    let mut words =
        vec![u64::MAX; usize::try_from(range.pages.div_ceil(64)).expect("they fit a frame")];
    if let Some(last) = words.last_mut().filter(|_| !range.pages.is_multiple_of(64)) {
        *last >>= 64 - range.pages % 64;
    }
    words
}

fn send_all(lane: &Lane, bytes: &[u8], until: Instant, inbox: &Inbox<Note>) -> Result<bool> {
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
