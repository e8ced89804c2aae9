//! Private memory: pages that have landed in the file become anonymous pages of the guest, and the file frees them.
//!
//! One thread, one ring. For each landed run it makes the pages visible in the guest (data from the file, the rest as
//! zeroes). Then it asks the guest's process to *touch* them (`touch ADDRESS LENGTH` on the hand-over socket), which
//! copies each page into the process's own memory. After the answer it releases the file's pages with MADV_REMOVE. A
//! block leaves its userfaultfd with its last page released: until then a discard by the guest is reported, and the
//! file's page is freed with it, so that no mapping can fall back to it.
//!
//! With `--postcopy-flags 0` the guest's process is asked only at the end, when every page has arrived: until then the
//! guest's own accesses touch pages, and the file keeps everything.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use serde::Deserialize;
use umem_ring::{
    Bytes, Completion, Config, Fd, Memory, Op, Outcome, Ring, TOKEN_WAKE, Wait, Waker,
};
use umem_wire::{PageRange, RegionId};

use super::{GuestMemory, GuestRegion, PageId, RETRY_INTERVAL, SHORTAGE_INTERVAL};
use crate::destination::InboxMessage;
use crate::error::{Error, Result};
use crate::memory::block_pages;
use crate::memory::claims::RunKind;
use crate::runtime::cores::Place;
use crate::runtime::inbox::Post;
use crate::runtime::panics;
use crate::runtime::worker::Started;

const TOKEN_RECEIVED: u64 = 0;
const TOKEN_SENT: u64 = 1;
const TOKEN_RETRY: u64 = 2;
/// The release of entry `i` of the table has this token plus `i`.
const TOKEN_RELEASED: u64 = 16;

/// The most bytes of unanswered touch requests: enough to keep the guest's process busy while answers are in flight.
const ASKED_BYTES_MAX: u64 = 8 << 20;

/// Releases in flight.
const RELEASES_MAX: usize = 64;

/// Answers taken with one receive.
const RECEIVE_BYTES: usize = 4096;

/// The longest valid answer.
const ANSWER_BYTES_MAX: usize = 1024;

/// The queue from lanes to the touch thread.
pub(crate) struct TouchQueue {
    sender: Sender<Work>,
    waker: Waker,
    /// The eventfd is signalled and the thread has not read it.
    is_woken: Arc<AtomicBool>,
    eager: bool,
}

enum Work {
    Landed(PageRange, RunKind),
    /// Every page has arrived: touch the rest.
    Rest,
    End,
}

impl TouchQueue {
    /// A run has landed, its pages are cached.
    pub(crate) fn landed(&self, range: PageRange, kind: RunKind) {
        self.send(Work::Landed(range, kind));
    }

    /// Touch and release pages as they arrive, not only at the end.
    pub(crate) fn is_eager(&self) -> bool {
        self.eager
    }

    fn send(&self, work: Work) {
        // If the thread has ended, its own message carries the reason.
        let _ = self.sender.send(work);
        if !self.is_woken.swap(true, SeqCst) {
            self.waker.wake();
        }
    }
}

/// The control thread's handle of the touch thread.
pub(crate) struct Toucher {
    sender: Sender<Work>,
    waker: Waker,
}

impl Toucher {
    /// Every page has arrived.
    pub(crate) fn touch_the_rest(&self) {
        let _ = self.sender.send(Work::Rest);
        self.waker.wake();
    }

    pub(crate) fn end(&self) {
        let _ = self.sender.send(Work::End);
        self.waker.wake();
    }
}

/// The parts of the thread.
pub(crate) struct TouchThread {
    pub(crate) guest: Arc<GuestMemory>,
    /// The hand-over socket; no other thread reads it meanwhile.
    pub(crate) socket: OwnedFd,
    /// Touch as pages arrive.
    pub(crate) eager: bool,
    pub(crate) core: Place,
    pub(crate) post: Post<InboxMessage>,
}

/// The handles for other threads, before the thread runs.
pub(crate) struct Ways {
    sender: Sender<Work>,
    is_woken: Arc<AtomicBool>,
}

/// Makes the thread's end and the other threads' ends.
pub(crate) fn ways() -> (TouchReceiver, Ways) {
    let (sender, receiver) = channel();
    let is_woken = Arc::new(AtomicBool::new(false));
    (TouchReceiver { receiver, is_woken: is_woken.clone() }, Ways { sender, is_woken })
}

impl Ways {
    /// For the lanes and for the control thread, once the thread runs.
    pub(crate) fn reach(self, waker: Waker, eager: bool) -> (TouchQueue, Toucher) {
        let Ways { sender, is_woken } = self;
        let toucher = Toucher { sender: sender.clone(), waker: waker.clone() };
        (TouchQueue { sender, waker, is_woken, eager }, toucher)
    }
}

/// The receiving end of the thread's work.
pub(crate) struct TouchReceiver {
    receiver: Receiver<Work>,
    is_woken: Arc<AtomicBool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Touched {
        touched: u64,
        size: u64,
    },
    Failed {
        error: String,
        #[serde(default)]
        text: String,
    },
}

/// A range that the guest's process has been asked to touch, at these addresses.
struct Asked {
    range: PageRange,
    address: u64,
    len: u64,
}

struct TouchState {
    guest: Arc<GuestMemory>,
    socket: Fd,
    eager: bool,
    post: Post<InboxMessage>,
    /// Landed and not visible yet.
    hidden: VecDeque<(PageRange, RunKind)>,
    /// Visible data that is touched next.
    ready: VecDeque<PageRange>,
    /// Visible data that is touched at the end.
    later: Later,
    asked: VecDeque<Asked>,
    asked_bytes: u64,
    /// Being released.
    releasing: Vec<Option<PageRange>>,
    /// Touched, and waiting for a free entry of `releasing`.
    touched: VecDeque<PageRange>,
    commands: Vec<u8>,
    sending: bool,
    answers: Vec<u8>,
    retry_armed: bool,
    pages_left: u64,
    touch_rest: bool,
    ended: bool,
}

/// Pages to touch at the end: one bit each, because they may be all of the guest's.
#[derive(Default)]
struct Later {
    /// By region.
    bits: Vec<Vec<u64>>,
    /// The position of the search for the next pages.
    region: usize,
    page: u64,
}

impl Later {
    fn new(guest: &GuestMemory) -> Later {
        let words = |region: &GuestRegion| {
            let pages = region.bytes >> region.unit_shift();
            vec![0; usize::try_from(pages.div_ceil(64)).expect("page state is in memory")]
        };
        Later { bits: guest.regions.iter().map(words).collect(), region: 0, page: 0 }
    }

    fn add(&mut self, range: PageRange) {
        let bits = &mut self.bits[usize::from(range.region.0)];
        for page in range.first..range.first + range.pages {
            bits[index(page / 64)] |= 1 << (page % 64);
        }
    }

    /// The next run, within one block; returns every page once.
    fn take(&mut self, guest: &GuestMemory) -> Option<PageRange> {
        while let Some(bits) = self.bits.get_mut(self.region) {
            let shift = guest.regions[self.region].unit_shift();
            let block_pages = block_pages(shift);
            let end = guest.regions[self.region].bytes >> shift;
            let is_set = |page: u64| bits[index(page / 64)] >> (page % 64) & 1 == 1;
            let first = (self.page..end).find(|&page| is_set(page));
            let Some(first) = first else {
                (self.region, self.page) = (self.region + 1, 0);
                continue;
            };
            let block_end = end.min((first / block_pages + 1) * block_pages);
            let after = (first..block_end).find(|&page| !is_set(page)).unwrap_or(block_end);
            self.page = after;
            let region = RegionId(u16::try_from(self.region).expect("at most 256 regions"));
            return Some(PageRange { region, first, pages: after - first });
        }
        None
    }
}

fn index(word: u64) -> usize {
    usize::try_from(word).expect("page state is in memory, so its index fits")
}

impl TouchThread {
    /// Serves until it is ordered to end.
    pub(crate) fn run(self, work: TouchReceiver, started: Started<Waker>) -> Result<()> {
        let mut ring = Ring::new(&Config {
            name: "touch".into(),
            core: self.core.enter(),
            ..Config::default()
        })?;
        started.with(ring.waker()?);
        let pages_left = self
            .guest
            .regions
            .iter()
            .filter(|region| region.memory.kind.needs_touch())
            .map(|region| region.bytes >> region.unit_shift())
            .sum();
        let later = if self.eager { Later::default() } else { Later::new(&self.guest) };
        let mut thread = TouchState {
            guest: self.guest,
            socket: Fd::from(Arc::new(self.socket)),
            eager: self.eager,
            post: self.post,
            hidden: VecDeque::new(),
            ready: VecDeque::new(),
            later,
            asked: VecDeque::new(),
            asked_bytes: 0,
            releasing: std::iter::repeat_with(|| None).take(RELEASES_MAX).collect(),
            touched: VecDeque::new(),
            commands: Vec::new(),
            sending: false,
            answers: Vec::new(),
            retry_armed: false,
            pages_left,
            touch_rest: false,
            ended: false,
        };
        thread.receive(&mut ring, Bytes::with_capacity(RECEIVE_BYTES))?;
        loop {
            ring.enter(Wait::One)?;
            panics::point(format_args!("touch"));
            while let Some(completion) = ring.next() {
                thread.completed(&mut ring, completion)?;
            }
            work.is_woken.store(false, SeqCst);
            while let Ok(work) = work.receiver.try_recv() {
                match work {
                    Work::Landed(range, kind) => thread.hidden.push_back((range, kind)),
                    Work::Rest => thread.touch_rest = true,
                    Work::End => thread.ended = true,
                }
            }
            if thread.ended {
                return Ok(());
            }
            thread.advance(&mut ring)?;
        }
    }
}

impl TouchState {
    fn advance(&mut self, ring: &mut Ring) -> Result<()> {
        self.show(ring)?;
        self.release(ring)?;
        self.ask();
        self.send(ring)
    }

    /// Makes landed pages visible.
    fn show(&mut self, ring: &mut Ring) -> Result<()> {
        while let Some((range, kind)) = self.hidden.pop_front() {
            let done = match self.guest.show_private(range, kind) {
                // Pages already visible are skipped next time.
                Err(Error::OutOfMemory(why)) => {
                    self.guest.cannot_show(&why);
                    self.hidden.push_front((range, kind));
                    return self.arm_retry(ring, SHORTAGE_INTERVAL);
                }
                shown => shown?,
            };
            let shown = PageRange { pages: done, ..range };
            if done > 0 && kind == RunKind::Data {
                self.push_ready(shown);
            } else if done > 0 {
                self.guest.complete(shown)?;
                self.completed_pages(done);
            }
            if done < range.pages {
                let rest =
                    PageRange { first: range.first + done, pages: range.pages - done, ..range };
                self.hidden.push_front((rest, kind));
                return self.arm_retry(ring, RETRY_INTERVAL);
            }
        }
        Ok(())
    }

    /// Touches neighbouring pages together, within a block.
    fn push_ready(&mut self, range: PageRange) {
        if !self.eager {
            self.later.add(range);
            return;
        }
        let shift = self.guest.region(range.region).unit_shift();
        let pages_max = block_pages(shift);
        if let Some(last) = self.ready.back_mut()
            && last.region == range.region
            && last.first + last.pages == range.first
            && last.pages + range.pages <= pages_max
        {
            last.pages += range.pages;
            return;
        }
        self.ready.push_back(range);
    }

    fn ask(&mut self) {
        // At the end everything is visible before the first page is touched.
        let is_time = self.eager || (self.touch_rest && self.hidden.is_empty());
        if !is_time {
            return;
        }
        while self.asked_bytes < ASKED_BYTES_MAX
            && let Some(range) = self.ready.pop_front().or_else(|| self.later.take(&self.guest))
        {
            let guest = self.guest.clone();
            let region = guest.region(range.region);
            let start = region.byte_offset(range.first);
            let end = start + region.byte_offset(range.pages);
            let mut first = range.first;
            for (_, address, len) in region.pieces(start..end) {
                let pages = len >> region.unit_shift();
                let piece = PageRange { first, pages, ..range };
                first += pages;
                self.commands.extend_from_slice(format!("touch {address} {len}\n").as_bytes());
                self.asked.push_back(Asked { range: piece, address, len });
                self.asked_bytes += len;
            }
        }
    }

    fn send(&mut self, ring: &mut Ring) -> Result<()> {
        if self.sending || self.commands.is_empty() {
            return Ok(());
        }
        self.sending = true;
        let bytes = std::mem::take(&mut self.commands);
        ring.submit(Op::send(self.socket.clone(), bytes).wait_all(), TOKEN_SENT)
            .map_err(|rejected| Error::Ring(rejected.error))?;
        ring.enter(Wait::No)?;
        Ok(())
    }

    fn receive(&self, ring: &mut Ring, buffer: Bytes) -> Result<()> {
        ring.submit(Op::recv(self.socket.clone(), buffer), TOKEN_RECEIVED)
            .map_err(|rejected| Error::Ring(rejected.error))?;
        Ok(())
    }

    fn completed(&mut self, ring: &mut Ring, completion: Completion) -> Result<()> {
        match completion.token {
            TOKEN_WAKE => Ok(()),
            TOKEN_RETRY => {
                self.retry_armed = false;
                Ok(())
            }
            TOKEN_SENT => {
                self.sending = false;
                // The end of the guest's process is detected elsewhere.
                Ok(())
            }
            TOKEN_RECEIVED => {
                let (Outcome::Done(count @ 1..), Some(Memory::Bytes(buffer))) =
                    (completion.outcome, completion.memory)
                else {
                    // As above.
                    return Ok(());
                };
                self.answers.extend_from_slice(&buffer.as_slice()[..count as usize]);
                self.receive(ring, buffer)?;
                self.read_answers()
            }
            token => {
                let entry = usize::try_from(token - TOKEN_RELEASED).expect("our own token");
                let range = self.releasing[entry].take().expect("released once");
                match completion.outcome {
                    Outcome::Done(_) => {
                        self.guest.released(range)?;
                        self.completed_pages(range.pages);
                        Ok(())
                    }
                    other => Err(Error::Host(format!("releasing touched pages: {other:?}"))),
                }
            }
        }
    }

    fn read_answers(&mut self) -> Result<()> {
        while let Some(end) = self.answers.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.answers.drain(..=end).collect();
            let strange = || {
                let text = String::from_utf8_lossy(&line).trim().to_owned();
                Error::Preload(format!("invalid answer to a touch request: {text}"))
            };
            match serde_json::from_slice(&line).map_err(|_| strange())? {
                Answer::Failed { error, text } => {
                    let asked = self.asked.pop_front().ok_or_else(strange)?;
                    self.asked_bytes -= asked.len;
                    if !self.take_unmapped(asked.range)? {
                        return Err(Error::Preload(format!(
                            "the guest's process could not touch its pages: {text} ({error})"
                        )));
                    }
                }
                Answer::Touched { touched, size } => {
                    let asked = self.asked.pop_front().ok_or_else(strange)?;
                    if (asked.address, asked.len) != (touched, size) {
                        return Err(strange());
                    }
                    self.asked_bytes -= asked.len;
                    self.touched.push_back(asked.range);
                }
            }
        }
        if self.answers.len() > ANSWER_BYTES_MAX {
            return Err(Error::Preload("the answer to a touch request has no newline".into()));
        }
        Ok(())
    }

    /// Of a range that could not be touched, pages that are no longer mapped are done; the rest is requested once more,
    /// page by page. False if all of the range is mapped: the failure has another cause.
    fn take_unmapped(&mut self, range: PageRange) -> Result<bool> {
        let pages = range.first..range.first + range.pages;
        let mut still_mapped = Vec::new();
        let mut any_unmapped = false;
        for page in pages {
            let one = PageRange { first: page, pages: 1, ..range };
            match self.guest.is_unmapped(PageId { region: range.region, page })? {
                true => {
                    any_unmapped = true;
                    self.touched.push_back(one);
                }
                false => still_mapped.push(one),
            }
        }
        if any_unmapped {
            self.ready.extend(still_mapped);
        }
        Ok(any_unmapped)
    }

    /// Releases touched pages.
    fn release(&mut self, ring: &mut Ring) -> Result<()> {
        while let Some(entry) = self.releasing.iter().position(Option::is_none)
            && let Some(range) = self.touched.pop_front()
        {
            let region = self.guest.region(range.region);
            let offset = region.byte_offset(range.first);
            let span = region.file().span(offset, region.byte_offset(range.pages));
            ring.submit(Op::madvise(span, libc::MADV_REMOVE), TOKEN_RELEASED + entry as u64)
                .map_err(|rejected| Error::Ring(rejected.error))?;
            self.releasing[entry] = Some(range);
        }
        Ok(())
    }

    fn completed_pages(&mut self, pages: u64) {
        self.pages_left -= pages;
        if self.pages_left == 0 {
            self.post.send(InboxMessage::AllReleased);
        }
    }

    fn arm_retry(&mut self, ring: &mut Ring, interval: Duration) -> Result<()> {
        if !self.retry_armed {
            self.retry_armed = true;
            ring.submit(Op::timeout(interval), TOKEN_RETRY)
                .map_err(|rejected| Error::Ring(rejected.error))?;
        }
        Ok(())
    }
}
