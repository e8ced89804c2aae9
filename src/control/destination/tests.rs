//! Every input in every state, and runs in which umem is killed and lanes are lost between any two effects.

mod kills;
mod rounds;

use std::fmt::Write;
use std::time::{Duration, Instant};

use umem_wire::destination::Mode;
use umem_wire::{
    Event as Heard, Fault, FaultCode, LaneRole, PageSize, Region, RegionTable, Totals,
};

use super::link::GOODBYE_PATIENCE;
use super::takeover::{Found, Plan, Recalled, plan};
use super::{
    Core, Effect, Entrance, Exit, FreeSpace, Input, Memory, Moment, Outcome, Process, Session,
    SessionPolicy, Stage,
};

use crate::control::Order;
use crate::control::suspicion::IN_A_ROW_MAX;
use crate::error::Error;
use crate::session::DestinationState;
use crate::transport::lane::CAUSE_PATIENCE;

const STEP_TIMEOUT: Duration = Duration::from_secs(600);

fn terms() -> SessionPolicy {
    SessionPolicy {
        recovers: true,
        has_bulk_lanes: true,
        is_checked: true,
        is_private: false,
        runs_itself: false,
        is_embedded: false,
        session: Some(Session { number: "5e55".into(), directory_option: String::new() }),
        step_timeout: STEP_TIMEOUT,
    }
}

fn landing() -> RegionTable {
    let page_size = PageSize::from_shift(12).unwrap();
    RegionTable::new(vec![Region { name: "ram".into(), bytes: 1 << 20, page_size }]).unwrap()
}

fn lost(lane: LaneRole) -> Input {
    let name = crate::error::lane_name(lane, u16::from(lane == LaneRole::Bulk));
    Input::LaneLost { lane, error: lost_error(name) }
}

fn lost_error(lane: String) -> Error {
    Error::Lost { side: "source", lane, what: "reset".into() }
}

fn no_room(free: Option<FreeSpace>) -> Input {
    Input::NoRoom { error: Error::OutOfMemory("no space".into()), free }
}

fn fault(code: FaultCode) -> Input {
    Input::Received(Heard::Error(Fault { code, text: "why".into() }))
}

fn failed() -> Input {
    Input::Failed(Error::Host("failed".into()))
}

/// A core with its clock.
struct Bench {
    core: Core,
    now: Moment,
}

impl Bench {
    fn new(terms: SessionPolicy) -> Bench {
        let now = Instant::now();
        let core = Core::new(terms, Some(Entrance::Listener), now);
        let memory = Memory { pages_missing: 7, bytes_missing: 8 << 20, ..Memory::default() };
        Bench { core, now: Moment { at: now, moved_bytes: 0, checksum_errors: 0, memory } }
    }

    fn feed(&mut self, input: Input) -> Vec<Effect> {
        self.core.handle(input, &self.now).collect()
    }

    fn feed_all(mut self, inputs: impl IntoIterator<Item = Input>) -> Bench {
        inputs.into_iter().for_each(|input| drop(self.feed(input)));
        self
    }

    fn says(&mut self, input: Input) -> String {
        all(&self.feed(input))
    }

    fn wait(&mut self, time: Duration) {
        self.now.at += time;
    }
}

/// The inputs that lead from stage to stage, in order.
fn way() -> Vec<(&'static str, Vec<Input>)> {
    let received = Input::Received;
    vec![
        ("Comparing", vec![]),
        ("Ready", vec![Input::Begin(landing())]),
        ("Receiving", vec![received(Heard::Stopped { postcopy: true, background: true })]),
        (
            "Loading",
            vec![
                received(Heard::DeviceState(vec![1, 2])),
                received(Heard::Load { state_bytes: 2 }),
            ],
        ),
        ("Committing", vec![Input::Loaded { runs: true }]),
        ("Holding", vec![Input::Committed]),
        ("Awaiting", vec![Input::Held]),
        ("Starting", vec![received(Heard::Switchover { stopped_us: 3 })]),
        ("Serving", vec![Input::Running]),
        ("Unregistering", vec![Input::AllCached]),
        ("Parting", vec![Input::Unregistered { exit: None, unmapped_bytes: 0 }]),
        ("Stopping", vec![received(Heard::Complete(Totals::default()))]),
        ("Releasing", vec![Input::ThreadsEnded]),
        ("Ended", vec![Input::Released]),
    ]
}

/// A core that has reached the stage of that name.
fn at(stage: &str, terms: SessionPolicy) -> Bench {
    let mut bench = Bench::new(terms);
    for (name, inputs) in way() {
        bench = bench.feed_all(inputs);
        if name == stage {
            return bench;
        }
    }
    panic!("no stage is called {stage}")
}

/// Cores in rounds, in failures, and after a takeover.
fn sidings() -> Vec<(&'static str, Bench)> {
    let recalled = |state| {
        let mode = Mode { postcopy: true, background: true };
        let at = (state != DestinationState::Loaded).then(Instant::now);
        let recalled = Recalled { state, mode, stopped_us: 3, switched: at, running: at };
        let bench = Bench::new(terms());
        let core = Core::recalled(terms(), &recalled, bench.now.at);
        Bench { core, ..bench }.feed_all([Input::TakeOver])
    };
    let cause = |process| Input::Cause { error: Error::Host("failed".into()), process };
    let remaining = || Input::Received(Heard::Remaining { runs: Vec::new(), last: true });
    let rounds = || at("Ready", terms()).feed_all([Input::Received(Heard::Rounds)]);
    let all_landed = || rounds().feed_all([Input::RoundsEnded]);
    vec![
        ("Rounds", rounds()),
        ("Rounds(all landed)", all_landed()),
        ("Settling(copies land)", rounds().feed_all([remaining()])),
        ("Settling", all_landed().feed_all([remaining()])),
        ("Settled", all_landed().feed_all([remaining(), Input::PagesSettled])),
        ("TakingOver(loaded)", recalled(DestinationState::Loaded)),
        ("TakingOver(switched)", recalled(DestinationState::Switched)),
        ("TakingOver(running)", recalled(DestinationState::Running)),
        ("Seeking(loading)", at("Loading", terms()).feed_all([failed()])),
        ("Seeking(loaded)", at("Awaiting", terms()).feed_all([failed()])),
        ("Seeking(running)", at("Serving", terms()).feed_all([failed()])),
        ("Stopping(stays)", at("Serving", terms()).feed_all([failed(), cause(Process::Stays)])),
        ("Stopping(ends)", at("Serving", terms()).feed_all([failed(), cause(Process::Gone)])),
        (
            "Releasing(unheard)",
            at("Parting", terms()).feed_all([
                lost(LaneRole::Demand),
                Input::Interrupt,
                Input::ThreadsEnded,
            ]),
        ),
    ]
}

/// One of each input, with lanes up.
fn inputs() -> Vec<(&'static str, Input)> {
    let not_written =
        |state| Input::NotWritten { state, error: Error::Environment("disk full".into()) };
    let cause = |process| Input::Cause { error: Error::Host("failed".into()), process };
    let remaining = |last| Input::Received(Heard::Remaining { runs: Vec::new(), last });
    vec![
        ("rounds", Input::Received(Heard::Rounds)),
        ("remaining, more to come", remaining(false)),
        ("remaining", remaining(true)),
        ("RoundsEnded", Input::RoundsEnded),
        ("PagesSettled", Input::PagesSettled),
        ("stopped", Input::Received(Heard::Stopped { postcopy: true, background: true })),
        ("device state", Input::Received(Heard::DeviceState(vec![1, 2]))),
        ("load", Input::Received(Heard::Load { state_bytes: 2 })),
        ("switchover", Input::Received(Heard::Switchover { stopped_us: 3 })),
        ("digests", Input::Received(Heard::Digests(vec![1]))),
        ("complete", Input::Received(Heard::Complete(Totals::default()))),
        ("ping", Input::Received(Heard::Ping(1))),
        ("the source gives up", fault(FaultCode::Cancelled)),
        ("the source's file fails", fault(FaultCode::SourceMemory)),
        ("AllCached", Input::AllCached),
        ("AllReleased", Input::AllReleased),
        ("Loaded", Input::Loaded { runs: true }),
        ("Committed", Input::Committed),
        ("NotWritten(running)", not_written(DestinationState::Running)),
        ("NotWritten(complete)", not_written(DestinationState::Complete)),
        ("Held", Input::Held),
        ("Running", Input::Running),
        ("Unregistered", Input::Unregistered { exit: None, unmapped_bytes: 4 }),
        (
            "Unregistered, guest died",
            Input::Unregistered {
                exit: Some(Exit::Failed { how: " (signal: 9)".into() }),
                unmapped_bytes: 0,
            },
        ),
        ("TakenUp", Input::TakenUp),
        ("Failed", failed()),
        ("NotDone", Input::NotDone(Error::Environment("disk full".into()))),
        ("demand lane lost", lost(LaneRole::Demand)),
        ("bulk lane lost", lost(LaneRole::Bulk)),
        ("no room", no_room(None)),
        ("Came", Input::Came),
        ("Pause", Input::Order(Order::Pause)),
        ("Offered(given)", Input::Offered(Entrance::Given)),
        ("Interrupt", Input::Interrupt),
        ("GuestEnded(fine)", Input::GuestEnded(Exit::Fine)),
        ("GuestEnded(failed)", Input::GuestEnded(Exit::Failed { how: String::new() })),
        ("Tick", Input::Tick),
        ("Cause(gone)", cause(Process::Gone)),
        ("Cause(ends with us)", cause(Process::EndsWithUs)),
        ("Cause(stays)", cause(Process::Stays)),
        ("ThreadsEnded", Input::ThreadsEnded),
        ("Released", Input::Released),
    ]
}

/// An effect as text, without times and memory addresses.
fn short(effect: &Effect) -> String {
    match effect {
        Effect::Persist(record) => {
            format!("Persist({})", format!("{:?}", record.state()).to_lowercase())
        }
        Effect::Load(state) => format!("Load({state:?})"),
        Effect::Send(frame) => {
            let frame = format!("{frame:?}");
            let end = frame.find([' ', '(']).unwrap_or(frame.len());
            format!("Send({})", frame[..end].to_lowercase())
        }
        Effect::Report(event) => {
            format!("Report({})", event.name().map_or_else(|| format!("{event:?}"), Into::into))
        }
        Effect::SeekCause(Error::Protocol { what, .. }) => format!("SeekCause(protocol: {what})"),
        Effect::SeekCause(error) => format!("SeekCause({error})"),
        Effect::EndThreads { told: Some(fault), .. } => {
            format!("EndThreads(told {:?}: {})", fault.code, fault.text)
        }
        Effect::EndThreads { told: None, .. } => "EndThreads".into(),
        Effect::Finish(Outcome::Failed(error)) => format!("Finish({error})"),
        Effect::Finish(Outcome::Complete { unheard: None }) => "Finish(complete)".into(),
        Effect::Finish(Outcome::Complete { unheard: Some(_) }) => {
            "Finish(complete, unheard)".into()
        }
        Effect::Reconnect { standing, is_complete } => format!(
            "Reconnect(switched {}, running {}, complete {is_complete})",
            standing.switched,
            standing.running.is_some()
        ),
        Effect::RequestPages => "RequestPages".into(),
        Effect::Sleep { .. } => "Sleep".into(),
        other => format!("{other:?}"),
    }
}

fn all(effects: &[Effect]) -> String {
    effects.iter().map(short).collect::<Vec<_>>().join(", ")
}

fn name(core: &Core) -> String {
    let stage = format!("{:?}", core.stage);
    let end = stage.find([' ', '(']).unwrap_or(stage.len());
    let lanes = format!("{:?}", core.link.state);
    let lanes = &lanes[..lanes.find([' ', '(']).unwrap_or(lanes.len())];
    format!("{} {lanes}", &stage[..end])
}

/// A line for each pair that changes something.
fn table() -> String {
    let mut table = String::new();
    let stages = way().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    let sidings_count = sidings().len();
    for index in 0..stages.len() + sidings_count {
        for (input_name, input) in inputs() {
            let (stage, mut bench) = match stages.get(index) {
                Some(stage) => (*stage, at(stage, terms())),
                None => sidings().swap_remove(index - stages.len()),
            };
            let before = name(&bench.core);
            let effects = bench.feed(input);
            let after = name(&bench.core);
            if effects.is_empty() && before == after {
                continue;
            }
            let to = if before == after { "-" } else { &after };
            let done = if effects.is_empty() { "-".into() } else { all(&effects) };
            writeln!(table, "{stage} | {input_name} | {to} | {done}").unwrap();
        }
    }
    table
}

/// `table.txt` lists every pair of a stage and an input with an effect. All other pairs have none.
#[test]
fn every_stage_answers_every_input_as_in_the_table() {
    let (expected, actual) = (include_str!("tests/table.txt"), table());
    let differ = |ours: &str, theirs: &str| {
        let lines: Vec<_> =
            ours.lines().filter(|line| !theirs.lines().any(|l| l == *line)).collect();
        lines.join("\n")
    };
    assert!(
        expected == actual,
        "no more:\n{}\nnew:\n{}\nall:\n{actual}",
        differ(expected, &actual),
        differ(&actual, expected)
    );
}

#[test]
fn broken_lanes_are_replaced_only_after_their_release() {
    let mut bench = at("Serving", terms());
    assert_eq!(bench.says(lost(LaneRole::Bulk)), "");
    assert_eq!(bench.core.deadline(), Some(bench.now.at + CAUSE_PATIENCE));
    bench.wait(CAUSE_PATIENCE);
    assert_eq!(bench.says(Input::Tick), "Sever, Report(recovering)");
    assert_eq!(bench.says(lost(LaneRole::Demand)), "", "of the same lanes");
    assert_eq!(bench.says(Input::Came), "");
    assert_eq!(bench.says(Input::Quiet), "Settle");
    let gone_on =
        "RollBack, Reconnect(switched true, running true, complete false), Report(resumed)";
    assert_eq!(bench.says(Input::Settled), gone_on);
    assert_eq!(bench.core.recoveries(), (1, Duration::ZERO));

    // In the reverse order: nothing of the old lanes is left when the new ones come.
    assert_eq!(bench.says(lost(LaneRole::Demand)), "Sever, Report(recovering)");
    assert_eq!(bench.says(Input::Quiet), "Settle");
    assert_eq!(bench.says(Input::Settled), "RollBack");
    bench.wait(Duration::from_secs(5));
    let gone_on = gone_on.strip_prefix("RollBack, ").unwrap();
    assert_eq!(bench.says(Input::Came), gone_on);
    assert_eq!(bench.core.recoveries(), (2, Duration::from_secs(5)));
}

#[test]
fn reason_of_a_source_is_kept_when_its_bulk_lanes_close_first() {
    let mut bench = at("Awaiting", terms());
    assert_eq!(bench.says(lost(LaneRole::Bulk)), "");
    assert_eq!(bench.says(fault(FaultCode::Cancelled)), "SeekCause(the source gave up: why)");
    let cause = Error::Peer { side: "source", code: FaultCode::Cancelled, text: "why".into() };
    assert_eq!(
        bench.says(Input::Cause { error: cause, process: Process::Stays }),
        "Show(\"ending\"), EndThreads(told Ended: the source gave up: why)"
    );
    assert_eq!(
        bench.says(Input::ThreadsEnded),
        "EndGuest, Forget, Finish(the source gave up: why)"
    );
}

#[test]
fn exhausted_room_refuses_lanes_until_room_returns() {
    let free = |bytes| Some(FreeSpace { ram: "ram".into(), bytes });
    let mut bench = at("Serving", terms());
    assert_eq!(bench.says(no_room(free(4096))), "Report(short), Send(error)");
    bench.wait(CAUSE_PATIENCE);
    assert_eq!(bench.says(Input::Tick), "Sever, Report(recovering)");
    let (code, why) = bench.core.refusal().unwrap();
    assert_eq!(code, FaultCode::OutOfMemory);
    assert!(why.contains("up to 8 MiB have not arrived"), "{why}");
    bench.wait(Duration::from_secs(1));
    assert_eq!(bench.says(Input::Tick), "MeasureRoom");
    assert_eq!(bench.says(Input::Room(free(4096))), "");
    assert!(bench.core.refusal().is_some());
    bench.wait(Duration::from_secs(1));
    assert_eq!(bench.says(Input::Tick), "MeasureRoom");
    assert_eq!(bench.says(Input::Room(free(2 << 20))), "");
    assert!(bench.core.refusal().is_none());
}

#[test]
fn checksum_losses_without_a_page_pause_the_destination() {
    let mut bench = at("Serving", terms());
    for round in 1..=IN_A_ROW_MAX {
        bench.now.checksum_errors += 1;
        let said = bench.says(lost(LaneRole::Demand));
        let is_last = round == IN_A_ROW_MAX;
        assert_eq!(said.ends_with("Report(paused)"), is_last, "{round}: {said}");
        assert_eq!(bench.says(Input::Quiet), "Settle");
        assert_eq!(bench.says(Input::Settled), "RollBack");
        assert_eq!(bench.core.refusal().is_some(), is_last);
        if !is_last {
            assert!(bench.says(Input::Came).starts_with("Reconnect"));
        }
    }
    assert_eq!(bench.says(Input::Order(Order::Resume(None))), "");
    assert!(bench.core.refusal().is_none());
}

#[test]
fn lookup_of_a_superseded_order_is_not_bound() {
    let uri = || "tcp::4444".parse::<crate::transport::uri::Uri>().unwrap();
    let found = |order| Input::Found { order, uri: uri(), found: Ok(Vec::new()) };
    let mut bench = at("Serving", terms());
    assert_eq!(bench.says(Input::Order(Order::Pause)), "Sever, Report(paused)");
    assert!(bench.says(Input::Order(Order::Resume(Some(uri())))).starts_with("LookUp { order: 2"));
    assert_eq!(bench.says(Input::Order(Order::Pause)), "Report(paused)");
    assert_eq!(bench.says(found(2)), "");
    assert!(bench.says(Input::Order(Order::Resume(Some(uri())))).starts_with("LookUp { order: 4"));
    assert!(bench.says(found(4)).starts_with("Bind"));
    assert!(bench.core.refusal().is_some(), "the pause lasts until a listener exists");
    let bound = Input::Bound { uri: "tcp:[::]:4444".into() };
    assert_eq!(bench.says(bound), "Open, WriteAddress(\"tcp:[::]:4444\"), Report(listening)");
    assert!(bench.core.refusal().is_none());
}

#[test]
fn given_connections_are_used_once() {
    let mut bench = at("Serving", terms());
    assert_eq!(bench.says(Input::Offered(Entrance::Given)), "Open, Sever, Report(recovering)");
    assert_eq!(bench.says(Input::GivenInVain), "ForgetGiven, Report(paused)");
    assert_eq!(bench.says(Input::Offered(Entrance::Given)), "Open");
    assert_eq!(bench.says(Input::Came), "ForgetGiven");
    assert_eq!(
        bench.says(Input::Order(Order::Pause)),
        "DropLanes, Report(paused)",
        "they wait for the old ones"
    );
}

#[test]
fn complete_destination_stops_waiting_for_the_goodbye_after_its_limit() {
    let mut bench = at("Parting", terms());
    assert_eq!(bench.says(lost(LaneRole::Demand)), "Sever, Report(recovering)");
    assert_eq!(bench.says(Input::Tick), "");
    bench.wait(GOODBYE_PATIENCE);
    let ends = "Entered(\"completed\"), Show(\"ending\"), EndThreads";
    assert_eq!(bench.says(Input::Tick), ends);
    assert_eq!(bench.says(Input::ThreadsEnded), "Release");
    let said = bench.says(Input::Released);
    assert!(said.starts_with("Report(Remark(SourceUnaware"), "{said}");
    assert!(said.ends_with("Finish(complete, unheard)"), "the record stays: {said}");
}

#[test]
fn first_interrupt_without_lanes_warns_and_second_ends() {
    for (stage, what) in [("Awaiting", "given the guest up"), ("Serving", "pages that only")] {
        let mut bench = at(stage, terms()).feed_all([lost(LaneRole::Demand)]);
        let said = bench.says(Input::Interrupt);
        assert!(said.starts_with("Report(Remark(InterruptAgainHere"), "{said}");
        let said = bench.says(Input::Interrupt);
        assert!(said.starts_with("SeekCause(interrupted") && said.contains(what), "{said}");
    }
    let embedded = SessionPolicy { is_embedded: true, ..terms() };
    let mut bench = at("Serving", embedded).feed_all([lost(LaneRole::Demand)]);
    assert_eq!(bench.says(Input::Interrupt), "");
}

#[test]
fn without_postcopy_the_commit_waits_for_every_page() {
    let stopped = Heard::Stopped { postcopy: false, background: true };
    let load = [
        Input::Received(stopped),
        Input::Received(Heard::DeviceState(vec![1, 2])),
        Input::Received(Heard::Load { state_bytes: 2 }),
    ];
    let mut bench = at("Ready", terms()).feed_all(load);
    assert_eq!(bench.says(Input::Loaded { runs: true }), "");
    assert_eq!(bench.says(Input::AllCached), "Commit");
    let private = SessionPolicy { is_private: true, ..terms() };
    let mut bench = at("Serving", private);
    assert_eq!(bench.says(Input::AllCached), "Show(\"touching\"), TouchTheRest");
    assert_eq!(bench.says(Input::AllReleased), "Unregister");
    // In either order.
    let private = SessionPolicy { is_private: true, ..terms() };
    let mut bench = at("Serving", private);
    assert_eq!(bench.says(Input::AllReleased), "");
    assert_eq!(bench.says(Input::AllCached), "Show(\"touching\"), TouchTheRest, Unregister");
}

/// Such a guest runs as soon as it has pages.
#[test]
fn guest_without_a_monitor_gets_pages_only_after_the_switchover() {
    let terms = SessionPolicy { runs_itself: true, ..terms() };
    let mut bench = at("Awaiting", terms);
    let switchover = Heard::Switchover { stopped_us: 7 };
    assert!(!bench.says(Input::Received(switchover)).contains("RequestPages"));
    let said = bench.says(Input::Running);
    let (known, requested) = (said.find("Persist(running)"), said.find("RequestPages"));
    assert!(known.is_some() && known < requested, "{said}");
    assert_eq!(bench.says(Input::GuestEnded(Exit::Fine)), "");
}

#[test]
fn session_without_takeover_writes_no_record_and_holds_no_guest() {
    let mut bench = at("Committing", SessionPolicy { session: None, ..terms() });
    assert_eq!(
        bench.says(Input::Committed),
        "Entered(\"waiting for the switchover\"), Send(loaded)"
    );
    // Only the source knows the owner of the guest, and it cannot reach another process.
    let cause = Input::Cause { error: Error::Host("failed".into()), process: Process::Stays };
    bench.feed(failed());
    bench.feed(cause);
    assert_eq!(
        bench.says(Input::ThreadsEnded),
        "EndGuest, Forget, Finish(the guest's monitor: failed)"
    );
}

#[test]
fn unexpected_frame_leaves_the_owner_of_the_guest_unchanged() {
    let mut bench = at("Awaiting", terms());
    let said = bench.says(Input::Received(Heard::Load { state_bytes: 2 }));
    assert!(said.starts_with("SeekCause("), "{said}");
    let error = Error::protocol("demand lane", "load");
    bench.feed(Input::Cause { error, process: Process::Stays });
    let said = bench.says(Input::ThreadsEnded);
    assert!(said.starts_with("LetWait, Report(stays), Finish("), "{said}");
}

#[test]
fn slow_step_ends_the_migration_only_before_loaded() {
    let mut bench = at("Receiving", terms());
    assert_eq!(bench.says(Input::Tick), "");
    bench.wait(STEP_TIMEOUT);
    assert!(bench.says(Input::Tick).contains("--step-timeout"));
    let mut bench = at("Awaiting", terms());
    bench.feed(Input::Tick);
    bench.wait(10 * STEP_TIMEOUT);
    assert_eq!(bench.says(Input::Tick), "", "silence decides nothing");
}

#[test]
fn takeover_plan_follows_from_record_and_guest() {
    use DestinationState::{Complete, Loaded, Parted, Running, Switched};
    for state in [Loaded, Switched, Running] {
        assert_eq!(plan(state, Found::Waiting(())), Plan::Serve(()));
        assert_eq!(plan::<()>(state, Found::Complete), Plan::Nothing);
        assert_eq!(plan::<()>(state, Found::Ended), Plan::TellOfEnd);
    }
    assert_eq!(plan(Complete, Found::Waiting(())), Plan::Serve(()));
    assert_eq!(plan::<()>(Complete, Found::Complete), Plan::TellOfCompletion);
    assert_eq!(plan::<()>(Complete, Found::Ended), Plan::TellOfCompletion);
    assert_eq!(plan(Parted, Found::Waiting(())), Plan::Release(()));
    assert_eq!(plan::<()>(Parted, Found::Complete), Plan::Nothing);
    assert_eq!(plan::<()>(Parted, Found::Ended), Plan::Nothing);
}

#[test]
fn every_waiting_stage_has_a_name_in_the_table() {
    for (name, _) in way() {
        let bench = at(name, terms());
        let is_named = matches!(
            (name, &bench.core.stage),
            ("Comparing" | "Ready" | "Receiving", Stage::Receiving { .. })
                | ("Loading", Stage::Loading)
                | ("Committing", Stage::Committing { .. })
                | ("Holding", Stage::Holding)
                | ("Awaiting", Stage::Awaiting)
                | ("Starting", Stage::Starting { .. })
                | ("Serving", Stage::Serving)
                | ("Unregistering", Stage::Unregistering)
                | ("Parting", Stage::Parting)
                | ("Stopping", Stage::Stopping(_))
                | ("Releasing", Stage::Releasing)
                | ("Ended", Stage::Ended)
        );
        assert!(is_named, "{name}: {:?}", bench.core.stage);
    }
}

/// The earlier write may have failed, because *switched* is not vital.
#[test]
fn running_guest_is_reported_running_without_known_times() {
    let mode = Mode { postcopy: true, background: true };
    let state = DestinationState::Running;
    let recalled = Recalled { state, mode, stopped_us: 0, switched: None, running: None };
    let bench = Bench::new(terms());
    let core = Core::recalled(terms(), &recalled, bench.now.at);
    let mut bench = Bench { core, ..bench }.feed_all([Input::TakeOver, Input::TakenUp]);
    let said = bench.says(Input::Came);
    assert!(said.starts_with("Reconnect(switched true, running true"), "{said}");
}

/// The source measures up to the sending of the switchover, and the frame may wait behind pages: both sides count that,
/// and the time until the guest runs, once.
#[test]
fn way_of_the_switchover_is_part_of_the_downtime() {
    let ms = Duration::from_millis;
    for (stated, waited, downtime) in [(300, 350, 360), (300, 300, 310), (300, 100, 310)] {
        let mut bench = at("Receiving", terms());
        bench.wait(ms(waited));
        let rest = way().into_iter().skip_while(|&(name, _)| name != "Loading");
        for input in rest.take_while(|&(name, _)| name != "Starting").flat_map(|(_, inputs)| inputs)
        {
            bench.feed(input);
        }
        let stopped_us = u64::try_from(ms(stated).as_micros()).unwrap();
        bench.feed(Input::Received(Heard::Switchover { stopped_us }));
        bench.wait(ms(10));
        let effects = bench.feed(Input::Running);
        assert_eq!(bench.core.times().downtime, ms(downtime));
        let told = effects.iter().find_map(|effect| match effect {
            Effect::Send(umem_wire::Frame::Running { us_since_switchover }) => {
                Some(Duration::from_micros(*us_since_switchover))
            }
            _ => None,
        });
        assert_eq!(told, Some(ms(downtime - stated)), "the source has the same sum");
    }
}
