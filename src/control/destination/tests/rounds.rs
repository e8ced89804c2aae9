//! Pages that are sent before the stop and again after it.

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
fn pages_settle_after_the_remaining_list_and_the_last_copy_in_any_order() {
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
        assert!(bench.says(Input::PagesSettled).is_empty(), "no thread waits for that");
    }
}

#[test]
fn frames_before_the_pages_settle_are_protocol_errors() {
    for inputs in [vec![], vec![remaining()], vec![Input::RoundsEnded]] {
        let mut bench = in_rounds().feed_all(inputs);
        let says = bench.says(stopped());
        assert!(says.starts_with("SeekCause(protocol: "), "{says}");
    }
    let says = in_rounds().feed_all([remaining()]).says(remaining());
    assert!(says.starts_with("SeekCause(protocol: "), "what remains is named once: {says}");
}

#[test]
fn failure_in_rounds_leaves_the_guest_at_the_source() {
    for input in [failed(), lost(LaneRole::Bulk), lost(LaneRole::Demand), Input::Interrupt] {
        let says = in_rounds().says(input);
        assert!(says.starts_with("SeekCause("), "{says}");
    }
}

/// A source that is silent for too long has no guest here.
#[test]
fn rounds_without_progress_end_after_the_step_timeout() {
    let mut bench = in_rounds();
    bench.says(Input::Tick);
    bench.wait(STEP_TIMEOUT);
    let says = bench.says(Input::Tick);
    assert!(says.contains("receiving pages while the guest runs"), "{says}");
}
