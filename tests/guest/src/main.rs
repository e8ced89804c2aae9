//! `/init` of the Linux guest that the tests move: fills its memory with verifiable words, reads and writes them at
//! random forever, and prints its findings on the console.
//!
//! Every page has a generation. Its words follow from seed, page and generation alone, so a page that arrives wrong,
//! twice, late or in the wrong place is detected, and so is a lost write.
//!
//! # Parameters, on the kernel's command line
//!
//! | parameter | meaning | default |
//! |---|---|---|
//! | `umem.mib=N` | memory to fill and check | 60 % of all memory |
//! | `umem.threads=N` | threads that read and write | 2 |
//! | `umem.seed=N` | seed of contents and choices | 1 |
//! | `umem.write=N` | percentage of accesses that write | 30 |
//! | `umem.mode=random\|sequential\|hot\|idle` | how pages are chosen; `hot`: at random in the hot set; `idle` touches none | random |
//! | `umem.hot=N` | size of the hot set, MiB from the beginning of the memory, at most all of it | 64 |
//! | `umem.balloon=N` | more memory, MiB, whose pages go to the host and come back | 0 |
//! | `umem.given=zeroes\|any` | what pages read as that the host has | zeroes |
//! | `umem.disk=N` | more memory, MiB, into which a disk of that size is read all the while | 0 |
//! | `umem.sweep=0\|1` | one more thread checks all pages in order, again and again | 1 |
//!
//! # Lines on the console
//!
//! ```text
//! umem-guest ready mib=256
//! umem-guest beat=7 reads=8123 writes=3456 bad=0 pass=1 given=0 disk=0 max_us=812 p50_us=3 p99_us=96 ms=700
//! umem-guest BAD page=17 word=5 want=0123456789abcdef got=0000000000000000
//! umem-guest checked pages=65536 bad=0
//! umem-guest failed: …
//! ```
//!
//! A beat comes about every 100 ms of the guest's time. Its counts are totals: page checks and page writes of the
//! threads, wrong words, completed sweeps, ballooned pages, reads of the disk. Its latencies are those of the first touch of a page since
//! the beat before, in microseconds (the upper end of a bucket, at most 12 % high; `max_us` is exact). `ms` is the
//! guest's clock since the memory was full. Only the first wrong word gets a BAD line.
//!
//! A line `check` that comes in on the console has all pages checked once, while the load goes on. The line `checked`
//! follows, with the wrong words that the guest has found since it began.

mod balloon;
mod console;
mod disk;
mod latency;
mod memory;
mod parameters;
mod virtio;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use balloon::Balloon;
use disk::Disk;
use latency::Latencies;
use memory::{Memory, Wrong};
use parameters::{Mode, Parameters};

const BEAT_INTERVAL: Duration = Duration::from_millis(100);

fn main() {
    // The kernel panics when init ends, so it never does.
    if let Err(error) = run() {
        console::line(&format!("umem-guest failed: {error}"));
    }
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn run() -> Result<(), String> {
    console::make_raw();
    let parameters = Parameters::read()?;
    let memory = Memory::new(parameters.mib, parameters.seed)?;
    memory.fill();
    console::line(&format!("umem-guest ready mib={}", parameters.mib));

    let guest = Arc::new(Guest { parameters, memory, counts: Counts::default() });
    if parameters.balloon_mib > 0 {
        start(&guest, Guest::give);
    }
    if parameters.disk_mib > 0 {
        start(&guest, Guest::read_disk);
    }
    start(&guest, Guest::answer);
    if parameters.mode != Mode::Idle {
        for index in 0..parameters.threads {
            start(&guest, move |guest| guest.work(index));
        }
        if parameters.sweep {
            start(&guest, Guest::sweep);
        }
    }
    guest.beat()
}

fn start(guest: &Arc<Guest>, run: impl FnOnce(&Guest) + Send + 'static) {
    let guest = Arc::clone(guest);
    std::thread::spawn(move || run(&guest));
}

struct Guest {
    parameters: Parameters,
    memory: Memory,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    reads: AtomicU64,
    writes: AtomicU64,
    bad: AtomicU64,
    passes: AtomicU64,
    given: AtomicU64,
    disk: AtomicU64,
    latencies: Latencies,
}

impl Guest {
    /// One load thread, forever.
    fn work(&self, index: u64) {
        let pages = self.parameters.load_pages(self.memory.pages());
        let mut random = Random::new(self.parameters.seed, index);
        let mut next = pages / self.parameters.threads * index;
        loop {
            let page = match self.parameters.mode {
                Mode::Random | Mode::Hot => random.below(pages),
                _ => {
                    next = (next + 1) % pages;
                    next
                }
            };
            self.access(page, random.below(100) < self.parameters.write_percent);
        }
    }

    /// Checks all pages in order, forever.
    fn sweep(&self) {
        loop {
            for page in 0..self.memory.pages() {
                let locked = self.memory.lock(page);
                self.note(page, locked.check());
            }
            self.counts.passes.fetch_add(1, Relaxed);
        }
    }

    /// Checks all pages when the console says so.
    fn answer(&self) {
        while console::waits_for("check") {
            let workers = self.parameters.threads.max(1);
            std::thread::scope(|scope| {
                for worker in 0..workers {
                    scope.spawn(move || {
                        for page in (worker..self.memory.pages()).step_by(workers as usize) {
                            let locked = self.memory.lock(page);
                            self.note(page, locked.check());
                        }
                    });
                }
            });
            let (pages, bad) = (self.memory.pages(), self.counts.bad.load(Relaxed));
            console::line(&format!("umem-guest checked pages={pages} bad={bad}"));
        }
    }

    /// Gives pages to the host, alternating between the two methods, forever, and checks other pages.
    fn give(&self) {
        let mut balloon = match Balloon::new(self.parameters.balloon_mib, self.parameters.seed) {
            Ok(balloon) => balloon,
            Err(error) => return console::line(&format!("umem-guest failed: {error}")),
        };
        let mut random = Random::new(self.parameters.seed, u64::MAX - 1);
        for turn in 0u64.. {
            let page = random.below(balloon.pages());
            self.note(turn, balloon.give(page, turn % 2 == 1, self.parameters.given_is_zeroes));
            self.counts.given.fetch_add(1, Relaxed);
            self.note(turn, balloon.check(random.below(balloon.pages())));
        }
    }

    /// Has the disk read into memory, forever, and checks other pages.
    fn read_disk(&self) {
        let mut disk = match Disk::new(self.parameters.disk_mib) {
            Ok(disk) => disk,
            Err(error) => return console::line(&format!("umem-guest failed: {error}")),
        };
        let mut random = Random::new(self.parameters.seed, u64::MAX - 2);
        for read in 0..Disk::reads() {
            disk.begin(read, random.below(u64::MAX));
        }
        loop {
            let page = random.below(disk.pages());
            self.note(page, disk.check(page));
            while let Some((read, result)) = disk.end() {
                self.note(u64::from(read), result);
                self.counts.disk.fetch_add(1, Relaxed);
                disk.begin(read, random.below(u64::MAX));
            }
            std::thread::yield_now();
        }
    }

    fn access(&self, page: u64, write: bool) {
        let mut locked = self.memory.lock(page);
        let before = Instant::now();
        locked.touch();
        self.counts.latencies.record(before.elapsed());

        self.note(page, locked.check());
        self.counts.reads.fetch_add(1, Relaxed);
        if write {
            locked.rewrite();
            self.counts.writes.fetch_add(1, Relaxed);
        }
    }

    fn note(&self, page: u64, result: Result<(), Wrong>) {
        let Err(wrong) = result else {
            return;
        };
        if self.counts.bad.fetch_add(wrong.count, Relaxed) == 0 {
            console::line(&format!(
                "umem-guest BAD page={page} word={} want={:016x} got={:016x}",
                wrong.word, wrong.want, wrong.got
            ));
        }
    }

    fn beat(&self) -> ! {
        let start = Instant::now();
        for beat in 1u64.. {
            std::thread::sleep(BEAT_INTERVAL);
            let counts = &self.counts;
            let latency = counts.latencies.take();
            console::line(&format!(
                "umem-guest beat={beat} reads={} writes={} bad={} pass={} given={} disk={} max_us={} p50_us={} \
                 p99_us={} ms={}",
                counts.reads.load(Relaxed),
                counts.writes.load(Relaxed),
                counts.bad.load(Relaxed),
                counts.passes.load(Relaxed),
                counts.given.load(Relaxed),
                counts.disk.load(Relaxed),
                latency.max_us,
                latency.p50_us,
                latency.p99_us,
                start.elapsed().as_millis(),
            ));
        }
        unreachable!("2^64 beats take longer than any test")
    }
}

/// xorshift64*: small, and good enough to choose pages.
struct Random(u64);

impl Random {
    fn new(seed: u64, stream: u64) -> Self {
        // Never zero, which would stay zero.
        Random(memory::mix(seed ^ memory::mix(stream + 1)) | 1)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
}
