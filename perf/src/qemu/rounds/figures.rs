//! What the moves come to: tables, ratios of the same round, and the targets.

use serde_json::{Value, json};

use crate::machine::Machine;
use crate::report::{Report, Table, cell};
use crate::statistics::{Spread, finite};
use crate::svg::{Bar, Plot};

use super::super::mover::{Mover, Qemu, Umem};
use super::super::moving::{DOWNTIME_LIMIT_MS, Move};
use super::super::quantity::{
    CPU, CPU_WITHOUT_VCPUS, DOWNTIME, FAULTS, LINK, LINK_SHARE, LOST, LOST_IN_ALL, MAX, P99,
    Quantity, SENT, TOTAL, spreads, table,
};
use super::words::{LoadName, Road, ram_word};
use super::{BEATS_MIN, Course, Options, Turns};

const QUANTITIES: [Quantity; 12] = [
    TOTAL,
    DOWNTIME,
    LOST,
    LOST_IN_ALL,
    FAULTS,
    P99,
    MAX,
    SENT,
    LINK,
    LINK_SHARE,
    CPU,
    CPU_WITHOUT_VCPUS,
];

const MULTIFD: Mover = Mover::Qemu(Qemu::Multifd);
const QEMU_HYBRID: Mover = Mover::Qemu(Qemu::Hybrid);
const POSTCOPY: Mover = Mover::Umem(Umem::Postcopy);
const PRECOPY: Mover = Mover::Umem(Umem::Precopy);
const HYBRID: Mover = Mover::Umem(Umem::Hybrid);

/// What other movers are compared with.
const BASES: [Mover; 2] = [HYBRID, PRECOPY];

/// Of what `umem -p` alone takes, umem's hybrid takes at most this much, with a hot guest.
const FAULTS_OF_POSTCOPY: f64 = 0.10;
const LOST_OF_POSTCOPY: f64 = 1.0 / 2.0;
const DOWNTIME_OVER_POSTCOPY_MS: f64 = 20.0;

/// Of what QEMU's postcopy after a pass takes.
const LOST_OF_QEMU_HYBRID: f64 = 1.0 / 3.0;

/// Precopy of an idle guest through the link: the share of the link's rate, at least, and of multifd's time, at most.
const LINK_SHARE_MIN: f64 = 0.90;
const TOTAL_OF_MULTIFD: f64 = 0.8;

pub(super) fn report(options: &Options, machine: Machine, courses: &[Course]) -> Report {
    let version = courses.iter().flat_map(|course| &course.turns).find_map(Turns::version);
    let version = version.unwrap_or_else(|| "?".into());
    let names = |words: Vec<&'static str>| words;
    Report {
        what: "rounds",
        machine,
        method: method(options, &version),
        highlights: courses.iter().flat_map(highlights).collect(),
        tables: courses.iter().flat_map(|course| [figures(course), ratios(course)]).collect(),
        plots: courses.iter().map(plot).collect(),
        value: json!({
            "size_mib": options.size,
            "fill_mib": options.fill,
            "hot_mib": options.hot,
            "ram": ram_word(options.ram),
            "rounds": options.rounds,
            "limit_s": options.limit,
            "rate_gbps": options.rate,
            "loads": names(options.loads.0.iter().map(|load| load.word()).collect()),
            "links": names(options.links.0.iter().map(|road| road.word()).collect()),
            "qemu_version": version,
            "courses": courses.iter().map(value).collect::<Vec<Value>>(),
        }),
    }
}

impl Turns {
    /// The moves that came to an end.
    fn ended(&self) -> Vec<Move> {
        self.moves.iter().flatten().cloned().collect()
    }

    fn version(&self) -> Option<String> {
        self.moves.iter().flatten().next().map(|moved| moved.qemu_version.clone())
    }
}

impl Course {
    fn of(&self, mover: Mover) -> Option<&Turns> {
        self.turns.iter().find(|turns| turns.mover == mover)
    }

    /// A figure of both movers in each round in which both came to an end.
    fn both(&self, one: Mover, other: Mover, get: fn(&Move) -> f64) -> Vec<(f64, f64)> {
        let (Some(one), Some(other)) = (self.of(one), self.of(other)) else { return Vec::new() };
        let rounds = one.moves.iter().zip(&other.moves);
        let pair = |(one, other): (&Option<Move>, &Option<Move>)| {
            Some((get(one.as_ref()?), get(other.as_ref()?)))
        };
        rounds.filter_map(pair).collect()
    }

    /// One mover's figure over the other's of the same round: the median of the rounds'. A guest that did more than
    /// usual has lost no work that could be compared with.
    fn ratio(&self, one: Mover, other: Mover, quantity: &Quantity) -> f64 {
        let pairs = self.both(one, other, quantity.get);
        let pairs = pairs.iter().filter(|(_, other)| *other > 0.0);
        Spread::of(pairs.map(|(one, other)| one / other).collect()).median
    }

    /// The same for their difference.
    fn difference(&self, one: Mover, other: Mover, quantity: &Quantity) -> f64 {
        let pairs = self.both(one, other, quantity.get);
        Spread::of(pairs.iter().map(|(one, other)| one - other).collect()).median
    }

    fn median(&self, mover: Mover, quantity: &Quantity) -> f64 {
        self.of(mover).map_or(f64::NAN, |turns| quantity.spread(&turns.ended()).median)
    }
}

/// What is aimed at.
struct Target {
    what: &'static str,
    value: f64,
    bound: Bound,
}

enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Target {
    /// None for a figure that is not known.
    fn is_met(&self) -> Option<bool> {
        let value = finite(self.value)?;
        Some(match self.bound {
            Bound::AtMost(bound) => value <= bound,
            Bound::AtLeast(bound) => value >= bound,
        })
    }

    fn text(&self) -> String {
        let (word, bound) = match self.bound {
            Bound::AtMost(bound) => ("at most", bound),
            Bound::AtLeast(bound) => ("at least", bound),
        };
        let verdict = match self.is_met() {
            Some(true) => "met",
            Some(false) => "missed",
            None => "not measured",
        };
        format!("{} {} ({word} {}: {verdict})", self.what, cell(self.value, 2), cell(bound, 2))
    }
}

/// The targets that this course measures.
fn targets(course: &Course) -> Vec<(Mover, Vec<Target>)> {
    use Bound::{AtLeast, AtMost};
    let target = |what, value, bound| Target { what, value, bound };
    match (course.load, course.road) {
        (LoadName::Hot, _) if course.of(HYBRID).is_some() => {
            let faults = course.ratio(HYBRID, POSTCOPY, &FAULTS);
            let lost = course.ratio(HYBRID, POSTCOPY, &LOST);
            let lost_of_qemu = course.ratio(HYBRID, QEMU_HYBRID, &LOST);
            let downtime = course.difference(HYBRID, POSTCOPY, &DOWNTIME);
            let targets = vec![
                target("faults over -p alone's", faults, AtMost(FAULTS_OF_POSTCOPY)),
                target("work lost over -p alone's", lost, AtMost(LOST_OF_POSTCOPY)),
                target(
                    "work lost over that of postcopy-preempt after a pass",
                    lost_of_qemu,
                    AtMost(LOST_OF_QEMU_HYBRID),
                ),
                target(
                    "downtime less -p alone's, ms,",
                    downtime,
                    AtMost(DOWNTIME_OVER_POSTCOPY_MS),
                ),
            ];
            vec![(HYBRID, targets)]
        }
        (LoadName::Idle, Road::Link) if course.of(PRECOPY).is_some() => {
            let limit_ms = f64::from(DOWNTIME_LIMIT_MS);
            let share = course.median(PRECOPY, &LINK_SHARE);
            let total = course.ratio(PRECOPY, MULTIFD, &TOTAL);
            let targets = vec![
                target("share of the link's rate", share, AtLeast(LINK_SHARE_MIN)),
                target("total over QEMU multifd's", total, AtMost(TOTAL_OF_MULTIFD)),
                target("downtime, ms,", course.median(PRECOPY, &DOWNTIME), AtMost(limit_ms)),
            ];
            vec![(PRECOPY, targets)]
        }
        _ => Vec::new(),
    }
}

/// The targets first, then each mover in a line.
fn highlights(course: &Course) -> Vec<String> {
    let target = |(mover, targets): (Mover, Vec<Target>)| {
        let targets: Vec<String> = targets.iter().map(Target::text).collect();
        format!("{}: {}: {}", course.name(), mover.name(), targets.join("; "))
    };
    targets(course).into_iter().map(target).collect()
}

fn figures(course: &Course) -> Table {
    let mut table = table(&course.name(), &QUANTITIES);
    for turns in &course.turns {
        let mut cells = vec![turns.mover.name().to_owned()];
        if turns.diverges() {
            cells.push("does not converge".into());
            cells.resize(QUANTITIES.len() + 1, "–".into());
        } else {
            let moves = turns.ended();
            cells.extend(QUANTITIES.iter().map(|quantity| quantity.cell(&moves)));
        }
        table.row(cells);
    }
    table
}

/// Each other mover's figures over those of umem's modes with passes.
fn ratios(course: &Course) -> Table {
    let mut table = table(&format!("{}: over", course.name()), &QUANTITIES);
    for base in BASES {
        let others = course.turns.iter().filter(|turns| turns.mover != base && !turns.diverges());
        for turns in others.filter(|_| course.of(base).is_some()) {
            let mut cells = vec![format!("{} / {}", turns.mover.name(), base.name())];
            let ratio = |quantity: &Quantity| course.ratio(turns.mover, base, quantity);
            cells.extend(QUANTITIES.iter().map(|quantity| cell(ratio(quantity), 2)));
            table.row(cells);
        }
    }
    table
}

/// The main figure: the work that the guest lost, or the time where it does none.
fn plot(course: &Course) -> Plot {
    let (quantity, what, unit) = match course.load {
        LoadName::Idle => (TOTAL, "from giving the command to both sides' end", "s"),
        _ => (LOST, "work lost from the stop on", "s"),
    };
    let bar = |turns: &Turns| {
        let value = finite(quantity.spread(&turns.ended()).median);
        Bar { name: turns.mover.name().into(), value, mark: None }
    };
    let title = format!("A Linux guest ({}): {what}", course.name());
    Plot::bars(&title, unit, course.turns.iter().map(bar).collect())
}

fn value(course: &Course) -> Value {
    let mover = |turns: &Turns| {
        let mut object = spreads(&QUANTITIES, &turns.ended());
        object.insert("mover".into(), json!(turns.mover.key()));
        object.insert("converges".into(), json!(!turns.diverges()));
        object.insert("moves".into(), json!(turns.moves));
        Value::Object(object)
    };
    let mut ratios = serde_json::Map::new();
    for base in BASES.into_iter().filter(|&base| course.of(base).is_some()) {
        for turns in course.turns.iter().filter(|turns| turns.mover != base) {
            let ratio = |quantity: &Quantity| {
                (quantity.name.to_owned(), json!(course.ratio(turns.mover, base, quantity)))
            };
            let object = Value::Object(QUANTITIES.iter().map(ratio).collect());
            ratios.insert(format!("{}_over_{}", turns.mover.key(), base.key()), object);
        }
    }
    let target = |(mover, targets): (Mover, Vec<Target>)| {
        targets.into_iter().map(move |target| {
            json!({
                "mover": mover.key(),
                "what": target.what.trim_end_matches(','),
                "value": finite(target.value),
                "is_met": target.is_met(),
            })
        })
    };
    json!({
        "load": course.load.word(),
        "link": course.road.word(),
        "movers": course.turns.iter().map(mover).collect::<Vec<Value>>(),
        "ratios": ratios,
        "targets": targets(course).into_iter().flat_map(target).collect::<Vec<Value>>(),
    })
}

fn method(options: &Options, version: &str) -> String {
    format!(
        "A Linux guest of {size} MiB with two vCPUs under TCG in QEMU {version} fills {fill} MiB. Then it touches none of \
         it (idle), or two threads write whole pages as fast as they can, checking each page before: random pages of \
         the first {hot} MiB (hot), all pages in order (sequential), or random ones of all (random). It is moved from \
         one QEMU to another on this machine, over loopback TCP, or (10g) through two network namespaces with a veth \
         pair shaped to {rate} Gbit/s (tbf, burst 4 MB, latency 1 ms). The guest's RAM is of the kind `{ram}` for every \
         mover. The movers take turns in each of {rounds} rounds, each with new processes and as much memory warmed \
         before. QEMU's movers have no bandwidth limit and a downtime limit of {downtime} ms, which is umem's default as \
         well; multifd has QEMU's default number of connections; postcopy-preempt after a pass switches over when QEMU's \
         second pass begins. A precopy of QEMU's that has not ended after {limit} s is cancelled, does not converge, and \
         gets no more turns with that load on that way. umem's passes end by its own rules. Total: from giving the \
         command (for umem: starting the process) until both sides report completion. Downtime: from the source's STOP \
         to the destination's RESUME, timestamps of QEMU's events for every mover. Work lost: seconds of the guest's \
         work, at its rate of the last two seconds before the command, that it did not get done from its last beat at the \
         source until the move had ended and it had printed {beats} beats (100 ms each) at the destination; `in all` \
         counts from the command on. Faults: those that waited for a page after the switch, by the mover's report \
         (umem: the count of its latencies; QEMU: postcopy-requests). p99 and max: first touches of pages in those beats at the \
         destination, as the guest measured them (the median of the beats' p99, and the largest). Sent: umem's page \
         contents and QEMU's ram.transferred, counted each time. Link: the rate of the bytes that left over the link, \
         headers included, but for the first and the last hundredth of them; its share is of the link's rate. CPU: user \
         and system time of both QEMUs and both umem processes between start and end, the guest's own computing \
         included; `without vCPUs` leaves out QEMU's vCPU threads. After each move the guest has checked all of its \
         memory: a wrong word fails the measurement. Ratios are of the same round, the median of the rounds'.",
        size = options.size,
        fill = options.fill,
        hot = options.hot,
        rate = options.rate,
        ram = ram_word(options.ram),
        rounds = options.rounds,
        downtime = DOWNTIME_LIMIT_MS,
        limit = options.limit,
        beats = BEATS_MIN,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A move whose figures are these.
    fn moved(total_s: f64, downtime_ms: f64, lost_s: f64, faults: u64) -> Option<Move> {
        Some(Move::example(total_s, downtime_ms, lost_s, faults))
    }

    fn course(load: LoadName, road: Road, turns: Vec<(Mover, Vec<Option<Move>>)>) -> Course {
        let turns = turns.into_iter().map(|(mover, moves)| Turns { mover, moves }).collect();
        Course { load, road, turns }
    }

    #[test]
    fn targets_of_a_hot_guest_are_ratios_of_the_same_round() {
        // The second round was slow for all; the ratios of medians would miss.
        let hot = course(
            LoadName::Hot,
            Road::Loopback,
            vec![
                (QEMU_HYBRID, vec![moved(9.0, 5.0, 3.0, 0), moved(9.0, 5.0, 30.0, 0)]),
                (POSTCOPY, vec![moved(1.0, 5.0, 2.0, 1000), moved(1.0, 10.0, 20.0, 4000)]),
                (HYBRID, vec![moved(2.0, 15.0, 0.9, 100), moved(2.0, 31.0, 9.0, 400)]),
            ],
        );
        let [(mover, targets)] = &targets(&hot)[..] else { panic!() };
        assert_eq!(*mover, HYBRID);
        let met: Vec<Option<bool>> = targets.iter().map(Target::is_met).collect();
        assert_eq!(met, [Some(true); 4], "{:?}", highlights(&hot));
        let text = &highlights(&hot)[0];
        for part in ["0.10 (at most 0.10: met)", "0.45 (at most 0.50: met)", "15.50 (at most 20"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }

    #[test]
    fn nothing_is_compared_with_work_that_was_not_lost() {
        let lost = |lost_s| moved(1.0, 1.0, lost_s, 0);
        let turns = vec![
            (POSTCOPY, vec![lost(-0.1), lost(0.5), lost(0.0)]),
            (HYBRID, vec![lost(0.3), lost(0.1), lost(0.3)]),
        ];
        let hot = course(LoadName::Hot, Road::Link, turns);
        assert!((hot.ratio(HYBRID, POSTCOPY, &LOST) - 0.2).abs() < 1e-9);
        assert!(hot.ratio(HYBRID, POSTCOPY, &FAULTS).is_nan());
        assert!((hot.difference(HYBRID, POSTCOPY, &LOST) - 0.3).abs() < 1e-9);
    }

    #[test]
    fn mover_that_does_not_converge_has_no_figures_and_no_ratio() {
        let idle = course(
            LoadName::Idle,
            Road::Link,
            vec![
                (MULTIFD, vec![moved(2.0, 300.0, 0.0, 0), None]),
                (PRECOPY, vec![moved(1.0, 100.0, 0.0, 0), moved(9.0, 120.0, 0.0, 0)]),
            ],
        );
        let rows = figures(&idle).rows;
        assert_eq!((rows[0][1].as_str(), rows[0][2].as_str()), ("does not converge", "–"));
        assert_eq!(rows[0].len(), rows[1].len());
        assert!(ratios(&idle).rows.is_empty());
        // Of the round in which both came to an end.
        let [(PRECOPY, targets)] = &targets(&idle)[..] else { panic!() };
        let met: Vec<Option<bool>> = targets.iter().map(Target::is_met).collect();
        assert_eq!(met, [None, Some(true), Some(true)]);
        assert!((targets[1].value - 0.5).abs() < 1e-9);
        assert!(highlights(&idle)[0].contains("not measured"));
    }

    #[test]
    fn courses_without_a_target_have_no_highlight() {
        let random =
            course(LoadName::Random, Road::Link, vec![(HYBRID, vec![moved(1.0, 1.0, 1.0, 1)])]);
        assert!(highlights(&random).is_empty());
        let hot = course(LoadName::Hot, Road::Link, vec![(PRECOPY, vec![moved(1.0, 1.0, 1.0, 1)])]);
        assert!(highlights(&hot).is_empty());
    }
}
