//! The phases of the source, from its hello to its goodbye.
//!
//! ```text
//! Connected --SentRegions--> Comparing --Ready--> Ready --GuestStopped--+-- postcopy --> Saving
//!                                                                      |                  ^
//!                                           CopyingStopped <--- not ---+                  |
//!                                                    +----------- PagesAllSent -----------+
//!
//! Ready --SentRounds--> Rounds --SentRemaining--> Settling --Settled--> Settled --GuestStopped--> as from Ready
//!
//! Saving --SentLoad--> Loading --Loaded--> Loaded --SentSwitchover--> Committed
//!                                                                         |
//!              Completed <--Complete-- Serving <--Running-----------------+
//!
//! Committed, Serving --Broken--> the same, and then Resume and an account of all pages:
//!     Committed --Resume (runs)--> Serving
//!     Serving --Resume (does not run yet)--> Committed
//!
//! any but Completed --Lost, Error, unexpected input--> Failed
//! any before Committed --Broken--> Failed
//! any before Committed --Cancel--> Failed
//! ```
//!
//! In [`Phase::Rounds`] the source sends pages while the guest runs, and sends them again after
//! writes. By [`Input::SentRemaining`] the guest has stopped; the remaining frames name the pages
//! that are still to be sent, each once.
//!
//! Up to [`Phase::Loaded`] every failure leaves the source's guest as it was: it may be resumed.
//! The *commit point* is [`Input::SentSwitchover`]: from there on the source's guest never runs
//! again, because the destination's may. So this input is stepped before the frame's first byte is
//! handed to the kernel: a frame whose sending failed may have arrived.

use crate::error::PhaseError;
use crate::frame::Standing;
use crate::frame::Totals;
use crate::limits::STATE_BYTES_MAX;
use crate::receive::Event;

/// The source's phase.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Phase {
    /// The demand lane is open; the table of regions has not been sent.
    Connected,
    /// The destination compares the regions and prepares its guest.
    Comparing,
    /// Both guests are ready; the source's runs.
    Ready,
    /// The source's guest runs, and its pages are sent, again after each write.
    Rounds,
    /// The source's guest has stopped, and the destination takes note of the pages that are still
    /// to come.
    Settling,
    /// The remaining pages are settled: each page is sent once from here on.
    Settled,
    /// The source's guest has stopped, and every page is sent before the device state.
    CopyingStopped,
    /// The source's guest has stopped, and its device state is sent.
    Saving {
        /// Bytes of device state sent.
        state_bytes: u64,
    },
    /// The destination's guest loads the device state.
    Loading {
        /// Total bytes of device state.
        state_bytes: u64,
    },
    /// The destination's guest has loaded the device state: only the switchover is left.
    Loaded {
        /// Total bytes of device state.
        state_bytes: u64,
    },
    /// The switchover is in flight; the source's guest never runs again.
    Committed,
    /// The destination's guest runs, and its pages are sent.
    Serving,
    /// Every page is cached at the destination.
    Completed(Totals),
    /// The migration failed.
    Failed {
        /// Whether the source's guest may be resumed.
        may_run: bool,
    },
}

/// An input of the phase machine: an action of this end, an event of the demand lane, or a failure.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Input<'a> {
    /// The table of regions is about to be sent.
    SentRegions,
    /// A rounds frame is about to be sent.
    SentRounds,
    /// The guest has stopped after rounds, every bulk lane has sent its rounds end, and the
    /// remaining frames are about to be sent.
    SentRemaining,
    /// The guest has stopped, and a stopped frame is about to be sent.
    GuestStopped {
        /// Whether pages are sent after the switchover; if not, all are sent now.
        postcopy: bool,
        /// Whether pages are sent without a request.
        background: bool,
    },
    /// A piece of device state is about to be sent.
    SentState {
        /// Its length.
        bytes: u64,
    },
    /// The load frame is about to be sent; [`Phase::Saving`] has its byte count.
    SentLoad,
    /// The switchover frame is about to be sent: the commit point.
    SentSwitchover,
    /// Every page has been sent once.
    PagesAllSent,
    /// An event of the demand lane. Events of bulk lanes are no inputs: they are not ordered
    /// against the demand lane's.
    Received(&'a Event),
    /// A lane is lost, and the session cannot recover.
    Lost,
    /// A lane is lost, in a session that recovers ([`Capabilities::RECOVERY`]). Without effect from
    /// the commit point on: new lanes will come. Before it the guest continues at once.
    ///
    /// [`Capabilities::RECOVERY`]: crate::Capabilities::RECOVERY
    Broken,
    /// A request to stop. Without effect from the commit point on.
    Cancel,
}

impl Phase {
    /// The demand lane has just opened.
    #[expect(clippy::new_without_default, reason = "a phase is no default of anything")]
    pub fn new() -> Phase {
        Phase::Connected
    }

    /// Takes one step. An error comes with the new phase, which is then, and only then,
    /// [`Phase::Failed`].
    pub fn step(self, input: Input<'_>) -> Result<Phase, (Phase, PhaseError)> {
        let (name, may_run) = (self.name(), self.may_run());
        self.advance(input).map_err(|stop| {
            let error = stop.unwrap_or(PhaseError::Unexpected { phase: name, input: input.name() });
            (Phase::Failed { may_run }, error)
        })
    }

    /// Whether the source's guest may run, or be resumed after a failure.
    pub fn may_run(&self) -> bool {
        match self {
            Phase::Connected
            | Phase::Comparing
            | Phase::Ready
            | Phase::Rounds
            | Phase::Settling
            | Phase::Settled
            | Phase::CopyingStopped
            | Phase::Saving { .. }
            | Phase::Loading { .. }
            | Phase::Loaded { .. } => true,
            Phase::Committed | Phase::Serving | Phase::Completed(_) => false,
            Phase::Failed { may_run } => *may_run,
        }
    }

    /// Whether pages may be sent, each once: the guest has stopped, and the migration continues.
    pub fn may_send_pages(&self) -> bool {
        self.has_stopped() && !matches!(self, Phase::Completed(_))
    }

    /// The phase's name in messages, after "while".
    pub fn name(&self) -> &'static str {
        match self {
            Phase::Connected => "connected",
            Phase::Comparing => "comparing regions",
            Phase::Ready => "ready",
            Phase::Rounds => "sending pages while the guest runs",
            Phase::Settling => "settling which pages are still to come",
            Phase::Settled => "about to send the rest",
            Phase::CopyingStopped => "sending pages before the switchover",
            Phase::Saving { .. } => "sending device state",
            Phase::Loading { .. } => "the destination loads device state",
            Phase::Loaded { .. } => "about to switch over",
            Phase::Committed => "switching over",
            Phase::Serving => "serving pages",
            Phase::Completed(_) => "completed",
            Phase::Failed { .. } => "failed",
        }
    }

    /// The step itself: `Err(None)` is an input that cannot happen in this phase.
    fn advance(self, input: Input<'_>) -> Result<Phase, Option<PhaseError>> {
        match (self, input) {
            (Phase::Failed { .. }, _) => Err(None),
            (Phase::Completed(totals), input) => after_completion(totals, input),
            (phase, Input::Lost) => Err(Some(PhaseError::Lost { phase: phase.name() })),
            (phase, Input::Broken) if phase.may_run() => {
                Err(Some(PhaseError::Lost { phase: phase.name() }))
            }
            (phase, Input::Broken) => Ok(phase),
            (phase, Input::Cancel) if phase.may_run() => {
                Err(Some(PhaseError::Cancelled { phase: phase.name() }))
            }
            (phase, Input::Cancel) => Ok(phase),
            (phase, Input::Received(event)) => phase.receive(event),

            (Phase::Connected, Input::SentRegions) => Ok(Phase::Comparing),
            (Phase::Ready, Input::SentRounds) => Ok(Phase::Rounds),
            (Phase::Rounds, Input::SentRemaining) => Ok(Phase::Settling),
            (Phase::Ready | Phase::Settled, Input::GuestStopped { postcopy: true, .. }) => {
                Ok(Phase::Saving { state_bytes: 0 })
            }
            (Phase::Ready | Phase::Settled, Input::GuestStopped { postcopy: false, .. }) => {
                Ok(Phase::CopyingStopped)
            }
            (Phase::CopyingStopped, Input::PagesAllSent) => Ok(Phase::Saving { state_bytes: 0 }),
            (Phase::Saving { state_bytes }, Input::SentState { bytes }) => {
                match state_bytes.saturating_add(bytes) {
                    state_bytes if state_bytes <= STATE_BYTES_MAX => {
                        Ok(Phase::Saving { state_bytes })
                    }
                    too_long => Err(Some(PhaseError::StateTooLong(too_long))),
                }
            }
            (Phase::Saving { state_bytes }, Input::SentLoad) => Ok(Phase::Loading { state_bytes }),
            (Phase::Loaded { .. }, Input::SentSwitchover) => Ok(Phase::Committed),
            (phase, Input::PagesAllSent) if phase.has_stopped() => Ok(phase),
            _ => Err(None),
        }
    }

    fn receive(self, event: &Event) -> Result<Phase, Option<PhaseError>> {
        match (self, event) {
            (phase, Event::Ping(_) | Event::Pong(_)) => Ok(phase),
            (phase, Event::Error(fault)) => {
                Err(Some(PhaseError::Peer { phase: phase.name(), fault: fault.clone() }))
            }
            (phase, Event::Request(_) | Event::Ack(_)) if phase.has_stopped() => Ok(phase),
            (Phase::Comparing, Event::Ready(_)) => Ok(Phase::Ready),
            (Phase::Settling, Event::Settled) => Ok(Phase::Settled),
            (Phase::Loading { state_bytes }, Event::Loaded) => Ok(Phase::Loaded { state_bytes }),
            (Phase::Committed, Event::Running { .. }) => Ok(Phase::Serving),
            (Phase::Serving, Event::Digests(_)) => Ok(Phase::Serving),
            (Phase::Serving, Event::Complete(totals)) => Ok(Phase::Completed(*totals)),
            // A killed destination knows only what it had recorded, which may be less than it had
            // sent.
            (Phase::Committed | Phase::Serving, Event::Resume(Standing { running: None, .. })) => {
                Ok(Phase::Committed)
            }
            (
                Phase::Committed | Phase::Serving,
                Event::Resume(Standing { running: Some(_), .. }),
            ) => Ok(Phase::Serving),
            (
                phase @ (Phase::Committed | Phase::Serving),
                Event::Have { .. } | Event::Accounted,
            ) => Ok(phase),
            _ => Err(None),
        }
    }

    /// Whether the guest has stopped, the destination has been told so, and nothing has failed.
    fn has_stopped(&self) -> bool {
        match self {
            Phase::Connected
            | Phase::Comparing
            | Phase::Ready
            | Phase::Rounds
            | Phase::Settling
            | Phase::Settled
            | Phase::Failed { .. } => false,
            Phase::CopyingStopped
            | Phase::Saving { .. }
            | Phase::Loading { .. }
            | Phase::Loaded { .. }
            | Phase::Committed
            | Phase::Serving
            | Phase::Completed(_) => true,
        }
    }
}

/// After completion no failure has an effect; acknowledgements may come late, and lanes close in
/// the normal course.
fn after_completion(totals: Totals, input: Input<'_>) -> Result<Phase, Option<PhaseError>> {
    match input {
        Input::Lost | Input::Broken | Input::Cancel | Input::PagesAllSent => {
            Ok(Phase::Completed(totals))
        }
        Input::Received(Event::Ack(_) | Event::Ping(_) | Event::Pong(_) | Event::Error(_)) => {
            Ok(Phase::Completed(totals))
        }
        _ => Err(None),
    }
}

impl Input<'_> {
    /// The input's name in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Input::SentRegions => "sending regions",
            Input::SentRounds => "sending rounds",
            Input::SentRemaining => "sending what remains",
            Input::GuestStopped { .. } => "stopping the guest",
            Input::SentState { .. } => "sending device state",
            Input::SentLoad => "sending load",
            Input::SentSwitchover => "sending switchover",
            Input::PagesAllSent => "the last page",
            Input::Received(event) => event.name(),
            Input::Lost => "a lost lane",
            Input::Broken => "a broken lane",
            Input::Cancel => "cancelling",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::{Fault, FaultCode};

    const STOP: Input<'_> = Input::GuestStopped { postcopy: true, background: true };
    const STOP_PRECOPY: Input<'_> = Input::GuestStopped { postcopy: false, background: true };

    /// Every phase, in order, each with the names of the inputs and events that it accepts besides
    /// pings.
    fn phases() -> [(Phase, &'static [&'static str]); 14] {
        let totals = Totals { data_bytes: 7, ..Totals::default() };
        [
            (Phase::Connected, &["sending regions"]),
            (Phase::Comparing, &["ready"]),
            (Phase::Ready, &["stopping the guest", "sending rounds"]),
            (Phase::Rounds, &["sending what remains"]),
            (Phase::Settling, &["settled"]),
            (Phase::Settled, &["stopping the guest"]),
            (Phase::CopyingStopped, &["the last page", "request", "ack"]),
            (
                Phase::Saving { state_bytes: 5 },
                &["sending device state", "sending load", "the last page", "request", "ack"],
            ),
            (Phase::Loading { state_bytes: 5 }, &["the last page", "request", "ack", "loaded"]),
            (
                Phase::Loaded { state_bytes: 5 },
                &["sending switchover", "the last page", "request", "ack"],
            ),
            (
                Phase::Committed,
                &[
                    "the last page",
                    "cancelling",
                    "a broken lane",
                    "request",
                    "ack",
                    "running",
                    "resume",
                    "have",
                    "the end of an account",
                ],
            ),
            (
                Phase::Serving,
                &[
                    "the last page",
                    "cancelling",
                    "a broken lane",
                    "request",
                    "ack",
                    "digests",
                    "complete",
                    "resume",
                    "have",
                    "the end of an account",
                ],
            ),
            (
                Phase::Completed(totals),
                &["the last page", "a lost lane", "a broken lane", "cancelling", "ack", "error"],
            ),
            (Phase::Failed { may_run: true }, &[]),
        ]
    }

    fn all(events: &[Event]) -> Vec<Input<'_>> {
        let mut inputs = vec![
            Input::SentRegions,
            Input::SentRounds,
            Input::SentRemaining,
            STOP,
            Input::SentState { bytes: 1 },
            Input::SentLoad,
            Input::SentSwitchover,
            Input::PagesAllSent,
            Input::Lost,
            Input::Broken,
            Input::Cancel,
        ];
        inputs.extend(events.iter().map(Input::Received));
        inputs
    }

    #[test]
    fn each_phase_accepts_exactly_its_inputs() {
        let events = crate::receive::one_of_each();
        for (phase, accepted) in phases() {
            for input in all(&events) {
                let pinged = matches!(input, Input::Received(Event::Ping(_) | Event::Pong(_)));
                let failed = matches!(phase, Phase::Failed { .. });
                let may_run = phase.may_run();
                let expected = accepted.contains(&input.name()) || pinged && !failed;
                match phase.clone().step(input) {
                    Ok(next) => {
                        assert!(expected, "{} accepted {}", phase.name(), input.name());
                        assert!(!matches!(next, Phase::Failed { .. }));
                        let commits = input == Input::SentSwitchover;
                        assert_eq!(next.may_run(), may_run && !commits, "{next:?}");
                    }
                    Err((next, error)) => {
                        assert!(!expected, "{error}");
                        assert_eq!(next, Phase::Failed { may_run });
                        assert!(error.to_string().contains(phase.name()), "{error}");
                    }
                }
            }
        }
    }

    #[test]
    fn postcopy_saves_at_once_and_stop_and_copy_sends_pages_first() {
        let next = |phase: Phase, input| phase.step(input).unwrap();
        let saving = Phase::Saving { state_bytes: 0 };
        assert_eq!(next(Phase::Ready, STOP), saving);
        assert_eq!(next(Phase::Ready, STOP_PRECOPY), Phase::CopyingStopped);
        assert_eq!(next(Phase::CopyingStopped, Input::PagesAllSent), saving);
        let more = next(saving, Input::SentState { bytes: 9 });
        assert_eq!(next(more, Input::SentLoad), Phase::Loading { state_bytes: 9 });
    }

    #[test]
    fn rounds_end_with_remaining_and_settled() {
        let next = |phase: Phase, input| phase.step(input).unwrap();
        let settling = next(next(Phase::Ready, Input::SentRounds), Input::SentRemaining);
        let settled = next(settling, Input::Received(&Event::Settled));
        assert_eq!(next(settled.clone(), STOP), Phase::Saving { state_bytes: 0 });
        assert_eq!(next(settled, STOP_PRECOPY), Phase::CopyingStopped);
        assert!(Phase::Rounds.step(STOP).is_err(), "the destination has not settled the rounds");
    }

    #[test]
    fn pages_are_sent_only_while_the_guest_is_stopped() {
        let sending = phases().map(|(phase, _)| phase.may_send_pages());
        let expected = [
            false, false, false, false, false, false, true, true, true, true, true, true, false,
            false,
        ];
        assert_eq!(sending, expected);
    }

    #[test]
    fn resume_moves_the_source_to_the_phase_of_the_destination() {
        let resume = |switched, running| {
            Event::Resume(Standing { switched, running, totals: Totals::default() })
        };
        let next = |phase: Phase, event: &Event| phase.step(Input::Received(event));
        assert_eq!(next(Phase::Committed, &resume(false, None)), Ok(Phase::Committed));
        assert_eq!(next(Phase::Committed, &resume(true, None)), Ok(Phase::Committed));
        assert_eq!(next(Phase::Committed, &resume(true, Some(1))), Ok(Phase::Serving));
        assert_eq!(next(Phase::Serving, &resume(true, Some(1))), Ok(Phase::Serving));
        // The destination had sent *running*, and was killed before it could record that.
        assert_eq!(next(Phase::Serving, &resume(true, None)), Ok(Phase::Committed));
        assert_eq!(next(Phase::Serving, &resume(false, None)), Ok(Phase::Committed));
    }

    #[test]
    fn device_state_over_its_limit_fails() {
        let full = Phase::Saving { state_bytes: STATE_BYTES_MAX };
        let (phase, error) = full.step(Input::SentState { bytes: 1 }).unwrap_err();
        assert_eq!(phase, Phase::Failed { may_run: true });
        assert_eq!(error, PhaseError::StateTooLong(STATE_BYTES_MAX + 1));
    }

    #[test]
    fn failure_text_names_its_cause() {
        let fault = Fault::new(FaultCode::OutOfMemory, "no room");
        let event = Event::Error(fault.clone());
        let (_, error) = Phase::Ready.step(Input::Received(&event)).unwrap_err();
        assert_eq!(error, PhaseError::Peer { phase: "ready", fault });
        let (_, error) = Phase::Ready.step(Input::Lost).unwrap_err();
        assert_eq!(error, PhaseError::Lost { phase: "ready" });
        let (_, error) = Phase::Ready.step(Input::Cancel).unwrap_err();
        assert_eq!(error, PhaseError::Cancelled { phase: "ready" });
        let (_, error) = Phase::Ready.step(Input::SentSwitchover).unwrap_err();
        let unexpected = PhaseError::Unexpected { phase: "ready", input: "sending switchover" };
        assert_eq!(error, unexpected);
    }
}
