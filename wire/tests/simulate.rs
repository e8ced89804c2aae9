//! Two ends in one test: the real receivers and phase machines of a source and a destination, over
//! lanes that are chopped at random and read in a random order, up to the last page or up to a
//! lane's sudden end.
//!
//! Pages are virtual: on a pipe stands *which* bytes of which page come next, never the bytes, so
//! gigabytes cost nothing, and a byte that would land in the wrong place is caught at once.
//!
//! In a session that recovers lanes are cut again and again, also while they are being opened and while
//! the destination says what it has, and opened anew: everything arrives all the same, each page once.
//!
//! With checksums bits change on the way too, and bytes come again: no page is cached that is not as it was
//! sent, everything arrives all the same, and both ends' digests are equal.
//!
//! Checked at every step: never may both guests run. At the end of a whole run: every page arrived
//! exactly once, as what the source has. At the end of a broken one: both ends know a typed error
//! or had finished, and the source may run exactly if it had not committed.

mod support;

use std::collections::VecDeque;
use support::{Random, region, seeds};
use umem_wire::checksum::{SUMMED_BYTES, digest};
use umem_wire::*;

/// More steps than any run takes; one that takes them is stuck.
const STEPS_MAX: u64 = 1_000_000;

#[test]
fn whole_migrations() {
    for seed in seeds(200) {
        let mut world = World::new(Random(seed));
        for step in 0.. {
            assert!(
                step < STEPS_MAX,
                "stuck: {:?} {:?}",
                world.source.phase,
                world.destination.phase
            );
            world.step();
            if world.is_completed() {
                break;
            }
        }
        world.assert_whole();
    }
}

#[test]
fn broken_migrations() {
    let (mut resumed, mut lost, mut completed) = (0, 0, 0);
    for seed in seeds(400) {
        let mut world = World::new(Random(seed));
        let steps_before_fault = world.random.below(3000);
        for _ in 0..steps_before_fault {
            world.step();
        }
        world.inject_fault();
        for step in 0.. {
            assert!(
                step < STEPS_MAX,
                "stuck: {:?} {:?}",
                world.source.phase,
                world.destination.phase
            );
            if world.is_over() {
                break;
            }
            world.step();
        }
        world.assert_ended();
        match world.source.phase {
            source::Phase::Completed(_) => completed += 1,
            _ if world.source.phase.may_run() => resumed += 1,
            _ => lost += 1,
        }
    }
    println!("{resumed} resumed at the source, {lost} not, {completed} completed");
    let one_seed = std::env::var_os("UMEM_SEED").is_some();
    assert!(one_seed || (resumed > 0 && lost > 0 && completed > 0));
}

#[test]
fn recovered_migrations() {
    let (mut whole, mut resumed, mut reconnected) = (0, 0, 0);
    for seed in seeds(400) {
        let mut world = World::new(Random(seed));
        world.recover();
        // From very often to rarely.
        let interval = [30, 300, 3000][world.random.index(3)];
        let mut cuts_left = world.random.below(40);
        for step in 0.. {
            assert!(
                step < STEPS_MAX,
                "stuck: {:?} {:?}",
                world.source.phase,
                world.destination.phase
            );
            if world.is_over_or_kept() {
                break;
            }
            assert!(
                !world.source.committed || world.source.failure.is_none(),
                "{:?}",
                world.source.failure
            );
            assert!(
                world.destination.failure.is_none() || !world.source.committed,
                "{:?}",
                world.destination.failure
            );
            // Cuts before the commit point end the migration, of which there is another test.
            let may_cut = world.source.committed || world.random.chance(1);
            if may_cut && cuts_left > 0 && world.random.below(interval) == 0 {
                cuts_left -= 1;
                world.cut_some();
            }
            world.step();
            world.reconnect();
        }
        reconnected += world.source.epoch;
        if world.source.committed {
            whole += 1;
            assert_eq!(world.source.failure, None);
            assert!(matches!(world.source.phase, source::Phase::Completed(_)));
            assert!(matches!(world.destination.phase, destination::Phase::Completed(_)));
            world.assert_pages();
        } else {
            resumed += 1;
            assert!(world.source.phase.may_run() && !world.destination.phase.may_run());
        }
    }
    println!("{whole} went on over {reconnected} attempts, {resumed} resumed at the source");
    let one_seed = std::env::var_os("UMEM_SEED").is_some();
    assert!(one_seed || (whole > 0 && resumed > 0 && reconnected > 500));
}

#[test]
fn corrupted_migrations() {
    let (mut whole, mut resumed, mut reconnected) = (0, 0, 0);
    for seed in seeds(300) {
        let mut world = World::checked(Random(seed), true);
        world.recover();
        let interval = [10, 100, 1000][world.random.index(3)];
        let mut left = world.random.below(40);
        for step in 0.. {
            assert!(
                step < STEPS_MAX,
                "stuck: {:?} {:?}",
                world.source.phase,
                world.destination.phase
            );
            if world.is_over_or_kept() {
                break;
            }
            let committed = world.source.committed;
            assert!(!committed || world.source.failure.is_none(), "{:?}", world.source.failure);
            let failure = &world.destination.failure;
            assert!(failure.is_none() || !committed, "{failure:?}");
            // What is spoilt before the commit point ends the migration.
            let may_spoil = committed || world.random.below(500) == 0;
            if may_spoil && left > 0 && world.random.below(interval) == 0 {
                left -= 1;
                match world.random.chance(10) {
                    true => world.cut_some(),
                    false => world.spoil_some(),
                }
            }
            world.step();
            world.reconnect();
        }
        reconnected += world.source.epoch;
        if world.source.committed {
            whole += 1;
            assert_eq!(world.source.failure, None);
            assert!(matches!(world.source.phase, source::Phase::Completed(_)));
            assert!(matches!(world.destination.phase, destination::Phase::Completed(_)));
            world.assert_pages();
            world.assert_digests();
        } else {
            resumed += 1;
            assert!(world.source.phase.may_run() && !world.destination.phase.may_run());
        }
    }
    println!("{whole} went on over {reconnected} attempts, {resumed} resumed at the source");
    let one_seed = std::env::var_os("UMEM_SEED").is_some();
    assert!(one_seed || (whole > 0 && resumed > 0 && reconnected > 500));
}

/// What a page is at the source.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Content {
    Data,
    Zero,
    Hole,
}

/// What a page is at the destination.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Page {
    Missing,
    Landing,
    Cached(Content),
}

/// Why an end stopped.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Failure {
    Hello(HelloError),
    Receive(ReceiveError),
    Phase(PhaseError),
}

impl Failure {
    /// Another lane may do better.
    fn is_loss(&self) -> bool {
        match self {
            Failure::Receive(error) => {
                error.is_corruption() || matches!(error, ReceiveError::Truncated { .. })
            }
            Failure::Hello(_) => true,
            Failure::Phase(_) => false,
        }
    }
}

struct World {
    random: Random,
    source: Source,
    destination: Destination,
    /// Lane 0 is the demand lane.
    lanes: Vec<LanePipes>,
    /// Frames have checksums.
    is_checked: bool,
}

struct LanePipes {
    to_destination: Pipe,
    to_source: Pipe,
}

impl World {
    fn new(mut random: Random) -> World {
        let is_checked = random.chance(30);
        World::checked(random, is_checked)
    }

    fn checked(mut random: Random, is_checked: bool) -> World {
        let sizes = [PageSize::SIZE_4K, PageSize::SIZE_2M, PageSize::SIZE_1G];
        // A page of 1 GiB has 262,144 sums to make up.
        let most = if is_checked { 2 } else { 3 };
        let (mut theirs, mut ours) = (Vec::new(), VecDeque::new());
        for (name, units_max, sizes) in
            [("small", 600, &sizes[..1]), ("large", 5, &sizes[..2]), ("huge", 2, &sizes[..most])]
        {
            // The two sides' pages may differ in size; the length is whole units of both.
            let [there, here] = [(); 2].map(|()| sizes[random.index(sizes.len())]);
            let unit = there.max(here);
            let Region { bytes, .. } = region(name, 1 + random.below(units_max), unit);
            theirs.push(Region { name: name.into(), bytes, page_size: there });
            ours.push_front(Region { name: name.into(), bytes, page_size: here });
        }
        let bulk_lanes = random.below(4) as u16;
        let mut source = Source::new(RegionTable::new(theirs).unwrap(), bulk_lanes, &mut random);
        let mut destination = Destination::new(RegionTable::new(ours.into()).unwrap(), bulk_lanes);
        let sums = if is_checked { Capabilities::CHECKSUM } else { Capabilities::NONE };
        source.hellos.iter_mut().for_each(|hello| hello.capabilities = sums);
        (source.is_checked, destination.is_checked) = (is_checked, is_checked);
        let lanes = (0..=bulk_lanes).map(|_| LanePipes::new(is_checked)).collect();
        World { random, source, destination, lanes, is_checked }
    }

    /// One end does one thing, or reads once from one lane.
    fn step(&mut self) {
        let lane = self.random.index(self.lanes.len());
        match self.random.below(4) {
            0 => self.source.act(&mut self.lanes, &mut self.random),
            1 => self.destination.act(&mut self.lanes, &mut self.random),
            2 => self.source.read(lane, &mut self.lanes, &mut self.random),
            _ => self.destination.read(lane, &mut self.lanes, &mut self.random),
        }
        assert!(
            !(self.source.phase.may_run() && self.destination.phase.may_run()),
            "both may run: {:?} {:?}",
            self.source.phase,
            self.destination.phase
        );
    }

    /// Both ends go on over new lanes when these are lost, from the commit point on.
    fn recover(&mut self) {
        self.source.recovers = true;
        self.destination.recovers = true;
        for hello in &mut self.source.hellos {
            hello.capabilities = hello.capabilities.union(Capabilities::RECOVERY);
        }
    }

    /// Cuts one lane, or all.
    fn cut_some(&mut self) {
        let lane = self.random.index(self.lanes.len());
        let all = self.random.chance(30);
        let lanes = self.lanes.iter_mut().enumerate();
        let cut = lanes.filter(|(index, _)| all || *index == lane);
        cut.for_each(|(_, lane)| lane.cut(&mut self.random));
    }

    /// Changes a bit of what is on its way on some lane, or has bytes of it come again.
    fn spoil_some(&mut self) {
        let lane = self.random.index(self.lanes.len());
        let LanePipes { to_destination, to_source } = &mut self.lanes[lane];
        let pipe = if self.random.chance(70) { to_destination } else { to_source };
        pipe.spoil(&mut self.random);
    }

    /// Both ends know what the other has, as far as it got to say so, and it is the same.
    fn assert_digests(&self) {
        let theirs = self.source.digests();
        assert_eq!(self.source.heard_digests.as_ref(), Some(&theirs));
        assert_eq!(self.destination.digests, theirs);
        if let destination::Phase::Completed(Some(_)) = self.destination.phase {
            assert_eq!(self.destination.heard_digests, Some(theirs));
        }
    }

    /// What an end has given up is no more for the other either, though it may read what is on its
    /// way; and when the source has given up it opens lanes again, sooner or later.
    fn reconnect(&mut self) {
        if self.source.is_down || self.destination.is_down {
            self.lanes.iter_mut().for_each(LanePipes::close);
        }
        let source_is_gone = matches!(self.source.phase, source::Phase::Completed(_));
        if source_is_gone && self.destination.is_down {
            // It waits a while for somebody who does not come, and leaves.
            return self.destination.input(destination::Input::Lost);
        }
        if !self.source.is_down || !self.random.chance(5) {
            return;
        }
        // A hello of a later epoch ends what is older.
        self.destination.go_down();
        let is_checked = self.is_checked;
        self.lanes.iter_mut().for_each(|lane| *lane = LanePipes::new(is_checked));
        self.source.is_down = false;
        self.source.epoch += 1;
        for hello in &mut self.source.hellos {
            hello.epoch = self.source.epoch;
        }
        self.destination.is_down = false;
        self.destination.lanes = self.lanes.iter().map(|_| LaneEnd::Opening(Vec::new())).collect();
        self.destination.are_intact.fill(true);
    }

    /// Both have ended; or the guest goes on at the source, and the destination cannot know it.
    fn is_over_or_kept(&self) -> bool {
        let is_kept = matches!(self.destination.phase, destination::Phase::Loaded { .. })
            && self.destination.is_down
            && matches!(self.source.phase, source::Phase::Failed { may_run: true });
        self.is_over() || is_kept
    }

    /// Cuts a lane, loses an end, or has an end cancelled.
    fn inject_fault(&mut self) {
        let lane = self.random.index(self.lanes.len());
        match self.random.below(4) {
            0 => self.source.input(source::Input::Cancel),
            1 => self.destination.input(destination::Input::Cancel),
            2 => self.lanes[lane].cut(&mut self.random),
            _ => self.lanes.iter_mut().for_each(|lane| lane.cut(&mut self.random)),
        }
    }

    fn is_completed(&self) -> bool {
        matches!(self.source.phase, source::Phase::Completed(_))
            && matches!(self.destination.phase, destination::Phase::Completed(Some(_)))
            && self.lanes.iter().all(|lane| lane.to_destination.is_empty())
    }

    fn is_over(&self) -> bool {
        self.source.is_over() && self.destination.is_over()
    }

    fn assert_whole(&self) {
        assert_eq!(self.source.failure, None);
        assert_eq!(self.destination.failure, None);
        self.assert_pages();
        let source::Phase::Completed(received) = self.source.phase else { unreachable!() };
        assert_eq!(received, self.destination.totals);
        let sent = destination::Phase::Completed(Some(self.source.totals));
        assert_eq!(self.destination.phase, sent);
        let of = |t: Totals| (t.data_bytes, t.zero_bytes, t.hole_bytes);
        assert_eq!(of(received), of(self.source.totals));
        assert_eq!(
            received.data_bytes + received.zero_bytes + received.hole_bytes,
            self.source.regions.total_bytes()
        );
    }

    /// Every page is here, as what the source has.
    fn assert_pages(&self) {
        for (theirs, region) in self.source.regions.iter() {
            let ours = self.destination.id(theirs);
            for page in 0..region.pages() as usize {
                let there = self.source.contents[usize::from(theirs.0)][page];
                let here = self.destination.pages[usize::from(ours.0)][page];
                assert_eq!(here, Page::Cached(there), "page {page} of '{}'", region.name);
            }
        }
    }

    fn assert_ended(&self) {
        let (source, destination) = (&self.source, &self.destination);
        match source.phase {
            source::Phase::Completed(_) => self.assert_pages(),
            source::Phase::Failed { may_run } => {
                assert_eq!(may_run, !source.committed);
                assert_ne!(source.failure, None);
            }
            _ => panic!("{:?}", source.phase),
        }
        match destination.phase {
            destination::Phase::Completed(_) => self.assert_pages(),
            destination::Phase::Failed { .. } => assert_ne!(destination.failure, None),
            _ => panic!("{:?}", destination.phase),
        }
        assert!(!(source.phase.may_run() && destination.phase.may_run()));
    }
}

/// One direction of a lane: what was sent and not read.
struct Pipe {
    pieces: VecDeque<Piece>,
    closed: bool,
    seal: Seal,
    /// What comes is not what was sent.
    is_spoilt: bool,
}

#[derive(Clone)]
enum Piece {
    /// Headers and bodies.
    Control(VecDeque<u8>),
    /// Bytes of pages, in the source's numbers; true if some of them have changed.
    Pages(RunTarget, bool),
}

/// What 4 KiB of a page add up to, made up.
fn sum(region: RegionId, page: u64) -> u32 {
    Random(u64::from(region.0) << 48 | page).next() as u32
}

/// The sums of a run's pages, and the number of the first of them in 4 KiB.
fn sums(table: &RegionTable, range: PageRange) -> (u64, Vec<u32>) {
    let summed = table.get(range.region).unwrap().page_size.bytes() / SUMMED_BYTES as u64;
    let first = range.first * summed;
    let end = first + range.pages * summed;
    (first, (first..end).map(|page| sum(range.region, page)).collect())
}

impl Pipe {
    fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Whole frames, and device state behind its header.
    fn send(&mut self, frames: &[u8]) {
        let mut sealed = frames.to_vec();
        self.seal.frames(&mut sealed);
        self.send_bytes(&sealed);
    }

    /// A data run's header.
    fn send_data(&mut self, range: PageRange, sums: &[u32]) {
        let mut header = transmit::data_header(range);
        self.seal.data(&mut header, sums);
        self.send_bytes(&header);
    }

    /// A closed pipe swallows what is sent, as a socket does for a while.
    fn send_bytes(&mut self, bytes: &[u8]) {
        if self.closed {
            return;
        }
        if let Some(Piece::Control(waiting)) = self.pieces.back_mut() {
            return waiting.extend(bytes);
        }
        self.pieces.push_back(Piece::Control(bytes.iter().copied().collect()));
    }

    fn send_pages(&mut self, run: RunTarget) {
        if !self.closed {
            self.pieces.push_back(Piece::Pages(run, false));
        }
    }

    /// Reads control bytes, some of `most`. Pages where control bytes are wanted are a mistake, unless
    /// what comes is not what was sent.
    fn read_control(&mut self, most: usize, random: &mut Random) -> Vec<u8> {
        if let (true, Some(Piece::Pages(run, _))) = (self.is_spoilt, self.pieces.front_mut()) {
            let count = random.partial(run.bytes.min(most as u64));
            run.bytes -= count;
            run.byte_offset += count;
            if run.bytes == 0 {
                self.pieces.pop_front();
            }
            return vec![0xa5; count as usize];
        }
        let Some(Piece::Control(waiting)) = self.pieces.front_mut() else {
            panic!("control bytes were wanted, pages came");
        };
        let count = random.partial(most.min(waiting.len()) as u64) as usize;
        let bytes = waiting.drain(..count).collect();
        if waiting.is_empty() {
            self.pieces.pop_front();
        }
        bytes
    }

    /// Reads bytes of pages, and checks that they belong where the reader puts them, as far as what comes is
    /// what was sent. How many bytes, and whether they are those of the target.
    fn read_pages(&mut self, target: RunTarget, random: &mut Random) -> (u64, bool) {
        if let (true, Some(Piece::Control(_))) = (self.is_spoilt, self.pieces.front()) {
            let most = usize::try_from(target.bytes).unwrap();
            return (self.read_control(most, random).len() as u64, false);
        }
        let Some(Piece::Pages(run, is_spoilt)) = self.pieces.front_mut() else {
            panic!("pages were wanted, control bytes came");
        };
        let is_intact = *run == target && !*is_spoilt;
        assert!(is_intact || self.is_spoilt, "bytes land where they do not belong");
        let count = random.partial(run.bytes.min(target.bytes));
        run.byte_offset += count;
        run.bytes -= count;
        if run.bytes == 0 {
            self.pieces.pop_front();
        }
        (count, is_intact)
    }

    /// Changes a bit, or has something come again.
    fn spoil(&mut self, random: &mut Random) {
        if self.pieces.is_empty() {
            return;
        }
        self.is_spoilt = true;
        let index = random.index(self.pieces.len());
        let again = random.chance(30);
        match &mut self.pieces[index] {
            Piece::Control(bytes) if again => {
                let start = random.index(bytes.len());
                let end = start + 1 + random.index(bytes.len() - start);
                let slice: Vec<u8> = bytes.range(start..end).copied().collect();
                let behind = bytes.split_off(end);
                bytes.extend(slice);
                bytes.extend(behind);
            }
            Piece::Control(bytes) => {
                let at = random.index(bytes.len());
                bytes[at] ^= 1 << random.below(8);
            }
            Piece::Pages(run, _) if again => {
                let run = *run;
                self.pieces.insert(index, Piece::Pages(run, true));
            }
            Piece::Pages(_, is_spoilt) => *is_spoilt = true,
        }
    }

    /// Ends here: some of what was not read is lost.
    fn cut(&mut self, random: &mut Random) {
        self.closed = true;
        self.pieces.truncate(random.index(self.pieces.len() + 1));
        if let Some(Piece::Control(waiting)) = self.pieces.back_mut() {
            waiting.truncate(1 + random.index(waiting.len()));
        }
    }
}

impl LanePipes {
    fn new(is_checked: bool) -> LanePipes {
        let pipe = || Pipe {
            pieces: VecDeque::new(),
            closed: false,
            seal: Seal::new(is_checked),
            is_spoilt: false,
        };
        LanePipes { to_destination: pipe(), to_source: pipe() }
    }

    fn cut(&mut self, random: &mut Random) {
        self.to_destination.cut(random);
        self.to_source.cut(random);
    }

    fn close(&mut self) {
        self.to_destination.closed = true;
        self.to_source.closed = true;
    }
}

/// A lane as one end has it.
#[derive(Debug)]
enum LaneEnd {
    /// The peer's hello or welcome is arriving.
    Opening(Vec<u8>),
    Open(Box<Receiver>),
    /// The peer closed it in order.
    Closed,
}

impl LaneEnd {
    /// Reads the next bytes of an opening; all of it, if it is whole.
    fn open(&mut self, pipe: &mut Pipe, random: &mut Random) -> Option<[u8; HELLO_BYTES]> {
        let LaneEnd::Opening(bytes) = self else {
            return None;
        };
        let read = pipe.read_control(HELLO_BYTES - bytes.len(), random);
        bytes.extend(read);
        (**bytes).try_into().ok()
    }
}

struct Source {
    phase: source::Phase,
    failure: Option<Failure>,
    committed: bool,
    /// With page sizes at first, from ready on with landing units.
    regions: RegionTable,
    /// Of each unit, once they are known.
    contents: Vec<Vec<Content>>,
    claimed: Vec<Vec<bool>>,
    lanes: Vec<LaneEnd>,
    hellos: Vec<Hello>,
    postcopy: bool,
    background: bool,
    state_bytes: u64,
    ended_lanes: bool,
    totals: Totals,
    is_checked: bool,
    heard_digests: Option<Vec<u64>>,
    recovers: bool,
    /// The lanes are lost, and there are no others yet.
    is_down: bool,
    epoch: u32,
    /// What the destination says first on new lanes; nothing goes on before all of it.
    standing: Option<Standing>,
    is_accounted: bool,
}

impl Source {
    fn new(regions: RegionTable, bulk_lanes: u16, random: &mut Random) -> Source {
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

    /// The landing table is known: makes up what the guest's memory holds, in its units.
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
        self.regions = landing.clone();
        for lane in &mut self.lanes[1..] {
            let LaneEnd::Open(receiver) = lane else { panic!("regions before a welcome") };
            receiver.set_regions(landing);
        }
    }

    fn is_over(&self) -> bool {
        matches!(self.phase, source::Phase::Completed(_) | source::Phase::Failed { .. })
    }

    fn input(&mut self, input: source::Input<'_>) {
        self.phase = match std::mem::replace(&mut self.phase, source::Phase::new()).step(input) {
            Ok(phase) => phase,
            Err((phase, error)) => {
                self.failure.get_or_insert(Failure::Phase(error));
                phase
            }
        };
    }

    /// The lanes are no more: remembers why, and tells the phase.
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

    /// The destination has said what it has.
    fn account(&mut self, event: &Event, pipes: &mut [LanePipes]) {
        match event {
            Event::Resume(standing) => self.standing = Some(*standing),
            Event::Have { range, words } => {
                for page in range.first..range.first + range.pages {
                    let bit = page - range.first;
                    let has = words[(bit / 64) as usize] >> (bit % 64) & 1 == 1;
                    let claimed = &mut self.claimed[usize::from(range.region.0)][page as usize];
                    assert!(*claimed || !has, "page {page} is there and was not sent");
                    *claimed = has;
                }
            }
            Event::Accounted => {
                self.is_accounted = true;
                let standing = self.standing.take().expect("it comes first");
                self.totals = standing.totals;
                if !standing.switched {
                    self.say(pipes, &Frame::Switchover { stopped_us: 2000 });
                }
            }
            _ => {}
        }
    }

    fn act(&mut self, pipes: &mut [LanePipes], random: &mut Random) {
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
            source::Phase::Ready => {
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

    /// What all of its memory comes to.
    fn digests(&self) -> Vec<u64> {
        let of = |(region, pages): (usize, &Vec<Content>)| {
            let region = RegionId(region as u16);
            let data = (0..).zip(pages).filter(|&(_, &content)| content == Content::Data);
            data.fold(0u64, |all, (first, _)| {
                let (first, sums) = sums(&self.regions, PageRange { region, first, pages: 1 });
                all.wrapping_add(digest(first, &sums))
            })
        };
        self.contents.iter().enumerate().map(of).collect()
    }

    /// Sends the next run that nobody claimed, from a random place on; or ends the lanes.
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

    /// Reads ahead as it likes: nothing but control bytes ever comes.
    fn read(&mut self, lane: usize, pipes: &mut [LanePipes], random: &mut Random) {
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
        receiver.assert_invariants();
        let events: Vec<Event> = std::iter::from_fn(|| receiver.poll_event()).collect();
        for event in events {
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

struct Destination {
    phase: destination::Phase,
    failure: Option<Failure>,
    regions: RegionTable,
    /// Our number of each of the source's regions.
    ids: Vec<RegionId>,
    landing: Option<RegionTable>,
    pages: Vec<Vec<Page>>,
    lanes: Vec<LaneEnd>,
    /// Of each lane's current run nothing has come yet that was not sent.
    are_intact: Vec<bool>,
    /// Each lane's current run.
    begun: Vec<Option<PageRange>>,
    totals: Totals,
    is_checked: bool,
    digests: Vec<u64>,
    heard_digests: Option<Vec<u64>>,
    recovers: bool,
    /// The lanes are lost, and there are no others yet.
    is_down: bool,
    epoch: u32,
}

impl Destination {
    fn new(regions: RegionTable, bulk_lanes: u16) -> Destination {
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
            totals: Totals::default(),
            is_checked: false,
            digests: Vec::new(),
            heard_digests: None,
            recovers: false,
            is_down: false,
            epoch: 0,
        }
    }

    fn id(&self, theirs: RegionId) -> RegionId {
        self.ids[usize::from(theirs.0)]
    }

    fn is_over(&self) -> bool {
        matches!(self.phase, destination::Phase::Completed(_) | destination::Phase::Failed { .. })
    }

    fn input(&mut self, input: destination::Input<'_>) {
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

    /// Gives up its lanes: what was landing has not come.
    fn go_down(&mut self) {
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

    /// What it says first on a demand lane that replaces a lost one.
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

    fn act(&mut self, pipes: &mut [LanePipes], random: &mut Random) {
        // The guest comes to run, with lanes or without; what is said without is said later.
        match self.phase {
            destination::Phase::Failed { .. } => {
                return pipes.iter_mut().for_each(LanePipes::close);
            }
            destination::Phase::Preparing => {
                self.input(destination::Input::GuestReady);
                let landing = self.landing.as_ref().expect("the regions have come");
                send(&mut pipes[0].to_source, &Frame::Ready(landing.units()));
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

    /// What cannot be said, as there is no open lane, is in the account that comes first on the next.
    fn say(&self, pipes: &mut [LanePipes], frame: &Frame) {
        if let LaneEnd::Open(_) = self.lanes[0] {
            send(&mut pipes[0].to_source, frame);
        }
    }

    fn is_whole(&self) -> bool {
        self.pages.iter().flatten().all(|page| matches!(page, Page::Cached(_)))
    }

    /// Asks for some pages that are missing, perhaps again.
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
    fn read(&mut self, lane: usize, pipes: &mut [LanePipes], random: &mut Random) {
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
                        let range = self.begun[lane].expect("it has begun");
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
        receiver.assert_invariants();
        let events: Vec<Event> = std::iter::from_fn(|| receiver.poll_event()).collect();
        for event in events {
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
        let ours = ours.union(Capabilities::CHECKSUM);
        let welcome = Welcome::answer(&hello, PROTOCOL, ours, hello.proof).unwrap();
        answers.send_bytes(&welcome.encode());
        let receiver = Receiver::for_destination(hello.role).checked(self.is_checked);
        self.lanes[lane] = LaneEnd::Open(Box::new(receiver));
        if hello.epoch == 0 {
            return;
        }
        let landing = self.landing.as_ref().expect("the regions were agreed on");
        if lane > 0 {
            let LaneEnd::Open(receiver) = &mut self.lanes[lane] else { unreachable!() };
            return receiver.set_regions(landing);
        }
        assert!(hello.epoch > self.epoch, "an old lane came in");
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
                self.digests = vec![0; ids.len()];
                (self.ids, self.landing) = (ids, Some(landing));
            }
            Event::RunBegins(range) => {
                self.begun[lane] = Some(*range);
                self.move_pages(*range, Page::Missing, Page::Landing);
            }
            Event::Data(range) => {
                self.move_pages(*range, Page::Landing, Page::Cached(Content::Data));
                self.totals.data_bytes += self.bytes(*range);
                if self.is_checked {
                    let landing = self.landing.as_ref().expect("pages come after the regions");
                    let (first, sums) = sums(landing, *range);
                    let digests = &mut self.digests[usize::from(range.region.0)];
                    *digests = digests.wrapping_add(digest(first, &sums));
                }
                if random.chance(50) {
                    answers.send(&transmit::ack_header(*range));
                }
            }
            Event::Zero(range) => {
                self.move_pages(*range, Page::Missing, Page::Cached(Content::Zero));
                self.totals.zero_bytes += self.bytes(*range);
            }
            Event::Hole(range) => {
                self.move_pages(*range, Page::Missing, Page::Cached(Content::Hole));
                self.totals.hole_bytes += self.bytes(*range);
            }
            Event::Digests(digests) => self.heard_digests = Some(digests.clone()),
            Event::Ping(number) => send(answers, &Frame::Pong(*number)),
            _ => {}
        }
    }

    fn bytes(&self, range: PageRange) -> u64 {
        let landing = self.landing.as_ref().expect("pages come after the regions");
        range.pages * landing.get(range.region).unwrap().page_size.bytes()
    }

    /// Each page takes each step once.
    fn move_pages(&mut self, range: PageRange, from: Page, to: Page) {
        let ours = usize::from(self.id(range.region).0);
        let (first, pages) = (range.first as usize, range.pages as usize);
        for page in &mut self.pages[ours][first..first + pages] {
            assert_eq!(*page, from, "{range}");
            *page = to;
        }
    }
}

fn send(pipe: &mut Pipe, frame: &Frame) {
    let mut bytes = Vec::new();
    transmit::encode(frame, &mut bytes);
    pipe.send(&bytes);
}
