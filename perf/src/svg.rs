//! Plots: curves of distributions, and bars. A plot is data in a result's JSON, drawn on demand.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// The data of a plot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plot {
    pub(crate) title: String,
    pub(crate) unit: String,
    #[serde(flatten)]
    pub(crate) shape: Shape,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Shape {
    Curves(Vec<Curve>),
    Bars(Vec<Bar>),
}

/// A distribution: latency, and the share of accesses that took no longer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Curve {
    pub(crate) name: String,
    /// In ascending order.
    pub(crate) points: Vec<(f64, f64)>,
}

/// One bar, and the mark to compare it with: the floor, or a peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Bar {
    pub(crate) name: String,
    /// None if it could not be measured.
    pub(crate) value: Option<f64>,
    pub(crate) mark: Option<f64>,
}

impl Plot {
    pub(crate) fn curves(title: &str, unit: &str, curves: Vec<Curve>) -> Plot {
        Plot { title: title.into(), unit: unit.into(), shape: Shape::Curves(curves) }
    }

    pub(crate) fn bars(title: &str, unit: &str, bars: Vec<Bar>) -> Plot {
        Plot { title: title.into(), unit: unit.into(), shape: Shape::Bars(bars) }
    }

    fn drawn(&self) -> Drawing {
        match &self.shape {
            Shape::Curves(of) => curves(&self.title, &self.unit, of),
            Shape::Bars(of) => bars(&self.title, &self.unit, of),
        }
    }
}

/// One drawing of these plots, one below the other.
pub(crate) fn svg(plots: &[Plot]) -> String {
    let drawings: Vec<Drawing> = plots.iter().map(Plot::drawn).collect();
    let height: f64 = drawings.iter().map(|drawing| drawing.height).sum();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut top = 0.0;
    for drawing in &drawings {
        let _ = writeln!(svg, "<g transform=\"translate(0 {top})\">\n{}</g>", drawing.elements);
        top += drawing.height;
    }
    svg.push_str("</svg>\n");
    svg
}

/// Elements of SVG, and the room that they take.
struct Drawing {
    height: f64,
    elements: String,
}

const WIDTH: f64 = 960.0;
const MARGIN: f64 = 24.0;
const TITLE_HEIGHT: f64 = 40.0;
const PLOT_HEIGHT: f64 = 360.0;
const LINE_HEIGHT: f64 = 20.0;
const BAR_NAMES_WIDTH: f64 = 400.0;
const COLOURS: [&str; 8] =
    ["#0b6e99", "#d9730d", "#4d9b5b", "#9065b0", "#c14c8a", "#946c1c", "#5a6b7b", "#d44c47"];

impl Drawing {
    fn new(title: &str, height: f64) -> Drawing {
        let mut drawing = Drawing { height, elements: String::new() };
        drawing.text(MARGIN, 26.0, "start", title);
        drawing
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let text = umem::observe::page::escape(text);
        self.element(&format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    fn line(&mut self, [x1, y1, x2, y2]: [f64; 4], colour: &str) {
        self.element(&format!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\"/>"
        ));
    }

    fn rectangle(&mut self, [x, y, width, height]: [f64; 4], colour: &str) {
        self.element(&format!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
        ));
    }

    fn element(&mut self, element: &str) {
        self.elements.push_str(element);
        self.elements.push('\n');
    }
}

/// Curves over a logarithmic axis; the vertical axis is in nines, so that the slowest thousandth is
/// as visible as the median.
fn curves(title: &str, unit: &str, curves: &[Curve]) -> Drawing {
    let bottom = TITLE_HEIGHT + PLOT_HEIGHT;
    let legend = bottom + 2.0 * LINE_HEIGHT;
    let mut plot = Drawing::new(title, legend + LINE_HEIGHT * curves.len() as f64 + MARGIN);
    let values = || curves.iter().flat_map(|curve| &curve.points).map(|&(value, _)| value);
    let decade = |value: f64| value.max(1e-3).log10();
    let first = values().map(decade).fold(f64::INFINITY, f64::min).floor().min(3.0);
    let last = values().map(decade).fold(f64::NEG_INFINITY, f64::max).ceil().max(first + 1.0);
    let left = MARGIN + 56.0;
    let x = |value: f64| left + (decade(value) - first) / (last - first) * (WIDTH - MARGIN - left);
    // 0 % at the bottom, 99.99 % at the top, each nine as high as the one before.
    let nines = |share: f64| -(1.0 - share).max(1e-4).log10();
    let y = |share: f64| bottom - nines(share) / 4.0 * PLOT_HEIGHT;
    for (share, name) in
        [(0.0, "0"), (0.5, "p50"), (0.9, "p90"), (0.99, "p99"), (0.999, "p99.9"), (1.0, "p99.99")]
    {
        plot.line([left, y(share), WIDTH - MARGIN, y(share)], "#dddddd");
        plot.text(left - 6.0, y(share) + 4.0, "end", name);
    }
    let mut edge = first;
    while edge <= last {
        let value = 10_f64.powf(edge);
        plot.line([x(value), TITLE_HEIGHT, x(value), bottom], "#dddddd");
        plot.text(x(value), bottom + 16.0, "middle", &format!("{value}"));
        edge += 1.0;
    }
    plot.text(WIDTH - MARGIN, 26.0, "end", unit);
    for (index, curve) in curves.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let mut points = String::new();
        for &(value, share) in &curve.points {
            let _ = write!(points, "{:.1},{:.1} ", x(value), y(share));
        }
        plot.element(&format!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            points.trim_end()
        ));
        let line = legend + LINE_HEIGHT * index as f64;
        plot.rectangle([left, line - 10.0, 18.0, 10.0], colour);
        plot.text(left + 26.0, line, "start", &curve.name);
    }
    plot
}

/// Horizontal bars, with their marks.
fn bars(title: &str, unit: &str, bars: &[Bar]) -> Drawing {
    let row = LINE_HEIGHT + 8.0;
    let mut plot = Drawing::new(title, TITLE_HEIGHT + row * bars.len() as f64 + 2.0 * MARGIN);
    let most = bars.iter().flat_map(|bar| [bar.value, bar.mark]).flatten().fold(0.0, f64::max);
    let (left, right) = (BAR_NAMES_WIDTH, WIDTH - MARGIN - 60.0);
    let length = |value: f64| if most > 0.0 { value / most * (right - left) } else { 0.0 };
    for (index, bar) in bars.iter().enumerate() {
        let top = TITLE_HEIGHT + row * index as f64;
        plot.text(left - 8.0, top + 15.0, "end", &bar.name);
        let value = bar.value.unwrap_or(0.0);
        plot.rectangle([left, top, length(value), LINE_HEIGHT], COLOURS[0]);
        if let Some(mark) = bar.mark {
            let x = left + length(mark);
            plot.rectangle([x - 1.0, top - 3.0, 3.0, LINE_HEIGHT + 6.0], "#333333");
        }
        let end = left + length(value.max(bar.mark.unwrap_or(0.0)));
        let text = bar.value.map_or_else(|| "–".into(), |value| format!("{value:.1}"));
        plot.text(end + 8.0, top + 15.0, "start", &text);
    }
    plot.text(WIDTH - MARGIN, 26.0, "end", unit);
    plot
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plot_shows_every_subject_within_its_bounds() {
        let points = vec![(10.0, 0.1), (20.0, 0.5), (5000.0, 1.0)];
        let both = ["a < b", "c"].map(|name| Curve { name: name.into(), points: points.clone() });
        let text = svg(&[Plot::curves("Title", "µs", both.to_vec())]);
        assert_eq!(text.matches("<polyline").count(), 2);
        assert!(text.contains("a &lt; b") && text.ends_with("</svg>\n"));
        let ends = text.split("points=\"").skip(1).map(|rest| rest.split('"').next().unwrap());
        for point in ends.flat_map(|points| points.split(' ')) {
            let (x, y) = point.split_once(',').unwrap();
            let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
            assert!((0.0..=WIDTH).contains(&x), "{point}");
            assert!((TITLE_HEIGHT..=TITLE_HEIGHT + PLOT_HEIGHT).contains(&y), "{point}");
        }
    }

    #[test]
    fn longest_bar_or_mark_fills_the_width() {
        let bar = |value, mark| Bar { name: "x".into(), value: Some(value), mark };
        let text = bars("Title", "Gbit/s", &[bar(10.0, Some(20.0)), bar(5.0, None)]).elements;
        let width = (WIDTH - MARGIN - 60.0 - BAR_NAMES_WIDTH) / 2.0;
        assert!(text.contains(&format!("width=\"{width:.1}\"")), "{text}");
        assert!(text.contains(&format!("width=\"{:.1}\"", width / 2.0)), "{text}");
    }

    #[test]
    fn plots_are_stacked_and_survive_json() {
        let bar = Bar { name: "x".into(), value: Some(1.0), mark: None };
        let points = vec![(10.0, 0.1), (20.0, 1.0)];
        let curve = Curve { name: "y".into(), points };
        let plots = [Plot::bars("a", "s", vec![bar]), Plot::curves("b", "µs", vec![curve])];
        let json = serde_json::to_string(&plots).unwrap();
        let again: Vec<Plot> = serde_json::from_str(&json).unwrap();
        let text = svg(&again);
        assert_eq!(text, svg(&plots));
        let height = bars("a", "s", &[]).height + LINE_HEIGHT + 8.0;
        assert!(text.contains(&format!("translate(0 {height})")), "{text}");
    }
}
