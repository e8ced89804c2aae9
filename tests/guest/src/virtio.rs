//! Devices of QEMU's that reach the guest's memory by themselves: a driver in user space for their older interface
//! (virtio 1.2, "legacy"). Their registers are ports, and pages are named by their physical numbers. It needs no kernel
//! module.

use std::arch::asm;
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU16, Ordering, fence};

pub(crate) const PAGE_SIZE: usize = 4096;

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

/// Flags of a descriptor.
pub(crate) const DEVICE_WRITES: u16 = 2;
pub(crate) const GOES_ON: u16 = 1;

/// A virtqueue.
pub(crate) struct Queue {
    number: u16,
    size: u16,
    /// Two pages with consecutive physical numbers: the driver's ring and the device's.
    ours: *mut u8,
    theirs: *mut u8,
    count: u16,
}

/// Starts a device that has these features, and no others that are not named.
pub(crate) fn start(
    port: u16,
    features: u32,
    queues: &mut [&mut Queue],
    frame_of: impl Fn(*mut u8) -> u64,
) -> Result<(), String> {
    write8(port + STATUS, 0);
    write8(port + STATUS, ACKNOWLEDGE);
    write8(port + STATUS, ACKNOWLEDGE | DRIVER);
    let offered = read32(port + HOST_FEATURES);
    if offered & features != features {
        return Err(format!("the device has the features {offered:#x}, not {features:#x}"));
    }
    write32(port + GUEST_FEATURES, features);
    for queue in queues {
        write16(port + QUEUE_SELECT, queue.number);
        queue.size = read16(port + QUEUE_SIZE);
        let fits = usize::from(queue.size) * 16 + 6 + 2 * usize::from(queue.size);
        if queue.size == 0 || fits > PAGE_SIZE {
            return Err(format!("queue {} has {} entries", queue.number, queue.size));
        }
        write32(port + QUEUE_ADDRESS, frame_of(queue.ours) as u32);
    }
    write8(port + STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
    Ok(())
}

impl Queue {
    /// Queue `number`, in two pages with consecutive physical numbers.
    pub(crate) fn new(number: u16, ours: *mut u8, theirs: *mut u8) -> Queue {
        Queue { number, size: 0, ours, theirs, count: 0 }
    }

    /// Submits one buffer to the device, and waits until it is used.
    pub(crate) fn send(&mut self, port: u16, address: u64, length: u32, flags: u16) {
        // Descriptor 0 each time.
        self.describe(0, (address, length), flags, 0);
        self.submit(port, 0);
        while self.used() != self.count {
            std::thread::yield_now();
        }
    }

    /// Writes a descriptor that the device does not have: a buffer of some bytes at a physical address, and the number
    /// of the one behind it, if its flags say so.
    pub(crate) fn describe(
        &mut self,
        number: u16,
        (address, length): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        assert!(number < self.size, "descriptor {number} of {}", self.size);
        // SAFETY: the first page of the queue has the descriptors, 16 bytes each.
        unsafe {
            let descriptor = self.ours.add(usize::from(number) * 16);
            descriptor.cast::<u64>().write_volatile(address);
            descriptor.add(8).cast::<u32>().write_volatile(length);
            descriptor.add(12).cast::<u16>().write_volatile(flags);
            descriptor.add(14).cast::<u16>().write_volatile(next);
        }
    }

    /// Submits the chain of descriptors that begins with this one.
    pub(crate) fn submit(&mut self, port: u16, number: u16) {
        // SAFETY: the available ring lies behind the descriptors, in the same page.
        unsafe {
            let available = self.ours.add(usize::from(self.size) * 16).cast::<u16>();
            available.add(2 + usize::from(self.count % self.size)).write_volatile(number);
            fence(Ordering::SeqCst);
            self.count = self.count.wrapping_add(1);
            available.add(1).write_volatile(self.count);
            fence(Ordering::SeqCst);
        }
        write16(port + QUEUE_NOTIFY, self.number);
    }

    /// Chains that the device has used so far.
    pub(crate) fn used(&self) -> u16 {
        // SAFETY: the used ring is in the second page.
        unsafe { AtomicU16::from_ptr(self.theirs.add(2).cast()) }.load(Ordering::SeqCst)
    }

    /// The first descriptor of the chain that the device has used at this place of its ring.
    pub(crate) fn used_at(&self, place: u16) -> u16 {
        // SAFETY: as above; its entries have 8 bytes each.
        let entry = unsafe { self.theirs.add(4 + usize::from(place % self.size) * 8) };
        // SAFETY: as above.
        unsafe { entry.cast::<u32>().read_volatile() as u16 }
    }
}

/// The first port of the device of this number; this thread may access its ports from now on.
pub(crate) fn find_device(number: &str) -> Result<u16, String> {
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
        if read("vendor").trim() != "0x1af4" || read("device").trim() != number {
            continue;
        }
        fs::write(device.path().join("enable"), "1").map_err(error("enabling the device"))?;
        let config = fs::File::options().read(true).write(true).open(device.path().join("config"));
        let config = config.map_err(error("the device's configuration"))?;
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
    Err(format!("there is no device {number}"))
}

/// Small pages that are present and not moved.
pub(crate) fn map(pages: usize) -> Result<*mut u8, String> {
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

pub(crate) fn frames_of(memory: *mut u8, pages: usize) -> Result<Vec<u64>, String> {
    let mut bytes = vec![0; pages * 8];
    fs::File::open("/proc/self/pagemap")
        .and_then(|map| map.read_exact_at(&mut bytes, (memory as usize / PAGE_SIZE * 8) as u64))
        .map_err(|error| format!("/proc/self/pagemap: {error}"))?;
    let (entries, _) = bytes.as_chunks::<8>();
    // The lower 55 bits.
    Ok(entries.iter().map(|&entry| u64::from_ne_bytes(entry) << 9 >> 9).collect())
}

/// Pairs of pages behind the first `skipped` ones that are adjacent in physical memory.
pub(crate) fn neighbours(
    frames: &[u64],
    skipped: usize,
) -> impl Iterator<Item = (usize, usize)> + use<> {
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
