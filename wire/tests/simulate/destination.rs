//! The destination's end: the real phases and receivers; each page comes once.

use umem_wire::checksum::{digest, digest_of_zeroes};
use umem_wire::*;

use crate::lane::{LaneEnd, LanePipes, Pipe, events, send, sums};
use crate::support::Random;
use crate::world::{Content, Failure, Page};

pub(super) struct Destination {
    pub(super) phase: destination::Phase,
    pub(super) failure: Option<Failure>,
    regions: RegionTable,
    /// This side's number of each of the source's regions.
    ids: Vec<RegionId>,
    landing: Option<RegionTable>,
    pub(super) pages: Vec<Vec<Page>>,
    pub(super) lanes: Vec<LaneEnd>,
    /// For each lane: all that came of its current run is unchanged.
    pub(super) are_intact: Vec<bool>,
    /// Each lane's current run.
    begun: Vec<Option<PageRange>>,
    /// Lanes on which a page may come again.
    in_rounds: Vec<bool>,
    /// The last copy of each page in rounds.
    copies: Vec<Vec<Option<Content>>>,
    remaining: Vec<PageRange>,
    pub(super) totals: Totals,
    pub(super) is_checked: bool,
    pub(super) digests: Vec<u64>,
    pub(super) heard_digests: Option<Vec<u64>>,
    pub(super) recovers: bool,
    /// The lanes are lost, and not replaced yet.
    pub(super) is_down: bool,
    epoch: u32,
}

impl Destination {
    pub(super) fn new(regions: RegionTable, bulk_lanes: u16) -> Destination {
        Destination {
            phase: destination::Phase::new(),
            failure: None,
            ids: Vec::new(),
            landing: None,
            pages: Vec::new(),
            regions,
            lanes: (0..=bulk_lanes).map(|_| LaneEnd::Opening(Vec::new())).collect(),
            are_intact: vec![true; usize::from(bulk_lanes) + 1],
            begun: vec![None; usize::from(bulk_lanes) + 1],
            in_rounds: vec![false; usize::from(bulk_lanes) + 1],
            copies: Vec::new(),
            remaining: Vec::new(),
            totals: Totals::default(),
            is_checked: false,
            digests: Vec::new(),
            heard_digests: None,
            recovers: false,
            is_down: false,
            epoch: 0,
        }
    }

    pub(super) fn id(&self, theirs: RegionId) -> RegionId {
        self.ids[usize::from(theirs.0)]
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, destination::Phase::Completed(_) | destination::Phase::Failed { .. })
    }

    pub(super) fn input(&mut self, input: destination::Input<'_>) {
        let phase = std::mem::replace(&mut self.phase, destination::Phase::new());
        self.phase = match phase.step(input) {
            Ok(phase) => phase,
            Err((phase, error)) => {
                self.failure.get_or_insert(Failure::Phase(error));
                phase
            }
        };
    }

    fn lost(&mut self, failure: Failure) {
        if failure.is_loss() && self.recovers && self.phase.outlives_its_lanes() {
            return self.go_down();
        }
        self.failure.get_or_insert(failure);
        self.input(destination::Input::Lost);
    }

    /// Drops its lanes: landing pages become missing.
    pub(super) fn go_down(&mut self) {
        if self.is_down {
            return;
        }
        self.input(destination::Input::Broken);
        self.is_down = !self.is_over();
        for page in self.pages.iter_mut().flatten() {
            if *page == Page::Landing {
                *page = Page::Missing;
            }
        }
    }

    /// The account, first on a demand lane that replaces a lost one.
    fn account(&self, out: &mut Vec<u8>) {
        let landing = self.landing.as_ref().expect("the regions were agreed on");
        let runs = matches!(
            self.phase,
            destination::Phase::Running { .. } | destination::Phase::Completing
        );
        let switched = runs || matches!(self.phase, destination::Phase::Switched { .. });
        let running = runs.then_some(9);
        transmit::encode(&Frame::Resume(Standing { switched, running, totals: self.totals }), out);
        for range in resume::have_ranges(landing) {
            let pages = &self.pages[usize::from(self.id(range.region).0)];
            let words = (0..range.pages.div_ceil(64) as u32).map(|word| {
                let first = range.first + u64::from(word) * 64;
                let end = (first + 64).min(range.first + range.pages);
                let has = |page: &u64| matches!(pages[*page as usize], Page::Cached(_));
                (first..end).filter(has).map(|page| 1 << (page - first)).sum()
            });
            transmit::have(out, range, words.collect::<Vec<u64>>().into_iter());
        }
        if self.phase == destination::Phase::Completing {
            if self.is_checked {
                transmit::encode(&Frame::Digests(self.digests.clone()), out);
            }
            transmit::encode(&Frame::Complete(self.totals), out);
        }
    }

    pub(super) fn act(&mut self, pipes: &mut [LanePipes], random: &mut Random) {
        // The guest starts with or without lanes; frames that cannot be sent now are sent later.
        match self.phase {
            destination::Phase::Failed { .. } => {
                return pipes.iter_mut().for_each(LanePipes::close);
            }
            destination::Phase::Preparing => {
                self.input(destination::Input::GuestReady);
                let landing = self.landing.as_ref().expect("the regions have come");
                send(&mut pipes[0].to_source, &Frame::Ready(landing.units()));
            }
            destination::Phase::Settling if !self.in_rounds[1..].contains(&true) => {
                self.settle();
                self.input(destination::Input::PagesSettled);
                self.say(pipes, &Frame::Settled);
            }
            destination::Phase::Loading { .. } if random.chance(20) => {
                self.input(destination::Input::StateLoaded);
                send(&mut pipes[0].to_source, &Frame::Loaded);
            }
            destination::Phase::Switched { .. } => {
                self.input(destination::Input::GuestRunning);
                self.say(pipes, &Frame::Running { us_since_switchover: 9 });
            }
            destination::Phase::Running { .. } if self.is_whole() => {
                self.input(destination::Input::AllCached);
                if self.is_checked {
                    self.say(pipes, &Frame::Digests(self.digests.clone()));
                }
                self.say(pipes, &Frame::Complete(self.totals));
            }
            _ => {}
        }
        let can_ask = matches!(self.lanes[0], LaneEnd::Open(_));
        if can_ask && self.phase.may_request_pages() && random.chance(20) {
            self.request(&mut pipes[0].to_source, random);
        }
    }

    /// The remaining pages are missing, all others cached.
    fn settle(&mut self) {
        for range in std::mem::take(&mut self.remaining) {
            let ours = usize::from(self.id(range.region).0);
            let (first, pages) = (range.first as usize, range.pages as usize);
            self.copies[ours][first..first + pages].fill(None);
        }
        let landing = self.landing.clone().expect("pages come after the regions");
        for (theirs, region) in landing.iter() {
            let ours = usize::from(self.id(theirs).0);
            for page in 0..region.pages() {
                let Some(content) = self.copies[ours][page as usize] else { continue };
                let range = PageRange { region: theirs, first: page, pages: 1 };
                match content {
                    Content::Data => self.data(range, Page::Missing),
                    Content::Zero => self.zero(range),
                    Content::Hole => self.hole(range),
                }
            }
        }
    }

    /// Records a copy that came in a round.
    fn copied(&mut self, range: PageRange, content: Content) {
        let ours = usize::from(self.id(range.region).0);
        let (first, pages) = (range.first as usize, range.pages as usize);
        self.copies[ours][first..first + pages].fill(Some(content));
    }

    fn data(&mut self, range: PageRange, from: Page) {
        self.move_pages(range, from, Page::Cached(Content::Data));
        self.totals.data_bytes += self.bytes(range);
        if self.is_checked {
            let landing = self.landing.as_ref().expect("pages come after the regions");
            let (first, sums) = sums(landing, range);
            let digests = &mut self.digests[usize::from(range.region.0)];
            *digests = digests.wrapping_add(digest(first, &sums));
        }
    }

    fn zero(&mut self, range: PageRange) {
        self.move_pages(range, Page::Missing, Page::Cached(Content::Zero));
        self.totals.zero_bytes += self.bytes(range);
        self.count_zeroes(range);
    }

    fn hole(&mut self, range: PageRange) {
        self.move_pages(range, Page::Missing, Page::Cached(Content::Hole));
        self.totals.hole_bytes += self.bytes(range);
        self.count_zeroes(range);
    }

    /// Sends a frame. Without an open lane the account on the next lane carries its meaning.
    fn say(&self, pipes: &mut [LanePipes], frame: &Frame) {
        if let LaneEnd::Open(_) = self.lanes[0] {
            send(&mut pipes[0].to_source, frame);
        }
    }

    fn is_whole(&self) -> bool {
        self.pages.iter().flatten().all(|page| matches!(page, Page::Cached(_)))
    }

    /// Requests some missing pages, perhaps again.
    fn request(&mut self, pipe: &mut Pipe, random: &mut Random) {
        let mut wanted = Vec::new();
        for theirs in 0..self.ids.len() {
            let ours = usize::from(self.ids[theirs].0);
            let pages = self.pages[ours].iter().enumerate();
            let missing = pages.filter(|&(_, &page)| page == Page::Missing);
            let wants = missing.map(|(page, _)| (RegionId(theirs as u16), page as u64));
            wanted.extend(wants.filter(|_| random.chance(5)));
        }
        wanted.truncate(limits::REQUEST_ENTRIES_MAX);
        if !wanted.is_empty() {
            let mut out = Vec::new();
            transmit::request(&mut out, &wanted);
            pipe.send(&out);
        }
    }

    /// Reads once, no further than the lane's target.
    pub(super) fn read(&mut self, lane: usize, pipes: &mut [LanePipes], random: &mut Random) {
        let over = matches!(self.phase, destination::Phase::Failed { .. }) || self.is_down;
        if over || matches!(self.lanes[lane], LaneEnd::Closed) {
            return;
        }
        let LanePipes { to_destination: pipe, to_source: answers } = &mut pipes[lane];
        if pipe.is_empty() {
            if pipe.closed {
                self.read_end(lane);
            }
            return;
        }
        let receiver = match &mut self.lanes[lane] {
            LaneEnd::Open(receiver) => receiver,
            opening => {
                if let Some(hello) = opening.open(pipe, random) {
                    self.hello(lane, &hello, answers);
                }
                return;
            }
        };
        let result = match receiver.next_target() {
            Target::Control { exact } => receiver.control(&pipe.read_control(exact, random)),
            Target::Run(target) => {
                let (count, is_intact) = pipe.read_pages(target, random);
                self.are_intact[lane] &= is_intact;
                let verified = match count == target.bytes && receiver.is_checked() {
                    true => {
                        let is_intact = std::mem::replace(&mut self.are_intact[lane], true);
                        let range = self.begun[lane].expect("a run has begun");
                        let landing = self.landing.as_ref().expect("pages come after the regions");
                        let (_, mut sums) = sums(landing, range);
                        sums[0] ^= u32::from(!is_intact);
                        let verified = receiver.verify(&sums);
                        assert_eq!(verified.is_ok(), is_intact, "{range}");
                        verified
                    }
                    false => Ok(()),
                };
                verified.and_then(|()| receiver.landed(count))
            }
        };
        for event in events(receiver) {
            self.handle(lane, &event, answers, random);
        }
        if let Err(error) = result {
            self.lost(Failure::Receive(error));
        }
    }

    fn read_end(&mut self, lane: usize) {
        let end = std::mem::replace(&mut self.lanes[lane], LaneEnd::Closed);
        if let LaneEnd::Open(mut receiver) = end {
            match receiver.closed() {
                Ok(()) if receiver.is_ended() => return,
                Ok(()) => {}
                Err(error) => return self.lost(Failure::Receive(error)),
            }
        }
        if self.recovers && self.phase.outlives_its_lanes() {
            return self.go_down();
        }
        self.input(destination::Input::Lost);
    }

    fn hello(&mut self, lane: usize, bytes: &[u8; HELLO_BYTES], answers: &mut Pipe) {
        let hello = match Hello::decode(bytes) {
            Ok(hello) => hello,
            Err(error) => {
                answers.closed = true;
                return self.lost(Failure::Hello(error));
            }
        };
        assert_eq!(usize::from(hello.index), lane);
        let ours = if self.recovers { Capabilities::RECOVERY } else { Capabilities::NONE };
        let ours = ours.union(Capabilities::CHECKSUM).union(Capabilities::ROUNDS);
        let welcome = Welcome::answer(&hello, PROTOCOL, ours, hello.proof).unwrap();
        answers.send_bytes(&welcome.encode());
        let receiver = Receiver::for_destination(hello.role).checked(self.is_checked);
        self.lanes[lane] = LaneEnd::Open(Box::new(receiver));
        if hello.epoch == 0 {
            self.in_rounds[lane] = lane > 0 && hello.capabilities.contains(Capabilities::ROUNDS);
            return;
        }
        let landing = self.landing.as_ref().expect("the regions were agreed on");
        if lane > 0 {
            let LaneEnd::Open(receiver) = &mut self.lanes[lane] else { unreachable!() };
            return receiver.set_regions(landing);
        }
        assert!(hello.epoch > self.epoch, "a lane of an old epoch was accepted");
        self.epoch = hello.epoch;
        let mut account = Vec::new();
        self.account(&mut account);
        answers.send(&account);
        let receiver = Receiver::for_resumed_destination(landing).checked(self.is_checked);
        self.lanes[0] = LaneEnd::Open(Box::new(receiver));
    }

    fn handle(&mut self, lane: usize, event: &Event, answers: &mut Pipe, random: &mut Random) {
        if lane == 0 {
            self.input(destination::Input::Received(event));
        }
        match event {
            Event::Regions(theirs) => {
                let Agreement { ids, landing } = self.regions.compare(theirs).unwrap();
                for lane in &mut self.lanes {
                    let LaneEnd::Open(receiver) = lane else { panic!("regions before a welcome") };
                    receiver.set_regions(&landing);
                }
                self.pages = vec![Vec::new(); ids.len()];
                for (theirs, region) in landing.iter() {
                    let ours = usize::from(ids[usize::from(theirs.0)].0);
                    self.pages[ours] = vec![Page::Missing; region.pages() as usize];
                }
                self.copies = self.pages.iter().map(|pages| vec![None; pages.len()]).collect();
                self.digests = vec![0; ids.len()];
                (self.ids, self.landing) = (ids, Some(landing));
            }
            Event::RunBegins(range) => {
                self.begun[lane] = Some(*range);
                if !self.in_rounds[lane] {
                    self.move_pages(*range, Page::Missing, Page::Landing);
                }
            }
            Event::Data(range) if self.in_rounds[lane] => self.copied(*range, Content::Data),
            Event::Zero(range) if self.in_rounds[lane] => self.copied(*range, Content::Zero),
            Event::Hole(range) if self.in_rounds[lane] => self.copied(*range, Content::Hole),
            Event::RoundsEnd => self.in_rounds[lane] = false,
            Event::Remaining { runs, .. } => self.remaining.extend(runs),
            Event::Data(range) => {
                self.data(*range, Page::Landing);
                if random.chance(50) {
                    answers.send(&transmit::ack_header(*range));
                }
            }
            Event::Zero(range) => self.zero(*range),
            Event::Hole(range) => self.hole(*range),
            Event::Digests(digests) => self.heard_digests = Some(digests.clone()),
            Event::Ping(number) => send(answers, &Frame::Pong(*number)),
            _ => {}
        }
    }

    fn count_zeroes(&mut self, range: PageRange) {
        if self.is_checked {
            let landing = self.landing.as_ref().expect("pages come after the regions");
            let (first, sums) = sums(landing, range);
            let digests = &mut self.digests[usize::from(range.region.0)];
            *digests = digests.wrapping_add(digest_of_zeroes(first, sums.len() as u64));
        }
    }

    fn bytes(&self, range: PageRange) -> u64 {
        let landing = self.landing.as_ref().expect("pages come after the regions");
        range.pages * landing.get(range.region).unwrap().page_size.bytes()
    }

    /// Moves each page one step, which it takes once.
    fn move_pages(&mut self, range: PageRange, from: Page, to: Page) {
        let ours = usize::from(self.id(range.region).0);
        let (first, pages) = (range.first as usize, range.pages as usize);
        for page in &mut self.pages[ours][first..first + pages] {
            assert_eq!(*page, from, "{range}");
            *page = to;
        }
    }
}
