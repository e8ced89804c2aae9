//! The bottleneck of a test, in a sentence.

use super::protocol::{Measured, Test};

/// A thread that runs for at least this share of its time is the bottleneck.
const BUSY: f64 = 0.9;

/// A receiver that spends at least this share of its time on placing pages is limited by page allocation.
const PLACING: f64 = 0.5;

/// The bottleneck of a test.
#[derive(Debug)]
pub(super) struct Verdict {
    /// For programs: `page_allocation`, `receiver_cpu`, `sender_cpu`, `other_load`
    /// or `link`.
    pub(super) limit: &'static str,
    /// For users.
    pub(super) text: String,
}

impl Verdict {
    /// Of one direction.
    pub(super) fn of(test: &Test, sent: &Measured, received: &Measured) -> Verdict {
        let gib = received.counts.bytes as f64 / f64::from(1 << 30);
        let placing = received.placing_s_per_gib.unwrap_or(0.0) * gib;
        // All lanes' threads place pages; the busiest one is measured.
        let working = received.busy * received.seconds * f64::from(test.lanes);
        let share = if working > 0.0 { (placing / working).min(1.0) } else { 0.0 };
        let (sender, receiver) = (sent.busy * 100.0, received.busy * 100.0);
        let busy =
            format!("the sender's busiest thread {sender:.0} %, the receiver's {receiver:.0} %");
        let (limit, text) = if received.busy >= BUSY && received.busy >= sent.busy {
            if share >= PLACING {
                let share = share * 100.0;
                (
                    "page_allocation",
                    format!(
                        "limited by page allocation at the receiver, about {share:.0} % of its time \
                     ({busy}): huge pages or more lanes help"
                    ),
                )
            } else {
                ("receiver_cpu", format!("limited by the receiver's CPU ({busy})"))
            }
        } else if sent.busy >= BUSY {
            ("sender_cpu", format!("limited by the sender's CPU ({busy})"))
        } else if let Some((end, share)) = crowded(sent, received) {
            let share = share * 100.0;
            (
                "other_load",
                format!(
                    "limited by other load at the {end}, where a runnable thread waited for a core {share:.0} % of the time ({busy})"
                ),
            )
        } else if sent.pressed.is_some() && received.pressed.is_some() {
            ("link", format!("limited by the link ({busy})"))
        } else {
            ("link", format!("limited by the link, or by other load here ({busy})"))
        };
        Verdict { limit, text }
    }
}

/// The end whose thread would be busy if it had a core to itself, and the share of time without one.
fn crowded(sent: &Measured, received: &Measured) -> Option<(&'static str, f64)> {
    let share = |side: &Measured| side.pressed.filter(|&pressed| pressed >= BUSY);
    let of = |name, side: &Measured| share(side).map(|pressed| (name, pressed - side.busy));
    let ends = [of("receiver", received), of("sender", sent)];
    ends.into_iter().flatten().max_by(|one, other| one.1.total_cmp(&other.1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::programs::bench::protocol::Counts;
    use crate::programs::bench::protocol::tests::test;

    #[test]
    fn verdict_names_the_bottleneck() {
        let test = test();
        let side = |busy, placing_s_per_gib| Measured {
            seconds: 1.0,
            counts: Counts { bytes: 1 << 30, ..Counts::default() },
            busy,
            placing_s_per_gib,
            ..Measured::default()
        };
        for (sent, received, placing, limit) in [
            (0.5, 0.99, Some(0.6), "page_allocation"),
            (0.5, 0.99, Some(0.3), "receiver_cpu"),
            (0.5, 0.99, None, "receiver_cpu"),
            (0.97, 0.95, Some(0.6), "sender_cpu"),
            (0.97, 0.2, None, "sender_cpu"),
            (0.3, 0.4, Some(0.6), "link"),
            (0.0, 0.0, Some(0.6), "link"),
        ] {
            let verdict = Verdict::of(&test, &side(sent, None), &side(received, placing));
            assert_eq!(verdict.limit, limit, "{verdict:?}");
        }
        let pressed = |busy, pressed| Measured { pressed: Some(pressed), ..side(busy, None) };
        for (sent, received, limit, part) in [
            (pressed(0.5, 0.95), pressed(0.3, 0.99), "other_load", "at the receiver"),
            (pressed(0.5, 0.95), pressed(0.3, 0.5), "other_load", "at the sender"),
            (pressed(0.95, 0.97), pressed(0.3, 0.99), "sender_cpu", "sender's CPU"),
            (pressed(0.5, 0.6), pressed(0.3, 0.5), "link", "limited by the link (the"),
            (pressed(0.5, 0.6), side(0.3, None), "link", "or by other load"),
        ] {
            let verdict = Verdict::of(&test, &sent, &received);
            assert_eq!(verdict.limit, limit, "{verdict:?}");
            assert!(verdict.text.contains(part), "{verdict:?}");
        }
    }
}
