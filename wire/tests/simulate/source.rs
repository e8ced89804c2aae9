//! The source's end: the real phases and receivers, and a made-up guest.

use umem_wire::checksum::{digest, digest_of_zeroes};
use umem_wire::*;

use crate::lane::{LaneEnd, LanePipes, Pipe, events, send, sums};
use crate::support::Random;
use crate::world::{Content, Failure};

pub(super) struct Source {
    pub(super) phase: source::Phase,
    pub(super) failure: Option<Failure>,
    pub(super) committed: bool,
    /// With page sizes at first, with landing units from ready on.
    pub(super) regions: RegionTable,
    /// Of each unit, once the units are known.
    pub(super) contents: Vec<Vec<Content>>,
    claimed: Vec<Vec<bool>>,
    /// Pages that are still to be sent (again) in rounds, if there are rounds.
    dirty: Vec<Vec<bool>>,
    /// Runs that are still to be sent in rounds.
    rounds: u64,
    lanes: Vec<LaneEnd>,
    pub(super) hellos: Vec<Hello>,
    postcopy: bool,
    background: bool,
    state_bytes: u64,
    ended_lanes: bool,
    pub(super) totals: Totals,
    pub(super) is_checked: bool,
    pub(super) heard_digests: Option<Vec<u64>>,
    pub(super) recovers: bool,
    /// The lanes are lost, and not replaced yet.
    pub(super) is_down: bool,
    pub(super) epoch: u32,
    /// The destination's standing on new lanes; nothing else is processed before the whole account.
    standing: Option<Standing>,
    is_accounted: bool,
}

impl Source {
    pub(super) fn new(regions: RegionTable, bulk_lanes: u16, random: &mut Random) -> Source {
        let hello = |index: u16| Hello {
            versions: PROTOCOL,
            capabilities: Capabilities::NONE,
            session: SessionId([7; 16]),
            role: if index == 0 { LaneRole::Demand } else { LaneRole::Bulk },
            index,
            bulk_lanes,
            epoch: 0,
            proof: [9; 32],
        };
        let postcopy = random.chance(80);
        Source {
            phase: source::Phase::new(),
            failure: None,
            committed: false,
            claimed: Vec::new(),
            dirty: Vec::new(),
            rounds: 0,
            contents: Vec::new(),
            regions,
            lanes: Vec::new(),
            hellos: (0..=bulk_lanes).map(hello).collect(),
            postcopy,
            background: !postcopy || random.chance(70),
            state_bytes: random.below(300_000),
            ended_lanes: false,
            totals: Totals::default(),
            is_checked: false,
            heard_digests: None,
            recovers: false,
            is_down: false,
            epoch: 0,
            standing: None,
            is_accounted: true,
        }
    }

    /// Makes up the content of the guest's memory, in the landing table's units.
    fn land(&mut self, landing: &RegionTable, random: &mut Random) {
        let kinds = [Content::Data, Content::Data, Content::Zero, Content::Hole];
        let contents = landing.iter().map(|(_, region)| {
            // Stretches of one kind, so that runs have lengths.
            let mut kind = Content::Data;
            let mut page = || {
                if random.chance(10) {
                    kind = kinds[random.index(kinds.len())];
                }
                kind
            };
            (0..region.pages()).map(|_| page()).collect()
        });
        self.contents = contents.collect();
        self.claimed = self.contents.iter().map(|pages| vec![false; pages.len()]).collect();
        self.dirty = self.contents.iter().map(|pages| vec![true; pages.len()]).collect();
        self.rounds = random.below(100);
        self.regions = landing.clone();
        for lane in &mut self.lanes[1..] {
            let LaneEnd::Open(receiver) = lane else { panic!("regions before a welcome") };
            receiver.set_regions(landing);
        }
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, source::Phase::Completed(_) | source::Phase::Failed { .. })
    }

    pub(super) fn input(&mut self, input: source::Input<'_>) {
        self.phase = match std::mem::replace(&mut self.phase, source::Phase::new()).step(input) {
            Ok(phase) => phase,
            Err((phase, error)) => {
                self.failure.get_or_insert(Failure::Phase(error));
                phase
            }
        };
    }

    /// Drops the lanes: keeps the cause, and gives it to the phase.
    fn lost(&mut self, failure: Failure) {
        if self.recovers && self.committed && failure.is_loss() {
            return self.go_down();
        }
        self.failure.get_or_insert(failure);
        self.input(source::Input::Lost);
    }

    fn go_down(&mut self) {
        self.input(source::Input::Broken);
        self.is_down = !self.is_over();
        self.lanes.clear();
        self.ended_lanes = false;
        self.is_accounted = false;
    }

    /// Processes the destination's account.
    fn account(&mut self, event: &Event, pipes: &mut [LanePipes]) {
        match event {
            Event::Resume(standing) => self.standing = Some(*standing),
            Event::Have { range, words } => {
                for page in range.first..range.first + range.pages {
                    let bit = page - range.first;
                    let has = words[(bit / 64) as usize] >> (bit % 64) & 1 == 1;
                    let claimed = &mut self.claimed[usize::from(range.region.0)][page as usize];
                    assert!(*claimed || !has, "page {page} arrived but was not sent");
                    *claimed = has;
                }
            }
            Event::Accounted => {
                self.is_accounted = true;
                let standing = self.standing.take().expect("the standing comes first");
                self.totals = standing.totals;
                if !standing.switched {
                    self.say(pipes, &Frame::Switchover { stopped_us: 2000 });
                }
            }
            _ => {}
        }
    }

    pub(super) fn act(&mut self, pipes: &mut [LanePipes], random: &mut Random) {
        if self.is_down {
            return;
        }
        match self.phase {
            source::Phase::Failed { .. } => return pipes.iter_mut().for_each(LanePipes::close),
            source::Phase::Completed(_) => return self.say_goodbye(pipes),
            _ => {}
        }
        if self.lanes.len() < self.hellos.len() {
            let index = self.lanes.len();
            pipes[index].to_destination.send_bytes(&self.hellos[index].encode());
            return self.lanes.push(LaneEnd::Opening(Vec::new()));
        }
        let is_open = self.lanes.iter().all(|lane| matches!(lane, LaneEnd::Open(_)));
        if !is_open || !self.is_accounted {
            return;
        }
        if random.chance(2) {
            self.say(pipes, &Frame::Ping(random.next()));
        }
        self.act_in_phase(pipes, random);
        if self.phase.may_send_pages() && self.background && !self.ended_lanes {
            self.send_background(pipes, random);
        }
    }

    fn act_in_phase(&mut self, pipes: &mut [LanePipes], random: &mut Random) {
        match self.phase {
            source::Phase::Connected => {
                self.input(source::Input::SentRegions);
                self.say(pipes, &Frame::Regions(self.regions.clone()));
            }
            source::Phase::Ready if self.has_rounds() => {
                self.input(source::Input::SentRounds);
                self.say(pipes, &Frame::Rounds);
            }
            source::Phase::Rounds if self.rounds > 0 => {
                self.rounds -= 1;
                self.send_in_round(pipes, random);
            }
            source::Phase::Rounds => {
                for lane in &mut pipes[1..] {
                    send(&mut lane.to_destination, &Frame::RoundsEnd);
                }
                self.input(source::Input::SentRemaining);
                self.say_what_remains(pipes, random);
            }
            source::Phase::Ready | source::Phase::Settled => {
                let (postcopy, background) = (self.postcopy, self.background);
                self.input(source::Input::GuestStopped { postcopy, background });
                self.say(pipes, &Frame::Stopped { postcopy, background });
            }
            source::Phase::Saving { state_bytes } if state_bytes < self.state_bytes => {
                let most = limits::STATE_CHUNK_BYTES_MAX as u64;
                let bytes = random.partial(most.min(self.state_bytes - state_bytes)).max(500);
                let bytes = bytes.min(self.state_bytes - state_bytes);
                self.input(source::Input::SentState { bytes });
                let mut frame = transmit::device_state_header(bytes as usize).to_vec();
                frame.extend(vec![0xa5; bytes as usize]);
                pipes[0].to_destination.send(&frame);
            }
            source::Phase::Saving { state_bytes } => {
                self.input(source::Input::SentLoad);
                self.say(pipes, &Frame::Load { state_bytes });
            }
            source::Phase::Loaded { .. } => {
                self.input(source::Input::SentSwitchover);
                self.committed = true;
                self.say(pipes, &Frame::Switchover { stopped_us: 1000 });
            }
            _ => {}
        }
    }

    fn has_rounds(&self) -> bool {
        self.hellos[0].capabilities.contains(Capabilities::ROUNDS)
    }

    /// The guest writes somewhere, then a run of written pages is sent, on the lane of its 64
    /// pages.
    fn send_in_round(&mut self, pipes: &mut [LanePipes], random: &mut Random) {
        let kinds = [Content::Data, Content::Zero, Content::Hole];
        for _ in 0..random.below(20) {
            let region = random.index(self.contents.len());
            let page = random.index(self.contents[region].len());
            self.contents[region][page] = kinds[random.index(kinds.len())];
            self.dirty[region][page] = true;
        }
        let region = random.index(self.contents.len());
        let start = random.index(self.contents[region].len());
        let dirty = &self.dirty[region];
        let Some(first) = (start..dirty.len()).find(|&page| dirty[page]) else { return };
        let lane = 1 + (region + first / 64) % (pipes.len() - 1);
        let most = 1 + random.below(64 - first as u64 % 64);
        // Nothing counts as sent: clean pages are sent again, too.
        self.claimed[region].fill(false);
        let totals = self.totals;
        let sent = self.send_run(&mut pipes[lane].to_destination, region, first, most) as usize;
        self.totals = totals;
        self.claimed[region].fill(false);
        self.dirty[region][first..first + sent].fill(false);
    }

    /// The guest has stopped: clean pages have been sent.
    fn say_what_remains(&mut self, pipes: &mut [LanePipes], random: &mut Random) {
        let mut runs: Vec<PageRange> = Vec::new();
        for (id, region) in self.regions.clone().iter() {
            let index = usize::from(id.0);
            for page in 0..region.pages() as usize {
                if !self.dirty[index][page] {
                    self.claimed[index][page] = true;
                    let bytes = region.page_size.bytes();
                    match self.contents[index][page] {
                        Content::Data => self.totals.data_bytes += bytes,
                        Content::Zero => self.totals.zero_bytes += bytes,
                        Content::Hole => self.totals.hole_bytes += bytes,
                    }
                    continue;
                }
                let first = page as u64;
                match runs
                    .last_mut()
                    .filter(|run| run.region == id && run.first + run.pages == first)
                {
                    Some(run) => run.pages += 1,
                    None => runs.push(PageRange { region: id, first, pages: 1 }),
                }
            }
        }
        while !runs.is_empty() && random.chance(50) {
            let some = runs.split_off(random.index(runs.len()));
            self.say(pipes, &Frame::Remaining { runs: some, last: false });
        }
        self.say(pipes, &Frame::Remaining { runs, last: true });
    }

    fn say_goodbye(&mut self, pipes: &mut [LanePipes]) {
        self.end_lanes(pipes);
        if self.is_checked {
            self.say(pipes, &Frame::Digests(self.digests()));
        }
        self.say(pipes, &Frame::Complete(self.totals));
        pipes.iter_mut().for_each(LanePipes::close);
    }

    fn say(&self, pipes: &mut [LanePipes], frame: &Frame) {
        send(&mut pipes[0].to_destination, frame);
    }

    /// The digests of all of its memory.
    pub(super) fn digests(&self) -> Vec<u64> {
        let of = |(region, pages): (usize, &Vec<Content>)| {
            let region = RegionId(region as u16);
            (0..).zip(pages).fold(0u64, |all, (first, &content)| {
                let (first, sums) = sums(&self.regions, PageRange { region, first, pages: 1 });
                all.wrapping_add(match content {
                    Content::Data => digest(first, &sums),
                    Content::Zero | Content::Hole => digest_of_zeroes(first, sums.len() as u64),
                })
            })
        };
        self.contents.iter().enumerate().map(of).collect()
    }

    /// Sends the next unclaimed run from a random place on, or ends the lanes.
    fn send_background(&mut self, pipes: &mut [LanePipes], random: &mut Random) {
        let lane = if pipes.len() == 1 { 0 } else { 1 + random.index(pipes.len() - 1) };
        let start = random.index(self.claimed.len());
        for region in (start..self.claimed.len()).chain(0..start) {
            let unclaimed = |&(_, claimed): &(usize, &bool)| !claimed;
            if let Some((first, _)) = self.claimed[region].iter().enumerate().find(unclaimed) {
                let most = 1 + random.below(600);
                let sent = self.send_run(&mut pipes[lane].to_destination, region, first, most);
                self.totals.pages_background += sent;
                return;
            }
        }
        self.end_lanes(pipes);
        self.input(source::Input::PagesAllSent);
    }

    fn end_lanes(&mut self, pipes: &mut [LanePipes]) {
        if !std::mem::replace(&mut self.ended_lanes, true) {
            for lane in &mut pipes[1..] {
                send(&mut lane.to_destination, &Frame::LaneEnd);
            }
        }
    }

    /// Claims and sends the longest run of one kind that starts here, `most` pages at most.
    fn send_run(&mut self, pipe: &mut Pipe, region: usize, first: usize, most: u64) -> u64 {
        let id = RegionId(region as u16);
        let page_size = self.regions.get(id).unwrap().page_size;
        let kind = self.contents[region][first];
        let most = match kind {
            Content::Data if self.is_checked => most.min(page_size.checked_run_pages_max()),
            Content::Data => most.min(page_size.run_pages_max()),
            _ => most,
        };
        let (contents, claimed) = (&self.contents[region], &self.claimed[region]);
        let fits = |&page: &usize| contents[page] == kind && !claimed[page];
        let end = first + most as usize;
        let pages = (first..end.min(contents.len())).take_while(fits).count();
        assert!(pages > 0);
        self.claimed[region][first..first + pages].fill(true);

        let range = PageRange { region: id, first: first as u64, pages: pages as u64 };
        let bytes = range.pages * page_size.bytes();
        match kind {
            Content::Data => {
                let sums = if self.is_checked { sums(&self.regions, range).1 } else { Vec::new() };
                pipe.send_data(range, &sums);
                let byte_offset = range.first * page_size.bytes();
                pipe.send_pages(RunTarget { region: id, byte_offset, bytes });
                self.totals.data_bytes += bytes;
            }
            Content::Zero => {
                pipe.send(&transmit::zero_header(range));
                self.totals.zero_bytes += bytes;
            }
            Content::Hole => {
                pipe.send(&transmit::hole_header(range));
                self.totals.hole_bytes += bytes;
            }
        }
        range.pages
    }

    /// Reads ahead as it likes: only control bytes come.
    pub(super) fn read(&mut self, lane: usize, pipes: &mut [LanePipes], random: &mut Random) {
        let over = matches!(self.phase, source::Phase::Failed { .. }) || self.is_down;
        if over || lane >= self.lanes.len() || matches!(self.lanes[lane], LaneEnd::Closed) {
            return;
        }
        let pipe = &mut pipes[lane].to_source;
        if pipe.is_empty() {
            if pipe.closed {
                self.read_end(lane);
            }
            return;
        }
        let receiver = match &mut self.lanes[lane] {
            LaneEnd::Open(receiver) => receiver,
            opening => {
                if let Some(welcome) = opening.open(pipe, random) {
                    self.welcome(lane, &welcome);
                }
                return;
            }
        };
        let bytes = pipe.read_control(1000, random);
        let result = receiver.control(&bytes);
        for event in events(receiver) {
            self.handle(lane, &event, pipes, random);
        }
        if let Err(error) = result {
            self.lost(Failure::Receive(error));
        }
    }

    fn read_end(&mut self, lane: usize) {
        let end = std::mem::replace(&mut self.lanes[lane], LaneEnd::Closed);
        if self.recovers && self.committed {
            return self.go_down();
        }
        if let LaneEnd::Open(mut receiver) = end
            && let Err(error) = receiver.closed()
        {
            return self.lost(Failure::Receive(error));
        }
        self.input(source::Input::Lost);
    }

    fn welcome(&mut self, lane: usize, bytes: &[u8; HELLO_BYTES]) {
        let checked = Welcome::decode(bytes).and_then(|w| w.check(&self.hellos[lane]));
        if let Err(error) = checked {
            return self.lost(Failure::Hello(error));
        }
        let receiver = match lane {
            0 if self.epoch > 0 => Receiver::for_resumed_source(&self.regions),
            0 => Receiver::for_source(&self.regions),
            _ => Receiver::for_source_bulk(),
        };
        self.lanes[lane] = LaneEnd::Open(Box::new(receiver.checked(self.is_checked)));
        if let (1.., LaneEnd::Open(receiver)) = (self.epoch, &mut self.lanes[lane]) {
            receiver.set_regions(&self.regions);
        }
    }

    fn handle(&mut self, lane: usize, event: &Event, pipes: &mut [LanePipes], random: &mut Random) {
        if lane == 0 {
            self.input(source::Input::Received(event));
        }
        if let source::Phase::Failed { .. } = self.phase {
            return;
        }
        self.account(event, pipes);
        if let Event::Digests(digests) = event {
            self.heard_digests = Some(digests.clone());
        }
        if let Event::Ready(landing) = event {
            self.land(landing, random);
        }
        if let Event::Request(pages) = event {
            for &(region, page) in pages {
                let (region, page) = (usize::from(region.0), page as usize);
                if !self.claimed[region][page] {
                    let pipe = &mut pipes[0].to_destination;
                    self.totals.pages_demand += self.send_run(pipe, region, page, 1);
                }
            }
        }
    }
}
