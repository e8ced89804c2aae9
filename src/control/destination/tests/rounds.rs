//! Pages that come before the stop, and come again.

use super::*;

fn in_rounds() -> Bench {
    at("Ready", terms()).feed_all([Input::Received(Heard::Rounds)])
}

fn remaining() -> Input {
    Input::Received(Heard::Remaining { runs: Vec::new(), last: true })
}

fn stopped() -> Input {
    Input::Received(Heard::Stopped { postcopy: true, background: true })
}

/// The demand lane and the bulk lanes are not ordered against each other.
#[test]
fn pages_are_settled_once_what_remains_is_named_and_every_copy_has_landed() {
    for is_named_first in [true, false] {
        let mut inputs = [Input::RoundsEnded, remaining()];
        if is_named_first {
            inputs.reverse();
        }
        let [first, second] = inputs;
        let mut bench = in_rounds();
        assert!(!bench.says(first).contains("SettlePages"));
        assert!(bench.says(second).ends_with("SettlePages"));
        let settled = "Entered(\"waiting for the rest\"), Send(settled)";
        assert_eq!(bench.says(Input::PagesSettled), settled);
        assert!(bench.says(stopped()).contains("Report(stopped)"));
        assert!(bench.says(Input::PagesSettled).is_empty(), "nobody waits for that");
    }
}

#[test]
fn nothing_follows_before_that() {
    for inputs in [vec![], vec![remaining()], vec![Input::RoundsEnded]] {
        let mut bench = in_rounds().feed_all(inputs);
        let says = bench.says(stopped());
        assert!(says.starts_with("SeekCause(protocol: "), "{says}");
    }
    let says = in_rounds().feed_all([remaining()]).says(remaining());
    assert!(says.starts_with("SeekCause(protocol: "), "what remains is named once: {says}");
}

#[test]
fn the_guest_stays_at_the_source_whatever_happens() {
    for input in [failed(), lost(LaneRole::Bulk), lost(LaneRole::Demand), Input::Interrupt] {
        let says = in_rounds().says(input);
        assert!(says.starts_with("SeekCause("), "{says}");
    }
}

/// A source that is silent for too long has no guest here.
#[test]
fn rounds_in_which_nothing_moves_have_an_end() {
    let mut bench = in_rounds();
    bench.says(Input::Tick);
    bench.wait(STEP_TIMEOUT);
    let says = bench.says(Input::Tick);
    assert!(says.contains("receiving pages while the guest runs"), "{says}");
}
