//! Memory that the guest gives back to the host, through QEMU's virtio balloon: pages go into the balloon, or are
//! reported as free. They must read as zeroes then, and all others as written.
//!
//! A driver in user space for the device's older interface (virtio 1.2, "legacy"): its registers are ports, and pages
//! are named by their physical numbers. It needs no kernel module.

use std::arch::asm;
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use crate::memory::{Wrong, mix};

const PAGE_SIZE: usize = 4096;
const WORDS: usize = PAGE_SIZE / size_of::<u64>();

/// Besides the ballooned pages: those of the queues.
const RING_PAGES: usize = 256;

// Registers of the device, from its first port on.
const HOST_FEATURES: u16 = 0x00;
const GUEST_FEATURES: u16 = 0x04;
const QUEUE_ADDRESS: u16 = 0x08;
const QUEUE_SIZE: u16 = 0x0c;
const QUEUE_SELECT: u16 = 0x0e;
const QUEUE_NOTIFY: u16 = 0x10;
const STATUS: u16 = 0x12;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURE_REPORTING: u32 = 1 << 5;
const DEVICE_WRITES: u16 = 2;

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

/// A virtqueue of which one descriptor is used.
struct Queue {
    number: u16,
    size: u16,
    /// Two pages with consecutive physical numbers: the driver's ring and the device's.
    ours: *mut u8,
    theirs: *mut u8,
    count: u16,
}

impl Balloon {
    /// Of `mib` MiB, all written.
    pub(crate) fn new(mib: u64, seed: u64) -> Result<Balloon, String> {
        let port = find_device()?;
        let pages = mib as usize * (1 << 20) / PAGE_SIZE;
        let memory = map(pages + RING_PAGES)?;
        let frames = frames_of(memory, pages + RING_PAGES)?;
        let mut rings = neighbours(&frames, pages);
        let mut queue = |number| {
            let (ours, theirs) =
                rings.next().ok_or("no pages for a queue that lie side by side")?;
            // SAFETY: pages of the mapping.
            let at = |page: usize| unsafe { memory.add(page * PAGE_SIZE) };
            Ok::<_, String>(Queue { number, size: 0, ours: at(ours), theirs: at(theirs), count: 0 })
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

    /// Gives a page back, checks its contents in the guest, and takes it again.
    pub(crate) fn give(&mut self, page: u64, is_reported: bool) -> Result<(), Wrong> {
        let page = page as usize;
        let frame = self.frames[page];
        if is_reported {
            self.report.send(self.port, frame << 12, PAGE_SIZE as u32, DEVICE_WRITES);
        } else {
            self.tell(frame);
            self.inflate.send(self.port, self.frames[self.message] << 12, 4, 0);
        }
        let result = self.compare(page, |_| 0);
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
        let port = self.port;
        write8(port + STATUS, 0);
        write8(port + STATUS, ACKNOWLEDGE);
        write8(port + STATUS, ACKNOWLEDGE | DRIVER);
        if read32(port + HOST_FEATURES) & FEATURE_REPORTING == 0 {
            return Err("the balloon takes no reports of free pages".into());
        }
        write32(port + GUEST_FEATURES, FEATURE_REPORTING);
        let (memory, frames) = (self.memory, &self.frames);
        for queue in [&mut self.inflate, &mut self.deflate, &mut self.report] {
            write16(port + QUEUE_SELECT, queue.number);
            queue.size = read16(port + QUEUE_SIZE);
            let fits = usize::from(queue.size) * 16 + 6 + 2 * usize::from(queue.size);
            if queue.size == 0 || fits > PAGE_SIZE {
                return Err(format!("queue {} has {} entries", queue.number, queue.size));
            }
            let page = (queue.ours as usize - memory as usize) / PAGE_SIZE;
            write32(port + QUEUE_ADDRESS, frames[page] as u32);
        }
        write8(port + STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
        Ok(())
    }
}

impl Queue {
    /// Submits one buffer to the device, and waits until it is used.
    fn send(&mut self, port: u16, address: u64, length: u32, flags: u16) {
        // SAFETY: the two pages of the queue: the descriptors, 16 bytes each, the available ring behind them, and, in
        // the second page, the used ring.
        unsafe {
            self.ours.cast::<u64>().write_volatile(address);
            self.ours.add(8).cast::<u32>().write_volatile(length);
            self.ours.add(12).cast::<u16>().write_volatile(flags);
            let available = self.ours.add(usize::from(self.size) * 16).cast::<u16>();
            // Descriptor 0 each time.
            available.add(2 + usize::from(self.count % self.size)).write_volatile(0);
            fence(Ordering::SeqCst);
            self.count = self.count.wrapping_add(1);
            available.add(1).write_volatile(self.count);
            fence(Ordering::SeqCst);
            write16(port + QUEUE_NOTIFY, self.number);
            let used = AtomicU16::from_ptr(self.theirs.add(2).cast());
            while used.load(Ordering::SeqCst) != self.count {
                std::thread::yield_now();
            }
        }
    }
}

/// The first port of the balloon; this thread may access its ports from now on.
fn find_device() -> Result<u16, String> {
    let error = |what: &str| {
        let what = what.to_owned();
        move |error: std::io::Error| format!("{what}: {error}")
    };
    fs::create_dir_all("/sys").map_err(error("/sys"))?;
    // SAFETY: strings with their ends.
    unsafe {
        libc::mount(c"sysfs".as_ptr(), c"/sys".as_ptr(), c"sysfs".as_ptr(), 0, std::ptr::null());
        if libc::syscall(libc::SYS_iopl, 3) != 0 {
            return Err(format!("iopl: {}", std::io::Error::last_os_error()));
        }
    }
    for device in fs::read_dir("/sys/bus/pci/devices").map_err(error("PCI"))?.flatten() {
        let read = |name: &str| fs::read_to_string(device.path().join(name)).unwrap_or_default();
        if read("vendor").trim() != "0x1af4" || read("device").trim() != "0x1002" {
            continue;
        }
        fs::write(device.path().join("enable"), "1").map_err(error("enabling the balloon"))?;
        let config = fs::File::options().read(true).write(true).open(device.path().join("config"));
        let config = config.map_err(error("the balloon's configuration"))?;
        let mut command = [0; 2];
        config.read_exact_at(&mut command, 4).map_err(error("its command register"))?;
        // The device answers at its ports, and reaches memory by itself.
        command[0] |= 0b101;
        config.write_all_at(&command, 4).map_err(error("its command register"))?;
        let resources = read("resource");
        let first = resources.split_whitespace().next().unwrap_or_default();
        let port = u16::from_str_radix(first.trim_start_matches("0x"), 16);
        return port.map_err(|_| format!("its ports are not where they should be: {resources}"));
    }
    Err("there is no balloon".into())
}

/// Small pages that are present and not moved.
fn map(pages: usize) -> Result<*mut u8, String> {
    let length = pages * PAGE_SIZE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping at an address of the kernel's choice, and advice about it.
    unsafe {
        let start = libc::mmap(std::ptr::null_mut(), length, access, flags, -1, 0);
        if start == libc::MAP_FAILED {
            return Err(format!("mmap: {}", std::io::Error::last_os_error()));
        }
        libc::madvise(start, length, libc::MADV_NOHUGEPAGE);
        if libc::mlock(start, length) != 0 {
            return Err(format!("mlock: {}", std::io::Error::last_os_error()));
        }
        Ok(start.cast())
    }
}

fn frames_of(memory: *mut u8, pages: usize) -> Result<Vec<u64>, String> {
    let mut bytes = vec![0; pages * 8];
    fs::File::open("/proc/self/pagemap")
        .and_then(|map| map.read_exact_at(&mut bytes, (memory as usize / PAGE_SIZE * 8) as u64))
        .map_err(|error| format!("/proc/self/pagemap: {error}"))?;
    let (entries, _) = bytes.as_chunks::<8>();
    // The lower 55 bits.
    Ok(entries.iter().map(|&entry| u64::from_ne_bytes(entry) << 9 >> 9).collect())
}

/// Pairs of pages behind the first `skipped` ones that are adjacent in physical memory.
fn neighbours(frames: &[u64], skipped: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
    let mut pages: Vec<(u64, usize)> = frames.iter().copied().zip(0..).skip(skipped).collect();
    pages.sort_unstable();
    let mut at = 0;
    std::iter::from_fn(move || {
        while let [(first, ours), (second, theirs)] = pages.get(at..at + 2)? {
            if *second == first + 1 {
                at += 2;
                return Some((*ours, *theirs));
            }
            at += 1;
        }
        None
    })
}

fn write8(port: u16, value: u8) {
    // SAFETY: a port of the device's; here and below.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value) };
}

fn write16(port: u16, value: u16) {
    // SAFETY: as above.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value) };
}

fn write32(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value) };
}

fn read16(port: u16) -> u16 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value) };
    value
}

fn read32(port: u16) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value) };
    value
}
