//! An authenticated peer that is malicious, on real connections: floods take no memory, impossible requests are
//! refused, and the migration in progress is not disturbed.
//!
//! `wire/tests/hostile.rs` covers invalid bytes, `secure.rs` authentication, and `peers.rs` frames in the wrong phase.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;

use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use support::{Guests, LaneFromSource, Qmp, Scratch, Umem};
use umem_wire::limits::{ERROR_TEXT_BYTES_MAX, REQUEST_ENTRIES_MAX};
use umem_wire::{
    Capabilities, Event, Frame, HELLO_BYTES, Hello, LaneRole, PROTOCOL, PageRange, PageSize,
    Receiver, Region, RegionId, RegionTable, SessionId, Target, Welcome, transmit,
};

/// Frames of a flood. A queue with an entry for each would take 100 MiB.
const FLOOD: u64 = 1 << 20;

/// The allowed growth of a flooded process: buffers, not the flood.
const GROWTH_BYTES: u64 = 16 << 20;

/// Bytes of a flood of frames of one kind.
const FLOOD_BYTES: usize = 128 << 20;

const PAGES: u64 = 1024;

/// The peak memory of a process, bytes.
fn peak_bytes(umem: &Umem) -> u64 {
    peak(umem).expect("umem runs")
}

/// None if it has ended.
fn peak(umem: &Umem) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", umem.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10)
}

/// A `umem migrate` of [`PAGES`] pages with data, and the two lanes that it opens here.
fn migrate(scratch: &Scratch) -> (Umem, LaneFromSource<TcpStream>, LaneFromSource<TcpStream>) {
    migrate_of(scratch, PAGES, PAGES)
}

/// The same with this many pages, of which the first have data.
fn migrate_of(
    scratch: &Scratch,
    pages: u64,
    data: u64,
) -> (Umem, LaneFromSource<TcpStream>, LaneFromSource<TcpStream>) {
    let path = scratch.ram("source");
    let file = File::create(&path).unwrap();
    file.set_len(pages << 12).unwrap();
    (0..data).for_each(|page| file.write_all_at(&[7; 4096], page << 12).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let ram = format!("ram0={}", path.display());
    let migrate = Umem::start(["migrate", "-p", "-n", "--json", "--ram", &ram, &uri]);
    let lane = || LaneFromSource::welcome(listener.accept().unwrap().0, Capabilities::NONE);
    let (demand, bulk) = (lane(), lane());
    (migrate, demand, bulk)
}

/// This many pings in a row, without waiting for answers.
fn pings(count: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    (0..count).for_each(|number| transmit::encode(&Frame::Ping(number), &mut bytes));
    bytes
}

#[test]
fn ping_flood_does_not_grow_source_memory() {
    let scratch = Scratch::new();
    let (mut migrate, mut demand, _bulk) = migrate(&scratch);
    demand.until_stopped();
    let before = peak_bytes(&migrate);
    demand.stream.write_all(&pings(FLOOD)).unwrap();
    // The last ping is answered in any case.
    while !matches!(demand.control_event(), Some(Event::Pong(number)) if number == FLOOD - 1) {}
    let growth = peak_bytes(&migrate) - before;
    assert!(growth < GROWTH_BYTES, "{growth} bytes");
    migrate.signal(Signal::SIGINT);
    assert!(migrate.fails().contains("the guest continues at the source"));
}

/// Every kind of control frame that a destination may send, except pings, requests and acknowledgements, repeatedly:
/// they are not queued.
#[test]
fn control_frame_flood_does_not_grow_source_memory() {
    let frames = [
        Frame::Pong(1),
        Frame::Ready(vec![PageSize::SIZE_4K]),
        Frame::Loaded,
        Frame::Running { us_since_switchover: 1 },
        Frame::Digests(vec![1]),
        Frame::Complete(umem_wire::Totals::default()),
        Frame::Error(umem_wire::Fault {
            code: umem_wire::FaultCode::Refused,
            text: "x".repeat(ERROR_TEXT_BYTES_MAX),
        }),
    ];
    for frame in frames {
        let scratch = Scratch::new();
        let (migrate, mut demand, _bulk) = migrate(&scratch);
        demand.until_stopped();
        let growth = flood(&migrate, &mut demand.stream, &frame);
        assert!(growth < GROWTH_BYTES, "{frame:?}: {growth} bytes");
        drop(demand);
        migrate.fails();
    }
}

/// Writes a frame repeatedly, until enough has been written or the peer stops reading. Returns the process's growth.
fn flood(umem: &Umem, stream: &mut TcpStream, frame: &Frame) -> u64 {
    let mut once = Vec::new();
    transmit::encode(frame, &mut once);
    let many = once.repeat((64 << 10) / once.len() + 1);
    let before = peak_bytes(umem);
    let (mut growth, mut sent) = (0, 0);
    // A peer that stopped reading for this long has stopped.
    setsockopt(&*stream, sockopt::SendTimeout, &TimeVal::seconds(2)).unwrap();
    while sent < FLOOD_BYTES && stream.write_all(&many).is_ok() {
        sent += many.len();
        growth = growth.max(peak(umem).unwrap_or(0).saturating_sub(before));
    }
    growth
}

/// One page, requested repeatedly: it is sent once.
#[test]
fn repeated_requests_are_answered_once() {
    let scratch = Scratch::new();
    let (migrate, mut demand, mut bulk) = migrate(&scratch);
    let table = demand.until_stopped();
    bulk.set_regions(&table);
    demand.until_running();
    let before = peak_bytes(&migrate);
    let mut bytes = Vec::new();
    let frame = [(RegionId(0), 5); REQUEST_ENTRIES_MAX];
    for _ in 0..FLOOD / REQUEST_ENTRIES_MAX as u64 {
        transmit::request(&mut bytes, &frame);
    }
    transmit::encode(&Frame::Ping(1), &mut bytes);
    demand.stream.write_all(&bytes).unwrap();
    let mut pages = 0;
    loop {
        match demand.event().unwrap() {
            Event::Data(range) => pages += range.pages,
            Event::Pong(_) => break,
            _ => {}
        }
    }
    assert_eq!(pages, 1);
    let growth = peak_bytes(&migrate) - before;
    assert!(growth < GROWTH_BYTES, "{growth} bytes");
    // Everything else arrives as usual.
    let rest: Vec<_> = (0..PAGES).filter(|&page| page != 5).map(|p| (RegionId(0), p)).collect();
    for batch in rest.chunks(REQUEST_ENTRIES_MAX) {
        demand.send(&Frame::Request(batch.to_vec()));
    }
    while pages < PAGES {
        pages += demand.pages().unwrap().pages;
    }
    demand.send(&Frame::Complete(umem_wire::Totals::default()));
    assert!(matches!(demand.control_event(), Some(Event::Complete(_))));
    migrate.succeeds();
}

/// Requests for every page of a large guest, without reading the answers: the source stops reading, too.
#[test]
fn unread_answers_are_not_queued() {
    let scratch = Scratch::new();
    let (migrate, mut demand, _bulk) = migrate_of(&scratch, FLOOD * 4, 0);
    demand.until_stopped();
    let before = peak_bytes(&migrate);
    // A source that stopped reading for this long has stopped.
    setsockopt(&demand.stream, sockopt::SendTimeout, &TimeVal::seconds(2)).unwrap();
    for first in (0..FLOOD * 4).step_by(REQUEST_ENTRIES_MAX) {
        let mut bytes = Vec::new();
        let pages = first..first + REQUEST_ENTRIES_MAX as u64;
        let pages: Vec<_> = pages.map(|page| (RegionId(0), page)).collect();
        transmit::request(&mut bytes, &pages);
        if demand.stream.write_all(&bytes).is_err() {
            break;
        }
    }
    let growth = peak_bytes(&migrate) - before;
    assert!(growth < GROWTH_BYTES, "{growth} bytes");
    drop(demand);
    assert!(migrate.fails().contains("demand lane"));
}

/// A source played by the test, up to its lanes being open.
struct Lanes {
    lanes: Vec<TcpStream>,
    receiver: Receiver,
}

fn hello(index: u16, bulk_lanes: u16) -> Hello {
    Hello {
        versions: PROTOCOL,
        capabilities: Capabilities::NONE,
        session: SessionId([9; 16]),
        role: if index == 0 { LaneRole::Demand } else { LaneRole::Bulk },
        index,
        bulk_lanes,
        epoch: 0,
        proof: [0; 32],
    }
}

/// Opens a lane, if it is accepted; otherwise returns the reason.
fn dial(uri: &str, hello: &Hello) -> Result<TcpStream, String> {
    let lane = TcpStream::connect(uri.strip_prefix("tcp:").unwrap());
    let mut lane = lane.map_err(|error| error.to_string())?;
    lane.write_all(&hello.encode()).unwrap();
    let mut welcome = [0; HELLO_BYTES];
    lane.read_exact(&mut welcome).map_err(|error| error.to_string())?;
    Welcome::decode(&welcome).map_err(|error| error.to_string()).map(|_| lane)
}

fn table(bytes: u64) -> RegionTable {
    let page_size = PageSize::SIZE_4K;
    RegionTable::new(vec![Region { name: "ram0".into(), bytes, page_size }]).unwrap()
}

impl Lanes {
    fn open(uri: &str) -> Lanes {
        let lanes = (0..2).map(|index| dial(uri, &hello(index, 1)).unwrap()).collect();
        Lanes { lanes, receiver: Receiver::for_source(&table(4096)) }
    }

    /// Up to the destination being ready for a guest of this size.
    fn until_ready(guests: &Guests, uri: &str) -> Lanes {
        let mut source = Lanes::open(uri);
        let table = table(guests.bytes());
        source.receiver = Receiver::for_source(&table);
        source.send(&Frame::Regions(table));
        assert!(matches!(source.event(), Event::Ready(_)));
        source
    }

    /// Up to the guest standing still here.
    fn until_stopped(guests: &Guests) -> Lanes {
        let mut source = Lanes::until_ready(guests, guests.uri());
        source.send(&Frame::Stopped { postcopy: true, background: true });
        source
    }

    fn send(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        transmit::encode(frame, &mut bytes);
        self.lanes[0].write_all(&bytes).unwrap();
    }

    fn event(&mut self) -> Event {
        loop {
            if let Some(event) = self.receiver.poll_event() {
                return event;
            }
            let Target::Control { exact } = self.receiver.next_target() else { unreachable!() };
            let mut bytes = vec![0; exact];
            let count = self.lanes[0].read(&mut bytes).unwrap();
            assert!(count > 0, "the destination closed the lane");
            self.receiver.control(&bytes[..count]).unwrap();
        }
    }
}

#[test]
fn ping_flood_does_not_grow_destination_memory() {
    let scratch = Scratch::new();
    let guests = Guests::quiet(&scratch, &["--json"]);
    let mut source = Lanes::open(guests.uri());
    let table = table(guests.bytes());
    source.receiver = Receiver::for_source(&table);
    source.send(&Frame::Regions(table));
    assert!(matches!(source.event(), Event::Ready(_)));
    let before = peak_bytes(&guests.incoming);
    source.lanes[0].write_all(&pings(FLOOD)).unwrap();
    while !matches!(source.event(), Event::Pong(number) if number == FLOOD - 1) {}
    let growth = peak_bytes(&guests.incoming) - before;
    assert!(growth < GROWTH_BYTES, "{growth} bytes");
    source.send(&Frame::Error(umem_wire::Fault {
        code: umem_wire::FaultCode::Refused,
        text: "enough".into(),
    }));
    assert!(guests.incoming.fails().contains("enough"));
}

/// The same for a source: frames other than pages, requests and pings.
#[test]
fn control_frame_flood_does_not_grow_destination_memory() {
    let frames = [
        Frame::Pong(1),
        Frame::Stopped { postcopy: true, background: true },
        Frame::Load { state_bytes: 0 },
        Frame::Switchover { stopped_us: 1 },
        Frame::Digests(vec![1]),
        Frame::Complete(umem_wire::Totals::default()),
        Frame::Error(umem_wire::Fault {
            code: umem_wire::FaultCode::Refused,
            text: "x".repeat(ERROR_TEXT_BYTES_MAX),
        }),
    ];
    for frame in frames {
        let scratch = Scratch::new();
        let guests = Guests::quiet(&scratch, &["--json"]);
        let mut source = Lanes::until_stopped(&guests);
        let growth = flood(&guests.incoming, &mut source.lanes[0], &frame);
        assert!(growth < GROWTH_BYTES, "{frame:?}: {growth} bytes");
        drop(source);
        guests.incoming.fails();
    }
}

/// Frames of minimal size take only the memory of their contents.
#[test]
fn device_state_in_one_byte_frames_does_not_grow_destination_memory() {
    let scratch = Scratch::new();
    let guests = Guests::quiet(&scratch, &["--json"]);
    let mut source = Lanes::until_stopped(&guests);
    let mut piece = transmit::device_state_header(1).to_vec();
    piece.push(0xa5);
    let before = peak_bytes(&guests.incoming);
    source.lanes[0].write_all(&piece.repeat(FLOOD as usize)).unwrap();
    source.send(&Frame::Ping(7));
    while !matches!(source.event(), Event::Pong(7)) {}
    let growth = peak_bytes(&guests.incoming) - before;
    assert!(growth < GROWTH_BYTES, "{growth} bytes");
    // All of it has been counted.
    source.send(&Frame::Load { state_bytes: FLOOD - 1 });
    let said = guests.incoming.fails();
    assert!(said.contains(&FLOOD.to_string()), "{said}");
}

/// Before the guest has stopped there is no device state.
#[test]
fn early_device_state_is_not_kept() {
    let scratch = Scratch::new();
    let guests = Guests::quiet(&scratch, &["--json"]);
    let mut source = Lanes::until_ready(&guests, guests.uri());
    let mut piece = transmit::device_state_header(1).to_vec();
    piece.push(0xa5);
    source.lanes[0].write_all(&piece).unwrap();
    let said = guests.incoming.fails();
    assert!(said.contains("device state where none belongs"), "{said}");
}

/// Two pebibytes: refused by the guest's size, before anything is allocated for them.
#[test]
fn impossibly_large_region_is_refused() {
    let scratch = Scratch::new();
    let guests = Guests::quiet(&scratch, &["--json"]);
    let before = peak_bytes(&guests.incoming);
    let mut source = Lanes::open(guests.uri());
    source.send(&Frame::Regions(table(1 << 51)));
    let Event::Error(fault) = source.event() else { panic!("the destination accepts the frame") };
    assert!(fault.text.contains("ram0"), "{}", fault.text);
    // The process ends after that, and may have ended.
    if let Some(peak) = peak(&guests.incoming) {
        assert!(peak - before < GROWTH_BYTES, "{} bytes", peak - before);
    }
    assert!(guests.incoming.fails().contains("ram0"));
}

/// A duplicate lane, a lane beyond the agreed number, and a lane with another number of lanes.
#[test]
fn surplus_lanes_are_refused_and_the_others_continue() {
    let scratch = Scratch::new();
    let mut guests = Guests::quiet(&scratch, &["--json"]);
    let uri = guests.uri().to_owned();
    let demand = dial(&uri, &hello(0, 3)).unwrap();
    let second = dial(&uri, &hello(2, 3)).unwrap();
    for one_more in [hello(2, 3), hello(1, 2), hello(0, 3)] {
        let refused = dial(&uri, &one_more).expect_err("umem accepts the lane");
        assert!(refused.contains("another migration"), "{refused}");
    }
    let wrong = dial(&uri, &hello(4, 3));
    assert!(wrong.is_err());
    let [first, third] = [1, 3].map(|index| dial(&uri, &hello(index, 3)).unwrap());
    let receiver = Receiver::for_source(&table(4096));
    let mut source = Lanes { lanes: vec![demand, first, second, third], receiver };
    source.send(&Frame::Regions(table(guests.bytes())));
    source.receiver = Receiver::for_source(&table(guests.bytes()));
    assert!(matches!(source.event(), Event::Ready(_)), "all four lanes are accepted");
    // No lane is accepted once all have arrived.
    assert!(dial(&uri, &hello(1, 3)).is_err());
    drop(source);
    assert_eq!(guests.incoming.wait().code(), Some(1));
    let said = guests.incoming.stderr();
    assert!(said.contains("lane index 4") && said.contains("the source closed it"), "{said}");
}

/// Seconds that a step may take in these tests; a side that is probed gets half as many.
const STEP: &str = "4";

/// A destination played by the test that has sent *ready* to a demo guest's source; the guest then stands still.
fn stopped(guests: &Guests) -> (Umem, LaneFromSource<TcpStream>, LaneFromSource<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let migrate = guests.migrate_to(&uri, &["-p", "--json", "--step-timeout", STEP]);
    let lane = || LaneFromSource::welcome(listener.accept().unwrap().0, Capabilities::NONE);
    let (mut demand, bulk) = (lane(), lane());
    demand.until_stopped();
    (migrate, demand, bulk)
}

/// A connected destination need not be running.
#[test]
fn silent_destination_leaves_the_guest_running_at_the_source() {
    let scratch = Scratch::new();
    let guests = Guests::quiet(&scratch, &["--json"]);
    let (migrate, _demand, _bulk) = stopped(&guests);
    let said = migrate.fails();
    assert!(said.contains("no answer for 2 s"), "{said}");
    assert_eq!(Qmp::connect(guests.qmp()).status(), "running");
}

/// The destination answers, and makes no progress.
#[test]
fn destination_that_never_loads_leaves_the_guest_running_at_the_source() {
    let scratch = Scratch::new();
    let guests = Guests::quiet(&scratch, &["--json"]);
    let (migrate, mut demand, _bulk) = stopped(&guests);
    let mut pings = 0;
    let fault = loop {
        match demand.control_event() {
            Some(Event::Ping(number)) => {
                pings += 1;
                demand.send(&Frame::Pong(number));
            }
            Some(Event::Error(fault)) => break fault,
            Some(_) => {}
            None => panic!("the reason is missing"),
        }
    };
    assert!(pings > 1, "{pings}");
    for said in [fault.text, migrate.fails()] {
        assert!(said.contains("no data moved for 4 s"), "{said}");
    }
    assert_eq!(Qmp::connect(guests.qmp()).status(), "running");
}

/// Before that the guest has not stopped.
#[test]
fn destination_that_is_never_ready_times_out() {
    let scratch = Scratch::new();
    let guests = Guests::quiet(&scratch, &["--json"]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let migrate = guests.migrate_to(&uri, &["-p", "--json", "--step-timeout", STEP]);
    let lane = || LaneFromSource::welcome(listener.accept().unwrap().0, Capabilities::NONE);
    let _lanes = (lane(), lane());
    let said = migrate.fails();
    assert!(said.contains("no data moved for 4 s"), "{said}");
}

/// The same for a source: in each of its steps, responsive or not.
#[test]
fn stalled_source_times_out() {
    for (steps, answers) in [(0, false), (1, false), (1, true), (2, false), (2, true)] {
        let scratch = Scratch::new();
        let guests = Guests::quiet(&scratch, &["--json", "--step-timeout", STEP]);
        let mut source = match steps {
            0 => Lanes::open(guests.uri()),
            1 => Lanes::until_ready(&guests, guests.uri()),
            _ => Lanes::until_stopped(&guests),
        };
        if answers {
            loop {
                match source.event() {
                    Event::Ping(number) => source.send(&Frame::Pong(number)),
                    Event::Error(_) => break,
                    other => panic!("{}", other.name()),
                }
            }
        }
        let said = guests.incoming.fails();
        let hint = match (steps, answers) {
            (0, _) => "its regions have not arrived for 4 s",
            (_, false) => "no answer for 2 s",
            (_, true) => "no data moved for 4 s",
        };
        assert!(said.contains(hint), "step {steps}: {said}");
    }
}

/// A slow side answers, and progress restarts its time limit.
#[test]
fn slow_source_does_not_time_out() {
    let scratch = Scratch::new();
    let mut guests = Guests::quiet(&scratch, &["--json", "--step-timeout", STEP]);
    let mut source = Lanes::until_stopped(&guests);
    // A second for each: three times the limit of a step without progress.
    for page in 0..13 {
        let Event::Ping(number) = source.event() else {
            panic!("the destination gives up after {page} pings")
        };
        source.send(&Frame::Pong(number));
        source.send(&Frame::Hole(PageRange { region: RegionId(0), first: page, pages: 1 }));
    }
    assert!(guests.incoming.is_running());
}
