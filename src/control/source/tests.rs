//! Single decisions of the core, input by input.

use std::time::{Duration, Instant};

use umem_wire::{Event as Said, FaultCode, Frame, PageSize, Region, RegionTable, Standing, Totals};

use super::*;
use crate::control::calling::{Called, Word};
use crate::events::Remark;
use crate::memory::dirty::LeftToSend;

const DIGESTS: [u64; 1] = [7];

struct Bench {
    core: Source,
    now: Instant,
}

impl Bench {
    fn new(is_kept: bool, is_checked: bool) -> Bench {
        Bench::with(is_kept, is_checked, None)
    }

    fn with(is_kept: bool, is_checked: bool, rounds: Option<RoundsPlan>) -> Bench {
        let now = Instant::now();
        let kept = Kept { session: "5e55".into(), directory_option: String::new() };
        let plan = Plan {
            postcopy: true,
            rounds,
            bulk_lanes: 1,
            recovers: true,
            kept: is_kept.then_some(kept),
            is_checked,
            is_embedded: false,
            total_bytes: 4096,
            step_timeout: Duration::from_secs(60),
            seed: 1,
        };
        let uri = Uri::Tcp { host: "host".into(), port: 1 };
        Bench { core: Source::new(plan, Some(uri), true, now), now }
    }

    fn tell(&mut self, input: Input) -> Vec<Effect> {
        self.handle(input).collect()
    }

    fn handle(&mut self, input: Input) -> Effects<Effect> {
        let now = Moment { at: self.now, moved_bytes: 0, checksum_errors: 0, memory: () };
        self.core.handle(input, &now)
    }

    fn say(&mut self, said: Said) -> Vec<Effect> {
        self.tell(Input::Received(said))
    }

    fn stands_still(&mut self, result: Result<()>) -> Vec<Effect> {
        self.tell(Input::Monitor(Answer::StandsStill(result)))
    }

    fn ready(&mut self) -> Vec<Effect> {
        let page_size = PageSize::from_shift(12).unwrap();
        let region = Region { name: "ram0".into(), bytes: 4096, page_size };
        self.tell(Input::Begin);
        self.say(Said::Ready(RegionTable::new(vec![region]).unwrap()))
    }

    /// In the first pass before the stop.
    fn in_rounds() -> Bench {
        let plan = RoundsPlan { passes_max: 4, downtime_limit: Duration::ZERO, timeout: None };
        let mut bench = Bench::with(true, false, Some(plan));
        bench.ready();
        bench.tell(Input::Monitor(Answer::Tracking(Ok(()))));
        bench
    }

    /// A pass ends with this many dirty bytes left.
    fn pass(&mut self, dirty_bytes: u64) -> Vec<Effect> {
        let effects = self.tell(Input::PassEnded);
        assert!(matches!(effects[..], [Effect::Ask(Question::Look)]), "{effects:?}");
        let effects = self.tell(Input::Monitor(Answer::Looked(Ok(()))));
        assert!(matches!(effects[..], [Effect::CountDirty]), "{effects:?}");
        self.tell(Input::Counted { left: dirty(dirty_bytes), sent_bytes: 1 })
    }

    /// Until the guest runs at the destination.
    fn serve(&mut self) {
        self.ready();
        self.tell(Input::Monitor(Answer::Stopped(Ok(None))));
        self.tell(Input::Monitor(Answer::Saved(Ok(vec![0]))));
        self.say(Said::Loaded);
        self.stands_still(Ok(()));
        self.tell(Input::Committed);
    }

    /// Lanes are lost and opened again. `switched` is the arrival of the switchover, as the destination reports it.
    fn reopen(&mut self, switched: bool) -> Vec<Effect> {
        self.tell(Input::Failed(lost("demand lane")));
        self.tell(Input::LanesDown);
        let totals = Totals::default();
        let running = switched.then_some(1);
        self.tell(Input::Opened(Opened::Lanes(Standing { switched, running, totals })))
    }

    fn failure(&mut self) -> (Error, Guest) {
        match self.core.take_outcome() {
            Some(Outcome::Failed { error, guest }) => (error, guest),
            other => panic!("{other:?}"),
        }
    }
}

fn dirty(dirty_bytes: u64) -> LeftToSend {
    LeftToSend { dirty_bytes, ..LeftToSend::default() }
}

fn lost(lane: &str) -> Error {
    Error::Lost { side: "destination", lane: lane.into(), what: "reset".into() }
}

fn refused() -> Error {
    Error::Host("the guest runs".into())
}

fn has(effects: &[Effect], is: impl Fn(&Effect) -> bool) -> bool {
    effects.iter().any(is)
}

fn file_failed() -> Error {
    Error::RamFailed { name: "ram0".into(), path: "/dev/shm/ram0".into(), what: "changed".into() }
}

#[test]
fn writes_are_tracked_before_the_first_pass() {
    let plan = RoundsPlan { passes_max: 4, downtime_limit: Duration::ZERO, timeout: None };
    let mut bench = Bench::with(true, false, Some(plan));
    let effects = bench.ready();
    assert!(matches!(effects.last(), Some(Effect::Ask(Question::Track))), "{effects:?}");
    let effects = bench.tell(Input::Monitor(Answer::Tracking(Ok(()))));
    let [Effect::Send(Frame::Rounds), Effect::Show(_), Effect::SendPass] = &effects[..] else {
        panic!("{effects:?}")
    };
}

#[test]
fn guest_stops_when_passes_do_not_shrink_and_rounds_end_before_stopped() {
    let mut bench = Bench::in_rounds();
    let effects = bench.pass(1000);
    assert!(matches!(effects[..], [Effect::Tell(Event::Pass { .. }), Effect::SendPass]));
    let effects = bench.pass(900);
    let is_stop = |effect: &Effect| matches!(effect, Effect::Ask(Question::Stop));
    assert!(has(&effects, is_stop), "it hardly shrinks: {effects:?}");
    let effects = bench.tell(Input::Monitor(Answer::Stopped(Ok(None))));
    assert!(matches!(effects[..], [Effect::EndRounds]), "{effects:?}");
    let effects = bench.say(Said::Settled);
    let is_next = |effect: &Effect| matches!(effect, Effect::Send(Frame::Stopped { .. }));
    assert!(matches!(effects.first(), Some(Effect::Fix)) && has(&effects, is_next), "{effects:?}");
    assert!(has(&effects, |effect| matches!(effect, Effect::Ask(Question::Save))));
}

/// Without passes all of memory remains, and would compete with the switchover.
#[test]
fn remaining_pages_follow_the_state_after_passes_and_the_switchover_without_them() {
    let is_bulk = |effect: &Effect| matches!(effect, Effect::SendBulk);
    for has_passes in [true, false] {
        let mut bench = if has_passes { Bench::in_rounds() } else { Bench::new(true, false) };
        if has_passes {
            bench.pass(1000);
            bench.pass(900);
        } else {
            bench.ready();
        }
        bench.tell(Input::Monitor(Answer::Stopped(Ok(None))));
        if has_passes {
            bench.say(Said::Settled);
        }
        let effects = bench.tell(Input::Monitor(Answer::Saved(Ok(vec![0]))));
        assert!(!has(&effects, is_bulk), "the state is first: {effects:?}");
        assert_eq!(has(&bench.tell(Input::StateLeft), is_bulk), has_passes);
        assert!(!has(&bench.say(Said::Loaded), is_bulk));
        bench.stands_still(Ok(()));
        assert!(!has(&bench.tell(Input::Committed), is_bulk));
        let effects = bench.say(Said::Running { us_since_switchover: 1 });
        assert_eq!(has(&effects, is_bulk), !has_passes, "once: {effects:?}");
        // New lanes begin again.
        assert!(has(&bench.reopen(true), is_bulk));
    }
}

impl Bench {
    /// In the first pass of rounds without an end, with two lanes.
    fn in_endless_rounds(timeout: Option<Duration>) -> Bench {
        let plan = RoundsPlan { passes_max: u32::MAX, downtime_limit: Duration::ZERO, timeout };
        let mut bench = Bench::with(true, false, Some(plan));
        bench.core.plan.bulk_lanes = 2;
        bench.ready();
        bench.tell(Input::Monitor(Answer::Tracking(Ok(()))));
        bench
    }

    /// Both lanes end the pass, which leaves half. With `is_over` the guest stops; otherwise another pass follows.
    fn lanes_end(&mut self, dirty_bytes: u64, is_over: bool, is_cut: bool) {
        assert!(self.tell(Input::PassEnded).is_empty(), "the other lane has not been around");
        match &self.pass(dirty_bytes)[..] {
            [Effect::Tell(Event::Pass { is_cut: cut, .. }), rest @ ..] => {
                assert_eq!(*cut, is_cut);
                let next = rest.last();
                let stops = matches!(next, Some(Effect::Ask(Question::Stop)));
                assert!(stops == is_over && (is_over || matches!(next, Some(Effect::SendPass))));
            }
            effects => panic!("{effects:?}"),
        }
    }
}

/// Whether the lanes are notified. A ping may be due at the same time.
fn is_cut_pass(effects: &[Effect]) -> bool {
    has(effects, |effect| matches!(effect, Effect::CutPass))
}

#[test]
fn pass_is_cut_once_at_the_timeout() {
    let timeout = Duration::from_secs(5);
    let mut bench = Bench::in_endless_rounds(Some(timeout));
    let begun = bench.now;
    bench.lanes_end(1000, false, false);
    bench.now = begun + timeout - Duration::from_millis(1);
    assert!(!is_cut_pass(&bench.tell(Input::Time)));
    assert_eq!(bench.core.deadline(), Some(begun + timeout));
    bench.now = begun + timeout;
    assert!(is_cut_pass(&bench.tell(Input::Time)));
    assert!(!is_cut_pass(&bench.tell(Input::Time)), "lanes are notified once");
    assert!(bench.core.deadline().is_none_or(|at| at > bench.now), "it has passed");
    bench.lanes_end(500, true, true);
}

/// No lane sends while the log looks: the pass has ended as a whole.
#[test]
fn timeout_between_passes_starts_no_further_pass() {
    let timeout = Duration::from_secs(5);
    let mut bench = Bench::in_endless_rounds(Some(timeout));
    bench.tell(Input::PassEnded);
    bench.tell(Input::PassEnded);
    bench.tell(Input::Monitor(Answer::Looked(Ok(()))));
    bench.now += timeout;
    let effects = bench.tell(Input::Counted { left: dirty(1000), sent_bytes: 1 });
    assert!(matches!(effects.first(), Some(Effect::Tell(Event::Pass { is_cut: false, .. }))));
    assert!(has(&effects, |effect| matches!(effect, Effect::Ask(Question::Stop))), "{effects:?}");
}

#[test]
fn order_ends_the_passes_at_any_time() {
    // In a pass, twice.
    let mut bench = Bench::in_endless_rounds(None);
    bench.lanes_end(1000, false, false);
    assert!(is_cut_pass(&bench.tell(Input::EndPasses)));
    assert!(bench.tell(Input::EndPasses).is_empty());
    bench.lanes_end(500, true, true);
    assert!(bench.tell(Input::EndPasses).is_empty(), "the guest is stopped already");
    // While the log looks.
    let mut bench = Bench::in_endless_rounds(None);
    bench.tell(Input::PassEnded);
    bench.tell(Input::PassEnded);
    assert!(bench.tell(Input::EndPasses).is_empty());
    bench.tell(Input::Monitor(Answer::Looked(Ok(()))));
    let effects = bench.tell(Input::Counted { left: dirty(1000), sent_bytes: 1 });
    assert!(has(&effects, |effect| matches!(effect, Effect::Ask(Question::Stop))), "{effects:?}");
    // Before the destination is ready, and before writes are tracked: the only pass ends at once.
    for is_ready in [false, true] {
        let plan =
            RoundsPlan { passes_max: 4, downtime_limit: Duration::from_secs(1), timeout: None };
        let mut bench = Bench::with(true, false, Some(plan));
        if is_ready {
            bench.ready();
        }
        assert!(bench.tell(Input::EndPasses).is_empty());
        if !is_ready {
            bench.ready();
        }
        let effects = bench.tell(Input::Monitor(Answer::Tracking(Ok(()))));
        assert!(matches!(effects[..], [.., Effect::SendPass, Effect::CutPass]), "{effects:?}");
        let effects = bench.pass(4096);
        assert!(has(&effects, |effect| matches!(effect, Effect::Ask(Question::Stop))));
    }
}

/// Pages sent in passes do not count as pages that the destination has.
#[test]
fn needed_bytes_exclude_only_final_pages() {
    let mut bench = Bench::in_endless_rounds(None);
    bench.tell(Input::EndPasses);
    bench.tell(Input::PassEnded);
    bench.tell(Input::PassEnded);
    bench.tell(Input::Monitor(Answer::Looked(Ok(()))));
    bench.tell(Input::Counted { left: dirty(1000), sent_bytes: 8192 });
    bench.tell(Input::Monitor(Answer::Stopped(Ok(None))));
    bench.say(Said::Settled);
    bench.tell(Input::Monitor(Answer::Saved(Ok(vec![0]))));
    bench.say(Said::Loaded);
    bench.stands_still(Ok(()));
    bench.tell(Input::Committed);
    bench.say(Said::Running { us_since_switchover: 1 });
    let now = Moment { at: bench.now, moved_bytes: 8192 + 1096, checksum_errors: 0, memory: () };
    let effects: Vec<Effect> = bench.core.handle(Input::Interrupted, &now).collect();
    let [Effect::Tell(Event::Remark(Remark::StillNeeded { bytes: 3000 }))] = effects[..] else {
        panic!("{effects:?}")
    };
}

#[test]
fn failure_in_rounds_leaves_the_guest_running_here() {
    let failures = [
        Input::Failed(lost("demand lane")),
        Input::Monitor(Answer::Looked(Err(refused()))),
        Input::Interrupted,
        Input::NotDone(refused()),
    ];
    for failure in failures {
        let mut bench = Bench::in_rounds();
        let effects = bench.tell(failure);
        assert!(has(&effects, |effect| matches!(effect, Effect::Ask(Question::Resume))));
        // The guest was not stopped, so no record of a stop is written.
        assert!(!has(&effects, |effect| matches!(effect, Effect::Persist(_))), "{effects:?}");
        bench.tell(Input::Monitor(Answer::Resumed(Ok(()))));
        assert!(matches!(bench.failure().1, Guest::Here));
    }
}

/// The monitor's settings were changed to track the guest's writes.
#[test]
fn record_stays_if_monitor_settings_are_not_restored() {
    let endings: [fn(&mut Bench) -> Vec<Effect>; 3] = [
        |bench| bench.tell(Input::Monitor(Answer::Resumed(Err(refused())))),
        |bench| {
            bench.now += Duration::from_secs(5);
            bench.tell(Input::Time)
        },
        |bench| bench.tell(Input::Interrupted),
    ];
    for end in endings {
        let mut bench = Bench::in_rounds();
        bench.tell(Input::NotDone(refused()));
        let effects = end(&mut bench);
        assert!(!has(&effects, |effect| matches!(effect, Effect::Forget)), "{effects:?}");
        let is_reported = |effect: &Effect| matches!(effect, Effect::ReportUnrestored { .. });
        assert!(has(&effects, is_reported), "{effects:?}");
        assert!(matches!(bench.failure().1, Guest::Here));
    }
}

#[test]
fn effects_behind_a_failed_effect_are_dropped() {
    let mut bench = Bench::new(true, false);
    bench.serve();
    bench.say(Said::Running { us_since_switchover: 1 });
    let first = bench.handle(Input::Received(Said::Complete(Totals::default()))).next();
    assert!(matches!(first, Some(Effect::CheckFiles { are_compared: false })), "{first:?}");
    let rest = bench.tell(Input::NotDone(file_failed()));
    assert!(!has(&rest, |effect| matches!(effect, Effect::Goodbye(_) | Effect::Persist(_))));
    assert!(matches!(bench.failure(), (Error::RamFailed { .. }, Guest::Complete)));
}

/// Without a takeover the migration ends at once, and its end is already decided.
#[test]
fn ram_file_failure_at_the_end_fails_a_migration_without_takeover() {
    let mut bench = Bench::new(false, false);
    bench.serve();
    bench.tell(Input::Monitor(Answer::PutBack(Ok(()))));
    bench.say(Said::Running { us_since_switchover: 1 });
    let first = bench.handle(Input::Received(Said::Complete(Totals::default()))).next();
    assert!(matches!(first, Some(Effect::CheckFiles { .. })), "{first:?}");
    bench.tell(Input::NotDone(file_failed()));
    assert!(matches!(bench.failure(), (Error::RamFailed { .. }, Guest::Complete)));
}

#[test]
fn lanes_lost_during_comparison_lead_to_a_dialed_goodbye() {
    let mut bench = Bench::new(true, true);
    bench.serve();
    bench.tell(Input::Monitor(Answer::PutBack(Ok(()))));
    bench.say(Said::Running { us_since_switchover: 1 });
    bench.say(Said::Digests(DIGESTS.into()));
    let effects = bench.say(Said::Complete(Totals::default()));
    assert!(has(&effects, |effect| matches!(effect, Effect::Digest)));
    bench.tell(Input::Failed(lost("demand lane")));
    let effects = bench.tell(Input::Digested(Ok(Some(DIGESTS.into()))));
    let is_call = |effect: &Effect| matches!(effect, Effect::Call { word: Word::Goodbye, .. });
    assert!(has(&effects, is_call), "{effects:?}");
    let effects = bench.tell(Input::Called(Called::Heard));
    assert!(matches!(effects[..], [Effect::FreeRest, Effect::Forget]), "{effects:?}");
}

#[test]
fn guest_ended_before_the_goodbye_answer_fails_the_migration() {
    for (code, has_failed) in [(FaultCode::Ended, true), (FaultCode::Other, false)] {
        let mut bench = Bench::new(true, false);
        bench.serve();
        bench.tell(Input::Monitor(Answer::PutBack(Ok(()))));
        bench.say(Said::Running { us_since_switchover: 1 });
        let effects = bench.say(Said::Complete(Totals::default()));
        assert!(has(&effects, |effect| matches!(effect, Effect::Goodbye(Goodbye::Asked))));
        let effects = bench.say(Said::Error(Fault { code, text: "why".into() }));
        assert_eq!(has(&effects, |effect| matches!(effect, Effect::Forget)), has_failed);
        assert_eq!(bench.core.has_ended(), has_failed);
        if has_failed {
            assert!(matches!(bench.failure(), (Error::Peer { .. }, Guest::Complete)));
        }
    }
}

#[test]
fn last_monitor_answer_decides_about_a_second_switchover() {
    let is_switchover = |effect: &Effect| matches!(effect, Effect::Switchover);
    let mut bench = Bench::new(true, false);
    bench.serve();
    bench.reopen(false);
    bench.reopen(false);
    assert!(!has(&bench.stands_still(Ok(())), is_switchover), "asked on lanes that are gone");
    assert!(has(&bench.stands_still(Ok(())), is_switchover));
    assert!(!bench.core.has_ended());

    // The switchover has been sent: a later answer of the monitor does not return the guest.
    let effects = bench.stands_still(Err(refused()));
    assert!(effects.is_empty() && !bench.core.has_ended(), "{effects:?}");

    let mut bench = Bench::new(true, false);
    bench.serve();
    bench.reopen(false);
    bench.reopen(false);
    bench.stands_still(Ok(()));
    let effects = bench.stands_still(Err(refused()));
    let is_resume = |effect: &Effect| matches!(effect, Effect::Ask(Question::Resume));
    assert!(has(&effects, is_resume) && !has(&effects, is_switchover), "{effects:?}");
}

#[test]
fn failure_after_the_switchover_never_resumes_the_guest_here() {
    for switched in [false, true] {
        let mut bench = Bench::new(true, false);
        bench.serve();
        if switched {
            bench.reopen(true);
        }
        let effects = bench.tell(Input::Failed(Error::Host("broken".into())));
        assert!(!has(&effects, |effect| matches!(effect, Effect::Ask(_))), "{effects:?}");
        assert!(matches!(bench.failure(), (Error::Host(_), Guest::Away)));
    }
}

#[test]
fn abandoned_input_ends_the_migration_at_once_in_every_state() {
    let abandoned = || Input::Abandoned(Error::Interrupted("given up".into()));
    let states: [fn(&mut Bench); 5] = [
        |_| {},
        |bench| bench.serve(),
        |bench| {
            bench.serve();
            bench.tell(Input::Failed(lost("demand lane")));
            bench.tell(Input::LanesDown);
        },
        |bench| {
            bench.tell(Input::Interrupted);
        },
        |bench| {
            bench.serve();
            bench.say(Said::Running { us_since_switchover: 1 });
            bench.say(Said::Complete(Totals::default()));
        },
    ];
    for reach in states {
        let mut bench = Bench::new(true, false);
        reach(&mut bench);
        bench.tell(abandoned());
        assert!(bench.core.has_ended(), "{:?}", bench.core);
    }
}

/// The destination waits for the umem that takes the session over, as after a kill.
#[test]
fn panic_after_the_commit_closes_the_lanes_without_a_reason() {
    for is_kept in [true, false] {
        let mut bench = Bench::new(is_kept, false);
        bench.serve();
        let effects = bench.tell(Input::NotDone(Error::Internal("why".into())));
        let told = effects.iter().find_map(|effect| match effect {
            Effect::EndThreads(fault) => Some(fault.is_some()),
            _ => None,
        });
        assert_eq!(told, Some(!is_kept), "{effects:?}");
    }
}

/// A destination that was killed reports the state that it could write.
#[test]
fn switchover_is_resent_without_a_question_if_the_guest_was_reported_running() {
    for switched in [false, true] {
        let mut bench = Bench::new(true, false);
        bench.serve();
        bench.say(Said::Running { us_since_switchover: 1 });
        bench.tell(Input::Failed(lost("demand lane")));
        bench.tell(Input::LanesDown);
        let standing = Standing { switched, running: None, totals: Totals::default() };
        let effects = bench.tell(Input::Opened(Opened::Lanes(standing)));
        assert!(!bench.core.has_ended(), "{effects:?}");
        assert!(!has(&effects, |effect| matches!(effect, Effect::Ask(_))), "{effects:?}");
        assert_eq!(has(&effects, |effect| matches!(effect, Effect::Switchover)), !switched);
        // The guest was known to run: no event reports that again, and its pages are sent again.
        let effects = bench.say(Said::Running { us_since_switchover: 1 });
        let is_news = |effect: &Effect| matches!(effect, Effect::Tell(Event::Running { .. }));
        assert!(!has(&effects, is_news), "{effects:?}");
        assert!(has(&effects, |effect| matches!(effect, Effect::SendBulk)), "{effects:?}");
    }
}

#[test]
fn silent_monitor_after_a_denied_switchover_is_reported_and_can_be_left() {
    let can_leave_of = |effects: &[Effect]| {
        effects.iter().find_map(|effect| match effect {
            Effect::Tell(Event::Remark(Remark::AwaitsStandstill { can_leave })) => Some(*can_leave),
            _ => None,
        })
    };
    for is_kept in [true, false] {
        let mut bench = Bench::new(is_kept, false);
        bench.serve();
        bench.reopen(false);
        assert_eq!(can_leave_of(&bench.tell(Input::Time)), None);
        bench.now += STANDSTILL_PATIENCE;
        assert_eq!(can_leave_of(&bench.tell(Input::Time)), Some(is_kept));
        assert_eq!(can_leave_of(&bench.tell(Input::Time)), None, "the event is reported once");
        assert_eq!(can_leave_of(&bench.tell(Input::Interrupted)), Some(is_kept));
        let effects = bench.tell(Input::Interrupted);
        assert_eq!(bench.core.has_ended(), is_kept, "no process could continue: {effects:?}");
        if is_kept {
            // To the destination it looks as if umem had been killed.
            assert!(has(&effects, |effect| matches!(effect, Effect::EndThreads(None))));
            assert!(!has(&effects, |effect| matches!(effect, Effect::Forget)), "{effects:?}");
            assert!(matches!(bench.failure(), (Error::Interrupted(_), Guest::Away)));
        }
    }
}

/// The answer may wait on its way for any time: that is no downtime.
#[test]
fn downtime_ends_when_the_destination_says() {
    let mut bench = Bench::with(false, false, None);
    bench.ready();
    bench.tell(Input::Monitor(Answer::Stopped(Ok(Some(bench.now)))));
    bench.tell(Input::Monitor(Answer::Saved(Ok(vec![0]))));
    bench.say(Said::Loaded);
    bench.now += Duration::from_millis(20);
    bench.stands_still(Ok(()));
    bench.tell(Input::Committed);
    assert_eq!(bench.core.times().stopped_us(), 20_000);
    bench.now += Duration::from_millis(500);
    bench.say(Said::Running { us_since_switchover: 7_000 });
    assert_eq!(bench.core.times().downtime(), Duration::from_millis(27));
}
