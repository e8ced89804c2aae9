//! Takes both sides' events and answers them, as embedding programs would.

#![allow(clippy::disallowed_methods, reason = "it may open all that it polls")]

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use umem::embed::{Destination, DestinationSetup, Event, Failure, Source, SourceSetup};
use umem::embed::{Guest as Owner, Stats};

use super::super::random::Random;
use super::model::{Guest, Habits, Running};
use super::relay::{Deeds, Place, Relay, Spoilt};

/// The time after which a migration counts as stuck, on any machine.
const DEADLINE: Duration = Duration::from_secs(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// How the two sides connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Unix,
    Tcp,
    /// Connections are given to both.
    Given,
}

/// Orders of the relay: pause this side manually, and resume like this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pausing {
    /// As before.
    Resume,
    /// At another address, or over other connections.
    Elsewhere,
}

/// The parameters of a migration.
pub(crate) struct Move<'a> {
    pub(crate) seed: u64,
    pub(crate) route: Route,
    /// 0 for a single connection.
    pub(crate) bulk_lanes: u16,
    pub(crate) postcopy: bool,
    pub(crate) recovers: bool,
    /// Both sides use checksums. Without them no byte may be damaged in transit.
    pub(crate) checksum: bool,
    pub(crate) state_bytes: u64,
    pub(crate) habits: Habits,
    /// From the start, from the loading of the device state, from the switchover, and from when both sides know that
    /// the guest runs.
    pub(crate) deeds: [Deeds; 4],
    /// By the number that the relay reports.
    pub(crate) pauses: [(Side, Pausing); 2],
    /// For sockets.
    pub(crate) directory: &'a Path,
}

/// The end of a side.
#[derive(Debug)]
pub(crate) enum End {
    Completed(Box<umem::report::Completed>),
    Failed(Failure),
    /// The other side had ended, unknown to this one.
    Dropped,
}

/// The result of a migration.
pub(crate) struct Moved {
    pub(crate) source: End,
    pub(crate) destination: End,
    /// The destination's guest was asked to run.
    pub(crate) has_run: bool,
    /// The guest still runs, if its accesses are endless.
    pub(crate) running: Option<Running>,
    /// How often a side reported new connections.
    pub(crate) resumed: u32,
    /// How often a side paused because of wrong checksums, and waited for a resume.
    pub(crate) rests: u32,
    pub(crate) spoilt: Spoilt,
}

/// The connection state of a side, by its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Up,
    /// The side opens them, or waits for the other side.
    Recovering,
    Paused,
}

struct Drive<'a> {
    plan: Move<'a>,
    random: Random,
    relay: Relay,
    source: Option<Source>,
    destination: Option<Arc<Destination>>,
    leaving: Arc<Guest>,
    arriving: Arc<Guest>,
    state: Vec<u8>,
    loader: Option<JoinHandle<()>>,
    running: Option<Running>,
    ends: [Option<End>; 2],
    links: [Link; 2],
    /// Paused manually, until it is resumed.
    pausing: [Option<Pausing>; 2],
    places: u32,
    has_run: bool,
    resumed: u32,
    rests: u32,
}

/// The text of a pause without an order.
const IN_VAIN: &str = "consecutive connections failed checksum verification";

const SOURCE: usize = 0;
const DESTINATION: usize = 1;

impl Move<'_> {
    /// Runs it. `before_stop` is called on the source's guest when it is asked to stop.
    ///
    /// # Panics
    /// If the migration is stuck, or an impossible event comes.
    pub(crate) fn run(
        self,
        leaving: &Arc<Guest>,
        arriving: &Arc<Guest>,
        before_stop: impl FnOnce(&Guest),
    ) -> Moved {
        let mut random = Random::of(self.seed, 7);
        let mut source = SourceSetup::new();
        let mut destination = DestinationSetup::new();
        leaving.leave(&mut source);
        arriving.arrive(&mut destination);
        source.postcopy(self.postcopy);
        source.recover(self.recovers);
        source.checksum(self.checksum);
        destination.recover(self.recovers);
        let (relay, destination) = match self.route {
            Route::Given => {
                let relay = Relay::start(self.seed, None);
                let (here, there): (Vec<_>, Vec<_>) =
                    (0..=self.bulk_lanes).map(|_| relay.pair()).unzip();
                source.connections(here).expect("connected sockets");
                destination.connections(there).expect("connected sockets");
                (relay, destination.start().expect("a destination"))
            }
            Route::Unix | Route::Tcp => {
                let (uri, from) = match self.route {
                    Route::Unix => (
                        format!("unix:{}", self.directory.join("to").display()),
                        Place::Unix(self.directory.join("from")),
                    ),
                    _ => ("tcp:127.0.0.1:0".into(), Place::Tcp(0)),
                };
                destination.listen(uri.parse().expect("an address"), 4).expect("an address");
                let destination = destination.start().expect("a destination");
                let to = place(&destination.uri().expect("the destination listens").to_string());
                let relay = Relay::start(self.seed, Some((from, to)));
                let uri = relay.place.as_ref().expect("the relay has a place").uri();
                // At least one lane has to be dialled.
                let lanes = self.bulk_lanes.max(1);
                source.dial(uri.parse().expect("an address"), lanes).expect("an address");
                (relay, destination)
            }
        };
        let state = (0..self.state_bytes).map(|_| random.next() as u8).collect();
        let [first, ..] = &self.deeds;
        relay.then(first.clone());
        let source = source.start().expect("a source");
        let mut drive = Drive {
            random,
            relay,
            source: Some(source),
            destination: Some(Arc::new(destination)),
            leaving: leaving.clone(),
            arriving: arriving.clone(),
            state,
            loader: None,
            running: None,
            ends: [None, None],
            links: [Link::Up; 2],
            pausing: [None; 2],
            places: 0,
            has_run: false,
            resumed: 0,
            rests: 0,
            plan: self,
        };
        drive.until_ended(before_stop);
        let spoilt = drive.relay.spoilt();
        let Drive { ends, has_run, running, resumed, rests, .. } = drive;
        let [source, destination] = ends.map(|end| end.unwrap_or(End::Dropped));
        Moved { source, destination, has_run, running, resumed, rests, spoilt }
    }
}

fn place(uri: &str) -> Place {
    match uri.split_once(':') {
        Some(("unix", path)) => Place::Unix(path.into()),
        _ => Place::Tcp(uri.rsplit_once(':').unwrap().1.parse().expect("a port")),
    }
}

impl Drive<'_> {
    fn until_ended(&mut self, before_stop: impl FnOnce(&Guest)) {
        let mut before_stop = Some(before_stop);
        let deadline = Instant::now() + DEADLINE;
        while self.ends.iter().any(Option::is_none) {
            self.wait(deadline);
            for what in self.relay.take_told() {
                self.pause(usize::from(what));
            }
            while let Some(event) = self.source.as_ref().and_then(Source::next_event) {
                if matches!(event, Event::Stop) {
                    before_stop.take().expect("the guest stops once")(&self.leaving);
                }
                self.of_source(event);
            }
            while let Some(event) = self.destination.as_ref().and_then(|d| d.next_event()) {
                self.of_destination(event);
            }
            self.mend();
        }
        if !self.has_run {
            // The guest's memory is void, and so is the device state being loaded.
            self.arriving.abandon();
        }
        let failed = matches!(self.ends[DESTINATION], Some(End::Failed(_)));
        if self.has_run && failed {
            self.arriving.abandon();
            let destination = self.destination.as_ref().expect("the destination has failed");
            destination.guest_has_stopped().expect("the last event has arrived");
        }
        if let Some(loader) = self.loader.take() {
            loader.join().expect("the thread does not panic");
        }
        for _ in 0..2 {
            assert!(self.source.as_ref().is_none_or(|source| source.next_event().is_none()));
        }
        self.source = None;
        let destination = self.destination.take().map(Arc::into_inner);
        assert!(destination.is_none_or(|last| last.is_some()), "the handle has no other owner");
    }

    fn wait(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let stats = |side: Option<Stats>| format!("{side:?}");
            let source = stats(self.source.as_ref().map(Source::stats));
            let destination = stats(self.destination.as_ref().map(|d| d.stats()));
            panic!(
                "stuck: source {source} {:?}, destination {destination} {:?}, {:?}, ended {:?}",
                self.links[SOURCE], self.links[DESTINATION], self.pausing, self.ends
            );
        }
        let mut fds = vec![PollFd::new(self.relay.told(), PollFlags::POLLIN)];
        let of_source = self.source.as_ref().map(Source::event_fd);
        let of_destination = self.destination.as_ref().map(|d| d.event_fd());
        fds.extend(
            of_source
                .into_iter()
                .chain(of_destination)
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN)),
        );
        let timeout = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => panic!("poll: {errno}"),
        }
    }

    fn of_source(&mut self, event: Event) {
        let source = self.source.as_ref().expect("the side has sent an event");
        // Answers, here and below, are refused if the migration has failed meanwhile.
        match event {
            Event::Stop => drop(source.stopped()),
            Event::SaveState => drop(source.saved(self.state.clone())),
            Event::Running { .. } => self.relay.then(std::mem::take(&mut self.plan.deeds[3])),
            Event::Connected => {}
            event => self.either(SOURCE, event),
        }
    }

    fn of_destination(&mut self, event: Event) {
        let destination = self.destination.clone().expect("the side has sent an event");
        match event {
            Event::LoadState(state) => {
                assert!(state == self.state, "the device state is unchanged");
                self.relay.then(std::mem::take(&mut self.plan.deeds[1]));
                self.load(destination);
            }
            Event::Run => {
                assert!(!std::mem::replace(&mut self.has_run, true), "the guest is run once");
                self.relay.then(std::mem::take(&mut self.plan.deeds[2]));
                let habits = self.plan.habits;
                self.running = Some(Running::start(&self.arriving, habits, self.plan.seed));
                let _ = destination.running();
            }
            Event::Connected => {}
            event => self.either(DESTINATION, event),
        }
    }

    fn either(&mut self, side: usize, event: Event) {
        assert!(self.ends[side].is_none(), "{event:?} after the last event");
        match event {
            Event::Recovering { .. } => self.links[side] = Link::Recovering,
            Event::Paused { reason } => {
                self.links[side] = Link::Paused;
                if reason.contains(IN_VAIN) {
                    assert!(self.plan.checksum, "{reason}");
                    self.rests += 1;
                    self.pausing[side].get_or_insert(Pausing::Resume);
                }
            }
            Event::Resumed { .. } => {
                self.links[side] = Link::Up;
                self.resumed += 1;
            }
            Event::Completed(report) => self.ends[side] = Some(End::Completed(report)),
            Event::Failed(failure) => self.ends[side] = Some(End::Failed(failure)),
            other => panic!("{other:?} at the wrong side"),
        }
    }

    /// Devices read their rings, on a thread that may wait for pages.
    fn load(&mut self, destination: Arc<Destination>) {
        let guest = self.arriving.clone();
        let mut random = self.random.clone();
        self.loader = Some(std::thread::spawn(move || {
            for _ in 0..random.below(6) {
                let (region, page) = guest.any(&mut random);
                guest.check(region, page);
            }
            let _ = destination.loaded();
        }));
    }

    fn pause(&mut self, which: usize) {
        let (side, how) = self.plan.pauses[which];
        let paused = match side {
            Side::Source => self.source.as_ref().map(Source::pause),
            Side::Destination => self.destination.as_ref().map(|d| d.pause()),
        };
        // Refused before the switchover and after the end.
        if let Some(Ok(())) = paused {
            self.pausing[side as usize] = Some(how);
        }
    }

    /// Acts as an administrator with access to both machines would.
    fn mend(&mut self) {
        let is_down = |link: Link| link != Link::Up;
        let is_at_source = matches!(
            &self.ends[SOURCE],
            Some(End::Failed(failure)) if failure.guest == Owner::AtSource
        );
        if self.ends[DESTINATION].is_none() && is_down(self.links[DESTINATION]) {
            let destination = self.destination.as_ref().expect("the destination has not ended");
            if matches!(self.ends[SOURCE], Some(End::Completed(_))) {
                // The destination is complete, and waits for a source that knows that.
                destination.cancel();
            } else if is_at_source {
                self.ends[DESTINATION] = Some(End::Dropped);
            }
        } else if self.ends[DESTINATION].is_none() && is_at_source {
            // The side may still wait for a source.
            self.destination.as_ref().expect("the destination has not ended").cancel();
        }
        if self.ends.iter().any(Option::is_some) {
            return;
        }
        match self.plan.route {
            Route::Given => self.mend_given(),
            Route::Unix | Route::Tcp => self.mend_dialled(),
        }
    }

    /// New connections are given when both sides have lost theirs, or one was paused and the other has noticed.
    fn mend_given(&mut self) {
        if self.links != [Link::Paused; 2] {
            return;
        }
        self.pausing = [None; 2];
        self.links = [Link::Recovering; 2];
        let (here, there): (Vec<OwnedFd>, Vec<OwnedFd>) =
            (0..=self.plan.bulk_lanes).map(|_| self.relay.pair()).unzip();
        let (source, destination) = (self.source.as_ref(), self.destination.as_ref());
        let (source, destination) =
            (source.expect("both sides exist"), destination.expect("both sides exist"));
        // Refused by a side that has ended, whose last event is queued.
        if self.random.percent(50) {
            let _ = source.reconnect(here);
            let _ = destination.reconnect(there);
        } else {
            let _ = destination.reconnect(there);
            let _ = source.reconnect(here);
        }
    }

    fn mend_dialled(&mut self) {
        for side in [SOURCE, DESTINATION] {
            if self.links[side] != Link::Paused {
                continue;
            }
            let Some(how) = self.pausing[side].take() else { continue };
            let (source, destination) = (self.source.as_ref(), self.destination.as_ref());
            let (source, destination) =
                (source.expect("both sides exist"), destination.expect("both sides exist"));
            let _ = match (side, how) {
                (SOURCE, Pausing::Resume) => source.resume(),
                (DESTINATION, Pausing::Resume) => destination.resume(),
                (SOURCE, Pausing::Elsewhere) => source.resume_at(self.relays_uri()),
                _ => {
                    self.places += 1;
                    self.move_door(destination)
                }
            };
            self.links[side] = Link::Recovering;
        }
    }

    /// The relay's own address, named again.
    fn relays_uri(&self) -> umem::Uri {
        self.relay
            .place
            .as_ref()
            .expect("the relay has an address")
            .uri()
            .parse()
            .expect("an address")
    }

    /// The destination listens on another address, and the relay connects there.
    fn move_door(&self, destination: &Destination) -> umem::Result<()> {
        let uri = match self.plan.route {
            Route::Unix => {
                let path = self.plan.directory.join(format!("to-{}", self.places));
                format!("unix:{}", path.display())
            }
            _ => "tcp:127.0.0.1:0".into(),
        };
        let bound = destination.resume_at(&uri.parse().expect("an address"))?;
        self.relay.lead_to(place(&bound.to_string()));
        Ok(())
    }
}
