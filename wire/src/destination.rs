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
//! any but Completed --Error, what cannot happen--> Failed
//! any before Loaded --Cancel--> Failed
//! ```
//!
//! In [`Phase::Rounds`] pages come that may come again, and none may be asked for: nobody touches the memory.
//! Otherwise pages come, and may be asked for, from [`Phase::Receiving`] on: loading the device state touches
//! memory. The guest may run from [`Phase::Switched`] on, and from there on it belongs to this side
//! whatever happens: the source has given it up. It may have done so from [`Phase::Loaded`] on, where a
//! broken lane leaves open whether a switchover was on its way: the guest does not run, and is kept.

use crate::error::PhaseError;
use crate::frame::Totals;
use crate::limits::STATE_BYTES_MAX;
use crate::receive::Event;

/// How the source sends its pages.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Mode {
    /// Pages are sent after the switchover; if not, all come before the device state.
    pub postcopy: bool,
    /// Pages are sent that nobody asked for.
    pub background: bool,
}

/// Where the destination is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Phase {
    /// The demand lane is open; the source's regions have not come.
    Comparing,
    /// They have; they have to be compared, and our guest prepared.
    Preparing,
    /// Our guest waits.
    Ready,
    /// The source's guest runs, and its pages come, again where it writes to them.
    Rounds,
    /// It has stopped, and has said which pages are still to come.
    Settling,
    /// What remains is settled: each page comes once from here on.
    Settled,
    /// The source's guest has stopped: pages and device state come.
    Receiving {
        /// How pages are sent.
        mode: Mode,
        /// Bytes of device state that came.
        state_bytes: u64,
    },
    /// Our guest takes the device state.
    Loading {
        /// How pages are sent.
        mode: Mode,
        /// Bytes of device state in all.
        state_bytes: u64,
    },
    /// It has, and waits for the switchover.
    Loaded {
        /// How pages are sent.
        mode: Mode,
    },
    /// The guest is ours and may run.
    Switched {
        /// How pages are sent.
        mode: Mode,
        /// µs from the source guest's stop to its switchover frame.
        stopped_us: u64,
    },
    /// It runs.
    Running {
        /// How pages are sent.
        mode: Mode,
        /// µs from the source guest's stop to its switchover frame.
        stopped_us: u64,
    },
    /// Every page is cached, and the source has yet to say goodbye.
    Completing,
    /// Done. What the source sent in all, if its goodbye arrived.
    Completed(Option<Totals>),
    /// It did not work.
    Failed {
        /// Whether our guest may have run: it is the only one then.
        may_have_run: bool,
    },
}

/// What moves the destination on: what we did, what the peer said on the demand lane, or what went
/// wrong.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Input<'a> {
    /// The source said this on the demand lane. Events of bulk lanes do not come here: they are not
    /// ordered against the demand lane's.
    Received(&'a Event),
    /// The regions match, our guest is prepared, and a ready frame is about to be sent.
    GuestReady,
    /// All that came in rounds is in place and counted, and a settled frame is about to be sent.
    PagesSettled,
    /// Our guest has taken the device state, and a loaded frame is about to be sent.
    StateLoaded,
    /// Our guest runs, and a running frame is about to be sent.
    GuestRunning,
    /// Every page is cached and our guest runs; a complete frame is about to be sent.
    AllCached,
    /// A lane is gone, and the session cannot go on without it.
    Lost,
    /// A lane is gone, in a session that recovers ([`Capabilities::RECOVERY`]). Once the source may have
    /// given its guest up, that changes nothing here.
    ///
    /// [`Capabilities::RECOVERY`]: crate::Capabilities::RECOVERY
    Broken,
    /// Somebody asked to stop. Too late once the guest is ours, and without effect then.
    Cancel,
}

impl Phase {
    /// The demand lane has just opened.
    #[expect(clippy::new_without_default, reason = "a phase is no default of anything")]
    pub fn new() -> Phase {
        Phase::Comparing
    }

    /// Moves on. The answer is an error exactly if the new phase, which comes with it, is
    /// [`Phase::Failed`].
    pub fn step(self, input: Input<'_>) -> Result<Phase, (Phase, PhaseError)> {
        let (name, may_have_run) = (self.name(), self.may_run());
        self.advance(input).map_err(|stop| {
            let error = stop.unwrap_or(PhaseError::Unexpected { phase: name, input: input.name() });
            (Phase::Failed { may_have_run }, error)
        })
    }

    /// Whether our guest may run: the source has given it up.
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

    /// Whether the source may have given its guest up, so that this one is kept when lanes break, in a
    /// session that recovers.
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

    /// Whether pages may be asked for, and come.
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

    /// What the phase is called in messages, after "while".
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

    /// The step itself: `Err(None)` is an input that cannot happen here.
    fn advance(self, input: Input<'_>) -> Result<Phase, Option<PhaseError>> {
        match (self, input) {
            (Phase::Failed { .. }, _) => Err(None),
            (Phase::Completed(totals), input) => after_completion(totals, input),
            (Phase::Completing, Input::Lost) => Ok(Phase::Completed(None)),
            (phase, Input::Lost) => Err(Some(PhaseError::Lost { phase: phase.name() })),
            (phase, Input::Broken) if phase.outlives_its_lanes() => Ok(phase),
            (phase, Input::Broken) => Err(Some(PhaseError::Lost { phase: phase.name() })),
            // The source may have given the guest up already: then nobody would have it.
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
            // Those of bulk lanes are not ordered against this.
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

/// After the end nothing can be lost any more, and the closing of lanes is part of it.
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
    /// What the input is called in messages.
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
    fn every_pair_of_phase_and_input() {
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
    fn pages_come_from_stopped_on() {
        let asking = phases().map(|(phase, _)| phase.may_request_pages());
        let expected = [
            false, false, false, false, false, false, true, true, true, true, true, false, false,
            false,
        ];
        assert_eq!(asking, expected);
    }

    #[test]
    fn device_state_is_counted() {
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
    fn a_lane_lost_after_the_last_page_loses_nothing() {
        assert_eq!(Phase::Completing.step(Input::Lost), Ok(Phase::Completed(None)));
        let totals = Totals { pages_demand: 1, ..Totals::default() };
        let goodbye = Event::Complete(totals);
        let completed = Phase::Completed(Some(totals));
        assert_eq!(Phase::Completing.step(Input::Received(&goodbye)), Ok(completed));
    }
}
