//! Each side's phases under any sequence of inputs: the documented invariants hold at every step.

use arbitrary::{Arbitrary, Unstructured};
use umem_wire::limits::STATE_BYTES_MAX;
use umem_wire::{Event, destination, source};

use crate::words::Word;

/// An event of a source.
#[derive(Arbitrary, Clone, Debug)]
pub(crate) enum AtSource {
    SentRegions,
    GuestStopped { postcopy: bool, background: bool },
    SentState { bytes: u32 },
    SentLoad,
    SentSwitchover,
    PagesAllSent,
    Received(Word),
    Lost,
    Cancel,
    Broken,
}

/// An event of a destination.
#[derive(Arbitrary, Clone, Debug)]
pub(crate) enum AtDestination {
    Received(Word),
    GuestReady,
    StateLoaded,
    GuestRunning,
    AllCached,
    Lost,
    Cancel,
    Broken,
}

/// Byte 0 selects the side.
pub(crate) fn run(input: &[u8]) {
    let &[which, ref rest @ ..] = input else { return };
    let mut rest = Unstructured::new(rest);
    if which & 1 == 0 {
        let mut phase = source::Phase::new();
        while let (false, Ok(what)) = (rest.is_empty(), AtSource::arbitrary(&mut rest)) {
            let event = what.event();
            phase = step_source(phase, what.input(event.as_ref()));
        }
    } else {
        let mut phase = destination::Phase::new();
        while let (false, Ok(what)) = (rest.is_empty(), AtDestination::arbitrary(&mut rest)) {
            let event = what.event();
            phase = step_destination(phase, what.input(event.as_ref()));
        }
    }
}

impl AtSource {
    pub(crate) fn event(&self) -> Option<Event> {
        if let AtSource::Received(word) = self { Some(word.event()) } else { None }
    }

    /// `event` is this one's.
    pub(crate) fn input<'a>(&self, event: Option<&'a Event>) -> source::Input<'a> {
        match *self {
            AtSource::SentRegions => source::Input::SentRegions,
            AtSource::GuestStopped { postcopy, background } => {
                source::Input::GuestStopped { postcopy, background }
            }
            AtSource::SentState { bytes } => source::Input::SentState { bytes: bytes.into() },
            AtSource::SentLoad => source::Input::SentLoad,
            AtSource::SentSwitchover => source::Input::SentSwitchover,
            AtSource::PagesAllSent => source::Input::PagesAllSent,
            AtSource::Received(_) => {
                source::Input::Received(event.expect("the state machine received this event"))
            }
            AtSource::Lost => source::Input::Lost,
            AtSource::Cancel => source::Input::Cancel,
            AtSource::Broken => source::Input::Broken,
        }
    }
}

impl AtDestination {
    pub(crate) fn event(&self) -> Option<Event> {
        if let AtDestination::Received(word) = self { Some(word.event()) } else { None }
    }

    /// `event` is this one's.
    pub(crate) fn input<'a>(&self, event: Option<&'a Event>) -> destination::Input<'a> {
        match self {
            AtDestination::Received(_) => {
                destination::Input::Received(event.expect("the state machine received this event"))
            }
            AtDestination::GuestReady => destination::Input::GuestReady,
            AtDestination::StateLoaded => destination::Input::StateLoaded,
            AtDestination::GuestRunning => destination::Input::GuestRunning,
            AtDestination::AllCached => destination::Input::AllCached,
            AtDestination::Lost => destination::Input::Lost,
            AtDestination::Cancel => destination::Input::Cancel,
            AtDestination::Broken => destination::Input::Broken,
        }
    }
}

/// A step of the source, and the invariants of any step.
pub(crate) fn step_source(before: source::Phase, input: source::Input<'_>) -> source::Phase {
    use source::{Input, Phase};
    let result = before.clone().step(input);
    let failed = result.is_err();
    let after = match result {
        Ok(phase) => phase,
        Err((phase, error)) => {
            assert!(!error.to_string().is_empty());
            phase
        }
    };
    assert_eq!(failed, matches!(after, Phase::Failed { .. }), "{before:?} {input:?} {after:?}");
    if failed {
        assert_eq!(after, Phase::Failed { may_run: before.may_run() }, "a failure changes nothing");
    } else {
        // The commit point is the only one, and there is no way back.
        let commits = input == Input::SentSwitchover;
        assert_eq!(after.may_run(), before.may_run() && !commits, "{before:?} {input:?}");
        let stops = matches!(input, Input::GuestStopped { .. });
        if after.may_send_pages() {
            assert!(before.may_send_pages() || stops, "{before:?} {input:?} {after:?}");
        }
    }
    if matches!(input, Input::Cancel)
        && !before.may_run()
        && !matches!(before, Phase::Failed { .. })
    {
        assert_eq!(after, before, "a late cancel changes nothing");
    }
    if matches!(input, Input::Broken) {
        assert!(failed != (!before.may_run() && !matches!(before, Phase::Failed { .. })));
        assert!(failed || after == before, "lost lanes change nothing after the end");
    }
    if let Phase::Saving { state_bytes } | Phase::Loading { state_bytes } = after {
        assert!(state_bytes <= STATE_BYTES_MAX);
    }
    after
}

/// A step of the destination, and the invariants of any step.
pub(crate) fn step_destination(
    before: destination::Phase,
    input: destination::Input<'_>,
) -> destination::Phase {
    use destination::{Input, Phase};
    let result = before.clone().step(input);
    let failed = result.is_err();
    let after = match result {
        Ok(phase) => phase,
        Err((phase, error)) => {
            assert!(!error.to_string().is_empty());
            phase
        }
    };
    assert_eq!(failed, matches!(after, Phase::Failed { .. }), "{before:?} {input:?} {after:?}");
    if failed {
        let may_have_run = before.may_run();
        assert_eq!(after, Phase::Failed { may_have_run }, "a failure changes nothing");
    } else {
        let is_given = matches!(input, Input::Received(Event::Switchover { .. }));
        assert_eq!(after.may_run(), before.may_run() || is_given, "{before:?} {input:?}");
        let begins = matches!(input, Input::Received(Event::Stopped { .. }));
        if after.may_request_pages() {
            assert!(before.may_request_pages() || begins, "{before:?} {input:?} {after:?}");
        }
    }
    if matches!(input, Input::Cancel) && before.may_run() && !matches!(before, Phase::Failed { .. })
    {
        assert_eq!(after, before, "a late cancel changes nothing");
    }
    if matches!(input, Input::Broken) {
        assert!(failed || after == before, "lost lanes change nothing after the end");
        assert_eq!(failed, !before.outlives_its_lanes() && !matches!(before, Phase::Completed(_)));
    }
    if let Phase::Receiving { state_bytes, .. } | Phase::Loading { state_bytes, .. } = after {
        assert!(state_bytes <= STATE_BYTES_MAX);
    }
    after
}
