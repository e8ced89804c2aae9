//! Both ends and the lanes between them, and the checks at each step and at the end.

use std::collections::VecDeque;

use umem_wire::*;

use crate::destination::Destination;
use crate::lane::{LaneEnd, LanePipes};
use crate::source::Source;
use crate::support::{Random, region};

/// More steps than any run takes; a run that takes them is stuck.
const STEPS_MAX: u64 = 1_000_000;

pub(super) struct World {
    pub(super) random: Random,
    pub(super) source: Source,
    pub(super) destination: Destination,
    /// Lane 0 is the demand lane.
    lanes: Vec<LanePipes>,
    /// Frames have checksums.
    pub(super) is_checked: bool,
}

impl World {
    pub(super) fn new(mut random: Random) -> World {
        let is_checked = random.chance(30);
        World::checked(random, is_checked)
    }

    pub(super) fn checked(mut random: Random, is_checked: bool) -> World {
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
        // Without bulk lanes there are no rounds in this model.
        let has_rounds = bulk_lanes > 0 && random.chance(40);
        let rounds = if has_rounds { Capabilities::ROUNDS } else { Capabilities::NONE };
        source.hellos.iter_mut().for_each(|hello| hello.capabilities = sums.union(rounds));
        (source.is_checked, destination.is_checked) = (is_checked, is_checked);
        let lanes = (0..=bulk_lanes).map(|_| LanePipes::new(is_checked)).collect();
        World { random, source, destination, lanes, is_checked }
    }

    /// Steps until the end; `before` is called before each step.
    pub(super) fn run_until(
        &mut self,
        is_at_end: impl Fn(&World) -> bool,
        mut before: impl FnMut(&mut World),
    ) {
        for step in 0.. {
            let (source, destination) = (&self.source.phase, &self.destination.phase);
            assert!(step < STEPS_MAX, "stuck: {source:?} {destination:?}");
            if is_at_end(self) {
                return;
            }
            before(self);
            self.step();
            if self.source.recovers {
                self.reconnect();
            }
        }
    }

    /// One end acts once, or reads once from one lane.
    pub(super) fn step(&mut self) {
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

    /// From the commit point on both ends open new lanes after a loss.
    pub(super) fn recover(&mut self) {
        self.source.recovers = true;
        self.destination.recovers = true;
        for hello in &mut self.source.hellos {
            hello.capabilities = hello.capabilities.union(Capabilities::RECOVERY);
        }
    }

    /// Cuts one lane, or all.
    pub(super) fn cut_some(&mut self) {
        let lane = self.random.index(self.lanes.len());
        let all = self.random.chance(30);
        let lanes = self.lanes.iter_mut().enumerate();
        let cut = lanes.filter(|(index, _)| all || *index == lane);
        cut.for_each(|(_, lane)| lane.cut(&mut self.random));
    }

    /// Changes a bit in flight on some lane, or repeats bytes of it.
    pub(super) fn spoil_some(&mut self) {
        let lane = self.random.index(self.lanes.len());
        let LanePipes { to_destination, to_source } = &mut self.lanes[lane];
        let pipe = if self.random.chance(70) { to_destination } else { to_source };
        pipe.spoil(&mut self.random);
    }

    /// Both ends know the other's digests, if sent, and they are equal.
    fn assert_digests(&self) {
        let theirs = self.source.digests();
        assert_eq!(self.source.heard_digests.as_ref(), Some(&theirs));
        assert_eq!(self.destination.digests, theirs);
        if let destination::Phase::Completed(Some(_)) = self.destination.phase {
            assert_eq!(self.destination.heard_digests, Some(theirs));
        }
    }

    /// Lanes that one end has dropped close for the other, which may still read data in flight.
    /// When the source has dropped its lanes it opens new ones sooner or later.
    fn reconnect(&mut self) {
        if self.source.is_down || self.destination.is_down {
            self.lanes.iter_mut().for_each(LanePipes::close);
        }
        let source_is_gone = matches!(self.source.phase, source::Phase::Completed(_));
        if source_is_gone && self.destination.is_down {
            // It waits for a source that does not come, and leaves.
            return self.destination.input(destination::Input::Lost);
        }
        if !self.source.is_down || !self.random.chance(5) {
            return;
        }
        // A hello of a later epoch ends older lanes.
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

    /// Both have ended; or the guest goes on at the source, which the destination cannot know.
    pub(super) fn is_over_or_kept(&self) -> bool {
        let is_kept = matches!(self.destination.phase, destination::Phase::Loaded { .. })
            && self.destination.is_down
            && matches!(self.source.phase, source::Phase::Failed { may_run: true });
        self.is_over() || is_kept
    }

    /// Cuts a lane, loses an end, or has an end cancelled.
    pub(super) fn inject_fault(&mut self) {
        let lane = self.random.index(self.lanes.len());
        match self.random.below(4) {
            0 => self.source.input(source::Input::Cancel),
            1 => self.destination.input(destination::Input::Cancel),
            2 => self.lanes[lane].cut(&mut self.random),
            _ => self.lanes.iter_mut().for_each(|lane| lane.cut(&mut self.random)),
        }
    }

    pub(super) fn is_completed(&self) -> bool {
        matches!(self.source.phase, source::Phase::Completed(_))
            && matches!(self.destination.phase, destination::Phase::Completed(Some(_)))
            && self.lanes.iter().all(|lane| lane.to_destination.is_empty())
    }

    pub(super) fn is_over(&self) -> bool {
        self.source.is_over() && self.destination.is_over()
    }

    pub(super) fn assert_whole(&self) {
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

    /// Every page is cached, with the source's content.
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

    /// A committed migration has completed, over any number of lanes.
    pub(super) fn assert_gone_on(&self) {
        assert_eq!(self.source.failure, None);
        assert!(matches!(self.source.phase, source::Phase::Completed(_)));
        assert!(matches!(self.destination.phase, destination::Phase::Completed(_)));
        self.assert_pages();
        if self.is_checked {
            self.assert_digests();
        }
    }

    pub(super) fn assert_ended(&self) {
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

/// The content of a page at the source.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Content {
    Data,
    Zero,
    Hole,
}

/// The state of a page at the destination.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Page {
    Missing,
    Landing,
    Cached(Content),
}

/// The reason why an end stopped.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Failure {
    Hello(HelloError),
    Receive(ReceiveError),
    Phase(PhaseError),
}

impl Failure {
    /// Whether another lane may succeed.
    pub(super) fn is_loss(&self) -> bool {
        match self {
            Failure::Receive(error) => {
                error.is_corruption() || matches!(error, ReceiveError::Truncated { .. })
            }
            Failure::Hello(_) => true,
            Failure::Phase(_) => false,
        }
    }
}
