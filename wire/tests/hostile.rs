//! Input from a broken or malicious peer: the result is always a typed error or another valid
//! meaning, never a panic, and never memory of a size that the peer chose.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use support::*;
use umem_wire::*;

/// The most bytes that one receiver may hold whatever it receives: the largest body, twice while it
/// grows and is decoded, and a small constant.
const RECEIVER_BYTES_MAX: usize = 4 * limits::BODY_BYTES_MAX;

/// The most bytes that a receiver may hold after `n` bytes of a body came: twice `n`, and a small
/// constant.
const fn body_bytes_max(received: usize) -> usize {
    2 * received + 1024
}

#[test]
fn truncated_frame_gives_no_event() {
    for bytes in valid_frames() {
        for cut in 1..bytes.len() {
            for mut receiver in receivers() {
                let (events, _) = feed(&mut receiver, &bytes[..cut]);
                let run_begins = matches!(events[..], [Event::RunBegins(_)]);
                assert!(events.is_empty() || run_begins, "{cut} of {} bytes", bytes.len());
                assert!(receiver.closed().is_err(), "closed after {cut} bytes");
            }
        }
    }
}

#[test]
fn flipped_bit_of_a_frame_gives_an_error_or_another_meaning() {
    let mut meanings = 0;
    for bytes in valid_frames() {
        for bit in 0..8 * bytes.len() {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            for mut receiver in receivers() {
                meanings += usize::from(check_meaning(&mut receiver, &flipped));
            }
        }
    }
    assert!(meanings > 100, "most flipped bits of a ping give another ping");
}

#[test]
fn flipped_bit_of_a_hello_gives_an_error_or_another_meaning() {
    let hello = Hello {
        versions: PROTOCOL,
        capabilities: Capabilities(6),
        session: SessionId([0x51; 16]),
        role: LaneRole::Bulk,
        index: 1,
        bulk_lanes: 2,
        epoch: 0,
        proof: [0x9f; 32],
    };
    let welcome = Welcome::answer(&hello, PROTOCOL, Capabilities(2), [3; 32]).unwrap().encode();
    let refusal = Welcome::refuse(FaultCode::NotReady, "later");
    for bytes in [hello.encode(), welcome, refusal] {
        for bit in 0..8 * HELLO_BYTES {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            check_hello(&flipped);
        }
    }
}

#[test]
fn garbage_hello_gives_an_error_or_its_exact_meaning() {
    for seed in seeds(2000) {
        let mut random = Random(seed);
        let mut bytes = std::array::from_fn(|_| random.next() as u8);
        bytes[..8].copy_from_slice([b"UMEMLANE", b"UMEMWELC"][random.index(2)]);
        if random.chance(50) {
            bytes[8..12].copy_from_slice(&[random.below(2) as u8, 0, 1, 0]);
        }
        check_hello(&bytes);
    }
}

#[test]
fn garbage_on_a_lane_allocates_within_the_limit() {
    let tags = Kind::ALL.map(|kind| kind as u8);
    for seed in seeds(3000) {
        let mut random = Random(seed);
        let mut bytes: Vec<u8> = (0..512).map(|_| random.next() as u8).collect();
        // Most headers are made plausible: otherwise all would fail the first check.
        for header in bytes.as_chunks_mut::<HEADER_BYTES>().0 {
            header[0] = tags[random.index(tags.len())];
            for byte in &mut header[1..] {
                *byte = if random.chance(90) { 0 } else { *byte & 3 };
            }
            header[16] = header[16].max(random.below(2) as u8);
        }
        for receiver in &mut receivers() {
            let peak = peak_bytes(|| {
                let _ = feed(receiver, &bytes);
            });
            assert!(peak < RECEIVER_BYTES_MAX, "{peak} bytes");
        }
    }
}

#[test]
fn frames_in_any_order_never_commit_the_source() {
    let frames = valid_frames();
    for seed in seeds(500) {
        let mut random = Random(seed);
        let (mut source, mut destination) = (source::Phase::new(), destination::Phase::new());
        let [mut demand, _, mut replies, ..] = receivers();
        for _ in 0..20 {
            let bytes = &frames[random.index(frames.len())];
            for event in feed(&mut demand, bytes).0 {
                destination = match destination.step(destination::Input::Received(&event)) {
                    Ok(phase) | Err((phase, _)) => phase,
                };
            }
            for event in feed(&mut replies, bytes).0 {
                source = match source.step(source::Input::Received(&event)) {
                    Ok(phase) | Err((phase, _)) => phase,
                };
            }
            // Frames alone never commit the source, nor give it a guest that was not prepared.
            assert!(source.may_run() && !destination.may_run());
        }
    }
}

#[test]
fn impossible_body_length_allocates_nothing() {
    for kind in Kind::ALL {
        for body_bytes in [1, 0xffff, 0x1_0001, 1 << 20, 1 << 31, u32::MAX] {
            let mut header = [0; HEADER_BYTES];
            header[0] = kind as u8;
            header[4..8].copy_from_slice(&body_bytes.to_le_bytes());
            header[8] = 1;
            for receiver in &mut receivers() {
                let peak = peak_bytes(|| {
                    let _ = feed(receiver, &header);
                });
                assert!(peak <= body_bytes_max(0), "{kind}: {peak} bytes for {body_bytes} claimed");
            }
        }
    }
}

#[test]
fn run_outside_every_region_is_refused() {
    for first in [0, 299, 300, 1 << 52, 1 << 63, u64::MAX - 1, u64::MAX] {
        for pages in [0, 1, 301, 1 << 52, 1 << 63, u64::MAX - 299, u64::MAX] {
            for region in [0, 3, u16::MAX] {
                let range = PageRange { region: RegionId(region), first, pages };
                let exists = region == 0 && first < 300 && pages == 1;
                for header in [transmit::data_header, transmit::zero_header, transmit::hole_header]
                {
                    let [_, mut bulk, ..] = receivers();
                    assert_eq!(bulk.control(&header(range)).is_ok(), exists, "{range}");
                }
                let [mut demand, ..] = receivers();
                let mut remaining = Vec::new();
                if first >> 48 == 0 {
                    transmit::remaining(&mut remaining, &[range], true);
                    let (_, fed) = feed(&mut demand, &remaining);
                    assert_eq!(fed.is_ok(), exists, "{range}");
                }
                let [_, _, _, mut acks, ..] = receivers();
                assert_eq!(acks.control(&transmit::ack_header(range)).is_ok(), exists, "{range}");
            }
        }
    }
}

#[test]
fn body_memory_grows_only_with_bytes_received() {
    let header = transmit::device_state_header(limits::STATE_CHUNK_BYTES_MAX);
    let chunk = vec![0xa5; limits::STATE_CHUNK_BYTES_MAX];
    for received in [0, 1, 100, 4096, 65_535] {
        let [mut demand, ..] = receivers();
        let peak = peak_bytes(|| {
            demand.control(&header).unwrap();
            for byte in &chunk[..received] {
                demand.control(std::slice::from_ref(byte)).unwrap();
            }
        });
        // While a vector moves, its old and its new memory both exist.
        assert!(peak <= 2 * body_bytes_max(received), "{peak} bytes for {received}");
    }
}

#[test]
fn bulk_lane_loop_allocates_nothing() {
    let [_, mut bulk, ..] = receivers();
    let range = PageRange { region: RegionId(0), first: 0, pages: 300 };
    let peak = peak_bytes(|| {
        for _ in 0..1000 {
            bulk.control(&transmit::data_header(range)).unwrap();
            assert_eq!(bulk.poll_event(), Some(Event::RunBegins(range)));
            bulk.landed(300 * 4096).unwrap();
            assert_eq!(bulk.poll_event(), Some(Event::Data(range)));
        }
    });
    assert_eq!(peak, 0);
}

/// Feeds bytes, also in place of pages, as a caller would: no further than each target, and nothing
/// after an error. Returns the events before the end or the error.
fn feed(receiver: &mut Receiver, bytes: &[u8]) -> (Vec<Event>, Result<(), ReceiveError>) {
    let mut rest = bytes;
    let mut events = Vec::new();
    while !rest.is_empty() {
        let result = match receiver.next_target() {
            Target::Control { exact } => {
                let (now, later) = rest.split_at(exact.min(rest.len()));
                rest = later;
                receiver.control(now)
            }
            Target::Run(target) => {
                let bytes = target.bytes.min(rest.len() as u64);
                rest = &rest[bytes as usize..];
                receiver.landed(bytes)
            }
        };
        receiver.assert_invariants();
        events.extend(std::iter::from_fn(|| receiver.poll_event()));
        if result.is_err() {
            return (events, result);
        }
    }
    (events, Ok(()))
}

/// Feeds one frame's bytes. If they decode, the meaning encodes to exactly those bytes.
fn check_meaning(receiver: &mut Receiver, bytes: &[u8]) -> bool {
    let (events, _) = feed(receiver, bytes);
    let Some(event) = events.first() else {
        return false;
    };
    check_pages(event);
    let Some(frame) = frame(event) else {
        return false;
    };
    let mut said = Vec::new();
    transmit::encode(&frame, &mut said);
    // Codes of a newer version are the one exception: all are read as "other".
    let unknown_code = matches!(&frame, Frame::Error(fault) if fault.code == FaultCode::Other);
    assert!(unknown_code || bytes.starts_with(&said), "{frame:?} from {bytes:x?}");
    true
}

/// An event's pages exist.
fn check_pages(event: &Event) {
    match event {
        Event::RunBegins(range) | Event::Zero(range) | Event::Hole(range) | Event::Ack(range) => {
            table().check(*range).unwrap();
        }
        Event::Request(pages) => {
            for &(region, page) in pages {
                assert!(page < table().pages(region));
            }
        }
        Event::Remaining { runs, .. } => {
            runs.iter().for_each(|&run| table().check(run).unwrap());
        }
        _ => {}
    }
}

/// A hello or a welcome that decodes encodes to exactly the same bytes.
fn check_hello(bytes: &[u8; HELLO_BYTES]) {
    if let Ok(hello) = Hello::decode(bytes) {
        assert_eq!(hello.encode(), *bytes);
    }
    match Welcome::decode(bytes) {
        Ok(welcome) => assert_eq!(welcome.encode(), *bytes),
        Err(HelloError::Refused { code: FaultCode::Other, .. }) => {}
        Err(HelloError::Refused { code, text }) => {
            assert_eq!(Welcome::refuse(code, &text), *bytes);
        }
        Err(_) => {}
    }
}

/// The most bytes of heap that this thread held at once during `work`, beyond what it held before.
fn peak_bytes(work: impl FnOnce()) -> usize {
    let before = HELD_BYTES.get();
    PEAK_BYTES.set(before);
    work();
    (PEAK_BYTES.get() - before).try_into().expect("the peak is not below the start")
}

thread_local! {
    static HELD_BYTES: Cell<isize> = const { Cell::new(0) };
    static PEAK_BYTES: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, counting for each thread.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: every call goes on to the system's allocator unchanged. The counters are plain cells of
// the thread, without a destructor, so touching them neither allocates nor fails.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD_BYTES.get() + layout.size() as isize;
        HELD_BYTES.set(held);
        PEAK_BYTES.set(PEAK_BYTES.get().max(held));
        // SAFETY: the caller's contract is the one required.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD_BYTES.set(HELD_BYTES.get() - layout.size() as isize);
        // SAFETY: the caller's contract is the one required.
        unsafe { System.dealloc(pointer, layout) }
    }
}
