//! The demo guest's vCPUs: threads that read and write random pages and check every word.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use hdrhistogram::Histogram;

use super::Verdict;
use super::pattern::{Fill, Pattern, Words, mix};
use super::ram::GuestRam;
use crate::error::Result;
use crate::fault::uffd;
use crate::memory::bits::Bits;
use crate::runtime::print;
use crate::statistics::{Latency, latency_histogram, record};

/// A thread has locked the page.
const LOCKED: u32 = 1 << 31;
/// A wrong word has been found in the page.
const BAD: u32 = 1 << 30;
/// The page has been discarded since its last write.
const DISCARDED: u32 = 1 << 29;
/// Number of writes of the page.
const GENERATION: u32 = DISCARDED - 1;
/// The bits of a page that move with the guest.
const MOVES: u32 = DISCARDED | GENERATION;

/// Before the move the guest writes to this many pages only, so that its device state, which records them, stays small.
const HOT_PAGES: u64 = 4096;

/// Runs of written pages in one answer at most: an answer is one line.
const RUNS_TOLD: usize = 4096;

/// Accesses that discard their page, if the guest discards, percent.
const DISCARD_PERCENT: u64 = 5;

/// The expected contents of a page.
fn words(pattern: Pattern, page: u64, cell: u32) -> Words {
    if cell & DISCARDED != 0 { Words::ZEROES } else { pattern.words(page, cell & GENERATION) }
}

/// The guest's memory, its expected contents, and the threads' common state.
pub(crate) struct Machine {
    pub(crate) ram: GuestRam,
    pattern: Mutex<Pattern>,
    write_percent: u32,
    discard: bool,
    pages: Box<[AtomicU32]>,
    /// Pages that have been written or discarded since they were last reported.
    dirty: Bits,
    arrived: AtomicBool,
    reads: AtomicU64,
    writes: AtomicU64,
    discards: AtomicU64,
    latency: Mutex<Histogram<u64>>,
    run: Mutex<Run>,
    changed: Condvar,
}

#[derive(Default)]
struct Run {
    running: bool,
    /// Threads that have not parked yet.
    active: usize,
}

/// An error in a device state that arrived.
pub(crate) struct StateError;

impl Machine {
    pub(crate) fn new(
        ram: GuestRam,
        pattern: Pattern,
        write_percent: u32,
        discard: bool,
    ) -> Machine {
        Machine {
            pages: (0..ram.pages()).map(|_| AtomicU32::new(0)).collect(),
            dirty: Bits::new(ram.pages()),
            ram,
            pattern: Mutex::new(pattern),
            write_percent,
            discard,
            arrived: AtomicBool::new(false),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            discards: AtomicU64::new(0),
            latency: Mutex::new(latency_histogram()),
            run: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Writes every page for the first time.
    pub(crate) fn fill(&self) {
        let pattern = self.pattern();
        for page in 0..self.ram.pages() {
            if pattern.fill(page) != Fill::Hole {
                self.ram.write(page, pattern.words(page, 0));
            }
        }
    }

    pub(crate) fn start_threads(self: &Arc<Self>, count: usize) -> Result<()> {
        for index in 0..count {
            let machine = self.clone();
            super::thread(&format!("vcpu-{index}"), move || machine.vcpu(index as u64))?;
        }
        Ok(())
    }

    /// Lets the threads run.
    pub(crate) fn resume(&self) {
        self.run.lock().expect("no vCPU panics").running = true;
        self.changed.notify_all();
    }

    /// Stops the threads; each has finished its access when this returns.
    pub(crate) fn stop(&self) {
        let mut run = self.run.lock().expect("no vCPU panics");
        run.running = false;
        while run.active > 0 {
            run = self.changed.wait(run).expect("no vCPU panics");
        }
    }

    /// Its state has been loaded, if it was to arrive.
    pub(crate) fn has_arrived(&self) -> bool {
        self.arrived.load(Ordering::Relaxed)
    }

    pub(crate) fn is_running(&self) -> bool {
        self.run.lock().expect("no vCPU panics").running
    }

    /// The state that the threads need to continue elsewhere.
    pub(crate) fn save(&self) -> Vec<u8> {
        let pattern = self.pattern();
        let mut state = Vec::new();
        state.extend(pattern.seed.to_le_bytes());
        state.extend(pattern.zero_percent.to_le_bytes());
        state.extend(pattern.hole_percent.to_le_bytes());
        for (page, cell) in self.pages.iter().enumerate() {
            let moves = cell.load(Ordering::Relaxed) & MOVES;
            if moves > 0 {
                state.extend((page as u64).to_le_bytes());
                state.extend(moves.to_le_bytes());
            }
        }
        state
    }

    pub(crate) fn load(&self, state: &[u8]) -> std::result::Result<(), StateError> {
        let (head, rest) = state.split_at_checked(16).ok_or(StateError)?;
        let number = |bytes: &[u8]| -> u64 {
            bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
        };
        let narrow = |number: u64| u32::try_from(number).map_err(|_| StateError);
        *self.pattern.lock().expect("no vCPU panics") = Pattern {
            seed: number(&head[..8]),
            zero_percent: narrow(number(&head[8..12]))?,
            hole_percent: narrow(number(&head[12..]))?,
        };
        for entry in rest.chunks(12) {
            let (page, moves) = entry.split_at_checked(8).ok_or(StateError)?;
            let page = usize::try_from(number(page)).map_err(|_| StateError)?;
            let cell = self.pages.get(page).ok_or(StateError)?;
            cell.store(narrow(number(moves))? & MOVES, Ordering::Relaxed);
        }
        self.arrived.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Runs of pages from `from` on, as first page and count, that have been written since they were last reported; and
    /// the page at which the next call continues, unless these were all.
    pub(crate) fn take_dirty(&self, from: u64) -> (Vec<(u64, u64)>, Option<u64>) {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for word in (from / 64 * 64..self.ram.pages()).step_by(64) {
            if runs.len() >= RUNS_TOLD {
                return (runs, Some(word));
            }
            let mut bits = self.dirty.take_word(word, 64.min(self.ram.pages() - word));
            while bits != 0 {
                let page = word + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                match runs.last_mut().filter(|(first, pages)| first + pages == page) {
                    Some((_, pages)) => *pages += 1,
                    None => runs.push((page, 1)),
                }
            }
        }
        (runs, None)
    }

    fn pattern(&self) -> Pattern {
        *self.pattern.lock().expect("no vCPU panics")
    }

    fn vcpu(&self, index: u64) {
        let mut random = mix(index ^ u64::from(std::process::id()));
        let mut latency = latency_histogram();
        let mut seen_running = false;
        loop {
            self.park(&mut seen_running, &mut latency);
            let (pattern, arrived) = (self.pattern(), self.arrived.load(Ordering::Relaxed));
            // Accesses between two checks of the common state.
            for _ in 0..64 {
                random = mix(random);
                self.access(pattern, arrived, random, &mut latency);
            }
        }
    }

    /// Waits while the guest is stopped.
    fn park(&self, seen_running: &mut bool, latency: &mut Histogram<u64>) {
        let mut run = self.run.lock().expect("no vCPU panics");
        if run.running && *seen_running {
            return;
        }
        if *seen_running {
            *seen_running = false;
            run.active -= 1;
            let mut all = self.latency.lock().expect("no vCPU panics");
            all.add(&*latency).expect("the same bounds");
            latency.reset();
            self.changed.notify_all();
        }
        while !run.running {
            run = self.changed.wait(run).expect("no vCPU panics");
        }
        run.active += 1;
        *seen_running = true;
    }

    fn access(&self, pattern: Pattern, arrived: bool, random: u64, latency: &mut Histogram<u64>) {
        let page = random % self.ram.pages();
        let cell = self.cell(page);
        let read_only = self.is_read_only(page);
        // The page's state of arrival does not matter: it is not read before.
        if self.discard && arrived && !read_only && (random >> 48) % 100 < DISCARD_PERCENT {
            return self.discard(page);
        }
        if !read_only && cell.fetch_or(LOCKED, Ordering::Acquire) & LOCKED != 0 {
            // Another thread has this page; enough other pages are left.
            return;
        }
        let began = Instant::now();
        self.ram.touch(page);
        record(latency, began.elapsed());
        let state = cell.load(Ordering::Relaxed);
        if self.ram.check(page, words(pattern, page, state)).is_some() {
            cell.fetch_or(BAD, Ordering::Relaxed);
        }
        self.reads.fetch_add(1, Ordering::Relaxed);
        if read_only {
            return;
        }
        let may_write = arrived || page < HOT_PAGES;
        if may_write && (random >> 32) % 100 < u64::from(self.write_percent) {
            self.ram.write(page, pattern.words(page, (state & GENERATION) + 1));
            // Set after the write, so that a thread that takes the mark finds the write.
            self.dirty.set(page, 1);
            cell.fetch_add(1, Ordering::Relaxed);
            cell.fetch_and(!DISCARDED, Ordering::Relaxed);
            self.writes.fetch_add(1, Ordering::Relaxed);
        }
        cell.fetch_and(!LOCKED, Ordering::Release);
    }

    fn cell(&self, page: u64) -> &AtomicU32 {
        &self.pages[usize::try_from(page).expect("64-bit Linux")]
    }

    /// One page in 16 (or one of the pages that are discarded together) is only read, by any number of threads at once:
    /// several of them wait for the same missing page.
    fn is_read_only(&self, page: u64) -> bool {
        (page / self.ram.discard_pages).is_multiple_of(16)
    }

    /// Discards the page, and the pages that can only be discarded with it, unless another thread has one of them.
    fn discard(&self, page: u64) {
        let first = page - page % self.ram.discard_pages;
        let pages = first..first + self.ram.discard_pages;
        let lock = |page| self.cell(page).fetch_or(LOCKED, Ordering::Acquire) & LOCKED == 0;
        let unlock = |page| _ = self.cell(page).fetch_and(!LOCKED, Ordering::Release);
        if let Some(busy) = pages.clone().find(|&page| !lock(page)) {
            (first..busy).for_each(unlock);
            return;
        }
        let discarded = self.ram.discard(first);
        self.dirty.set(first, self.ram.discard_pages);
        let state = match discarded {
            Ok(()) => DISCARDED,
            Err(errno) => {
                print::err_line(&format!("umem guest: page {first} cannot be discarded: {errno}"));
                BAD
            }
        };
        self.discards.fetch_add(1, Ordering::Relaxed);
        for page in pages {
            self.cell(page).fetch_or(state, Ordering::Relaxed);
            unlock(page);
        }
    }

    /// Stops the threads and checks every page.
    pub(crate) fn verify(&self) -> Verdict {
        self.stop();
        let pattern = self.pattern();
        let (mut verified_pages, mut bad_pages, mut guest_writes_lost) = (0, 0, 0);
        for (page, cell) in (0..).zip(&self.pages) {
            let cell = cell.load(Ordering::Relaxed);
            let wrong = self.ram.check(page, words(pattern, page, cell));
            if let Some((word, want, got)) = wrong {
                print::err_line(&format!(
                    "umem guest: page {page} word {word} is {got:#x}, not {want:#x}"
                ));
                guest_writes_lost += u64::from(cell & MOVES > 0 && cell & DISCARDED == 0);
            }
            if wrong.is_some() || cell & BAD != 0 {
                bad_pages += 1;
            } else {
                verified_pages += 1;
            }
        }
        Verdict {
            verified_pages,
            bad_pages,
            guest_writes_lost,
            reads: self.reads.load(Ordering::Relaxed),
            writes: self.writes.load(Ordering::Relaxed),
            discards: self.discards.load(Ordering::Relaxed),
            access_latency_us: Latency::of(&self.latency.lock().expect("no vCPU panics")),
            huge_bytes: huge_bytes(),
            registered: uffd::process_is_registered(std::process::id()).unwrap_or(true),
        }
    }
}

/// Bytes that this process maps with huge pages: of files, anonymous, and of hugetlb (proc(5)).
fn huge_bytes() -> u64 {
    const FIELDS: [&str; 3] = ["ShmemPmdMapped", "AnonHugePages", "Private_Hugetlb"];
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap_or_default();
    let kib = rollup.lines().filter_map(|line| {
        let (_, value) = line.split_once(':').filter(|(field, _)| FIELDS.contains(field))?;
        value.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
    });
    kib.sum::<u64>() << 10
}
