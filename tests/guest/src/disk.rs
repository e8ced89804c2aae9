//! Memory that QEMU fills by itself, from a virtio disk: several reads are under way all the while, each into a page of
//! its own. Pages that have been read must have the disk's contents.
//!
//! Page `n` of the disk has the words `mix(n) ^ w`, for each word's number `w`.

use crate::memory::{Wrong, mix};
use crate::virtio::{self, DEVICE_WRITES, GOES_ON, PAGE_SIZE, Queue, frames_of, map, neighbours};

/// The device's number on the PCI bus.
const DEVICE: &str = "0x1001";

const WORDS: u64 = (PAGE_SIZE / size_of::<u64>()) as u64;
const SECTORS_A_PAGE: u64 = PAGE_SIZE as u64 / 512;

/// Besides the pages that are read into: those of the queue.
const RING_PAGES: usize = 64;

/// Reads under way. Each has three descriptors: of its header, its page, and its status.
const READS: u16 = 16;
const HEADER_BYTES: u32 = 16;

/// In the page of headers: where the statuses begin.
const STATUSES: usize = 2048;

pub(crate) struct Disk {
    port: u16,
    queue: Queue,
    memory: *mut u8,
    frames: Vec<u64>,
    /// The page of headers and statuses.
    messages: usize,
    /// The page that each read goes to.
    targets: Vec<usize>,
    /// Of each page of memory: the page of the disk that it has, and whether it is being read.
    contents: Vec<(u64, bool)>,
    disk_pages: u64,
    /// Chains of the queue that have been looked at.
    taken: u16,
}

impl Disk {
    /// Memory of `mib` MiB, before a disk of as much.
    pub(crate) fn new(mib: u64) -> Result<Disk, String> {
        let port = virtio::find_device(DEVICE)?;
        let pages = mib as usize * (1 << 20) / PAGE_SIZE;
        let memory = map(pages + RING_PAGES)?;
        let frames = frames_of(memory, pages + RING_PAGES)?;
        let mut rings = neighbours(&frames, pages);
        let (ours, theirs) = rings.next().ok_or("no pages for a queue that lie side by side")?;
        let (messages, _) = rings.next().ok_or("no page for messages")?;
        // SAFETY: pages of the mapping.
        let at = |page: usize| unsafe { memory.add(page * PAGE_SIZE) };
        let mut queue = Queue::new(0, at(ours), at(theirs));
        let frame_of = |page: *mut u8| frames[(page as usize - memory as usize) / PAGE_SIZE];
        virtio::start(port, 0, &mut [&mut queue], frame_of)?;
        let targets = vec![0; usize::from(READS)];
        let contents = vec![(0, false); pages];
        let disk_pages = pages as u64;
        let mut disk =
            Disk { port, queue, memory, frames, messages, targets, contents, disk_pages, taken: 0 };
        // Every page has something of the disk.
        for page in 0..pages {
            disk.fill(page, page as u64);
        }
        Ok(disk)
    }

    pub(crate) fn pages(&self) -> u64 {
        self.contents.len() as u64
    }

    pub(crate) fn reads() -> u16 {
        READS
    }

    /// Begins read number `read`, which is not under way: of any page of the disk into a page that is not being read,
    /// both found by a random number.
    pub(crate) fn begin(&mut self, read: u16, random: u64) {
        let pages = self.contents.len();
        let mut target = random as usize % pages;
        while self.contents[target].1 {
            target = (target + 1) % pages;
        }
        let from = mix(random) % self.disk_pages;
        self.contents[target] = (from, true);
        self.targets[usize::from(read)] = target;
        let header = usize::from(read) * HEADER_BYTES as usize;
        // SAFETY: in the page of messages, the header of this read, which the device does not have: type 0 reads.
        unsafe {
            let header = self.at(self.messages).add(header);
            header.cast::<u64>().write_volatile(0);
            header.add(8).cast::<u64>().write_volatile(from * SECTORS_A_PAGE);
            self.at(self.messages).add(STATUSES + usize::from(read)).write_volatile(u8::MAX);
        }
        let messages = self.frames[self.messages] << 12;
        let [first, second, third] = [0, 1, 2].map(|part| read * 3 + part);
        self.queue.describe(first, (messages + header as u64, HEADER_BYTES), GOES_ON, second);
        let page = (self.frames[target] << 12, PAGE_SIZE as u32);
        self.queue.describe(second, page, GOES_ON | DEVICE_WRITES, third);
        let status = messages + STATUSES as u64 + u64::from(read);
        self.queue.describe(third, (status, 1), DEVICE_WRITES, 0);
        self.queue.submit(self.port, first);
    }

    /// A read that has ended since the last call, and what it has brought.
    pub(crate) fn end(&mut self) -> Option<(u16, Result<(), Wrong>)> {
        if self.queue.used() == self.taken {
            return None;
        }
        let read = self.queue.used_at(self.taken) / 3;
        self.taken = self.taken.wrapping_add(1);
        let target = self.targets[usize::from(read)];
        self.contents[target].1 = false;
        // SAFETY: the status of this read.
        let status =
            unsafe { self.at(self.messages).add(STATUSES + usize::from(read)).read_volatile() };
        let wrong = Wrong { word: 0, want: 0, got: u64::from(status), count: 1 };
        Some((read, if status == 0 { self.compare(target) } else { Err(wrong) }))
    }

    /// Checks a page, unless it is being read.
    pub(crate) fn check(&self, page: u64) -> Result<(), Wrong> {
        match self.contents[page as usize] {
            (_, true) => Ok(()),
            (_, false) => self.compare(page as usize),
        }
    }

    fn compare(&self, page: usize) -> Result<(), Wrong> {
        let base = mix(self.contents[page].0);
        let mut wrong: Option<Wrong> = None;
        for word in 0..WORDS {
            // SAFETY: a word of the mapping; volatile, as the device changes it too.
            let got = unsafe { self.at(page).cast::<u64>().add(word as usize).read_volatile() };
            let want = base ^ word;
            if got != want {
                wrong.get_or_insert(Wrong { word, want, got, count: 0 }).count += 1;
            }
        }
        wrong.map_or(Ok(()), Err)
    }

    fn fill(&mut self, page: usize, from: u64) {
        self.contents[page] = (from, false);
        let base = mix(from);
        for word in 0..WORDS {
            // SAFETY: as above.
            unsafe { self.at(page).cast::<u64>().add(word as usize).write_volatile(base ^ word) };
        }
    }

    fn at(&self, page: usize) -> *mut u8 {
        // SAFETY: a page of the mapping.
        unsafe { self.memory.add(page * PAGE_SIZE) }
    }
}
