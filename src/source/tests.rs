//! The orders to pause and to resume, between this side and a destination that the test plays.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nix::poll::PollFlags;
use umem_wire::{
    Capabilities, Frame, HELLO_BYTES, Hello, PROTOCOL, PageRange, Receiver, RegionId, RegionTable,
    Standing, Target, Totals, Welcome, transmit,
};

use super::*;
use crate::control::liveness::STEP_TIMEOUT;
use crate::host::monitor::{Answer, Question};
use crate::host::thread::HostThread;
use crate::memory::region::RamFile;
use crate::observe::output::Output;
use crate::observe::watch::Watch;
use crate::runtime::idle::IdleCores;
use crate::runtime::inbox::{Canceller, Inbox, Post};
use crate::runtime::role::Role;
use crate::source::memory::SourceMemory;
use crate::source::{Order, Plan, wait};
use crate::transport::lane::{Lane, Session};
use crate::transport::secure::{self, ClientAuth};
use crate::transport::uri::Uri;

const PAGES: u64 = 512;

/// A lane's end at a destination that the test plays.
struct End {
    stream: TcpStream,
    hello: Hello,
    receiver: Receiver,
}

impl End {
    fn accept(listener: &TcpListener, landing: Option<&RegionTable>) -> End {
        let mut stream = listener.accept().unwrap().0;
        let mut bytes = [0; HELLO_BYTES];
        stream.read_exact(&mut bytes).unwrap();
        let hello = Hello::decode(&bytes).unwrap();
        let welcome = Welcome::answer(&hello, PROTOCOL, Capabilities::RECOVERY, [0; 32]);
        stream.write_all(&welcome.unwrap().encode()).unwrap();
        let mut receiver = Receiver::for_destination(hello.role);
        landing.into_iter().for_each(|landing| receiver.set_regions(landing));
        End { stream, hello, receiver }
    }

    fn say(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        transmit::encode(frame, &mut bytes);
        self.stream.write_all(&bytes).unwrap();
    }

    /// The next event; none when the source has closed the lane.
    fn event(&mut self) -> Option<Event> {
        let mut buffer = Vec::new();
        loop {
            if let Some(event) = self.receiver.poll_event() {
                return Some(event);
            }
            let (bytes, is_run) = match self.receiver.next_target() {
                Target::Control { exact } => (exact as u64, false),
                Target::Run(run) => (run.bytes, true),
            };
            buffer.resize(usize::try_from(bytes).unwrap(), 0);
            let count = self.stream.read(&mut buffer).unwrap_or(0);
            match (count, is_run) {
                (0, _) => return None,
                (_, true) => self.receiver.landed(count as u64).unwrap(),
                (_, false) => self.receiver.control(&buffer[..count]).unwrap(),
            }
        }
    }

    /// Up to an event of this name.
    fn until(&mut self, name: &str) -> Event {
        std::iter::from_fn(|| self.event()).find(|event| event.name() == name).unwrap()
    }

    /// Notes the pages that come until the lane ends or is closed; none for a second time.
    fn pages(&mut self, have: &mut [u64]) {
        while let Some(event) = self.event() {
            let (Event::Data(range) | Event::Zero(range) | Event::Hole(range)) = event else {
                if event == Event::LaneEnd { return } else { continue }
            };
            for page in range.first..range.first + range.pages {
                let word = &mut have[usize::try_from(page / 64).unwrap()];
                assert!(*word >> (page % 64) & 1 == 0, "page {page} came twice");
                *word |= 1 << (page % 64);
            }
        }
    }
}

/// The destination's part: paused after a while, and resumed at the second address.
fn play(listeners: &[TcpListener; 2], post: &Post<InboxMessage>) {
    let [first, second] = listeners;
    let (mut demand, mut bulk) = (End::accept(first, None), End::accept(first, None));
    let Event::Regions(table) = demand.until("regions") else { unreachable!() };
    demand.receiver.set_regions(&table);
    bulk.receiver.set_regions(&table);
    demand.say(&Frame::Ready(table.units()));
    demand.until("load");
    demand.say(&Frame::Loaded);
    demand.until("switchover");
    demand.say(&Frame::Running { us_since_switchover: 1 });
    let mut have = vec![0; usize::try_from(PAGES / 64).unwrap()];
    bulk.event().unwrap();
    post.send(InboxMessage::Pause);
    bulk.pages(&mut have);
    assert_eq!(std::iter::from_fn(|| demand.event()).last(), None, "closed, too");
    // As if the last of them had not come.
    have[7] = 0;

    let port = second.local_addr().unwrap().port();
    post.send(InboxMessage::Resume(Some(Uri::Tcp { host: "127.0.0.1".into(), port })));
    let session = demand.hello.session;
    let (mut demand, mut bulk) =
        (End::accept(second, Some(&table)), End::accept(second, Some(&table)));
    for lane in [&demand, &bulk] {
        assert_eq!((lane.hello.session, lane.hello.epoch), (session, 1));
    }
    let totals = Totals::default();
    demand.say(&Frame::Resume(Standing { switched: true, running: Some(1), totals }));
    let range = PageRange { region: RegionId(0), first: 0, pages: PAGES };
    demand.say(&Frame::Have { range, words: have.clone() });
    bulk.pages(&mut have);
    assert_eq!(have, vec![u64::MAX; have.len()], "the rest, and nothing else");
    demand.say(&Frame::Complete(totals));
    demand.until("complete");
}

#[test]
fn pause_closes_every_lane_and_resume_dials_another_address() {
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.write_all(&[7; 4096 * PAGES as usize]).unwrap();
    let ram = RamFile::open_source("ram0", file.path(), false).unwrap();
    let memory = Arc::new(SourceMemory::new(vec![ram], false));
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let port = listeners[0].local_addr().unwrap().port();
    let uri = Uri::Tcp { host: "127.0.0.1".into(), port };
    let inbox = Inbox::embedded(Canceller::new().unwrap()).unwrap();
    let (post, answers) = (inbox.post(), inbox.post());
    let destination = std::thread::spawn(move || play(&listeners, &post));
    let session = Session::new(1, false, true).unwrap();
    let pass = Arc::new(ClientAuth::default());
    let wait = |fds: &[(BorrowedFd<'_>, PollFlags)], limit| wait(&inbox, fds, limit);
    let open = |index| secure::dial(&uri, &session.hello(index, 0), &pass, &wait).unwrap();
    let lanes: Vec<Lane> = (0..=1).map(open).collect();
    let link = Link::new(session, pass, Some(uri), &lanes);
    let watch = Watch::new(Role::Source, false, None);
    let host = HostThread::elsewhere(move |question| {
        answers.send(InboxMessage::Host(match question {
            Question::Stop => Answer::Stopped(Ok(None)),
            Question::StandsStill => Answer::StandsStill(Ok(())),
            Question::PutBack => Answer::PutBack(Ok(())),
            Question::Save => Answer::Saved(Ok(Vec::new())),
            _ => Answer::Resumed(Ok(())),
        }));
    });
    let plan = Plan {
        postcopy: true,
        background: true,
        precopy: None,
        cores: &[],
        idle_cores: IdleCores::Sleep,
        order: Order::Adaptive,
        step_timeout: STEP_TIMEOUT,
        watch: &watch,
        quiet: true,
        has_monitor: false,
        stays_local: true,
    };
    let output = Output::Host(Arc::new(|_| {}));
    let migration = Migration::start(&plan, output, inbox, (lanes, link), memory, host);
    let report = migration.unwrap().drive(Input::Begin).unwrap();
    assert_eq!(report.recoveries, 1);
    destination.join().unwrap();
}
