//! Pages that the guest writes in each pass. Both sides run in this process. The test relays the bulk lane, which shows
//! which pages are sent, and in which order.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use umem::embed::{DestinationSetup, Event, Memory, SourceSetup};
use umem_wire::{
    Event as Said, HELLO_BYTES, LaneRole, PageSize, Receiver, Region, RegionTable, Target,
};

const PAGE: u64 = 4096;
const PAGES: u64 = 4096;
const BYTES: u64 = PAGES * PAGE;

/// Written in each pass, spread among and behind the pages that are written once.
const HOT: [u64; 16] =
    [700, 701, 702, 900, 1500, 1501, 2047, 2048, 2500, 3000, 3001, 3100, 3333, 3500, 3800, 4095];

/// Pages before these are written once, in one of this many passes or at the stop: each time half of the remaining
/// ones.
const COLD: u64 = 512;

/// Pages that were sent on the bulk lane, in order.
#[derive(Default)]
struct Left {
    in_rounds: Vec<u64>,
    after: Vec<u64>,
}

/// Relays a bulk lane to the destination, and parses its frames.
fn relay(mut source: UnixStream, mut destination: UnixStream) -> JoinHandle<Left> {
    let clone = |socket: &UnixStream| socket.try_clone().expect("a descriptor");
    let (mut back, mut to) = (clone(&destination), clone(&source));
    std::thread::spawn(move || {
        // Ends with either side.
        let _ = std::io::copy(&mut back, &mut to);
    });
    std::thread::spawn(move || {
        let page_size = PageSize::SIZE_4K;
        let region = Region { name: "ram0".into(), bytes: BYTES, page_size };
        let mut receiver = Receiver::for_destination(LaneRole::Bulk);
        receiver.set_regions(&RegionTable::new(vec![region]).expect("a table"));
        let mut pass = |bytes: usize| {
            let mut buffer = vec![0; bytes];
            source.read_exact(&mut buffer).ok()?;
            destination.write_all(&buffer).ok()?;
            Some(buffer)
        };
        let (mut left, mut is_after) = (Left::default(), false);
        pass(HELLO_BYTES);
        loop {
            match receiver.next_target() {
                Target::Control { exact } => {
                    let Some(bytes) = pass(exact) else { return left };
                    receiver.control(&bytes).expect("frames");
                }
                Target::Run(run) => {
                    let Some(_) = pass(usize::try_from(run.bytes).expect("memory")) else {
                        return left;
                    };
                    receiver.landed(run.bytes).expect("a run");
                    let pages = run.byte_offset / PAGE..(run.byte_offset + run.bytes) / PAGE;
                    if is_after { &mut left.after } else { &mut left.in_rounds }.extend(pages);
                }
            }
            while let Some(event) = receiver.poll_event() {
                is_after |= matches!(event, Said::RoundsEnd);
            }
        }
    })
}

/// The guest's memory at the source, and the number of writes of each page.
struct Guest {
    file: File,
    generations: BTreeMap<u64, u64>,
}

impl Guest {
    fn new() -> Guest {
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
        file.set_len(BYTES).expect("room");
        let mut guest = Guest { file, generations: BTreeMap::new() };
        (0..PAGES).for_each(|page| guest.write(page));
        guest
    }

    fn write(&mut self, page: u64) {
        let generation = self.generations.entry(page).or_default();
        *generation += 1;
        let word = (page << 32 | *generation).to_le_bytes();
        self.file.write_all_at(&word.repeat(512), page * PAGE).expect("room");
    }
}

/// Moves the guest. Returns the pages sent on the bulk lane, and the number of passes.
fn moved(postcopy: bool) -> (Left, u64) {
    let mut guest = Guest::new();
    let ram = File::from(memfd_create(c"there", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    ram.set_len(BYTES).expect("room");
    let length = usize::try_from(BYTES).unwrap().try_into().unwrap();
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &ram, 0) };
    let start: NonNull<std::ffi::c_void> = start.expect("room");

    let pair = || UnixStream::pair().expect("a pair of sockets");
    let (demand, from, to) = (pair(), pair(), pair());
    let relay = relay(from.1, to.1);
    let mut source = SourceSetup::new();
    source.region("ram0", guest.file.as_fd()).expect("a region");
    source.connections(vec![OwnedFd::from(demand.0), from.0.into()]).expect("connections");
    source.precopy(20, Duration::ZERO);
    source.log(true);
    source.postcopy(postcopy);
    let mut destination = DestinationSetup::new();
    let memory = Memory { start: start.cast(), bytes: BYTES, file: Some(ram.as_fd()) };
    // SAFETY: the mapping has no other user, and stays until the end.
    unsafe { destination.region("ram0", &memory) }.expect("a region");
    destination.connections(vec![OwnedFd::from(demand.1), to.0.into()]).expect("connections");
    let (source, destination) =
        (source.start().expect("starts"), destination.start().expect("starts"));
    let arriving = std::thread::spawn(move || {
        while let Some(event) = destination.wait(None).expect("events") {
            match event {
                Event::LoadState(_) => destination.loaded().expect("an answer"),
                Event::Run => destination.running().expect("an answer"),
                Event::Completed(_) => return,
                Event::Failed(failure) => panic!("{}", failure.error),
                _ => {}
            }
        }
    });
    let mut passes = 0;
    while let Some(event) = source.wait(None).expect("events") {
        match event {
            Event::ReadLog | Event::Stop => {
                let is_pass = matches!(event, Event::ReadLog);
                passes += u64::from(is_pass);
                let time = passes + u64::from(!is_pass);
                let cold = COLD - (COLD >> (time - 1))..COLD - (COLD >> time);
                for page in cold.chain(HOT) {
                    guest.write(page);
                    source.written(0, page * PAGE, PAGE).expect("it is there");
                }
                let answer = if is_pass { source.log_read() } else { source.stopped() };
                answer.expect("it was asked");
            }
            Event::SaveState => source.saved(Vec::new()).expect("an answer"),
            Event::Completed(_) => break,
            Event::Failed(failure) => panic!("{}", failure.error),
            _ => {}
        }
    }
    arriving.join().expect("the destination ends well");
    drop(source);
    let left = relay.join().expect("the lane is read");
    let (mut here, mut there) = (vec![0; BYTES as usize], vec![0; BYTES as usize]);
    guest.file.read_exact_at(&mut here, 0).expect("it is as long");
    ram.read_exact_at(&mut there, 0).expect("it is as long");
    let pages = here.chunks(PAGE as usize).zip(there.chunks(PAGE as usize));
    let wrong: Vec<_> =
        (0..).zip(pages).filter(|(_, (a, b))| a != b).map(|(page, _)| page).collect();
    assert_eq!(wrong, Vec::<u64>::new(), "pages are wrong");
    // SAFETY: this process's own mapping, which has no other user any more.
    unsafe { munmap(start, BYTES as usize) }.expect("it is mapped");
    (left, passes)
}

/// Pages that are written once are sent once more. Hot pages are sent in the first two passes, in none of the later
/// ones, and first after the switchover.
#[test]
fn pages_written_in_each_pass_are_sent_in_two_passes_and_first_after_the_switchover() {
    for postcopy in [true, false] {
        let (left, passes) = moved(postcopy);
        // 4 pages and the 16 hot ones: more than 0.7 of these are hot.
        assert_eq!(passes, 7, "postcopy: {postcopy}");
        let count = |page: u64| left.in_rounds.iter().filter(|&&other| other == page).count();
        for page in HOT {
            assert_eq!(count(page), 2, "hot page {page}");
        }
        for page in 0..504 {
            assert_eq!(count(page), 2, "page {page}");
        }
        assert_eq!(left.in_rounds.len() as u64, PAGES + 504 + HOT.len() as u64);
        let after: Vec<u64> = HOT.into_iter().chain(504..510).collect();
        assert_eq!(left.after, after, "postcopy: {postcopy}");
    }
}
