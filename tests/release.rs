//! `--release-ram`: the pages that the source frees, and the time.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use nix::sys::signal::Signal;
use support::{LaneFromSource, Scratch, Umem, wait_for};
use umem_wire::{
    Capabilities, Event, Frame, HELLO_BYTES, Hello, LaneRole, PROTOCOL, PageRange, Receiver,
    RegionId, RegionTable, SessionId, Target, Totals, Welcome, transmit,
};

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

const MIB: u64 = 8;
const PAGES: u64 = MIB << 8;

/// Every page has data.
fn write_ram(path: &Path) {
    let file = File::create(path).unwrap();
    for page in 0..PAGES {
        file.write_all_at(&[page as u8 | 1; 4096], page * 4096).unwrap();
    }
}

fn held(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

fn range(first: u64, pages: u64) -> PageRange {
    PageRange { region: RegionId(0), first, pages }
}

/// A `umem migrate --release-ram`, whose destination the test plays.
struct Source {
    scratch: Scratch,
    migrate: Umem,
    demand: LaneFromSource<TcpStream>,
    bulk: LaneFromSource<TcpStream>,
    landing: RegionTable,
}

impl Source {
    /// Up to the guest having stopped.
    fn start(mode: &[&str]) -> Source {
        let scratch = Scratch::new();
        write_ram(&scratch.ram("source"));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:127.0.0.1:{}", listener.local_addr().unwrap().port());
        let ram = format!("ram0={}", scratch.ram("source").display());
        let mut arguments = vec!["migrate", "--release-ram", "--json", "--ram", &ram, &uri];
        arguments.extend(mode);
        let migrate = Umem::start(arguments);
        let accept = || LaneFromSource::welcome(listener.accept().unwrap().0, Capabilities::ACKS);
        let (mut demand, mut bulk) = (accept(), accept());
        let offered = Capabilities::ACKS.union(Capabilities::RECOVERY);
        assert!(demand.is_demand() && demand.hello.capabilities == offered);
        let landing = demand.until_stopped();
        bulk.set_regions(&landing);
        Source { scratch, migrate, demand, bulk, landing }
    }

    fn held(&self) -> u64 {
        held(&self.scratch.ram("source"))
    }

    fn wait_until_held(&self, pages: u64) {
        wait_for(format!("the file to hold {pages} pages"), || {
            (self.held() == pages * 4096).then_some(())
        });
    }

    /// Receives every page on the bulk lane; returns its ranges.
    fn receive_all(&mut self) -> Vec<PageRange> {
        let runs: Vec<PageRange> = std::iter::from_fn(|| self.bulk.pages()).collect();
        assert_eq!(runs.iter().map(|run| run.pages).sum::<u64>(), self.landing.pages(RegionId(0)));
        runs
    }

    fn complete(mut self) {
        self.demand.send(&Frame::Complete(Totals::default()));
        let report = self.migrate.event("completed");
        assert_eq!(report["release_bytes"], MIB << 20);
        assert_eq!(self.held(), 0);
        self.migrate.succeeds();
    }
}

#[test]
fn acknowledged_pages_are_freed_and_the_rest_kept() {
    let mut source = Source::start(&["-p"]);
    source.demand.until_running();
    let runs = source.receive_all();
    assert_eq!(source.held(), MIB << 20, "nothing has been acknowledged");
    // On either lane, whole runs and parts of them.
    source.bulk.send(&Frame::Ack(range(0, PAGES / 4)));
    source.demand.send(&Frame::Ack(range(PAGES / 2, PAGES / 4)));
    source.wait_until_held(PAGES / 2);
    source.demand.send(&Frame::Ack(range(PAGES - 1, 1)));
    source.wait_until_held(PAGES / 2 - 1);
    assert!(runs.len() > 1);
    // Pages without an acknowledgement are freed at the end.
    source.complete();
}

#[test]
fn no_page_is_freed_before_the_switchover() {
    // Every page has been sent and acknowledged, and the guest continues at the source after all.
    let mut source = Source::start(&[]);
    source.receive_all();
    source.demand.send(&Frame::Ack(range(0, PAGES)));
    // A side that answers this has read everything before it.
    source.demand.send(&Frame::Ping(1));
    while !matches!(source.demand.control_event(), Some(Event::Pong(1))) {}
    source.migrate.signal(Signal::SIGINT);
    let (scratch, error) = (source.scratch, source.migrate.fails());
    assert!(error.contains("interrupted"), "{error}");
    assert_eq!(held(&scratch.ram("source")), MIB << 20);

    // The guest leaves the source: pages acknowledged before the switchover are freed after it.
    let mut source = Source::start(&[]);
    source.receive_all();
    source.demand.send(&Frame::Ack(range(0, PAGES / 2)));
    source.demand.send(&Frame::Ping(1));
    while !matches!(source.demand.control_event(), Some(Event::Load { .. })) {}
    assert_eq!(source.held(), MIB << 20);
    source.demand.send(&Frame::Loaded);
    while !matches!(source.demand.control_event(), Some(Event::Switchover { .. })) {}
    source.wait_until_held(PAGES / 2);
    source.demand.send(&Frame::Running { us_since_switchover: 1 });
    source.complete();
}

#[test]
fn acknowledgement_of_an_unsent_page_is_refused() {
    // The page has no demand, and there is no background.
    let mut source = Source::start(&["-p", "-n"]);
    source.demand.until_running();
    source.demand.send(&Frame::Request(vec![(RegionId(0), 5)]));
    assert_eq!(source.demand.pages(), Some(range(5, 1)));
    source.demand.send(&Frame::Ack(range(5, 1)));
    source.wait_until_held(PAGES - 1);
    source.demand.send(&Frame::Ack(range(6, 1)));
    let (scratch, error) = (source.scratch, source.migrate.fails());
    assert!(error.contains("the acknowledged page 6 of RAM ram0 was not sent"), "{error}");
    assert_eq!(held(&scratch.ram("source")), (PAGES - 1) * 4096, "the page is kept");

    // The same page twice.
    let mut source = Source::start(&["-p"]);
    source.demand.until_running();
    source.receive_all();
    source.bulk.send(&Frame::Ack(range(0, 10)));
    source.wait_until_held(PAGES - 10);
    source.bulk.send(&Frame::Ack(range(9, 2)));
    let error = source.migrate.fails();
    assert!(error.contains("the acknowledged page 9 of RAM ram0"), "{error}");
}

#[test]
fn unrequested_acknowledgements_end_the_migration() {
    let scratch = Scratch::new();
    write_ram(&scratch.ram("source"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:127.0.0.1:{}", listener.local_addr().unwrap().port());
    let ram = format!("ram0={}", scratch.ram("source").display());
    let migrate = Umem::start(["migrate", "-p", "--json", "--ram", &ram, &uri]);
    let accept = || LaneFromSource::welcome(listener.accept().unwrap().0, Capabilities::ACKS);
    let (mut demand, mut bulk) = (accept(), accept());
    assert_eq!(demand.hello.capabilities, Capabilities::RECOVERY);
    let landing = demand.until_stopped();
    bulk.set_regions(&landing);
    demand.until_running();
    let run = bulk.pages().unwrap();
    demand.send(&Frame::Ack(run));
    let error = migrate.fails();
    assert!(error.contains("unrequested"), "{error}");
    assert_eq!(held(&scratch.ram("source")), MIB << 20);
}

#[test]
fn release_ram_refuses_a_file_on_disk_and_an_old_destination() {
    let scratch = Scratch::new();
    // The directory of the tests' executable is on a disk.
    let directory = tempfile::tempdir_in(Path::new(UMEM).parent().unwrap()).unwrap();
    let file = directory.path().join("snapshot");
    write_ram(&file);
    let ram = format!("ram0={}", file.display());
    let arguments = ["migrate", "-p", "--release-ram", "--ram", &ram, "tcp:127.0.0.1:1"];
    let error = Umem::start(arguments).fails();
    assert!(error.contains("--release-ram would destroy"), "{error}");

    write_ram(&scratch.ram("source"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:127.0.0.1:{}", listener.local_addr().unwrap().port());
    let ram = format!("ram0={}", scratch.ram("source").display());
    let migrate = Umem::start(["migrate", "-p", "--release-ram", "--ram", &ram, &uri]);
    LaneFromSource::welcome(listener.accept().unwrap().0, Capabilities::NONE);
    let error = migrate.fails();
    assert!(error.contains("does not acknowledge pages"), "{error}");
}

fn incoming(scratch: &Scratch) -> Umem {
    let ram = format!("ram0={}", scratch.ram("destination").display());
    let qmp = scratch.path("guest.qmp").display().to_string();
    let mib = MIB.to_string();
    let mut arguments = vec!["incoming", "--json", "--ram", &ram, "tcp:127.0.0.1:0", "--", UMEM];
    arguments.extend(["guest", "--incoming", "--threads", "0"]);
    arguments.extend(["--ram", &ram, "--size", &mib, "--qmp", &qmp]);
    Umem::start(arguments)
}

#[test]
fn moved_guest_leaves_no_memory_at_the_source() {
    for mode in [&["-p"][..], &[], &["-p", "--lanes", "2"]] {
        let scratch = Scratch::new();
        let source = scratch.ram("source");
        write_ram(&source);
        let before = std::fs::read(&source).unwrap();
        let mut incoming = incoming(&scratch);
        let uri = incoming.event("listening")["uri"].as_str().unwrap().to_owned();
        let ram = format!("ram0={}", source.display());
        let mut arguments = vec!["migrate", "--release-ram", "--json", "--ram", &ram, &uri];
        arguments.extend(mode);
        let mut migrate = Umem::start(arguments);
        assert_eq!(migrate.event("completed")["release_bytes"], MIB << 20);
        incoming.event("completed");
        migrate.succeeds();
        assert_eq!(held(&source), 0);
        assert!(std::fs::read(scratch.ram("destination")).unwrap() == before);
    }
}

/// The real destination: its acknowledgements on a bulk lane cover the pages received there, each once.
#[test]
fn destination_acknowledges_received_pages() {
    let scratch = Scratch::new();
    let mut incoming = incoming(&scratch);
    let uri = incoming.event("listening")["uri"].as_str().unwrap().to_owned();
    let mut lanes: Vec<TcpStream> = Vec::new();
    for index in 0..2 {
        let hello = Hello {
            versions: PROTOCOL,
            capabilities: Capabilities::ACKS,
            session: SessionId([7; 16]),
            role: if index == 0 { LaneRole::Demand } else { LaneRole::Bulk },
            index,
            bulk_lanes: 1,
            epoch: 0,
            proof: [0; 32],
        };
        let mut lane = TcpStream::connect(uri.strip_prefix("tcp:").unwrap()).unwrap();
        lane.write_all(&hello.encode()).unwrap();
        let mut welcome = [0; HELLO_BYTES];
        lane.read_exact(&mut welcome).unwrap();
        assert_eq!(Welcome::decode(&welcome).unwrap().capabilities, Capabilities::ACKS);
        lanes.push(lane);
    }
    let region = umem_wire::Region {
        name: "ram0".into(),
        bytes: MIB << 20,
        page_size: umem_wire::PageSize::SIZE_4K,
    };
    let table = RegionTable::new(vec![region]).unwrap();
    let send = |lane: &mut TcpStream, frame: &Frame, body: &[u8]| {
        let mut bytes = Vec::new();
        transmit::encode(frame, &mut bytes);
        bytes.extend_from_slice(body);
        lane.write_all(&bytes).unwrap();
    };
    let mut demand = Receiver::for_source(&table);
    send(&mut lanes[0], &Frame::Regions(table.clone()), &[]);
    assert_eq!(event(&mut lanes[0], &mut demand), Some(Event::Ready(table.clone())));
    send(&mut lanes[0], &Frame::Stopped { postcopy: true, background: true }, &[]);
    // Every second page with data, then the rest as holes: many ranges, then a large one.
    for page in (0..PAGES / 2).step_by(2) {
        send(&mut lanes[1], &Frame::Data(range(page, 1)), &[0xa5; 4096]);
    }
    send(&mut lanes[1], &Frame::Hole(range(PAGES / 2, PAGES / 4)), &[]);
    send(&mut lanes[1], &Frame::LaneEnd, &[]);
    let mut bulk = Receiver::for_source_bulk();
    bulk.set_regions(&table);
    let mut acknowledged = vec![0; PAGES as usize];
    while let Some(event) = event(&mut lanes[1], &mut bulk) {
        let Event::Ack(PageRange { first, pages, .. }) = event else { panic!("{event:?}") };
        (first..first + pages).for_each(|page| acknowledged[page as usize] += 1);
    }
    for (page, times) in acknowledged.into_iter().enumerate() {
        let has_come = page < PAGES as usize / 2 && page % 2 == 0
            || (PAGES / 2..PAGES / 4 * 3).contains(&(page as u64));
        assert_eq!(times, i32::from(has_come), "page {page}");
    }
}

/// The next event; None if the lane is closed.
fn event(lane: &mut TcpStream, receiver: &mut Receiver) -> Option<Event> {
    loop {
        if let Some(event) = receiver.poll_event() {
            return Some(event);
        }
        let Target::Control { exact } = receiver.next_target() else { unreachable!() };
        let mut bytes = vec![0; exact];
        match lane.read(&mut bytes).unwrap_or(0) {
            0 => return None,
            count => receiver.control(&bytes[..count]).unwrap(),
        }
    }
}
