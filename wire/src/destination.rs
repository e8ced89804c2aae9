//! The phases of the destination, from its welcome to the source's goodbye.
//!
//! ```text
//! Comparing --Regions--> Preparing --GuestReady--> Ready --Stopped--> Receiving --Load--> Loading
//!                                                                                           |
//!           Running <--GuestRunning-- Switched <--Switchover-- Loaded <--StateLoaded--------+
//!              |
//!              +--AllCached--> Completing --Complete--> Completed
//!
//! Ready --Rounds--> Rounds --Remaining (last)--> Settling --PagesSettled--> Settled --Stopped--> Receiving
//!
//! Loaded, Switched, Running, Completing --Broken--> the same: new lanes will come
//!
//! any but Completing, Completed --Lost--> Failed
//! any before Loaded --Broken--> Failed
//! any but Completed --Error, unexpected input--> Failed
//! any before Loaded --Cancel--> Failed
//! ```
//!
//! In [`Phase::Rounds`] a page may come several times, and no page may be requested: nothing
//! touches the memory. In all other cases pages come, and may be requested, from
//! [`Phase::Receiving`] on, as loading the device state touches memory. The guest may run from
//! [`Phase::Switched`] on. From there on it belongs to the destination whatever happens: the source
//! has given it up. The source may have given it up from [`Phase::Loaded`] on: a lane that breaks
//! there may have carried a switchover. The guest then does not run, and is kept.

use crate::error::PhaseError;
use crate::frame::Totals;
use crate::limits::STATE_BYTES_MAX;
use crate::receive::Event;

/// How the source sends its pages.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Mode {
    /// Pages are sent after the switchover; otherwise all come before the device state.
    pub postcopy: bool,
    /// Pages are sent without a request.
    pub background: bool,
}

/// The destination's phase.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Phase {
    /// The demand lane is open; the source's regions have not come.
    Comparing,
    /// The regions have come; they have to be compared, and the guest prepared.
    Preparing,
    /// The guest is prepared, and waits for the source's guest to stop.
    Ready,
    /// The source's guest runs, and its pages come, again after each write.
    Rounds,
    /// The source's guest has stopped, and the source has named the pages that are still to come.
    Settling,
    /// The remaining pages are settled: each page comes once from here on.
    Settled,
    /// The source's guest has stopped: pages and device state come.
    Receiving {
        /// How pages are sent.
        mode: Mode,
        /// Bytes of device state received.
        state_bytes: u64,
    },
    /// The guest loads the device state.
    Loading {
        /// How pages are sent.
        mode: Mode,
        /// Total bytes of device state.
        state_bytes: u64,
    },
    /// The guest has loaded the device state, and waits for the switchover.
    Loaded {
        /// How pages are sent.
        mode: Mode,
    },
    /// The guest belongs to the destination and may run.
    Switched {
        /// How pages are sent.
        mode: Mode,
        /// µs from the source guest's stop to its switchover frame.
        stopped_us: u64,
    },
    /// The guest runs.
    Running {
        /// How pages are sent.
        mode: Mode,
        /// µs from the source guest's stop to its switchover frame.
        stopped_us: u64,
    },
    /// Every page is cached, and the source's goodbye is still to come.
    Completing,
    /// Finished, with the source's totals if its goodbye arrived.
    Completed(Option<Totals>),
    /// The migration failed.
    Failed {
        /// Whether this guest may have run: then it is the only one.
        may_have_run: bool,
    },
}

/// An input of the phase machine: an action of this end, an event of the demand lane, or a failure.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Input<'a> {
    /// An event of the demand lane. Events of bulk lanes are no inputs: they are not ordered
    /// against the demand lane's.
    Received(&'a Event),
    /// The regions match, the guest is prepared, and a ready frame is about to be sent.
    GuestReady,
    /// All pages of the rounds are in place and counted, and a settled frame is about to be sent.
    PagesSettled,
    /// The guest has loaded the device state, and a loaded frame is about to be sent.
    StateLoaded,
    /// The guest runs, and a running frame is about to be sent.
    GuestRunning,
    /// Every page is cached and the guest runs; a complete frame is about to be sent.
    AllCached,
    /// A lane is lost, and the session cannot recover.
    Lost,
    /// A lane is lost, in a session that recovers ([`Capabilities::RECOVERY`]). Without effect once
    /// the source may have given its guest up.
    ///
    /// [`Capabilities::RECOVERY`]: crate::Capabilities::RECOVERY
    Broken,
    /// A request to stop. Without effect once the source may have given its guest up.
    Cancel,
}

impl Phase {
    /// The demand lane has just opened.
    #[expect(clippy::new_without_default, reason = "a phase is no default of anything")]
    pub fn new() -> Phase {
        Phase::Comparing
    }

    /// Takes one step. An error comes with the new phase, which is then, and only then,
    /// [`Phase::Failed`].
    pub fn step(self, input: Input<'_>) -> Result<Phase, (Phase, PhaseError)> {
        let (name, may_have_run) = (self.name(), self.may_run());
        self.advance(input).map_err(|stop| {
            let error = stop.unwrap_or(PhaseError::Unexpected { phase: name, input: input.name() });
            (Phase::Failed { may_have_run }, error)
        })
    }

    /// Whether this guest may run: the source has given its guest up.
    pub fn may_run(&self) -> bool {
        match self {
            Phase::Comparing
            | Phase::Preparing
            | Phase::Ready
            | Phase::Rounds
            | Phase::Settling
            | Phase::Settled
            | Phase::Receiving { .. }
            | Phase::Loading { .. }
            | Phase::Loaded { .. } => false,
            Phase::Switched { .. }
            | Phase::Running { .. }
            | Phase::Completing
            | Phase::Completed(_) => true,
            Phase::Failed { may_have_run } => *may_have_run,
        }
    }

    /// Whether the source may have given its guest up. In a session that recovers this guest is
    /// then kept when lanes break.
    pub fn outlives_its_lanes(&self) -> bool {
        match self {
            Phase::Loaded { .. }
            | Phase::Switched { .. }
            | Phase::Running { .. }
            | Phase::Completing => true,
            Phase::Comparing
            | Phase::Preparing
            | Phase::Ready
            | Phase::Rounds
            | Phase::Settling
            | Phase::Settled
            | Phase::Receiving { .. }
            | Phase::Loading { .. }
            | Phase::Completed(_)
            | Phase::Failed { .. } => false,
        }
    }

    /// Whether pages come and may be requested.
    pub fn may_request_pages(&self) -> bool {
        match self {
            Phase::Receiving { .. }
            | Phase::Loading { .. }
            | Phase::Loaded { .. }
            | Phase::Switched { .. }
            | Phase::Running { .. } => true,
            Phase::Comparing
            | Phase::Preparing
            | Phase::Ready
            | Phase::Rounds
            | Phase::Settling
            | Phase::Settled
            | Phase::Completing
            | Phase::Completed(_)
            | Phase::Failed { .. } => false,
        }
    }

    /// The phase's name in messages, after "while".
    pub fn name(&self) -> &'static str {
        match self {
            Phase::Comparing => "waiting for regions",
            Phase::Preparing => "preparing the guest",
            Phase::Ready => "ready",
            Phase::Rounds => "receiving pages while the guest runs",
            Phase::Settling => "settling which pages are still to come",
            Phase::Settled => "waiting for the rest",
            Phase::Receiving { .. } => "receiving device state",
            Phase::Loading { .. } => "loading device state",
            Phase::Loaded { .. } => "waiting for the switchover",
            Phase::Switched { .. } => "starting the guest",
            Phase::Running { .. } => "receiving pages",
            Phase::Completing => "saying goodbye",
            Phase::Completed(_) => "completed",
            Phase::Failed { .. } => "failed",
        }
    }

    /// The step itself: `Err(None)` is an input that cannot happen in this phase.
    fn advance(self, input: Input<'_>) -> Result<Phase, Option<PhaseError>> {
        match (self, input) {
            (Phase::Failed { .. }, _) => Err(None),
            (Phase::Completed(totals), input) => after_completion(totals, input),
            (Phase::Completing, Input::Lost) => Ok(Phase::Completed(None)),
            (phase, Input::Lost) => Err(Some(PhaseError::Lost { phase: phase.name() })),
            (phase, Input::Broken) if phase.outlives_its_lanes() => Ok(phase),
            (phase, Input::Broken) => Err(Some(PhaseError::Lost { phase: phase.name() })),
            // The source may have given its guest up already: cancelling would leave no guest at
            // all.
            (phase, Input::Cancel) if phase.outlives_its_lanes() => Ok(phase),
            (phase, Input::Cancel) => Err(Some(PhaseError::Cancelled { phase: phase.name() })),
            (phase, Input::Received(event)) => phase.receive(event),

            (Phase::Preparing, Input::GuestReady) => Ok(Phase::Ready),
            (Phase::Settling, Input::PagesSettled) => Ok(Phase::Settled),
            (Phase::Loading { mode, .. }, Input::StateLoaded) => Ok(Phase::Loaded { mode }),
            (Phase::Switched { mode, stopped_us }, Input::GuestRunning) => {
                Ok(Phase::Running { mode, stopped_us })
            }
            (Phase::Running { .. }, Input::AllCached) => Ok(Phase::Completing),
            _ => Err(None),
        }
    }

    fn receive(self, event: &Event) -> Result<Phase, Option<PhaseError>> {
        match (self, event) {
            (phase, Event::Ping(_) | Event::Pong(_)) => Ok(phase),
            (phase, Event::Error(fault)) => {
                Err(Some(PhaseError::Peer { phase: phase.name(), fault: fault.clone() }))
            }
            (phase, Event::RunBegins(_) | Event::Data(_) | Event::Zero(_) | Event::Hole(_))
                if phase.may_request_pages() =>
            {
                Ok(phase)
            }
            // Events of bulk lanes are not ordered against this one.
            (
                Phase::Rounds,
                Event::RunBegins(_) | Event::Data(_) | Event::Zero(_) | Event::Hole(_),
            ) => Ok(Phase::Rounds),
            (Phase::Comparing, Event::Regions(_)) => Ok(Phase::Preparing),
            (Phase::Ready, Event::Rounds) => Ok(Phase::Rounds),
            (Phase::Rounds, Event::Remaining { last: false, .. }) => Ok(Phase::Rounds),
            (Phase::Rounds, Event::Remaining { last: true, .. }) => Ok(Phase::Settling),
            (Phase::Ready | Phase::Settled, &Event::Stopped { postcopy, background }) => {
                Ok(Phase::Receiving { mode: Mode { postcopy, background }, state_bytes: 0 })
            }
            (Phase::Receiving { mode, state_bytes }, Event::DeviceState(chunk)) => {
                receive_state(mode, state_bytes, chunk.len() as u64)
            }
            (Phase::Receiving { mode, state_bytes }, &Event::Load { state_bytes: announced }) => {
                if announced != state_bytes {
                    let received = state_bytes;
                    return Err(Some(PhaseError::StateLength { received, announced }));
                }
                Ok(Phase::Loading { mode, state_bytes })
            }
            (Phase::Loaded { mode }, &Event::Switchover { stopped_us }) => {
                Ok(Phase::Switched { mode, stopped_us })
            }
            (Phase::Completing, Event::Digests(_)) => Ok(Phase::Completing),
            (Phase::Completing, Event::Complete(totals)) => Ok(Phase::Completed(Some(*totals))),
            _ => Err(None),
        }
    }
}

fn receive_state(mode: Mode, before: u64, chunk: u64) -> Result<Phase, Option<PhaseError>> {
    match before.saturating_add(chunk) {
        state_bytes if state_bytes <= STATE_BYTES_MAX => Ok(Phase::Receiving { mode, state_bytes }),
        too_long => Err(Some(PhaseError::StateTooLong(too_long))),
    }
}

/// After completion no failure has an effect, and lanes close in the normal course.
fn after_completion(totals: Option<Totals>, input: Input<'_>) -> Result<Phase, Option<PhaseError>> {
    match input {
        Input::Lost | Input::Broken | Input::Cancel => Ok(Phase::Completed(totals)),
        Input::Received(Event::Ping(_) | Event::Pong(_) | Event::Error(_)) => {
            Ok(Phase::Completed(totals))
        }
        _ => Err(None),
    }
}

impl Input<'_> {
    /// The input's name in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Input::Received(event) => event.name(),
            Input::GuestReady => "the guest's readiness",
            Input::PagesSettled => "the settled pages",
            Input::StateLoaded => "loaded device state",
            Input::GuestRunning => "the running guest",
            Input::AllCached => "the last cached page",
            Input::Lost => "a lost lane",
            Input::Broken => "a broken lane",
            Input::Cancel => "cancelling",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODE: Mode = Mode { postcopy: true, background: false };

    /// Every phase, in order, each with the names of the inputs and events that it accepts besides
    /// pings and, from the second list on, pages.
    fn phases() -> [(Phase, &'static [&'static str]); 14] {
        let (mode, stopped_us) = (MODE, 3);
        [
            (Phase::Comparing, &["regions"]),
            (Phase::Preparing, &["the guest's readiness"]),
            (Phase::Ready, &["stopped", "rounds"]),
            (Phase::Rounds, &["remaining", "data", "zero", "hole", "the start of a data run"]),
            (Phase::Settling, &["the settled pages"]),
            (Phase::Settled, &["stopped"]),
            (Phase::Receiving { mode, state_bytes: 2 }, &["device state", "load"]),
            (Phase::Loading { mode, state_bytes: 2 }, &["loaded device state"]),
            (Phase::Loaded { mode }, &["cancelling", "switchover", "a broken lane"]),
            (
                Phase::Switched { mode, stopped_us },
                &["cancelling", "the running guest", "a broken lane"],
            ),
            (
                Phase::Running { mode, stopped_us },
                &["cancelling", "the last cached page", "a broken lane"],
            ),
            (
                Phase::Completing,
                &["cancelling", "a lost lane", "a broken lane", "digests", "complete"],
            ),
            (Phase::Completed(None), &["cancelling", "a lost lane", "a broken lane", "error"]),
            (Phase::Failed { may_have_run: false }, &[]),
        ]
    }

    fn all(events: &[Event]) -> Vec<Input<'_>> {
        let mut inputs = vec![
            Input::GuestReady,
            Input::PagesSettled,
            Input::StateLoaded,
            Input::GuestRunning,
            Input::AllCached,
            Input::Lost,
            Input::Broken,
            Input::Cancel,
        ];
        inputs.extend(events.iter().map(Input::Received));
        inputs
    }

    fn is_page(input: Input<'_>) -> bool {
        let Input::Received(event) = input else {
            return false;
        };
        matches!(event, Event::RunBegins(_) | Event::Data(_) | Event::Zero(_) | Event::Hole(_))
    }

    #[test]
    fn each_phase_accepts_exactly_its_inputs() {
        let mut events = crate::receive::one_of_each();
        for event in &mut events {
            if let Event::Load { state_bytes } = event {
                *state_bytes = 2;
            }
        }
        for (phase, accepted) in phases() {
            for input in all(&events) {
                let pinged = matches!(input, Input::Received(Event::Ping(_) | Event::Pong(_)));
                let failed = matches!(phase, Phase::Failed { .. });
                let expected = accepted.contains(&input.name())
                    || pinged && !failed
                    || is_page(input) && phase.may_request_pages();
                let may_have_run = phase.may_run();
                match phase.clone().step(input) {
                    Ok(next) => {
                        assert!(expected, "{} accepted {}", phase.name(), input.name());
                        assert!(!matches!(next, Phase::Failed { .. }));
                        let ours = input.name() == "switchover";
                        assert_eq!(next.may_run(), may_have_run || ours, "{next:?}");
                    }
                    Err((next, error)) => {
                        assert!(!expected, "{error}");
                        assert_eq!(next, Phase::Failed { may_have_run });
                        assert!(error.to_string().contains(phase.name()), "{error}");
                    }
                }
            }
        }
    }

    #[test]
    fn pages_may_be_requested_from_stopped_on() {
        let asking = phases().map(|(phase, _)| phase.may_request_pages());
        let expected = [
            false, false, false, false, false, false, true, true, true, true, true, false, false,
            false,
        ];
        assert_eq!(asking, expected);
    }

    #[test]
    fn device_state_of_another_length_fails() {
        let receiving = |state_bytes| Phase::Receiving { mode: MODE, state_bytes };
        let chunk = Event::DeviceState(vec![0xa5; 3]);
        assert_eq!(receiving(1).step(Input::Received(&chunk)), Ok(receiving(4)));
        let (_, error) = receiving(STATE_BYTES_MAX - 2).step(Input::Received(&chunk)).unwrap_err();
        assert_eq!(error, PhaseError::StateTooLong(STATE_BYTES_MAX + 1));

        let load = Event::Load { state_bytes: 4 };
        let loading = Phase::Loading { mode: MODE, state_bytes: 4 };
        assert_eq!(receiving(4).step(Input::Received(&load)), Ok(loading));
        let (_, error) = receiving(5).step(Input::Received(&load)).unwrap_err();
        assert_eq!(error, PhaseError::StateLength { received: 5, announced: 4 });
    }

    #[test]
    fn lane_lost_while_completing_completes() {
        assert_eq!(Phase::Completing.step(Input::Lost), Ok(Phase::Completed(None)));
        let totals = Totals { pages_demand: 1, ..Totals::default() };
        let goodbye = Event::Complete(totals);
        let completed = Phase::Completed(Some(totals));
        assert_eq!(Phase::Completing.step(Input::Received(&goodbye)), Ok(completed));
    }
}
