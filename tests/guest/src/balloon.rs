//! Memory that the guest gives back to the host, through QEMU's virtio balloon: pages go into the balloon, or are
//! reported as free. They must read as zeroes then, and all others as written.

use crate::memory::{Wrong, mix};
use crate::virtio::{self, DEVICE_WRITES, PAGE_SIZE, Queue, frames_of, map, neighbours};

const WORDS: usize = PAGE_SIZE / size_of::<u64>();

/// Besides the ballooned pages: those of the queues.
const RING_PAGES: usize = 256;

/// The device's number on the PCI bus.
const DEVICE: &str = "0x1002";

const FEATURE_REPORTING: u32 = 1 << 5;

// Queues of the device; the last one as long as it has no hints about free pages.
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const REPORT: u16 = 3;

/// Memory that goes to the host and comes back, page by page.
pub(crate) struct Balloon {
    port: u16,
    /// The pages, then those of the queues.
    memory: *mut u8,
    /// Their physical numbers.
    frames: Vec<u64>,
    /// One a page: its last written generation.
    generations: Vec<u64>,
    inflate: Queue,
    deflate: Queue,
    report: Queue,
    /// A page for the contents of a queue's descriptor.
    message: usize,
    seed: u64,
}

impl Balloon {
    /// Of `mib` MiB, all written.
    pub(crate) fn new(mib: u64, seed: u64) -> Result<Balloon, String> {
        let port = virtio::find_device(DEVICE)?;
        let pages = mib as usize * (1 << 20) / PAGE_SIZE;
        let memory = map(pages + RING_PAGES)?;
        let frames = frames_of(memory, pages + RING_PAGES)?;
        let mut rings = neighbours(&frames, pages);
        let mut queue = |number| {
            let (ours, theirs) =
                rings.next().ok_or("no pages for a queue that lie side by side")?;
            // SAFETY: pages of the mapping.
            let at = |page: usize| unsafe { memory.add(page * PAGE_SIZE) };
            Ok::<_, String>(Queue::new(number, at(ours), at(theirs)))
        };
        let (inflate, deflate, report) = (queue(INFLATE)?, queue(DEFLATE)?, queue(REPORT)?);
        let (message, _) = rings.next().ok_or("no page for messages")?;
        let generations = vec![0; pages];
        let mut balloon =
            Balloon { port, memory, frames, generations, inflate, deflate, report, message, seed };
        balloon.start()?;
        (0..pages).for_each(|page| balloon.write(page));
        Ok(balloon)
    }

    pub(crate) fn pages(&self) -> u64 {
        self.generations.len() as u64
    }

    /// Gives a page back, checks its contents in the guest if they are zeroes then, and takes it again.
    pub(crate) fn give(
        &mut self,
        page: u64,
        is_reported: bool,
        is_zeroes: bool,
    ) -> Result<(), Wrong> {
        let page = page as usize;
        let frame = self.frames[page];
        if is_reported {
            self.report.send(self.port, frame << 12, PAGE_SIZE as u32, DEVICE_WRITES);
        } else {
            self.tell(frame);
            self.inflate.send(self.port, self.frames[self.message] << 12, 4, 0);
        }
        let result = if is_zeroes { self.compare(page, |_| 0) } else { Ok(()) };
        if !is_reported {
            self.tell(frame);
            self.deflate.send(self.port, self.frames[self.message] << 12, 4, 0);
        }
        self.generations[page] += 1;
        self.write(page);
        result
    }

    /// Checks a page that has not been given back since it was written.
    pub(crate) fn check(&self, page: u64) -> Result<(), Wrong> {
        let base = self.base(page as usize);
        self.compare(page as usize, |word| base ^ word)
    }

    fn compare(&self, page: usize, expected: impl Fn(u64) -> u64) -> Result<(), Wrong> {
        let mut wrong: Option<Wrong> = None;
        for word in 0..WORDS {
            // SAFETY: a word of the mapping; volatile, as the device changes it too.
            let got = unsafe { self.words(page).add(word).read_volatile() };
            let want = expected(word as u64);
            if got != want {
                wrong.get_or_insert(Wrong { word: word as u64, want, got, count: 0 }).count += 1;
            }
        }
        wrong.map_or(Ok(()), Err)
    }

    fn write(&mut self, page: usize) {
        let base = self.base(page);
        for word in 0..WORDS {
            // SAFETY: as above.
            unsafe { self.words(page).add(word).write_volatile(base ^ word as u64) };
        }
    }

    fn base(&self, page: usize) -> u64 {
        mix(self.seed ^ mix(page as u64) ^ self.generations[page]) | 1 << 63
    }

    fn words(&self, page: usize) -> *mut u64 {
        // SAFETY: a page of the mapping.
        unsafe { self.memory.add(page * PAGE_SIZE).cast() }
    }

    fn tell(&self, frame: u64) {
        // SAFETY: the message's page, which has no other user.
        unsafe { self.words(self.message).cast::<u32>().write_volatile(frame as u32) };
    }

    fn start(&mut self) -> Result<(), String> {
        let (memory, frames) = (self.memory as usize, &self.frames);
        let frame_of = |page: *mut u8| frames[(page as usize - memory) / PAGE_SIZE];
        let queues = &mut [&mut self.inflate, &mut self.deflate, &mut self.report];
        virtio::start(self.port, FEATURE_REPORTING, queues, frame_of)
    }
}
