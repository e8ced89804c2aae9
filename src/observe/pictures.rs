//! The four pictures of a report: throughput over time, fault latencies, a map of the guest's memory, the phases.

use std::fmt::Write as _;

use super::recording::{CellRecord, MapRecord, Recording};
use super::svg::{Scale, Svg, number, ticks};
use crate::events::CUT;
use crate::statistics::Latency;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = WIDTH - 32.0;

/// Points of a curve: more could not be told apart.
const POINTS_MAX: f64 = 240.0;

/// A recording on the common clock of a report.
pub(super) struct Timed<'a> {
    pub(super) recording: &'a Recording,
    /// The offset of its seconds.
    shift_s: f64,
}

impl Timed<'_> {
    pub(super) fn at(&self, seconds: f64) -> f64 {
        seconds + self.shift_s
    }

    fn end(&self) -> f64 {
        self.at(self.recording.seconds)
    }
}

/// Puts recordings on one clock. The clock begins when the first side has a peer; before that both only wait.
pub(super) fn align(recordings: &[Recording]) -> Vec<Timed<'_>> {
    let first = |recording: &Recording| recording.phases.get(1).map_or(0.0, |span| span.begin_s);
    let unix = |recording: &Recording| recording.began_unix_ms as f64 / 1e3;
    let begin = recordings.iter().map(|r| unix(r) + first(r)).fold(f64::INFINITY, f64::min);
    let timed = |recording| Timed { recording, shift_s: unix(recording) - begin };
    recordings.iter().map(timed).collect()
}

/// A time axis below a drawing, with its grid.
fn time_axis(svg: &mut Svg, end_s: f64, top: f64, bottom: f64) -> Scale {
    let ticks: Vec<f64> = ticks(end_s, 8).into_iter().filter(|&tick| tick <= end_s).collect();
    let x = Scale::new([0.0, end_s], [LEFT, RIGHT]);
    for &tick in &ticks {
        svg.line([x.at(tick), top, x.at(tick), bottom], "grid");
        svg.text(x.at(tick), bottom + 16.0, "m", &number(tick));
    }
    svg.text(RIGHT, bottom + 32.0, "e", "seconds");
    x
}

/// A key below a drawing: the class and name of each colour.
fn key(svg: &mut Svg, y: f64, entries: &[(&str, &str)]) {
    let mut x = LEFT;
    for (class, name) in entries {
        svg.rectangle([x, y - 9.0, 14.0, 10.0], class, "");
        svg.text(x + 20.0, y, "i", name);
        x += 44.0 + 7.0 * name.chars().count() as f64;
    }
}

fn empty(what: &str, why: &str) -> String {
    let mut svg = Svg::new(WIDTH, 60.0, what);
    svg.text(WIDTH / 2.0, 34.0, "m", why);
    svg.finished()
}

/// Gbit/s of page contents, and of all pages with zeroes and holes; below, the number of waiting faults.
pub(super) fn throughput(timed: &Timed<'_>) -> String {
    const WHAT: &str = "Throughput over time";
    let (top, bottom, floor) = (12.0, 240.0, 310.0);
    let rates = rates(timed);
    if rates.is_empty() {
        return empty(WHAT, "The migration ended before the first measurement.");
    }
    let mut svg = Svg::new(WIDTH, floor + 64.0, WHAT);
    let x = time_axis(&mut svg, timed.end().max(1e-3), top, floor);
    let most = rates.iter().map(|rate| rate.all.max(rate.data)).fold(0.0, f64::max);
    let marks = ticks(most, 5);
    let y = Scale::new([0.0, marks[marks.len() - 1]], [bottom, top]);
    for &mark in &marks {
        svg.line([LEFT, y.at(mark), RIGHT, y.at(mark)], "grid");
        svg.text(LEFT - 6.0, y.at(mark) + 4.0, "e", &number(mark));
    }
    let curve = |value: fn(&Rate) -> f64| -> String {
        rates.iter().fold(String::new(), |mut d, rate| {
            let letter = if d.is_empty() { 'M' } else { 'L' };
            let _ = write!(d, "{letter}{:.1} {:.1}", x.at(rate.at_s), y.at(value(rate)));
            d
        })
    };
    let (data, all) = (curve(|rate| rate.data), curve(|rate| rate.all));
    let (first, last) = (x.at(rates[0].at_s), x.at(rates[rates.len() - 1].at_s));
    svg.path(&format!("{data}L{last:.1} {bottom:.1}L{first:.1} {bottom:.1}Z"), "area");
    svg.path(&all, "all");
    svg.path(&data, "rate");
    waiting(&mut svg, timed, x, [bottom + 16.0, floor]);
    let names = [
        ("bar", "Gbit/s of page contents"),
        ("key-all", "with zeroes and holes"),
        ("wait", "faults waiting"),
    ];
    key(&mut svg, floor + 54.0, &names);
    svg.finished()
}

/// Gbit/s in each interval, from its beginning to its end in seconds.
pub(super) fn steps(intervals: &[[f64; 3]]) -> String {
    const WHAT: &str = "Throughput in each interval";
    let Some(&[_, end, _]) = intervals.last() else {
        return empty(WHAT, "The test has no interval.");
    };
    let (top, bottom) = (12.0, 240.0);
    let mut svg = Svg::new(WIDTH, bottom + 40.0, WHAT);
    let x = time_axis(&mut svg, end.max(1e-3), top, bottom);
    let most = intervals.iter().map(|interval| interval[2]).fold(0.0, f64::max);
    let marks = ticks(most, 5);
    let y = Scale::new([0.0, marks[marks.len() - 1]], [bottom, top]);
    for &mark in &marks {
        svg.line([LEFT, y.at(mark), RIGHT, y.at(mark)], "grid");
        svg.text(LEFT - 6.0, y.at(mark) + 4.0, "e", &number(mark));
    }
    for &[begin, end, gbps] in intervals {
        let (left, up) = (x.at(begin), y.at(gbps));
        let width = (x.at(end) - left - 1.0).max(1.0);
        let title = format!("{begin:.2} to {end:.2} s: {gbps:.2} Gbit/s");
        svg.rectangle([left, up, width, bottom - up], "bar", &title);
    }
    svg.finished()
}

struct Rate {
    at_s: f64,
    data: f64,
    all: f64,
}

/// Rates between samples that are far enough apart for a meaningful rate.
fn rates(timed: &Timed<'_>) -> Vec<Rate> {
    let samples = &timed.recording.samples;
    let (Some(first), Some(last)) = (samples.first(), samples.last()) else { return Vec::new() };
    let step = ((last.at_s - first.at_s) / POINTS_MAX).max(0.01);
    let mut rates = vec![Rate { at_s: timed.at(first.at_s), data: 0.0, all: 0.0 }];
    let mut before = first;
    for sample in samples.iter().skip(1) {
        let seconds = sample.at_s - before.at_s;
        if seconds < step && sample.at_s < last.at_s || seconds <= 0.0 {
            continue;
        }
        let gbps = |bytes: u64| bytes as f64 * 8e-9 / seconds;
        let data = sample.crossed_data_bytes.saturating_sub(before.crossed_data_bytes);
        let all = sample.crossed_bytes.saturating_sub(before.crossed_bytes);
        rates.push(Rate { at_s: timed.at(sample.at_s), data: gbps(data), all: gbps(all) });
        before = sample;
    }
    rates
}

fn waiting(svg: &mut Svg, timed: &Timed<'_>, x: Scale, [top, bottom]: [f64; 2]) {
    let samples = &timed.recording.samples;
    let most = samples.iter().map(|sample| sample.faults_waiting).max().unwrap_or(0);
    svg.line([LEFT, bottom, RIGHT, bottom], "grid");
    svg.text(LEFT - 6.0, top + 8.0, "e", &most.to_string());
    svg.text(LEFT - 6.0, bottom, "e", "0");
    if most == 0 {
        return;
    }
    let y = Scale::new([0.0, most as f64], [bottom, top]);
    let mut d = format!("M{LEFT:.1} {bottom:.1}");
    for sample in samples {
        let at = (x.at(timed.at(sample.at_s)), y.at(sample.faults_waiting as f64));
        let _ = write!(d, "L{:.1} {:.1}", at.0, at.1);
    }
    let last = samples.last().map_or(LEFT, |sample| x.at(timed.at(sample.at_s)));
    svg.path(&format!("{d}L{last:.1} {bottom:.1}Z"), "wait");
}

/// Fault latencies over a logarithmic axis.
pub(super) fn latencies(faults: &[(f64, f64, u64)], latency: Option<&Latency>) -> String {
    const WHAT: &str = "Fault latencies";
    let (Some(first), Some(last)) = (faults.first(), faults.last()) else {
        return empty(WHAT, "This side measured no faults. The destination measures them.");
    };
    let (top, bottom) = (52.0, 268.0);
    let mut svg = Svg::new(WIDTH, bottom + 40.0, WHAT);
    let (from, to) = (first.0.log10().floor(), last.1.log10().ceil());
    let x = Scale::new([from, to], [LEFT, RIGHT]);
    let mut decade = from;
    while decade <= to {
        svg.line([x.at(decade), top, x.at(decade), bottom], "grid");
        svg.text(x.at(decade), bottom + 16.0, "m", &time(10_f64.powf(decade)));
        decade += 1.0;
    }
    let most = faults.iter().map(|&(_, _, count)| count).max().unwrap_or(0) as f64;
    let marks = ticks(most, 4);
    let y = Scale::new([0.0, marks[marks.len() - 1]], [bottom, top]);
    for &mark in &marks {
        svg.line([LEFT, y.at(mark), RIGHT, y.at(mark)], "grid");
        svg.text(LEFT - 6.0, y.at(mark) + 4.0, "e", &number(mark));
    }
    for &(low, high, count) in faults.iter().filter(|&&(_, _, count)| count > 0) {
        let (left, right) = (x.at(low.log10()), x.at(high.log10()));
        let up = y.at(count as f64);
        let title = format!("{} to {}: {count} faults", time(low), time(high));
        let width = (right - left - 1.0).max(1.0);
        svg.rectangle([left, up, width, (bottom - up).max(1.0)], "bar", &title);
    }
    let marks = latency.iter().flat_map(|l| [("p50", l.p50), ("p99", l.p99), ("max", l.max)]);
    for (row, (name, us)) in marks.enumerate() {
        let at = x.at((us.max(1) as f64).log10());
        let up = 12.0 + 15.0 * row as f64;
        svg.line([at, up, at, bottom], "mark");
        // On the side with room.
        let (at, class) = if at > RIGHT - 120.0 { (at - 4.0, "i e") } else { (at + 4.0, "i") };
        svg.text(at, up + 4.0, class, &format!("{name} {}", time(us as f64)));
    }
    svg.finished()
}

/// A time in its natural unit.
pub(super) fn time(us: f64) -> String {
    match us {
        us if us < 1e3 => format!("{} µs", number(us)),
        us if us < 1e6 => format!("{} ms", number(us / 1e3)),
        us => format!("{} s", number(us / 1e6)),
    }
}

/// Two maps of the guest's memory, side by side: how each part arrived, and when.
pub(super) fn map(timed: &Timed<'_>) -> String {
    const WHAT: &str = "A map of the guest's memory";
    let record = &timed.recording.map;
    if record.cells.is_empty() {
        return empty(WHAT, "The migration ended before the guest's size was known.");
    }
    let grid = Grid::new(record.cells.len());
    let bottom = 28.0 + grid.height();
    let mut svg = Svg::new(WIDTH, bottom + 56.0, WHAT);
    svg.text(LEFT, 16.0, "i", "How each part arrived");
    svg.text(LEFT + MAP_STEP, 16.0, "i", "When each part was complete");
    let how: Vec<&str> = (0..record.cells.len()).map(|index| how(record, index, timed)).collect();
    grid.draw(&mut svg, LEFT, 28.0, &how);
    let (first, last) = arrivals(&record.cells);
    let when = |(index, cell): (usize, &CellRecord)| match cell.complete_s {
        None if u64::from(cell.earlier) >= pages_of(record, index, timed) => "earlier",
        None => "missing",
        Some(at_s) => STEPS[Scale::new([first, last], [0.0, 7.49]).at(at_s).round() as usize],
    };
    let when: Vec<&str> = record.cells.iter().enumerate().map(when).collect();
    grid.draw(&mut svg, LEFT + MAP_STEP, 28.0, &when);
    let has_earlier = record.cells.iter().any(|cell| cell.earlier > 0);
    map_keys(&mut svg, bottom + 20.0, [timed.at(first), timed.at(last)], has_earlier);
    svg.finished()
}

const MAP_WIDTH: f64 = 416.0;
const MAP_STEP: f64 = MAP_WIDTH + 48.0;
const STEPS: [&str; 8] = ["w0", "w1", "w2", "w3", "w4", "w5", "w6", "w7"];

/// The colour of a cell in the first map.
fn how(record: &MapRecord, index: usize, timed: &Timed<'_>) -> &'static str {
    let cell = &record.cells[index];
    let came = u64::from(cell.demand)
        + u64::from(cell.background)
        + u64::from(cell.zero)
        + u64::from(cell.hole);
    if came + u64::from(cell.earlier) < pages_of(record, index, timed) {
        return "missing";
    }
    if u64::from(cell.earlier) > came {
        return "earlier";
    }
    match f64::from(cell.demand) / came.max(1) as f64 {
        share if share >= 0.5 => "demand3",
        share if share >= 0.1 => "demand2",
        share if share > 0.0 => "demand1",
        _ if cell.background >= cell.zero.max(cell.hole) => "data",
        _ if cell.zero >= cell.hole => "zero",
        _ => "hole",
    }
}

/// Pages of 4 KiB in a cell.
fn pages_of(record: &MapRecord, index: usize, timed: &Timed<'_>) -> u64 {
    let start = index as u64 * record.cell_bytes;
    timed.recording.total_bytes.saturating_sub(start).min(record.cell_bytes) / 4096
}

/// The times at which the first and the last cell were complete.
fn arrivals(cells: &[CellRecord]) -> (f64, f64) {
    let times = || cells.iter().filter_map(|cell| cell.complete_s);
    (times().fold(f64::INFINITY, f64::min).min(1e12), times().fold(0.0, f64::max))
}

/// `has_earlier`: an earlier process of the session has moved some of the memory.
fn map_keys(svg: &mut Svg, y: f64, [first, last]: [f64; 2], has_earlier: bool) {
    let demand =
        [("demand3", "on demand, half or more"), ("demand2", "a tenth"), ("demand1", "less")];
    let mut others = vec![("data", "background"), ("zero", "zeroes"), ("hole", "holes")];
    others.extend(has_earlier.then_some(("earlier", "before the takeover")));
    for (row, entries) in [&demand[..], &others].into_iter().enumerate() {
        key(svg, y + 18.0 * row as f64, entries);
    }
    let left = LEFT + MAP_STEP;
    for (index, class) in STEPS.iter().enumerate() {
        svg.rectangle([left + 20.0 * index as f64, y - 9.0, 20.0, 10.0], class, "");
    }
    svg.text(left + 170.0, y, "i", &format!("{first:.2} s to {last:.2} s"));
    svg.rectangle([left, y + 9.0, 14.0, 10.0], "missing", "");
    svg.text(left + 20.0, y + 18.0, "i", "has not arrived");
}

/// Cells row by row, about twice as wide as high.
struct Grid {
    cells: usize,
    columns: usize,
    side: f64,
}

impl Grid {
    fn new(cells: usize) -> Grid {
        let columns = ((2.0 * cells as f64).sqrt().ceil() as usize).max(1);
        Grid { cells, columns, side: MAP_WIDTH / columns as f64 }
    }

    fn height(&self) -> f64 {
        self.cells.div_ceil(self.columns) as f64 * self.side
    }

    /// One path for each colour; adjacent cells form one piece.
    fn draw(&self, svg: &mut Svg, left: f64, top: f64, classes: &[&str]) {
        let mut names: Vec<&str> = classes.to_vec();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let mut d = String::new();
            for (row, cells) in classes.chunks(self.columns).enumerate() {
                let mut column = 0;
                while column < cells.len() {
                    let same = cells[column..].iter().take_while(|&&class| class == name).count();
                    if same > 0 {
                        let x = left + column as f64 * self.side;
                        let (y, width) = (top + row as f64 * self.side, same as f64 * self.side);
                        let side = self.side;
                        let _ = write!(d, "M{x:.2} {y:.2}h{width:.2}v{side:.2}h-{width:.2}z");
                    }
                    column += same.max(1);
                }
            }
            svg.path(&d, name);
        }
    }
}

/// The phases of each side, one below the other.
pub(super) fn timeline(sides: &[Timed<'_>]) -> String {
    let row = 58.0;
    let bottom = 8.0 + row * sides.len() as f64;
    let mut svg = Svg::new(WIDTH, bottom + 72.0, "The phases");
    let end = sides.iter().map(Timed::end).fold(1e-3, f64::max);
    let x = time_axis(&mut svg, end, 8.0, bottom);
    for (index, side) in sides.iter().enumerate() {
        let top = 8.0 + row * index as f64;
        svg.text(LEFT, top + 12.0, "i", &side.recording.role);
        let mut free = LEFT;
        for span in &side.recording.phases {
            let (begin, end) = (side.at(span.begin_s), side.at(span.end_s));
            if end <= 0.0 {
                continue;
            }
            let left = x.at(begin);
            let width = (x.at(end) - left).max(1.5);
            let took = time((span.end_s - span.begin_s) * 1e6);
            let title = format!("{}: {took}", span.name);
            svg.rectangle([left, top + 18.0, width, 22.0], phase_class(&span.name), &title);
            // A name if it fits; the table has all names.
            let needs = 7.0 * span.name.chars().count() as f64 + 8.0;
            if width >= needs && left >= free {
                svg.text(left + 2.0, top + 53.0, "t", &span.name);
                free = left + needs;
            }
        }
    }
    let names = [
        ("phase", "prepares, or says goodbye"),
        ("still", "the guest stands still"),
        ("pages", "pages move behind the guest"),
        ("cut", "no connection"),
    ];
    key(&mut svg, bottom + 62.0, &names);
    svg.finished()
}

/// The class of a phase, by the guest's state in it.
fn phase_class(name: &str) -> &'static str {
    match name {
        "serving pages" | "receiving pages" => "pages",
        CUT => "cut",
        "connecting"
        | "connected"
        | "comparing regions"
        | "ready"
        | "completed"
        | "failed"
        | "waiting for a source"
        | "waiting for regions"
        | "preparing the guest"
        | "saying goodbye" => "phase",
        _ => "still",
    }
}

#[cfg(test)]
mod tests {
    use super::super::recording::{Sample, Span};
    use super::*;

    fn recording() -> Recording {
        let sample = |step: u32| Sample {
            at_s: 5.0 + f64::from(step) * 0.01,
            data_bytes: u64::from(step) << 20,
            crossed_data_bytes: u64::from(step) << 20,
            crossed_bytes: u64::from(step) << 20,
            faults_waiting: u64::from(step % 7),
            ..Sample::default()
        };
        let span = |name: &str, begin_s, end_s| Span { name: name.into(), begin_s, end_s };
        let cell = |demand, zero| CellRecord {
            demand,
            zero,
            complete_s: Some(5.5),
            ..CellRecord::default()
        };
        Recording {
            role: "destination".into(),
            began_unix_ms: 1_000_000,
            seconds: 6.0,
            total_bytes: 3 * 65536 + 4096,
            samples: (0..100).map(sample).collect(),
            phases: vec![span("waiting for a source", 0.0, 5.0), span("a < b", 5.0, 6.0)],
            map: MapRecord {
                cell_bytes: 65536,
                cells: vec![cell(16, 0), cell(2, 14), cell(0, 16), CellRecord::default()],
            },
            faults: vec![(64.0, 80.0, 10), (80.0, 96.0, 0), (96.0, 112.0, 3)],
            ..Recording::default()
        }
    }

    /// Checks that every coordinate of a drawing is inside it.
    fn check(svg: &str) {
        let view = svg.split("viewBox=\"0 0 ").nth(1).unwrap().split('"').next().unwrap();
        let (width, height) = view.split_once(' ').unwrap();
        let (width, height): (f64, f64) = (width.parse().unwrap(), height.parse().unwrap());
        for (attribute, most) in [("x", width), ("y", height), ("x1", width), ("y2", height)] {
            for value in svg.split(&format!(" {attribute}=\"")).skip(1) {
                let value: f64 = value.split('"').next().unwrap().parse().unwrap();
                assert!((0.0..=most).contains(&value), "{attribute}={value} of {most}");
            }
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(svg.ends_with("</svg>\n"));
    }

    #[test]
    fn pictures_stay_inside_and_begin_with_the_peer() {
        let recordings = [recording(), Recording { role: "source".into(), ..recording() }];
        let sides = align(&recordings);
        assert!(
            (sides[0].end() - 1.0).abs() < 1e-9,
            "the wait for a source is not part of the clock"
        );
        check(&throughput(&sides[0]));
        let latency = Latency { count: 13, p50: 70, p90: 100, p99: 101, p999: 102, max: 103 };
        check(&latencies(&recordings[0].faults, Some(&latency)));
        check(&map(&sides[0]));
        let timeline = timeline(&sides);
        check(&timeline);
        assert!(timeline.contains("a &lt; b") && !timeline.contains("waiting for a source"));
    }

    #[test]
    fn colour_of_a_cell_shows_how_it_arrived() {
        let recordings = [recording()];
        let sides = align(&recordings);
        let colours: Vec<_> = (0..4).map(|cell| how(&recordings[0].map, cell, &sides[0])).collect();
        assert_eq!(colours, ["demand3", "demand2", "zero", "missing"]);
    }

    #[test]
    fn failed_migration_has_pictures() {
        let recordings = [Recording::default()];
        let sides = align(&recordings);
        for picture in [steps(&[]), steps(&[[0.0, 1.0, 8.0], [1.0, 1.5, 0.0]])] {
            check(&picture);
        }
        for picture in
            [throughput(&sides[0]), latencies(&[], None), map(&sides[0]), timeline(&sides)]
        {
            check(&picture);
        }
    }

    /// The largest guest's map is drawn in pieces, not in cells.
    #[test]
    fn map_of_the_largest_guest_is_small() {
        let mut recording = recording();
        recording.total_bytes = 4096 << 20;
        let cell = CellRecord { background: 256, complete_s: Some(1.0), ..CellRecord::default() };
        recording.map = MapRecord { cell_bytes: 1 << 20, cells: vec![cell; 4096] };
        let recordings = [recording];
        assert!(map(&align(&recordings)[0]).len() < 16 << 10);
    }
}
